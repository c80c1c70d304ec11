"""Tests of learning splits beside the training of the weights."""

import dataclasses
import json
import os
import signal
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny_networks

from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import method
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import ranking as ranking_lib
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import train
from autogrow_jax.run import trained
from autogrow_jax import state as state_lib
from autogrow_jax import view
from experiments.studies.gauss_newton import joint
from experiments.studies.gauss_newton import rivals

SGD = optimizers.make(optimizers.SGD())


def seed():
  return networks.get('basic3resnet').seed(
      (2, 1, 1), input_shape=(8, 8, 1), classes=3,
      options={'widths': (3, 4, 4)},
  )


class JointTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.architecture = seed()
    grower = joint.JointGaussNewton(timing=joint.Timing(4, 0, 8))
    self.state = state_lib.create_state(
        self.architecture, SGD, key=jax.random.key(0), extra=grower.extra
    )
    generator = np.random.default_rng(0)
    self.x = generator.normal(size=(16, 8, 8, 1)).astype('f4')
    self.labels = generator.integers(0, 3, 16).astype('i4')
    whole = padding.Whole(self.architecture)
    layout = view.layout(self.architecture, computed=whole.computed)
    packed = view.pack(whole.take(self.state), layout)
    self.memory = packed.stats['method']
    self.weights = packed.params['weights']
    self.stats = packed.stats['network']
    self.step = jax.jit(
        lambda now, key, timing: joint.JointGaussNewton(timing=timing).learn(
            now,
            base.Network(view.Plain(), layout, jnp.asarray(self.x)),
            self.weights,
            self.stats,
            self.labels,
            key,
        ),
        static_argnums=2,
    )

  @pytest.mark.slow
  def test_learns_at_the_end_of_each_phase(self):
    """Steps 1 and 3 of phases of 2, each from a start; none from step 4 on."""
    timing = joint.Timing(phase=2, begin=1, end=4)
    now, moved = self.memory, []
    for number in range(6):
      before = now
      now = self.step(now, jax.random.key(number), timing)
      moved.append(
          any(
              np.any(one != other)
              for one, other in zip(
                  jax.tree.leaves(now['splits']),
                  jax.tree.leaves(before['splits']),
                  strict=True,
              )
          )
      )
      if moved[-1]:
        self.assertEqual(now['adam'][0].count, 1)
    self.assertEqual(moved, [False, True, False, True, False, False])

  def test_growth_finds_its_axes(self):
    """It has the shapes of any architecture, also through `growth.carry`."""
    grower = joint.JointGaussNewton(timing=joint.Timing(4, 0, 8))
    change = tiny_networks.split(self.architecture, 's0', [1])
    state, _ = state_lib.grow(
        self.state, change, SGD, key=jax.random.key(1), extra=grower.extra
    )
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    self.assertEqual(
        shapes(state.stats['method']),
        shapes(grower.extra(change.target).other),
    )

  def test_refuses(self):
    rival = method.GaussNewton(ranking=rivals.RIVALS['random']())
    with self.assertRaisesRegex(ValueError, 'ranks learned splits, not Random'):
      joint.JointGaussNewton(rival)
    with self.assertRaisesRegex(ValueError, 'within a phase of 2 steps'):
      joint.Timing(2, 3)
    # A binary knows the steps of a phase only when it knows the data.
    with self.assertRaisesRegex(ValueError, 'its timing: the steps of a phase'):
      joint.JointGaussNewton().extra(self.architecture)


def without_prunes(**settings):
  ranking = ranking_lib.LearnedSplits(compensation='off')
  return method.GaussNewton(ranking=ranking, **settings)


def jointly(phases):
  """Learns in all steps of phases of two epochs."""
  phase = 2 * runs.STEPS
  return joint.JointGaussNewton(
      without_prunes(), 0.05, joint.Timing(phase, 0, phases * phase)
  )


def tiny(workdir, grower):
  """Two phases of two epochs."""
  return dataclasses.replace(
      runs.tiny(workdir),
      network=config_lib.NetworkConfig('mlp', widths=(4, 4)),
      policy=config_lib.PolicyConfig('every', interval=2, max_epochs=4),
      method=grower,
  )


class RunTest(parameterized.TestCase):

  def test_growing_ends_when_nothing_more_may_grow(self):
    with tempfile.TemporaryDirectory() as workdir:
      limits = selection.Limits(growth_cap=1e-9)
      config = tiny(workdir, without_prunes(limits=limits))

      def at_step(number, arguments):
        del arguments
        if number == 40:  # Of the third epoch, after the end of growing.
          os.kill(os.getpid(), signal.SIGTERM)

      with runs.watch_steps(at_step), self.assertRaises(train.Interrupted):
        runs.quietly(config)
      runs.quietly(config)
      (skip,) = runs.records(workdir, 'skip')
      (phase,) = runs.records(workdir, 'phase')
      epochs = runs.records(workdir, 'epoch')
    self.assertEqual((skip['epoch'], phase['epoch']), (2, 2))
    self.assertLen(epochs, 2 + config.schedule.finetune_epochs)

  @parameterized.parameters(without_prunes(), jointly(phases=2))
  @pytest.mark.slow
  def test_continues_bit_for_bit(self, grower):
    """After a stop while splits are learned, and after one behind a growth."""
    with tempfile.TemporaryDirectory() as folder:
      digests = []
      for name, stops in (('all', ()), ('parts', (20, 40))):
        config = tiny(os.path.join(folder, name), grower)
        for stop in stops:

          def at_step(number, arguments, stop=stop):
            del number
            if int(arguments[0].step) == stop:
              os.kill(os.getpid(), signal.SIGTERM)

          with runs.watch_steps(at_step):
            with self.assertRaises(train.Interrupted):
              runs.quietly(config)
        digests.append(runs.quietly(config)['params_digest'])
        self.assertNotEmpty(runs.records(config.workdir, 'grow'))
    self.assertEqual(*digests)

  @pytest.mark.slow
  def test_learns_beside_the_weights(self):
    """A run grows by what it learned, and can be read from its directory."""
    with tempfile.TemporaryDirectory() as workdir:
      config = tiny(workdir, jointly(phases=1))
      policy = dataclasses.replace(config.policy, max_epochs=2)
      config = dataclasses.replace(config, policy=policy)
      stored = json.loads(json.dumps(config.to_json()))
      self.assertEqual(config_lib.RunConfig.from_json(stored), config)
      result = runs.quietly(config)
      self.assertEqual(result['method'], 'jointgaussnewton')
      (record,) = [
          r
          for r in runs.records(workdir)
          if r['event'] in ('grow', 'skip')
      ]
      self.assertEqual(record['event'], 'grow')
      report = record['initializer']
      self.assertLess(report['estimated_change'], 0)
      self.assertLess(report['actual_change'], 0)
      sites.survey.cache_clear()  # As in another process.
      network = trained.load(workdir)
      self.assertEqual(
          network.architecture.to_json()['sizes'],
          result['architecture']['sizes'],
      )
      again = runs.quietly(config)
      self.assertEqual(again['params_digest'], result['params_digest'])


if __name__ == '__main__':
  absltest.main()
