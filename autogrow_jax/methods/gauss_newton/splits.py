"""Learning how to split every channel, and what each split will gain.

Symbols, per channel of a site:

  u (incoming,)   change of the incoming weights, one child +, the other -
  e (outgoing,)   likewise of the outgoing weights, on top of a half each
  s, c            <d, dz> and <d', dz> of an example, see `signals`

The model of the loss is mean(s) + mean(c^2) / 2. All channels are learned at
the same time: their models are independent, and every solve is vmapped.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import linalg
from autogrow_jax.methods.gauss_newton import matrix_free
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib

Model, Trees = signals_lib.Model, signals_lib.Trees
Site, Signal = sites_lib.Site, signals_lib.Signal
Batch = tuple[jax.Array, jax.Array]

# Weights of a unit, and bytes of the matrices of all units of a site, up to
# which a block is solved by factoring; larger ones are `matrix_free`.
LARGEST_SOLVE = 1152
LARGEST_MATRICES = 2**30
SOLVERS = ('als', 'adam')
ADAM_DECAYS = (0.9, 0.99)
_EXACT = lax.Precision.HIGHEST


@struct.dataclass
class Split:
  """Parameters of the splits of all units of a site.

  Attributes:
    u: per writer, in the shape of its kernel.
    e: per reader, likewise.
  """

  u: tuple[jax.Array, ...]
  e: tuple[jax.Array, ...]


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


@functools.partial(jax.jit, static_argnums=0)
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
    kernels = [trees.kernel(reader.layer) for reader in site.readers]
    widths = [kernel.shape[-1] for kernel in kernels]
    signs = jax.random.rademacher(
        jax.random.fold_in(key, index),
        (site.units, sum(widths)),
        kernels[0].dtype,
    )
    splits[site.axis] = Split(
        u=tuple(
            jnp.zeros_like(trees.kernel(writer.layer))
            for writer in site.writers
        ),
        e=tuple(
            kernel / 2 * jnp.expand_dims(own, range(kernel.ndim - 2))
            for kernel, own in zip(
                kernels, sites_lib.cut(signs, widths), strict=True
            )
        ),
    )
  return splits


def differences(
    site: Site, trees: Trees, signal: Signal, u: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, jax.Array], ...]:
  """What the readers read more: of both children's mean, and between them.

  Args:
    site: the site.
    trees: the network's arrays.
    signal: of a batch.
    u: see `Split`.

  Returns:
    Per reader (T(h+r) + T(h-r)) / 2 - T(h), and T(h+r) - T(h-r), each (batch,
    ..., units).
  """
  return _differences(site, trees, signal, responses(site, trees, signal, u))


def responses(
    site: Site, trees: Trees, signal: Signal, u: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
  """r: by how much each writer's pre-activations of children differ from h."""
  return tuple(
      _by_unit(writer.layer.linear(x, own), trees.factor(writer))
      for writer, x, own in zip(site.writers, signal.x, u, strict=True)
  )


def output_changes(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, ...]:
  """The change dz of each reader's output if all units are split.

  It is exact while pre-activations are what they are. If one reader's change
  gets to another writer of the same stream, those change as well: of the
  logits' change, dz then has the first order only.
  """
  return tuple(
      reader.layer.linear(mean, trees.kernel(reader.layer))
      + reader.layer.linear(between, e)
      for reader, (mean, between), e in zip(
          site.readers,
          differences(site, trees, signal, split.u),
          split.e,
          strict=True,
      )
  )


def projections(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, jax.Array]:
  """s and c of every unit, over all readers: (batch, units) each."""
  both = differences(site, trees, signal, split.u)
  return tuple(
      _project(site, trees, split.e, both, gradients)
      for gradients in (signal.slope, signal.curvature)
  )


def incoming_rows(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, jax.Array]:
  """Derivatives of s and c by each unit's own u: (batch, units, incoming)."""
  return _rows(site, trees, signal, split, 'u')


def outgoing_rows(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, jax.Array]:
  """Derivatives of s and c by each unit's own e: (batch, units, outgoing)."""
  return _rows(site, trees, signal, split, 'e')


def _rows(site, trees, signal, split, block):
  return tuple(
      _linear(site, trees, signal, split, block, gradients).rows()
      for gradients in (signal.slope, signal.curvature)
  )


