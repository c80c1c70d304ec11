"""Loops over equal blocks whose number is data.

Programs depend on a capacity only, to which blocks are stacked; slots without a
block hold zeros that are never read. `lax.scan` has a static length, and JAX's
loops of another length have no derivative, so here is one: the forward loop
stores what each block's pullback needs, and the backward loop pulls back. There
is no forward mode.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

Tree = Any
# (x, weights, stats, gate, position=..., train=..., key=...) -> y, new stats.
Block = Callable[..., tuple[jax.Array, Tree]]


def capacity(length: int) -> int:
  """Length of the stack for a number of blocks: 4, 6, 8, 11, 15, 20, 27, ...

  Each is a third more than the last, since room that is empty takes memory.
  """
  size = 4
  while size < length:
    size = -(-4 * size // 3)
  return size


def repeat(
    block: Block,
    depth: jax.Array,
    x: jax.Array,
    parts: tuple[Tree, Tree, Tree],
    *,
    position: int | jax.Array,
    train: bool | jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, Tree]:
  """Applies the first blocks of a stack, one after another.

  Args:
    block: function of one block; its output has its input's shape and type.
    depth: number of blocks that exist, int32 scalar.
    x: input of the first block.
    parts: (weights, statistics, gates), leaves stacked; gates may be None.
    position: position of the first block in its network.
    train: as in `base.apply`, for all blocks.
    key: as in `base.apply`, for all blocks.

  Returns:
    Output of the last block, and the stacked new statistics. Slots without a
    block keep their statistics, and all derivatives with respect to them are
    zero. No gradient flows through the new statistics.
  """
  shared = {'position': position, 'key': key}
  if isinstance(train, bool):
    block = functools.partial(block, train=train)
  else:
    shared['train'] = train
  return _repeat(block, depth, x, parts, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _repeat(block, depth, x, parts, shared):

  def step(index, carry):
    x, stats = carry
    x, new = block(x, *_slot(parts, index), **_arguments(shared, index))
    return x, _with_slot(stats, new, index)

  return lax.fori_loop(0, depth, step, (x, parts[1]))


def _repeat_forward(block, depth, x, parts, shared):
  length = len(jax.tree.leaves(parts)[0])
  # Traced once, for the shape of the pullback and for the loop.
  differentiate = jax.jit(
      functools.partial(_differentiate, block), inline=True
  )
  first = jnp.int32(0)  # Not 0, whose type is weak: another trace.
  needed = jax.eval_shape(differentiate, parts, shared, first, x)[2]

  def step(index, carry):
    x, stats, saved = carry
    y, new, pullback = differentiate(parts, shared, index, x)
    saved = _with_slot(saved, jax.tree.leaves(pullback), index)
    return y, _with_slot(stats, new, index), saved

  leaves, structure = jax.tree.flatten(needed)
  saved = [jnp.zeros((length, *leaf.shape), leaf.dtype) for leaf in leaves]
  y, stats, saved = lax.fori_loop(first, depth, step, (x, parts[1], saved))
  return (y, stats), (depth, jax.tree.unflatten(structure, saved), parts)


def _repeat_backward(block, residuals, cotangents):
  del block
  depth, saved, parts = residuals

  def step(count, carry):
    dy, gradients = carry
    index = depth - 1 - count
    dx, gradient = _slot(saved, index)(dy)
    return dx, _with_slot(gradients, gradient, index)

  dx, gradients = lax.fori_loop(
      0, depth, step, (cotangents[0], jax.tree.map(jnp.zeros_like, parts))
  )
  return None, dx, gradients, None


def _differentiate(block, parts, shared, index, x):
  """One block's output, new statistics and pullback, which is a tree."""
  y, pullback, new = jax.vjp(
      lambda x, part: block(x, *part, **_arguments(shared, index)),
      x,
      _slot(parts, index),
      has_aux=True,
  )
  return y, new, pullback


_repeat.defvjp(_repeat_forward, _repeat_backward)


def _arguments(shared: dict[str, Any], index: jax.Array) -> dict[str, Any]:
  return {**shared, 'position': shared['position'] + index}


def _slot(tree: Tree, index: jax.Array) -> Tree:
  """One part of a stack."""
  return jax.tree.map(
      lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree
  )


def _with_slot(tree: Tree, part: Tree, index: jax.Array) -> Tree:
  """A stack with one part replaced."""
  return jax.tree.map(
      lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, index, 0),
      tree,
      part,
  )
