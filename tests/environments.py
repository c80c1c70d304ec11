"""Fresh virtual environments, for tests of what pip installs."""

import atexit
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Without the flags and paths of this process. Compiling takes longer than tiny
# runs; modules are compiled to byte code when they are first imported.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ('PYTHONPATH', 'XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')
} | {
    'JAX_PLATFORMS': 'cpu',
    'PIP_NO_COMPILE': '1',
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
}

# Flags of a run of some seconds.
TINY = (
    '--network.widths=4-4-4', '--data.data_fraction=0.2', '--batch_size=32',
    '--finetune_epochs=1', '--compilation_cache=compiled',
)
GROWING = (
    '--policy.max_depths=2-1-1', '--grow_interval=1', '--stop_window=1',
    '--compare=',
)


def call(command: list[str], cwd: str | os.PathLike[str]) -> str:
  """Standard output of a command that must succeed."""
  done = subprocess.run(
      command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
      check=False,
  )
  if done.returncode:
    raise AssertionError(f'{" ".join(command)}:\n{done.stderr[-3000:]}')
  return done.stdout


@functools.cache
def wheel() -> str:
  """The package, built once per process."""
  folder = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, folder)
  call(
      [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', folder,
       str(ROOT)],
      folder,
  )
  (path,) = pathlib.Path(folder).glob('*.whl')
  return str(path)


def make(folder: pathlib.Path, python: str = sys.executable) -> pathlib.Path:
  """Makes an environment; returns its folder of programs."""
  if python == sys.executable:
    venv.create(folder, with_pip=True)
  else:
    call([python, '-m', 'venv', str(folder)], folder.parent)
  return folder / 'bin'
