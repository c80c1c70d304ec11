"""MobileNet V1 (Howard et al. 2017).

A block is a depthwise 3x3 convolution (which carries the stride), norm, ReLU, a
pointwise convolution, norm, ReLU. Every pointwise convolution writes an axis of
its own, `<block>.out`; the depthwise one behind it keeps it, channel by
channel, and the next pointwise one reads it.

The width multiplier of the paper is in `widths`: 0.5 is 32-64-128-256-512. The
stem is half as wide as the first stage.
"""

from collections.abc import Sequence
import dataclasses

from flax import linen as nn

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax.networks import base
from autogrow_jax.networks import common
from autogrow_jax.networks import plain


class SeparableBlock(base.Module):
  """A depthwise and a pointwise convolution; gated as a plain block is.

  Attributes:
    features: width.
    stride: of the depthwise convolution.
    scale_init: see `layers.Norm`.
    init_scheme: see `layers.Conv`.
  """

  features: int = 64
  stride: int = 1
  scale_init: str = 'ones'
  init_scheme: str = 'small'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    norm = lambda y, axis, name: nn.relu(
        layers.Norm(axis, self.scale_init, name=name)(y, train=train)
    )
    y = layers.DepthwiseConv(
        3,
        self.stride,
        init_scheme=self.init_scheme,
        plain=self.plain,
        name='depthwise',
    )(x)
    y = norm(y, 'in', 'norm1')
    y = layers.Conv(
        self.features,
        1,
        init_scheme=self.init_scheme,
        plain=self.plain,
        name='pointwise',
    )(y)
    y = norm(y, 'out', 'norm2')
    return common.faded(x, y, gate)


@dataclasses.dataclass(frozen=True)
class MobileNet(common.Published):
  """A MobileNet family.

  Attributes:
    name: key of the family.
    title: name in the paper.
    depths: blocks per stage.
    widths: width per stage.
  """

  name: str
  title: str
  depths: tuple[int, ...]
  widths: tuple[int, ...]

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    return {'stem': max(1, widths[0] // 2)}

  def parts(
      self, architecture: architecture_lib.Architecture
  ) -> tuple[base.Part, ...]:
    option, sizes = dict(architecture.options), dict(architecture.sizes)
    kind = {
        'scale_init': option['bn_scale_init'], 'init_scheme': option['stem']
    }
    stride = 2 if option['stem'] == 'imagenet' else 1
    stem = plain.PlainBlock(features=sizes['stem'], stride=stride, **kind)
    stream = 'stem'
    chain = [common.stem_part(architecture, stream, stem)]
    for stage, names in enumerate(architecture.stages):
      for index, block in enumerate(names):
        module = SeparableBlock(
            features=sizes[f'{block}.out'],
            stride=2 if stage > 0 and index == 0 else 1,
            **kind,
        )
        axes = (('in', stream), ('out', f'{block}.out'))
        shape = base.output_shape(chain[-1])
        chain.append(base.Part(block, module, axes, shape))
        stream = f'{block}.out'
    chain.append(common.head_part(architecture, stream, chain))
    return tuple(chain)

  def layers(self, depths: Sequence[int]) -> int:
    """Depthwise and pointwise convolutions count one each."""
    return 2 * sum(depths) + 2


MOBILENET1 = MobileNet(
    'mobilenet1', 'MobileNet V1', (1, 2, 2, 6, 2), (64, 128, 256, 512, 1024)
)
