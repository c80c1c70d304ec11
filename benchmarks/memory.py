"""Memory of a training step as compiled, without and with rematerialisation.

    python -m benchmarks.memory
    python -m benchmarks.memory --networks=vgg16 --batch_size=64

Each network is laid out as in a run that does not grow; `growing` has stacks
with spare room (`--depth_buckets=powers`). Compiled bytes are of one device,
the batch included and a data set left out; kept ones are what the backward pass
reads of the forward pass, without compiling: `--nocompile` shows them alone.
"""

from absl import flags
import jax.numpy as jnp

from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import view
from autogrow_jax.run import console

from benchmarks import common
from benchmarks import steps
from experiments import flags as run_flags

NETWORKS = flags.DEFINE_list(
    'networks',
    ['basic3resnet:3-3-3', 'basic3resnet:9-9-9', 'vgg16'],
    'Families, with depths or their own.',
)
BATCH = flags.DEFINE_integer('batch_size', 128, 'Images of a step.')
LAYOUTS = flags.DEFINE_list(
    'layouts', ['fixed', 'growing'], 'Of them: fixed, growing.'
)
COMPILE = flags.DEFINE_bool('compile', True, 'Compile and time the steps.')
SHAPE, CLASSES = (32, 32, 3), 10


def main() -> None:
  batch = steps.noise(SHAPE, CLASSES, BATCH.value)
  figures, kept = {}, {}
  for text in NETWORKS.value:
    name, _, depths = text.partition(':')
    network = networks.get(name)
    architecture = network.seed(
        policies.parse_depths(depths) if depths else network.seed_depths,
        input_shape=SHAPE,
        classes=CLASSES,
        options={},
    )
    for kind in LAYOUTS.value:
      layout = view.layout(architecture, spare=kind == 'growing')
      kept[f'{text} {kind}'] = tuple(
          steps.kept_bytes(layout, BATCH.value, dtype)
          for dtype in (jnp.float32, jnp.bfloat16)
      )
      if not COMPILE.value:
        continue
      figures |= {
          f'{text} {kind}, {remat}': figure
          for remat, figure in _measure(
              architecture, batch, spare=kind == 'growing'
          ).items()
      }
  common.report(
      f'Kept for the backward pass, batch {BATCH.value}',
      ('network', 'float32', 'bfloat16', 'ratio'),
      [
          (name, *(f'{console.format_count(size)}B' for size in sizes),
           f'{sizes[1] / sizes[0]:.3f}')
          for name, sizes in kept.items()
      ],
      {'kept': kept},
  )
  if not COMPILE.value:
    return
  common.report(
      f'Memory of a training step, batch {BATCH.value}',
      ('network, remat', 'compiled', 'of none',
       'ms, median (range)', 'time of none'),
      [
          (name, f'{console.format_count(item["compiled"])}B',
           f'{item["memory_of_none"]:.2f}', item['milliseconds'],
           f'{item["time_of_none"]:.2f}')
          for name, item in figures.items()
      ],
      figures | {'kept': kept},
  )


def _measure(architecture, batch, *, spare):
  """Figures without and with rematerialisation of all stages."""
  chosen = {
      'none': frozenset(), 'all': frozenset(range(len(architecture.stages)))
  }
  runs = {
      name: steps.training(architecture, batch, spare=spare, remat=remat)
      for name, remat in chosen.items()
  }
  spreads = common.in_turn(
      {name: step.run for name, step in runs.items()}, common.REPEATS.value
  )
  return {
      name: {
          'compiled': step.bytes,
          'memory_of_none': step.bytes / runs['none'].bytes,
          'milliseconds': spreads[name],
          'time_of_none': spreads[name].median / spreads['none'].median,
      }
      for name, step in runs.items()
  }


if __name__ == '__main__':
  run_flags.run(main, __doc__)
