"""The data sets that `load` knows: where they come from, what they need.

Those of the papers are the rows of `SOURCES`; `find` knows them, all others
that TFDS has prepared, and folders.
"""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any

import numpy as np

from autogrow_jax.data import config as config_lib
from autogrow_jax.data import dots
from autogrow_jax.data import extras
from autogrow_jax.data import folders
from autogrow_jax.data import images as images_lib
from autogrow_jax.data import masks
from autogrow_jax.data import pipeline
from autogrow_jax.data import prepared
from autogrow_jax.data import splits

Preprocessing = pipeline.Preprocessing

_DIGITS_TEST = 360

_KINDS = (
    f'A folder of images is {config_lib.FOLDER}PATH, one with masks '
    f'{config_lib.PAIRS}PATH, one of texts {config_lib.TEXT}PATH.'
)

Read = Callable[[str], images_lib.Records]


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set that is not read yet.

  Attributes:
    classes: number of classes.
    shape: (height, width, channel) of the images as they are loaded.
    open: called with the data directory or None, makes sure that both splits
      are there, without reading them, and returns the function that opens the
      split 'train' or 'test'.
    holdout: default number of training examples to hold out; None for a tenth,
      at most 5,000.
    preprocessing: with the mean and std of the pixels; None to measure them.
    train: official number of training examples, where it is known.
    test: official number of test examples, where it is known.
    paper_std: the paper's std, where it is not that of the pixels.
    is_resized: whether training takes random resized crops of images, which
      have sizes of their own and are decoded anew in each epoch.
    has_masks: whether labels are masks, the last channel of the records.
    fit: brings an image to `shape`; None if all images have it.
    digest: digest of the names and sizes of the files; None if their origin
      vouches for them.
  """

  classes: int
  shape: tuple[int, int, int]
  open: Callable[[str | None], Read]
  holdout: int | None = None
  preprocessing: Preprocessing | None = None
  train: int = 0
  test: int = 0
  paper_std: tuple[float, ...] | None = None
  is_resized: bool = False
  has_masks: bool = False
  fit: Callable[[np.ndarray], np.ndarray] | None = None
  digest: str | None = None


def find(config: config_lib.DataConfig) -> Source:
  """Finds a data set of images.

  Raises:
    ValueError: it is not there, or its images cannot be had like that.
  """
  name = config.dataset
  if name in SOURCES or dots.is_one(name):
    source = known(config)
  elif name.startswith((config_lib.FOLDER, config_lib.PAIRS)):
    found = folders.Folder(config)
    source = Source(
        classes=found.classes,
        shape=found.shape,
        open=lambda data_dir: found.records,
        has_masks=found.has_masks,
        digest=found.digest,
    )
  elif ':' in name:
    raise ValueError(
        f'The data {name} are arrays of your own: pass them to `run`. ({_KINDS}'
        ')'
    )
  else:
    source = _prepared(config)
  fit = None
  if source.has_masks:
    fit = functools.partial(masks.frame, size=source.shape[:2])
  elif source.is_resized or config.image_size is not None:
    fit = functools.partial(images_lib.fit, size=source.shape[0])
  return dataclasses.replace(source, fit=fit)


def known(config: config_lib.DataConfig) -> Source:
  """The row of `SOURCES` for a data set, with a configuration's options."""
  name = config.dataset
  source = SOURCES.get(name) or _of_dots(name)
  height, width, channels = source.shape
  if config.channels not in (None, channels):
    raise ValueError(
        f'Images of {name} have {channels} channels, got channels='
        f'{config.channels}; leave it out.'
    )
  size, how = config.image_size, source.preprocessing
  if config.normalization == 'paper' and source.paper_std is not None:
    how = dataclasses.replace(how, std=source.paper_std)
  shape = size or height, size or width, channels
  return dataclasses.replace(source, shape=shape, preprocessing=how)


