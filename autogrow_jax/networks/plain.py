"""The plain families of Wen et al. 2020: one convolution per sub-module.

Every block writes a private axis `<block>.out` that the next block reads, so
that each layer can have its own width.
"""

from collections.abc import Sequence
import dataclasses

from flax import linen as nn

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax.networks import base
from autogrow_jax.networks import common


class PlainBlock(base.Module):
  """relu(norm(conv(x))); gated, the block fades into the identity.

  Attributes:
    features: width.
    stride: of the convolution.
    scale_init: see `layers.Norm`.
    init_scheme: see `layers.Conv`.
    bias: see `layers.Conv`.
    halve: halve the image before the convolution.
  """

  features: int = 16
  stride: int = 1
  scale_init: str = 'ones'
  init_scheme: str = 'small'
  bias: bool = False
  halve: bool = False

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    y = layers.Conv(
        self.features,
        3,
        self.stride,
        init_scheme=self.init_scheme,
        plain=self.plain,
        bias=self.bias,
        name='conv',
    )(layers.halve(x) if self.halve else x)
    y = layers.Norm(scale_init=self.scale_init, name='norm')(y, train=train)
    y = nn.relu(y)
    return common.faded(x, y, gate)


@dataclasses.dataclass(frozen=True)
class PlainNet(common.Family):
  """A plain family.

  Attributes:
    name: key of the family.
    title: name in the paper.
    widths: width per stage.
    strides: of the first block per stage.
  """

  name: str
  title: str
  widths: tuple[int, ...]
  strides: tuple[int, ...]
  learning_rate: float = 0.01

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    return {'stem': widths[0]}

  def parts(
      self, architecture: architecture_lib.Architecture
  ) -> tuple[base.Part, ...]:
    option = dict(architecture.options)
    stream = 'stem'
    chain = [common.stem_part(architecture, stream)]
    for stage, names in enumerate(architecture.stages):
      for index, block in enumerate(names):
        chain.append(
            base.Part(
                block,
                PlainBlock(
                    features=architecture.size(f'{block}.out'),
                    stride=self.strides[stage] if index == 0 else 1,
                    scale_init=option['bn_scale_init'],
                    init_scheme=option['stem'],
                ),
                (('in', stream), ('out', f'{block}.out')),
                base.output_shape(chain[-1]),
            )
        )
        stream = f'{block}.out'
    chain.append(common.head_part(architecture, stream, chain))
    return tuple(chain)

  def layers(self, depths: Sequence[int]) -> int:
    return sum(depths) + 2


PLAIN3 = PlainNet('plain3net', 'Plain3Net', (16, 32, 64), (1, 2, 2))
PLAIN4 = PlainNet(
    'plain4net', 'Plain4Net', (64, 128, 256, 512), (1, 2, 2, 2)
)
