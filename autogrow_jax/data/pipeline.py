"""From raw pixels to network inputs, on the device; and the batch order.

Everything here is a pure function that may run inside jit. The batch of step t
depends on the run's seed and on t only, so that neither growth, evaluation nor
a restart can shift it. Of text, the numbers of words are the inputs.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """Preprocessing and augmentation of images; hashable and JSON-able.

  Attributes:
    mean: per channel, subtracted from pixels scaled to [0, 1].
    std: per channel, divides pixels scaled to [0, 1].
    pad: pixels of black added on each side, in training and in evaluation.
    crop: largest shift of training images, pixels in each direction, filled
      with black: "pad by `crop` and crop at random". It precedes `pad`.
    flip: whether half of the training images are mirrored left to right.
    scale: training images with masks are scaled, about a random position, by a
      random factor from 1 / `scale` to `scale`.
    kind: 'images', or 'tokens' of text, which stay as they are.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  pad: int = 0
  crop: int = 0
  flip: bool = False
  scale: float = 1.0
  kind: str = 'images'

  def __post_init__(self):
    # JSON has lists in place of tuples.
    object.__setattr__(self, 'mean', tuple(map(float, self.mean)))
    object.__setattr__(self, 'std', tuple(map(float, self.std)))
    if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
      raise ValueError(
          'mean and std need one number per channel each, and std must be '
          f'above 0, got mean {self.mean} and std {self.std}.'
      )
    for name in ('pad', 'crop'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 0:
        raise ValueError(f'{name} must be a whole number >= 0, got {value!r}.')
    if not 1 <= self.scale < float('inf'):
      raise ValueError(f'scale must be at least 1, got {self.scale!r}.')


def preprocess(
    images: jax.Array,
    preprocessing: Preprocessing,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Pads raw pixels with black, scales them to [0, 1], normalises.

  Padding comes first, so pad pixels become -mean / std (as in the code of Wen
  et al. 2020).

  Args:
    images: uint8, (batch, height, width, channel); tokens stay as they are.
    preprocessing: padding, mean and std.
    dtype: type of the result, which is computed in float32.
  """
  _check_images(images, preprocessing)
  if preprocessing.kind == 'tokens':
    return images
  images = _pad(images, preprocessing.pad)
  # Explicit leading axes: the tests forbid rank promotion.
  channels = (1, 1, 1, -1)
  mean = jnp.asarray(preprocessing.mean, jnp.float32).reshape(channels)
  std = jnp.asarray(preprocessing.std, jnp.float32).reshape(channels)
  return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def augment_examples(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    preprocessing: Preprocessing,
    *,
    first: jax.typing.ArrayLike = 0,
) -> tuple[jax.Array, jax.Array]:
  """Shifts and mirrors training images at random; scales those with masks.

  The change of an image depends on `key` and on its position in the global
  batch only, and so not on how the batch is spread over devices.

  With masks, pixels from outside are black, and void in the mask; images are
  interpolated bilinearly, masks take the nearest pixel.

  Args:
    key: random key of the step.
    images: uint8, (batch, height, width, channel); tokens stay as they are.
    labels: (batch, ...); masks are (batch, height, width), where -1 is void.
    preprocessing: with `crop` and `flip`; for masks, `scale` and `flip`.
    first: position of `images[0]` in the global batch, where `images` is one
      device's part of it; may be traced.
  """
  _check_images(images, preprocessing)
  labels = labels.astype(jnp.int32)
  places = first + jnp.arange(len(images))
  if labels.ndim == 3:
    draw = functools.partial(_draw_frame, key, labels.shape[1:], preprocessing)
    rows, columns = jax.vmap(draw)(places)
    nearest = (jnp.round(x).astype(jnp.int32) for x in (rows, columns))
    return _bilinear(images, rows, columns), _take(labels, *nearest, -1)
  if preprocessing.crop or preprocessing.flip:
    images = _shift_and_mirror(key, images, preprocessing, places)
  return images, labels


def _shift_and_mirror(key, images, preprocessing, places):
  crop, flip = preprocessing.crop, preprocessing.flip
  batch, height, width, _ = images.shape

  def draw(place):
    image_key = jax.random.fold_in(key, place)
    shift = jax.random.randint(
        jax.random.fold_in(image_key, 0), (2,), 0, 2 * crop + 1
    )
    mirror = jax.random.bernoulli(jax.random.fold_in(image_key, 1)) & flip
    return shift, mirror

  shift, mirror = jax.vmap(draw)(places)
  columns = jnp.arange(width)[None]
  columns = jnp.where(mirror[:, None], width - 1 - columns, columns)
  rows = shift[:, :1] + jnp.arange(height)[None]
  columns = shift[:, 1:] + columns
  # One gather: on a CPU faster than a vmapped dynamic_slice and a reversal.
  return _pad(images, crop)[
      jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]
  ]


def _draw_frame(key, size, preprocessing, place):
  """Rows and columns of an image that become those of the new one."""
  key = jax.random.fold_in(key, place)
  limit = jnp.log(preprocessing.scale)
  factor = jnp.exp(
      jax.random.uniform(
          jax.random.fold_in(key, 0), minval=-limit, maxval=limit
      )
  )
  start = jax.random.uniform(jax.random.fold_in(key, 1), (2,))
  mirror = jax.random.bernoulli(jax.random.fold_in(key, 2))
  # A part of a larger image is visible; a smaller one lies within the frame.
  rows, columns = (
      (jnp.arange(side) + 0.5 + part * (factor - 1) * side) / factor - 0.5
      for side, part in zip(size, start)
  )
  return rows, jnp.where(mirror & preprocessing.flip, columns[::-1], columns)


def _bilinear(images, rows, columns):
  """Images at positions between pixels, in uint8."""
  total = jnp.zeros(images.shape, jnp.float32)
  for step in itertools.product((0, 1), repeat=2):
    corner, weights = [], []
    for place, one in zip((rows, columns), step):
      start = jnp.floor(place)
      corner.append((start + one).astype(jnp.int32))
      weights.append(1 - jnp.abs(place - start - one))
    total += (
        _take(images, *corner, 0)
        * weights[0][:, :, None, None]
        * weights[1][:, None, :, None]
    )
  return jnp.round(total).astype(jnp.uint8)


def _take(x, rows, columns, outside):
  """Rows and columns of each example, (batch, ...), or a value outside."""
  index = [
      jnp.where((place >= 0) & (place < size), place, size)
      for place, size in ((rows, x.shape[1]), (columns, x.shape[2]))
  ]
  batch = jnp.arange(len(x))[:, None, None]
  return x.at[batch, index[0][:, :, None], index[1][:, None, :]].get(
      mode='fill', fill_value=outside
  )


def steps_per_epoch(examples: int, batch_size: int) -> int:
  """Number of whole batches in an epoch.

  Unlike the paper, the last, incomplete batch of an epoch is dropped: it would
  need a second compilation, and batch norm would see padding. The permutation
  differs from epoch to epoch, and so do the images left out.
  """
  if not 1 <= batch_size <= examples:
    raise ValueError(
        f'Batch size {batch_size} must be from 1 to {examples}, the number of '
        'training examples.'
    )
  return examples // batch_size


def epoch_permutation(
    key: jax.Array, epoch: jax.typing.ArrayLike, examples: int
) -> jax.Array:
  """Order of the examples in an epoch, int32, (examples,).

  Args:
    key: random key of the data order, the same in all epochs.
    epoch: number of the epoch, from 0; may be traced.
    examples: number of training examples.
  """
  return jax.random.permutation(
      jax.random.fold_in(key, epoch), jnp.arange(examples, dtype=jnp.int32)
  )


def epoch_in_order(examples: int, batch_size: int) -> np.ndarray:
  """Order of the windows of a text, int32, the same in all epochs.

  Each row of a batch continues the row of the batch before it, on a stretch of
  the text of its own. The rest, which does not fill a batch, is left out.
  """
  steps = steps_per_epoch(examples, batch_size)
  windows = np.arange(steps * batch_size, dtype=np.int32)
  return windows.reshape(batch_size, steps).T.reshape(-1)


def batch_indices(
    permutation: jax.Array | np.ndarray,
    step_in_epoch: jax.typing.ArrayLike,
    batch_size: int,
) -> jax.Array | np.ndarray:
  """Indices of the examples in one batch, int32, (batch_size,).

  Args:
    permutation: from `epoch_permutation`; a NumPy copy stays on the host.
    step_in_epoch: from 0 to `steps_per_epoch` - 1; may be traced.
    batch_size: number of examples, over all devices.
  """
  start = step_in_epoch * batch_size
  if isinstance(permutation, np.ndarray):
    return permutation[start : start + batch_size]
  return jax.lax.dynamic_slice_in_dim(permutation, start, batch_size)


def _pad(images: jax.Array, pixels: int) -> jax.Array:
  return jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))


def _check_images(images: jax.Array, preprocessing: Preprocessing) -> None:
  channels, got = len(preprocessing.mean), f'{images.dtype} {images.shape}'
  if preprocessing.kind == 'tokens':
    if images.dtype != jnp.int32 or images.ndim != 2:
      raise ValueError(f'Tokens must be int32 (batch, step), got {got}.')
  elif images.dtype != jnp.uint8 or images.shape[3:] != (channels,):
    raise ValueError(
        'Images must be raw pixels, uint8 (batch, height, width, '
        f'{channels}), got {got}.'
    )
