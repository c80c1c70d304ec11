"""Tests of replays, and of their binary."""

import json
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import runs

from autogrow_jax import policies
from experiments.studies import replay

TRACE_A = (
    4000, 5000, 6000, 5500, 6500, 7000, 6200, 7100, 7300, 6000, 7302, 7250,
    7303, 7200, 7301, 7000, 7400, 7390, 7380, 7405, 7401, 7400, 7397, 7405,
    7406, 7300, 7300, 7300, 7407, 7400,
)
TRACE_C = (
    5000, 6000, 6500, 7000, 7010, 7000, 7020, 7010, 7020, 7022, 7010, 7020,
    7100, 7150, 7200, 7230, 7200, 7231, 7230, 7220, 7220, 7233, 7210, 7220,
    7300, 7340, 7330, 7320, 7341, 7342, 7340, 7330, 7320, 7343, 7330, 7340,
    7300, 7300, 7344, 7300,
)


def summary(events):
  return [(e['epoch'], e['event'], e['stage'], e['depths']) for e in events]


class CurveTest(parameterized.TestCase):

  def write(self, content):
    if not isinstance(content, (str, bytes)):
      content = json.dumps(content) + '\n'
    if isinstance(content, str):
      content = content.encode()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    path = pathlib.Path(directory) / 'curve'
    path.write_bytes(content)
    return path


class ReplayTest(CurveTest):

  def events(self, content, policy):
    curve = replay.read_curve(self.write(content))
    return list(replay.events(policy, curve))

  def test_convergent(self):
    policy = policies.Convergent(
        interval=4, threshold='0.05', depths=(1, 1, 1)
    )
    events = self.events({'total': 10_000, 'correct': TRACE_C}, policy)
    self.assertEqual(
        [(e['epoch'], e['event'], e['stage']) for e in events],
        [
            (12, 'grow', 0), (20, 'grow', 1), (24, 'stop', 1), (24, 'grow', 2),
            (32, 'grow', 0), (36, 'stop', 0), (36, 'grow', 2), (40, 'stop', 2),
            (40, 'end', None),
        ],
    )
    self.assertEqual(events[-1]['depths'], '3-2-3')

  @parameterized.parameters(
      ({}, {}),
      ({'select_on': 'holdout', 'protocol': 'holdout'}, {}),
      ({'select_on': 'test', 'protocol': 'paper_compat'},
       {'protocol': 'paper_compat'}),
  )
  def test_a_history_gives_the_same(self, said, protocol):
    policy = policies.Periodic(
        interval=3, window=6, threshold='0.05', depths=(1, 1, 1)
    )
    expected = self.events({'total': 10_000, 'correct': TRACE_A}, policy)
    self.assertEqual(expected[-1]['depths'], '3-5-4')
    lines = [{'event': 'start', 'epoch': 0}]
    for epoch, correct in enumerate(TRACE_A, 1):
      lines.append({
          'event': 'epoch', 'phase': 'growing', 'epoch': epoch,
          'correct': correct, 'total': 10_000, **said,
      })
      lines.append({'event': 'grow', 'epoch': epoch, 'correct': 'ignored'})
    lines.append({
        'event': 'epoch', 'phase': 'finetuning', 'epoch': 31, 'correct': 1,
        'total': 2,
    })
    history = ''.join(json.dumps(line) + '\n' for line in lines)
    self.assertEqual(
        self.events(history, policy), [e | protocol for e in expected]
    )

  def test_ends(self):
    policy = policies.Periodic(
        interval=3, window=100, threshold='0.05', depths=(1, 1, 1)
    )
    curve = {'total': 10_000, 'correct': [5_000] * 300}
    events = self.events(curve, policy)  # The curve outlasts the growth.
    self.assertEqual(summary(events)[-1], (108, 'end', None, '13-13-12'))
    self.assertEmpty(self.events({'total': 10, 'correct': [1, 2]}, policy))
    policy = policies.Periodic(
        interval=3, window=3, threshold='1', depths=(2,), max_depths=(2,)
    )
    self.assertEqual(
        summary(self.events(curve, policy)), [(0, 'end', None, '2')]
    )

  @parameterized.named_parameters(
      ('malformed', '{"total": 10, "correct": [1\n', 'line 1: not JSON'),
      ('number', '3\n', "needs an 'event'"),
      ('binary', b'\xff\xfe\x00\n', 'line 1: not JSON'),
      ('no_content', '', 'no growing epochs'),
      ('no_growing_epochs', {'event': 'start'}, 'no growing epochs'),
      ('no_counts', {'total': 10, 'correct': []}, 'no growing epochs'),
      ('no_total', {'correct': [1]}, '1 of None'),
      ('no_list', {'total': 10, 'correct': 1}, "needs an 'event'"),
      ('total_zero', {'total': 0, 'correct': [0]}, '0 of 0'),
      ('above', {'total': 10, 'correct': [1, 11]}, '11 of 10 .* epoch 2'),
      ('fraction', {'total': 10, 'correct': [0.5]}, '0.5 of 10'),
      (
          'lacking',
          {'event': 'epoch', 'phase': 'growing', 'epoch': 1, 'total': 10},
          'None of 10',
      ),
  )
  def test_refuses(self, content, message):
    with self.assertRaisesRegex(ValueError, message):
      replay.read_curve(self.write(content))


