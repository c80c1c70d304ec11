"""A network is a chain of named parts; how chains are built and executed.

A family implements two functions, `seed` and `parts`. Everything else follows
from the parts: initialisation, axis tables, costs, the exact forward pass and
the fused one, in which runs of identical consecutive blocks are stacked on a
leading dimension and executed by one loop, so that compile time does not grow
with depth. Where a run may still grow, how many of the stack's blocks are there
is data (`runs.py`), so that neither does the number of compilations.

Parameters and statistics are nested dictionaries `{part: {layer: {leaf}}}`.
"""

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import functools
from typing import Any, ClassVar

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax import randomness
from autogrow_jax.networks import runs as runs_lib

Architecture = architecture_lib.Architecture
Tree = dict[str, Any]
Path = tuple[str, ...]

# Statistics of the last training step from which the next one goes on in the
# same text: outputs and cells, with a leading dimension of streams.
CARRIED = ('output', 'cell')


class Module(nn.Module):
  """What a family's modules have in common; equal fields mean equal programs.

  A module is called as `module(x, train=..., gate=...)`; `gate` is a scalar
  that only growable blocks get, `train` a bool or a traced one.

  Attributes:
    plain: use XLA's own convolution derivative (see `layers.conv`).
    last_norm: the layer that ends the residual branch, for the initialisers
      that act on it; None for a module without one.
    is_random: whether it draws in training, see `apply`.
  """

  plain: bool = False
  last_norm: ClassVar[str | None] = None

  @property
  def last_layer(self) -> str | None:
    """The layer that ends the residual branch, a norm or not."""
    return self.last_norm

  @property
  def is_random(self) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Part:
  """One link of the chain.

  Attributes:
    name: block name, 'stem' or 'head'.
    module: the Linen module; names no global axis, so that identical blocks are
      equal.
    axes: (local, global) axis names.
    input_shape: of what enters, without the batch: (height, width, channel),
      (unit,) behind a dense layer, (step,) or (step, unit) in text, where it is
      that of one step.
  """

  name: str
  module: Module
  axes: tuple[tuple[str, str], ...]
  input_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Segment:
  """Consecutive parts with equal modules, executed as one.

  Attributes:
    key: name in packed trees; depends on the position, not on block names.
    module: their common module.
    length: of the stack, the number of parts or a capacity that it is filled up
      to; None for a single part that is not stacked.
    remat: whether the backward pass computes each part again from its input,
      rather than keep what it computed.
  """

  key: str
  module: Module
  length: int | None
  remat: bool = False


class Network(abc.ABC):
  """A family of networks. Implementations are frozen dataclasses.

  Attributes:
    name: key of the family.
    title: its name in papers.
    widths: base width per stage; their number is the number of stages.
    learning_rate: the top rate that suits it.
    fixed_axes: those whose size is given by the data or the task.
    inputs: what it takes, 'images' or 'tokens'; see `data.Preprocessing`.
    milestones: of its learning rate, see `optimizers.Schedule`; None for those
      of the stem.
  """

  fixed_axes: ClassVar[tuple[str, ...]] = ('image', 'classes')
  inputs: ClassVar[str] = 'images'
  milestones: ClassVar[str | None] = None

  name: str
  title: str
  widths: tuple[int, ...]
  learning_rate: float = 0.1

  @property
  def seed_depths(self) -> tuple[int, ...]:
    """Blocks per stage of a seed whose depths are not given: one each."""
    return (1,) * len(self.widths)

  @abc.abstractmethod
  def seed(
      self,
      depths: Sequence[int],
      *,
      input_shape: Sequence[int],
      classes: int,
      options: Mapping[str, Any],
  ) -> Architecture:
    """An architecture of this family.

    Args:
      depths: blocks per stage.
      input_shape: (height, width, channel), after padding; of tokens (1,).
      classes: number of classes.
      options: stem, shortcut, bn_scale_init, widths; what is missing or None
        takes the family's default.

    Returns:
      The architecture.
    """

  @abc.abstractmethod
  def parts(self, architecture: Architecture) -> tuple[Part, ...]:
    """The chain that an architecture stands for."""

  @abc.abstractmethod
  def layers(self, depths: Sequence[int]) -> int:
    """Number of layers by the papers' convention."""


