"""How much of an epoch is not the network's own step.

    python -m benchmarks.epoch

Trains fixed networks on images in memory, as a run does (batches, meters,
progress, records), and compares their pace with the bare compiled step on a
batch of the same size.
A perceptron, whose step takes next to nothing, shows what input, metrics and
Python take where nothing hides them: they are done while the device computes,
so that a step that takes longer does not wait.
"""

import contextlib
import io
import os
import tempfile

from absl import flags

from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax.run import config
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import train

from benchmarks import common
from benchmarks import steps
from experiments import flags as run_flags

DEPTHS = flags.DEFINE_string('depths', '1-1-1', 'Blocks of the larger one.')
BATCH = flags.DEFINE_integer('batch_size', 128, 'Images of a step.')
IMAGES = flags.DEFINE_integer('images', 2560, 'Of an epoch.')
SHAPE, CLASSES = (32, 32, 3), 10


def main() -> None:
  cases = {
      f'Basic3ResNet-{DEPTHS.value}': (
          'basic3resnet', policies.parse_depths(DEPTHS.value), None
      ),
      'perceptron, 8 units': ('mlp', (1, 1), (8, 8)),
  }
  found = {name: _measure(*case) for name, case in cases.items()}
  common.report(
      f'Training steps, batch {BATCH.value}, {IMAGES.value} images in memory',
      ('', 'bare, ms, median (range)', 'in a run', 'not the step'),
      [
          (name, item['bare'], item['in_run'],
           f'{item["rest"]:.2f} ms, {100 * item["share"]:.1f} %')
          for name, item in found.items()
      ],
      found,
  )


def _measure(
    network: str, depths: tuple[int, ...], widths: tuple[int, ...] | None
) -> dict[str, object]:
  """Paces of one network, alone and in a run."""
  size = BATCH.value
  images, labels = steps.noise(SHAPE, CLASSES, IMAGES.value + size)
  preprocessing = data.Preprocessing(
      mean=(0.5,) * 3, std=(0.25,) * 3, crop=4, flip=True
  )
  dataset = data.from_arrays(
      images, labels, images[:size], labels[:size],
      holdout=size, seed=0, preprocessing=preprocessing, name='noise',
  )
  architecture = networks.get(network).seed(
      depths,
      input_shape=SHAPE,
      classes=CLASSES,
      options={} if widths is None else {'widths': widths},
  )
  step = steps.training(architecture, (images[:size], labels[:size]))
  bare = common.in_turn({'step': step.run}, 5 * common.REPEATS.value)['step']
  known = config.NetworkConfig(network, depths=depths, widths=widths)
  in_run = _pace(known, dataset)
  rest = in_run.median - bare.median
  return {
      'bare': bare, 'in_run': in_run, 'rest': 1e3 * rest,
      'share': rest / in_run.median,
  }


def _pace(
    network: config.NetworkConfig, dataset: data.Dataset
) -> common.Spread:
  """Seconds of a step in the epochs of a run."""
  with tempfile.TemporaryDirectory() as workdir:
    with contextlib.redirect_stdout(io.StringIO()):
      train.run(
          config.RunConfig(
              workdir=workdir,
              network=network,
              policy=config.PolicyConfig('fixed'),
              schedule=config.ScheduleConfig(
                  learning_rate=1e-3, finetune_epochs=common.REPEATS.value + 1
              ),
              batch_size=BATCH.value,
          ),
          dataset=dataset,
      )
    records = history_lib.read(os.path.join(workdir, 'history.jsonl'))
  paces = [
      BATCH.value / record['images_per_second']
      for record in records
      if record['event'] == 'epoch'
  ][1:]
  return common.Spread.of(paces)


if __name__ == '__main__':
  run_flags.run(main, __doc__)
