"""`TrainState`: all arrays of a run, by name, with exact shapes.

This is the canonical form. Its leaves are NumPy arrays on the host; training
uses a packed copy of it on the devices (`view.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import struct
import jax
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import randomness
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture
Path = tuple[str, ...]
AxisTable = dict[Path, layers.Axes]


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
  aux, memory, _ = extra(architecture)
  params = {
      'weights': {name: weights for name, (weights, _) in parts.items()},
      'aux': aux,
  }
  stats = {
      'network': {name: stats for name, (_, stats) in parts.items()},
      'method': memory,
  }
  return to_host(
      TrainState(
          step=np.int32(0),
          params=params,
          stats=stats,
          opt_state=tx.init(params),
          key=jax.random.key_data(key),
      )
  )


def abstract_state(
    architecture: Architecture,
    tx: optax.GradientTransformation,
    *,
    extra: ExtraOf = no_extra,
) -> TrainState:
  """Shapes and types of `create_state`, without computing anything."""
  return jax.eval_shape(
      lambda: _zeros_state(architecture, tx, extra)
  )


def _zeros_state(
    architecture: Architecture,
    tx: optax.GradientTransformation,
    extra: ExtraOf,
) -> TrainState:
  """Zeros in the shape of a state; traceable."""
  parts = {
      part.name: base.shapes(part) for part in networks.parts(architecture)
  }
  zeros = lambda tree: jax.tree.map(
      lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), tree
  )
  aux, memory, _ = extra(architecture)
  params = {
      'weights': {name: zeros(weights) for name, (weights, _) in parts.items()},
      'aux': aux,
  }
  return TrainState(
      step=jax.numpy.int32(0),
      params=params,
      stats={
          'network': {name: zeros(stats) for name, (_, stats) in parts.items()},
          'method': memory,
      },
      opt_state=tx.init(params),
      key=jax.random.key_data(jax.random.key(0)),
  )


def to_host(tree: Any) -> Any:
  """Copies all leaves to NumPy arrays.

  They are copies on every backend: a view of a CPU buffer would keep it from
  being donated.
  """
  return jax.tree.map(lambda leaf: np.array(leaf), tree)


def names(path: tuple[Any, ...]) -> Path:
  """A key path of `jax.tree_util` as strings."""
  return tuple(
      str(
          getattr(
              entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', entry))
          )
      )
      for entry in path
  )


def axis_table(
    architecture: Architecture, extra: ExtraOf = no_extra
) -> AxisTable:
  """Named axes of every leaf, by the end of its path.

  A leaf of the optimizer's state has the axes of the parameter whose path ends
  its own. The method's leaves are keyed by axis, and then run along it, or by
  block.

  Args:
    architecture: the architecture.
    extra: the method's additional leaves.

  Returns:
    `{('weights' | 'network' | 'aux' | 'method', ...): axes}`; leaves without
    named axes are absent.
  """
  table = {}
  for part in networks.parts(architecture):
    for path, (collection, axes) in base.axes(part).items():
      root = 'weights' if collection == 'params' else 'network'
      table[root, *path] = axes
  sizes = dict(architecture.sizes)
  aux, memory, _ = extra(architecture)
  for root, tree in (('aux', aux), ('method', memory)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      path = names(path)
      axis = next((name for name in path if name in sizes), None)
      if axis is not None and np.shape(leaf) == (sizes[axis],):
        table[root, *path] = (layers.Axis(axis, 'neither'),)
  return table


def find_axes(path: Path, table: AxisTable) -> layers.Axes | None:
  """The axes of the leaf at a path, by the longest matching end of it."""
  for start in range(len(path)):
    if path[start:] in table:
      return table[path[start:]]
  return None
