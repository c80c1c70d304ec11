"""Rivals: other ways to split channels, on the same footing as Gauss-Newton.

All propose u and e for every unit of every site, with a gain for each, and
`selection.by_gain` picks from them by gain per resource. None has a joint
model, so gains are added up and every split is applied as it is.

  random    u in a random direction, e = 0, random channels: what a split is
            worth if nothing is learned
  net2net   copies of random channels, up to a little noise (Chen et al. 2016)
  steepest  u along the eigenvector of the smallest eigenvalue of each channel's
            splitting matrix (Liu et al. 2019), or a Rayleigh quotient's minimum
            where that matrix is large (Wang et al. 2019)
  firefly   all splits of the network at once, optimised on the true loss; each
            one's gain by its first-order contribution (Wu et al. 2020)
  gradmax   new channels with zero outgoing weights whose incoming ones make the
            gradient of the outgoing ones large (Evci et al. 2022)

Symbols as in `signals` and `splits`; and

  g     gradient of an example's loss at the output a of the site's ReLU
  S     splitting matrix of a unit, (incoming, incoming): the mean over examples
        of the sum over positions of g relu''(h) f^2 x x', f the norm's factor;
        relu'' is that of a softplus
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import trials

Architecture = architecture_lib.Architecture
Model, Trees = signals_lib.Model, signals_lib.Trees
Site, Signal = sites_lib.Site, signals_lib.Signal
Batch, Split, Splits = splits_lib.Batch, splits_lib.Split, splits_lib.Splits

RIVALS = ('random', 'net2net', 'steepest', 'firefly', 'gradmax')
STRATEGIES = ('gauss_newton', *RIVALS)
# Those that can do sites of one writer alone.
OF_ONE_WRITER = ('steepest', 'gradmax')

# Of the softplus log(1 + exp(beta h)) / beta that stands in for ReLU.
BETA = 3.0
# Splitting matrices are formed if a unit has no more incoming weights; of all
# their eigenvalues only the smallest is needed.
LARGEST_MATRIX = 576
# Scales at which Firefly's contributions are measured.
POINTS = 3
# Rank-deficient directions of GradMax have smaller singular values than this
# part of the largest.
SMALLEST_SINGULAR = 1e-5
RMSPROP_DECAY = 0.9
_POSITIVE = 1e-6
_EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the rivals.

  Attributes:
    step: of random and steepest, |u| in units of |w|.
    noise: of net2net, likewise.
    trust: of firefly: largest |u| in units of |w|, and largest distance of e
      from where it starts in units of |v|.
    epochs: of firefly.
    rayleigh_epochs: of steepest where matrices are too large.
    learning_rate: of RMSprop in both.
  """

  step: float = 1e-2
  noise: float = 1e-3
  trust: float = 0.5
  epochs: int = 1
  rayleigh_epochs: int = 10
  learning_rate: float = 1e-3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 < value < float('inf'):
        raise ValueError(f'{field.name} is positive, got {value}.')


@dataclasses.dataclass(frozen=True)
class Proposal:
  """What a strategy proposes.

  Attributes:
    splits: of every unit of every site.
    gains: (candidates,) float64, what the strategy believes it gains by each
      unit, in the order of the sites and their units; nats for steepest and
      firefly, else a score of its own.
    usable: (candidates,) whether a unit may be split.
    one_sided: whether units are new channels, see `surgery.morph`.
    examples_seen: images of training steps that it cost.
    refused: (axis, reason) for sites that the strategy cannot do.
  """

  splits: Splits
  gains: np.ndarray
  usable: np.ndarray
  one_sided: bool
  examples_seen: int
  refused: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class _Site:
  """A strategy's result for one site.

  Attributes:
    split: of all its units.
    gains: (units,).
    usable: (units,).
  """

  split: Split
  gains: np.ndarray
  usable: np.ndarray


