"""`Pruned`: train the full network, prune it once to a budget, train on.

Every strategy puts all channels of the network in an order. The first of them
stay, as many as come nearest to the budget, and at least one of every group.
Groups are those of `space`. A channel's norm is the norm of the weights that
write it, summed over its writers.

  uniform   by rank within the group over the group's size, so that all groups
            keep the same part; rank by the L1 norm of filters
  l1        by the L1 norm over the group's mean (Li et al. 2017); groups keep
            different parts
  soft      as uniform, but by the L2 norm; after every query but the last,
            filters that would go become zero and are trained on (He et al.
            2018)
  morphnet  while the network is dense, a penalty on the scales of its norms,
            in proportion to the channel's cost. Widths that are left above a
            threshold are multiplied by one factor, back to the budget (Gordon
            et al. 2018): by rank within the group over the width that is left.
            The sum of absolute scales ranks channels; filters rank those
            without norms, which are not penalised

Unlike the paper, l1 does not choose a part for every layer by its sensitivity:
one ranking of the whole network takes more where weights are more unequal.
Unlike the paper, morphnet takes a channel's cost in the full network and not in
the remaining one, adds up the scales of a channel of several norms, and has one
round, after which weights stay.
"""

import bisect
from collections.abc import Callable, Mapping
import dataclasses
import functools
import operator
from typing import Any

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.sparsify import space as space_lib
from autogrow_jax.networks import common

Architecture = architecture_lib.Architecture
Tree = base.Tree
Channels = dict[str, np.ndarray]  # By group.
Places = list[tuple[axes_lib.Path, int]]

STRATEGIES = ('l1', 'uniform', 'soft', 'morphnet')

_L1 = lambda leaf, axes: abs(leaf).sum(axes)
_L2 = lambda leaf, axes: (leaf * leaf).sum(axes) ** 0.5


