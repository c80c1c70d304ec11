"""Estimates the gain of splits by a joint quadratic model of all candidates.

A scale t in [0, 1] multiplies the u of each candidate split. First-order
changes of the logits add, and the loss changes by about

    s't + 1/2 t'Gt,   s = mean of s_nm,   G = mean of c_nm c_nm',

with the same sampled label for all candidates of an example. Changes of single
candidates do not add: the off-diagonal part of G keeps several of them from
overshooting together.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import tasks
from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import base

Model, Trees = signals_lib.Model, signals_lib.Trees
Batch, Splits = splits_lib.Batch, splits_lib.Splits

# Half the curvature of a candidate is about the mean KL divergence, in nats,
# between the softmax before and after; beyond it the quadratic model fails.
LARGEST_DIVERGENCE = 0.01


@dataclasses.dataclass(frozen=True)
class Estimates:
  """The joint model of the loss over candidates.

  Attributes:
    candidates: (axis, unit) pairs.
    slopes: (candidates,) s, float64, nats.
    gram: (candidates, candidates) G, float64.
    loss: mean loss of the unchanged network over the examples, nats.
    examples: number of examples.
    usable: (candidates,) true for candidates that may be selected: their
      statistics are finite, and they change something.
  """

  candidates: tuple[tuple[str, int], ...]
  slopes: np.ndarray
  gram: np.ndarray
  loss: float
  examples: int
  usable: np.ndarray

  @property
  def curvatures(self) -> np.ndarray:
    """(candidates,) curvature of each candidate alone."""
    return np.diag(self.gram)

  @property
  def dropped(self) -> int:
    """Number of candidates that cannot be used."""
    return int(np.count_nonzero(~self.usable))

  def changes(self) -> np.ndarray:
    """Returns the change of the loss by each candidate alone, nats."""
    return self.slopes + self.curvatures / 2

  def joint_change(self, scales: np.ndarray) -> float:
    """Returns the change of the loss by all candidates together, nats."""
    chosen = np.flatnonzero(scales)  # The rest may not be finite.
    scales, gram = scales[chosen], self.gram[np.ix_(chosen, chosen)]
    return float(self.slopes[chosen] @ scales + scales @ gram @ scales / 2)

  def best_scales(self) -> np.ndarray:
    """Returns each candidate's best scale within trust; 0 if unusable."""
    curvatures = np.where(self.usable, self.curvatures, 0)
    best = linalg.best_scale(np.where(self.usable, self.slopes, 0), curvatures)
    limits = largest_scales(curvatures)
    return np.where(self.usable, np.minimum(best, limits), 0)


def largest_scales(curvatures: np.ndarray) -> np.ndarray:
  """Returns the largest trusted scales, at most 1, for some curvatures."""
  largest = 2 * LARGEST_DIVERGENCE
  return np.sqrt(largest / np.maximum(curvatures, largest))


def candidates_of(model: Model) -> tuple[tuple[str, int], ...]:
  """Lists (axis, unit) of all units of all sites."""
  return tuple(
      (site.axis, unit) for site in model.sites for unit in range(site.units)
  )


def estimate(
    model: Model,
    trees: Trees,
    splits: Splits,
    batches: Sequence[Batch],
    key: jax.Array,
    *,
    curvature: str = 'mc',
    samples: int = 2,
) -> Estimates:
  """Estimates the change of the loss by every split.

  The examples are better not those that the splits were learned from.
  """
  if not batches or samples < 1:
    raise ValueError('An estimate takes at least one batch and one sample.')
  slopes, gram, loss, examples = 0.0, 0.0, 0.0, 0
  # Only mc is random: further samples would repeat the first.
  for sample in range(samples if curvature == 'mc' else 1):
    for index, (x, labels) in enumerate(batches):
      draw = jax.random.fold_in(jax.random.fold_in(key, sample), index)
      sums = _sums(model, curvature, trees, splits, x, labels, draw)
      sums = [np.asarray(part, np.float64) for part in sums]
      slopes, gram, loss = slopes + sums[0], gram + sums[1], loss + sums[2]
      examples += len(labels)
  slopes, gram = slopes / examples, gram / examples
  finite = np.isfinite(slopes) & np.isfinite(np.diag(gram))
  return Estimates(
      candidates=candidates_of(model),
      slopes=slopes,
      gram=gram,
      loss=float(loss / examples),
      examples=sum(len(labels) for _, labels in batches),
      usable=finite & (np.diag(gram) > linalg.DEAD_TRACE),
  )


def scaled(
    splits: Splits, candidates: Sequence[tuple[str, int]], scales: np.ndarray
) -> Splits:
  """Multiplies the u of each candidate by its scale; e stays.

  Where the scale is 0 both become 0, even if the split is not finite.
  """
  return _scaled(
      splits,
      {
          axis: np.array(
              [
                  scale
                  for (name, _), scale in zip(candidates, scales, strict=True)
                  if name == axis
              ],
              np.float32,
          )
          for axis in splits
      },
  )


@jax.jit
def _scaled(splits, factors):
  """Scales splits by (units,) factors of each axis, as one program."""
  result = {}
  for axis, split in splits.items():
    u, e = splits_lib.incoming(split.u), splits_lib.outgoing(split.e)
    factor = factors[axis][:, None].astype(u.dtype)
    u, e = (jnp.where(factor == 0, 0, part) for part in (u * factor, e))
    result[axis] = split.replace(
        u=splits_lib.as_incoming(u, split.u),
        e=splits_lib.as_outgoing(e, split.e),
    )
  return result


def mean_loss(
    chain: tuple[base.Segment, ...], trees: Trees, batches: Sequence[Batch]
) -> float:
  """Computes the mean cross-entropy in evaluation mode, nats."""
  total = sum(
      float(_loss_sum(chain, trees, x, labels)) for x, labels in batches
  )
  return total / sum(len(labels) for _, labels in batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(model, curvature, trees, splits, x, labels, key):
  """Sums slopes, Gram matrix and loss over a batch."""
  losses, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  slopes, curvatures = [], []
  for site in model.sites:
    s, c = splits_lib.projections(
        site, trees, by_axis[site.axis], splits[site.axis]
    )
    slopes.append(s)
    curvatures.append(c)
  c = jnp.concatenate(curvatures, -1)
  gram = jnp.einsum('nc,nd->cd', c, c, precision=lax.Precision.HIGHEST)
  return jnp.concatenate(slopes, -1).sum(0), gram, losses.sum()


@functools.partial(jax.jit, static_argnums=0)
def _loss_sum(chain, trees, x, labels):
  logits = taps.run(chain, trees.weights, trees.stats, x).output
  return tasks.cross_entropy(logits, labels).sum()
