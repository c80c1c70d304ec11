"""A data set, divided into examples to train, to decide and to report on."""

from collections.abc import Callable
import dataclasses

import numpy as np

from autogrow_jax.data import config as config_lib
from autogrow_jax.data import pipeline
from autogrow_jax.data import splits
from autogrow_jax.data import streams


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A divided data set. The test split is read on request only.

  Attributes:
    name: name of the data set.
    classes: number of classes.
    train: examples to train on.
    holdout: examples held out to decide on; empty with select_on='test'.
    preprocessing: preprocessing of the images.
    train_indices: int64, ascending, numbers of the examples of `train` in the
      official training split.
    holdout_indices: the same for `holdout`; the two are disjoint.
    select_on: 'holdout' or 'test'.
    read_test: reads the test split; later calls return the same. With
      select_on='holdout' nothing here calls it: do so once, at the end.
    digest: digest of the files, where it identifies the data; else None.
    asked_holdout: number of examples asked to be held out, including the
      damaged ones that are left out; None if it is all of `holdout`.
    stream: training batches, decoded when needed; None for data in memory.
  """

  name: str
  classes: int
  train: splits.Split
  holdout: splits.Split
  preprocessing: pipeline.Preprocessing
  train_indices: np.ndarray
  holdout_indices: np.ndarray
  select_on: str
  read_test: Callable[[], splits.Split]
  digest: str | None = None
  asked_holdout: int | None = None
  stream: streams.Stream | None = None

  def __post_init__(self):
    for name in ('train', 'holdout'):
      _check_split(name, getattr(self, name), self)

  @property
  def is_text(self) -> bool:
    """True if the examples are windows of text."""
    return self.preprocessing.kind == 'tokens'

  @property
  def selection(self) -> splits.Split:
    """Examples to decide on: the hold-out, or the test split."""
    return self.read_test() if self.select_on == 'test' else self.holdout

  @property
  def input_shape(self) -> tuple[int, ...]:
    """(height, width, channel) of what `preprocess` returns; (1,) for text."""
    if self.is_text:  # A network reads it word by word.
      return (1,)
    height, width, channels = self.train.images.shape[1:]
    pad = 2 * self.preprocessing.pad
    return height + pad, width + pad, channels


def from_arrays(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    holdout: int,
    seed: int,
    preprocessing: pipeline.Preprocessing,
    classes: int | None = None,
    name: str = 'arrays',
) -> Dataset:
  """Makes a data set from arrays.

  Args:
    train_images: uint8, (example, height, width) or with a channel axis.
    train_labels: integers from 0, (example,), or masks.
    test_images: like `train_images`.
    test_labels: like `train_labels`.
    holdout: number of training examples to hold out, by class proportions.
    seed: decides which.
    preprocessing: preprocessing of the images; its mean and std are of pixels
      scaled to [0, 1].
    classes: number of classes; None for 1 + the largest training label.
    name: name of the data set, for logs.

  Returns:
    The data set. Only its `read_test` returns the test arrays.

  Raises:
    ValueError: an array has a wrong type or shape, or a label has no class.
  """
  config_lib.check_count('holdout', holdout)
  official = _to_split('train', train_images, train_labels)
  test = _to_split('test', test_images, test_labels)
  if classes is None:
    classes = 1 + int(official.labels.max())
  config_lib.check_count('classes', classes)
  train, held_out = splits.divide(official.labels, holdout, seed=seed)
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


def _to_split(
    name: str, images: np.ndarray, labels: np.ndarray
) -> splits.Split:
  """Makes a split from a user's arrays."""
  images, labels = np.asarray(images), np.asarray(labels)
  if not np.issubdtype(labels.dtype, np.integer) or labels.ndim not in (1, 3):
    raise ValueError(
        f'{name}_labels must be integers, one class for each image, '
        '(example,), or masks, (example, height, width), got '
        f'{labels.dtype} {labels.shape}.'
    )
  if not labels.size:
    raise ValueError(f'{name}_labels is empty; at least one example is needed.')
  if labels.max() > np.iinfo(np.int32).max:
    raise ValueError(
        f'{name}_labels must be class numbers below 2**31, got {labels.max()}.'
    )
  try:
    return splits.Split(
        images[..., np.newaxis] if images.ndim == 3 else images,
        labels.astype(np.int32),
    )
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error


def _check_split(name: str, split: splits.Split, dataset: Dataset) -> None:
  """Raises a ValueError unless a split fits the rest of its data set."""
  if dataset.is_text:
    return
  shape, how = split.images.shape[1:], dataset.preprocessing
  if shape != dataset.train.images.shape[1:]:
    raise ValueError(
        f'Images of {name} have the shape {shape}, those of train '
        f'{dataset.train.images.shape[1:]}; they must agree.'
    )
  if shape[-1] != len(how.mean):
    raise ValueError(
        f'Images of {name} have {shape[-1]} channels, but the mean and std of '
        f'the preprocessing are for {len(how.mean)}.'
    )
  if split.labels.ndim == 3 and (
      split.labels.shape[1:] != shape[:2] or how.pad or how.crop
  ):
    raise ValueError(
        f'Masks of {name} must be as large as their images, without pad and '
        f'crop, got {split.labels.shape[1:]} for {shape[:2]}.'
    )
  if len(split) and split.labels.max() >= dataset.classes:
    raise ValueError(
        f'Labels of {name} must be from 0 to {dataset.classes - 1}, as there '
        f'are {dataset.classes} classes, got {split.labels.max()}.'
    )
