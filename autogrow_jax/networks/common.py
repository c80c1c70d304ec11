"""What families share: stems, head, options, naming."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture


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


def stem_part(architecture: Architecture, writes: str) -> base.Part:
  """The chain's first part."""
  option = dict(architecture.options)
  module = Stem(
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


def resolve_options(
    network: Any,
    input_shape: Sequence[int],
    options: Mapping[str, Any],
    *,
    shortcuts: Sequence[str],
) -> dict[str, Any]:
  """Fills in defaults and refuses what a network doesn't have.

  The stem is 'small' up to 64 pixels, else 'imagenet', unless given.
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
  shortcut = given.pop('shortcut', None)
  if shortcuts:
    resolved['shortcut'] = shortcut or shortcuts[0]
    check_choice('shortcut', resolved['shortcut'], shortcuts)
  elif shortcut not in (None, 'B'):
    raise ValueError(
        f'{network.title} has no shortcuts; leave out shortcut={shortcut!r}.'
    )
  check_choice('stem', resolved['stem'], tuple(layers.KERNEL_INITS))
  check_choice(
      'bn_scale_init', resolved['bn_scale_init'], tuple(layers.SCALE_INITS)
  )
  widths = resolved['widths']
  if len(widths) != len(network.widths) or min(widths) < 1:
    raise ValueError(
        f'{network.title} takes {len(network.widths)} positive widths, got '
        f'{"-".join(map(str, widths))}.'
    )
  if given:
    raise ValueError(f'{network.title} has no options {sorted(given)}.')
  return resolved


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises a ValueError unless a named value is one of the choices."""
  if value not in choices:
    raise ValueError(
        f'{name} is one of {", ".join(choices)}, got {value!r}.'
    )
