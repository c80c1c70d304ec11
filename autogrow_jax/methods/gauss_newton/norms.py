"""Measures the statistics of norms, and adapts norms to new statistics.

Running statistics lag behind the weights and are wrong after a split or prune.
Everything here is learned and estimated in evaluation mode, so statistics are
measured before each growth and settled after it.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import layers
from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import base

Trees = signals_lib.Trees


def measured(
    chain: tuple[base.Segment, ...],
    trees: Trees,
    batches: Sequence[splits_lib.Batch],
) -> Trees:
  """Replaces all running statistics by those of some batches of equal size.

  Each batch runs in training mode, so that a norm sees the outputs of the
  layers before it in that mode; statistics are then pooled.
  """
  if not jax.tree.leaves(trees.stats):
    return trees
  sums = None
  for x, _ in batches:
    moments = _moments(chain, trees, x)
    sums = moments if sums is None else linalg.plus(sums, moments)
  pooled = jax.tree.map(lambda leaf: np.asarray(leaf) / len(batches), sums)
  return trees.replace(stats=_centred(trees.stats, pooled))


def settled(
    chain: tuple[base.Segment, ...],
    trees: Trees,
    batches: Sequence[splits_lib.Batch],
) -> Trees:
  """Gives norms true statistics without changing the function.

  A growth shifts the inputs of its own and of all later norms. Training mode
  would normalise these shifts away, and with them part of the gain. With m, v
  the old statistics of a norm, and m', v' those of its input,

    scale' = scale sqrt((v' + eps) / (v + eps)),
    bias'  = bias + scale (m' - m) / sqrt(v + eps)

  is the same affine map in evaluation mode, and also holds in training mode.
  """
  epsilons: dict[taps.Path, float] = {}

  def note(path, module, x, y):
    del x, y
    if isinstance(module, layers.Norm):
      epsilons[path] = module.epsilon

  x, _ = batches[0]
  jax.eval_shape(
      lambda: taps.run(
          chain, trees.weights, trees.stats, x, on_layer=note
      ).output
  )
  examples = sum(len(labels) for _, labels in batches)
  sums = None
  for x, _ in batches:
    moments = _entering(chain, tuple(epsilons), trees, x)
    sums = moments if sums is None else linalg.plus(sums, moments)
  weights, stats = trees.weights, trees.stats
  for path, (mean, square) in (sums or {}).items():
    mean, square = np.asarray(mean) / examples, np.asarray(square) / examples
    var = np.maximum(square - np.square(mean), 0)
    old, norm = signals_lib.at(stats, path), signals_lib.at(weights, path)
    deviation = np.sqrt(old['var'] + epsilons[path])
    shift = norm['scale'] * (mean - old['mean']) / deviation
    ratio = np.sqrt(var + epsilons[path]) / deviation
    weights = signals_lib.with_leaves(
        weights, path, scale=norm['scale'] * ratio, bias=norm['bias'] + shift
    )
    stats = signals_lib.with_leaves(stats, path, mean=mean, var=var)
  return trees.replace(weights=weights, stats=stats)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _entering(chain, paths, trees, x):
  """Sums position means of each norm's input and its square over a batch."""
  tapped = taps.run(chain, trees.weights, trees.stats, x)
  result = {}
  for path in paths:
    entering = tapped.inputs[path]
    flat = entering.reshape(len(x), -1, entering.shape[-1])
    result[path] = flat.mean(1).sum(0), jnp.square(flat).mean(1).sum(0)
  return result


@functools.partial(jax.jit, static_argnums=0)
def _moments(chain, trees, x):
  """Returns each norm's mean, and as 'var' its mean square, over a batch."""

  def after(value):
    stats = _on_norms(
        lambda norm: {
            name: jnp.full_like(leaf, value) for name, leaf in norm.items()
        },
        trees.stats,
    )
    return base.apply(chain, trees.weights, stats, x, train=True)[1]

  def of_batch(zero, one):
    # A running statistic becomes k old + (1 - k) new; runs from 0 and 1 give k
    # and new. In training mode a norm's output does not depend on it.
    mean, var = (
        zero[name] / (1 - (one[name] - zero[name])) for name in ('mean', 'var')
    )
    return {'mean': mean, 'var': var + jnp.square(mean)}

  return _on_norms(of_batch, after(0.0), after(1.0))


def _centred(stats: base.Tree, moments: base.Tree) -> base.Tree:
  """Turns mean squares of all norms into variances; other leaves stay."""

  def centred(old, new):
    del old
    var = np.maximum(new['var'] - np.square(new['mean']), 0)
    return {'mean': new['mean'], 'var': var}

  return _on_norms(centred, stats, moments)


def _on_norms(function, *trees):
  """Applies a function to the statistics of every norm; other leaves stay."""
  first = trees[0]
  if not isinstance(first, dict):
    return first
  if first.keys() == {'mean', 'var'}:
    return function(*trees)
  return {
      name: _on_norms(function, *(tree[name] for tree in trees))
      for name in first
  }
