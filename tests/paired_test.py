"""Tests of paired comparisons: packed hits and the exact sign test."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from autogrow_jax import paired


def p_value(gains, losses):
  before = np.array([0] * gains + [2] * losses + [1])
  return paired.p_value(before, np.ones_like(before))


class SignTestTest(parameterized.TestCase):

  @parameterized.parameters(*range(0, 25, 3))
  def test_equals_the_definition(self, gains):
    for losses in range(25):
      pairs = gains + losses
      ways = sum(math.comb(pairs, k) for k in range(gains, pairs + 1))
      self.assertAlmostEqual(p_value(gains, losses), ways / 2**pairs, 12)

  def test_error_rate(self):
    # Images that are as good before as after, of very different difficulty.
    rng = np.random.default_rng(0)
    repetitions, alpha, found = 4_000, 0.05, 0
    for _ in range(repetitions):
      accuracies = rng.beta(2, 0.3, size=400)
      found += paired.p_value(*rng.binomial(3, accuracies, (2, 400))) <= alpha
    spread = 4 * math.sqrt(alpha * (1 - alpha) / repetitions)
    self.assertLess(found / repetitions, alpha + spread)
    self.assertGreater(found / repetitions, 0.02)  # It is no empty test.


class HitsTest(parameterized.TestCase):

  @parameterized.parameters((1, 1), (7, 1), (8, 3), (9, 300), (1_000, 3))
  def test_counts(self, total, evaluations):
    hits = np.random.default_rng(total).random((evaluations, total)) < 0.7
    counts = paired.counts([paired.pack_hits(row) for row in hits])
    np.testing.assert_array_equal(counts[:total], hits.sum(0))
    self.assertFalse(counts[total:].any())

  def test_size(self):
    self.assertLen(paired.pack_hits(np.zeros(50_000, bool)), 8_336)


if __name__ == '__main__':
  absltest.main()
