"""Mask variables: where they start, their temperatures, and their samples.

All trees here are {'channels': {group: (size,)}, 'layers': {block: ()}}.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import randomness
from autogrow_jax.methods.sparsify import space as space_lib
from autogrow_jax.networks import base

Tree = base.Tree
Space = space_lib.Space

# Probabilities within are ambiguous: the next sample may well differ.
AMBIGUOUS = (0.05, 0.95)


def full(
    architecture: Any, space: Space, channel: Any, layer: Any, dtype: Any
) -> Tree:
  """The same values for all channels, and for all layers."""
  return {
      'channels': {
          name: np.full(architecture.size(name), channel, dtype)
          for name, _ in space.groups
      },
      'layers': {block: np.array(layer, dtype) for block in space.layers},
  }


def seeded(tree: Tree, value: Any) -> Tree:
  """A tree with a value for the first channel of every group: the seed's."""
  channels = {name: leaf.copy() for name, leaf in tree['channels'].items()}
  for leaf in channels.values():
    leaf[0] = value
  return {**tree, 'channels': channels}


def probabilities(s: Tree, noise: Tree, beta: Tree) -> Tree:
  """sigmoid(beta (s + noise)), element by element."""
  return jax.tree.map(
      lambda s, noise, beta: jax.nn.sigmoid(beta * (s + noise)), s, noise, beta
  )


def temperatures(counters: Tree, final: float, queries: int) -> Tree:
  """Equation (7): inverse temperatures final^(t / T), from 1.

  Args:
    counters: t, how often each was sampled.
    final: what one that is sampled in all of a run's queries would end with.
    queries: T.

  Returns:
    Inverse temperatures.
  """
  growth = math.log(final) / max(1, queries)
  return jax.tree.map(lambda t: jnp.exp(growth * jnp.float32(t)), counters)


def steps_to_zero(distance: float, rate: float) -> float:
  """Steps of the penalty alone from s = -distance to 0, at beta = 1.

  ds = rate sigmoid(s) sigmoid(-s) in every step, integrated.

  Args:
    distance: to go.
    rate: |lambda| times the effective learning rate, see `effective_rate`.

  Returns:
    The number of steps.
  """
  return (2 * distance + 2 * math.sinh(distance)) / rate


def effective_rate(learning_rate: float, momentum: float) -> float:
  """What momentum makes of a learning rate, over many steps."""
  return learning_rate / (1 - momentum)


def distance_of(steps: float, rate: float) -> float:
  """The inverse of `steps_to_zero`."""
  return _bisect(
      lambda distance: steps_to_zero(distance, rate) < steps, 0.0, 30.0
  )


def least_distance(is_sparse: Callable[[float], bool]) -> float:
  """The smallest distance at which a predicate holds; it goes on to hold."""
  return _bisect(lambda distance: not is_sparse(distance), 0.0, 30.0)


def probability_of(density: Callable[[float], float], target: float) -> float:
  """The probability of everything at which the expected density is a target."""
  return _bisect(lambda p: density(p) < target, 0.0, 1.0)


def sample(key: jax.Array, p: Tree) -> Tree:
  """Bernoulli samples, from streams by the names of groups and blocks."""
  return _drawn(key, p, lambda key, p: jax.random.uniform(key, p.shape) < p)


def logistic(key: jax.Array, like: Tree) -> Tree:
  """Logistic noise, the difference of two Gumbel variables."""
  return _drawn(key, like, lambda key, p: jax.random.logistic(key, p.shape))


def guarded(q: Tree, s: Tree) -> Tree:
  """Samples with at least one channel in every group: that of the largest s."""
  channels = {}
  for name, drawn in q['channels'].items():
    drawn = np.array(drawn)
    if not drawn.any():
      drawn[np.argmax(s['channels'][name])] = True
    channels[name] = drawn
  return {**q, 'channels': channels}


def ambiguous(p: Tree) -> float:
  """The share of probabilities that are neither near 0 nor near 1."""
  low, high = AMBIGUOUS
  values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(p)])
  return float(np.mean((low < values) & (values < high)))


def _drawn(
    key: jax.Array, tree: Tree, draw: Callable[[jax.Array, Any], jax.Array]
) -> Tree:
  return {
      kind: {
          name: np.asarray(
              draw(randomness.stream(key, name), np.asarray(leaf))
          )
          for name, leaf in leaves.items()
      }
      for kind, leaves in tree.items()
  }


def _bisect(
    is_below: Callable[[float], bool], low: float, high: float
) -> float:
  """Where a predicate that holds at first no longer does."""
  if not is_below(low):
    return low
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if is_below(middle) else (low, middle)
  return high


@functools.lru_cache(maxsize=256)
def start(
    architecture: Any, space: Space, config: Any
) -> tuple[float, float]:
  """How far below zero channels and layers that are off start.

  So far that the penalty alone would take `config.start` of the run's updates
  to bring them to 0, but so that half of the budget is not expected to be there
  at once. Where there is no penalty, the latter alone decides.

  Args:
    architecture: the full-size network.
    space: its space.
    config: of the method.

  Returns:
    The distances, of channels and of layers.
  """
  target = 1 - config.target_sparsity
  rate = effective_rate(config.mask.learning_rate, config.mask.momentum)
  steps = config.start * config.run.steps / config.run.accumulate
  distances = [
      distance_of(steps, rate * target * pressure)
      if steps * rate * pressure
      else 0.0
      for pressure in (config.lambda1, config.lambda2)
  ]

  def density(least):
    off = [1 / (1 + math.exp(max(least, d))) for d in distances]
    return space_lib.density(
        architecture,
        space,
        seeded(full(architecture, space, *off, np.float64), 1.0),
        config.budget,
    )

  seed = density(30.0)
  least = least_distance(lambda d: density(d) <= max(target / 2, 1.01 * seed))
  return tuple(max(least, distance) for distance in distances)
