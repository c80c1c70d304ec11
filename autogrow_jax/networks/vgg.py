"""VGG with batch norm for small images (Simonyan and Zisserman 2015).

Stages of 3x3 convolutions, each with norm and ReLU; images are halved by a 2x2
maximum after every stage; then the mean over what positions are left (of 32x32
pixels one) and a dense layer. Every convolution writes an axis of its own,
`<block>.out`, so that all widths can change separately.

VGG-16 is the network of https://github.com/kuangliu/pytorch-cifar, whose
convolutions have biases, VGG-19 that of https://github.com/klightz/Firefly,
whose have none. Some count a further dense layer to VGG-16: a sixth number in
`widths` is the width of a hidden layer of the head.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax.networks import base
from autogrow_jax.networks import common
from autogrow_jax.networks import plain

HIDDEN = 'head.hidden'  # The axis of the head's hidden layer, if it has one.


class Head(base.Module):
  """Halves, averages over positions; a hidden layer or none; a dense layer.

  Attributes:
    classes: number of logits.
    hidden: width of the hidden layer, None for a head without one.
  """

  classes: int = 10
  hidden: int | None = None

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del train, gate
    x, reads = jnp.mean(layers.widened(layers.halve(x)), (1, 2)), 'in'
    if self.hidden is not None:
      x = layers.Dense(self.hidden, writes='hidden', name='hidden')(x)
      x, reads = nn.relu(x), 'hidden'
    return layers.Dense(self.classes, reads, 'classes', name='dense')(x)


@dataclasses.dataclass(frozen=True)
class VGG(common.Published):
  """A VGG family.

  Attributes:
    name: key of the family.
    title: name in papers.
    depths: convolutions per stage.
    widths: width per stage.
    bias: whether convolutions have biases.
  """

  name: str
  title: str
  depths: tuple[int, ...]
  widths: tuple[int, ...] = (64, 128, 256, 512, 512)
  bias: bool = False

  def seed(
      self,
      depths: Sequence[int],
      *,
      input_shape: Sequence[int],
      classes: int,
      options: Mapping[str, Any],
  ) -> architecture_lib.Architecture:
    widths = tuple(options.get('widths') or self.widths)
    stages = len(self.widths)
    hidden = widths[stages:]
    if len(hidden) > 1 or 0 in hidden:
      raise ValueError(
          f'{self.title} takes {stages} positive widths, and one more for a '
          f'hidden layer of the head, got {"-".join(map(str, widths))}.'
      )
    architecture = super().seed(
        depths,
        input_shape=input_shape,
        classes=classes,
        options={**options, 'widths': widths[:stages]},
    )
    sizes = (*architecture.sizes, *((HIDDEN, width) for width in hidden))
    return dataclasses.replace(architecture, sizes=tuple(sorted(sizes)))

  def parts(
      self, architecture: architecture_lib.Architecture
  ) -> tuple[base.Part, ...]:
    option, sizes = dict(architecture.options), dict(architecture.sizes)
    stream, chain = 'image', []
    shape = (*option['resolution'], sizes['image'])
    for stage, names in enumerate(architecture.stages):
      for index, block in enumerate(names):
        module = plain.PlainBlock(
            features=sizes[f'{block}.out'],
            scale_init=option['bn_scale_init'],
            init_scheme=option['stem'],
            bias=self.bias,
            halve=stage > 0 and index == 0,
        )
        axes = (('in', stream), ('out', f'{block}.out'))
        chain.append(base.Part(block, module, axes, shape))
        stream, shape = f'{block}.out', base.output_shape(chain[-1])
    hidden = sizes.get(HIDDEN)
    axes = (('in', stream), ('classes', 'classes'))
    if hidden is not None:
      axes += (('hidden', HIDDEN),)
    head = Head(classes=sizes['classes'], hidden=hidden)
    return (*chain, base.Part('head', head, axes, shape))

  def layers(self, depths: Sequence[int]) -> int:
    """Convolutions and the last dense layer."""
    return sum(depths) + 1


VGG16 = VGG('vgg16', 'VGG-16', (2, 2, 3, 3, 3), bias=True)
VGG19 = VGG('vgg19', 'VGG-19', (2, 2, 4, 4, 4))
