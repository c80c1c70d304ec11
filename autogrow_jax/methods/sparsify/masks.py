"""Mask variables: where they start, their temperatures, and their samples.

All trees here are {'channels': {group: (size,)}, 'layers': {block: ()}}.
"""

from collections.abc import Callable
import dataclasses
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
_DRAWS = 64  # Samples of which the one nearest to the budget is taken.


def on_host(tree: Tree, dtype: Any = None) -> Tree:
  """Copies leaves to NumPy arrays, of a type if it is given."""
  return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def full(
    architecture: Any, space: Space, channel: Any, layer: Any, dtype: Any
) -> Tree:
  """Makes a tree of one value for all channels, and one for all layers."""
  return {
      'channels': {
          name: np.full(architecture.size(name), channel, dtype)
          for name, _ in space.groups
      },
      'layers': {block: np.array(layer, dtype) for block in space.layers},
  }


def seeded(tree: Tree, value: Any) -> Tree:
  """Gives the first channel of every group, which the seed has, a value."""
  channels = {name: leaf.copy() for name, leaf in tree['channels'].items()}
  for leaf in channels.values():
    leaf[0] = value
  return {**tree, 'channels': channels}


@dataclasses.dataclass(frozen=True)
class Annealing:
  """How mask variables become probabilities, sharper with every sample.

  Attributes:
    final: inverse temperature of what is sampled in all queries; from 1.
    queries: T, number of samples of a run.
  """

  final: float
  queries: int

  def temperatures(self, counters: Tree) -> Tree:
    """Equation (7): inverse temperatures final^(t / T) of counters t."""
    growth = math.log(self.final) / max(1, self.queries)
    return jax.tree.map(lambda t: jnp.exp(growth * jnp.float32(t)), counters)

  def probabilities(self, s: Tree, memory: Tree) -> Tree:
    """sigmoid(beta (s + noise)), element by element.

    Args:
      s: mask variables.
      memory: the method's other leaves: 't', 'noise'.

    Returns:
      Probabilities.
    """
    return jax.tree.map(
        lambda s, noise, beta: jax.nn.sigmoid(beta * (s + noise)),
        s,
        memory['noise'],
        self.temperatures(memory['t']),
    )


def steps_to_zero(distance: float, rate: float) -> float:
  """Counts steps of the penalty alone from s = -distance to 0, at beta = 1.

  ds = rate sigmoid(s) sigmoid(-s) in every step, integrated.

  Args:
    distance: distance from s to 0.
    rate: |lambda| times the effective learning rate, see `effective_rate`.

  Returns:
    The number of steps.
  """
  return (2 * distance + 2 * math.sinh(distance)) / rate


def effective_rate(learning_rate: float, momentum: float) -> float:
  """Returns the step that momentum makes of a learning rate in the long run."""
  return learning_rate / (1 - momentum)


def distance_of(steps: float, rate: float) -> float:
  """Inverts `steps_to_zero`."""
  return _bisect(
      lambda distance: steps_to_zero(distance, rate) < steps, 0.0, 30.0
  )


def least_distance(is_sparse: Callable[[float], bool]) -> float:
  """Finds the smallest distance from which on a predicate holds."""
  return _bisect(lambda distance: not is_sparse(distance), 0.0, 30.0)


def probability_of(density: Callable[[float], float], target: float) -> float:
  """Finds the common probability at which the density meets a target."""
  return _bisect(lambda p: density(p) < target, 0.0, 1.0)


def sample(key: jax.Array, p: Tree) -> Tree:
  """Draws Bernoulli samples, from streams named by groups and blocks."""
  return _drawn(key, p, lambda key, p: jax.random.uniform(key, p.shape) < p)


def logistic(key: jax.Array, like: Tree) -> Tree:
  """Draws logistic noise, the difference of two Gumbel variables."""
  return _drawn(key, like, lambda key, p: jax.random.logistic(key, p.shape))


def guarded(q: Tree, s: Tree) -> Tree:
  """Turns the channel of the largest s on in every group that has none."""
  channels = {}
  for name, drawn in q['channels'].items():
    drawn = np.array(drawn)
    if not drawn.any():
      drawn[np.argmax(s['channels'][name])] = True
    channels[name] = drawn
  return {**q, 'channels': channels}


def nearest(
    key: jax.Array,
    p: Tree,
    s: Tree,
    *,
    density: Callable[[Tree], float],
    target: float,
) -> Tree:
  """Draws several samples and picks the one that comes nearest to a budget.

  Args:
    key: key of the samples.
    p: probabilities.
    s: mask variables, see `guarded`.
    density: cost of a sample over that of the full network.
    target: density to come near to.

  Returns:
    The sample.
  """
  draws = [
      guarded(sample(jax.random.fold_in(key, n), p), s) for n in range(_DRAWS)
  ]
  return min(draws, key=lambda q: abs(density(q) - target))


def ambiguous(p: Tree) -> float:
  """Returns the share of probabilities that are neither near 0 nor near 1."""
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
  """Finds where a predicate that holds at first no longer does."""
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
  """Picks how far below zero channels and layers that are off start.

  The penalty alone would take the part `config.start` of the run's updates to
  bring them to 0. At most half of the budget is expected to be there at once.
  Where there is no penalty, the latter alone decides.

  Args:
    architecture: the full-size network.
    space: configuration space of the network.
    config: settings of the method.

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
