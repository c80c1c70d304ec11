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
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps

from . import by_gain
from . import common
from . import trials

# Scales at which contributions are measured.
POINTS = 3


@dataclasses.dataclass(frozen=True)
class Firefly(by_gain.RankingByGain):
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

  def rank(self, snapshot: steps.Snapshot) -> by_gain.Ranked:
    model, trees, batches = snapshot.model, snapshot.trees, snapshot.learning
    architecture, sites = snapshot.architecture, model.sites
    static = padding.padded(architecture), sites
    start = splits = splits_lib.start(model, trees, snapshot.rng)
    state = _rmsprop(self.learning_rate).init(start)
    for _ in range(self.epochs):
      for batch in batches:
        splits, state = _step(
            *static, self, trees, start, splits, state, *batch
        )
    count = signals_lib.count(batches)
    sums = signals_lib.add(
        _scale_gradients(*static, trees, splits, (i + 0.5) / POINTS, *batch)
        for i in range(POINTS)
        for batch in batches
    )
    found = {
        axis: (splits[axis], -gradients / (POINTS * count))
        for axis, gradients in sums.items()
    }
    wider = architecture.resized({s.axis: 2 * s.units for s in sites})
    ratio = costs.macs(wider) / costs.macs(architecture)
    return common.ranked(
        snapshot, found, ratio * (self.epochs + POINTS) * count
    )


def _rmsprop(learning_rate: float) -> optax.GradientTransformation:
  return optax.rmsprop(learning_rate, 0.9)


def _all_units(architecture, sites):
  return {s.axis: np.arange(architecture.size(s.axis)) for s in sites}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(architecture, sites, config, trees, start, splits, state, x, labels):
  """Takes a step on the loss with all splits, back into the trust region."""
  units = _all_units(architecture, sites)

  def loss(splits):
    return trials.losses(
        architecture, sites, trees, splits, units, x, labels
    ).mean()

  tx = _rmsprop(config.learning_rate)
  updates, state = tx.update(jax.grad(loss)(splits), state)
  splits = optax.apply_updates(splits, updates)
  trusted = {}
  for site in sites:
    split, origin = splits[site.axis], start[site.axis]
    local = trees.local(site)
    w, v = (local.kernels(ends) for ends in (
        site.form.writers, site.form.readers
    ))
    moved = jax.tree.map(jnp.subtract, split.e, origin.e)
    trusted[site.axis] = splits_lib.Split(
        _shortened(split.u, w, config.trust, -1),
        jax.tree.map(
            jnp.add, origin.e, _shortened(moved, v, config.trust, -2)
        ),
    )
  return trusted, state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scale_gradients(architecture, sites, trees, splits, scale, x, labels):
  """Sums d loss / d scale of each u over a batch, per axis (units,)."""
  units = _all_units(architecture, sites)

  def loss(scales):
    scaled = {
        axis: split.replace(u=_times(split.u, scales[axis], -1))
        for axis, split in splits.items()
    }
    return trials.losses(
        architecture, sites, trees, scaled, units, x, labels
    ).sum()

  return jax.grad(loss)(
      {axis: jnp.full(len(each), scale) for axis, each in units.items()}
  )


def _shortened(kernels, weights, limit, dim):
  """Shortens each unit's part to a part of the length of its weights."""

  def lengths(kernels):
    squares = (jnp.square(jnp.moveaxis(k, dim, 0)) for k in kernels)
    return jnp.sqrt(sum(k.reshape(len(k), -1).sum(-1) for k in squares))

  length, largest = lengths(kernels), limit * lengths(weights)
  factor = jnp.minimum(1, largest / jnp.where(length > 0, length, 1))
  return _times(kernels, factor, dim)


def _times(kernels, factor, dim):
  """Multiplies kernels by a factor of each unit."""
  return tuple(
      k * axes_lib.along(factor, k.ndim + dim, k.ndim) for k in kernels
  )
