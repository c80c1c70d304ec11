"""Tests of the walls between the rooms of the library, and of its imports."""

import ast
import graphlib
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

import autogrow_jax

PACKAGE = pathlib.Path(autogrow_jax.__file__).parent

# Room -> what it never imports; rooms are folders of the package.
WALLS = {

    'data': ('*',),
    'networks': ('data', 'methods', 'run'),
    'methods': ('data', 'run'),
    'run': (
        'methods.autogrow', 'methods.sparsify', 'methods.gauss_newton'
    ),
}


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


def is_within(name: str, room: str) -> bool:
  return name == room or name.startswith(f'{room}.')


class ImportsTest(parameterized.TestCase):

  @parameterized.parameters(*WALLS)
  def test_walls(self, room):
    names = [name for name in FILES if is_within(name, room)]
    self.assertNotEmpty(names)
    for name in names:
      for imported in own_imports_of(name) - {''}:
        for wall in WALLS[room]:
          closed = wall == '*' or is_within(imported, wall)
          if is_within(imported, room):
            closed = False
          self.assertFalse(closed, f'{name} imports {imported}')

  def test_no_cycles(self):
    graph = {name: own_imports_of(name) - {name} for name in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    self.assertLen(order, len(FILES))
    # The check sees imports at all.
    self.assertIn('policies', graph['methods.base'])
    self.assertIn('data.pipeline', graph['data'])

  def test_only_checkpoint_imports_orbax(self):
    users = {
        name.rpartition('.')[2]
        for name in FILES
        if any(
            module.startswith('orbax') for module in outside_imports_of(name)
        )
    }
    self.assertEqual(users, {'checkpoint'})

  def test_nothing_imports_flags_or_experiments(self):
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
        and name not in ('layers', 'models', 'ops')
        and not name.startswith('networks.')
    }
    # They find layers by intercepting calls.
    self.assertEqual(users, {'costs', 'methods.gauss_newton.taps'})

  def test_no_private_or_retired_modules(self):
    retired = ('jax._src', 'jax.experimental', 'flax.training')
    for name in FILES:
      for module in outside_imports_of(name):
        self.assertFalse(module.startswith(retired), f'{name}: {module}')

  @parameterized.parameters('architecture', 'policies')
  def test_needs_no_jax(self, name):
    code = (
        f'import sys, autogrow_jax.{name}; '
        'sys.exit("jax" in sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


if __name__ == '__main__':
  absltest.main()
