"""Splitting steepest descent (Liu et al. 2019).

u points along the eigenvector of the smallest eigenvalue of each channel's
splitting matrix S, (incoming, incoming): the mean over examples of the sum over
positions of g relu''(h) f^2 x x', with g the gradient of an example's loss at
the output of the site's ReLU, f the norm's factor, and relu'' that of a
softplus. Where S is large, the minimum of its Rayleigh quotient takes the place
of the eigenvector (Wang et al. 2019). The curvature of ReLUs behind the site's
first one is left out.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import ranking

from . import common

# Sharpness of the softplus log(1 + exp(beta h)) / beta in place of ReLU.
BETA = 3.0
# Most incoming weights of a unit for which splitting matrices are formed; only
# the smallest of their eigenvalues is needed.
LARGEST_MATRIX = 576


@dataclasses.dataclass(frozen=True)
class Steepest(ranking.RankingByGain):
  """Splits by the smallest eigenvalue lambda: gain -lambda |u|^2 / 2.

  Attributes:
    length: |u| in units of |w|.
    rayleigh_epochs: epochs of RMSprop where matrices are too large.
    learning_rate: learning rate of RMSprop.
  """

  length: float = 1e-2
  rayleigh_epochs: int = 10
  learning_rate: float = 1e-3

  def __post_init__(self):
    common.check_positive(self)

  def rank(self, architecture, model, trees, batches, key):
    refused = common.refused(
        model,
        trees,
        batches[0],
        _is_rectified,
        'what lies behind it does not begin with a ReLU',
    )
    covered = [site for site in model.sites if site.axis not in dict(refused)]
    large = [site for site in covered if site.incoming > LARGEST_MATRIX]
    small = [site for site in covered if site.incoming <= LARGEST_MATRIX]
    only = lambda sites: dataclasses.replace(model, sites=tuple(sites))
    pairs = {
        **_eigenpairs(only(small), trees, batches),
        **self._rayleigh_minima(only(large), trees, batches, key),
    }
    found = {}
    for site in covered:
      values, vectors = pairs[site.axis]
      weights = common.incoming_weights(site, trees)
      lengths = np.linalg.norm(weights, axis=-1)
      u = common.relative(site, trees, vectors, self.length)
      found[site.axis] = common.RankedSite(
          common.without_e(site, trees, u),
          -np.square(self.length * lengths) * values / 2,
          np.isfinite(values) & (values < 0),
      )
    passes = common.steps(architecture, {
        site.writers[0]: site.units * site.incoming**2 for site in small
    })
    if large:  # The quotient costs as much as the gradients that it needs.
      passes += 2 * (self.rayleigh_epochs + 1)
    return common.ranked(
        model, trees, found, refused, passes * charges.count(batches)
    )

  def _rayleigh_minima(self, model, trees, batches, key):
    """Finds `_eigenpairs` without matrices, by RMSprop on v'Sv / v'v."""
    if not model.sites:
      return {}
    vectors = {
        site.axis: common.unit_rows(
            jax.random.normal(
                jax.random.fold_in(key, index), (site.units, site.incoming)
            )
        )
        for index, site in enumerate(model.sites)
    }
    state = common.rmsprop(self.learning_rate).init(vectors)
    for _ in range(self.rayleigh_epochs):
      for x, labels in batches:
        vectors, state = _rayleigh_step(
            model, self.learning_rate, trees, vectors, state, x, labels
        )
    sums = common.total(
        _rayleigh_quotients(model, trees, vectors, x, labels)
        for x, labels in batches
    )
    return {
        axis: (values / charges.count(batches), np.asarray(vectors[axis]))
        for axis, values in sums.items()
    }


def _eigenpairs(
    model: common.Model, trees: common.Trees, batches: Sequence[common.Batch]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns the smallest eigenvalues (units,) of S and vectors, per axis."""
  if not model.sites:
    return {}
  sums = common.total(
      _splitting_matrices(model, trees, x, labels) for x, labels in batches
  )
  pairs = {}
  for axis, matrices in sums.items():
    finite = np.isfinite(matrices).all((1, 2))
    matrices = np.where(finite[:, None, None], matrices, 0)
    values, vectors = np.linalg.eigh(matrices / charges.count(batches))
    pairs[axis] = np.where(finite, values[:, 0], np.nan), vectors[..., 0]
  return pairs


