"""A new built-in of each kind is at most two files of the library.

Each kind is added to a copy of the package by a written patch; then a tiny run
in the copy uses all of them by their names.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest

import autogrow_jax

PACKAGE = pathlib.Path(autogrow_jax.__file__).parent

# Kind -> file -> (anchor, text before the anchor); a new file has no anchor.
PATCHES = {
    'policy': {
        'policies.py': (
            ('POLICIES: dict', '''
@dataclasses.dataclass(frozen=True)
class Once(Policy):
  """Grows a single time."""

  after: int = _setting('epoch after which to grow')
  epoch: int = 0

  @property
  def finished(self) -> bool:
    return self.epoch >= self.after

  def update(self, observation: Observation) -> tuple[Self, Decision]:
    policy = dataclasses.replace(self, epoch=observation.epoch)
    return policy, grow() if policy.finished else KEEP


'''),
            ("    'fixed': Fixed,", "    'once': Once,\n"),
        ),
        'run/config.py': (
            ('  def __post_init__', "  after: int = _policy('after', 1)\n\n"),
        ),
    },
    'method': {
        'methods/wider.py': '''
"""Adds units to the first hidden layer."""

import dataclasses

from autogrow_jax import state as state_lib
from autogrow_jax.core import growth
from autogrow_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Wider(base.Method):
  """Widens at every growth."""

  units: int = dataclasses.field(default=2, metadata={'help': 'New units.'})

  def propose(self, decision, situation):
    if decision.action != 'grow':
      return None
    axes = state_lib.axis_table(situation.architecture)
    size = axes.sizes['s0b0.out'] + self.units
    return growth.widen(axes, 's0b0.out', to=size)
''',
        'run/config.py': (
            ("    'autogrow': ",
             "    'wider': 'autogrow_jax.methods.wider:Wider',\n"),
        ),
    },
    'network': {
        'networks/narrow.py': '''
"""A perceptron with a single narrow layer."""

from autogrow_jax.networks import mlp

NARROW = mlp.Perceptron('narrow', 'Narrow', (6,))
''',
        'networks/__init__.py': (
            ('from autogrow_jax.networks import plain\n',
             'from autogrow_jax.networks import narrow\n'),
            ('        mlp.MLP,', '        narrow.NARROW,\n'),
        ),
    },
    'task': {
        'tasks.py': (
            ('TASKS = ', '''
@dataclasses.dataclass(frozen=True)
class Smoothed(Classes):
  """Classes with smoothed labels."""

  def loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    targets = optax.smooth_labels(targets, 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


'''),
        ),
    },
    'optimizer': {
        'optimizers.py': (
            ("    'adamw': ", "    'sign': 'autogrow_jax.optimizers:Sign',\n"),
            ('@dataclasses.dataclass(frozen=True)\nclass AdamW', '''
@dataclasses.dataclass(frozen=True)
class Sign(Optimizer):
  """The sign of the gradient."""

  def transformation(
      self, learning_rate: jax.Array
  ) -> optax.GradientTransformation:
    return optax.sign_sgd(learning_rate)


'''),
        ),
    },
    'data source': {
        'data/sources.py': (
            ('SOURCES = {', '''
def _open_stripes(data_dir: str | None) -> Read:
  """Vertical and horizontal stripes."""
  del data_dir

  def read(split: str) -> images_lib.Records:
    labels = np.arange({'train': 96, 'test': 32}[split], dtype=np.int32) % 2
    stripes = np.zeros((4, 4), np.uint8)
    stripes[::2] = 255
    kinds = np.stack([stripes, stripes.T])[..., None]
    return splits.Split(kinds[labels], labels)

  return read


'''),
            ("    'digits': Source(", "    'stripes': Source(\n"
             '        2, (4, 4, 1), _open_stripes, 32,\n'
             '        Preprocessing((0.5,), (0.5,)), 96, 32,\n    ),\n'),
        ),
    },
}
PROGRAM = '''
import json
import autogrow_jax as ag
config = ag.RunConfig.from_json({
    'workdir': 'run',
    'data': {'dataset': 'stripes'},
    'network': {'name': 'narrow'},
    'policy': {'name': 'once', 'after': 1},
    'method': {'kind': 'wider', 'units': 3},
    'optimizer': {'kind': 'sign'},
    'schedule': {'finetune_epochs': 1, 'learning_rate': 0.01},
    'batch_size': 32,
})
result = ag.run(config, task=ag.tasks.Smoothed())
stored = json.load(open('run/config.json'))
print(json.dumps([
    ag.__file__, result['dataset'], result['network'], result['method'],
    result['growths'], result['architecture']['sizes']['s0b0.out'],
    stored['policy']['after'], stored['optimizer']['kind'], stored['own'],
]))
'''


class BuiltInTest(absltest.TestCase):

  def test_at_most_two_files(self):
    root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    root = root.resolve()
    copy = root / 'autogrow_jax'
    shutil.copytree(
        PACKAGE, copy, ignore=shutil.ignore_patterns('__pycache__')
    )
    for kind, files in PATCHES.items():
      self.assertLessEqual(len(files), 2, kind)
      for name, edits in files.items():
        path = copy / name
        if isinstance(edits, str):
          self.assertFalse(path.exists(), name)
          path.write_text(edits.lstrip())
          continue
        text = path.read_text()
        for anchor, added in edits:
          self.assertIn(anchor, text, name)
          text = text.replace(anchor, added + anchor, 1)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM],
        cwd=root,
        env={**os.environ, 'PYTHONPATH': str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-3000:])
    self.assertEqual(
        json.loads(done.stdout.splitlines()[-1]),
        [
            str(copy / '__init__.py'), 'stripes', 'narrow', 'wider', 1, 9, 1,
            'sign', 'task autogrow_jax.tasks:Smoothed Smoothed()',
        ],
    )


if __name__ == '__main__':
  absltest.main()
