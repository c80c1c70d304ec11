"""Tests of `experiments.morphisms` and of what it measures with."""

import json
import os
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest
import numpy as np
import runs

from autogrow_jax import data
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.run import trained
from experiments.studies.gauss_newton import calibration
from experiments.studies.gauss_newton import strategies
from experiments.studies.gauss_newton import subject

# Compiling takes longer than running here.
FAST_COMPILE = '--xla_backend_optimization_level=0'
CHANNELS = 7  # Of the tiny run's network.
BAD = (
    ('--study=estimates --trie=1', 'flag --trie; did you mean --tries'),
    ('--study=all', 'should be one of <estimates|strategies>'),
    ('--study=estimates --batch_size=0', 'batch_size is at least 1, got 0'),
    ('--study=estimates --scale=0', "scale is best or a positive .*got '0'"),
    ('--study=strategies --layer=stem', "'stem' .*; there are s0b0.out, s1b0"),
    ('--study=estimates --run=/nowhere', '/nowhere holds no run'),
)


class CalibrationTest(parameterized.TestCase):

  def test_a_line(self):
    x = np.array([-3.0, -1.0, 0.0, 2.0])
    found = calibration.calibration(x, 0.5 * x)
    self.assertAlmostEqual(found.pearson, 1)
    self.assertAlmostEqual(found.spearman, 1)
    self.assertAlmostEqual(found.slope, 0.5)
    self.assertAlmostEqual(found.estimated, -0.5)
    self.assertAlmostEqual(found.measured, -0.25)
    self.assertEqual(found.count, 4)

  def test_the_slope_goes_through_the_origin(self):
    found = calibration.calibration([1.0, 2.0], [2.0, 3.0])
    self.assertAlmostEqual(found.slope, (1 * 2 + 2 * 3) / (1 + 4))
    self.assertAlmostEqual(found.pearson, 1)

  def test_monotone(self):
    x = np.linspace(-2, 2, 9)
    found = calibration.calibration(x, -np.exp(3 * x))
    self.assertAlmostEqual(found.spearman, -1)
    self.assertBetween(found.pearson, -0.9, -0.5)

  def test_equal_values_share_a_rank(self):
    found = calibration.calibration([1, 1, 2, 3], [5, 7, 8, 9])
    # Ranks (0.5, 0.5, 2, 3) and (0, 1, 2, 3).
    self.assertAlmostEqual(found.spearman, 4.5 / np.sqrt(4.5 * 5))

  def test_constant_and_empty(self):
    for measured in ([1.0, 1.0, 1.0], [], [np.nan]):
      found = calibration.calibration(np.arange(len(measured)) * 1.0, measured)
      self.assertTrue(np.isnan(found.pearson) and np.isnan(found.spearman))
    self.assertEqual(found.count, 0)
    zero = calibration.calibration([0, 0], [1, 2])
    self.assertTrue(np.isnan(zero.slope))

  def test_what_is_not_finite_is_left_out(self):
    found = calibration.calibration([1, np.inf, 2, 3], [1, 1, np.nan, 3])
    self.assertEqual(found.count, 2)
    self.assertAlmostEqual(found.slope, 1)

  def test_other_lengths(self):
    with self.assertRaisesRegex(ValueError, r'\(2,\) and \(3,\)'):
      calibration.calibration([1, 2], [1, 2, 3])


class BinaryTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    cls.run_dir = os.path.join(folder.name, 'run')
    runs.quietly(
        runs.tiny(
            cls.run_dir,
            network={'name': 'mlp', 'widths': [3, 4]},
            policy={'name': 'fixed', 'max_depths': None},
            schedule={'learning_rate': 0.1, 'finetune_epochs': 3},
        )
    )

  def call(self, *calls):
    common = [f'--run={self.run_dir}', f'--compilation_cache={runs.CACHE}']
    with mock.patch.dict(os.environ, XLA_FLAGS=FAST_COMPILE):
      return runs.call('morphisms', [[*common, *given] for given in calls])

  def answer(self, name):
    path = pathlib.Path(self.run_dir, 'morphisms', name)
    return json.loads(path.read_text())

  @pytest.mark.slow
  def test_studies(self):
    outcomes = self.call(
        [
            '--study=estimates', '--scale=0.05', '--batch_size=90',
            '--method.ranking.learn.sweeps=1',
            f'--method.examples={runs.HOLDOUT}',
        ],
        [
            '--study=strategies', '--channels=2', '--tries=2',
            '--method.examples=100', '--batch_size=50',
        ],
    )
    for outcome in outcomes:
      self.assertEqual(outcome.status, 0, outcome.stderr)
    with self.subTest('estimates'):
      found = self.answer('estimates.json')
      self.assertEqual(found['learn']['sweeps'], 1)
      self.assertEqual(found['examples'], runs.HOLDOUT)
      rows = {(one['of'], one['on']): one for one in found['calibration']}
      self.assertEqual(rows['splits', 'training']['count'], CHANNELS)
      self.assertGreater(rows['splits', 'training']['pearson'], 0.98)
      self.assertBetween(rows['splits', 'training']['slope'], 0.9, 1.1)
      self.assertLen(found['points']['prunes']['held_out'], CHANNELS)
      self.assertIn('learning splits of 7 channels', outcomes[0].stderr)
      self.assertGreater(rows['prunes', 'training']['pearson'], 0.9)
      pearson, count = found['prunes_on_logarithmic_axes']['training']
      self.assertIn(
          f'Pearson {pearson:.3f} of the {count} that cost', outcomes[0].stdout
      )
      self.assertIn(
          f'{rows["splits", "training"]["slope"]:.3f}', outcomes[0].stdout
      )
    with self.subTest('strategies'):
      found = self.answer('strategies.json')['decreases']
      self.assertEqual(tuple(found), strategies.STRATEGIES)
      mean = {name: np.mean(one['learning']) for name, one in found.items()}
      self.assertGreater(mean['gauss_newton'], 0)
      self.assertGreater(mean['oracle'], max(mean['random'], mean['net2net']))
      self.assertLen(found['oracle']['judging'], 2)
      self.assertIn(f'{mean["oracle"]:+.2e}', outcomes[1].stdout)
    for name in ('estimates', 'strategies'):
      text = pathlib.Path(self.run_dir, 'morphisms', f'{name}.svg').read_text()
      self.assertStartsWith(text, '<svg')

  def test_bad_input(self):
    help_, *outcomes = self.call(['-h'], *runs.arguments_of(BAD))
    runs.check_help(self, help_, 'morphisms', 'study', 'tries')
    runs.check_refused(self, outcomes, BAD)

  def test_a_network_without_sites(self):
    network, dataset = self.load()
    nothing = sites.Survey((), (('mid', 'it is odd'),))
    with mock.patch.object(sites, 'survey', return_value=nothing):
      with self.assertRaisesRegex(ValueError, 'no channels .*mid: it is odd'):
        subject.prepare(network, dataset, examples=10, batch_size=5)

  def test_too_many_examples(self):
    network, dataset = self.load()
    with self.assertRaisesRegex(ValueError, '539, and as many .* 538: .* 1077'):
      subject.prepare(network, dataset, examples=539, batch_size=5)

  def test_examples_do_not_overlap(self):
    network, dataset = self.load()
    given = subject.prepare(network, dataset, examples=50, batch_size=20)
    self.assertLen(given.learning, 3)  # Of 16, so that all are equal.
    self.assertEqual(given.examples, 48)
    rows = lambda batches: {
        np.asarray(image).tobytes() for x, _ in batches for image in x
    }
    parts = [rows(b) for b in (given.learning, given.judging, given.holdout)]
    self.assertEqual([len(part) for part in parts], [48, 48, runs.HOLDOUT])
    self.assertLen(set.union(*parts), 96 + runs.HOLDOUT)

  def load(self):
    network = trained.load(self.run_dir)
    return network, data.load(network.config.data, seed=network.config.seed)


if __name__ == '__main__':
  absltest.main()
