"""Estimates the cost of removing each unit, compensation included.

The K of a site (see `compensation`) are units * (weights of w)^2 numbers. Where
those of all sites exceed `LARGEST_GRAMS` bytes, the largest sites go without:
their compensation is least squares, and mean (S_n'w)^2 is measured in a second
pass, for the w of each unit and for r = 0. For further removals, K is then
taken to be the multiple of the activations' second moments that gives the sum
of both. A batch's products, of which K is the sum, are formed for as many units
at a time as fit into `LARGEST_PRODUCTS` bytes.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax.methods.gauss_newton import compensation as compensation_lib
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import removals
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib

Model, Trees = signals_lib.Model, signals_lib.Trees
Batch = splits_lib.Batch

# Bytes of the K of all sites, and of a batch's products at any time.
LARGEST_GRAMS = 2**31
LARGEST_PRODUCTS = 2**28
_EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Prunes:
  """Estimated prunes of all units of all sites.

  Attributes:
    candidates: (axis, unit) pairs.
    changes: (candidates,) change of the loss by each alone, nats.
    curvatures: (candidates,) w'Kw.
    weights: per axis, (units, readers, units + 1) w of each unit alone.
    usable: (candidates,) true where statistics are finite and the model is
      trusted.
    remaining: per axis, the statistics that further removals need.
    passes: number of times each example was seen.
  """

  candidates: tuple[tuple[str, int], ...]
  changes: np.ndarray
  curvatures: np.ndarray
  weights: Mapping[str, np.ndarray]
  usable: np.ndarray
  remaining: Mapping[str, compensation_lib.Remaining]
  passes: int

  @property
  def dropped(self) -> int:
    """Number of candidates that cannot be used."""
    return int(np.count_nonzero(~self.usable))

  def alone(self, index: int) -> removals.Removal:
    """Returns the removal of one candidate and no other of its axis."""
    axis, unit = self.candidates[index]
    return removals.alone(axis, unit, self.weights[axis][unit])


# The prunes of a step without pruning.
NONE = Prunes((), np.zeros(0), np.zeros(0), {}, np.zeros(0, bool), {}, 0)


def estimate(
    model: Model,
    trees: Trees,
    learning: Sequence[Batch],
    judging: Sequence[Batch],
    key: jax.Array,
    *,
    compensation: str = 'gauss_newton',
    curvature: str = 'mc',
) -> Prunes:
  """Estimates the change of the loss by removing each unit.

  Args:
    learning: examples that choose the compensation.
    judging: examples that judge it, better others.
    compensation: one of `compensation.COMPENSATIONS`.
  """
  with_gram = _with_gram(model.sites)
  remaining = [
      _start(model, trees, batches, draw, with_gram, compensation, curvature)
      for batches, draw in (
          (learning, key), (judging, jax.random.fold_in(key, len(learning)))
      )
  ]
  remaining = {
      axis: compensation_lib.judged_by(remaining[0][axis], judge)
      for axis, judge in remaining[1].items()
  }
  everything = slice(None)
  found = {
      axis: compensation_lib.evaluated(remaining[axis], everything)
      for axis in with_gram
  }
  wide = tuple(site for site in model.sites if site.axis not in with_gram)
  if wide:
    weights = {
        site.axis: compensation_lib.least_squares(
            remaining[site.axis].chosen_by, everything
        )
        for site in wide
    }
    measured = _mean(
        functools.partial(
            _curvatures, dataclasses.replace(model, sites=wide), curvature,
            trees, {axis: w.astype('f4') for axis, w in weights.items()},
        ),
        judging,
        jax.random.fold_in(key, len(learning)),
    )
    for axis, w in weights.items():
      remaining[axis], found[axis] = compensation_lib.as_measured(
          remaining[axis], w, measured[axis]
      )
  return _collected(model, found, remaining, passes=2 + bool(wide))


def _start(model, trees, batches, key, with_gram, compensation, curvature):
  """Measures the statistics of all sites on some examples."""
  sums = _mean(
      functools.partial(
          _sums, model, curvature, with_gram, LARGEST_PRODUCTS, trees
      ),
      batches,
      key,
  )
  remaining = {}
  for site in model.sites:
    constants = np.array([
        reader.norm is not None or trees.has_bias(reader.layer)
        for reader in site.readers
    ])
    remaining[site.axis] = compensation_lib.start(
        site.axis, sums[site.axis], constants, compensation
    )
  return remaining


def _collected(
    model: Model,
    found: Mapping[str, compensation_lib.Evaluation],
    remaining: Mapping[str, compensation_lib.Remaining],
    *,
    passes: int,
) -> Prunes:
  """Collects the first evaluation of each site."""
  ordered = [found[site.axis] for site in model.sites]
  changes = np.concatenate([one.changes for one in ordered])
  curvatures = np.concatenate([one.curvatures for one in ordered])
  lonely = [np.full(site.units, site.units == 1) for site in model.sites]
  usable = compensation_lib.trusted(changes, curvatures)
  return Prunes(
      candidates=estimates_lib.candidates_of(model),
      changes=changes,
      curvatures=curvatures,
      weights={axis: one.weights for axis, one in found.items()},
      usable=usable & ~np.concatenate(lonely),
      remaining=remaining,
      passes=passes,
  )


def _with_gram(sites: Sequence[sites_lib.Site]) -> tuple[str, ...]:
  """Lists the axes whose K are formed: the smallest that fit together."""
  sizes = {  # In float32, for two sets of examples.
      site.axis: 4
      * 2
      * site.units
      * (len(site.readers) * (site.units + 1)) ** 2
      for site in sites
  }
  axes = sorted(sizes, key=sizes.get)
  ends = np.cumsum([sizes[axis] for axis in axes])
  return tuple(a for a, end in zip(axes, ends) if end <= LARGEST_GRAMS)


def _mean(sums, batches, key):
  """Averages a program's sums over all examples, on the host."""
  total = None
  for index, (x, labels) in enumerate(batches):
    part = sums(x, labels, jax.random.fold_in(key, index))
    total = part if total is None else linalg.plus(total, part)
  examples = sum(len(labels) for _, labels in batches)
  return jax.tree.map(lambda leaf: np.asarray(leaf) / examples, total)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sums(model, curvature, with_gram, chunk_bytes, trees, x, labels, key):
  """Sums the statistics of all sites over a batch.

  Returns:
    `{axis: (moments of the activations and 1, averaged over positions,
    (readers, units + 1, units + 1); R (units, readers, units + 1); and for
    axes of `with_gram`, SS' (units, weights of w, weights of w))}`
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  sums = {}
  for site in model.sites:
    signal = by_axis[site.axis]
    activations = removals.activations(site, trees, signal)
    slopes, curvatures = (
        [
            removals.received(
                reader.layer, trees.kernel(reader.layer), a.shape, gradient
            )
            for reader, a, gradient in zip(
                site.readers, activations, gradients, strict=True
            )
        ]
        for gradients in (signal.slope, signal.curvature)
    )
    flat = [removals.flat(a) for a in activations]
    moments = jnp.stack([_moments(a) for a in flat])
    summed = jnp.stack(
        [_summed(a, *slope) for a, slope in zip(flat, slopes, strict=True)], 1
    )
    sums[site.axis] = moments, summed
    if site.axis in with_gram:
      sums[site.axis] += (_gram(flat, curvatures, chunk_bytes),)
  return sums


def _moments(a):
  """Sums second moments of activations and 1 over a batch."""
  extended = jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)
  moments = jnp.einsum('bpi,bpj->ij', extended, extended, precision=_EXACT)
  return moments / a.shape[1]


def _summed(a, received, constant):
  """Sums a reader's R over a batch, (units, units + 1)."""
  products = jnp.einsum('bpc,bpj->cj', received, a, precision=_EXACT)
  return jnp.concatenate([products, constant.sum(0)[:, None]], -1)


