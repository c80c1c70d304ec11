"""Tiny image data sets with the schemas of real ones, for tests.

TFDS's own builders write them, so that names, versions, features and files are
those of the real data sets; only the examples are generated here. Neither
TensorFlow nor the network is needed.
"""

from collections.abc import Mapping, Sequence
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image

Examples = Sequence[tuple[bytes, int]]


def pixels(
    seed: int, shape: tuple[int, ...], *, label: int = 0
) -> np.ndarray:
  """A smooth image that is told by its pixels, brighter for larger labels."""
  rng = np.random.default_rng(seed)
  rows = np.linspace(0, 80, shape[0])[:, None]
  columns = np.linspace(0, 80, shape[1])[None]
  image = 20 + 15 * label + rows * rng.random() + columns * rng.random()
  if len(shape) == 3:
    image = image[..., None] * rng.uniform(0.7, 1, shape[2])
  return np.clip(image, 0, 255).astype(np.uint8)


def encode(
    image: np.ndarray, kind: str = 'PNG', mode: str | None = None
) -> bytes:
  """An image file.

  Args:
    image: uint8, (height, width), or with 3 or 4 channels.
    kind: as Pillow names it, such as 'PNG' or 'JPEG'.
    mode: that the image is converted to first, such as 'CMYK' or 'P'.

  Returns:
    Its bytes.
  """
  picture = Image.fromarray(image)
  if mode is not None:
    picture = picture.convert(mode)
  file = io.BytesIO()
  picture.save(file, kind)
  return file.getvalue()


def damage(encoded: bytes) -> bytes:
  """An image file that ends too early."""
  return encoded[: len(encoded) // 2]


def fixed(
    examples: int, classes: int, shape: tuple[int, int, int], *, seed: int = 0
) -> Examples:
  """PNG files of one size whose classes take turns."""
  is_grey = shape[-1] == 1
  return [
      (
          encode(
              pixels(
                  1000 * seed + index,
                  shape[:2] if is_grey else shape,
                  label=index % classes % 10,
              )
          ),
          index % classes,
      )
      for index in range(examples)
  ]


def odd(
    examples: int,
    classes: int,
    *,
    damaged: Sequence[int] = (),
    seed: int = 0,
) -> Examples:
  """JPEG files like ImageNet's: odd sizes, some grey, some CMYK.

  Args:
    examples: how many.
    classes: that take turns.
    damaged: the examples whose files end too early.
    seed: of sizes and pixels.

  Returns:
    The files and labels. Every fifth is grey, every seventh CMYK.
  """
  rng = np.random.default_rng(seed)
  result = []
  for index in range(examples):
    size = tuple(rng.integers(40, 130, 2).tolist())
    image = pixels(1000 * seed + index, (*size, 3), label=index % classes % 10)
    mode = 'L' if index % 5 == 1 else 'CMYK' if index % 7 == 2 else None
    encoded = encode(image, 'JPEG', mode)
    if index in damaged:
      encoded = damage(encoded)
    result.append((encoded, index % classes))
  return result


def prepare(
    name: str, data_dir: str | pathlib.Path, splits: Mapping[str, Examples]
) -> pathlib.Path:
  """Writes a TFDS data set of the real schema.

  Args:
    name: of TFDS, 'name' or 'name/config'.
    data_dir: where to prepare it.
    splits: name of a split -> its examples. TFDS shuffles them by their keys,
      'SPLIT_NUMBER.JPEG', always alike.

  Returns:
    The directory with its files.
  """
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  tfds.disable_progress_bar()
  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  image_key, label_key = builder.info.supervised_keys or ('image', 'label')
  features = builder.info.features
  labels = features[label_key] if label_key in features else None
  # pylint: disable-next=protected-access
  if labels and labels.num_classes and not labels._str2int:
    # Class names that a builder would learn from what it downloads.
    labels.names = [f'class_{number}' for number in range(labels.num_classes)]

  def examples(split: str):
    for index, (encoded, label) in enumerate(splits[split]):
      key = f'{split}_{index}.JPEG'
      example = {
          feature: _placeholder(kind, key)
          for feature, kind in features.items()
      }
      example[image_key] = io.BytesIO(encoded)
      if labels:
        example[label_key] = label
      yield key, example

  # The documented extension point of a builder.
  # pylint: disable-next=protected-access
  builder._split_generators = lambda dl_manager: {
      split: examples(split) for split in splits
  }
  builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)


def write_folder(
    root: pathlib.Path, files: Mapping[str, bytes | np.ndarray]
) -> pathlib.Path:
  """Writes files, and pixels as PNG, at paths below a folder."""
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        encode(content) if isinstance(content, np.ndarray) else content
    )
  return root


def _placeholder(feature: Any, key: str) -> Any:
  """A value for a feature that is neither the image nor its class."""
  kind = type(feature).__name__
  if kind == 'ClassLabel':
    return 0
  if kind == 'Image':
    return io.BytesIO(encode(np.zeros((4, 4), np.uint8)))
  if kind == 'Text':
    return key
  if kind == 'BBoxFeature':
    import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

    return tfds.features.BBox(ymin=0.0, xmin=0.0, ymax=1.0, xmax=1.0)
  raise ValueError(f'There is no example of a feature {kind}.')
