"""Resolving: a configuration with every default filled in, and checked.

Everything that depends on the data and on the devices at hand is decided here.
"""

import dataclasses
import pathlib
from typing import Any

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import tasks
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import history
from autogrow_jax.run import parallel as parallel_lib
from autogrow_jax.run import settings
from autogrow_jax.run import trained

Architecture = architecture_lib.Architecture
RunConfig = config_lib.RunConfig


def resolve(
    config: RunConfig,
    dataset: data.Dataset,
    task: tasks.Task | None = None,
) -> RunConfig:
  """Fills in every default, and checks what depends on data and devices.

  Args:
    config: a configuration that may leave things open.
    dataset: the data.
    task: task in place of the one that the labels belong to.
  """
  if config.data.select_on != dataset.select_on:
    raise ValueError(
        f'The data are divided to decide on {dataset.select_on}, but the '
        f'configuration has select_on={config.data.select_on}; set '
        f'data.select_on to {dataset.select_on}, or divide the data anew.'
    )
  network = networks.get(config.network.name)
  if config.paper_compat and config.network.bn_scale_init is None:
    config = _with_paper_scales(config, dataset)
  if config.init_from is not None:
    network_config = _from_origin(config, config.init_from, dataset)
    config = dataclasses.replace(config, network=network_config)
  architecture = seed_architecture(config, dataset)
  option: dict[str, Any] = dict(architecture.options)
  task = task or tasks.of_labels(dataset.train.labels)
  task.check(
      architecture.family,
      networks.label_shape(architecture),
      dataset.train.labels,
  )
  _check_sizes(config, dataset)
  _check_devices(config, task)
  rate, name = config.schedule.learning_rate, config.network.name
  return settings.replace(config, {
      'network.name': name if ':' in name else network.name,
      'network.depths': architecture.depths,
      **{
          f'network.{name}': option.get(name)
          for name in config.network.options()
          if name not in ('widths', 'embedding')  # Which are sizes.
      },
      'data.holdout': _known_holdout(dataset),
      'data.digest': dataset.digest,
      'policy.interval': config.interval,
      'schedule.learning_rate': network.learning_rate if rate is None else rate,
  })


def seed_architecture(
    config: RunConfig, dataset: data.Dataset
) -> Architecture:
  """The architecture that a configuration starts from."""
  network = networks.get(config.network.name)
  if network.inputs != dataset.preprocessing.kind:
    raise ValueError(
        f'{network.title} takes {network.inputs}, but {dataset.name} has '
        f'{dataset.preprocessing.kind}; choose another --network or --dataset.'
    )
  return network.seed(
      config.network.depths or network.seed_depths,
      input_shape=dataset.input_shape,
      classes=dataset.classes,
      options=_network_options(config),
  )


def _network_options(config: RunConfig) -> dict[str, Any]:
  """The options for `Network.seed`; a batch has a row for every stream."""
  options = config.network.options()
  if networks.get(config.network.name).inputs == 'tokens':
    options['streams'] = config.batch_size
  return options


def _check_sizes(config: RunConfig, dataset: data.Dataset) -> None:
  """Refuses batches and data that the meters or steps can't count."""
  examples = len(dataset.train.labels)
  if config.batch_size > examples:
    raise ValueError(
        f'batch_size {config.batch_size} is larger than the training data '
        f'({examples} examples); take at most {examples}.'
    )
  if dataset.train.labels.size >= 2**32:
    raise ValueError(
        f'An epoch has {dataset.train.labels.size} labels, but must have fewer '
        'than 2**32: take a smaller --data.image_size or --data.data_fraction.'
    )


def _check_devices(config: RunConfig, task: tasks.Task) -> None:
  """Refuses devices that cannot do what is asked of them."""
  parallel = parallel_lib.make(
      config.devices.parallel, config.devices.num_devices
  )
  count = len(parallel.devices)
  if config.batch_size % count:
    raise ValueError(
        f'batch_size {config.batch_size} cannot be split evenly among '
        f'{count} devices; take a multiple of {count}, or another '
        '--num_devices.'
    )
  is_divided = parallel.mode == 'pmap' and count > 1
  if task.is_stateful and is_divided:
    raise ValueError(
        'In pmap mode statistics are averaged over devices, but each stream of '
        'text has a state of its own; use --parallel=jit for text.'
    )
  if task.is_stateful and config.devices.precision != 'float32':
    raise ValueError(
        f'Text is computed in float32, got {config.devices.precision}; leave '
        'out --devices.precision.'
    )


def _known_holdout(dataset: data.Dataset) -> int | None:
  """Size of a hold-out by which the same data are divided the same way."""
  if dataset.select_on != 'holdout' or dataset.is_text:
    return None
  asked = dataset.asked_holdout
  return len(dataset.holdout.labels) if asked is None else asked


def _with_paper_scales(config: RunConfig, dataset: data.Dataset) -> RunConfig:
  """The configuration with the batch norm scales of the paper's runs."""
  option: dict[str, Any] = dict(seed_architecture(config, dataset).options)
  start_of_scales = config_lib.paper_scale_init(option.get('stem', 'small'))
  return settings.replace(config, {'network.bn_scale_init': start_of_scales})


def _from_origin(
    config: RunConfig, init_from: str, dataset: data.Dataset
) -> config_lib.NetworkConfig:
  """The network of `init_from`, in full.

  A run that was started before knows it from its own directory, and no longer
  needs its origin.
  """
  workdir = pathlib.Path(config.workdir)
  stored = history.read_json(workdir / 'config.json') or {}
  if stored.get('init_from') == init_from:
    known = RunConfig.from_json(stored).network
  else:
    origin = trained.load(init_from)
    _check_origin(origin, config, dataset)
    known = dataclasses.replace(
        origin.config.network, depths=origin.architecture.depths
    )
  given = {
      name: value
      for name, value in dataclasses.asdict(config.network).items()
      if value is not None
  }
  return dataclasses.replace(known, **given)


def _check_origin(
    origin: trained.TrainedNetwork, config: RunConfig, dataset: data.Dataset
) -> None:
  """Refuses another run's network if it is not what is asked for."""
  architecture = origin.architecture
  network = networks.get(architecture.family)
  option = dict(architecture.options)
  held = {
      'network': network.name,
      'depths': architecture.depths,
      **option,
      'embedding': dict(architecture.sizes).get('embedding'),
      'widths': origin.config.network.widths or network.widths,
      'input_shape': networks.parts(architecture)[0].input_shape,
      'classes': architecture.size('classes'),
  }
  wanted = {
      'network': networks.get(config.network.name).name,
      'depths': config.network.depths,
      **_network_options(config),
      'input_shape': dataset.input_shape,
      'classes': dataset.classes,
  }
  for name, value in wanted.items():
    if value is not None and value != held.get(name):
      raise ValueError(
          f'init_from {config.init_from} holds a network with {name} '
          f'{held.get(name)}, but {value} is asked for.'
      )