def _gram(activations, received, chunk_bytes):
  """Sums SS' over a batch, for as many units at a time as there is room."""

  def of_unit(received):
    rows = []
    for a, (pulled, constant) in zip(activations, received, strict=True):
      rows.append(jnp.einsum('bp,bpj->bj', pulled, a, precision=_EXACT))
      rows.append(constant[:, None])
    rows = jnp.concatenate(rows, -1)
    return jnp.einsum('bj,bk->jk', rows, rows, precision=_EXACT)

  by_unit = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), received)
  batch, _, units = activations[0].shape
  width = len(activations) * (units + 1)
  chunk = max(1, chunk_bytes // (4 * batch * width))
  if chunk >= units:
    return jax.vmap(of_unit)(by_unit)
  return lax.map(of_unit, by_unit, batch_size=chunk)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _curvatures(model, curvature, trees, weights, x, labels, key):
  """Sums (S'w)^2 over a batch, per axis (2, units) for w and for r = 0."""
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  sums = {}
  for site in model.sites:
    signal = by_axis[site.axis]
    w = weights[site.axis]
    own = jnp.broadcast_to(jnp.eye(site.units)[:, None], w[..., :-1].shape)
    c = removals.projected(
        site,
        trees,
        removals.activations(site, trees, signal),
        signal.curvature,
        jnp.concatenate([w, -jnp.pad(own, ((0, 0), (0, 0), (0, 1)))]),
        jnp.concatenate([own, own]),
    )
    sums[site.axis] = jnp.square(c).sum(0).reshape(2, -1)
  return sums
