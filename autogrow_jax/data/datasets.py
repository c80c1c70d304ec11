"""`load`: a data set divided into what to train, to decide and to report on.

The clean protocol: decisions are taken on a stratified hold-out from the
official training split, and the test split is read once, at the end. Unlike the
paper (Wen et al. 2020), whose code decides on the test split; that is to be had
with `select_on='test'`.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import fractions
import functools
import numbers
import os
import re

from absl import logging
import numpy as np

from autogrow_jax.data import images as images_lib
from autogrow_jax.data import pairs
from autogrow_jax.data import pipeline
from autogrow_jax.data import prepared
from autogrow_jax.data import sources
from autogrow_jax.data import stratified
from autogrow_jax.data import streams
from autogrow_jax.data import text

Preprocessing = pipeline.Preprocessing
Split = sources.Split

# Training images of more bytes are streamed unless told otherwise.
_FITS = 2**31

# The mean and std of unknown data are those of about so many of its images.
_MEASURED = 10_000

# Images with masks are scaled while training by up to so much, up or down.
_MASK_SCALE = 2.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which data, and how it is divided; JSON-able.

  Attributes:
    dataset: a key of `sources.SOURCES`; the name of another image
      classification data set that TFDS has prepared, 'name' or 'name/config';
      'folder:PATH', see `folder.Folder`; 'pairs:PATH', see `pairs.Folder`;
      'topics' or 'text:PATH', see `text.read`; of arrays that a run was given,
      'name:digest'.
    data_dir: where TFDS data sets are prepared; None for TFDS's own default,
      the environment variable TFDS_DATA_DIR or else ~/tensorflow_datasets.
    holdout: how many examples to hold out from training; None for the data
      set's own number.
    data_fraction: part of what is left for training that is used, e.g. '0.25'
      or '1/4'; of text, the first part. Text, so that it is exact.
    select_on: 'holdout', or 'test' to take decisions on the test split; then
      nothing is held out, and every result must say so.
    normalization: 'pixels', or 'paper' for the paper's own constants where they
      are not the mean and std of the pixels (CIFAR-10).
    image_size: height and width to which all images are brought; None for what
      the data set has.
    channels: 1 for grey, 3 for colours; None for what the data set has.
    stream: 'auto' to decode training images while training if they would take
      more than 2 GiB in memory, 'always' or 'never'.
    skip_damaged: whether images that cannot be read are left out, and counted,
      in place of an error.
    digest: of the names and sizes of the files in a folder, or of the words of
      a text, by which another content is refused; None to take what is there.
    unroll: of text, words in a training window.
  """

  dataset: str = 'digits'
  data_dir: str | None = None
  holdout: int | None = None
  data_fraction: str = '1'
  select_on: str = 'holdout'
  normalization: str = 'pixels'
  image_size: int | None = None
  channels: int | None = None
  stream: str = 'auto'
  skip_damaged: bool = False
  digest: str | None = None
  unroll: int = 35

  def __post_init__(self):
    _check_count('unroll', self.unroll)
    if text.is_text(self.dataset):
      _check_text_options(self)
    if ':' not in self.dataset and not re.fullmatch(
        r'\w+(/[\w.-]+)?', self.dataset
    ):
      raise ValueError(
          f'Unknown data set {self.dataset!r}; there are '
          f'{", ".join(sources.SOURCES)}, {sources.FOLDER}PATH, '
          f'{sources.PAIRS}PATH, {text.TOPICS}, {text.FOLDER}PATH, and the '
          'names of data sets that TFDS has prepared.'
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
    for name, allowed in (
        ('normalization', ('pixels', 'paper')),
        ('channels', (None, 1, 3)),
        ('stream', ('auto', 'always', 'never')),
        ('skip_damaged', (False, True)),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
            f'{name} must be one of {allowed}, got {getattr(self, name)!r}.'
        )
    if self.image_size is not None:
      _check_count('image_size', self.image_size)
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
    digest: of the files, where it says which data these are; else None.
    asked_holdout: how many examples were to be held out, the damaged ones that
      are left out among them; None if it is all of `holdout`.
    stream: training batches, decoded when needed; None for data in memory.
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
  digest: str | None = None
  asked_holdout: int | None = None
  stream: streams.Stream | None = None

  def __post_init__(self):
    _check_split('train', self.train, self)
    _check_split('holdout', self.holdout, self)

  @property
  def is_text(self) -> bool:
    """Whether the examples are windows of text."""
    return self.preprocessing.kind == 'tokens'

  @property
  def selection(self) -> Split:
    """What decisions are taken on: the hold-out, or the test split."""
    return self.read_test() if self.select_on == 'test' else self.holdout

  @property
  def input_shape(self) -> tuple[int, ...]:
    """(height, width, channel) of what `preprocess` returns; (1,) of text."""
    if self.is_text:  # A network reads it word by word.
      return (1,)
    height, width, channels = self.train.images.shape[1:]
    pad = 2 * self.preprocessing.pad
    return height + pad, width + pad, channels


def load(config: DataConfig, *, seed: int) -> Dataset:
  """Reads a data set and divides it.

  Args:
    config: which, and how.
    seed: decides what is held out and, with a fraction below 1, what is left
      out: for the same seed, smaller fractions are subsets of larger ones.

  Returns:
    The data set, its splits in memory unless it is streamed.

  Raises:
    ValueError: it is not there (and how to prepare it), or it cannot be read or
      divided like that.
  """
  _check_is_ours(config)
  if text.is_text(config.dataset):
    return _load_text(config)
  found = sources.find(
      config.dataset,
      data_dir=config.data_dir,
      normalization=config.normalization,
      image_size=config.image_size,
      channels=config.channels,
      skip_damaged=config.skip_damaged,
  )
  _check_digest(config, found.digest)
  records = found.read('train')
  train, held_out = _divide(
      records.labels,
      _holdout(config, found.holdout, len(records)),
      config.fraction,
      seed=seed,
  )
  is_streamed = _is_streamed(config, found, len(train))
  asked_holdout = len(held_out)

  def read(records, indices, *, name):
    if indices is None:
      indices = np.arange(len(records))
    is_lazy = is_streamed or _is_streamed(config, found, len(indices))
    return (_open if is_lazy else _read)(
        records, indices, found=found, config=config, name=name
    )

  train, train_split = read(records, train, name='train')
  held_out, holdout_split = read(records, held_out, name='holdout')
  if found.digest and not (is_streamed or config.skip_damaged):
    # Files of one's own: a run would find damage only at its very end.
    read(found.read('test'), None, name='test')
  return Dataset(
      name=config.dataset,
      classes=found.classes,
      train=train_split,
      holdout=holdout_split,
      preprocessing=found.preprocessing or _measured(train_split),
      train_indices=train,
      holdout_indices=held_out,
      select_on=config.select_on,
      asked_holdout=asked_holdout,
      read_test=functools.cache(
          lambda: read(found.read('test'), None, name='test')[1]
      ),
      digest=found.digest,
      stream=(
          streams.Stream(
              records,
              train,
              shape=found.shape,
              size=found.size,
              crop=found.is_resized,
              skip_damaged=config.skip_damaged,
          )
          if is_streamed
          else None
      ),
  )


def _load_text(config: DataConfig) -> Dataset:
  """A text: its validation part is the hold-out."""
  corpus = text.read(config.dataset)
  _check_digest(config, corpus.digest)
  train = text.training_windows(corpus.tokens['train'], config.unroll)
  train = train.take(np.arange(max(1, round(config.fraction * len(train)))))
  held_out = text.evaluation_windows(corpus.tokens['valid'])
  if config.select_on == 'test':
    held_out = held_out.take(np.arange(0))
  test = text.evaluation_windows(corpus.tokens['test'])
  return Dataset(
      name=config.dataset,
      classes=len(corpus.vocabulary),
      train=train,
      holdout=held_out,
      preprocessing=Preprocessing(mean=(0,), std=(1,), kind='tokens'),
      train_indices=np.arange(len(train)),
      holdout_indices=np.arange(0),  # None of the training windows.
      select_on=config.select_on,
      read_test=lambda: test,
      digest=corpus.digest,
  )


def _check_digest(config: DataConfig, digest: str | None) -> None:
  """Raises ValueError if the data are others than a configuration's."""
  if config.digest not in (None, digest):
    raise ValueError(
        f'The files of {config.dataset} are not those of this run: their '
        f'digest was {config.digest} and is {digest}. Restore them, or begin '
        'another run.'
    )


def _check_text_options(config: DataConfig) -> None:
  """Raises ValueError if there is an option that text has no use for."""
  default = {field.name: field.default for field in dataclasses.fields(config)}
  for name in (
      'holdout', 'normalization', 'image_size', 'channels', 'stream',
      'skip_damaged',
  ):
    if getattr(config, name) != default[name]:
      raise ValueError(
          f'{name}={getattr(config, name)} means nothing to text, whose '
          'validation part is held out; leave it out.'
      )


def stand_in(config: DataConfig, *, seed: int) -> Dataset:
  """A known data set without its data, to try out what depends on its sizes.

  Args:
    config: its `dataset` is a key of `sources.SOURCES`.
    seed: as for `load`.

  Returns:
    What `load` would, but that all images are one image of noise, which takes
    no memory, and that the classes take turns.

  Raises:
    ValueError: as by `load`, or the data set is no such key.
  """
  if config.dataset not in sources.SOURCES:
    raise ValueError(
        f'Only {", ".join(sources.SOURCES)} are known without their data, got '
        f'{config.dataset!r}.'
    )
  source = sources.SOURCES[config.dataset]
  shape = sources.shape_of(
      config.dataset, image_size=config.image_size, channels=config.channels
  )
  noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  labels = np.arange(source.train, dtype=np.int32) % source.classes
  train, held_out = _divide(
      labels,
      _holdout(config, source.holdout, source.train),
      config.fraction,
      seed=seed,
  )

  def part(indices: np.ndarray) -> Split:
    chosen = indices % source.classes
    chosen = chosen.astype(np.int32)
    if source.has_masks:
      size = len(chosen), *shape[:2]
      chosen = np.broadcast_to(chosen[:, None, None], size)
    return Split(np.broadcast_to(noise, (len(indices), *shape)), chosen)

  return Dataset(
      name=config.dataset,
      classes=source.classes,
      train=part(train),
      holdout=part(held_out),
      preprocessing=sources.preprocessing_of(
          config.dataset, config.normalization
      ),
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
  train, held_out = _divide(official.labels, holdout, everything, seed=seed)
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


def _check_is_ours(config: DataConfig) -> None:
  """Raises ValueError if the data were given to a run as arrays."""
  name = config.dataset
  known = sources.FOLDER, sources.PAIRS, text.FOLDER
  if ':' in name and not name.startswith(known):
    raise ValueError(
        f'The data {name} are arrays of your own: pass them to `run`. (A '
        f'folder of images is {sources.FOLDER}PATH, one with masks '
        f'{sources.PAIRS}PATH, one of text {text.FOLDER}PATH.)'
    )


def _holdout(config: DataConfig, usual: int | None, examples: int) -> int:
  """How many training examples to hold out."""
  if config.select_on == 'test':
    return 0
  if config.holdout is not None:
    return config.holdout
  if usual is not None:
    return usual
  return max(1, min(5000, examples // 10))


def _is_streamed(
    config: DataConfig, found: sources.Found, examples: int
) -> bool:
  """Whether so many images are to be decoded when they are needed."""
  if found.is_resized:
    if config.stream == 'never':
      raise ValueError(
          f'{config.dataset} is trained on in random resized crops, which need '
          "the whole images anew in each epoch; leave out stream='never'."
      )
    return True
  if found.has_masks:
    if config.stream == 'always':
      raise ValueError(
          f'Images with masks, as of {config.dataset}, are held in memory; '
          "leave out stream='always'."
      )
    return False
  if config.stream == 'auto':
    return examples * int(np.prod(found.shape)) > _FITS
  return config.stream == 'always'


def _open(
    records: images_lib.Records,
    indices: np.ndarray,
    *,
    found: sources.Found,
    config: DataConfig,
    name: str,
) -> tuple[np.ndarray, Split]:
  """Like `_read`, but decodes images when they are asked for."""
  del name
  images = streams.LazyImages(
      records,
      indices,
      shape=found.shape,
      size=found.size,
      skip_damaged=config.skip_damaged,
  )
  return indices, Split(images, records.labels[indices])


def _read(
    records: images_lib.Records,
    indices: np.ndarray,
    *,
    found: sources.Found,
    config: DataConfig,
    name: str,
) -> tuple[np.ndarray, Split]:
  """Decodes examples into memory.

  Args:
    records: of a split.
    indices: which of them.
    found: says how large their images are to be.
    config: says whether damaged ones may be left out.
    name: of the examples, for messages.

  Returns:
    The indices that were not left out, and their images and labels.
  """
  pixels = np.empty((len(indices), *found.shape), np.uint8)
  labels = records.labels[indices]
  size = found.shape[:2]
  if found.has_masks:
    labels = np.empty((len(indices), *size), np.int16)
  good = np.ones(len(indices), bool)

  def decode(positions: range) -> int:
    chosen = indices[positions].tolist()
    for position, image in zip(positions, images_lib.read_all(records, chosen)):
      if isinstance(image, images_lib.Damaged):
        if not config.skip_damaged:
          raise image
        good[position] = False
        continue
      if found.has_masks:
        image, labels[position] = pairs.fit(*image, size)
      elif found.size is not None:
        image = images_lib.fit(image, found.size)
      images_lib.check_shape(
          image,
          found.shape,
          name=f'Image {indices[position]} of {name} in {config.dataset}',
      )
      pixels[position] = image
    return len(positions)

  at_once = 1000 if found.size is None else 50
  parts = [
      range(len(indices))[start : start + at_once]
      for start in range(0, len(indices), at_once)
  ]
  with (
      prepared.progress(
          len(indices), f'Images of {config.dataset}, {name}'
      ) as advance,
      futures.ThreadPoolExecutor(os.cpu_count()) as pool,
  ):
    # Small images hold Python's lock while they are decoded: threads would only
    # be in each other's way.
    for count in map(decode, parts) if found.size is None else pool.map(
        decode, parts
    ):
      advance(count)
  if bad := np.count_nonzero(~good):
    logging.warning(
        '%d of %d images of %s in %s cannot be read and are left out.',
        bad, len(good), name, config.dataset,
    )
    lost = np.setdiff1d(records.labels[indices], records.labels[indices[good]])
    if bad == len(good) or (name == 'train' and lost.size):
      raise ValueError(
          f'No image of the classes {lost.tolist()} of {name} in '
          f'{config.dataset} can be read.'
      )
    indices, pixels, labels = indices[good], pixels[good], labels[good]
  return indices, Split(pixels, labels)


def _measured(train: Split) -> Preprocessing:
  """Normalisation by the training images; those with masks are augmented."""
  found = _measure(train.images)
  if train.labels.ndim == 1:
    return found
  return dataclasses.replace(found, scale=_MASK_SCALE, flip=True)


def _measure(images: np.ndarray | streams.LazyImages) -> Preprocessing:
  """Normalisation by the mean and std of images, and nothing else."""
  counts = np.zeros((images.shape[-1], 256), np.int64)
  step = -(-len(images) // _MEASURED)
  if isinstance(images, streams.LazyImages):
    images = images.take(np.arange(0, len(images), step))
  else:  # The same ones, that streaming makes no difference.
    images = images[::step]
  for start in range(0, len(images), 1000):
    part = images[start : start + 1000]
    damaged = getattr(images, 'damaged', {})
    if bad := [position - start for position in damaged if position >= start]:
      part = np.delete(part, bad, axis=0)
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
  return Preprocessing(mean=tuple(mean), std=tuple(std))


def _divide(
    labels: np.ndarray,
    holdout: int,
    fraction: fractions.Fraction,
    *,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Ascending indices of what to train on and of what is held out.

  The hold-out is the first stretch of one stratified order, the training part
  the next, so that neither depends on the size of anything behind it.
  """
  if labels.ndim > 1:  # Of no one class.
    labels = np.zeros(len(labels), np.int32)
  order = stratified.order(labels, seed=seed)
  if holdout >= len(order):
    raise ValueError(
        f'holdout must be below {len(order)}, the number of training examples, '
        f'got {holdout}.'
    )
  end = holdout + round(fraction * (len(order) - holdout))
  train, held_out = np.sort(order[holdout:end]), np.sort(order[:holdout])
  missing = np.setdiff1d(labels, labels[train])
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
  if labels.ndim not in (1, 3):
    raise ValueError(
        f'{name}_labels must be one class for each image, (example,), or '
        f'masks, (example, height, width), got {labels.shape}.'
    )
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
  if dataset.is_text:
    return
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
  how = dataset.preprocessing
  if split.labels.ndim == 3 and (
      split.labels.shape[1:] != split.images.shape[1:3] or how.pad or how.crop
  ):
    raise ValueError(
        f'Masks of {name} must be as large as their images, without pad and '
        f'crop, got {split.labels.shape[1:]} for {split.images.shape[1:3]}.'
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
