"""Selects the morphisms to apply together.

Splits are picked one by one, each time the one whose addition lowers the
optimal value of the joint model most per unit of resource; then the scales of
all are optimised together. Prunes follow, again one by one, each time the one
that costs least loss per unit of resource, as long as that is less than the
gain of the last split. `confirm` repeats the test beside everything else.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import prunes as prunes_lib
from autogrow_jax.methods.gauss_newton import removals
from autogrow_jax.methods.gauss_newton import together
from autogrow_jax.networks import common

Architecture = architecture_lib.Architecture

RESOURCES = ('params', 'macs')
# Smallest scale that is worth a channel.
SMALLEST_SCALE = 0.05
# Relative ridge on the diagonal of the Gram matrix of the picks.
RELATIVE_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of one growth step.

  Attributes:
    resource: 'params' or 'macs', parameters or multiply-adds per image.
    growth_cap: largest relative increase of the resource in a step.
    price: smallest gain of a split, nats per unit of resource.
    budget: largest resource of the network, None for no limit.
  """

  resource: str = dataclasses.field(
      default='params',
      metadata={'help': 'What growth pays with: params, or macs (per image).'},
  )
  growth_cap: float = dataclasses.field(
      default=0.35,
      metadata={'help': 'Largest growth in a step, as a part of the resource.'},
  )
  price: float = dataclasses.field(
      default=0.0,
      metadata={'help': 'Smallest gain of a split, nats per unit of it.'},
  )
  budget: int | None = dataclasses.field(
      default=None,
      metadata={'help': 'Largest resource of all; by default no limit.'},
  )

  def __post_init__(self):
    common.check_choice('resource', self.resource, RESOURCES)
    if not self.growth_cap > 0:
      raise ValueError(f'growth_cap is positive, got {self.growth_cap}.')
    if not self.price >= 0:
      raise ValueError(f'price is at least 0, got {self.price}.')

  def allowance(self, architecture: Architecture) -> int:
    """Returns the largest increase of the resource in one step.

    Raises:
      ValueError: if the network is beyond the budget already.
    """
    used = getattr(costs, self.resource)(architecture)
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
  """Selected splits and prunes.

  Attributes:
    splits: indices into the candidates, in the order of picking.
    scales: scale of each split, at least `SMALLEST_SCALE`.
    change: estimated change of the loss by all together, nats; before `confirm`
      by the splits alone.
    prunes: removals in the order of picking; each depends on the earlier ones
      of its axis.
    price: largest cost of a prune, nats per unit of resource.
  """

  splits: tuple[int, ...]
  scales: np.ndarray
  change: float
  prunes: tuple[removals.Removal, ...]
  price: float


def select(
    architecture: Architecture,
    estimates: estimates_lib.Estimates,
    limits: Limits,
    prunes: prunes_lib.Prunes = prunes_lib.NONE,
) -> Selection:
  """Selects splits and prunes.

  Args:
    estimates: estimates of all splits.
    prunes: estimates of all prunes.

  Returns:
    The selection; it may be empty.
  """
  picked, ratio = pick(architecture, estimates, limits)
  scales = joint_scales(estimates, picked)
  kept = [i for i, scale in enumerate(scales) if scale >= SMALLEST_SCALE]
  picked = [picked[i] for i in kept]
  # The others may gain more without those left out.
  scales = joint_scales(estimates, picked)
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
    joint: together.Joint,
    limits: Limits,
) -> Selection:
  """Keeps the prunes that are worth it beside the splits and each other.

  After a refused prune, the later ones of its axis are refused too, since they
  depend on it.

  Args:
    candidates: (axis, unit) pairs that splits were selected from.
    selected: splits and prunes.
    joint: joint model of this selection.

  Returns:
    The selection, with the change of the loss by all of it together.
  """
  sizes = _sizes_with(architecture, [candidates[i] for i in selected.splits])
  kept: list[int] = []
  refused: set[str] = set()
  for number, removal in enumerate(selected.prunes):
    axis = removal.axis
    cost = joint.change([*kept, number]) - joint.change(kept)
    freed = _resources(architecture, sizes, [axis], limits.resource, -1)[axis]
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
    estimates: estimates_lib.Estimates, picked: list[int]
) -> np.ndarray:
  """Returns the best scales of some candidates together, within trust."""
  chosen = np.array(picked, int)
  return linalg.minimize_in_box(
      estimates.slopes[chosen],
      estimates.gram[np.ix_(chosen, chosen)],
      estimates_lib.largest_scales(estimates.curvatures[chosen]),
  )


