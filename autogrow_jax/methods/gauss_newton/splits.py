"""Learning how to split every channel, and what each split will gain.

Symbols, per channel of a site:

  u (incoming,)   change of the incoming weights, one child +, the other -
  e (outgoing,)   likewise of the outgoing weights, on top of a half each
  s, c            <d, dz> and <d', dz> of an example, see `signals`

The model of the loss is mean(s) + mean(c^2) / 2. All channels are learned at
the same time: their models are independent, and every solve is vmapped.
"""

from collections.abc import Sequence
import dataclasses
import functools

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import linalg
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.networks import taps

Model, Trees = signals_lib.Model, signals_lib.Trees
Site, Signal = sites_lib.Site, signals_lib.Signal
Batch = tuple[jax.Array, jax.Array]

# Larger solves would need a matrix-free method, which is not here.
LARGEST_SOLVE = 1152
SOLVERS = ('als', 'adam')
ADAM_DECAYS = (0.9, 0.99)
_EXACT = lax.Precision.HIGHEST


@struct.dataclass
class Split:
  """Parameters of the splits of all units of a site.

  Attributes:
    u: in the shape of the writer's kernel.
    e: in the shape of the reader's.
  """

  u: jax.Array
  e: jax.Array


Splits = dict[str, Split]  # By axis.


@dataclasses.dataclass(frozen=True)
class LearnConfig:
  """How splits are learned on frozen weights.

  Attributes:
    curvature: one of `signals.CURVATURES`.
    solver: 'als', alternating damped least squares over u and e, or 'adam'.
    sweeps: of als over both blocks; more, or less damping, leave the region in
      which the quadratic model holds.
    damping: of each solve, in units of the mean eigenvalue.
    trust: largest step of u in a sweep, in units of the norm of w.
    epochs: of adam.
    learning_rate: of adam.
  """

  curvature: str = 'mc'
  solver: str = 'als'
  sweeps: int = 2
  damping: float = 0.3
  trust: float = 0.5
  epochs: int = 4
  learning_rate: float = 3e-3

  def __post_init__(self):
    signals_lib.check_curvature(self.curvature)
    if self.solver not in SOLVERS:
      raise ValueError(
          f'solver is one of {", ".join(SOLVERS)}, got {self.solver!r}.'
      )
    for name in ('sweeps', 'epochs'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} is at least 1, got {getattr(self, name)}.')
    for name in ('damping', 'trust', 'learning_rate'):
      if not 0 < getattr(self, name) < float('inf'):
        raise ValueError(f'{name} is positive, got {getattr(self, name)}.')


  @property
  def passes(self) -> int:
    """How often learning sees each example."""
    return 2 * self.sweeps if self.solver == 'als' else self.epochs


@dataclasses.dataclass(frozen=True)
class Learned:
  """What learning left.

  Attributes:
    splits: of every site.
    codes: per axis, (units,) the worst `linalg.Code` of a unit's solves.
  """

  splits: Splits
  codes: dict[str, np.ndarray]


def start(model: Model, trees: Trees, key: jax.Array) -> Splits:
  """Splits that change nothing and can be learned from.

  u = 0, and each child feeds a random half of the consumers: e = +-v/2. At
  e = 0 as well, all gradients would be zero.

  Args:
    model: the network.
    trees: its arrays.
    key: of the halves.

  Returns:
    The splits.
  """
  splits = {}
  for index, site in enumerate(model.sites):
    kernel = trees.kernel(site.reader)
    signs = jax.random.rademacher(
        jax.random.fold_in(key, index), kernel.shape[-2:], kernel.dtype
    )
    signs = signs.reshape((1,) * (kernel.ndim - 2) + signs.shape)
    splits[site.axis] = Split(
        jnp.zeros_like(trees.kernel(site.writer)), kernel / 2 * signs
    )
  return splits


