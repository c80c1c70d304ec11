"""The data sets that `load` knows: where they come from, what they need.

Those of the paper are the rows of `SOURCES`; `find` knows them, every other one
that TFDS has prepared, and folders of images.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Self

import numpy as np

from autogrow_jax.data import folder
from autogrow_jax.data import images
from autogrow_jax.data import pairs
from autogrow_jax.data import pipeline
from autogrow_jax.data import prepared
from autogrow_jax.data import stratified
from autogrow_jax.data import streams

Preprocessing = pipeline.Preprocessing

# What the name of a folder of images begins with, and of one with masks.
FOLDER = 'folder:'
PAIRS = 'pairs:'

_DIGITS_TEST = 360


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Images with labels.

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
    is_array = isinstance(images, (np.ndarray, streams.LazyImages))
    is_text = is_array and images.dtype == np.int32 and images.ndim == 2
    if not is_array or not (is_text or images.dtype == np.uint8):
      raise ValueError(
          f'Images must be a uint8 numpy array, got {_describe(images)}; scale '
          'them to 0 to 255, round and cast.'
      )
    if images.ndim != 4 and not is_text:
      raise ValueError(
          'Images must have the shape (example, height, width, channel), got '
          f'{images.shape}.'
      )
    kinds = (np.int32, np.int16) if np.ndim(labels) == 3 else (np.int32,)
    if not isinstance(labels, np.ndarray) or labels.dtype not in kinds:
      raise ValueError(
          f'Labels must be an int32 numpy array, got {_describe(labels)}.'
      )
    if labels.shape[:1] != images.shape[:1]:
      raise ValueError(
          f'Labels have the shape {labels.shape}, but there are '
          f'{images.shape[0]} images, so it must be ({images.shape[0]},).'
      )
    if labels.size and labels.min() < (0 if labels.ndim == 1 else -1):
      raise ValueError(
          f'Labels must be from 0 to classes - 1, got {labels.min()}.'
      )

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def length(self) -> int:
    """What an example counts in costs: 1 for an image, else its tokens."""
    return self.images.shape[1] if self.images.ndim == 2 else 1

  @property
  def damaged(self) -> Mapping[int, str]:
    """Index -> what is wrong, of the damaged images met so far."""
    return getattr(self.images, 'damaged', {})

  def take(self, indices: np.ndarray) -> Self:
    """The examples of these indices, copied."""
    return type(self)(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Source:
  """A known data set.

  Attributes:
    classes: number of classes.
    holdout: how many training examples to hold out unless told otherwise.
    preprocessing: as in the papers, with the mean and std of the pixels.
    open: called with the data directory or None, makes sure that both splits
      are there, without reading them, and returns the function that opens the
      split 'train' or 'test'. Raises ValueError where one is missing.
    train: official number of training examples.
    test: official number of test examples.
    shape: (height, width, channel) of the images as they are loaded.
    paper_std: the paper's own, where it is not that of the pixels.
    is_resized: whether the images have sizes of their own: they are trained on
      in random resized crops of the height and width of `shape`.
    has_masks: see `Found`.
  """

  classes: int
  holdout: int
  preprocessing: Preprocessing
  open: Callable[[str | None], Callable[[str], images.Records]]
  train: int
  test: int
  shape: tuple[int, int, int]
  paper_std: tuple[float, ...] | None = None
  is_resized: bool = False
  has_masks: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
  """A data set that is there, not read yet.

  Attributes:
    classes: number of classes.
    shape: (height, width, channel) of the images as they will be loaded.
    size: to which images are scaled, pixels; None if they stay as they are.
    is_resized: whether training takes random resized crops, so that images
      have to be decoded anew in each epoch.
    read: opens the split 'train' or 'test'.
    holdout: training examples to hold out unless told otherwise; None for a
      tenth, at most 5,000.
    preprocessing: None if the mean and std are to be measured.
    digest: of the names and sizes of the files; None if their origin vouches
      for them.
    has_masks: whether records have a mask with each image, as `pairs.Files`,
      which is then its label.
  """

  classes: int
  shape: tuple[int, int, int]
  size: int | None
  is_resized: bool
  read: Callable[[str], images.Records]
  holdout: int | None = None
  preprocessing: Preprocessing | None = None
  digest: str | None = None
  has_masks: bool = False


class Arrays:
  """`images.Records` of images in memory.

  Attributes:
    labels: int32, (example,).
  """

  def __init__(self, split: Split):
    self._images, self.labels = split.images, split.labels

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> np.ndarray:
    return self._images[index]


def find(
    dataset: str,
    *,
    data_dir: str | None = None,
    normalization: str = 'pixels',
    image_size: int | None = None,
    channels: int | None = None,
    skip_damaged: bool = False,
) -> Found:
  """Finds a data set; see `datasets.DataConfig` for the arguments.

  Raises:
    ValueError: it is not there, or its images cannot be had like that.
  """
  if dataset in SOURCES:
    source = SOURCES[dataset]
    return Found(
        classes=source.classes,
        shape=shape_of(dataset, image_size=image_size, channels=channels),
        size=image_size or (source.shape[0] if source.is_resized else None),
        is_resized=source.is_resized,
        read=source.open(data_dir),
        holdout=source.holdout,
        preprocessing=preprocessing_of(dataset, normalization),
        has_masks=source.has_masks,
    )
  for prefix, kind in ((FOLDER, folder.Folder), (PAIRS, pairs.Folder)):
    if dataset.startswith(prefix):
      found = kind(
          dataset.removeprefix(prefix),
          channels=channels,
          image_size=image_size,
          skip_damaged=skip_damaged,
      )
      return Found(
          classes=found.classes,
          shape=found.shape,
          size=image_size,
          is_resized=False,
          read=found.records,
          digest=found.digest,
          has_masks=prefix == PAIRS,
      )
  return _find_prepared(dataset, data_dir, image_size, channels)


def shape_of(
    dataset: str, *, image_size: int | None, channels: int | None
) -> tuple[int, int, int]:
  """(height, width, channel) of the images of a key of `SOURCES`, as loaded."""
  height, width, own = SOURCES[dataset].shape
  if channels not in (None, own):
    raise ValueError(
        f'Images of {dataset} have {own} channel{"s" if own > 1 else ""}, got '
        f'channels={channels}; leave it out.'
    )
  return image_size or height, image_size or width, own


def preprocessing_of(dataset: str, normalization: str) -> Preprocessing:
  """What is done to the images of a key of `SOURCES`."""
  source = SOURCES[dataset]
  if normalization == 'paper' and source.paper_std is not None:
    return dataclasses.replace(source.preprocessing, std=source.paper_std)
  return source.preprocessing


def _find_prepared(
    dataset: str,
    data_dir: str | None,
    image_size: int | None,
    channels: int | None,
) -> Found:
  """A data set of TFDS that is no key of `SOURCES`."""
  if not prepared.is_prepared(dataset, data_dir):
    raise ValueError(
        f'Unknown data set {dataset!r}; there are {", ".join(SOURCES)}, '
        f'{FOLDER}PATH for a folder of images, {PAIRS}PATH for one with masks, '
        f'and all that TFDS has prepared in {prepared.root(data_dir)}, where '
        'there is none of that name; '
        '--data_dir names another directory.'
    )
  found = prepared.Prepared(dataset, data_dir)
  height, width, own = found.shape
  if image_size is None and (height is None or width is None):
    raise ValueError(
        f'The images of {dataset} differ in size; give a size for all with '
        '--image_size.'
    )
  channels = channels or (1 if own == 1 else 3)
  splits = {'train': found.train_split, 'test': found.test_split}
  return Found(
      classes=found.classes,
      shape=(image_size or height, image_size or width, channels),
      size=image_size,
      is_resized=False,
      read=lambda split: found.records(splits[split], channels),
  )


def _open_digits(data_dir: str | None) -> Callable[[str], images.Records]:
  """The 1,797 digits that come with scikit-learn (8x8, values 0 to 16).

  They have no official test split. Ours is fixed: 360 stratified images,
  independent of any seed. The other 1,437 are the training split.
  """
  del data_dir  # They are part of the package.

  def read(split: str) -> images.Records:
    from sklearn import datasets  # pylint: disable=g-import-not-at-top

    digits = datasets.load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    order = stratified.order(labels, seed=0)
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    indices = {'train': train, 'test': test}[split]
    return Arrays(Split(pixels, labels).take(np.sort(indices)))

  return read


def _open_tfds(
    name: str, channels: int
) -> Callable[[str | None], Callable[[str], images.Records]]:
  """Opens a data set that TFDS has prepared."""

  def open_(data_dir: str | None) -> Callable[[str], images.Records]:
    found = prepared.Prepared(name, data_dir)
    splits = {'train': found.train_split, 'test': found.test_split}
    return lambda split: found.records(splits[split], channels)

  return open_


def _open_voc(
    data_dir: str | None,
) -> Callable[[str], images.Records]:
  return pairs.voc(prepared.root(data_dir)).__getitem__


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
        train=1437,
        test=_DIGITS_TEST,
        shape=(8, 8, 1),
    ),
    'mnist': Source(
        classes=10,
        holdout=5000,
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,), pad=2),
        open=_open_tfds('mnist', 1),
        train=60_000,
        test=10_000,
        shape=(28, 28, 1),
    ),
    'fashion_mnist': Source(
        classes=10,
        holdout=5000,
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,), pad=2, flip=True),
        open=_open_tfds('fashion_mnist', 1),
        train=60_000,
        test=10_000,
        shape=(28, 28, 1),
    ),
    # Without its 531,131 images named 'extra', as in the paper.
    'svhn_cropped': Source(
        classes=10,
        holdout=7257,
        preprocessing=Preprocessing(
            mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970), crop=4
        ),
        open=_open_tfds('svhn_cropped', 3),
        train=73_257,
        test=26_032,
        shape=(32, 32, 3),
    ),
    'cifar10': Source(
        classes=10,
        holdout=5000,
        # Unlike the paper, the std of the pixels; the paper's is an average
        # over the std of each image.
        preprocessing=Preprocessing(
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            crop=4,
            flip=True,
        ),
        paper_std=(0.2023, 0.1994, 0.2010),
        open=_open_tfds('cifar10', 3),
        train=50_000,
        test=10_000,
        shape=(32, 32, 3),
    ),
    'cifar100': Source(
        classes=100,
        holdout=5000,
        preprocessing=Preprocessing(
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            crop=4,
            flip=True,
        ),
        open=_open_tfds('cifar100', 3),
        train=50_000,
        test=10_000,
        shape=(32, 32, 3),
    ),
    # Its split 'validation' is the test; the labels of 'test' are secret.
    'imagenet2012': Source(
        classes=1000,
        holdout=50_000,
        preprocessing=Preprocessing(
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), flip=True
        ),
        open=_open_tfds('imagenet2012', 3),
        train=1_281_167,
        test=50_000,
        shape=(224, 224, 3),
        is_resized=True,
    ),
    # Its split 'val' is the test; the masks of 'test' are secret. Images have
    # at most 500 pixels a side, so that none is scaled down.
    'voc/2012': Source(
        classes=21,
        holdout=146,
        preprocessing=Preprocessing(
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            scale=2,
            flip=True,
        ),
        open=_open_voc,
        train=1464,
        test=1449,
        shape=(513, 513, 3),
        has_masks=True,
    ),
}
