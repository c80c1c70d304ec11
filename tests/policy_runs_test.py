"""Tests of whole runs under the policies that the paper's rule is not."""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest
import runs

from autogrow_jax.run import console
from autogrow_jax import policies
from experiments.studies import null_model

_SEQUENTIAL = {
    'policy': {
        'name': 'sequential', 'interval': 2, 'window': 2,
        'error_rate': '0.4', 'max_depths': [2, 1, 1],
    },
    'schedule': {'finetune_epochs': 1},
}


class Killed(Exception):
  """Ends a run without a word."""


def kill(at):
  """Within it, the `at`-th step of this process is the last one."""

  def at_step(number, arguments):
    del arguments
    if number == at:
      raise Killed

  return runs.watch_steps(at_step)


class RunTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(directory, 'run')


class SequentialRunTest(RunTest):

  @pytest.mark.slow
  def test_killed_and_continued_bit_for_bit(self):
    whole = self.workdir.with_name('whole')
    expected = runs.quietly(runs.tiny(whole, **_SEQUENTIAL))
    config = runs.tiny(self.workdir, **_SEQUENTIAL)
    # After the third epoch, so in the middle of an interval.
    with kill(3 * runs.STEPS + 5), self.assertRaises(Killed):
      runs.quietly(config)
    result = runs.quietly(config)
    self.assertEqual(runs.course(self.workdir), runs.course(whole))
    self.assertEqual(result['params_digest'], expected['params_digest'])
    self.assertGreater(result['growths'], 0)
    controls = null_model.of_run(self.workdir)
    self.assertEqual(controls['null_band']['runs'], 200)
    self.assertEqual(controls['floor'], '2-1-1')
    # Hits stay out of the history.
    history = (self.workdir / 'history.jsonl').read_text()
    self.assertNotIn('memory', history)
    self.assertNotIn('hits', history)

  def test_the_policy_saw_what_is_recorded(self):
    seen = []
    update = policies.Sequential.update

    def watch(policy, observation):
      answer = update(policy, observation)
      seen.append((observation, answer[1]))
      return answer

    with mock.patch.object(policies.Sequential, 'update', watch):
      changes = json.loads(json.dumps(_SEQUENTIAL))
      changes['policy']['max_epochs'] = 3
      runs.quietly(runs.tiny(self.workdir, **changes))
    epochs = [
        item
        for item in runs.records(self.workdir, 'epoch')
        if item['phase'] == 'growing'
    ]
    for item, (observation, _) in zip(epochs, seen, strict=True):
      self.assertEqual(item['correct'], observation.correct)
      self.assertEqual(observation.hits.sum(), item['correct'])
      self.assertLen(observation.hits, runs.HOLDOUT)


class OneShotRunTest(RunTest):

  def run_one_shot(self, initializer):
    return runs.quietly(
        runs.tiny(
            self.workdir,
            policy={
                'name': 'oneshot', 'interval': 2, 'target': [2, 2, 1],
                'max_depths': None,
            },
            method={'kind': 'autogrow', 'initializer': initializer},
            schedule={'growing': 'staircase', 'finetune_epochs': 1},
        )
    )

  def test_grows_all_at_once(self):
    result = self.run_one_shot('zero')
    self.assertEqual(result['found'], '2-2-1')
    self.assertEqual((result['growths'], result['growing_epochs']), (1, 2))
    self.assertEqual(result['epochs'], 3)
    self.assertEmpty(null_model.of_run(self.workdir))
    (growth,) = runs.records(self.workdir, 'grow')
    self.assertIsNone(growth['stage'])
    self.assertEqual(growth['block'], 's0b1, s1b1')
    self.assertEqual(growth['epoch'], 2)
    self.assertEqual(growth['depths'], [2, 2, 1])
    self.assertIn('append s0b1, s1b1, zero initialisation', growth['note'])
    self.assertEqual(growth['logits_change_eval'], 0)
    self.assertEqual(growth['logits_change_train'], 0)
    line = console.format_record(growth).splitlines()[0]
    self.assertStartsWith(line, 'grow at once by s0b1, s1b1 -> 2-2-1')
    rates = [
        item['learning_rate'] for item in runs.records(self.workdir, 'epoch')
    ]
    # Within two epochs drops come after one; one epoch is at the lowest rate.
    self.assertSequenceAlmostEqual(rates, [0.05, 0.0005, 0.0005])
    self.assertEqual(
        [item['name'] for item in runs.records(self.workdir, 'phase')],
        ['finetuning'],
    )

  def test_continues_after_the_growth(self):
    expected = self.run_one_shot('gauss')
    whole, self.workdir = self.workdir, self.workdir.with_name('killed')
    with kill(2 * runs.STEPS + 3), self.assertRaises(Killed):
      self.run_one_shot('gauss')
    result = self.run_one_shot('gauss')
    (growth,) = runs.records(self.workdir, 'grow')
    self.assertGreater(growth['logits_change_eval'], 0)
    self.assertEqual(runs.course(self.workdir), runs.course(whole))
    self.assertEqual(result['params_digest'], expected['params_digest'])

  @parameterized.parameters(
      (dict(target=None), 'needs a target'),
      (dict(target=[1, 1, 1]), 'must differ'),
      (dict(target=[2, 2]), 'number of stages'),
      (dict(target=[2, 0, 1]), 'target is'),
  )
  def test_refuses(self, changes, message):
    policy = {'name': 'oneshot', 'max_depths': None, **changes}
    with self.assertRaisesRegex(ValueError, message):
      runs.tiny(self.workdir, policy=policy)


if __name__ == '__main__':
  absltest.main()
