"""Runs that are killed, stopped or out of disk, and continue bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

from absl.testing import absltest
from absl.testing import parameterized
import pytest
import runs

from autogrow_jax.run import checkpoint
from autogrow_jax.run import train
from autogrow_jax.run import trained

# Each run is a fork of one process that has imported everything. It dies at the
# n-th call of a function, before, after, or halfway: for a write, with half of
# the bytes written.
_KILLER = '''
import importlib, json, os, signal, sys
from autogrow_jax import state
from autogrow_jax.run import config, history, programs, train
import sklearn.datasets

def die():
  os.kill(os.getpid(), signal.SIGKILL)

def arm(owner, name, number, when):
  function, calls = getattr(owner, name), 0
  def wrapped(*arguments, **keywords):
    nonlocal calls
    calls += 1
    if calls == number and when == 'before':
      die()
    if calls == number and when == 'half':
      receiver, line = arguments
      receiver._file.write(line[:len(line) // 2])
      die()
    result = function(*arguments, **keywords)
    if calls == number and when == 'after':
      die()
    return result
  setattr(owner, name, wrapped)

def always(cadence, **unused):
  return True

value, cache, deaths = json.load(sys.stdin)
statuses = []
for where, number, when, every_step in deaths:
  pid = os.fork()
  if not pid:
    try:
      train.cache_compilations(cache)
      if every_step:
        config.CheckpointConfig.is_due = always
      if where == 'a training step':
        compiled = programs.Programs.train_step
        def train_step(self, bucket, arguments):
          program = compiled(self, bucket, arguments)
          return lambda *arguments: step(program, *arguments)
        def step(program, *arguments):
          return program(*arguments)
        programs.Programs.train_step = train_step
        arm(sys.modules[__name__], 'step', number, when)
      elif where:
        owner, _, name = where.rpartition('.')
        arm(eval(owner), name, number, when)
      train.run(config.RunConfig.from_json(value))
      os._exit(0)
    finally:
      os._exit(1)
  statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(statuses))
'''

# A binary of `experiments` that may not write files above a size.
_LIMITED = '''
import resource, runpy, sys
limit, module = int(sys.argv[1]), sys.argv[2]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
del sys.argv[1:3]
runpy.run_module(f'experiments.{module}', run_name='__main__', alter_sys=True)
'''


def setUpModule():
  global BASE, RESULT
  directory = tempfile.TemporaryDirectory()
  unittest.addModuleCleanup(directory.cleanup)
  BASE = pathlib.Path(directory.name, 'base')
  RESULT = runs.quietly(runs.tiny(BASE))


def flags_of(workdir):
  """The command of the tiny run."""
  return [
      f'--workdir={workdir}', '--network.widths=4-8-16', '--grow_interval=1',
      '--stop_window=2', '--policy.max_depths=2-2-1', '--learning_rate=0.05',
      '--finetune_epochs=2', '--batch_size=64', '--compare=',
      '--nodevices.compile_ahead',
      f'--compilation_cache={runs.CACHE}',
  ]


class ResumeTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(directory, 'run')

  def assert_undisturbed(self):
    """The run ended as the usual one that nobody disturbed."""
    result = train.read_result(self.workdir)
    for key in ('params_digest', 'found', 'test_accuracy', 'train_macs'):
      self.assertEqual(result[key], RESULT[key], key)
    self.assertEqual(runs.course(self.workdir), runs.course(BASE))

  def die(self, *deaths):
    """Runs that die, one after the other, and one that does not."""
    done = subprocess.run(
        [sys.executable, '-c', _KILLER],
        input=json.dumps([
            runs.tiny(self.workdir).to_json(),
            runs.CACHE,
            [*deaths, ('', 0, '', False)],
        ]),
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(
        json.loads(done.stdout.splitlines()[-1]), [-9] * len(deaths) + [0],
        done.stderr,
    )
    self.assertEqual(done.stderr, '')
    self.assert_undisturbed()

  def test_killed_anywhere(self):
    self.die(
        # config.json, half made; the first growth.
        ('os.replace', 1, 'before', False),
        ('state.grow', 1, 'after', False),
        # The first save, which a thread writes: before, within, after it.
        ('os.posix_fallocate', 1, 'before', False),
        ('os.rename', 4, 'before', False),
        # In line 4 of what it appends to the history: a cut line.
        ('history.History._write', 4, 'half', False),
    )

  @pytest.mark.slow
  def test_killed_within_epochs_and_at_the_end(self):
    self.die(
        # The very first steps, two moments of a save, and before a growth.
        ('a training step', 5, 'before', False),
        ('os.rename', 2, 'before', False),
        ('os.rename', 4, 'after', False),
        ('state.grow', 1, 'before', False),
        # As with a cadence of minutes: checkpoints within an epoch.
        ('a training step', 13, 'before', True),
        ('a training step', 13, 'before', True),
        ('os.rename', 39, 'after', True),
        # All trained and saved, without a result.
        ('history.write_json', 1, 'before', False),
    )
    (end,) = runs.records(self.workdir, 'end')
    self.assertEqual(end['step'], 5 * runs.STEPS)

  def test_signals_to_the_binary(self):
    for signum, status, epochs in (
        (signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 3)
    ):
      process = runs.start('autogrow', *flags_of(self.workdir))
      self.wait_for_epochs(process, epochs)
      process.send_signal(signum)
      outcome = runs.finish(process)
      self.assertEqual(outcome.status, status, outcome)
      self.assertRegex(
          outcome.stderr,
          rf'^{signum.name}: saved after epoch \d, step \d+ in '
          rf'{self.workdir}; the same command continues.\n$',
      )
      self.assertIsNone(train.read_result(self.workdir))
    runs.quietly(runs.tiny(self.workdir))
    self.assert_undisturbed()

  def wait_for_epochs(self, process, number):
    """Waits until the history of a process has so many epochs."""
    while process.poll() is None:
      if (self.workdir / 'history.jsonl').exists():
        if len(runs.records(self.workdir, 'epoch')) >= number:
          return
      time.sleep(0.02)
    self.fail(f'It ended too early: {runs.finish(process)}')

  @pytest.mark.slow
  def test_full_disk(self):
    # No room for the next checkpoint; then not even for the history.
    def at_step(count, unused_arguments):
      if count == 20:
        os.kill(os.getpid(), signal.SIGTERM)

    with runs.watch_steps(at_step):
      with self.assertRaises(train.Interrupted):
        runs.quietly(runs.tiny(self.workdir))
    for limit in (40_000, 600):
      process = subprocess.Popen(
          [
              sys.executable, '-c', _LIMITED, str(limit), 'autogrow',
              *flags_of(self.workdir),
          ],
          cwd=runs.ROOT,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
      )
      outcome = runs.finish(process)
      self.assertEqual(outcome.status, 2, outcome)
      self.assertRegex(outcome.stderr, '^error: .*File too large.*\n$')
      self.assertEqual(
          checkpoint.Checkpoints(self.workdir / 'checkpoints', keep=2).steps(),
          (16, 20),
      )
      self.assertEqual(trained.load(self.workdir).epoch, 1)
    runs.quietly(runs.tiny(self.workdir))
    self.assert_undisturbed()


if __name__ == '__main__':
  absltest.main()
