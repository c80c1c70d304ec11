"""A multilayer perceptron, by default LeNet-300-100 (LeCun et al. 1998).

A stage holds hidden layers of one width, and a block is one of them. Every
layer writes an axis of its own, `<block>.out`. The first one reads whole
images; its kernel keeps their channels apart, (height, width, image, out).
"""

import dataclasses

from flax import linen as nn

from autogrow_jax import layers
from autogrow_jax import ops
from autogrow_jax.networks import base
from autogrow_jax.networks import common


class DenseBlock(base.Module):
  """relu(dense(x)); gated as a plain block is."""

  features: int = 100

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del train
    y = ops.relu(layers.Dense(self.features, name='dense')(x))
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
  """A family of perceptrons; `block` makes a layer of a number of features."""

  other_layers = 1
  block = DenseBlock

  def parts(self, architecture: base.Architecture) -> common.Parts:
    def block_of(block, stage, index):
      del stage, index
      axis = f'{block}.out'
      return self.block(features=architecture.size(axis)), {'out': axis}

    head = Logits(classes=architecture.size('classes'))
    return common.chain(architecture, None, block_of, (head, {}))


MLP = Perceptron('mlp', 'MLP', (300, 100))
