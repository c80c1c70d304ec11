"""Runs a chain of a network and records or replaces what its layers write.

The network's code needs no change: Linen's interceptors see every call. Runs
are in evaluation mode, where a norm is one fixed affine map per channel and no
example influences another.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import layers
from autogrow_jax import ops
from autogrow_jax.networks import base

Path = tuple[str, ...]
Change = Callable[[jax.Array], jax.Array]

SMALL = 2**18  # Elements of the largest array of a small program.

_KINDS = (
    layers.Conv,
    layers.DepthwiseConv,
    layers.Dense,
    layers.Norm,
    layers.Select,
)


def program(*static: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Decorates a function to be compiled, with static positions of arguments.

  On CPUs, programs of small arrays are compiled without optimisation: they run
  once or twice per batch, and compiling takes a third of the time.
  """

  def decorate(function):
    plain = jax.jit(function, static_argnums=static)
    quick = jax.jit(
        function, static_argnums=static,
        compiler_options={'xla_backend_optimization_level': 0},
    )

    @functools.wraps(function)
    def call(*arguments):
      leaves = jax.tree.leaves(
          [a for i, a in enumerate(arguments) if i not in static]
      )
      is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
      is_small = max(map(np.size, leaves)) < SMALL
      if is_traced or not is_small or jax.default_backend() != 'cpu':
        return plain(*arguments)
      return quick(*arguments)

    call.lower = plain.lower
    return call

  return decorate


@dataclasses.dataclass(frozen=True)
class Layer:
  """One call of a layer with weights.

  Attributes:
    path: (part, layer).
    kind: class of the layer: 'Conv', 'DepthwiseConv', 'Dense', 'Norm' or
      'Select'.
    stride: stride of a convolution, else 1.
    size: side of a convolution's kernel, else 1.
    epsilon: epsilon of a norm, else 0.
    source: path of the layer whose unchanged output it reads; None if another
      operation lies between.
    dilation: dilation of a convolution's kernel, else 1.
  """

  path: Path
  kind: str
  stride: int
  size: int
  epsilon: float
  source: Path | None
  dilation: int = 1

  def linear(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Applies the layer with another kernel and without bias.

    It has no forward mode, see `ops.conv`.
    """
    if self.kind in ('Conv', 'DepthwiseConv'):
      return ops.conv(x, kernel, self.stride, self._pad, self.dilation)
    return x.reshape(len(x), -1) @ kernel.reshape(-1, kernel.shape[-1])

  def transposed(
      self, dy: jax.Array, kernel: jax.Array, shape: tuple[int, ...]
  ) -> jax.Array:
    """Pulls an output gradient back to the layer's input.

    Args:
      dy: (batch, ..., out) gradient at the layer's output.
      kernel: kernel in the layer's shape.
      shape: (batch, ..., in), the input's shape.

    Returns:
      The gradient at the input.
    """
    if self.kind in ('Conv', 'DepthwiseConv'):
      return ops.conv_input_gradient(
          dy, kernel, shape, self.stride, self._pad, self.dilation
      )
    return (dy @ kernel.reshape(-1, kernel.shape[-1]).T).reshape(shape)

  def patches(self, x: jax.Array) -> jax.Array:
    """Returns the inputs of each output position, (batch, ..., taps, in)."""
    if self.kind != 'Conv':
      return x.reshape(len(x), -1, x.shape[-1])
    patches = lax.conv_general_dilated_patches(
        x,
        (self.size, self.size),
        (self.stride, self.stride),
        ((self._pad, self._pad),) * 2,
        rhs_dilation=(self.dilation, self.dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=lax.Precision.HIGHEST,
    )  # The input channel is the slowest of its features.
    patches = patches.reshape(*patches.shape[:-1], x.shape[-1], self.size**2)
    return patches.swapaxes(-1, -2)

  @property
  def _pad(self) -> int:
    return self.dilation * (self.size // 2)


@struct.dataclass
class Tapped:
  """Everything that a run recorded.

  Attributes:
    output: output of the chain.
    entered: input of each part.
    inputs: input of each layer.
    outputs: output of each layer, changes included.
  """

  output: jax.Array
  entered: dict[str, jax.Array]
  inputs: dict[Path, jax.Array]
  outputs: dict[Path, jax.Array]


def run(
    chain: Iterable[base.Segment],
    weights: base.Tree,
    stats: base.Tree,
    x: jax.Array,
    *,
    changes: Mapping[Path, Change] | None = None,
    on_layer: Callable[..., None] | None = None,
    train: bool | jax.Array = False,
) -> Tapped:
  """Runs a chain.

  Args:
    chain: unfused segments, of a whole network or a piece of it.
    weights: `{part: parameters}`.
    stats: `{part: statistics}`.
    x: input of the chain.
    changes: per layer, a function that replaces its output.
    on_layer: callback with (path, module, input, output) of each layer.
    train: whether norms use statistics of the batch; may be traced.

  Returns:
    The recorded arrays.
  """
  changes = changes or {}
  entered, inputs, outputs = {}, {}, {}
  part = ''

  def tap(call, args, kwargs, context):
    y = call(*args, **kwargs)
    if context.method_name != '__call__' or not isinstance(
        context.module, _KINDS
    ):
      return y
    path = (part, *context.module.path)
    if path in changes:
      y = changes[path](y)
    inputs[path], outputs[path] = args[0], y
    if on_layer is not None:
      on_layer(path, context.module, args[0], y)
    return y

  with nn.intercept_methods(tap):
    for segment in chain:
      if segment.length is not None:
        raise ValueError(f'Segment {segment.key!r} is fused; taps need parts.')
      part = segment.key
      entered[part] = x
      x, _ = base.apply((segment,), weights, stats, x, train=train)
  return Tapped(x, entered, inputs, outputs)


def chain_of(parts: Iterable[base.Part]) -> tuple[base.Segment, ...]:
  """Returns the unfused chain, one segment per part."""
  return tuple(base.Segment(part.name, part.module, None) for part in parts)


@functools.lru_cache(maxsize=256)
def layers_of(parts: tuple[base.Part, ...]) -> tuple[Layer, ...]:
  """Lists all layers that a chain of parts calls, in forward order."""
  found = []
  writers = {}  # Keyed by the identity of their outputs.

  def add(path, module, x, y):
    found.append(
        Layer(
            path=path,
            kind=type(module).__name__,
            stride=getattr(module, 'stride', 1),
            size=getattr(module, 'size', 1),
            epsilon=getattr(module, 'epsilon', 0.0),
            source=writers.get(id(x), (None,))[0],
            dilation=getattr(module, 'dilation', 1),
        )
    )
    writers[id(y)] = path, y  # Holding y keeps its identity unique.

  def trace(trees, x):
    weights, stats = ({n: t[i] for n, t in trees.items()} for i in range(2))
    return run(chain_of(parts), weights, stats, x, on_layer=add).output

  jax.eval_shape(
      trace,
      {part.name: base.shapes(part) for part in parts},
      jax.ShapeDtypeStruct((1, *parts[0].input_shape), jnp.float32),
  )
  return tuple(found)
