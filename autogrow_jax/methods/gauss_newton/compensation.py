"""Chooses the compensation r of prunes, and estimates their cost.

With w and R of `removals`, each reader with its own r, one after another,

  change of the loss = mean(R)'w + 1/2 w'Kw,   K = mean S_n S_n',

where S is as R with d' in place of d. There is no Taylor expansion in between:
readers are linear. As with splits, a reader's effect on later writers of the
same stream enters in first order only. The compensations:

  least_squares  r minimises the mean square of what is left of a_c
  gauss_newton   r minimises the model above, with a ridge toward least squares
                 and within trust; or least squares, if they are better

Examples of which the network is certain have hardly any curvature, so the model
lets their logits move beyond all margins. Where few others are left,
gauss_newton adapts to these few. So it may not leave more of a_c than
`LARGEST_RESIDUE`, unless least squares do, and r is chosen by some examples and
judged by others.

Several units of an axis are removed one after another. Least squares leave out
removed units (`linalg.downdate`). Products of the S of two units are not kept,
so K of a mixture m is bounded, by Cauchy and Schwarz, with equality where units
do the same:

  K <= sum_i m_i^2 K_i / q_i,   q_i = |m_i| / sum |m|.

`together`, which has the last word, forms the mixtures themselves.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import removals

COMPENSATIONS = ('least_squares', 'gauss_newton')
# Ridges in units of the mean eigenvalue.
LEAST_SQUARES_DAMPING = 1e-6
GAUSS_NEWTON_DAMPING = 0.1
# Largest residue at a reader, in units of the unit's mean square activation.
LARGEST_RESIDUE = 0.5
# Half the curvature of a prune beyond which its estimate is not trusted, nats.
LARGEST_DIVERGENCE = 0.02


@dataclasses.dataclass(frozen=True)
class Remaining:
  """Statistics of a site after the removal of some units.

  Attributes:
    axis: axis of the site.
    compensation: one of `COMPENSATIONS`.
    constants: (readers,) true where a norm or a bias can take a constant.
    moments: (readers, units + 1, units + 1) moments of activations and 1.
    inverses: inverses of the moments of the remaining units; 0 for the others.
    slopes: (units, readers, units + 1) mean R.
    gram: (units, weights of w, weights of w) K up to its factors; (1, ...) if
      it is the same for all units.
    factors: (units,) factors of K.
    chosen_by: the same from the examples that choose r; None in these.
    removed: removals so far, in their order.
  """

  axis: str
  compensation: str
  constants: np.ndarray
  moments: np.ndarray
  inverses: np.ndarray
  slopes: np.ndarray
  gram: np.ndarray
  factors: np.ndarray
  chosen_by: 'Remaining | None' = None
  removed: tuple[removals.Removal, ...] = ()

  @property
  def most(self) -> int:
    """Largest number of units that one step may prune."""
    return len(self.slopes) // 2

  def removal(self, unit: int) -> tuple[removals.Removal, float]:
    """Returns the removal of a remaining unit, and the change of the loss.

    Args:
      unit: number of the unit.

    Returns:
      The removal; nats, infinite if the model is not trusted.
    """
    result = evaluated(self, slice(unit, unit + 1))
    usable = trusted(result.changes, result.curvatures).item()
    change = result.changes.item() if usable else float('inf')
    return removals.Removal(
        self.axis, unit, result.weights[0], _mixtures(self, [unit])[0]
    ), change

  def without(self, removal: removals.Removal) -> 'Remaining':
    """Returns the statistics after one more removal."""
    inverses = [
        linalg.downdate(inverse, removal.unit) for inverse in self.inverses
    ]
    return dataclasses.replace(
        self,
        inverses=np.stack(inverses),
        removed=(*self.removed, removal),
        chosen_by=self.chosen_by and self.chosen_by.without(removal),
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Removals, each as the next of its axis.

  Attributes:
    weights: (removals, readers, units + 1) w.
    changes: (removals,) nats.
    curvatures: (removals,) w'Kw.
  """

  weights: np.ndarray
  changes: np.ndarray
  curvatures: np.ndarray


def start(
    axis: str,
    sums: Sequence[np.ndarray],
    constants: np.ndarray,
    compensation: str,
) -> Remaining:
  """Returns the statistics of a site before any removal.

  Args:
    axis: axis of the site.
    sums: means of moments and R, and of K if there is room for it.
    constants: (readers,) true where a constant can be taken.
    compensation: one of `COMPENSATIONS`; without K, least squares are taken.
  """
  moments, slopes, *gram = sums
  moments = moments.astype('f8')
  if not gram:
    compensation = 'least_squares'
    gram = [_block_diagonal(moments)[None]]
  return Remaining(
      axis=axis,
      compensation=compensation,
      constants=constants,
      moments=moments,
      inverses=np.stack([
          _inverse(one, constant)
          for one, constant in zip(moments, constants, strict=True)
      ]),
      slopes=slopes.astype('f8'),
      gram=gram[0],
      factors=np.ones(len(slopes)),
  )


