"""Tests for checkpoint.py."""

import collections
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest
from absl.testing import parameterized
import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from autogrow_jax.run import checkpoint

_Momentum = collections.namedtuple('_Momentum', ['trace', 'count'])

_SAVE_FOR_EVER = '''
import sys
import numpy as np
from autogrow_jax.run import checkpoint
directory, first, stride = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
checkpoints = checkpoint.Checkpoints(directory, keep=2)
for i in range(10_000):
  state = {f'k{j}': np.full((30,), i, np.float32) for j in range(10)}
  checkpoints.save(first + stride * i, state, {'value': i})
  print(i, flush=True)
'''

_SAVE_UNDER_A_LIMIT = '''
import resource
import sys
import numpy as np
from autogrow_jax.run import checkpoint
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=2)
state = {'w': np.arange(30_000, dtype=np.float32)}
checkpoints.save(1, state, {})
for limit in (0, 4_000, 60_000):
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  try:
    checkpoints.save(2, state, {})
  except checkpoint.CheckpointError as error:
    print(error)
print(checkpoints.restore(lambda documents: state).step)
'''


@flax.struct.dataclass
class _State:
  step: jax.typing.ArrayLike
  params: dict
  opt_state: tuple
  key: jax.Array


def _state(value: float = 1.0) -> _State:
  nan = np.array([0x7FC12345, 0xFFC00001, 0x7F812345], np.uint32)
  return _State(
      step=np.array(7, np.int32),
      params={
          'weights': {
              's0b0': {'kernel': np.full((3, 2), value, np.float32)},
              'nan': nan.view(np.float32),
              'half': np.arange(3).astype(ml_dtypes.bfloat16),
              'nothing': np.zeros((0, 4), np.float32),
              'flags': np.array([True, False]),
              'seed': np.array([2**32 - 1], np.uint32),
          },
          'aux': {},
      },
      opt_state=(_Momentum(np.ones((2,), np.float32), np.int32(3)), ()),
      key=jax.random.key(5),
  )


def _abstract(state: _State):
  abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state))
  return lambda documents: abstract


def _assert_bit_equal(test: absltest.TestCase, actual, expected) -> None:
  test.assertEqual(jax.tree.structure(actual), jax.tree.structure(expected))
  test.assertEqual(checkpoint.digest(actual), checkpoint.digest(expected))


