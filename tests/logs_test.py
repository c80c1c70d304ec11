"""Tests for console.py."""

import io
import json
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from autogrow_jax.run import console
from autogrow_jax.run import tensorboard
from autogrow_jax.run import history as history_lib

_EPOCH = {
    'event': 'epoch', 'epoch': 12, 'step': 420, 'depths': [3, 2, 2],
    'phase': 'growing', 'learning_rate': 0.1, 'train_loss': 0.31234,
    'train_correct': 4321, 'train_total': 5000, 'loss': 0.4567,
    'correct': 850, 'total': 1000, 'best': 861, 'params': 78042,
    'macs': 12_500_000, 'train_macs': 3_100_000_000_000,
    'eval_macs': 90_000_000_000, 'wall_seconds': 61.5,
    'compile_seconds': 12.25, 'compile_count': 3, 'images_per_second': 5321.0,
    'train_metrics': {'accuracy': 86.42}, 'metrics': {'accuracy': 85.0},
}
_GROW = {
    'event': 'grow', 'epoch': 12, 'step': 420, 'depths': [3, 3, 2],
    'stage': 1, 'block': 's1b2', 'note': 'ZeroInit',
    'params_before': 78042, 'params_after': 96602,
    'macs_before': 12_500_000, 'macs_after': 13_900_000,
    'loss_before': 0.45671, 'loss_after': 0.45671,
    'logits_change_eval': 0.0, 'logits_change_train': 1.2e-7,
    'optimizer': {'kept': 24, 'new': 6, 'dropped': 0},
    'initializer': {'name': 'zero'},
}

_APPEND_FOR_EVER = '''
import sys
from autogrow_jax.run import history as history_lib
history = history_lib.History(sys.argv[1])
for i in range(1_000_000):
  history.append({'event': 'epoch', 'epoch': i, 'text': 'x' * 1000})
  print(i, flush=True)
'''


class _Terminal(io.StringIO):

  def isatty(self) -> bool:
    return True


class HistoryTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder, 'run', 'history.jsonl')

  def test_append_and_read(self):
    history = history_lib.History(self.path)
    history.append(_EPOCH)
    history.append(_GROW)
    self.assertEqual(history_lib.read(self.path), [_EPOCH, _GROW])
    history.close()
    history_lib.History(self.path).append(_EPOCH)
    self.assertEqual(history_lib.read(self.path), [_EPOCH, _GROW, _EPOCH])

  def test_half_written_last_line(self):
    history = history_lib.History(self.path)
    history.append(_EPOCH)
    history.append(_GROW)
    content = self.path.read_bytes()
    for cut in (1, 5, 100):
      self.path.write_bytes(content[:-cut])
      self.assertEqual(history_lib.read(self.path), [_EPOCH])
    history_lib.History(self.path).append(_GROW)
    self.assertEqual(self.path.read_bytes(), content)

  @parameterized.parameters('{"event":', '[1]', '{"epoch": 1}', '')
  def test_damaged_line_is_named(self, line):
    good = history_lib.dumps(_EPOCH)
    self.path.parent.mkdir()
    self.path.write_text(f'{good}\n{line}\n{good}\n')
    with self.assertRaisesRegex(ValueError, 'history.jsonl, line 2: '):
      history_lib.read(self.path)

  def test_truncate(self):
    history = history_lib.History(self.path)
    for record in (_EPOCH, _GROW):
      history.append(record)
    digest = history.digest(2)
    history.append(_EPOCH)
    history.close()
    with open(self.path, 'ab') as file:
      file.write(b'{"event": "ep')
    history = history_lib.History(self.path)
    history.truncate(2, digest)
    self.assertEqual(history_lib.read(self.path), [_EPOCH, _GROW])
    self.assertEqual(history.records, [_EPOCH, _GROW])
    history.append({'event': 'end'})
    self.assertEqual(history_lib.read(self.path)[2:], [{'event': 'end'}])
    for length, other in ((2, 'x'), (9, digest)):
      with self.assertRaisesRegex(ValueError, 'was changed or replaced'):
        history.truncate(length, other)
    history.truncate(0, history.digest(0))
    self.assertEqual(self.path.read_bytes(), b'')

  def test_survives_a_kill(self):
    process = subprocess.Popen(
        [sys.executable, '-c', _APPEND_FOR_EVER, str(self.path)],
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parent.parent,
        text=True,
    )
    for _ in range(50):
      process.stdout.readline()
    process.kill()
    output, _ = process.communicate()
    last = int(output.split()[-1]) if output.split() else 49
    epochs = [record['epoch'] for record in history_lib.read(self.path)]
    self.assertEqual(epochs, list(range(len(epochs))))
    self.assertBetween(len(epochs), last + 1, last + 2)


