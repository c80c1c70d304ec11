"""Generated images that take a known depth to tell apart.

An image has two bright pixels in one row, at one distance in class 0 and at
another in class 1. A stem of 3x3 and d basic blocks without stride see 3 + 4 d
pixels, so that distances above 2 + 4 d are all alike to them. Columns wrap
round at twice the larger distance: in both classes every column of that band is
equally likely, and a single pixel says nothing.
"""

import dataclasses
import re

import numpy as np

from autogrow_jax.data import splits

NAME = 'dots'
TRAIN, HOLDOUT, TEST = 2000, 1000, 2000  # Examples.


def is_one(name: str) -> bool:
  """Returns True for the name of such a data set."""
  return name.partition(':')[0] == NAME


@dataclasses.dataclass(frozen=True)
class Dots:
  """A set of such images.

  Attributes:
    pairs: distances in pixels, (class 0, class 1); an image is of one of the
      pairs, at random. Equal ones leave nothing to be learned.
    height: rows of an image.
    width: columns of an image.
  """

  pairs: tuple[tuple[int, int], ...]
  height: int
  width: int

  @classmethod
  def parse(cls, name: str) -> 'Dots':
    """Reads 'dots:8-10@20x20', of which 'dots' is short.

    Several pairs are 'dots:3-4,7-8'. Without '@HEIGHTxWIDTH', images are
    squares that just hold the pairs.

    Raises:
      ValueError: the name is of another form, or the image is too small.
    """
    match = re.fullmatch(
        r'dots(?::(\d+-\d+(?:,\d+-\d+)*)(?:@(\d+)x(\d+))?)?', name
    )
    if match:
      texts = (match[1] or '8-10').split(',')
      pairs = tuple(tuple(map(int, text.split('-'))) for text in texts)
      least = 2 * max(max(pair) for pair in pairs)
      height, width = (int(match[i] or least) for i in (2, 3))
      if min(map(min, pairs)) and height and width >= least:
        return cls(pairs, height, width)
    raise ValueError(
        f'Data of dots are dots:8-10 or dots:3-4,7-8@20x20, distances above 0 '
        'in images at least twice as wide as the largest, got '
        f'{name!r}.'
    )

  def draw(self, split: str) -> splits.Split:
    """Draws a split, always the same; the run's seed chooses the hold-out."""
    rng = np.random.default_rng(('train', 'test').index(split))
    size = TRAIN + HOLDOUT if split == 'train' else TEST
    labels = (np.arange(size) % 2).astype(np.int32)
    pairs = np.array(self.pairs)[rng.integers(len(self.pairs), size=size)]
    band = 2 * pairs.max(1)
    start = rng.integers(self.width - band + 1)
    first = rng.integers(band)
    second = (first + pairs[np.arange(size), labels]) % band
    row = rng.integers(self.height, size=size)
    images = np.zeros((size, self.height, self.width, 1), np.uint8)
    for column in (first, second):
      images[np.arange(size), row, start + column] = 255
    return splits.Split(images, labels)
