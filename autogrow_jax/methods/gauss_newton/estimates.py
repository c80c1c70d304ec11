"""Estimates the gain of splits and prunes by one joint quadratic model.

Every unit may be split, which a scale t in [0, 1] of its u tempers, or pruned,
where t is 1. First-order changes of the logits add, and the loss changes by
about

    s't + 1/2 t'Gt,   s = mean of s_nm,   G = mean of c_nm c_nm',

with the same sampled label for all candidates of an example. Changes of single
candidates do not add: the off-diagonal part of G keeps several of them from
overshooting together.

Where unit i is pruned, others take over: a reader's input a_i is replaced by

  w_0 + sum over j != i of w_j a_j,

which adds w_j v_i to the outgoing weights of a_j, and a constant to the
reader's output. Least squares over the examples that splits are learned from
choose w, for every reader on its own; with w_i = -1, s and c are linear in w.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib

Batch, Model, Trees = signals_lib.Batch, signals_lib.Model, signals_lib.Trees
Splits = splits_lib.Splits
Taken = Mapping[str, np.ndarray]

# Half the curvature of a candidate is about the mean KL divergence, in nats,
# between the softmax before and after; beyond it the quadratic model fails.
LARGEST_DIVERGENCE = {'split': 0.01, 'prune': 0.02}
# Ridge of the compensations in units of the mean eigenvalue.
RIDGE = 1e-6


@dataclasses.dataclass(frozen=True)
class Joint:
  """The joint model of the loss over all candidates: splits, then prunes.

  Attributes:
    candidates: (axis, unit) pairs; number i may be split, and pruned as number
      i + len(candidates).
    slopes: (2 * candidates,) s, float64, nats.
    gram: (2 * candidates, 2 * candidates) G, float64.
    usable: (2 * candidates,) true for candidates that may be selected: their
      statistics are finite, they change something, and the model is trusted.
  """

  candidates: tuple[tuple[str, int], ...]
  slopes: np.ndarray
  gram: np.ndarray
  usable: np.ndarray

  @property
  def dropped(self) -> int:
    """Number of splits that cannot be used."""
    return int(np.count_nonzero(~self.usable[: len(self.candidates)]))

  def changes(self) -> np.ndarray:
    """Returns the change of the loss by each candidate alone, nats."""
    return self.slopes + np.diag(self.gram) / 2

  def change(self, scales: np.ndarray) -> float:
    """Returns the change of the loss by all candidates together, nats."""
    chosen = np.flatnonzero(scales)  # The rest may not be finite.
    scales, gram = scales[chosen], self.gram[np.ix_(chosen, chosen)]
    return float(self.slopes[chosen] @ scales + scales @ gram @ scales / 2)

  def best_scales(self) -> np.ndarray:
    """Returns each split's best scale within trust; 0 if unusable."""
    count = len(self.candidates)
    curvatures = np.where(self.usable, np.diag(self.gram), 1)[:count]
    best = np.clip(-self.slopes[:count] / curvatures, 0, 1)
    best = np.minimum(best, largest_scales(curvatures))
    return np.where(self.usable[:count], best, 0)


def largest_scales(curvatures: np.ndarray) -> np.ndarray:
  """Returns the largest trusted scales of splits, at most 1."""
  largest = 2 * LARGEST_DIVERGENCE['split']
  return np.sqrt(largest / np.maximum(curvatures, largest))


def compensated(
    model: Model, trees: Trees, moments: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Computes the compensation of every prune by least squares.

  Args:
    model: the network.
    trees: its arrays.
    moments: see `splits.Learned`.

  Returns:
    Per axis, (units, readers, units + 1) w, the constant's last; padded.
  """
  result = splits_lib.no_prunes(model, trees)
  for site in model.sites:
    local, units = trees.local(site), site.units
    for number, reader in enumerate(site.form.readers):
      gram = moments[site.axis][number]
      used = list(range(units))
      if local.takes_constant(reader):
        used.append(len(gram) - 1)
      gram = gram[np.ix_(used, used)]
      if not np.isfinite(gram).all() or units == 1:
        continue
      ridge = max(RIDGE * np.trace(gram) / len(gram), 1e-12)
      inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
      w = -inverse[:units] / np.diag(inverse)[:units, None]
      result[site.axis][np.ix_(range(units), [number], used)] = w[:, None]
  return result


def estimate(
    model: Model,
    trees: Trees,
    splits: Splits,
    batches: Sequence[Batch],
    rng: np.random.Generator,
    *,
    taken: Taken | None = None,
    curvature: str = 'mc',
    samples: int = 2,
) -> Joint:
  """Estimates the change of the loss by every split and every prune.

  The examples are better not those that the splits were learned from.

  Args:
    model: the network.
    trees: its arrays.
    splits: splits of all sites.
    batches: examples to judge by.
    rng: source of sampled labels.
    taken: compensations of prunes; None for no prunes.
    curvature: one of `signals.CURVATURES`.
    samples: number of sampled labels per example.
  """
  taken = splits_lib.no_prunes(model, trees) if taken is None else taken
  local = [trees.local(site) for site in model.sites]
  slopes, gram, examples = 0.0, 0.0, 0
  # Only mc is random: further samples would repeat the first.
  for _ in range(samples if curvature == 'mc' else 1):
    for batch in batches:
      seed = rng.integers(2**32, dtype='u4')
      _, signals = signals_lib.signals(
          model, trees, batch, seed, curvature=curvature
      )
      pairs = [
          splits_lib.project(
              site.form, arrays, signal, splits[site.axis], taken[site.axis]
          )
          for site, arrays, signal in zip(
              model.sites, local, signals, strict=True
          )
      ]
      s, c = (
          _in_order(model, [np.asarray(pair[i], 'f8') for pair in pairs])
          for i in range(2)
      )
      slopes, gram = slopes + s.sum(0), gram + c.T @ c
      examples += len(s)
  slopes, gram = slopes / examples, gram / examples
  curvatures, count = np.diag(gram), len(model.candidates)
  usable = np.isfinite(slopes) & np.isfinite(curvatures)
  usable[:count] &= curvatures[:count] > splits_lib.DEAD_TRACE
  usable[count:] &= curvatures[count:] <= 2 * LARGEST_DIVERGENCE['prune']
  usable[count:] &= np.concatenate(
      [taken[site.axis][: site.units].any((1, 2)) for site in model.sites]
  )
  return Joint(model.candidates, slopes, gram, usable)


def _in_order(model: Model, columns: Sequence[np.ndarray]) -> np.ndarray:
  """Puts (batch, 2 * units) of all sites in the order of candidates."""
  parts = [], []
  for site, both in zip(model.sites, columns, strict=True):
    for part, half in zip(parts, np.split(both, 2, -1), strict=True):
      part.append(half[:, : site.units])
  return np.concatenate([*parts[0], *parts[1]], -1)
