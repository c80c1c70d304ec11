"""Benchmarks are commands that a user can start."""

import pathlib
import subprocess
import sys

from absl.testing import absltest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Those that need PyTorch import it when they run, or are of this kind.
_EXTRA = {'torch_resnet'}

# One process imports what all of them need, and a fork of it each of them,
# since they define flags of the same names.
_CHILD = """
import importlib, os, sys
from autogrow_jax.run import train
from benchmarks import common
from experiments import flags
for name in sys.argv[1:]:
  if not os.fork():
    importlib.import_module('benchmarks.' + name).main
    os._exit(0)
  if os.wait()[1]:
    sys.exit(name)
"""


class BenchmarksTest(absltest.TestCase):

  def test_can_be_started(self):
    names = [path.stem for path in (ROOT / 'benchmarks').glob('[!_]*.py')]
    commands = sorted({*names} - _EXTRA - {'common', 'steps'})
    self.assertContainsSubset({'growth', 'step', 'scaling'}, commands)
    done = subprocess.run(
        [sys.executable, '-c', _CHILD, *commands],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == '__main__':
  absltest.main()
