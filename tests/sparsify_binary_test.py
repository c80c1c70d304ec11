"""Tests of `experiments.sparsify`: a tiny run, and what it refuses."""

import os
import re
import tempfile

from absl.testing import absltest
import runs

from autogrow_jax.run import history as history_lib
from autogrow_jax.run import train
from autogrow_jax.run import trained

TINY = (
    '--network=mlp', '--depths=1-1', '--network.widths=8-8', '--epochs=2',
    '--target_sparsity=0.4', f'--compilation_cache={runs.CACHE}',
)

BAD = (
    ('--target_sparsty=0.1', 'did you mean --target_sparsity'),
    ('--method=l1 --method.lambda1=1', 'Unknown flag --method.lambda1'),
    ('--method=magic', 'should be one of <sparsify|random|.*>'),
    ('--backend=magic', 'should be one of <auto|masked|compact>'),
    ('--compare=seed', 'compare names some of full, direct, cost, not seed'),
    ('--target_sparsity=1', 'above 0 and below 1, got 1'),
    ('--target_sparsity=0.999', 'smallest network.* at most 0.8724'),
    ('--budget=watts', 'budget is one of params, macs, got .watts'),
    ('--method.grow=layers', 'no layers that may be missing.*--depths'),
    ('--method.freeze=2', 'freeze is from 0 to 1, got 2'),
    ('--epochs=0', '1 is the least'),
    ('--method=direct', 'name that run with --init_from'),
    ('--init_from=nothing', 'nothing holds no run'),
    ('--method=morphnet', 'has no norms, whose scales morphnet needs'),
)


class BinaryTest(absltest.TestCase):

  def test_a_run_and_its_continuation(self):
    with tempfile.TemporaryDirectory() as workdir:
      given = [
          *TINY, f'--workdir={workdir}', '--compare=full,direct,cost',
          '--optimizer.accumulate=2',
      ]
      help_, first, again, other, *refused = runs.call(
          'sparsify',
          [
              ['-h'],
              given,
              given,
              [*given, '--method.lambda1=1'],
              *runs.arguments_of(BAD, *TINY, f'--workdir={workdir}/bad'),
          ],
      )
      runs.check_help(
          self, help_, 'sparsify', 'workdir', 'target_sparsity', 'backend',
          'method.lambda1',
      )
      runs.check_refused(self, refused, BAD)
      self.assertEqual(other.status, 2)
      self.assertIn('lambda1: 0.5 -> 1.0', other.stderr)
      self.assertNotIn('bad', os.listdir(workdir))
      self.assertEqual(first.status, 0, first.stderr)
      self.assertIn('mlp-1-1 in full: 682 parameters', first.stderr)
      self.assertIn('60.00 % of the params were asked for', first.stdout)
      self.assertIn('wall time saved against the full network', first.stdout)
      self.assertLen(runs.records(workdir, 'sample'), 1)
      # Invariant 29: what is printed, times what was spent, is the full cost.
      (saved,) = re.findall('saved: (.*)x while growing', first.stdout)
      epochs = runs.records(workdir, 'epoch')
      self.assertEqual({record['phase'] for record in epochs}, {'growing'})
      self.assertAlmostEqual(
          float(saved) * sum(record['macs'] for record in epochs)
          / (len(epochs) * 656), 1, delta=0.01,
      )
      config = history_lib.read_json(f'{workdir}/config.json')
      self.assertEqual(config['method']['run']['accumulate'], 2)
      (end,) = runs.records(workdir, 'grow')
      self.assertLess(end['logits_change_eval'], 1e-5)
      result = train.read_result(workdir)
      sizes = result['architecture']['sizes']
      self.assertEqual(end['initializer']['widths'], {
          axis: sizes[axis] for axis in ('s0b0.out', 's1b0.out')
      })
      self.assertEqual(set(result['comparison']), {'full', 'direct', 'cost'})
      self.assertEqual(
          result['comparison']['direct']['params'], result['params']
      )
      self.assertEqual(trained.load(workdir).architecture.sizes, tuple(
          sorted(sizes.items())
      ))
      self.assertEqual(again.status, 0, again.stderr)
      self.assertEqual(train.read_result(workdir), result)


if __name__ == '__main__':
  absltest.main()
