"""Tests of whole runs that train a network in full, prune it, and train on."""

import dataclasses
import pathlib
import tempfile

from absl.testing import absltest
import pytest
import runs

from autogrow_jax import architecture as architecture_lib
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import trained
from autogrow_jax.methods.sparsify import method as sparsify
from experiments.studies.sparsify import pruning


def tiny(workdir, method, **changes):
  """A run of two dense epochs and one after the prune."""
  config = runs.tiny(
      workdir,
      network={'name': 'mlp', 'depths': [1, 1], 'widths': [16, 12], **changes},
      policy={'name': 'every', 'max_epochs': 2, 'max_depths': None},
      schedule={'finetune_epochs': 1},
      checkpoints={'every': '1'},
  )
  return dataclasses.replace(config, method=method)


class RunTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
        self.enter_context(tempfile.TemporaryDirectory())
    )

  def check(self, result, workdir, strategy):
    """Checks the files of a run; returns its growths."""
    growths = runs.records(workdir, 'grow')
    last = growths[-1]
    self.assertEqual(last['epoch'], 2)
    self.assertEqual(last['note'], f'prune by {strategy}')
    self.assertEqual(last['params_after'], result['params'])
    self.assertAlmostEqual(
        last['params_after'] / last['params_before'], 0.4, delta=0.03
    )
    self.assertEqual(
        [item['params'] for item in runs.records(workdir, 'epoch')],
        [last['params_before']] * 2 + [result['params']],
    )
    self.assertEqual(
        trained.load(workdir).architecture,
        architecture_lib.Architecture.from_json(result['architecture']),
    )
    return growths

  @pytest.mark.slow
  def test_morphnet(self):
    config = tiny(
        self.directory, pruning.Pruned('morphnet', 0.6),
        name='plain3net', depths=None, widths=[4, 6, 8],
    )
    growths = self.check(runs.quietly(config), self.directory, 'morphnet')
    self.assertLen(growths, 1)
    self.assertContainsSubset(
        {'stem', 's2b0.out'}, growths[0]['initializer']['left']
    )

  def test_soft_and_resume(self):
    """Killed before the prune, and after it."""
    config = tiny(self.directory / 'whole', pruning.Pruned('soft', 0.6))
    result = runs.quietly(config)
    growths = self.check(result, config.workdir, 'soft')
    (softened,) = runs.records(config.workdir, 'sample')
    self.assertEqual([softened['epoch'], growths[0]['epoch']], [1, 2])
    self.assertGreater(softened['logits_change_eval'], 0)
    killed = dataclasses.replace(config, workdir=str(self.directory / 'killed'))
    for steps in (20, 20):

      def die(number, unused_arguments, steps=steps):
        if number == steps:
          raise KeyboardInterrupt

      with runs.watch_steps(die), self.assertRaises(KeyboardInterrupt):
        runs.quietly(killed)
    resumed = runs.quietly(killed)
    self.assertEqual(resumed['params_digest'], result['params_digest'])
    self.assertEqual(runs.course(killed.workdir), runs.course(config.workdir))

  @pytest.mark.slow
  def test_direct(self):
    """Final widths of another run, drawn afresh, need no method."""
    origin = tiny(
        self.directory / 'origin',
        sparsify.Sparsify(
            target_sparsity=0.6, run=sparsify.Run(1, 2 * runs.STEPS)
        ),
    )
    found = runs.quietly(origin)
    self.assertLess(found['architecture']['sizes']['s0b0.out'], 16)
    config = config_lib.RunConfig(
        workdir=str(self.directory / 'direct'),
        network=config_lib.NetworkConfig('mlp'),
        policy=config_lib.PolicyConfig('fixed'),
        schedule=config_lib.ScheduleConfig(0.05, finetune_epochs=1),
        batch_size=64,
        init_from=origin.workdir,
        reinitialize=True,
    )
    result = runs.quietly(config)
    self.assertEqual(result['architecture'], found['architecture'])
    self.assertEqual(result['method'], 'fixed')


if __name__ == '__main__':
  absltest.main()