def judged_by(chosen_by: Remaining, judge: Remaining) -> Remaining:
  """Returns the statistics of examples that judge r chosen by others."""
  sums = chosen_by.slopes.sum((1, 2)) + chosen_by.moments.sum()
  broken = ~np.isfinite(sums)[:, None, None]
  return dataclasses.replace(
      judge,
      chosen_by=chosen_by,
      slopes=np.where(broken, np.nan, judge.slopes),
  )


def evaluated(remaining: Remaining, units: slice) -> Evaluation:
  """Compensates and estimates the removal of each of some units."""
  chosen_by = remaining.chosen_by
  first = least_squares(chosen_by, units)
  model = _model(remaining, units)
  result = _judged(first, *model)
  if remaining.compensation == 'gauss_newton':
    source = _model(chosen_by, units)
    best = _judged(_minimised(chosen_by, units, first, *source), *model)
    # Results that are not finite are taken, so that they are noticed.
    is_trusted = trusted(best.changes, best.curvatures)
    others = trusted(result.changes, result.curvatures)
    taken = ~(best.changes >= result.changes) & ~(others & ~is_trusted)
    taken |= ~np.isfinite(best.changes)
    result = Evaluation(
        np.where(taken[:, None, None], best.weights, result.weights),
        np.where(taken, best.changes, result.changes),
        np.where(taken, best.curvatures, result.curvatures),
    )
  return result


def as_measured(
    remaining: Remaining, w: np.ndarray, curvatures: np.ndarray
) -> tuple[Remaining, Evaluation]:
  """Completes a site without K by (2, units) w'Kw for w and for r = 0."""
  rows = w.reshape(len(w), -1)
  energies = np.sum(rows @ remaining.gram[0] * rows, -1)
  energies += np.diagonal(remaining.moments, axis1=1, axis2=2).sum(0)[:-1]
  factors = curvatures.sum(0) / np.maximum(energies, linalg.JITTER)
  changes = np.sum(remaining.slopes * w, (1, 2)) + curvatures[0] / 2
  return (
      dataclasses.replace(remaining, factors=factors),
      Evaluation(w, changes, curvatures[0].astype('f8')),
  )


def trusted(changes: np.ndarray, curvatures: np.ndarray) -> np.ndarray:
  """Returns true where the quadratic model holds."""
  return np.isfinite(changes) & (curvatures <= 2 * LARGEST_DIVERGENCE)


def least_squares(remaining: Remaining, units: slice) -> np.ndarray:
  """Computes (units chosen, readers, units + 1) w by least squares."""
  free = _free(remaining, units)
  chosen = _numbers(remaining, units)
  rows = (
      remaining.inverses[:, chosen]
      / remaining.inverses[:, chosen, chosen, None]
  )
  w = np.where(free, -np.moveaxis(rows, 0, 1), 0)
  w[np.arange(len(chosen)), :, chosen] = -1
  return w


def _model(
    remaining: Remaining, units: slice
) -> tuple[np.ndarray, np.ndarray]:
  """Returns slopes (units chosen, weights of w) and K of removals."""
  mixtures = _mixtures(remaining, _numbers(remaining, units))
  slopes = np.einsum('cri,irj->crj', mixtures, remaining.slopes)
  return slopes.reshape(len(slopes), -1), _bounded(remaining, units, mixtures)


def _minimised(
    remaining: Remaining,
    units: slice,
    first: np.ndarray,
    slopes: np.ndarray,
    gram: np.ndarray,
) -> np.ndarray:
  """Moves (units chosen, readers, units + 1) w toward the model's minimum."""
  free = _free(remaining, units).reshape(len(first), -1)
  w = first.reshape(len(first), -1)
  gradient = slopes + np.einsum('cjk,ck->cj', gram, w)
  solution = linalg.solve_damped(
      gram * free[:, :, None] * free[:, None, :],
      -gradient * free,
      damping=GAUSS_NEWTON_DAMPING,
  )
  change = np.where(free, np.asarray(solution.x, np.float64), 0)
  change = change.reshape(first.shape)
  return first + _part_within(remaining, units, first, change) * change


