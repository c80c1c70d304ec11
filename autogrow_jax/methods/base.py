"""`Method`: what is minimised and what is changed, as pure functions."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import growth
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.networks import base as networks_base

Architecture = architecture_lib.Architecture
Tree = dict[str, Any]


class Gated(NamedTuple):
  """The network that packed parameters stand for.

  Attributes:
    weights: packed.
    stats: packed network statistics.
    gates: see `networks.base.apply`.
  """

  weights: Tree
  stats: Tree
  gates: Tree | None = None


@dataclasses.dataclass(frozen=True)
class Forward:
  """The network in training mode, on one step's inputs.

  Attributes:
    layout: of the packed trees.
    x: (batch, height, width, channel), preprocessed and augmented; of text
      (batch, step).
    key: of what the network itself draws; None for nothing.
    depths: see `networks.base.apply`.
  """

  layout: view.Layout
  x: jax.Array
  key: jax.Array | None = None
  depths: Tree | None = None

  def __call__(
      self, weights: Tree, stats: Tree, gates: Any
  ) -> tuple[jax.Array, Tree]:
    """Logits (batch, classes) and new statistics; trees are packed."""
    return networks_base.apply(
        self.layout.bucket,
        weights,
        stats,
        self.x,
        train=True,
        gates=gates,
        key=self.key,
        depths=self.depths,
    )


@dataclasses.dataclass(frozen=True)
class Situation:
  """What a method may look at when it proposes a change.

  Attributes:
    architecture: the current one.
    state: the canonical state; not to be changed.
    batches: endless training batches (inputs (batch, height, width, channel)
      preprocessed and augmented, labels (batch,)), from a stream of their own,
      so that drawing from them does not shift the run's batches.
    batches_per_epoch: how many make an epoch.
    train_accuracy: fraction, over the epoch just finished.
    weight_decay: of the run's optimizer.
    is_last: whether nothing grows after this.
  """

  architecture: Architecture
  state: state_lib.TrainState
  batches: Callable[[], Iterator[tuple[jax.Array, jax.Array]]]
  batches_per_epoch: int
  train_accuracy: float
  weight_decay: float
  is_last: bool = False


@dataclasses.dataclass(frozen=True)
class Skip:
  """A decision that is not carried out.

  Attributes:
    reason: why, for people.
    images: that looking for a change trained on, as of a `growth.Growth`.
    report: what else is recorded of it.
    is_final: no later decision would be carried out either; growing ends.
  """

  reason: str
  images: int = 0
  report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  is_final: bool = False


class Method(Protocol):
  """A growing method: a frozen, hashable dataclass of hyper-parameters.

  Attributes:
    deepens: whether its growths append the blocks that decisions name, for
      which layouts then have spare room. Single blocks are not to be seen in
      its programs: it has no leaves of theirs, and nothing that runs inside jit
      unpacks a tree.
    aux: how its trainable leaves are trained; None if it has none.
    needs_whole_batches: whether its objective changes leaves by more than
      means over a batch, so that a mean over devices, with a part of it each,
      would not be what one device makes of the whole.
  """

  deepens: ClassVar[bool]

  @property
  def needs_whole_batches(self) -> bool:
    ...

  @property
  def aux(self) -> optimizers.AuxConfig | None:
    ...

  def extra(self, architecture: Architecture) -> tuple[Tree, Tree]:
    """Additional leaves.

    Args:
      architecture: the architecture.

    Returns:
      (trainable, other) trees, keyed by axis or block name so that growth
      carries them.
    """
    ...

  def active(
      self, architecture: Architecture, memory: Tree
  ) -> view.Active | None:
    """What of the network is computed, from the other leaves; None for all."""
    ...

  def gated(self, layout: view.Layout, params: Tree, stats: Tree) -> Gated:
    """The network that packed parameters stand for; runs inside jit."""
    ...

  def objective(
      self,
      forward: Forward,
      params: Tree,
      stats: Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
    """What a step differentiates with respect to `params`; runs inside jit.

    Args:
      forward: the network on this step's inputs.
      params: {'weights', 'aux'}, packed.
      stats: {'network', 'method'}, packed.
      labels: (batch, ...) int32.
      key: this step's.

    Returns:
      The loss, and (new stats, logits).
    """
    ...

  def applied(
      self, architecture: Architecture, updates: Tree, stats: Tree
  ) -> Tree:
    """What of an optimizer's updates is made; runs inside jit.

    Args:
      architecture: of the canonical state.
      updates: {'weights', 'aux'}, packed.
      stats: {'network', 'method'} that the step began with, packed.

    Returns:
      What to add to the parameters.
    """
    ...

  def propose(
      self, decision: policies.Decision, situation: Situation
  ) -> growth.Growth | Skip | None:
    """The change that carries out a decision, if any; runs between epochs."""
    ...

  def describe(self, architecture: Architecture, memory: Tree) -> str:
    """The shape of a network in a few characters, for the progress line."""
    ...

  def metrics(
      self, architecture: Architecture, aux: Tree, memory: Tree
  ) -> dict[str, Any]:
    """What to record after an epoch besides what all methods have."""
    ...


@dataclasses.dataclass(frozen=True)
class FixedArchitecture:
  """Trains a network as it is; the baseline."""

  deepens: ClassVar[bool] = False

  @property
  def needs_whole_batches(self) -> bool:
    return False

  @property
  def aux(self) -> optimizers.AuxConfig | None:
    return None

  def extra(self, architecture: Architecture) -> tuple[Tree, Tree]:
    return state_lib.no_extra(architecture)

  def active(
      self, architecture: Architecture, memory: Tree
  ) -> view.Active | None:
    del architecture, memory
    return None

  def gated(self, layout: view.Layout, params: Tree, stats: Tree) -> Gated:
    del layout
    return Gated(params['weights'], stats['network'])

  def objective(
      self,
      forward: Forward,
      params: Tree,
      stats: Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
    """Mean cross-entropy of the network that parameters stand for, in nats."""
    del key
    logits, network = forward(*self.gated(forward.layout, params, stats))
    return mean_cross_entropy(logits, labels), (
        {'network': network, 'method': stats['method']},
        logits,
    )

  def applied(
      self, architecture: Architecture, updates: Tree, stats: Tree
  ) -> Tree:
    del architecture, stats
    return updates

  def propose(
      self, decision: policies.Decision, situation: Situation
  ) -> growth.Growth | Skip | None:
    del decision, situation
    return None

  def describe(self, architecture: Architecture, memory: Tree) -> str:
    del memory
    return policies.format_depths(architecture.depths)

  def metrics(
      self, architecture: Architecture, aux: Tree, memory: Tree
  ) -> dict[str, Any]:
    del architecture, aux, memory
    return {}


def with_penalty(loss: jax.Array, penalty: jax.Array) -> jax.Array:
  """A loss with the gradient of a penalty, which does not show in its value."""
  return loss + (penalty - jax.lax.stop_gradient(penalty))


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean over all labels that count, in nats.

  Args:
    logits: (batch, ..., classes).
    labels: (batch, ...); where an example has several, -1 does not count.

  Returns:
    A scalar; 0 if none counts.
  """
  losses = cross_entropy(logits, labels)
  if labels.ndim == 1:
    return jnp.mean(losses)
  counts = labels >= 0
  return jnp.sum(losses, where=counts) / jnp.maximum(1, jnp.sum(counts))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Per label, in nats: (batch, ..., classes), (batch, ...) -> the latter."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
