"""What families share: seeds, stems, head, options, naming."""

from collections.abc import Mapping, Sequence
import types
from typing import Any, ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture


class Family(base.Network):
  """A family whose axes follow from a width per stage; its `seed`.

  Attributes:
    inner: private axes of a block, each as wide as its stage.
    choices: of the options that not all families have, the values that this one
      takes, its default first.
  """

  inner: tuple[str, ...] = ('out',)
  choices: ClassVar[Mapping[str, Sequence[str]]] = types.MappingProxyType({})

  def seed(
      self,
      depths: Sequence[int],
      *,
      input_shape: Sequence[int],
      classes: int,
      options: Mapping[str, Any],
  ) -> Architecture:
    resolved = resolve_options(self, input_shape, options)
    widths = resolved.pop('widths')
    blocks = name_blocks(checked_depths(self, depths))
    sizes = {
        'image': input_shape[-1],
        'classes': classes,
        **self.shared(widths),
        **{
            f'{block}.{axis}': width
            for names, width in zip(blocks, widths, strict=True)
            for block in names
            for axis in self.inner
        },
    }
    return build(self.name, blocks, sizes, resolved)

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    """Sizes of the axes that are no block's own, but for image and classes."""
    del widths
    return {}


class Published(Family):
  """A family whose seed has the depths that it was published with.

  Attributes:
    depths: blocks per stage.
  """

  depths: tuple[int, ...]

  @property
  def seed_depths(self) -> tuple[int, ...]:
    return self.depths


class Stem(base.Module):
  """Convolution, norm, ReLU; the ImageNet stem also subsamples by four."""

  features: int = 16
  kind: str = 'small'
  scale_init: str = 'ones'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del gate
    imagenet = self.kind == 'imagenet'
    x = layers.Conv(
        self.features,
        7 if imagenet else 3,
        2 if imagenet else 1,
        init_scheme=self.kind,
        plain=self.plain,
        name='conv',
    )(x)
    x = layers.Norm(scale_init=self.scale_init, name='norm')(x, train=train)
    x = nn.relu(x)
    return layers.max_pool(x) if imagenet else x


class Head(base.Module):
  """Average over all positions, then a dense layer; logits in float32."""

  classes: int = 10

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del train, gate
    x = jnp.mean(layers.widened(x), (1, 2))
    return layers.Dense(self.classes, writes='classes', name='dense')(x)


def conv(
    block: base.Module,
    features: int,
    size: int,
    stride: int,
    reads: str,
    writes: str,
    name: str,
    *,
    bias: bool = False,
    dilation: int = 1,
) -> layers.Conv:
  """A convolution of a block, initialised and computed as the block says."""
  return layers.Conv(
      features,
      size,
      stride,
      reads,
      writes,
      block.init_scheme,
      block.plain,
      bias=bias,
      dilation=dilation,
      name=name,
  )


def faded(x: jax.Array, y: jax.Array, gate: jax.Array | None) -> jax.Array:
  """What a block without a shortcut returns: y, faded into x by its gate.

  Args:
    x: the block's input.
    y: what it made of it.
    gate: 1 for y, 0 for x, or between; None for y, as where shapes differ.

  Returns:
    An array like y.
  """
  if gate is None or x.shape != y.shape:
    return y
  gate = gate.astype(y.dtype)
  return gate * y + (1 - gate) * x


def stem_part(
    architecture: Architecture, writes: str, module: base.Module | None = None
) -> base.Part:
  """The chain's first part; its module is a `Stem`, or one that is given."""
  option = dict(architecture.options)
  module = module or Stem(
      features=architecture.size(writes),
      kind=option['stem'],
      scale_init=option['bn_scale_init'],
  )
  shape = (*option['resolution'], architecture.size('image'))
  return base.Part('stem', module, (('in', 'image'), ('out', writes)), shape)


