"""What removing channels would cost, and what makes up for them.

Unit c is removed, and others take over: a_c is replaced by

  r_0 + sum over j != c of r_j a_j,

which adds r_j v_c to what the reader multiplies a_j with, and a constant to
what it writes. Each reader has its own activations and its own r, one after
another in what follows. With weights w = r and w_c = -1, and R_nj the product
of the gradient of example n with v_c a_j (j = 0: with the constant),

  s_n = R_n'w,   change of the loss = mean(R)'w + 1/2 w'Kw,   K = mean S_n S_n'

where S is as R with d' in place of d. There is no Taylor expansion in between:
readers are linear. As with splits, what one reader's change does to other
writers of the same stream is there in first order only.

  none           r = 0
  mean           r_0 is the mean of a_c
  least_squares  r minimises the mean square of what is left of a_c
  gauss_newton   r minimises the model above, with a ridge towards that one and
                 no further from it than trusted; or that one, if it is better

Examples of which the network is certain have hardly any curvature, so that to
the model their logits may move beyond all margins. Where few others are left,
gauss_newton adapts to these few. So it may not leave more of a_c than
`LARGEST_RESIDUE`, unless least squares do, and r is best chosen by some
examples and judged by others.

Several units of an axis go one after another. Unit d has by then taken over
from those before it: what it multiplies is no longer v_d, but a mixture

  sum_i m_i v_i,   m = e_d + sum over the c before it of r_cd m_c,

and its R is the same mixture of theirs. Least squares leave out who has gone
(`linalg.downdate`). Products of the S of two units are not kept, so that K is
bounded, by Cauchy and Schwarz, with equality where units do the same:

  K <= sum_i m_i^2 K_i / q_i,   q_i = |m_i| / sum |m|.

`together`, which has the last word, forms the mixtures themselves.

The K of a site are units * (weights of w)^2 numbers. Where those of all sites
are more than `LARGEST_GRAMS` bytes, the largest sites go without: gauss_newton
is least_squares there, and mean (S_n'w)^2 is measured in a second pass, for the
w of each unit and for r = 0. As units go, K is then taken to be the multiple of
the activations' second moments that gives the sum of both. A batch's products,
of which K is the sum, are formed for as many units at a time as fit into
`LARGEST_PRODUCTS` bytes.
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
# Of the mean square of a unit's activations, what may be left at any reader.
LARGEST_RESIDUE = 0.5
# Half the curvature of a prune beyond which its estimate is not trusted, nats.
LARGEST_DIVERGENCE = 0.02
# Bytes of the K of all sites, and of a batch's products at any time.
LARGEST_GRAMS = 2**31
LARGEST_PRODUCTS = 2**28
_EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Removal:
  """One unit to prune, after those of its axis that go before it.

  Attributes:
    axis: its axis.
    unit: its number before the step.
    weights: (readers, units + 1) w, the constant's last; 0 for those gone.
    mixture: (readers, units) m, of what the readers multiply it with.
  """

  axis: str
  unit: int
  weights: np.ndarray
  mixture: np.ndarray


def alone(axis: str, unit: int, weights: np.ndarray) -> Removal:
  """The first removal of an axis; weights as there."""
  return Removal(axis, unit, weights, _own(weights.shape, unit))


@dataclasses.dataclass(frozen=True)
class Left:
  """What is known of a site of which some units are pruned already.

  Attributes:
    axis: its axis.
    compensation: one of `COMPENSATIONS`.
    constants: (readers,) whether there is a norm or a bias for a constant.
    moments: (readers, units + 1, units + 1) of activations and 1.
    inverses: of the moments of the units that are left; 0 for the others.
    slopes: (units, readers, units + 1) mean R.
    gram: (units, weights of w, weights of w) K up to its factors; (1, ...) if
      it is the same of all.
    factors: (units,) of K.
    removals: of the pruned units, in their order.
    learned: the same by other examples, by which r is chosen; None for these.
  """

  axis: str
  compensation: str
  constants: np.ndarray
  moments: np.ndarray
  inverses: np.ndarray
  slopes: np.ndarray
  gram: np.ndarray
  factors: np.ndarray
  removals: tuple[Removal, ...] = ()
  learned: 'Left | None' = None

  @property
  def most(self) -> int:
    """How many units one step may prune."""
    return len(self.slopes) // 2

  def removal(self, unit: int) -> tuple[Removal, float]:
    """The removal of one more unit, and by how much it changes the loss.

    Args:
      unit: one that is left.

    Returns:
      The removal; nats, infinite if the model is not to be trusted.
    """
    found = _evaluated(self, slice(unit, unit + 1))
    usable = _trusted(found.changes, found.curvatures).item()
    change = found.changes.item() if usable else float('inf')
    return Removal(
        self.axis, unit, found.weights[0], _mixtures(self, [unit])[0]
    ), change

  def without(self, removal: Removal) -> 'Left':
    """What is left after one more removal."""
    inverses = [
        linalg.downdate(inverse, removal.unit) for inverse in self.inverses
    ]
    return dataclasses.replace(
        self,
        inverses=np.stack(inverses),
        removals=(*self.removals, removal),
        learned=self.learned and self.learned.without(removal),
    )


@dataclasses.dataclass(frozen=True)
class Prunes:
  """The prunes of all units of all sites.

  Attributes:
    candidates: (axis, unit) pairs.
    changes: (candidates,) change of the loss by each alone, nats.
    curvatures: (candidates,) w'Kw.
    weights: per axis, (units, readers, units + 1) the w of each unit alone.
    usable: (candidates,) whether the statistics are finite and the model is
      trusted.
    left: per axis, what further removals are estimated from.
    passes: how often the examples were seen.
  """

  candidates: tuple[tuple[str, int], ...]
  changes: np.ndarray
  curvatures: np.ndarray
  weights: Mapping[str, np.ndarray]
  usable: np.ndarray
  left: Mapping[str, Left]
  passes: int

  @property
  def dropped(self) -> int:
    """How many candidates cannot be used."""
    return int(np.count_nonzero(~self.usable))

  def alone(self, index: int) -> Removal:
    """The removal of one candidate and no other of its axis."""
    axis, unit = self.candidates[index]
    return alone(axis, unit, self.weights[axis][unit])


# Of a method that does not prune.
NONE = Prunes((), np.zeros(0), np.zeros(0), {}, np.zeros(0, bool), {}, 0)


def estimate(
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    key: jax.Array,
    *,
    judging: Sequence[Batch] | None = None,
    compensation: str = 'gauss_newton',
    curvature: str = 'mc',
) -> Prunes:
  """Estimates the change of the loss by removing each unit.

  Args:
    model: the network.
    trees: its arrays.
    batches: the examples to choose by what makes up for it.
    key: of sampled labels.
    judging: best others, of which the loss is; None for the same.
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
  with_gram = _with_gram(model.sites, 1 if judging is None else 2)

  def start(batches, key):
    sums = _mean(
        functools.partial(
            _sums, model, curvature, with_gram, LARGEST_PRODUCTS, trees
        ),
        batches,
        key,
    )
    return {
        site.axis: _start(site, trees, sums[site.axis], compensation)
        for site in model.sites
    }

  left = start(batches, key)
  if judging is not None:
    batches, key = judging, jax.random.fold_in(key, len(batches))
    left = {
        axis: _judging(own, left[axis])
        for axis, own in start(batches, key).items()
    }
  found = {axis: _evaluated(left[axis], slice(None)) for axis in with_gram}
  wide = tuple(site for site in model.sites if site.axis not in with_gram)
  if wide:
    model_of_wide = dataclasses.replace(model, sites=wide)
    weights = {
        site.axis: _first_weights(
            left[site.axis].learned or left[site.axis], slice(None)
        )
        for site in wide
    }
    measured = _mean(
        functools.partial(
            _curvatures, model_of_wide, curvature, trees,
            {axis: w.astype('f4') for axis, w in weights.items()},
        ),
        batches,
        key,
    )
    for axis, w in weights.items():
      left[axis], found[axis] = _as_measured(left[axis], w, measured[axis])
  passes = (1 if judging is None else 2) + bool(wide)
  return _collected(model, found, left, passes=passes)


