"""`load`: reads a data set, and divides it.

The clean protocol: decisions are taken on a stratified hold-out from the
official training split, and the test split is read once, at the end. Unlike the
paper (Wen et al. 2020), whose code decides on the test split; select_on='test'
does so.
"""

from collections.abc import Mapping
import dataclasses
import functools

from absl import logging
import numpy as np

from autogrow_jax.data import config as config_lib
from autogrow_jax.data import datasets
from autogrow_jax.data import extras
from autogrow_jax.data import images as images_lib
from autogrow_jax.data import masks
from autogrow_jax.data import pipeline
from autogrow_jax.data import sources
from autogrow_jax.data import splits
from autogrow_jax.data import streams
from autogrow_jax.data import text

# Training images of more bytes are streamed by default.
_FITS = 2**31

# Images on which the mean and std of unknown data are measured, about.
_MEASURED = 10_000

# Images with masks are scaled while training by up to so much, up or down.
_MASK_SCALE = 2.0


def load(config: config_lib.DataConfig, *, seed: int) -> datasets.Dataset:
  """Reads a data set and divides it.

  Args:
    config: name and settings of the data set.
    seed: decides which examples are held out and, with a fraction below 1, left
      out: for the same seed, smaller fractions are subsets of larger ones.

  Returns:
    The data set, its splits in memory unless it is streamed.

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
  train, held_out = splits.divide(
      records.labels,
      _holdout(config, source.holdout, len(records)),
      config.fraction,
      seed=seed,
  )
  asked_holdout = len(held_out)
  is_streamed = _is_streamed(config, source, len(train))

  def part(records, indices, name):
    is_lazy = is_streamed or _is_streamed(config, source, len(indices))
    images = streams.LazyImages(_stream(config, source, records, indices))
    if is_lazy:
      return indices, splits.Split(images, records.labels[indices])
    classes = records.labels[indices]
    what = f'{name} in {config.dataset}'
    return _in_memory(images, indices, classes, source, what)

  def read_test():
    test = read('test')
    return part(test, np.arange(len(test)), 'test')[1]

  stream = _stream(config, source, records, train)
  train, train_split = part(records, train, 'train')
  held_out, holdout_split = part(records, held_out, 'holdout')
  if source.digest and not (is_streamed or config.skip_damaged):
    read_test()  # Of a user's files, whose damage a run would find too late.
  return datasets.Dataset(
      name=config.dataset,
      classes=source.classes,
      train=train_split,
      holdout=holdout_split,
      preprocessing=source.preprocessing or _measured(train_split),
      train_indices=train,
      holdout_indices=held_out,
      select_on=config.select_on,
      asked_holdout=asked_holdout,
      read_test=functools.cache(read_test),
      digest=source.digest,
      stream=(
          dataclasses.replace(stream, crop=source.is_resized)
          if is_streamed
          else None
      ),
  )


def stand_in(config: config_lib.DataConfig, *, seed: int) -> datasets.Dataset:
  """A known data set without its data, to try out what depends on its sizes.

  Args:
    config: settings, whose `dataset` is a key of `sources.SOURCES`.
    seed: as for `load`.

  Returns:
    The data set of `load`, but all images are one image of noise, which takes
    no memory, and the classes take turns.

  Raises:
    ValueError: as by `load`, or the data set is no such key.
  """
  if config.dataset not in sources.SOURCES:
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

  train, held_out = splits.divide(
      np.arange(source.train, dtype=np.int32) % source.classes,
      _holdout(config, source.holdout, source.train),
      config.fraction,
      seed=seed,
  )
  return datasets.Dataset(
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


def _load_text(config: config_lib.DataConfig) -> datasets.Dataset:
  """Reads a text, whose validation part is the hold-out."""
  corpus = text.read(config.dataset)
  _check_digest(config, corpus.digest)
  train = text.training_windows(corpus.tokens['train'], config.unroll)
  train = train.take(np.arange(max(1, round(config.fraction * len(train)))))
  held_out = text.evaluation_windows(corpus.tokens['valid'])
  if config.select_on == 'test':
    held_out = held_out.take(np.arange(0))
  test = text.evaluation_windows(corpus.tokens['test'])
  return datasets.Dataset(
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


def _check_digest(config: config_lib.DataConfig, digest: str | None) -> None:
  """Raises a ValueError if the data have changed since a configuration."""
  if config.digest not in (None, digest):
    raise ValueError(
        f'The files of {config.dataset} are not those of this run: their '
        f'digest was {config.digest} and is {digest}. Restore them, or begin '
        'another run.'
    )


def _holdout(
    config: config_lib.DataConfig, usual: int | None, examples: int
) -> int:
  """Number of training examples to hold out."""
  if config.select_on == 'test':
    return 0
  return config.holdout or usual or max(1, min(5000, examples // 10))


def _is_streamed(
    config: config_lib.DataConfig, source: sources.Source, examples: int
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
  if source.is_resized or source.has_masks:
    return source.is_resized
  if config.stream == 'auto':
    return examples * int(np.prod(source.shape)) > _FITS
  return config.stream == 'always'


def _stream(
    config: config_lib.DataConfig,
    source: sources.Source,
    records: images_lib.Records,
    indices: np.ndarray,
) -> streams.Stream:
  *size, channels = source.shape
  return streams.Stream(
      records,
      indices,
      shape=(*size, channels + source.has_masks),
      fit=source.fit,
      skip_damaged=config.skip_damaged,
  )


def _in_memory(
    images: streams.LazyImages,
    indices: np.ndarray,
    classes: np.ndarray,
    source: sources.Source,
    what: str,
) -> tuple[np.ndarray, splits.Split]:
  """Decodes images into memory, and leaves out those that are damaged.

  Args:
    images: the images, or pairs.
    indices: numbers of the examples in their split.
    classes: classes of the images, int32, (example,).
    source: the data set.
    what: description of the images, for messages.

  Returns:
    The indices that were not left out, and their images and labels.
  """
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
  """Normalisation by the mean and std of training images.

  Images with masks are augmented, too.
  """
  images = train.images
  step = -(-len(images) // _MEASURED)
  counts = np.zeros((images.shape[-1], 256), np.int64)
  for start in range(0, len(images), 1000 * step):
    chosen = slice(start, start + 1000 * step, step)
    part = images[chosen]
    positions = np.arange(len(images))[chosen]
    part = part[~np.isin(positions, list(train.damaged))]
    for channel, count in enumerate(counts):
      count += np.bincount(part[..., channel].ravel(), minlength=256)
  mean, std = [], []
  for count in counts.tolist():
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
  if train.labels.ndim == 1:
    return pipeline.Preprocessing(tuple(mean), tuple(std))
  return pipeline.Preprocessing(
      tuple(mean), tuple(std), scale=_MASK_SCALE, flip=True
  )