@dataclasses.dataclass(frozen=True)
class Pruned(base.Method):
  """The full network, pruned when growing ends.

  Attributes:
    strategy: one of `STRATEGIES`.
    target_sparsity: u, the part of the full network's cost to do without.
    budget: cost that the budget counts, 'params' or 'macs'.
    penalty: for morphnet, nats; factor of the sum of all absolute scales, each
      times its channel's part of the cost of the whole network.
    threshold: for morphnet, sum of absolute scales below which a channel is
      gone.
  """

  strategy: str = 'l1'
  target_sparsity: float = 0.5
  budget: str = 'params'
  penalty: float = 1.0
  threshold: float = 0.05

  def __post_init__(self):
    common.check_choice('strategy', self.strategy, STRATEGIES)
    common.check_choice('budget', self.budget, space_lib.BUDGETS)
    space_lib.check_target(self.target_sparsity)
    for name in ('penalty', 'threshold'):
      if not 0 <= getattr(self, name) < np.inf:
        raise ValueError(
            f'{name} is a number of at least 0, got {getattr(self, name)}.'
        )

  def extra(self, architecture: Architecture) -> base.Extra:
    if self.strategy == 'morphnet' and not any(
        writers(architecture, 'scale').values()
    ):
      raise ValueError(
          f'{architecture} has no norms, whose scales morphnet needs; take '
          'another strategy.'
      )
    return base.Extra({}, {'open': np.float32(1)})

  def objective(
      self,
      network: base.Network,
      params: Tree,
      stats: Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
    """The penalty has a gradient but does not show in the loss."""
    loss, rest = super().objective(network, params, stats, labels, key)
    if self.strategy == 'morphnet':
      architecture = network.layout.architecture
      scales = norms(
          view.unpack(params['weights'], network.layout),
          writers(architecture, 'scale'),
          _L1,
      )
      costs = marginal_costs(architecture, self.budget)
      penalty = stats['method']['open'] * self.penalty * sum(
          costs[name] * scale.sum() for name, scale in scales.items()
      )
      loss = tasks.with_penalty(loss, penalty)
    return loss, rest

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth_lib.Growth | None:
    """Prunes at the end; zeroes filters until then if it is soft."""
    state = situation.state
    if not state.stats['method']['open']:
      return None
    if situation.is_last:
      return self.conclude(situation.architecture, state)
    if self.strategy == 'soft' and decision.action == 'grow':
      return self._soften(situation.architecture, state)
    return None

  def scores(self, architecture: Architecture, weights: Tree) -> Channels:
    """Computes the score of every channel, by group."""
    filters = writers(architecture, 'kernel')
    if self.strategy == 'morphnet':
      scales = norms(weights, writers(architecture, 'scale'), _L1)
      return norms(weights, filters, _L1) | scales
    return norms(weights, filters, _L2 if self.strategy == 'soft' else _L1)

  def left(self, architecture: Architecture, weights: Tree) -> dict[str, int]:
    """Returns the width of every group above morphnet's threshold, or all."""
    widths = {
        name: architecture.size(name) for name, _ in _space(architecture).groups
    }
    if self.strategy != 'morphnet':
      return widths
    scales = norms(weights, writers(architecture, 'scale'), _L1)
    return widths | {
        name: max(1, int(np.sum(scale >= self.threshold)))
        for name, scale in scales.items()
    }

  def kept(self, architecture: Architecture, weights: Tree) -> Channels:
    """Picks the channels that stay.

    Args:
      architecture: the full network.
      weights: weights of the network, on the host.

    Returns:
      Ascending indices by group; `axes_lib.NEW` beyond the group's width.
    """
    scores = self.scores(architecture, weights)
    if self.strategy == 'l1':
      places = {
          name: -score / (score.mean() or 1) for name, score in scores.items()
      }
    else:
      places = _in_proportion(scores, self.left(architecture, weights))
    return nearest(
        architecture, places, 1 - self.target_sparsity, self.budget
    )

  def conclude(
      self, architecture: Architecture, state: state_lib.TrainState
  ) -> growth_lib.Growth:
    """Proposes the pruned network."""
    weights = state.params['weights']
    space = _space(architecture)
    kept = self.kept(architecture, weights)
    sources = {
        axis: kept[name] for name, axes in space.groups for axis in axes
    }
    pruned = architecture.resized(
        {axis: len(units) for axis, units in sources.items()}
    )
    report = {'widths': {axis: pruned.size(axis) for axis in sorted(sources)}}
    if self.strategy == 'morphnet':
      report['left'] = self.left(architecture, weights)

    return growth_lib.Growth(
        sources,
        values={('method', 'open'): np.float32(0)},
        target=pruned,
        report=report,
        note=f'prune by {self.strategy}',
    )

  def least_density(self, architecture: Architecture) -> float:
    """Computes the density of one channel in every group."""
    counts = {name: np.ones(1) for name, _ in _space(architecture).groups}
    return _density(architecture, counts, self.budget)

  def _soften(
      self, architecture: Architecture, state: state_lib.TrainState
  ) -> growth_lib.Growth:
    """Proposes zeros for the filters that would go if this were the end."""
    kept = self.kept(architecture, state.params['weights'])
    stay = {}
    for name, axes in _space(architecture).groups:
      for axis in axes:
        stay[axis] = np.zeros(architecture.size(axis), np.float32)
        stay[axis][kept[name]] = 1

    table = state_lib.axis_table(architecture)
    zeroed = axes_lib.scale_filters(state.params, table, stay)
    return growth_lib.Growth(
        values=state_lib.values(weights=zeroed['weights']),
        target=architecture,
        report={
            'zeroed': {axis: int(np.sum(on == 0)) for axis, on in stay.items()}
        },
        note='zero the least filters',
    )


def writers(architecture: Architecture, leaf: str) -> dict[str, Places]:
  """Finds where leaves of a name write the channels of every group.

  Args:
    architecture: the network.
    leaf: 'kernel' or 'scale'.

  Returns:
    (path among the weights, dimension) pairs by group.
  """
  space = _space(architecture)
  groups = {axis: name for name, axes in space.groups for axis in axes}
  found = {name: [] for name, _ in space.groups}
  for path, axes in state_lib.axis_table(architecture).axes.items():
    for dim, axis in enumerate(axes):
      is_meant = path[-1] == leaf and axis is not None and axis.role == 'writes'
      if is_meant and axis.name in groups:
        found[groups[axis.name]].append((path[1:], dim))
  return found


def norms(
    weights: Tree, places: Mapping[str, Places], norm: Callable[..., Any]
) -> dict[str, Any]:
  """Computes the norm of every channel, by group that is written at all.

  Args:
    weights: {part: {layer: {leaf}}}; may be traced.
    places: places that `writers` found.
    norm: norm of a leaf over some dimensions.

  Returns:
    (channels,) sums over the writers.
  """
  def at(path, dim):
    leaf = functools.reduce(operator.getitem, path, weights)
    return norm(leaf, tuple(d for d in range(leaf.ndim) if d != dim))

  return {
      name: sum(at(*place) for place in group)
      for name, group in places.items()
      if group
  }


def nearest(
    architecture: Architecture,
    places: Channels,
    target: float,
    budget: str,
) -> Channels:
  """Picks the first channels of an order that come nearest to a budget.

  Args:
    architecture: the full network.
    places: places of a group's channels in the order of all, float (channels,);
      more than the group has are new ones.
    target: density to reach, the cost over that of the full network.
    budget: cost that the budget counts.

  Returns:
    Indices of channels by group, at least one of each.
  """
  groups = list(places)
  # The first of every group comes before all others.
  order = np.concatenate([
      np.where(np.arange(len(place)) == np.argmin(place), -np.inf, place)
      for place in places.values()
  ]).argsort(kind='stable')
  owners = np.repeat(np.arange(len(groups)), [len(p) for p in places.values()])
  units = np.concatenate([np.arange(len(p)) for p in places.values()])

  def first(number):
    chosen = order[:number]
    return {
        name: np.sort(units[chosen[owners[chosen] == index]])
        for index, name in enumerate(groups)
    }

  density = lambda number: _density(architecture, {
      name: np.ones(len(chosen)) for name, chosen in first(number).items()
  }, budget)
  numbers = range(len(groups), len(order) + 1)
  above = min(
      bisect.bisect_left(numbers, target, key=density), len(numbers) - 1
  )
  number = min(
      numbers[max(0, above - 1) : above + 1],
      key=lambda number: abs(density(number) - target),
  )
  return {
      name: np.where(chosen < architecture.size(name), chosen, axes_lib.NEW)
      for name, chosen in first(number).items()
  }


def marginal_costs(architecture: Architecture, budget: str) -> dict[str, float]:
  """Computes what one channel less saves by group, over the full cost."""
  full = {
      name: np.ones(architecture.size(name))
      for name, _ in _space(architecture).groups
  }
  return {
      name: 1 - _density(architecture, {**full, name: full[name][1:]}, budget)
      for name in full
  }


def _in_proportion(scores: Channels, widths: Mapping[str, int]) -> Channels:
  """Computes places by which all groups keep the same part of some widths.

  They go on beyond a group's own width, so far that with all places taken no
  group is narrower than its own.
  """
  most = max(len(score) / widths[name] for name, score in scores.items())
  places = {}
  for name, score in scores.items():
    ranks = np.argsort(np.argsort(-score, kind='stable'))
    more = np.arange(len(score), round(most * widths[name]))
    places[name] = (np.append(ranks, more) + 0.5) / widths[name]
  return places


def _space(architecture: Architecture) -> space_lib.Space:
  return space_lib.of(architecture, 'channels')


def _density(
    architecture: Architecture, channels: Channels, budget: str
) -> float:
  values = {'channels': channels, 'layers': {}}
  return space_lib.density(
      architecture, _space(architecture), values, budget
  )
