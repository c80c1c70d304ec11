"""Other Pythons that the README promises: a run of each method, and a resume.

The one that runs the tests is tested by all others, and by `wheel_test`.
"""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest
from absl.testing import parameterized
import environments
import pytest

VERSIONS = ('3.11', '3.12', '3.13')


def find(version: str) -> str | None:
  """A Python of a version, if it is installed."""
  candidates = [shutil.which(f'python{version}')]
  candidates += sorted(
      pathlib.Path.home().glob(f'.pyenv/versions/{version}.*/bin/python')
  )
  for candidate in filter(None, candidates):
    done = subprocess.run(
        [str(candidate), '-c', 'import sys; print(sys.version_info[:2])'],
        capture_output=True, text=True, check=False,
    )
    if done.stdout.strip() == str(tuple(map(int, version.split('.')))):
      return str(candidate)
  return None


@pytest.mark.ci
class PythonsTest(parameterized.TestCase):

  @parameterized.parameters(*VERSIONS)
  def test_runs(self, version):
    if version == f'{sys.version_info.major}.{sys.version_info.minor}':
      self.skipTest(f'PYTHON {version} RUNS ALL OTHER TESTS: NOT TRIED HERE')
    if (found := find(version)) is None:
      self.skipTest(f'PYTHON {version} IS NOT INSTALLED HERE: NOT TESTED')
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      python = str(environments.make(folder / 'environment', found) / 'python')
      environments.call(
          [python, '-m', 'pip', 'install', '-q',
           f'{environments.wheel()}[demo]'],
          folder,
      )
      for binary, flags in (
          ('autogrow', environments.GROWING),
          ('baseline', ('--depths=1-1-1',)),
          ('sparsify', ('--epochs=3',)),
          ('gauss_newton', ('--phases=1', '--seed_width=4')),
      ):
        tiny = [f for f in environments.TINY if 'widths' not in f]
        if binary in ('autogrow', 'baseline'):
          tiny = environments.TINY
        with self.subTest(binary):
          environments.call(
              [python, '-m', f'autogrow_jax.experiments.{binary}', *tiny,
               *flags, f'--workdir={binary}'],
              folder,
          )
      with self.subTest('a kill and a resume'):
        self.check_resume(python, folder)

  def check_resume(self, python: str, folder: pathlib.Path) -> None:
    command = [
        python, '-m', 'autogrow_jax.experiments.autogrow', *environments.TINY,
        *environments.GROWING, '--workdir=killed',
    ]
    process = subprocess.Popen(
        command, cwd=folder, env=environments.ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    history = folder / 'killed' / 'history.jsonl'
    while process.poll() is None:
      if history.exists() and '"event": "epoch"' in history.read_text():
        process.send_signal(signal.SIGKILL)
      time.sleep(0.05)
    environments.call(command, folder)
    digests = {
        json.loads((folder / name / 'result.json').read_text())['params_digest']
        for name in ('autogrow', 'killed')
    }
    self.assertLen(digests, 1)


if __name__ == '__main__':
  absltest.main()
