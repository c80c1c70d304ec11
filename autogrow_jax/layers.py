"""Layers whose parameters know the names and roles of their axes.

Shapes: images are (batch, height, width, channel), kernels (height, width,
input channel, output channel). The compute type is that of the input; weights
are cast to it, statistics and their reductions are always float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import struct
from flax.core import meta
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax.core import axes as axes_lib

Axes = axes_lib.Axes
Axis = axes_lib.Axis
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@struct.dataclass
class Named(meta.AxisMetadata[Any]):
  """A leaf together with its axes, as Linen's `init` returns it."""

  value: Any
  axes: Axes = struct.field(pytree_node=False)

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, val: Any) -> 'Named':
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> 'Named':
    del params
    return self.replace(axes=(*self.axes[:index], None, *self.axes[index:]))

  def remove_axis(self, index: int, params: dict[Any, Any]) -> 'Named':
    del params
    return self.replace(axes=(*self.axes[:index], *self.axes[index + 1 :]))


def named(init: Initializer, axes: Axes) -> Callable[..., Named]:
  """Attaches axes to what an initializer returns."""
  return lambda *args: Named(init(*args), axes)


# Wen et al. 2020 start small-image networks from the default of their time,
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), and ImageNet networks from
# N(0, 2/fan_out).
KERNEL_INITS = {
    'small': nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
    'imagenet': nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
}
SCALE_INITS = {
    'ones': nn.initializers.ones,
    'uniform01': nn.initializers.uniform(1.0),
}


