"""Growth: the one mechanism that changes the shape of a training state.

A growth event is data: the next architecture and, per named axis whose units
change, an integer vector that says from which old unit each new one comes.

    append a block      {}
    widen 8 to 12       {'s1b0.mid': [0, 1, ..., 7, NEW, NEW, NEW, NEW]}
    split units 0, 1    {'s1b0.mid': [0, 1, ..., 7, 0, 1]}
    prune               {'s1b0.mid': kept indices}

`carry` moves parameters, statistics and every optimizer moment across with
these vectors alone, since all of them know the names of their axes.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture
TrainState = state_lib.TrainState

NEW = -1  # In a source vector: a unit without a parent.

# Names of optimizer moments that hold squares of gradients. Zero would make the
# first updates of a new unit several times those of an old one, so new units
# start from the mean over the old ones, and new leaves from the mean over the
# same layer's in other blocks.
SQUARED_MOMENTS = frozenset({'nu', 'nu_max', 'sum_of_squares'})

Patch = Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, Any]]]


def no_patch(
    state: TrainState, key: jax.Array
) -> tuple[TrainState, dict[str, Any]]:
  """The patch that changes nothing."""
  del key
  return state, {}


@dataclasses.dataclass(frozen=True)
class Growth:
  """One growth event.

  Attributes:
    architecture: the next architecture.
    sources: per named axis of it, for each unit its source or `NEW`; axes that
      keep their units are left out.
    patch: `(state, key) -> (state, report)`, applied to the carried state; the
      report goes into the receipt. A report's 'images' is the number of images
      that it trained on.
    note: what happens, for people.
  """

  architecture: Architecture
  sources: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  patch: Patch = no_patch
  note: str = ''

  def __post_init__(self):
    sizes = dict(self.architecture.sizes)
    for axis, source in self.sources.items():
      source = np.asarray(source)
      if axis not in sizes:
        raise ValueError(
            f'Growth has sources for axis {axis!r}, which {self.architecture} '
            'does not have.'
        )
      if source.ndim != 1 or not np.issubdtype(source.dtype, np.integer):
        raise ValueError(
            f'Sources of axis {axis!r} must be a vector of integers, got '
            f'{source.dtype} of shape {source.shape}.'
        )
      if len(source) != sizes[axis]:
        raise ValueError(
            f'Axis {axis!r} has sources for {len(source)} units but the '
            f'architecture says {sizes[axis]}.'
        )


@dataclasses.dataclass(frozen=True)
class Carried:
  """What `grow` did, for the receipt.

  Attributes:
    optimizer: number of optimizer leaves 'kept', 'changed' in shape, 'new' and
      'dropped'.
    report: the patch's report.
  """

  optimizer: dict[str, int]
  report: dict[str, Any]


def grow(
    state: TrainState,
    growth: Growth,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array,
    extra: state_lib.ExtraOf = state_lib.no_extra,
) -> tuple[TrainState, Carried]:
  """Applies a growth event.

  Args:
    state: the canonical state; not changed.
    growth: the event.
    tx: the optimizer.
    key: fresh units and the patch draw from it.
    extra: the method's additional leaves.

  Returns:
    The canonical state of `growth.architecture`, and what was done.

  Raises:
    ValueError: if sources don't fit the state, or if the patch returns other
      shapes, types or paths than the architecture's.
  """
  fresh = state_lib.create_state(
      growth.architecture,
      tx,
      key=key,
      extra=extra,
      known=_carried_parts(state, growth),
  )
  table = state_lib.axis_table(growth.architecture, extra)
  grown, optimizer = carry(state, fresh, table, growth.sources)
  grown, report = growth.patch(grown, key)
  grown = state_lib.to_host(grown)
  _check_shapes(grown, fresh)
  return grown, Carried(optimizer, report)


def carry(
    old: TrainState,
    fresh: TrainState,
    table: state_lib.AxisTable,
    sources: Mapping[str, np.ndarray],
) -> tuple[TrainState, dict[str, int]]:
  """Moves what an old state knows into the shape of a fresh one.

  Args:
    old: the state before.
    fresh: a newly created state of the next architecture.
    table: the axes of the next architecture's leaves.
    sources: see `Growth`.

  Returns:
    The state, and counts of optimizer leaves by what happened to them.
  """
  leaves = jax.tree_util.tree_leaves_with_path(old)
  before = {state_lib.names(path): leaf for path, leaf in leaves}
  if len(before) != len(leaves):
    raise ValueError('Two leaves of the state have the same path.')
  counts = dict.fromkeys(('kept', 'changed', 'new', 'dropped'), 0)
  seen = set()

  def move(path, new):
    path = state_lib.names(path)
    is_moment = path[0] == 'opt_state'
    seen.add(path)
    if path not in before:
      counts['new'] += is_moment
      return _mean_of_siblings(path, new, before) if is_moment else new
    leaf = before[path]
    moved = _gather(
        path, leaf, new, state_lib.find_axes(path, table), sources
    )
    counts['kept' if moved is leaf else 'changed'] += is_moment
    return moved

  carried = jax.tree_util.tree_map_with_path(move, fresh)
  counts['dropped'] = sum(
      path[0] == 'opt_state' for path in before.keys() - seen
  )
  return carried, counts


def scale_readers(
    tree: Any,
    table: state_lib.AxisTable,
    vectors: Mapping[str, Any],
) -> Any:
  """Multiplies every reader of an axis: the soft gate, its fold, the halving.

  Depthwise kernels read and write their axis; they are left alone, and the
  reader behind them is scaled.

  Args:
    tree: any tree whose paths end in the table's, e.g. a state's `params`,
      `stats`, or its momentum.
    table: from `state.axis_table`.
    vectors: per axis a vector of its size; may be traced.

  Returns:
    The scaled tree.
  """
  return _scaled(
      tree, table, vectors, lambda path, axis: axis.role == 'reads'
  )


def scale_filters(
    tree: Any,
    table: state_lib.AxisTable,
    vectors: Mapping[str, Any],
) -> Any:
  """Multiplies every kernel that writes an axis; see `scale_readers`."""
  return _scaled(
      tree,
      table,
      vectors,
      lambda path, axis: (
          axis.role == 'writes' and path[-1].endswith('kernel')
      ),
  )


def scale_readers_patch(
    architecture: Architecture, vectors: Mapping[str, np.ndarray]
) -> Patch:
  """The patch that scales all readers of some axes, with their momentum.

  Squares and sums of gradients are left alone: the gradient of a reader does
  not change when its weight and that of its twin are halved.
  """
  table = state_lib.axis_table(architecture)

  def patch(state, key):
    del key
    scaled = scale_readers(state, table, vectors)
    gradients = {*SQUARED_MOMENTS, 'acc_grads'}
    keep = lambda path, old, new: (
        old if gradients & set(state_lib.names(path)) else new
    )
    return jax.tree_util.tree_map_with_path(keep, state, scaled), {}

  return patch


def split(
    architecture: Architecture, axis: str, units: np.ndarray
) -> Growth:
  """Splits units of an axis into two, each read with half the weight."""
  size = architecture.size(axis)
  units = _checked_units(architecture, axis, units)
  sources = np.concatenate([np.arange(size), units])
  factors = np.where(np.isin(sources, units), 0.5, 1.0).astype(np.float32)
  wider = architecture.resized({axis: len(sources)})
  return Growth(
      wider,
      {axis: sources},
      scale_readers_patch(wider, {axis: factors}),
      f'split {len(units)} of {size} units of {axis}',
  )


def widen(architecture: Architecture, axis: str, units: int) -> Growth:
  """Adds fresh units to an axis."""
  size = architecture.size(axis)
  return Growth(
      architecture.resized({axis: size + units}),
      {axis: np.concatenate([np.arange(size), np.full(units, NEW)])},
      note=f'widen {axis} from {size} to {size + units} units',
  )


def prune(architecture: Architecture, axis: str, kept: np.ndarray) -> Growth:
  """Keeps only some units of an axis."""
  size = architecture.size(axis)
  kept = _checked_units(architecture, axis, kept)
  return Growth(
      architecture.resized({axis: len(kept)}),
      {axis: kept},
      note=f'prune {axis} from {size} to {len(kept)} units',
  )


def append(architecture: Architecture, stage: int) -> Growth:
  """Appends a freshly initialised block to a stage."""
  return append_all(architecture, [stage])


def append_all(architecture: Architecture, stages: Sequence[int]) -> Growth:
  """Appends one freshly initialised block for each mention of a stage."""
  grown, names = architecture, []
  for stage in stages:
    grown = grown.with_block(stage)
    names.append(grown.stages[stage][-1])
  return Growth(grown, note=f'append {", ".join(names)}')


def _scaled(
    tree: Any,
    table: state_lib.AxisTable,
    vectors: Mapping[str, Any],
    is_meant: Callable[[tuple[str, ...], layers.Axis], bool],
) -> Any:
  """Multiplies leaves by vectors along those of their axes that are meant."""

  def scale(path, leaf):
    path = state_lib.names(path)
    axes = state_lib.find_axes(path, table)
    for dim, axis in enumerate(axes or ()):
      if axis is not None and axis.name in vectors and is_meant(path, axis):
        shape = [1] * leaf.ndim
        shape[dim] = -1
        leaf = leaf * vectors[axis.name].reshape(shape).astype(leaf.dtype)
    return leaf

  return jax.tree_util.tree_map_with_path(scale, tree)


def _checked_units(
    architecture: Architecture, axis: str, units: np.ndarray
) -> np.ndarray:
  """Distinct units of an axis, as an array."""
  units, size = np.asarray(units), architecture.size(axis)
  if len(set(units.tolist()) & set(range(size))) != units.size:
    raise ValueError(
        f'Units of axis {axis!r} are distinct numbers from 0 to {size - 1}, '
        f'got {units.tolist()}.'
    )
  return units


def _carried_parts(
    state: TrainState, growth: Growth
) -> dict[str, tuple[base.Tree, base.Tree]]:
  """Parts without anything new, as zeros: what they hold is carried over.

  So that nothing need be drawn for them.
  """
  carried = {}
  for part in networks.parts(growth.architecture):
    shapes = base.shapes(part)
    old = (
        state.params['weights'].get(part.name),
        state.stats['network'].get(part.name),
    )
    if jax.tree.structure(old) == jax.tree.structure(shapes) and not any(
        np.any(np.asarray(growth.sources.get(axis, 0)) == NEW)
        for _, axis in part.axes
    ):
      carried[part.name] = jax.tree.map(
          lambda leaf, was: np.zeros(leaf.shape, was.dtype), shapes, old
      )
  return carried


def _gather(
    path: tuple[str, ...],
    old: np.ndarray,
    fresh: np.ndarray,
    axes: layers.Axes | None,
    sources: Mapping[str, np.ndarray],
) -> np.ndarray:
  """Gathers one leaf along its changed axes; new entries are fresh."""
  where = '/'.join(path)
  changed = [
      (dim, axis.name)
      for dim, axis in enumerate(axes or ())
      if axis is not None and axis.name in sources
  ]
  if changed and old.ndim != len(axes):
    raise ValueError(
        f'Optimizer leaf {where} has rank {old.ndim}, its parameter has rank '
        f'{len(axes)}; factored moments cannot be grown.'
    )
  moved, is_new = old, np.zeros((1,) * old.ndim, bool)
  for dim, name in changed:
    source = np.asarray(sources[name])
    if source.max() >= old.shape[dim] or source.min() < NEW:
      raise ValueError(
          f'Sources of axis {name!r} go from {source.min()} to {source.max()}, '
          f'but {where} has units 0 to {old.shape[dim] - 1}.'
      )
    moved = np.take(moved, np.maximum(source, 0), axis=dim)
    shape = [1] * old.ndim
    shape[dim] = -1
    is_new = is_new | (source == NEW).reshape(shape)
  if moved.dtype != fresh.dtype:
    raise ValueError(
        f'Leaf {where} is {moved.dtype}; it should be {fresh.dtype}.'
    )
  if moved.shape != fresh.shape:
    raise ValueError(
        f'Leaf {where} would have shape {moved.shape}, but the architecture '
        f'says {fresh.shape}: an axis changed its size without sources.'
    )
  if is_new.any():
    if path[0] == 'opt_state' and SQUARED_MOMENTS & set(path):
      fresh = np.full_like(fresh, old.mean(dtype=np.float64))
    elif path[-1] == 'select':
      fresh = np.zeros_like(fresh)  # A shortcut without parameters stays so.
    moved = np.where(is_new, fresh, moved)
  return moved


def _mean_of_siblings(
    path: tuple[str, ...],
    fresh: np.ndarray,
    before: Mapping[tuple[str, ...], np.ndarray],
) -> np.ndarray:
  """A new optimizer leaf: squares like those of the same layer elsewhere."""
  if not SQUARED_MOMENTS & set(path):
    return fresh
  means = [
      leaf.mean(dtype=np.float64)
      for other, leaf in before.items()
      if len(other) == len(path)
      and other[:-3] == path[:-3]
      and other[-2:] == path[-2:]
      and leaf.shape == fresh.shape
  ]
  return np.full_like(fresh, np.mean(means)) if means else fresh


def _check_shapes(state: TrainState, expected: TrainState) -> None:
  """Refuses a patch that left the architecture's shapes."""
  describe = lambda tree: {
      '/'.join(state_lib.names(path)): f'{leaf.dtype}{leaf.shape}'
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  got, want = describe(state), describe(expected)
  for path in sorted(got.keys() | want.keys()):
    if got.get(path) != want.get(path):
      raise ValueError(
          f'The patch left {path} as {got.get(path)}; it should be '
          f'{want.get(path)}.'
      )
