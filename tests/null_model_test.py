"""Tests of the null model: decisions, floor and null band."""

import dataclasses
import json

from absl.testing import absltest
from absl.testing import parameterized

from autogrow_jax import policies
from experiments.studies import null_model

# Stages, J, K and what a constant accuracy finds.
FLOORS = (
    (3, 100, 1, '35-35-35'),
    (3, 100, 2, '19-18-18'),
    (3, 100, 3, '13-13-12'),
    (3, 100, 4, '10-10-10'),
    (3, 100, 5, '9-8-8'),
    (3, 100, 6, '7-7-7'),
    (3, 100, 10, '5-5-5'),
    (3, 100, 12, '5-4-4'),
    (3, 100, 20, '4-3-3'),
    (3, 100, 30, '3-3-2'),
    (3, 100, 50, '3-2-2'),
    (4, 100, 1, '27-27-27-26'),
    (4, 100, 2, '15-14-14-14'),
    (4, 100, 3, '10-10-10-10'),
    (4, 100, 4, '8-8-8-8'),
    (4, 100, 5, '7-7-7-6'),
    (4, 100, 6, '6-6-6-5'),
    (4, 100, 10, '5-4-4-4'),
    (4, 100, 12, '4-4-4-3'),
    (4, 100, 20, '3-3-3-3'),
    (4, 100, 30, '3-3-2-2'),
    (4, 100, 50, '3-2-2-2'),
    (4, 30, 2, '6-6-5-5'),
    (4, 30, 3, '5-4-4-4'),
    (4, 30, 5, '4-3-3-3'),
)


def periodic(K=3, J=100, seed=(1, 1, 1), **kwargs):
  return policies.Periodic(
      interval=K, window=J, depths=seed, **{'threshold': '0.05', **kwargs}
  )


def convergent(K=4, seed=(1, 1, 1), **kwargs):
  return policies.Convergent(
      interval=K, threshold='0.05', depths=seed, **kwargs
  )


def sequential(K=3, J=100, seed=(1, 1, 1), **kwargs):
  return policies.Sequential(
      interval=K, window=J, depths=seed, **{'error_rate': '0.05', **kwargs}
  )


