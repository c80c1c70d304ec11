"""Growing a model with its optimizer's state, and the receipt of it."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import carry as carry_lib
from autogrow_jax.core import growth as growth_lib

Account = carry_lib.Account
AxisTable = axes_lib.AxisTable
Growth = growth_lib.Growth


@dataclasses.dataclass(frozen=True)
class Receipt:
  """What a growth did to a model; prints itself.

  Attributes:
    note: the growth, in words.
    outputs_change: largest absolute change of the outputs, by mode; empty if it
      was not measured.
    parameters: what became of the leaves of the model.
    optimizer: what became of those of its optimizer; None without one.
    size: number of parameters before and after.
  """

  note: str
  outputs_change: Mapping[str, float]
  parameters: Account
  optimizer: Account | None
  size: tuple[int, int]

  def __str__(self) -> str:
    changes = ', '.join(
        f'{change:.2g}' + f' ({mode})' * bool(mode)
        for mode, change in self.outputs_change.items()
    )
    lines = [
        self.note or 'growth',
        f'parameters: {self.size[0]:,} -> {self.size[1]:,}; leaves: '
        f'{self.parameters}',
        f'largest change of the outputs: {changes or "not measured"}',
    ]
    if self.optimizer is not None:
      lines.append(f'optimizer: {self.optimizer}')
    return '\n  '.join(lines)


def grow(
    growth: Growth,
    table: AxisTable,
    tree: Any,
    opt_state: Any = None,
    *,
    like: Any,
    extra: Sequence[Any] = (),
    key: jax.Array | None = None,
    probe: tuple[Callable[..., Any], Callable[..., Any], Any] | None = None,
) -> tuple[Any, ...]:
  """Grows a model's arrays, and those of its optimizer.

  Args:
    growth: the event.
    table: axes of the model.
    tree: its arrays; not changed.
    opt_state: state of any optax optimizer over the tree, or over its 'params'.
    like: arrays of the grown model, from which new units come; or their shapes,
      and then new units are drawn with the standard deviation of the old leaf.
    extra: more trees of the same structure, such as moving averages.
    key: decides what is drawn.
    probe: the function before, that after, and inputs: both are called with a
      tree and the inputs to measure the change of the outputs.

  Returns:
    The tree, the optimizer's state, the extra trees, and the `Receipt`.

  Raises:
    ValueError: the growth does not fit the model or `like`.
  """
  grown, parameters = carry_lib.carry(growth, table, tree, like, key=key)
  others = tuple(
      carry_lib.carry(growth, table, other, like, key=key)[0]
      for other in extra
  )
  optimizer, new_state = None, None
  if opt_state is not None:
    new_state, optimizer = carry_lib.carry(
        growth, table, opt_state, _moments_like(opt_state, tree, grown),
        moments=True,
    )
  change = {}
  if probe is not None:
    before, after, *inputs = probe
    outputs = before(tree, *inputs), after(grown, *inputs)
    change = {'': largest_change(*outputs)}
  count = lambda arrays: sum(np.size(leaf) for leaf in jax.tree.leaves(arrays))
  receipt = Receipt(
      str(growth), change, parameters, optimizer, (count(tree), count(grown))
  )
  return grown, new_state, *others, receipt


def largest_change(before: Any, after: Any) -> float:
  """Largest absolute difference of two trees of outputs."""
  return max(
      float(np.abs(np.asarray(b) - np.asarray(a)).max())
      for b, a in zip(
          jax.tree.leaves(before), jax.tree.leaves(after), strict=True
      )
  )


def _moments_like(opt_state: Any, tree: Any, grown: Any) -> Any:
  """Shapes of an optimizer's state over a grown tree.

  Every part of the state that has the structure of the tree, or of its
  'params', becomes one of the grown tree's.
  """
  pairs = [(tree, grown)]
  if isinstance(tree, Mapping) and 'params' in tree:
    pairs.append((tree['params'], grown['params']))
  pairs = [(jax.tree.structure(old), new) for old, new in pairs]

  def shapes(node):
    for structure, new in pairs:
      if jax.tree.structure(node) == structure:
        # A moment may be of another type than its parameter.
        if structure == jax.tree.structure(new):
          return jax.tree.map(
              lambda leaf, n: jax.ShapeDtypeStruct(
                  np.shape(n) if np.ndim(leaf) == np.ndim(n)
                  else np.shape(leaf),
                  leaf.dtype,
              ),
              node,
              new,
          )
        dtype = jax.tree.leaves(node)[0].dtype
        return jax.tree.map(lambda n: np.zeros(np.shape(n), dtype), new)
    return jax.ShapeDtypeStruct(np.shape(node), np.asarray(node).dtype)

  is_part = lambda node: any(
      jax.tree.structure(node) == structure for structure, _ in pairs
  )
  return jax.tree.map(shapes, opt_state, is_leaf=is_part)