def head_part(
    architecture: Architecture, reads: str, chain: Sequence[base.Part]
) -> base.Part:
  """The chain's last part."""
  return base.Part(
      'head',
      Head(classes=architecture.size('classes')),
      (('in', reads), ('classes', 'classes')),
      base.output_shape(chain[-1]),
  )


def streams(widths: Sequence[int], expansion: int = 1) -> dict[str, int]:
  """Sizes of the streams 's0', 's1', ..., from the widths per stage."""
  return {
      f's{stage}': width * expansion for stage, width in enumerate(widths)
  }


def name_blocks(depths: Sequence[int]) -> tuple[tuple[str, ...], ...]:
  """('s0b0', 's0b1', ...) per stage."""
  return tuple(
      tuple(f's{stage}b{index}' for index in range(depth))
      for stage, depth in enumerate(depths)
  )


def build(
    family: str,
    blocks: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    options: Mapping[str, Any],
) -> Architecture:
  """The architecture with canonical ordering."""
  return Architecture(
      family=family,
      stages=tuple(map(tuple, blocks)),
      sizes=tuple(sorted(sizes.items())),
      options=architecture_lib.sorted_options(options),
      minted=tuple(map(len, blocks)),
  )


def checked_depths(network: Any, depths: Sequence[int]) -> tuple[int, ...]:
  """Depths that fit a network."""
  if len(depths) != len(network.widths):
    raise ValueError(
        f'{network.title} has {len(network.widths)} stages, but depths '
        f'{"-".join(map(str, depths))} name {len(depths)}.'
    )
  if any(depth < 1 for depth in depths):
    raise ValueError(
        f'Every stage needs at least one block, got depths '
        f'{"-".join(map(str, depths))}.'
    )
  return tuple(depths)


def checked_widths(network: Any, widths: Sequence[int]) -> tuple[int, ...]:
  """Widths that fit a network."""
  if len(widths) != len(network.widths) or min(widths) < 1:
    raise ValueError(
        f'{network.title} takes {len(network.widths)} positive widths, got '
        f'{"-".join(map(str, widths))}.'
    )
  return tuple(widths)


def resolve_options(
    network: Family,
    input_shape: Sequence[int],
    options: Mapping[str, Any],
) -> dict[str, Any]:
  """Fills in defaults and refuses what a network doesn't have.

  The stem is 'small' up to 64 pixels, else 'imagenet', unless given.

  Args:
    network: the family.
    input_shape: (height, width, channel).
    options: those given.

  Returns:
    All of its options, and `widths`.

  Raises:
    ValueError: an option or its value is not one of the family's.
  """
  given = {name: value for name, value in options.items() if value is not None}
  if len(input_shape) != 3 or min(input_shape) < 1:
    raise ValueError(
        f'The input shape is (height, width, channel), got {input_shape}.'
    )
  height, width, _ = input_shape
  resolved = {
      'stem': given.pop(
          'stem', 'small' if max(height, width) <= 64 else 'imagenet'
      ),
      'bn_scale_init': given.pop('bn_scale_init', 'ones'),
      'widths': tuple(given.pop('widths', network.widths)),
      'resolution': (height, width),
  }
  for name, values in network.choices.items():
    resolved[name] = given.pop(name, None) or values[0]
    check_choice(name, resolved[name], values)
  if (shortcut := given.pop('shortcut', 'B')) != 'B':
    raise ValueError(
        f'{network.title} has no shortcuts; leave out shortcut={shortcut!r}.'
    )
  check_choice('stem', resolved['stem'], tuple(layers.KERNEL_INITS))
  check_choice(
      'bn_scale_init', resolved['bn_scale_init'], tuple(layers.SCALE_INITS)
  )
  checked_widths(network, resolved['widths'])
  if given:
    raise ValueError(f'{network.title} has no options {sorted(given)}.')
  return resolved


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises a ValueError unless a named value is one of the choices."""
  if value not in choices:
    raise ValueError(
        f'{name} is one of {", ".join(choices)}, got {value!r}.'
    )
