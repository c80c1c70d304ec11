"""The execution view: how a canonical state is laid out on the devices.

`pack` stacks runs of identical blocks; `unpack` is its inverse, bit for bit.
Compiled programs depend on the `Bucket` alone, not on block names.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture
Bucket = tuple[base.Segment, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the parts of an architecture are in the packed trees.

  Attributes:
    architecture: whose parts they are.
    bucket: the chain to execute; equal buckets share compiled programs.
    members: per segment, the names of its parts.
  """

  architecture: Architecture
  bucket: Bucket
  members: tuple[tuple[str, ...], ...]


@functools.lru_cache(maxsize=256)
def layout(architecture: Architecture, *, fuse: bool = True) -> Layout:
  """The layout of an architecture; `fuse=False` is the exact reference."""
  pairs = base.segments(
      architecture, networks.parts(architecture), fuse=fuse
  )
  return Layout(
      architecture,
      tuple(segment for segment, _ in pairs),
      tuple(members for _, members in pairs),
  )


def pack(
    tree: Any, layout: Layout, *, stack: Callable[..., Any] = np.stack
) -> Any:
  """Stacks the parts of fused segments, anywhere in a tree of arrays.

  Every dictionary whose keys are exactly the parts of the network is replaced
  by one whose keys are the segments': weights, statistics, moments, gradients.

  Args:
    tree: any tree.
    layout: of its architecture.
    stack: how arrays are stacked; `jnp.stack` inside jit.

  Returns:
    The packed tree.
  """
  parts = {name for members in layout.members for name in members}

  def stack_runs(tree):
    return {
        segment.key: tree[members[0]]
        if segment.length is None
        else jax.tree.map(
            lambda *leaves: stack(leaves), *[tree[name] for name in members]
        )
        for segment, members in zip(
            layout.bucket, layout.members, strict=True
        )
    }

  return _replace_dictionaries(tree, parts, stack_runs)


def unpack(tree: Any, layout: Layout) -> Any:
  """The inverse of `pack`."""
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


def _replace_dictionaries(
    tree: Any, keys: set[str], replace: Callable[[Any], Any]
) -> Any:
  matches = lambda node: isinstance(node, dict) and node.keys() == keys
  return jax.tree.map(
      lambda node: replace(node) if matches(node) else node,
      tree,
      is_leaf=matches,
  )
