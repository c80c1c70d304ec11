"""How much of an epoch is not the network's own step.

    python -m benchmarks.epoch

Trains a fixed network on images in memory, as a run does (batches, meters,
progress, records), and compares its pace with the bare compiled step on a batch
of the same size.
"""

import os
import tempfile

from absl import flags
import numpy as np

from autogrow_jax import config
from autogrow_jax import data
from autogrow_jax import logs
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import train
from benchmarks import common
from benchmarks import steps
from experiments import flags as run_flags

DEPTHS = flags.DEFINE_string('depths', '1-1-1', 'Blocks per stage.')
BATCH = flags.DEFINE_integer('batch_size', 128, 'Images of a step.')
IMAGES = flags.DEFINE_integer('images', 2560, 'Of an epoch.')
SHAPE, CLASSES = (32, 32, 3), 10


def main() -> None:
  depths, size = policies.parse_depths(DEPTHS.value), BATCH.value
  images, labels = steps.noise(SHAPE, CLASSES, IMAGES.value + size)
  preprocessing = data.Preprocessing(
      mean=(0.5,) * 3, std=(0.25,) * 3, crop=4, flip=True
  )
  dataset = data.from_arrays(
      images, labels, images[:size], labels[:size],
      holdout=size, seed=0, preprocessing=preprocessing, name='noise',
  )
  with tempfile.TemporaryDirectory() as workdir:
    train.run(
        config.RunConfig(
            workdir=workdir,
            network=config.NetworkConfig('basic3resnet', depths=depths),
            policy=config.PolicyConfig('fixed'),
            schedule=config.ScheduleConfig(
                finetune_epochs=common.REPEATS.value + 1
            ),
            batch_size=size,
        ),
        dataset=dataset,
    )
    records = logs.read(os.path.join(workdir, 'history.jsonl'))
  paces = [
      size / record['images_per_second']
      for record in records
      if record['event'] == 'epoch'
  ][1:]
  architecture = networks.get('basic3resnet').seed(
      depths, input_shape=SHAPE, classes=CLASSES, options={}
  )
  step = steps.training(architecture, (images[:size], labels[:size]))
  bare = common.in_turn({'step': step.run}, 5 * common.REPEATS.value)['step']
  in_run = common.Spread.of(paces)
  share = 1 - bare.median / in_run.median
  common.report(
      f'Basic3ResNet-{DEPTHS.value}, batch {size}, {IMAGES.value} images in '
      'memory',
      ('', 'ms per step, median (range)', 'share'),
      [
          ('bare step', bare, f'{100 * (1 - share):.1f} %'),
          ('in a run', in_run, '100 %'),
          ('input, metrics, Python', '', f'{100 * share:.1f} %'),
      ],
      {'bare': bare, 'in_run': in_run, 'share': float(np.round(share, 4))},
  )


if __name__ == '__main__':
  run_flags.run_main(main)
