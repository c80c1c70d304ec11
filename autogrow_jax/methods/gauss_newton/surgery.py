"""Chosen splits and prunes as one `growth.Growth`.

Splitting is an index map (each child copies its parent), the halving of all
readers of the axis, and a patch that adds the learned u and e with a plus for
the child in the parent's place and a minus for the new one. Pruning leaves a
unit out, and a patch adds what makes up for it. Axes that change together need
no order: every delta is gathered along all axes of its kernel.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import growth
from autogrow_jax import layers
from autogrow_jax import state as state_lib
from autogrow_jax.methods.gauss_newton import prunes as prunes_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.networks import base
from autogrow_jax.networks import taps

Architecture = architecture_lib.Architecture
TrainState = state_lib.TrainState
Splits = splits_lib.Splits

OPTIMIZER_STATES = ('reset', 'carry')


@struct.dataclass
class ChildStatistics:
  """Moments of what the writer would write for both children of every unit.

  Attributes:
    mean: (2, units), of the child that adds u and of the other.
    var: (2, units).
  """

  mean: np.ndarray
  var: np.ndarray


@dataclasses.dataclass(frozen=True)
class Removal:
  """One unit to prune.

  Attributes:
    unit: its number.
    weights: (units + 1,) w of `prunes`, the constant's last.
    outgoing: (..., out) its slice of the reader's kernel.
  """

  unit: int
  weights: np.ndarray
  outgoing: np.ndarray


def removals(
    model: signals_lib.Model,
    trees: signals_lib.Trees,
    prunes: prunes_lib.Prunes,
    indices: Sequence[int],
) -> dict[str, Removal]:
  """Removals of selected candidates, by axis.

  Args:
    model: the network.
    trees: its arrays.
    prunes: of all units.
    indices: into its candidates, at most one of an axis.

  Returns:
    What `morph` takes.
  """
  sites = {site.axis: site for site in model.sites}
  result = {}
  for index in indices:
    axis, unit = prunes.candidates[index]
    if axis in result:
      raise ValueError(
          f'Two units of {axis} are to be pruned at once; each would count on '
          'the other. Prune one, and estimate again.'
      )
    kernel = np.asarray(trees.kernel(sites[axis].reader))
    result[axis] = Removal(
        unit, prunes.weights[axis][unit], kernel[..., unit, :]
    )
  return result


def morph(
    architecture: Architecture,
    splits: Splits,
    units: Mapping[str, np.ndarray],
    *,
    removed: Mapping[str, Removal] | None = None,
    optimizer_state: str = 'reset',
    statistics: Mapping[str, ChildStatistics] | None = None,
) -> growth.Growth:
  """Splits units of some sites in the learned way, and prunes others.

  Args:
    architecture: the network's.
    splits: of all units of these sites.
    units: per axis, the units to split.
    removed: per axis, the unit to prune.
    optimizer_state: 'reset' to zero all moments, or 'carry' to give each child
      what the chain rule says its moments would have been: half the gradient
      and a quarter of its square on the incoming side, all on the outgoing one.
    statistics: without them, children copy the norm of their parent, which is
      exact in evaluation mode only. With them, each has a norm of its own that
      is compensated, which is exact in both modes.

  Returns:
    The growth.
  """
  if optimizer_state not in OPTIMIZER_STATES:
    raise ValueError(
        f'optimizer_state is one of {", ".join(OPTIMIZER_STATES)}, got '
        f'{optimizer_state!r}.'
    )
  removed = removed or {}
  sites = {site.axis: site for site in sites_lib.survey(architecture).sites}
  if unknown := sorted((units.keys() | removed.keys()) - sites.keys()):
    raise ValueError(
        f'Axes {unknown} of {architecture} cannot be split or pruned.'
    )
  sources, signs, notes = {}, {}, []
  for axis, site in sites.items():
    chosen = np.asarray(units.get(axis, ()), int)
    gone = removed[axis].unit if axis in removed else None
    if chosen.size or gone is not None:
      sources[axis] = _sources(axis, site.units, chosen, gone)
      signs[axis] = _signs(sources[axis], chosen)
      notes.append(_note(axis, site.units, chosen, gone))
  wider = architecture.resized({a: len(s) for a, s in sources.items()})
  changed = {axis: sites[axis] for axis in sources}

  def patch(state: TrainState, key: jax.Array) -> tuple[TrainState, Any]:
    del key
    table = state_lib.axis_table(wider)
    weights, network = state.params['weights'], state.stats['network']
    deltas = _Deltas(table, sources, signs)
    for axis, site in changed.items():
      if axis in units:
        delta = splits[axis].u
        weights = deltas.add(weights, site.writer, delta, children=axis)
    for axis, removal in removed.items():
      delta = removal.weights[:-1].reshape(-1, 1) * removal.outgoing[
          ..., None, :
      ]
      weights = deltas.add(weights, sites[axis].reader, delta)
    halves = {axis: np.where(sign, 0.5, 1) for axis, sign in signs.items()}
    weights = growth.scale_readers({'weights': weights}, table, halves)
    weights = weights['weights']
    for axis, site in changed.items():
      if axis not in units:
        continue
      delta = splits[axis].e
      weights = deltas.add(weights, site.reader, delta, children=axis)
      if site.norm is not None and statistics is not None:
        weights, network = _with_own_norms(
            weights, network, site, statistics[axis], sources[axis], signs[axis]
        )
    for axis, removal in removed.items():
      weights, network = _with_constant(
          weights, network, sites[axis], removal, deltas
      )
    settle = _reset if optimizer_state == 'reset' else _carried
    return state.replace(
        params={**state.params, 'weights': weights},
        stats={**state.stats, 'network': network},
        opt_state=settle(state.opt_state, table, signs),
    ), {}

  return growth.Growth(wider, sources, patch, '; '.join(notes))


def child_statistics(
    model: signals_lib.Model,
    trees: signals_lib.Trees,
    splits: Splits,
    batches: Any,
) -> dict[str, ChildStatistics]:
  """Moments for norms of the children's own, over batches."""
  count = sum(len(labels) for _, labels in batches)
  sums = [_child_sums(model, trees, splits, x) for x, _ in batches]
  totals = jax.tree.map(lambda *leaves: sum(leaves) / count, *sums)
  result = {}
  for axis, (first, second) in totals.items():
    mean = np.asarray(first)
    var = np.maximum(np.asarray(second) - mean**2, 0)
    result[axis] = ChildStatistics(mean, var)
  return result


