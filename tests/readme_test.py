"""Runs the Python examples of the pages, as they stand there."""

import collections
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap

from absl.testing import absltest
import pytest
import runs

from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax.run import console
from autogrow_jax.run import resolve
from experiments import presets
from experiments.studies import null_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHECK = '''
assert logits.shape == (5, 2), logits.shape
result = ag.run(
    ag.RunConfig(
        workdir='runs/wide',
        network=config.NetworkConfig('my_networks:WIDE3', widths=(4, 8, 16)),
        policy=config.PolicyConfig(interval=1, window=1, max_depths=(2, 1, 1)),
        schedule=config.ScheduleConfig(finetune_epochs=1),
        batch_size=50,
    ),
    dataset=dataset,
)
assert result['found'] == '2-1-1', result['found']
kernel = ag.load('runs/wide').weights['s0b1']['conv1']['kernel']
assert kernel.shape == (5, 5, 4, 4), kernel.shape
'''


def examples(page: str) -> list[str]:
  text = (ROOT / page).read_text()
  return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


class PagesTest(absltest.TestCase):

  def test_examples_run(self):
    (loop,) = examples('README.md')
    *parts, block = examples('docs/extend.md')
    with tempfile.TemporaryDirectory() as directory:
      directory = pathlib.Path(directory)
      (directory / 'my_networks.py').write_text(block)
      (directory / 'main.py').write_text(
          '\n'.join([loop, 'print("END")', *parts, CHECK])
      )
      done = subprocess.run(
          [sys.executable, 'main.py'],
          cwd=directory,
          env={**os.environ, 'PYTHONPATH': f'{ROOT}:{directory}'},
          capture_output=True,
          text=True,
          check=False,
      )
    self.assertEqual(done.returncode, 0, done.stderr[-3000:])
    printed, _, _ = done.stdout.partition('END\n')
    # Zero may be 1e-8 on another machine.
    printed = re.sub(r'(outputs:) \d\.?\d*e-0[78]', r'\1 0', printed)
    self.assertStartsWith(printed, 'widen ')
    self.assertIn(
        textwrap.indent(printed, '    '), (ROOT / 'README.md').read_text()
    )

  @pytest.mark.ci
  def test_commands_have_flags_that_exist(self):
    sources = [
        ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md'),
        *(ROOT / 'experiments').glob('*.py'),
    ]
    text = ''.join(path.read_text() for path in sources)
    text = re.sub(r'\\+\n\s+', '', text)
    commands = collections.defaultdict(set)
    for binary, arguments in re.findall(
        r'^ +python -m experiments\.(\w+)(?!\.)\b(.*)', text, re.MULTILINE
    ):
      given = re.split('#|"""', arguments)[0].split()
      commands[binary].add(tuple(a for a in given if a.startswith('--')))
    self.assertIn('autogrow', commands)
    for binary, calls in commands.items():
      calls = sorted(call for call in calls if call)
      outcomes = runs.call(binary, [[*call, '-h'] for call in calls])
      for call, outcome in zip(calls, outcomes, strict=True):
        self.assertEqual(outcome.status, 0, (binary, call, outcome.stderr))
        for flag in call:
          name = flag.partition('=')[0]
          self.assertIn(f'\n  {name}: ', outcome.stdout, (binary, call))
  def test_the_demo_says_what_agrees_on_every_machine(self):
    """Sizes of networks, and the floor; accuracies differ by rounding."""
    readme = (ROOT / 'README.md').read_text()
    run_config = presets.get('dots')
    dataset = data.load(run_config.data, seed=0)
    architecture = resolve.seed_architecture(run_config, dataset)
    floor = null_model.floor(run_config.make_policy(architecture.depths))
    self.assertIn(f'the policy finds {floor.depths[0]} (floor:', readme)
    self.assertIn(f'{architecture.family} on {dataset.name}, seed 0', readme)
    rows = re.findall(r'^ +(?:grown|seed, fixed) +(\d+) +(.*?)  +\d+\.',
                      readme, re.MULTILINE)
    self.assertLen(rows, 2)
    for depth, sizes in rows:
      while architecture.depths[0] < int(depth):
        architecture = architecture.with_block(0)
      counts = costs.params(architecture), costs.macs(architecture)
      self.assertEqual(sizes.split('  ')[0], console.format_count(counts[0]))
      self.assertEndsWith(sizes, console.format_count(counts[1]))
      architecture = resolve.seed_architecture(run_config, dataset)

  def test_commands_name_existing_binaries(self):
    pages = [ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')]
    text = ''.join(page.read_text() for page in pages)
    names = set(re.findall(r'python -m (experiments[\w.]*\w)', text))
    for name in names:
      path = ROOT.joinpath(*name.split('.'))
      exists = path.with_suffix('.py').exists() or path.is_dir()
      self.assertTrue(exists, name)
    self.assertIn('experiments.autogrow', names)


if __name__ == '__main__':
  absltest.main()
