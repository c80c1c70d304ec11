"""The protocol of policies: what they observe, and what they decide."""

import abc
from collections.abc import Mapping
import dataclasses
import json
from typing import Any, Literal, Protocol, Self, TypeAlias

import numpy as np

Depths: TypeAlias = tuple[int, ...]  # Sub-modules per stage.


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
    twin_hits: hits of the ungrown twin; None without one.
  """

  epoch: int
  step: int
  correct: int
  total: int
  loss_sum: float
  cost: int
  hits: np.ndarray | None = None
  twin_hits: np.ndarray | None = None


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
    twin: 'new' to remember the network of before this growth as the twin,
      'back' to put the twin in place of the network first and then likewise.
  """

  action: Literal['keep', 'grow', 'finish']
  stage: int | None = None
  closed: tuple[int, ...] = ()
  capped: tuple[int, ...] = ()
  target: Depths | None = None
  twin: Literal['', 'new', 'back'] = ''

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
