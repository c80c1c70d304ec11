"""Accuracy and loss over a split, in fixed-size batches."""

from collections.abc import Callable
import dataclasses

import numpy as np

from autogrow_jax import data
from autogrow_jax import paired

_MAX_LOGITS = 2**24  # Of which those of a window of text are millions.


@dataclasses.dataclass(frozen=True)
class Score:
  """Exact counts over a split.

  Attributes:
    correct: number of correct predictions.
    total: number of labels.
    loss_sum: sum of cross-entropies, nats.
    hits: which examples are correct, one bit each; see `paired.pack_hits`.
      None where an example has several labels.
  """

  correct: int
  total: int
  loss_sum: float
  hits: bytes | None

  @property
  def accuracy(self) -> float:
    """Percent."""
    return 100 * self.correct / self.total

  @property
  def loss(self) -> float:
    """Mean cross-entropy, nats."""
    return self.loss_sum / self.total

  @property
  def perplexity(self) -> float:
    """Of a language model: how many words were as hard to tell apart."""
    return perplexity(self.loss)


def perplexity(loss: float) -> float:
  """From a mean cross-entropy in nats; infinite rather than too large."""
  with np.errstate(over='ignore'):
    return float(np.exp(loss))


def largest_batch(length: int, classes: int) -> int:
  """How many examples with so many labels each are evaluated at once."""
  return max(1, _MAX_LOGITS // (length * classes))


def score(
    forward: Callable[[np.ndarray], np.ndarray],
    split: data.Split,
    batch_size: int,
) -> Score:
  """Counts over a split.

  Args:
    forward: raw inputs (batch_size, ...) to logits (batch_size, ..., classes).
    split: inputs and labels; of several to an example, -1 does not count.
    batch_size: the last batch is filled up, and cut again, to this size.

  Returns:
    The counts, over all images that are not damaged.

  Raises:
    ValueError: all are.
  """
  has_one = split.labels.ndim == 1
  hits, loss_sum, total = [], 0.0, 0
  good = np.ones(len(split.labels), bool)
  for start in range(0, len(split.labels), batch_size):
    labels = split.labels[start : start + batch_size]
    logits = logits_of(
        forward, split.images[start : start + batch_size], batch_size
    )
    good[list(split.damaged)] = False
    kept = good[start : start + batch_size]
    logits, labels = logits[kept], labels[kept]
    counts = labels >= 0
    loss_sum += float(np.sum(cross_entropy(logits[counts], labels[counts])))
    total += int(np.count_nonzero(counts))
    correct = np.argmax(logits, -1) == labels
    hits.append(correct if has_one else np.count_nonzero(correct))
  if good.size and not good.any():
    raise ValueError(f'All {len(good)} images are damaged.')
  hits = np.concatenate(hits) if has_one and hits else np.array(hits, int)
  return Score(
      correct=int(hits.sum()),
      total=total,
      loss_sum=loss_sum,
      hits=paired.pack_hits(hits) if has_one else None,
  )


def logits_of(
    forward: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    batch_size: int,
) -> np.ndarray:
  """Logits of at most `batch_size` images, from a call with exactly so many."""
  missing = batch_size - len(images)
  padded = np.pad(images, [(0, missing), *[(0, 0)] * (images.ndim - 1)])
  return forward(padded)[: len(images)]


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Per example, in float64 and nats: (n, classes), (n,) -> (n,)."""
  logits = logits.astype(np.float64)
  top = logits.max(-1, keepdims=True)
  normalizer = top[:, 0] + np.log(np.sum(np.exp(logits - top), -1))
  return normalizer - logits[np.arange(len(labels)), labels]
