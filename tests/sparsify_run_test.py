"""Tests of whole runs with `Sparsify`."""

import dataclasses
import json
import os
import pathlib
import signal
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from autogrow_jax.run import config as config_lib
from autogrow_jax.run import history as history_lib
from autogrow_jax import policies
from autogrow_jax.run import train
from autogrow_jax.run import trained
from autogrow_jax.methods import base
from autogrow_jax.methods.sparsify import method as sparsify
from experiments.studies.sparsify import random_masks
import runs

GROWING, AFTER = 2, 1  # Epochs.
_RUN = {
    'network': {'name': 'mlp', 'widths': [24, 16], 'depths': [1, 3]},
    'policy': {'name': 'every', 'max_epochs': GROWING, 'max_depths': None},
    'schedule': {'finetune_epochs': AFTER},
    'method': {
        'kind': 'sparsify',
        'grow': 'both',
        'lambda1': 2.0,
        'lambda2': 1.0,
        'run': {'queries': GROWING, 'steps': GROWING * runs.STEPS},
    },
}


@dataclasses.dataclass(frozen=True)
class Decided(sparsify.Sparsify):
  """All is far from 0, so that samples do not change: half is there."""

  def extra(self, architecture):
    s, memory, optimizer = super().extra(architecture)
    q = {
        'channels': {
            name: np.arange(leaf.size) % 2 == 0
            for name, leaf in s['channels'].items()
        },
        'layers': {
            name: np.array(number > 0)
            for number, name in enumerate(s['layers'])
        },
    }
    far = lambda q: np.where(q, 20, -20).astype('f4')
    memory = {**memory, 'q': q, 'grown': q}
    return base.Extra(jax.tree.map(far, q), memory, optimizer)


def _interrupt(step):
  """For `runs.watch_steps`: a signal that stops the run at a step."""
  def at_step(count, unused_arguments):
    if count == step:
      os.kill(os.getpid(), signal.SIGTERM)

  return at_step


class RunTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(directory, 'run')

  def config(self, name='', **changes):
    # pylint: disable-next=protected-access
    return runs.tiny(f'{self.workdir}{name}', **runs._merge(_RUN, changes))

  def result(self, name='', **changes):
    return runs.quietly(self.config(name, **changes))

  def records(self, name='', event=None):
    return runs.records(f'{self.workdir}{name}', event)

  def decided(self, name, **changes):
    """A run with the same sample all the time."""
    config = self.config(name, **changes)
    method = Decided(**{
        field.name: getattr(config.method, field.name)
        for field in dataclasses.fields(sparsify.Sparsify)
    })
    return runs.quietly(
        dataclasses.replace(
            config,
            policy=config_lib.PolicyConfig(
                'policies:EveryEpochs', max_epochs=GROWING
            ),
        ),
        method=method,
        policy=policies.EveryEpochs(1, GROWING),
    )

  def test_continues_bit_for_bit(self):
    self.check_continues('compact')

  @pytest.mark.slow
  def test_continues_bit_for_bit_masked(self):
    self.check_continues('masked')

  def check_continues(self, backend):
    """In the middle of an epoch, and between two samples."""
    want = self.result('undisturbed', method={'backend': backend})
    at = (runs.STEPS, 2 * runs.STEPS - 3)
    for before, stop in zip((0, *at), at):
      with runs.watch_steps(_interrupt(stop - before)):
        with self.assertRaises(train.Interrupted):
          self.result('stopped', method={'backend': backend})
    got = self.result('stopped', method={'backend': backend})
    self.assertEqual(got['params_digest'], want['params_digest'])
    self.assertEqual(got['train_macs'], want['train_macs'])
    self.assertEqual(
        runs.course(f'{self.workdir}stopped'),
        runs.course(f'{self.workdir}undisturbed'),
    )
    samples = self.records('undisturbed', 'sample')
    self.assertLen(samples, GROWING - 1)
    changed = [
        sum(record['initializer'][f'channels_{what}']
            for what in ('grown', 'reattached', 'detached'))
        for record in samples
    ]
    self.assertGreater(min(changed), 0)
    # Nothing changed at the end but what had a gate without a shortcut.
    epochs = self.records('undisturbed', 'epoch')
    (end,) = self.records('undisturbed', 'grow')
    self.assertEqual(epochs[-1]['params'], end['params_after'])
    self.assertEqual(end['params_before'], epochs[-2]['params'])
    self.assertEqual(end['params_before'], want['params'])
    self.assertLess(epochs[0]['params'], want['params'])
    # Invariant 29: what training cost is what was there in each epoch.
    images = runs.STEPS * 64
    self.assertEqual(
        want['train_macs'], 3 * images * sum(r['macs'] for r in epochs)
    )

  @pytest.mark.slow
  def test_views_and_devices_agree(self):
    self.check_agree(
        {},
        ('compact', {}),
        ('masked', {}),
        ('compact', {'parallel': 'pmap', 'num_devices': 4}),
    )

  @pytest.mark.slow
  def test_views_and_devices_agree_with_norms(self):
    # In pmap mode, batch norm would see other batches.
    self.check_agree(
        {
            'network': {
                'name': 'basic3resnet', 'depths': [1, 1, 3],
                'widths': [4, 8, 16],
            },
            'schedule': {'learning_rate': 0.01},
        },
        ('compact', {}),
        ('masked', {}),
        ('compact', {'parallel': 'jit', 'num_devices': 4}),
    )

  def check_agree(self, changes, *ways):
    """Runs with one sample all the time say the same, in every epoch."""
    values = []
    for number, (backend, devices) in enumerate(ways):
      name = str(number)
      result = self.decided(
          name, **changes, method={'backend': backend}, devices=devices
      )
      epochs = self.records(name, 'epoch')
      values.append(
          [record[key] for record in epochs for key in ('loss', 'train_loss')]
      )
      self.assertLen([r for r in epochs if 'units' in r], GROWING)
      last = self.records(name, 'grow')[-1]
      self.assertEqual(last['depths'][-1], 2)
      self.assertLess(last['logits_change_eval'], 1e-5)
      self.assertLess(last['logits_change_train'], 1e-5)
      self.assertEqual(last['params_before'], last['params_after'])
      self.assertEqual(result['params'], last['params_after'])
    for others in values[1:]:
      np.testing.assert_allclose(others, values[0], rtol=1e-4)

  @parameterized.parameters(
      {'devices': {'precision': 'bfloat16'}, 'optimizer': {'accumulate': 2}},
      {'method': {'final': 'threshold', 'freeze': 0.3, 'budget': 'macs'}},
  )
  @pytest.mark.slow
  def test_other_ways(self, **changes):
    self.check_run(**changes)

  @parameterized.parameters(
      {
          'optimizer': {'clip_norm': 1.0},
          'method': {
              'relaxation': 'gumbel', 'gate': 'filter', 'grow': 'channels',
              'lambda_update': 'epoch', 'temperature': 'global',
          },
      },
  )
  @pytest.mark.slow
  def test_still_other_ways(self, **changes):
    self.check_run(**changes)

  @pytest.mark.slow
  def test_random_masks(self):
    method = random_masks.RandomMasks(
        grow='layers', run=self.config().method.run
    )
    self.check_run(method)
    config = history_lib.read_json(f'{self.workdir}/config.json')
    self.assertEqual(
        config_lib.RunConfig.from_json(config).method, method
    )

  def check_run(self, method=None, **changes):
    """It learns, and leaves the network that it says."""
    config = self.config(**changes)
    if method is not None:
      config = dataclasses.replace(config, method=method)
    result = runs.quietly(config)
    self.assertEqual(result['epochs'], GROWING + AFTER)
    epochs = self.records(event='epoch')
    self.assertLess(epochs[-1]['train_loss'], epochs[0]['train_loss'])
    network = trained.load(self.workdir)
    self.assertEqual(
        sum(leaf.size for leaf in jax.tree.leaves(network.weights)),
        result['params'],
    )
    for record in epochs[:GROWING]:
      self.assertBetween(record['expected_density'], 1e-9, 1)
      self.assertBetween(record['ambiguous'], 0, 1)

  def test_is_told_as_json(self):
    config = self.config()
    text = json.dumps(config.to_json())
    self.assertEqual(config_lib.RunConfig.from_json(json.loads(text)), config)
    self.assertIsInstance(config.method, sparsify.Sparsify)
    self.assertEqual(config.method.run.steps, GROWING * runs.STEPS)


if __name__ == '__main__':
  absltest.main()