class Conv(nn.Module):
  """Convolution padded symmetrically as in PyTorch.

  Attributes:
    features: number of output channels.
    size: side of the square kernel.
    stride: of both dimensions; centres are sampled at 0, stride, ...
    reads: local name of the input axis.
    writes: local name of the output axis.
    init_scheme: key of `KERNEL_INITS`.
    plain: use XLA's own derivative (which has a forward mode, too) instead of
      `conv`'s.
    bias: add a vector that starts at zero. A norm behind it takes it away again
      while training; some published networks, and their sizes, have it.
    dilation: distance between neighbouring taps of the kernel, pixels.
  """

  features: int
  size: int
  stride: int = 1
  reads: str = 'in'
  writes: str = 'out'
  init_scheme: str = 'small'
  plain: bool = False
  bias: bool = False
  dilation: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    out = Axis(self.writes, 'writes')
    axes = (None, None, Axis(self.reads, 'reads'), out)
    shape = (self.size, self.size, x.shape[-1], self.features)
    init = KERNEL_INITS[self.init_scheme]
    kernel = self.param('kernel', named(init, axes), shape)
    apply = plain_conv if self.plain else conv
    pad = self.dilation * (self.size // 2)
    y = apply(x, kernel.astype(x.dtype), self.stride, pad, self.dilation)
    if not self.bias:
      return y
    bias = self.param(
        'bias', named(nn.initializers.zeros, (out,)), (self.features,)
    )
    return y + bias[None, None, None].astype(y.dtype)


class DepthwiseConv(nn.Module):
  """Convolution of every channel on its own, padded as `Conv`; no bias.

  Its kernel both reads and writes the one axis. A gate on that axis is the
  business of the reader behind it.

  Attributes:
    size: side of the square kernel.
    stride: of both dimensions.
    keeps: local name of the channel axis.
    init_scheme: key of `KERNEL_INITS`.
    plain: see `Conv`.
  """

  size: int
  stride: int = 1
  keeps: str = 'in'
  init_scheme: str = 'small'
  plain: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    axes = (None, None, None, Axis(self.keeps, 'both'))
    shape = (self.size, self.size, 1, x.shape[-1])
    init = KERNEL_INITS[self.init_scheme]
    kernel = self.param('kernel', named(init, axes), shape)
    apply = plain_conv if self.plain else conv
    return apply(x, kernel.astype(x.dtype), self.stride, self.size // 2)


class Norm(nn.Module):
  """Batch normalisation with the papers' constants.

  Running statistics move by a tenth per step and use the biased variance.
  Unlike the paper, whose framework stores the unbiased one.

  Attributes:
    writes: local name of the channel axis.
    scale_init: key of `SCALE_INITS`.
    momentum: of the running statistics.
    epsilon: added to the variance.
  """

  writes: str = 'out'
  scale_init: str = 'ones'
  momentum: float = 0.9
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool | jax.Array) -> jax.Array:
    shape = (x.shape[-1],)
    axes = (Axis(self.writes, 'writes'),)
    along = (Axis(self.writes, 'neither'),)
    scale = self.param(
        'scale', named(SCALE_INITS[self.scale_init], axes), shape
    )
    bias = self.param('bias', named(nn.initializers.zeros, axes), shape)
    running_mean = self.variable(
        'stats', 'mean', named(jnp.zeros, along), shape, jnp.float32
    )
    running_var = self.variable(
        'stats', 'var', named(jnp.ones, along), shape, jnp.float32
    )
    mean, var = running_mean.value, running_var.value
    # A traced `train` computes both and selects: one program serves both.
    if train is not False and not self.is_initializing():
      x32 = widened(x)
      dims = tuple(range(x.ndim - 1))
      batch_mean = jnp.mean(x32, dims)
      # Of jnp.square loops would keep 2 * x32, besides x, for the gradient.
      batch_var = jnp.maximum(
          jnp.mean(x32 * x32, dims) - batch_mean * batch_mean, 0.0
      )
      if train is True:
        keep = self.momentum
      else:
        keep = jnp.where(train, self.momentum, 1.0)
      running_mean.value = keep * mean + (1 - keep) * batch_mean
      running_var.value = keep * var + (1 - keep) * batch_var
      if train is True:
        mean, var = batch_mean, batch_var
      else:
        mean = jnp.where(train, batch_mean, mean)
        var = jnp.where(train, batch_var, var)
    factor = scale * lax.rsqrt(var + self.epsilon)
    shift = bias - mean * factor
    channels = (1,) * (x.ndim - 1) + shape
    y = widened(x) * factor.reshape(channels)
    return (y + shift.reshape(channels)).astype(x.dtype)


class Dense(nn.Module):
  """Matrix product with bias, `widened`; both start as U(+-bound).

  All dimensions of the input but the batch are summed over. The kernel of an
  image keeps them apart, (height, width, in, out), and so has its channel axis.

  Attributes:
    features: number of output units.
    reads: local name of the input axis.
    writes: local name of the output axis.
    bound: of the start; None for 1/sqrt(fan_in).
  """

  features: int
  reads: str = 'in'
  writes: str = 'out'
  bound: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs = x.shape[1:]
    init = uniform(self.bound or 1 / np.sqrt(np.prod(inputs)))
    out = Axis(self.writes, 'writes')
    axes = (*(None,) * (len(inputs) - 1), Axis(self.reads, 'reads'), out)
    kernel = self.param(
        'kernel', named(init, axes), (*inputs, self.features)
    )
    bias = self.param('bias', named(init, (out,)), (self.features,))
    x = widened(x).reshape(len(x), -1)
    return x @ kernel.reshape(-1, self.features) + bias[None]


class Embedding(nn.Module):
  """A row of a table for every token.

  Attributes:
    rows: number of tokens that there are.
    features: length of a row.
    bound: entries start as U(+-bound).
    writes: local name of the output axis.
  """

  rows: int
  features: int
  bound: float
  writes: str = 'out'

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """(batch, step) whole numbers -> (batch, step, features)."""
    axes = (None, Axis(self.writes, 'writes'))
    init = named(uniform(self.bound), axes)
    table = self.param('table', init, (self.rows, self.features))
    return table[tokens.astype(jnp.int32)]


class LSTM(nn.Module):
  """A layer of long short-term memory, from one state to the next.

  The kernels hold, side by side, those of the input, the forget and the output
  gate and of the candidate: (in, 4, out) and, for what the layer itself put
  out a step before, (out, 4, out). A gate on the axis of the units multiplies
  the rows that read their outputs, here and behind; the cells have none.

  Attributes:
    features: number of units.
    bound: kernels and bias start as U(+-bound).
    reads: local name of the input axis.
    writes: local name of the axis of the units.
  """

  features: int
  bound: float
  reads: str = 'in'
  writes: str = 'out'

  @nn.compact
  def __call__(
      self, x: jax.Array, state: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Runs over a window.

    Args:
      x: (batch, step, in).
      state: outputs and cells (batch, features) before the first step.

    Returns:
      The outputs (batch, step, features), and the state after the last step.
    """
    units = self.features
    init, out = uniform(self.bound), Axis(self.writes, 'writes')
    kernel = self.param(
        'kernel',
        named(init, (Axis(self.reads, 'reads'), None, out)),
        (x.shape[-1], 4, units),
    )
    recurrent = self.param(
        'recurrent_kernel',
        named(init, (Axis(self.writes, 'reads'), None, out)),
        (units, 4, units),
    ).reshape(units, 4 * units)
    bias = self.param('bias', named(init, (None, out)), (4, units))
    # All inputs in one product, and only the recurrence step by step.
    inputs = jnp.swapaxes(x, 0, 1) @ kernel.reshape(-1, 4 * units)
    inputs = inputs + bias.reshape(1, 1, -1)

    def step(state, inputs):
      output, cell = state
      gates = inputs + output @ recurrent
      enter, keep, leave, candidate = jnp.split(gates, 4, -1)
      cell = nn.sigmoid(keep) * cell + nn.sigmoid(enter) * jnp.tanh(candidate)
      output = nn.sigmoid(leave) * jnp.tanh(cell)
      return (output, cell), output

    state, outputs = lax.scan(step, state, inputs)
    return jnp.swapaxes(outputs, 0, 1), state


class Select(nn.Module):
  """Option A shortcut of He et al.: subsamples and pads with zero channels.

  The frozen selection matrix among the statistics is a reader like any kernel,
  so gates and index maps reach it; it is no parameter and costs nothing.
  """

  features: int
  stride: int
  reads: str = 'in'
  writes: str = 'out'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    axes = (Axis(self.reads, 'reads'), Axis(self.writes, 'writes'))
    pad = max(0, self.features - x.shape[-1]) // 2
    select = self.variable(
        'stats',
        'select',
        named(lambda *shape: jnp.eye(*shape, k=pad), axes),
        x.shape[-1],
        self.features,
    )
    return x[:, :: self.stride, :: self.stride] @ select.value.astype(x.dtype)


def uniform(bound: float) -> Initializer:
  """Draws from U(+-bound)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def widened(x: jax.Array) -> jax.Array:
  """In float32; float64, which only checks of derivatives use, stays."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def max_pool(x: jax.Array) -> jax.Array:
  """3x3 maximum at stride 2 over the input padded by one with -infinity."""
  return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def halve(x: jax.Array) -> jax.Array:
  """2x2 maximum at stride 2; odd sides are rounded up, so that none vanishes.

  The result and its derivatives are those of `nn.max_pool`, whose gradient
  takes 15 to 30 times as long on CPUs (64 against 2 to 4 ms for 64 images of
  28x28 with 32 channels).

  Args:
    x: (batch, height, width, channel).

  Returns:
    (batch, height / 2, width / 2, channel), rounded up; of windows with a NaN
    it is NaN.
  """
  height, width = x.shape[1:3]
  pads = (0, 0), (0, height % 2), (0, width % 2), (0, 0)
  return _halved(jnp.pad(x, pads, constant_values=-jnp.inf))


@jax.custom_jvp
def _halved(x):
  return _largest(x)[0]


@_halved.defjvp
def _halved_derivative(primals, tangents):
  (x,), (tangent,) = primals, tangents
  y, chosen = _largest(x)
  # A select and a sum, whose transpose is one select over all of x, and not a
  # pass for each of the four places.
  places = np.arange(4).reshape(1, 1, 2, 1, 2, 1)
  is_chosen = chosen[:, :, None, :, None] == places
  return y, jnp.where(is_chosen, _windows(tangent), 0).sum((2, 4))


def _largest(x):
  """Maxima of 2x2 windows, and of each the first place that has it, 0 to 3."""
  windows = _windows(x)
  y, chosen = windows[:, :, 0, :, 0], 0
  for place in (1, 2, 3):
    other = windows[:, :, place // 2, :, place % 2]
    is_larger = (other > y) | jnp.isnan(other)
    y = jnp.where(is_larger, other, y)
    chosen = jnp.where(is_larger, jnp.uint8(place), chosen)
  return y, chosen


def _windows(x):
  """(batch, height / 2, 2, width / 2, 2, channel)."""
  batch, height, width, channels = x.shape
  return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


def plain_conv(
    x: jax.Array, kernel: jax.Array, stride: int, pad: int, dilation: int = 1
) -> jax.Array:
  """Convolution as XLA has it; depthwise if the kernel has one input."""
  if pad and math.prod(kernel.shape[:2]) > math.prod(x.shape[1:3]):
    # XLA swaps image and kernel where the kernel is larger, and CPUs do that on
    # a slow generic path: 2400 against 84 ms for (64, 2, 2, 512) and 3x3.
    pads = (0, 0), (pad, pad), (pad, pad), (0, 0)
    x, pad = lax.optimization_barrier(jnp.pad(x, pads)), 0
  return lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      ((pad, pad), (pad, pad)),
      rhs_dilation=(dilation, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=x.shape[-1] // kernel.shape[2],
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(
    x: jax.Array, kernel: jax.Array, stride: int, pad: int, dilation: int = 1
) -> jax.Array:
  """`plain_conv` with derivatives that stay fast inside loops on CPUs.

  XLA:CPU runs the gradients that autodiff produces on a slow generic path
  inside any loop (30 to 160 times slower than outside for the kernel's, 4 to 15
  times for the input's). Written as convolutions with explicit transposes they
  are as fast inside as outside. Strided ones keep the input's gradient of
  autodiff, which is faster outside; no loop over blocks contains one, but one
  over steps does. There is no forward mode: use `plain_conv` for `jax.jvp`.

  Args:
    x: (batch, height, width, in).
    kernel: (size, size, in, out), or depthwise (size, size, 1, in).
    stride: of both dimensions.
    pad: zeros on each side of both dimensions.
    dilation: distance between neighbouring taps of the kernel.

  Returns:
    (batch, out height, out width, out).
  """
  return plain_conv(x, kernel, stride, pad, dilation)


def _conv_forward(x, kernel, stride, pad, dilation):
  return plain_conv(x, kernel, stride, pad, dilation), (x, kernel)


def _conv_backward(stride, pad, dilation, residuals, dy):
  x, kernel = residuals
  how = stride, pad, dilation
  return (
      conv_input_gradient(dy, kernel, x.shape, *how),
      _kernel_gradient(x, dy, kernel, *how),
  )


conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def conv_input_gradient(
    dy: jax.Array,
    kernel: jax.Array,
    shape: tuple[int, ...],
    stride: int,
    pad: int,
    dilation: int = 1,
) -> jax.Array:
  """The gradient of `conv` by its input, linear in both arguments.

  Args:
    dy: (batch, out height, out width, out), by what it gives.
    kernel: of the convolution.
    shape: (batch, height, width, in) of the input.
    stride: of the convolution.
    pad: of it.
    dilation: of it.

  Returns:
    An array of that shape, whose own derivatives are as fast as those of
    `conv`.
  """
  plain = lambda x, kernel: plain_conv(x, kernel, stride, pad, dilation)
  autodiff = lambda dy, kernel: jax.linear_transpose(
      lambda x: plain(x, kernel), jax.ShapeDtypeStruct(shape, dy.dtype)
  )(dy)[0]
  transposed = lambda dy, kernel: _transposed_input_gradient(
      dy, kernel, shape[-1], pad, dilation
  )
  return lax.platform_dependent(
      dy,
      kernel,
      cpu=transposed if stride == 1 else autodiff,
      default=autodiff,
  )


def _input_gradient_forward(dy, kernel, shape, stride, pad, dilation):
  how = stride, pad, dilation
  return conv_input_gradient(dy, kernel, shape, *how), (dy, kernel)


def _input_gradient_backward(shape, stride, pad, dilation, residuals, dx):
  del shape
  dy, kernel = residuals
  how = stride, pad, dilation
  return conv(dx, kernel, *how), _kernel_gradient(dx, dy, kernel, *how)


conv_input_gradient.defvjp(_input_gradient_forward, _input_gradient_backward)


def _kernel_gradient(x, dy, kernel, stride, pad, dilation):
  """The gradient of `conv` by its kernel; of that the shape counts."""
  on_cpu = (
      _transposed_kernel_gradient
      if kernel.shape[2] == x.shape[-1]
      else _depthwise_kernel_gradient
  )
  return lax.platform_dependent(
      x,
      dy,
      cpu=lambda x, dy: on_cpu(x, dy, kernel.shape[0], stride, pad, dilation),
      default=lambda x, dy: jax.vjp(
          lambda k: plain_conv(x, k, stride, pad, dilation), kernel
      )[1](dy)[0],
  )


def _transposed_input_gradient(dy, kernel, inputs, pad, dilation):
  """The input gradient at stride 1 as a convolution with a turned kernel."""
  turned = kernel[::-1, ::-1]
  if kernel.shape[2] == inputs:
    turned = turned.transpose(0, 1, 3, 2)
  reach = (kernel.shape[0] - 1) * dilation
  return plain_conv(dy, turned, 1, reach - pad, dilation)


def _transposed_kernel_gradient(x, dy, size, stride, pad, dilation):
  """The kernel gradient as a convolution over the batch dimension."""
  reach = (size - 1) * dilation + 1
  pads = [
      (pad, reach + (dy.shape[dim] - 1) * stride - x.shape[dim] - pad)
      for dim in (1, 2)
  ]
  gradient = lax.conv_general_dilated(
      x.transpose(3, 1, 2, 0),  # (in, height, width, batch)
      dy.transpose(1, 2, 0, 3),  # (out height, out width, batch, out)
      (dilation, dilation),
      pads,
      rhs_dilation=(stride, stride),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  return gradient.transpose(1, 2, 0, 3)


def _depthwise_kernel_gradient(x, dy, size, stride, pad, dilation):
  """The kernel gradient of a depthwise convolution, one tap after another."""
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  height, width = ((side - 1) * stride + 1 for side in dy.shape[1:3])
  offsets = range(0, size * dilation, dilation)
  taps = [
      x[:, row : row + height : stride, column : column + width : stride]
      for row in offsets
      for column in offsets
  ]
  gradient = jnp.stack([jnp.sum(tap * dy, (0, 1, 2)) for tap in taps])
  return gradient.reshape(size, size, 1, -1)
