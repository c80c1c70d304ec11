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
from autogrow_jax.methods import autogrow
from autogrow_jax.methods import base
from autogrow_jax.networks import common
from autogrow_jax.run import settings

PRECISIONS = ('float32', 'bfloat16')
GROWING_SCHEDULES = ('constant', 'staircase', 'cosine', 'whole')

# Methods by the 'kind' that configurations store.
METHODS = {
    'autogrow': 'autogrow_jax.methods.autogrow:AutoGrow',
    'sparsify': 'autogrow_jax.methods.sparsify.method:Sparsify',
    'gauss_newton': 'autogrow_jax.methods.gauss_newton.method:GaussNewton',
}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """Which network a run starts from; None takes the family's default.

  Attributes:
    name: key of `networks.FAMILIES`, or 'package.module:attribute'.
    depths: blocks per stage; None for the family's `seed_depths`, most often
      one each.
    stem: 'small' or 'imagenet'; by default small up to 64 pixels.
    shortcut: 'B' (1x1 convolution and norm) or 'A' (no parameters).
    bn_scale_init: 'ones', or 'uniform01', which the paper very likely had.
    widths: base width per stage.
    embedding: of a language model, length of a word's vector.
    keep: of a language model, probability with which a unit stays in training.
    init_bound: of a language model, largest parameter at its start.
  """

  name: str = 'basic3resnet'
  depths: tuple[int, ...] | None = None
  stem: str | None = None
  shortcut: str | None = None
  bn_scale_init: str | None = None
  widths: tuple[int, ...] | None = None
  embedding: int | None = None
  keep: float | None = None
  init_bound: float | None = None

  def options(self) -> dict[str, Any]:
    """The options for `Network.seed`."""
    return {
        'stem': self.stem,
        'shortcut': self.shortcut,
        'bn_scale_init': self.bn_scale_init,
        'widths': self.widths,
        'embedding': self.embedding,
        'keep': self.keep,
        'init_bound': self.init_bound,
    }


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """When and where to grow.

  Attributes:
    name: 'periodic', 'convergent', 'sequential', 'oneshot', 'every' (every
      interval, what the method finds best), or 'fixed' to not grow.
    interval: K, epochs between checks; None for the paper's rule,
      `default_interval`.
    window: J, epochs over which a stage must have helped (periodic and
      sequential).
    threshold: tau, percentage points, as a decimal text (periodic and
      convergent).
    max_depths: per stage, the deepest allowed; None for 200 each.
    max_epochs: growing epochs after which growing ends; None for no limit.
    error_rate: alpha, the probability with which a check finds an improvement
      where there is none, as a decimal text (sequential).
    target: depths per stage after the one growth (oneshot).
  """

  name: str = 'periodic'
  interval: int | None = None
  window: int = 100
  threshold: str = '0.05'
  max_depths: tuple[int, ...] | None = None
  max_epochs: int | None = None
  error_rate: str = '0.05'
  target: tuple[int, ...] | None = None

  def __post_init__(self):
    common.check_choice('policy', self.name, tuple(policies.POLICIES))


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Learning rates.

  Attributes:
    learning_rate: the top rate; None for the network's own.
    growing: 'constant', 'staircase', 'cosine', or 'whole': as the final phase,
      over all growing epochs, which have to be limited.
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
    decode_workers: processes that decode streamed images; 0 for threads.
    depth_buckets: what training steps are compiled for while a network grows
      deeper, every 'exact' depth or 'powers' of two; results are equal to
      rounding.
    compile_ahead: compile for the next growth while the network trains.
    remat: stages whose blocks the backward pass computes again, so that less
      memory is needed: 'none', 'all', or their numbers, from 0: '0,1'.
    steps_per_call: training steps that the devices do in a loop before the host
      gives them the next ones; at most an epoch, and 1 of a stream. Where they
      are several, an evaluation of images in memory is one loop. Results are
      equal to rounding.
  """

  parallel: str = 'auto'
  num_devices: int | None = None
  precision: str = 'float32'
  decode_workers: int = 0
  depth_buckets: str = 'powers'
  compile_ahead: bool = True
  remat: str = 'none'
  steps_per_call: int = 1

  def __post_init__(self):
    common.check_choice('parallel', self.parallel, ('auto', 'pmap', 'jit'))
    common.check_choice('precision', self.precision, PRECISIONS)
    common.check_choice(
        'depth_buckets', self.depth_buckets, ('exact', 'powers')
    )
    if self.num_devices is not None and self.num_devices < 1:
      raise ValueError(f'num_devices is at least 1, got {self.num_devices}.')
    if self.decode_workers < 0:
      raise ValueError(
          f'decode_workers is at least 0, got {self.decode_workers}.'
      )
    if self.steps_per_call < 1:
      raise ValueError(
          f'steps_per_call is at least 1, got {self.steps_per_call}.'
      )
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
    reinitialize: of that network take the architecture alone, and draw its
      weights afresh.
    paper_compat: the paper's own protocol as a whole, see `in_paper_protocol`;
      what contradicts it is refused.
    own: names of the objects that `run` was given in place of these settings.
  """

  workdir: str
  data: data_lib.DataConfig = data_lib.DataConfig()
  network: NetworkConfig = NetworkConfig()
  policy: PolicyConfig = PolicyConfig()
  method: base.Method = dataclasses.field(
      default=autogrow.AutoGrow(), metadata={'kinds': METHODS}
  )
  schedule: ScheduleConfig = ScheduleConfig()
  optimizer: optimizers.Optimizer = dataclasses.field(
      default=optimizers.SGD(), metadata={'kinds': optimizers.OPTIMIZERS}
  )
  devices: DeviceConfig = DeviceConfig()
  checkpoints: CheckpointConfig = CheckpointConfig()
  batch_size: int = 128
  seed: int = 0
  init_from: str | None = None
  reinitialize: bool = False
  paper_compat: bool = False
  own: str = ''

  def __post_init__(self):
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
          'max_epochs.'
      )
    if self.batch_size < 1:
      raise ValueError(f'batch_size is at least 1, got {self.batch_size}.')
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'seed is from 0 to 2**32 - 1, got {self.seed}.')
    network = networks.get(self.network.name)
    depths = common.checked_depths(
        network, self.network.depths or network.seed_depths
    )
    self.devices.remat_of(len(depths))
    if 'policy' not in self.own:
      self.make_policy(depths)

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
    """As plain dictionaries and lists."""
    return settings.to_json(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Self:
    """The inverse of `to_json`; refuses unknown fields by name."""
    return settings.from_json(cls, value)


def default_interval(fraction: fractions.Fraction) -> int:
  """K of the paper: 3 epochs on all the data, longer on a part of it.

  Its dataset-size study (Wen et al. 2020, Table 8) divides K by the fraction,
  so that the images between two checks stay as many: 3, 4, 6 and 12 at 100,
  75, 50 and 25 %. The window J stays.

  Args:
    fraction: part of the training data that is used.

  Returns:
    Epochs.
  """
  return round(3 / fraction)


def in_paper_protocol(config: RunConfig) -> RunConfig:
  """A configuration under the protocol of Wen et al. 2020.

  Decisions are taken on the test set, nothing is held out, and the best test
  accuracy of all epochs is reported. Pixels are normalised with the paper's
  constants. Batch norm scales of small-image networks start uniform in [0, 1],
  as they very likely did with the authors' library version; those of ImageNet
  networks are ones, as their code says, which `train.resolve` finds out.

  Args:
    config: any configuration.

  Returns:
    The same with all of that, and `paper_compat` set.
  """
  return dataclasses.replace(
      config,
      data=dataclasses.replace(
          config.data, select_on='test', holdout=None, normalization='paper'
      ),
      network=dataclasses.replace(config.network, bn_scale_init=None),
      paper_compat=True,
  )


def paper_scale_init(stem: str) -> str:
  """Start of batch norm scales in the paper's runs, by the kind of stem."""
  return 'ones' if stem == 'imagenet' else 'uniform01'


def _protocol_conflicts(config: RunConfig) -> list[str]:
  """What of a configuration contradicts the paper's protocol."""
  wanted = [
      ('select_on', config.data.select_on, ('test',)),
      ('holdout', config.data.holdout, (None,)),
      ('normalization', config.data.normalization, ('paper',)),
  ]
  network = config.network
  if network.bn_scale_init is not None and network.stem is not None:
    allowed = (paper_scale_init(network.stem),)
    wanted.append(('bn_scale_init', network.bn_scale_init, allowed))
  return [
      f'{name}={value}' for name, value, allowed in wanted
      if value not in allowed
  ]
