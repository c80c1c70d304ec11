"""Turns chosen splits and prunes into one `growth.Growth`.

A split is an index map (each child copies its parent), the halving of all
readers of the axis, and a patch that adds the learned u and e, with a plus for
the child in the parent's place and a minus for the new one. Nothing reads the
new unit of a one-sided split. A prune leaves a unit out, and a patch adds its
compensation. Axes that change together need no order: every delta is gathered
along all axes of its kernel. `norms` takes care of shifted statistics.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import growth
from autogrow_jax.methods.gauss_newton import removals as removals_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import base
from autogrow_jax import state as state_lib

Architecture = architecture_lib.Architecture
TrainState = state_lib.TrainState
Splits = splits_lib.Splits

@dataclasses.dataclass(frozen=True)
class Absorbed:
  """Changes of an axis's readers that compensate its pruned units.

  Attributes:
    units: pruned units.
    deltas: per reader, change of its kernel before the step.
    constants: per reader, (out,) change of its output at every position.
  """

  units: tuple[int, ...]
  deltas: tuple[np.ndarray, ...]
  constants: tuple[np.ndarray, ...]


def absorbed(
    model: signals_lib.Model,
    trees: signals_lib.Trees,
    removals: Sequence[removals_lib.Removal],
) -> dict[str, Absorbed]:
  """Computes the changes of readers that compensate removals, by axis.

  Args:
    model: the network.
    trees: arrays of the network.
    removals: removals, those of an axis in their order.

  Returns:
    The argument `removed` of `morph`.
  """
  sites = {site.axis: site for site in model.sites}
  by_axis: dict[str, list[removals_lib.Removal]] = {}
  for removal in removals:
    by_axis.setdefault(removal.axis, []).append(removal)
  result = {}
  for axis, own in by_axis.items():
    weights = np.stack([removal.weights for removal in own])
    mixtures = np.stack([removal.mixture for removal in own])
    deltas, constants = [], []
    for number, reader in enumerate(sites[axis].readers):
      kernel = np.asarray(trees.kernel(reader.layer))
      # The outgoing weights that each removal takes away, (..., removals, out).
      slices = mixtures[:, number] @ kernel
      w = weights[:, number]
      deltas.append(w[:, :-1].T @ slices)
      sums = slices.reshape(-1, *slices.shape[-2:]).sum(0)
      constants.append(w[:, -1] @ sums)
    result[axis] = Absorbed(
        tuple(removal.unit for removal in own), tuple(deltas), tuple(constants)
    )
  return result


def morph(
    architecture: Architecture,
    splits: Splits,
    units: Mapping[str, np.ndarray],
    *,
    removed: Mapping[str, Absorbed] | None = None,
    one_sided: bool = False,
) -> growth.Growth:
  """Splits units of some sites in the learned way, and prunes others.

  Children copy the norms of their parent, which is exact in evaluation mode
  only; see `norms.settled`. All moments of the optimizer become zero.

  Args:
    architecture: architecture of the network.
    splits: splits of all units of these sites.
    units: per axis, units to split.
    removed: per axis, units to prune.
    one_sided: true to leave parents as they are, and to give each new unit
      w - u, which nothing reads yet; e is ignored.

  Returns:
    The growth.
  """
  removed = removed or {}
  sites = {site.axis: site for site in sites_lib.survey(architecture).sites}
  if unknown := sorted((units.keys() | removed.keys()) - sites.keys()):
    raise ValueError(
        f'Axes {unknown} of {architecture} cannot be split or pruned.'
    )
  sources, signs, notes = {}, {}, []
  for axis, site in sites.items():
    chosen = np.asarray(units.get(axis, ()), int)
    pruned = np.asarray(removed[axis].units if axis in removed else (), int)
    if chosen.size or pruned.size:
      sources[axis] = _sources(axis, site.units, chosen, pruned)
      signs[axis] = _signs(sources[axis], chosen)
      notes.append(_note(axis, site.units, chosen, pruned))
  moved = signs
  kept = {axis: np.where(sign, 0.5, 1) for axis, sign in signs.items()}
  if one_sided:
    moved = {axis: np.minimum(sign, 0) for axis, sign in signs.items()}
    kept = {axis: np.where(sign < 0, 0, 1) for axis, sign in signs.items()}
  wider = architecture.resized({a: len(s) for a, s in sources.items()})
  changed = {axis: sites[axis] for axis in sources}

  def patch(state: TrainState, key: jax.Array) -> tuple[TrainState, Any]:
    del key
    table = state_lib.axis_table(wider)
    weights, network = state.params['weights'], state.stats['network']
    deltas = _Deltas(table, sources)
    for axis, site in changed.items():
      if axis in units:
        weights = deltas.add(
            weights, site.writers, splits[axis].u, along=(axis, moved[axis])
        )
    for axis, taken in removed.items():
      weights = deltas.add(weights, sites[axis].readers, taken.deltas)
    weights = growth.scale_readers({'weights': weights}, table, kept)
    weights = weights['weights']
    for axis, site in changed.items():
      if axis in units and not one_sided:
        weights = deltas.add(
            weights, site.readers, splits[axis].e, along=(axis, signs[axis])
        )
    for axis, taken in removed.items():
      weights, network = _with_constants(
          weights, network, sites[axis], taken, deltas
      )
    return state.replace(
        params={**state.params, 'weights': weights},
        stats={**state.stats, 'network': network},
        opt_state=_reset(state.opt_state, table),
    ), {}

  return growth.Growth(wider, sources, patch, '; '.join(notes))


@dataclasses.dataclass(frozen=True)
class _Deltas:
  """Adds learned deltas to kernels of the grown network."""

  table: state_lib.AxisTable
  sources: Mapping[str, np.ndarray]

  def add(
      self,
      weights: base.Tree,
      ends: Sequence[sites_lib.End],
      deltas: Sequence[Any],
      *,
      along: tuple[str, np.ndarray] | None = None,
  ) -> base.Tree:
    """Adds deltas to the kernels of some layers.

    Args:
      weights: weights of the grown network.
      ends: layers to change.
      deltas: arrays in the shapes of the kernels before the growth.
      along: an axis, and the factor of the deltas for each of its units after
        the growth; None for no factors.

    Returns:
      The weights.
    """
    for end, delta in zip(ends, deltas, strict=True):
      delta = np.asarray(delta)
      axes = self.table['weights', *end.layer.path, 'kernel']
      for dim, named in enumerate(axes):
        if named is None or named.name not in self.sources:
          continue
        delta = np.take(delta, self.sources[named.name], axis=dim)
        if along is not None and named.name == along[0]:
          delta = delta * _along(along[1], dim, delta)
      weights = _with_leaves(
          weights, end.layer.path, kernel=lambda old, by=delta: old + by
      )
    return weights

  def of_outputs(self, layer: taps.Layer, vector: np.ndarray) -> np.ndarray:
    """Gathers a vector over a layer's outputs for the units after growth."""
    name = self.table['weights', *layer.path, 'kernel'][-1].name
    return vector[self.sources[name]] if name in self.sources else vector


