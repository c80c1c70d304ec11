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
    ('--method.ranking.learn.curvature=hessian', 'curvature is one of mc, rank1, got .hessian'),
    ('--strategy=magic', 'strategy is one of gauss_newton, random, .*magic'),
    ('--learn=later', 'learn is one of frozen, joint, got .later'),
    ('--final=never', 'final is one of continue, scratch, both, got .never'),
    ('--compare=found', 'compare names some of seed, uniform, not found'),
    ('--preset=table4/nothing', 'Unknown preset'),
    ('--method.limits.resource=watts', 'resource is one of params, macs, got .watts'),
    ('--method.ranking.compensation=magic', 'compensation is one of off, least_sq.*magic'),
    ('--seed_width=0', 'seed_width is at least 1, got 0'),
    ('--phases=0', 'phases is at least 1, got 0'),
    ('--epochs_per_phase=0', 'K is 0, max_epochs 6; 1 is the least'),
    ('--method.limits.growth_cap=0', 'growth_cap is positive, got 0'),
    ('--method.ranking.learn.damping=0', 'damping is positive, got 0'),
    ('--method.ranking.learn.sweeps=0', 'sweeps is at least 1, got 0'),
    ('--budget=50', 'budget is 50 params, but .* has 247 already'),
    ('--examples=1000', 'more than the 1077 training images; .* 512'),
    ('--examples=520', 'more than the 1077 training images; .* 512'),
    ('--strategy=random --learn=joint', 'random has no joint learning'),
    ('--prune=no', 'prune is one of on, off, got .no'),
    ('--batch_size=600', 'an epoch of 1077 training images has 1 of 600'),
    ('--learn=joint --parallel=pmap --num_devices=2', 'use --parallel=jit'),
    ('--network=deeplab', 'predicts a class for each pixel, but the data'),
    ('--dataset=topics --network=lstm2', 'a label for each word or pixel'),
    ('--learn=joint --method.ranking.learn.damping=1', 'damping means .*learn=joint, only to froz'),
    ('--finetune_epochs=1 --final=scratch', 'nothing for --finetune_epochs'),
)


class BinaryTest(absltest.TestCase):

  def test_a_run_and_its_continuation(self):
    with tempfile.TemporaryDirectory() as workdir:
      given = [
          *TINY, f'--workdir={workdir}', '--final=both', '--compare=uniform'
      ]
      first, again, other = runs.call(
          'gauss_newton', [given, given, [*given, '--method.ranking.learn.sweeps=1']]
      )
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
      self.assertEqual(other.status, 2)
      self.assertRegex(other.stderr, r'holds another run \(.*sweeps: 2 -> 1\)')
      self.assertTrue(os.path.exists(os.path.join(workdir, 'result.json')))

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

  def test_bad_input(self):
    with tempfile.TemporaryDirectory() as empty:
      outcomes = runs.call(
          'gauss_newton',
          [
              [*TINY, f'--workdir={empty}/{number}', *argument.split()]
              for number, (argument, _) in enumerate(BAD)
          ],
      )
      self.assertEmpty(os.listdir(empty))
    for (argument, message), outcome in zip(BAD, outcomes, strict=True):
      with self.subTest(argument):
        self.assertEqual(outcome.status, 2, outcome.stderr)
        self.assertLen(outcome.stderr.strip().split('\n'), 1)
        self.assertRegex(outcome.stderr, message)


if __name__ == '__main__':
  absltest.main()