def segments(
    architecture: Architecture,
    parts: Sequence[Part],
    *,
    fuse: bool,
    spare: bool = False,
    remat: Collection[int] = (),
) -> tuple[tuple[Segment, tuple[str, ...]], ...]:
  """Groups a chain into segments, with the names of the parts of each.

  Args:
    architecture: says which parts are blocks; only blocks are fused.
    parts: its chain.
    fuse: stack runs of equal blocks; otherwise one segment per part, named as
      the part.
    spare: stack a run that may still grow, the last one of its stage, to a
      capacity. The first block of a stage is a run of its own if it is unlike
      those that follow, so it never has one.
    remat: stages whose blocks are computed again in the backward pass; only
      where they are fused.

  Returns:
    (segment, part names) pairs in forward order.
  """
  if not fuse:
    return tuple(
        (Segment(part.name, part.module, None), (part.name,)) for part in parts
    )
  stage_of = {
      block: index
      for index, stage in enumerate(architecture.stages)
      for block in stage
  }
  runs = []  # [(stage or None, [part, ...])]
  for part in parts:
    stage = stage_of.get(part.name)
    if (
        stage is not None
        and runs
        and runs[-1][0] == stage
        and runs[-1][1][0].module == part.module
        and runs[-1][1][0].input_shape == part.input_shape
    ):
      runs[-1][1].append(part)
    else:
      runs.append((stage, [part]))
  result, index = [], {}
  for stage, run in runs:
    names = tuple(part.name for part in run)
    if stage is None:
      result.append((Segment(names[0], run[0].module, None), names))
    else:
      number = index[stage] = index.get(stage, -1) + 1
      is_last = names[-1] == architecture.stages[stage][-1]
      length = len(run) if len(run) > 1 else None
      if spare and is_last and (number or length):
        length = runs_lib.capacity(len(run))
      result.append(
          (
              Segment(
                  f'stage{stage}.{number}',
                  run[0].module,
                  length,
                  remat=stage in remat,
              ),
              names,
          )
      )
  return tuple(result)


def apply(
    chain: Sequence[Segment],
    weights: Tree,
    stats: Tree,
    x: jax.Array,
    *,
    train: bool | jax.Array,
    gates: Tree | None = None,
    key: jax.Array | None = None,
    depths: Tree | None = None,
) -> tuple[jax.Array, Tree]:
  """Runs a chain.

  Args:
    chain: segments in forward order.
    weights: `{segment key: parameters}`, stacked where the segment is.
    stats: likewise, the statistics.
    x: (batch, ...), already preprocessed.
    train: use and update batch statistics. A traced bool selects at run time;
      it stands for a look at the network in passing, without what lasts from
      one batch to the next.
    gates: optional `{segment key: scalar, or (length,) vector}` for blocks.
    key: of what is random in training; without one, nothing is.
    depths: `{segment key: int32 scalar}`, how many of a stack's first parts are
      there; of segments without one, all. No gradient flows through the new
      statistics of those with one.

  Returns:
    The logits (batch, ..., classes) in float32, and the new statistics.
  """
  depths = depths or {}
  new_stats, position = {}, 0
  for segment in chain:
    name = segment.key
    gate = None if gates is None else gates.get(name)

    def run(
        x, weights, stats, gate, position,
        train=train, key=key, module=segment.module,
    ):
      random = (
          {}
          if key is None or not module.is_random
          else {'dropout': jax.random.fold_in(key, position)}
      )
      y, changed = module.apply(
          {'params': weights, 'stats': stats},
          x,
          train=train,
          gate=gate,
          rngs=random,
          mutable=['stats'],
      )
      return y, changed.get('stats', {})

    if segment.remat:
      run = _rematerialized(run, in_loop=segment.length is not None)
    if segment.length is None:
      x, new_stats[name] = run(x, weights[name], stats[name], gate, position)
    elif name in depths:
      x, new_stats[name] = runs_lib.run(
          run,
          depths[name],
          x,
          (weights[name], stats[name], gate),
          position=position,
          train=train,
          key=key,
      )
    else:
      positions = jnp.arange(position, position + segment.length)
      x, new_stats[name] = lax.scan(
          lambda x, part, run=run: run(x, *part),
          x,
          (weights[name], stats[name], gate, positions),
      )
    position += depths.get(name, segment.length or 1)
  return x, new_stats


