"""Policies: *when* a network grows, at which stage, and when it is done.

A policy is an immutable state machine that sees one `Observation` per epoch and
answers with a `Decision`. It holds everything that it needs for the next one,
so it travels through a checkpoint as a small JSON object. It knows neither JAX
nor networks.

`Periodic` and `Convergent` are the two policies of AutoGrow (Wen et al. 2020,
"AutoGrow: Automatic Layer Growing in Deep Convolutional Networks", KDD, Alg. 1
and section 2.3), `OneShot` is the network morphism that it is compared with.
`Sequential` grows like `Periodic`, but its stop is a test that knows of noise.
In their notation and ours:

  K      `interval`, epochs between two checks
  J      `window`, epochs over which the stop check measures the gain
  tau    `threshold`, percentage points; a gain below it is no gain
  alpha  `error_rate`, how often noise alone may pass for a gain (ours)
  M      number of stages (the paper's sub-networks)
"""

import abc
import dataclasses
import fractions
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self, final

from autogrow_jax import paired

DEFAULT_CAP = 200  # Sub-modules per stage: a safety limit, not in the paper.


@dataclasses.dataclass(frozen=True)
class Observation:
  """What a policy may see after an epoch of the growing phase.

  Attributes:
    epoch: number of finished growing epochs, so the first one is 1.
    step: number of finished training steps.
    correct: correct predictions on the selection set, evaluated after the
      epoch. A count, so that comparisons are exact.
    total: predictions on the selection set.
    loss_sum: sum of the losses of these predictions.
    cost: multiply-adds spent on training so far.
    hits: which predictions are correct, one bit for each example, always in the
      same order; see `paired.pack_hits`. None if not known.
  """

  epoch: int
  step: int
  correct: int
  total: int
  loss_sum: float
  cost: int
  hits: bytes | None = None

  def __post_init__(self):
    _require_int('The epoch', self.epoch, 1)
    _require_int('The total number of predictions', self.total, 1)
    _require_int('The number of correct predictions', self.correct, 0)
    if self.correct > self.total:
      raise ValueError(
          f'The number of correct predictions is {self.correct}; it must be at '
          f'most the total, {self.total}.'
      )
    if self.hits is not None:
      paired.check_hits(self.hits, correct=self.correct, total=self.total)


@dataclasses.dataclass(frozen=True)
class Decision:
  """A policy's answer to an observation.

  In time, the stops in `closed` come before the growth, `capped` after it.

  Attributes:
    action: 'keep' training, 'grow' and train on, or 'finish' growing.
    stage: the stage that grows by one; None if nothing grows, or if the policy
      leaves it to the method what grows.
    closed: stages that this check's stop closed for ever.
    capped: stages that this growth brought to their cap, which closes them too.
    target: sub-modules per stage after a growth of several at once; None if at
      most one stage grows, by one.
  """

  action: Literal['keep', 'grow', 'finish']
  stage: int | None = None
  closed: tuple[int, ...] = ()
  capped: tuple[int, ...] = ()
  target: tuple[int, ...] | None = None

  def __post_init__(self):
    if self.action not in ('keep', 'grow', 'finish'):
      raise ValueError(
          f"Action {self.action!r} is unknown; the actions are 'keep', 'grow' "
          "and 'finish'."
      )
    if self.action != 'grow' and (
        self.stage is not None or self.capped or self.target is not None
    ):
      raise ValueError(
          f'A decision to {self.action} names stage {self.stage}, capped '
          f'stages {self.capped} and target {self.target}; only a decision to '
          'grow has them.'
      )
    if self.stage is not None and self.target is not None:
      raise ValueError(
          f'A decision names both stage {self.stage} and target {self.target}; '
          'it must name one of them.'
      )

  def stages(self, depths: Sequence[int]) -> tuple[int, ...]:
    """Once per block to append to a network of these depths, its stage."""
    if self.target is None:
      return () if self.stage is None else (self.stage,)
    pairs = enumerate(zip(depths, self.target, strict=True))
    return tuple(
        stage for stage, (now, goal) in pairs for _ in range(goal - now)
    )


