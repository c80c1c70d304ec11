"""Tests of experiments.dry_run: both modes agree, and find what is wrong."""

import dataclasses
from unittest import mock

from absl.testing import absltest
import runs

from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax.run import checkpoint
from autogrow_jax.run import programs
from autogrow_jax.run import steps
from autogrow_jax.run import train
from experiments import dry_run

CONFIG = runs.tiny('never/written', policy={'max_depths': [2, 1, 1]})


def walk(config=CONFIG, *, shapes=True):
  dataset = data.stand_in(CONFIG.data, seed=0)
  return list(dry_run.walk(config, dataset, shapes=shapes))


class WalkTest(absltest.TestCase):

  def test_both_modes_agree(self):
    train.cache_compilations(runs.CACHE)
    full, shapes = walk(shapes=False), walk()
    self.assertEqual(
        [stop.architecture.depths for stop in full], [(1, 1, 1), (2, 1, 1)]
    )
    self.assertEqual(
        [dataclasses.replace(stop, step=None) for stop in full], shapes
    )
    for stop in full:
      params = costs.params(stop.architecture)
      self.assertGreater(stop.step.memory, 4 * params)
      self.assertGreater(stop.step.loss, 0)

  def test_shapes_compute_nothing(self):
    policy = dataclasses.replace(CONFIG.policy, max_depths=(3, 3, 3))
    config = dataclasses.replace(
        CONFIG, policy=policy, batch_size=72  # As no other test has.
    )
    with programs.compilations() as spent:
      stops = walk(config)
    self.assertEqual(spent.count, 0)
    self.assertLen(stops, 5)

  def test_fixed(self):
    policy = dataclasses.replace(CONFIG.policy, name='fixed')
    (stop,) = walk(dataclasses.replace(CONFIG, policy=policy))
    self.assertEqual((stop.epoch, stop.architecture.depths), (0, (1, 1, 1)))

  def test_a_step_that_changes_shapes(self):
    original = steps.train_step

    def step(*arguments):
      packed, meters = original(*arguments)
      return packed, {**meters, 'loss_sum': meters['loss_sum'][None]}

    with mock.patch.object(steps, 'train_step', step):
      with self.assertRaisesRegex(AssertionError, 'loss_sum'):
        walk()

  def test_a_checkpoint_that_changes(self):
    policy = dataclasses.replace(CONFIG.policy, name='fixed')
    with mock.patch.object(checkpoint, 'digest', side_effect=['one', 'other']):
      with self.assertRaisesRegex(ValueError, 'resnet-1-1-1 was not restored'):
        walk(dataclasses.replace(CONFIG, policy=policy), shapes=False)


if __name__ == '__main__':
  absltest.main()