def uncovered(
    strategy: str, sites: Sequence[Site]
) -> tuple[tuple[str, str], ...]:
  """(axis, reason) of sites that a strategy never does.

  Which others it cannot do depends on what lies behind them; a `Proposal` says.
  """
  return tuple(_shared(sites)) if strategy in OF_ONE_WRITER else ()


def propose(
    strategy: str,
    architecture: Architecture,
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    config: Config = Config(),
) -> Proposal:
  """Proposes splits of all units.

  Args:
    strategy: one of `RIVALS`.
    architecture: the network's.
    model: the network and its sites.
    trees: its arrays.
    batches: the examples.
    key: of everything random.
    config: how.

  Returns:
    The proposal.

  Raises:
    ValueError: no such strategy, or no examples.
  """
  if strategy not in RIVALS:
    raise ValueError(
        f'A rival is one of {", ".join(RIVALS)}, got {strategy!r}.'
    )
  if not batches:
    raise ValueError('Splits are proposed from batches of examples; got none.')
  if strategy in ('random', 'net2net'):
    length = config.step if strategy == 'random' else config.noise
    return _at_random(model, trees, key, length)
  if strategy == 'firefly':
    return _firefly(architecture, model, trees, batches, key, config)
  if strategy == 'steepest':
    return _steepest(architecture, model, trees, batches, key, config)
  return _gradmax(architecture, model, trees, batches)


def _at_random(
    model: Model, trees: Trees, key: jax.Array, length: float
) -> Proposal:
  """Random u of a given length in units of |w|, and random gains.

  Selected by gain per resource, these are random channels, and cheap ones more
  often.
  """
  found = {}
  for index, site in enumerate(model.sites):
    for_u, for_gains = jax.random.split(jax.random.fold_in(key, index))
    rows = jax.random.normal(for_u, (site.units, site.incoming))
    gains = np.asarray(jax.random.uniform(for_gains, (site.units,)))
    u = _relative(site, trees, _unit_rows(rows), length)
    split = _without_e(site, trees, u)
    found[site.axis] = _Site(split, gains, np.ones(site.units, bool))
  return _proposal(model, trees, found, (), 0)


def _steepest(
    architecture: Architecture,
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    config: Config,
) -> Proposal:
  """Splitting steepest descent: lambda (step |w|)^2 / 2 for each unit.

  The curvature of ReLUs further behind than the site's first is left out.
  """
  refused = _refused(
      model,
      trees,
      batches[0],
      _is_rectified,
      'what lies behind it does not begin with a ReLU',
  )
  covered = [site for site in model.sites if site.axis not in dict(refused)]
  large = [site for site in covered if site.incoming > LARGEST_MATRIX]
  small = [site for site in covered if site.incoming <= LARGEST_MATRIX]
  pairs = {
      **_eigenpairs(dataclasses.replace(model, sites=tuple(small)), trees,
                    batches),
      **_rayleigh_minima(dataclasses.replace(model, sites=tuple(large)), trees,
                         batches, key, config),
  }
  found = {}
  for site in covered:
    values, vectors = pairs[site.axis]
    lengths = np.linalg.norm(_incoming_weights(site, trees), axis=-1)
    found[site.axis] = _Site(
        _without_e(site, trees, _relative(site, trees, vectors, config.step)),
        -np.square(config.step * lengths) * values / 2,
        np.isfinite(values) & (values < 0),
    )
  passes = _steps(architecture, {
      site.writers[0]: site.units * site.incoming**2 for site in small
  })
  if large:  # The quotient costs as much again as the gradients it takes.
    passes += 2 * (config.rayleigh_epochs + 1)
  return _proposal(
      model, trees, found, refused, round(passes * _count(batches))
  )


