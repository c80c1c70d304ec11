"""Parameters, multiply-adds and activation bytes of an architecture.

Multiply-adds are those of convolutions, dense and recurrent layers, one per
weight and output position; norms, pooling, embeddings and parameter-free
shortcuts count nothing. For text, read "token" for "image". Every count is a
sum of products of axis sizes, so that `counts` may be sizes, numbers of active
units, or traced expected numbers, which are differentiable.
"""

import collections
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

# The gradients by the input and by the kernel cost a forward pass each.
BACKWARD_OVER_FORWARD = 2


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter array in terms of costs.

  Attributes:
    path: (part, layer, leaf).
    shape: shape of the array.
    axes: names of its axes, None where a dimension has none.
    positions: output positions per image at which it is multiplied; 0 for
      biases and norms.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  positions: int

  def size(self, counts: Mapping[str, Any]) -> Any:
    """Number of entries, with counts in place of the axes' sizes."""
    return math.prod(
        counts.get(axis, size) if axis else size
        for axis, size in zip(self.axes, self.shape, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Row:
  """One layer in the table of a network.

  Attributes:
    name: 'part/layer'.
    kind: class of the layer.
    output_shape: shape of the output for one image.
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
  """Cost of a run so far.

  Attributes:
    forward_macs: multiply-adds of forward passes in training.
    backward_macs: multiply-adds of backward passes.
    eval_macs: multiply-adds of evaluations, receipts included.
    wall_seconds: seconds in `run`, over all restarts.
    compile_seconds: seconds of tracing and compiling steps and evaluations,
      partly in the background.
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
    forward = macs * images
    return self._plus(
        forward_macs=forward, backward_macs=BACKWARD_OVER_FORWARD * forward
    )

  def evaluated(self, macs: int, images: int) -> Self:
    """Adds forward passes outside training."""
    return self._plus(eval_macs=macs * images)

  def compiled(self, seconds: float, count: int = 1) -> Self:
    """Adds compilations."""
    return self._plus(compile_seconds=seconds, compile_count=count)

  def elapsed(self, seconds: float) -> Self:
    """Adds wall time."""
    return self._plus(wall_seconds=seconds)

  def _plus(self, **costs: Any) -> Self:
    sums = {name: getattr(self, name) + cost for name, cost in costs.items()}
    return dataclasses.replace(self, **sums)


def params(
    architecture: Architecture,
    counts: Mapping[str, Any] | None = None,
    present: Mapping[str, Any] | None = None,
) -> Any:
  """Number of parameters.

  Args:
    architecture: the architecture.
    counts: numbers by axis in place of the sizes; may be traced.
    present: weights by block, 1 by default and 0 for a block that does not
      count; may be probabilities, and traced.

  Returns:
    An int, or the type that arithmetic on counts and weights gives.
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
  """Training cost of the full network over the cost of smaller ones.

  Args:
    full: multiply-adds of the full network.
    spent: multiply-adds of the network of each epoch.

  Returns:
    The ratio over as many epochs of equal length.
  """
  return len(spent) * full / sum(spent)


@functools.lru_cache(maxsize=256)
def leaves(architecture: Architecture) -> tuple[Leaf, ...]:
  """All parameter arrays with axes and positions, in forward order."""
  result = []
  for part in networks.parts(architecture):
    axes, calls = base.axes(part), _calls(part.module, part.input_shape)
    weights, _ = base.shapes(part)
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
      *layer, name = (entry.key for entry in path)
      kind, shape = calls.get(tuple(layer), (nn.Module, ()))
      is_multiplied = name.endswith('kernel') and issubclass(kind, _WEIGHTED)
      path = (part.name, *layer, name)
      result.append(
          Leaf(
              path,
              leaf.shape,
              tuple(axis and axis.name for axis in axes[path][1]),
              math.prod(shape[:-1]) if is_multiplied else 0,
          )
      )
  return tuple(result)


def table(architecture: Architecture) -> tuple[Row, ...]:
  """All layers in forward order."""
  arrays = collections.defaultdict(list)
  for leaf in leaves(architecture):
    arrays[leaf.path[:-1]].append(leaf)
  result = []
  for part in networks.parts(architecture):
    calls = _calls(part.module, part.input_shape)
    for layer, (kind, shape) in calls.items():
      path = (part.name, *layer)
      sizes = [(leaf.size({}), leaf.positions) for leaf in arrays[path]]
      params = sum(size for size, _ in sizes)
      macs = sum(size * positions for size, positions in sizes)
      result.append(Row('/'.join(path), kind.__name__, shape, params, macs))
  return tuple(result)


def activation_bytes(architecture: Architecture) -> int:
  """Bytes of one image's layer outputs in float32."""
  return 4 * sum(math.prod(row.output_shape) for row in table(architecture))


def layers_of(architecture: Architecture) -> int:
  """Number of layers by the papers' convention (no projections, no norms)."""
  return networks.get(architecture.family).layers(architecture.depths)


@functools.lru_cache(maxsize=None)
def _calls(
    module: base.Module, input_shape: tuple[int, ...]
) -> dict[tuple[str, ...], tuple[type[nn.Module], tuple[int, ...]]]:
  """Layers that a module calls, by path: class and output shape per image."""
  found = {}

  def record(call, args, kwargs, context):
    output = call(*args, **kwargs)
    kinds = (*_WEIGHTED, layers.Norm, layers.Select, layers.Embedding)
    if context.method_name == '__call__' and isinstance(context.module, kinds):
      # The first output of an LSTM; its state follows.
      shape = jax.tree.leaves(output)[0].shape[1:]
      found[tuple(context.module.path)] = type(context.module), shape
    return output

  def trace():
    with nn.intercept_methods(record):
      return module.init_with_output(
          jax.random.key(0), jnp.zeros((1, *input_shape)), train=False
      )

  jax.eval_shape(trace)
  return found
