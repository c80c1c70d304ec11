"""Turns chosen splits and prunes into one growth.

A split is an index map (each child copies its parent), the halving of all
readers of the axis, and the addition of the learned u and e, with a plus for
the child in the parent's place and a minus for the new one. Nothing reads the
new unit of a one-sided split. A prune leaves a unit out, and adds its
compensation. Axes that change together need no order: every delta is gathered
along all axes of its kernel. `norms` takes care of shifted statistics.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import state as state_lib
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods.gauss_newton import removals as removals_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import base

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
) -> 'Morph':
  """Splits units of some sites in the learned way, and prunes others.

  Children copy the norms of their parent, which is exact in evaluation mode
  only; see `norms.settled`. All moments of the optimizer become zero.

  Args:
    units: per axis, units to split.
    removed: per axis, units to prune.
    one_sided: true to leave parents as they are, and to give each new unit
      w - u, which nothing reads yet; e is ignored.
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
  wider = architecture.resized({a: len(s) for a, s in sources.items()})
  return Morph(
      change=growth_lib.Growth(
          sources, moments='reset', target=wider, note='; '.join(notes)
      ),
      table=state_lib.axis_table(wider),
      signs=signs,
      # In forward order.
      split={sites[a]: splits[a] for a in sources if a in units},
      removed={sites[axis]: taken for axis, taken in removed.items()},
      one_sided=one_sided,
  )


@dataclasses.dataclass(frozen=True)
class Morph:
  """A growth, and the change of the leaves that it carries.

  Attributes:
    change: index maps alone.
    table: named axes of the grown network.
    signs: per changed axis, the sign of each unit, see `_signs`.
    split: splits of the sites with split units.
    removed: compensation of the sites with pruned units.
    one_sided: see `morph`.
  """

  change: growth_lib.Growth
  table: state_lib.AxisTable
  signs: Mapping[str, np.ndarray]
  split: Mapping[sites_lib.Site, splits_lib.Split]
  removed: Mapping[sites_lib.Site, Absorbed]
  one_sided: bool

  @property
  def architecture(self) -> Architecture:
    """Architecture of the grown network."""
    return self.change.target

  def grown(self, state: TrainState, key: jax.Array) -> TrainState:
    """The arrays of a state after the growth, without an optimizer.

    Args:
      state: canonical state, without leaves of a method.
      key: key of the growth, from which nothing is drawn.
    """
    return self.changed(state_lib.grown_arrays(state, self.change, key=key))

  def changed(self, state: TrainState) -> TrainState:
    """Adds splits and compensations to a state with the grown shapes."""
    weights, network = state.params['weights'], state.stats['network']
    moved = self.signs
    kept = {a: np.where(sign, 0.5, 1) for a, sign in self.signs.items()}
    if self.one_sided:
      moved = {a: np.minimum(sign, 0) for a, sign in self.signs.items()}
      kept = {a: np.where(sign < 0, 0, 1) for a, sign in self.signs.items()}
    for site, split in self.split.items():
      along = site.axis, moved[site.axis]
      weights = self._add(weights, site.writers, split.u, along)
    for site, taken in self.removed.items():
      weights = self._add(weights, site.readers, taken.deltas)
    weights = axes_lib.scale_readers({'weights': weights}, self.table, kept)
    weights = weights['weights']
    if not self.one_sided:
      for site, split in self.split.items():
        along = site.axis, self.signs[site.axis]
        weights = self._add(weights, site.readers, split.e, along)
    for site, taken in self.removed.items():
      weights, network = self._with_constants(weights, network, site, taken)
    return state.replace(
        params={**state.params, 'weights': weights},
        stats={**state.stats, 'network': network},
    )

  def _add(
      self,
      weights: base.Tree,
      ends: Sequence[sites_lib.End],
      deltas: Sequence[Any],
      along: tuple[str, np.ndarray] | None = None,
  ) -> base.Tree:
    """Adds deltas, in the shapes before the growth, to some layers' kernels.

    Args:
      weights: weights of the grown network.
      ends: layers to change.
      deltas: change of each kernel.
      along: an axis, and the factor of the deltas for each of its units after
        the growth; None for no factors.
    """
    for end, delta in zip(ends, deltas, strict=True):
      delta = np.asarray(delta)
      axes = self.table.axes['weights', *end.layer.path, 'kernel']
      sources, sizes = self.change.sources, self.table.sizes
      delta, _ = axes_lib.gather(delta, axes, sources, sizes)
      for dim, named in enumerate(axes):
        if named is not None and along is not None and named.name == along[0]:
          delta = delta * axes_lib.along(along[1], dim, delta.ndim)
      weights = _plus(weights, end.layer.path, 'kernel', delta)
    return weights

  def _with_constants(
      self,
      weights: base.Tree,
      network: base.Tree,
      site: sites_lib.Site,
      taken: Absorbed,
  ) -> tuple[base.Tree, base.Tree]:
    """Adds the constants of a compensation to the readers' outputs."""
    for reader, shift in zip(site.readers, taken.constants, strict=True):
      if not shift.any():
        continue
      axes = self.table.axes['weights', *reader.layer.path, 'kernel']
      if (written := axes[-1].name) in self.change.sources:
        shift = shift[self.change.sources[written]]
      if reader.norm is not None:
        network = _plus(network, reader.norm.path, 'mean', -shift)
      else:
        weights = _plus(weights, reader.layer.path, 'bias', shift)
    return weights, network


def _sources(
    axis: str, size: int, chosen: np.ndarray, pruned: np.ndarray
) -> np.ndarray:
  """Returns the kept units, then the parent of each new one."""
  named = [*chosen.tolist(), *pruned.tolist()]
  if len(set(named) & set(range(size))) != len(named):
    raise ValueError(
        f'Units of axis {axis!r} to split or prune are distinct numbers from 0 '
        f'to {size - 1}, got {named}.'
    )
  if size == len(pruned):
    raise ValueError(
        f'At least one unit of axis {axis!r} stays, but all {size} are to be '
        'pruned.'
    )
  return np.concatenate([np.setdiff1d(np.arange(size), pruned), chosen])


def _note(axis: str, size: int, chosen: np.ndarray, pruned: np.ndarray) -> str:
  """Describes the change of an axis."""
  done = [
      f'{verb} {len(units)}'
      for verb, units in (('split', chosen), ('prune', pruned))
      if units.size
  ]
  return f'{axis}: {" and ".join(done)} of {size} units'


def _signs(sources: np.ndarray, units: np.ndarray) -> np.ndarray:
  """Returns +1 for children in their parent's place, -1 for new ones, else 0.
  """
  signs = np.where(np.isin(sources, units), 1, 0)
  signs[len(sources) - len(units) :] = -1
  return signs


def _plus(tree: base.Tree, path: taps.Path, name: str, change: np.ndarray):
  """Adds a change to one leaf of a layer."""
  leaf = signals_lib.at(tree, path)[name]
  return signals_lib.with_leaves(tree, path, **{name: leaf + change})
