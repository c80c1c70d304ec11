"""`RunConfig`: everything a run needs, frozen and JSON-able."""

from collections.abc import Mapping
import dataclasses
import fractions
import re
from typing import Any, Self

from autogrow_jax import data as data_lib
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax.data import paths
from autogrow_jax.methods import base
from autogrow_jax.networks import common
from autogrow_jax.run import settings

NetworkConfig = networks.NetworkConfig

PRECISIONS = ('float32', 'bfloat16')
GROWING_SCHEDULES = ('constant', 'staircase', 'cosine', 'whole')

# Methods by the 'kind' that configurations store.
METHODS = {
    'autogrow': 'autogrow_jax.methods.autogrow:AutoGrow',
    'placebo': 'autogrow_jax.methods.autogrow:Placebo',
    'sparsify': 'autogrow_jax.methods.sparsify.method:Sparsify',
    'gauss_newton': 'autogrow_jax.methods.gauss_newton.method:GaussNewton',
}


def _setting(default: Any, text: str, **metadata: Any) -> Any:
  """A field with a default and one line of help."""
  return dataclasses.field(
      default=default, metadata={'help': text, **metadata}
  )


def _policy(name: str, default: Any) -> Any:
  """A field that is a setting of policies, with their own help."""
  text = next(
      field.metadata['help']
      for policy in policies.POLICIES.values()
      for field in dataclasses.fields(policy)
      if field.name == name
  )
  return _setting(default, f'{text[0].upper()}{text[1:]}.')


