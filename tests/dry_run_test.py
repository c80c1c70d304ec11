"""Tests for dry_run.py: both ways agree, and both find what is wrong."""

import dataclasses
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import runs

from autogrow_jax import data
from autogrow_jax import dry_run
from autogrow_jax.run import programs
from autogrow_jax.run import train
from autogrow_jax.run import trained

CONFIG = runs.tiny('never/written', policy={'max_depths': [2, 1, 1]})


def stand_in() -> data.Dataset:
  return data.stand_in(CONFIG.data, seed=0)


class WalkTest(parameterized.TestCase):

  def test_both_ways_agree(self):
    train.cache_compilations(runs.CACHE)
    full = list(dry_run.walk(CONFIG, stand_in()))
    shapes = list(dry_run.walk(CONFIG, stand_in(), shapes=True))
    self.assertEqual([stop.depths for stop in full], [(1, 1, 1), (2, 1, 1)])
    self.assertEqual(
        [dataclasses.replace(stop, tried=None) for stop in full], shapes
    )
    for stop in full:
      self.assertGreater(stop.tried.memory, 4 * stop.params)
      self.assertGreater(stop.tried.loss, 0)

  def test_the_loop_of_several_steps(self):
    train.cache_compilations(runs.CACHE)
    single = dataclasses.replace(
        CONFIG, policy=dataclasses.replace(CONFIG.policy, name='fixed')
    )
    config = dataclasses.replace(
        single, devices=dataclasses.replace(single.devices, steps_per_call=3)
    )
    with mock.patch.object(
        programs.Programs, 'train_step', autospec=True,
        side_effect=programs.Programs.train_step,
    ) as train_step:
      (loop,) = dry_run.walk(config, stand_in())
    *_, (_, _, arguments) = [call.args for call in train_step.mock_calls]
    self.assertIn((3, CONFIG.batch_size), [
        leaf.shape for leaf in arguments[2:] if hasattr(leaf, 'shape')
    ])
    (stop,) = dry_run.walk(single, stand_in())
    self.assertAlmostEqual(loop.tried.loss, stop.tried.loss, places=5)

  def test_shapes_compute_nothing(self):
    with programs.compilations() as spent:
      stops = list(
          dry_run.walk(
              dataclasses.replace(
                  CONFIG,
                  policy=dataclasses.replace(
                      CONFIG.policy, max_depths=(3, 3, 3)
                  ),
                  batch_size=72,  # As no other test has.
              ),
              stand_in(),
              shapes=True,
          )
      )
    self.assertEqual(spent.count, 0)
    self.assertLen(stops, 5)

  def test_fixed(self):
    config = dataclasses.replace(
        CONFIG, policy=dataclasses.replace(CONFIG.policy, name='fixed')
    )
    (stop,) = dry_run.walk(config, stand_in(), shapes=True)
    self.assertEqual((stop.epoch, stop.depths), (0, (1, 1, 1)))

  def test_a_step_that_changes_shapes(self):
    original = programs.train_step

    def step(*arguments):
      packed, meters = original(*arguments)
      return packed, {**meters, 'loss_sum': meters['loss_sum'][None]}

    with mock.patch.object(programs, 'train_step', step):
      with self.assertRaisesRegex(ValueError, 'resnet-1-1-1 changes shapes'):
        list(dry_run.walk(CONFIG, stand_in(), shapes=True))

  def test_a_checkpoint_of_other_shapes(self):
    original = trained.abstract_arrays

    def abstract_arrays(*arguments):
      arrays = original(*arguments)
      step = jnp.zeros((), jnp.float32)
      return {**arrays, 'state': arrays['state'].replace(step=step)}

    with mock.patch.object(trained, 'abstract_arrays', abstract_arrays):
      with self.assertRaisesRegex(ValueError, 'restored in other shapes'):
        list(dry_run.walk(CONFIG, stand_in(), shapes=True))


if __name__ == '__main__':
  absltest.main()