def _run(code: str, *args: object) -> subprocess.Popen:
  return subprocess.Popen(
      [sys.executable, '-c', code, *map(str, args)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parent.parent,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
      text=True,
  )


class CheckpointsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
        self.enterContext(tempfile.TemporaryDirectory()), 'c'
    )
    self.checkpoints = checkpoint.Checkpoints(self.directory, keep=2)

  def _save(self, *steps: int) -> None:
    for step in steps:
      self.checkpoints.save(step, _state(step), {'step': step})

  def _restore(self, state: _State | None = None):
    fresh = checkpoint.Checkpoints(self.directory, keep=2)
    return fresh.restore(_abstract(state or _state()))

  def _files(self, step: int) -> list[pathlib.Path]:
    return sorted(
        path for path in (self.directory / str(step)).rglob('*')
        if path.is_file()
    )

  def test_round_trip_is_bit_exact_and_on_the_host(self):
    documents = {
        'architecture': {'stages': [['s0b0'], []], 'name': 'é'},
        'policy': {'best': float('-inf'), 'rate': 0.1, 'closed': None},
        'history': [],
    }
    self.checkpoints.save(7, _state(), documents)
    restored = self._restore()
    self.assertEqual(restored.step, 7)
    self.assertEqual(restored.documents, documents)
    self.assertEqual(restored.refusals, ())
    _assert_bit_equal(self, restored.state, _state())
    for leaf in jax.tree.leaves(restored.state.params):
      self.assertIsInstance(leaf, np.ndarray)
    np.testing.assert_array_equal(
        jax.random.bits(restored.state.key), jax.random.bits(jax.random.key(5))
    )

  @parameterized.parameters(
      {'state': {}},
      {'state': {'empty': np.zeros((0,), np.int8)}},
      {'state': np.arange(3)},
      {'state': {'a/b': np.ones(2), 'c': [np.ones(()), None]}},
  )
  def test_round_trip_of_small_states(self, state):
    self.checkpoints.save(0, state, {'name': 'x'})
    restored = checkpoint.Checkpoints(self.directory, keep=1).restore(
        lambda documents: state
    )
    _assert_bit_equal(self, restored.state, state)

  def test_no_checkpoint_at_all(self):
    self.assertIsNone(self._restore())
    self.directory.mkdir()
    (self.directory / 'notes.txt').write_text('not a checkpoint')
    (self.directory / 'best').mkdir()
    (self.directory / '3.saving').mkdir()
    (self.directory / '4').write_text('a file')
    self.assertIsNone(self._restore())

  def test_keeps_the_newest(self):
    self._save(1, 2, 3, 10)
    self.assertEqual(self.checkpoints.steps(), (3, 10))
    self.assertEqual(self._restore().step, 10)

  def test_damaged_checkpoints_do_not_count_as_kept(self):
    self._save(1, 2)
    self._files(2)[-1].write_bytes(b'')
    fresh = checkpoint.Checkpoints(self.directory, keep=2)
    fresh.save(3, _state(), {})
    self.assertEqual(fresh.steps(), (1, 2, 3))
    fresh.save(4, _state(), {})
    self.assertEqual(fresh.steps(), (3, 4))

  def test_documents_select_the_abstract_state(self):
    self._save(4)
    seen = []

    def make_abstract(documents):
      seen.append(documents)
      return _abstract(_state())(documents)

    self.checkpoints.restore(make_abstract)
    self.assertEqual(seen, [{'step': 4}])

  def test_any_damaged_file_gives_the_previous_checkpoint(self):
    self._save(1, 2)
    for path in self._files(2):
      content = path.read_bytes()
      middle = len(content) // 2
      flipped = bytearray(content or b'x')
      flipped[middle] ^= 1
      for damage in (content[:middle] or b'x', bytes(flipped)):
        with self.subTest(path.name):
          path.write_bytes(damage)
          restored = self._restore()
          self.assertEqual(restored.step, 1)
          _assert_bit_equal(self, restored.state, _state(1))
          self.assertLen(restored.refusals, 1)
          self.assertIn(f'{self.directory}/2 refused', restored.refusals[0])
          self.assertNotIn('\n', restored.refusals[0])
      path.unlink()
      self.assertEqual(self._restore().step, 1)
      path.write_bytes(content)
    self.assertEqual(self._restore().step, 2)

  def test_changed_manifest_is_refused(self):
    self._save(1, 2)
    path = self.directory / '2' / 'manifest.json'
    text = path.read_text()
    for old, new in (('float32', 'float16'), ('"format": 2', '"format": 1')):
      path.write_text(text.replace(old, new, 1))
      self.assertEqual(self._restore().step, 1)
    for content in ('[]', 'null', '{}', '{"format": 2}'):
      path.write_text(content)
      self.assertEqual(self._restore().step, 1)

  def test_no_usable_checkpoint_is_an_error(self):
    self._save(1, 2)
    for step in (1, 2):
      self._files(step)[0].write_bytes(b'?')
    with self.assertRaisesRegex(
        checkpoint.CheckpointError, r'No usable checkpoint .*\(1 older refused'
    ) as raised:
      self._restore()
    self.assertNotIn('\n', str(raised.exception))

  @parameterized.named_parameters(
      ('shape', {'s0b0': {'kernel': np.zeros((3, 3), np.float32)}}, 'kernel'),
      ('dtype', {'flags': np.zeros((2,), np.int8)}, 'flags'),
      ('more', {'s0b1': np.zeros((2,), np.float32)}, '1 leaves are missing'),
  )
  def test_wrong_architecture_is_refused_whole(self, changes, message):
    self._save(1)
    state = _state()
    weights = {**state.params['weights'], **changes}
    wrong = state.replace(params={'weights': weights, 'aux': {}})
    with self.assertRaisesRegex(
        checkpoint.CheckpointError, f'another architecture: .*{message}'
    ):
      self._restore(wrong)
    self.assertEqual(self._restore().step, 1)

  def test_foreign_directories_are_refused_and_never_removed(self):
    self._save(1)
    foreign = self.directory / '5'
    foreign.mkdir()
    (foreign / 'model.pt').write_bytes(b'weights')
    restored = self._restore()
    self.assertEqual(restored.step, 1)
    self.assertIn('not a checkpoint of autogrow_jax', restored.refusals[0])
    self._save(5, 6, 7)
    self.assertEqual(self.checkpoints.steps(), (6, 7))
    self.assertTrue((self.directory / '5.foreign' / 'model.pt').exists())

  def test_same_step_again(self):
    self._save(3)
    manifest = self.directory / '3' / 'manifest.json'
    before = manifest.stat().st_mtime_ns
    self._save(3)
    self.assertEqual(manifest.stat().st_mtime_ns, before)
    self.checkpoints.save(3, _state(9), {})
    self.assertEqual(self._restore().documents, {})
    _assert_bit_equal(self, self._restore().state, _state(9))
    self.assertEqual(os.listdir(self.directory), ['3'])

  def test_replaced_checkpoint_counts_until_the_new_one_is_complete(self):
    self._save(1, 2)
    (self.directory / '2').rename(self.directory / '2.old')
    shutil.copytree(self.directory / '2.old', self.directory / '2.saving')
    restored = self._restore()
    self.assertEqual((restored.step, restored.refusals), (2, ()))
    self._save(3)
    self.assertCountEqual(os.listdir(self.directory), ['2.old', '3'])
    self._save(4)
    self.assertCountEqual(os.listdir(self.directory), ['3', '4'])

  def test_file_in_the_way(self):
    self._save(1)
    file_in_the_way = self.directory.parent / 'file'
    file_in_the_way.write_text('')
    with self.assertRaisesRegex(
        checkpoint.CheckpointError, 'Cannot write .* no previous'
    ):
      checkpoint.Checkpoints(file_in_the_way, keep=1).save(1, _state(), {})

  def test_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, 'At least one'):
      checkpoint.Checkpoints(self.directory, keep=0)
    with self.assertRaisesRegex(ValueError, 'at least 0'):
      self.checkpoints.save(-1, {}, {})
    with self.assertRaisesRegex(ValueError, 'no name for a document'):
      self.checkpoints.save(1, {}, {'state': 1})
    with self.assertRaisesRegex(ValueError, "have the path 'a/b'"):
      state = {'a': {'b': np.ones(1)}, 'a/b': np.ones(1)}
      self.checkpoints.save(1, state, {})

  def test_kill_at_any_moment(self):
    generator = random.Random(0)
    for stride in (1, 0, 1, 0):  # A new step each time, or the same step.
      process = _run(_SAVE_FOR_EVER, self.directory, 1, stride)
      first = process.stdout.readline()
      self.assertEqual(first, '0\n')
      time.sleep(generator.uniform(0.05, 0.4))
      process.send_signal(signal.SIGKILL)
      output, _ = process.communicate()
      saved = int((first + output).split()[-1])
      restored = checkpoint.Checkpoints(self.directory, keep=2).restore(
          lambda documents: {
              f'k{j}': jax.ShapeDtypeStruct((30,), np.float32)
              for j in range(10)
          }
      )
      value = restored.documents['value']
      self.assertBetween(value, saved, saved + 1)
      self.assertEqual(restored.step, 1 + stride * value)
      self.assertEqual(restored.refusals, ())
      for leaf in restored.state.values():
        np.testing.assert_array_equal(leaf, value)
      shutil.rmtree(self.directory)

  def test_file_size_limit(self):
    process = _run(_SAVE_UNDER_A_LIMIT, self.directory)
    output, errors = process.communicate(timeout=60)
    self.assertEqual(errors, '')
    line = (
        f'Cannot write checkpoint {self.directory}/2: File too large. The'
        ' previous checkpoint (step 1) is intact.'
    )
    self.assertEqual(output.splitlines(), [line] * 3 + ['1'])
    self.assertEqual(os.listdir(self.directory), ['1'])


