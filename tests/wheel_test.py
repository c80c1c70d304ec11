"""The wheel, in an empty environment: binaries, scripts, README's example."""

import json
import pathlib
import re
import tempfile

from absl.testing import absltest
import environments
import pytest


@pytest.mark.ci
class WheelTest(absltest.TestCase):

  def test_installed_package(self):
    root = environments.ROOT
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      programs = environments.make(folder / 'environment')
      python = str(programs / 'python')
      install = [python, '-m', 'pip', 'install', '-q']
      environments.call([*install, environments.wheel()], folder)

      with self.subTest('without extras'):
        (example,) = re.findall(
            r'```python\n(.*?)```', (root / 'README.md').read_text(), re.DOTALL
        )
        self.assertIn(
            'optimizer: 35 kept, 6 changed',
            environments.call([python, '-c', example], folder),
        )
        described = environments.call(
            [str(programs / 'autogrow-describe'), '--format=json'], folder
        )
        self.assertEqual(json.loads(described)['params'], 78042)
        with self.assertRaisesRegex(AssertionError, r'autogrow-jax\[demo\]'):
          environments.call([str(programs / 'autogrow')], folder)

      wheel = f'{environments.wheel()}[demo,report]'
      environments.call([*install, wheel], folder)
      flags = [*environments.TINY, *environments.GROWING]
      for name, command in (
          ('script', [str(programs / 'autogrow')]),
          ('module', [python, '-m', 'autogrow_jax.experiments.autogrow']),
      ):
        with self.subTest(name):
          environments.call([*command, *flags, f'--workdir={name}'], folder)
          self.assertTrue((folder / name / 'report.html').exists())
      digests = {
          json.loads((folder / name / 'result.json').read_text())[
              'params_digest'
          ]
          for name in ('script', 'module')
      }
      self.assertLen(digests, 1)


if __name__ == '__main__':
  absltest.main()