@dataclasses.dataclass(frozen=True)
class _Deltas:
  """Adds learned deltas to kernels of the grown network."""

  table: state_lib.AxisTable
  sources: Mapping[str, np.ndarray]
  signs: Mapping[str, np.ndarray]

  def add(
      self,
      weights: base.Tree,
      layer: taps.Layer,
      delta: Any,
      *,
      children: str | None = None,
  ) -> base.Tree:
    """Weights with a layer's delta, given for the units before the growth.

    Args:
      weights: of the grown network.
      layer: whose kernel.
      delta: in the shape of its kernel before the growth.
      children: the axis on which one child gets plus the delta, the other
        minus, and all other units nothing; None if all get it.

    Returns:
      The weights.
    """
    delta = np.asarray(delta)
    axes = self.table['weights', *layer.path, 'kernel']
    for dim, named in enumerate(axes):
      if named is None or named.name not in self.sources:
        continue
      delta = np.take(delta, self.sources[named.name], axis=dim)
      if named.name == children:
        delta = delta * _along(self.signs[children], dim, delta)
    return _with_leaves(
        weights, layer.path, kernel=lambda kernel: kernel + delta
    )

  def of_outputs(self, layer: taps.Layer, vector: np.ndarray) -> np.ndarray:
    """A vector over what a layer writes, for the units after the growth."""
    name = self.table['weights', *layer.path, 'kernel'][-1].name
    return vector[self.sources[name]] if name in self.sources else vector


def _sources(
    axis: str, size: int, chosen: np.ndarray, gone: int | None
) -> np.ndarray:
  """The kept units, then one more for each split."""
  named = [*chosen.tolist(), *([] if gone is None else [gone])]
  if len(set(named) & set(range(size))) != len(named):
    raise ValueError(
        f'Units of axis {axis!r} to split or prune are distinct numbers from 0 '
        f'to {size - 1}, got {named}.'
    )
  if size == 1 and gone is not None:
    raise ValueError(f'The only unit of axis {axis!r} cannot be pruned.')
  kept = np.array([unit for unit in range(size) if unit != gone], int)
  return np.concatenate([kept, chosen])


def _note(axis: str, size: int, chosen: np.ndarray, gone: int | None) -> str:
  """What happens to an axis, for people."""
  done = []
  if chosen.size:
    done.append(f'split {chosen.size}')
  if gone is not None:
    done.append('prune 1')
  return f'{axis}: {" and ".join(done)} of {size} units'


