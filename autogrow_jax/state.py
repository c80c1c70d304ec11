"""`TrainState`: all arrays of a run, by name, with exact shapes.

This is the canonical form. Its leaves are NumPy arrays on the host; training
uses a packed copy of it on the devices (`view.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import struct
import jax
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import randomness
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import carry as carry_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture
Account = carry_lib.Account
AxisTable = axes_lib.AxisTable
Growth = growth_lib.Growth
NEW = axes_lib.NEW


class Extra(NamedTuple):
  """A method's own leaves, keyed by axis or block so that growth carries them.

  Attributes:
    trainable: tree of the leaves that are trained beside the weights.
    other: tree of the leaves that the method changes by itself.
    optimizer: descent on the trainable leaves; None if there are none.
  """

  trainable: base.Tree
  other: base.Tree
  optimizer: optimizers.AuxConfig | None = None


ExtraOf = Callable[[Architecture], Extra]


@struct.dataclass
class TrainState:
  """Everything that training changes; every field is required.

  Attributes:
    step: number of batches seen, int32.
    params: {'weights': {part: {layer: {leaf}}}, 'aux': the method's trainable
      leaves}.
    stats: {'network': {part: ...}, 'method': the method's other leaves}.
    opt_state: the optimizer's state over `params`.
    key: data of the run's root random key, uint32.
  """

  step: Any
  params: base.Tree
  stats: base.Tree
  opt_state: Any
  key: Any


def no_extra(architecture: Architecture) -> Extra:
  """Returns no leaves, for methods that have none of their own."""
  del architecture
  return Extra({}, {})


def create_state(
    architecture: Architecture,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array,
    extra: ExtraOf = no_extra,
    known: Mapping[str, tuple[base.Tree, base.Tree]] | None = None,
) -> TrainState:
  """A fresh state.

  Args:
    architecture: determines all shapes.
    tx: the optimizer.
    key: the run's root key.
    extra: the method's additional leaves.
    known: parts whose (weights, statistics) need not be drawn.

  Returns:
    The state at step 0.
  """
  stream = randomness.stream(key, 'init')
  known = known or {}
  parts = {
      part.name: known.get(part.name) or base.init(part, stream)
      for part in networks.parts(architecture)
  }
  return to_host(_assemble(parts, extra(architecture), tx, key))


def abstract_state(
    architecture: Architecture,
    tx: optax.GradientTransformation,
    *,
    extra: ExtraOf = no_extra,
) -> TrainState:
  """Shapes and types of `create_state`, without computing anything."""
  shapes = {
      part.name: base.shapes(part) for part in networks.parts(architecture)
  }
  return jax.eval_shape(
      lambda parts: _assemble(
          parts, extra(architecture), tx, jax.random.key(0)
      ),
      shapes,
  )


def _assemble(
    parts: Mapping[str, tuple[base.Tree, base.Tree]],
    extra: Extra,
    tx: optax.GradientTransformation,
    key: jax.Array,
) -> TrainState:
  """The state at step 0 of {part: (weights, statistics)}."""
  params = {
      'weights': {name: weights for name, (weights, _) in parts.items()},
      'aux': extra.trainable,
  }
  return TrainState(
      step=np.int32(0),
      params=params,
      stats={
          'network': {name: stats for name, (_, stats) in parts.items()},
          'method': extra.other,
      },
      opt_state=tx.init(params),
      key=jax.random.key_data(key),
  )


def to_host(tree: Any) -> Any:
  """Copies all leaves to NumPy arrays.

  They are copies on every backend: a view of a CPU buffer would keep it from
  being donated.
  """
  return jax.tree.map(lambda leaf: np.array(leaf), tree)


def axis_table(
    architecture: Architecture, extra: ExtraOf = no_extra
) -> AxisTable:
  """Named axes of every leaf.

  The method's leaves are keyed by axis, and then run along it, or by block.

  Args:
    architecture: the architecture.
    extra: the method's additional leaves.

  Returns:
    The table, by `('weights' | 'network' | 'aux' | 'method', ...)`; leaves
    without named axes are absent.
  """
  table = {}
  for part in networks.parts(architecture):
    for path, (collection, axes) in base.axes(part).items():
      root = 'weights' if collection == 'params' else 'network'
      table[root, *path] = axes
  sizes, own = dict(architecture.sizes), extra(architecture)
  for root, tree in (('aux', own.trainable), ('method', own.other)):
    for path, leaf in axes_lib.by_path(tree).items():
      axis = next((name for name in path if name in sizes), None)
      if axis is not None and np.shape(leaf) == (sizes[axis],):
        table[root, *path] = (axes_lib.Axis(axis, 'neither'),)
  return AxisTable(table, sizes)


def values(**roots: base.Tree) -> dict[axes_lib.Path, Any]:
  """Leaves for `Growth.values`, such as of `weights=` and `network=`."""
  return {
      (root, *path): leaf
      for root, tree in roots.items()
      for path, leaf in axes_lib.by_path(tree).items()
  }


def append(architecture: Architecture, stages: Sequence[int]) -> Growth:
  """Appends one freshly initialised block for each mention of a stage."""
  grown, names = architecture, []
  for stage in stages:
    grown = grown.with_block(stage)
    names.append(grown.stages[stage][-1])
  return Growth(target=grown, note=f'append {", ".join(names)}')


def target_of(growth: Growth, architecture: Architecture) -> Architecture:
  """The next architecture: the growth's own, or one with other sizes.

  Raises:
    ValueError: the growth has sources for other axes or sizes.
  """
  known = dict(architecture.sizes)
  target = growth.target
  if target is not None:
    known = dict(target.sizes)
  for axis, size in growth.sizes.items():
    if axis not in known:
      raise ValueError(
          f'Growth has sources for axis {axis!r}, which '
          f'{target or architecture} does not have.'
      )
    if target is not None and size != known[axis]:
      raise ValueError(
          f'Axis {axis!r} has sources for {size} units but the architecture '
          f'says {known[axis]}.'
      )
  return architecture.resized(growth.sizes) if target is None else target


def grow(
    state: TrainState,
    growth: Growth,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array,
    extra: ExtraOf = no_extra,
) -> tuple[TrainState, Account]:
  """Applies a growth event to a canonical state.

  Args:
    state: the state; not changed.
    growth: the event; its target is the next architecture.
    tx: the optimizer.
    key: fresh units are drawn from it.
    extra: the method's additional leaves.

  Returns:
    The canonical state of the next architecture, and what became of the leaves
    of the optimizer's state.

  Raises:
    ValueError: the growth does not fit the state.
  """
  architecture = growth.target
  fresh = create_state(
      architecture,
      tx,
      key=key,
      extra=extra,
      known=_carried_parts(state, growth),
  )
  table = axis_table(architecture, extra)
  opt_state, account = carry_lib.carry(
      growth, table, state.opt_state, fresh.opt_state, moments=True
  )
  rest, _ = carry_lib.carry(
      growth,
      table,
      state.replace(opt_state=()),
      _without_selections(fresh, state).replace(opt_state=()),
      key=key,
  )
  return to_host(rest.replace(opt_state=opt_state)), account


def grown_arrays(
    state: TrainState,
    growth: Growth,
    *,
    key: jax.Array,
    extra: ExtraOf = no_extra,
) -> TrainState:
  """The state after a growth without an optimizer, for a method to look at."""
  tx = optax.identity()
  bare = state.replace(opt_state=tx.init(()))
  return grow(bare, growth, tx, key=key, extra=extra)[0]


def _carried_parts(
    state: TrainState, growth: Growth
) -> dict[str, tuple[base.Tree, base.Tree]]:
  """Parts without anything new, as zeros: what they hold is carried over.

  So that nothing need be drawn for them.
  """
  carried = {}
  for part in networks.parts(growth.target):
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


def _without_selections(fresh: TrainState, old: TrainState) -> TrainState:
  """A fresh state in which shortcuts that are there select no new unit."""
  known = axes_lib.by_path(old.stats['network'])
  network = axes_lib.map_with_names(
      lambda path, leaf: (
          np.zeros_like(leaf)
          if path[-1] == 'select' and path in known
          else leaf
      ),
      fresh.stats['network'],
  )
  return fresh.replace(stats={**fresh.stats, 'network': network})
