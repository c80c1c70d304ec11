"""Language models of stacked LSTM layers (Zaremba et al. 2014).

    embedding -> layers, a block each -> softmax over the vocabulary

Every block has an axis of units, `<block>.hidden`, which its recurrent kernel
and the next layer read; `embedding` is the axis between the table of words and
the first layer. There is one bias per gate.

A training window begins where the one before it in the same row of the batch
ended: a layer keeps its state, `output` and `cell`, among the statistics, and
no gradient passes from one window to the next (truncated back-propagation
through time). So an architecture has a number of `streams`, the rows of a
training batch. Evaluation begins at zero and leaves that state alone.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from autogrow_jax import layers
from autogrow_jax.networks import base
from autogrow_jax.networks import common


class _Dropping(base.Module):
  """Base of modules that drop units of their input in training.

  Attributes:
    keep: probability with which a unit stays in training.
    bound: largest parameter at the start.
  """

  keep: float = 1.0
  bound: float = 0.04

  @property
  def is_random(self) -> bool:
    return self.keep < 1

  def dropped(self, x: jax.Array, train: bool | jax.Array) -> jax.Array:
    """Drops units and scales up the others; does nothing outside training."""
    if train is not True or not self.has_rng('dropout') or self.keep == 1:
      return x
    stays = jax.random.bernoulli(self.make_rng('dropout'), self.keep, x.shape)
    return jnp.where(stays, x / self.keep, 0)


class Words(base.Module):
  """The embedding: a table with a row for each word.

  Attributes:
    vocabulary: number of different words.
    bound: largest entry at the start.
  """

  vocabulary: int = 10_000
  features: int = 1500
  bound: float = 0.04

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del train, gate
    return layers.Embedding(
        self.vocabulary, self.features, self.bound, name='embedding'
    )(x)


class RecurrentBlock(_Dropping):
  """An LSTM layer; gated as a plain block is.

  Attributes:
    streams: rows of a training batch.
  """

  features: int = 1500
  streams: int = 20

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    shape = (self.streams, self.features)
    axes = (None, layers.Axis('out', 'neither'))
    kept = [
        self.variable('stats', name, layers.named(jnp.zeros, axes), shape)
        for name in base.CARRIED
    ]
    continues = train is True and not self.is_initializing()
    if continues and x.shape[0] != self.streams:
      raise ValueError(
          f'A training batch has {x.shape[0]} rows, but the network carries '
          f'the state of {self.streams} streams of text; they must agree.'
      )
    if continues:
      state = tuple(variable.value.astype(x.dtype) for variable in kept)
    else:
      state = (jnp.zeros((x.shape[0], self.features), x.dtype),) * 2
    lstm = layers.LSTM(self.features, self.bound, name='lstm')
    y, state = lstm(self.dropped(x, train), state)
    if continues:
      for variable, value in zip(kept, state, strict=True):
        value = lax.stop_gradient(value)
        variable.value = value.astype(variable.value.dtype)
    return common.faded(x, y, gate)


class Softmax(_Dropping):
  """A dense layer at every step."""

  classes: int = 10_000

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del gate
    dense = layers.Dense(
        self.classes, writes='classes', bound=self.bound, name='dense'
    )
    y = dense(self.dropped(x, train).reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class StackedLSTM(common.Family):
  """A family of language models.

  Units drop out on the way into each layer and into the softmax. The option
  `streams` is the number of rows of a training batch.

  The published learning rate of 1 and gradient norm of 10 belong to a loss that
  is summed over the 35 steps of a window. The loss here is the mean, so that
  they become 35 and 10/35, which is 0.286.
  """

  inner = ('hidden',)
  fixed_axes = ('embedding', 'classes')
  inputs = 'tokens'
  milestones = 'zaremba'
  other_layers = 0

  def resolve(
      self,
      given: dict[str, Any],
      input_shape: Sequence[int],
      widths: Sequence[int],
  ) -> tuple[dict[str, Any], dict[str, int]]:
    if tuple(input_shape) != (1,):
      raise ValueError(
          f'{self.title} reads text, not inputs of the shape {input_shape}; '
          'choose --dataset=topics or text:PATH, or another --network.'
      )
    resolved = {
        'keep': float(given.pop('keep', 1)),
        'init_bound': float(given.pop('init_bound', 0.04)),
        'streams': given.pop('streams', 20),
    }
    if not 0 < resolved['keep'] <= 1:
      raise ValueError(
          f'keep is above 0 and at most 1, got {resolved["keep"]}.'
      )
    if not 0 < resolved['init_bound'] < float('inf'):
      raise ValueError(
          f'init_bound is a positive number, got {resolved["init_bound"]}.'
      )
    return resolved, {'embedding': given.pop('embedding', widths[0])}

  def parts(self, architecture: base.Architecture) -> common.Parts:
    option, sizes = dict(architecture.options), dict(architecture.sizes)
    dropping = {'keep': option['keep'], 'bound': option['init_bound']}
    words = Words(
        vocabulary=sizes['classes'],
        features=sizes['embedding'],
        bound=option['init_bound'],
    )

    def block_of(block, stage, index):
      del stage, index
      axis = f'{block}.hidden'
      module = RecurrentBlock(
          features=sizes[axis], streams=option['streams'], **dropping
      )
      return module, {'out': axis}

    head = Softmax(classes=sizes['classes'], **dropping)
    stem = words, {'out': 'embedding'}
    return common.chain(architecture, stem, block_of, (head, {}))


LSTM2 = StackedLSTM(
    'lstm2', 'Two-layer stacked LSTM', (1500, 1500), learning_rate=35.0
)
