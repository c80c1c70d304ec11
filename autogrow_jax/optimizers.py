"""Optimizers as optax transformations; the learning rate is data.

A transformation runs on packed trees, in which equal blocks are stacked, so
labels and masks must be functions of leaf *names* ('kernel', 'scale'), not of
ranks, and transformations that take norms leaf by leaf (LARS, LAMB) see one
leaf per stack. They must be functions of the parameters, never trees: a tree is
stale after the first growth.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

# Optimizers by the 'kind' that configurations store.
OPTIMIZERS = {
    'sgd': 'autogrow_jax.optimizers:SGD',
    'adamw': 'autogrow_jax.optimizers:AdamW',
    'lion': 'autogrow_jax.optimizers:Lion',
    'adafactor': 'autogrow_jax.optimizers:Adafactor',
    'muon': 'autogrow_jax.optimizers:Muon',
}


def _setting(default: Any, text: str) -> Any:
  return dataclasses.field(default=default, metadata={'help': text})


@dataclasses.dataclass(frozen=True)
class Optimizer(abc.ABC):
  """Settings that all optimizers have; `transformation` makes one.

  Attributes:
    weight_decay: coefficient on all parameters, those of norms and biases
      included. The optimizer's own text says whether it is coupled (added to
      the gradient) or decoupled (from the update, times the learning rate).
    clip_norm: largest global norm of a gradient; 0 for no limit.
    accumulate: batches over which gradients are averaged before an update.
  """

  weight_decay: float = _setting(5e-4, 'Coefficient of weight decay.')
  clip_norm: float = _setting(
      0.0, 'Largest global norm of a gradient; 0 for no limit.'
  )
  accumulate: int = _setting(
      1, 'Batches over which gradients are averaged before an update.'
  )

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 <= value < math.inf:
        raise ValueError(
            f'{field.name} is a number of at least 0, got {value}.'
        )
      if field.name in ('momentum', 'b1', 'b2') and value >= 1:
        raise ValueError(f'{field.name} is in [0, 1), got {value}.')
    if self.accumulate < 1:
      raise ValueError(f'accumulate is at least 1, got {self.accumulate}.')

  @abc.abstractmethod
  def transformation(
      self, learning_rate: jax.Array
  ) -> optax.GradientTransformation:
    """The optimizer with this learning rate."""


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
  """Stochastic gradient descent with momentum and coupled weight decay.

  The decay is added to the gradient of every parameter before the momentum, as
  in Wen et al. 2020.

  Attributes:
    momentum: decay rate of the heavy-ball momentum.
  """

  momentum: float = _setting(0.9, 'Heavy-ball momentum.')

  def transformation(
      self, learning_rate: jax.Array
  ) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(self.weight_decay),
        optax.sgd(learning_rate, self.momentum),
    )


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
  """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

  Attributes:
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
  """

  b1: float = _setting(0.9, 'Decay rate of the first moment.')
  b2: float = _setting(0.999, 'Decay rate of the second moment.')

  def transformation(
      self, learning_rate: jax.Array
  ) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate, self.b1, self.b2, weight_decay=self.weight_decay
    )


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
  """Lion with decoupled weight decay (Chen et al. 2023).

  Attributes:
    b1: weight of the momentum in an update.
    b2: decay rate of the momentum.
  """

  b1: float = _setting(0.9, 'Weight of the momentum in an update.')
  b2: float = _setting(0.99, 'Decay rate of the momentum.')

  def transformation(
      self, learning_rate: jax.Array
  ) -> optax.GradientTransformation:
    return optax.lion(
        learning_rate, self.b1, self.b2, weight_decay=self.weight_decay
    )


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
  """Adafactor with decoupled weight decay (Shazeer and Stern 2018)."""

  def transformation(
      self, learning_rate: jax.Array
  ) -> optax.GradientTransformation:
    # Its own decay is not multiplied by the learning rate.
    return optax.chain(
        optax.adafactor(learning_rate),
        optax.add_decayed_weights(-learning_rate * self.weight_decay),
    )


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
  """Muon for dense kernels, AdamW for the rest, decoupled decay (Jordan 2024).

  Stacks of kernels of several blocks are orthogonalised one by one.
  """

  def transformation(
      self, learning_rate: jax.Array
  ) -> optax.GradientTransformation:
    return optax.contrib.muon(
        learning_rate,
        weight_decay=self.weight_decay,
        adam_weight_decay=self.weight_decay,
        muon_weight_dimension_numbers=_dense_kernels,
    )


def _dense_kernels(params: Any) -> Any:
  """Dimension numbers of (input, output) and (block, input, output) kernels."""
  numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
  is_dense = lambda path, leaf: path[-1].key == 'kernel' and leaf.ndim < 4
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: numbers if is_dense(path, leaf) else None, params
  )


@dataclasses.dataclass(frozen=True)
class AuxConfig:
  """Descent on a method's own variables, on the schedule of the weights.

  Attributes:
    learning_rate: learning rate where that of the weights is the top rate.
    momentum: heavy-ball momentum.
    weight_decay: added to gradients before the momentum.
  """

  learning_rate: float = _setting(0.1, "Top rate of the method's variables.")
  momentum: float = _setting(0.9, 'Their heavy-ball momentum.')
  weight_decay: float = _setting(1e-6, 'Their weight decay.')


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
    optimizer: Optimizer | optax.GradientTransformation,
    *,
    aux: AuxConfig | None = None,
    top_rate: float | None = None,
) -> optax.GradientTransformation:
  """The transformation of an optimizer; see `with_learning_rate`.

  Args:
    optimizer: settings for the weights, or a transformation of one's own.
    aux: descent on the method's own variables, which are then the second of two
      groups, 'weights' and 'aux'; None if it has none.
    top_rate: the largest learning rate of the weights, with `aux`.

  Returns:
    The transformation.
  """
  if not isinstance(optimizer, Optimizer) and aux is None:
    return optimizer

  @optax.inject_hyperparams
  def injected(learning_rate):
    weights = optimizer
    if isinstance(optimizer, Optimizer):
      clip = optax.identity()
      if optimizer.clip_norm:
        clip = optax.clip_by_global_norm(optimizer.clip_norm)
      weights = optax.chain(clip, optimizer.transformation(learning_rate))
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

  tx = injected(learning_rate=0.0)
  if getattr(optimizer, 'accumulate', 1) > 1:
    tx = optax.MultiSteps(
        tx, optimizer.accumulate
    ).gradient_transformation()
  return tx


def with_learning_rate(opt_state: Any, learning_rate: jax.Array) -> Any:
  """Sets the learning rate in an optimizer state, if it has one as data."""
  if not optax.tree.get_all_with_path(opt_state, 'learning_rate'):
    return opt_state
  return optax.tree.set(
      opt_state, learning_rate=jnp.asarray(learning_rate, jnp.float32)
  )
