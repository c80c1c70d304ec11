"""Layers whose parameters declare the names and roles of their axes.

Images are (batch, height, width, channel), kernels (height, width, input
channel, output channel). Layers compute in their input's type, to which weights
are cast; statistics and their reductions are always float32.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
from flax import struct
from flax.core import meta
import jax
from jax import ad_checkpoint
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import ops
from autogrow_jax.core import axes as axes_lib

Axes = axes_lib.Axes
Axis = axes_lib.Axis
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@struct.dataclass
class Named(meta.AxisMetadata[Any]):
  """A leaf with its axes, as Linen's `init` returns it."""

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
  """Wraps an initializer: a float32 leaf, also under x64, that carries axes."""
  return lambda *args: Named(jnp.asarray(init(*args), jnp.float32), axes)


# Wen et al. 2020 draw the kernels of small-image networks from the default of
# their framework, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), and those of ImageNet
# networks from N(0, 2/fan_out).
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
    size: side of the square kernel, pixels.
    stride: distance between neighbouring output positions, pixels; the first
      one is centred on pixel 0.
    reads: local name of the input axis.
    writes: local name of the output axis.
    init_scheme: key of `KERNEL_INITS`.
    plain: use XLA's own derivatives, which include a forward mode, in place of
      those of `ops.conv`.
    bias: add a vector that starts at zero. A norm behind it cancels it in
      training; some published networks have it nevertheless.
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
    init = named(KERNEL_INITS[self.init_scheme], axes)
    kernel = self.param('kernel', init, shape).astype(x.dtype)
    pad = self.dilation * (self.size // 2)
    convolve = ops.plain_conv if self.plain else ops.conv
    y = convolve(x, kernel, self.stride, pad, self.dilation)
    if not self.bias:
      return y
    init = named(nn.initializers.zeros, (out,))
    bias = self.param('bias', init, (self.features,))
    return y + bias[None, None, None].astype(y.dtype)


class DepthwiseConv(nn.Module):
  """Convolution of every channel on its own, padded as `Conv`; no bias.

  Its kernel both reads and writes the one axis. A gate on that axis multiplies
  the layer that reads it next, not this one.

  Attributes:
    size: side of the square kernel, pixels.
    stride: distance between neighbouring output positions, pixels.
    keeps: local name of the channel axis.
    init_scheme: key of `KERNEL_INITS`.
    plain: use XLA's own derivatives, as in `Conv`.
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
    init = named(KERNEL_INITS[self.init_scheme], axes)
    kernel = self.param('kernel', init, shape).astype(x.dtype)
    convolve = ops.plain_conv if self.plain else ops.conv
    return convolve(x, kernel, self.stride, self.size // 2)


_KEEP_STATISTICS = jax.checkpoint_policies.save_only_these_names('batch')


class Norm(nn.Module):
  """Batch normalisation with the papers' constants.

  Running statistics move by a tenth per step. Unlike the paper, whose framework
  stores the unbiased variance, they hold the biased one.

  Attributes:
    writes: local name of the channel axis.
    scale_init: key of `SCALE_INITS`.
    momentum: weight of the old running statistics, per step.
    epsilon: number added to the variance.
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
    init = named(SCALE_INITS[self.scale_init], axes)
    scale = self.param('scale', init, shape)
    bias = self.param('bias', named(nn.initializers.zeros, axes), shape)
    running = lambda name, init: self.variable(
        'stats', name, named(init, along), shape, jnp.float32
    )
    running_mean = running('mean', jnp.zeros)
    running_var = running('var', jnp.ones)
    old = running_mean.value, running_var.value
    if self.is_initializing():
      train = False
    # The backward pass has x in its own type and computes x in float32 again.
    y, new = jax.checkpoint(
        functools.partial(self._normalised, train), policy=_KEEP_STATISTICS
    )(x, scale, bias, old)
    if train is not False:
      running_mean.value, running_var.value = new
    return y

  def _normalised(self, train, x, scale, bias, old):
    """Normalised x, and the next running statistics."""
    (mean, var), x32, keep = old, widened(x), self.momentum
    # A traced `train` computes both and selects: one program serves both.
    if train is not False:
      dims = tuple(range(x.ndim - 1))
      batch_mean = jnp.mean(x32, dims)
      # With jnp.square, loops would keep 2 * x32 besides x for the gradient.
      batch_var = jnp.maximum(
          jnp.mean(x32 * x32, dims) - batch_mean * batch_mean, 0.0
      )
      batch = ad_checkpoint.checkpoint_name((batch_mean, batch_var), 'batch')
      mean, var = batch
      if train is not True:
        keep = jnp.where(train, keep, 1.0)
        mean, var = (jnp.where(train, *pair) for pair in zip(batch, old))
      old = tuple(keep * a + (1 - keep) * b for a, b in zip(old, batch))
    factor = scale * lax.rsqrt(var + self.epsilon)
    shift = bias - mean * factor
    channels = (1,) * (x.ndim - 1) + scale.shape
    y = x32 * factor.reshape(channels)
    return (y + shift.reshape(channels)).astype(x.dtype), old


class Dense(nn.Module):
  """Matrix product with bias, in float32; both start as U(+-bound).

  The product sums over all dimensions of the input but the batch. A kernel that
  reads images has the shape (height, width, in, out), so that their channels
  are an axis.

  Attributes:
    features: number of output units.
    reads: local name of the input axis.
    writes: local name of the output axis.
    bound: largest parameter at the start; None for 1/sqrt(fan_in).
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
    shape = (*inputs, self.features)
    kernel = self.param('kernel', named(init, axes), shape)
    bias = self.param('bias', named(init, (out,)), (self.features,))
    x = widened(x).reshape(x.shape[0], -1)
    return x @ kernel.reshape(-1, self.features) + bias[None]


class Embedding(nn.Module):
  """Table with a row for each token.

  Attributes:
    rows: number of different tokens.
    features: length of a row.
    bound: largest entry at the start, which is U(+-bound).
    writes: local name of the output axis.
  """

  rows: int
  features: int
  bound: float
  writes: str = 'out'

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Looks tokens up: (batch, step) integers -> (batch, step, features)."""
    axes = (None, Axis(self.writes, 'writes'))
    init = named(uniform(self.bound), axes)
    table = self.param('table', init, (self.rows, self.features))
    return table[tokens.astype(jnp.int32)]


class LSTM(nn.Module):
  """Layer of long short-term memory, from one state to the next.

  A kernel holds four side by side: input gate, forget gate, output gate and
  candidate. `kernel` (in, 4, out) reads the input, `recurrent_kernel` (out, 4,
  out) the layer's own output one step earlier. A gate on the units' axis
  multiplies the rows that read their outputs, here and in later layers; cells
  have no gate.

  Attributes:
    features: number of units.
    bound: largest entry of kernels and bias at the start, which is U(+-bound).
    reads: local name of the input axis.
    writes: local name of the units' axis.
  """

  features: int
  bound: float
  reads: str = 'in'
  writes: str = 'out'

  @nn.compact
  def __call__(
      self, x: jax.Array, state: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Computes a window, step by step.

    Args:
      x: (batch, step, in).
      state: outputs and cells, (batch, features) each, before the first step.

    Returns:
      Outputs (batch, step, features), and the state after the last step.
    """
    units, out = self.features, Axis(self.writes, 'writes')

    def kernel_of(name, reads, inputs):
      init = named(uniform(self.bound), (Axis(reads, 'reads'), None, out))
      kernel = self.param(name, init, (inputs, 4, units))
      return kernel.reshape(inputs, 4 * units)

    kernel = kernel_of('kernel', self.reads, x.shape[-1])
    recurrent = kernel_of('recurrent_kernel', self.writes, units)
    init = named(uniform(self.bound), (None, out))
    bias = self.param('bias', init, (4, units))
    # One product reads all inputs; only the recurrence goes step by step.
    inputs = jnp.swapaxes(x, 0, 1) @ kernel
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
  """Option A shortcut of He et al. 2016: subsamples, pads with zero channels.

  The selection matrix is frozen and stands among the statistics. It reads like
  any kernel, so that gates and index maps reach it, but it is no parameter and
  costs nothing.

  Attributes:
    features: number of output channels.
    stride: distance between neighbouring output positions, pixels.
    reads: local name of the input axis.
    writes: local name of the output axis.
  """

  features: int
  stride: int
  reads: str = 'in'
  writes: str = 'out'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    axes = (Axis(self.reads, 'reads'), Axis(self.writes, 'writes'))
    pad = max(0, self.features - x.shape[-1]) // 2
    init = named(lambda *shape: jnp.eye(*shape, k=pad), axes)
    select = self.variable(
        'stats', 'select', init, x.shape[-1], self.features
    )
    return x[:, :: self.stride, :: self.stride] @ select.value.astype(x.dtype)


def uniform(bound: float) -> Initializer:
  """Initializer that draws from U(+-bound)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def widened(x: jax.Array) -> jax.Array:
  """Casts to float32; float64, which only derivative checks use, stays."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
