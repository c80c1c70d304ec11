"""Runs of equal blocks whose number is data, so that programs know only bounds.

A run is stacked to a capacity and the blocks that are not there are zeros,
which are never read. `lax.scan` has a static length, and a loop of a length
that is not static has no derivative, so here is one: forward the loop stores
what enters each block, backward it computes the block again from that.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

Tree = Any
# (x, weights, stats, gate, train) -> y, new stats.
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
    train: bool | jax.Array,
) -> tuple[jax.Array, Tree]:
  """Runs the first blocks of a stack, one after another.

  Args:
    block: one of them; its output has the shape and type of its input.
    depth: int32 scalar, how many are there; at most the stack's length.
    x: enters the first.
    parts: (weights, statistics, gates), leaves stacked; gates may be None.
    train: passed on to the blocks, a bool or a traced one.

  Returns:
    What leaves the last, and the statistics, stacked. Those of blocks that are
    not there are unchanged, and all derivatives with respect to such a block
    are zero. No gradient flows through the new statistics.
  """
  if isinstance(train, bool):
    static = lambda x, weights, stats, gate, train_: block(
        x, weights, stats, gate, train
    )
    return _run(static, depth, x, parts, None)
  return _run(block, depth, x, parts, train)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(block, depth, x, parts, train):

  def step(index, carry):
    x, stats = carry
    x, new = block(x, *_take(parts, index), train)
    return x, _put(stats, new, index)

  return lax.fori_loop(0, depth, step, (x, parts[1]))


def _forward(block, depth, x, parts, train):

  def step(index, carry):
    x, stats, entered = carry
    y, new = block(x, *_take(parts, index), train)
    return y, _put(stats, new, index), _put(entered, x, index)

  length = len(jax.tree.leaves(parts)[0])
  y, stats, entered = lax.fori_loop(
      0,
      depth,
      step,
      (x, parts[1], jnp.zeros((length, *x.shape), x.dtype)),
  )
  return (y, stats), (depth, entered, parts, train)


def _backward(block, residuals, cotangents):
  depth, entered, parts, train = residuals

  def step(count, carry):
    dy, gradients = carry
    index = depth - 1 - count
    _, pullback, _ = jax.vjp(
        lambda x, part: block(x, *part, train),
        *_take((entered, parts), index),
        has_aux=True,
    )
    dx, gradient = pullback(dy)
    return dx, _put(gradients, gradient, index)

  dx, gradients = lax.fori_loop(
      0, depth, step, (cotangents[0], jax.tree.map(jnp.zeros_like, parts))
  )
  return None, dx, gradients, None


_run.defvjp(_forward, _backward)


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