def _linear(site, trees, signal, split, block, gradients):
  """<gradients, dz> of all units as a linear function of a block, at a split.

  Gradients are those at what the readers write.
  """
  if block == 'e':
    both = differences(site, trees, signal, split.u)
    return matrix_free.Linear(
        reads=tuple(between for _, between in both),
        gradients=gradients,
        layers=tuple(reader.layer for reader in site.readers),
        dim=sites_lib.READ,
    )

  def total(r):
    both = _differences(site, trees, signal, r)
    return _project(site, trees, split.e, both, gradients).sum()

  # Examples and units are independent: the sum's gradient is each one's own.
  at_h = jax.grad(total)(responses(site, trees, signal, split.u))
  return matrix_free.Linear(
      reads=signal.x,
      gradients=tuple(
          _by_unit(values, trees.factor(writer))
          for writer, values in zip(site.writers, at_h, strict=True)
      ),
      layers=tuple(writer.layer for writer in site.writers),
      dim=sites_lib.WRITTEN,
  )


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
    ValueError: no examples.
  """
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
    solutions = {}
    for wide, solve in ((False, _by_factoring), (True, _by_products)):
      sites = tuple(s for s in model.sites if is_wide(s, block) == wide)
      if sites:
        solutions |= solve(
            dataclasses.replace(model, sites=sites),
            block, config, trees, splits, factors, batches, block_key,
        )
    steps = {axis: solution.x for axis, solution in solutions.items()}
    splits = _stepped(model, block, config.trust, trees, splits, steps)
    codes = {
        axis: np.maximum(code, np.asarray(solutions[axis].code))
        for axis, code in codes.items()
    }
  return Learned(splits, codes)


def is_wide(site: Site, block: str) -> bool:
  """Whether the matrices of a block, 'u' or 'e', are too large to be formed."""
  size = site.incoming if block == 'u' else site.outgoing
  matrices = 4 * site.units * size**2
  return size > LARGEST_SOLVE or matrices > LARGEST_MATRICES


def _by_factoring(
    model, block, config, trees, splits, factors, batches, key
):
  """Per axis, the damped Gauss-Newton step of every unit by Cholesky."""
  total = None
  for index, (x, labels) in enumerate(batches):
    part = _moments(
        model, block, config.curvature, trees, splits, factors, x, labels,
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
  """Per axis, matrices and right sides."""
  return {
      axis: (gram / count, -gradient / count)
      for axis, (gram, gradient) in sums.items()
  }


def _by_products(
    model, block, config, trees, splits, factors, batches, key
):
  """Per axis, the damped Gauss-Newton step of every unit without matrices."""

  def at(index):
    x, labels = batches[index]
    return linearized(
        model, block, config.curvature, trees, splits, factors, x, labels,
        jax.random.fold_in(key, index),
    )

  return matrix_free.solve(
      at,
      {site.axis: getattr(splits[site.axis], block) for site in model.sites},
      batches=len(batches),
      examples=sum(len(labels) for _, labels in batches),
      damping=config.damping,
  )


def _learn_by_adam(
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    config: LearnConfig,
) -> Learned:
  """`learn` by steps on the sum of all units' models, one for each batch."""
  splits = start(model, trees, jax.random.fold_in(key, 0))
  state = adam(config).init(splits)
  factors = {site.axis: jnp.ones(()) for site in model.sites}
  for epoch in range(config.epochs):
    epoch_key = jax.random.fold_in(key, epoch + 1)
    if config.curvature == 'rank1-cal' and epoch:
      factors = calibrate(model, trees, splits, batches, epoch_key)
    for index, (x, labels) in enumerate(batches):
      splits, state = adam_step(
          model, config, trees, splits, state, factors, x, labels,
          jax.random.fold_in(epoch_key, index),
      )
  return checked(model, splits)


def checked(model: Model, splits: Splits) -> Learned:
  """What Adam has learned, with the codes of what it could not learn."""
  codes = {}
  for site in model.sites:
    rows = np.asarray(incoming(splits[site.axis].u))
    # Without any gradient Adam stays where it starts.
    code = np.where(rows.any(-1), linalg.Code.OK, linalg.Code.RANK_ZERO)
    finite = np.isfinite(rows).all(-1)
    codes[site.axis] = np.where(finite, code, linalg.Code.NOT_FINITE)
  return Learned(splits, codes)


