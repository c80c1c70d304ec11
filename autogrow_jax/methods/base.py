"""`Method`: what is minimised and what is changed, as pure functions."""

import abc
from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any

import jax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.networks import base as networks_base

Architecture = architecture_lib.Architecture
Extra = state_lib.Extra
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
  """The network in training mode, on one step's inputs.

  Attributes:
    execution: how the network is computed.
    layout: layout of the packed trees.
    x: (batch, height, width, channel), preprocessed and augmented; of text
      (batch, step).
    task: the task, whose loss methods minimise.
    key: key of what the network itself draws; None for nothing.
    depths: number of blocks per stack, see `networks.base.apply`.
    mean: averages a tree over the devices that share the batch.
  """

  execution: view.Execution
  layout: view.Layout
  x: jax.Array
  task: tasks.Task = tasks.Classes()
  key: jax.Array | None = None
  depths: Tree | None = None
  mean: Callable[[Tree], Tree] = lambda tree: tree

  def __call__(self, params: Tree, stats: Tree) -> tuple[jax.Array, Tree]:
    """Computes logits (batch, ..., classes) and new statistics.

    Args:
      params: {'weights', 'aux'}, packed.
      stats: {'network', 'method'}, packed.

    Returns:
      The logits and the statistics after the step.
    """
    weights, network, gates = self.execution.gated(self.layout, params, stats)
    logits, network = networks_base.apply(
        self.layout.bucket,
        weights,
        network,
        self.x,
        train=True,
        gates=gates,
        key=self.key,
        depths=self.depths,
    )
    return logits, {'network': network, 'method': stats['method']}


@dataclasses.dataclass(frozen=True)
class Situation:
  """State of a run that a method may use to propose a change.

  Attributes:
    architecture: the current architecture.
    state: the canonical state; not to be changed.
    key: key of everything that the growth draws.
    task: what the network predicts, and its loss.
    batches: makes endless training batches: inputs, of images (batch, height,
      width, channel) preprocessed and augmented, of text (batch, step); and
      labels (batch, ...) int32. They come from a stream of their own, so that
      drawing from them does not shift the run's batches.
    batches_per_epoch: number of batches of an epoch.
    train_accuracy: fraction, over the epoch just finished.
    weight_decay: weight decay of the run's optimizer.
    is_last: whether nothing grows after this.
  """

  architecture: Architecture
  state: state_lib.TrainState
  key: jax.Array
  task: tasks.Task
  batches: Callable[[], Iterator[tuple[jax.Array, jax.Array]]]
  batches_per_epoch: int
  train_accuracy: float
  weight_decay: float
  is_last: bool = False


@dataclasses.dataclass(frozen=True)
class Skip:
  """A decision that is not carried out.

  Attributes:
    reason: text for people.
    examples: training examples that the search for a change took.
    report: further values to record.
    is_final: whether growing ends because no later decision would be carried
      out either.
  """

  reason: str
  examples: int = 0
  report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  is_final: bool = False


class Method(abc.ABC):
  """A growing method: a frozen, hashable dataclass of hyper-parameters.

  A method has four members, of which only `propose` has no default, and a
  report. Methods derive from this class and never from one another.
  """

  @property
  def execution(self) -> view.Execution:
    """How the network is computed."""
    return view.Plain()

  def extra(self, architecture: Architecture) -> Extra:
    """Returns the method's own leaves for an architecture."""
    return state_lib.no_extra(architecture)

  def objective(
      self,
      network: Network,
      params: Tree,
      stats: Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
    """Computes what a step differentiates by `params`; runs inside jit.

    Args:
      network: the network on this step's inputs.
      params: {'weights', 'aux'}, packed.
      stats: {'network', 'method'}, packed.
      labels: (batch, ...) int32.
      key: key of this step.

    Returns:
      The loss, here that of the task, and (new stats, logits).
    """
    del key
    logits, stats = network(params, stats)
    return network.task.loss(logits, labels), (stats, logits)

  @abc.abstractmethod
  def propose(
      self, decision: policies.Decision, situation: Situation
  ) -> growth_lib.Growth | Skip | None:
    """Returns the change that carries out a decision; runs between epochs."""

  def report(
      self, architecture: Architecture, aux: Tree, memory: Tree
  ) -> dict[str, Any]:
    """Returns values to record after an epoch.

    Args:
      architecture: architecture of the canonical state.
      aux: the method's trainable leaves.
      memory: the method's other leaves.

    Returns:
      Values by name. 'shape' is the network in a few characters, for the
      progress line.
    """
    del aux, memory
    return {'shape': policies.format_depths(architecture.depths)}


@dataclasses.dataclass(frozen=True)
class FixedArchitecture(Method):
  """Trains a network as it is; the baseline."""

  def propose(
      self, decision: policies.Decision, situation: Situation
  ) -> None:
    del decision, situation
