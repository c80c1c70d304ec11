"""Image-classification data sets that TFDS has prepared.

They are read without TensorFlow and without the network. Their images are
decoded by `images`, so that files of all kinds and damage are treated as those
in folders are.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import hashlib
import os
import pathlib
import re
from typing import Any

from absl import logging
import numpy as np

from autogrow_jax.data import extras
from autogrow_jax.data import images

# Examples per read: enough to amortise it, few enough to hold encoded.
_READ_AT_ONCE = 1000

# From so many examples on, all labels are read once and kept in a file.
_MANY = 100_000

_CACHE = pathlib.Path('~/.cache/autogrow_jax')

_VERSION = r'\d+\.\d+\.\d+'


class Prepared:
  """A prepared data set with images and class labels.

  Attributes:
    classes: number of classes.
    shape: (height, width, channel) of an image; None for what varies.
  """

  def __init__(self, name: str, data_dir: str | None):
    """Finds a data set.

    Args:
      name: TFDS's name of the data set, 'name' or 'name/config'.
      data_dir: where TFDS data sets are prepared; None for TFDS's default.

    Raises:
      ValueError: it is not there, damaged, or not of that kind.
    """
    self._name, self._root = name, root(data_dir)
    self._directory = _find(name, self._root)
    builder = _builder(self._directory, name)
    self._info = builder.info
    self._keys = self._find_keys()
    feature, label = (self._info.features[key] for key in self._keys)
    self.classes, self.shape = label.num_classes, tuple(feature.shape)
    self._check_split('train')
    self._splits = {'train': 'train', 'test': self._find_test(builder)}

  def records(self, split: str, channels: int) -> '_Records':
    """A split, not decoded.

    Args:
      split: 'train' or 'test'.
      channels: 1 for grey, 3 for red, green and blue.
    """
    return _Records(
        self._name, self._directory, self._splits[split], self._keys, channels
    )

  def _find_keys(self) -> tuple[str, str]:
    """Names of the features with the image and its class."""
    features = self._info.features
    kinds = {key: type(value).__name__ for key, value in features.items()}
    candidates = [('image', 'label')]
    if isinstance(self._info.supervised_keys, tuple):
      candidates.append(self._info.supervised_keys)
    for keys in candidates:
      found = [kinds.get(key) if isinstance(key, str) else '' for key in keys]
      if found == ['Image', 'ClassLabel']:
        image, label = (features[key] for key in keys)
        dtype, classes = np.dtype(image.np_dtype), label.num_classes or 0
        if dtype in (np.uint8, np.uint16) and classes >= 2:
          return keys
        raise ValueError(
            f'{self._name} has {classes} classes and images of {dtype}; at '
            'least 2 classes and whole numbers of 8 or 16 bits are needed.'
        )
    raise ValueError(
        f'{self._name} is not for image classification: it needs the features '
        "'image' (Image) and 'label' (ClassLabel), but has "
        + ', '.join(f'{key!r} ({kind})' for key, kind in kinds.items())
        + '.'
    )

  def _find_test(self, builder: Any) -> str:
    """Name of the split to report on: the first one with labels."""
    found = [
        split for split in ('test', 'validation') if split in self._info.splits
    ]
    if not found:
      raise ValueError(
          f"{self._name} has neither a split 'test' nor 'validation', only "
          + ', '.join(map(repr, self._info.splits))
          + f'; its directory is {self._directory}.'
      )
    for split in found:
      self._check_split(split)
      (example,) = _read(_open(builder, split), [0])
      if example[self._keys[1]] >= 0:  # Else they are secret.
        return split
    raise ValueError(
        f'The labels of {self._name} are missing in '
        + ' and '.join(map(repr, found))
        + '; a split to report on needs them.'
    )

  def _check_split(self, split: str) -> None:
    there = [
        name
        for name, info in self._info.splits.items()
        if info.num_examples and all(map(os.path.exists, info.filepaths))
    ]
    if split not in there:
      raise ValueError(
          f'The split {split!r} of {self._name} is not in {self._directory}, '
          f'only {there}. Remove that directory and prepare it again: '
          f'{_how_to_prepare(self._name, self._root)}'
      )


class _Records:
  """`images.Records` of a split."""

  def __init__(
      self,
      name: str,
      directory: pathlib.Path,
      split: str,
      keys: tuple[str, str],
      channels: int,
  ):
    self._name, self._directory, self._split = name, directory, split
    self._image_key, self._label_key = keys
    self._channels, self._length = channels, len(self._source)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    (image,) = self.__getitems__([index])
    if isinstance(image, images.Damaged):
      raise image
    return image

  def __getitems__(
      self, indices: Sequence[int]
  ) -> list[np.ndarray | images.Damaged]:
    """Returns what `images.read_all` does, by one read."""
    result = []
    for index, example in zip(indices, _read(self._source, indices)):
      name = f'Example {index} of the split {self._split!r} of {self._name}'
      if 'file_name' in example:
        name += f" ({example['file_name'].decode(errors='replace')})"
      encoded = example[self._image_key]
      try:
        result.append(images.decode(encoded, self._channels, name=name))
      except images.Damaged as error:
        result.append(error)
    return result

  def __getstate__(self):
    # Open files cannot be pickled; each process opens its own.
    return {k: v for k, v in self.__dict__.items() if k != '_source'}

  @functools.cached_property
  def _source(self) -> Any:
    return _open(_builder(self._directory, self._name), self._split)

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """int32, (example,); reads the whole split without decoding images."""
    if len(self) < _MANY:
      return self._read_labels()
    size = self._source.dataset_info.splits[self._split].num_bytes
    mark = hashlib.sha256(str(self._directory.resolve()).encode()).hexdigest()
    path = _CACHE.expanduser() / (
        f'{mark[:16]}-labels-{self._split}-{len(self)}-{size}.npy'
    )
    with contextlib.suppress(OSError, ValueError, EOFError):
      labels = np.load(path)
      if labels.shape == (len(self),) and labels.dtype == np.int32:
        return labels
    labels = self._read_labels()
    with contextlib.suppress(OSError):  # Without room, they are read again.
      path.parent.mkdir(parents=True, exist_ok=True)
      new = path.with_name(f'{os.getpid()}-{path.name}')
      try:
        np.save(new, labels)
        os.replace(new, path)
      finally:
        new.unlink(missing_ok=True)
    return labels

  def _read_labels(self) -> np.ndarray:
    labels = np.empty(len(self), np.int32)
    with extras.progress(len(self), f'Labels of {self._name}') as advance:
      for start in range(0, len(self), _READ_AT_ONCE):
        indices = range(start, min(start + _READ_AT_ONCE, len(self)))
        examples = _read(self._source, indices)
        labels[indices] = [example[self._label_key] for example in examples]
        advance(len(indices))
    if missing := np.count_nonzero(labels < 0):
      raise ValueError(
          f'{missing} of {len(self)} examples of the split {self._split!r} of '
          f'{self._name} have no class.'
      )
    return labels


def root(data_dir: str | None) -> pathlib.Path:
  """Directory in which data sets are prepared."""
  return pathlib.Path(
      data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  ).expanduser()


def is_prepared(name: str, data_dir: str | None) -> bool:
  """True if there is a data set, or configs of one, of that name."""
  found = root(data_dir).glob(f'{name}/**/dataset_info.json')
  return next(found, None) is not None


def _find(name: str, directory: pathlib.Path) -> pathlib.Path:
  """Directory of the newest prepared version.

  Found by hand, because for a data set that is not prepared `tfds.builder`
  would look for one in the cloud.
  """
  found = [
      path.parent
      for path in directory.glob(f'{name}/**/dataset_info.json')
      if re.fullmatch(_VERSION, path.parent.name)
  ]
  versions = [path for path in found if path.parent == directory / name]
  if versions:
    return max(versions, key=lambda path: [*map(int, path.name.split('.'))])
  if found:
    configs = sorted({f'{name}/{path.parent.name}' for path in found})
    raise ValueError(
        f'The data set {name} is prepared in {directory} with a config; name '
        f'it: {" or ".join(configs)}.'
    )
  raise ValueError(
      f'The data set {name} is not prepared in {directory}. Prepare it once: '
      f'{_how_to_prepare(name, directory)}'
  )


def _how_to_prepare(name: str, directory: pathlib.Path | str) -> str:
  archives = (
      f' with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in '
      f'{directory}/downloads/manual'
      if name == 'imagenet2012'
      else ''
  )
  return (
      "pip install tensorflow && python -c 'import tensorflow_datasets as "
      f'tfds; tfds.builder("{name}", data_dir="{directory}", '
      f'file_format="array_record").download_and_prepare()\'{archives} '
      '(TensorFlow is needed only for this). If it is prepared elsewhere, name '
      'that directory with --data_dir.'
  )


@contextlib.contextmanager
def _quietly_using_tfds() -> Iterator[Any]:
  """Imports TFDS and silences what it logs while it opens files."""
  need = 'Reading TFDS data sets needs '
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    extras.load('array_record', f'{need}array_record')
    yield extras.load('tensorflow_datasets', f'{need}tensorflow-datasets')
  finally:
    logging.set_verbosity(verbosity)


def _builder(directory: pathlib.Path, name: str) -> Any:
  with _quietly_using_tfds() as tfds, _explaining(directory):
    builder = tfds.builder_from_directory(directory)
  file_format = builder.info.file_format
  if file_format.value != 'array_record':
    raise ValueError(
        f'{directory} holds {file_format.value} files, which only TensorFlow '
        'can read. Prepare the data set in another directory: '
        f'{_how_to_prepare(name, "ANOTHER_DIRECTORY")}'
    )
  return builder


def _open(builder: Any, split: str) -> Any:
  """Opens a split whose images stay encoded."""
  with _quietly_using_tfds() as tfds, _explaining(builder.data_dir):
    encoded = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split=split, decoders=encoded)


def _read(source: Any, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
  """Reads examples of an opened split."""
  with _explaining(source.dataset_info.data_dir):
    return source.__getitems__([int(index) for index in indices])


@contextlib.contextmanager
def _explaining(directory: str | pathlib.Path) -> Iterator[None]:
  """Adds to an error what to do about it."""
  try:
    yield
  # TFDS, protobuf and array_record each have exceptions of their own.
  except Exception as error:  # pylint: disable=broad-exception-caught
    reason = ' '.join(str(error).split())
    raise ValueError(
        f'{directory} cannot be read ({type(error).__name__}: {reason}). If '
        'its files are damaged, remove it and prepare it again.'
    ) from error