def differences(
    site: Site, trees: Trees, signal: Signal, u: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What the reader reads more: of both children's mean, and between them.

  Args:
    site: the site.
    trees: the network's arrays.
    signal: of a batch.
    u: see `Split`.

  Returns:
    (T(h+r) + T(h-r)) / 2 - T(h), and T(h+r) - T(h-r), each (batch, ...,
    units).
  """
  return _differences(site, trees, signal, response(site, trees, signal, u))


def response(
    site: Site, trees: Trees, signal: Signal, u: jax.Array
) -> jax.Array:
  """r: by how much the children's pre-activations differ from h."""
  r = site.writer.linear(signal.x, u)
  return r * _last(trees.factor(site), r.ndim)


def output_change(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> jax.Array:
  """The exact change of the reader's output if all units are split."""
  mean, between = differences(site, trees, signal, split.u)
  return site.reader.linear(mean, trees.kernel(site.reader)) + (
      site.reader.linear(between, split.e)
  )


def projections(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, jax.Array]:
  """s and c of every unit: (batch, units) each."""
  mean, between = differences(site, trees, signal, split.u)
  return tuple(
      _project(site, trees, split.e, mean, between, gradient)
      for gradient in (signal.slope, signal.curvature)
  )


def incoming_rows(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, jax.Array]:
  """Derivatives of s and c by each unit's own u: (batch, units, incoming)."""
  r = response(site, trees, signal, split.u)
  patches = patches_of(site.writer, signal.x)
  factor = _last(trees.factor(site), r.ndim)

  def rows(gradient):
    def total(r):
      mean, between = _differences(site, trees, signal, r)
      return _project(site, trees, split.e, mean, between, gradient).sum()

    # Examples and units are independent: the sum's gradient is each one's own.
    at_h = factor * jax.grad(total)(r)
    patched = patches.reshape(*at_h.shape[:-1], -1)
    return _over_positions('bpd,bpc->bcd', patched, at_h)

  return rows(signal.slope), rows(signal.curvature)


def outgoing_rows(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, jax.Array]:
  """Derivatives of s and c by each unit's own e: (batch, units, outgoing)."""
  _, between = differences(site, trees, signal, split.u)
  patches = patches_of(site.reader, between)
  taps_, units = patches.shape[-2:]

  def rows(gradient):
    patched = patches.reshape(*gradient.shape[:-1], taps_ * units)
    rows = _over_positions('bpd,bpo->bdo', patched, gradient)
    rows = rows.reshape(len(rows), taps_, units, -1)
    return rows.transpose(0, 2, 1, 3).reshape(len(rows), units, -1)

  return rows(signal.slope), rows(signal.curvature)


def patches_of(layer: taps.Layer, x: jax.Array) -> jax.Array:
  """What each output position reads: (batch, ..., taps, in)."""
  if layer.kind != 'Conv':
    return x.reshape(len(x), -1, x.shape[-1])
  pad = layer.size // 2
  patches = lax.conv_general_dilated_patches(
      x,
      (layer.size, layer.size),
      (layer.stride, layer.stride),
      ((pad, pad), (pad, pad)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=_EXACT,
  )  # The input channel is the slowest of its features.
  patches = patches.reshape(*patches.shape[:-1], x.shape[-1], layer.size**2)
  return patches.swapaxes(-1, -2)


def learn(
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    config: LearnConfig = LearnConfig(),
) -> Learned:
  """Learns the splits of all units of all sites on frozen weights.

  Args:
    model: the network.
    trees: its arrays.
    batches: the examples; each block of each sweep, or epoch, sees all of them,
      with other sampled labels.
    key: of everything random.
    config: how.

  Returns:
    The splits.

  Raises:
    ValueError: no examples, or a site with too many weights for a solve.
  """
  if config.solver == 'als':
    check_sizes(model)
  if not batches:
    raise ValueError('Splits are learned from batches of examples; got none.')
  if config.solver == 'adam':
    return _learn_by_adam(model, trees, batches, key, config)
  splits = start(model, trees, jax.random.fold_in(key, 0))
  codes = {site.axis: np.zeros(site.units, int) for site in model.sites}
  factors = {site.axis: jnp.ones(()) for site in model.sites}
  for number in range(2 * config.sweeps):
    block = 'ue'[number % 2]
    block_key = jax.random.fold_in(key, number + 1)
    if config.curvature == 'rank1-cal' and number:
      factors = calibrate(model, trees, splits, batches, block_key)
    total = None
    for index, (x, labels) in enumerate(batches):
      part = _moments(
          model, block, config.curvature, trees, splits, factors, x, labels,
          jax.random.fold_in(block_key, index),
      )
      total = part if total is None else jax.tree.map(jnp.add, total, part)
    count = sum(len(labels) for _, labels in batches)
    splits, new = _step(model, block, config, trees, splits, total, count)
    codes = {
        axis: np.maximum(code, np.asarray(new[axis]))
        for axis, code in codes.items()
    }
  return Learned(splits, codes)


def _learn_by_adam(
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    config: LearnConfig,
) -> Learned:
  """`learn` by steps on the sum of all units' models, one for each batch."""
  splits = start(model, trees, jax.random.fold_in(key, 0))
  state = _adam(config).init(splits)
  factors = {site.axis: jnp.ones(()) for site in model.sites}
  for epoch in range(config.epochs):
    epoch_key = jax.random.fold_in(key, epoch + 1)
    if config.curvature == 'rank1-cal' and epoch:
      factors = calibrate(model, trees, splits, batches, epoch_key)
    for index, (x, labels) in enumerate(batches):
      splits, state = _adam_step(
          model, config, trees, splits, state, factors, x, labels,
          jax.random.fold_in(epoch_key, index),
      )
  codes = {}
  for site in model.sites:
    rows = np.asarray(incoming(splits[site.axis].u))
    # Without any gradient Adam stays where it starts.
    code = np.where(rows.any(-1), linalg.Code.OK, linalg.Code.RANK_ZERO)
    finite = np.isfinite(rows).all(-1)
    codes[site.axis] = np.where(finite, code, linalg.Code.NOT_FINITE)
  return Learned(splits, codes)


def _adam(config: LearnConfig) -> optax.GradientTransformation:
  return optax.adam(config.learning_rate, *ADAM_DECAYS)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _adam_step(
    model, config, trees, splits, state, factors, x, labels, key
):
  """One step; no unit's model depends on another's u or e."""
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=config.curvature
  )

  def total(splits):
    value = 0.0
    for site in model.sites:
      s, c = projections(site, trees, by_axis[site.axis], splits[site.axis])
      value += jnp.sum(s) + factors[site.axis] * jnp.sum(c**2) / 2
    return value / len(labels)

  updates, state = _adam(config).update(jax.grad(total)(splits), state)
  return optax.apply_updates(splits, updates), state


def calibrate(
    model: Model,
    trees: Trees,
    splits: Splits,
    batches: Sequence[Batch],
    key: jax.Array,
) -> dict[str, jax.Array]:
  """Per site, curvature by mc over that by rank1-sqrt; at least 1."""
  sums = {}
  for curvature in ('mc', 'rank1-sqrt'):
    parts = [
        _curvatures(
            model, curvature, trees, splits, x, labels,
            jax.random.fold_in(key, index),
        )
        for index, (x, labels) in enumerate(batches)
    ]
    sums[curvature] = jax.tree.map(lambda *leaves: sum(leaves), *parts)
  return jax.tree.map(
      lambda ours, model: jnp.where(
          model > 0, jnp.maximum(ours / jnp.where(model > 0, model, 1), 1), 1
      ),
      sums['mc'],
      sums['rank1-sqrt'],
  )


def check_sizes(model: Model) -> None:
  """Raises a ValueError for a site that dense solves are too small for."""
  for site in model.sites:
    size = max(site.incoming, site.outgoing)
    if size > LARGEST_SOLVE:
      raise ValueError(
          f'Each unit of {site.axis} has {size} weights on one side; dense '
          f'solves go up to {LARGEST_SOLVE}. Leave out that site.'
      )


def within_reach(survey: sites_lib.Survey) -> sites_lib.Survey:
  """The sites that dense solves can do; the others are named as uncovered."""
  fits = lambda site: max(site.incoming, site.outgoing) <= LARGEST_SOLVE
  return sites_lib.Survey(
      tuple(filter(fits, survey.sites)),
      survey.uncovered
      + tuple(
          (
              site.axis,
              f'{max(site.incoming, site.outgoing)} weights of a unit on one '
              f'side are more than {LARGEST_SOLVE}, the most for a dense solve',
          )
          for site in survey.sites
          if not fits(site)
      ),
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(
    model, block, curvature, trees, splits, factors, x, labels, key
):
  """Sums over a batch of what a block's solve needs, per axis.

  Returns:
    `{axis: ((units, d, d), (units, d))}`: of outer products of the rows of c,
    and of the gradient of the model.
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  rows_of = incoming_rows if block == 'u' else outgoing_rows
  sums = {}
  for site in model.sites:
    signal, split = by_axis[site.axis], splits[site.axis]
    signal = signal.replace(
        curvature=signal.curvature
        * jnp.sqrt(factors[site.axis]).astype(signal.curvature.dtype)
    )
    _, c = projections(site, trees, signal, split)
    slope, rows = rows_of(site, trees, signal, split)
    gram = jnp.einsum('bcd,bce->cde', rows, rows, precision=_EXACT)
    gradient = slope.sum(0) + jnp.einsum(
        'bc,bcd->cd', c, rows, precision=_EXACT
    )
    sums[site.axis] = gram, gradient
  return sums


def _step(model, block, config, trees, splits, moments, count):
  """One block's damped Gauss-Newton step of every unit, site by site."""
  codes, stepped = {}, {}
  for site in model.sites:
    gram, gradient = moments[site.axis]
    solution = linalg.solve_damped(
        gram / count, -gradient / count, damping=config.damping
    )
    split = splits[site.axis]
    if block == 'u':
      weights = trees.kernel(site.writer)
      split = split.replace(
          u=_trusted(split.u, solution.x, weights, config.trust)
      )
    else:
      split = split.replace(e=split.e + as_outgoing(solution.x, split.e))
    stepped[site.axis], codes[site.axis] = split, solution.code
  return stepped, codes


@jax.jit
def _trusted(u, step, weights, trust):
  """u after a step that is shortened to a part of the length of w."""
  norm = lambda rows: jnp.linalg.norm(rows, axis=-1)
  length, limit = norm(step), trust * norm(incoming(weights))
  shorter = jnp.minimum(1, limit / jnp.where(length > 0, length, 1))
  return u + as_incoming(step * shorter[:, None], u)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _curvatures(model, curvature, trees, splits, x, labels, key):
  """Per axis, the sum of c^2 over examples and units."""
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  return {
      site.axis: jnp.sum(
          projections(site, trees, by_axis[site.axis], splits[site.axis])[1]
          ** 2
      )
      for site in model.sites
  }


def incoming(kernel: jax.Array) -> jax.Array:
  """(units, incoming) from the shape of a writer's kernel."""
  return jnp.moveaxis(kernel, -1, 0).reshape(kernel.shape[-1], -1)


def as_incoming(rows: jax.Array, like: jax.Array) -> jax.Array:
  """The inverse of `incoming`."""
  return jnp.moveaxis(rows.reshape(like.shape[-1], *like.shape[:-1]), 0, -1)


def outgoing(kernel: jax.Array) -> jax.Array:
  """(units, outgoing) from the shape of a reader's kernel."""
  return jnp.moveaxis(kernel, -2, 0).reshape(kernel.shape[-2], -1)


def as_outgoing(rows: jax.Array, like: jax.Array) -> jax.Array:
  """The inverse of `outgoing`."""
  shape = like.shape[-2], *like.shape[:-2], like.shape[-1]
  return jnp.moveaxis(rows.reshape(shape), 0, -2)


def _differences(site, trees, signal, r):
  plus, minus, middle = (
      site.activation(trees.weights, trees.stats, signal.entered, h)
      for h in (signal.h + r, signal.h - r, signal.h)
  )
  return (plus + minus) / 2 - middle, plus - minus


def _project(site, trees, e, mean, between, gradient):
  """<gradient, dz> of every unit, (batch, units).

  The gradient is pulled back through the reader, so that no unit's dz is ever
  formed.
  """
  total = 0
  for difference, kernel in ((mean, trees.kernel(site.reader)), (between, e)):
    (at_reader,) = jax.linear_transpose(
        lambda a, kernel=kernel: site.reader.linear(a, kernel), difference
    )(gradient)
    product = at_reader * difference
    total = total + product.sum(tuple(range(1, product.ndim - 1)))
  return total


def _over_positions(formula, left, right):
  """An einsum whose operands have any number of positions, even none."""
  flat = lambda a: a.reshape(len(a), -1, a.shape[-1])
  return jnp.einsum(formula, flat(left), flat(right), precision=_EXACT)


def _last(vector, rank):
  return vector.reshape((1,) * (rank - 1) + (-1,))
