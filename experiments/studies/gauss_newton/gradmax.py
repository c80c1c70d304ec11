"""GradMax: new channels with large gradients (Evci et al. 2022).

A new channel has zero outgoing weights, and incoming ones that make the
gradient of the outgoing ones large. That gradient is linear in the incoming
weights w where ReLU's derivative is taken as 1, and largest for the first
singular vectors of that map. Weights are as long as those of the site on
average. The gain is the squared norm of the gradient: the first-order gain of a
step with a learning rate of 1. Of the two signs of a singular vector, the one
with the larger mean pre-activation is taken, for an open ReLU.

Unlike the paper, maxima of pooling are taken where the mean channel has them,
and the channel starts with the norm of its parent.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import ranking

from . import common

# Smallest singular value of a usable direction, relative to the largest one.
SMALLEST_SINGULAR = 1e-5


@dataclasses.dataclass(frozen=True)
class GradMax(ranking.RankingByGain):
  """Adds the k-th best new channel of a site as a one-sided split of unit k."""

  def rank(self, architecture, model, trees, batches, key):
    del key
    refused = common.refused(
        model,
        trees,
        batches[0],
        _is_alike,
        'what lies behind it differs from unit to unit',
    )
    covered = [site for site in model.sites if site.axis not in dict(refused)]
    sums = {}
    if covered:
      small = dataclasses.replace(model, sites=tuple(covered))
      sums = common.total(
          _outgoing_gradients(small, trees, x, labels) for x, labels in batches
      )
    count = charges.count(batches)
    found = {
        site.axis: _ranked_site(
            site, trees, *(part / count for part in sums[site.axis])
        )
        for site in covered
    }
    passes = common.steps(architecture, {
        reader: trees.kernel(reader.layer).size // site.units * site.incoming
        for site in covered
        for reader in site.readers
    })
    ranked = common.ranked(model, trees, found, refused, passes * count)
    return dataclasses.replace(ranked, one_sided=True)


def _ranked_site(site, trees, gradients, x):
  """Returns the new channels of a site by its map and mean x."""
  if not np.isfinite(gradients).all():
    gradients = np.zeros_like(gradients)  # Rank 0: nothing is usable.
  _, values, rows = np.linalg.svd(gradients, full_matrices=False)
  rank = min(site.units, np.sum(values > SMALLEST_SINGULAR * values[0]))
  weights = np.asarray(common.incoming_weights(site, trees), np.float64)
  length = np.linalg.norm(weights, axis=-1).mean()
  factor = np.asarray(trees.factor(site.writers[0]), np.float64)[:rank]
  signs = np.where(factor * (rows[:rank] @ x) < 0, -1, 1)
  new, gains = weights.copy(), np.zeros(site.units)
  new[:rank] = length * signs[:, None] * rows[:rank]
  gains[:rank] = np.square(factor * length * values[:rank])
  split = common.without_e(site, trees, weights - new)
  return common.RankedSite(split, gains, gains > 0)


@functools.partial(jax.jit, static_argnums=0)
def _is_alike(site, trees, signal):
  """Tests that T, made linear, is one map for all units."""
  (h,) = signal.h
  first = lambda leaf: jnp.broadcast_to(leaf[..., :1], leaf.shape)
  pushed = _linearised(site, trees, signal)(first(h))
  return jnp.stack(
      [
          jnp.allclose(one, first(one), rtol=1e-4, equal_nan=True)
          for one in pushed
      ]
  ).all()


@functools.partial(jax.jit, static_argnums=0)
def _outgoing_gradients(model, trees, x, labels):
  """Sums the map that GradMax decomposes over a batch, per axis.

  Returns:
    `{axis: ((outgoing, incoming), (incoming,))}`: the map from a new channel's
    incoming weights to the gradient of its outgoing ones; and x, averaged over
    positions.
  """
  by_axis, sums = common.signals(model, trees, x, labels), {}
  for site in model.sites:
    signal = by_axis[site.axis]
    push = _linearised(site, trees, signal)
    # Features take the place of units, as many at a time.
    features = common.incoming_patches(site, signal)
    mean = features.reshape(len(x), -1, site.incoming).mean(1).sum(0)
    missing = -site.incoming % site.units
    none = [(0, 0)] * (features.ndim - 1)
    features = jnp.pad(features, [*none, (0, missing)])
    features = features.reshape(*features.shape[:-1], -1, site.units)

    def gradients(features, site=site, signal=signal, push=push):
      blocks = []
      for reader, a, slope in zip(
          site.readers, push(features), signal.slope, strict=True
      ):
        patches = reader.layer.patches(a)
        size, width = patches.shape[-2:]
        block = jnp.einsum(
            'pd,po->do',
            patches.reshape(-1, size * width),
            slope.reshape(-1, slope.shape[-1]),
            precision=common.EXACT,
        )
        block = block.reshape(size, width, -1).swapaxes(1, 2)
        blocks.append(block.reshape(-1, width))
      return jnp.concatenate(blocks)

    blocks = lax.map(gradients, jnp.moveaxis(features, -2, 0))
    blocks = jnp.moveaxis(blocks, 0, 1)
    blocks = blocks.reshape(len(blocks), -1)[:, : site.incoming]
    sums[site.axis] = blocks, mean
  return sums


def _linearised(
    site: common.Site, trees: common.Trees, signal: common.Signal
) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
  """Returns T's derivative at positive units that equal their mean."""
  (h,) = signal.h
  place = jnp.broadcast_to(common.rectified(h).mean(-1, keepdims=True), h.shape)
  read = lambda h: site.activations(
      trees.weights, trees.stats, signal.entered, (h,)
  )
  return lambda tangent: jax.jvp(read, (place,), (tangent,))[1]
