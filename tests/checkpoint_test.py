"""Tests for checkpoint.py."""

import asyncio
import collections
from concurrent import futures
import os
import pathlib
import random
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
import orbax.checkpoint as ocp

from autogrow_jax.run import checkpoint

_Momentum = collections.namedtuple('_Momentum', ['trace', 'count'])

_SAVE_FOR_EVER = '''
import sys
import numpy as np
from autogrow_jax.run import checkpoint
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=2)
for i in range(10_000):
  state = {f'k{j}': np.full((30,), i, np.float32) for j in range(10)}
  checkpoints.save(1 + int(sys.argv[2]) * i, state, {'value': i})
  print(i, flush=True)
'''

_SAVE_UNDER_A_LIMIT = '''
import resource
import sys
import numpy as np
from autogrow_jax.run import checkpoint
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=2)
state = {f'w{i}': np.arange(300, dtype=np.float32) for i in range(100)}
checkpoints.save(1, state, {})
checkpoints.wait()
for limit in (0, 4_000, 60_000):
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  try:
    checkpoints.save(2, state, {})
    checkpoints.wait()
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
              's0b0.mid/x': np.array([2**32 - 1], np.uint32),
          },
          'aux': {},
      },
      opt_state=(_Momentum(np.ones((2,), np.float32), np.int32(3)), ()),
      key=jax.random.key(5),
  )


def _abstract(state: _State):
  abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state))
  return lambda documents: abstract


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
      self.checkpoints.save(step, _state(step), {'saved': step})
    self.checkpoints.wait()

  def _restore(self, state: _State | None = None) -> checkpoint.Restored:
    fresh = checkpoint.Checkpoints(self.directory, keep=2)
    return fresh.restore(_abstract(state or _state()))

  def _files(self, number: int) -> list[pathlib.Path]:
    paths = sorted((self.directory / str(number)).rglob('*'))
    return [path for path in paths if path.is_file()]

  def assert_state(self, actual: _State, expected: _State) -> None:
    self.assertEqual(jax.tree.structure(actual), jax.tree.structure(expected))
    self.assertEqual(checkpoint.digest(actual), checkpoint.digest(expected))

  def test_round_trip_is_bit_exact_and_on_the_host(self):
    documents = {
        'architecture': {'stages': [['s0b0'], []], 'name': 'é'},
        'policy': {'best': float('-inf'), 'rate': 0.1, 'closed': None},
        'history': [],
    }
    self.checkpoints.save(7, _state(), documents)
    self.checkpoints.wait()
    restored = self._restore()
    self.assertEqual(restored.step, 7)
    self.assertEqual(restored.documents, documents)
    self.assertEqual(restored.refusals, ())
    self.assert_state(restored.state, _state())
    for leaf in jax.tree.leaves(restored.state.params):
      self.assertIsInstance(leaf, np.ndarray)
    np.testing.assert_array_equal(
        jax.random.bits(restored.state.key), jax.random.bits(jax.random.key(5))
    )

  def test_plain_orbax_reads_the_names(self):
    self._save(7)
    path = self.directory / '7' / 'arrays'
    state = _state(7)
    for checkpointer in (ocp.PyTreeCheckpointer(), ocp.StandardCheckpointer()):
      arrays = checkpointer.restore(path)
      weights = arrays['params']['weights']
      np.testing.assert_array_equal(
          weights['s0b0.mid/x'], state.params['weights']['s0b0.mid/x']
      )
      np.testing.assert_array_equal(
          weights['s0b0']['kernel'], np.full((3, 2), 7, np.float32)
      )
      np.testing.assert_array_equal(
          arrays['opt_state']['0']['trace'], state.opt_state[0].trace
      )
      np.testing.assert_array_equal(
          arrays['key'], jax.random.key_data(state.key)
      )

  def test_no_checkpoint_at_all(self):
    self.assertIsNone(self._restore())
    self.assertFalse(self.directory.exists())
    self.directory.mkdir()
    (self.directory / 'notes.txt').write_text('not a checkpoint')
    (self.directory / 'best').mkdir()
    (self.directory / '3.orbax-checkpoint-tmp').mkdir()
    self.assertIsNone(self._restore())
    self.assertIn('3.orbax-checkpoint-tmp', os.listdir(self.directory))
    self._save(3)
    self.assertCountEqual(
        os.listdir(self.directory), ['notes.txt', 'best', '3']
    )

  def test_keeps_the_newest(self):
    self._save(1, 2, 3, 10)
    self.assertEqual(self.checkpoints.steps(), (3, 10))
    self.assertEqual(self._restore().step, 10)

  def test_a_step_saved_again_has_the_next_number(self):
    self._save(3)
    self.checkpoints.save(3, _state(9), {})
    self.checkpoints.wait()
    self.assertEqual(self.checkpoints.steps(), (3, 4))
    restored = self._restore()
    self.assertEqual((restored.step, restored.documents), (3, {}))
    self.assert_state(restored.state, _state(9))

  def test_later_changes_of_the_state_are_not_saved(self):
    array, documents = np.zeros(1000), {'a': [0]}
    self.checkpoints.save(1, {'w': array}, documents)
    array += 1
    documents['a'].append(1)
    restored = self.checkpoints.restore(lambda documents: {'w': array})
    np.testing.assert_array_equal(restored.state['w'], 0)
    self.assertEqual(restored.documents, {'a': [0]})

  def test_damaged_files(self):
    self._save(1, 2)
    refused = 0
    for path in self._files(2):
      content = path.read_bytes()
      flipped = bytearray(content)
      flipped[len(content) // 2] ^= 1
      for damage in (content[: len(content) // 2], bytes(flipped), None):
        with self.subTest(path.name):
          if damage is None:
            path.unlink()
          else:
            path.write_bytes(damage)
          restored = self._restore()
          # Files that hold no contents may be damaged.
          self.assertEqual(restored.documents, {'saved': restored.step})
          self.assert_state(restored.state, _state(restored.step))
          if restored.step == 1:
            refused += 1
            (line,) = restored.refusals
            self.assertStartsWith(
                line, f'Checkpoint {self.directory}/2 refused: '
            )
            self.assertEndsWith(
                line, f' 1 is used instead; remove {self.directory}/2.'
            )
            self.assertNotIn('\n', line)
      path.write_bytes(content)
    self.assertGreater(refused, 10)
    self.assertEqual(self._restore().step, 2)

  def test_no_good_checkpoint_is_an_error(self):
    self._save(1, 2)
    for step in (1, 2):
      (self.directory / f'{step}/documents/metadata').write_text('?')
    with self.assertRaisesRegex(
        checkpoint.CheckpointError,
        r'^No checkpoint can be used. .*/2: damaged: .*/1: damaged: [^\n]*'
        'Start again in another --workdir.$',
    ):
      self._restore()

  @parameterized.named_parameters(
      ('shape', {'flags': np.zeros((3,), bool)}, r'bool\[2\], not bool\[3\]'),
      ('dtype', {'flags': np.zeros((2,), np.int8)}, r'bool\[2\], not int8\[2'),
      ('more', {'s0b1': np.zeros((2,), bool)}, r'missing, not bool\[2\]'),
      ('fewer', {'nan': {}}, r'float32\[3\], not wanted'),
  )
  def test_another_architecture_is_refused_whole(self, changes, message):
    self._save(1)
    state = _state()
    weights = {**state.params['weights'], **changes}
    wrong = state.replace(params={'weights': weights, 'aux': {}})
    with self.assertRaisesRegex(
        checkpoint.CheckpointError,
        'another architecture, method or optimizer: '
        f"'params/weights/{list(changes)[0]}' is {message}",
    ):
      self._restore(wrong)
    self.assertEqual(self._restore().step, 1)

  def test_documents_that_make_no_state_are_refused(self):
    self._save(1, 2)

    def abstract_of(documents):
      if documents['saved'] == 2:
        raise KeyError('stages')
      return _state()

    restored = self.checkpoints.restore(abstract_of)
    self.assertEqual(restored.step, 1)
    self.assertIn("2 refused: KeyError: 'stages'.", restored.refusals[0])

  def test_failed_saves_are_raised_later(self):
    self.directory.write_text('a file in the way')
    line = f'Cannot save step 1 in {self.directory}: File exists. Earlier'
    for later in (
        self.checkpoints.wait,
        lambda: self.checkpoints.save(2, _state(), {}),
        lambda: self.checkpoints.restore(_abstract(_state())),
    ):
      self.checkpoints.save(1, _state(), {})
      with self.assertRaisesRegex(checkpoint.CheckpointError, line):
        later()
      self.checkpoints.wait()
    self.directory.unlink()
    self._save(1)
    self.assertEqual(self._restore().step, 1)

  def test_paths_that_orbax_would_mix(self):
    state = {'a.b': np.ones(1), 'a': {'b': np.zeros(1)}}
    self.checkpoints.save(1, state, {})
    with self.assertRaisesRegex(ValueError, 'two arrays have the same path'):
      self.checkpoints.wait()

  def test_several_threads(self):
    def save(number):
      directory = self.directory / str(number % 3)
      checkpoints = managers[number % 3]
      state = {'w': np.full((5,), number, np.float32)}
      checkpoints.save(number, state, {'number': number})
      checkpoints.wait()
      fresh = checkpoint.Checkpoints(directory, keep=1)
      return fresh.restore(lambda documents: state)

    managers = [
        checkpoint.Checkpoints(self.directory / str(i), keep=20)
        for i in range(3)
    ]
    with futures.ThreadPoolExecutor(9) as pool:
      restored = list(pool.map(save, range(18)))
    for number, found in enumerate(restored):
      self.assertEqual(found.documents['number'] % 3, number % 3)
      self.assertEqual(found.refusals, ())
      np.testing.assert_array_equal(
          found.state['w'], found.documents['number']
      )
    for manager in managers:
      self.assertLen(manager.steps(), 6)

  def test_running_event_loop(self):
    async def save():
      self._save(1)
      return self._restore()

    self.assertEqual(asyncio.run(save()).step, 1)

  def test_kill_at_any_moment(self):
    generator = random.Random(0)
    for stride in (1, 0):  # A new step each time, or the same step.
      directory = self.directory / f'{generator.random()}'
      process = _run(_SAVE_FOR_EVER, directory, stride)
      lines = process.stdout.readline(), process.stdout.readline()
      self.assertEqual(lines, ('0\n', '1\n'))  # The first is committed.
      time.sleep(generator.uniform(0.05, 0.4))
      process.send_signal(signal.SIGKILL)
      output, _ = process.communicate()
      started = int((lines[1] + output).split()[-1])
      state = {f'k{j}': np.zeros((30,), np.float32) for j in range(10)}
      checkpoints = checkpoint.Checkpoints(directory, keep=2)
      restored = checkpoints.restore(lambda documents: state)
      value = restored.documents['value']
      self.assertBetween(value, started - 1, started + 1)
      self.assertEqual(restored.step, 1 + stride * value)
      self.assertEqual(restored.refusals, ())
      for leaf in restored.state.values():
        np.testing.assert_array_equal(leaf, value)
      checkpoints.save(restored.step, state, {})
      checkpoints.wait()
      self.assertCountEqual(
          os.listdir(directory), map(str, checkpoints.steps())
      )

  def test_file_size_limit(self):
    process = _run(_SAVE_UNDER_A_LIMIT, self.directory)
    output, errors = process.communicate(timeout=60)
    self.assertEqual(errors, '')
    line = (
        f'Cannot save step 2 in {self.directory}: File too large. Earlier '
        'checkpoints are intact.'
    )
    self.assertEqual(output.splitlines(), [line] * 3 + ['1'])
    self.assertEqual(os.listdir(self.directory), ['1'])


class DigestTest(absltest.TestCase):

  def test_depends_on_path_dtype_shape_and_bytes(self):
    trees = (
        {'a': np.zeros(4, np.float32)},
        {'b': np.zeros(4, np.float32)},
        {'a': np.zeros(4, np.int32)},
        {'a': np.zeros((2, 2), np.float32)},
        {'a': np.array([0, 0, 0, -0.0], np.float32)},
        {'a': np.zeros(4, np.float32), 'b': np.zeros(0)},
        {'a': jax.random.key(1)},
        {'a': jax.random.key_data(jax.random.key(1))},
    )
    self.assertLen({checkpoint.digest(tree) for tree in trees}, len(trees))

  def test_does_not_depend_on_order_place_or_layout(self):
    a, b = np.eye(3, dtype=np.float32)[:2], np.ones(2, np.float32)
    expected = checkpoint.digest({'a': a, 'b': b})
    for tree in (
        {'b': b, 'a': a},
        {'a': np.asfortranarray(a), 'b': jnp.asarray(b)},
    ):
      self.assertEqual(checkpoint.digest(tree), expected)

  def test_stays_what_it_was(self):
    tree = {
        'b': [np.arange(3, dtype=np.float32), np.int32(7)],
        'a': jax.random.key(5),
        'z': np.zeros((0, 2), bool),
    }
    self.assertEqual(
        checkpoint.digest(tree),
        'a91b7bdfa2dd101cb514e5a6efeeefae44bee9034141a30d4f34b0eca7d76921',
    )


if __name__ == '__main__':
  absltest.main()
