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

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import steps

from . import by_gain
from . import common

# Smallest singular value of a usable direction, relative to the largest one.
SMALLEST_SINGULAR = 1e-5


@dataclasses.dataclass(frozen=True)
class GradMax(by_gain.RankingByGain):
  """Adds the k-th best new channel of a site as a one-sided split of unit k."""

  def rank(self, snapshot: steps.Snapshot) -> by_gain.Ranked:
    model, trees = snapshot.model, snapshot.trees
    refused = common.refused(model)
    count, found = signals_lib.count(snapshot.learning), {}
    summed = common.sums(snapshot, refused, outgoing_gradients)
    for site, (gradients, x, is_alike) in summed:
      if is_alike < len(snapshot.learning):
        refused[site.axis] = 'what lies behind it differs from unit to unit'
      else:
        found[site.axis] = _ranked(site, trees, gradients / count, x / count)
    return common.ranked(
        snapshot, found, _cost(snapshot, found) * count, refused=refused,
        one_sided=True,
    )


def _ranked(site, trees, gradients, x):
  """Returns the new channels of a site by its map and mean x, with gains."""
  if not np.isfinite(gradients).all():
    gradients = np.zeros_like(gradients)  # Rank 0: nothing is usable.
  _, values, rows = np.linalg.svd(gradients, full_matrices=False)
  rank = min(site.units, np.sum(values > SMALLEST_SINGULAR * values[0]))
  weights = common.incoming(site, trees)
  length = np.linalg.norm(weights[: site.units], axis=-1).mean()
  factor = np.asarray(trees.local(site).factor(site.form.writers[0]), 'f8')
  factor = np.broadcast_to(factor, len(weights))[:rank]
  signs = np.where(factor * (rows[:rank] @ x) < 0, -1, 1)
  new, gains = weights.copy(), np.full(site.units, np.nan)
  new[:rank] = length * signs[:, None] * rows[:rank]
  gains[:rank] = np.square(factor * length * values[:rank])
  return common.without_e(site, trees, weights - new), gains


def _cost(snapshot, found):
  """Returns the training steps per image that signals and maps cost."""
  positions = {
      leaf.path[:-1]: leaf.positions
      for leaf in costs.leaves(snapshot.architecture)
      if leaf.path[-1] == 'kernel'
  }
  macs = sum(
      site.incoming * site.outgoing * positions[site.path(reader.layer.path)]
      for site in snapshot.model.sites
      for reader in site.form.readers
      if site.axis in found
  )
  step = (1 + costs.BACKWARD_OVER_FORWARD) * costs.macs(snapshot.architecture)
  return 1 + macs / step


@functools.partial(jax.jit, static_argnums=0)
def outgoing_gradients(form, local, signal):
  """Sums the map that GradMax decomposes over a batch.

  Returns:
    (outgoing, incoming), the map from a new channel's incoming weights to the
    gradient of its outgoing ones; (incoming,), x averaged over positions; and
    whether T is one map for all units.
  """
  (h,) = signal.h
  place = jnp.broadcast_to(common.rectified(h).mean(-1, keepdims=True), h.shape)
  read = lambda h: form.read(local.weights, local.stats, signal.entered, (h,))
  push = lambda tangent: jax.jvp(read, (place,), (tangent,))[1]
  first = lambda a: jnp.broadcast_to(a[..., :1], a.shape)
  is_alike = jnp.stack([
      jnp.allclose(one, first(one), rtol=1e-4, equal_nan=True)
      for one in push(first(h))
  ]).all()
  # Features take the place of units, as many at a time.
  features, units = common.patches(form, signal), h.shape[-1]
  size = features.shape[-1]
  mean = features.reshape(len(h), -1, size).mean(1).sum(0)
  none = [(0, 0)] * (features.ndim - 1)
  features = jnp.pad(features, [*none, (0, -size % units)])
  features = features.reshape(*features.shape[:-1], -1, units)

  def gradients(features):
    blocks = []
    for reader, a, slope in zip(
        form.readers, push(features), signal.slope, strict=True
    ):
      slope = slope.reshape(len(slope), -1, slope.shape[-1])
      patches = reader.layer.patches(a)
      patches = patches.reshape(*slope.shape[:2], -1, units)
      block = jnp.einsum('bptu,bpo->tou', patches, slope)
      blocks.append(block.reshape(-1, units))
    return jnp.concatenate(blocks)

  blocks = lax.map(gradients, jnp.moveaxis(features, -2, 0))
  blocks = jnp.moveaxis(blocks, 0, 1)
  return blocks.reshape(blocks.shape[0], -1)[:, :size], mean, is_alike
