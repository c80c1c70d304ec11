"""Learns the splits of all channels on frozen weights.

The model of a unit's split (u, e) is mean(s) + mean(c^2) / 2, see `splits`. It
is quadratic in u and in e alone, so the two are found by alternating damped
least squares. The models of different units are independent: all channels are
learned at the same time, and every solve is vmapped.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import matrix_free
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.networks import common

Model, Trees = signals_lib.Model, signals_lib.Trees
Batch, Splits = splits_lib.Batch, splits_lib.Splits

# Weights of a unit, and bytes of the matrices of all units of a site, up to
# which a block is solved by factoring; larger ones are `matrix_free`.
LARGEST_SOLVE = 1152
LARGEST_MATRICES = 2**30


@dataclasses.dataclass(frozen=True)
class LearnConfig:
  """Settings of alternating least squares.

  Attributes:
    curvature: one of `signals.CURVATURES`.
    sweeps: sweeps over both blocks; more sweeps, or less damping, leave the
      region where the quadratic model holds.
    damping: damping of each solve, in units of the mean eigenvalue.
    trust: largest step of u in a sweep, in units of the norm of w.
  """

  curvature: str = dataclasses.field(
      default='mc',
      metadata={
          'help': 'Curvature of the loss: mc (labels sampled from the '
                  'model) or rank1 (from the true labels).'
      },
  )
  sweeps: int = dataclasses.field(
      default=2,
      metadata={'help': 'Alternating sweeps over both halves of the splits.'},
  )
  damping: float = dataclasses.field(
      default=0.3,
      metadata={'help': 'Damping of each solve, in mean eigenvalues.'},
  )
  trust: float = dataclasses.field(
      default=0.5,
      metadata={'help': 'Largest step in a sweep, in norms of the weights.'},
  )

  def __post_init__(self):
    common.check_choice('curvature', self.curvature, signals_lib.CURVATURES)
    if self.sweeps < 1:
      raise ValueError(f'sweeps is at least 1, got {self.sweeps}.')
    for name in ('damping', 'trust'):
      if not 0 < getattr(self, name) < float('inf'):
        raise ValueError(f'{name} is positive, got {getattr(self, name)}.')


@dataclasses.dataclass(frozen=True)
class Learned:
  """Learned splits.

  Attributes:
    splits: splits of every site.
    codes: per axis, (units,) worst `linalg.Code` of a unit's solves.
  """

  splits: Splits
  codes: dict[str, np.ndarray]


def learn(
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    config: LearnConfig = LearnConfig(),
) -> Learned:
  """Learns the splits of all units of all sites.

  Each block of each sweep sees all examples, with other sampled labels.

  Raises:
    ValueError: if there are no examples.
  """
  if not batches:
    raise ValueError('Splits are learned from batches of examples; got none.')
  splits = splits_lib.start(model, trees, jax.random.fold_in(key, 0))
  codes = {site.axis: np.zeros(site.units, int) for site in model.sites}
  for number in range(2 * config.sweeps):
    block = 'ue'[number % 2]
    block_key = jax.random.fold_in(key, number + 1)
    solutions = {}
    for wide, solve in ((False, _by_factoring), (True, _by_products)):
      sites = tuple(s for s in model.sites if is_wide(s, block) == wide)
      if sites:
        solutions |= solve(
            dataclasses.replace(model, sites=sites),
            block, config, trees, splits, batches, block_key,
        )
    steps = {axis: solution.x for axis, solution in solutions.items()}
    splits = _stepped(model, block, config.trust, trees, splits, steps)
    codes = {
        axis: np.maximum(code, np.asarray(solutions[axis].code))
        for axis, code in codes.items()
    }
  return Learned(splits, codes)


def is_wide(site: sites_lib.Site, block: str) -> bool:
  """Returns true if the matrices of a block 'u' or 'e' are too large."""
  size = site.incoming if block == 'u' else site.outgoing
  matrices = 4 * site.units * size**2
  return size > LARGEST_SOLVE or matrices > LARGEST_MATRICES


def _by_factoring(model, block, config, trees, splits, batches, key):
  """Computes the damped Gauss-Newton step of every unit by Cholesky."""
  total = None
  for index, (x, labels) in enumerate(batches):
    part = _moments(
        model, block, config.curvature, trees, splits, x, labels,
        jax.random.fold_in(key, index),
    )
    total = part if total is None else linalg.plus(total, part)
  count = sum(len(labels) for _, labels in batches)
  return {
      axis: linalg.solve_damped(*problem, damping=config.damping)
      for axis, problem in _problems(total, count).items()
  }


@jax.jit
def _problems(sums, count):
  """Returns matrices and right sides, per axis."""
  return {
      axis: (gram / count, -gradient / count)
      for axis, (gram, gradient) in sums.items()
  }


def _by_products(model, block, config, trees, splits, batches, key):
  """Computes the damped Gauss-Newton step of every unit without matrices."""

  def at(index):
    x, labels = batches[index]
    return linearized(
        model, block, config.curvature, trees, splits, x, labels,
        jax.random.fold_in(key, index),
    )

  return matrix_free.solve(
      at,
      {site.axis: getattr(splits[site.axis], block) for site in model.sites},
      batches=len(batches),
      examples=sum(len(labels) for _, labels in batches),
      damping=config.damping,
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(model, block, curvature, trees, splits, x, labels, key):
  """Sums the statistics of a block's solve over a batch.

  Returns:
    `{axis: ((units, d, d), (units, d))}`: sums of outer products of the rows of
    c, and of the gradient of the model.
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  rows_of = (
      splits_lib.incoming_rows if block == 'u' else splits_lib.outgoing_rows
  )
  exact = lax.Precision.HIGHEST
  sums = {}
  for site in model.sites:
    split, signal = splits[site.axis], by_axis[site.axis]
    _, c = splits_lib.projections(site, trees, signal, split)
    slope, rows = rows_of(site, trees, signal, split)
    gram = jnp.einsum('bcd,bce->cde', rows, rows, precision=exact)
    gradient = slope.sum(0) + jnp.einsum(
        'bc,bcd->cd', c, rows, precision=exact
    )
    sums[site.axis] = gram, gradient
  return sums


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def linearized(
    model: Model,
    block: str,
    curvature: str,
    trees: Trees,
    splits: Splits,
    x: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[matrix_free.Linears, dict[str, jax.Array]]:
  """Writes c of the sites as a linear function of a block, on a batch.

  The other block is held at the splits, and the gradient is taken there.

  Args:
    block: 'u' or 'e'.

  Returns:
    c of each axis, and the gradient of the model summed over the batch,
    (units, weights).
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  linears, gradients = {}, {}
  for site in model.sites:
    split, signal = splits[site.axis], by_axis[site.axis]
    linear = splits_lib.linear(
        site, trees, signal, split, block, signal.curvature
    )
    linears[site.axis] = linear

    def change(kernels, site=site, signal=signal, split=split):
      s, c = splits_lib.projections(
          site, trees, signal, split.replace(**{block: kernels})
      )
      return jnp.sum(s) + jnp.sum(c**2) / 2

    kernels = jax.grad(change)(getattr(split, block))
    gradients[site.axis] = sites_lib.rows(kernels, linear.dim)
  return linears, gradients


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stepped(model, block, trust, trees, splits, steps):
  """Takes a step of one block of all splits, that of u within trust."""
  stepped = {}
  for site in model.sites:
    split, step = splits[site.axis], steps[site.axis]
    if block == 'u':
      weights = tuple(trees.kernel(writer.layer) for writer in site.writers)
      split = split.replace(u=_trusted(split.u, step, weights, trust))
    else:
      step = splits_lib.as_outgoing(step, split.e)
      split = split.replace(e=jax.tree.map(jnp.add, split.e, step))
    stepped[site.axis] = split
  return stepped


def _trusted(u, step, weights, trust):
  """Takes a step of u, shortened to a part of the length of w."""
  norm = lambda rows: jnp.linalg.norm(rows, axis=-1)
  length, limit = norm(step), trust * norm(splits_lib.incoming(weights))
  shorter = jnp.minimum(1, limit / jnp.where(length > 0, length, 1))
  step = splits_lib.as_incoming(step * shorter[:, None], u)
  return jax.tree.map(jnp.add, u, step)
