"""Measures the time of growing, and how much of it is compilation.

    python -m benchmarks.growth                    # 12 growths, digits
    python -m benchmarks.growth --depths=32-32-32 --growths=3 --starts=first
    python -m benchmarks.growth --dataset=cifar10 --data_dir=DIR \
        --data_fraction=0.05 --interval=3 --starts=first

Runs of p-AutoGrow, each in a process of its own, by --starts: `first`, with an
empty compilation cache; `second`, the same again with the cache it left;
`waiting`, a first start that compiles nothing in advance; `exact`, one that
compiles for every exact depth as well.
"""

import os
import subprocess
import sys
import tempfile

from absl import flags

from autogrow_jax import data
from autogrow_jax import policies
from autogrow_jax.run import config
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import train

from benchmarks import common
from experiments import flags as run_flags

GROWTHS = flags.DEFINE_integer('growths', 12, 'Of each run.')
INTERVAL = flags.DEFINE_integer('interval', 1, 'Epochs between growths.')
DEPTHS = flags.DEFINE_string('depths', '1-1-1', 'Blocks per stage at first.')
WIDTHS = flags.DEFINE_string('widths', '16-32-64', 'Channels per stage.')
DATASET = flags.DEFINE_string('dataset', 'digits', 'Training data.')
DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where TFDS prepared them.')
FRACTION = flags.DEFINE_string('data_fraction', '1', 'Part to train on.')
BATCH = flags.DEFINE_integer('batch_size', 64, 'Images of a step.')
SETTINGS = (
    GROWTHS, INTERVAL, DEPTHS, WIDTHS, DATASET, DATA_DIR, FRACTION, BATCH
)
KINDS = ('first', 'second', 'waiting', 'exact')
STARTS = flags.DEFINE_list('starts', [*KINDS], 'Which runs.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Used by the benchmark itself.')
START = flags.DEFINE_string('start', None, 'Used by the benchmark itself.')
CACHE = flags.DEFINE_string('cache', None, 'Used by the benchmark itself.')


def main() -> None:
  if WORKDIR.value:
    _run(WORKDIR.value, CACHE.value, START.value)
    return
  if unknown := set(STARTS.value) - set(KINDS):
    raise ValueError(
        f'--starts are of {", ".join(KINDS)}, got {", ".join(unknown)}.'
    )
  starts = STARTS.value
  if 'second' in starts and 'first' not in starts[: starts.index('second')]:
    raise ValueError('--starts=second needs first before it.')
  figures = {}
  with tempfile.TemporaryDirectory() as directory:
    for name in starts:
      workdir = os.path.join(directory, name)
      shared = 'first' if name == 'second' else name
      done = subprocess.run(
          [
              sys.executable, '-m', 'benchmarks.growth', f'--workdir={workdir}',
              f'--cache={os.path.join(directory, shared)}-cache',
              f'--start={name}',
              *(
                  f'--{item.name}={item.value}'
                  for item in SETTINGS
                  if item.value is not None
              ),
          ],
          check=False,
          stdout=subprocess.DEVNULL,
      )
      if done.returncode:  # It has said why.
        sys.exit(done.returncode)
      figures[name] = _figures(workdir)
  base = figures[starts[0]]['compile_seconds']
  common.report(
      f'p-AutoGrow over {GROWTHS.value} growths from {DEPTHS.value}, widths '
      f'{WIDTHS.value}, {DATASET.value} ({FRACTION.value}), K = '
      f'{INTERVAL.value}',
      ('start', 'wall, s', 'compiling, s', 'of the first', 'waited, s',
       'train steps compiled', 'growing and compiling'),
      [
          (name, f'{item["wall_seconds"]:.1f}',
           f'{item["compile_seconds"]:.1f}',
           f'{100 * item["compile_seconds"] / base:.0f} %',
           f'{item["waited_seconds"]:.1f}',
           item['train_steps_compiled'],
           f'{100 * item["share"]:.1f} %')
          for name, item in figures.items()
      ],
      figures,
  )


def _run(workdir: str, cache: str, start: str) -> None:
  """One run, in a process of its own."""
  train.cache_compilations(cache)
  train.run(config.RunConfig(
      workdir=workdir,
      data=data.DataConfig(
          dataset=DATASET.value,
          data_dir=DATA_DIR.value,
          data_fraction=FRACTION.value,
      ),
      network=config.NetworkConfig(
          'basic3resnet',
          depths=policies.parse_depths(DEPTHS.value),
          widths=tuple(map(int, WIDTHS.value.split('-'))),
      ),
      policy=config.PolicyConfig(
          interval=INTERVAL.value,
          window=100 * INTERVAL.value,
          max_epochs=GROWTHS.value * INTERVAL.value + 1,
      ),
      devices=config.DeviceConfig(
          depth_buckets='exact' if start == 'exact' else 'powers',
          compile_ahead=start in ('first', 'second'),
      ),
      schedule=config.ScheduleConfig(learning_rate=0.05, finetune_epochs=1),
      batch_size=BATCH.value,
  ))


def _figures(workdir: str) -> dict[str, object]:
  """From a run's history and result."""
  result = train.read_result(workdir)
  records = history_lib.read(os.path.join(workdir, 'history.jsonl'))
  compiled = [item for item in records if item['event'] == 'compile']
  waited = sum(item.get('waited', item['seconds']) for item in compiled)
  grown = [item for item in records if item['event'] == 'grow']
  spent = waited + sum(item['seconds'] for item in grown)
  return {
      'wall_seconds': result['wall_seconds'],
      'compile_seconds': result['compile_seconds'],
      'compile_count': result['compile_count'],
      'waited_seconds': round(waited, 3),
      'train_steps_compiled': sum(
          item['what'].startswith('train step') for item in compiled
      ),
      'growths': len(grown),
      'share': min(1.0, spent / result['wall_seconds']),
  }


if __name__ == '__main__':
  run_flags.run(main, __doc__)
