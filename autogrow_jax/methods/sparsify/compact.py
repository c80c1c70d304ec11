"""The part of a network whose masks are on, as a smaller network.

`Subset.take` makes the state of the smaller network, and `Subset.put` puts back
what training changed; units that are off stay as they were, bit for bit. Widths
are rounded up, so that programs are few; the units that fill them up are not
put back, and gates have to silence them. For the same reason alike blocks of a
stage trade names: those that are on come first.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib

Architecture = architecture_lib.Architecture
Tree = Any

# Widths are rounded up to multiples of this, and of an eighth of the whole.
QUANTUM = 8


def ordered(on: Any, size: int, *, numpy: Any = np) -> Any:
  """Lists the units of a computed axis: those that are on, then others.

  Args:
    on: bool (units,), the units that are on.
    size: number of units of the computed axis.
    numpy: `jnp` inside jit.

  Returns:
    int (size,), units of the canonical axis.
  """
  return numpy.argsort(numpy.logical_not(on), stable=True)[:size]


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
  """The units and blocks of a network that are on, see `view.Active`.

  Attributes:
    canonical: architecture of the canonical state.
    units: bool (size,) per axis, the units that are on; all of an axis that is
      left out.
    blocks: whether each block is on; those left out are. The axis that a block
      reads has the same units as the one that it writes, if it is off.
    compact: whether only what is on is computed. Otherwise all is, and gates
      have to silence the rest.
  """

  canonical: Architecture
  units: Mapping[str, np.ndarray]
  blocks: Mapping[str, bool]
  compact: bool

  @property
  def counts(self) -> dict[str, int]:
    return {
        axis: int(np.count_nonzero(on)) for axis, on in self.units.items()
    }

  @functools.cached_property
  def computed(self) -> Architecture:
    """The network of what is on, widths rounded up.

    The axes of the same name in all blocks of a stage become equally wide, so
    that equal blocks stay equal.
    """
    if not self.compact:
      return self.canonical
    on = self._traded
    compact = self.canonical
    for block, is_on in on.blocks.items():
      if not is_on:
        compact = compact.without_block(block)
    stage_of = {
        block: stage
        for stage, blocks in enumerate(compact.stages)
        for block in blocks
    }
    kind_of = {}
    for axis, _ in compact.sizes:
      block, _, name = axis.partition('.')
      kind_of[axis] = (stage_of[block], name) if block in stage_of else axis
    widest = {}
    for axis, count in on.counts.items():
      if axis in kind_of:
        size = self.canonical.size(axis)
        step = max(QUANTUM, size // 8)
        rounded = min(size, -(-count // step) * step)
        kind = kind_of[axis]
        widest[kind] = max(rounded, widest.get(kind, 0))
    return compact.resized({
        axis: min(widest[kind], self.canonical.size(axis))
        for axis, kind in kind_of.items()
        if axis in on.units
    })

  def take(self, state: Tree) -> Tree:
    """Returns the state of what is computed.

    A method's own leaves stay whole; those of blocks that trade names do so,
    too.
    """
    state, units = _renamed(state, self._names), self._traded.units
    # Behind a block that is left out, another axis is read than before.
    table, sizes = state_lib.axis_table(self.computed), self.computed.sizes
    chosen = {
        axis: ordered(units[axis], size)
        for axis, size in sizes
        if axis in units
    }

    def gather(path, leaf):
      return axes_lib.gather(leaf, table.find(path), chosen, table.sizes)[0]

    canonical, computed = (
        [part.name for part in networks.parts(architecture)]
        for architecture in (self.canonical, self.computed)
    )
    state = view.replace_dictionaries(
        state, set(canonical), lambda tree: {n: tree[n] for n in computed}
    )
    return axes_lib.map_with_names(gather, state)

  def put(self, computed: Tree, state: Tree) -> Tree:
    """Returns the canonical state with what is on put back."""
    state, on = _renamed(state, self._names), self._traded
    table = state_lib.axis_table(self.canonical)
    new = axes_lib.by_path(computed)
    off = {block for block, is_on in on.blocks.items() if not is_on}

    def scatter(path, leaf):
      axes = table.find(path)
      if axes is None:
        return new.get(path, leaf)
      if path not in new or off & set(path):
        return leaf
      chosen = [
          np.flatnonzero(on.units[axis.name])
          if axis is not None and axis.name in on.units
          else np.arange(size)
          for axis, size in zip(axes, leaf.shape, strict=True)
      ]
      first = tuple(slice(len(units)) for units in chosen)
      leaf = np.array(leaf)
      leaf[np.ix_(*chosen)] = new[path][first]
      return leaf

    back = {new: old for old, new in self._names.items()}
    return _renamed(axes_lib.map_with_names(scatter, state), back)

  @functools.cached_property
  def _names(self) -> dict[str, str]:
    """Names of blocks in programs, which see how many are on, not which.

    In a stage whose blocks behind the first are alike, those that are on have
    the first names, in the same order.
    """
    if not self.compact:
      return {}
    kinds = {
        part.name: (part.module, part.input_shape)
        for part in networks.parts(self.canonical)
    }
    names = {}
    for _, *blocks in self.canonical.stages:
      if len({kinds[block] for block in blocks}) == 1:
        order = sorted(blocks, key=lambda name: not self.blocks.get(name, True))
        names.update(zip(order, blocks, strict=True))
    return names

  @functools.cached_property
  def _traded(self) -> 'Subset':
    """The subset under the names that blocks have in programs."""
    return dataclasses.replace(
        self,
        units=_renamed(self.units, self._names),
        blocks=_renamed(self.blocks, self._names),
    )


def _renamed(tree: Tree, names: Mapping[str, str]) -> Tree:
  """Gives blocks and their axes other names, in all dictionaries of a tree."""

  def rename(key):
    block, dot, axis = key.partition('.')
    return names.get(block, block) + dot + axis

  def visit(node):
    if not isinstance(node, dict):
      return node
    return {rename(key): _renamed(value, names) for key, value in node.items()}

  return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, dict))
