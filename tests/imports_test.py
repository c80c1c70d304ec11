"""Tests of the order of modules: lower rows import only from rows above."""

import ast
import graphlib
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

import autogrow_jax

PACKAGE = pathlib.Path(autogrow_jax.__file__).parent

# A module imports from its own row and those above, without cycles.
ROWS = (
    (
        '',
        'architecture',
        'controls',
        'paired',
        'policies',
        'randomness',
        'version',
    ),
    ('layers',),
    (
        'networks',
        'networks.base',
        'networks.common',
        'networks.deeplab',
        'networks.lstm',
        'networks.mlp',
        'networks.mobilenet',
        'networks.plain',
        'networks.residual',
        'networks.runs',
        'networks.taps',
        'networks.vgg',
        'networks.wide',
    ),
    ('costs', 'optimizers', 'state'),
    ('growth', 'linalg', 'view'),
    (
        'methods',
        'methods.autogrow',
        'methods.base',
        'methods.gauss_newton',
        'methods.gauss_newton.calibration',
        'methods.gauss_newton.estimates',
        'methods.gauss_newton.joint',
        'methods.gauss_newton.matrix_free',
        'methods.gauss_newton.method',
        'methods.gauss_newton.norms',
        'methods.gauss_newton.prunes',
        'methods.gauss_newton.rivals',
        'methods.gauss_newton.selection',
        'methods.gauss_newton.signals',
        'methods.gauss_newton.sites',
        'methods.gauss_newton.splits',
        'methods.gauss_newton.surgery',
        'methods.gauss_newton.trials',
        'methods.sparsify',
        'methods.sparsify.dynamics',
        'methods.sparsify.masks',
        'methods.sparsify.method',
        'methods.sparsify.pruning',
        'methods.sparsify.space',
    ),
    (
        'checkpoint',
        'data',
        'data.datasets',
        'data.folder',
        'data.images',
        'data.pairs',
        'data.pipeline',
        'data.prepared',
        'data.sources',
        'data.stratified',
        'data.streams',
        'data.text',
        'evaluation',
        'logs',
        'parallel',
    ),
    ('config',),
    ('feeds', 'programs'),
    ('trained',),
    ('learning_costs', 'session', 'studies'),
    ('results',),
    ('train',),
)
RANK = {name: rank for rank, names in enumerate(ROWS) for name in names}


def name_of(path: pathlib.Path) -> str:
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


FILES = {name_of(path): path for path in PACKAGE.rglob('*.py')}


def imports_of(path: pathlib.Path) -> set[str]:
  """All modules that a file imports, anywhere in it, by their full names."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      if node.level:
        raise ValueError(f'{path} has a relative import.')
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        own = full.removeprefix('autogrow_jax.')
        # `from package.module import name` imports `package.module`.
        is_name = full.startswith('autogrow_jax.') and own not in FILES
        found.add(node.module if is_name else full)
  return found


def own_imports_of(name: str) -> set[str]:
  """Modules of the package that one of them imports."""
  return {
      '' if module == 'autogrow_jax' else module.removeprefix('autogrow_jax.')
      for module in imports_of(FILES[name])
      if module.partition('.')[0] == 'autogrow_jax'
  }


def outside_imports_of(name: str) -> set[str]:
  return {
      module
      for module in imports_of(FILES[name])
      if module.partition('.')[0] != 'autogrow_jax'
  }


class ImportsTest(parameterized.TestCase):

  def test_every_module_has_a_row(self):
    self.assertEqual(set(FILES), set(RANK))

  @parameterized.parameters(*sorted(FILES))
  def test_imports_only_from_rows_above(self, name):
    for imported in own_imports_of(name):
      self.assertLessEqual(
          RANK[imported], RANK[name], f'{name} imports {imported}'
      )

  def test_no_cycles(self):
    graph = {name: own_imports_of(name) for name in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    self.assertLen(order, len(FILES))
    # The check sees imports at all.
    self.assertIn('growth', graph['methods.base'])
    self.assertIn('data.pipeline', graph['data'])

  def test_only_checkpoint_imports_orbax(self):
    users = {
        name
        for name in FILES
        if any(
            module.startswith('orbax') for module in outside_imports_of(name)
        )
    }
    self.assertEqual(users, {'checkpoint'})

  def test_nothing_imports_flags(self):
    for name in FILES:
      for module in outside_imports_of(name):
        self.assertNotStartsWith(module, 'absl.flags', name)
        self.assertNotStartsWith(module, 'absl.app', name)
        self.assertNotEqual(module, 'absl', name)
        self.assertNotStartsWith(module, 'experiments', name)

  def test_linen_stays_in_layers_and_networks(self):
    users = {
        name
        for name in FILES
        if 'flax.linen' in outside_imports_of(name)
        and name != 'layers'
        and not name.startswith('networks.')
    }
    # Costs find layers by intercepting calls.
    self.assertEqual(users, {'costs'})

  def test_no_private_or_retired_modules(self):
    retired = ('jax._src', 'jax.experimental', 'flax.training')
    for name in FILES:
      for module in outside_imports_of(name):
        self.assertFalse(module.startswith(retired), f'{name}: {module}')

  @parameterized.parameters('architecture', 'controls', 'policies')
  def test_needs_no_jax(self, name):
    code = (
        f'import sys, autogrow_jax.{name}; '
        'sys.exit("jax" in sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


if __name__ == '__main__':
  absltest.main()
