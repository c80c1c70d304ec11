"""`load`: a data set divided into what to train, to decide and to report on.

The clean protocol: decisions are taken on a stratified hold-out from the
official training split, and the test split is read once, at the end. Unlike the
paper (Wen et al. 2020), whose code decides on the test split; select_on='test'
does so.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from absl import logging
import numpy as np

from autogrow_jax.data import dots
from autogrow_jax.data import config as config_lib
from autogrow_jax.data import extras
from autogrow_jax.data import masks
from autogrow_jax.data import pipeline
from autogrow_jax.data import sources
from autogrow_jax.data import splits
from autogrow_jax.data import streams
from autogrow_jax.data import text

DataConfig = config_lib.DataConfig

_FITS = 2**31  # Training images of more bytes are streamed by default.
_MEASURED = 10_000  # Images to measure the mean and std of unknown data, about.
_MASK_SCALE = 2.0  # Largest factor by which images with masks are scaled.


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A divided data set. The test split is read on request only.

  Attributes:
    name: name of the data set.
    classes: number of classes.
    train: examples to train on.
    holdout: examples held out to decide on; empty with select_on='test'.
    preprocessing: preprocessing of the images.
    train_indices: ascending numbers of the examples of `train` in the official
      training split.
    holdout_indices: the same for `holdout`.
    select_on: 'holdout' or 'test'.
    read_test: reads the test split, once; to be called at the end only.
    digest: digest of the files, where it identifies the data.
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


def load(config: DataConfig, *, seed: int) -> Dataset:
  """Reads a data set and divides it.

  Args:
    config: name and settings of the data set.
    seed: decides which examples are held out and, with a fraction below 1, left
      out: for the same seed, smaller fractions are subsets of larger ones.

  Raises:
    ValueError: it is not there (and how to prepare it), or it cannot be read or
      divided like that.
  """
  if config.is_text:
    return _load_text(config)
  source = sources.find(config)
  _check_digest(config, source.digest)
  read = source.open(config.data_dir)
  records = read('train')
  train, held_out = _divide(config, source, records.labels, seed)
  *size, channels = source.shape
  stream = streams.Stream(
      records,
      train,
      shape=(*size, channels + source.has_masks),
      fit=source.fit,
      skip_damaged=config.skip_damaged,
  )
  is_streamed = _is_streamed(config, source, len(train))

  def part(records, indices, name):
    chosen = dataclasses.replace(stream, records=records, indices=indices)
    images = streams.LazyImages(chosen)
    if is_streamed or _is_streamed(config, source, len(indices)):
      return indices, splits.Split(images, records.labels[indices])
    return _in_memory(images, chosen, source, f'{name} in {config.dataset}')

  def read_test():
    test = read('test')
    return part(test, np.arange(len(test)), 'test')[1]

  train_indices, train_split = part(records, train, 'train')
  holdout_indices, holdout_split = part(records, held_out, 'holdout')
  if source.digest and not (is_streamed or config.skip_damaged):
    read_test()  # Of a user's files, whose damage a run would find too late.
  batches = dataclasses.replace(stream, crop=source.is_resized)
  return Dataset(
      name=config.dataset,
      classes=source.classes,
      train=train_split,
      holdout=holdout_split,
      preprocessing=source.preprocessing or _measured(train_split),
      train_indices=train_indices,
      holdout_indices=holdout_indices,
      select_on=config.select_on,
      read_test=functools.cache(read_test),
      digest=source.digest,
      asked_holdout=len(held_out),
      stream=batches if is_streamed else None,
  )


def stand_in(config: DataConfig, *, seed: int) -> Dataset:
  """A data set of `sources.SOURCES` without its data, to try out its sizes.

  It is as from `load`, but all images are one image of noise, which takes no
  memory, and the classes take turns.
  """
  if not (config.dataset in sources.SOURCES or dots.is_one(config.dataset)):
    raise ValueError(
        f'Only {", ".join(sources.SOURCES)} are known without their data, got '
        f'{config.dataset!r}.'
    )
  source = sources.known(config)
  noise = np.random.default_rng(0).integers(0, 256, source.shape, np.uint8)

  def part(indices: np.ndarray) -> splits.Split:
    labels = (indices % source.classes).astype(np.int32)
    if source.has_masks:
      size = len(labels), *source.shape[:2]
      labels = np.broadcast_to(labels[:, None, None], size)
    images = np.broadcast_to(noise, (len(indices), *source.shape))
    return splits.Split(images, labels)

  labels = np.arange(source.train, dtype=np.int32) % source.classes
  train, held_out = _divide(config, source, labels, seed)
  return Dataset(
      name=config.dataset,
      classes=source.classes,
      train=part(train),
      holdout=part(held_out),
      preprocessing=source.preprocessing,
      train_indices=train,
      holdout_indices=held_out,
      select_on=config.select_on,
      read_test=functools.cache(lambda: part(np.arange(source.test))),
  )


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
    preprocessing: with the mean and std of pixels scaled to [0, 1].
    classes: number of classes; None for 1 + the largest training label.
    name: name of the data set, for logs.
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


def _load_text(config: DataConfig) -> Dataset:
  """A text, whose validation part is the hold-out."""
  corpus = text.read(config.dataset)
  _check_digest(config, corpus.digest)
  train = text.training_windows(corpus.tokens['train'], config.unroll)
  train = train.take(np.arange(max(1, round(config.fraction * len(train)))))
  held_out, test = (
      text.evaluation_windows(corpus.tokens[part]) for part in ('valid', 'test')
  )
  if config.select_on == 'test':
    held_out = held_out.take(np.arange(0))
  return Dataset(
      name=config.dataset,
      classes=len(corpus.vocabulary),
      train=train,
      holdout=held_out,
      preprocessing=pipeline.Preprocessing((0,), (1,), kind='tokens'),
      train_indices=np.arange(len(train)),
      holdout_indices=np.arange(0),  # None of the training windows.
      select_on=config.select_on,
      read_test=lambda: test,
      digest=corpus.digest,
  )


def _check_digest(config: DataConfig, digest: str | None) -> None:
  if config.digest not in (None, digest):
    raise ValueError(
        f'The files of {config.dataset} are not those of this run: their '
        f'digest was {config.digest} and is {digest}. Restore them, or begin '
        'another run.'
    )


def _divide(
    config: DataConfig, source: sources.Source, labels: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  usual = source.holdout or max(1, min(5000, len(labels) // 10))
  holdout = 0 if config.select_on == 'test' else config.holdout or usual
  return splits.divide(labels, holdout, config.fraction, seed=seed)


def _is_streamed(
    config: DataConfig, source: sources.Source, examples: int
) -> bool:
  """True if so many images are decoded on demand rather than held in memory."""
  if source.is_resized and config.stream == 'never':
    raise ValueError(
        f'{config.dataset} is trained on in random resized crops, which need '
        "the whole images anew in each epoch; leave out stream='never'."
    )
  if source.has_masks and config.stream == 'always':
    raise ValueError(
        f'Images with masks, as of {config.dataset}, are held in memory; '
        "leave out stream='always'."
    )
  is_large = examples * int(np.prod(source.shape)) > _FITS
  is_free = not source.has_masks and config.stream == 'auto'
  return source.is_resized or config.stream == 'always' or is_large and is_free


def _in_memory(
    images: streams.LazyImages,
    stream: streams.Stream,
    source: sources.Source,
    what: str,
) -> tuple[np.ndarray, splits.Split]:
  """Decodes the images of a stream, and leaves out those that are damaged.

  Returns:
    The stream's indices that were not left out, their images and labels.
  """
  indices, classes = stream.indices, stream.records.labels[stream.indices]
  pixels = np.empty((len(images), *source.shape), np.uint8)
  labels = classes
  if source.has_masks:
    labels = np.empty(pixels.shape[:-1], np.int16)
  at_once = 1000 if source.fit is None else 64
  with extras.progress(len(images), f'Images of {what}') as advance:
    for start in range(0, len(images), at_once):
      chosen = slice(start, start + at_once)
      found = images[chosen]
      pixels[chosen] = found[..., : source.shape[-1]]
      if source.has_masks:
        labels[chosen] = masks.labels(found[..., -1])
      advance(len(found))
  if not images.damaged:
    return indices, splits.Split(pixels, labels)
  good = np.delete(np.arange(len(indices)), list(images.damaged))
  logging.warning(
      '%d of %d images of %s cannot be read and are left out.',
      len(images.damaged), len(indices), what,
  )
  lost = np.setdiff1d(classes, classes[good]).tolist()
  if not good.size or (lost and what.startswith('train ')):
    raise ValueError(f'No image of the classes {lost} of {what} can be read.')
  return indices[good], splits.Split(pixels[good], labels[good])


def _measured(train: splits.Split) -> pipeline.Preprocessing:
  """Normalisation by the mean and std; images with masks are augmented, too."""
  images = train.images
  step = -(-len(images) // _MEASURED)
  counts = np.zeros((images.shape[-1], 256), np.int64)
  for start in range(0, len(images), 1000 * step):
    chosen = slice(start, start + 1000 * step, step)
    part, positions = images[chosen], np.arange(len(images))[chosen]
    part = part[~np.isin(positions, list(train.damaged))]
    for channel, count in enumerate(counts):
      count += np.bincount(part[..., channel].ravel(), minlength=256)
  mean, std = [], []
  for count in counts.tolist():  # Python's integers, which are exact.
    total = sum(count)
    if not total:
      raise ValueError('No training image can be read.')
    first = sum(n * level for level, n in enumerate(count))
    second = sum(n * level**2 for level, n in enumerate(count))
    mean.append(first / (255 * total))
    std.append((total * second - first**2) ** 0.5 / (255 * total))
  if not all(std):
    raise ValueError(
        'All training images have the same value in all pixels of a channel; '
        'there is nothing to learn from.'
    )
  how = pipeline.Preprocessing(tuple(mean), tuple(std))
  if train.labels.ndim == 1:
    return how
  return dataclasses.replace(how, scale=_MASK_SCALE, flip=True)


def _to_split(name: str, images: Any, labels: Any) -> splits.Split:
  """Makes a split from a user's arrays."""
  images, labels = np.asarray(images), np.asarray(labels)
  is_integer = np.issubdtype(labels.dtype, np.integer) and labels.size
  if not is_integer or labels.ndim not in (1, 3) or labels.max() >= 2**31:
    raise ValueError(
        f'{name}_labels must be integers below 2**31, one class for each image '
        'or masks, (example, height, width), got '
        f'{labels.dtype} {labels.shape}.'
    )
  if images.ndim == 3:
    images = images[..., np.newaxis]
  try:
    return splits.Split(images, labels.astype(np.int32))
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error


def _check_split(name: str, split: splits.Split, dataset: Dataset) -> None:
  """Raises a ValueError unless a split fits the rest of its data set."""
  if dataset.is_text:
    return
  shape, how = split.images.shape[1:], dataset.preprocessing
  want = *dataset.train.images.shape[1:3], len(how.mean)
  if shape != want:
    raise ValueError(
        f'Images of {name} have the shape {shape}, but by those of train and '
        f'by the mean and std of the preprocessing it is {want}.'
    )
  is_masks = split.labels.ndim == 3
  if is_masks and (split.labels.shape[1:] != shape[:2] or how.pad or how.crop):
    raise ValueError(
        f'Masks of {name} must be as large as their images, without pad and '
        f'crop, got {split.labels.shape[1:]} for {shape[:2]}.'
    )
  if len(split) and split.labels.max() >= dataset.classes:
    raise ValueError(
        f'Labels of {name} must be from 0 to {dataset.classes - 1}, as there '
        f'are {dataset.classes} classes, got {split.labels.max()}.'
    )