class BinaryTest(CurveTest):

  def test_answers(self):
    curve = f'--curve={self.write({"total": 10_000, "correct": TRACE_A})}'
    flat = f'--curve={self.write({"total": 10, "correct": [5] * 9})}'
    calls = (
        (curve, '--grow_interval=3', '--stop_window=6', '--error_rate=0.1'),
        (flat, '--seed_depths=1-2', '--max_depths=2', '--threshold=.5'),
        ('--noise=94', '--total=500', '--runs=20', '--stop_window=12'),
        ('--noise=94', '--total=500', '--runs=3', '--policy=convergent',
         '--common_sigma=0.5', '--stop_window=9'),
    )
    outcomes = runs.call('replay', [list(call) for call in calls])
    answers = []
    for outcome in outcomes:
      self.assertEqual(outcome.status, 0, outcome.stderr)
      answers.append(list(map(json.loads, outcome.stdout.splitlines())))
    self.assertEqual(
        [outcome.stderr for outcome in outcomes],
        ['ignored: --error_rate means nothing to periodic\n', '', '',
         'ignored: --stop_window means nothing to convergent\n'],
    )
    self.assertEqual(summary(answers[0])[-1], (30, 'end', None, '3-5-4'))
    self.assertEqual(
        summary(answers[1]),
        [(3, 'grow', 0, '2-2'), (6, 'end', None, '2-2')],
    )
    self.assertEqual(
        [(a['policy'], a['start'], a['floor']) for a in answers[2]],
        [
            ('periodic', 'untrained', '3-3-3'),
            ('convergent', 'untrained', '2-2-2'),
            ('sequential', 'untrained', '4-3-3'),
            ('sequential', 'trained', '2-2-2'),
        ],
    )
    periodic, _, untrained, trained = answers[2]
    self.assertEqual(untrained['epochs']['p50'], 24)
    self.assertEqual(trained['epochs']['p50'], 12)
    self.assertLess(untrained['epochs']['p90'], periodic['epochs']['p90'])
    (answer,) = answers[3]
    counting = 100 * (0.94 * 0.06 / 500) ** 0.5
    self.assertAlmostEqual(answer['sigma'], (counting**2 + 0.25) ** 0.5)

  def test_refuses(self):
    path = self.write({'total': 10, 'correct': [1]})
    gap = self.write({
        'event': 'epoch', 'phase': 'growing', 'epoch': 2, 'correct': 1,
        'total': 10,
    })
    bad = (
        (f'--curv={path}', 'did you mean --curve'),
        (f'--curve={path} --grow_interval=0', 'K is 0'),
        (f'--curve={path} --seed_depths=3-x', "seed_depths.*'3-x'"),
        (f'--curve={path} --max_depths=2-2', 'number of stages'),
        (f'--curve={path} --policy=sequential', 'needs hits'),
        (f'--curve={path} other.json', 'other.json'),
        (f'--curve={gap}', 'Epoch 2 cannot follow 0'),
        ('--curve=/no/such/file', 'No such file'),
        ('--noise=nan', 'NaN'),
        ('--noise=50 --error_rate=0.7', 'error_rate .* below 0.5'),
        ('--noise=50 --curve=x', 'either --curve=FILE or --noise'),
    )
    help_, *outcomes = runs.call('replay', [['-h'], *runs.arguments_of(bad)])
    runs.check_help(self, help_, 'replay', 'curve', 'stop_window')
    runs.check_refused(self, outcomes, bad)


if __name__ == '__main__':
  absltest.main()
