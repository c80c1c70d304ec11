"""Tiny runs for tests: digits, 4-8-16 channels, every program traced once.

Tracing and compiling dominate, so all runs of a process share their programs,
and the usual run has three architectures: 1-1-1, 2-1-1 and 2-2-1.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple
from unittest import mock

from absl.testing import parameterized
import jax

from autogrow_jax import optimizers
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import parallel
from autogrow_jax.run import programs
from autogrow_jax.run import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = os.environ['JAX_COMPILATION_CACHE_DIR']  # See conftest.py.

# 1437 - 360 training images in batches of 64.
STEPS = 16
HOLDOUT = 360

_TINY = {
    'network': {'widths': [4, 8, 16]},
    'policy': {'interval': 1, 'window': 2, 'max_depths': [2, 2, 1]},
    'schedule': {'learning_rate': 0.05, 'finetune_epochs': 2},
    # Not to compile what is not needed; binaries, that are killed, do.
    'devices': {'compile_ahead': False},
    'batch_size': 64,
}

# Serves many calls of a binary from one process that has imported everything:
# each call is a fork, so that it has its own flags, devices and exit status.
_SERVER = '''
import importlib, io, json, os, runpy, sys, tempfile, traceback
import sklearn.datasets
module = importlib.import_module(sys.argv[1])
calls = json.load(sys.stdin)
results = []
for arguments in calls:
  files = [tempfile.TemporaryFile() for _ in range(2)]
  pid = os.fork()
  if not pid:
    for number, file in enumerate(files, start=1):
      os.dup2(file.fileno(), number)
    sys.argv = [module.__name__, *arguments]
    status = 1
    try:
      module.main()
      status = 0
    except SystemExit as error:
      status = error.code or 0
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(status)
  _, status = os.waitpid(pid, 0)
  for file in files:
    file.seek(0)
  texts = [file.read().decode() for file in files]
  results.append([os.waitstatus_to_exitcode(status), *texts])
json.dump(results, sys.stdout)
'''


class Outcome(NamedTuple):
  """What a process left behind."""

  status: int
  stdout: str
  stderr: str


def tiny(
    workdir: str | os.PathLike[str], **changes: Any
) -> config_lib.RunConfig:
  """A tiny configuration; nested fields are changed by nested dictionaries."""
  value = _merge(_TINY, changes)
  return config_lib.RunConfig.from_json({'workdir': str(workdir), **value})


def quietly(
    config: config_lib.RunConfig,
    *,
    stdout: io.StringIO | None = None,
    **arguments: Any,
) -> dict[str, Any]:
  """Calls `train.run`, with shared programs; `stdout` gets what it prints."""
  with (
      contextlib.redirect_stdout(stdout or io.StringIO()),
      mock.patch.object(optimizers, 'make', _optimizer),
      mock.patch.object(parallel.Parallel, 'compile', _compile),
  ):
    return train.run(config, **arguments)


_optimizer = functools.cache(optimizers.make)  # Equal ones are one object.
_compiled: dict[Any, Any] = {}
_compile_anew = parallel.Parallel.compile


def _compile(self, function, arguments, **options):
  """`Parallel.compile`, once per function, shapes and devices."""
  leaves, structure = jax.tree.flatten(arguments)
  key = (
      self, function.func, function.args, structure, *options.items(),
      *((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves),
  )
  if key not in _compiled:
    _compiled[key] = _compile_anew(self, function, arguments, **options)
  return _compiled[key]


def watch_steps(
    at_step: Callable[[int, tuple[Any, ...]], None],
) -> contextlib.AbstractContextManager[Any]:
  """Within it, calls `at_step` before every training step.

  Args:
    at_step: called with the number of the step in this process, from 1, and
      the arguments of the compiled program.

  Returns:
    The context.
  """
  count = 0
  original = programs.Programs.train_step

  def train_step(self, bucket, arguments):
    compiled = original(self, bucket, arguments)

    def run(*arguments):
      nonlocal count
      count += 1
      at_step(count, arguments)
      return compiled(*arguments)

    return run

  return mock.patch.object(programs.Programs, 'train_step', train_step)


def records(
    workdir: str | os.PathLike[str], event: str | None = None
) -> list[dict[str, Any]]:
  """The history of a run, of one kind of event or all."""
  history = history_lib.read(pathlib.Path(workdir) / 'history.jsonl')
  return [item for item in history if event in (None, item['event'])]


def course(workdir: str | os.PathLike[str]) -> list[tuple[Any, ...]]:
  """All of a history that must not depend on time, machine or interruptions."""
  volatile = {
      'wall_seconds', 'compile_seconds', 'compile_count', 'images_per_second',
      'device_bytes', 'seconds',
  }
  return [
      {name: item for name, item in record.items() if name not in volatile}
      for record in records(workdir)
      if record['event'] != 'compile'
  ]


def call(module: str, calls: list[list[str]]) -> list[Outcome]:
  """Runs a binary of `experiments` with several lists of arguments."""
  done = subprocess.run(
      [sys.executable, '-c', _SERVER, f'experiments.{module}'],
      input=json.dumps(calls),
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  if done.returncode:
    raise RuntimeError(done.stderr)
  return [Outcome(*item) for item in json.loads(done.stdout)]


def start(module: str, *arguments: str, **options: Any) -> subprocess.Popen:
  """Starts a binary of `experiments` for real."""
  return subprocess.Popen(
      [sys.executable, '-m', f'experiments.{module}', *arguments],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      **options,
  )


def finish(process: subprocess.Popen) -> Outcome:
  """Waits for a process."""
  stdout, stderr = process.communicate(timeout=300)
  return Outcome(process.returncode, stdout, stderr)


def arguments_of(
    bad: Sequence[tuple[str, str]], *common: str, **names: str
) -> list[list[str]]:
  """Arguments of the calls of a table of (arguments, message)."""
  return [
      [*common, *arguments.format(**names).split()] for arguments, _ in bad
  ]


def check_refused(
    test: parameterized.TestCase,
    outcomes: Sequence[Outcome],
    bad: Sequence[tuple[str, str]],
) -> None:
  """Checks for status 2 and one line that says what is wrong."""
  for outcome, (arguments, message) in zip(outcomes, bad, strict=True):
    with test.subTest(arguments):
      test.assertEqual((outcome.status, outcome.stdout), (2, ''), outcome)
      test.assertRegex(outcome.stderr, f'^error: .*({message}).*\n$')
      test.assertEqual(outcome.stderr.count('\n'), 1, outcome.stderr)


def check_help(
    test: parameterized.TestCase, outcome: Outcome, module: str, *own: str
) -> None:
  """Checks that help has the binary's command and flags of its own."""
  test.assertEqual((outcome.status, outcome.stderr), (0, ''))
  test.assertIn(f'python -m experiments.{module}', outcome.stdout)
  for flag in own:
    test.assertIn(f'\n  --{flag}: ', outcome.stdout)
  test.assertNotIn('--logtostderr', outcome.stdout)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
  result = dict(old)
  for name, item in new.items():
    if isinstance(item, dict):
      item = _merge(old.get(name, {}), item)
    result[name] = item
  return result
