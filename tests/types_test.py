"""The typed rooms of the library have no type errors."""

import subprocess
import sys

from absl.testing import absltest
import environments
import pytest


@pytest.mark.ci
class TypesTest(absltest.TestCase):

  def test_mypy(self):
    done = subprocess.run(
        [sys.executable, '-m', 'mypy'], cwd=environments.ROOT,
        capture_output=True, text=True, check=False,
    )
    self.assertEqual(done.returncode, 0, done.stdout)


if __name__ == '__main__':
  absltest.main()