def _signs(sources: np.ndarray, units: np.ndarray) -> np.ndarray:
  """+1 for children in their parent's place, -1 for new ones, else 0."""
  signs = np.where(np.isin(sources, units), 1, 0)
  signs[len(sources) - len(units) :] = -1
  return signs


def _with_constant(weights, network, site, removal, deltas):
  """What the reader writes, with the constant part of a compensation."""
  amount = removal.weights[-1]
  if not amount:
    return weights, network
  out = removal.outgoing.reshape(-1, removal.outgoing.shape[-1]).sum(0)
  shift = amount * deltas.of_outputs(site.reader, out)
  if site.reader_norm is not None:
    return weights, _with_leaves(
        network, site.reader_norm.path, mean=lambda mean: mean - shift
    )
  return _with_leaves(
      weights, site.reader.path, bias=lambda bias: bias + shift
  ), network


def _with_own_norms(weights, network, site, statistics, sources, signs):
  """Norms of the children's own, whose output is as with the parent's."""
  plus = np.where(signs >= 0, 0, 1)
  parent = network[site.norm.path[0]]
  for name in site.norm.path[1:]:
    parent = parent[name]
  mean, var = (
      np.where(signs == 0, parent[name], moment[plus, sources])
      for name, moment in (('mean', statistics.mean), ('var', statistics.var))
  )
  old, epsilon = parent['var'], site.norm.epsilon
  ratio = np.sqrt((var + epsilon) / (old + epsilon))
  scale = weights[site.norm.path[0]]
  for name in site.norm.path[1:]:
    scale = scale[name]
  factor = scale['scale'] / np.sqrt(old + epsilon)
  shift = factor * (mean - parent['mean'])
  weights = _with_leaves(
      weights,
      site.norm.path,
      scale=lambda scale: scale * ratio,
      bias=lambda bias: bias + shift,
  )
  network = _with_leaves(
      network, site.norm.path, mean=lambda _: mean, var=lambda _: var
  )
  return weights, network


def _with_leaves(tree: base.Tree, path: taps.Path, **changes: Any) -> base.Tree:
  """A tree with leaves of one layer changed, in their own type."""
  if path:
    inner = _with_leaves(tree[path[0]], path[1:], **changes)
    return {**tree, path[0]: inner}
  changed = {
      name: np.asarray(change(tree[name]), tree[name].dtype)
      for name, change in changes.items()
  }
  return {**tree, **changed}


def _reset(
    opt_state: Any, table: state_lib.AxisTable, signs: Mapping[str, np.ndarray]
) -> Any:
  """All moments and step counts zero; learning rates stay."""
  del signs

  def zero(path, leaf):
    path = state_lib.names(path)
    is_moment = state_lib.find_axes(path, table) is not None
    return np.zeros_like(leaf) if is_moment or path[-1] == 'count' else leaf

  return jax.tree_util.tree_map_with_path(zero, opt_state)


def _carried(
    opt_state: Any, table: state_lib.AxisTable, signs: Mapping[str, np.ndarray]
) -> Any:
  """Moments of each child, by the chain rule at the moment of the split."""

  def scale(path, leaf):
    path = state_lib.names(path)
    axes: layers.Axes = state_lib.find_axes(path, table) or ()
    part = 0.25 if growth.SQUARED_MOMENTS & set(path) else 0.5
    for dim, axis in enumerate(axes):
      if axis is not None and axis.role == 'writes' and axis.name in signs:
        factor = np.where(signs[axis.name], part, 1).astype(leaf.dtype)
        leaf = leaf * _along(factor, dim, leaf)
    return leaf

  return jax.tree_util.tree_map_with_path(scale, opt_state)


def _along(vector: np.ndarray, dim: int, like: np.ndarray) -> np.ndarray:
  """A vector shaped to be multiplied along one dimension."""
  shape = [1] * like.ndim
  shape[dim] = -1
  return vector.reshape(shape)


@functools.partial(jax.jit, static_argnums=0)
def _child_sums(model, trees, splits, x):
  """Per axis, sums over examples of position means: of y and of its square."""
  tapped = taps.run(model.chain, trees.weights, trees.stats, x)
  result = {}
  for site in model.sites:
    y = tapped.outputs[site.writer.path]
    change = site.writer.linear(
        tapped.inputs[site.writer.path], splits[site.axis].u
    )
    both = jnp.stack([y + change, y - change])
    both = both.reshape(2, len(x), -1, site.units)
    result[site.axis] = both.mean(2).sum(1), jnp.square(both).mean(2).sum(1)
  return result
