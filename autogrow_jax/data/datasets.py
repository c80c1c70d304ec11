"""`load`: a data set divided into what to train, to decide and to report on.

The clean protocol: decisions are taken on a stratified hold-out from the
official training split, and the test split is read once, at the end. Unlike the
paper (Wen et al. 2020), whose code decides on the test split; that is to be had
with `select_on='test'`.
"""

from collections.abc import Callable
import dataclasses
import fractions
import functools
import numbers

import numpy as np

from autogrow_jax.data import pipeline
from autogrow_jax.data import sources
from autogrow_jax.data import stratified

Preprocessing = pipeline.Preprocessing
Split = sources.Split


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which data, and how it is divided; JSON-able.

  Attributes:
    dataset: a key of `sources.SOURCES`; of arrays that a run was given,
      'name:digest'.
    data_dir: where TFDS data sets are prepared; None for TFDS's own default,
      the environment variable TFDS_DATA_DIR or else ~/tensorflow_datasets.
    holdout: how many examples to hold out from training; None for the data
      set's own number.
    data_fraction: part of what is left for training that is used, e.g. '0.25'
      or '1/4'. Text, so that it is exact.
    select_on: 'holdout', or 'test' to take decisions on the test split; then
      nothing is held out, and every result must say so.
  """

  dataset: str = 'digits'
  data_dir: str | None = None
  holdout: int | None = None
  data_fraction: str = '1'
  select_on: str = 'holdout'

  def __post_init__(self):
    if ':' not in self.dataset and self.dataset not in sources.SOURCES:
      raise ValueError(
          f'Unknown data set {self.dataset!r}; there are '
          f'{", ".join(sources.SOURCES)}.'
      )
    if self.data_dir is not None and not isinstance(self.data_dir, str):
      raise ValueError(f'data_dir must be text, got {self.data_dir!r}.')
    if self.select_on not in ('holdout', 'test'):
      raise ValueError(
          f"select_on must be 'holdout' or 'test', got {self.select_on!r}."
      )
    if self.holdout is not None:
      _check_count('holdout', self.holdout)
      if self.select_on == 'test':
        raise ValueError(
            f"holdout={self.holdout} has no use with select_on='test', where "
            'nothing is held out; leave it out.'
        )
    if not 0 < self.fraction <= 1:
      raise ValueError(
          'data_fraction must be above 0 and at most 1, got '
          f'{self.data_fraction!r}.'
      )

  @property
  def fraction(self) -> fractions.Fraction:
    """`data_fraction`, exactly."""
    try:
      if isinstance(self.data_fraction, str):
        return fractions.Fraction(self.data_fraction)
    except (ValueError, ZeroDivisionError):
      pass
    raise ValueError(
        "data_fraction must be text such as '0.25' or '1/4', got "
        f'{self.data_fraction!r}.'
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A divided data set. The test split is not in it until it is asked for.

  Attributes:
    name: of the data set.
    classes: number of classes.
    train: what to train on.
    holdout: what is held out to decide on; empty with select_on='test'.
    preprocessing: what to do to the images.
    train_indices: int64, ascending, of the examples of `train` in the official
      training split.
    holdout_indices: the same of `holdout`; the two are disjoint.
    select_on: 'holdout' or 'test'.
    read_test: reads the test split; on later calls it is there already. With
      select_on='holdout' nothing here calls it: do so once, at the end.
  """

  name: str
  classes: int
  train: Split
  holdout: Split
  preprocessing: Preprocessing
  train_indices: np.ndarray
  holdout_indices: np.ndarray
  select_on: str
  read_test: Callable[[], Split]

  def __post_init__(self):
    _check_split('train', self.train, self)
    _check_split('holdout', self.holdout, self)

  @property
  def selection(self) -> Split:
    """What decisions are taken on: the hold-out, or the test split."""
    return self.read_test() if self.select_on == 'test' else self.holdout

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channel) of what `preprocess` returns."""
    height, width, channels = self.train.images.shape[1:]
    pad = 2 * self.preprocessing.pad
    return height + pad, width + pad, channels


def load(config: DataConfig, *, seed: int) -> Dataset:
  """Reads a known data set and divides it.

  Args:
    config: which, and how.
    seed: decides what is held out and, with a fraction below 1, what is left
      out: for the same seed, smaller fractions are subsets of larger ones.

  Returns:
    The data set, its training split in memory.

  Raises:
    ValueError: it is not prepared (and how to do so), or it cannot be divided
      like that.
  """
  if config.dataset not in sources.SOURCES:
    raise ValueError(
        f'The data {config.dataset} are arrays of your own: pass them to `run`.'
    )
  source = sources.SOURCES[config.dataset]
  read = source.open(config.data_dir)
  if config.select_on == 'test':
    holdout = 0
  else:
    holdout = source.holdout if config.holdout is None else config.holdout
  official = read('train')
  train, held_out = _divide(official, holdout, config.fraction, seed=seed)
  return Dataset(
      name=config.dataset,
      classes=source.classes,
      train=official.take(train),
      holdout=official.take(held_out),
      preprocessing=source.preprocessing,
      train_indices=train,
      holdout_indices=held_out,
      select_on=config.select_on,
      read_test=functools.cache(functools.partial(read, 'test')),
  )


def from_arrays(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    holdout: int,
    seed: int,
    preprocessing: Preprocessing,
    classes: int | None = None,
    name: str = 'arrays',
) -> Dataset:
  """A data set of one's own.

  Args:
    train_images: uint8, (example, height, width) or with a channel axis.
    train_labels: integers from 0, (example,).
    test_images: like `train_images`.
    test_labels: like `train_labels`.
    holdout: how many training examples to hold out, by class proportions.
    seed: decides which.
    preprocessing: what to do to the images; its mean and std are of pixels
      scaled to [0, 1].
    classes: number of classes; None for 1 + the largest training label.
    name: of the data set, for logs.

  Returns:
    The data set. Only its `read_test` returns the test arrays.

  Raises:
    ValueError: an array has a wrong type or shape, or a label has no class.
  """
  _check_count('holdout', holdout)
  official = _to_split('train', train_images, train_labels)
  test = _to_split('test', test_images, test_labels)
  if classes is None:
    classes = 1 + int(official.labels.max())
  _check_count('classes', classes)
  everything = fractions.Fraction(1)
  train, held_out = _divide(official, holdout, everything, seed=seed)
  dataset = Dataset(
      name=name,
      classes=int(classes),
      train=official.take(train),
      holdout=official.take(held_out),
      preprocessing=preprocessing,
      train_indices=train,
      holdout_indices=held_out,
      select_on='holdout',
      read_test=lambda: test,
  )
  # Now, because a run would find out only at its very end.
  _check_split('test', test, dataset)
  return dataset


def _divide(
    official: Split, holdout: int, fraction: fractions.Fraction, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Ascending indices of what to train on and of what is held out.

  The hold-out is the first stretch of one stratified order, the training part
  the next, so that neither depends on the size of anything behind it.
  """
  order = stratified.order(official.labels, seed=seed)
  if holdout >= len(order):
    raise ValueError(
        f'holdout must be below {len(order)}, the number of training examples, '
        f'got {holdout}.'
    )
  end = holdout + round(fraction * (len(order) - holdout))
  train, held_out = np.sort(order[holdout:end]), np.sort(order[:holdout])
  missing = np.setdiff1d(official.labels, official.labels[train])
  if missing.size:
    raise ValueError(
        f'A hold-out of {holdout} and a data fraction of {fraction} leave '
        f'{len(train)} of {len(order)} training examples and none of the '
        f'classes {missing.tolist()}; hold out fewer or use a larger fraction.'
    )
  return train, held_out


