"""Shared pieces of families: seeds, chains, stem, head, options, names."""

from collections.abc import Callable, Mapping, Sequence
import types
from typing import Any, ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax import ops
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture
Parts = tuple[base.Part, ...]
# A module and its axes, local to global names, but for 'in' and 'classes'.
Link = tuple[base.Module, dict[str, str]]


class Family(base.Network):
  """Family whose axes follow from one width per stage.

  Attributes:
    inner: private axes of a block, each as wide as its stage.
    optional: axes whose sizes may follow the stages' widths in `widths`.
    choices: values of the options that not all families have, by name; the
      first one is the default.
  """

  inner: tuple[str, ...] = ('out',)
  optional: ClassVar[tuple[str, ...]] = ()
  choices: ClassVar[Mapping[str, Sequence[str]]] = types.MappingProxyType({})

  def seed(
      self,
      depths: Sequence[int],
      *,
      input_shape: Sequence[int],
      classes: int,
      options: Mapping[str, Any],
  ) -> Architecture:
    given = {name: item for name, item in options.items() if item is not None}
    widths = tuple(given.pop('widths', self.widths))
    stages = len(self.widths)
    most = stages + len(self.optional)
    if not stages <= len(widths) <= most or min(widths) < 1:
      also = ''.join(f', and one more for {axis}' for axis in self.optional)
      raise ValueError(
          f'{self.title} takes {stages} positive widths{also}, got '
          f'{"-".join(map(str, widths))}.'
      )
    widths, more = widths[:stages], widths[stages:]
    resolved, sizes = self.resolve(given, input_shape, widths)
    sizes |= {'classes': classes, **dict(zip(self.optional, more))}
    if given:
      raise ValueError(f'{self.title} has no options {sorted(given)}.')
    blocks = tuple(
        tuple(f's{stage}b{index}' for index in range(depth))
        for stage, depth in enumerate(checked_depths(self, depths))
    )
    for names, width in zip(blocks, widths, strict=True):
      sizes |= {f'{b}.{axis}': width for b in names for axis in self.inner}
    return Architecture(
        family=self.name,
        stages=blocks,
        sizes=tuple(sorted(sizes.items())),
        options=architecture_lib.sorted_options(resolved),
        minted=tuple(map(len, blocks)),
    )

  def resolve(
      self,
      given: dict[str, Any],
      input_shape: Sequence[int],
      widths: Sequence[int],
  ) -> tuple[dict[str, Any], dict[str, int]]:
    """Checks options, fills in defaults, and sizes the shared axes.

    The stem is 'small' up to 64 pixels, else 'imagenet', unless given.

    Args:
      given: options but widths; those that the family has are taken out.
      input_shape: (height, width, channel).
      widths: channels per stage.

    Returns:
      All options, and the sizes of axes that belong to no block.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
      raise ValueError(
          f'The input shape is (height, width, channel), got {input_shape}.'
      )
    *resolution, channels = input_shape
    if max(resolution) > 64:
      given.setdefault('stem', 'imagenet')
    choices = {
        'stem': tuple(layers.KERNEL_INITS),
        'bn_scale_init': tuple(layers.SCALE_INITS),
        **self.choices,
    }
    resolved = {'resolution': tuple(resolution)}
    for name, values in choices.items():
      resolved[name] = given.pop(name, values[0])
      check_choice(name, resolved[name], values)
    if (shortcut := given.pop('shortcut', 'B')) != 'B':
      raise ValueError(
          f'{self.title} has no shortcuts; leave out shortcut={shortcut!r}.'
      )
    return resolved, {'image': channels, **self.shared(widths)}

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    """Sizes of the axes that belong to no block, but for image and classes."""
    del widths
    return {}


class Stem(base.Module):
  """Convolution, norm, ReLU; the ImageNet stem also subsamples by four."""

  features: int = 16
  kind: str = 'small'
  scale_init: str = 'ones'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del gate
    size, stride = (7, 2) if self.kind == 'imagenet' else (3, 1)
    x = layers.Conv(
        self.features,
        size,
        stride,
        init_scheme=self.kind,
        plain=self.plain,
        name='conv',
    )(x)
    x = ops.relu(norm(self, train, 'out', 'norm')(x))
    return ops.max_pool(x) if self.kind == 'imagenet' else x


class Head(base.Module):
  """Average over all positions, then a dense layer; logits in float32."""

  classes: int = 10

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del train, gate
    x = jnp.mean(layers.widened(x), (1, 2))
    return layers.Dense(self.classes, writes='classes', name='dense')(x)


def conv(
    block: base.Module, features: int, size: int, **fields: Any
) -> layers.Conv:
  """Convolution of a block, initialised and computed as the block says."""
  fields.update(init_scheme=block.init_scheme, plain=block.plain)
  return layers.Conv(features, size, **fields)


def norm(
    block: base.Module, train: bool | jax.Array, writes: str, name: str
) -> Callable[[jax.Array], jax.Array]:
  """Batch norm of a block over a local axis, started as the block says."""
  layer = layers.Norm(writes, block.scale_init, name=name)
  return lambda x: layer(x, train=train)


def faded(x: jax.Array, y: jax.Array, gate: jax.Array | None) -> jax.Array:
  """Fades the output y of a block without a shortcut into its input x.

  Args:
    x: input of the block.
    y: output of its layers.
    gate: 1 for y, 0 for x, or between; ignored where shapes differ.

  Returns:
    An array like y.
  """
  if gate is None or x.shape != y.shape:
    return y
  gate = gate.astype(y.dtype)
  return gate * y + (1 - gate) * x


def chain(
    architecture: Architecture,
    stem: Link | None,
    block_of: Callable[[str, int, int], Link],
    head: Link,
) -> Parts:
  """Chains modules; each reads, as 'in', the axis 'out' of the one before it.

  Args:
    architecture: names of blocks; text has no option `resolution`.
    stem: the first link; None where the first block reads the input.
    block_of: (block, stage, index within the stage) -> link.
    head: the last link, which writes the axis 'classes'.

  Returns:
    The parts, with their input shapes.
  """
  option = dict(architecture.options)
  stream, shape = 'tokens', (1,)
  if 'resolution' in option:
    stream, shape = 'image', (*option['resolution'], architecture.size('image'))
  links = [
      (block, *block_of(block, stage, index))
      for stage, names in enumerate(architecture.stages)
      for index, block in enumerate(names)
  ]
  if stem is not None:
    links.insert(0, ('stem', *stem))
  module, axes = head
  links.append(('head', module, {**axes, 'classes': 'classes'}))
  parts = []
  for name, module, axes in links:
    axes = {'in': stream, **axes}
    parts.append(base.Part(name, module, tuple(axes.items()), shape))
    stream, shape = axes.get('out', stream), base.output_shape(parts[-1])
  return tuple(parts)


def stem_link(architecture: Architecture, writes: str) -> Link:
  """The families' common stem, which writes a global axis."""
  option = dict(architecture.options)
  module = Stem(
      features=architecture.size(writes),
      kind=option['stem'],
      scale_init=option['bn_scale_init'],
  )
  return module, {'out': writes}


