"""Evaluates a finished run's network, from its directory alone.

    python -m experiments.evaluate --workdir=runs/demo --split=test
"""

from collections.abc import Sequence
import json
from typing import Any

from absl import flags as absl_flags

from autogrow_jax import data
from autogrow_jax.run import results
from autogrow_jax.run import trained

from . import flags


def main() -> None:
  flags.run(_main, __doc__, _define)


def _define(arguments: Sequence[str]) -> None:
  del arguments
  absl_flags.DEFINE_string(
      'workdir', None, 'Work directory of a finished run.', required=True
  )
  absl_flags.DEFINE_enum(
      'split', 'holdout', ['holdout', 'test'], 'Examples to evaluate on.'
  )


def _main() -> None:
  workdir, name = flags.FLAGS.workdir, flags.FLAGS.split
  network, result = finished(workdir)
  config = network.config
  dataset = data.load(config.data, seed=config.seed)
  split = dataset.holdout if name == 'holdout' else dataset.read_test()
  if not len(split.labels):
    raise ValueError(
        f'The run in {workdir} had no hold-out; use --split=test.'
    )
  score = network.score(split)
  print(
      json.dumps({
          'workdir': workdir,
          'found': result['found'],
          'split': name,
          'select_on': config.data.select_on,
          'protocol': config.protocol,
          'correct': score.correct,
          'total': score.total,
          'loss': score.loss,
          'accuracy': score.accuracy,
          **score.metrics,
      })
  )


def finished(workdir: str) -> tuple[trained.TrainedNetwork, dict[str, Any]]:
  """Loads the network of a run that has ended, and its result."""
  result, network = results.read_result(workdir), trained.load(workdir)
  if result is None:
    raise ValueError(
        f'The run in {workdir} has not ended (epoch {network.epoch}); '
        'start its command again to continue it.'
    )
  return network, result


if __name__ == '__main__':
  main()