def _collected(
    model: Model,
    found: Mapping[str, '_Evaluation'],
    left: Mapping[str, Left],
    *,
    passes: int,
) -> Prunes:
  """`Prunes` from the first evaluation of each site."""
  ordered = [found[site.axis] for site in model.sites]
  changes = np.concatenate([one.changes for one in ordered])
  curvatures = np.concatenate([one.curvatures for one in ordered])
  lonely = [np.full(site.units, site.units == 1) for site in model.sites]
  return Prunes(
      candidates=tuple(
          (site.axis, unit)
          for site in model.sites
          for unit in range(site.units)
      ),
      changes=changes,
      curvatures=curvatures,
      weights={axis: one.weights for axis, one in found.items()},
      usable=_trusted(changes, curvatures) & ~np.concatenate(lonely),
      left=left,
      passes=passes,
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
    removals: Sequence[Removal],
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
    removals: of units, those of an axis in their order.
    batches: the examples.
    key: of sampled labels.
    samples: of the label of each example.

  Returns:
    The joint model.
  """
  numbers: dict[str, list[int]] = {}
  for number, removal in enumerate(removals):
    numbers.setdefault(removal.axis, []).append(number)
  stacked = {
      axis: tuple(
          np.asarray([getattr(removals[i], name) for i in own], np.float32)
          for name in ('weights', 'mixture')
      )
      for axis, own in numbers.items()
  }
  slopes, gram, examples = 0.0, 0.0, 0
  for sample in range(samples):
    for index, (x, labels) in enumerate(batches):
      draw = jax.random.fold_in(jax.random.fold_in(key, sample), index)
      sums = _joint_sums(model, trees, splits, stacked, x, labels, draw)
      slopes = slopes + np.asarray(sums[0], np.float64)
      gram = gram + np.asarray(sums[1], np.float64)
      examples += len(labels)
  # The program has the axes by name.
  order = [number for axis in sorted(numbers) for number in numbers[axis]]
  back = np.array([0, *(1 + np.argsort(order))], int)
  return Joint(slopes[back] / examples, gram[np.ix_(back, back)] / examples)


@functools.partial(jax.jit, static_argnums=0)
def _joint_sums(model, trees, splits, stacked, x, labels, key):
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
  s, c = (
      [sum(one.sum(-1) for one in kind)[:, None]]
      for kind in zip(*by_split, strict=True)
  )
  sites = {site.axis: site for site in model.sites}
  for axis in sorted(stacked):
    signal = by_axis[axis]
    a = _activations(sites[axis], trees, signal)
    project = functools.partial(_projected, sites[axis], trees, a)
    s.append(project(signal.slope, *stacked[axis]))
    c.append(project(signal.curvature, *stacked[axis]))
  s, c = jnp.concatenate(s, -1), jnp.concatenate(c, -1)
  return s.sum(0), jnp.einsum('bi,bj->ij', c, c, precision=_EXACT)


def _projected(site, trees, activations, gradients, weights, mixtures):
  """<gradients, dz> of some removals, (batch, removals)."""
  total = 0.0
  for reader, a, gradient, w, m in zip(
      site.readers,
      activations,
      gradients,
      jnp.moveaxis(weights, 1, 0),
      jnp.moveaxis(mixtures, 1, 0),
      strict=True,
  ):
    kernel = jnp.einsum(
        '...io,ni->...no', trees.kernel(reader.layer), m, precision=_EXACT
    )
    own, constant = _received(reader.layer, kernel, a.shape, gradient)
    read = jnp.einsum('bpj,nj->bpn', _flat(a), w[:, :-1], precision=_EXACT)
    total += (own * read).sum(1) + constant * w[None, :, -1]
  return total


def _received(layer, kernel, shape, gradient):
  """What a kernel's units receive of the gradient of what a layer writes.

  Args:
    layer: a reader.
    kernel: (..., units, out), of any units.
    shape: (batch, ..., channels) of what it reads.
    gradient: (batch, ..., out).

  Returns:
    (batch, positions, units); (batch, units) of a constant at every position of
    the output, also at the border.
  """
  own = layer.transposed(gradient, kernel, (*shape[:-1], kernel.shape[-2]))
  constant = jnp.einsum(
      'bpo,co->bc', _flat(gradient), outgoing_sum(kernel), precision=_EXACT
  )
  return _flat(own), constant


def _activations(site, trees, signal):
  return site.activations(
      trees.weights, trees.stats, signal.entered, signal.h
  )


def _flat(a):
  """(batch, positions, channels)."""
  return a.reshape(len(a), -1, a.shape[-1])


def outgoing_sum(kernel: jax.Array) -> jax.Array:
  """(units, out): what a reader makes of a constant 1, inside the border."""
  return kernel.reshape(-1, *kernel.shape[-2:]).sum(0)


def _with_gram(
    sites: Sequence[sites_lib.Site], copies: int
) -> tuple[str, ...]:
  """The axes whose K are formed: the smallest that fit together."""
  sizes = {
      site.axis: 4
      * copies
      * site.units
      * (len(site.readers) * (site.units + 1)) ** 2
      for site in sites
  }
  axes = sorted(sizes, key=sizes.get)
  ends = np.cumsum([sizes[axis] for axis in axes])
  return tuple(a for a, end in zip(axes, ends) if end <= LARGEST_GRAMS)


def _mean(sums, batches, key):
  """Means over all examples, on the host, of what a program sums."""
  total = None
  for index, (x, labels) in enumerate(batches):
    part = sums(x, labels, jax.random.fold_in(key, index))
    total = part if total is None else linalg.plus(total, part)
  examples = sum(len(labels) for _, labels in batches)
  return jax.tree.map(lambda leaf: np.asarray(leaf) / examples, total)


def _start(site, trees, sums, compensation):
  """A `Left` of which nothing has been pruned."""
  moments, slopes, *gram = sums
  constants = np.array([
      reader.norm is not None or trees.has_bias(reader.layer)
      for reader in site.readers
  ])
  moments = moments.astype('f8')
  if not gram:
    if compensation == 'gauss_newton':
      compensation = 'least_squares'
    gram = [_block_diagonal(moments)[None]]
  return Left(
      axis=site.axis,
      compensation=compensation,
      constants=constants,
      moments=moments,
      inverses=np.stack([
          _inverse(own, constant)
          for own, constant in zip(moments, constants, strict=True)
      ]),
      slopes=slopes.astype('f8'),
      gram=gram[0],
      factors=np.ones(site.units),
  )


def _judging(left: Left, learned: Left) -> Left:
  """What is known by others of units whose r is chosen by `learned`."""
  sums = learned.slopes.sum((1, 2)) + learned.moments.sum()
  broken = ~np.isfinite(sums)[:, None, None]
  return dataclasses.replace(
      left, learned=learned, slopes=np.where(broken, np.nan, left.slopes)
  )


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
  """(count, size, size) along the diagonal of one matrix."""
  count, size, _ = blocks.shape
  matrix = np.zeros((count, size, count, size))
  matrix[np.arange(count), :, np.arange(count)] = blocks
  return matrix.reshape(count * size, count * size)


def _inverse(moments: np.ndarray, constant: bool) -> np.ndarray:
  """Of a reader's moments with a ridge; 0 for a constant it cannot take."""
  # A site with a value that is not finite stays so in its change.
  moments = moments if np.isfinite(moments).all() else np.eye(len(moments))
  used = np.append(np.ones(len(moments) - 1, bool), constant)
  kept, size = moments[np.ix_(used, used)], np.count_nonzero(used)
  ridge = max(LEAST_SQUARES_DAMPING * np.trace(kept) / size, linalg.JITTER)
  inverse = np.zeros_like(moments)
  inverse[np.ix_(used, used)] = np.linalg.inv(kept + ridge * np.eye(size))
  return inverse


@dataclasses.dataclass(frozen=True)
class _Evaluation:
  """Of removals, each as the next of its axis.

  Attributes:
    weights: (removals, readers, units + 1) w.
    changes: (removals,) nats.
    curvatures: (removals,) w'Kw.
  """

  weights: np.ndarray
  changes: np.ndarray
  curvatures: np.ndarray


def _evaluated(left: Left, units: slice) -> _Evaluation:
  """Compensates, and estimates, the removal of each of some units."""
  learned = left.learned or left
  first = _first_weights(learned, units)
  model = _model(left, units)
  found = _judged(first, *model)
  if left.compensation == 'gauss_newton':
    source = model if learned is left else _model(learned, units)
    best = _judged(_minimised(learned, units, first, *source), *model)
    # What is not finite is taken, so that it is seen.
    trusted = _trusted(best.changes, best.curvatures)
    others = _trusted(found.changes, found.curvatures)
    taken = ~(best.changes >= found.changes) & ~(others & ~trusted)
    taken |= ~np.isfinite(best.changes)
    found = _Evaluation(
        np.where(taken[:, None, None], best.weights, found.weights),
        np.where(taken, best.changes, found.changes),
        np.where(taken, best.curvatures, found.curvatures),
    )
  return found


def _model(left: Left, units: slice) -> tuple[np.ndarray, np.ndarray]:
  """Slopes (units chosen, weights of w) and K of removals."""
  mixtures = _mixtures(left, _numbers(left, units))
  slopes = np.einsum('cri,irj->crj', mixtures, left.slopes)
  return slopes.reshape(len(slopes), -1), _bounded(left, units, mixtures)


def _minimised(
    left: Left,
    units: slice,
    first: np.ndarray,
    slopes: np.ndarray,
    gram: np.ndarray,
) -> np.ndarray:
  """(units chosen, readers, units + 1) w towards the minimum of the model."""
  free = _free(left, units).reshape(len(first), -1)
  w = first.reshape(len(first), -1)
  gradient = slopes + np.einsum('cjk,ck->cj', gram, w)
  solution = linalg.solve_damped(
      gram * free[:, :, None] * free[:, None, :],
      -gradient * free,
      damping=GAUSS_NEWTON_DAMPING,
  )
  change = np.where(free, np.asarray(solution.x, np.float64), 0)
  change = change.reshape(first.shape)
  return first + _part_within(left, units, first, change) * change


def _part_within(
    left: Left, units: slice, first: np.ndarray, change: np.ndarray
) -> np.ndarray:
  """(units chosen, 1, 1) how much of a change of w is trusted, 0 to 1."""
  product = lambda a, b: np.einsum('cri,rij,crj->cr', a, left.moments, b)
  own = np.diagonal(left.moments, axis1=1, axis2=2).T[:-1][units]
  room = np.maximum(LARGEST_RESIDUE * own - product(first, first), 0)
  # The larger root of square t^2 + 2 cross t = room.
  square, cross = product(change, change), product(first, change)
  root = np.sqrt(np.square(cross) + square * room) - cross
  part = np.where(room > 0, root / np.maximum(square, linalg.JITTER), 0)
  part = np.where(square > 0, part, 1)
  return np.clip(part.min(-1), 0, 1)[:, None, None]


def _judged(
    weights: np.ndarray, slopes: np.ndarray, gram: np.ndarray
) -> _Evaluation:
  """What a model of the loss says of some w."""
  w = weights.reshape(len(weights), -1)
  curvatures = np.sum(w * np.einsum('cjk,ck->cj', gram, w), -1)
  return _Evaluation(
      weights, np.sum(slopes * w, -1) + curvatures / 2, curvatures
  )


def _as_measured(
    left: Left, w: np.ndarray, curvatures: np.ndarray
) -> tuple[Left, _Evaluation]:
  """A site without K, given (2, units) w'Kw for w and for r = 0."""
  rows = w.reshape(len(w), -1)
  energies = np.sum(rows @ left.gram[0] * rows, -1)
  energies += np.diagonal(left.moments, axis1=1, axis2=2).sum(0)[:-1]
  factors = curvatures.sum(0) / np.maximum(energies, linalg.JITTER)
  changes = np.sum(left.slopes * w, (1, 2)) + curvatures[0] / 2
  return (
      dataclasses.replace(left, factors=factors),
      _Evaluation(w, changes, curvatures[0].astype('f8')),
  )


def _trusted(changes, curvatures):
  return np.isfinite(changes) & (curvatures <= 2 * LARGEST_DIVERGENCE)


def _numbers(left: Left, units: slice) -> np.ndarray:
  return np.arange(len(left.slopes))[units]


def _own(shape: tuple[int, int], unit: int) -> np.ndarray:
  """The mixture of a unit that has taken over nothing."""
  mixture = np.zeros((shape[0], shape[1] - 1))
  mixture[:, unit] = 1
  return mixture


def _mixtures(left: Left, units: Sequence[int]) -> np.ndarray:
  """(units chosen, readers, units) m."""
  shape = left.slopes.shape[1:]
  mixtures = np.stack([_own(shape, unit) for unit in units])
  for removal in left.removals:
    taken = removal.weights.T[units]
    mixtures = mixtures + taken[..., None] * removal.mixture
  return mixtures


def _bounded(left: Left, units: slice, mixtures: np.ndarray) -> np.ndarray:
  """(units chosen, weights of w, weights of w) K of mixtures, or its bound."""
  if not left.removals:
    return left.factors[units, None, None] * np.broadcast_to(
        left.gram, (len(left.factors), *left.gram.shape[1:])
    )[units]
  gone = [removal.unit for removal in left.removals]
  return np.stack([
      _bound(left, [unit, *gone], mixture)
      for unit, mixture in zip(_numbers(left, units), mixtures, strict=True)
  ])


def _bound(left: Left, units: list[int], mixture: np.ndarray) -> np.ndarray:
  """The bound of a mixture, (readers, units), of some units."""
  mixture = mixture[:, units]
  sizes = np.abs(mixture).sum(0)
  # A unit that is not in the mixture has no part in the bound either.
  part = left.factors[units] * sizes.sum() / np.where(sizes > 0, sizes, 1)
  parts = np.einsum('i,ri,si->irs', part, mixture, mixture)
  readers, width = left.slopes.shape[1:]
  blocks = left.gram.reshape(-1, readers, width, readers, width)
  if len(blocks) == 1:
    bound = parts.sum(0)[:, None, :, None] * blocks[0]
  else:
    bound = np.einsum('irs,irjsk->rjsk', parts, blocks[units])
  return bound.reshape(readers * width, -1)


def _free(left: Left, units: slice) -> np.ndarray:
  """(units chosen, readers, units + 1) which weights may be chosen."""
  chosen = _numbers(left, units)
  free = np.ones((len(chosen), *left.slopes.shape[1:]), bool)
  free[np.arange(len(chosen)), :, chosen] = False
  free[:, :, [removal.unit for removal in left.removals]] = False
  free[:, :, -1] = left.constants
  return free


def _first_weights(left: Left, units: slice) -> np.ndarray:
  """(units chosen, readers, units + 1) w up to least squares."""
  free = _free(left, units)
  chosen = _numbers(left, units)
  w = np.zeros(free.shape)
  if left.compensation == 'mean':
    w[..., -1] = (left.moments[:, chosen, -1] / left.moments[:, -1:, -1]).T
  elif left.compensation != 'none':
    rows = left.inverses[:, chosen] / left.inverses[:, chosen, chosen, None]
    w = -np.moveaxis(rows, 0, 1)
  w = np.where(free, w, 0)
  w[np.arange(len(chosen)), :, chosen] = -1
  return w


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sums(model, curvature, with_gram, chunk_bytes, trees, x, labels, key):
  """Sums over a batch, per axis.

  Returns:
    `{axis: (moments of the activations and 1, averaged over positions,
    (readers, units + 1, units + 1); R (units, readers, units + 1); and if it is
    among `with_gram`, SS' (units, weights of w, weights of w))}`
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  sums = {}
  for site in model.sites:
    signal = by_axis[site.axis]
    activations = _activations(site, trees, signal)
    slopes, curvatures = (
        [
            _received(
                reader.layer, trees.kernel(reader.layer), a.shape, gradient
            )
            for reader, a, gradient in zip(
                site.readers, activations, gradients, strict=True
            )
        ]
        for gradients in (signal.slope, signal.curvature)
    )
    flat = [_flat(a) for a in activations]
    moments = jnp.stack([_moments(a) for a in flat])
    summed = jnp.stack(
        [_summed(a, *own) for a, own in zip(flat, slopes, strict=True)], 1
    )
    sums[site.axis] = moments, summed
    if site.axis in with_gram:
      sums[site.axis] += (_gram(flat, curvatures, chunk_bytes),)
  return sums


def _moments(a):
  """Sums over a batch of second moments of activations and 1."""
  extended = jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)
  moments = jnp.einsum('bpi,bpj->ij', extended, extended, precision=_EXACT)
  return moments / a.shape[1]


def _summed(a, own, constant):
  """A reader's R summed over a batch, (units, units + 1)."""
  products = jnp.einsum('bpc,bpj->cj', own, a, precision=_EXACT)
  return jnp.concatenate([products, constant.sum(0)[:, None]], -1)


def _gram(activations, received, chunk_bytes):
  """SS' summed over a batch, by as many units at a time as there is room."""

  def of_unit(received):
    rows = []
    for a, (own, constant) in zip(activations, received, strict=True):
      rows.append(jnp.einsum('bp,bpj->bj', own, a, precision=_EXACT))
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
  """Per axis, sums over a batch of (S'w)^2, for w and for r = 0: (2, units).
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  sums = {}
  for site in model.sites:
    signal = by_axis[site.axis]
    w = weights[site.axis]
    own = jnp.broadcast_to(jnp.eye(site.units)[:, None], w[..., :-1].shape)
    c = _projected(
        site,
        trees,
        _activations(site, trees, signal),
        signal.curvature,
        jnp.concatenate([w, -jnp.pad(own, ((0, 0), (0, 0), (0, 1)))]),
        jnp.concatenate([own, own]),
    )
    sums[site.axis] = jnp.square(c).sum(0).reshape(2, -1)
  return sums