def _check_at_least(low: int, **values: int | None) -> None:
  """Raises ValueError for a number that is too small; None is none."""
  for name, value in values.items():
    if value is not None and value < low:
      raise ValueError(f'{name} is at least {low}, got {value}.')


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """When and where to grow; each policy uses some of these."""

  name: str = _setting(
      'periodic',
      'periodic, convergent, sequential (stops when an exact paired test finds '
      'no improvement), twin (stops when growing helps no more than not '
      'growing), oneshot (all stages at once), every (the method '
      'decides what) or fixed (nothing grows).',
  )
  interval: int | None = _setting(
      None,
      "K, epochs between two checks; by default the paper's rule, 3 / the "
      'fraction of the data.',
  )
  window: int = _policy('window', 100)
  threshold: str = _policy('threshold', '0.05')
  max_depths: tuple[int, ...] | None = _policy('max_depths', None)
  max_epochs: int | None = _policy('max_epochs', None)
  error_rate: str = _policy('error_rate', '0.05')
  target: tuple[int, ...] | None = _policy('target', None)
  patience: int = _policy('patience', 0)

  def __post_init__(self):
    common.check_choice('policy', self.name, tuple(policies.POLICIES))

  def used(self) -> tuple[str, ...]:
    """Names of the fields that the chosen policy uses."""
    cls = policies.POLICIES[self.name]
    return ('name', *(field.name for field in dataclasses.fields(cls)))


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Learning rates."""

  learning_rate: float | None = _setting(
      None,
      "Top learning rate; the network's own (0.1, plain nets 0.01) by default.",
  )
  growing: str = _setting(
      'constant',
      'Learning rate while growing: constant, staircase, cosine (within each '
      'interval), or whole (as the final phase, over all growing epochs).',
  )
  finetune_epochs: int = _setting(
      200, 'N, epochs after growing; all of them if nothing grows.'
  )

  def __post_init__(self):
    common.check_choice('growing schedule', self.growing, GROWING_SCHEDULES)
    if self.learning_rate is not None and not (
        0 < self.learning_rate < float('inf')
    ):
      raise ValueError(
          f'learning_rate is a positive number, got {self.learning_rate}.'
      )
    _check_at_least(0, finetune_epochs=self.finetune_epochs)


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
  """Where and how to compute."""

  parallel: str = _setting(
      'auto',
      'auto, pmap (batch norm per device) or jit (over the whole batch).',
  )
  num_devices: int | None = _setting(
      None, 'Number of devices; all accelerators, or one CPU, by default.'
  )
  precision: str = _setting(
      'float32',
      'Type of activations: float32 or bfloat16; parameters stay float32.',
  )
  decode_workers: int = _setting(
      0, 'Processes that decode streamed images; 0 for threads.'
  )
  depth_buckets: str = _setting(
      'powers',
      'Depths that growing networks are compiled for: exact, or powers of 4/3.',
  )
  compile_ahead: bool = _setting(
      True, 'Compile for the next growth while the network trains.'
  )
  remat: str = _setting(
      'none',
      'Stages whose blocks the backward pass computes again, for less memory: '
      'none, all, or numbers from 0, as 0,1.',
  )

  def __post_init__(self):
    common.check_choice('parallel', self.parallel, ('auto', 'pmap', 'jit'))
    common.check_choice('precision', self.precision, PRECISIONS)
    common.check_choice(
        'depth_buckets', self.depth_buckets, ('exact', 'powers')
    )
    _check_at_least(1, num_devices=self.num_devices)
    _check_at_least(0, decode_workers=self.decode_workers)
    if not re.fullmatch(r'none|all|\d+(,\d+)*', self.remat):
      raise ValueError(
          'remat is none, all, or numbers of stages such as 0,1; got '
          f'{self.remat!r}.'
      )

  def remat_of(self, stages: int) -> frozenset[int]:
    """Stages that are computed again, of a network with so many."""
    if self.remat in ('none', 'all'):
      return frozenset(range(stages) if self.remat == 'all' else ())
    chosen = frozenset(map(int, self.remat.split(',')))
    if max(chosen) >= stages:
      raise ValueError(
          f'remat names stage {max(chosen)}, but the network has {stages}, '
          f'numbered from 0 to {stages - 1}.'
      )
    return chosen


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Frequency and number of checkpoints."""

  every: str = _setting('1', 'Epochs (2) or minutes (10m) between checkpoints.')
  keep: int = _setting(2, 'Number of checkpoints to keep.')

  def __post_init__(self):
    if not re.fullmatch(r'0*[1-9]\d*m?', self.every):
      raise ValueError(
          'checkpoints.every is a number of epochs (2) or minutes (10m), got '
          f'{self.every!r}.'
      )
    _check_at_least(1, **{'checkpoints.keep': self.keep})

  def is_due(self, *, epoch: int | None, seconds: float) -> bool:
    """Returns True if it is time to save.

    Args:
      epoch: number of the epoch that just ended; None within one.
      seconds: seconds since the last save.
    """
    if self.every.endswith('m'):
      return seconds >= 60 * int(self.every[:-1])
    return epoch is not None and epoch % int(self.every) == 0


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything a run needs; the fields' metadata says what each one is."""

  workdir: str = dataclasses.field(
      metadata={
          'help': 'Directory of all results; the same configuration started '
          'again in it continues.'
      }
  )
  data: data_lib.DataConfig = data_lib.DataConfig()
  network: NetworkConfig = NetworkConfig()
  policy: PolicyConfig = PolicyConfig()
  method: base.Method = dataclasses.field(
      default_factory=lambda: settings.class_of(
          'autogrow', METHODS, 'method', base.Method
      )(),
      metadata={'kinds': METHODS, 'help': 'What a growth does.'},
  )
  schedule: ScheduleConfig = ScheduleConfig()
  optimizer: optimizers.Optimizer = _setting(
      optimizers.SGD(),
      'sgd (coupled weight decay), adamw, lion, adafactor or muon (decoupled).',
      kinds=optimizers.OPTIMIZERS,
  )
  devices: DeviceConfig = DeviceConfig()
  checkpoints: CheckpointConfig = CheckpointConfig()
  batch_size: int = _setting(128, 'Images per step, over all devices.')
  seed: int = _setting(0, 'Seed of everything random.')
  init_from: str | None = _setting(
      None, 'Work directory of a run whose final network to start from.'
  )
  reinitialize: bool = _setting(
      False, 'Take only the shape of that network, and draw its weights afresh.'
  )
  paper_compat: bool = _setting(
      False,
      "The AutoGrow paper's own protocol as a whole: decisions on the test "
      'set, best test accuracy of any epoch reported, its normalisation and '
      'batch norm scales. Every output says so.',
  )
  own: str = _setting(
      '', 'Names of objects that `run` was given in place of settings.'
  )

  def __post_init__(self):
    for name in ('workdir', 'init_from'):
      if given := getattr(self, name):  # Still there in another directory.
        path = paths.local(given, f'{name} is a run, which')
        object.__setattr__(self, name, str(path))
    if self.paper_compat and (conflicts := _protocol_conflicts(self)):
      raise ValueError(
          f"paper_compat is the paper's own protocol as a whole; it excludes "
          f'{", ".join(conflicts)}. Leave out the one or the other.'
      )
    if self.reinitialize and self.init_from is None:
      raise ValueError(
          'reinitialize draws the weights of another run afresh: name that run '
          'with init_from.'
      )
    if self.schedule.growing == 'whole' and self.policy.max_epochs is None:
      raise ValueError(
          "growing schedule 'whole' needs the number of growing epochs; give "
          'policy.max_epochs (--max_growing_epochs).'
      )
    _check_at_least(1, batch_size=self.batch_size)
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'seed is from 0 to 2**32 - 1, got {self.seed}.')
    network = networks.get(self.network.name)
    depths = common.checked_depths(
        network, self.network.depths or network.seed_depths
    )
    self.devices.remat_of(len(depths))
    if not self.has_own_policy:
      self.make_policy(depths)

  @property
  def has_own_policy(self) -> bool:
    """True if `run` was given a policy in place of `policy`."""
    return any(item.startswith('policy ') for item in self.own.split('; '))

  @property
  def interval(self) -> int:
    """K, epochs between checks, as given or by the rule."""
    given = self.policy.interval
    return default_interval(self.data.fraction) if given is None else given

  @property
  def protocol(self) -> str:
    """'holdout', 'test' if that decides, or 'paper_compat'."""
    return 'paper_compat' if self.paper_compat else self.data.select_on

  def make_policy(self, depths: tuple[int, ...]) -> policies.Policy:
    """Makes the policy, at its start from a network of some depths."""
    policy = dataclasses.replace(self.policy, interval=self.interval)
    return policies.make(depths=depths, **dataclasses.asdict(policy))

  def to_json(self) -> dict[str, Any]:
    """Plain dictionaries and lists."""
    return settings.to_json(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Self:
    """Inverts `to_json`; refuses unknown fields by name."""
    return settings.from_json(cls, value)


def default_interval(fraction: fractions.Fraction) -> int:
  """K of the paper in epochs, for a fraction of the training data.

  Its dataset-size study (Wen et al. 2020, Table 8) divides 3 by the fraction,
  so that the images between two checks stay as many: 3, 4, 6 and 12 at 100,
  75, 50 and 25 %. The window J stays.
  """
  return round(3 / fraction)


def in_paper_protocol(config: RunConfig) -> RunConfig:
  """A configuration under the protocol of Wen et al. 2020.

  Decisions are taken on the test set, nothing is held out, and the best test
  accuracy of all epochs is reported. Pixels are normalised with the paper's
  constants. Batch norm scales of small-image networks start uniform in [0, 1],
  as they very likely did with the authors' library version; those of ImageNet
  networks are ones, as their code says, which `resolve` finds out.
  """
  return settings.replace(config, {
      'data.select_on': 'test', 'data.holdout': None,
      'data.normalization': 'paper', 'network.bn_scale_init': None,
      'paper_compat': True,
  })


def paper_scale_init(stem: str) -> str:
  """Start of batch norm scales in the paper's runs, by the kind of stem."""
  return 'ones' if stem == 'imagenet' else 'uniform01'


def _protocol_conflicts(config: RunConfig) -> list[str]:
  """Lists settings that contradict the paper's protocol."""
  wanted = [
      ('select_on', config.data.select_on, 'test'),
      ('holdout', config.data.holdout, None),
      ('normalization', config.data.normalization, 'paper'),
  ]
  network = config.network
  if network.bn_scale_init is not None and network.stem is not None:
    allowed = paper_scale_init(network.stem)
    wanted.append(('bn_scale_init', network.bn_scale_init, allowed))
  return [
      f'{name}={value}' for name, value, allowed in wanted if value != allowed
  ]
