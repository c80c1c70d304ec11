"""Parameters, multiply-adds and activation bytes of an architecture.

Multiply-adds are those of convolutions, dense and recurrent layers, one per
weight and output position; norms, pooling, embeddings and parameter-free
shortcuts count nothing. What is said of an image is meant of a token of text.
Every count is a sum of products of axis sizes, so that `counts` may be sizes,
numbers of active units, or traced expected numbers, which are differentiable.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, Self

from flax import linen as nn
import jax
import jax.numpy as jnp

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax import networks
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture

# Layers whose kernels are multiplied once for each output position.
_WEIGHTED = (layers.Conv, layers.DepthwiseConv, layers.Dense, layers.LSTM)

# Gradients with respect to the input and to the kernel cost a forward pass
# each.
BACKWARD_OVER_FORWARD = 2


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter array in cost terms.

  Attributes:
    path: (part, layer, leaf).
    shape: its shape.
    axes: names of its axes, None where a dimension has none.
    positions: output positions per image at which it is multiplied; 0 for
      biases and norms.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  positions: int

  def size(self, counts: Mapping[str, Any]) -> Any:
    """Number of entries, with the counts in place of the axis sizes."""
    return math.prod(
        counts.get(axis, size) if axis else size
        for axis, size in zip(self.axes, self.shape, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer of a network, for tables.

  Attributes:
    name: 'part/layer'.
    kind: class of the layer.
    output_shape: per image.
    params: number of parameters.
    macs: multiply-adds per image.
  """

  name: str
  kind: str
  output_shape: tuple[int, ...]
  params: int
  macs: int


@dataclasses.dataclass(frozen=True)
class Ledger:
  """What a run has spent so far.

  Attributes:
    forward_macs: multiply-adds of forward passes in training.
    backward_macs: of backward passes.
    eval_macs: of evaluations, receipts included.
    wall_seconds: time in `run`, over all restarts.
    compile_seconds: tracing and compiling of steps and evaluations, some of
      it while the network trains.
    compile_count: number of these compilations.
  """

  forward_macs: int = 0
  backward_macs: int = 0
  eval_macs: int = 0
  wall_seconds: float = 0.0
  compile_seconds: float = 0.0
  compile_count: int = 0

  @property
  def train_macs(self) -> int:
    """Multiply-adds of training, forward and backward."""
    return self.forward_macs + self.backward_macs

  def trained(self, macs: int, images: int) -> Self:
    """Adds training steps on a number of images."""
    return dataclasses.replace(
        self,
        forward_macs=self.forward_macs + macs * images,
        backward_macs=(
            self.backward_macs + BACKWARD_OVER_FORWARD * macs * images
        ),
    )

  def evaluated(self, macs: int, images: int) -> Self:
    """Adds forward passes outside training."""
    return dataclasses.replace(self, eval_macs=self.eval_macs + macs * images)

  def compiled(self, seconds: float, count: int = 1) -> Self:
    """Adds compilations."""
    return dataclasses.replace(
        self,
        compile_seconds=self.compile_seconds + seconds,
        compile_count=self.compile_count + count,
    )

  def elapsed(self, seconds: float) -> Self:
    """Adds wall time."""
    return dataclasses.replace(self, wall_seconds=self.wall_seconds + seconds)


def params(
    architecture: Architecture,
    counts: Mapping[str, Any] | None = None,
    present: Mapping[str, Any] | None = None,
) -> Any:
  """Number of parameters.

  Args:
    architecture: the architecture.
    counts: per axis, what to use in place of its size; may be traced.
    present: per block, 1 or 0 for one that does not count, or the probability
      that it does; may be traced.

  Returns:
    An int, or what arithmetic on the counts gives.
  """
  return sum(
      leaf.size(counts or {}) * (present or {}).get(leaf.path[0], 1)
      for leaf in leaves(architecture)
  )


def macs(
    architecture: Architecture,
    counts: Mapping[str, Any] | None = None,
    present: Mapping[str, Any] | None = None,
) -> Any:
  """Multiply-adds of one image's forward pass; see `params`."""
  return sum(
      leaf.positions
      * leaf.size(counts or {})
      * (present or {}).get(leaf.path[0], 1)
      for leaf in leaves(architecture)
      if leaf.positions
  )


def savings(full: int, spent: Sequence[int]) -> float:
  """Training cost of the full network over that of a run of smaller ones.

  Args:
    full: multiply-adds of the full network.
    spent: of what was trained in each of equally long epochs.

  Returns:
    The ratio, for as many epochs.
  """
  return len(spent) * full / sum(spent)


@functools.lru_cache(maxsize=256)
def leaves(architecture: Architecture) -> tuple[Leaf, ...]:
  """All parameter arrays with axes and positions, in forward order."""
  result = []
  for part in networks.parts(architecture):
    names = base.axes(part)
    weights, _ = base.shapes(part)
    positions = {
        record.path: record.positions
        for record in _records(part.module, part.input_shape)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
      path = tuple(entry.key for entry in path)
      _, axes = names[part.name, *path]
      result.append(
          Leaf(
              (part.name, *path),
              leaf.shape,
              tuple(axis and axis.name for axis in axes),
              positions.get(path[:-1], 0) if path[-1].endswith('kernel') else 0,
          )
      )
  return tuple(result)


def table(architecture: Architecture) -> tuple[Layer, ...]:
  """All layers in forward order."""
  by_layer: dict[tuple[str, ...], list[Leaf]] = {}
  for leaf in leaves(architecture):
    by_layer.setdefault(leaf.path[:-1], []).append(leaf)
  result = []
  for part in networks.parts(architecture):
    for record in _records(part.module, part.input_shape):
      own = by_layer.get((part.name, *record.path), [])
      result.append(
          Layer(
              '/'.join((part.name, *record.path)),
              record.kind,
              record.output_shape,
              sum(leaf.size({}) for leaf in own),
              sum(leaf.positions * leaf.size({}) for leaf in own),
          )
      )
  return tuple(result)


def activation_bytes(architecture: Architecture, *, itemsize: int = 4) -> int:
  """Bytes of one image's layer outputs, which a training step keeps."""
  return itemsize * sum(
      math.prod(layer.output_shape) for layer in table(architecture)
  )


def layers_of(architecture: Architecture) -> int:
  """Number of layers by the papers' convention (no projections, no norms)."""
  return networks.get(architecture.family).layers(architecture.depths)


@dataclasses.dataclass(frozen=True)
class _Record:
  path: tuple[str, ...]
  kind: str
  output_shape: tuple[int, ...]
  positions: int


@functools.lru_cache(maxsize=None)
def _records(
    module: base.Module, input_shape: tuple[int, ...]
) -> tuple[_Record, ...]:
  """The layers that a module calls, found by tracing it once."""
  records = []

  def record(call, args, kwargs, context):
    output = call(*args, **kwargs)
    kinds = (*_WEIGHTED, layers.Norm, layers.Select, layers.Embedding)
    if context.method_name == '__call__' and isinstance(context.module, kinds):
      # Of an LSTM the state follows its output.
      shape = jax.tree.leaves(output)[0].shape[1:]
      weighted = isinstance(context.module, _WEIGHTED)
      records.append(
          _Record(
              tuple(context.module.path),
              type(context.module).__name__,
              shape,
              math.prod(shape[:-1]) if weighted else 0,
          )
      )
    return output

  def trace():
    with nn.intercept_methods(record):
      return module.init_with_output(
          jax.random.key(0), jnp.zeros((1, *input_shape)), train=False
      )

  jax.eval_shape(trace)
  return tuple(records)
