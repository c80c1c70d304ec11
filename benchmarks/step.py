"""A training step beside the same network in PyTorch.

    python -m benchmarks.step
    python -m benchmarks.step --precision=bfloat16 --out=step.json

Basic3ResNet-3-3-3 on 32x32 colour images: forward, backward and the update of
SGD with momentum; ours with augmentation and preprocessing, theirs on images
that are already floats on the device. PyTorch is optional:

    pip install '.[bench]'
"""

from absl import flags

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax import policies

from benchmarks import common
from benchmarks import steps
from experiments import flags as run_flags

DEPTHS = flags.DEFINE_string('depths', '3-3-3', 'Blocks per stage.')
BATCH = flags.DEFINE_integer('batch_size', 128, 'Images of a step.')
PRECISION = flags.DEFINE_enum(
    'precision', 'float32', ['float32', 'bfloat16'], 'Of activations.'
)
COMPILE = flags.DEFINE_bool(
    'torch_compile', False, 'Time torch.compile with automatic mixed precision '
    'as well.'
)
SHAPE, CLASSES = (32, 32, 3), 10


def main() -> None:
  depths = policies.parse_depths(DEPTHS.value)
  architecture = networks.get('basic3resnet').seed(
      depths, input_shape=SHAPE, classes=CLASSES, options={}
  )
  batch = steps.noise(SHAPE, CLASSES, BATCH.value)
  ours = steps.training(architecture, batch, precision=PRECISION.value)
  runs = {'autogrow_jax': ours.run}
  try:
    from benchmarks import torch_resnet  # pylint: disable=g-import-not-at-top
  except ModuleNotFoundError:
    print("PyTorch is not installed: pip install '.[bench]' to compare.")
  else:
    runs['PyTorch, eager'] = torch_resnet.training(depths, batch)
    if COMPILE.value:
      runs['PyTorch, compiled, mixed precision'] = torch_resnet.training(
          depths, batch, compiled=True
      )
  spreads = common.in_turn(runs, common.REPEATS.value)
  macs = 3 * costs.macs(architecture) * BATCH.value
  seconds = spreads['autogrow_jax'].median
  common.report(
      f'Training step of Basic3ResNet-{DEPTHS.value}, batch {BATCH.value}, '
      f'{PRECISION.value}',
      ('', 'ms, median (range)', 'G multiply-adds/s', 'ours / this'),
      [
          (name, spread, f'{macs / spread.median / 1e9:.1f}',
           f'{seconds / spread.median:.2f}')
          for name, spread in spreads.items()
      ],
      {'spreads': spreads, 'compile_seconds': ours.compile_seconds},
  )


if __name__ == '__main__':
  run_flags.run(main, __doc__)
