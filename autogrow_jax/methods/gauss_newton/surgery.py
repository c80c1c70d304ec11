"""Turns chosen splits and prunes into one growth.

A split is an index map (each child copies its parent), the halving of all
readers of the axis, and the addition of the learned u and e, with a plus for
the child in the parent's place and a minus for the new one. Nothing reads the
new unit of a one-sided split. A prune leaves a unit out, and adds its
compensation. Axes that change together need no order: every delta is gathered
along all axes of its kernel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import state as state_lib
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import taps

Architecture = architecture_lib.Architecture
Growth = growth_lib.Growth


def morph(
    architecture: Architecture,
    weights: Any,
    stats: Any,
    splits: splits_lib.Splits,
    chosen: Mapping[str, Sequence[int]],
    *,
    pruned: Mapping[str, int] | None = None,
    taken: Mapping[str, np.ndarray] | None = None,
    one_sided: bool = False,
) -> Growth:
  """Splits units of some sites in the learned way, and prunes others.

  Children copy the norms of their parent, which is exact in evaluation mode
  only. All moments of the optimizer become zero.

  Args:
    architecture: architecture of the network.
    weights: `{part: parameters}`, on the host and without padding.
    stats: `{part: statistics}`, likewise.
    splits: splits of all sites.
    chosen: per axis, units to split.
    pruned: per axis, a unit to prune.
    taken: compensations of prunes, see `estimates`.
    one_sided: true to leave parents as they are, and to give each new unit
      w - u, which nothing reads yet; e is ignored.

  Returns:
    The growth, which holds all weights and statistics.
  """
  pruned = pruned or {}
  sites = {site.axis: site for site in sites_lib.survey(architecture).sites}
  if unknown := sorted((chosen.keys() | pruned.keys()) - sites.keys()):
    raise ValueError(
        f'Axes {unknown} of {architecture} cannot be split or pruned.'
    )
  sources, signs, notes = {}, {}, []
  for axis in sites:
    parents = np.asarray(chosen.get(axis, ()), int)
    gone = [pruned[axis]] if axis in pruned else []
    if parents.size or gone:
      size = architecture.size(axis)
      sources[axis] = _sources(axis, size, parents, gone)
      signs[axis] = np.where(np.isin(sources[axis], parents), 1, 0)
      signs[axis][len(signs[axis]) - len(parents) :] = -1
      done = [('split', len(parents)), ('prune', len(gone))]
      verbs = ' and '.join(f'{verb} {n}' for verb, n in done if n)
      notes.append(f'{axis}: {verbs} of {size} units')
  wider = architecture.resized({a: len(s) for a, s in sources.items()})
  table = state_lib.axis_table(wider)
  tree = axes_lib.map_with_names(
      lambda path, leaf: axes_lib.gather(
          np.asarray(leaf), table.find(path), sources, table.sizes
      )[0],
      {'weights': weights, 'network': stats},
  )
  moved, kept = signs, {a: np.where(s, 0.5, 1) for a, s in signs.items()}
  if one_sided:
    moved = {a: np.minimum(s, 0) for a, s in signs.items()}
    kept = {a: np.where(s < 0, 0, 1) for a, s in signs.items()}

  def add(axis, ends, deltas, along=None):
    for end, delta in zip(ends, deltas, strict=True):
      path = sites[axis].path(end.layer.path)
      like = signals_lib.at(weights, path)['kernel']
      delta = padding.cut(delta, like)
      axes = table.axes['weights', *path, 'kernel']
      delta, _ = axes_lib.gather(delta, axes, sources, table.sizes)
      for dim, named in enumerate(axes):
        if along is not None and named is not None and named.name == axis:
          delta = delta * axes_lib.along(along[axis], dim, delta.ndim)
      _plus(tree['weights'], path, 'kernel', delta)

  for axis in chosen:
    add(axis, sites[axis].form.writers, splits[axis].u, moved)
  for axis, unit in pruned.items():
    site = sites[axis]
    deltas = [
        w[: site.units, None]
        * _outgoing(weights, site.path(reader.layer.path), unit)[..., None, :]
        for reader, w in zip(site.form.readers, taken[axis][unit])
    ]
    add(axis, site.form.readers, deltas)
  tree['weights'] = axes_lib.scale_readers(
      {'weights': tree['weights']}, table, kept
  )['weights']
  for axis in () if one_sided else chosen:
    add(axis, sites[axis].form.readers, splits[axis].e, signs)
  for axis, unit in pruned.items():
    for reader, w in zip(sites[axis].form.readers, taken[axis][unit]):
      path = sites[axis].path(reader.layer.path)
      shift = w[-1] * _outgoing(weights, path, unit)
      shift = shift.reshape(-1, shift.shape[-1]).sum(0)
      written = table.axes['weights', *path, 'kernel'][-1].name
      shift = shift[sources.get(written, slice(None))]
      if reader.norm is not None:
        norm = sites[axis].path(reader.norm.path)
        _plus(tree['network'], norm, 'mean', -shift)
      elif 'bias' in signals_lib.at(weights, path):
        _plus(tree['weights'], path, 'bias', shift)
  return Growth(
      sources,
      values=state_lib.values(**tree),
      moments='reset',
      target=wider,
      note='; '.join(notes),
  )


def _sources(
    axis: str, size: int, parents: np.ndarray, gone: Sequence[int]
) -> np.ndarray:
  """Returns the kept units, then the parent of each new one."""
  growth_lib.checked_units(axis, size, [*parents, *gone])
  return np.concatenate([np.setdiff1d(np.arange(size), gone), parents])


def _outgoing(weights: Any, path: taps.Path, unit: int) -> np.ndarray:
  """Returns v of a unit at one reader, (..., out)."""
  kernel = signals_lib.at(weights, path)['kernel']
  return np.take(kernel, unit, sites_lib.READ)


def _plus(tree: Any, path: taps.Path, name: str, change: np.ndarray) -> None:
  """Adds a change to one leaf of a layer."""
  leaves = signals_lib.at(tree, path)
  leaves[name] = np.asarray(leaves[name] + change, leaves[name].dtype)