def _part_within(
    remaining: Remaining, units: slice, first: np.ndarray, change: np.ndarray
) -> np.ndarray:
  """Returns the trusted part of a change of w, 0 to 1, (units chosen, 1, 1)."""
  product = lambda a, b: np.einsum('cri,rij,crj->cr', a, remaining.moments, b)
  squares = np.diagonal(remaining.moments, axis1=1, axis2=2).T[:-1][units]
  room = np.maximum(LARGEST_RESIDUE * squares - product(first, first), 0)
  # The larger root of square t^2 + 2 cross t = room.
  square, cross = product(change, change), product(first, change)
  root = np.sqrt(np.square(cross) + square * room) - cross
  part = np.where(room > 0, root / np.maximum(square, linalg.JITTER), 0)
  part = np.where(square > 0, part, 1)
  return np.clip(part.min(-1), 0, 1)[:, None, None]


def _judged(
    weights: np.ndarray, slopes: np.ndarray, gram: np.ndarray
) -> Evaluation:
  """Evaluates some w by a model of the loss."""
  w = weights.reshape(len(weights), -1)
  curvatures = np.sum(w * np.einsum('cjk,ck->cj', gram, w), -1)
  return Evaluation(
      weights, np.sum(slopes * w, -1) + curvatures / 2, curvatures
  )


def _numbers(remaining: Remaining, units: slice) -> np.ndarray:
  return np.arange(len(remaining.slopes))[units]


def _mixtures(remaining: Remaining, units: Sequence[int]) -> np.ndarray:
  """Computes (units chosen, readers, units) m."""
  shape = remaining.slopes.shape[1:]
  mixtures = np.stack([removals.unmixed(shape, unit) for unit in units])
  for removal in remaining.removed:
    taken = removal.weights.T[units]
    mixtures = mixtures + taken[..., None] * removal.mixture
  return mixtures


def _bounded(
    remaining: Remaining, units: slice, mixtures: np.ndarray
) -> np.ndarray:
  """Returns (units chosen, weights of w, weights of w) K, or its bound."""
  if not remaining.removed:
    gram = remaining.gram
    return remaining.factors[units, None, None] * np.broadcast_to(
        gram, (len(remaining.factors), *gram.shape[1:])
    )[units]
  removed = [removal.unit for removal in remaining.removed]
  return np.stack([
      _bound(remaining, [unit, *removed], mixture)
      for unit, mixture in zip(
          _numbers(remaining, units), mixtures, strict=True
      )
  ])


def _bound(
    remaining: Remaining, units: list[int], mixture: np.ndarray
) -> np.ndarray:
  """Bounds K of a mixture, (readers, units), of some units."""
  mixture = mixture[:, units]
  sizes = np.abs(mixture).sum(0)
  # Units outside the mixture do not count.
  part = (
      remaining.factors[units] * sizes.sum() / np.where(sizes > 0, sizes, 1)
  )
  parts = np.einsum('i,ri,si->irs', part, mixture, mixture)
  readers, width = remaining.slopes.shape[1:]
  blocks = remaining.gram.reshape(-1, readers, width, readers, width)
  if len(blocks) == 1:
    bound = parts.sum(0)[:, None, :, None] * blocks[0]
  else:
    bound = np.einsum('irs,irjsk->rjsk', parts, blocks[units])
  return bound.reshape(readers * width, -1)


def _free(remaining: Remaining, units: slice) -> np.ndarray:
  """Marks the weights that may be chosen, (units chosen, readers, units + 1).
  """
  chosen = _numbers(remaining, units)
  free = np.ones((len(chosen), *remaining.slopes.shape[1:]), bool)
  free[np.arange(len(chosen)), :, chosen] = False
  free[:, :, [removal.unit for removal in remaining.removed]] = False
  free[:, :, -1] = remaining.constants
  return free


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
  """Puts (count, size, size) along the diagonal of one matrix."""
  count, size, _ = blocks.shape
  matrix = np.zeros((count, size, count, size))
  matrix[np.arange(count), :, np.arange(count)] = blocks
  return matrix.reshape(count * size, count * size)


def _inverse(moments: np.ndarray, constant: bool) -> np.ndarray:
  """Inverts a reader's moments with a ridge; 0 for an impossible constant."""
  # Values that are not finite remain in the site's slopes.
  moments = moments if np.isfinite(moments).all() else np.eye(len(moments))
  used = np.append(np.ones(len(moments) - 1, bool), constant)
  kept, size = moments[np.ix_(used, used)], np.count_nonzero(used)
  ridge = max(LEAST_SQUARES_DAMPING * np.trace(kept) / size, linalg.JITTER)
  inverse = np.zeros_like(moments)
  inverse[np.ix_(used, used)] = np.linalg.inv(kept + ridge * np.eye(size))
  return inverse
