"""Tests of paired comparisons: hits, tallies and the exact sign test."""

import base64
import fractions
import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import scipy.stats

from autogrow_jax import paired


def brute_force(gains, losses):
  pairs = gains + losses
  ways = sum(math.comb(pairs, k) for k in range(gains, pairs + 1))
  return fractions.Fraction(ways, 2**pairs)


class SignTestTest(parameterized.TestCase):

  def test_equals_the_definition(self):
    for gains in range(25):
      for losses in range(25):
        p_value = paired.p_value(gains, losses)
        self.assertIsInstance(p_value, fractions.Fraction)
        self.assertEqual(p_value, brute_force(gains, losses))

  @parameterized.parameters(
      (7, 1), (1, 7), (60, 40), (40, 60), (50, 50), (900, 100), (1040, 960),
      (3, 0), (0, 0), (25_300, 24_700), (24_700, 25_300),
  )
  def test_agrees_with_scipy(self, gains, losses):
    p_value = float(paired.p_value(gains, losses))
    expected = scipy.stats.binom.sf(gains - 1, gains + losses, 0.5)
    np.testing.assert_allclose(p_value, expected, rtol=1e-9)

  def test_the_boundary_is_exact(self):
    # 1/32 exactly; a float of a sum might fall on either side.
    self.assertEqual(paired.p_value(5, 0), fractions.Fraction(1, 32))
    self.assertEqual(paired.p_value(5, 1), fractions.Fraction(7, 64))

  def test_error_rate(self):
    # Images that are as good before as after, of very different difficulty.
    rng = np.random.default_rng(0)
    repetitions, alpha, found = 4_000, 0.05, 0
    for _ in range(repetitions):
      accuracies = rng.beta(2, 0.3, size=400)
      before, after = rng.binomial(3, accuracies, size=(2, 400))
      found += paired.p_value(*paired.gains_and_losses(before, after)) <= alpha
    spread = 4 * math.sqrt(alpha * (1 - alpha) / repetitions)
    self.assertLess(found / repetitions, alpha + spread)
    self.assertGreater(found / repetitions, 0.02)  # It is no empty test.


class TallyTest(parameterized.TestCase):

  @parameterized.parameters(
      (1, 1), (7, 1), (8, 3), (9, 4), (1_000, 3), (13, 300)
  )
  def test_counts(self, total, most):
    rng = np.random.default_rng(total)
    evaluations = rng.random((min(most, 20), total)) < 0.7
    tally = paired.empty_tally(total=total, most=most)
    for hits in evaluations:
      tally = paired.add_hits(
          tally, paired.pack_hits(hits), total=total, most=most
      )
    counts = paired.counts_of(tally, total=total, most=most)
    np.testing.assert_array_equal(counts, evaluations.sum(0))
    with self.assertRaises(ValueError):
      counts[0] = 1

  def test_counts_to_the_most(self):
    tally = paired.empty_tally(total=3, most=300)
    hits = paired.pack_hits(np.array([True, False, True]))
    for _ in range(300):
      tally = paired.add_hits(tally, hits, total=3, most=300)
    np.testing.assert_array_equal(
        paired.counts_of(tally, total=3, most=300), [300, 0, 300]
    )

  def test_size(self):
    tally = paired.empty_tally(total=50_000, most=3)
    self.assertLen(tally, 16_668)  # 2 bits in 50,000, 4/3 for base64.

  @parameterized.parameters(
      ('',), (None,), (3,), ('AAA',), ('AA=!',), ('AAAA',),
      (base64.b64encode(b'\x80\x80').decode(),),  # Counts 3 of 2.
      (base64.b64encode(b'\x10\x00').decode(),),  # A fourth example.
  )
  def test_refuses(self, tally):
    with self.assertRaisesRegex(ValueError, 'tally of 3 examples'):
      paired.counts_of(tally, total=3, most=2)

  def test_gains_and_losses(self):
    before, after = np.array([0, 3, 1, 2, 2]), np.array([1, 2, 1, 3, 3])
    self.assertEqual(paired.gains_and_losses(before, after), (3, 1))


class HitsTest(parameterized.TestCase):

  def test_possible(self):
    hits = paired.pack_hits(np.array([True] * 9 + [False]))
    self.assertEqual(hits, b'\xff\x80')
    paired.check_hits(hits, correct=9, total=10)

  @parameterized.parameters(
      (b'\xff\x80', 8, 10),
      (b'\xff', 8, 10),
      (b'\xff\x01', 9, 10),
      (b'', 0, 1),
      ('\xff\x80', 9, 10),
      (None, 9, 10),
  )
  def test_impossible(self, hits, correct, total):
    with self.assertRaisesRegex(ValueError, 'hits'):
      paired.check_hits(hits, correct=correct, total=total)


if __name__ == '__main__':
  absltest.main()
