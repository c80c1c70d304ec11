"""`trace`: finds the axes of a model that declares none, from its jaxpr."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from autogrow_jax.core import axes as axes_lib
from autogrow_jax.tracing import labels
from autogrow_jax.tracing import rules
from autogrow_jax.tracing import steps

_KINDS = {
    steps.OUTPUT: 'outputs',
    steps.INDEXED: 'indexed',
    steps.STACKED: 'layers',
}
_SUFFIXES = {
    'writes': 'out', 'both': 'out', 'reads': 'in', 'tied': 'in',
    'indexed': 'rows',
}


def trace(
    function: Callable[..., Any], tree: Any, *inputs: Any
) -> axes_lib.AxisTable:
  """Finds which dimensions of a model's leaves belong together.

  Nothing is computed: shapes do in place of arrays. A dimension whose units
  cannot come and go is frozen with the reason and the place in the source; one
  that meets an unknown primitive is, too.

  Args:
    function: computes the outputs from the tree and the inputs, in evaluation
      or in training mode; new statistics must not be among the outputs.
    tree: arrays or shapes of the model, of any structure.
    *inputs: further arguments, arrays or shapes.

  Returns:
    The axes. A factor has the name of the first leaf that writes it, such as
    'mlp/kernel:out'. Paths begin behind the collection ('params').
  """
  closed = jax.make_jaxpr(function)(tree, *inputs)
  jaxpr, uses = closed.jaxpr, steps.Uses()
  paths = _paths(tree)
  origins = [frozenset([number]) for number in range(len(paths))]
  origins += [None] * (len(jaxpr.invars) - len(paths))
  values = [
      steps.value(var.aval, origin)
      for var, origin in zip(jaxpr.invars, origins, strict=True)
  ]
  outputs = rules.run(jaxpr, closed.consts, values, uses)
  weights, rest = values[: len(paths)], values[len(paths) :]
  for reason, ends in ((steps.INPUT, rest), (steps.OUTPUT, outputs)):
    labels.mark((dim for end in ends for dim in end.dims), reason, '')
  leaves = {
      path: [labels.expand(dim) for dim in weight.dims]
      for path, weight in zip(paths, weights, strict=True)
  }
  for dims in leaves.values():
    for factor in (f for dim in dims for segment in dim for f in segment):
      if factor.is_sum:
        factor.mark({'is a concatenation inside a product': ''})
  roles = _roles(leaves, uses, _statistics(tree))
  return _table(leaves, roles, _factors(uses.normalised))


def _paths(tree: Any) -> list[axes_lib.Path]:
  """Paths of all leaves, behind the collection where that is unambiguous."""
  paths = [
      axes_lib.names(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]
  ends = [path[1:] for path in paths]
  has_collections = isinstance(tree, Mapping) and 'params' in tree
  return ends if has_collections and len(set(ends)) == len(ends) else paths


def _statistics(tree: Any) -> list[bool]:
  """For each leaf, True if it is outside of 'params'."""
  has_collections = isinstance(tree, Mapping) and 'params' in tree
  return [
      has_collections and axes_lib.names(path)[0] != 'params'
      for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _factors(dims: Sequence[labels.Dim]) -> set[labels.Factor]:
  return {
      factor
      for dim in dims
      for segment in labels.expand(dim)
      for factor in segment
  }


def _roles(
    leaves: Mapping[axes_lib.Path, list[labels.Dim]],
    uses: steps.Uses,
    is_statistic: Sequence[bool],
) -> dict[tuple[axes_lib.Path, int], axes_lib.Role]:
  """Roles of all dimensions, by path and number."""
  used = {
      kind: {
          (leaf, factor) for leaf, dim in pairs for factor in _factors([dim])
      }
      for kind, pairs in (
          ('reads', uses.reads), ('writes', uses.writes),
          ('both', uses.both), ('adds', uses.adds),
      )
  }
  outside = {
      factor
      for dims in leaves.values()
      if not any(steps.STACKED in f.marks for f in _factors(dims))
      for factor in _factors(dims)
  }
  roles = {}
  for number, (path, dims) in enumerate(leaves.items()):
    writes = {
        factor
        for leaf, factor in used['writes'] | used['adds']
        if leaf == number
    }
    for place, dim in enumerate(dims):
      factors = _factors([dim])
      marks = {mark for factor in factors for mark in factor.marks}
      is_used = {
          kind: any((number, factor) in pairs for factor in factors)
          for kind, pairs in used.items()
      }
      if is_used['both']:
        role = 'both'
      elif steps.STACKED in marks:
        role = 'reads' if writes & outside else 'layers'
      elif is_used['reads']:
        shared = factors & _factors(dims[:place] + dims[place + 1 :])
        role = 'tied' if is_used['writes'] and not shared else 'reads'
      elif steps.SPACE in marks or is_statistic[number] > is_used['writes']:
        role = 'neither'
      else:
        role = 'indexed' if steps.INDEXED in marks else 'writes'
      roles[path, place] = role
  return roles


def _table(
    leaves: Mapping[axes_lib.Path, list[labels.Dim]],
    roles: Mapping[tuple[axes_lib.Path, int], axes_lib.Role],
    normalised: set[labels.Factor],
) -> axes_lib.AxisTable:
  """The table of labelled leaves."""
  names = _names(leaves, roles)
  axes = {
      path: tuple(
          axes_lib.Axis(
              tuple(tuple(names[f] for f in segment) for segment in dim),
              roles[path, place],
          )
          if any(dim)
          else None
          for place, dim in enumerate(dims)
      )
      for path, dims in leaves.items()
  }
  frozen, kinds = {}, {}
  for factor, name in names.items():
    for reason, where in factor.marks.items():
      if reason in _KINDS:
        kinds.setdefault(name, _KINDS[reason])
      else:
        at = f' ({where})' if where else ''
        frozen.setdefault(name, reason + at)
  return axes_lib.AxisTable(
      axes,
      {name: factor.size for factor, name in names.items()},
      frozen,
      kinds,
      frozenset(names[f] for f in normalised if f in names),
  )


def _names(
    leaves: Mapping[axes_lib.Path, list[labels.Dim]],
    roles: Mapping[tuple[axes_lib.Path, int], axes_lib.Role],
) -> dict[labels.Factor, str]:
  """A name for each factor, by the leaf that best stands for it."""
  candidates: dict[labels.Factor, tuple[tuple[bool, int], str]] = {}
  for path, dims in leaves.items():
    layers = sum(steps.STACKED in f.marks for f in _factors(dims))
    for place, dim in enumerate(dims):
      role = roles[path, place]
      factors = [factor for segment in dim for factor in segment]
      suffix = _SUFFIXES.get(role, str(place)) if len(dims) > 1 else ''
      rank = (role != 'writes', layers - len(dims))
      for number, factor in enumerate(factors):
        if steps.STACKED in factor.marks:
          suffix = 'layers'
        parts = [suffix] * bool(suffix) + [str(number)] * (len(factors) > 1)
        name = '/'.join(path).removesuffix('/value')
        name += ':' * bool(parts) + '.'.join(parts)
        if factor not in candidates or rank < candidates[factor][0]:
          candidates[factor] = (rank, name)
  taken: dict[str, labels.Factor] = {}
  for factor, (_, name) in candidates.items():
    unique, number = name, 2
    while unique in taken:
      unique, number = f'{name}~{number}', number + 1
    taken[unique] = factor
  return {factor: name for name, factor in taken.items()}
