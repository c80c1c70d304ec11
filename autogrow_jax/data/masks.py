"""Masks: a class for every pixel of an image.

A mask is a PNG of 8 bits, palette or grey, as large as its image, whose values
are class indices from 0; 255 is void, which does not count. A pair is an image
with its mask as the last channel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autogrow_jax.data import images

VOID = 255


def read(path: str) -> np.ndarray:
  """Decodes a mask: uint8, (height, width)."""
  return _opened(path, images.upright).astype(np.uint8)


def probe(path: str) -> tuple[int, int]:
  """(height, width) of a mask, from the head of its file."""
  return _opened(path, images.shown_size)


def frame(pair: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Brings a pair into the centre of a frame, which is black and void.

  A pair larger than (height, width) is scaled down and keeps its proportions.
  """
  factor = min(want / is_ for want, is_ in zip(size, pair.shape))
  if factor < 1:
    rows, columns = (max(1, round(factor * side)) for side in pair.shape[:2])
    pillow = images.pillow()
    kinds = [pillow.Resampling.BILINEAR] * (pair.shape[-1] - 1)
    planes = zip(np.moveaxis(pair, -1, 0), [*kinds, pillow.Resampling.NEAREST])
    resized = [
        np.asarray(pillow.fromarray(plane).resize((columns, rows), kind))
        for plane, kind in planes
    ]
    pair = np.stack(resized, -1)
  result = np.zeros((*size, pair.shape[-1]), np.uint8)
  result[..., -1] = VOID
  rows, columns = pair.shape[:2]
  top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
  result[top : top + rows, left : left + columns] = pair
  return result


def labels(mask: np.ndarray) -> np.ndarray:
  """Labels of masks, int16, in which void is -1."""
  return np.where(mask == VOID, np.int16(-1), mask.astype(np.int16))


def _opened(path: str, use: Callable[[Any], Any]) -> Any:
  """The result of a function of an open mask, or an error that names it."""
  pillow = images.pillow()
  with images.reading(path), pillow.open(path) as mask:
    kind = f'{mask.format} of the kind {mask.mode!r}'
    # Pillow's names for pictures whose values are indices or levels of grey.
    is_mask = mask.format == 'PNG' and mask.mode in ('1', 'L', 'P')
    result = use(mask) if is_mask else None
  if not is_mask:
    raise ValueError(
        f'{path} is a {kind}; a mask is a PNG of 8 bits, palette or grey, '
        f'whose values are class indices, and {VOID} for void.'
    )
  return result
