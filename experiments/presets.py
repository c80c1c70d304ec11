"""Named configurations; every value can be overridden by a flag.

The rows of the paper's tables are in `paper.py`.
"""

import dataclasses

from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax.methods import autogrow
from autogrow_jax.methods.gauss_newton import method as gauss_newton
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.sparsify import method as sparsify
from autogrow_jax.run import config
from autogrow_jax.run import history as history_lib

from . import paper
from .studies import null_model

RunConfig = config.RunConfig

_PAPER = paper.defaults('digits')


def _widening(dataset: str) -> RunConfig:
  """Learned morphisms of VGG-19 from 16 channels in every layer."""
  return RunConfig(
      workdir='',
      data=data.DataConfig(dataset=dataset),
      network=config.NetworkConfig('vgg19', widths=(16,) * 5),
      policy=config.PolicyConfig('every', interval=10, max_epochs=150),
      method=gauss_newton.GaussNewton(),
      schedule=config.ScheduleConfig(
          learning_rate=0.1, growing='cosine', finetune_epochs=200
      ),
  )


def _widening_small(dataset: str) -> RunConfig:
  """The same within minutes on two cores."""
  full = _widening(dataset)
  return dataclasses.replace(
      full,
      data=data.DataConfig(
          dataset=dataset, holdout=2000, data_fraction='0.05'
      ),
      network=dataclasses.replace(full.network, depths=(1,) * 5),
      policy=dataclasses.replace(full.policy, interval=3, max_epochs=45),
      method=gauss_newton.GaussNewton(
          limits=selection.Limits(growth_cap=0.2)
      ),
      schedule=config.ScheduleConfig(
          learning_rate=0.05, growing='cosine', finetune_epochs=12
      ),
      batch_size=64,
  )


def _masking(
    dataset: str,
    network: config.NetworkConfig,
    sparsity: float,
    *,
    epochs: int,
    weight_decay: float = 1e-4,
    batch_size: int = 128,
    budget: str = 'params',
    image_size: int | None = None,
) -> RunConfig:
  """Channels by sampled masks, trained as the full network is."""
  return RunConfig(
      workdir='',
      data=data.DataConfig(dataset=dataset, image_size=image_size),
      network=network,
      policy=config.PolicyConfig('every', interval=1, max_epochs=epochs),
      method=sparsify.Sparsify(target_sparsity=sparsity, budget=budget),
      schedule=config.ScheduleConfig(growing='whole', finetune_epochs=0),
      optimizer=optimizers.SGD(weight_decay=weight_decay),
      batch_size=batch_size,
  )


def _masking_layers(
    dataset: str,
    network: config.NetworkConfig,
    *,
    epochs: int,
    finetune: int,
    batch_size: int = 128,
) -> RunConfig:
  """Channels and layers, within the depths that AutoGrow found."""
  run_config = _masking(
      dataset, network, 0.5, epochs=epochs, batch_size=batch_size
  )
  return dataclasses.replace(
      run_config,
      method=dataclasses.replace(
          run_config.method, grow='both', lambda1=1.0, lambda2=0.1
      ),
      schedule=dataclasses.replace(
          run_config.schedule, finetune_epochs=finetune
      ),
  )


def _masking_small() -> RunConfig:
  """One layer per resolution, on a tenth of Fashion-MNIST, for two cores.

  Masks have hundreds of steps where the paper gives them tens of thousands, so
  that their rate is a hundred times the paper's, and the last fifth of the run
  trains the last sample.
  """
  run_config = _masking(
      'fashion_mnist',
      config.NetworkConfig(
          'vgg16', depths=(1,) * 5, widths=(16, 32, 64, 64, 64)
      ),
      0.9,
      epochs=25,
      batch_size=64,
  )
  return dataclasses.replace(
      run_config,
      data=dataclasses.replace(
          run_config.data, holdout=2000, data_fraction='0.1'
      ),
      method=dataclasses.replace(
          run_config.method,
          mask=optimizers.AuxConfig(learning_rate=10.0),
          freeze=0.8,
      ),
  )


