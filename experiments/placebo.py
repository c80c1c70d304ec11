"""The control of a grown result: the same run of a network that never grows.

The policy sees the learning curve of the seed network, at each of its decisions
to grow nothing happens, and in the end it has "found" a depth nevertheless. A
depth found by growing is evidence only beyond that.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import scipy

from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import policies
from autogrow_jax.data import dots
from autogrow_jax.methods import autogrow
from autogrow_jax.run import config
from autogrow_jax.run import history
from autogrow_jax.run import resolve
from autogrow_jax.run import results
from autogrow_jax.run import train

Result = Mapping[str, Any]

CHOICES = ('auto', 'yes', 'no')
HELP = (
    'Repeat the run with a network that never grows, in WORKDIR/placebo, and '
    'report what depth the policy finds there. auto does so for dots, and '
    'where it takes less than a fifth of the training cost.'
)
_SHARE = 0.2  # Largest part of the run's cost that auto pays.
_LEVEL = 0.001  # Of the verdict's test.


def run(
    run_config: config.RunConfig,
    dataset: data.Dataset,
    result: Result,
    choice: str,
) -> dict[str, Any]:
  """Runs the placebo of a finished run, and adds it to the run's result.

  Args:
    run_config: configuration of the run.
    dataset: its data.
    result: its result.
    choice: one of `CHOICES`.

  Returns:
    `placebo` for the result; nothing where none is run.
  """
  resolved = resolve.resolve(run_config, dataset)
  seed = resolve.seed_architecture(resolved, dataset)
  policy = resolved.make_policy(seed.depths)
  # The placebo takes about as many epochs, of the seed.
  size = resolved.batch_size
  images = len(dataset.train.labels) // size * size * result['epochs']
  cost = costs.Ledger().trained(costs.macs(seed), images).train_macs
  is_cheap = cost < _SHARE * result['train_macs']
  if choice == 'auto' and (is_cheap or dots.is_one(dataset.name)):
    choice = 'yes'
  if choice != 'yes' or not isinstance(policy, policies.RoundRobin):
    return {}
  workdir = pathlib.Path(run_config.workdir, 'placebo')
  placebo = train.run(
      dataclasses.replace(
          run_config,
          workdir=os.fspath(workdir),
          method=autogrow.Placebo(),
          devices=dataclasses.replace(run_config.devices, compile_ahead=False),
      ),
      dataset=dataset,
  )
  found = list(seed.depths)
  for record in history.read(workdir / 'history.jsonl'):
    if record['event'] == 'back':  # Nothing helps, and all is taken back.
      found = list(seed.depths)
    for stage in record.get('stages', ()):
      found[stage] += 1
  keys = 'epochs', 'test_accuracy', 'train_macs'
  control = {
      'found': policies.format_depths(found),
      **{key: placebo[key] for key in keys},
  }
  results.add(run_config.workdir, placebo=control)
  return {'placebo': control}


def verdict(result: Result) -> str:
  """Says if the grown network is better than the one that never grew.

  Fisher's exact test of two accuracies, one-sided. Both are of the same images,
  which makes it err on the safe side.
  """
  total, placebo = result['test_total'], result['placebo']
  right = [
      round(item['test_accuracy'] / 100 * total) for item in (result, placebo)
  ]
  p = scipy.stats.fisher_exact(
      [right, [total - count for count in right]], 'greater'
  ).pvalue
  if p > _LEVEL:
    return f'no evidence that growing helped (exact test, p = {p:.2g})'
  return f'growing helped (exact test, p = {max(p, 1e-300):.1g})'
