"""What removing each channel would cost, and what makes up for it.

Unit c is removed, and others take over: a_c is replaced by

  r_0 + sum over j != c of r_j a_j,

which adds r_j v_c to what the reader multiplies a_j with, and a constant to
what it writes. With weights w = r and w_c = -1, and R_nj the product of the
gradient of example n with v_c a_j (j = 0: with the constant),

  s_n = R_n'w,   change of the loss = mean(R)'w + 1/2 w'Kw,   K = mean S_n S_n'

where S is as R with d' in place of d. There is no Taylor expansion in between:
the reader is linear.

  none           r = 0
  mean           r_0 is the mean of a_c
  least_squares  r minimises the mean square of what is left of a_c
  gauss_newton   r minimises the model above, with a ridge towards that one
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
import numpy as np

from autogrow_jax import linalg
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib

Model, Trees = signals_lib.Model, signals_lib.Trees
Batch = splits_lib.Batch

COMPENSATIONS = ('none', 'mean', 'least_squares', 'gauss_newton')
# Of the ridges, in units of the mean eigenvalue.
LEAST_SQUARES_DAMPING = 1e-6
GAUSS_NEWTON_DAMPING = 0.1
# Half the curvature of a prune beyond which its estimate is not trusted, nats.
LARGEST_DIVERGENCE = 0.02
_EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Prunes:
  """The prunes of all units of all sites.

  Attributes:
    candidates: (axis, unit) pairs.
    changes: (candidates,) change of the loss by each alone, nats.
    curvatures: (candidates,) w'Kw.
    weights: per axis, (units, units + 1) the w of each unit, the constant's
      last.
    usable: (candidates,) whether the statistics are finite and the model is
      trusted.
  """

  candidates: tuple[tuple[str, int], ...]
  changes: np.ndarray
  curvatures: np.ndarray
  weights: Mapping[str, np.ndarray]
  usable: np.ndarray

  @property
  def dropped(self) -> int:
    """How many candidates cannot be used."""
    return int(np.count_nonzero(~self.usable))


# Of a method that does not prune.
NONE = Prunes((), np.zeros(0), np.zeros(0), {}, np.zeros(0, bool))


def estimate(
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    *,
    compensation: str = 'gauss_newton',
    curvature: str = 'mc',
) -> Prunes:
  """Estimates the change of the loss by removing each unit.

  Args:
    model: the network.
    trees: its arrays.
    batches: the examples.
    key: of sampled labels.
    compensation: one of `COMPENSATIONS`.
    curvature: one of `signals.CURVATURES`; the factor of rank1-cal is measured
      on splits, and 1 here.

  Returns:
    The estimates.
  """
  signals_lib.check_curvature(curvature)
  if compensation not in COMPENSATIONS:
    raise ValueError(
        f'compensation is one of {", ".join(COMPENSATIONS)}, got '
        f'{compensation!r}.'
    )
  if not batches:
    raise ValueError('An estimate takes at least one batch.')
  total, examples = None, sum(len(labels) for _, labels in batches)
  for index, (x, labels) in enumerate(batches):
    draw = jax.random.fold_in(key, index)
    part = _sums(model, curvature, trees, x, labels, draw)
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  changes, curvatures, weights, usable = [], [], {}, []
  for site in model.sites:
    moments, slopes, gram = (
        np.asarray(leaf, np.float64) / examples for leaf in total[site.axis]
    )
    free = np.ones((site.units, site.units + 1), bool)
    free[np.arange(site.units), np.arange(site.units)] = False
    free[:, -1] = _takes_constant(site, trees)
    # A site with a value that is not finite stays so in `changes`.
    moments = moments if np.isfinite(moments).all() else np.eye(len(moments))
    w = _first_weights(moments, free, compensation)
    if compensation == 'gauss_newton':
      w = w + _refinement(slopes, gram, w, free)
    curvature_of = np.einsum('cj,cjk,ck->c', w, gram, w)
    changes.append(np.einsum('cj,cj->c', slopes, w) + curvature_of / 2)
    curvatures.append(curvature_of)
    weights[site.axis] = w
    usable.append(
        np.isfinite(changes[-1])
        & (curvature_of <= 2 * LARGEST_DIVERGENCE)
        & (site.units > 1)
    )
  return Prunes(
      tuple(
          (site.axis, unit)
          for site in model.sites
          for unit in range(site.units)
      ),
      np.concatenate(changes),
      np.concatenate(curvatures),
      weights,
      np.concatenate(usable),
  )


@dataclasses.dataclass(frozen=True)
class Joint:
  """The model of the loss over one step's splits and prunes together.

  Attributes:
    slopes: (1 + prunes,) of all splits together, then of each prune.
    gram: (1 + prunes, 1 + prunes).
  """

  slopes: np.ndarray
  gram: np.ndarray

  def change(self, included: Sequence[int]) -> float:
    """Change of the loss by the splits and some of the prunes, nats."""
    chosen = np.array([0, *(1 + number for number in included)])
    gram = self.gram[np.ix_(chosen, chosen)]
    return float(self.slopes[chosen].sum() + gram.sum() / 2)


def together(
    model: Model,
    trees: Trees,
    splits: splits_lib.Splits,
    removed: Sequence[tuple[str, int, np.ndarray]],
    batches: Sequence[Batch],
    key: jax.Array,
    *,
    samples: int,
) -> Joint:
  """Estimates a step as it will be applied, by mc.

  A compensation that lowers the loss and a split often do so by the same change
  of the logits, so that their estimates don't add.

  Args:
    model: the network.
    trees: its arrays.
    splits: of all sites, with u = 0 for the units that stay.
    removed: (axis, unit, w) of each prune.
    batches: the examples.
    key: of sampled labels.
    samples: of the label of each example.

  Returns:
    The joint model.
  """
  axes = tuple(axis for axis, _, _ in removed)
  units = [jnp.int32(unit) for _, unit, _ in removed]
  weights = [jnp.asarray(w, jnp.float32) for _, _, w in removed]
  slopes, gram, examples = 0.0, 0.0, 0
  for sample in range(samples):
    for index, (x, labels) in enumerate(batches):
      draw = jax.random.fold_in(jax.random.fold_in(key, sample), index)
      sums = _joint_sums(
          model, axes, trees, splits, units, weights, x, labels, draw
      )
      slopes = slopes + np.asarray(sums[0], np.float64)
      gram = gram + np.asarray(sums[1], np.float64)
      examples += len(labels)
  return Joint(slopes / examples, gram / examples)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _joint_sums(model, axes, trees, splits, units, weights, x, labels, key):
  """Sums over a batch for `Joint`."""
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature='mc'
  )
  by_split = [
      splits_lib.projections(
          site, trees, by_axis[site.axis], splits[site.axis]
      )
      for site in model.sites
  ]
  s, c = zip(*by_split, strict=True)
  columns = [tuple(sum(one.sum(-1) for one in kind) for kind in (s, c))]
  sites = {site.axis: site for site in model.sites}
  for axis, unit, w in zip(axes, units, weights, strict=True):
    columns.append(
        tuple(
            jnp.einsum('bj,j->b', product[:, unit], w, precision=_EXACT)
            for product in products(sites[axis], trees, by_axis[axis])
        )
    )
  s, c = (jnp.stack(kind, -1) for kind in zip(*columns, strict=True))
  return s.sum(0), jnp.einsum('bi,bj->ij', c, c, precision=_EXACT)


def products(
    site: sites_lib.Site, trees: Trees, signal: signals_lib.Signal
) -> tuple[jax.Array, jax.Array]:
  """R and S of every example and unit: (batch, units, units + 1) each."""
  kernel = trees.kernel(site.reader)
  a = site.activation(trees.weights, trees.stats, signal.entered, signal.h)
  flat = a.reshape(len(a), -1, site.units)
  back = jax.linear_transpose(lambda a: site.reader.linear(a, kernel), a)

  def of(gradient):
    (at_reader,) = back(gradient)
    own = jnp.einsum(
        'bpc,bpj->bcj', at_reader.reshape(flat.shape), flat, precision=_EXACT
    )
    # The constant is added at every output position, also at the border.
    summed = gradient.reshape(len(a), -1, gradient.shape[-1]).sum(1)
    constant = jnp.einsum(
        'bo,co->bc', summed, outgoing_sum(kernel), precision=_EXACT
    )
    return jnp.concatenate([own, constant[..., None]], -1)

  return of(signal.slope), of(signal.curvature)


def _takes_constant(site, trees) -> bool:
  """Whether there is a norm or a bias behind the reader for a constant."""
  return site.reader_norm is not None or trees.has_bias(site.reader)


def _first_weights(
    moments: np.ndarray, free: np.ndarray, compensation: str
) -> np.ndarray:
  """(units, units + 1) w, up to least squares; one inverse serves all units."""
  units = len(free)
  w = np.zeros(free.shape)
  if compensation == 'mean':
    w[:, -1] = moments[:units, -1] / moments[-1, -1]
  elif compensation != 'none':
    used = np.append(np.ones(units, bool), free[0, -1])
    size = np.count_nonzero(used)
    kept = moments[np.ix_(used, used)]
    ridge = max(LEAST_SQUARES_DAMPING * np.trace(kept) / size, linalg.JITTER)
    precision = np.linalg.inv(kept + ridge * np.eye(size))
    w[:, used] = -precision[:units] / np.diag(precision)[:units, None]
  w = np.where(free, w, 0)
  w[np.arange(units), np.arange(units)] = -1
  return w


def _refinement(
    slopes: np.ndarray, gram: np.ndarray, w: np.ndarray, free: np.ndarray
) -> np.ndarray:
  """(units, units + 1) step of each w to the damped minimum of its model."""
  gradient = slopes + np.einsum('cjk,ck->cj', gram, w)
  solution = linalg.solve_damped(
      jnp.asarray(gram * free[:, :, None] * free[:, None, :]),
      jnp.asarray(-gradient * free),
      damping=GAUSS_NEWTON_DAMPING,
  )
  return np.where(free, np.asarray(solution.x, np.float64), 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(model, curvature, trees, x, labels, key):
  """Sums over a batch, per axis.

  Returns:
    `{axis: (moments (units + 1, units + 1) of the activations and 1, averaged
    over positions; R (units, units + 1); SS' (units, units + 1, units + 1))}`
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  sums = {}
  for site in model.sites:
    signal = by_axis[site.axis]
    a = site.activation(trees.weights, trees.stats, signal.entered, signal.h)
    flat = a.reshape(len(a), -1, site.units)
    extended = jnp.concatenate([flat, jnp.ones_like(flat[..., :1])], -1)
    moments = jnp.einsum(
        'bpi,bpj->ij', extended, extended, precision=_EXACT
    )
    by_slope, by_curvature = products(site, trees, signal)
    sums[site.axis] = (
        moments / flat.shape[1],
        by_slope.sum(0),
        jnp.einsum(
            'bcj,bck->cjk', by_curvature, by_curvature, precision=_EXACT
        ),
    )
  return sums


def outgoing_sum(kernel: jax.Array) -> jax.Array:
  """(units, out): what a reader makes of a constant 1, inside the border."""
  return kernel.reshape(-1, *kernel.shape[-2:]).sum(0)