KEEP = Decision('keep')
FINISH = Decision('finish')


def grow(stage: int | None = None) -> Decision:
  """The plain decision to grow a stage; None leaves it to the method."""
  return Decision('grow', stage)


class Policy(Protocol):
  """When and where a network grows.

  A policy is a value: frozen, hashable, and never changed by `update`. Equal
  policies answer equal observations with equal decisions, so all hosts of a run
  that feed theirs the same integers agree without talking.
  """

  @property
  def finished(self) -> bool:
    """Whether growing is over; a finished policy takes no more observations."""

  @property
  def depths(self) -> tuple[int, ...]:
    """Sub-modules per stage now; () if the policy does not keep account."""

  def update(self, observation: Observation) -> tuple[Self, Decision]:
    """Takes the observation of one epoch.

    Args:
      observation: the result of the epoch that follows the last one seen.

    Returns:
      The policy that will take the next observation, and what to do now.

    Raises:
      ValueError: if the observation is not the next of the same run.
    """

  def to_json(self) -> dict[str, Any]:
    """As plain dictionaries, lists, strings and ints; see `from_json`."""

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Self:
    """The exact inverse of `to_json`, at any moment of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRobin(abc.ABC):
  """One check every K epochs: close what did not help, grow the next in turn.

  The base of `Periodic`, `Convergent` and `Sequential`, which share its
  attributes.

  Wen et al. 2020, Alg. 1. A check first may close the stage that was grown
  last, and ends growing if no stage is left open; else it may append one
  sub-module to the open stage that is next in circular order. Subclasses say
  when either happens, and what they remember for it.

  Unlike the paper, a stage also closes when it reaches its cap, and an epoch
  limit ends growing without a last growth that would never be trained.

  Attributes:
    interval: K, epochs between checks.
    depths: sub-modules per stage: the seed's at first, then the current ones.
    caps: the most sub-modules per stage; None means 200 each.
    max_epochs: the growing epoch that ends growing whatever the curve; None
      means no limit.
    epoch: progress, as are all fields below: number of epochs seen.
    total: predictions per epoch, None before the first one.
    open_stages: stages that may still grow, ascending.
    grown: the stage that was grown last, None before the first growth.
    last_growth: the epoch of that growth.
  """

  interval: int
  depths: tuple[int, ...]
  caps: tuple[int, ...] | None = None
  max_epochs: int | None = None
  epoch: int = 0
  total: int | None = None
  open_stages: tuple[int, ...] | None = None
  grown: int | None = None
  last_growth: int | None = None

  def __post_init__(self):
    _require_int('The growing interval K (epochs)', self.interval, 1)
    _set(self, 'depths', _exact_depths('depths', self.depths))
    if self.caps is None:
      _set(self, 'caps', (DEFAULT_CAP,) * len(self.depths))
    _set(self, 'caps', _exact_depths('caps', self.caps))
    if len(self.caps) != len(self.depths):
      raise ValueError(
          f'The caps {format_depths(self.caps)} and the depths '
          f'{format_depths(self.depths)} differ in their number of stages; '
          'every stage needs one of each.'
      )
    for stage, (depth, cap) in enumerate(zip(self.depths, self.caps)):
      if depth > cap:
        raise ValueError(
            f'Stage {stage} has depth {depth} but a cap of {cap}; the cap must '
            'be at least the depth.'
        )
    _require_limited(self.epoch, self.max_epochs)
    if self.open_stages is None:
      _set(self, 'open_stages', self._below_caps())
    self._require_possible_progress()

  @abc.abstractmethod
  def _judge(self) -> tuple[bool, bool]:
    """Whether the stop check fires, and whether the grow check does."""

  @abc.abstractmethod
  def _remembered(self, observation: Observation) -> dict[str, Any]:
    """The subclass's own fields after an observation."""

  @abc.abstractmethod
  def _require_possible_memory(self):
    """Raises ValueError unless the subclass's own fields fit the others."""

  @property
  def finished(self) -> bool:
    """Whether growing is over: by the limit, or by a check with none open.

    A growth that closes the last stage by its cap is still trained until the
    next check.
    """
    return self.epoch == self.max_epochs or (
        not self.open_stages
        and self.epoch % self.interval == 0
        and self.epoch != self.last_growth
    )

  def update(self, observation: Observation) -> tuple[Self, Decision]:
    """See `Policy.update`."""
    policy = self._recorded(observation)
    if policy.epoch % policy.interval == 0:
      return policy._checked()
    return policy, FINISH if policy.finished else KEEP

  def to_json(self) -> dict[str, Any]:
    """See `Policy.to_json`."""
    return _to_json(self)

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Self:
    """See `Policy.from_json`."""
    return _from_json(cls, data)

  def _recorded(self, observation: Observation) -> Self:
    _require_next(self, observation)
    if self.total not in (None, observation.total):
      raise ValueError(
          f'Epoch {observation.epoch} has {observation.total} predictions, the '
          f'epochs before it {self.total}; the selection set must not change.'
      )
    return dataclasses.replace(
        self,
        epoch=observation.epoch,
        total=observation.total,
        **self._remembered(observation),
    )

  def _checked(self) -> tuple[Self, Decision]:
    stop, growth = self._judge()
    # A stage that its cap has closed may still be the one grown last; then a
    # stop closes nothing, least of all another stage.
    closed = (self.grown,) if stop and self.grown in self.open_stages else ()
    policy = dataclasses.replace(
        self,
        open_stages=tuple(s for s in self.open_stages if s not in closed),
    )
    if policy.finished:
      return policy, Decision('finish', closed=closed)
    if not growth:
      return policy, Decision('keep', closed=closed)
    policy = policy._with_growth()
    capped = (policy.grown,) if policy.grown not in policy.open_stages else ()
    return policy, Decision('grow', policy.grown, closed, capped)

  def _with_growth(self) -> Self:
    last = -1 if self.grown is None else self.grown
    stages = len(self.depths)
    stage = min(self.open_stages, key=lambda s: (s - last - 1) % stages)
    depths = tuple(d + (s == stage) for s, d in enumerate(self.depths))
    at_cap = depths[stage] == self.caps[stage]
    return dataclasses.replace(
        self,
        depths=depths,
        open_stages=tuple(
            s for s in self.open_stages if not (at_cap and s == stage)
        ),
        grown=stage,
        last_growth=self.epoch,
    )

  def _below_caps(self) -> tuple[int, ...]:
    pairs = enumerate(zip(self.depths, self.caps))
    return tuple(stage for stage, (depth, cap) in pairs if depth < cap)

  def _require_possible_progress(self):
    if (self.total is None) != (self.epoch == 0):
      raise ValueError(f'Total {self.total!r} does not fit epoch {self.epoch}.')
    if self.total is not None:
      _require_int('The total number of predictions', self.total, 1)
    self._require_possible_memory()
    if not _is_subsequence(self.open_stages, self._below_caps()):
      raise ValueError(
          f'The open stages {self.open_stages!r} must be among the stages '
          f'below their caps, {self._below_caps()}, in ascending order.'
      )
    if self.grown is None and self.last_growth is None:
      return
    _require_int('The last growth', self.last_growth, self.interval)
    if self.last_growth > self.epoch or self.last_growth % self.interval:
      raise ValueError(
          f'The last growth was at epoch {self.last_growth}; it must be a '
          f'multiple of K = {self.interval} and at most {self.epoch}.'
      )
    _require_int('The stage grown last', self.grown, 0)
    if self.grown >= len(self.depths):
      raise ValueError(
          f'Stage {self.grown} does not exist; there are {len(self.depths)}.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningMaximum(RoundRobin):
  """What improves is the running maximum of the accuracy: the paper's signal.

  The base of `Periodic` and `Convergent`. The maximum is kept as its records,
  the (epoch, correct) at which it rose, and only as far back as a check looks.
  Before a check's window is full the gain is measured from zero, as in the
  authors' code. Unlike the paper, accuracies are compared as integer counts.

  Attributes:
    threshold: tau, percentage points, exact: a decimal string, an int or a
      Fraction, never a float.
    records: progress: the (epoch, correct) at which the running maximum rose.
  """

  threshold: fractions.Fraction | str | int
  records: tuple[tuple[int, int], ...] = ()

  def __post_init__(self):
    _set(self, 'threshold', _exact_threshold(self.threshold))
    super().__post_init__()

  @property
  @abc.abstractmethod
  def _reach(self) -> int:
    """How many epochs back a check looks."""

  def _remembered(self, observation: Observation) -> dict[str, Any]:
    epoch, correct = observation.epoch, observation.correct
    records = self.records
    if not records or correct > records[-1][1]:
      records = (*records, (epoch, correct))
    while len(records) > 1 and records[1][0] <= epoch - self._reach:
      records = records[1:]
    return {'records': records}

  def _flat(self, window: int) -> bool:
    """Whether the gain over the last epochs is below tau, decided exactly."""
    past = self.epoch - window
    then = next((c for e, c in reversed(self.records) if e <= past), 0)
    gain = self.records[-1][1] - then
    return gain * 100 < self.threshold * self.total

  def _require_possible_memory(self):
    if not self._has_possible_records():
      raise ValueError(
          f'The records {self.records!r} are not those of a running maximum of '
          f'counts up to {self.total} over epochs up to {self.epoch}.'
      )

  def _has_possible_records(self) -> bool:
    records = self.records
    if not _are_int_pairs(records) or bool(records) != (self.epoch > 0):
      return False
    if not records:
      return True
    epochs, counts = zip(*records)
    start = self.epoch - self._reach
    return (
        _ascends((0, *epochs, self.epoch + 1))
        and _ascends((-1, *counts, self.total + 1))
        and (epochs[0] == 1 or epochs[0] <= start)
        and (len(epochs) == 1 or epochs[1] > start)
    )


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Periodic(RunningMaximum):
  """p-AutoGrow, the paper's final method: every check grows (Wen et al. 2020).

  The stop check fires if the running maximum rose by less than tau over the
  last J epochs. `Periodic(interval=3, window=100, threshold='0.05',
  depths=(1, 1, 1))` is the paper's setting for small images.

  Attributes:
    window: J, epochs, at least K. The others are those of `RunningMaximum`.
  """

  window: int

  def __post_init__(self):
    _require_int('The stop window J (epochs)', self.window, 1)
    super().__post_init__()
    _require_window(self)

  @property
  def _reach(self) -> int:
    return self.window

  def _judge(self) -> tuple[bool, bool]:
    return self._flat(self.window), True


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Convergent(RunningMaximum):
  """c-AutoGrow: grow when the curve is flat (Wen et al. 2020).

  A check grows if the running maximum rose by less than tau since the check
  before it, and then also closes the stage grown at that check, since that
  growth did not help. After a growth that did help, the network trains on
  until it converges, and the next stage grows.
  """

  def __post_init__(self):
    super().__post_init__()
    if not self.threshold:
      raise ValueError(
          'The threshold is 0 percentage points; no gain is below it, so '
          "nothing would ever grow. It must be positive, such as '0.05'."
      )

  @property
  def _reach(self) -> int:
    return self.interval

  def _judge(self) -> tuple[bool, bool]:
    flat = self._flat(self.interval)
    return flat and self.last_growth == self.epoch - self.interval, flat


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequential(RoundRobin):
  """Grows at every check until an exact paired test finds no improvement.

  Not in the paper. The running maximum of noisy accuracies creeps upwards
  although nothing is learned, and `Periodic` takes every small record for a
  gain. This policy compares the same images before and after: for each one, how
  often the last K epochs' evaluations got it right against how often those of
  the interval that ended J epochs ago did (J rounded up to whole intervals), or
  those of the first interval as long as there is none that old. Images that are
  right more often now are gains, less often losses. The stop check fires unless
  the one-sided sign test

    p = P(Binomial(gains + losses, 1/2) >= gains) <= alpha

  finds an improvement; p is computed in integers. Sums over an interval are
  compared, and not single epochs, since one epoch's training noise moves many
  images at once and averages out.

  The error rate. Call a check unwarranted if since the earlier interval every
  image is as likely to have gained as to have lost. If images also do so
  independently of one another, an unwarranted check grows on with a probability
  of at most alpha. If epochs are independent, too, then checks that share no
  interval err independently, as any J / K consecutive ones do once the window
  is full. So, unless there are more than that, the number of unwarranted checks
  until all M stages are closed is at most negative binomial: M / (1 - alpha) on
  average, each but the last with a growth. M - 1 of these growths are Alg. 1's
  own, since a check closes one stage and grows another; those due to chance are
  at most M alpha / (1 - alpha) on average, 0.16 for three stages and alpha =
  0.05.

  What this does not cover. A gain that is real but older than the last growth:
  as with `Periodic`, what was learned within the last J epochs, or since the
  start, warrants a growth. A network that the last growth has set back: where
  `Periodic` remembers the best epoch, an interval that is no better on average
  closes a stage, so that K must leave time to recover from random initialisers,
  and J must be long enough for a gain.

  Nor training noise that is common to all images: where weights fluctuate from
  epoch to epoch so that the accuracy of the whole population has standard
  deviation s, the error rate is larger than alpha, the more so the more images
  there are and the fewer of them change, and at most 1/2 while that noise is
  symmetric. Simulated for alpha = 0.05, K = 3 and 94 % right, with s of 0.1,
  0.3 and 0.5 percentage points: 5, 9 and 18 % of 5,000 images that all change
  alike (28 % of them do from interval to interval), 6, 22 and 29 % if most are
  always right or always wrong (5 % change). A larger K averages more of it out;
  see `controls.null_band`, whose `common_sigma` is s.

  Attributes:
    window: J, epochs, at least K. The others are those of `RoundRobin`.
    error_rate: alpha, exact: a decimal string or a Fraction, never a float;
      above 0 and below 1/2.
    tallies: progress: per interval, the oldest first and the one under way
      last, how often each image was right (see `paired.add_hits`); those that a
      check can still need. With 50,000 images, K = 3 and J = 100 they are 35
      times 17 KB.
  """

  window: int
  error_rate: fractions.Fraction | str
  tallies: tuple[str, ...] = ()

  def __post_init__(self):
    _require_int('The stop window J (epochs)', self.window, 1)
    _set(self, 'error_rate', _exact_error_rate(self.error_rate))
    super().__post_init__()
    _require_window(self)

  @property
  def _kept(self) -> int:
    """How many tallies a check looks at, the first and the last of them."""
    return -(-self.window // self.interval) + 1

  def _remembered(self, observation: Observation) -> dict[str, Any]:
    if observation.hits is None:
      raise ValueError(
          'The sequential policy compares single examples, but the observation '
          f'of epoch {observation.epoch} has only counts; it needs its hits.'
      )
    size = {'total': observation.total, 'most': self.interval}
    if self.epoch % self.interval == 0:  # Another interval begins.
      finished, current = self.tallies, paired.empty_tally(**size)
    else:
      *finished, current = self.tallies
    current = paired.add_hits(current, observation.hits, **size)
    return {'tallies': (*finished, current)[-self._kept :]}

  def _judge(self) -> tuple[bool, bool]:
    if len(self.tallies) < 2:
      return False, True
    before, after = (
        paired.counts_of(tally, total=self.total, most=self.interval)
        for tally in (self.tallies[0], self.tallies[-1])
    )
    p_value = paired.p_value(*paired.gains_and_losses(before, after))
    return p_value > self.error_rate, True

  def _require_possible_memory(self):
    begun = -(-self.epoch // self.interval)
    wanted = min(begun, self._kept)
    if not isinstance(self.tallies, tuple) or len(self.tallies) != wanted:
      raise ValueError(
          f'There must be {wanted} tallies after epoch {self.epoch}, got '
          f'{self.tallies!r:.60}.'
      )
    for tally in self.tallies:
      paired.counts_of(tally, total=self.total, most=self.interval)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShot:
  """Trains for K epochs, then grows all stages at once, and is finished.

  Network morphism as in Wen et al. 2020, Table 2: the seed is trained to
  convergence, which is what the 'staircase' schedule does within K epochs, and
  fine-tuning follows the growth.

  Attributes:
    interval: K, epochs before the growth.
    depths: sub-modules per stage: the seed's at first, then the target's.
    target: sub-modules per stage after the growth, at least the seed's.
    epoch: progress: number of epochs seen.
  """

  interval: int
  depths: tuple[int, ...]
  target: tuple[int, ...]
  epoch: int = 0

  def __post_init__(self):
    _require_int('The growing interval K (epochs)', self.interval, 1)
    _set(self, 'depths', _exact_depths('depths', self.depths))
    _set(self, 'target', _exact_depths('target depths', self.target))
    depths, target = format_depths(self.depths), format_depths(self.target)
    if len(self.target) != len(self.depths):
      raise ValueError(
          f'The target depths {target} and the depths {depths} differ in their '
          'number of stages.'
      )
    if any(goal < depth for goal, depth in zip(self.target, self.depths)):
      raise ValueError(
          f'The target depths {target} are below the depths {depths} in some '
          'stage; one-shot growth only appends.'
      )
    _require_int('The epoch', self.epoch, 0)
    if self.epoch > self.interval:
      raise ValueError(
          f'Epoch {self.epoch} is beyond the growth at epoch {self.interval}.'
      )
    if (self.target == self.depths) != self.finished:
      raise ValueError(
          f'The depths are {depths} and the target depths {target} at epoch '
          f'{self.epoch}; they must differ before the growth at epoch '
          f'{self.interval}, and be equal from then on.'
      )

  @property
  def finished(self) -> bool:
    """Whether the growth has happened."""
    return self.epoch == self.interval

  def update(self, observation: Observation) -> tuple[Self, Decision]:
    """See `Policy.update`."""
    _require_next(self, observation)
    if observation.epoch < self.interval:
      return dataclasses.replace(self, epoch=observation.epoch), KEEP
    grown = dataclasses.replace(
        self, epoch=observation.epoch, depths=self.target
    )
    return grown, Decision('grow', target=self.target)

  def to_json(self) -> dict[str, Any]:
    """See `Policy.to_json`."""
    return _to_json(self)

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Self:
    """See `Policy.from_json`."""
    return _from_json(cls, data)


@final
@dataclasses.dataclass(frozen=True)
class EveryEpochs:
  """Decides to grow every n epochs; *what* grows is left to the method.

  Attributes:
    interval: n, epochs.
    max_epochs: the epoch that ends growing, after a last growth if one is due.
      None means no limit.
    epoch: progress: number of epochs seen.
  """

  interval: int
  max_epochs: int | None = None
  epoch: int = 0

  def __post_init__(self):
    _require_int('The growing interval (epochs)', self.interval, 1)
    _require_limited(self.epoch, self.max_epochs)

  @property
  def depths(self) -> tuple[int, ...]:
    """(): what grows, and so the depths, only the method knows."""
    return ()

  @property
  def finished(self) -> bool:
    """Whether the epoch limit is reached."""
    return self.epoch == self.max_epochs

  def update(self, observation: Observation) -> tuple[Self, Decision]:
    """See `Policy.update`."""
    _require_next(self, observation)
    policy = dataclasses.replace(self, epoch=observation.epoch)
    if policy.epoch % self.interval == 0:
      return policy, grow()
    return policy, FINISH if policy.finished else KEEP

  def to_json(self) -> dict[str, Any]:
    """See `Policy.to_json`."""
    return _to_json(self)

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Self:
    """See `Policy.from_json`."""
    return _from_json(cls, data)


@final
@dataclasses.dataclass(frozen=True)
class Fixed:
  """Never grows and never finishes: the baseline.

  Attributes:
    depths: sub-modules per stage; () to leave them to the architecture.
  """

  depths: tuple[int, ...] = ()

  def __post_init__(self):
    if self.depths != ():
      _set(self, 'depths', _exact_depths('depths', self.depths))

  @property
  def finished(self) -> bool:
    """False."""
    return False

  def update(self, observation: Observation) -> tuple[Self, Decision]:
    """See `Policy.update`."""
    del observation
    return self, KEEP

  def to_json(self) -> dict[str, Any]:
    """See `Policy.to_json`."""
    return _to_json(self)

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Self:
    """See `Policy.from_json`."""
    return _from_json(cls, data)


_POLICIES = {
    'periodic': Periodic,
    'convergent': Convergent,
    'sequential': Sequential,
    'oneshot': OneShot,
    'every_epochs': EveryEpochs,
    'fixed': Fixed,
}


def from_json(data: Mapping[str, Any]) -> Policy:
  """The exact inverse of `Policy.to_json`, of whichever policy of this file.

  Raises:
    ValueError: if the data is not what a policy wrote.
  """
  return _from_json(_stored_kind(data), data)


def format_depths(depths: tuple[int, ...]) -> str:
  """The pretty form of depths, such as '3-2-2'."""
  return '-'.join(map(str, depths))


def parse_depths(text: str) -> tuple[int, ...]:
  """The inverse of `format_depths`."""
  if not re.fullmatch(r'[1-9][0-9]{0,8}(-[1-9][0-9]{0,8})*', text):
    raise ValueError(
        f"Depths {text!r} must be positive whole numbers joined by '-', one "
        "per stage, such as '3-2-2'."
    )
  return tuple(map(int, text.split('-')))


def _set(instance: Any, name: str, value: Any):
  """Puts a field into its canonical form, in `__post_init__` only."""
  object.__setattr__(instance, name, value)


def _require_int(what: str, value: Any, least: int):
  if type(value) is not int or value < least:
    raise ValueError(
        f'{what} is {value!r}; it must be an int, at least {least}.'
    )


def _require_limited(epoch: Any, max_epochs: Any):
  _require_int('The epoch', epoch, 0)
  if max_epochs is None:
    return
  _require_int('The limit of growing epochs', max_epochs, 1)
  if epoch > max_epochs:
    raise ValueError(
        f'Epoch {epoch} is beyond the limit of {max_epochs} growing epochs.'
    )


def _require_window(policy: 'Periodic | Sequential'):
  if policy.window < policy.interval:
    raise ValueError(
        f'The stop window J is {policy.window} epochs; it must be at least the '
        f'growing interval K, {policy.interval}.'
    )


def _require_next(policy: Policy, observation: Observation):
  if policy.finished:
    raise ValueError(
        f'Growing has finished at epoch {policy.epoch}; epoch '
        f'{observation.epoch} is not for the policy.'
    )
  if observation.epoch != policy.epoch + 1:
    raise ValueError(
        f'The observation is of epoch {observation.epoch}; the next one is '
        f'{policy.epoch + 1}.'
    )


def _exact_threshold(value: Any) -> fractions.Fraction:
  return _exact_number('threshold', 'percentage points', value)


def _exact_error_rate(value: Any) -> fractions.Fraction:
  rate = _exact_number('error rate', 'a fraction', value)
  if not 0 < rate < fractions.Fraction(1, 2):
    raise ValueError(
        f'The error rate is {value!r}; it must be above 0 and below 0.5, such '
        "as '0.05'."
    )
  return rate


def _exact_number(what: str, unit: str, value: Any) -> fractions.Fraction:
  if isinstance(value, float):
    raise ValueError(
        f'The {what} is the float {value!r}, which may not be exactly what '
        f"was meant; give {unit} as a string, such as '0.05'."
    )
  if isinstance(value, str) and re.fullmatch(
      r'[0-9]+(\.[0-9]*)?|\.[0-9]+|[0-9]+/0*[1-9][0-9]*', value
  ):
    value = fractions.Fraction(value)
  if type(value) is int:
    value = fractions.Fraction(value)
  if not isinstance(value, fractions.Fraction) or value < 0:
    raise ValueError(
        f'The {what} is {value!r}; it must be {unit}, at least 0, as a decimal '
        "string, such as '0.05'."
    )
  return value


def _exact_depths(what: str, values: Any) -> tuple[int, ...]:
  if (
      not isinstance(values, (tuple, list))
      or not values
      or not all(type(value) is int and value >= 1 for value in values)
  ):
    raise ValueError(
        f'The {what} are {values!r}; they must be positive ints, one per '
        'stage, such as (1, 1, 1).'
    )
  return tuple(values)


def _stored_kind(data: Any) -> type[Policy]:
  if not isinstance(data, Mapping):
    raise ValueError(f'A policy is stored as a JSON object, not as {data!r}.')
  name = data.get('policy')
  if not isinstance(name, str) or name not in _POLICIES:
    raise ValueError(
        f"Policy {name!r} is unknown; 'policy' is one of {sorted(_POLICIES)}."
    )
  return _POLICIES[name]


def _from_json(kind: type[Policy], data: Any) -> Any:
  if _stored_kind(data) is not kind:
    raise ValueError(
        f'The stored policy is {data["policy"]!r}, not a {kind.__name__}.'
    )
  wanted = {field.name for field in dataclasses.fields(kind)}
  given = set(data) - {'policy'}
  if given != wanted:
    raise ValueError(
        f'A stored {data["policy"]} policy lacks {sorted(wanted - given)} and '
        f'has unknown {sorted(given - wanted, key=str)}; it must match exactly.'
    )
  for field in sorted({'caps', 'open_stages'} & wanted):
    if data[field] is None:
      raise ValueError(f'{field!r} of a stored policy is null, not a list.')
  return kind(**{key: _frozen(data[key]) for key in given})


def _to_json(policy: Policy) -> dict[str, Any]:
  names = {kind: name for name, kind in _POLICIES.items()}
  values = {
      field.name: _thawed(getattr(policy, field.name))
      for field in dataclasses.fields(policy)
  }
  return {'policy': names[type(policy)], **values}


def _thawed(value: Any) -> Any:
  if isinstance(value, fractions.Fraction):
    return str(value)
  return [_thawed(v) for v in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
  return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _is_subsequence(values: Any, of: tuple[int, ...]) -> bool:
  return (
      isinstance(values, tuple)
      and all(type(value) is int for value in values)
      and values == tuple(value for value in of if value in values)
  )


def _are_int_pairs(values: Any) -> bool:
  return isinstance(values, tuple) and all(
      isinstance(pair, tuple)
      and len(pair) == 2
      and all(type(value) is int for value in pair)
      for pair in values
  )


def _ascends(values: tuple[int, ...]) -> bool:
  return all(low < high for low, high in zip(values, values[1:]))
