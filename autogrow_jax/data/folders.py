"""Folders of images: one folder per class, or pairs of an image and a mask."""

from collections.abc import Mapping, Sequence
from concurrent import futures
import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np

from autogrow_jax.data import config as config_lib
from autogrow_jax.data import images
from autogrow_jax.data import masks
from autogrow_jax.data import paths
from autogrow_jax.data import splits

# One in so many images is for the test, where the folder does not say which.
_TEST = 5

_VOC_MASKS = (
    'its masks of classes are not among what TFDS prepares; unpack '
    'VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC/voc2012) and '
    'name the directory that then holds VOCdevkit with --data_dir. Other masks '
    'for the same images, such as the augmented set, are read by pairs:PATH.'
)


class _File(NamedTuple):
  """Paths of an image and of its mask, if it has one; and its class."""

  paths: tuple[str, ...]
  label: int = 0


class Folder:
  """Images in PATH/train and PATH/test, or in PATH alone.

  Each of these has one folder of images per class; with masks, it has a folder
  'images' with NAME.* and a folder 'masks' with NAME.png. Without a folder
  'test', a fifth of all images is for the test: stratified, fixed, independent
  of any seed. Hidden files, and masks without an image, are ignored.

  Attributes:
    classes: number of classes; they have the order of their names, or they are
      the indices in the training masks.
    shape: (height, width, channel) of all images.
    digest: digest of the names and sizes of all files.
    has_masks: whether images have masks instead of a class.
  """

  def __init__(self, config: config_lib.DataConfig):
    """Lists a folder, and looks at the heads of its files where it must.

    Raises:
      ValueError: there is no such folder, it is not like that, or its images
        differ in size and no `image_size` is given.
    """
    kind, _, path = config.dataset.partition(':')
    root, size = paths.local(path, 'A folder of images'), config.image_size
    if not root.is_dir():
      raise ValueError(f'There is no folder {root}.')
    self._root, self._skip = root, config.skip_damaged
    self.has_masks = f'{kind}:' == config_lib.PAIRS
    parts = _parts(root)
    names = [] if self.has_masks else _class_names(parts[0])
    listed = [_by_class(x, names) if names else _pairs(x) for x in parts]
    if len(listed) == 1:
      (files,) = listed
      labels = np.array([file.label for file in files], np.int32)
      chosen = splits.fixed_test(labels, round(len(files) / _TEST))
      listed = [[files[i] for i in chosen[x]] for x in ('train', 'test')]
    if not all(listed):
      raise ValueError(f'{root} has no images to train or test on; add some.')
    self._files = dict(zip(('train', 'test'), listed))
    self.digest = _digest(self._files)
    self.shape = (size, size, config.channels)
    if self.has_masks or None in self.shape:
      found = self._look(must_agree=size is None)
      self.shape = tuple(x or y for x, y in zip(self.shape, found))
    self.classes = len(names) or 1 + self._largest_index()
    if self.classes < 2:
      raise ValueError(
          f'The training masks in {root} have no class but 0 and void; at '
          'least two classes, 0 and 1, are needed.'
      )

  def records(self, split: str) -> 'Files':
    """The split 'train' or 'test', not decoded."""
    return Files(self._files[split], self.shape[-1], self.classes)

  def _look(self, *, must_agree: bool) -> tuple[int, int, int]:
    """(height, width, channel) from the heads of all files."""
    sizes, channels = {}, 1
    for file in (file for files in self._files.values() for file in files):
      try:
        *size, kind = _probe(file)
      except images.Damaged:
        if self._skip:
          continue
        raise
      channels = max(channels, kind)
      sizes.setdefault(tuple(size), file.paths[0])
      if must_agree and len(sizes) > 1:
        one, other = (
            f'{path} has {rows}x{columns} pixels'
            for (rows, columns), path in sizes.items()
        )
        raise ValueError(
            f'The images in {self._root} differ in size: {one}, {other}. Give '
            'a size for all with --data.image_size.'
        )
    if not sizes:
      raise ValueError(f'No file in {self._root} is an image.')
    return *next(iter(sizes)), channels

  def _largest_index(self) -> int:
    """Largest class index in the training masks."""

    def largest(file: _File) -> int:
      try:
        mask = masks.read(file.paths[1])
      except images.Damaged:
        if self._skip:
          return 0
        raise
      return int(mask.max(initial=0, where=mask != masks.VOID))

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      return max(pool.map(largest, self._files['train']))


class Files:
  """`images.Records` of image files, or of pairs, which have no one class.

  Attributes:
    labels: int32, (example,).
  """

  def __init__(self, files: Sequence[_File], channels: int, classes: int):
    self._files, self._channels, self._classes = files, channels, classes
    self.labels = np.array([file.label for file in files], np.int32)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> np.ndarray:
    path, *mask_paths = paths = self._files[index].paths
    with images.reading(path):
      encoded = pathlib.Path(path).read_bytes()
    image = images.decode(encoded, self._channels, name=path)
    if not mask_paths:
      return image
    mask = masks.read(*mask_paths)
    unknown = mask[(mask >= self._classes) & (mask != masks.VOID)]
    if unknown.size:
      raise ValueError(
          f'{mask_paths[0]} has the class index {unknown.min()}, but there are '
          f'the classes 0 to {self._classes - 1}, and {masks.VOID} for void.'
      )
    _check_sizes(paths, image.shape[:2], mask.shape)
    return np.concatenate([image, mask[..., np.newaxis]], -1)


