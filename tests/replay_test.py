"""Tests of the replay binary."""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

ROOT = pathlib.Path(__file__).parent.parent

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
FLAGS_A = ('--grow_interval=3', '--stop_window=6')
FLAGS_C = ('--policy=convergent', '--grow_interval=4')


def run(*arguments):
  return subprocess.run(
      [sys.executable, '-m', 'experiments.replay', *arguments],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
  )


class ReplayTest(parameterized.TestCase):

  def write(self, content):
    if not isinstance(content, (str, bytes)):
      content = json.dumps(content)
    if isinstance(content, str):
      content = content.encode()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    path = pathlib.Path(directory) / 'curve'
    path.write_bytes(content)
    return path

  def events(self, content, *arguments):
    result = run(f'--curve={self.write(content)}', *arguments)
    self.assertEqual((result.returncode, result.stderr), (0, ''))
    return [json.loads(line) for line in result.stdout.splitlines()]

  def assert_refused(self, result, message):
    self.assertEqual(result.returncode, 2, result.stderr)
    self.assertEqual(result.stdout, '')
    self.assertLen(result.stderr.splitlines(), 1)
    self.assertStartsWith(result.stderr, 'replay: ')
    self.assertRegex(result.stderr, message)

  def test_trace_a(self):
    events = self.events({'total': 10_000, 'correct': TRACE_A}, *FLAGS_A)
    self.assertEqual(
        events[0], {'epoch': 3, 'event': 'grow', 'stage': 0, 'depths': '2-1-1'}
    )
    self.assertEqual(
        events[4:6],
        [
            {'epoch': 15, 'event': 'stop', 'stage': 0, 'depths': '3-2-2'},
            {'epoch': 15, 'event': 'grow', 'stage': 1, 'depths': '3-3-2'},
        ],
    )
    self.assertEqual(
        events[-1],
        {'epoch': 30, 'event': 'end', 'stage': None, 'depths': '3-5-4'},
    )
    self.assertLen([e for e in events if e['event'] == 'grow'], 9)

  def test_trace_c(self):
    events = self.events({'total': 10_000, 'correct': TRACE_C}, *FLAGS_C)
    self.assertEqual(
        [(e['epoch'], e['event'], e['stage']) for e in events],
        [
            (12, 'grow', 0), (20, 'grow', 1), (24, 'stop', 1), (24, 'grow', 2),
            (32, 'grow', 0), (36, 'stop', 0), (36, 'grow', 2), (40, 'stop', 2),
            (40, 'end', None),
        ],
    )
    self.assertEqual(events[-1]['depths'], '3-2-3')

  def test_a_history_gives_the_same(self):
    lines = [{'event': 'start', 'epoch': 0}]
    for epoch, correct in enumerate(TRACE_A, 1):
      lines.append({
          'event': 'epoch', 'phase': 'growing', 'epoch': epoch,
          'correct': correct, 'total': 10_000, 'loss_sum': 1.5,
      })
      lines.append({'event': 'grow', 'epoch': epoch, 'correct': 'ignored'})
    lines.append({
        'event': 'epoch', 'phase': 'fine-tuning', 'epoch': 31, 'correct': 1,
        'total': 2,
    })
    history = '\n'.join(json.dumps(line) for line in lines) + '\n'
    curve = {'total': 10_000, 'correct': TRACE_A}
    self.assertEqual(
        self.events(history, *FLAGS_A), self.events(curve, *FLAGS_A)
    )

  def test_a_history_of_one_line(self):
    line = {
        'event': 'epoch', 'phase': 'growing', 'epoch': 1, 'correct': 1,
        'total': 2,
    }
    events = self.events(line, '--grow_interval=1')
    self.assertEqual([e['event'] for e in events], ['grow'])

  def test_a_curve_may_outlast_the_growth_or_be_short(self):
    curve = {'total': 10_000, 'correct': [5_000] * 300}
    events = self.events(curve)
    self.assertEqual(events[-1]['epoch'], 108)
    self.assertEqual(events[-1]['depths'], '13-13-12')
    self.assertEqual(self.events({'total': 10, 'correct': [1, 2]}), [])

  @parameterized.parameters('2', '2-2')
  def test_max_depths(self, caps):
    events = self.events(
        {'total': 10, 'correct': [5] * 9},
        '--seed_depths=1-2',
        f'--max_depths={caps}',
        '--threshold=.5',
    )
    self.assertEqual(
        [(e['epoch'], e['event'], e['depths']) for e in events],
        [(3, 'grow', '2-2'), (6, 'end', '2-2')],
    )

  def test_a_seed_at_its_caps_ends_at_once(self):
    self.assertEqual(
        self.events({'total': 10, 'correct': [5]}, '--max_depths=1'),
        [{'epoch': 0, 'event': 'end', 'stage': None, 'depths': '1-1-1'}],
    )

  @parameterized.named_parameters(
      ('malformed', '{"total": 10, "correct": [1', 'not a JSON object'),
      ('number', '3', 'not a JSON object'),
      ('deep', '[' * 100_000, 'not a JSON object'),
      ('binary', b'\xff\xfe\x00', 'UTF-8'),
      ('no_content', '', 'no epochs'),
      ('no_growing_epochs', {'event': 'start'}, 'no epochs'),
      ('no_counts', {'total': 10, 'correct': []}, 'no epochs'),
      ('no_total', {'correct': [1]}, 'needs a number "total"'),
      ('no_list', {'total': 10, 'correct': 1}, 'list "correct"'),
      ('total_zero', {'total': 0, 'correct': [0]}, 'is 0'),
      ('total_text', {'total': '10', 'correct': [1]}, "is '10'"),
      ('above', {'total': 10, 'correct': [1, 11]}, 'Entry 2 .* is 11'),
      ('negative', {'total': 10, 'correct': [-1]}, 'is -1'),
      ('fraction', {'total': 10, 'correct': [0.5]}, 'is 0.5'),
      ('boolean', {'total': 10, 'correct': [True]}, 'is True'),
      ('nothing', {'total': 10, 'correct': [None]}, 'is None'),
      ('not_a_number', '{"total": 10, "correct": [NaN]}', 'is nan'),
      (
          'lacking',
          {'event': 'epoch', 'phase': 'growing', 'epoch': 1, 'total': 10},
          "lacks .'correct'",
      ),
      (
          'gap',
          {
              'event': 'epoch', 'phase': 'growing', 'epoch': 2, 'correct': 1,
              'total': 10,
          },
          'epoch 2; the next one is 1',
      ),
      ('torn', '{"event": "start"}\n{"event": "ep', 'Line 2'),
  )
  def test_refuses_a_curve(self, content, message):
    self.assert_refused(run(f'--curve={self.write(content)}'), message)

  def test_refuses_a_missing_file(self):
    self.assert_refused(run('--curve=/no/such/file'), 'No such file')

  @parameterized.parameters(
      ('--grow_interval=0', 'K .* is 0'),
      ('--stop_window=2', 'J is 2 epochs'),
      ('--threshold=nan', "'nan'"),
      ('--threshold=-0.05', "'-0.05'"),
      ('--threshold=', "such as '0.05'"),
      ('--seed_depths=3-x', "'3-x'"),
      ('--seed_depths=0-1', "'0-1'"),
      ('--max_depths=2-2', 'number of stages'),
      ('--error_rate=0.1', 'means nothing to --policy=periodic'),
      ('--max_depths=', "such as '3-2-2'"),
      ('other.json', '--curve=FILE'),
  )
  def test_refuses_an_argument(self, argument, message):
    path = self.write({'total': 10, 'correct': [1]})
    self.assert_refused(run(f'--curve={path}', argument), message)

  def test_noise(self):
    result = run('--noise=94', '--total=500', '--runs=20', '--stop_window=12')
    self.assertEqual((result.returncode, result.stderr), (0, ''))
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    self.assertEqual(
        [(a['policy'], a['start'], a['floor']) for a in answers],
        [
            ('periodic', 'untrained', '3-3-3'),
            ('convergent', 'untrained', '2-2-2'),
            ('sequential', 'untrained', '4-3-3'),
            ('sequential', 'trained', '2-2-2'),
        ],
    )
    periodic, _, untrained, trained = answers
    self.assertEqual(untrained['epochs']['p50'], 24)
    self.assertEqual(trained['epochs']['p50'], 12)
    self.assertLess(untrained['epochs']['p90'], periodic['epochs']['p90'])
    self.assertEqual(periodic['runs'], 20)
    self.assertLen(periodic['depths'], 3)

  def test_noise_of_one_policy(self):
    result = run(
        '--noise=94', '--total=500', '--runs=3', '--policy=convergent',
        '--common_sigma=0.5',
    )
    (answer,) = [json.loads(line) for line in result.stdout.splitlines()]
    self.assertEqual(answer['policy'], 'convergent')
    counting = 100 * (0.94 * 0.06 / 500) ** 0.5
    self.assertAlmostEqual(answer['sigma'], (counting**2 + 0.25) ** 0.5)

  @parameterized.parameters(
      ('--noise=101', '101.0; it must be an accuracy'),
      ('--noise=nan', 'nan; it must be'),
      ('--noise=50 --total=0', 'is 0'),
      ('--noise=50 --runs=0', 'runs is 0'),
      ('--noise=50 --common_sigma=-1', 'Common sigma -1'),
      ('--noise=50 --error_rate=0.7', 'error rate .* below 0.5'),
      ('--noise=50 --curve=x', 'either --curve=FILE or --noise'),
      (
          '--noise=50 --policy=convergent --stop_window=9',
          'stop_window means nothing to --policy=convergent',
      ),
      ('--policy=sequential --curve=x', 'counts only, .* --noise'),
      ('--policy=sequential', 'either --curve=FILE or --noise'),
  )
  def test_refuses_noise(self, arguments, message):
    self.assert_refused(run(*arguments.split()), message)

  @parameterized.parameters('--policy=other', '--grow_interval=x', '--nova=1')
  def test_flag_errors_have_no_traceback(self, argument):
    result = run('--curve=x', argument)
    self.assertNotEqual(result.returncode, 0)
    self.assertNotIn('Traceback', result.stderr)

  def test_help_shows_its_own_flags(self):
    result = run('--help')
    self.assertIn('--grow_interval', result.stdout)
    self.assertIn("(default: '0.05')", result.stdout)


if __name__ == '__main__':
  absltest.main()
