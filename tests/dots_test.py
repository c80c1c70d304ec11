"""Tests of the generated images of two pixels."""

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from autogrow_jax import data
from autogrow_jax.data import dots


class DotsTest(parameterized.TestCase):

  @parameterized.parameters(
      ('dots', {8, 12}, {10}, (20, 20, 1)),
      ('dots:3-4@8x20', {3, 5}, {4}, (8, 20, 1)),
      ('dots:3-4,15-16', {3, 5, 15, 17}, {4, 16}, (32, 32, 1)),
      ('dots:8-8', {8}, {8}, (16, 16, 1)),
  )
  def test_distances_tell_the_classes(self, name, even, odd, shape):
    dataset = data.load(data.DataConfig(name), seed=0)
    self.assertEqual(dataset.input_shape, shape)
    self.assertEqual(
        [len(dataset.train), len(dataset.holdout), len(dataset.read_test())],
        [dots.TRAIN, dots.HOLDOUT, dots.TEST],
    )
    for split in (dataset.train, dataset.holdout, dataset.read_test()):
      rows, columns = (x.reshape(-1, 2) for x in np.nonzero(split.images)[1:3])
      np.testing.assert_array_equal(rows[:, 0], rows[:, 1])
      distances = columns[:, 1] - columns[:, 0]
      for label, expected in enumerate((even, odd)):
        found = distances[split.labels == label]
        self.assertEqual(set(found.tolist()), expected)

  def test_a_single_pixel_says_nothing(self):
    """In both classes every column of a band is equally likely."""
    split = dots.Dots.parse('dots:8-10@8x20').draw('train')
    counts = [
        (split.images[split.labels == label] > 0).sum((0, 1, 3))
        for label in (0, 1)
    ]
    means = split.labels.size / 20, split.labels.size / 20
    for count, mean in zip(counts, means, strict=True):
      np.testing.assert_allclose(count, mean, atol=5 * mean**0.5)

  def test_always_the_same_but_for_the_holdout(self):
    first, again, other = (
        data.load(data.DataConfig('dots'), seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.train.images, again.train.images)
    self.assertFalse(
        np.array_equal(first.train_indices, other.train_indices)
    )
    np.testing.assert_array_equal(
        first.read_test().images, other.read_test().images
    )

  @parameterized.parameters('dots:8', 'dots:0-4', 'dots:3-4@8x7', 'dots:')
  def test_refuses(self, name):
    with self.assertRaisesRegex(ValueError, 'Data of dots are .*got'):
      data.load(data.DataConfig(name), seed=0)


if __name__ == '__main__':
  absltest.main()