def voc(data_dir: str | os.PathLike[str]) -> Mapping[str, Files]:
  """Pascal VOC 2012 in VOCdevkit: its splits 'train', and 'val' as 'test'."""
  root = pathlib.Path(data_dir) / 'VOCdevkit' / 'VOC2012'
  result = {}
  for split, official in (('train', 'train'), ('test', 'val')):
    listing = root / 'ImageSets' / 'Segmentation' / f'{official}.txt'
    try:
      names = listing.read_text().split()
    except OSError as error:
      raise ValueError(
          f'VOC 2012 needs {listing}, which cannot be read '
          f'({error.strerror}): {_VOC_MASKS}'
      ) from error
    files = []
    for name in names:
      image = f'{root}/JPEGImages/{name}.jpg'
      files.append(_File((image, f'{root}/SegmentationClass/{name}.png')))
    for path in (path for file in files for path in file.paths):
      if not os.path.isfile(path):
        raise ValueError(f'VOC 2012 lacks {path}: {_VOC_MASKS}')
    result[split] = Files(files, channels=3, classes=21)
  return result


def _parts(root: pathlib.Path) -> list[pathlib.Path]:
  """Folders for training and for the test, or the one that is to be divided."""
  train = root / 'train'
  if not train.is_dir():
    return [root]
  for name in ('test', 'validation', 'val'):
    if (root / name).is_dir():
      return [train, root / name]
  raise ValueError(
      f"{root} has a folder 'train' but none named 'test'; add one, or name "
      f'{train} to have a fifth of it for the test.'
  )


def _digest(files: Mapping[str, Sequence[_File]]) -> str:
  result = hashlib.sha256()
  for split, listed in files.items():
    for path in (path for file in listed for path in file.paths):
      name = '/'.join([split, *path.split(os.sep)[-2:]])
      try:
        size = os.stat(path).st_size
      except OSError:  # Reading it will raise.
        size = None
      result.update(os.fsencode(f'{name}\0{size}\0'))
  return result.hexdigest()[:16]


def _visible(path: pathlib.Path, *, folders: bool) -> list[str]:
  """Sorted names of the folders, or of everything else, in a folder."""
  there = sorted(path.glob('[!.]*'))
  return [entry.name for entry in there if entry.is_dir() == folders]


def _class_names(path: pathlib.Path) -> list[str]:
  names = _visible(path, folders=True)
  if len(names) < 2:
    raise ValueError(
        f'{path} needs at least two folders of images, one per class; it has '
        f'{names}.'
    )
  return names


def _by_class(path: pathlib.Path, names: Sequence[str]) -> list[_File]:
  """Files in the order of their classes and names."""
  result = []
  for name in _class_names(path):
    if name not in names:
      raise ValueError(
          f'{path} has the class {name!r}, which the training images have not.'
      )
    files, folders = (_visible(path / name, folders=x) for x in (False, True))
    if folders or not files:
      found = f'holds the folder {folders[0]!r}' if folders else 'is empty'
      raise ValueError(
          f'The class folder {path / name} {found}; it must hold images, and '
          'nothing else.'
      )
    label = names.index(name)
    result += [_File((f'{path}/{name}/{file}',), label) for file in files]
  return result


def _pairs(path: pathlib.Path) -> list[_File]:
  """Images with their masks, in the order of their names."""
  for name in ('images', 'masks'):
    if not (path / name).is_dir():
      raise ValueError(
          f'{path} has no folder {name!r}; put images into {path}/images '
          f'(NAME.*) and their masks into {path}/masks (NAME.png), or both '
          "into folders 'train' and 'test'."
      )
  there = set(_visible(path / 'masks', folders=False))
  pairs: dict[str, _File] = {}
  for file in _visible(path / 'images', folders=False):
    name = f'{os.path.splitext(file)[0]}.png'
    image, mask = f'{path}/images/{file}', f'{path}/masks/{name}'
    if name not in there:
      raise ValueError(
          f'{image} has no mask {mask}; add it, or remove the image.'
      )
    if name in pairs:
      raise ValueError(
          f'{pairs[name].paths[0]} and {image} would share the mask {name}; '
          'rename or remove one.'
      )
    pairs[name] = _File((image, mask))
  return list(pairs.values())


def _probe(file: _File) -> tuple[int, int, int]:
  """(height, width, channel) of an image, whose mask must have its size."""
  path, *mask_paths = file.paths
  with images.reading(path):
    opened = open(path, 'rb')
  with opened:
    *size, channels = images.probe(opened, name=path)
  if mask_paths:
    _check_sizes(file.paths, tuple(size), masks.probe(*mask_paths))
  return *size, channels


def _check_sizes(
    paths: Sequence[str], size: tuple[int, int], mask_size: tuple[int, int]
) -> None:
  if mask_size != size:
    raise ValueError(
        f'{paths[1]} has {mask_size[0]}x{mask_size[1]} pixels, but its image '
        f'{paths[0]} has {size[0]}x{size[1]}; they must agree.'
    )
