"""The plain families of Wen et al. 2020: one convolution per sub-module.

Every block writes a private axis `<block>.out` that the next block reads, so
that each layer can have its own width.
"""

from collections.abc import Sequence
import dataclasses

from flax import linen as nn

from autogrow_jax import ops
from autogrow_jax.networks import base
from autogrow_jax.networks import common


class PlainBlock(base.Module):
  """relu(norm(conv(x))); a gate fades the block into the identity.

  Attributes:
    bias: give the convolution a bias.
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
    y = common.conv(
        self, self.features, 3, stride=self.stride, bias=self.bias, name='conv'
    )(ops.halve(x) if self.halve else x)
    y = ops.relu(common.norm(self, train, 'out', 'norm')(y))
    return common.faded(x, y, gate)


@dataclasses.dataclass(frozen=True)
class PlainNet(common.Family):
  """A plain family.

  Attributes:
    strides: stride of the first block per stage, pixels.
  """

  strides: tuple[int, ...]
  learning_rate: float = dataclasses.field(default=0.01, kw_only=True)

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    return {'stem': widths[0]}

  def parts(self, architecture: base.Architecture) -> common.Parts:
    def block_of(block, stage, index):
      module = PlainBlock(
          features=architecture.size(f'{block}.out'),
          stride=self.strides[stage] if index == 0 else 1,
          **common.starts(architecture),
      )
      return module, {'out': f'{block}.out'}

    return common.chain(
        architecture,
        common.stem_link(architecture, 'stem'),
        block_of,
        common.head_link(architecture),
    )


PLAIN3 = PlainNet('plain3net', 'Plain3Net', (16, 32, 64), (1, 2, 2))
PLAIN4 = PlainNet(
    'plain4net', 'Plain4Net', (64, 128, 256, 512), (1, 2, 2, 2)
)
