"""What splits will gain: a joint quadratic model of all candidates.

With a scale t in [0, 1] for each candidate split, which multiplies its u, first
order changes of the logits add, and the loss changes by about

    s't + 1/2 t'Gt,   s = mean of s_nm,   G = mean of c_nm c_nm',

with the same sampled label for all candidates of an example. Changes of single
candidates don't add: the off-diagonal part of G is what keeps several of them
from overshooting together.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
import numpy as np

from autogrow_jax import linalg
from autogrow_jax.methods import base as methods_base
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.networks import base
from autogrow_jax.networks import taps

Model, Trees = signals_lib.Model, signals_lib.Trees
Batch, Splits = splits_lib.Batch, splits_lib.Splits

# Half the curvature of a candidate is about the mean KL divergence between the
# softmax before and after, in nats; a larger one leaves the quadratic model.
LARGEST_DIVERGENCE = 0.01


@dataclasses.dataclass(frozen=True)
class Estimates:
  """The model of the loss over candidates.

  Attributes:
    candidates: (axis, unit) pairs.
    slopes: (candidates,) float64, nats.
    gram: (candidates, candidates) float64.
    loss: mean over the examples, nats, of the network as it is.
    examples: how many.
    usable: (candidates,) whether a candidate may be selected; not if its
      statistics are not finite or it changes nothing.
  """

  candidates: tuple[tuple[str, int], ...]
  slopes: np.ndarray
  gram: np.ndarray
  loss: float
  examples: int
  usable: np.ndarray

  @property
  def curvatures(self) -> np.ndarray:
    """(candidates,) curvature of each alone."""
    return np.diag(self.gram)

  @property
  def dropped(self) -> int:
    """How many candidates cannot be used."""
    return int(np.count_nonzero(~self.usable))

  def changes(self, scales: np.ndarray | float = 1.0) -> np.ndarray:
    """(candidates,) change of the loss by each alone, nats."""
    return scales * self.slopes + np.square(scales) * self.curvatures / 2

  def joint_change(self, scales: np.ndarray) -> float:
    """Change of the loss by all together, nats."""
    chosen = np.flatnonzero(scales)  # The rest may not be finite.
    scales, gram = scales[chosen], self.gram[np.ix_(chosen, chosen)]
    return float(self.slopes[chosen] @ scales + scales @ gram @ scales / 2)

  def best_scales(
      self, largest_divergence: float = LARGEST_DIVERGENCE
  ) -> np.ndarray:
    """(candidates,) best scale of each alone, within trust; 0 if unusable."""
    curvatures = np.where(self.usable, self.curvatures, 0)
    best = linalg.best_scale(np.where(self.usable, self.slopes, 0), curvatures)
    largest = 2 * largest_divergence
    limits = np.sqrt(largest / np.maximum(curvatures, largest))
    return np.where(self.usable, np.minimum(best, limits), 0)


def candidates_of(model: Model) -> tuple[tuple[str, int], ...]:
  """(axis, unit) of all units of all sites."""
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

  Args:
    model: the network.
    trees: its arrays.
    splits: of all units of all sites.
    batches: the examples, best others than the splits were learned from.
    key: of sampled labels.
    curvature: one of `signals.CURVATURES`.
    samples: of the label of each example.

  Returns:
    The estimates.
  """
  signals_lib.check_curvature(curvature)
  if not batches or samples < 1:
    raise ValueError('An estimate takes at least one batch and one sample.')
  factors = {site.axis: jnp.ones(()) for site in model.sites}
  if curvature == 'rank1-cal':
    factors = splits_lib.calibrate(
        model, trees, splits, batches, jax.random.fold_in(key, samples)
    )
  slopes, gram, loss, examples = 0.0, 0.0, 0.0, 0
  # Only mc draws anything: further samples would repeat the first.
  for sample in range(samples if curvature == 'mc' else 1):
    for index, (x, labels) in enumerate(batches):
      draw = jax.random.fold_in(jax.random.fold_in(key, sample), index)
      sums = _sums(model, curvature, trees, splits, factors, x, labels, draw)
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
  """Splits with each candidate's u multiplied; e stays.

  Where the scale is 0 both are 0, also of splits that are not finite.
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
  """`scaled` by (units,) of each axis, as one compiled program."""
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
  """Mean cross-entropy over batches in evaluation mode, nats."""
  total = sum(
      float(_loss_sum(chain, trees, x, labels)) for x, labels in batches
  )
  return total / sum(len(labels) for _, labels in batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(model, curvature, trees, splits, factors, x, labels, key):
  """Sums over a batch: slopes, Gram matrix, loss."""
  losses, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  slopes, curvatures = [], []
  for site in model.sites:
    s, c = splits_lib.projections(
        site, trees, by_axis[site.axis], splits[site.axis]
    )
    slopes.append(s)
    curvatures.append(c * jnp.sqrt(factors[site.axis]).astype(c.dtype))
  c = jnp.concatenate(curvatures, -1)
  gram = jnp.einsum('nc,nd->cd', c, c, precision=lax.Precision.HIGHEST)
  return jnp.concatenate(slopes, -1).sum(0), gram, losses.sum()


@functools.partial(jax.jit, static_argnums=0)
def _loss_sum(chain, trees, x, labels):
  logits = taps.run(chain, trees.weights, trees.stats, x).output
  return methods_base.cross_entropy(logits, labels).sum()
