"""The work directory of a run: claimed by its configuration, and locked."""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import socket
from typing import Any

from autogrow_jax.run import config as config_lib
from autogrow_jax.run import history
from autogrow_jax.run import settings

RunConfig = config_lib.RunConfig

# Files that a start which was killed at once may leave behind.
_REMAINS = {'config.json.new', 'lock'}


@contextlib.contextmanager
def claimed(config: RunConfig) -> Iterator[None]:
  """Makes the work directory this run's own, or checks that it is.

  Within the context no other process or thread can claim it. The kernel frees
  the lock of a process that is killed. A finished run needs no lock.

  Raises:
    ValueError: the directory holds something else, or a run that still works.
  """
  workdir = pathlib.Path(config.workdir)
  with contextlib.ExitStack() as stack:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      names = {item.name for item in workdir.iterdir()}
      if 'config.json' not in names and names - _REMAINS:
        raise ValueError(
            f'Work directory {workdir} is not empty and holds no run; choose '
            'another.'
        )
      if 'result.json' not in names:
        _lock(stack.enter_context(open(workdir / 'lock', 'a+')), workdir)
      _claim(config, workdir / 'config.json')
    except OSError as error:
      raise ValueError(
          f'Work directory {workdir} cannot be used: {error.strerror}; choose '
          'another with --workdir.'
      ) from error
    yield


def _lock(file: Any, workdir: pathlib.Path) -> None:
  """Locks a file until it is closed, and names this process in it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.seek(0)
    raise ValueError(
        f'Work directory {workdir} is in use by {file.read() or "another"}; '
        'wait for it, stop it, or choose another with --workdir.'
    ) from error
  except OSError:  # A file system that has no locks.
    pass
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}')
  file.flush()


def _claim(config: RunConfig, path: pathlib.Path) -> None:
  """Writes the configuration, or compares it with the one that is there."""
  if (stored := history.read_json(path)) is None:
    history.write_json(path, config.to_json())
    return
  try:
    known = RunConfig.from_json(stored)
  except ValueError as error:
    raise ValueError(
        f'{path} is not of a run: {error} Choose another work directory.'
    ) from error
  continued = known
  if config.data.skip_damaged and not known.data.skip_damaged:
    # Nothing read so far was damaged: that would have raised.
    continued = settings.replace(known, {'data.skip_damaged': True})
  if changed := settings.differences(_outcome(continued), _outcome(config)):
    raise ValueError(
        f'Work directory {path.parent} holds another run ('
        + '; '.join(changed)
        + '); choose another, or repeat its configuration to continue it.'
    )
  if continued != known:
    history.write_json(path, continued.to_json())


def _outcome(config: RunConfig) -> dict[str, Any]:
  """The fields of a configuration that its result depends on, as JSON."""
  neutral = settings.replace(config, {
      'workdir': '',
      'checkpoints': config_lib.CheckpointConfig(),
      'data.data_dir': None,
      'devices.decode_workers': 0,
      'devices.compile_ahead': True,
      'devices.remat': 'none',
  })
  return json.loads(history.dumps(neutral.to_json()))
