"""The residual families of Wen et al. 2020 (their names, our axes).

Basic block: two 3x3 convolutions; bottleneck: 1x1, 3x3 (which carries the
stride), 1x1 to four times the width. Both are post-activation. All blocks of
a stage read and write the stage's stream `s<stage>`; the inner widths are
private.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, ClassVar

from flax import linen as nn
import jax

from autogrow_jax import layers
from autogrow_jax import ops
from autogrow_jax.networks import base
from autogrow_jax.networks import common


class BasicBlock(base.Module):
  """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))."""

  mid: int = 16
  features: int = 16
  stride: int = 1
  shortcut: str = 'identity'
  scale_init: str = 'ones'
  init_scheme: str = 'small'

  last_norm: ClassVar[str] = 'norm2'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    conv = functools.partial(common.conv, self)
    norm = functools.partial(common.norm, self, train)
    y = conv(self.mid, 3, stride=self.stride, writes='mid', name='conv1')(x)
    y = ops.relu(norm('mid', 'norm1')(y))
    y = conv(self.features, 3, reads='mid', name='conv2')(y)
    y = norm('out', 'norm2')(y)
    if gate is not None:
      y = gate.astype(y.dtype) * y
    return ops.relu(y + shortcut(self, x, self.features, train))


class BottleneckBlock(base.Module):
  """1x1, 3x3 and 1x1 convolutions around a shortcut.

  The 3x3 convolution carries stride and dilation.
  """

  mid1: int = 64
  mid2: int = 64
  features: int = 256
  stride: int = 1
  dilation: int = 1
  shortcut: str = 'identity'
  scale_init: str = 'ones'
  init_scheme: str = 'small'

  last_norm: ClassVar[str] = 'norm3'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    conv = functools.partial(common.conv, self)
    norm = functools.partial(common.norm, self, train)
    y = conv(self.mid1, 1, writes='mid1', name='conv1')(x)
    y = ops.relu(norm('mid1', 'norm1')(y))
    y = conv(
        self.mid2,
        3,
        stride=self.stride,
        reads='mid1',
        writes='mid2',
        dilation=self.dilation,
        name='conv2',
    )(y)
    y = ops.relu(norm('mid2', 'norm2')(y))
    y = conv(self.features, 1, reads='mid2', name='conv3')(y)
    y = norm('out', 'norm3')(y)
    if gate is not None:
      y = gate.astype(y.dtype) * y
    return ops.relu(y + shortcut(self, x, self.features, train))


def shortcut(
    block: Any, x: jax.Array, features: int, train: bool | jax.Array
) -> jax.Array:
  """Identity, option A (selection) or option B (1x1 convolution and norm)."""
  if block.shortcut == 'identity':
    return x
  if block.shortcut == 'A':
    return layers.Select(features, block.stride, name='shortcut')(x)
  y = common.conv(
      block, features, 1, stride=block.stride, name='shortcut_conv'
  )(x)
  return common.norm(block, train, 'out', 'shortcut_norm')(y)


@dataclasses.dataclass(frozen=True)
class Trunk(common.Family):
  """Base of families whose stages are residual blocks.

  Attributes:
    strides: stride of the first block per stage, pixels.
    block: class of the blocks' modules, with the fields of `BasicBlock`; those
      of the private axes are named by `inner`.
    inner: private axes of a block, each as wide as the stage.
    expansion: width of the stream over base width.
    dilations: dilation of the blocks per stage, pixels; None for blocks
      without that field.
  """

  strides: tuple[int, ...]
  block: type[base.Module] = BasicBlock
  inner: tuple[str, ...] = ('mid',)
  expansion: int = 1
  dilations: tuple[int, ...] | None = None

  choices: ClassVar[Mapping[str, Sequence[str]]] = {'shortcut': ('B', 'A')}

  @property
  def layers_per_block(self) -> int:
    return len(self.inner) + 1

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    stem = {} if self.expansion == 1 else {'stem': widths[0]}
    return {**stem, **common.streams(widths, self.expansion)}

  def chain(
      self, architecture: base.Architecture, head: common.Link
  ) -> common.Parts:
    """Stem, blocks and a head that reads the last stage's stream."""
    sizes = dict(architecture.sizes)
    stem = 's0' if self.expansion == 1 else 'stem'

    def block_of(block, stage, index):
      stride = self.strides[stage] if index == 0 else 1
      axes = {axis: f'{block}.{axis}' for axis in self.inner}
      fields = {axis: sizes[name] for axis, name in axes.items()}
      if self.dilations:
        fields['dilation'] = self.dilations[stage]
      enters = stage == 0 and stem == 's0' and stride == 1
      module = self.block(
          features=sizes[f's{stage}'],
          stride=stride,
          shortcut=(
              'identity' if index or enters else architecture.option('shortcut')
          ),
          **fields,
          **common.starts(architecture),
      )
      return module, {'out': f's{stage}', **axes}

    stem_link = common.stem_link(architecture, stem)
    return common.chain(architecture, stem_link, block_of, head)


@dataclasses.dataclass(frozen=True)
class ResNet(Trunk):
  """A residual family for classification."""

  def parts(self, architecture: base.Architecture) -> common.Parts:
    return self.chain(architecture, common.head_link(architecture))


BASIC1 = ResNet('basic1resnet', 'Basic1ResNet', (8,), (1,))  # Ours.
BASIC3 = ResNet('basic3resnet', 'Basic3ResNet', (16, 32, 64), (1, 2, 2))
BASIC4 = ResNet(
    'basic4resnet', 'Basic4ResNet', (64, 128, 256, 512), (1, 2, 2, 2)
)
BOTTLENECK4 = ResNet(
    'bottleneck4resnet',
    'Bottleneck4ResNet',
    (64, 128, 256, 512),
    (1, 2, 2, 2),
    BottleneckBlock,
    ('mid1', 'mid2'),
    expansion=4,
)
