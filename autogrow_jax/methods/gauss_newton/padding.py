"""Widths rounded up, so that networks that grow seldom compile.

Everything is computed with padded widths. Weights, scales and biases of the
units beyond a width are zero. Such units write zero and nothing reads them;
their gradients and moments are zero, too, so training leaves them alone.
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

MULTIPLE = 8


def inner(architecture: Architecture) -> dict[str, int]:
  """Sizes of the axes that may grow."""
  fixed = networks.get(architecture.family).fixed_axes
  return {axis: n for axis, n in architecture.sizes if axis not in fixed}


@functools.lru_cache(maxsize=256)
def padded(architecture: Architecture) -> Architecture:
  """Rounds all widths up, to one of four to eight steps per doubling."""
  sizes = {}
  for axis, size in inner(architecture).items():
    step = max(MULTIPLE, 2 ** (size.bit_length() - 3))
    sizes[axis] = -(-size // step) * step
  return architecture.resized(sizes)


def pad(tree: Tree, architecture: Architecture) -> Tree:
  """Pads all leaves with zeros to the sizes of an architecture."""
  table = state_lib.axis_table(architecture)

  def of_leaf(path, leaf):
    axes = table.find(path)
    if axes is None or len(axes) != np.ndim(leaf):
      return leaf
    missing = [
        (0, table.sizes[axis.name] - size if axis else 0)
        for axis, size in zip(axes, leaf.shape, strict=True)
    ]
    return np.pad(leaf, missing)

  return axes_lib.map_with_names(of_leaf, tree)


def cut(leaf: Any, like: Any) -> np.ndarray:
  """Cuts the padding of a leaf off, to the shape of another."""
  return np.asarray(leaf)[tuple(map(slice, np.shape(like)))]


@dataclasses.dataclass(frozen=True)
class Whole:
  """A whole network that is computed with padded widths; see `view.Active`.

  Attributes:
    canonical: architecture without padding.
  """

  canonical: Architecture

  @property
  def computed(self) -> Architecture:
    return padded(self.canonical)

  @property
  def counts(self) -> Mapping[str, int]:
    return dict(self.canonical.sizes)

  @property
  def blocks(self) -> Mapping[str, bool]:
    return {}

  def take(self, state: Tree) -> Tree:
    return pad(state, self.computed)

  def put(self, computed: Tree, state: Tree) -> Tree:
    return jax.tree.map(cut, computed, state)


@dataclasses.dataclass(frozen=True)
class Execution(view.Plain):
  """Computes the whole network with padded widths."""

  def active(self, architecture: Architecture, memory: Tree) -> Whole:
    del memory
    return Whole(architecture)
