"""VGG with batch norm for small images (Simonyan and Zisserman 2015).

Stages are 3x3 convolutions, each with norm and ReLU; a 2x2 maximum halves the
images after every stage. The head averages over the remaining positions (one,
for images of 32x32 pixels) and ends in a dense layer. Every convolution writes
an axis of its own, `<block>.out`, so that all widths can change separately.

VGG-16 is the network of https://github.com/kuangliu/pytorch-cifar, whose
convolutions have biases, VGG-19 that of https://github.com/klightz/Firefly,
without biases. Some papers count a further dense layer to VGG-16: a sixth
number in `widths` is the width of a hidden layer of the head.
"""

import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from autogrow_jax import layers
from autogrow_jax import ops
from autogrow_jax.networks import base
from autogrow_jax.networks import common
from autogrow_jax.networks import plain

HIDDEN = 'head.hidden'  # The axis of the head's hidden layer, if it has one.


class HalvingHead(base.Module):
  """Halves, averages over positions; an optional hidden layer; a dense layer.

  Attributes:
    hidden: width of the hidden layer, None for a head without one.
  """

  classes: int = 10
  hidden: int | None = None

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del train, gate
    x, reads = jnp.mean(layers.widened(ops.halve(x)), (1, 2)), 'in'
    if self.hidden is not None:
      x = layers.Dense(self.hidden, writes='hidden', name='hidden')(x)
      x, reads = ops.relu(x), 'hidden'
    return layers.Dense(self.classes, reads, 'classes', name='dense')(x)


@dataclasses.dataclass(frozen=True)
class VGG(common.Family):
  """A VGG family.

  Attributes:
    bias: give the convolutions biases.
  """

  bias: bool = False

  optional = (HIDDEN,)
  other_layers = 1  # The hidden layer of the head doesn't count.

  def parts(self, architecture: base.Architecture) -> common.Parts:
    sizes = dict(architecture.sizes)

    def block_of(block, stage, index):
      module = plain.PlainBlock(
          features=sizes[f'{block}.out'],
          bias=self.bias,
          halve=stage > 0 and index == 0,
          **common.starts(architecture),
      )
      return module, {'out': f'{block}.out'}

    head = HalvingHead(classes=sizes['classes'], hidden=sizes.get(HIDDEN))
    axes = {'hidden': HIDDEN} if HIDDEN in sizes else {}
    return common.chain(architecture, None, block_of, (head, axes))


_WIDTHS = (64, 128, 256, 512, 512)
VGG16 = VGG('vgg16', 'VGG-16', _WIDTHS, bias=True, depths=(2, 2, 3, 3, 3))
VGG19 = VGG('vgg19', 'VGG-19', _WIDTHS, depths=(2, 2, 4, 4, 4))
