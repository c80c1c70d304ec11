"""Image-classification data sets that TFDS has prepared.

They are read without TensorFlow and without the network. Their images are
decoded by `images`, so that files of all kinds and damage are treated as those
in folders are.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import hashlib
import io
import os
import pathlib
import re
import sys
from typing import Any

from absl import logging
import numpy as np
import tqdm

from autogrow_jax.data import images

# Enough to amortise a read, few enough to hold encoded.
_READ_AT_ONCE = 1000

# From so many examples on, all labels are read once and kept in a file.
_MANY = 100_000

_CACHE = pathlib.Path('~/.cache/autogrow_jax')


class Prepared:
  """A prepared data set with images and class labels.

  Attributes:
    classes: number of classes.
    shape: (height, width, channel) of an image; None for what varies.
    train_split: name of the split to train on.
    test_split: name of the split to report on.
  """

  def __init__(self, name: str, data_dir: str | None):
    """Finds a data set.

    Args:
      name: of TFDS, 'name' or 'name/config'.
      data_dir: where TFDS data sets are prepared; None for TFDS's default.

    Raises:
      ValueError: it is not there, damaged, or not of that kind.
    """
    self._directory, self._root = _find(name, data_dir), root(data_dir)
    self._name = name
    builder = _builder(self._directory, name)
    self._info = builder.info
    self.image_key, self.label_key = self._find_keys()
    feature = self._info.features[self.image_key]
    self.classes = self._info.features[self.label_key].num_classes
    self.shape = tuple(feature.shape)
    self.train_split = 'train'
    self.test_split = self._find_test(builder)

  def records(self, split: str, channels: int) -> '_Records':
    """A split, not decoded.

    Args:
      split: `train_split` or `test_split`.
      channels: 1 for grey, 3 for red, green and blue.
    """
    return _Records(
        name=self._name,
        directory=self._directory,
        split=split,
        keys=(self.image_key, self.label_key),
        channels=channels,
    )

  def _find_keys(self) -> tuple[str, str]:
    """Names of the features with the image and its class."""
    # Their classes are told by name, as the module of TFDS is not loaded here.
    kinds = {
        key: type(feature).__name__
        for key, feature in self._info.features.items()
    }
    candidates = [('image', 'label')]
    if isinstance(self._info.supervised_keys, tuple):
      candidates.append(self._info.supervised_keys)
    for image, label, *rest in candidates:
      if rest or not (isinstance(image, str) and isinstance(label, str)):
        continue
      if kinds.get(image) == 'Image' and kinds.get(label) == 'ClassLabel':
        return self._check_kind(image, label)
    raise ValueError(
        f'{self._name} is not for image classification: it needs the features '
        "'image' (Image) and 'label' (ClassLabel), but has "
        + ', '.join(f'{key!r} ({kind})' for key, kind in kinds.items())
        + '.'
    )

  def _check_kind(self, image: str, label: str) -> tuple[str, str]:
    feature = self._info.features[image]
    dtype = np.dtype(feature.np_dtype)
    if dtype not in (np.uint8, np.uint16):
      raise ValueError(
          f'Images of {self._name} are {dtype}; only whole numbers of 8 or 16 '
          'bits are known.'
      )
    classes = self._info.features[label].num_classes
    if classes is None or classes < 2:
      raise ValueError(
          f'{self._name} has {classes} classes; at least 2 are needed.'
      )
    return image, label

  def _find_test(self, builder: Any) -> str:
    """Name of the split to report on; both splits are seen to be there."""
    self._check_split('train')
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
      # The labels of some test splits are secret.
      (example,) = _read(_open(builder, split), [0])
      if example[self.label_key] >= 0:
        return split
    raise ValueError(
        f'The labels of {self._name} are missing in '
        + ' and '.join(map(repr, found))
        + '; a split to report on needs them.'
    )

  def _check_split(self, split: str) -> None:
    info = self._info.splits.get(split)
    if (
        not info
        or not info.num_examples
        or not all(map(os.path.exists, info.filepaths))
    ):
      there = [
          name
          for name, other in self._info.splits.items()
          if all(map(os.path.exists, other.filepaths))
      ]
      raise ValueError(
          f'The split {split!r} of {self._name} is not in {self._directory}, '
          f'only {there}. Remove that directory and prepare it again: '
          f'{_how_to_prepare(self._name, self._root)}'
      )


class _Records:
  """`images.Records` of a split."""

  def __init__(
      self,
      *,
      name: str,
      directory: pathlib.Path,
      split: str,
      keys: tuple[str, str],
      channels: int,
  ):
    self._name, self._directory, self._split = name, directory, split
    self._image_key, self._label_key = keys
    self._channels = channels
    self._length = len(self._source)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    with _explaining(self._directory):
      example = self._source[int(index)]
    return self._decode(index, example)

  def __getitems__(
      self, indices: Sequence[int]
  ) -> list[np.ndarray | images.Damaged]:
    """What `images.read_all` returns, by one read for all."""
    result = []
    for index, example in zip(indices, _read(self._source, indices)):
      try:
        result.append(self._decode(index, example))
      except images.Damaged as error:
        result.append(error)
    return result

  def __getstate__(self):
    # Open files cannot be pickled; each process opens its own.
    return {k: v for k, v in self.__dict__.items() if k != '_source'}

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """int32, (example,); reads the whole split without decoding images."""
    if len(self) < _MANY:
      return self._read_labels()
    split = self._source.dataset_info.splits[self._split]
    name = f'labels-{self._split}-{len(self)}-{split.num_bytes}.npy'
    mark = hashlib.sha256(str(self._directory.resolve()).encode()).hexdigest()
    places = (
        self._directory / name,
        _CACHE.expanduser() / f'{mark[:16]}-{name}',
    )
    for path in places:
      with contextlib.suppress(OSError, ValueError, EOFError):
        labels = np.load(path)
        if labels.shape == (len(self),) and labels.dtype == np.int32:
          return labels
    labels = self._read_labels()
    for path in places:
      with contextlib.suppress(OSError):
        _write_array(path, labels)
        break
    return labels

  @functools.cached_property
  def _source(self) -> Any:
    return _open(_builder(self._directory, self._name), self._split)

  def _read_labels(self) -> np.ndarray:
    labels = np.empty(len(self), np.int32)
    with progress(len(self), f'Labels of {self._name}') as advance:
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

  def _decode(self, index: int, example: dict[str, Any]) -> np.ndarray:
    name = f'Example {index} of the split {self._split!r} of {self._name}'
    if 'file_name' in example:
      name += f" ({example['file_name'].decode(errors='replace')})"
    return images.decode(example[self._image_key], self._channels, name=name)


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Any]:
  """Shows how far something is, once it has taken a few seconds.

  Args:
    total: number of images.
    what: is done.

  Yields:
    A function to call with the number of images just done.
  """
  with tqdm.tqdm(
      total=total,
      desc=what,
      unit=' images',
      delay=5,
      mininterval=0.5 if sys.stderr.isatty() else 60,
      leave=False,
  ) as bar:
    yield bar.update


def root(data_dir: str | None) -> pathlib.Path:
  """Where data sets are prepared."""
  return pathlib.Path(
      data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  ).expanduser()


def is_prepared(name: str, data_dir: str | None) -> bool:
  """Whether there is a data set, or configs of one, of that name."""
  directory = root(data_dir)
  return bool(_versions(directory, name) or _configs(directory, name))


def _find(name: str, data_dir: str | None) -> pathlib.Path:
  """Directory of the newest prepared version.

  Found by hand, because for a data set that is not prepared `tfds.builder`
  would look for one in the cloud.
  """
  directory = root(data_dir)
  if versions := _versions(directory, name):
    return max(versions, key=lambda path: [*map(int, path.name.split('.'))])
  if configs := _configs(directory, name):
    raise ValueError(
        f'The data set {name} is prepared in {directory} with a config; name '
        'it: ' + ' or '.join(f'{name}/{config}' for config in configs) + '.'
    )
  raise ValueError(
      f'The data set {name} is not prepared in {directory}. Prepare it once: '
      f'{_how_to_prepare(name, directory)}'
  )


def _versions(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
  return [
      path.parent
      for path in directory.glob(f'{name}/*/dataset_info.json')
      if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)
  ]


def _configs(directory: pathlib.Path, name: str) -> list[str]:
  return sorted({
      path.parents[1].name
      for path in directory.glob(f'{name}/*/*/dataset_info.json')
      if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)
  })


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


def _builder(directory: pathlib.Path, name: str) -> Any:
  with _quiet(), _explaining(directory):
    import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

    builder = tfds.builder_from_directory(directory)
  file_format = builder.info.file_format
  if file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise ValueError(
        f'{directory} holds {file_format.value} files, which only TensorFlow '
        'can read. Prepare the data set in another directory: '
        f'{_how_to_prepare(name, "ANOTHER_DIRECTORY")}'
    )
  return builder


def _open(builder: Any, split: str) -> Any:
  """A split whose images stay encoded."""
  with _quiet(), _explaining(builder.data_dir):
    import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

    encoded = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split=split, decoders=encoded)


def _read(source: Any, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
  """Reads examples of what `_open` returned."""
  with _explaining(source.dataset_info.data_dir):
    return source.__getitems__([int(index) for index in indices])


def _write_array(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes a file that is whole or not there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  content = io.BytesIO()
  np.save(content, array)
  new = path.with_name(f'{path.name}.{os.getpid()}.new')
  try:
    new.write_bytes(content.getvalue())
    os.replace(new, path)
  finally:
    new.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences what TFDS says while it opens files."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _explaining(directory: str | pathlib.Path) -> Iterator[None]:
  """Says of an error what to do about it."""
  try:
    yield
  # TFDS, protobuf and array_record each have exceptions of their own.
  except Exception as error:  # pylint: disable=broad-exception-caught
    reason = ' '.join(str(error).split())
    raise ValueError(
        f'{directory} cannot be read ({type(error).__name__}: {reason}). If '
        'its files are damaged, remove it and prepare it again.'
    ) from error
