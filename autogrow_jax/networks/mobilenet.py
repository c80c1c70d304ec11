"""MobileNet V1 (Howard et al. 2017).

A block is a depthwise 3x3 convolution, which carries the stride, norm, ReLU, a
pointwise convolution, norm, ReLU. Every pointwise convolution writes an axis of
its own, `<block>.out`; the next block's depthwise convolution keeps it, channel
by channel, and its pointwise one reads it.

`widths` contain the paper's width multiplier: 0.5 is 32-64-128-256-512. The
stem is half as wide as the first stage.
"""

from collections.abc import Sequence
import dataclasses

from flax import linen as nn

from autogrow_jax import layers
from autogrow_jax import ops
from autogrow_jax.networks import base
from autogrow_jax.networks import common
from autogrow_jax.networks import plain


class SeparableBlock(base.Module):
  """A depthwise and a pointwise convolution; gated as a plain block is."""

  features: int = 64
  stride: int = 1
  scale_init: str = 'ones'
  init_scheme: str = 'small'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    y = layers.DepthwiseConv(
        3,
        self.stride,
        init_scheme=self.init_scheme,
        plain=self.plain,
        name='depthwise',
    )(x)
    y = ops.relu(common.norm(self, train, 'in', 'norm1')(y))
    y = common.conv(self, self.features, 1, name='pointwise')(y)
    y = ops.relu(common.norm(self, train, 'out', 'norm2')(y))
    return common.faded(x, y, gate)


@dataclasses.dataclass(frozen=True)
class MobileNet(common.Family):
  """A MobileNet family."""

  layers_per_block = 2

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    return {'stem': max(1, widths[0] // 2)}

  def parts(self, architecture: base.Architecture) -> common.Parts:
    starts = common.starts(architecture)
    stem = plain.PlainBlock(
        features=architecture.size('stem'),
        stride=2 if starts['init_scheme'] == 'imagenet' else 1,
        **starts,
    )

    def block_of(block, stage, index):
      module = SeparableBlock(
          features=architecture.size(f'{block}.out'),
          stride=2 if stage > 0 and index == 0 else 1,
          **starts,
      )
      return module, {'out': f'{block}.out'}

    head = common.head_link(architecture)
    return common.chain(architecture, (stem, {'out': 'stem'}), block_of, head)


MOBILENET1 = MobileNet(
    'mobilenet1',
    'MobileNet V1',
    (64, 128, 256, 512, 1024),
    depths=(1, 2, 2, 6, 2),
)
