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
from autogrow_jax.data import paths

_READ_AT_ONCE = 1000  # Examples: they amortise a read, and fit encoded.
_MANY = 100_000  # Labels of more examples are read once and kept in a file.


class Prepared:
  """A prepared data set with images and class labels.

  Attributes:
    name: TFDS's name of the data set, 'name' or 'name/config'.
    directory: where its files are.
    keys: names of the features with the image and its class.
    classes: number of classes.
    shape: (height, width, channel) of an image; None for what varies.
  """

  def __init__(self, name: str, data_dir: str | None):
    """Finds a data set in a directory of them; None for TFDS's default.

    Raises:
      ValueError: it is not there, damaged, or not of that kind.
    """
    self.name, self.directory = name, _find(name, root(data_dir))
    builder = _builder(self.directory)
    info = builder.info
    self.keys = _find_keys(name, info)
    image, label = (info.features[key] for key in self.keys)
    self.classes, self.shape = label.num_classes, tuple(image.shape)
    there = [
        split
        for split, found in info.splits.items()
        if found.num_examples and all(map(os.path.exists, found.filepaths))
    ]
    tests = [x for x in ('test', 'validation') if x in info.splits] or ['test']
    for split in ('train', *tests):
      if split not in there:
        raise ValueError(
            f'The split {split!r} of {name} is not in {self.directory}, only '
            f'{there}. If there is one, remove that directory and prepare it '
            f'again: {_how_to_prepare(name, root(data_dir))}'
        )
      if split != 'train':
        (example,) = _read(_open(builder, split), [0])
        if example[self.keys[1]] >= 0:  # Else labels are secret.
          break
    else:
      raise ValueError(
          f'The labels of {name} are missing in {tests}; a split to report on '
          'needs them.'
      )
    self._splits = {'train': 'train', 'test': split}

  def records(self, split: str, channels: int) -> '_Records':
    """The split 'train' or 'test', not decoded, with 1 or 3 channels."""
    return _Records(self, self._splits[split], channels)


class _Records:
  """`images.Records` of a split."""

  def __init__(self, dataset: Prepared, split: str, channels: int):
    self._dataset, self._split, self._channels = dataset, split, channels
    self._length = len(self._source)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    (image,) = self.__getitems__([index])
    if isinstance(image, images.Damaged):
      raise image
    return image

  def __getitems__(self, indices: Sequence[int]) -> list[Any]:
    result = []
    for index, example in zip(indices, _read(self._source, indices)):
      name = f'Example {index} of {self._what}'
      if 'file_name' in example:
        name += f" ({example['file_name'].decode(errors='replace')})"
      encoded = example[self._dataset.keys[0]]
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
    return _open(_builder(self._dataset.directory), self._split)

  @property
  def _what(self) -> str:
    return f'the split {self._split!r} of {self._dataset.name}'

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """int32, (example,); reads the whole split without decoding images."""
    if len(self) < _MANY:
      return self._read_labels()
    size = self._source.dataset_info.splits[self._split].num_bytes
    directory = self._dataset.directory.resolve()
    key = f'{directory} {self._split} {len(self)} {size}'
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
      cache = paths.local('~/.cache/autogrow_jax')
    except ValueError:  # No home directory.
      return self._read_labels()
    path = cache / f'labels-{digest}.npy'
    with contextlib.suppress(OSError, ValueError, EOFError):
      labels = np.load(path)
      if labels.shape == (len(self),) and labels.dtype == np.int32:
        return labels
    labels = self._read_labels()
    with contextlib.suppress(OSError):  # Without room, they are read again.
      cache.mkdir(parents=True, exist_ok=True)
      new = cache / f'{os.getpid()}.npy'
      np.save(new, labels)
      os.replace(new, path)
    return labels

  def _read_labels(self) -> np.ndarray:
    labels, key = np.empty(len(self), np.int32), self._dataset.keys[1]
    with extras.progress(len(self), f'Labels of {self._what}') as advance:
      for start in range(0, len(self), _READ_AT_ONCE):
        part = range(len(self))[start : start + _READ_AT_ONCE]
        labels[part] = [example[key] for example in _read(self._source, part)]
        advance(len(part))
    if missing := np.count_nonzero(labels < 0):
      raise ValueError(
          f'{missing} of {len(self)} examples of {self._what} have no class.'
      )
    return labels


