"""Tests of the controls: decisions, floor and null band."""

import dataclasses
import json

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from autogrow_jax import controls
from autogrow_jax import paired
from autogrow_jax import policies

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
  def test_floor(self, stages, window, interval, found):  # 9
    policy = periodic(interval, window, (1,) * stages)
    result = controls.floor(policy)
    self.assertEqual(policies.format_depths(result.depths), found)
    self.assertEqual(
        result.epochs, interval * (sum(result.depths) - stages + 1)
    )

  def test_seed_at_its_caps(self):
    policy = periodic(seed=(2, 2), caps=(2, 2))
    self.assertEqual(controls.floor(policy), controls.Floor((2, 2), 0))
    policy = sequential(seed=(2, 2), caps=(2, 2))
    self.assertEqual(controls.floor(policy), controls.Floor((2, 2), 0))

  @parameterized.parameters((1, 4), (3, 100), (2, 5), (5, 5))
  def test_sequential(self, interval, window):
    policy = sequential(interval, window)
    # The first interval, in which nothing is right, is w before the last check
    # that finds a gain. Then three checks close a stage each.
    checks = 1 + -(-window // interval) + 3
    found = controls.floor(policy)
    self.assertEqual(found.epochs, interval * checks)
    self.assertEqual(sum(found.depths) - 3, checks - 1)
    # As good from the start: the second check closes.
    self.assertEqual(
        controls.floor(policy, trained=True),
        controls.Floor((2, 2, 2), 4 * interval),
    )


class DecisionsTest(parameterized.TestCase):

  def test_end_at_the_floor(self):
    found = list(controls.decisions(periodic()))
    self.assertEqual([p.epoch for p, _ in found], list(range(1, 109)))
    growths = [d.stage for _, d in found if d.action == 'grow']
    self.assertEqual(growths, [0, 1, 2] * 11 + [0, 1])
    self.assertEqual(found[-1][1].action, 'finish')

  @parameterized.product(
      make=(periodic, convergent, sequential), trained=(False, True)
  )
  def test_growths_are_those_of_the_floor(self, make, trained):
    policy = make(2) if make is convergent else make(2, 9)
    floor = controls.floor(policy, trained=trained)
    found = list(controls.decisions(policy, trained=trained))
    self.assertLen(found, floor.epochs)
    stages = [decision.stage for _, decision in found]
    self.assertEqual(tuple(1 + stages.count(s) for s in range(3)), floor.depths)

  def test_grows_at_once(self):
    policy = policies.OneShot(interval=2, depths=(1, 1), target=(3, 2))
    (_, first), (end, second) = controls.decisions(policy)
    self.assertEqual([first.action, second.action], ['keep', 'grow'])
    self.assertEqual(end.depths, (3, 2))

  def test_what_never_ends_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'every 2 epochs .* max_epochs'):
      next(controls.decisions(policies.EveryEpochs(2)))
    found = list(controls.decisions(policies.EveryEpochs(2, max_epochs=5)))
    self.assertLen(found, 5)

  def test_nothing_of_a_fixed_policy(self):
    self.assertEqual(list(controls.decisions(policies.Fixed((1, 1)))), [])


class NextGrowthTest(parameterized.TestCase):

  @parameterized.product(make=(periodic, convergent, sequential))
  def test_is_the_one_that_comes(self, make):
    policy = make(2) if make is convergent else make(2, 9)
    found = list(controls.decisions(policy, trained=True))
    rest = [decision for _, decision in found]
    for epoch, (policy, _) in enumerate(found, start=1):
      rest.pop(0)
      seen = policies.Observation(
          epoch=epoch, step=epoch, correct=1000, total=1000, loss_sum=0.0,
          cost=0, hits=paired.pack_hits(np.ones(1000, bool)),
      )
      want = [decision for decision in rest if decision.action == 'grow']
      self.assertEqual(
          controls.next_growth(policy, seen), want[0] if want else None
      )

  def test_none_of_a_policy_that_never_grows(self):
    seen = policies.Observation(
        epoch=1, step=1, correct=1, total=2, loss_sum=0.0, cost=0
    )
    self.assertIsNone(controls.next_growth(policies.Fixed((1, 1)), seen))


