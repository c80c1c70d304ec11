"""Masked networks: what is saved on paper, and on the clock.

    python -m benchmarks.compact
    python -m benchmarks.compact --network=vgg16 --density=0.1,0.3

One training step of `Sparsify` at several densities, with the masks of a random
sample, executed masked (everything computed) and compact (what is there, widths
rounded up), beside the full network without masks.
"""

from absl import flags
import numpy as np

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax.methods.sparsify import method as sparsify
from autogrow_jax.methods.sparsify import space as space_lib

from benchmarks import common
from benchmarks import steps
from experiments import flags as run_flags

NETWORK = flags.DEFINE_string('network', 'basic3resnet', 'A family.')
BATCH = flags.DEFINE_integer('batch_size', 128, 'Images of a step.')
DENSITY = flags.DEFINE_list(
    'density', ['0.1', '0.3', '0.6'], 'Parts of the channels that are there.'
)
SHAPE, CLASSES = (32, 32, 3), 10


def main() -> None:
  network = networks.get(NETWORK.value)
  depths = (3, 3, 3) if NETWORK.value == 'basic3resnet' else network.seed_depths
  architecture = network.seed(
      depths, input_shape=SHAPE, classes=CLASSES, options={}
  )
  batch = steps.noise(SHAPE, CLASSES, BATCH.value)
  space = space_lib.of(architecture, 'channels')
  runs = {'full': steps.training(architecture, batch)}
  macs = {}
  for density in map(float, DENSITY.value):
    on = {
        name: np.arange(architecture.size(name))
        < max(1, round(density * architecture.size(name)))
        for name, _ in space.groups
    }
    counts = {
        axis: int(on[name].sum())
        for name, axes in space.groups
        for axis in axes
    }
    for backend in ('masked', 'compact'):
      name = f'{density:g} {backend}'
      runs[name] = steps.training(
          architecture,
          batch,
          method=sparsify.Sparsify(backend=backend),
          memory=lambda memory, on=on: {
              **memory, 'q': {**memory['q'], 'channels': on}
          },
      )
      macs[name] = costs.macs(architecture, counts)
  spreads = common.in_turn(
      {name: step.run for name, step in runs.items()}, common.REPEATS.value
  )
  full, macs['full'] = spreads['full'].median, costs.macs(architecture)
  figures = {
      name: {
          'milliseconds': spread,
          'saved_clock': full / spread.median,
          'saved_macs': macs['full'] / macs[name],
          'compile_seconds': runs[name].compile_seconds,
      }
      for name, spread in spreads.items()
  }
  common.report(
      f'Masks on {architecture}, batch {BATCH.value}',
      ('channels', 'ms, median (range)', 'saved, clock',
       'saved, multiply-adds', 'clock / multiply-adds', 'compile, s'),
      [
          (name, item['milliseconds'], f'{item["saved_clock"]:.2f}x',
           f'{item["saved_macs"]:.2f}x',
           f'{item["saved_clock"] / item["saved_macs"]:.2f}',
           f'{item["compile_seconds"]:.1f}')
          for name, item in figures.items()
      ],
      figures,
  )


if __name__ == '__main__':
  run_flags.run(main, __doc__)
