"""Grows the depth of a network while it trains (Wen et al., KDD 2020).

    python -m experiments.autogrow                      # digits, minutes
    python -m experiments.autogrow --preset=cifar10 --data_dir=DIR
"""

from collections.abc import Mapping
import dataclasses
import os
import sys
from typing import Any

from absl import flags as absl_flags

from autogrow_jax import config
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import dry_run
from autogrow_jax import logs
from autogrow_jax import policies
from autogrow_jax import results
from autogrow_jax import session
from autogrow_jax import train
from experiments import flags
from experiments import presets
from experiments import summary

FIELDS = {**flags.GROWING_FLAGS, **flags.RUN_FLAGS}

flags.define(FIELDS)
COMPARE = absl_flags.DEFINE_list(
    'compare',
    ['seed'],
    'Fixed networks to train from scratch at equal training cost: seed, found, '
    "both (seed,found) or '' for none.",
)
DRY_RUN = absl_flags.DEFINE_bool(
    'dry_run',
    False,
    'Walk the whole growth schedule on one batch: shapes, memory, compilations,'
    ' a checkpoint saved and restored; no training.',
)

NEXT = """
Next: other policies on this very run, without training:
    python -m experiments.replay --curve=WORKDIR/history.jsonl --stop_window=8
its network on the test set, from its directory alone:
    python -m experiments.evaluate --workdir=WORKDIR --split=test
and real images, once TFDS has prepared them:
    python -m experiments.autogrow --preset=fashion_mnist_small"""


def main() -> None:
  flags.use_compilation_cache()
  run_config = flags.make_config(FIELDS)
  if run_config.policy.name == 'fixed':
    raise ValueError(
        '--policy is periodic or convergent; fixed networks are '
        "experiments.baseline's."
    )
  if unknown := set(COMPARE.value) - {'seed', 'found'}:
    raise ValueError(
        f'--compare names seed, found or both, not {", ".join(unknown)}.'
    )
  if DRY_RUN.value:
    walk(run_config)
    return
  dataset = data.load(run_config.data, seed=run_config.seed)
  result = train.run(run_config, dataset=dataset)
  comparisons = [
      (f'{name}, fixed', compare(run_config, dataset, result, name))
      for name in COMPARE.value
  ]
  if comparisons:
    results.add_comparisons(run_config.workdir, dict(comparisons))
  print(summary.of_run(result, run_config.workdir, comparisons))
  if run_config.data.dataset == 'digits':
    print(NEXT.replace('WORKDIR', run_config.workdir))


def compare(
    run_config: config.RunConfig,
    dataset: data.Dataset,
    result: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:
  """Trains a fixed network from scratch at a grown one's training cost.

  Args:
    run_config: of the grown network.
    dataset: its data.
    result: its result.
    name: 'seed' or 'found', the depths to train.

  Returns:
    The fixed network's result.
  """
  resolved = train.resolve(run_config, dataset)
  depths = (
      resolved.network.depths
      if name == 'seed'
      else policies.parse_depths(result['found'])
  )
  fixed = dataclasses.replace(
      presets.fixed(resolved),
      workdir=os.path.join(run_config.workdir, f'fixed-{name}'),
      network=dataclasses.replace(resolved.network, depths=depths),
      init_from=None,
  )
  macs = costs.macs(session.seed_architecture(fixed, dataset))
  images = len(dataset.train.labels) // fixed.batch_size * fixed.batch_size
  epoch_cost = costs.Ledger().trained(macs, images).train_macs
  epochs = max(1, round(result['train_macs'] / epoch_cost))
  print(
      f'for comparison: {policies.format_depths(depths)}, fixed, {epochs} '
      'epochs at equal training cost',
      file=sys.stderr,
      flush=True,
  )
  return train.run(
      dataclasses.replace(
          fixed,
          schedule=dataclasses.replace(fixed.schedule, finetune_epochs=epochs),
      ),
      dataset=dataset,
  )


def walk(run_config: config.RunConfig) -> None:
  """Prints a dry run."""
  print(
      'epoch  depths        parameters  multiply-adds  peak memory  compiling  '
      'loss on one batch'
  )
  stops = []
  for stop in dry_run.walk(run_config):
    stops.append(stop)
    print(
        f'{stop.epoch:5}  {policies.format_depths(stop.depths):12}  '
        f'{logs.format_count(stop.params):>10}  '
        f'{logs.format_count(stop.macs):>13}  '
        f'{logs.format_count(stop.memory):>10}B  '
        f'{stop.compile_seconds:7.1f} s  {stop.loss:.3f}',
        flush=True,
    )
  seconds = sum(stop.compile_seconds for stop in stops)
  print(
      f'{len(stops)} architectures compiled in {seconds:.0f} s; the checkpoint '
      'of the last one was saved and restored. A run without progress ends '
      'there.'
  )


if __name__ == '__main__':
  flags.run_main(main)
