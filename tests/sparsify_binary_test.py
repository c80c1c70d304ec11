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
    ('--target_sparsity=0', 'above 0 and below 1, got 0'),
    ('--target_sparsity=1', 'above 0 and below 1, got 1'),
    ('--target_sparsity=0.999', 'smallest network.* at most 0.8724'),
    ('--budget=watts', 'budget is one of params, macs, got .watts'),
    ('--method.grow=depth', 'grow is one of channels, layers, both, got .depth'),
    ('--method.grow=layers', 'no layers that may be missing.*--depths'),
    ('--method.gate=input', 'gate is one of readers, filter, got .input'),
    ('--method.temperature=warm', 'temperature is one of structure, global'),
    ('--method.beta_final=0.5', 'beta_final is from 1 to 1000000.0, got 0.5'),
    ('--method.freeze=2', 'freeze is from 0 to 1, got 2'),
    ('--compare=seed', 'compare names some of full, direct, cost, not seed'),
    ('--epochs=0', 'at least 1'),
    ('--method=l1 --method.lambda1=1', 'lambda1 means nothing to --method=l1'),
    ('--method=direct', 'name that run with --init_from'),
    ('--init_from=nothing', 'init_from means nothing to --method=sparsify'),
    ('--method=morphnet', 'has no norms, whose scales morphnet needs'),
)


class BinaryTest(absltest.TestCase):

  def test_a_run_and_its_continuation(self):
    with tempfile.TemporaryDirectory() as workdir:
      given = [
          *TINY, f'--workdir={workdir}', '--compare=full,direct,cost',
          '--optimizer.accumulate=2',
      ]
      first, again, other = runs.call(
          'sparsify', [given, given, [*given, '--method.lambda1=1']]
      )
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
      self.assertEqual(other.status, 2)
      self.assertIn('lambda1: 0.5 -> 1.0', other.stderr)

  def test_bad_input(self):
    with tempfile.TemporaryDirectory() as parent:
      names = [f'{parent}/{number}' for number in range(len(BAD))]
      outcomes = runs.call(
          'sparsify',
          [
              [*TINY, *flags.split(), f'--workdir={name}']
              for (flags, _), name in zip(BAD, names, strict=True)
          ],
      )
      for (flags, message), outcome in zip(BAD, outcomes, strict=True):
        with self.subTest(flags):
          self.assertEqual(outcome.status, 2, outcome.stdout)
          (line,) = outcome.stderr.splitlines()
          self.assertRegex(line, f'^error: .*({message})')
      self.assertEqual(os.listdir(parent), [])


if __name__ == '__main__':
  absltest.main()
