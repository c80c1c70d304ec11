"""Wide residual networks (Zagoruyko and Komodakis 2016), pre-activation.

Unlike in the paper, the stride is on a block's second convolution and all
convolutions have biases, as in https://github.com/meliketoy/wide-resnet.pytorch;
there is no dropout, and the first block of every stage has a 1x1 convolution as
its shortcut, also where stem and first stage are equally wide.

All blocks of a stage write its stream, `s<stage>`, and no norm is in its way.
What reads it stands behind a norm, for which channels are separate: first
convolutions of blocks and the head; 1x1 convolutions read it as it is. The
inner widths are private.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import ClassVar

from flax import linen as nn
import jax.numpy as jnp

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax.networks import base
from autogrow_jax.networks import common


class Stem(base.Module):
  """A 3x3 convolution.

  Attributes:
    features: width.
    init_scheme: see `layers.Conv`.
  """

  features: int = 16
  init_scheme: str = 'small'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del train, gate
    return layers.Conv(
        self.features,
        3,
        init_scheme=self.init_scheme,
        plain=self.plain,
        bias=True,
        name='conv',
    )(x)


class PreActivationBlock(base.Module):
  """conv2(relu(norm2(conv1(relu(norm1(x)))))) + shortcut(x).

  Attributes:
    mid: inner width.
    features: width of the stream.
    stride: of the second convolution.
    projects: whether the shortcut is a 1x1 convolution.
    scale_init: see `layers.Norm`.
    init_scheme: see `layers.Conv`.
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
    y = layers.Norm('in', self.scale_init, name='norm1')(x, train=train)
    y = conv(self.mid, 3, 1, 'in', 'mid', 'conv1')(nn.relu(y))
    y = layers.Norm('mid', self.scale_init, name='norm2')(y, train=train)
    y = conv(self.features, 3, self.stride, 'mid', 'out', 'conv2')(nn.relu(y))
    if gate is not None:
      y = gate.astype(y.dtype) * y
    if self.projects:
      x = conv(self.features, 1, self.stride, 'in', 'out', 'shortcut_conv')(x)
    return y + x


class Head(base.Module):
  """Norm, ReLU, average over all positions, a dense layer.

  Attributes:
    classes: number of logits.
    scale_init: see `layers.Norm`.
  """

  classes: int = 10
  scale_init: str = 'ones'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del gate
    x = layers.Norm('in', self.scale_init, name='norm')(x, train=train)
    x = jnp.mean(layers.widened(nn.relu(x)), (1, 2))
    return layers.Dense(self.classes, writes='classes', name='dense')(x)


@dataclasses.dataclass(frozen=True)
class WideResNet(common.Published):
  """A wide residual family.

  Attributes:
    name: key of the family.
    title: name in the paper.
    depths: blocks per stage.
    widths: width per stage, 16, 32 and 64 times the factor of the paper.
    stem: width of the stem.
  """

  name: str
  title: str
  depths: tuple[int, ...]
  widths: tuple[int, ...]
  stem: int = 16

  inner = ('mid',)
  milestones = 'wide'

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    return {'stem': self.stem, **common.streams(widths)}

  def parts(
      self, architecture: architecture_lib.Architecture
  ) -> tuple[base.Part, ...]:
    option, sizes = dict(architecture.options), dict(architecture.sizes)
    scale_init, scheme = option['bn_scale_init'], option['stem']
    stem = Stem(features=sizes['stem'], init_scheme=scheme)
    stream = 'stem'
    chain = [common.stem_part(architecture, stream, stem)]
    for stage, names in enumerate(architecture.stages):
      for index, block in enumerate(names):
        module = PreActivationBlock(
            mid=sizes[f'{block}.mid'],
            features=sizes[f's{stage}'],
            stride=2 if stage > 0 and index == 0 else 1,
            projects=index == 0,
            scale_init=scale_init,
            init_scheme=scheme,
        )
        axes = (
            ('in', stream), ('out', f's{stage}'), ('mid', f'{block}.mid')
        )
        shape = base.output_shape(chain[-1])
        chain.append(base.Part(block, module, axes, shape))
        stream = f's{stage}'
    head = Head(classes=sizes['classes'], scale_init=scale_init)
    axes = (('in', stream), ('classes', 'classes'))
    shape = base.output_shape(chain[-1])
    return (*chain, base.Part('head', head, axes, shape))

  def layers(self, depths: Sequence[int]) -> int:
    return 2 * sum(depths) + 2


WRN28 = WideResNet('wrn28_10', 'WRN-28-10', (4, 4, 4), (160, 320, 640))