def head_link(architecture: Architecture) -> Link:
  """The families' common head."""
  return Head(classes=architecture.size('classes')), {}


def starts(architecture: Architecture) -> dict[str, str]:
  """Fields of modules that say how norms and kernels start."""
  option = dict(architecture.options)
  return {'scale_init': option['bn_scale_init'], 'init_scheme': option['stem']}


def streams(widths: Sequence[int], expansion: int = 1) -> dict[str, int]:
  """Sizes of the streams 's0', 's1', ..., from the widths per stage."""
  return {
      f's{stage}': width * expansion for stage, width in enumerate(widths)
  }


def checked_depths(
    network: base.Network, depths: Sequence[int]
) -> tuple[int, ...]:
  """Returns depths that fit a network, or raises a ValueError."""
  given = '-'.join(map(str, depths))
  if len(depths) != len(network.widths):
    raise ValueError(
        f'{network.title} has {len(network.widths)} stages, but depths {given} '
        f'name {len(depths)}.'
    )
  if min(depths) < 1:
    raise ValueError(
        f'Every stage needs at least one block, got depths {given}.'
    )
  return tuple(depths)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises a ValueError unless a named value is one of the choices."""
  if value not in choices:
    raise ValueError(
        f'{name} is one of {", ".join(choices)}, got {value!r}.'
    )
