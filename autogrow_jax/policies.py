"""Policies: *when* a network grows, at which stage, and when it is done.

A policy is an immutable state machine that sees one `Observation` per epoch and
answers with a `Decision`. Fields with a help text in their metadata are its
settings, the others its progress.
"""

import abc
from collections.abc import Mapping, Sequence
import dataclasses
import fractions
import json
import re
from typing import Any, Literal, Protocol, Self, TypeAlias

import numpy as np

from autogrow_jax import paired

Depths: TypeAlias = tuple[int, ...]  # Sub-modules per stage.
Number: TypeAlias = fractions.Fraction | str  # As it is written, and exact.


@dataclasses.dataclass(frozen=True)
class Observation:
  """Results of one growing epoch on the selection data.

  Attributes:
    epoch: number of finished growing epochs, from 1.
    step: number of finished training steps.
    correct: number of correct predictions.
    total: number of predictions.
    loss_sum: sum of their losses.
    cost: multiply-adds spent on training so far.
    hits: bool (examples,), results of single examples in an order that never
      changes, for paired tests; None where an example has several labels.
  """

  epoch: int
  step: int
  correct: int
  total: int
  loss_sum: float
  cost: int
  hits: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
  """A policy's answer to an observation.

  Attributes:
    action: 'keep' training, 'grow' and train on, or 'finish' growing.
    stage: stage that grows by one; None if nothing grows, or if the method
      decides what grows.
    closed: stages closed for ever by this check's stop, before any growth.
    capped: stages closed by this growth, at their largest depth.
    target: depths after a growth of several at once, or None.
  """

  action: Literal['keep', 'grow', 'finish']
  stage: int | None = None
  closed: tuple[int, ...] = ()
  capped: tuple[int, ...] = ()
  target: Depths | None = None

  def stages(self, depths: Depths) -> tuple[int, ...]:
    """Returns the stage of each block to append to a network of `depths`."""
    if self.target is None:
      return () if self.stage is None else (self.stage,)
    pairs = enumerate(zip(depths, self.target, strict=True))
    return sum(((stage,) * (goal - now) for stage, (now, goal) in pairs), ())


KEEP = Decision('keep')
FINISH = Decision('finish')


def grow(stage: int | None = None) -> Decision:
  """Returns the decision to grow a stage; None leaves it to the method."""
  return Decision('grow', stage)


class Policy(Protocol):
  """When and where a network grows; a frozen, hashable value.

  Equal policies answer equal observations with equal decisions, so that hosts
  which feed theirs the same counts agree without talking. A dataclass that
  inherits from this class is stored as its fields.
  """

  @property
  @abc.abstractmethod
  def finished(self) -> bool:
    """True once growing is over; then `update` is not called any more."""

  @abc.abstractmethod
  def update(self, observation: Observation) -> tuple[Self, Decision]:
    """Returns the policy after the next epoch, and what to do now."""

  def to_json(self) -> dict[str, Any]:
    """Returns lists, texts and numbers; see `from_json`."""
    return json.loads(json.dumps(dataclasses.asdict(self), default=str))

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Self:
    """Inverts `to_json`, at any moment of a run."""
    return cls(**{
        name: tuple(value) if isinstance(value, list) else value
        for name, value in data.items()
    })


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
    last, stages = -1 if self.grown is None else self.grown, len(self.depths)
    stage = min(policy.open_stages, key=lambda s: (s - last - 1) % stages)
    policy = dataclasses.replace(
        policy,
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
    if observation.hits is None:
      raise ValueError('The sequential policy needs hits of single examples.')
    return paired.pack_hits(observation.hits)

  def _judge(self, total: int) -> tuple[bool, bool]:
    if self.epoch == self.interval:
      return False, True
    first, last = self.memory[: self.interval], self.memory[-self.interval :]
    p_value = paired.p_value(paired.counts(first), paired.counts(last))
    # Rounding must not decide where p = alpha, which is an improvement.
    return p_value > float(self.error_rate) * (1 + 1e-9), True


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
    'oneshot': OneShot,
    'every': EveryEpochs,
    'fixed': Fixed,
}


def make(name: str, **values: Any) -> Policy:
  """Makes the policy of a name; settings of other policies are ignored."""
  names = {f.name for f in dataclasses.fields(POLICIES[name]) if f.metadata}
  return POLICIES[name](**{k: v for k, v in values.items() if k in names})


def next_growth(policy: Policy, observation: Observation) -> Decision | None:
  """Predicts the next growth, if all epochs were like the one just observed."""
  for _ in range(1000):
    if policy.finished:
      break
    observation = dataclasses.replace(observation, epoch=observation.epoch + 1)
    policy, decision = policy.update(observation)
    if decision.action == 'grow':
      return decision
  return None


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
