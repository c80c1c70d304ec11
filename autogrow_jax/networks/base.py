"""Networks as chains of named parts: what they are and how they are executed.

A family implements two functions, `seed` and `parts`. Everything else follows
from the parts: initialisation, axis tables, costs, the exact forward pass and
the fused one. The fused one stacks equal consecutive blocks on a leading
dimension and executes them by one loop, so that compile time does not grow with
depth. Where a stack may still grow, its number of blocks is data (`loops.py`),
so that the number of compilations does not grow with depth either.

Parameters and statistics are nested dictionaries `{part: {layer: {leaf}}}`.
"""

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any, ClassVar

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax import randomness
from autogrow_jax.networks import loops

Architecture = architecture_lib.Architecture
Tree = dict[str, Any]
Path = tuple[str, ...]

# Statistics that carry a text's state from one training step to the next:
# outputs and cells, with a leading dimension of streams.
CARRIED = ('output', 'cell')


class Module(nn.Module):
  """Base of the modules of all families; equal fields mean equal programs.

  A module is called as `module(x, train=..., gate=...)`; `gate` is a scalar
  that only growable blocks get, `train` a bool or a traced one. Fields that
  many modules have: `features` (width of the output), `classes` (number of
  logits), `stride` (of its k x k convolution, pixels), `scale_init` and
  `init_scheme` (keys of `layers.SCALE_INITS` and `layers.KERNEL_INITS`).

  Attributes:
    plain: use XLA's own convolution derivatives, see `layers.Conv`.
    last_norm: name of the norm that ends the residual branch, on which
      initialisers of new blocks act; None for a module without one.
    is_random: True if it draws random numbers in training.
  """

  plain: bool = False
  last_norm: ClassVar[str | None] = None

  @property
  def last_layer(self) -> str | None:
    """Name of the layer that ends the residual branch, a norm or not."""
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
    input_shape: shape of its input without the batch: (height, width, channel),
      (unit,) behind a dense layer, (1,) or (1, unit) for one step of text.
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
    length: length of the stack: the number of parts, or a capacity; None for a
      single part that is not stacked.
    remat: let the backward pass compute each part again from its input, rather
      than keep intermediate values.
  """

  key: str
  module: Module
  length: int | None
  remat: bool = False


@dataclasses.dataclass(frozen=True)
class Network(abc.ABC):
  """A family of networks. Implementations are frozen dataclasses.

  Attributes:
    name: key of the family.
    title: name in papers.
    widths: base width per stage; their number is the number of stages.
    learning_rate: top learning rate.
    depths: blocks per stage of the published network, if there is one.
    fixed_axes: axes whose size is given by the data or the task.
    inputs: kind of input, 'images' or 'tokens'; see `data.Preprocessing`.
    milestones: schedule of the learning rate, see `optimizers.Schedule`; None
      for that of the stem.
    layers_per_block: layers of a block by the papers' convention.
    other_layers: layers outside blocks by the papers' convention.
  """

  name: str
  title: str
  widths: tuple[int, ...]
  _: dataclasses.KW_ONLY
  learning_rate: float = 0.1
  depths: tuple[int, ...] | None = None

  fixed_axes: ClassVar[tuple[str, ...]] = ('image', 'classes')
  inputs: ClassVar[str] = 'images'
  milestones: ClassVar[str | None] = None
  layers_per_block: ClassVar[int] = 1
  other_layers: ClassVar[int] = 2

  @property
  def seed_depths(self) -> tuple[int, ...]:
    """Blocks per stage by default: the published ones, or one each."""
    return self.depths or (1,) * len(self.widths)

  @abc.abstractmethod
  def seed(
      self,
      depths: Sequence[int],
      *,
      input_shape: Sequence[int],
      classes: int,
      options: Mapping[str, Any],
  ) -> Architecture:
    """Makes an architecture of this family.

    Args:
      depths: blocks per stage.
      input_shape: (height, width, channel), after padding; (1,) for text.
      classes: number of classes.
      options: options by name; the family's default stands for a missing one
        and for None.
    """

  @abc.abstractmethod
  def parts(self, architecture: Architecture) -> tuple[Part, ...]:
    """Chain of parts that an architecture stands for."""

  def layers(self, depths: Sequence[int]) -> int:
    """Number of layers by the papers' convention (no projections, no norms)."""
    return self.layers_per_block * sum(depths) + self.other_layers


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
    architecture: tells which parts are blocks; only blocks are fused.
    parts: its chain.
    fuse: stack equal consecutive blocks; otherwise every part is a segment with
      the part's name.
    spare: stack blocks that may still become more, the last ones of a stage, to
      a capacity. The first block of a stage is a segment of its own if it
      differs from those that follow, and then has no capacity.
    remat: stages whose fused blocks are computed again in the backward pass.

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

  def kind(part):
    stage = stage_of.get(part.name)
    if stage is None:
      return (part.name,)
    return stage, part.module, part.input_shape

  result, index = [], {}
  for _, group in itertools.groupby(parts, kind):
    names, modules = zip(*((part.name, part.module) for part in group))
    stage = stage_of.get(names[0])
    if stage is None:
      result.append((Segment(names[0], modules[0], None), names))
      continue
    number = index[stage] = index.get(stage, -1) + 1
    length = len(names) if len(names) > 1 else None
    is_last = names[-1] == architecture.stages[stage][-1]
    if spare and is_last and (number or length):
      length = loops.capacity(len(names))
    key, again = f'stage{stage}.{number}', stage in remat
    result.append((Segment(key, modules[0], length, again), names))
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
  """Computes a chain.

  Args:
    chain: segments in forward order.
    weights: `{segment key: parameters}`, stacked where the segment is.
    stats: `{segment key: statistics}`, stacked likewise.
    x: (batch, ...), already preprocessed.
    train: use and update batch statistics. A traced bool selects at run time;
      then nothing is random, and a text's carried state stays as it is.
    gates: optional `{segment key: scalar, or (length,) vector}` for blocks.
    key: random key of training; None for nothing random.
    depths: `{segment key: int32 scalar}`, number of a stack's first blocks that
      exist; all of them in other segments. No gradient flows through the new
      statistics of segments with such a number.

  Returns:
    The logits (batch, ..., classes) in float32, and the new statistics.
  """
  depths = depths or {}
  new_stats, position = {}, 0
  for segment in chain:
    name = segment.key
    gate = None if gates is None else gates.get(name)
    call = _function_of(segment, train, key)
    if segment.length is None:
      x, new_stats[name] = call(x, weights[name], stats[name], gate, position)
    elif name in depths:
      x, new_stats[name] = loops.repeat(
          call,
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
          lambda x, part, call=call: call(x, *part),
          x,
          (weights[name], stats[name], gate, positions),
      )
    position += depths.get(name, segment.length or 1)
  return x, new_stats


