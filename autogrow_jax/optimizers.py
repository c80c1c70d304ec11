"""Optimizers as optax transformations; the learning rate is data.

A transformation runs on packed trees, in which equal blocks are stacked, so
labels and masks must be functions of leaf *names* ('kernel', 'scale'), not of
ranks, and transformations that take norms leaf by leaf (LARS, LAMB) see one
leaf per stack. They must be functions of the parameters, never trees: a tree is
stale after the first growth.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Stochastic gradient descent with momentum and coupled L2.

  Attributes:
    momentum: of the heavy-ball kind.
    weight_decay: added to the gradient of every parameter, those of norms and
      biases included, before the momentum, as in Wen et al. 2020.
    clip_norm: largest global norm of a gradient; 0 for none.
    accumulate: batches over which gradients are averaged before an update.
  """

  momentum: float = 0.9
  weight_decay: float = 5e-4
  clip_norm: float = 0.0
  accumulate: int = 1

  def __post_init__(self):
    if not 0 <= self.momentum < 1:
      raise ValueError(f'momentum is in [0, 1), got {self.momentum}.')
    for name in ('weight_decay', 'clip_norm'):
      value = getattr(self, name)
      if not 0 <= value < float('inf'):
        raise ValueError(f'{name} is a number of at least 0, got {value}.')
    if self.accumulate < 1:
      raise ValueError(f'accumulate is at least 1, got {self.accumulate}.')


@dataclasses.dataclass(frozen=True)
class AuxConfig:
  """Descent on a method's own variables, on the schedule of the weights.

  Attributes:
    learning_rate: where that of the weights is the top rate.
    momentum: of the heavy-ball kind.
    weight_decay: added to gradients before the momentum.
  """

  learning_rate: float = 0.1
  momentum: float = 0.9
  weight_decay: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Learning rate as a pure function of phase and epoch.

  Attributes:
    learning_rate: the top rate.
    growing: 'constant'; 'staircase' or 'cosine': all of it within every
      interval of the policy, whether or not the network grew; 'whole': as the
      final phase, over all of the growing phase.
    interval: epochs between the policy's checks.
    finetune_epochs: N, length of the final phase.
    milestones: 'small' drops tenfold at 1/2 and 3/4 of a phase, 'imagenet' at
      1/3 and 2/3 (Wen et al. 2020), rounded down: a phase of one epoch has the
      lowest rate only. 'wide' drops fivefold at 3, 6 and 8 tenths; 'poly' falls
      as the 0.9th power of what is left. 'zaremba' keeps the rate for 14 of 55
      epochs and divides it by 1.15 with every one of them after that (Zaremba
      et al. 2014); a phase of another length is the same in its time.
    growing_epochs: length of the growing phase, for 'whole'.
  """

  learning_rate: float
  growing: str
  interval: int
  finetune_epochs: int
  milestones: str
  growing_epochs: int | None = None

  def rate(self, phase: str, epoch: int) -> float:
    """Learning rate of an epoch.

    Args:
      phase: 'growing', or any other name for the final phase.
      epoch: number of epochs of this phase before it.

    Returns:
      The rate.
    """
    if phase == 'growing':
      if self.growing == 'constant':
        return self.learning_rate
      length = self.interval
      if self.growing == 'whole':
        length = self.growing_epochs
      epoch %= length
      if self.growing == 'cosine':
        return self.learning_rate * (1 + math.cos(math.pi * epoch / length)) / 2
    else:
      length = self.finetune_epochs
    if self.milestones == 'zaremba':
      falling = max(0.0, (epoch + 1) * 55 / length - 14)
      return self.learning_rate / 1.15**falling
    if self.milestones == 'poly':
      return self.learning_rate * (1 - epoch / length) ** 0.9
    parts, factors = _MILESTONES[self.milestones]
    drops = sum(
        epoch >= numerator * length // denominator
        for numerator, denominator in parts
    )
    return self.learning_rate * factors[drops]


# Parts of a phase at which the rate drops, and its factors.
_MILESTONES = {
    'small': (((1, 2), (3, 4)), (1.0, 0.1, 0.01)),
    'imagenet': (((1, 3), (2, 3)), (1.0, 0.1, 0.01)),
    'wide': (((3, 10), (6, 10), (8, 10)), (1.0, 0.2, 0.04, 0.008)),
}


def make(
    config: OptimizerConfig,
    *,
    aux: AuxConfig | None = None,
    top_rate: float | None = None,
) -> optax.GradientTransformation:
  """The transformation of a configuration; see `with_learning_rate`.

  Args:
    config: of the weights.
    aux: of the method's own variables, which are then the second of two
      groups, 'weights' and 'aux'; None if it has none.
    top_rate: the largest learning rate of the weights, with `aux`.

  Returns:
    The transformation.
  """

  @optax.inject_hyperparams
  def sgd(learning_rate):
    weights = optax.chain(
        optax.clip_by_global_norm(config.clip_norm)
        if config.clip_norm
        else optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate, config.momentum),
    )
    if aux is None:
      return weights
    own = optax.chain(
        optax.add_decayed_weights(aux.weight_decay),
        optax.sgd(
            learning_rate * (aux.learning_rate / top_rate), aux.momentum
        ),
    )
    return optax.partition(
        {'weights': weights, 'aux': own},
        lambda params: {name: name for name in params},
    )

  tx = sgd(learning_rate=0.0)
  if config.accumulate > 1:
    tx = optax.MultiSteps(tx, config.accumulate).gradient_transformation()
  return tx


def with_learning_rate(opt_state: Any, learning_rate: jax.Array) -> Any:
  """Sets the learning rate in an optimizer state, if it has one as data."""
  if not optax.tree.get_all_with_path(opt_state, 'learning_rate'):
    return opt_state
  return optax.tree.set(
      opt_state, learning_rate=jnp.asarray(learning_rate, jnp.float32)
  )
