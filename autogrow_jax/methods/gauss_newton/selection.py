"""Which morphisms to apply together.

Splits are picked one by one, each time the one whose addition lowers the
optimal value of the joint model most per unit of resource; then the scales of
all are optimised together. Prunes come after them: one is worth it if it costs
less loss per resource than the last split gained, and `confirm` asks again how
much that is beside everything else.
"""

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
    prunes: indices into the candidates for pruning, at most one of an axis;
      those that cost least come first.
    price: nats per unit of resource that a prune may cost.
  """

  splits: tuple[int, ...]
  scales: np.ndarray
  change: float
  prunes: tuple[int, ...]
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
  best = estimates.best_scales(limits.largest_divergence)
  scales = joint_scales(estimates, picked, limits)
  kept = [i for i, scale in enumerate(scales) if scale >= SMALLEST_SCALE]
  picked = [picked[i] for i in kept]
  # Those left out leave room for the others.
  scales = joint_scales(estimates, picked, limits)
  every = np.zeros(len(best))
  every[picked] = scales
  price = max(limits.price, ratio)
  removed = _pick_prunes(
      architecture, estimates, picked, prunes, limits, price
  )
  return Selection(
      tuple(picked),
      scales,
      estimates.joint_change(every) if picked else 0.0,
      removed,
      price,
  )


def confirm(
    architecture: Architecture,
    selected: Selection,
    prunes: prunes_lib.Prunes,
    joint: prunes_lib.Joint,
    limits: Limits,
) -> Selection:
  """Keeps the prunes that are worth it beside the splits and each other.

  Args:
    architecture: the network's.
    selected: splits and prunes.
    prunes: of all units.
    joint: of this selection.
    limits: of the step.

  Returns:
    The selection, with the change of the loss by all of it together.
  """
  kept: list[int] = []
  for number, index in enumerate(selected.prunes):
    cost = joint.change([*kept, number]) - joint.change(kept)
    axis, _ = prunes.candidates[index]
    if cost / freed(architecture, axis, limits.resource) < selected.price:
      kept.append(number)
  return dataclasses.replace(
      selected,
      prunes=tuple(selected.prunes[number] for number in kept),
      change=joint.change(kept),
  )


def freed(architecture: Architecture, axis: str, resource: str) -> int:
  """By how much the resource falls with one unit of an axis less."""
  measure, sizes = getattr(costs, resource), dict(architecture.sizes)
  smaller = {**sizes, axis: sizes[axis] - 1}
  return measure(architecture, sizes) - measure(architecture, smaller)


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
  allowance = limits.allowance(architecture)
  axes = [axis for axis, _ in estimates.candidates]
  sizes = dict(architecture.sizes)
  slopes = np.where(estimates.usable, estimates.slopes, 0)
  usable = estimates.usable
  gram = np.where(usable[:, None] & usable[None], estimates.gram, 0)
  rho, chi = slopes.copy(), np.diag(gram) * (1 + RELATIVE_RIDGE)
  chi = np.where(usable, chi + linalg.JITTER, 1)
  factor: list[np.ndarray] = []  # Rows of L^-1 G_M: one per pick.
  available = usable & (estimates.slopes < 0)
  picked, spent, last = [], 0, 0.0
  while available.any():
    increments = _increments(architecture, sizes, set(axes), limits.resource)
    resource = np.array([increments[axis] for axis in axes])
    # A slope that the picks have turned around has nothing to add.
    gains = np.where(available & (rho < 0), rho**2 / (2 * chi), 0) / resource
    gains[resource > allowance - spent] = 0
    best = int(np.argmax(gains))
    if gains[best] <= limits.price:
      break
    last = float(gains[best])
    picked.append(best)
    available[best] = False
    spent += resource[best]
    sizes[axes[best]] += 1
    row = gram[best] - sum((f[best] * f for f in factor), np.zeros(len(axes)))
    row[best] = chi[best]
    row = row / np.sqrt(chi[best])
    rho = rho - row * rho[best] / np.sqrt(chi[best])
    chi = np.maximum(chi - row**2, RELATIVE_RIDGE * np.diag(gram) + 1e-300)
    factor.append(row)
  return picked, last


def _increments(architecture, sizes, axes, resource):
  """By how much the resource grows with one more unit of each axis."""
  measure = getattr(costs, resource)
  now = measure(architecture, sizes)
  return {
      axis: measure(architecture, {**sizes, axis: sizes[axis] + 1}) - now
      for axis in axes
  }


def _pick_prunes(architecture, estimates, picked, prunes, limits, price):
  """The cheapest prune of each axis, if it costs less than the price.

  Two prunes of an axis would each count on the other, and no unit is split and
  pruned in the same step.
  """
  split = {estimates.candidates[index] for index in picked}
  best: dict[str, tuple[float, int]] = {}
  for index, (axis, unit) in enumerate(prunes.candidates):
    if not prunes.usable[index] or (axis, unit) in split:
      continue
    ratio = prunes.changes[index] / freed(architecture, axis, limits.resource)
    if ratio < price and (axis not in best or ratio < best[axis][0]):
      best[axis] = ratio, index
  return tuple(index for _, index in sorted(best.values()))
