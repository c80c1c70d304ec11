"""Policies: *when* a network grows, at which stage, and when it is done.

The protocol is in `policy`. Fields with a help text in their metadata are the
settings of a policy, the others its progress.
"""

import abc
from collections.abc import Sequence
import dataclasses
import fractions
import re
from typing import Any, Literal, Self, TypeAlias

import numpy as np

from autogrow_jax import paired
from autogrow_jax.policy import Decision as Decision
from autogrow_jax.policy import Depths as Depths
from autogrow_jax.policy import FINISH as FINISH
from autogrow_jax.policy import grow as grow
from autogrow_jax.policy import KEEP as KEEP
from autogrow_jax.policy import next_growth as next_growth
from autogrow_jax.policy import Observation as Observation
from autogrow_jax.policy import Policy as Policy

Number: TypeAlias = fractions.Fraction | str  # As it is written, and exact.


def _setting(text: str, **default: Any) -> Any:
  return dataclasses.field(metadata={'help': text}, **default)


_DEPTHS = 'sub-modules per stage to start from, such as 1-1-1'
_WINDOW = 'J, epochs over which a stage must have helped; at least K'


@dataclasses.dataclass(frozen=True)
class _Checking(Policy):
  """Checks after every K epochs; `epoch` is the last one seen."""

  interval: int = _setting('K, epochs between two checks')
  max_epochs: int | None = _setting('most growing epochs', default=None)
  epoch: int = dataclasses.field(default=0, kw_only=True)

  def __post_init__(self):
    _require(
        self.interval >= 1 and (self.max_epochs is None or self.max_epochs > 0),
        f'K is {self.interval}, max_epochs {self.max_epochs}; 1 is the least.',
    )

  @property
  def finished(self) -> bool:
    """True at the epoch limit."""
    return self.epoch == self.max_epochs

  def update(self, observation: Observation) -> tuple[Self, Decision]:
    """See `Policy.update`."""
    _require(
        observation.epoch == self.epoch + 1 and not self.finished,
        f'Epoch {observation.epoch} cannot follow {self.epoch} of this policy.',
    )
    changes = self._remembered(observation)
    policy = dataclasses.replace(self, epoch=observation.epoch, **changes)
    if policy.epoch % policy.interval == 0:
      return policy._checked(observation.total)
    return policy, FINISH if policy.finished else KEEP

  def _remembered(self, observation: Observation) -> dict[str, Any]:
    """Returns the fields that an observation changes, apart from `epoch`."""
    return {}

  @abc.abstractmethod
  def _checked(self, total: int) -> tuple[Self, Decision]:
    """Checks; `total` is the number of predictions in an epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRobin(_Checking):
  """A check closes the last stage if it did not help, and grows the next.

  Wen et al. 2020, "AutoGrow", KDD, Alg. 1: the base of `Periodic`, `Convergent`
  and `Sequential`. Growing ends if no stage is left open; else a check may
  append one sub-module to the open stage that is next in circular order. Unlike
  the paper, a stage also closes at its largest depth, and an epoch limit ends
  growing without a last growth that would never be trained.

  Attributes:
    depths: the seed's at first, then the current ones.
    memory: an item for each of the last epochs, as many as a check looks at.
    closed: stages that a stop closed.
    grown: stage that was grown last, None before the first growth.
    last_growth: epoch of that growth.
  """

  depths: Depths = _setting(_DEPTHS)
  max_depths: Depths | None = _setting(
      'largest depths per stage, or one for all; 200 by default', default=None
  )
  memory: tuple[Any, ...] = ()
  closed: tuple[int, ...] = ()
  grown: int | None = None
  last_growth: int | None = None

  def __post_init__(self):
    super().__post_init__()
    largest = self.max_depths or (200,)  # A safety limit, not in the paper.
    largest *= len(self.depths) if len(largest) == 1 else 1
    object.__setattr__(self, 'max_depths', largest)
    _require_growth(self.depths, largest, 'max_depths')
    _require(
        self.window >= self.interval,
        f'J is {self.window} epochs; it must be at least K, {self.interval}.',
    )

  @abc.abstractmethod
  def _item(self, observation: Observation) -> Any:
    """Returns what is remembered of an epoch."""

  @abc.abstractmethod
  def _judge(self, total: int) -> tuple[bool, bool]:
    """Returns if a check closes the stage grown last, and if it may grow."""

  @property
  def open_stages(self) -> tuple[int, ...]:
    """Stages that may still grow, in ascending order."""
    return tuple(
        stage
        for stage, largest in enumerate(self.max_depths)
        if self.depths[stage] < largest and stage not in self.closed
    )

  @property
  def finished(self) -> bool:
    """True at the epoch limit, and after a check with no stage open."""
    return self.epoch == self.max_epochs or (
        not self.open_stages
        and self.epoch % self.interval == 0
        and self.epoch != self.last_growth  # Which is still trained.
    )

  def _remembered(self, observation: Observation) -> dict[str, Any]:
    intervals = -(-self.window // self.interval) + 1
    memory = (*self.memory, self._item(observation))
    return {'memory': memory[-intervals * self.interval :]}

  def _checked(self, total: int) -> tuple[Self, Decision]:
    stop, growth = self._judge(total)
    # A stage at its largest depth may still be the one grown last; then a stop
    # closes nothing, least of all another stage.
    closed = (self.grown,) if stop and self.grown in self.open_stages else ()
    policy = dataclasses.replace(self, closed=self.closed + closed)
    if policy.finished or not growth:
      action = 'finish' if policy.finished else 'keep'
      return policy, Decision(action, closed=closed)
    return policy._grown(policy._next(), closed)

  def _next(self) -> int:
    """Returns the open stage that follows the one grown last."""
    last, stages = -1 if self.grown is None else self.grown, len(self.depths)
    return min(self.open_stages, key=lambda s: (s - last - 1) % stages)

  def _grown(self, stage: int, closed: Depths) -> tuple[Self, Decision]:
    policy = dataclasses.replace(
        self,
        depths=tuple(d + (s == stage) for s, d in enumerate(self.depths)),
        grown=stage,
        last_growth=self.epoch,
    )
    capped = () if stage in policy.open_stages else (stage,)
    return policy, Decision('grow', stage, closed, capped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningMaximum(RoundRobin):
  """Remembers the running maximum of correct predictions: the paper's signal.

  Before a check's window is full the gain is measured from zero, as in the
  authors' code. Unlike the paper, gains are counts and compared exactly.
  """

  threshold: Number = _setting('tau, percentage points that count as help')

  def __post_init__(self):
    super().__post_init__()
    _set_exact(self, 'threshold', 100)

  def _item(self, observation: Observation) -> int:
    return max((observation.correct, *self.memory[-1:]))

  def _is_flat(self, total: int) -> bool:
    """Returns if the gain over the window is below tau."""
    before = self.memory[-1 - self.window] if self.epoch > self.window else 0
    return (self.memory[-1] - before) * 100 < self.threshold * total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Periodic(RunningMaximum):
  """p-AutoGrow, the paper's final method: every check grows (Wen et al. 2020).

  A stage closes if the running maximum rose by less than tau over the last J
  epochs. For small images the paper has K = 3, J = 100 and tau = '0.05'.
  """

  window: int = _setting(_WINDOW)

  def _judge(self, total: int) -> tuple[bool, bool]:
    return self._is_flat(total), True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convergent(RunningMaximum):
  """c-AutoGrow: grow when the curve is flat (Wen et al. 2020).

  A check grows if the running maximum rose by less than tau since the check
  before it, and then also closes the stage grown at that check, since that
  growth did not help. With tau = 0 nothing ever grows.
  """

  window = property(lambda self: self.interval)

  def _judge(self, total: int) -> tuple[bool, bool]:
    flat = self._is_flat(total)
    return flat and self.last_growth == self.epoch - self.interval, flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequential(RoundRobin):
  """Grows at every check until an exact paired test finds no improvement.

  Not in the paper. The running maximum of noisy accuracies creeps upwards
  although nothing is learned, and `Periodic` takes every small record for a
  gain. This policy compares how often the last K epochs got each image right
  with the K epochs that ended J epochs ago (J rounded up to whole intervals),
  or with the first K as long as there are none that old. It closes a stage
  unless `paired.p_value` is at most alpha. K must leave time to recover from a
  growth, and noise that is common to all images raises the error rate.
  """

  window: int = _setting(_WINDOW)
  error_rate: Number = _setting('alpha, how often the test may err by chance')

  def __post_init__(self):
    super().__post_init__()
    _set_exact(self, 'error_rate', 0.5)

  def _item(self, observation: Observation) -> str:
    return _packed(observation.hits)

  def _judge(self, total: int) -> tuple[bool, bool]:
    if self.epoch == self.interval:
      return False, True
    first, last = self.memory[: self.interval], self.memory[-self.interval :]
    return not _is_better(first, last, self.error_rate), True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twin(RoundRobin):
  """Grows as long as growth helps, by comparison with an ungrown twin.

  Not in the paper, whose policies ask if time helped. The run trains the twin,
  the network of before a growth, on the same batches. Over the second half of
  an interval, after the set-back of a growth, an exact paired test compares how
  often the two got each image right. If growth helped, `paired.p_value` is at
  most alpha, the next stage grows, and the grown network is the next twin. If
  not, up to m more growths of the same stage may follow, and then the twin
  takes the grown network's place and the stage closes.

  Attributes:
    failed: growths in a row that did not help.
    before: depths of the twin; None before the first growth.
  """

  error_rate: Number = _setting('alpha, how often the test may err by chance')
  patience: int = _setting(
      'm, growths in a row that may fail before one that does is the last',
      default=0,
  )
  failed: int = 0
  before: Depths | None = None

  window = property(lambda self: self.interval)

  def __post_init__(self):
    super().__post_init__()
    _set_exact(self, 'error_rate', 0.5)
    _require(self.patience >= 0, f'm is {self.patience}; 0 is the least.')

  def _item(self, observation: Observation) -> str:
    hits = _packed(observation.hits)
    if self.before is None or observation.twin_hits is None:
      return ''
    return f'{_packed(observation.twin_hits)} {hits}'

  def _judge(self, total: int) -> tuple[bool, bool]:
    pairs = [pair.split() for pair in self.memory[-self.interval // 2 :]]
    helped = all(pairs) and _is_better(*zip(*pairs), self.error_rate)
    return not helped, True

  def _checked(self, total: int) -> tuple[Self, Decision]:
    if self.before is None:
      return self._forked((), 'new')
    failed, _ = self._judge(total)
    if not failed:
      policy, closed, twin = dataclasses.replace(self, failed=0), (), 'new'
    elif (
        self.failed < self.patience
        and self.grown in self.open_stages
        and self.epoch != self.max_epochs
    ):
      policy = dataclasses.replace(self, failed=self.failed + 1)
      return policy._grown(self.grown, ())
    else:
      closed, twin = (self.grown,), 'back'
      policy = dataclasses.replace(
          self,
          closed=(*self.closed, *closed),
          depths=self.before,
          failed=0,
      )
    if policy.finished:
      twin = twin if closed else ''
      return policy, Decision('finish', closed=closed, twin=twin)
    return policy._forked(closed, twin)

  def _forked(
      self, closed: Depths, twin: Literal['new', 'back']
  ) -> tuple[Self, Decision]:
    """Grows the next stage, and remembers the network of before."""
    policy, decision = self._grown(self._next(), closed)
    return (
        dataclasses.replace(policy, before=self.depths),
        dataclasses.replace(decision, twin=twin),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShot(_Checking):
  """Trains for K epochs, then grows all stages at once, and is finished.

  Network morphism as in Wen et al. 2020, Table 2: the seed converges, by the
  'staircase' schedule, and fine-tuning follows the growth.
  """

  depths: Depths = _setting(_DEPTHS)
  target: Depths = _setting('sub-modules per stage to grow to, such as 5-5-5')

  def __post_init__(self):
    super().__post_init__()
    _require(self.target, 'oneshot needs a target, as --policy.target=5-5-5.')
    _require_growth(self.depths, self.target, 'target')
    is_possible = self.finished or self.depths != self.target
    _require(is_possible, f'The target must differ from {self.depths}.')

  @property
  def finished(self) -> bool:
    """True once the growth has happened."""
    return self.epoch in (self.interval, self.max_epochs)

  def _checked(self, total: int) -> tuple[Self, Decision]:
    grown = dataclasses.replace(self, depths=self.target)
    return grown, Decision('grow', target=self.target)


@dataclasses.dataclass(frozen=True)
class EveryEpochs(_Checking):
  """Grows every K epochs, the last one included; the method decides what."""

  def _checked(self, total: int) -> tuple[Self, Decision]:
    return self, grow()


@dataclasses.dataclass(frozen=True)
class Fixed(Policy):
  """Never grows and never finishes: the baseline."""

  finished = False

  def update(self, observation: Observation) -> tuple[Self, Decision]:
    """See `Policy.update`."""
    return self, KEEP


POLICIES: dict[str, type[Any]] = {
    'periodic': Periodic,
    'convergent': Convergent,
    'sequential': Sequential,
    'twin': Twin,
    'oneshot': OneShot,
    'every': EveryEpochs,
    'fixed': Fixed,
}


def make(name: str, **values: Any) -> Policy:
  """Makes the policy of a name; settings of other policies are ignored."""
  names = {f.name for f in dataclasses.fields(POLICIES[name]) if f.metadata}
  return POLICIES[name](**{k: v for k, v in values.items() if k in names})


def format_depths(depths: Sequence[int]) -> str:
  """Returns the pretty form of depths, such as '3-2-2'."""
  return '-'.join(map(str, depths))


def parse_depths(text: str) -> Depths:
  """Inverts `format_depths`."""
  _require(
      re.fullmatch(r'[1-9][0-9]{0,8}(-[1-9][0-9]{0,8})*', text),
      f"Depths {text!r} must be positive, one per stage, such as '3-2-2'.",
  )
  return tuple(map(int, text.split('-')))


def _packed(hits: np.ndarray | None) -> str:
  _require(hits is not None, 'This policy needs hits of single examples.')
  return paired.pack_hits(hits)


def _is_better(
    first: Sequence[str], last: Sequence[str], error_rate: Number
) -> bool:
  """Returns if a paired test finds the later evaluations to be better."""
  p_value = paired.p_value(paired.counts(first), paired.counts(last))
  # Rounding must not decide where p = alpha, which is an improvement.
  return p_value <= float(error_rate) * (1 + 1e-9)


def _require(condition: Any, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _require_growth(low: Depths, high: Depths | None, name: str) -> None:
  _require(
      low and high and len(low) == len(high)
      and all(1 <= first <= last for first, last in zip(low, high)),
      f'The {name} is {high}; it must be at least the depths, {low}, which '
      'must be positive, in the same number of stages.',
  )


def _set_exact(policy: Policy, name: str, limit: float) -> None:
  """Makes a setting the number that is written; the float 0.05 is 1/20."""
  text = str(getattr(policy, name))
  is_number = re.fullmatch(r'\d*\.?\d+(e-?\d+)?|\d+/[1-9]\d*', text, re.ASCII)
  _require(
      is_number and fractions.Fraction(text) < limit,
      f'The {name} is {text}; it must be a number below {limit}, like 0.05.',
  )
  object.__setattr__(policy, name, fractions.Fraction(text))
