"""Tests of random masks, and of mask variables without a network.

Numbers are those of the invariants that the method's specification lists.
"""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import optimizers
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import method as sparsify
from autogrow_jax.methods.sparsify import space as space_lib
from experiments.studies.sparsify import dynamics
from experiments.studies.sparsify import random_masks
import tiny_masks


def narrow_vgg():
  return tiny_masks.full_size('vgg16', widths=(16, 32, 64, 64, 64))


class RandomMasksTest(absltest.TestCase):

  def test_random_samples_meet_the_budget(self):
    """Invariant 27: within 3 %, and all gates are the sample."""
    self.assertEqual(masks.probability_of(lambda p: p**2, 0.25), 0.5)
    architecture = narrow_vgg()
    method = random_masks.RandomMasks(target_sparsity=0.95)
    extra = method.extra(architecture)
    p = method.sparsify.annealing.probabilities(extra.trainable, extra.other)
    self.assertTrue(all(np.all(p == 1) for p in jax.tree.leaves(p)))
    self.assertEqual(extra.optimizer.learning_rate, 0)
    setting = dynamics.Setting(method.sparsify, architecture)
    state = dynamics.start(setting, 0)[0]
    seen = set()
    for number in range(2):
      state = state.replace(step=np.int32(number))
      change = tiny_masks.propose(method, architecture, state)
      state = dynamics.after(change, state)
      report = method.report(
          architecture, state.params['aux'], state.stats['method']
      )
      self.assertAlmostEqual(report['density_params'] / 0.05, 1, delta=0.03)
      seen.add(report['density_macs'])
    self.assertLen(seen, 2)


class DynamicsTest(parameterized.TestCase):
  """Penalty, temperatures, samples and optimizer together, without a network.
  """

  def test_steps_to_zero(self):
    """Invariant 20, within 5 %: in 95 % of the steps not there yet."""
    method = sparsify.Sparsify(
        target_sparsity=0.95, lambda_update='epoch',
        run=sparsify.Run(queries=100, steps=10_000),
    )
    architecture = tiny_masks.resnet20()
    scene = dynamics.Setting(method, architecture, s_off=-3.0)
    force = 0.5 * (0.05 - method.least_density(architecture))
    steps = masks.steps_to_zero(
        3.0, force * masks.effective_rate(0.1, 0.9)
    )
    state, worth = dynamics.start(scene, 0)
    for part, is_there in ((0.95, False), (1.05, True)):
      after = dynamics.train(
          scene, round(part * steps), state, worth, jnp.float32(0.1)
      )
      for s in after.params['aux']['channels'].values():
        self.assertTrue(np.all((s[1:] > 0) == is_there))

  def test_one_step_of_the_penalty(self):
    """Invariant 16: eta |lambda| beta p (1 - p), up or down."""
    for target in (0.9, 0.0001):
      method = sparsify.Sparsify(
          target_sparsity=1 - target, lambda_update='epoch',
          mask=optimizers.AuxConfig(0.1, momentum=0.0, weight_decay=0.0),
          run=sparsify.Run(queries=100, steps=10_000),
      )
      architecture = tiny_masks.resnet20()
      scene = dynamics.Setting(method, architecture, s_off=-1.0)
      state, worth = dynamics.start(scene, 0)
      after = dynamics.train(scene, 1, state, worth, jnp.float32(0.1))
      force = 0.5 * (target - method.least_density(architecture))
      for name, s in state.params['aux']['channels'].items():
        p = 1 / (1 + np.exp(-np.float64(s)))
        np.testing.assert_allclose(
            np.asarray(after.params['aux']['channels'][name]) - s,
            0.1 * force * p * (1 - p), rtol=2e-2, atol=2e-7,
        )

  @parameterized.parameters((narrow_vgg, 0.05), (tiny_masks.resnet20, 0.358))
  def test_the_expected_cost_meets_the_budget(self, network, target):
    """Invariant 21, within 1 %."""
    method = sparsify.Sparsify(
        target_sparsity=1 - target,
        run=sparsify.Run(queries=10, steps=10_000),
    )
    architecture = network()
    scene = dynamics.Setting(method, architecture)
    state, worth = dynamics.start(scene, 0)
    space = space_lib.of(architecture, method.grow)
    before, after = (
        space_lib.density(
            architecture, space,
            method.annealing.probabilities(
                state.params['aux'], state.stats['method']
            ),
            'params',
        )
        for state in (
            state,
            dynamics.train(scene, 10_000, state, worth, jnp.float32(0.1)),
        )
    )
    self.assertLess(before, 0.51 * target)
    self.assertAlmostEqual(after / target, 1, delta=0.01)

  def test_worth_decides(self):
    """With a gradient of the task, masks become sure, without one they don't.
    """
    method = sparsify.Sparsify(
        target_sparsity=0.642, run=sparsify.Run(queries=20, steps=8000)
    )
    sure, unsure = (
        dynamics.simulate(
            dynamics.Setting(method, tiny_masks.resnet20(), kappa=kappa)
        )[-1]
        for kappa in (0.2, 0.0)
    )
    self.assertLess(sure.ambiguous, 0.1)
    self.assertGreater(unsure.ambiguous, 0.5)
    self.assertAlmostEqual(sure.sampled / 0.358, 1, delta=0.1)
    self.assertAlmostEqual(sure.likely / 0.358, 1, delta=0.1)


if __name__ == '__main__':
  absltest.main()