def _eigenpairs(
    model: Model, trees: Trees, batches: Sequence[Batch]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Per axis, the smallest eigenvalues (units,) of S and their vectors."""
  if not model.sites:
    return {}
  total = _sum(
      _splitting_matrices(model, trees, x, labels) for x, labels in batches
  )
  pairs = {}
  for axis, matrices in total.items():
    finite = np.isfinite(matrices).all((1, 2))
    matrices = np.where(finite[:, None, None], matrices, 0)
    values, vectors = np.linalg.eigh(matrices / _count(batches))
    pairs[axis] = np.where(finite, values[:, 0], np.nan), vectors[..., 0]
  return pairs


def _rayleigh_minima(
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    config: Config,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """`_eigenpairs` without matrices, by RMSprop on v'Sv / v'v of all units."""
  if not model.sites:
    return {}
  vectors = {
      site.axis: _unit_rows(
          jax.random.normal(
              jax.random.fold_in(key, index), (site.units, site.incoming)
          )
      )
      for index, site in enumerate(model.sites)
  }
  state = _rmsprop(config).init(vectors)
  for _ in range(config.rayleigh_epochs):
    for x, labels in batches:
      vectors, state = _rayleigh_step(
          model, config, trees, vectors, state, x, labels
      )
  total = _sum(
      _rayleigh_quotients(model, trees, vectors, x, labels)
      for x, labels in batches
  )
  return {
      axis: (values / _count(batches), np.asarray(vectors[axis]))
      for axis, values in total.items()
  }


def _firefly(
    architecture: Architecture,
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    config: Config,
) -> Proposal:
  """All splits at once on the true loss, and what each contributes.

  Unlike the paper, children differ in their outgoing weights too, which makes
  the candidates those of Gauss-Newton; there are no other candidates; and the
  scales of all splits move from 0 to 1 together, so that the contributions add
  up to what all splits gain.
  """
  start = splits_lib.start(model, trees, key)
  splits, state = start, _rmsprop(config).init(start)
  for _ in range(config.epochs):
    for x, labels in batches:
      splits, state = _firefly_step(
          architecture, model, config, trees, start, splits, state, x, labels
      )
  total = _sum(
      _scale_gradients(
          architecture, model, trees, splits, (point + 0.5) / POINTS, x, labels
      )
      for point in range(POINTS)
      for x, labels in batches
  )
  found = {}
  for axis, gradients in total.items():
    gains = -gradients / (POINTS * _count(batches))
    found[axis] = _Site(splits[axis], gains, np.isfinite(gains))
  wider = architecture.resized(
      {site.axis: 2 * site.units for site in model.sites}
  )
  steps = costs.macs(wider) / costs.macs(architecture)
  passes = steps * (config.epochs + POINTS)
  return _proposal(model, trees, found, (), round(passes * _count(batches)))


def _gradmax(
    architecture: Architecture,
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
) -> Proposal:
  """The k-th best new channel of a site, as a one-sided split of unit k.

  The outgoing gradient is linear in the incoming weights w where ReLU's
  derivative is taken as 1, and largest for the first singular vectors of that
  map. Weights are as long as those of the site on average. The gain is the
  squared norm of the gradient, what a step of a learning rate of 1 would gain
  to first order. A singular vector's sign is free; that whose pre-activation is
  larger on average is taken, for an open ReLU. Unlike in the paper, maxima of
  pooling are taken where the mean channel has them, and the channel starts with
  the norm of its parent.
  """
  refused = _refused(
      model,
      trees,
      batches[0],
      _is_alike,
      'what lies behind it differs from unit to unit',
  )
  covered = [site for site in model.sites if site.axis not in dict(refused)]
  total = {}
  if covered:
    small = dataclasses.replace(model, sites=tuple(covered))
    total = _sum(
        _outgoing_gradients(small, trees, x, labels) for x, labels in batches
    )
  found = {}
  for site in covered:
    gradients, x = (part / _count(batches) for part in total[site.axis])
    if not np.isfinite(gradients).all():
      gradients = np.zeros_like(gradients)  # Of rank 0: nothing is usable.
    _, values, rows = np.linalg.svd(gradients, full_matrices=False)
    rank = min(site.units, np.sum(values > SMALLEST_SINGULAR * values[0]))
    weights = np.asarray(_incoming_weights(site, trees), np.float64)
    length = np.linalg.norm(weights, axis=-1).mean()
    factor = np.asarray(trees.factor(site.writers[0]), np.float64)[:rank]
    signs = np.where(factor * (rows[:rank] @ x) < 0, -1, 1)
    new, gains = weights.copy(), np.zeros(site.units)
    new[:rank] = length * signs[:, None] * rows[:rank]
    gains[:rank] = np.square(factor * length * values[:rank])
    split = _without_e(site, trees, weights - new)
    found[site.axis] = _Site(split, gains, gains > 0)
  passes = _steps(architecture, {
      reader: trees.kernel(reader.layer).size // site.units * site.incoming
      for site in covered
      for reader in site.readers
  })
  proposal = _proposal(
      model, trees, found, refused, round(passes * _count(batches))
  )
  return dataclasses.replace(proposal, one_sided=True)


def _proposal(
    model: Model,
    trees: Trees,
    found: dict[str, _Site],
    refused: tuple[tuple[str, str], ...],
    examples_seen: int,
) -> Proposal:
  """A two-sided proposal; nothing is usable where nothing was found."""
  in_order = [
      found.get(site.axis) or _nothing(site, trees) for site in model.sites
  ]
  return Proposal(
      splits={
          site.axis: one.split
          for site, one in zip(model.sites, in_order, strict=True)
      },
      gains=np.concatenate([one.gains for one in in_order]).astype(np.float64),
      usable=np.concatenate([one.usable for one in in_order]),
      one_sided=False,
      examples_seen=examples_seen,
      refused=refused,
  )


def _nothing(site: Site, trees: Trees) -> _Site:
  """u = e = 0 for all units."""
  zeros = np.zeros((site.units, site.incoming))
  return _Site(
      _without_e(site, trees, zeros),
      np.zeros(site.units),
      np.zeros(site.units, bool),
  )


def _refused(
    model: Model,
    trees: Trees,
    batch: Batch,
    suits: Callable[[Site, Trees, Signal], jax.Array],
    reason: str,
) -> tuple[tuple[str, str], ...]:
  """(axis, reason) of sites with several writers, or that do not suit."""
  by_axis = _signals(model, trees, *batch)
  shared = dict(_shared(model.sites))
  refused = []
  for site in model.sites:
    if site.axis in shared:
      refused.append((site.axis, shared[site.axis]))
    elif not suits(site, trees, by_axis[site.axis]):
      refused.append((site.axis, reason))
  return tuple(refused)


def _shared(sites: Sequence[Site]) -> list[tuple[str, str]]:
  """(axis, reason) of sites with several writers."""
  return [
      (site.axis, f'written by {len(site.writers)} layers')
      for site in sites
      if len(site.writers) > 1
  ]


@functools.partial(jax.jit, static_argnums=0)
def _is_rectified(site, trees, signal):
  """Whether T(h) is T(relu(h)), without which there is no splitting matrix."""
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
def _is_alike(site, trees, signal):
  """Whether T, made linear, is one map for all units, as GradMax needs."""
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
def _signals(model, trees, x, labels):
  """Signals of a batch; nothing random is in them, nor any curvature."""
  return signals_lib.signals(
      model, trees, x, labels, jax.random.key(0), curvature='emp-fisher'
  )[1]


@functools.partial(jax.jit, static_argnums=0)
def _splitting_matrices(model, trees, x, labels):
  """Per axis, the sum over a batch of S, (units, incoming, incoming)."""
  by_axis, sums = _signals(model, trees, x, labels), {}
  for site in model.sites:
    signal = by_axis[site.axis]
    density = _splitting_density(site, trees, signal)
    patches = _incoming_patches(site, signal)
    patches = patches.reshape(-1, site.incoming)
    # One unit's weighted patches are as large as all patches.
    chunk = max(1, linalg.CHUNK_BYTES // patches.nbytes)
    sums[site.axis] = lax.map(
        lambda own, patches=patches: jnp.einsum(
            'pd,pe->de', own[:, None] * patches, patches, precision=_EXACT
        ),
        density.reshape(-1, site.units).T,
        batch_size=chunk,
    )
  return sums


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rayleigh_step(model, config, trees, vectors, state, x, labels):
  """One step of all units' vectors, which stay of length 1."""
  by_axis = _signals(model, trees, x, labels)

  def total(vectors):
    quotients = _quotients(model, trees, vectors, by_axis)
    return sum(jnp.sum(value) for value in quotients.values()) / len(labels)

  gradients = jax.grad(total)(vectors)
  updates, state = _rmsprop(config).update(gradients, state)
  vectors = optax.apply_updates(vectors, updates)
  return jax.tree.map(_unit_rows, vectors), state


@functools.partial(jax.jit, static_argnums=0)
def _rayleigh_quotients(model, trees, vectors, x, labels):
  """Per axis, (units,) sums over a batch of v'Sv / v'v."""
  return _quotients(model, trees, vectors, _signals(model, trees, x, labels))


def _quotients(model, trees, vectors, by_axis):
  quotients = {}
  for site in model.sites:
    signal, rows = by_axis[site.axis], vectors[site.axis]
    density = _splitting_density(site, trees, signal)
    (kernel,) = _as_incoming(site, trees, rows)
    r = site.writers[0].layer.linear(signal.x[0], kernel)
    weighted = (density * jnp.square(r)).reshape(-1, site.units)
    quotients[site.axis] = weighted.sum(0) / jnp.sum(jnp.square(rows), -1)
  return quotients


def _splitting_density(site: Site, trees: Trees, signal: Signal) -> jax.Array:
  """g relu''(h) f^2, (batch, ..., units): the weight of each x x' in S.

  What follows the ReLU is T where h is positive. T is differentiated at a
  nearby positive place whose maxima are those of h.
  """
  (writer,), (h,) = site.writers, signal.h

  def read(h):
    inputs = site.activations(trees.weights, trees.stats, signal.entered, (h,))
    return tuple(
        reader.layer.linear(a, trees.kernel(reader.layer))
        for reader, a in zip(site.readers, inputs, strict=True)
    )

  (at_activation,) = jax.vjp(read, _rectified(h))[1](signal.slope)
  gate = jax.nn.sigmoid(BETA * h)
  factor = trees.factor(writer).reshape((1,) * (h.ndim - 1) + (-1,))
  return at_activation * BETA * gate * (1 - gate) * jnp.square(factor)


def _rectified(h: jax.Array) -> jax.Array:
  """Nearly relu(h), but positive and increasing."""
  return jnp.maximum(h, _POSITIVE * jnp.exp(jnp.minimum(h, 0)))


@functools.partial(jax.jit, static_argnums=0)
def _outgoing_gradients(model, trees, x, labels):
  """Per axis, sums over a batch of the map that GradMax decomposes.

  Returns:
    `{axis: ((outgoing, incoming), (incoming,))}`: what gives the gradient of a
    new channel's outgoing weights if applied to its incoming ones; and x,
    averaged over positions.
  """
  by_axis, sums = _signals(model, trees, x, labels), {}
  for site in model.sites:
    signal = by_axis[site.axis]
    push = _linearised(site, trees, signal)
    # Features take the place of units, so many at a time.
    features = _incoming_patches(site, signal)
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
            precision=_EXACT,
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
    site: Site, trees: Trees, signal: Signal
) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
  """T's derivative where all units are positive and like the mean of them."""
  (h,) = signal.h
  place = jnp.broadcast_to(_rectified(h).mean(-1, keepdims=True), h.shape)
  read = lambda h: site.activations(
      trees.weights, trees.stats, signal.entered, (h,)
  )
  return lambda tangent: jax.jvp(read, (place,), (tangent,))[1]


