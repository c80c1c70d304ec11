"""Images with masks: a class for every pixel.

A mask is a PNG of 8 bits, palette or grey, as large as its image, whose values
are class indices from 0; 255 is void, which nothing counts.

Images and masks are brought to one size together: what is larger is scaled
down, keeping its proportions, and what is smaller is framed, in black and void.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from autogrow_jax.data import folder
from autogrow_jax.data import images
from autogrow_jax.data import stratified

VOID = 255

# Pillow's names for pictures whose values are indices or levels of grey.
_MODES = ('1', 'L', 'P')

_VOC_MASKS = (
    'its masks of classes are not among what TFDS prepares; unpack '
    'VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC/voc2012) and '
    'name the directory that then holds VOCdevkit with --data_dir. Other masks '
    'for the same images, such as the augmented set, are read by pairs:PATH.'
)

Pair = tuple[str, str]


class Folder:
  """Pairs in PATH/train and PATH/test, or in PATH alone.

  Each of these has a folder 'images' with NAME.* and a folder 'masks' with
  NAME.png. Without a folder 'test', a fifth of all pairs is for the test:
  fixed, independent of any seed. Hidden files and masks without an image are
  ignored.

  Attributes:
    classes: one more than the largest index in the training masks.
    shape: (height, width, channel) of all images in the end.
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
    """Lists a folder, and looks into its files.

    Args:
      path: of the folder.
      channels: 1 or 3; None for what the images have.
      image_size: of the frame that all images are brought into; None for their
        own size.
      skip_damaged: whether files that are no images do not matter.

    Raises:
      ValueError: there is no such folder, it is not like that, or its images
        differ in size and no `image_size` is given.
    """
    root = folder.existing(path)
    train, test = folder.splits(root)
    listed = _list(train)
    if test is None:
      groups = np.zeros(len(listed), np.int32)
      chosen = folder.test_part(stratified.order(groups, seed=0))
      self._pairs = {
          split: [listed[index] for index in indices]
          for split, indices in chosen.items()
      }
    else:
      self._pairs = {'train': listed, 'test': _list(test)}
    for split, pairs in self._pairs.items():
      if not pairs:
        raise ValueError(f'{root} has no pair for {split}; add some.')
    files = {
        split: [path for pair in pairs for path in pair]
        for split, pairs in self._pairs.items()
    }
    self.digest = folder.digest(files)
    self._root, self._skip = root, skip_damaged
    height, width, found = self._look(image_size is None)
    self.shape = (
        image_size or height, image_size or width, channels or found
    )
    self.classes = 1 + self._largest()
    if self.classes < 2:
      raise ValueError(
          f'The training masks in {root} have no class but 0 and void; at '
          'least two classes, 0 and 1, are needed.'
      )

  def records(self, split: str) -> 'Files':
    """The split 'train' or 'test', not decoded."""
    return Files(self._pairs[split], self.shape[-1], self.classes)

  def _look(self, must_agree: bool) -> tuple[int, int, int]:
    """(height, width, channel) by the heads of all files."""
    shapes, channels = {}, 1
    for pair in (pair for pairs in self._pairs.values() for pair in pairs):
      try:
        *shape, kind = _check_heads(pair)
      except images.Damaged:
        if self._skip:
          continue
        raise
      channels = max(channels, kind)
      shapes.setdefault(tuple(shape), pair[0])
    if not shapes:
      raise ValueError(f'No file in {self._root} is an image.')
    if must_agree and len(shapes) > 1:
      (shape, one), (other_shape, other), *_ = shapes.items()
      raise ValueError(
          f'The images in {self._root} differ in size: {one} has '
          f'{shape[0]}x{shape[1]} pixels, {other} {other_shape[0]}x'
          f'{other_shape[1]}. Give a size for all with --image_size.'
      )
    return *next(iter(shapes)), channels

  def _largest(self) -> int:
    """Largest class index in the training masks."""

    def of_one(pair: Pair) -> int:
      try:
        mask = read_mask(pair[1])
      except images.Damaged:
        if self._skip:
          return 0
        raise
      return int(mask.max(initial=0, where=mask != VOID))

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      return max(pool.map(of_one, self._pairs['train']))


