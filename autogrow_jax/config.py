"""`RunConfig`: everything a run needs, frozen and JSON-able."""

from collections.abc import Mapping
import dataclasses
import re
import types
import typing
from typing import Any, Self

from autogrow_jax import data as data_lib
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax.methods import autogrow
from autogrow_jax.networks import common

PRECISIONS = ('float32', 'bfloat16')
POLICIES = ('periodic', 'convergent', 'fixed')
GROWING_SCHEDULES = ('constant', 'staircase')


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """Which network a run starts from; None takes the family's default.

  Attributes:
    name: key of `networks.FAMILIES`, or 'package.module:attribute'.
    depths: blocks per stage; None for one each.
    stem: 'small' or 'imagenet'; by default small up to 64 pixels.
    shortcut: 'B' (1x1 convolution and norm) or 'A' (no parameters).
    bn_scale_init: 'ones', or 'uniform01', which the paper very likely had.
    widths: base width per stage.
  """

  name: str = 'basic3resnet'
  depths: tuple[int, ...] | None = None
  stem: str | None = None
  shortcut: str | None = None
  bn_scale_init: str | None = None
  widths: tuple[int, ...] | None = None

  def options(self) -> dict[str, Any]:
    """The options for `Network.seed`."""
    return {
        'stem': self.stem,
        'shortcut': self.shortcut,
        'bn_scale_init': self.bn_scale_init,
        'widths': self.widths,
    }


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """When and where to grow.

  Attributes:
    name: 'periodic', 'convergent', or 'fixed' to not grow; of a policy object
      that `run` is given, 'module:class'.
    interval: K, epochs between checks.
    window: J, epochs over which a stage must have helped (periodic).
    threshold: tau, percentage points, as a decimal text.
    max_depths: per stage, the deepest allowed; None for 200 each.
    max_epochs: growing epochs after which growing ends; None for no limit.
  """

  name: str = 'periodic'
  interval: int = 3
  window: int = 100
  threshold: str = '0.05'
  max_depths: tuple[int, ...] | None = None
  max_epochs: int | None = None

  def __post_init__(self):
    if self.is_named:
      common.check_choice('policy', self.name, POLICIES)

  @property
  def is_named(self) -> bool:
    """Whether it is the library's, and not an object given to `run`."""
    return ':' not in self.name


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Learning rates.

  Attributes:
    learning_rate: the top rate; None for the network's own.
    growing: 'constant' or 'staircase'.
    finetune_epochs: N, epochs after growing (all of them if nothing grows).
  """

  learning_rate: float | None = None
  growing: str = 'constant'
  finetune_epochs: int = 200

  def __post_init__(self):
    common.check_choice('growing schedule', self.growing, GROWING_SCHEDULES)
    if self.learning_rate is not None and not (
        0 < self.learning_rate < float('inf')
    ):
      raise ValueError(
          f'learning_rate is a positive number, got {self.learning_rate}.'
      )
    if self.finetune_epochs < 0:
      raise ValueError(
          f'finetune_epochs is at least 0, got {self.finetune_epochs}.'
      )


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
  """Where and how to compute.

  Attributes:
    parallel: 'auto', 'pmap' or 'jit'; see `parallel.py`.
    num_devices: None for all accelerators, or one CPU.
    precision: type of activations, 'float32' or 'bfloat16'; parameters,
      statistics and logits are float32 always.
  """

  parallel: str = 'auto'
  num_devices: int | None = None
  precision: str = 'float32'

  def __post_init__(self):
    common.check_choice('parallel', self.parallel, ('auto', 'pmap', 'jit'))
    common.check_choice('precision', self.precision, PRECISIONS)
    if self.num_devices is not None and self.num_devices < 1:
      raise ValueError(f'num_devices is at least 1, got {self.num_devices}.')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """How often to save and how much to keep.

  Attributes:
    every: '2' for two epochs, '10m' for ten minutes.
    keep: number of checkpoints.
  """

  every: str = '1'
  keep: int = 2

  def __post_init__(self):
    Cadence.parse(self.every)
    if self.keep < 1:
      raise ValueError(f'keep is at least 1, got {self.keep}.')


@dataclasses.dataclass(frozen=True)
class Cadence:
  """'Every n', of epochs or of minutes.

  Attributes:
    epochs: after every so many epochs, or None.
    seconds: after so many seconds, or None.
  """

  epochs: int | None
  seconds: float | None

  @classmethod
  def parse(cls, text: str) -> Self:
    """Reads '2' (epochs) or '10m' (minutes)."""
    match = re.fullmatch(r'(\d+)(m?)', text)
    if not match or not int(match[1]):
      raise ValueError(
          f'checkpoint_every is a number of epochs (2) or minutes (10m), got '
          f'{text!r}.'
      )
    number = int(match[1])
    return cls(None, 60.0 * number) if match[2] else cls(number, None)

  def due(self, *, epoch: int | None, seconds: float) -> bool:
    """Whether it is time.

    Args:
      epoch: number of the epoch that just ended, None within one.
      seconds: since it was last time.

    Returns:
      Whether it is.
    """
    if self.seconds is not None:
      return seconds >= self.seconds
    return epoch is not None and epoch % self.epochs == 0


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything a run needs.

  Attributes:
    workdir: directory of all results; the same configuration started again in
      it continues.
    data: the data set.
    network: the network.
    policy: when and where it grows.
    method: what a growth does.
    schedule: learning rates.
    optimizer: the rest of the optimizer.
    devices: where to compute.
    checkpoints: how often to save.
    batch_size: images per step, over all devices.
    seed: of everything random.
    init_from: work directory of a run whose final network to start from.
  """

  workdir: str
  data: data_lib.DataConfig = data_lib.DataConfig()
  network: NetworkConfig = NetworkConfig()
  policy: PolicyConfig = PolicyConfig()
  method: autogrow.AutoGrow = autogrow.AutoGrow()
  schedule: ScheduleConfig = ScheduleConfig()
  optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
  devices: DeviceConfig = DeviceConfig()
  checkpoints: CheckpointConfig = CheckpointConfig()
  batch_size: int = 128
  seed: int = 0
  init_from: str | None = None

  def __post_init__(self):
    if self.batch_size < 1:
      raise ValueError(f'batch_size is at least 1, got {self.batch_size}.')
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'seed is from 0 to 2**32 - 1, got {self.seed}.')
    network = networks.get(self.network.name)
    depths = common.checked_depths(
        network, self.network.depths or (1,) * len(network.widths)
    )
    if self.policy.is_named:
      self.make_policy(depths)

  def make_policy(self, depths: tuple[int, ...]) -> policies.Policy:
    """The policy, at its start from a network of some depths."""
    policy = self.policy
    if not policy.is_named:
      raise ValueError(
          f'The policy {policy.name} is one of your own: pass it to `run`.'
      )
    if policy.name == 'fixed':
      return policies.Fixed(depths=depths)
    shared = {
        'interval': policy.interval,
        'threshold': policy.threshold,
        'depths': depths,
        'caps': policy.max_depths,
        'max_epochs': policy.max_epochs,
    }
    if policy.name == 'convergent':
      return policies.Convergent(**shared)
    return policies.Periodic(window=policy.window, **shared)

  def to_json(self) -> dict[str, Any]:
    """As plain dictionaries and lists."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Self:
    """The inverse of `to_json`; refuses unknown fields by name."""
    return _from_json(cls, value, '')


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ''
) -> list[str]:
  """Fields in which two JSON forms differ, as 'name: old -> new'."""
  result = []
  for name in sorted(old.keys() | new.keys()):
    before, after = old.get(name), new.get(name)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      result += differences(before, after, f'{prefix}{name}.')
    elif before != after:
      result.append(f'{prefix}{name}: {before} -> {after}')
  return result


def _from_json(kind: Any, value: Mapping[str, Any], where: str) -> Any:
  hints = typing.get_type_hints(kind)
  if not isinstance(value, Mapping):
    what = where.rstrip('.') or 'The configuration'
    raise ValueError(f'{what} is not a JSON object.')
  fields = {field.name for field in dataclasses.fields(kind)}
  if unknown := [where + name for name in sorted(set(value) - fields)]:
    raise ValueError(f'The configuration has unknown fields {unknown}.')
  arguments = {}
  for name, item in value.items():
    hint = hints[name]
    if dataclasses.is_dataclass(hint):
      item = _from_json(hint, item, f'{where}{name}.')
    elif isinstance(item, list):
      item = tuple(item)
    _check_type(f'{where}{name}', item, hint)
    arguments[name] = item
  try:
    return kind(**arguments)
  except TypeError as error:
    raise ValueError(f'The configuration is incomplete: {error}.') from error


def _check_type(name: str, value: Any, hint: Any) -> None:
  if not _is_of(value, hint):
    raise ValueError(f'{name} has the wrong type: {value!r}.')


def _is_of(value: Any, hint: Any) -> bool:
  """Whether a value has a type; ints are floats, but bools are not ints."""
  if isinstance(hint, types.UnionType):
    return any(_is_of(value, option) for option in typing.get_args(hint))
  if typing.get_origin(hint) is tuple:
    item_hint, _ = typing.get_args(hint)
    return isinstance(value, tuple) and all(
        _is_of(item, item_hint) for item in value
    )
  return type(value) in ((int, float) if hint is float else (hint,))