def adam(config: LearnConfig) -> optax.GradientTransformation:
  """The optimizer of splits."""
  return optax.adam(config.learning_rate, *ADAM_DECAYS)


@functools.partial(jax.jit, static_argnums=(0, 1))
def adam_step(
    model: Model,
    config: LearnConfig,
    trees: Trees,
    splits: Splits,
    state: optax.OptState,
    factors: Mapping[str, jax.Array],
    x: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[Splits, optax.OptState]:
  """One step on a batch; no unit's model depends on another's u or e.

  Args:
    model: static; the network.
    config: static.
    trees: the network's arrays.
    splits: of all sites.
    state: of `adam`.
    factors: per axis, by which c^2 is multiplied.
    x: (batch, height, width, channel), preprocessed.
    labels: (batch,).
    key: of sampled labels.

  Returns:
    The next splits and state.
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=config.curvature
  )

  gradient = jax.grad(
      lambda splits: modelled_change(model, trees, by_axis, splits, factors)
  )(splits)
  updates, state = adam(config).update(gradient, state)
  return optax.apply_updates(splits, updates), state


def modelled_change(
    model: Model,
    trees: Trees,
    by_axis: Mapping[str, Signal],
    splits: Splits,
    factors: Mapping[str, jax.Array],
) -> jax.Array:
  """Sum over all units of mean(s) + mean(c^2) / 2, each unit's own model.

  Args:
    model: the network.
    trees: its arrays.
    by_axis: signals of a batch.
    splits: of all sites.
    factors: per axis, by which c^2 is multiplied.

  Returns:
    Nats.
  """
  total = 0.0
  for site in model.sites:
    s, c = projections(site, trees, by_axis[site.axis], splits[site.axis])
    total += jnp.sum(s) + factors[site.axis] * jnp.sum(c**2) / 2
    examples = len(s)
  return total / examples


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
    split = splits[site.axis]
    signal = _calibrated(by_axis[site.axis], factors[site.axis])
    _, c = projections(site, trees, signal, split)
    slope, rows = rows_of(site, trees, signal, split)
    gram = jnp.einsum('bcd,bce->cde', rows, rows, precision=_EXACT)
    gradient = slope.sum(0) + jnp.einsum(
        'bc,bcd->cd', c, rows, precision=_EXACT
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
    factors: Mapping[str, jax.Array],
    x: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[matrix_free.Linears, dict[str, jax.Array]]:
  """On a batch, c of the sites as a linear function of a block.

  Args:
    model: the network, and the sites to look at.
    block: 'u' or 'e'.
    curvature: one of `signals.CURVATURES`.
    trees: the network's arrays.
    splits: where the other block is held, and the gradient taken.
    factors: per axis, by which c^2 is multiplied.
    x: (batch, height, width, channel), preprocessed.
    labels: (batch,).
    key: of the sampled labels.

  Returns:
    c of each axis, and the sum over the batch of the gradient of the model,
    (units, weights).
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  linears, gradients = {}, {}
  for site in model.sites:
    split = splits[site.axis]
    signal = _calibrated(by_axis[site.axis], factors[site.axis])
    linear = _linear(site, trees, signal, split, block, signal.curvature)
    linears[site.axis] = linear

    def model_of(kernels, site=site, signal=signal, split=split):
      s, c = projections(
          site, trees, signal, split.replace(**{block: kernels})
      )
      return jnp.sum(s) + jnp.sum(c**2) / 2

    kernels = jax.grad(model_of)(getattr(split, block))
    gradients[site.axis] = sites_lib.rows(kernels, linear.dim)
  return linears, gradients


def _calibrated(signal, factor):
  """A signal whose curvatures Q are multiplied."""
  return signal.replace(
      curvature=tuple(
          gradient * jnp.sqrt(factor).astype(gradient.dtype)
          for gradient in signal.curvature
      )
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stepped(model, block, trust, trees, splits, steps):
  """All splits after a step of one block, that of u within trust."""
  stepped = {}
  for site in model.sites:
    split, step = splits[site.axis], steps[site.axis]
    if block == 'u':
      weights = tuple(trees.kernel(writer.layer) for writer in site.writers)
      split = split.replace(u=_trusted(split.u, step, weights, trust))
    else:
      step = as_outgoing(step, split.e)
      split = split.replace(e=jax.tree.map(jnp.add, split.e, step))
    stepped[site.axis] = split
  return stepped


def _trusted(u, step, weights, trust):
  """u after a step that is shortened to a part of the length of w."""
  norm = lambda rows: jnp.linalg.norm(rows, axis=-1)
  length, limit = norm(step), trust * norm(incoming(weights))
  shorter = jnp.minimum(1, limit / jnp.where(length > 0, length, 1))
  step = as_incoming(step * shorter[:, None], u)
  return jax.tree.map(jnp.add, u, step)


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


@functools.partial(jax.jit, static_argnums=0)
def balanced(
    model: Model, trees: Trees, splits: Splits, trust: float
) -> Splits:
  """(t u, e / t) in place of (u, e), t >= 1: to leading order the same splits.

  A small u with a large e does its work by the difference of two large and
  nearly equal children, which the first training steps destroy. So u and e get
  the same length in units of w and v, as far as u stays within trust.

  Args:
    model: the network.
    trees: its arrays.
    splits: of all sites.
    trust: largest length of u in units of w.

  Returns:
    The splits.
  """
  kernels = lambda ends: tuple(trees.kernel(end.layer) for end in ends)
  return {
      site.axis: _balanced(
          splits[site.axis], kernels(site.writers), kernels(site.readers), trust
      )
      for site in model.sites
  }


def _balanced(split, writers, readers, trust):
  norm = lambda rows: jnp.linalg.norm(rows, axis=-1)
  share = lambda part, whole: norm(part) / jnp.maximum(norm(whole), 1e-30)
  u = share(incoming(split.u), incoming(writers))
  e = share(outgoing(split.e), outgoing(readers))
  safe = jnp.where(u > 0, u, 1)
  t = jnp.maximum(jnp.minimum(jnp.sqrt(e / safe), trust / safe), 1)
  t = jnp.where(u > 0, t, 1)[:, None]
  return Split(
      as_incoming(incoming(split.u) * t, split.u),
      as_outgoing(outgoing(split.e) / t, split.e),
  )


def incoming(kernels: Sequence[jax.Array]) -> jax.Array:
  """(units, incoming) from arrays in the shapes of writers' kernels."""
  return sites_lib.rows(kernels, sites_lib.WRITTEN)


def as_incoming(
    rows: jax.Array, like: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
  """The inverse of `incoming`."""
  return sites_lib.kernels_of(rows, like, sites_lib.WRITTEN)


def outgoing(kernels: Sequence[jax.Array]) -> jax.Array:
  """(units, outgoing) from arrays in the shapes of readers' kernels."""
  return sites_lib.rows(kernels, sites_lib.READ)


def as_outgoing(
    rows: jax.Array, like: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
  """The inverse of `outgoing`."""
  return sites_lib.kernels_of(rows, like, sites_lib.READ)


def _differences(site, trees, signal, r):
  plus, minus, middle = (
      site.activations(trees.weights, trees.stats, signal.entered, h)
      for h in (
          jax.tree.map(jnp.add, signal.h, r),
          jax.tree.map(jnp.subtract, signal.h, r),
          signal.h,
      )
  )
  return tuple(
      ((one + other) / 2 - old, one - other)
      for one, other, old in zip(plus, minus, middle, strict=True)
  )


def _project(site, trees, e, both, gradients):
  """The sum over readers of <gradient, dz> of every unit, (batch, units).

  The gradient is pulled back through each reader, so that no unit's dz is ever
  formed.
  """
  total = 0
  for reader, differences_, own, gradient in zip(
      site.readers, both, e, gradients, strict=True
  ):
    kernels = trees.kernel(reader.layer), own
    for difference, kernel in zip(differences_, kernels, strict=True):
      product = difference * reader.layer.transposed(
          gradient, kernel, difference.shape
      )
      total = total + product.sum(tuple(range(1, product.ndim - 1)))
  return total


def _by_unit(values, factor):
  """Values whose last dimension are units, times a factor of each."""
  return values * factor.reshape((1,) * (values.ndim - 1) + (-1,))
