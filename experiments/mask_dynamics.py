"""What mask variables do by themselves, on real architectures.

    python -m experiments.mask_dynamics

prints, for some settings of `Sparsify`, how much of the network its samples
have in the course of a run in which a fixed random gradient replaces that of
the task, see `studies.sparsify.dynamics`. It trains nothing and takes minutes.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax.methods.sparsify import method

from . import flags
from .studies.sparsify import dynamics

# Network, sparsity, and differences from the defaults.
_SETTINGS = (
    ('vgg16', 0.95, {'s_off': -3.0}),
    ('vgg16', 0.95, {'s_off': -4.0}),
    ('vgg16', 0.95, {'s_off': -5.0}),
    ('vgg16', 0.95, {'s_off': -5.0, 'kappa': 0.01}),
    ('vgg16', 0.95, {'s_off': -5.0, 'kappa': 0.05}),
    ('vgg16', 0.95, {'s_off': -7.0, 'kappa': 0.01}),
    ('vgg16', 0.95, {'s_off': -5.0, 'kappa': 0.01, 'temperature': 'global'}),
    ('vgg16', 0.95, {'kappa': 0.01}),
    ('resnet20', 0.642, {'s_off': -5.0, 'lambda_update': 'epoch'}),
    (
        'resnet20',
        0.642,
        {'s_off': -5.0, 'kappa': 0.1, 'lambda_update': 'epoch'},
    ),
    ('resnet20', 0.642, {'s_off': -5.0, 'kappa': 0.02}),
    ('resnet20', 0.642, {'kappa': 0.02}),
    *(
        (
            'resnet50',
            0.388,
            {
                's_off': -5.0,
                'kappa': 0.02,
                'lambda_update': update,
                'steps': 5005,
                'queries': 90,
            },
        )
        for update in ('epoch', 'step')
    ),
)


def full_size(name: str) -> networks.base.Architecture:
  """VGG-16 or ResNet-20 (option A) for CIFAR-10, ResNet-50 for ImageNet."""
  family, depths, options, image, classes = {
      'vgg16': ('vgg16', None, {}, 32, 10),
      'resnet20': ('basic3resnet', (3, 3, 3), {'shortcut': 'A'}, 32, 10),
      'resnet50': ('bottleneck4resnet', (3, 4, 6, 3), {}, 224, 1000),
  }[name]
  network = networks.get(family)
  return network.seed(
      depths or network.seed_depths,
      input_shape=(image, image, 3),
      classes=classes,
      options=options,
  )


def main() -> None:
  flags.run(_main, __doc__, _define)


def _define(arguments: Sequence[str]) -> None:
  del arguments
  absl_flags.DEFINE_integer(
      'steps', 391, 'Steps between two samples; 5005 for ResNet-50.'
  )
  absl_flags.DEFINE_integer('queries', 160, 'Samples; 90 for ResNet-50.')
  absl_flags.DEFINE_integer('seed', 0, 'Seed of samples and gradients.')


def _main() -> None:
  shown = [1, 2, 4, 8, 16, 40, 80, 120]
  print('percent of parameters after so many queries:')
  print(' '.join(f'{query:>5}' for query in [*shown, 'all']),
        'p >= 1/2  ambiguous  savings  setting')
  for network, sparsity, setting in _SETTINGS:
    changes = dict(setting)
    queries = changes.pop('queries', flags.FLAGS.queries)
    steps = changes.pop('steps', flags.FLAGS.steps)
    outer = {n: changes.pop(n) for n in ('s_off', 'kappa') if n in changes}
    simulated = dynamics.Setting(
        method.Sparsify(
            target_sparsity=sparsity,
            run=method.Run(queries, queries * steps),
            **changes,
        ),
        full_size(network),
        **outer,
    )
    course = dynamics.simulate(simulated, flags.FLAGS.seed)
    last = course[-1]
    print(
        ' '.join(
            f'{100 * course[query - 1].sampled:5.1f}'
            if query <= queries
            else '    -'
            for query in [*shown, queries]
        ),
        f'{100 * last.likely:8.1f} {100 * last.ambiguous:10.1f}',
        f'{costs.savings(1, [query.macs for query in course]):8.2f} ',
        network,
        ', '.join(f'{name}={value}' for name, value in setting.items()),
        flush=True,
    )


if __name__ == '__main__':
  main()
