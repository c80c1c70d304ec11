"""Tests of `experiments.gauss_newton`: a tiny run, and what it refuses."""

import os
import tempfile

from absl.testing import absltest
import pytest
import runs

from autogrow_jax.run import train

TINY = (
    '--network=mlp', '--seed_width=3', '--phases=1', '--epochs_per_phase=1',
    '--finetune_epochs=1', f'--compilation_cache={runs.CACHE}',
)

BAD = (
    ('--seed_widht=3', 'flag --seed_widht; did you mean --seed_width'),
    ('--prune=no', 'Unknown flag --prune'),
    ('--strategy=random --method.ranking.learn.sweeps=1', 'flag .*sweeps'),
    ('--strategy=magic', 'should be one of <gauss_newton|random|.*>'),
    ('--learn=later', 'should be one of <frozen|joint>'),
    ('--final=never', 'should be one of <continue|scratch|both>'),
    ('--compare=found', 'compare names some of seed, uniform, not found'),
    ('--method.limits.resource=watts', 'resource is one of params, macs, got'),
    ('--method.ranking.compensation=magic', 'is one of off, least_'),
    ('--method.ranking.learn.curvature=x', 'is one of mc, rank1, got'),
    ('--seed_width=0', 'flag --seed_width=0: 0 is not a positive'),
    ('--phases=0', 'flag --phases=0: 0 is not a positive'),
    ('--epochs_per_phase=0', 'K is 0, max_epochs 6; 1 is the least'),
    ('--budget=50', 'budget is 50 params, but .* has 247 already'),
    ('--examples=520', 'more than the 1077 training images; .* 512'),
    ('--batch_size=600', 'an epoch of 1077 training images has 1 of 600'),
    ('--strategy=random --learn=joint', 'random has no joint learning'),
    ('--learn=joint --parallel=pmap --num_devices=2', 'use --parallel=jit'),
    ('--network=deeplab', 'predicts a class for each pixel, but the data'),
    ('--dataset=topics --network=lstm2', 'a label for each word or pixel'),
    ('--finetune_epochs=1 --final=scratch', 'nothing for --finetune_epochs'),
)


class BinaryTest(absltest.TestCase):

  def test_a_run_and_its_continuation(self):
    with tempfile.TemporaryDirectory() as workdir:
      given = [
          *TINY, f'--workdir={workdir}', '--final=both', '--compare=uniform'
      ]
      help_, first, again, other, *refused = runs.call(
          'gauss_newton',
          [
              ['-h'],
              given,
              given,
              [*given, '--method.ranking.learn.sweeps=1'],
              *runs.arguments_of(BAD, *TINY, f'--workdir={workdir}/bad'),
          ],
      )
      runs.check_help(
          self, help_, 'gauss_newton', 'workdir', 'seed_width', 'strategy',
          'method.ranking.learn.damping',
      )
      runs.check_refused(self, refused, BAD)
      self.assertEqual(other.status, 2)
      self.assertRegex(other.stderr, r'holds another run \(.*sweeps: 2 -> 1\)')
      self.assertNotIn('bad', os.listdir(workdir))
      self.assertEqual(first.status, 0, first.stderr)
      self.assertIn(
          '6 channels of 2 layers can be split: s0b0.out 3, s1b0.out 3',
          first.stderr,
      )
      (growth,) = runs.records(workdir, 'grow')
      report = growth['initializer']
      self.assertLess(report['estimated_change'], 0)
      self.assertLess(report['actual_change'], 0)
      self.assertIn(
          f'{report["estimated_change"]:+.4f} nats estimated, '
          f'{report["actual_change"]:+.4f} measured',
          first.stdout,
      )
      widths = report['widths']
      split, pruned = (
          sum(map(len, report[kind].values())) for kind in ('splits', 'prunes')
      )
      self.assertGreater(split, 0)
      self.assertEqual(sum(widths.values()), 6 + split - pruned)
      self.assertIn(f's0b0.out {widths["s0b0.out"]}', first.stdout)
      # The found widths afresh, and equal widths of about as many parameters.
      fixed = {
          name: train.read_result(os.path.join(workdir, f'fixed-{name}'))
          for name in ('scratch', 'uniform')
      }
      result = train.read_result(workdir)
      self.assertEqual(result['comparison'].keys(), fixed.keys())
      for name, other_result in fixed.items():
        self.assertIn(f'\n  {name}, fixed ', first.stdout)
        ratio = other_result['train_macs'] / result['train_macs']
        self.assertBetween(ratio, 0.7, 1.4)
      self.assertEqual(fixed['scratch']['params'], result['params'])
      self.assertNotEqual(
          fixed['scratch']['params_digest'], result['params_digest']
      )
      self.assertEqual(again.status, 0)
      self.assertIn('nats estimated', again.stdout)

  @pytest.mark.slow
  def test_learns_jointly(self):
    with tempfile.TemporaryDirectory() as workdir:
      (outcome,) = runs.call(
          'gauss_newton',
          [[*TINY, '--phases=4', '--learn=joint', f'--workdir={workdir}']],
      )
      self.assertEqual(outcome.status, 0, outcome.stderr)
      self.assertIn('nats estimated', outcome.stdout)
      # Of at least three attempts.
      found = train.read_result(workdir)['calibration']
      self.assertGreaterEqual(found['count'], 3)
      self.assertIn(f'Pearson {found["pearson"]:.3f}', outcome.stdout)


if __name__ == '__main__':
  absltest.main()
