"""From encoded image files to pixels of one size, on the host.

Pure functions on one image at a time, which a worker process may run.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import io
from typing import Any, BinaryIO, Protocol

from absl import logging
import numpy as np

from autogrow_jax.data import extras

# Larger images are evaluated on a part, as networks with an ImageNet stem are.
_SMALL = 64


class Damaged(ValueError):
  """An image that cannot be read; the message names it."""


class Records(Protocol):
  """One split of a data set, not decoded yet; it can be pickled.

  Attributes:
    labels: int32, (example,), from 0.
  """

  labels: np.ndarray

  def __len__(self) -> int:
    """Number of examples."""

  def __getitem__(self, index: int) -> np.ndarray:
    """Decodes one image: uint8, (height, width, channel), in its own size.

    Where there are masks, they are the last channel. Raises `Damaged` if the
    image cannot be read.
    """


def read_all(
    records: Records, indices: Sequence[int]
) -> list[np.ndarray | Damaged]:
  """Images, or the errors in their place.

  Records that read several much faster than one by one have a method
  `__getitems__` that does the same.
  """
  if hasattr(records, '__getitems__'):
    return records.__getitems__(indices)
  result = []
  for index in indices:
    try:
      result.append(records[index])
    except Damaged as error:
      result.append(error)
  return result


def pillow() -> Any:
  """The module `PIL.Image`."""
  return extras.load('PIL.Image', 'Reading images needs pillow')


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
  """Turns any error of reading the image `name` into `Damaged`."""
  try:
    yield
  except MemoryError:  # The machine's fault, not the image's.
    raise
  # Pillow's decoders raise whatever they come across: OSError, SyntaxError, ...
  except Exception as error:  # pylint: disable=broad-exception-caught
    reason = ' '.join(str(getattr(error, 'strerror', '') or error).split())
    if type(error).__name__ == 'UnidentifiedImageError':
      reason = 'no image format that Pillow knows'
    raise Damaged(
        f'{name} cannot be read ({reason}); repair or remove it, or leave out '
        'such images with --data.skip_damaged.'
    ) from error


def decode(
    encoded: bytes, channels: int, *, name: str = 'The image'
) -> np.ndarray:
  """Decodes an image file of any kind that Pillow knows.

  It is turned as viewers show it, by its EXIF orientation. Transparent pixels
  become white, 16 bits become 8, and colours become their luminance where 1
  channel is asked for, not 3. Of several frames, the first counts.

  Returns:
    uint8, (height, width, channel).

  Raises:
    Damaged: it cannot be decoded; the message has the `name`.
  """
  module = pillow()
  with reading(name):
    if not encoded:
      raise ValueError('it is empty')
    with module.open(io.BytesIO(encoded)) as image:
      convert = functools.partial(_convert, channels=channels, name=name)
      pixels = upright(image, convert)
  return pixels[..., np.newaxis] if channels == 1 else pixels


def probe(encoded: BinaryIO, *, name: str) -> tuple[int, int, int]:
  """(height, width, channel) from the head of an open image file.

  There is 1 channel if the file's colours are grey by their kind, else 3.
  Raises `Damaged` if it is no image.
  """
  module = pillow()
  with reading(name):
    if not encoded.read(1):
      raise ValueError('it is empty')
    encoded.seek(0)
    with module.open(encoded) as image:
      mode = image.mode
      is_grey = mode[:1] in ('1', 'L', 'I', 'F') and mode != 'LAB'
      if mode in ('P', 'PA'):
        palette = np.array(image.getpalette('RGB')).reshape(-1, 3)
        is_grey = bool(np.all(palette == palette[:, :1]))
      return *shown_size(image), 1 if is_grey else 3


def upright(
    image: Any, convert: Callable[[Any], Any] = lambda image: image
) -> np.ndarray:
  """Pixels of an open image as viewers show it, after a conversion."""
  turn = _turn(image)
  image.load()
  image = convert(image)
  return np.asarray(image if turn is None else image.transpose(turn))


def shown_size(image: Any) -> tuple[int, int]:
  """(height, width) of an open image as viewers show it."""
  turn = _turn(image)
  upright = 'FLIP_LEFT_RIGHT', 'FLIP_TOP_BOTTOM', 'ROTATE_180'
  is_upright = turn is None or turn.name in upright
  return image.size[::-1] if is_upright else image.size


def _turn(image: Any) -> Any:
  """How an image that is open, but not loaded, must be turned; or None."""
  if image.format == 'TIFF':  # Pillow turns it.
    return None
  how = pillow().Transpose
  try:
    return {
        2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM,
        5: how.TRANSPOSE, 6: how.ROTATE_270, 7: how.TRANSVERSE,
        8: how.ROTATE_90,
    }.get(image.getexif().get(0x0112))  # pyformat: disable
  # Damaged notes about an image do not damage the image.
  except Exception:  # pylint: disable=broad-exception-caught
    return None


def fit(image: np.ndarray, size: int) -> np.ndarray:
  """Cuts out the centre of an image, as it is evaluated.

  Above 64 pixels the short side is scaled to 256/224 of the size before the
  centre is cut out (Wen et al. 2020: 256 for 224), up to 64 to the size itself.
  """
  height, width = image.shape[:2]
  side = min(height, width)
  if size <= _SMALL:
    if height == width == size:
      return image
  else:
    side = side * size / round(size * 256 / 224)
  top, left = (height - side) / 2, (width - side) / 2
  if side == size:  # Whole pixels, so that nothing is blurred.
    top, left = int(top), int(left)
    return image[top : top + size, left : left + size]
  # Only the visible part is scaled, so that a long image costs no memory.
  return _resize(image, size, (left, top, left + side, top + side))


def random_resized_crop(
    rng: np.random.Generator, image: np.ndarray, size: int
) -> np.ndarray:
  """Scales a random part of an image, for training.

  The part has 8 to 100 % of the area and an aspect ratio from 3/4 to 4/3; if it
  does not fit ten times in a row, it is the largest centre that does.
  """
  height, width = image.shape[:2]
  for _ in range(10):
    area = height * width * (0.08 + 0.92 * rng.random())
    ratio = np.exp(np.log(4 / 3) * (2 * rng.random() - 1))
    rows, columns = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
    if 0 < rows <= height and 0 < columns <= width:
      top = int(rng.random() * (height - rows + 1))
      left = int(rng.random() * (width - columns + 1))
      break
  else:
    rows = max(1, min(height, round(width * 4 / 3)))
    columns = max(1, min(width, round(height * 4 / 3)))
    top, left = (height - rows) // 2, (width - columns) // 2
  return _resize(image[top : top + rows, left : left + columns], size)


def _convert(image: Any, channels: int, name: str) -> Any:
  """Converts to 8 bits per channel without transparency."""
  module = pillow()
  if image.mode.startswith('I'):
    values = np.asarray(image)
    tags = getattr(image, 'tag_v2', {})  # SMaxSampleValue, MaxSampleValue.
    white = float(np.max(tags.get(341, tags.get(281, 65535))))
    if values.min() < 0 or values.max() > white:
      raise ValueError(f'its pixels are not from 0 to {white:.0f}')
    if white == 65535 and 0 < values.max() < 4096:
      logging.log_first_n(
          logging.WARNING,
          '%s has levels of grey up to %d, where white is 65535, and so is '
          'nearly black. If white is less, scale the values, or write a TIFF '
          'with MaxSampleValue.', 1, name, values.max(),
      )
    image = module.fromarray(np.round(values / (white / 255)).astype(np.uint8))
  if image.mode == 'F':
    raise ValueError('its pixels are real numbers of unknown range')
  bands = image.getbands()
  if 'A' in bands or 'a' in bands or 'transparency' in image.info:
    image = image.convert('RGBA')
    white = module.new('RGBA', image.size, 'white')
    image = module.alpha_composite(white, image)
  if channels == 3:
    return image.convert('RGB')
  if image.mode not in ('1', 'L', 'RGB', 'RGBA'):
    image = image.convert('RGB')  # Not every mode converts to grey.
  return image.convert('L')


def _resize(
    image: np.ndarray,
    size: int,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
  """Scales a part of an image with an antialiasing filter."""
  is_grey, module = image.shape[-1] == 1, pillow()
  picture = module.fromarray(image[..., 0] if is_grey else image)
  picture = picture.resize((size, size), module.Resampling.BILINEAR, box)
  pixels = np.asarray(picture)
  return pixels[..., np.newaxis] if is_grey else pixels
