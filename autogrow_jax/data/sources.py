"""The data sets that `load` knows: where they come from, what they need.

A new one that TFDS has is one more row of `SOURCES`.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import os
import pathlib
import re
from typing import Any, Self

from absl import logging
import numpy as np

from autogrow_jax.data import pipeline
from autogrow_jax.data import stratified

Preprocessing = pipeline.Preprocessing

# Enough to amortise a read, few enough to hold decoded twice.
_READ_AT_ONCE = 1000

_DIGITS_TEST = 360


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Images with labels.

  Attributes:
    images: uint8, (example, height, width, channel), from 0 to 255.
    labels: int32, (example,), from 0.
  """

  images: np.ndarray
  labels: np.ndarray

  def __post_init__(self):
    images, labels = self.images, self.labels
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
      raise ValueError(
          f'Images must be a uint8 numpy array, got {_describe(images)}; scale '
          'them to 0 to 255, round and cast.'
      )
    if images.ndim != 4:
      raise ValueError(
          'Images must have the shape (example, height, width, channel), got '
          f'{images.shape}.'
      )
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int32:
      raise ValueError(
          f'Labels must be an int32 numpy array, got {_describe(labels)}.'
      )
    if labels.shape != images.shape[:1]:
      raise ValueError(
          f'Labels have the shape {labels.shape}, but there are '
          f'{images.shape[0]} images, so it must be ({images.shape[0]},).'
      )
    if labels.size and labels.min() < 0:
      raise ValueError(
          f'Labels must be from 0 to classes - 1, got {labels.min()}.'
      )

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, indices: np.ndarray) -> Self:
    """The examples of these indices, copied."""
    return type(self)(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Source:
  """A known data set.

  Attributes:
    classes: number of classes.
    holdout: how many training examples to hold out unless told otherwise.
    preprocessing: as in the papers.
    open: called with the data directory or None, makes sure that both splits
      are there, without reading them, and returns the function that reads the
      split 'train' or 'test'. Raises ValueError where one is missing.
  """

  classes: int
  holdout: int
  preprocessing: Preprocessing
  open: Callable[[str | None], Callable[[str], Split]]


def _open_digits(data_dir: str | None) -> Callable[[str], Split]:
  """The 1,797 digits that come with scikit-learn (8x8, values 0 to 16).

  They have no official test split. Ours is fixed: 360 stratified images,
  independent of any seed. The other 1,437 are the training split.
  """
  del data_dir  # They are part of the package.

  def read(split: str) -> Split:
    from sklearn import datasets  # pylint: disable=g-import-not-at-top

    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    order = stratified.order(labels, seed=0)
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    indices = {'train': train, 'test': test}[split]
    return Split(images, labels).take(np.sort(indices))

  return read


def _open_tfds(name: str) -> Callable[[str | None], Callable[[str], Split]]:
  """Reads a prepared TFDS data set without TensorFlow or the network."""

  def open_(data_dir: str | None) -> Callable[[str], Split]:
    directory = _prepared_directory(name, data_dir)
    builder = _builder(directory)
    for split in ('train', 'test'):
      info = builder.info.splits.get(split)
      if not info or not all(map(os.path.exists, info.filepaths)):
        raise ValueError(
            f'The split {split!r} of {name} is not in {directory}. Remove that '
            'directory and prepare it again: '
            f'{_how_to_prepare(name, directory.parents[1])}'
        )
    return lambda split: _read_tfds(builder, split)

  return open_


def _prepared_directory(name: str, data_dir: str | None) -> pathlib.Path:
  """Directory of the newest prepared version.

  Found by hand, because for a data set that is not prepared `tfds.builder`
  would look for one in the cloud.
  """
  root = pathlib.Path(
      data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  ).expanduser()
  versions = [
      path.parent
      for path in root.glob(f'{name}/*/dataset_info.json')
      if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)
  ]
  if not versions:
    raise ValueError(
        f'The data set {name} is not prepared in {root}. Prepare it once: '
        f'{_how_to_prepare(name, root)}'
    )
  return max(versions, key=lambda path: [*map(int, path.name.split('.'))])


def _how_to_prepare(name: str, root: pathlib.Path | str) -> str:
  return (
      "pip install tensorflow && python -c 'import tensorflow_datasets as "
      f'tfds; tfds.builder("{name}", data_dir="{root}", '
      'file_format="array_record").download_and_prepare()\' (TensorFlow is '
      'needed only for this). If it is prepared elsewhere, name that directory '
      'with --data_dir.'
  )


def _builder(directory: pathlib.Path) -> Any:
  with _calling_tfds(directory):
    import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

    builder = tfds.builder_from_directory(directory)
  file_format = builder.info.file_format
  if file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise ValueError(
        f'{directory} holds {file_format.value} files, which only TensorFlow '
        'can read. Prepare the data set in another directory: '
        f'{_how_to_prepare(builder.name, "ANOTHER_DIRECTORY")}'
    )
  return builder


def _read_tfds(builder: Any, split: str) -> Split:
  """Decodes a whole split into memory.

  In one thread: these images are so small that decoding holds Python's lock,
  and a pool of threads is slower.
  """
  info = builder.info
  examples = info.splits[split].num_examples
  images = np.empty((examples, *info.features['image'].shape), np.uint8)
  labels = np.empty(examples, np.int32)
  with _calling_tfds(builder.data_dir):
    source = builder.as_data_source(split=split)
    for start in range(0, examples, _READ_AT_ONCE):
      indices = range(start, min(start + _READ_AT_ONCE, examples))
      batch = source.__getitems__(list(indices))
      for index, example in zip(indices, batch, strict=True):
        images[index] = example['image']
        labels[index] = example['label']
  return Split(images, labels)


@contextlib.contextmanager
def _calling_tfds(directory: str | pathlib.Path) -> Iterator[None]:
  """Silences warnings (OpenCV would be faster, ...) and explains errors."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  # TFDS, protobuf and array_record each have exceptions of their own.
  except Exception as error:  # pylint: disable=broad-exception-caught
    reason = ' '.join(str(error).split())
    raise ValueError(
        f'{directory} cannot be read ({type(error).__name__}: {reason}). If '
        'its files are damaged, remove it and prepare it again.'
    ) from error
  finally:
    logging.set_verbosity(verbosity)


def _describe(value: Any) -> str:
  dtype = getattr(value, 'dtype', None)
  return type(value).__name__ + (f' of {dtype}' if dtype is not None else '')


SOURCES = {
    'digits': Source(
        classes=10,
        holdout=360,
        # Of the 1,437 training images.
        preprocessing=Preprocessing(mean=(0.3053,), std=(0.3757,)),
        open=_open_digits,
    ),
    'mnist': Source(
        classes=10,
        holdout=5000,
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,), pad=2),
        open=_open_tfds('mnist'),
    ),
    'fashion_mnist': Source(
        classes=10,
        holdout=5000,
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,), pad=2, flip=True),
        open=_open_tfds('fashion_mnist'),
    ),
    'cifar10': Source(
        classes=10,
        holdout=5000,
        # Unlike the paper, the std of the pixels; the paper's .2023 .1994 .2010
        # is an average over the std of each image.
        preprocessing=Preprocessing(
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            crop=4,
            flip=True,
        ),
        open=_open_tfds('cifar10'),
    ),
}
