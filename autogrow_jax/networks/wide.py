"""Wide residual networks (Zagoruyko and Komodakis 2016), pre-activation.

Unlike the paper, and as in https://github.com/meliketoy/wide-resnet.pytorch,
the stride is on a block's second convolution and all convolutions have biases;
there is no dropout, and the first block of every stage has a 1x1 convolution as
its shortcut, also where stem and first stage are equally wide.

All blocks of a stage write its stream, `s<stage>`, without a norm behind. First
convolutions of blocks and the head read it through a norm, for which channels
are separate; 1x1 shortcuts read it as it is. The inner widths are private.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import ClassVar

from flax import linen as nn
import jax.numpy as jnp

from autogrow_jax import layers
from autogrow_jax import ops
from autogrow_jax.networks import base
from autogrow_jax.networks import common


class ConvStem(base.Module):
  """A 3x3 convolution with bias."""

  features: int = 16
  init_scheme: str = 'small'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del train, gate
    return common.conv(self, self.features, 3, bias=True, name='conv')(x)


class PreActivationBlock(base.Module):
  """conv2(relu(norm2(conv1(relu(norm1(x)))))) + shortcut(x).

  Attributes:
    mid: inner width.
    projects: make the shortcut a 1x1 convolution.
  """

  mid: int = 160
  features: int = 160
  stride: int = 1
  projects: bool = False
  scale_init: str = 'ones'
  init_scheme: str = 'small'

  last_layer: ClassVar[str] = 'conv2'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    conv = functools.partial(common.conv, self, bias=True)
    norm = functools.partial(common.norm, self, train)
    y = ops.relu(norm('in', 'norm1')(x))
    y = conv(self.mid, 3, writes='mid', name='conv1')(y)
    y = ops.relu(norm('mid', 'norm2')(y))
    strided = functools.partial(conv, self.features, stride=self.stride)
    y = strided(3, reads='mid', name='conv2')(y)
    if gate is not None:
      y = gate.astype(y.dtype) * y
    if self.projects:
      x = strided(1, name='shortcut_conv')(x)
    return y + x


class NormHead(base.Module):
  """Norm, ReLU, average over all positions, a dense layer."""

  classes: int = 10
  scale_init: str = 'ones'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del gate
    x = ops.relu(common.norm(self, train, 'in', 'norm')(x))
    x = jnp.mean(layers.widened(x), (1, 2))
    return layers.Dense(self.classes, writes='classes', name='dense')(x)


@dataclasses.dataclass(frozen=True)
class WideResNet(common.Family):
  """A wide residual family.

  `widths` are 16, 32 and 64 times the paper's widening factor.

  Attributes:
    stem: width of the stem.
  """

  stem: int = 16

  inner = ('mid',)
  milestones = 'wide'
  layers_per_block = 2

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    return {'stem': self.stem, **common.streams(widths)}

  def parts(self, architecture: base.Architecture) -> common.Parts:
    starts, sizes = common.starts(architecture), dict(architecture.sizes)

    def block_of(block, stage, index):
      module = PreActivationBlock(
          mid=sizes[f'{block}.mid'],
          features=sizes[f's{stage}'],
          stride=2 if stage > 0 and index == 0 else 1,
          projects=index == 0,
          **starts,
      )
      return module, {'out': f's{stage}', 'mid': f'{block}.mid'}

    stem = ConvStem(features=sizes['stem'], init_scheme=starts['init_scheme'])
    head = NormHead(classes=sizes['classes'], scale_init=starts['scale_init'])
    stem_link = stem, {'out': 'stem'}
    return common.chain(architecture, stem_link, block_of, (head, {}))


WRN28 = WideResNet(
    'wrn28_10', 'WRN-28-10', (160, 320, 640), depths=(4, 4, 4)
)
