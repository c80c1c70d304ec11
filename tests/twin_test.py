"""Tests of the policy that compares a network with its ungrown twin."""

import json
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import policy_runs_test
import runs

from autogrow_jax import policies

TOTAL = 1000
RUN = {
    'policy': {
        'name': 'twin', 'interval': 2, 'error_rate': '1e-30',
        'max_depths': [2, 1, 1],
    },
    'schedule': {'finetune_epochs': 1},
}


def twin(seed=(1,), **settings):
  settings = {'interval': 2, 'error_rate': '0.05'} | settings
  return policies.Twin(depths=seed, **settings)


def play(rng, policy, accuracy):
  """Runs a policy to its end, on networks that know images at random.

  Args:
    rng: source of noise.
    policy: policy at its start.
    accuracy: fraction by depths; every image has a difficulty of its own, and
      each epoch draws anew which ones are right.

  Returns:
    The policy at its end, and all decisions to take something back.
  """
  difficulty = rng.normal(0, 3, TOTAL)
  draw = lambda depths: (
      rng.random(TOTAL) < 1 / (1 + np.exp(difficulty - accuracy(depths)))
  )
  taken_back = []
  while not policy.finished:
    # Stored and restored, as a run does it.
    policy = type(policy).from_json(json.loads(json.dumps(policy.to_json())))
    twin_hits = None if policy.before is None else draw(policy.before)
    hits = draw(policy.depths)
    epoch = policy.epoch + 1
    policy, decision = policy.update(
        policies.Observation(
            epoch, epoch, int(hits.sum()), TOTAL, 0.0, 0, hits, twin_hits
        )
    )
    if decision.twin == 'back':
      taken_back.append((epoch, decision.closed))
  return policy, taken_back


class TwinTest(parameterized.TestCase):

  @parameterized.parameters(1, 2, 4)
  def test_level(self, interval):
    """Where depth does nothing, a growth is kept by chance alone."""
    rng, alpha, runs_ = np.random.default_rng(0), 0.1, 300
    ends = [
        play(rng, twin(interval=interval, error_rate=str(alpha)), lambda _: 2)
        for _ in range(runs_)
    ]
    kept = np.mean([end.depths != (1,) for end, _ in ends])
    self.assertLess(kept, alpha + 4 * (alpha / runs_) ** 0.5)
    self.assertGreater(kept, alpha / 4)  # It is no empty test.

  @parameterized.parameters((0, (1,)), (1, (1,)), (2, (4,)))
  def test_power_on_a_plateau(self, patience, found):
    """Three blocks together help; the last of them is the one that pays."""
    rng = np.random.default_rng(1)
    policy = twin(patience=patience, error_rate='0.001', max_depths=(9,))
    end, taken_back = play(rng, policy, lambda d: 1 + 2 * (d[0] >= 4))
    self.assertEqual(end.depths, found)
    self.assertLen(taken_back, 1)

  def test_closes_the_stage_that_does_not_help(self):
    rng = np.random.default_rng(2)
    policy = twin((1, 1), error_rate='0.0001')
    end, taken_back = play(rng, policy, lambda d: min(d[1], 3) + 0 * d[0])
    self.assertEqual(end.depths, (1, 3))
    self.assertEqual([closed for _, closed in taken_back], [(0,), (1,)])

  @parameterized.parameters((dict(max_depths=(3,)), 3), (dict(max_epochs=4), 2))
  def test_ends_at_limits(self, limits, depth):
    rng = np.random.default_rng(3)
    end, taken_back = play(rng, twin(**limits), lambda d: 2 * d[0])
    self.assertEqual((end.depths, taken_back), ((depth,), []))

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'm is -1'):
      twin(patience=-1)


class RunTest(absltest.TestCase):

  def test_what_is_taken_back_is_as_if_it_had_never_grown(self):
    """Bit for bit, and also after a kill while the twin trains."""
    directory = self.enter_context(tempfile.TemporaryDirectory())
    path = lambda name: pathlib.Path(directory, name)
    whole = runs.quietly(runs.tiny(path('whole'), **RUN))
    placebo = runs.tiny(path('placebo'), **RUN, method={'kind': 'placebo'})
    self.assertEqual(
        runs.quietly(placebo)['params_digest'], whole['params_digest']
    )
    self.assertEqual((whole['found'], whole['growths']), ('1-1-1', 1))
    config = runs.tiny(path('killed'), **RUN)
    with policy_runs_test.kill(3 * runs.STEPS + 5):
      with self.assertRaises(policy_runs_test.Killed):
        runs.quietly(config)
    again = runs.quietly(config)
    self.assertEqual(again['params_digest'], whole['params_digest'])
    self.assertEqual(again['train_macs'], whole['train_macs'])
    self.assertEqual(runs.course(path('killed')), runs.course(path('whole')))


if __name__ == '__main__':
  absltest.main()
