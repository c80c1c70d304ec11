"""Accuracy, loss and mean IoU over a split, in fixed-size batches."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import data
from autogrow_jax.methods import base

# Of a batch: 256 MB of float32.
_MOST_LOGITS = 2**26


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
  """Pixels of each class over a split of masks, void left out.

  Attributes:
    hits: labels that are predicted, int64 (classes,).
    labels: all labels, likewise.
    predictions: likewise.
  """

  hits: np.ndarray
  labels: np.ndarray
  predictions: np.ndarray

  @property
  def miou(self) -> float:
    """Mean intersection over union, percent.

    The mean is over the classes that occur among labels or predictions.
    """
    unions = self.labels + self.predictions - self.hits
    occurs = unions > 0
    return 100 * float(np.mean(self.hits[occurs] / unions[occurs]))


@dataclasses.dataclass(frozen=True)
class Score:
  """Exact counts over a split.

  Attributes:
    correct: number of correct predictions.
    total: number of labels.
    loss_sum: sum of cross-entropies, nats.
    hits: bool (examples,), correct predictions; None where an example has
      several labels.
    pixels: where labels are masks, else None.
  """

  correct: int
  total: int
  loss_sum: float
  hits: np.ndarray | None = dataclasses.field(compare=False)
  pixels: Pixels | None = None

  @property
  def accuracy(self) -> float:
    """Percent."""
    return 100 * self.correct / self.total

  @property
  def loss(self) -> float:
    """Mean cross-entropy, nats."""
    return self.loss_sum / self.total

  @property
  def miou(self) -> float | None:
    """Mean intersection over union, percent; None without masks."""
    return None if self.pixels is None else self.pixels.miou

  @property
  def perplexity(self) -> float:
    """Of a language model: how many words were as hard to tell apart."""
    return perplexity(self.loss)


def perplexity(loss: float) -> float:
  """From a mean cross-entropy in nats; infinite rather than too large."""
  with np.errstate(over='ignore'):
    return float(np.exp(loss))


def score(
    forward: Callable[[np.ndarray], np.ndarray],
    split: data.Split,
    batch_size: int,
) -> Score:
  """Counts over a split.

  Args:
    forward: raw inputs (examples, ...) to logits (examples, ..., classes).
    split: inputs and labels; of several to an example, -1 does not count.
    batch_size: most examples to call it with; all calls but the last one have
      so many.

  Returns:
    The counts, over all images that are not damaged.

  Raises:
    ValueError: all are.
  """
  if split.labels.ndim == 3:
    return _score_masks(forward, split, batch_size)
  has_one = split.labels.ndim == 1
  hits, loss_sum, total = [], 0.0, 0
  good = np.ones(len(split.labels), bool)
  for start in range(0, len(split.labels), batch_size):
    labels = split.labels[start : start + batch_size]
    logits = forward(split.images[start : start + batch_size])
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
      hits=hits if has_one else None,
  )


def examples_at_once(most: int, logits: int) -> int:
  """How many examples to evaluate in a call.

  Args:
    most: not more than so many.
    logits: of one example.
  """
  return max(1, min(most, _MOST_LOGITS // logits))


def _score_masks(
    forward: Callable[[np.ndarray], np.ndarray],
    split: data.Split,
    batch_size: int,
) -> Score:
  """`score` where labels are masks; counted on the device."""
  total, loss_sum = 0, 0.0
  for start in range(0, len(split.labels), batch_size):
    part = slice(start, start + batch_size)
    logits = forward(split.images[part])
    losses, pixels = _count(logits, split.labels[part])
    loss_sum += float(np.sum(np.asarray(losses, np.float64)))
    total = total + np.asarray(pixels, np.int64)
  pixels = Pixels(*total)
  if not pixels.labels.any():
    raise ValueError('All pixels of the masks are void; there is nothing to '
                     'evaluate on.')
  return Score(
      correct=int(pixels.hits.sum()),
      total=int(pixels.labels.sum()),
      loss_sum=loss_sum,
      hits=None,
      pixels=pixels,
  )


@jax.jit
def _count(
    logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Losses (example,) and, (3, classes), what `Pixels` has."""
  labels = labels.astype(jnp.int32)
  counts = labels >= 0
  losses = base.cross_entropy(logits, labels)
  predicted = jnp.where(counts, jnp.argmax(logits, -1), -1)
  classes = jnp.arange(logits.shape[-1]).reshape(1, 1, 1, -1)
  labelled, predicted = (x[..., None] == classes for x in (labels, predicted))
  pixels = [
      jnp.sum(which, (0, 1, 2), dtype=jnp.int32)
      for which in (labelled & predicted, labelled, predicted)
  ]
  return jnp.sum(losses, (1, 2), where=counts), jnp.stack(pixels)


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
