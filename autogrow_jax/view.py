"""The execution view: how a canonical state is laid out on the devices.

`pack` stacks runs of identical blocks; `unpack` is its inverse, bit for bit.
Compiled programs depend on the `Bucket` alone, not on block names. A layout
with `spare` room stacks runs to a capacity, and then `Layout.depths` are an
argument of programs, so that a run that grows needs a new one only where it
outgrows its capacity.

An `Execution` says how a method is computed: the whole network as it is
(`Plain`), or under gates, or only a part of it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

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


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the parts of an architecture are in the packed trees.

  Attributes:
    architecture: whose parts they are.
    bucket: the chain to execute; equal buckets share compiled programs.
    members: per segment, the names of its parts.
    canonical: architecture of the canonical state; a larger one where only a
      part of it is computed.
    spare: True if runs that may grow are stacked to a capacity.
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
    computed: Architecture | None = None,
    remat: frozenset[int] = frozenset(),
) -> Layout:
  """The layout of an architecture.

  Args:
    architecture: architecture of the canonical state.
    fuse: True to stack equal blocks; False is the exact reference.
    spare: True for stacks with room for more blocks.
    computed: architecture of the part that is computed; None for all.
    remat: stages computed again in the backward pass, likewise.

  Returns:
    The layout.
  """
  found = _layout(computed or architecture, fuse, spare, remat)
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
    layout: layout of its architecture.
    stack: function that stacks arrays; `jnp.stack` inside jit.

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

  return replace_dictionaries(tree, parts, stack_runs)


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
        'every exact one with --devices.depth_buckets=exact.'
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

  return replace_dictionaries(tree, keys, unstack)


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


def replace_dictionaries(
    tree: Any, keys: set[str], replace: Callable[[Any], Any]
) -> Any:
  """Replaces every dictionary in a tree that has exactly these keys."""
  matches = lambda node: isinstance(node, dict) and node.keys() == keys
  return jax.tree.map(
      lambda node: replace(node) if matches(node) else node,
      tree,
      is_leaf=matches,
  )


class Active(Protocol):
  """The part of a network that is computed, as its method has chosen it.

  Attributes:
    computed: architecture that programs are compiled for.
    counts: number of active units per axis, for `costs`.
    blocks: True for each block that may be missing and is active, for `costs`.
  """

  @property
  def computed(self) -> Architecture:
    ...

  @property
  def counts(self) -> Mapping[str, int]:
    ...

  @property
  def blocks(self) -> Mapping[str, bool]:
    ...

  def take(self, state: Tree) -> Tree:
    """Returns the state of `computed` that a canonical state holds."""
    ...

  def put(self, computed: Tree, state: Tree) -> Tree:
    """Returns a canonical state with what training changed put back.

    Args:
      computed: a state of `computed`.
      state: the canonical state that it was taken from.

    Returns:
      The canonical state. Everything inactive is that of `state`, bit for bit.
    """
    ...


class Gated(NamedTuple):
  """The network that packed parameters stand for.

  Attributes:
    weights: packed weights.
    stats: packed network statistics.
    gates: gates of blocks, see `networks.base.apply`.
  """

  weights: Tree
  stats: Tree
  gates: Tree | None = None


class Execution(Protocol):
  """How a method is computed.

  Attributes:
    spare: True for stacks with room for more blocks while the network grows, so
      that growths seldom compile. Nothing inside jit can then unpack a tree.
  """

  @property
  def spare(self) -> bool:
    ...

  def active(
      self, architecture: Architecture, memory: Tree
  ) -> Active | None:
    """Returns the part that is computed; None for the whole network.

    Args:
      architecture: architecture of the canonical state.
      memory: the method's other leaves.
    """
    ...

  def gated(self, layout: Layout, params: Tree, stats: Tree) -> Gated:
    """Returns the network that packed parameters stand for; runs inside jit."""
    ...

  def applied(
      self, architecture: Architecture, updates: Tree, stats: Tree
  ) -> Tree:
    """Filters the optimizer's updates before they are applied, inside jit.

    Args:
      architecture: architecture of the canonical state.
      updates: {'weights', 'aux'}, packed.
      stats: {'network', 'method'} that the step began with, packed.

    Returns:
      What is added to the parameters.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Plain:
  """Computes the whole network as it is.

  Attributes:
    spare: True for stacks with room for more blocks.
  """

  spare: bool = False

  def active(self, architecture: Architecture, memory: Tree) -> None:
    del architecture, memory

  def gated(self, layout: Layout, params: Tree, stats: Tree) -> Gated:
    del layout
    return Gated(params['weights'], stats['network'])

  def applied(
      self, architecture: Architecture, updates: Tree, stats: Tree
  ) -> Tree:
    del architecture, stats
    return updates