class DumpsTest(parameterized.TestCase):

  @parameterized.parameters(
      (float('nan'), 'nan'),
      (float('-inf'), '-inf'),
      (np.float32('inf'), 'inf'),
      (np.float64(0.5), 0.5),
      (np.int64(3), 3),
      (np.bool_(True), True),
      (np.array([1.0, np.nan]), [1.0, 'nan']),
      ((1, None, 'x'), [1, None, 'x']),
      ({1: {'a': (np.int32(2),)}}, {'1': {'a': [2]}}),
  )
  def test_strict_json(self, value, expected):
    def refuse(constant):
      self.fail(f'{constant} is not JSON')

    text = history_lib.dumps({'value': value})
    self.assertEqual(
        json.loads(text, parse_constant=refuse)['value'], expected
    )

  def test_refuses_what_is_not_json(self):
    with self.assertRaises(TypeError):
      history_lib.dumps({'value': object()})


class FormatTest(parameterized.TestCase):

  @parameterized.parameters(
      (0, '0'), (7, '7'), (999, '999'), (0.5, '0.5'), (1000, '1.00 k'),
      (9994, '9.99 k'), (9996, '10.0 k'), (78042, '78.0 k'),
      (999_499, '999 k'), (999_600, '1.00 M'), (12_500_000, '12.5 M'),
      (3.1e12, '3.10 T'), (2e22, '20000 E'), (-78042, '-78.0 k'),
      (999.7, '1.00 k'), (float('inf'), 'inf'),
  )
  def test_count(self, count, expected):
    self.assertEqual(console.format_count(count), expected)

  def test_epoch(self):
    self.assertEqual(
        console.format_epoch(_EPOCH),
        'epoch  12  grow   3-2-2    loss 0.312/0.457  acc 86.42/85.00%  best'
        ' 86.10%  lr 0.1  78.0k params',
    )

  @parameterized.parameters(
      ({'depths': [42, 42, 42, 42]},),
      ({'epoch': 12345, 'train_loss': 'nan', 'loss': 1e30},),
      ({'learning_rate': 1.23456e-5, 'params': 123_456_789},),
      ({'shape': '28-21-23-17-51', 'estimated_change': -0.0704,
        'actual_change': -0.0431},),
      ({'shape': '28-21-23-17-51', 'estimated_change': -0.0704,
        'actual_change': -0.0431, 'select_on': 'test'},),
  )
  def test_epoch_fits_100_columns(self, changes):
    self.assertLessEqual(len(console.format_epoch({**_EPOCH, **changes})), 100)

  def test_epoch_after_an_estimated_growth(self):
    changes = {'estimated_change': -0.0704, 'actual_change': 0.0431}
    line = console.format_epoch(
        {**_EPOCH, 'shape': '28-21-23-17-51', **changes}
    )
    self.assertIn('28-21-23-17-51', line)
    self.assertTrue(line.endswith('best 86.10%  grew -.070/+.043'), line)
    changes = {'estimated_change': -20.5, 'actual_change': 10.02}
    line = console.format_epoch(_EPOCH | changes)
    self.assertIn('grew -20.500/+10.020', line)

  def test_epoch_with_required_keys_only(self):
    record = {'event': 'epoch', 'epoch': 0, 'step': 0, 'depths': [1]}
    self.assertIn('loss -/-', console.format_epoch(record))

  def test_growth(self):
    self.assertEqual(
        console.format_growth(_GROW).splitlines(),
        [
            'grow stage 1 by s1b2 -> 3-3-2  (ZeroInit)',
            '  78.0 k -> 96.6 k parameters, 12.5 M -> 13.9 M multiply-adds',
            '  loss 0.4567 -> 0.4567',
            '  largest change of the logits 0 (evaluation), 1.2e-07 (training)',
            '  optimizer state: 24 kept, 6 new, 0 dropped',
            '  initializer: name zero',
        ],
    )

  @parameterized.parameters(
      ({'event': 'stop', 'stage': 1, 'reason': 'cap'}, 'largest depth'),
      ({'event': 'phase', 'name': 'finetuning'}, 'finetuning at 3-2'),
      ({'event': 'compile', 'what': '4-4', 'seconds': 2}, '4-4 in 2.0 s'),
      ({'event': 'skip', 'reason': 'no loss'}, 'no growth: no loss'),
      ({'event': 'end'}, ''),
  )
  def test_other_records(self, record, expected):
    record = {'epoch': 1, 'step': 2, 'depths': [3, 2], **record}
    self.assertIn(expected, console.format_record(record))


