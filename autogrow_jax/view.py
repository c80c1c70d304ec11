"""The execution view: how a canonical state is laid out on the devices.

`pack` stacks runs of identical blocks; `unpack` is its inverse, bit for bit.
Compiled programs depend on the `Bucket` alone, not on block names. A layout
with `spare` room stacks runs to a capacity, and then `Layout.depths` are an
argument of programs, so that a run that grows needs a new one only where it
outgrows a power of two.

A method may say that only some units and blocks of the canonical state are
`Active`. Then `take` makes the state of a smaller network of them, and `put`
puts back what training changed; units that are not active stay as they were,
bit for bit. Widths are rounded up, so that programs are few; the units that
fill them up are not put back, and a method has to silence them. For the same
reason alike blocks of a stage trade names: those that are active come first.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture
Bucket = tuple[base.Segment, ...]
Tree = Any

# From so many on an optimizer's state is made a stack at a time.
_MANY_LEAVES = 256

# Widths are rounded up to multiples of this, and of an eighth of the whole.
_QUANTUM = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Active:
  """What of an architecture is computed.

  Attributes:
    units: per axis, which units: bool (size,); all of an axis left out.
    blocks: which blocks; those left out are. What one reads and what it writes
      have the same units, if it is not there.
    compact: compute the active units and blocks alone; otherwise all, and the
      method has to silence the others.
  """

  units: Mapping[str, np.ndarray]
  blocks: Mapping[str, bool]
  compact: bool

  @property
  def counts(self) -> dict[str, int]:
    """Active units per axis, for `costs`."""
    return {
        axis: int(np.count_nonzero(units))
        for axis, units in self.units.items()
    }


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the parts of an architecture are in the packed trees.

  Attributes:
    architecture: whose parts they are.
    bucket: the chain to execute; equal buckets share compiled programs.
    members: per segment, the names of its parts.
    canonical: of the canonical state; another one where only a part of it is
      computed.
    spare: whether runs that may grow are stacked to a capacity.
  """

  architecture: Architecture
  bucket: Bucket
  members: tuple[tuple[str, ...], ...]
  canonical: Architecture
  spare: bool = False

  @property
  def depths(self) -> dict[str, np.int32] | None:
    """Parts per stack, for programs; None where the bucket tells."""
    if not self.spare:
      return None
    return {
        segment.key: np.int32(len(members))
        for segment, members in zip(self.bucket, self.members, strict=True)
        if segment.length is not None
    }


def layout(
    architecture: Architecture,
    *,
    fuse: bool = True,
    spare: bool = False,
    active: Active | None = None,
    remat: frozenset[int] = frozenset(),
) -> Layout:
  """The layout of an architecture.

  Args:
    architecture: of the canonical state.
    fuse: stack equal blocks; False is the exact reference.
    spare: stack them with room for more, see `networks.base.segments`.
    active: what of it is computed; None for all.
    remat: stages computed again in the backward pass, likewise.

  Returns:
    The layout.
  """
  computed = architecture
  if active is not None and active.compact:
    names = _traded(architecture, active)
    computed = _compact(architecture, _with_names(active, names))
  found = _layout(computed, fuse, spare, remat)
  return dataclasses.replace(found, canonical=architecture)


@functools.lru_cache(maxsize=256)
def _layout(
    architecture: Architecture, fuse: bool, spare: bool, remat: frozenset[int]
) -> Layout:
  pairs = base.segments(
      architecture,
      networks.parts(architecture),
      fuse=fuse,
      spare=spare,
      remat=remat,
  )
  return Layout(
      architecture,
      tuple(segment for segment, _ in pairs),
      tuple(members for _, members in pairs),
      architecture,
      spare,
  )


def ordered(active: Any, size: int, *, numpy: Any = np) -> Any:
  """Which units a computed axis has: the active ones, then others.

  Args:
    active: bool (units,).
    size: of the computed axis.
    numpy: `jnp` inside jit.

  Returns:
    int (size,), of the canonical axis.
  """
  return numpy.argsort(numpy.logical_not(active), stable=True)[:size]


