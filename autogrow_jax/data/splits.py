"""Splits: examples with labels, and how a training split is divided."""

from collections.abc import Mapping
import dataclasses
import fractions
from typing import Any, Self

import numpy as np

from autogrow_jax.data import streams


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Images or windows of text, with labels; images also as `images.Records`.

  Attributes:
    images: uint8, (example, height, width, channel), from 0 to 255; or tokens,
      int32, (example, step).
    labels: int32, (example,) from 0, or (example, ...) where -1 does not count;
      masks, (example, height, width), may be int16.
  """

  images: np.ndarray | streams.LazyImages
  labels: np.ndarray

  def __post_init__(self):
    images, labels = self.images, self.labels
    if not isinstance(images, (np.ndarray, streams.LazyImages)) or (
        (images.ndim, images.dtype) not in ((4, np.uint8), (2, np.int32))
    ):
      raise ValueError(
          'Images must be a uint8 numpy array, (example, height, width, '
          f'channel), got {_describe(images)}; scale them to 0 to 255, round '
          'and cast.'
      )
    kinds = (np.int32, np.int16) if np.ndim(labels) == 3 else (np.int32,)
    is_array = isinstance(labels, np.ndarray) and labels.dtype in kinds
    if not is_array or labels.shape[:1] != images.shape[:1]:
      raise ValueError(
          f'Labels must be an int32 numpy array for {images.shape[0]} images, '
          f'got {_describe(labels)}.'
      )
    if labels.size and labels.min() < (0 if labels.ndim == 1 else -1):
      raise ValueError(
          f'Labels must be from 0 to classes - 1, got {labels.min()}.'
      )

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> np.ndarray:
    return self.images[index]

  @property
  def length(self) -> int:
    """Inputs per example in costs: 1 for an image, else its tokens."""
    return self.images.shape[1] if self.images.ndim == 2 else 1

  @property
  def damaged(self) -> Mapping[int, str]:
    """Index -> what is wrong, for the damaged images met so far."""
    return getattr(self.images, 'damaged', {})

  def take(self, indices: np.ndarray) -> Self:
    """Copies the examples with these indices."""
    return type(self)(self.images[indices], self.labels[indices])


def order(labels: np.ndarray, *, seed: int) -> np.ndarray:
  """A stratified random order: every stretch has nearly the class proportions.

  Example number r of the n of a class, counted in random order, comes at
  (r + 1/2) / n of the way. So the first m examples apportion m by the divisor
  method of Sainte-Lague. Unlike with largest remainders, no class loses an
  example when m grows: subsets of all sizes nest.

  The order is the same on every machine and NumPy version, because only the raw
  stream of the generator is used.
  """
  draws = np.random.PCG64(seed).random_raw(labels.size)
  by_class = np.lexsort((draws, labels))
  sizes = np.bincount(labels)
  starts = np.cumsum(sizes) - sizes
  ranks = np.empty(labels.size, np.int64)
  ranks[by_class] = np.arange(labels.size) - starts[labels[by_class]]
  return np.lexsort((draws, (ranks + 0.5) / sizes[labels]))


def fixed_test(labels: np.ndarray, count: int) -> dict[str, np.ndarray]:
  """Ascending indices of 'train' and 'test', independent of a run's seed."""
  shuffled = order(labels, seed=0)
  return {'train': np.sort(shuffled[count:]), 'test': np.sort(shuffled[:count])}


def divide(
    labels: np.ndarray,
    holdout: int,
    fraction: fractions.Fraction = fractions.Fraction(1),
    *,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Ascending indices of the examples to train on, and of those held out.

  The hold-out is the first stretch of one stratified order, the training part
  the next, so that neither depends on the size of anything behind it. Labels
  may be masks, which have no one class.
  """
  if labels.ndim > 1:
    labels = np.zeros(len(labels), np.int32)
  shuffled = order(labels, seed=seed)
  if holdout >= len(shuffled):
    raise ValueError(
        f'holdout must be below {len(shuffled)}, the number of training '
        f'examples, got {holdout}.'
    )
  end = holdout + round(fraction * (len(shuffled) - holdout))
  train, held_out = np.sort(shuffled[holdout:end]), np.sort(shuffled[:holdout])
  if missing := np.setdiff1d(labels, labels[train]).tolist():
    raise ValueError(
        f'A hold-out of {holdout} and a data fraction of {fraction} leave '
        f'{len(train)} of {len(shuffled)} training examples and none of the '
        f'classes {missing}; hold out fewer or use a larger fraction.'
    )
  return train, held_out


def _describe(value: Any) -> str:
  found = (getattr(value, name, '') for name in ('dtype', 'shape'))
  return ' '.join([type(value).__name__, *map(str, found)])
