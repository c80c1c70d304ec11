"""Language models of stacked LSTM layers, as Zaremba et al. 2014 have them.

    embedding -> layer, a block each -> ... -> softmax over the vocabulary

A stage has an axis of units per block, `<block>.hidden`, which the block's
recurrent kernel and whatever is behind it read; `embedding` is the axis between
the table of words and the first layer. There is one bias per gate.

A training window begins where the one before it in the same row of the batch
has ended: a layer keeps its state, `output` and `cell`, among the statistics
and, at the end of a step, leaves it there without its gradient (truncated
back-propagation through time). So an architecture has a number of `streams`,
the rows of a training batch. Everything but training begins at zero and leaves
that state alone.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax.networks import base
from autogrow_jax.networks import common


class _Dropping(base.Module):
  """What drops units on its way in.

  Attributes:
    keep: probability with which a unit stays, in training.
    bound: parameters start as U(+-bound).
  """

  keep: float = 1.0
  bound: float = 0.04

  @property
  def is_random(self) -> bool:
    return self.keep < 1

  def dropped(self, x: jax.Array, train: bool | jax.Array) -> jax.Array:
    """Units that stay, scaled up; all of them outside training."""
    if train is not True or not self.has_rng('dropout') or self.keep == 1:
      return x
    stays = jax.random.bernoulli(self.make_rng('dropout'), self.keep, x.shape)
    return jnp.where(stays, x / self.keep, 0)


class Words(base.Module):
  """The embedding: a row of a table for each word.

  Attributes:
    vocabulary: number of words.
    features: length of a row.
    bound: entries start as U(+-bound).
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
  """A layer of LSTM; gated as a plain block is.

  Attributes:
    features: number of units.
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
    goes_on = train is True and not self.is_initializing()
    if goes_on and len(x) != self.streams:
      raise ValueError(
          f'A training batch has {len(x)} rows, but the network carries the '
          f'state of {self.streams} streams of text; they must agree.'
      )
    if goes_on:
      state = tuple(variable.value.astype(x.dtype) for variable in kept)
    else:
      state = (jnp.zeros((len(x), self.features), x.dtype),) * 2
    lstm = layers.LSTM(self.features, self.bound, name='lstm')
    y, state = lstm(self.dropped(x, train), state)
    if goes_on:
      for variable, value in zip(kept, state, strict=True):
        value = lax.stop_gradient(value)
        variable.value = value.astype(variable.value.dtype)
    return common.faded(x, y, gate)


class Softmax(_Dropping):
  """A dense layer at every step.

  Attributes:
    classes: number of words.
  """

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
class StackedLSTM(base.Network):
  """A family of language models.

  Options: `widths`, units per stage; `embedding`, by default as wide as the
  first stage; `keep`, the probability with which a unit stays in training, on
  the way into each layer and into the softmax; `init_bound`, of the uniform
  distribution that all parameters start from; `streams`, rows of a training
  batch.

  The published rate of 1 and largest gradient of 10 are of a loss that is
  summed over the 35 steps of a window. Here it is the mean, so that they are 35
  and 10/35, which is 0.286.

  Attributes:
    name: key of the family.
    title: name in papers.
    widths: units per stage.
    learning_rate: the top rate that suits it, for windows of 35 steps.
  """

  name: str
  title: str
  widths: tuple[int, ...]
  learning_rate: float = 35.0

  fixed_axes: ClassVar[tuple[str, ...]] = ('embedding', 'classes')
  inputs: ClassVar[str] = 'tokens'
  milestones: ClassVar[str | None] = 'zaremba'

  def seed(
      self,
      depths: Sequence[int],
      *,
      input_shape: Sequence[int],
      classes: int,
      options: Mapping[str, Any],
  ) -> architecture_lib.Architecture:
    if tuple(input_shape) != (1,):
      raise ValueError(
          f'{self.title} reads text, not inputs of the shape {input_shape}; '
          'choose --dataset=topics or text:PATH, or another --network.'
      )
    depths = common.checked_depths(self, depths)
    given = {name: item for name, item in options.items() if item is not None}
    widths = common.checked_widths(self, given.pop('widths', self.widths))
    embedding = given.pop('embedding', widths[0])
    resolved = {
        'keep': float(given.pop('keep', 1)),
        'init_bound': float(given.pop('init_bound', 0.04)),
        'streams': given.pop('streams', 20),
    }
    if given:
      raise ValueError(f'{self.title} has no options {sorted(given)}.')
    if not 0 < resolved['keep'] <= 1:
      raise ValueError(
          f'keep is above 0 and at most 1, got {resolved["keep"]}.'
      )
    if not 0 < resolved['init_bound'] < float('inf'):
      raise ValueError(
          f'init_bound is a positive number, got {resolved["init_bound"]}.'
      )
    blocks = common.name_blocks(depths)
    hidden = {
        f'{block}.hidden': width
        for names, width in zip(blocks, widths, strict=True)
        for block in names
    }
    sizes = {'embedding': embedding, 'classes': classes, **hidden}
    return common.build(self.name, blocks, sizes, resolved)

  def parts(
      self, architecture: architecture_lib.Architecture
  ) -> tuple[base.Part, ...]:
    option, sizes = dict(architecture.options), dict(architecture.sizes)
    dropping = {'keep': option['keep'], 'bound': option['init_bound']}
    words = Words(
        vocabulary=sizes['classes'],
        features=sizes['embedding'],
        bound=option['init_bound'],
    )
    stream = 'embedding'
    chain = [base.Part('stem', words, (('out', stream),), (1,))]
    for block in (name for stage in architecture.stages for name in stage):
      module = RecurrentBlock(
          features=sizes[f'{block}.hidden'],
          streams=option['streams'],
          **dropping,
      )
      axes = (('in', stream), ('out', f'{block}.hidden'))
      chain.append(base.Part(block, module, axes, (1, sizes[stream])))
      stream = f'{block}.hidden'
    head = Softmax(classes=sizes['classes'], **dropping)
    axes = (('in', stream), ('classes', 'classes'))
    return (*chain, base.Part('head', head, axes, (1, sizes[stream])))

  def layers(self, depths: Sequence[int]) -> int:
    return sum(depths)


LSTM2 = StackedLSTM('lstm2', 'Two-layer stacked LSTM', (1500, 1500))
