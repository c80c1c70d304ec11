"""Tasks: what a network predicts of an example, and how that is scored.

A task is all that knows whether labels are classes, masks or words. `loss` and
`counts` run inside a training step; `score` runs over a split of the data.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Split(Protocol):
  """Inputs and labels, as `data.Split` has them."""

  @property
  def images(self) -> Any:
    """Inputs."""

  @property
  def labels(self) -> np.ndarray:
    """Labels."""

  @property
  def damaged(self) -> Mapping[int, str]:
    """Reason by index, for the damaged images met so far."""


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
  """Exact counts over a split.

  Attributes:
    correct: number of correct predictions, by which policies decide.
    total: number of labels.
    loss_sum: sum of the losses, nats.
    metrics: values by name, the first one the task's own.
    hits: bool (examples,), correct predictions; None where an example has
      several labels.
  """

  correct: int
  total: int
  loss_sum: float
  metrics: Mapping[str, float]
  hits: np.ndarray | None = None

  @property
  def accuracy(self) -> float:
    """Correct predictions, percent."""
    return 100 * self.correct / self.total

  @property
  def loss(self) -> float:
    """Mean loss, nats."""
    return self.loss_sum / self.total


class Task:
  """Abstract base of tasks; frozen dataclasses of their settings.

  Attributes:
    label_ndim: dimensions of the labels, the first one for examples.
    is_stateful: True if networks carry a state from one batch to the next one.
  """

  label_ndim: ClassVar[int]
  is_stateful: ClassVar[bool] = False

  def loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean loss over all labels that count; runs inside jit.

    Args:
      logits: (batch, ..., classes).
      labels: (batch, ...) int32; where an example has several, -1 does not
        count.

    Returns:
      A scalar, nats; 0 if none counts.
    """
    losses = cross_entropy(logits, labels)
    if labels.ndim == 1:
      return jnp.mean(losses)
    counts = labels >= 0
    return jnp.sum(losses, where=counts) / jnp.maximum(1, jnp.sum(counts))

  def counts(
      self, logits: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Number of correct predictions, and of labels; runs inside jit."""
    count = lambda which: jnp.sum(which, dtype=jnp.uint32)
    return (  # No prediction is the label -1.
        count(jnp.argmax(logits, -1) == labels),
        jnp.uint32(labels.size) if labels.ndim == 1 else count(labels >= 0),
    )

  def metrics(self, loss: float, correct: int, total: int) -> dict[str, float]:
    """Metrics of an epoch of training, from its mean loss and counts."""
    del loss
    return {'accuracy': 100 * correct / total}

  def score(
      self,
      forward: Callable[[np.ndarray], np.ndarray],
      split: Split,
      batch_size: int,
  ) -> Score:
    """Counts over a split, all images that are not damaged.

    Args:
      forward: raw inputs (examples, ...) to logits (examples, ..., classes).
      split: inputs and labels.
      batch_size: largest number of examples of a call; all calls but the last
        one have so many.

    Returns:
      The score.

    Raises:
      ValueError: all images are damaged.
    """
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
      loss_sum += float(
          np.sum(exact_cross_entropy(logits[counts], labels[counts]))
      )
      total += int(np.count_nonzero(counts))
      correct = np.argmax(logits, -1) == labels
      hits.append(correct if has_one else np.count_nonzero(correct))
    if good.size and not good.any():
      raise ValueError(f'All {len(good)} images are damaged.')
    hits = np.concatenate(hits) if has_one and hits else np.array(hits, int)
    correct = int(hits.sum())
    return Score(
        correct,
        total,
        loss_sum,
        self.metrics(loss_sum / max(1, total), correct, max(1, total)),
        hits if has_one else None,
    )

  def check(self, name: str, predicted: tuple[int, ...], labels: Any) -> None:
    """Refuses labels that a network does not predict.

    Args:
      name: name of the network.
      predicted: shape of its predictions for one example.
      labels: labels of the training data, (examples, ...).

    Raises:
      ValueError: the labels are of another kind.
    """
    wanted = labels.shape[1:]
    if predicted != wanted:
      kind = {0: 'one class for each example', 2: 'a class for each pixel'}
      raise ValueError(
          f'{name} predicts {kind.get(len(predicted), predicted)}, but the '
          f'data have {kind.get(len(wanted), wanted)}: choose another '
          '--network or --dataset.'
      )


@dataclasses.dataclass(frozen=True)
class Classes(Task):
  """One class for each example."""

  label_ndim: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True)
class Text(Task):
  """The next word at each step of a window."""

  label_ndim: ClassVar[int] = 2
  is_stateful: ClassVar[bool] = True

  def metrics(self, loss: float, correct: int, total: int) -> dict[str, float]:
    """Perplexity, infinite rather than too large."""
    del correct, total
    with np.errstate(over='ignore'):
      return {'perplexity': float(np.exp(loss))}

  def check(self, name: str, predicted: tuple[int, ...], labels: Any) -> None:
    """Accepts windows of any length."""


@dataclasses.dataclass(frozen=True)
class Masks(Task):
  """A class for each pixel; -1 is void and does not count."""

  label_ndim: ClassVar[int] = 3

  def score(
      self,
      forward: Callable[[np.ndarray], np.ndarray],
      split: Split,
      batch_size: int,
  ) -> Score:
    """Counts pixels on the device; see `Task.score`."""
    total, loss_sum = 0, 0.0
    for start in range(0, len(split.labels), batch_size):
      part = slice(start, start + batch_size)
      losses, pixels = _count(forward(split.images[part]), split.labels[part])
      loss_sum += float(np.sum(np.asarray(losses, np.float64)))
      total = total + np.asarray(pixels, np.int64)
    hits, labelled, predicted = total
    if not labelled.any():
      raise ValueError(
          'All pixels of the masks are void; there is nothing to evaluate on.'
      )
    unions = labelled + predicted - hits
    occurs = unions > 0  # The mean is over classes that occur in either.
    correct, count = int(hits.sum()), int(labelled.sum())
    metrics = self.metrics(loss_sum / count, correct, count)
    miou = 100 * float(np.mean(hits[occurs] / unions[occurs]))
    return Score(correct, count, loss_sum, {**metrics, 'miou': miou})


TASKS = (Classes(), Text(), Masks())


def of_labels(labels: np.ndarray) -> Task:
  """The task that labels belong to, by the number of their dimensions."""
  return next(task for task in TASKS if task.label_ndim == labels.ndim)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Loss per label, nats: (batch, ..., classes), (batch, ...) -> the latter."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def exact_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Loss per example in float64, nats: (n, classes), (n,) -> (n,)."""
  logits = logits.astype(np.float64)
  top = logits.max(-1, keepdims=True)
  normalizer = top[:, 0] + np.log(np.sum(np.exp(logits - top), -1))
  return normalizer - logits[np.arange(len(labels)), labels]


def with_penalty(loss: jax.Array, penalty: jax.Array) -> jax.Array:
  """A loss with the gradient of a penalty, which does not show in its value."""
  return loss + (penalty - jax.lax.stop_gradient(penalty))


@jax.jit
def _count(
    logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Losses (example,); and hits, labels, predictions, (3, classes)."""
  labels = labels.astype(jnp.int32)
  counts = labels >= 0
  losses = cross_entropy(logits, labels)
  predicted = jnp.where(counts, jnp.argmax(logits, -1), -1)
  classes = jnp.arange(logits.shape[-1]).reshape(1, 1, 1, -1)
  labelled, predicted = (x[..., None] == classes for x in (labels, predicted))
  pixels = [
      jnp.sum(which, (0, 1, 2), dtype=jnp.int32)
      for which in (labelled & predicted, labelled, predicted)
  ]
  return jnp.sum(losses, (1, 2), where=counts), jnp.stack(pixels)