class NullBandTest(parameterized.TestCase):

  def test_invariant_35(self):
    band = controls.null_band(
        periodic(), total=10**6, accuracy=0.7, sigma=0.5, runs=200
    )
    self.assertLen(band.depths, 3)
    for depth in band.depths:
      self.assertBetween(depth.p50, 17, 21)
    self.assertEqual((band.runs, band.sigma), (200, 0.5))

  def test_binomial_noise(self):
    # 100 sqrt(0.7 * 0.3 / 8400) = 0.5 percentage points.
    band = controls.null_band(
        periodic(seed=(1, 1, 1, 1)), total=8_400, accuracy=0.7, runs=200
    )
    self.assertAlmostEqual(band.sigma, 0.5)
    for depth in band.depths:
      self.assertBetween(depth.p50, 13, 16)
    floor = controls.floor(periodic(seed=(1, 1, 1, 1)))
    for value in (band.epochs, band.submodules, *band.depths):
      self.assertLessEqual(value.p10, value.p50)
      self.assertLessEqual(value.p50, value.p90)
    self.assertGreaterEqual(band.epochs.p10, floor.epochs)
    self.assertEqual(band.epochs.p50, 3 * (band.submodules.p50 - 4 + 1))
    json.dumps(dataclasses.asdict(band))

  def test_no_noise_is_the_floor(self):
    policy = periodic(2, 10)
    floor = controls.floor(policy)
    for band in (
        controls.null_band(policy, total=100, accuracy=1.0, runs=3),
        controls.null_band(policy, total=100, accuracy=0.5, runs=3, sigma=0),
    ):
      self.assertEqual(band.sigma, 0)
      self.assertEqual(band.epochs.p90, floor.epochs)
      self.assertEqual(tuple(d.p10 for d in band.depths), floor.depths)

  def test_seed_decides(self):
    first, again, other = (
        controls.null_band(
            periodic(2, 20), total=1_000, accuracy=0.6, runs=40, seed=seed
        )
        for seed in (0, 0, 1)
    )
    self.assertEqual(first, again)
    self.assertNotEqual(first, other)

  def test_convergent_and_limited(self):
    policy = convergent(4, max_epochs=50)
    band = controls.null_band(policy, total=1_000, accuracy=0.6, runs=40)
    self.assertLessEqual(band.epochs.p90, 50)
    self.assertGreater(band.submodules.p10, 3)

  @parameterized.parameters(
      (dict(total=0, accuracy=0.5), 'is 0'),
      (dict(total=10, accuracy=74), '74'),
      (dict(total=10, accuracy=float('nan')), 'nan'),
      (dict(total=10, accuracy=0.5, runs=0), 'runs'),
      (dict(total=10, accuracy=0.5, sigma=-1), '-1'),
      (dict(total=10, accuracy=0.5, common_sigma=-1), 'Common sigma -1'),
  )
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      controls.null_band(periodic(), **arguments)

  def test_needs_a_policy_before_its_first_epoch(self):
    policy, _ = periodic().update(
        policies.Observation(
            epoch=1, step=1, correct=1, total=2, loss_sum=0.0, cost=0
        )
    )
    with self.assertRaisesRegex(ValueError, 'seen 1 epochs'):
      controls.floor(policy)

  def test_common_noise_lengthens(self):
    arguments = dict(total=50_000, accuracy=0.94, runs=40)
    without = controls.null_band(periodic(), **arguments)
    band = controls.null_band(periodic(), common_sigma=0.5, **arguments)
    self.assertAlmostEqual(band.sigma, (without.sigma**2 + 0.25) ** 0.5)
    self.assertGreater(band.epochs.p50, without.epochs.p50)


class SequentialBandTest(parameterized.TestCase):

  def test_stops_where_periodic_creeps_on(self):
    arguments = dict(total=500, accuracy=0.94, runs=40)
    creeping = controls.null_band(periodic(2, 20), **arguments)
    for trained in (False, True):
      policy = sequential(2, 20)
      floor = controls.floor(policy, trained=trained)
      band = controls.null_band(policy, trained=trained, **arguments)
      self.assertEqual(band.epochs.p50, floor.epochs)
      self.assertLessEqual(band.epochs.p90, floor.epochs + 2 * 2)
      self.assertLess(band.epochs.p90, creeping.epochs.p90)
    self.assertLess(band.epochs.p90, creeping.epochs.p10)
    self.assertEqual(band.sigma, creeping.sigma)

  def test_common_noise_raises_the_error_rate(self):
    bands = [
        controls.null_band(
            sequential(1, 3),
            total=4_000,
            accuracy=0.9,
            runs=60,
            common_sigma=sigma,
            trained=True,
        )
        for sigma in (0.0, 4.0)
    ]
    self.assertEqual(bands[0].epochs.p50, 4)
    self.assertGreater(bands[1].epochs.p50, 4)
    self.assertAlmostEqual(
        bands[1].sigma, (bands[0].sigma ** 2 + 16) ** 0.5
    )

  def test_default_runs(self):
    policy = sequential(1, 1, max_epochs=1)
    for total, runs in ((100, 200), (10_000, 100), (50_000, 40)):
      band = controls.null_band(policy, total=total, accuracy=0.5)
      self.assertEqual(band.runs, runs)

  def test_seed_decides(self):
    bands = [
        controls.null_band(
            sequential(1, 4), total=50, accuracy=0.6, runs=30, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    self.assertEqual(bands[0], bands[1])
    self.assertNotEqual(bands[0], bands[2])

  def test_refuses_sigma(self):
    with self.assertRaisesRegex(ValueError, 'common_sigma'):
      controls.null_band(sequential(), total=10, accuracy=0.5, sigma=1.0)


if __name__ == '__main__':
  absltest.main()