class FloorTest(parameterized.TestCase):

  @parameterized.parameters(*FLOORS)
  def test_floor(self, stages, window, interval, found):
    policy = periodic(interval, window, (1,) * stages)
    end = null_model.floor(policy)
    self.assertEqual(policies.format_depths(end.depths), found)
    self.assertEqual(end.epoch, interval * (sum(end.depths) - stages + 1))

  @parameterized.parameters(periodic, sequential)
  def test_seed_at_its_largest_depths(self, make):
    policy = make(seed=(2, 2), max_depths=(2, 2))
    self.assertEqual(null_model.floor(policy), policy)

  @parameterized.parameters((1, 4), (3, 100), (2, 5), (5, 5))
  def test_sequential(self, interval, window):
    policy = sequential(interval, window)
    # The first interval, in which nothing is right, is w before the last check
    # that finds a gain. Then three checks close a stage each.
    checks = 1 + -(-window // interval) + 3
    end = null_model.floor(policy)
    self.assertEqual(end.epoch, interval * checks)
    self.assertEqual(sum(end.depths) - 3, checks - 1)
    # As good from the start: the second check closes.
    end = null_model.floor(policy, trained=True)
    self.assertEqual((end.depths, end.epoch), ((2, 2, 2), 4 * interval))


class DecisionsTest(parameterized.TestCase):

  @parameterized.product(
      policy=(periodic(2, 9), convergent(2), sequential(2, 9)),
      trained=(False, True),
  )
  def test_growths_are_those_of_the_floor(self, policy, trained):
    end = null_model.floor(policy, trained=trained)
    found = list(null_model.decisions(policy, trained=trained))
    self.assertEqual(
        [policy.epoch for policy, _ in found], list(range(1, end.epoch + 1))
    )
    stages = [decision.stage for _, decision in found]
    self.assertEqual(tuple(1 + stages.count(s) for s in range(3)), end.depths)
    self.assertEqual(found[-1][1].action, 'finish')

  def test_of_other_policies(self):
    policy = policies.OneShot(interval=2, depths=(1, 1), target=(3, 2))
    actions = [d.action for _, d in null_model.decisions(policy)]
    self.assertEqual(actions, ['keep', 'grow'])
    self.assertEmpty(list(null_model.decisions(policies.Fixed())))


class NullBandTest(parameterized.TestCase):

  def test_noise_of_half_a_point(self):
    # 100 sqrt(0.7 * 0.3 / 8400) = 0.5 percentage points.
    policy = periodic(seed=(1, 1, 1, 1))
    band = null_model.null_band(policy, total=8_400, accuracy=0.7, runs=200)
    self.assertEqual(band.runs, 200)
    self.assertAlmostEqual(band.sigma, 0.5)
    for depth in band.depths:
      self.assertBetween(depth.p50, 13, 16)
    for value in (band.epochs, band.submodules, *band.depths):
      self.assertLessEqual(value.p10, value.p50)
      self.assertLessEqual(value.p50, value.p90)
    self.assertGreaterEqual(band.epochs.p10, null_model.floor(policy).epoch)
    self.assertEqual(band.epochs.p50, 3 * (band.submodules.p50 - 4 + 1))
    json.dumps(dataclasses.asdict(band))

  def test_no_noise_is_the_floor(self):
    policy = periodic(2, 10)
    band = null_model.null_band(policy, total=100, accuracy=1.0, runs=3)
    end = null_model.floor(policy)
    self.assertEqual(band.sigma, 0)
    self.assertEqual(band.epochs.p90, end.epoch)
    self.assertEqual(tuple(d.p10 for d in band.depths), end.depths)

  def test_convergent_and_limited(self):
    policy = convergent(4, max_epochs=50)
    band = null_model.null_band(policy, total=1_000, accuracy=0.6, runs=40)
    self.assertLessEqual(band.epochs.p90, 50)
    self.assertGreater(band.submodules.p10, 3)

  def test_common_noise_lengthens(self):
    arguments = dict(total=50_000, accuracy=0.94, runs=40)
    without = null_model.null_band(periodic(), **arguments)
    band = null_model.null_band(periodic(), common_sigma=0.5, **arguments)
    self.assertAlmostEqual(band.sigma, (without.sigma**2 + 0.25) ** 0.5)
    self.assertGreater(band.epochs.p50, without.epochs.p50)

  def test_sequential_stops_where_periodic_creeps_on(self):
    arguments = dict(total=500, accuracy=0.94, runs=40)
    creeping = null_model.null_band(periodic(2, 20), **arguments)
    for trained in (False, True):
      policy = sequential(2, 20)
      end = null_model.floor(policy, trained=trained)
      band = null_model.null_band(policy, trained=trained, **arguments)
      self.assertEqual(band.epochs.p50, end.epoch)
      self.assertLessEqual(band.epochs.p90, end.epoch + 2 * 2)
      self.assertLess(band.epochs.p90, creeping.epochs.p90)
    self.assertLess(band.epochs.p90, creeping.epochs.p10)

  def test_common_noise_raises_the_error_rate(self):
    without, band = (
        null_model.null_band(
            sequential(1, 3), total=4_000, accuracy=0.9, runs=60,
            common_sigma=sigma, trained=True,
        )
        for sigma in (0.0, 4.0)
    )
    self.assertEqual(without.epochs.p50, 4)
    self.assertGreater(band.epochs.p50, 4)

  @parameterized.parameters((100, 200), (10_000, 100), (50_000, 40))
  def test_default_runs(self, total, runs):
    policy = sequential(1, 1, max_epochs=1)
    band = null_model.null_band(policy, total=total, accuracy=0.5)
    self.assertEqual(band.runs, runs)


if __name__ == '__main__':
  absltest.main()
