"""Shared pieces of the rivals.

Symbols as in `signals` and `splits` of `autogrow_jax.methods.gauss_newton`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib

Model, Trees = signals_lib.Model, signals_lib.Trees
Site, Signal = sites_lib.Site, signals_lib.Signal
Batch, Split = splits_lib.Batch, splits_lib.Split

EXACT = lax.Precision.HIGHEST
RMSPROP_DECAY = 0.9
_POSITIVE = 1e-6


@dataclasses.dataclass(frozen=True)
class RankedSite:
  """A rival's result for one site.

  Attributes:
    split: split of all its units.
    gains: (units,) gains.
    usable: (units,) true for units that may be split.
  """

  split: Split
  gains: np.ndarray
  usable: np.ndarray


def check_positive(rival: object) -> None:
  """Raises a ValueError unless all settings of a rival are positive."""
  for field in dataclasses.fields(rival):
    value = getattr(rival, field.name)
    if not 0 < value < float('inf'):
      raise ValueError(f'{field.name} is positive, got {value}.')


def ranked(
    model: Model,
    trees: Trees,
    found: Mapping[str, RankedSite],
    refused: tuple[tuple[str, str], ...],
    examples_seen: float,
) -> ranking.Ranked:
  """Collects the results of some sites; no unit of the others is usable."""
  in_order = []
  for site in model.sites:
    nothing = np.zeros((site.units, site.incoming))
    in_order.append(found.get(site.axis) or RankedSite(
        without_e(site, trees, nothing),
        np.zeros(site.units),
        np.zeros(site.units, bool),
    ))
  return ranking.Ranked(
      splits={
          site.axis: one.split
          for site, one in zip(model.sites, in_order, strict=True)
      },
      gains=np.concatenate([one.gains for one in in_order]).astype(np.float64),
      usable=np.concatenate([one.usable for one in in_order]),
      one_sided=False,
      examples_seen=round(examples_seen),
      refused=refused,
  )


def with_several_writers(sites: Sequence[Site]) -> tuple[tuple[str, str], ...]:
  """Lists (axis, reason) of sites with several writers."""
  return tuple(
      (site.axis, f'written by {len(site.writers)} layers')
      for site in sites
      if len(site.writers) > 1
  )


def refused(
    model: Model,
    trees: Trees,
    batch: Batch,
    suits: Callable[[Site, Trees, Signal], jax.Array],
    reason: str,
) -> tuple[tuple[str, str], ...]:
  """Lists (axis, reason) of sites with several writers, or that do not suit."""
  by_axis = signals(model, trees, *batch)
  shared = dict(with_several_writers(model.sites))
  return tuple(
      (site.axis, shared.get(site.axis, reason))
      for site in model.sites
      if site.axis in shared or not suits(site, trees, by_axis[site.axis])
  )


@functools.partial(jax.jit, static_argnums=0)
def signals(model, trees, x, labels):
  """Returns signals of a batch; their curvature means nothing."""
  return signals_lib.signals(
      model, trees, x, labels, jax.random.key(0), curvature='rank1'
  )[1]


def rectified(h: jax.Array) -> jax.Array:
  """Approximates relu(h) by a positive and increasing function."""
  return jnp.maximum(h, _POSITIVE * jnp.exp(jnp.minimum(h, 0)))


def incoming_patches(site: Site, signal: Signal) -> jax.Array:
  """Returns x for each position and weight, (batch, ..., incoming)."""
  patches = site.writers[0].layer.patches(signal.x[0])
  return patches.reshape(*signal.h[0].shape[:-1], site.incoming)


def all_units(model: Model) -> dict[str, np.ndarray]:
  """Returns the numbers of all units, per axis."""
  return {site.axis: np.arange(site.units) for site in model.sites}


def rmsprop(learning_rate: float) -> optax.GradientTransformation:
  """Returns the optimizer of firefly and of Rayleigh quotients."""
  return optax.rmsprop(learning_rate, RMSPROP_DECAY)


def unit_rows(rows: jax.Array) -> jax.Array:
  """Scales rows to length 1."""
  return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def relative(
    site: Site, trees: Trees, rows: jax.typing.ArrayLike, length: float
) -> np.ndarray:
  """Scales rows of length 1 to a length in units of |w|."""
  weights = np.linalg.norm(incoming_weights(site, trees), axis=-1)
  return length * weights[:, None] * np.asarray(rows)


def without_e(site: Site, trees: Trees, rows: jax.typing.ArrayLike) -> Split:
  """Returns the split with these u, (units, incoming), and e = 0."""
  return Split(
      as_incoming(site, trees, rows),
      tuple(
          jnp.zeros_like(trees.kernel(reader.layer)) for reader in site.readers
      ),
  )


def as_incoming(
    site: Site, trees: Trees, rows: jax.typing.ArrayLike
) -> tuple[jax.Array, ...]:
  """Converts rows (units, incoming) to the shapes of the writers' kernels."""
  kernels = [trees.kernel(writer.layer) for writer in site.writers]
  rows = jnp.asarray(rows, kernels[0].dtype)
  return splits_lib.as_incoming(rows, kernels)


def incoming_weights(site: Site, trees: Trees) -> jax.Array:
  """Returns w of every unit, (units, incoming)."""
  return splits_lib.incoming(
      [trees.kernel(writer.layer) for writer in site.writers]
  )


def total(parts):
  """Adds trees in float64 on the host."""
  result = None
  for part in parts:
    part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
    result = part if result is None else jax.tree.map(np.add, result, part)
  return result


def steps(
    architecture: architecture_lib.Architecture,
    products: Mapping[sites_lib.End, int],
) -> float:
  """Returns the training steps per image that signals and products cost.

  Args:
    architecture: architecture of the network.
    products: per layer, multiply-adds at each position of its output.

  Returns:
    One step and the cost of the products; 0 without any.
  """
  positions = {
      leaf.path[:-1]: leaf.positions
      for leaf in costs.leaves(architecture)
      if leaf.path[-1] == 'kernel'
  }
  macs = sum(
      count * positions[end.layer.path] for end, count in products.items()
  )
  step = (1 + costs.BACKWARD_OVER_FORWARD) * costs.macs(architecture)
  return 1 + macs / step if products else 0