def _function_of(
    segment: Segment, train: bool | jax.Array, key: jax.Array | None
) -> Callable[..., tuple[jax.Array, Tree]]:
  """Function of one block of a segment, see `loops.Block`."""

  def call(x, weights, stats, gate, position, train=train, key=key):
    random = {}
    if key is not None and segment.module.is_random:
      random['dropout'] = jax.random.fold_in(key, position)
    y, changed = segment.module.apply(
        {'params': weights, 'stats': stats},
        x,
        train=train,
        gate=gate,
        rngs=random,
        mutable=['stats'],
    )
    return y, changed.get('stats', {})

  if segment.remat:
    return _rematerialized(call, in_loop=segment.length is not None)
  return call


def _rematerialized(
    call: Callable[..., Any], *, in_loop: bool
) -> Callable[..., Any]:
  """Wraps a block so that the backward pass keeps its arguments only."""

  def again(*arguments, **rest):
    static = {}
    if isinstance(rest.get('train'), bool):  # It must not become traced.
      static['train'] = rest.pop('train')
    # In a loop the compiler can't merge the second computation with the first.
    return jax.checkpoint(
        functools.partial(call, **static), prevent_cse=not in_loop
    )(*arguments, **rest)

  return again


def rewound(stats: Tree) -> Tree:
  """Sets the state of texts among statistics, packed or not, to zero."""

  def rewind(path, leaf):
    if path[-1].key not in CARRIED:
      return leaf
    zeros = np.zeros(leaf.shape, leaf.dtype)
    if isinstance(leaf, jax.Array):
      return jax.device_put(zeros, leaf.sharding, may_alias=False)
    return zeros

  return jax.tree_util.tree_map_with_path(rewind, stats)


def init(part: Part, key: jax.Array) -> tuple[Tree, Tree]:
  """Draws fresh (weights, statistics) of one part; folds in the part's name."""
  return _initialiser(part.module, part.input_shape)(
      randomness.stream(key, part.name)
  )


def axes(part: Part) -> dict[Path, tuple[str, layers.Axes]]:
  """Axes of a part's leaves by (part, layer, leaf), with global names.

  They stand behind the leaf's collection, 'params' or 'stats'.
  """
  names = dict(part.axes)
  rename = lambda axis: axis and layers.Axis(names[axis.name], axis.role)
  local = _local_axes(part.module, part.input_shape)
  return {
      (part.name, *path): (collection, tuple(map(rename, leaf_axes)))
      for (collection, *path), leaf_axes in local.items()
  }


def shapes(part: Part) -> tuple[Tree, Tree]:
  """Shapes of a part's (weights, statistics); equal parts share the trees."""
  return _module_shapes(part.module, part.input_shape)


def output_shape(part: Part) -> tuple[int, ...]:
  """Shape of a part's output, without the batch."""
  output, _ = _abstract(part.module, part.input_shape)
  return output.shape[1:]


@functools.lru_cache(maxsize=None)
def _initialiser(module: Module, input_shape: tuple[int, ...]) -> Any:
  """Compiled initialiser of a module; its forward pass is dead code.

  It is called once, so it is compiled without optimisation: four times faster.
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
def _module_shapes(
    module: Module, input_shape: tuple[int, ...]
) -> tuple[Tree, Tree]:
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
