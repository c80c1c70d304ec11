"""Study A: does the depth that a policy finds follow the depth that is needed?

    python -m experiments.studies.depth            # runs what is not there yet
    python -m experiments.studies.depth --table    # only shows the table

Tasks are `dots` that need 1 to 4 blocks. On a plateau nothing is gained until
the last one (of at most 3); in graded tasks each block up to the needed one
adds accuracy; in `none` there is nothing to be learned. Each finished cell
(task, arm, seed) is a line of results/depth.jsonl, and cells that are there are
skipped.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import scipy

from autogrow_jax import data
from autogrow_jax import policies
from autogrow_jax.data import paths
from autogrow_jax.run import config
from autogrow_jax.run import train

from .. import placebo
from .. import presets

PATH = pathlib.Path(__file__).parent / 'results' / 'depth.jsonl'
SEEDS = range(8)
GROWN = ('twin', 'periodic', 'sequential', 'convergent')
FIXED = (1, 2, 3, 4, 5)
# Task -> (data set, needed depth).
TASKS = {
    'plateau1': ('dots:3-4@8x8', 1),
    'plateau2': ('dots:7-8@8x16', 2),
    'plateau3': ('dots:10-12@8x24', 3),
    **{
        f'graded{n}': (
            'dots:'
            + ','.join(f'{4*k-1}-{4*k}' for k in range(1, n + 1))
            + f'@8x{8*n}',
            n,
        )
        for n in range(2, 5)
    },
    'none': ('dots:8-8@8x16', 1),
}
# Fixed before any seed was run: K, J, and growths in a row that may fail.
POLICY = config.PolicyConfig(
    interval=6, window=12, threshold='0.05', error_rate='0.05', patience=2,
    max_depths=(10,), max_epochs=84,
)
EPOCHS_OF_FIXED = 36

Cell = dict[str, Any]


def cells() -> Iterator[tuple[str, str, int]]:
  """Yields (task, arm, seed), the decisive arms first, seed by seed."""
  for arms in (('twin',), GROWN[1:], tuple(f'fixed{d}' for d in FIXED)):
    for seed in SEEDS:
      for task in TASKS:
        for arm in arms:
          yield task, arm, seed


def configuration(
    task: str, arm: str, seed: int, workdir: str
) -> config.RunConfig:
  """Returns the configuration of a cell."""
  run_config = dataclasses.replace(
      presets.get('dots'),
      workdir=workdir,
      data=data.DataConfig(TASKS[task][0]),
      seed=seed,
      checkpoints=config.CheckpointConfig(every='1000'),
  )
  if arm.startswith('fixed'):
    return dataclasses.replace(
        presets.fixed(run_config),
        network=dataclasses.replace(
            run_config.network, depths=(int(arm.removeprefix('fixed')),)
        ),
        schedule=dataclasses.replace(
            run_config.schedule, finetune_epochs=EPOCHS_OF_FIXED
        ),
    )
  return dataclasses.replace(
      run_config, policy=dataclasses.replace(POLICY, name=arm)
  )


def run(task: str, arm: str, seed: int) -> Cell:
  """Runs a cell: a grown network and its placebo, or a fixed network."""
  keys = 'test_accuracy', 'epochs', 'train_macs', 'wall_seconds'
  cell = {'task': task, 'needed': TASKS[task][1], 'arm': arm, 'seed': seed}
  with tempfile.TemporaryDirectory() as workdir:
    run_config = configuration(task, arm, seed, os.path.join(workdir, 'run'))
    dataset = data.load(run_config.data, seed=seed)
    result = train.run(run_config, dataset=dataset)
    (found,) = policies.parse_depths(result['found'])
    cell |= {'found': found} | {key: result[key] for key in keys}
    if arm in GROWN:
      cell |= placebo.run(run_config, dataset, result, 'yes')
  return cell


def read(path: pathlib.Path) -> list[Cell]:
  """Reads the finished cells."""
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def table(rows: Sequence[Cell]) -> str:
  """Returns depths and tests of all arms, as Markdown."""
  lines = [
      '| arm | ' + ' | '.join(TASKS) + ' |',
      '|---' * (1 + len(TASKS)) + '|',
  ]
  columns = {
      **{arm: (arm, 'found') for arm in GROWN},
      **{f'placebo, {arm}': (arm, 'placebo') for arm in GROWN},
      **{f'{arm}, test %': (arm, 'test_accuracy') for arm in GROWN},
      **{
          f'depth {d} fixed, test %': (f'fixed{d}', 'test_accuracy')
          for d in FIXED
      },
  }
  for title, (arm, key) in columns.items():
    texts = [_cell(_values(rows, task, arm, key), key) for task in TASKS]
    lines.append(f'| {title} | ' + ' | '.join(texts) + ' |')
  return '\n'.join([*lines, '', *map(lambda arm: _tests(rows, arm), GROWN)])


def _values(
    rows: Sequence[Cell], task: str, arm: str, key: str
) -> list[float]:
  """Returns a value of an arm on a task, by seed."""
  return [
      float(row[key]['found'] if key == 'placebo' else row[key])
      for row in sorted(rows, key=lambda row: row['seed'])
      if (row['task'], row['arm']) == (task, arm)
  ]


def _cell(values: Sequence[float], key: str) -> str:
  if not values:
    return ''
  if key == 'test_accuracy':
    return f'{np.mean(values):.1f}'
  return ' '.join(f'{value:.0f}' for value in values)


def _tests(rows: Sequence[Cell], arm: str) -> str:
  """Returns the tests of the claims about an arm, in a line.

  Spearman's correlation of found and needed depth over the tasks in which
  something is to be learned; and, but for `twin`, by an exact one-sided
  sign-flip test over seeds, the mean depth beyond that of the placebo.
  """
  grown = [r for r in rows if r['arm'] == arm and r['task'] != 'none']
  seeds = sorted({row['seed'] for row in grown})
  if len({row['needed'] for row in grown}) < 2 or len(seeds) < 2:
    return f'* {arm}: too few cells.'
  needed, found = zip(*((row['needed'], row['found']) for row in grown))
  rho = scipy.stats.spearmanr(needed, found)
  exact = sum(a == b for a, b in zip(needed, found))
  near = sum(a <= b <= a + 1 for a, b in zip(needed, found))
  text = (
      f'* {arm}: Spearman {rho.statistic:.2f} (p = {rho.pvalue:.1g}) over '
      f'{len(grown)} runs; found = needed in {exact}, at most one more in '
      f'{near}'
  )
  if arm == 'twin':  # Twins of a network that never grows are equal.
    return f'{text}.'
  beyond = [
      np.mean([
          row['found'] - float(row['placebo']['found'])
          for row in grown
          if row['seed'] == seed
      ])
      for seed in seeds
  ]
  flips = scipy.stats.permutation_test(
      (beyond,), np.mean, permutation_type='samples', alternative='greater'
  )
  return (
      f'{text}; beyond the placebo by {np.mean(beyond):.2f} blocks (sign-flip '
      f'over {len(seeds)} seeds, p = {flips.pvalue:.2g}).'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--table', action='store_true', help='only the table')
  parser.add_argument(
      '--results', type=pathlib.Path, default=PATH, help='file of the cells'
  )
  arguments = parser.parse_args()
  path = arguments.results
  if not arguments.table:
    train.cache_compilations(paths.local('~/.cache/autogrow_jax'))
    path.parent.mkdir(exist_ok=True)
    done = {(row['task'], row['arm'], row['seed']) for row in read(path)}
    for cell in cells():
      if cell not in done:
        row = run(*cell)
        jax.clear_caches()  # Hundreds of programs would stay in memory.
        with path.open('a') as file:
          file.write(json.dumps(row) + '\n')
  print(table(read(path)))


if __name__ == '__main__':
  main()