def root(data_dir: str | None) -> pathlib.Path:
  """Directory in which data sets are prepared."""
  return paths.local(
      data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets',
      'The data directory',
  )


def versions(name: str, directory: pathlib.Path) -> list[pathlib.Path]:
  """Directories of all prepared versions of a data set and of its configs."""
  found = (x.parent for x in directory.glob(f'{name}/**/dataset_info.json'))
  return [x for x in found if re.fullmatch(r'\d+\.\d+\.\d+', x.name)]


def _find_keys(name: str, info: Any) -> tuple[str, str]:
  """Names of the features with the image and its class."""
  features = info.features
  kinds = {key: type(value).__name__ for key, value in features.items()}
  for keys in (('image', 'label'), info.supervised_keys or ()):
    names = [key for key in keys if isinstance(key, str)]
    if [kinds.get(key) for key in names] == ['Image', 'ClassLabel']:
      image, label = (features[key] for key in names)
      dtype, classes = np.dtype(image.np_dtype), label.num_classes or 0
      if dtype in (np.uint8, np.uint16) and classes >= 2:
        return tuple(names)
      kinds = {'image': dtype, 'label': f'{classes} classes'}
      break
  raise ValueError(
      f"{name} is not for image classification: it needs the features 'image' "
      "(Image, whole numbers of 8 or 16 bits) and 'label' (ClassLabel, of at "
      'least 2 classes), but has '
      + ', '.join(f'{key!r} ({kind})' for key, kind in kinds.items())
      + '.'
  )


def _find(name: str, directory: pathlib.Path) -> pathlib.Path:
  """Directory of the newest prepared version.

  Found by hand, because for a data set that is not prepared `tfds.builder`
  would look for one in the cloud.
  """
  there = versions(name, directory)
  if own := [path for path in there if path.parent == directory / name]:
    return max(own, key=lambda path: [*map(int, path.name.split('.'))])
  if there:
    configs = sorted({f'{name}/{path.parent.name}' for path in there})
    raise ValueError(
        f'The data set {name} is prepared in {directory} with a config; name '
        f'it: {" or ".join(configs)}.'
    )
  raise ValueError(
      f'The data set {name} is not prepared in {directory}. Prepare it once: '
      f'{_how_to_prepare(name, directory)}'
  )


def _how_to_prepare(name: str, directory: pathlib.Path) -> str:
  archives = ''
  if name == 'imagenet2012':
    archives = (
        ' with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in '
        f'{directory}/downloads/manual'
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
  """Imports TFDS, and silences what it logs while it opens files."""
  need = 'Reading TFDS data sets needs '
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    extras.load('array_record', f'{need}array_record')
    yield extras.load('tensorflow_datasets', f'{need}tensorflow-datasets')
  finally:
    logging.set_verbosity(verbosity)


def _builder(directory: pathlib.Path) -> Any:
  with _quietly_using_tfds() as tfds, _explaining(directory):
    return tfds.builder_from_directory(directory)


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
  with _explaining(source.dataset_info.data_dir):
    return source.__getitems__([int(index) for index in indices])


@contextlib.contextmanager
def _explaining(directory: str | pathlib.Path) -> Iterator[None]:
  """Adds to any error of TFDS and its readers what to do about it."""
  try:
    yield
  except Exception as error:  # pylint: disable=broad-exception-caught
    reason = ' '.join(str(error).split())
    raise ValueError(
        f'{directory} cannot be read ({type(error).__name__}: {reason}). If '
        'its files are damaged, or not of the format array_record, remove it '
        'and prepare it again.'
    ) from error
