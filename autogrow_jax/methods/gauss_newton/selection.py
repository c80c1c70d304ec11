"""Which morphisms to apply together.

Splits are picked one by one, each time the one whose addition lowers the
optimal value of the joint model most per unit of resource; then the scales of
all are optimised together. Prunes come after them, one by one as well, each
time the one that costs least loss per unit of resource: it is worth it if that
is less than the last split gained. `confirm` asks again how much it is beside
everything else.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import linalg
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import prunes as prunes_lib

Architecture = architecture_lib.Architecture

RESOURCES = ('params', 'macs')
# Scales below it are not worth a channel.
SMALLEST_SCALE = 0.05
# On the diagonal of the Gram matrix of what has been picked.
RELATIVE_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Limits:
  """How far one growth step may go.

  Attributes:
    resource: 'params' or 'macs', parameters or multiply-adds per image.
    growth_cap: largest relative increase of the resource in a step.
    price: nats per unit of resource below which no split is worth it.
    budget: largest resource of the network, None for no limit.
    largest_divergence: of each split, see `Estimates.best_scales`.
  """

  resource: str = 'params'
  growth_cap: float = 0.35
  price: float = 0.0
  budget: int | None = None
  largest_divergence: float = estimates_lib.LARGEST_DIVERGENCE

  def __post_init__(self):
    if self.resource not in RESOURCES:
      raise ValueError(
          f'resource is one of {", ".join(RESOURCES)}, got {self.resource!r}.'
      )
    if not self.growth_cap > 0:
      raise ValueError(f'growth_cap is positive, got {self.growth_cap}.')
    if not self.price >= 0:
      raise ValueError(f'price is at least 0, got {self.price}.')
    if not self.largest_divergence > 0:
      raise ValueError(
          f'largest_divergence is positive, got {self.largest_divergence}.'
      )

  def used(self, architecture: Architecture) -> int:
    """The resource that a network takes."""
    return getattr(costs, self.resource)(architecture)

  def allowance(self, architecture: Architecture) -> int:
    """By how much the resource may increase in one step.

    Raises:
      ValueError: the network is beyond the budget already.
    """
    used = self.used(architecture)
    allowed = int(self.growth_cap * used)
    if self.budget is None:
      return allowed
    if used > self.budget:
      raise ValueError(
          f'The budget is {self.budget} {self.resource}, but {architecture} '
          f'has {used} already; raise the budget or start smaller.'
      )
    return min(allowed, self.budget - used)


@dataclasses.dataclass(frozen=True)
class Selection:
  """What to apply.

  Attributes:
    splits: indices into the candidates, in the order of picking.
    scales: of each of them, above `SMALLEST_SCALE`.
    change: of the loss by all together, nats, as estimated; before `confirm`
      by the splits alone.
    prunes: in the order of picking; each counts on those of its axis before
      it.
    price: nats per unit of resource that a prune may cost.
  """

  splits: tuple[int, ...]
  scales: np.ndarray
  change: float
  prunes: tuple[prunes_lib.Removal, ...]
  price: float


def select(
    architecture: Architecture,
    estimates: estimates_lib.Estimates,
    limits: Limits,
    prunes: prunes_lib.Prunes = prunes_lib.NONE,
) -> Selection:
  """Selects splits and prunes.

  Args:
    architecture: the network's.
    estimates: of all splits.
    limits: of the step.
    prunes: of all prunes.

  Returns:
    The selection; it may be empty.
  """
  picked, ratio = pick(architecture, estimates, limits)
  scales = joint_scales(estimates, picked, limits)
  kept = [i for i, scale in enumerate(scales) if scale >= SMALLEST_SCALE]
  picked = [picked[i] for i in kept]
  # Those left out leave room for the others.
  scales = joint_scales(estimates, picked, limits)
  every = np.zeros(len(estimates.candidates))
  every[picked] = scales
  price = max(limits.price, ratio)
  split = [estimates.candidates[index] for index in picked]
  removed = pick_prunes(architecture, split, prunes, limits, price)
  return Selection(
      tuple(picked),
      scales,
      estimates.joint_change(every) if picked else 0.0,
      removed,
      price,
  )


def confirm(
    architecture: Architecture,
    candidates: Sequence[tuple[str, int]],
    selected: Selection,
    joint: prunes_lib.Joint,
    limits: Limits,
) -> Selection:
  """Keeps the prunes that are worth it beside the splits and each other.

  Where one is not, those of its axis that come after it are not kept either,
  since they counted on it.

  Args:
    architecture: the network's.
    candidates: (axis, unit) pairs that splits were selected from.
    selected: splits and prunes.
    joint: of this selection.
    limits: of the step.

  Returns:
    The selection, with the change of the loss by all of it together.
  """
  sizes = _sizes_with(architecture, [candidates[i] for i in selected.splits])
  kept: list[int] = []
  refused: set[str] = set()
  for number, removal in enumerate(selected.prunes):
    axis = removal.axis
    cost = joint.change([*kept, number]) - joint.change(kept)
    freed = _freed(architecture, sizes, [axis], limits.resource)[axis]
    if axis not in refused and cost / freed < selected.price:
      kept.append(number)
      sizes[axis] -= 1
    else:
      refused.add(axis)
  return dataclasses.replace(
      selected,
      prunes=tuple(selected.prunes[number] for number in kept),
      change=joint.change(kept),
  )


def joint_scales(
    estimates: estimates_lib.Estimates, picked: list[int], limits: Limits
) -> np.ndarray:
  """Best scales of some candidates together, each within its trust."""
  chosen = np.array(picked, int)
  largest = 2 * limits.largest_divergence
  curvatures = estimates.curvatures[chosen]
  return linalg.minimize_in_box(
      estimates.slopes[chosen],
      estimates.gram[np.ix_(chosen, chosen)],
      np.sqrt(largest / np.maximum(curvatures, largest)),
  )


def pick(
    architecture: Architecture,
    estimates: estimates_lib.Estimates,
    limits: Limits,
) -> tuple[list[int], float]:
  """Greedy picks by gain per resource, and the ratio of the last of them.

  With M the picks so far, adding m lowers the optimal value by rho^2 / (2 chi),
  rho = s_m - G_mM G_MM^-1 s_M and chi = G_mm - G_mM G_MM^-1 G_Mm. Both are
  kept up to date by one step of a Cholesky factorisation per pick.
  """
  slopes = np.where(estimates.usable, estimates.slopes, 0)
  usable = estimates.usable
  gram = np.where(usable[:, None] & usable[None], estimates.gram, 0)
  rho, chi = slopes.copy(), np.diag(gram) * (1 + RELATIVE_RIDGE)
  chi = np.where(usable, chi + linalg.JITTER, 1)
  factor: list[np.ndarray] = []  # Rows of L^-1 G_M: one per pick.

  def gains():
    # A slope that the picks have turned around has nothing to add.
    return np.where(rho < 0, rho**2 / (2 * chi), 0)

  def update(best):
    nonlocal rho, chi
    row = gram[best] - sum((f[best] * f for f in factor), np.zeros(len(rho)))
    row[best] = chi[best]
    row = row / np.sqrt(chi[best])
    rho = rho - row * rho[best] / np.sqrt(chi[best])
    chi = np.maximum(chi - row**2, RELATIVE_RIDGE * np.diag(gram) + 1e-300)
    factor.append(row)

  available = usable & (estimates.slopes < 0)
  return _greedy(
      architecture, estimates.candidates, available, limits, gains, update
  )


def pick_prunes(
    architecture: Architecture,
    split: Sequence[tuple[str, int]],
    prunes: prunes_lib.Prunes,
    limits: Limits,
    price: float,
) -> tuple[prunes_lib.Removal, ...]:
  """Greedy picks of prunes by cost per resource, while that is below a price.

  Of an axis no more than half of the units, and none that is split. What the
  others of an axis cost changes with each pick of it. It hardly ever falls,
  there being fewer to take over, so that it is only estimated again once the
  last estimate is the lowest of all.

  Args:
    architecture: the network's.
    split: (axis, unit) pairs that are split in the same step.
    prunes: of all units.
    limits: of the step.
    price: nats per unit of resource.

  Returns:
    The removals, in the order of picking.
  """
  sizes = _sizes_with(architecture, split)
  axes = np.array([axis for axis, _ in prunes.candidates])
  stays = np.array([c not in split for c in prunes.candidates], bool)
  available = prunes.usable & stays
  changes, left = prunes.changes.copy(), dict(prunes.left)
  found = {index: prunes.alone(index) for index in np.flatnonzero(available)}
  picked: list[prunes_lib.Removal] = []
  while available.any():
    freed = _freed(architecture, sizes, set(axes), limits.resource)
    ratios = changes / [freed[axis] for axis in axes]
    ratios = np.where(available, ratios, np.inf)
    best = int(np.argmin(ratios))
    axis, unit = prunes.candidates[best]
    if not ratios[best] < price:
      break
    if best not in found:
      found[best], changes[best] = left[axis].removal(unit)
      continue
    picked.append(found[best])
    left[axis] = left[axis].without(found[best])
    sizes[axis] -= 1
    same = axes == axis
    found = {index: r for index, r in found.items() if not same[index]}
    available[best] = False
    if len(left[axis].removals) == left[axis].most:
      available[same] = False
  return tuple(picked)


def by_gain(
    architecture: Architecture,
    candidates: Sequence[tuple[str, int]],
    gains: np.ndarray,
    usable: np.ndarray,
    limits: Limits,
) -> Selection:
  """Selects splits by their own gains, which are taken to add up.

  There is no joint model: everything is applied as it is, and no unit pruned.

  Args:
    architecture: the network's.
    candidates: (axis, unit) pairs.
    gains: (candidates,) any score that is larger for better splits; in nats if
      `limits.price` is to mean anything.
    usable: (candidates,) whether a candidate may be selected.
    limits: of the step.

  Returns:
    The selection, whose change is minus the sum of gains; it may be empty.
  """
  picked, last = _greedy(
      architecture, candidates, usable, limits, lambda: gains
  )
  return Selection(
      splits=tuple(picked),
      scales=np.ones(len(picked)),
      change=-float(np.sum(np.asarray(gains)[picked])),
      prunes=(),
      price=max(limits.price, last),
  )


def _greedy(
    architecture: Architecture,
    candidates: Sequence[tuple[str, int]],
    available: np.ndarray,
    limits: Limits,
    gains: Callable[[], np.ndarray],
    update: Callable[[int], None] = lambda best: None,
) -> tuple[list[int], float]:
  """Picks by gain per resource, one by one, within limits.

  Args:
    architecture: the network's.
    candidates: (axis, unit) pairs.
    available: (candidates,) those that may be picked.
    limits: of the step.
    gains: (candidates,) now.
    update: called with every pick.

  Returns:
    The picks, and the ratio of the last of them.
  """
  allowance = limits.allowance(architecture)
  axes = [axis for axis, _ in candidates]
  sizes = dict(architecture.sizes)
  available = np.array(available)
  picked, spent, last = [], 0, 0.0
  while available.any():
    increments = _increments(architecture, sizes, set(axes), limits.resource)
    resource = np.array([increments[axis] for axis in axes])
    ratios = np.where(available, gains(), 0) / resource
    ratios[resource > allowance - spent] = 0
    best = int(np.argmax(ratios))
    if ratios[best] <= limits.price:
      break
    last = float(ratios[best])
    picked.append(best)
    available[best] = False
    spent += resource[best]
    sizes[axes[best]] += 1
    update(best)
  return picked, last


def _sizes_with(architecture, split):
  """Sizes of all axes with some of their units split."""
  sizes = dict(architecture.sizes)
  for axis, _ in split:
    sizes[axis] += 1
  return sizes


def _freed(architecture, sizes, axes, resource):
  """By how much the resource falls with one unit less of each axis."""
  measure = getattr(costs, resource)
  now = measure(architecture, sizes)
  return {
      axis: now - measure(architecture, {**sizes, axis: sizes[axis] - 1})
      for axis in axes
  }


def _increments(architecture, sizes, axes, resource):
  """By how much the resource grows with one more unit of each axis."""
  measure = getattr(costs, resource)
  now = measure(architecture, sizes)
  return {
      axis: measure(architecture, {**sizes, axis: sizes[axis] + 1}) - now
      for axis in axes
  }
