"""Stratified random order: the one mechanism behind hold-outs and subsets."""

import numpy as np


def order(labels: np.ndarray, *, seed: int) -> np.ndarray:
  """A random order in which every stretch has nearly the class proportions.

  Example number r of the n of a class, counted in random order, comes at
  (r + 1/2) / n of the way. So the first m examples apportion m by the divisor
  method of Sainte-Lague. Unlike with largest remainders, no class loses an
  example when m grows: subsets of all sizes nest.

  Args:
    labels: integers, (example,).
    seed: whole number >= 0.

  Returns:
    A permutation, (example,); the same on every machine and NumPy version,
    because only the raw stream of the generator is used.

  Raises:
    ValueError: the seed is negative or no integer.
  """
  if not isinstance(seed, (int, np.integer)) or seed < 0:
    raise ValueError(f'The seed must be a whole number >= 0, got {seed!r}.')
  draws = np.random.PCG64(int(seed)).random_raw(labels.size)
  by_class = np.lexsort((draws, labels))
  sizes = np.bincount(labels)
  starts = np.cumsum(sizes) - sizes
  ranks = np.empty(labels.size, np.int64)
  ranks[by_class] = np.arange(labels.size) - starts[labels[by_class]]
  return np.lexsort((draws, (ranks + 0.5) / sizes[labels]))