# Yuan et al. 2021. Budgets are those of their results; of ImageNet networks
# lengths, weight decay and batch size are our own choice.
_MASKING = {
    'vgg16_fashion_mnist_small': _masking_small(),
    'vgg16_cifar10': _masking(
        'cifar10', config.NetworkConfig('vgg16'), 0.95, epochs=160
    ),
    'resnet20_cifar10': _masking(
        'cifar10',
        config.NetworkConfig('basic3resnet', depths=(3, 3, 3), shortcut='A'),
        0.642,
        epochs=160,
    ),
    'wrn28_10_cifar10': _masking(
        'cifar10',
        config.NetworkConfig('wrn28_10'),
        0.9057,
        epochs=200,
        weight_decay=5e-4,
    ),
    'resnet50_imagenet': _masking(
        'imagenet2012',
        config.NetworkConfig('bottleneck4resnet', depths=(3, 4, 6, 3)),
        0.388,
        epochs=90,
        batch_size=256,
    ),
    # 73 and 83 % of the multiply-adds of the quarter and three quarters wide
    # network.
    'mobilenet_imagenet_small': _masking(
        'imagenet2012',
        config.NetworkConfig('mobilenet1', widths=(32, 64, 128, 256, 512)),
        0.7985,
        epochs=90,
        batch_size=256,
        weight_decay=4e-5,
        budget='macs',
        image_size=128,
    ),
    'mobilenet_imagenet_large': _masking(
        'imagenet2012',
        config.NetworkConfig('mobilenet1'),
        0.5251,
        epochs=90,
        batch_size=256,
        weight_decay=4e-5,
        budget='macs',
    ),
    'deeplab_voc': _masking(
        'voc/2012',
        config.NetworkConfig('deeplab'),
        0.498,
        epochs=50,
        batch_size=16,
        image_size=513,
    ),
    # The large network of Zaremba et al. 2014; its text is --dataset=text:PATH.
    'lstm_ptb': dataclasses.replace(
        _masking(
            'text:ptb',
            config.NetworkConfig('lstm2', keep=0.65),
            0.688,
            epochs=55,
            batch_size=20,
        ),
        optimizer=optimizers.SGD(
            momentum=0.0, weight_decay=0.0, clip_norm=10 / 35
        ),
    ),
    # The full spaces are what AutoGrow found; the budget is half of that.
    'basic3_layers_cifar10': _masking_layers(
        'cifar10',
        config.NetworkConfig('basic3resnet', depths=(42, 42, 42)),
        epochs=160,
        finetune=40,
    ),
    'plain3_layers_cifar10': _masking_layers(
        'cifar10',
        config.NetworkConfig('plain3net', depths=(23, 22, 22)),
        epochs=160,
        finetune=40,
    ),
    'bottleneck4_layers_imagenet': _masking_layers(
        'imagenet2012',
        config.NetworkConfig('bottleneck4resnet', depths=(6, 7, 3, 9)),
        epochs=90,
        finetune=20,
        batch_size=256,
    ),
    'plain4_layers_imagenet': _masking_layers(
        'imagenet2012',
        config.NetworkConfig('plain4net', depths=(5, 5, 5, 4)),
        epochs=90,
        finetune=20,
        batch_size=256,
    ),
}