def pick(
    architecture: Architecture,
    estimates: estimates_lib.Estimates,
    limits: Limits,
) -> tuple[list[int], float]:
  """Picks splits greedily by gain per resource.

  With M the picks so far, adding m lowers the optimal value by rho^2 / (2 chi),
  rho = s_m - G_mM G_MM^-1 s_M and chi = G_mm - G_mM G_MM^-1 G_Mm. One step of a
  Cholesky factorisation per pick updates both.

  Args:
    estimates: estimates of all splits.

  Returns:
    The picks, and the ratio of the last one, nats per unit of resource.
  """
  slopes = np.where(estimates.usable, estimates.slopes, 0)
  usable = estimates.usable
  gram = np.where(usable[:, None] & usable[None], estimates.gram, 0)
  rho, chi = slopes.copy(), np.diag(gram) * (1 + RELATIVE_RIDGE)
  chi = np.where(usable, chi + linalg.JITTER, 1)
  factor: list[np.ndarray] = []  # Rows of L^-1 G_M: one per pick.

  def gains():
    # A slope whose sign the picks have turned has nothing to add.
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
) -> tuple[removals.Removal, ...]:
  """Picks prunes greedily by cost per resource, while it is below a price.

  At most half of the units of an axis are pruned, and none that is split. Each
  pick changes the costs of the rest of its axis. They hardly ever fall, since
  fewer units can take over, so a cost is estimated again only once its last
  estimate is the lowest of all.

  Args:
    split: (axis, unit) pairs that are split in the same step.
    prunes: estimates of all units.
    price: largest cost, nats per unit of resource.
  """
  sizes = _sizes_with(architecture, split)
  axes = np.array([axis for axis, _ in prunes.candidates])
  stays = np.array([c not in split for c in prunes.candidates], bool)
  available = prunes.usable & stays
  changes, left = prunes.changes.copy(), dict(prunes.remaining)
  found = {index: prunes.alone(index) for index in np.flatnonzero(available)}
  picked: list[removals.Removal] = []
  while available.any():
    freed = _resources(architecture, sizes, set(axes), limits.resource, -1)
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
    if len(left[axis].removed) == left[axis].most:
      available[same] = False
  return tuple(picked)


def by_gain(
    architecture: Architecture,
    candidates: Sequence[tuple[str, int]],
    gains: np.ndarray,
    usable: np.ndarray,
    limits: Limits,
) -> Selection:
  """Selects splits by gains that are taken to add up.

  There is no joint model: splits are applied without scaling.

  Args:
    candidates: (axis, unit) pairs.
    gains: (candidates,) score that is larger for better splits; in nats if
      `limits.price` is to mean anything.
    usable: (candidates,) true for candidates that may be selected.

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
    candidates: (axis, unit) pairs.
    available: (candidates,) true for candidates that may be picked.
    gains: function that returns the current gains, (candidates,).
    update: callback after each pick.

  Returns:
    The picks, and the ratio of the last one.
  """
  allowance = limits.allowance(architecture)
  axes = [axis for axis, _ in candidates]
  sizes = dict(architecture.sizes)
  available = np.array(available)
  picked, spent, last = [], 0, 0.0
  while available.any():
    increments = _resources(
        architecture, sizes, set(axes), limits.resource, 1
    )
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
  """Returns the sizes of all axes after some splits."""
  sizes = dict(architecture.sizes)
  for axis, _ in split:
    sizes[axis] += 1
  return sizes


def _resources(architecture, sizes, axes, resource, more):
  """Returns the resource taken or freed by 1 or -1 unit more, per axis."""
  measure = getattr(costs, resource)
  now = measure(architecture, sizes)
  return {
      axis: more
      * (measure(architecture, {**sizes, axis: sizes[axis] + more}) - now)
      for axis in axes
  }
