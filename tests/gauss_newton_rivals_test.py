"""Tests of the rivals of Gauss-Newton, and of the true loss after splits."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import method
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.run import config as config_lib
from experiments.studies.gauss_newton import firefly
from experiments.studies.gauss_newton import gradmax
from experiments.studies.gauss_newton import rivals
from experiments.studies.gauss_newton import trials
import tiny_morphisms as tiny


class TrialsTest(parameterized.TestCase):

  @parameterized.parameters(
      ('basic3resnet', 's1'), ('mobilenet1', 's1b0.out')
  )
  def test_changes_are_those_after_surgery(self, family, axis):
    with jax.enable_x64(True):
      data = tiny.case(family)
      snapshot = data.snapshot
      (site,) = (s for s in data.model.sites if s.axis == axis)
      chosen = tiny.random_splits(data)
      found = trials.true_changes(
          data.architecture, site, data.trees, chosen[axis], [1, 2],
          [data.batch],
      )
      for unit, change in zip([1, 2], found, strict=True):
        growth = surgery.morph(
            data.architecture, *snapshot.arrays, chosen, {axis: [unit]}
        )
        want = snapshot.grown_loss(growth) - snapshot.loss
        self.assertAlmostEqual(change, want, places=9)

  def test_the_oracle_gains_by_each_unit_alone(self):
    data = tiny.case('mlp', dtype='f4')
    site, snapshot = data.model.sites[1], data.snapshot
    start = ranking.splits_lib.start(data.model, data.trees, snapshot.rng)
    split = trials.oracle(
        data.architecture, site, data.trees, start[site.axis],
        range(site.units), [data.batch], steps=5, learning_rate=0.01,
    )
    changes = trials.true_changes(
        data.architecture, site, data.trees, split, range(site.units),
        [data.batch],
    )
    self.assertLess(changes.max(), 1e-6)
    self.assertLess(changes.min(), -1e-4)


class RivalsTest(parameterized.TestCase):

  @parameterized.parameters('random', 'net2net', 'uniform')
  def test_copies_hardly_change_anything(self, name):
    data = tiny.case('plain3net', dtype='f4')
    snapshot = data.snapshot
    limits = selection.Limits(growth_cap=0.9)
    step = rivals.RIVALS[name]().step(snapshot, limits)
    growth = step.growth(snapshot)
    self.assertLess(abs(snapshot.grown_loss(growth) - snapshot.loss), 0.02)
    size = costs.params(data.architecture)
    self.assertBetween(costs.params(growth.target), 1.3 * size, 1.9 * size)
    for axis, units in step.splits.items():
      u = ranking.splits_lib.rows_of(step.parameters[axis].u, 'u')
      self.assertTrue(np.all(np.linalg.norm(u[units], axis=-1) > 0))
    if name == 'uniform':
      parts = [
          len(step.splits.get(site.axis, ())) / site.units
          for site in data.model.sites
      ]
      self.assertLess(max(parts) - min(parts), 0.7)

  def test_steepest_gains_what_it_says(self):
    """With smooth activations it would be exact; here in sign and order."""
    data = tiny.case('mlp', 64, 'f4')
    ranked = rivals.RIVALS['steepest']().rank(data.snapshot)
    gains = ranked.gains[np.isfinite(ranked.gains)]
    self.assertNotEmpty(gains)
    self.assertGreater(gains.min(), 0)
    for axis, split in ranked.splits.items():
      (site,) = (s for s in data.model.sites if s.axis == axis)
      kernels = data.trees.local(site).kernels(site.form.writers)
      weights = ranking.splits_lib.rows_of(kernels, 'u')[: site.units]
      u = ranking.splits_lib.rows_of(split.u, 'u')[: site.units]
      lengths = np.linalg.norm(u, axis=-1)
      np.testing.assert_allclose(
          lengths, 0.01 * np.linalg.norm(weights, axis=-1), rtol=1e-4
      )

  def test_what_cannot_be_done_is_named(self):
    data = tiny.case('basic3resnet', dtype='f4')
    for name in rivals.OF_ONE_WRITER:
      ranked = rivals.RIVALS[name]().rank(data.snapshot)
      self.assertIn('s0: written by 3 layers', ranked.refused)
      self.assertIn('s0', rivals.uncovered(name, data.model.sites))
      self.assertTrue(np.isnan(ranked.gains[:3]).all())

  def test_firefly_lowers_the_loss(self):
    data = tiny.case('mlp', 64, 'f4')
    snapshot = data.snapshot
    rival = firefly.Firefly(epochs=20, learning_rate=0.01)
    ranked = rival.rank(snapshot)
    units = {s.axis: list(range(s.units)) for s in data.model.sites}
    growth = surgery.morph(
        data.architecture, *snapshot.arrays, ranked.splits, units
    )
    change = snapshot.grown_loss(growth) - snapshot.loss
    self.assertLess(change, -0.01)
    # Contributions add up to the gain of all.
    self.assertAlmostEqual(-ranked.gains.sum() / change, 1, delta=0.15)

  @parameterized.parameters('mlp', 'plain3net')
  def test_gradmax_adds_channels_that_nothing_reads(self, family):
    data = tiny.case(family, dtype='f4')
    snapshot = data.snapshot
    ranked = gradmax.GradMax().rank(snapshot)
    self.assertTrue(ranked.one_sided)
    growth = surgery.morph(
        data.architecture, *snapshot.arrays, ranked.splits,
        {site.axis: [0] for site in data.model.sites}, one_sided=True,
    )
    self.assertAlmostEqual(snapshot.grown_loss(growth), snapshot.loss, places=5)
    self.assertTrue(np.isfinite(ranked.gains).any())

  def test_gradmax_has_the_largest_gradients(self):
    """The first channel's gain, where its ReLU is open for all examples."""
    data = tiny.case('mlp', 64, 'f4')
    _, found = data.signals()
    site = data.model.sites[0]
    gradients, _, is_alike = map(np.asarray, gradmax.outgoing_gradients(
        site.form, data.trees.local(site), found[site.axis]
    ))
    signal = found[site.axis]
    x = np.asarray(signal.x[0]).reshape(64, -1)
    want = np.asarray(signal.slope[0]).T @ x
    np.testing.assert_allclose(gradients, want, atol=1e-3)
    self.assertTrue(is_alike)

  def test_bad_settings(self):
    with self.assertRaisesRegex(ValueError, 'noise is positive, got 0'):
      rivals.RIVALS['net2net'](noise=0)

  @parameterized.parameters(*rivals.RIVALS)
  def test_a_configuration_names_its_kind(self, name):
    grower = method.GaussNewton(ranking=rivals.RIVALS[name]())
    config = config_lib.RunConfig(workdir='x', method=grower)
    again = config_lib.RunConfig.from_json(config.to_json())
    self.assertEqual(again, config)
    self.assertEqual(rivals.name_of(again.method.ranking), name)


if __name__ == '__main__':
  absltest.main()