def take(state: Tree, layout: Layout, active: Active) -> Tree:
  """The part of a canonical state that a layout computes.

  A method's own leaves stay whole; those of blocks that trade names do so, too.

  Args:
    state: canonical.
    layout: made with `active`.
    active: what is active.

  Returns:
    A state of `layout.architecture`.
  """
  names = _traded(layout.canonical, active)
  state, active = _renamed(state, names), _with_names(active, names)
  # Behind a block that is left out, another axis is read than before.
  table = state_lib.axis_table(layout.architecture)
  sizes = dict(layout.architecture.sizes)

  def gather(path, leaf):
    axes = state_lib.find_axes(state_lib.names(path), table) or ()
    for dim, axis in enumerate(axes):
      if axis is not None and axis.name in active.units:
        units = ordered(active.units[axis.name], sizes[axis.name])
        leaf = np.take(leaf, units, axis=dim)
    return leaf

  return jax.tree_util.tree_map_with_path(gather, _computed(state, layout))


def put(
    computed: Tree, state: Tree, layout: Layout, active: Active
) -> Tree:
  """The inverse of `take`: what is active, put back.

  Args:
    computed: a state of `layout.architecture`.
    state: the canonical state that it was taken from.
    layout: made with `active`.
    active: what is active.

  Returns:
    The canonical state. All that is not active is that of `state`.
  """
  names = _traded(layout.canonical, active)
  state, active = _renamed(state, names), _with_names(active, names)
  table = state_lib.axis_table(layout.canonical)
  new = {
      state_lib.names(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(computed)
  }
  off = {block for block, is_on in active.blocks.items() if not is_on}

  def scatter(path, leaf):
    path = state_lib.names(path)
    axes = state_lib.find_axes(path, table)
    if axes is None:
      return new.get(path, leaf)
    if path not in new or off & set(path):
      return leaf
    chosen = [
        np.flatnonzero(active.units[axis.name])
        if axis is not None and axis.name in active.units
        else np.arange(size)
        for axis, size in zip(axes, leaf.shape, strict=True)
    ]
    first = tuple(slice(len(units)) for units in chosen)
    leaf = np.array(leaf)
    leaf[np.ix_(*chosen)] = new[path][first]
    return leaf

  back = {new: old for old, new in names.items()}
  return _renamed(jax.tree_util.tree_map_with_path(scatter, state), back)


def pack(
    tree: Any, layout: Layout, *, stack: Callable[..., Any] = np.stack
) -> Any:
  """Stacks the parts of fused segments, anywhere in a tree of arrays.

  Every dictionary whose keys are exactly the parts of the network is replaced
  by one whose keys are the segments': weights, statistics, moments, gradients.
  Spare room is filled with zeros, which stay zeros: no gradient reaches them,
  and decay and moments of zeros are zero.

  Args:
    tree: any tree.
    layout: of its architecture.
    stack: how arrays are stacked; `jnp.stack` inside jit.

  Returns:
    The packed tree.
  """
  parts = {name for members in layout.members for name in members}

  def filled(leaves, length):
    spare = np.zeros(leaves[0].shape, leaves[0].dtype)
    return stack([*leaves, *[spare] * (length - len(leaves))])

  def stack_runs(tree):
    return {
        segment.key: tree[members[0]]
        if segment.length is None
        else jax.tree.map(
            lambda *leaves, length=segment.length: filled(leaves, length),
            *[tree[name] for name in members],
        )
        for segment, members in zip(
            layout.bucket, layout.members, strict=True
        )
    }

  return _replace_dictionaries(tree, parts, stack_runs)


def unpack(tree: Any, layout: Layout) -> Any:
  """The inverse of `pack`.

  Raises:
    ValueError: inside jit, if the layout has spare room: the program serves
      other depths, too.
  """
  leaves = jax.tree.leaves(tree)
  if layout.spare and any(isinstance(l, jax.core.Tracer) for l in leaves):
    raise ValueError(
        'A program for many depths has no blocks to unpack; compile it for '
        'every exact one with --depth_buckets=exact.'
    )
  keys = {segment.key for segment in layout.bucket}

  def unstack(tree):
    result = {}
    for segment, members in zip(layout.bucket, layout.members, strict=True):
      for index, name in enumerate(members):
        result[name] = (
            tree[segment.key]
            if segment.length is None
            else jax.tree.map(lambda leaf, i=index: leaf[i], tree[segment.key])
        )
    return result

  return _replace_dictionaries(tree, keys, unstack)


def with_stacked_init(
    tx: optax.GradientTransformation, architecture: Architecture
) -> optax.GradientTransformation:
  """The same transformation; its init stacks equal blocks of deep networks.

  Optimizers initialise leaf by leaf, at a third of a millisecond each: a
  quarter of a second of every growth where there are hundreds. The stacks have
  spare room, so that their shapes are seldom new ones, which are compiled for;
  where leaves are few, that would take longer than they do.
  """
  stacked = layout(architecture, spare=True)

  def init(params):
    if len(jax.tree.leaves(params)) < _MANY_LEAVES:
      return tx.init(params)
    opt_state = tx.init(pack(params, stacked))
    return unpack(state_lib.to_host(opt_state), stacked)

  return optax.GradientTransformation(init, tx.update)


def _compact(architecture: Architecture, active: Active) -> Architecture:
  """The architecture of the active units and blocks, widths rounded up.

  The axes of the same name in all blocks of a stage become equally wide, so
  that equal blocks stay equal.
  """
  compact = architecture
  for block, is_on in active.blocks.items():
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
  for axis, count in active.counts.items():
    if axis in kind_of:
      size = architecture.size(axis)
      step = max(_QUANTUM, size // 8)
      rounded = min(size, -(-count // step) * step)
      kind = kind_of[axis]
      widest[kind] = max(rounded, widest.get(kind, 0))
  return compact.resized({
      axis: min(widest[kind], architecture.size(axis))
      for axis, kind in kind_of.items()
      if axis in active.units
  })


def _traded(architecture: Architecture, active: Active) -> dict[str, str]:
  """Per block, its name in programs; they see how many are there, not which.

  In a stage whose blocks behind the first are alike, those that are active have
  the first names, in the same order.
  """
  if not active.compact:
    return {}
  kinds = {
      part.name: (part.module, part.input_shape)
      for part in networks.parts(architecture)
  }
  names = {}
  for _, *blocks in architecture.stages:
    if len({kinds[block] for block in blocks}) == 1:
      order = sorted(blocks, key=lambda name: not active.blocks.get(name, True))
      names.update(zip(order, blocks, strict=True))
  return names


def _with_names(active: Active, names: Mapping[str, str]) -> Active:
  return dataclasses.replace(
      active,
      units=_renamed(active.units, names),
      blocks=_renamed(active.blocks, names),
  )


def _renamed(tree: Tree, names: Mapping[str, str]) -> Tree:
  """Other names of blocks, and of their axes, in all dictionaries."""

  def rename(key):
    block, dot, axis = key.partition('.')
    return names.get(block, block) + dot + axis

  def visit(node):
    if not isinstance(node, dict):
      return node
    return {rename(key): _renamed(value, names) for key, value in node.items()}

  return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, dict))


def _computed(state: Tree, layout: Layout) -> Tree:
  """A canonical state without the parts that a layout leaves out."""
  parts = {part.name for part in networks.parts(layout.canonical)}
  computed = [name for members in layout.members for name in members]
  return _replace_dictionaries(
      state, parts, lambda tree: {name: tree[name] for name in computed}
  )


def _replace_dictionaries(
    tree: Any, keys: set[str], replace: Callable[[Any], Any]
) -> Any:
  matches = lambda node: isinstance(node, dict) and node.keys() == keys
  return jax.tree.map(
      lambda node: replace(node) if matches(node) else node,
      tree,
      is_leaf=matches,
  )
