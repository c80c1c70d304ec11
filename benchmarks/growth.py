"""What growing costs: compilations, pauses, and a second start.

    python -m benchmarks.growth                    # 12 growths, digits
    python -m benchmarks.growth --growths=24

Runs of p-AutoGrow on the embedded digits, one block in every epoch: one with
an empty compilation cache, and the same again with the cache it left. The pause
of a growth is what passes between the last step before it and the first one
after, without the evaluation of the epoch and the receipt's forward passes.
"""

import os
import subprocess
import sys
import tempfile

from absl import flags

from autogrow_jax import config
from autogrow_jax import data
from autogrow_jax import logs
from autogrow_jax import train
from benchmarks import common
from experiments import flags as run_flags

GROWTHS = flags.DEFINE_integer('growths', 12, 'Of each run.')
WIDTHS = flags.DEFINE_string('widths', '16-32-64', 'Channels per stage.')
CACHE = flags.DEFINE_string('cache', None, 'Used by the benchmark itself.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Used by the benchmark itself.')


def main() -> None:
  if WORKDIR.value:
    _run(WORKDIR.value, CACHE.value)
    return
  with tempfile.TemporaryDirectory() as directory:
    cache = os.path.join(directory, 'cache')
    figures = {}
    for name in ('first start', 'second start'):
      workdir = os.path.join(directory, name.replace(' ', '-'))
      subprocess.run(
          [
              sys.executable, '-m', 'benchmarks.growth', f'--workdir={workdir}',
              f'--cache={cache}', f'--growths={GROWTHS.value}',
              f'--widths={WIDTHS.value}',
          ],
          check=True,
          stdout=subprocess.DEVNULL,
      )
      figures[name] = _figures(workdir)
  first = figures['first start']['compile_seconds']
  common.report(
      f'p-AutoGrow over {GROWTHS.value} growths, digits, '
      f'widths {WIDTHS.value}',
      ('', 'wall, s', 'compiling, s', 'of the first', 'train steps compiled',
       'growing and compiling', 'median pause, s'),
      [
          (name, f'{item["wall_seconds"]:.1f}',
           f'{item["compile_seconds"]:.1f}',
           f'{100 * item["compile_seconds"] / first:.0f} %',
           item['train_steps_compiled'],
           f'{100 * item["share"]:.0f} %', f'{item["pause"].median:.2f}')
          for name, item in figures.items()
      ],
      figures,
  )


def _run(workdir: str, cache: str) -> None:
  """One run, in a process of its own."""
  train.cache_compilations(cache)
  train.run(config.RunConfig(
      workdir=workdir,
      data=data.DataConfig(dataset='digits'),
      network=config.NetworkConfig(
          'basic3resnet', widths=tuple(map(int, WIDTHS.value.split('-')))
      ),
      policy=config.PolicyConfig(
          interval=1, window=100, max_epochs=GROWTHS.value + 1
      ),
      schedule=config.ScheduleConfig(learning_rate=0.05, finetune_epochs=1),
      batch_size=64,
  ))


def _figures(workdir: str) -> dict[str, object]:
  """From a run's history and result."""
  result = train.read_result(workdir)
  records = logs.read(os.path.join(workdir, 'history.jsonl'))
  pauses, rebuilding, growing = [], 0.0, None
  steps = 0
  for record in records:
    if record['event'] == 'grow':
      growing = record['seconds']
      rebuilding += record['seconds']
    elif record['event'] == 'compile' and record['what'] == 'train step':
      steps += 1
      if growing is not None:
        growing += record['seconds']
    elif record['event'] == 'epoch' and growing is not None:
      pauses.append(growing)
      growing = None
  spent = result['compile_seconds'] + rebuilding
  return {
      'wall_seconds': result['wall_seconds'],
      'compile_seconds': result['compile_seconds'],
      'compile_count': result['compile_count'],
      'train_steps_compiled': steps,
      'growths': result['growths'],
      'share': min(1.0, spent / result['wall_seconds']),
      'pause': common.Spread.of(pauses),
  }


if __name__ == '__main__':
  run_flags.run_main(main)
