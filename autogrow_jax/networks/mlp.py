"""A multilayer perceptron, by default LeNet-300-100 (LeCun et al. 1998).

A stage is a run of hidden layers of one width, a block one of them. Every layer
writes an axis of its own, `<block>.out`. The first one reads whole images; its
kernel keeps their channels apart, (height, width, image, out).
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import ClassVar

from flax import linen as nn

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax.networks import base
from autogrow_jax.networks import common


class DenseBlock(base.Module):
  """relu(norm(dense(x))), with or without norm; gated as a plain block is.

  Attributes:
    features: width.
    norm: 'none' or 'batch'.
    scale_init: see `layers.Norm`.
  """

  features: int = 100
  norm: str = 'none'
  scale_init: str = 'ones'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    y = layers.Dense(self.features, name='dense')(x)
    if self.norm == 'batch':
      y = layers.Norm(scale_init=self.scale_init, name='norm')(y, train=train)
    y = nn.relu(y)
    return common.faded(x, y, gate)


class Logits(base.Module):
  """A dense layer."""

  classes: int = 10

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del train, gate
    return layers.Dense(self.classes, writes='classes', name='dense')(x)


@dataclasses.dataclass(frozen=True)
class Perceptron(common.Family):
  """A family of perceptrons; `options['norm']` is 'none' or 'batch'.

  Attributes:
    name: key of the family.
    title: name in papers.
    widths: width per stage.
  """

  name: str
  title: str
  widths: tuple[int, ...]

  choices: ClassVar[Mapping[str, Sequence[str]]] = {'norm': ('none', 'batch')}

  def parts(
      self, architecture: architecture_lib.Architecture
  ) -> tuple[base.Part, ...]:
    option, sizes = dict(architecture.options), dict(architecture.sizes)
    stream, chain = 'image', []
    shape = (*option['resolution'], sizes['image'])
    for block in (name for stage in architecture.stages for name in stage):
      module = DenseBlock(
          features=sizes[f'{block}.out'],
          norm=option['norm'],
          scale_init=option['bn_scale_init'],
      )
      axes = (('in', stream), ('out', f'{block}.out'))
      chain.append(base.Part(block, module, axes, shape))
      stream, shape = f'{block}.out', base.output_shape(chain[-1])
    axes = (('in', stream), ('classes', 'classes'))
    head = Logits(classes=sizes['classes'])
    return (*chain, base.Part('head', head, axes, shape))

  def layers(self, depths: Sequence[int]) -> int:
    return sum(depths) + 1


MLP = Perceptron('mlp', 'MLP', (300, 100))
