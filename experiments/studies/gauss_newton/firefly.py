"""Firefly: all splits of the network at once on the true loss (Wu et al. 2020).

Unlike the paper, children differ in their outgoing weights too, which makes the
candidates those of Gauss-Newton; there are no other candidates; and the scales
of all splits move from 0 to 1 together, so that first-order contributions add
up to the gain of all splits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import splits as splits_lib

from . import common
from . import trials

# Scales at which contributions are measured.
POINTS = 3


@dataclasses.dataclass(frozen=True)
class Firefly(ranking.RankingByGain):
  """Optimises all splits at once, and ranks them by their contributions.

  Attributes:
    trust: largest |u| in units of |w|, and largest distance of e from its start
      in units of |v|.
    epochs: epochs of RMSprop.
    learning_rate: learning rate of RMSprop.
  """

  trust: float = 0.5
  epochs: int = 1
  learning_rate: float = 1e-3

  def __post_init__(self):
    common.check_positive(self)

  def rank(self, architecture, model, trees, batches, key):
    start = splits_lib.start(model, trees, key)
    splits = start
    state = common.rmsprop(self.learning_rate).init(start)
    for _ in range(self.epochs):
      for x, labels in batches:
        splits, state = _step(
            architecture, model, self, trees, start, splits, state, x, labels
        )
    sums = common.total(
        _scale_gradients(
            architecture, model, trees, splits, (point + 0.5) / POINTS, x,
            labels,
        )
        for point in range(POINTS)
        for x, labels in batches
    )
    found = {}
    for axis, gradients in sums.items():
      gains = -gradients / (POINTS * charges.count(batches))
      found[axis] = common.RankedSite(splits[axis], gains, np.isfinite(gains))
    wider = architecture.resized(
        {site.axis: 2 * site.units for site in model.sites}
    )
    steps = costs.macs(wider) / costs.macs(architecture)
    passes = steps * (self.epochs + POINTS)
    return common.ranked(
        model, trees, found, (), passes * charges.count(batches)
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(architecture, model, config, trees, start, splits, state, x, labels):
  """Takes a step on the loss with all splits, back into the trust region."""
  units = common.all_units(model)

  def loss(splits):
    return trials.losses(
        architecture, model, trees, splits, units, x, labels
    ).mean()

  tx = common.rmsprop(config.learning_rate)
  updates, state = tx.update(jax.grad(loss)(splits), state)
  splits = optax.apply_updates(splits, updates)
  trusted = {}
  for site in model.sites:
    split, origin = splits[site.axis], start[site.axis]
    outgoing = splits_lib.outgoing(origin.e)
    e = outgoing + _shortened(
        splits_lib.outgoing(split.e) - outgoing,
        config.trust,
        # e starts at +-v/2.
        2 * outgoing,
    )
    u = _shortened(
        splits_lib.incoming(split.u),
        config.trust,
        common.incoming_weights(site, trees),
    )
    trusted[site.axis] = common.Split(
        splits_lib.as_incoming(u, split.u), splits_lib.as_outgoing(e, split.e)
    )
  return trusted, state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scale_gradients(architecture, model, trees, splits, scale, x, labels):
  """Sums d loss / d scale of each u over a batch, per axis (units,)."""
  units = common.all_units(model)

  def loss(scales):
    scaled = {
        axis: split.replace(u=tuple(
            u * scales[axis].reshape((1,) * (u.ndim - 1) + (-1,))
            for u in split.u
        ))
        for axis, split in splits.items()
    }
    return trials.losses(
        architecture, model, trees, scaled, units, x, labels
    ).sum()

  dtype = jnp.result_type(*jax.tree.leaves(splits))
  return jax.grad(loss)({
      site.axis: jnp.full(site.units, scale, dtype) for site in model.sites
  })


def _shortened(rows: jax.Array, limit: float, weights: jax.Array) -> jax.Array:
  """Shortens rows to a part of the length of the weights."""
  length = jnp.linalg.norm(rows, axis=-1)
  largest = limit * jnp.linalg.norm(weights, axis=-1)
  factor = jnp.minimum(1, largest / jnp.where(length > 0, length, 1))
  return rows * factor[:, None]
