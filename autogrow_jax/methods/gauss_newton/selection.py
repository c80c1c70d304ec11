"""Selects the morphisms to apply together.

Splits are picked one by one, each time the one whose addition lowers the
optimal value of the joint model most per unit of resource; then the scales of
all are optimised together. Prunes follow, at most one of each axis, each time
the one that costs least loss per unit of resource beside everything else, as
long as that is less than the gain of the last split.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np
from scipy import optimize

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.networks import common

Architecture = architecture_lib.Architecture
Candidates = Sequence[tuple[str, int]]

RESOURCES = ('params', 'macs')
# Smallest scale that is worth a channel.
SMALLEST_SCALE = 0.05
# Relative ridge on the diagonal of the Gram matrix of the picks.
RELATIVE_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of one growth step."""

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
      metadata={'help': 'Smallest gain of a split, nats per unit of resource.'},
  )
  budget: int | None = dataclasses.field(
      default=None,
      metadata={
          'help': 'Largest number of parameters, or of multiply-adds with '
                  '--method.limits.resource=macs, that the network may grow '
                  'to; by default no limit.'
      },
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
    splits: numbers of candidates, in the order of picking.
    scales: (candidates,) scale of each split, 0 for all others.
    prunes: numbers of candidates, in the order of picking.
    price: largest cost of a prune, nats per unit of resource.
  """

  splits: tuple[int, ...]
  scales: np.ndarray
  prunes: tuple[int, ...]
  price: float


def select(
    architecture: Architecture,
    joint: estimates_lib.Joint,
    limits: Limits,
) -> Selection:
  """Selects splits and prunes; perhaps nothing."""
  picked, ratio = pick(architecture, joint, limits)
  scales = joint_scales(joint, picked)
  picked = [i for i, t in zip(picked, scales) if t >= SMALLEST_SCALE]
  # The others may gain more without those left out.
  every = np.zeros(len(joint.candidates))
  every[picked] = joint_scales(joint, picked)
  price = max(limits.price, ratio)
  selected = Selection(tuple(picked), every, (), price)
  prunes = pick_prunes(
      architecture, joint, selected, limits, range(len(joint.candidates))
  )
  return dataclasses.replace(selected, prunes=prunes)


def joint_scales(
    joint: estimates_lib.Joint, picked: Sequence[int]
) -> np.ndarray:
  """Returns the best scales of some splits together, within trust."""
  if not picked:
    return np.zeros(0)
  chosen = np.array(picked, int)
  gram = joint.gram[np.ix_(chosen, chosen)]
  largest = estimates_lib.largest_scales(np.diag(gram))
  # With G = LL', it is the least squares of L't + L^-1 s in a box.
  factor = np.linalg.cholesky(gram + 1e-9 * np.diag(np.diag(gram)))
  target = np.linalg.solve(factor, -joint.slopes[chosen])
  return optimize.lsq_linear(
      factor.T, target, (0, largest), method='bvls', tol=1e-12
  ).x


def pick(
    architecture: Architecture,
    joint: estimates_lib.Joint,
    limits: Limits,
) -> tuple[list[int], float]:
  """Picks splits greedily by gain per resource.

  With M the picks so far, adding m lowers the optimal value by rho^2 / (2 chi),
  rho = s_m - G_mM G_MM^-1 s_M and chi = G_mm - G_mM G_MM^-1 G_Mm. One step of a
  Cholesky factorisation per pick updates both.

  Args:
    architecture: architecture of the network.
    joint: the joint model.
    limits: limits of the step.

  Returns:
    The picks, and the ratio of the last one, nats per unit of resource.
  """
  count = len(joint.candidates)
  usable = joint.usable[:count]
  slopes = np.where(usable, joint.slopes[:count], 0)
  gram = joint.gram[:count, :count]
  gram = np.where(usable[:, None] & usable[None], gram, 0)
  rho, chi = slopes.copy(), np.diag(gram) * (1 + RELATIVE_RIDGE)
  chi = np.where(usable, chi + 1e-12, 1)
  factor: list[np.ndarray] = []  # Rows of L^-1 G_M: one per pick.

  def gains():
    # A slope whose sign the picks have turned has nothing to add.
    return np.where(rho < 0, rho**2 / (2 * chi), 0)

  def update(best):
    nonlocal rho, chi
    row = gram[best] - sum((f[best] * f for f in factor), np.zeros(count))
    row[best] = chi[best]
    row = row / np.sqrt(chi[best])
    rho = rho - row * rho[best] / np.sqrt(chi[best])
    chi = np.maximum(chi - row**2, RELATIVE_RIDGE * np.diag(gram) + 1e-300)
    factor.append(row)

  available = usable & (slopes < 0)
  return greedy(
      architecture, joint.candidates, available, limits, gains, update
  )


def pick_prunes(
    architecture: Architecture,
    joint: estimates_lib.Joint,
    selected: Selection,
    limits: Limits,
    numbers: Sequence[int],
) -> tuple[int, ...]:
  """Picks prunes greedily by cost per resource, while it is below a price.

  At most one unit of an axis is pruned, none that is split, and not the only
  one.

  Args:
    architecture: architecture of the network.
    joint: the joint model.
    selected: selected splits with their scales, and the price.
    limits: limits of the step.
    numbers: candidates to pick from.

  Returns:
    The picks.
  """
  count, picked = len(joint.candidates), []
  sizes = dict(architecture.sizes)
  for number in selected.splits:
    sizes[joint.candidates[number][0]] += 1
  scales = np.zeros(2 * count)
  scales[:count] = selected.scales
  axes = [axis for axis, _ in joint.candidates]
  single = {axis for axis in axes if architecture.size(axis) == 1}
  closed = {axis: axis in single for axis in axes}
  within = set(numbers) - set(selected.splits)
  while True:
    freed = resources(architecture, sizes, set(axes), limits.resource, -1)
    chosen = np.flatnonzero(scales)
    ratios = np.array([
        (
            joint.slopes[count + i]
            + joint.gram[count + i, count + i] / 2
            + joint.gram[count + i, chosen] @ scales[chosen]
        ) / freed[axis]
        if i in within and joint.usable[count + i] and not closed[axis]
        else np.inf
        for i, axis in enumerate(axes)
    ])
    best = int(np.argmin(ratios))
    if not ratios[best] < selected.price:
      return tuple(picked)
    picked.append(best)
    scales[count + best] = 1
    sizes[axes[best]] -= 1
    closed[axes[best]] = True


def greedy(
    architecture: Architecture,
    candidates: Candidates,
    available: np.ndarray,
    limits: Limits,
    gains: Callable[[], np.ndarray],
    update: Callable[[int], None] = lambda best: None,
) -> tuple[list[int], float]:
  """Picks splits by gain per resource, one by one, within limits.

  Args:
    architecture: architecture of the network.
    candidates: (axis, unit) pairs.
    available: (candidates,) true for candidates that may be picked.
    limits: limits of the step.
    gains: function that returns the current gains, (candidates,).
    update: callback after each pick.

  Returns:
    The picks, and the ratio of the last one.
  """
  allowance = limits.allowance(architecture)
  axes = [axis for axis, _ in candidates]
  sizes, available = dict(architecture.sizes), np.array(available)
  picked, spent, last = [], 0, 0.0
  while available.any():
    added = resources(architecture, sizes, set(axes), limits.resource, 1)
    resource = np.array([added[axis] for axis in axes])
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


def resources(architecture, sizes, axes, resource, more):
  """Returns the resource taken or freed by 1 or -1 unit more, per axis."""
  measure = getattr(costs, resource)
  now = measure(architecture, sizes)
  return {
      axis: more
      * (measure(architecture, {**sizes, axis: sizes[axis] + more}) - now)
      for axis in axes
  }
