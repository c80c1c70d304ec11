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

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax.networks import base
from autogrow_jax.networks import common


def shortcut(block: Any, x: jax.Array, features: int, train: Any) -> jax.Array:
  """Identity, option A (selection) or option B (1x1 convolution and norm)."""
  if block.shortcut == 'identity':
    return x
  if block.shortcut == 'A':
    return layers.Select(features, block.stride, name='shortcut')(x)
  y = layers.Conv(
      features,
      1,
      block.stride,
      init_scheme=block.init_scheme,
      plain=block.plain,
      name='shortcut_conv',
  )(x)
  return layers.Norm(scale_init=block.scale_init, name='shortcut_norm')(
      y, train=train
  )


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
    y = layers.Conv(
        self.mid,
        3,
        self.stride,
        writes='mid',
        init_scheme=self.init_scheme,
        plain=self.plain,
        name='conv1',
    )(x)
    y = layers.Norm('mid', self.scale_init, name='norm1')(y, train=train)
    y = layers.Conv(
        self.features,
        3,
        reads='mid',
        init_scheme=self.init_scheme,
        plain=self.plain,
        name='conv2',
    )(nn.relu(y))
    y = layers.Norm(scale_init=self.scale_init, name='norm2')(y, train=train)
    if gate is not None:
      y = gate.astype(y.dtype) * y
    return nn.relu(y + shortcut(self, x, self.features, train))


class BottleneckBlock(base.Module):
  """1x1, 3x3 and 1x1 convolutions around a shortcut.

  Stride and dilation are those of the 3x3 convolution.
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
    y = conv(self.mid1, 1, 1, 'in', 'mid1', 'conv1')(x)
    y = layers.Norm('mid1', self.scale_init, name='norm1')(y, train=train)
    y = conv(
        self.mid2,
        3,
        self.stride,
        'mid1',
        'mid2',
        'conv2',
        dilation=self.dilation,
    )(nn.relu(y))
    y = layers.Norm('mid2', self.scale_init, name='norm2')(y, train=train)
    y = conv(self.features, 1, 1, 'mid2', 'out', 'conv3')(nn.relu(y))
    y = layers.Norm(scale_init=self.scale_init, name='norm3')(y, train=train)
    if gate is not None:
      y = gate.astype(y.dtype) * y
    return nn.relu(y + shortcut(self, x, self.features, train))


@dataclasses.dataclass(frozen=True)
class Trunk(common.Family):
  """What families have in common whose stages are of residual blocks.

  Attributes:
    name: key of the family.
    title: name in the paper.
    widths: base width per stage.
    strides: of the first block per stage.
    block: the block's module class; takes the block's private axes, `features`
      (the stream), stride, shortcut, scale_init, init_scheme and plain.
    inner: private axes of a block, each as wide as the stage.
    expansion: stream width over base width.
    convolutions: per block, for the layer count.
    dilations: of all blocks per stage, if they take any; None for 1.
  """

  name: str
  title: str
  widths: tuple[int, ...]
  strides: tuple[int, ...]
  block: type[base.Module] = BasicBlock
  inner: tuple[str, ...] = ('mid',)
  expansion: int = 1
  convolutions: int = 2
  dilations: tuple[int, ...] | None = None

  choices: ClassVar[Mapping[str, Sequence[str]]] = {'shortcut': ('B', 'A')}

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    stem = {} if self.expansion == 1 else {'stem': widths[0]}
    return {**stem, **common.streams(widths, self.expansion)}

  def trunk(
      self, architecture: architecture_lib.Architecture
  ) -> list[base.Part]:
    """Stem and blocks; they end in the stream of the last stage."""
    option = dict(architecture.options)
    stream = 'stem' if self.expansion != 1 else 's0'
    chain = [common.stem_part(architecture, stream)]
    for stage, names in enumerate(architecture.stages):
      for index, block in enumerate(names):
        stride = self.strides[stage] if index == 0 else 1
        features = architecture.size(f's{stage}')
        same = stride == 1 and architecture.size(stream) == features
        chain.append(
            base.Part(
                block,
                self.block(
                    **{
                        axis: architecture.size(f'{block}.{axis}')
                        for axis in self.inner
                    },
                    **(
                        {'dilation': self.dilations[stage]}
                        if self.dilations
                        else {}
                    ),
                    features=features,
                    stride=stride,
                    shortcut=(
                        'identity'
                        if index or (same and stream == f's{stage}')
                        else option['shortcut']
                    ),
                    scale_init=option['bn_scale_init'],
                    init_scheme=option['stem'],
                ),
                (
                    ('in', stream),
                    ('out', f's{stage}'),
                    *((axis, f'{block}.{axis}') for axis in self.inner),
                ),
                base.output_shape(chain[-1]),
            )
        )
        stream = f's{stage}'
    return chain


@dataclasses.dataclass(frozen=True)
class ResNet(Trunk):
  """A residual family for classification."""

  def parts(
      self, architecture: architecture_lib.Architecture
  ) -> tuple[base.Part, ...]:
    chain = self.trunk(architecture)
    stream = f's{len(architecture.stages) - 1}'
    return (*chain, common.head_part(architecture, stream, chain))

  def layers(self, depths: Sequence[int]) -> int:
    return self.convolutions * sum(depths) + 2


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
    convolutions=3,
)
