"""Named configurations; every value can be overridden by a flag."""

import dataclasses

from autogrow_jax import config
from autogrow_jax import data
from autogrow_jax import logs
from autogrow_jax import optimizers

RunConfig = config.RunConfig

# Wen et al. 2020 on small images: K = 3, J = 100, tau = 0.05, N = 200.
_PAPER = RunConfig(
    workdir='',
    policy=config.PolicyConfig(interval=3, window=100, threshold='0.05'),
    schedule=config.ScheduleConfig(finetune_epochs=200),
    optimizer=optimizers.OptimizerConfig(weight_decay=5e-4),
    batch_size=128,
)

PRESETS: dict[str, RunConfig] = {
    # A first run: minutes on two CPU cores.
    'digits': dataclasses.replace(
        _PAPER,
        data=data.DataConfig(dataset='digits'),
        policy=config.PolicyConfig(interval=1, window=4),
        schedule=config.ScheduleConfig(learning_rate=0.05, finetune_epochs=8),
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
    **{
        name: dataclasses.replace(_PAPER, data=data.DataConfig(dataset=name))
        for name in ('mnist', 'fashion_mnist', 'cifar10')
    },
}


def get(name: str) -> RunConfig:
  """The configuration of a name.

  Args:
    name: a key of `PRESETS`, or the path of a run's config.json.

  Returns:
    Its configuration; the work directory of a preset is empty.

  Raises:
    ValueError: if there is none of that name.
  """
  if name.endswith('.json'):
    stored = logs.read_json(name)
    if stored is None:
      raise ValueError(f'There is no configuration {name}.')
    return RunConfig.from_json(stored)
  if name not in PRESETS:
    raise ValueError(
        f'Unknown preset {name!r}; there are {", ".join(PRESETS)}.'
    )
  return PRESETS[name]


def fixed(run_config: RunConfig) -> RunConfig:
  """A configuration without growing."""
  return dataclasses.replace(
      run_config,
      policy=dataclasses.replace(run_config.policy, name='fixed'),
  )