class DigestTest(absltest.TestCase):

  def test_does_not_depend_on_insertion_order(self):
    a, b = np.ones(2), np.zeros(3)
    self.assertEqual(
        checkpoint.digest({'a': a, 'b': b}), checkpoint.digest({'b': b, 'a': a})
    )

  def test_depends_on_path_dtype_shape_and_bytes(self):
    trees = (
        {'a': np.zeros(4, np.float32)},
        {'b': np.zeros(4, np.float32)},
        {'a': np.zeros(4, np.int32)},
        {'a': np.zeros((2, 2), np.float32)},
        {'a': np.array([0, 0, 0, -0.0], np.float32)},
        {'a': np.zeros(4, np.float32), 'b': np.zeros(0)},
    )
    self.assertLen({checkpoint.digest(tree) for tree in trees}, len(trees))

  def test_of_device_arrays_and_keys(self):
    self.assertEqual(
        checkpoint.digest({'a': jnp.ones(2), 'k': jax.random.key(1)}),
        checkpoint.digest(
            {'a': np.ones(2, np.float32), 'k': jax.random.key(1)}
        ),
    )
    self.assertEqual(
        checkpoint.digest({'a': np.asfortranarray(np.eye(3)[:2])}),
        checkpoint.digest({'a': np.eye(3)[:2]}),
    )


if __name__ == '__main__':
  absltest.main()