PRESETS: dict[str, RunConfig] = {
    # A first run: minutes on two CPU cores.
    'digits': dataclasses.replace(
        _PAPER,
        data=data.DataConfig(dataset='digits'),
        policy=config.PolicyConfig(interval=1, window=4),
        schedule=config.ScheduleConfig(learning_rate=0.05, finetune_epochs=8),
        batch_size=64,
    ),
    # A task that no network of one block can learn, and one of three can.
    'dots': dataclasses.replace(
        _PAPER,
        data=data.DataConfig(dataset='dots:8-10@8x20'),
        network=config.NetworkConfig('basic1resnet'),
        policy=config.PolicyConfig(interval=3, window=6),
        schedule=config.ScheduleConfig(learning_rate=0.1, finetune_epochs=3),
        batch_size=64,
    ),
    # Two percent of Fashion-MNIST (1,160 images), sized for two CPU cores.
    'fashion_mnist_small': dataclasses.replace(
        _PAPER,
        data=data.DataConfig(
            dataset='fashion_mnist', holdout=2000, data_fraction='0.02'
        ),
        policy=config.PolicyConfig(interval=2, window=6),
        schedule=config.ScheduleConfig(finetune_epochs=12),
        batch_size=64,
    ),
    # Wen et al. 2020 on a data set.
    **{name: paper.defaults(name) for name in paper.DATASETS},
    # Lawton et al. 2024 grow VGG-19 on CIFAR; seed widths, phases and rates are
    # not known of them, and our own choice.
    **{f'vgg19_{name}': _widening(name) for name in ('cifar10', 'cifar100')},
    # One layer per resolution, and five percent of the images, for two cores.
    **{
        f'vgg19_{name}_small': _widening_small(name)
        for name in ('cifar10', 'cifar100')
    },
    **_MASKING,
}


def names() -> tuple[str, ...]:
  """All presets: those above, and the rows of the paper's tables."""
  return (*PRESETS, *paper.rows())


def get(name: str) -> RunConfig:
  """The configuration of a name.

  Args:
    name: one of `names`, or the path of a run's config.json.

  Returns:
    Its configuration; the work directory of a preset is empty.

  Raises:
    ValueError: if there is none of that name.
  """
  if name.endswith('.json'):
    stored = history_lib.read_json(name)
    if stored is None:
      raise ValueError(f'There is no configuration {name}.')
    return RunConfig.from_json(stored)
  if name in PRESETS:
    return PRESETS[name]
  if name not in paper.rows():
    raise ValueError(
        f'Unknown preset {name!r}; there are {", ".join(PRESETS)}, and rows of '
        'the paper such as table4/basic3resnet-cifar10; '
        '`python -m experiments.describe --presets` lists all.'
    )
  return paper.rows()[name].config


def fixed(run_config: RunConfig) -> RunConfig:
  """A configuration without growing."""
  method = run_config.method
  if not isinstance(method, autogrow.AutoGrow):
    method = autogrow.AutoGrow()  # It does nothing in a fixed network.
  return dataclasses.replace(
      run_config,
      policy=dataclasses.replace(run_config.policy, name='fixed'),
      method=method,
  )


def listing() -> str:
  """All presets as a table for people, with what the paper found."""
  header = (
      'preset', 'network', 'data', 'policy', 'K', 'J', 'initializer', 'floor',
      "paper's depth", "paper's test %",
  )
  lines = [header, *(_described(name) for name in names())]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = '\n'.join(
      '  '.join(
          cell.ljust(width) for cell, width in zip(line, widths, strict=True)
      ).rstrip()
      for line in lines
  )
  return f'{text}\n\n{paper.CAUTION}'


def _described(name: str) -> tuple[str, ...]:
  """The row of a preset in the listing."""
  run_config = get(name)
  network = networks.get(run_config.network.name)
  depths = run_config.network.depths or network.seed_depths
  policy = run_config.make_policy(depths)
  fraction = run_config.data.fraction
  part = '' if fraction == 1 else f'{100 * float(fraction):g} % of '
  grows = not isinstance(policy, policies.Fixed)
  has_window = isinstance(policy, (policies.Periodic, policies.Sequential))
  row = paper.rows().get(name)
  growing = run_config.schedule.growing
  appends = grows and isinstance(run_config.method, autogrow.AutoGrow)
  return (
      name,
      f'{network.name} {policies.format_depths(depths)}',
      part + run_config.data.dataset,
      run_config.policy.name
      + (f', {growing}' if growing != 'constant' else ''),
      str(run_config.interval) if grows else '-',
      str(run_config.policy.window) if has_window else '-',
      run_config.method.initializer if appends else '-',
      policies.format_depths(null_model.floor(policy).depths)
      if isinstance(policy, policies.RoundRobin)
      else '-',
      policies.format_depths(row.found) if row else '-',
      '-' if row is None or row.accuracy is None else f'{row.accuracy:.2f}',
  )
