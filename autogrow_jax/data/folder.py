"""A folder of images: one folder per class."""

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import os
import pathlib

import numpy as np

from autogrow_jax.data import images
from autogrow_jax.data import stratified

# One in so many images is for the test, where the folder does not say which.
_TEST = 5


class Folder:
  """Images in PATH/train/CLASS and PATH/test/CLASS, or in PATH/CLASS alone.

  Without a folder 'test', a fifth of all images is for the test: stratified,
  fixed, independent of any seed. Hidden files are ignored.

  Attributes:
    classes: number of classes; their numbers are those of the sorted names.
    channels: 1 if all images are grey, else 3; or as asked for.
    shape: (height, width, channel) of all images; None where it varies.
    digest: of the names and sizes of all files.
  """

  def __init__(
      self,
      path: str,
      *,
      channels: int | None = None,
      image_size: int | None = None,
      skip_damaged: bool = False,
  ):
    """Lists a folder, and looks at the heads of its files if it must.

    Args:
      path: of the folder.
      channels: 1 or 3; None for what the images have.
      image_size: to which images will be scaled; None for their own.
      skip_damaged: whether files that are no images do not matter.

    Raises:
      ValueError: there is no such folder, it is not like that, or its images
        differ in size and no `image_size` is given.
    """
    self._root = existing(path)
    train, test = splits(self._root)
    names = _class_names(train)
    self.classes = len(names)
    files = _list(train, names)
    if test is None:
      labels = np.array([label for _, label in files], np.int32)
      chosen = test_part(stratified.order(labels, seed=0))
      self._files = {
          split: [files[index] for index in indices]
          for split, indices in chosen.items()
      }
    else:
      known = _class_names(test)
      if unknown := sorted(set(known) - set(names)):
        raise ValueError(
            f'{test} has the classes {unknown}, which {train} has not.'
        )
      self._files = {'train': files, 'test': _list(test, names)}
    for split, listed in self._files.items():
      if not listed:
        raise ValueError(f'{self._root} has no image for {split}; add some.')
    self.digest = digest({
        split: [path for path, _ in listed]
        for split, listed in self._files.items()
    })
    self.shape = (image_size, image_size, channels)
    if channels is None or image_size is None:
      height, width, found = self._look(image_size is None, skip_damaged)
      self.shape = (
          image_size or height, image_size or width, channels or found
      )
    self.channels = self.shape[-1]

  def records(self, split: str) -> 'Files':
    """The split 'train' or 'test', not decoded."""
    files = self._files[split]
    return Files(
        [path for path, _ in files],
        np.array([label for _, label in files], np.int32),
        self.channels,
    )

  def _look(
      self, must_agree: bool, skip_damaged: bool
  ) -> tuple[int | None, int | None, int]:
    """(height, width, channel) by the heads of all files."""
    first, shape, channels = None, (None, None), 1
    for path in self._paths():
      try:
        with open(path, 'rb') as file:
          *found, kind = images.probe(file, name=path)
      except (images.Damaged, OSError) as error:
        if skip_damaged:
          continue
        if isinstance(error, images.Damaged):
          raise
        raise images.Damaged.because(path, error) from error
      channels = max(channels, kind)
      if first is None:
        first, shape = path, tuple(found)
      elif tuple(found) != shape:
        if must_agree:
          raise ValueError(
              f'The images in {self._root} differ in size: {first} has '
              f'{shape[0]}x{shape[1]} pixels, {path} {found[0]}x{found[1]}. '
              'Give a size for all with --image_size.'
          )
        shape = (None, None)
    if first is None:
      raise ValueError(f'No file in {self._root} is an image.')
    return *shape, channels

  def _paths(self) -> Iterator[str]:
    for files in self._files.values():
      for path, _ in files:
        yield path


class Files:
  """`images.Records` of image files.

  Attributes:
    labels: int32, (example,).
  """

  def __init__(
      self, paths: Sequence[str], labels: np.ndarray, channels: int
  ):
    self._paths, self.labels, self._channels = paths, labels, channels

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> np.ndarray:
    path = self._paths[index]
    try:
      with open(path, 'rb') as file:
        encoded = file.read()
    except OSError as error:
      raise images.Damaged.because(path, error) from error
    return images.decode(encoded, self._channels, name=path)


def existing(path: str) -> pathlib.Path:
  """A folder that is there; raises a ValueError if it is not."""
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    raise ValueError(f'There is no folder {root}.')
  return root


def splits(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
  """Folders for training and for the test; the latter may have to be divided.
  """
  train = root / 'train'
  tests = [root / name for name in ('test', 'validation', 'val')]
  found = [path for path in tests if path.is_dir()]
  if not train.is_dir():
    return root, None
  if not found:
    raise ValueError(
        f"{root} has a folder 'train' but none named 'test'; add one, or name "
        f'{train} to have a fifth of it for the test.'
    )
  return train, found[0]


def test_part(order: np.ndarray) -> dict[str, np.ndarray]:
  """Ascending indices of 'train' and 'test', which is the first fifth."""
  count = round(len(order) / _TEST)
  return {'train': np.sort(order[count:]), 'test': np.sort(order[:count])}


def digest(files: Mapping[str, Sequence[str]]) -> str:
  """Of the names and sizes of the files of each split."""
  result = hashlib.sha256()
  for split, paths in files.items():
    for path in paths:
      name = '/'.join([split, *path.split(os.sep)[-2:]])
      try:
        size = os.stat(path).st_size
      except OSError:  # Reading it will say so.
        size = None
      result.update(os.fsencode(f'{name}\0{size}\0'))
  return result.hexdigest()[:16]


def _class_names(path: pathlib.Path) -> list[str]:
  """Names of the folders in a folder, sorted."""
  names = sorted(
      entry.name
      for entry in os.scandir(path)
      if entry.is_dir() and not entry.name.startswith('.')
  )
  if not names:
    raise ValueError(
        f'{path} has no classes: it needs one folder of images per class.'
    )
  if len(names) == 1:
    raise ValueError(
        f'{path} has one class, {names[0]!r}; at least two are needed.'
    )
  return names


def _list(
    path: pathlib.Path, names: Sequence[str]
) -> list[tuple[str, int]]:
  """(file, class number) in the order of their names."""
  result = []
  for label, name in enumerate(names):
    if not (path / name).is_dir():  # A class that the test lacks.
      continue
    entries = [
        entry
        for entry in os.scandir(path / name)
        if not entry.name.startswith('.')
    ]
    if folders := sorted(entry.name for entry in entries if entry.is_dir()):
      raise ValueError(
          f'The class folder {path / name} holds the folder {folders[0]!r}; it '
          'may hold images only.'
      )
    if not entries:
      raise ValueError(
          f'The class folder {path / name} is empty; fill or remove it.'
      )
    result += [
        (os.path.join(path, name, file), label)
        for file in sorted(entry.name for entry in entries)
    ]
  return result
