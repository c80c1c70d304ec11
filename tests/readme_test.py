"""Runs the README's Python examples, as they stand there."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

from absl.testing import absltest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def examples() -> list[str]:
  text = (ROOT / 'README.md').read_text()
  return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


class ReadmeTest(absltest.TestCase):

  def test_examples_run(self):
    arrays, policy, block = examples()
    check = '''
import numpy as np
assert logits.shape == (5, 2), logits.shape
config_ = config.RunConfig(
    workdir='runs/wide',
    network=config.NetworkConfig('my_networks:WIDE3', widths=(4, 8, 16)),
    policy=config.PolicyConfig(interval=1, window=1, max_depths=(2, 1, 1)),
    schedule=config.ScheduleConfig(finetune_epochs=1),
    batch_size=50,
)
result = train.run(config_, dataset=dataset)
assert result['found'] == '2-1-1', result['found']
kernel = trained.load('runs/wide').weights['s0b1']['conv1']['kernel']
assert kernel.shape == (5, 5, 4, 4), kernel.shape
'''
    with tempfile.TemporaryDirectory() as directory:
      directory = pathlib.Path(directory)
      (directory / 'my_networks.py').write_text(block)
      (directory / 'main.py').write_text('\n'.join([arrays, policy, check]))
      done = subprocess.run(
          [sys.executable, 'main.py'],
          cwd=directory,
          env={**os.environ, 'PYTHONPATH': f'{ROOT}:{directory}'},
          capture_output=True,
          text=True,
          check=False,
      )
    self.assertEqual(done.returncode, 0, done.stderr[-3000:])

  def test_has_no_placeholders(self):
    self.assertNotIn('@@', (ROOT / 'README.md').read_text())

  def test_command_lines_name_existing_binaries(self):
    text = (ROOT / 'README.md').read_text()
    names = set(re.findall(r'python -m experiments\.(\w+)', text))
    self.assertContainsSubset(
        names, {path.stem for path in (ROOT / 'experiments').glob('*.py')}
    )
    self.assertIn('autogrow', names)


if __name__ == '__main__':
  absltest.main()