def _prepared(config: config_lib.DataConfig) -> Source:
  """A data set of TFDS that is no key of `SOURCES`."""
  name, directory = config.dataset, prepared.root(config.data_dir)
  is_name = re.fullmatch(r'\w+(/[\w.-]+)?', name)
  if not is_name or not prepared.versions(name, directory):
    raise ValueError(
        f'Unknown data set {name!r}; there are {", ".join(SOURCES)}, '
        f'{config_lib.TOPICS}, and all that TFDS has prepared in {directory}, '
        f'where there is none of that name; --data_dir names another. {_KINDS}'
    )
  found, size = prepared.Prepared(name, config.data_dir), config.image_size
  height, width, channels = found.shape
  if size is None and None in (height, width):
    raise ValueError(
        f'The images of {name} differ in size; give a size for all with '
        '--data.image_size.'
    )
  channels = config.channels or (1 if channels == 1 else 3)
  return Source(
      classes=found.classes,
      shape=(size or height, size or width, channels),
      open=lambda data_dir: functools.partial(found.records, channels=channels),
  )


def _open_digits(data_dir: str | None) -> Read:
  """The 1,797 digits that come with scikit-learn (8x8, values 0 to 16).

  They have no official test split. Ours is fixed: 360 stratified images,
  independent of any seed. The other 1,437 are the training split.
  """
  del data_dir  # They are part of the package.

  def read(split: str) -> images_lib.Records:
    need = 'The data set digits needs scikit-learn'
    digits = extras.load('sklearn.datasets', need, extra='demo').load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    chosen = splits.fixed_test(labels, _DIGITS_TEST)[split]
    return splits.Split(pixels, labels).take(chosen)

  return read


def _of_dots(name: str) -> Source:
  """Generated images, which need no data directory."""
  found = dots.Dots.parse(name)
  return Source(
      2,
      (found.height, found.width, 1),
      lambda data_dir: found.draw,
      dots.HOLDOUT,
      Preprocessing((0,), (1,)),
      dots.TRAIN + dots.HOLDOUT,
      dots.TEST,
  )


def _tfds(
    name: str,
    classes: int,
    shape: tuple[int, int, int],
    examples: tuple[int, int, int],
    preprocessing: Preprocessing,
    **options: Any,
) -> Source:
  """A data set of TFDS; its examples are to train, to hold out and to test."""

  def open_(data_dir: str | None) -> Read:
    found = prepared.Prepared(name, data_dir)
    return functools.partial(found.records, channels=shape[-1])

  train, holdout, test = examples
  return Source(
      classes, shape, open_, holdout, preprocessing, train, test, **options
  )


# Preprocessing: mean and std, then pad, crop and flip as in the papers.
_IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}

SOURCES = {
    'digits': Source(
        10, (8, 8, 1), _open_digits, 360,
        Preprocessing((0.3053,), (0.3757,)), 1437, _DIGITS_TEST,
    ),
    dots.NAME: _of_dots(dots.NAME),
    'mnist': _tfds(
        'mnist', 10, (28, 28, 1), (60_000, 5000, 10_000),
        Preprocessing((0,), (1,), pad=2),
    ),
    'fashion_mnist': _tfds(
        'fashion_mnist', 10, (28, 28, 1), (60_000, 5000, 10_000),
        Preprocessing((0,), (1,), pad=2, flip=True),
    ),
    # Without its 531,131 images named 'extra', as in the paper.
    'svhn_cropped': _tfds(
        'svhn_cropped', 10, (32, 32, 3), (73_257, 7257, 26_032),
        Preprocessing((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), 0, 4),
    ),
    # Unlike the paper, with the std of the pixels; the paper's is an average
    # over the std of each image.
    'cifar10': _tfds(
        'cifar10', 10, (32, 32, 3), (50_000, 5000, 10_000),
        Preprocessing(
            (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 0, 4, True
        ),
        paper_std=(0.2023, 0.1994, 0.2010),
    ),
    'cifar100': _tfds(
        'cifar100', 100, (32, 32, 3), (50_000, 5000, 10_000),
        Preprocessing(
            (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 0, 4, True
        ),
    ),
    # Its split 'validation' is the test; the labels of 'test' are secret.
    'imagenet2012': _tfds(
        'imagenet2012', 1000, (224, 224, 3), (1_281_167, 50_000, 50_000),
        Preprocessing(**_IMAGENET, flip=True), is_resized=True,
    ),
    # Its split 'val' is the test; the masks of 'test' are secret. Images have
    # at most 500 pixels a side, so that none is scaled down.
    'voc/2012': Source(
        21, (513, 513, 3),
        lambda data_dir: folders.voc(prepared.root(data_dir)).__getitem__, 146,
        Preprocessing(**_IMAGENET, scale=2, flip=True), 1464, 1449,
        has_masks=True,
    ),
}  # pyformat: disable
