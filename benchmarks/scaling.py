"""What a growing run costs: a model, its constants, and how well it predicts.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --large=12-12-12 --batch_size=64

Measures training steps, compilations, growths and checkpoints of small
networks, fits the constants of the model in docs/scaling.md to them, and
compares what it says of a larger network (--large) with what that one takes.
Then predicts a run of p-AutoGrow on ImageNet on other machines, which are
assumptions: --devices of --rate multiply-adds per second each in training, and
--link bytes per second between them.
"""

from collections.abc import Sequence
import dataclasses
import tempfile

from absl import flags
import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.run import checkpoint

from benchmarks import common
from benchmarks import steps
from experiments import flags as run_flags

Architecture = architecture_lib.Architecture

SMALL = flags.DEFINE_list(
    'small', ['1-1-1', '2-2-2', '3-3-3', '5-5-5'],
    'Depths of Basic3ResNet that the constants are fitted to.',
)
LARGE = flags.DEFINE_string('large', '9-9-9', 'Depths to predict.')
BATCH = flags.DEFINE_integer('batch_size', 64, 'Images of a step.')
FOUND = flags.DEFINE_string(
    'found', '12-12-11-9', 'Depths that the ImageNet run ends at.'
)
INTERVAL = flags.DEFINE_integer('interval', 3, 'Its epochs between growths.')
FINETUNE = flags.DEFINE_integer('finetune_epochs', 90, 'Its last epochs.')
GLOBAL_BATCH = flags.DEFINE_integer('global_batch', 256, 'Its images per step.')
DEVICES = flags.DEFINE_list('devices', ['8', '256'], 'Devices of the machines.')
RATE = flags.DEFINE_list(
    'rate', ['3e13', '3e13'],
    'Multiply-adds per second of one of their devices, in training.',
)
LINK = flags.DEFINE_list(
    'link', ['2e11', '5e10'], 'Bytes per second between their devices.'
)
_IMAGES = 1_231_167  # ImageNet without its hold-out.
# What is measured of a network -> what it grows with.
_QUANTITIES = {
    'step': 'macs',
    'compiling': 'segments',
    'growing': 'bytes',
    'saving': 'bytes',
}


@dataclasses.dataclass(frozen=True)
class Line:
  """Seconds that grow with a quantity: base + slope * quantity."""

  base: float
  slope: float

  @classmethod
  def fit(cls, quantities: Sequence[float], seconds: Sequence[float]) -> 'Line':
    """Least squares of relative errors, with no constant below zero."""
    x, y = np.asarray(quantities, float), np.asarray(seconds, float)
    table = np.stack([1 / y, x / y], axis=1)
    base, slope = np.linalg.lstsq(table, np.ones_like(y), rcond=None)[0]
    if base < 0:
      base, slope = 0.0, float(np.mean(y / x))
    if slope < 0:
      base, slope = float(np.mean(y)), 0.0
    return cls(float(base), float(slope))

  def __call__(self, quantity: float) -> float:
    return self.base + self.slope * quantity


@dataclasses.dataclass(frozen=True)
class Case:
  """What is known of a network, and measured of it, in seconds.

  Attributes:
    macs: multiply-adds of a step, forward and backward.
    segments: runs of equal blocks, and single parts, that are compiled.
    bytes: of the state.
    step: of training.
    compiling: the training step.
    growing: by one block, until the grown state is on the device.
    saving: a checkpoint.
  """

  macs: int
  segments: int
  bytes: int
  step: float
  compiling: float
  growing: float
  saving: float


def main() -> None:
  cases = [_measure(depths) for depths in SMALL.value]
  lines = {
      name: Line.fit(
          [getattr(case, quantity) for case in cases],
          [getattr(case, name) for case in cases],
      )
      for name, quantity in _QUANTITIES.items()
  }
  large = _measure(LARGE.value)
  common.report(
      f'Seconds of Basic3ResNet-{LARGE.value}, batch {BATCH.value}, predicted '
      f'from {", ".join(SMALL.value)}',
      ('', 'base', 'per', '', 'predicted', 'measured', 'predicted / measured'),
      [
          (name, f'{line.base:.3g}', f'{line.slope:.3g}', quantity,
           f'{line(getattr(large, quantity)):.3g}',
           f'{getattr(large, name):.3g}',
           f'{line(getattr(large, quantity)) / getattr(large, name):.2f}')
          for (name, quantity), line in zip(
              _QUANTITIES.items(), lines.values(), strict=True
          )
      ],
      {
          'cases': [dataclasses.asdict(case) for case in cases],
          'lines': {
              name: dataclasses.asdict(line) for name, line in lines.items()
          },
          'large': dataclasses.asdict(large),
      },
  )
  print(f'\np-AutoGrow of Basic4ResNet to {FOUND.value} on ImageNet, K = '
        f'{INTERVAL.value}, {FINETUNE.value} epochs at the end; predicted')
  for machine in zip(DEVICES.value, RATE.value, LINK.value, strict=True):
    print('  ' + _predict(lines, *map(float, machine)))