def _incoming_patches(site: Site, signal: Signal) -> jax.Array:
  """x for each position and weight, (batch, ..., incoming)."""
  patches = site.writers[0].layer.patches(signal.x[0])
  return patches.reshape(*signal.h[0].shape[:-1], site.incoming)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _firefly_step(
    architecture, model, config, trees, start, splits, state, x, labels
):
  """One step on the loss with all splits, back into the trust region."""
  units = _all_units(model)

  def loss(splits):
    return trials.losses(
        architecture, model, trees, splits, units, x, labels
    ).mean()

  updates, state = _rmsprop(config).update(jax.grad(loss)(splits), state)
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
        _incoming_weights(site, trees),
    )
    trusted[site.axis] = Split(
        splits_lib.as_incoming(u, split.u), splits_lib.as_outgoing(e, split.e)
    )
  return trusted, state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scale_gradients(architecture, model, trees, splits, scale, x, labels):
  """Per axis, (units,) sums over a batch of d loss / d scale of each u."""
  units = _all_units(model)

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


def _all_units(model: Model) -> dict[str, np.ndarray]:
  return {site.axis: np.arange(site.units) for site in model.sites}


def _rmsprop(config: Config) -> optax.GradientTransformation:
  return optax.rmsprop(config.learning_rate, RMSPROP_DECAY)


