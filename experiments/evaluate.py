"""Evaluates a finished run's network, from its directory alone.

    python -m experiments.evaluate --workdir=runs/demo --split=test
"""

import json

from absl import flags as absl_flags

from autogrow_jax import data
from autogrow_jax.run import results
from autogrow_jax.run import trained
from experiments import flags

WORKDIR = absl_flags.DEFINE_string(
    'workdir', None, 'Work directory of a finished run.', required=True
)
SPLIT = absl_flags.DEFINE_enum(
    'split', 'holdout', ['holdout', 'test'], 'Examples to evaluate on.'
)


def main() -> None:
  result = results.read_result(WORKDIR.value)
  network = trained.load(WORKDIR.value)
  if result is None:
    raise ValueError(
        f'The run in {WORKDIR.value} has not ended (epoch {network.epoch}); '
        'start its command again to continue it.'
    )
  config = network.config
  dataset = data.load(config.data, seed=config.seed)
  split = dataset.holdout if SPLIT.value == 'holdout' else dataset.read_test()
  if not len(split.labels):
    raise ValueError(
        f'The run in {WORKDIR.value} had no hold-out; use --split=test.'
    )
  score = network.score(split)
  print(
      json.dumps({
          'workdir': WORKDIR.value,
          'found': result['found'],
          'split': SPLIT.value,
          'select_on': config.data.select_on,
          'protocol': config.protocol,
          'correct': score.correct,
          'total': score.total,
          'loss': score.loss,
          'accuracy': score.accuracy,
          **score.metrics,
      })
  )


if __name__ == '__main__':
  flags.run_main(main)