def _measure(depths: str) -> Case:
  """Times everything of one network."""
  architecture = _architecture(depths)
  batch = steps.noise((32, 32, 3), 10, BATCH.value)
  step = steps.training(architecture, batch)
  tx = optimizers.make(
      optimizers.SGD(), aux=None, top_rate=0.1
  )
  state = state_lib.create_state(architecture, tx, key=jax.random.key(0))
  change = state_lib.append(architecture, [0])

  def grow():
    grown, _ = state_lib.grow(state, change, tx, key=jax.random.key(1))
    layout = view.layout(change.architecture, spare=True)
    jax.block_until_ready(jax.device_put(view.pack(grown, layout)))

  with tempfile.TemporaryDirectory() as directory:
    checkpoints = checkpoint.Checkpoints(directory, keep=1)
    numbers = iter(range(1000))

    def save():
      checkpoints.save(
          next(numbers), {'state': state}, architecture.to_json()
      )

    spreads = common.in_turn(
        {'step': step.run, 'growing': grow, 'saving': save},
        common.REPEATS.value,
    )
  return Case(
      macs=_training_macs(architecture, BATCH.value),
      segments=len(view.layout(architecture).bucket),
      bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
      compiling=step.compile_seconds,
      **{name: spread.median for name, spread in spreads.items()},
  )


def _architecture(depths: str) -> Architecture:
  return networks.get('basic3resnet').seed(
      policies.parse_depths(depths),
      input_shape=(32, 32, 3),
      classes=10,
      options={},
  )


def _training_macs(architecture: Architecture, images: int) -> int:
  return costs.Ledger().trained(costs.macs(architecture), images).train_macs


def _predict(
    lines: dict[str, Line], devices: float, rate: float, link: float
) -> str:
  """One line about a run on ImageNet.

  Args:
    lines: the model; the base of a step, which is this machine's, is left out.
    devices: number of them.
    rate: multiply-adds per second of each, in training.
    link: bytes per second between them.

  Returns:
    The line.
  """
  architecture = networks.get('basic4resnet').seed(
      (1, 1, 1, 1), input_shape=(224, 224, 3), classes=1000, options={}
  )
  found = policies.parse_depths(FOUND.value)
  per_epoch = _IMAGES // GLOBAL_BATCH.value
  training = compiling = growing = saving = 0.0
  buckets, growths = set(), 0
  while True:
    layout = view.layout(architecture, spare=True)
    if layout.bucket not in buckets:
      buckets.add(layout.bucket)
      compiling += lines['compiling'](len(layout.bucket))
    is_last = architecture.depths == found
    size = 8.0 * costs.params(architecture)  # With momentum, float32.
    epochs = FINETUNE.value if is_last else INTERVAL.value
    step = _training_macs(architecture, GLOBAL_BATCH.value) / devices / rate
    step += size * (devices - 1) / devices / link  # Gradients, there and back.
    training += epochs * per_epoch * step
    saving += epochs * lines['saving'](size)
    if is_last:
      break
    growing += lines['growing'](size)
    growths += 1
    stage = min(
        (stage for stage, depth in enumerate(architecture.depths)
         if depth < found[stage]),
        key=lambda stage: (architecture.depths[stage], stage),
    )
    architecture = architecture.with_block(stage)
  total = training + compiling + growing + saving
  return (
      f'{devices:g} devices of {rate:g}/s, link {link:g}: '
      f'{total / 3600:.1f} h; of it {growths} growths {growing:.0f} s, '
      f'{len(buckets)} compilations {compiling:.0f} s, checkpoints '
      f'{saving:.0f} s: '
      f'{100 * (growing + compiling) / total:.2f} % is growing and compiling'
  )


if __name__ == '__main__':
  run_flags.run(main, __doc__)
