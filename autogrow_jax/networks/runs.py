"""Runs of equal blocks whose number is data, so that programs know only bounds.

A run is stacked to a capacity; the blocks that are not there are zeros, which
are never read. `lax.scan` has a static length, and a loop of a length that is
not static has no derivative, so here is one: the forward loop stores what each
block's pullback needs, and the backward loop pulls back. There is no forward
mode.
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

_LEAST = 4


def capacity(length: int) -> int:
  """How many blocks a run of so many is stacked to: 4, 8, 16, ..."""
  return max(_LEAST, 1 << (length - 1).bit_length())


def run(
    block: Block,
    depth: jax.Array,
    x: jax.Array,
    parts: tuple[Tree, Tree, Tree],
    *,
    position: int | jax.Array,
    train: bool | jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, Tree]:
  """Runs the first blocks of a stack, one after another.

  Args:
    block: one of them; its output has the shape and type of its input.
    depth: int32 scalar, how many are there; at most the stack's length.
    x: enters the first.
    parts: (weights, statistics, gates), leaves stacked; gates may be None.
    position: of the first block in its network.
    train: see `base.apply`; all blocks get it.
    key: likewise.

  Returns:
    What leaves the last, and the statistics, stacked. Those of blocks that are
    not there are unchanged, and all derivatives with respect to such a block
    are zero. No gradient flows through the new statistics.
  """
  same = {'position': position, 'key': key}
  if isinstance(train, bool):
    block = functools.partial(block, train=train)
  else:
    same['train'] = train
  return _run(block, depth, x, parts, same)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(block, depth, x, parts, same):

  def step(index, carry):
    x, stats = carry
    x, new = block(x, *_take(parts, index), **_at(same, index))
    return x, _put(stats, new, index)

  return lax.fori_loop(0, depth, step, (x, parts[1]))


def _forward(block, depth, x, parts, same):
  length = len(jax.tree.leaves(parts)[0])
  # Traced once, for the shape of the pullback and for the loop.
  differentiate = jax.jit(
      functools.partial(_differentiate, block), inline=True
  )
  first = jnp.int32(0)  # Not 0, whose type is weak: another trace.
  needed = jax.eval_shape(differentiate, parts, same, first, x)[2]

  def step(index, carry):
    x, stats, saved = carry
    y, new, pullback = differentiate(parts, same, index, x)
    saved = _put(saved, jax.tree.leaves(pullback), index)
    return y, _put(stats, new, index), saved

  leaves, structure = jax.tree.flatten(needed)
  saved = [jnp.zeros((length, *leaf.shape), leaf.dtype) for leaf in leaves]
  y, stats, saved = lax.fori_loop(first, depth, step, (x, parts[1], saved))
  return (y, stats), (depth, jax.tree.unflatten(structure, saved), parts)


def _backward(block, residuals, cotangents):
  del block
  depth, saved, parts = residuals

  def step(count, carry):
    dy, gradients = carry
    index = depth - 1 - count
    dx, gradient = _take(saved, index)(dy)
    return dx, _put(gradients, gradient, index)

  dx, gradients = lax.fori_loop(
      0, depth, step, (cotangents[0], jax.tree.map(jnp.zeros_like, parts))
  )
  return None, dx, gradients, None


def _differentiate(block, parts, same, index, x):
  """One block's output, new statistics and pullback, which is a tree."""
  y, pullback, new = jax.vjp(
      lambda x, part: block(x, *part, **_at(same, index)),
      x,
      _take(parts, index),
      has_aux=True,
  )
  return y, new, pullback


_run.defvjp(_forward, _backward)


def _at(same: dict[str, Any], index: jax.Array) -> dict[str, Any]:
  return {**same, 'position': same['position'] + index}


def _take(tree: Tree, index: jax.Array) -> Tree:
  """One part of a stack."""
  return jax.tree.map(
      lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree
  )


def _put(tree: Tree, part: Tree, index: jax.Array) -> Tree:
  """A stack with one part replaced."""
  return jax.tree.map(
      lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, index, 0),
      tree,
      part,
  )