def _to_split(name: str, images: np.ndarray, labels: np.ndarray) -> Split:
  """A split from a user's arrays."""
  images, labels = np.asarray(images), np.asarray(labels)
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
        f'{name}_labels must be integers, one per image, got {labels.dtype} '
        f'{labels.shape}.'
    )
  if not labels.size:
    raise ValueError(f'{name}_labels is empty; at least one example is needed.')
  if images.ndim == 3:
    images = images[..., np.newaxis]
  if labels.max() > np.iinfo(np.int32).max:
    raise ValueError(
        f'{name}_labels must be class numbers below 2**31, got {labels.max()}.'
    )
  try:
    return Split(images, labels.astype(np.int32))
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error


def _check_split(name: str, split: Split, dataset: Dataset) -> None:
  """Raises ValueError unless a split fits the rest of its data set."""
  if split.images.shape[1:] != dataset.train.images.shape[1:]:
    raise ValueError(
        f'Images of {name} have the shape {split.images.shape[1:]}, those of '
        f'train {dataset.train.images.shape[1:]}; they must agree.'
    )
  channels = len(dataset.preprocessing.mean)
  if split.images.shape[-1] != channels:
    raise ValueError(
        f'Images of {name} have {split.images.shape[-1]} channels, but the '
        f'mean and std of the preprocessing are for {channels}.'
    )
  if len(split) and split.labels.max() >= dataset.classes:
    raise ValueError(
        f'Labels of {name} must be from 0 to {dataset.classes - 1}, as there '
        f'are {dataset.classes} classes, got {split.labels.max()}.'
    )


def _check_count(name: str, value: int) -> None:
  if (
      not isinstance(value, numbers.Integral)
      or isinstance(value, bool)
      or value < 1
  ):
    raise ValueError(f'{name} must be a whole number >= 1, got {value!r}.')