@functools.partial(jax.jit, static_argnums=0)
def _is_rectified(site, trees, signal):
  """Tests that T(h) is T(relu(h)); otherwise there is no splitting matrix."""
  (h,) = signal.h
  read = lambda h: site.activations(
      trees.weights, trees.stats, signal.entered, (h,)
  )
  same = [
      jnp.array_equal(one, other, equal_nan=True)
      for h in (h, -h)
      for one, other in zip(read(h), read(jax.nn.relu(h)), strict=True)
  ]
  return jnp.stack(same).all()


@functools.partial(jax.jit, static_argnums=0)
def _splitting_matrices(model, trees, x, labels):
  """Sums S over a batch, per axis (units, incoming, incoming)."""
  by_axis, sums = common.signals(model, trees, x, labels), {}
  for site in model.sites:
    signal = by_axis[site.axis]
    density = _splitting_density(site, trees, signal)
    patches = common.incoming_patches(site, signal)
    patches = patches.reshape(-1, site.incoming)
    # One unit's weighted patches are as large as all patches.
    chunk = max(1, linalg.CHUNK_BYTES // patches.nbytes)
    sums[site.axis] = lax.map(
        lambda weights, patches=patches: jnp.einsum(
            'pd,pe->de', weights[:, None] * patches, patches,
            precision=common.EXACT,
        ),
        density.reshape(-1, site.units).T,
        batch_size=chunk,
    )
  return sums


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rayleigh_step(model, learning_rate, trees, vectors, state, x, labels):
  """Moves the vectors of all units, keeping their length of 1."""
  by_axis = common.signals(model, trees, x, labels)

  def total(vectors):
    quotients = _quotients(model, trees, vectors, by_axis)
    return sum(jnp.sum(value) for value in quotients.values()) / len(labels)

  gradients = jax.grad(total)(vectors)
  updates, state = common.rmsprop(learning_rate).update(gradients, state)
  vectors = optax.apply_updates(vectors, updates)
  return jax.tree.map(common.unit_rows, vectors), state


@functools.partial(jax.jit, static_argnums=0)
def _rayleigh_quotients(model, trees, vectors, x, labels):
  """Sums v'Sv / v'v over a batch, per axis (units,)."""
  by_axis = common.signals(model, trees, x, labels)
  return _quotients(model, trees, vectors, by_axis)


def _quotients(model, trees, vectors, by_axis):
  quotients = {}
  for site in model.sites:
    signal, rows = by_axis[site.axis], vectors[site.axis]
    density = _splitting_density(site, trees, signal)
    (kernel,) = common.as_incoming(site, trees, rows)
    r = site.writers[0].layer.linear(signal.x[0], kernel)
    weighted = (density * jnp.square(r)).reshape(-1, site.units)
    quotients[site.axis] = weighted.sum(0) / jnp.sum(jnp.square(rows), -1)
  return quotients


def _splitting_density(
    site: common.Site, trees: common.Trees, signal: common.Signal
) -> jax.Array:
  """Computes g relu''(h) f^2, (batch, ..., units): the weights of x x' in S.

  Behind the ReLU lies T at positive h. T is differentiated at a nearby positive
  place with the maxima of h.
  """
  (writer,), (h,) = site.writers, signal.h

  def read(h):
    inputs = site.activations(trees.weights, trees.stats, signal.entered, (h,))
    return tuple(
        reader.layer.linear(a, trees.kernel(reader.layer))
        for reader, a in zip(site.readers, inputs, strict=True)
    )

  (at_activation,) = jax.vjp(read, common.rectified(h))[1](signal.slope)
  gate = jax.nn.sigmoid(BETA * h)
  factor = trees.factor(writer).reshape((1,) * (h.ndim - 1) + (-1,))
  return at_activation * BETA * gate * (1 - gate) * jnp.square(factor)