def _shortened(rows: jax.Array, limit: float, weights: jax.Array) -> jax.Array:
  """Rows, no longer than a part of those of the weights."""
  length = jnp.linalg.norm(rows, axis=-1)
  largest = limit * jnp.linalg.norm(weights, axis=-1)
  factor = jnp.minimum(1, largest / jnp.where(length > 0, length, 1))
  return rows * factor[:, None]


def _unit_rows(rows: jax.Array) -> jax.Array:
  """Rows of length 1."""
  return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def _without_e(
    site: Site, trees: Trees, rows: jax.typing.ArrayLike
) -> Split:
  """The split of these u and no e."""
  return Split(
      _as_incoming(site, trees, rows),
      tuple(
          jnp.zeros_like(trees.kernel(reader.layer)) for reader in site.readers
      ),
  )


def _relative(
    site: Site, trees: Trees, rows: jax.typing.ArrayLike, length: float
) -> np.ndarray:
  """Rows of length 1, made so long in units of |w|."""
  weights = np.linalg.norm(_incoming_weights(site, trees), axis=-1)
  return length * weights[:, None] * np.asarray(rows)


def _as_incoming(
    site: Site, trees: Trees, rows: jax.typing.ArrayLike
) -> tuple[jax.Array, ...]:
  """Rows (units, incoming) in the shapes and types of the writers' kernels."""
  kernels = [trees.kernel(writer.layer) for writer in site.writers]
  rows = jnp.asarray(rows, kernels[0].dtype)
  return splits_lib.as_incoming(rows, kernels)


def _incoming_weights(site: Site, trees: Trees) -> jax.Array:
  """w of every unit, (units, incoming)."""
  return splits_lib.incoming(
      [trees.kernel(writer.layer) for writer in site.writers]
  )


def _sum(parts):
  """The sum of trees in float64 on the host."""
  total = None
  for part in parts:
    part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
    total = part if total is None else jax.tree.map(np.add, total, part)
  return total


def _steps(
    architecture: Architecture, products: dict[sites_lib.End, int]
) -> float:
  """Training steps on one image that signals and products with them cost.

  Args:
    architecture: the network's.
    products: per layer, multiply-adds at each position of what it writes.

  Returns:
    One step, and what the products add; 0 without any.
  """
  positions = {
      leaf.path[:-1]: leaf.positions
      for leaf in costs.leaves(architecture)
      if leaf.path[-1] == 'kernel'
  }
  macs = sum(
      count * positions[end.layer.path] for end, count in products.items()
  )
  step = (1 + costs.BACKWARD_OVER_FORWARD) * costs.macs(architecture)
  return 1 + macs / step if products else 0


def _count(batches: Sequence[Batch]) -> int:
  return sum(len(labels) for _, labels in batches)
