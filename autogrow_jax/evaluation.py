"""Accuracy and loss over a split, in fixed-size batches."""

from collections.abc import Callable
import dataclasses

import numpy as np

from autogrow_jax import data
from autogrow_jax import paired


@dataclasses.dataclass(frozen=True)
class Score:
  """Exact counts over a split.

  Attributes:
    correct: number of correct examples.
    total: number of examples.
    loss_sum: sum of cross-entropies, nats.
    hits: which examples are correct, one bit each; see `paired.pack_hits`.
  """

  correct: int
  total: int
  loss_sum: float
  hits: bytes

  @property
  def accuracy(self) -> float:
    """Percent."""
    return 100 * self.correct / self.total

  @property
  def loss(self) -> float:
    """Mean cross-entropy, nats."""
    return self.loss_sum / self.total


def score(
    forward: Callable[[np.ndarray], np.ndarray],
    split: data.Split,
    batch_size: int,
) -> Score:
  """Counts over a split.

  Args:
    forward: raw images (batch_size, height, width, channel) to logits
      (batch_size, classes).
    split: images and labels.
    batch_size: the last batch is filled up, and cut again, to this size.

  Returns:
    The counts, over all images that are not damaged.

  Raises:
    ValueError: all are.
  """
  hits, loss_sum = np.zeros(len(split.labels), bool), 0.0
  good = np.ones(len(split.labels), bool)
  for start in range(0, len(split.labels), batch_size):
    labels = split.labels[start : start + batch_size]
    logits = logits_of(
        forward, split.images[start : start + batch_size], batch_size
    )
    hits[start : start + batch_size] = np.argmax(logits, -1) == labels
    good[list(split.damaged)] = False
    kept = good[start : start + batch_size]
    loss_sum += float(np.sum(cross_entropy(logits[kept], labels[kept])))
  hits = hits[good]
  if good.size and not hits.size:
    raise ValueError(f'All {len(good)} images are damaged.')
  return Score(
      correct=int(np.count_nonzero(hits)),
      total=len(hits),
      loss_sum=loss_sum,
      hits=paired.pack_hits(hits),
  )


def logits_of(
    forward: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    batch_size: int,
) -> np.ndarray:
  """Logits of at most `batch_size` images, from a call with exactly so many."""
  missing = batch_size - len(images)
  padded = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
  return forward(padded)[: len(images)]


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Per example, in float64 and nats: (n, classes), (n,) -> (n,)."""
  logits = logits.astype(np.float64)
  top = logits.max(-1, keepdims=True)
  normalizer = top[:, 0] + np.log(np.sum(np.exp(logits - top), -1))
  return normalizer - logits[np.arange(len(labels)), labels]