def _rematerialized(
    run: Callable[..., Any], *, in_loop: bool
) -> Callable[..., Any]:
  """A block of which the backward pass finds its arguments alone."""

  def again(*arguments, **rest):
    static = {}
    if isinstance(rest.get('train'), bool):  # Which must not become traced.
      static['train'] = rest.pop('train')
    # In a loop nothing else could be told to be the same.
    return jax.checkpoint(
        functools.partial(run, **static), prevent_cse=not in_loop
    )(*arguments, **rest)

  return again


def rewound(stats: Tree) -> Tree:
  """Statistics, packed or not, at the beginning of the text."""

  def rewind(path, leaf):
    if path[-1].key not in CARRIED:
      return leaf
    zeros = np.zeros(leaf.shape, leaf.dtype)
    if isinstance(leaf, jax.Array):
      return jax.device_put(zeros, leaf.sharding, may_alias=False)
    return zeros

  return jax.tree_util.tree_map_with_path(rewind, stats)


def init(part: Part, key: jax.Array) -> tuple[Tree, Tree]:
  """Fresh (weights, statistics) of one part; folds in the part's name.

  Args:
    part: the part.
    key: the stream of initialisations, shared by all parts of a network.

  Returns:
    Its weights and its statistics.
  """
  return _init(part.module, part.input_shape)(
      randomness.stream(key, part.name)
  )


def axes(part: Part) -> dict[Path, tuple[str, layers.Axes]]:
  """Named axes of a part's leaves.

  Returns:
    `{(part, layer, leaf): (collection, axes)}` with global axis names;
    collection is 'params' or 'stats'.
  """
  names = dict(part.axes)

  def rename(axis):
    if axis is None:
      return None
    return layers.Axis(names[axis.name], axis.role)

  return {
      (part.name, *path): (collection, tuple(map(rename, leaf_axes)))
      for (collection, *path), leaf_axes in _local_axes(
          part.module, part.input_shape
      ).items()
  }


def shapes(part: Part) -> tuple[Tree, Tree]:
  """(weights, statistics) of one part as `jax.ShapeDtypeStruct`s.

  They are shared by all equal parts, and not to be changed.
  """
  return _shapes(part.module, part.input_shape)


def output_shape(part: Part) -> tuple[int, ...]:
  """Shape, without the batch, of what leaves a part."""
  output, _ = _abstract(part.module, part.input_shape)
  return output.shape[1:]


@functools.lru_cache(maxsize=None)
def _init(module: Module, input_shape: tuple[int, ...]) -> Any:
  """The jitted initialiser of a module; the forward pass is dead code.

  It runs once, so it is compiled without optimisation: four times faster.
  """

  def fresh(key):
    variables = nn.meta.unbox(
        module.init(key, jnp.zeros((1, *input_shape)), train=False)
    )
    return variables.get('params', {}), variables.get('stats', {})

  return jax.jit(
      fresh, compiler_options={'xla_backend_optimization_level': 0}
  )


@functools.lru_cache(maxsize=None)
def _abstract(
    module: Module, input_shape: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, Tree]:
  """Output and boxed variables, for a batch of one."""
  return jax.eval_shape(
      lambda: module.init_with_output(
          jax.random.key(0), jnp.zeros((1, *input_shape)), train=False
      )
  )


@functools.lru_cache(maxsize=None)
def _shapes(module: Module, input_shape: tuple[int, ...]) -> tuple[Tree, Tree]:
  unboxed = nn.meta.unbox(_abstract(module, input_shape)[1])
  return unboxed.get('params', {}), unboxed.get('stats', {})


@functools.lru_cache(maxsize=None)
def _local_axes(
    module: Module, input_shape: tuple[int, ...]
) -> dict[Path, layers.Axes]:
  boxes = jax.tree_util.tree_leaves_with_path(
      _abstract(module, input_shape)[1],
      is_leaf=lambda node: isinstance(node, layers.Named),
  )
  return {
      tuple(entry.key for entry in path): box.axes for path, box in boxes
  }