class Files:
  """`images.Records` of pairs: an item is an image and its mask.

  Attributes:
    labels: int32, (example,); zeros, as a pair is of no one class.
  """

  def __init__(self, pairs: Sequence[Pair], channels: int, classes: int):
    self._pairs, self._channels, self._classes = pairs, channels, classes
    self.labels = np.zeros(len(pairs), np.int32)

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one pair.

    Args:
      index: from 0.

    Returns:
      The image as uint8, (height, width, channel), and its mask as uint8,
      (height, width).

    Raises:
      images.Damaged: one of them cannot be read.
      ValueError: the mask has an index that is no class.
    """
    image_path, mask_path = self._pairs[index]
    encoded = _read(image_path)
    image = images.decode(encoded, self._channels, name=image_path)
    mask = read_mask(mask_path)
    if unknown := np.setdiff1d(mask[mask >= self._classes], [VOID]).tolist():
      raise ValueError(
          f'{mask_path} has the class index {unknown[0]}, but there are the '
          f'classes 0 to {self._classes - 1}, and {VOID} for void.'
      )
    return image, mask


def voc(data_dir: str | os.PathLike[str]) -> Mapping[str, Files]:
  """Pascal VOC 2012 as it is published: its splits 'train' and 'val' as 'test'.

  Args:
    data_dir: holds the folder VOCdevkit.

  Raises:
    ValueError: it does not, or a file is missing.
  """
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
    pairs = [
        (
            os.fspath(root / 'JPEGImages' / f'{name}.jpg'),
            os.fspath(root / 'SegmentationClass' / f'{name}.png'),
        )
        for name in names
    ]
    for path in (path for pair in pairs for path in pair):
      if not os.path.isfile(path):
        raise ValueError(f'VOC 2012 lacks {path}: {_VOC_MASKS}')
    result[split] = Files(pairs, channels=3, classes=21)
  return result


def read_mask(path: str) -> np.ndarray:
  """Decodes a mask: uint8, (height, width).

  Raises:
    images.Damaged: it cannot be read.
    ValueError: it is no mask.
  """
  return _opened(path, lambda mask: np.asarray(mask).astype(np.uint8))


def fit(
    image: np.ndarray, mask: np.ndarray, size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Brings a pair into a frame, in its centre.

  Args:
    image: uint8, (height, width, channel).
    mask: uint8, (height, width).
    size: (height, width) of the frame.

  Returns:
    The image as uint8, (*size, channel), and the labels as int16, of that size,
    where void is -1.

  Raises:
    ValueError: the two differ in size.
  """
  if image.shape[:2] != mask.shape:
    raise ValueError(
        f'A mask of {mask.shape[0]}x{mask.shape[1]} pixels does not fit an '
        f'image of {image.shape[0]}x{image.shape[1]}.'
    )
  factor = min(want / is_ for want, is_ in zip(size, mask.shape))
  if factor < 1:
    rows, columns = (max(1, round(factor * side)) for side in mask.shape)
    scale = lambda pixels, how: np.asarray(
        Image.fromarray(pixels).resize((columns, rows), how)
    )
    planes = np.moveaxis(image, -1, 0)
    image = np.stack(
        [scale(plane, Image.Resampling.BILINEAR) for plane in planes], -1
    )
    mask = scale(mask, Image.Resampling.NEAREST)
  frame = np.zeros((*size, image.shape[-1]), np.uint8)
  labels = np.full(size, -1, np.int16)
  rows, columns = mask.shape
  top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
  part = slice(top, top + rows), slice(left, left + columns)
  frame[part] = image
  labels[part] = np.where(mask == VOID, -1, mask.astype(np.int16))
  return frame, labels


def _list(split: pathlib.Path) -> list[Pair]:
  """(image, mask) paths in the order of their names."""
  for name in ('images', 'masks'):
    if not (split / name).is_dir():
      raise ValueError(
          f"{split} has no folder {name!r}; put images into {split}/images "
          f'(NAME.*) and their masks into {split}/masks (NAME.png), or both '
          "into folders 'train' and 'test'."
      )
  masks = {name for name in _files(split / 'masks') if name.endswith('.png')}
  if not masks:
    raise ValueError(
        f'{split}/masks has no masks; there must be one NAME.png for each '
        f'image {split}/images/NAME.*.'
    )
  pairs = {}
  for file in _files(split / 'images'):
    name, _ = os.path.splitext(file)
    image = os.path.join(split, 'images', file)
    if f'{name}.png' not in masks:
      raise ValueError(
          f'{image} has no mask {split}/masks/{name}.png; add it, or remove '
          'the image.'
      )
    if name in pairs:
      raise ValueError(
          f'{pairs[name][0]} and {image} would share the mask {name}.png; '
          'rename or remove one.'
      )
    pairs[name] = image, os.path.join(split, 'masks', f'{name}.png')
  if not pairs:
    raise ValueError(f'{split}/images has no images; add some.')
  return list(pairs.values())


def _files(path: pathlib.Path) -> Iterable[str]:
  return sorted(
      entry.name for entry in os.scandir(path) if not entry.name.startswith('.')
  )


def _check_heads(pair: Pair) -> tuple[int, int, int]:
  """(height, width, channel) of an image whose mask has its size."""
  path, mask_path = pair
  try:
    with open(path, 'rb') as file:
      height, width, channels = images.probe(file, name=path)
  except OSError as error:
    raise images.Damaged.because(path, error) from error
  columns, rows = _opened(mask_path, lambda mask: mask.size)
  if (rows, columns) != (height, width):
    raise ValueError(
        f'{mask_path} has {rows}x{columns} pixels, but its image {path} has '
        f'{height}x{width}; they must agree.'
    )
  return height, width, channels


def _opened(path: str, use: Any) -> Any:
  """What a function returns of an open mask."""
  try:
    with Image.open(path) as mask:
      kind = f'{mask.format} of the kind {mask.mode!r}'
      is_mask = mask.format == 'PNG' and mask.mode in _MODES
      result = use(mask) if is_mask else None
  except MemoryError:
    raise
  except Exception as error:  # pylint: disable=broad-exception-caught
    raise images.Damaged.because(path, error) from error
  if not is_mask:
    raise ValueError(
        f'{path} is a {kind}; a mask is a PNG of 8 bits, palette or grey, '
        f'whose values are class indices, and {VOID} for void.'
    )
  return result


def _read(path: str) -> bytes:
  try:
    with open(path, 'rb') as file:
      return file.read()
  except OSError as error:
    raise images.Damaged.because(path, error) from error