class ProgressTest(absltest.TestCase):

  def test_lines_where_there_is_no_terminal(self):
    stream = io.StringIO()
    progress = console.Console(stream=stream)
    progress.start_epoch(12, 10, '3-2-2', 0)
    progress.update(self.fail)  # Nobody looks: they are not asked for.
    progress.record(_EPOCH)
    progress.record({'event': 'end'})
    progress.close()
    self.assertEqual(stream.getvalue(), console.format_epoch(_EPOCH) + '\n')

  def test_bar_on_a_terminal(self):
    stream = _Terminal()
    progress = console.Console(stream=stream)
    progress.start_epoch(12, 10, '3-2-2', 0)
    progress.write('a line')
    progress.update(lambda: (0.5, 80.0))
    progress.update(self.fail)  # They were, a moment ago.
    progress.record(_EPOCH)
    progress.close()
    self.assertIn('epoch 12  3-2-2:', stream.getvalue())
    self.assertIn('loss=0.500, accuracy=80.0%', stream.getvalue())
    self.assertIn('a line\n', stream.getvalue())
    self.assertIn(console.format_epoch(_EPOCH) + '\n', stream.getvalue())


class TensorBoardTest(absltest.TestCase):

  def test_scalars(self):
    scalars = tensorboard.scalars(_EPOCH)
    self.assertAlmostEqual(scalars['accuracy/selection'], 85.0)
    self.assertAlmostEqual(scalars['accuracy/best'], 86.1)
    self.assertEqual(scalars['depth/stage0'], 3.0)
    self.assertEqual(scalars['cost/train_macs'], 3.1e12)

  def test_a_protocol_on_the_test_set_is_a_text(self):
    for select_on, texts in (('holdout', []), ('test', ['paper_compat: '])):
      board = mock.Mock()
      for epoch in (1, 2):
        tensorboard.write(board, {
            **_EPOCH, 'epoch': epoch, 'select_on': select_on,
            'protocol': 'paper_compat',
        })
      found = [call.args[1] for call in board.add_text.call_args_list]
      self.assertLen(found, len(texts))
      for text, start in zip(found, texts, strict=True):
        self.assertStartsWith(text, start)

  def test_no_step_appears_twice(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    board = tensorboard.writer(folder, resume_step=0)
    for step in (10, 20, 30):
      tensorboard.write(board, {**_EPOCH, 'step': step})
    tensorboard.write(board, _GROW)
    board.close()
    board = tensorboard.writer(folder, resume_step=20)
    tensorboard.write(board, {**_EPOCH, 'step': 30, 'loss': 'nan'})
    board.close()
    self.assertEqual(_purge_steps(folder), {1, 21})

  def test_not_imported_while_unused(self):
    code = (
        'import sys; from autogrow_jax.run import console, tensorboard;'
        ' sys.exit("tensorboardX" in sys.modules or "jax" in sys.modules)'
    )
    root = pathlib.Path(__file__).parent.parent
    subprocess.run([sys.executable, '-c', code], cwd=root, check=True)


def _purge_steps(folder: str) -> set[int]:
  """Steps from which on an event file hides what is older."""
  # pylint: disable-next=g-import-not-at-top
  from tensorboardX.proto import event_pb2

  steps = set()
  for path in pathlib.Path(folder).iterdir():
    data, start = path.read_bytes(), 0
    while start < len(data):  # length (8), crc (4), event, crc (4)
      length = int.from_bytes(data[start : start + 8], 'little')
      event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
      if event.HasField('session_log'):
        steps.add(event.step)
      start += 16 + length
  return steps


if __name__ == '__main__':
  absltest.main()