def _sources(
    axis: str, size: int, chosen: np.ndarray, gone: np.ndarray
) -> np.ndarray:
  """Returns the kept units, then the parent of each new one."""
  named = [*chosen.tolist(), *gone.tolist()]
  if len(set(named) & set(range(size))) != len(named):
    raise ValueError(
        f'Units of axis {axis!r} to split or prune are distinct numbers from 0 '
        f'to {size - 1}, got {named}.'
    )
  if size == len(gone):
    raise ValueError(
        f'At least one unit of axis {axis!r} stays, but all {size} are to be '
        'pruned.'
    )
  return np.concatenate([np.setdiff1d(np.arange(size), gone), chosen])


def _note(axis: str, size: int, chosen: np.ndarray, gone: np.ndarray) -> str:
  """Describes the change of an axis."""
  done = [
      f'{verb} {len(units)}'
      for verb, units in (('split', chosen), ('prune', gone))
      if units.size
  ]
  return f'{axis}: {" and ".join(done)} of {size} units'


def _signs(sources: np.ndarray, units: np.ndarray) -> np.ndarray:
  """Returns +1 for children in their parent's place, -1 for new ones, else 0.
  """
  signs = np.where(np.isin(sources, units), 1, 0)
  signs[len(sources) - len(units) :] = -1
  return signs


def _with_constants(weights, network, site, taken, deltas):
  """Adds the constants of a compensation to the readers' outputs."""
  for reader, out in zip(site.readers, taken.constants, strict=True):
    if not out.any():
      continue
    shift = deltas.of_outputs(reader.layer, out)
    if reader.norm is not None:
      network = _with_leaves(
          network, reader.norm.path, mean=lambda mean, by=shift: mean - by
      )
    else:
      weights = _with_leaves(
          weights, reader.layer.path, bias=lambda bias, by=shift: bias + by
      )
  return weights, network


def _with_leaves(tree: base.Tree, path: taps.Path, **changes: Any) -> base.Tree:
  """Changes leaves of one layer, each keeping its type."""
  if path:
    inner = _with_leaves(tree[path[0]], path[1:], **changes)
    return {**tree, path[0]: inner}
  changed = {
      name: np.asarray(change(tree[name]), tree[name].dtype)
      for name, change in changes.items()
  }
  return {**tree, **changed}


def _reset(opt_state: Any, table: state_lib.AxisTable) -> Any:
  """Zeroes all moments and step counts; learning rates stay."""

  def zero(path, leaf):
    path = state_lib.names(path)
    is_moment = state_lib.find_axes(path, table) is not None
    return np.zeros_like(leaf) if is_moment or path[-1] == 'count' else leaf

  return jax.tree_util.tree_map_with_path(zero, opt_state)


def _along(vector: np.ndarray, dim: int, like: np.ndarray) -> np.ndarray:
  """Reshapes a vector to be multiplied along one dimension."""
  shape = [1] * like.ndim
  shape[dim] = -1
  return vector.reshape(shape)
