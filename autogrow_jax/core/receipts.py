"""Growing a model with its optimizer's state, and the receipt of it."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import carry as carry_lib
from autogrow_jax.core import growth as growth_lib

Account = carry_lib.Account
AxisTable = axes_lib.AxisTable
Growth = growth_lib.Growth

# mypy does not know the type of the result.
_structure: Callable[[Any], Any] = jax.tree.structure


@dataclasses.dataclass(frozen=True)
class Receipt:
  """Effect of a growth on a model; prints itself.

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
    tx: optax.GradientTransformation | None = None,
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
    tx: the optimizer; only for states that have leaves of other shapes than
      their parameters, such as adafactor's, or copies of the parameters, such
      as schedule_free's. Noise and values of the growth do not reach copies.

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
    fresh = (
        _moments_like(opt_state, tree, grown)
        if tx is None
        else _fresh_state(tx, opt_state, tree, grown)
    )
    new_state, optimizer = carry_lib.carry(
        growth, table, opt_state, fresh, moments=True
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


def _fresh_state(
    tx: optax.GradientTransformation, opt_state: Any, tree: Any, grown: Any
) -> Any:
  """A new state over a grown tree, or over its 'params'.

  Raises:
    ValueError: the state is not one of the optimizer.
  """
  pairs = [(tree, grown)]
  if isinstance(tree, Mapping) and 'params' in tree:
    pairs.append((tree['params'], grown['params']))
  for old, new in pairs:
    if _structure(jax.eval_shape(tx.init, old)) == _structure(opt_state):
      return tx.init(new)
  raise ValueError('`opt_state` is not a state of `tx` over the tree.')


def _moments_like(opt_state: Any, tree: Any, grown: Any) -> Any:
  """Shapes of an optimizer's state over a grown tree, or over its 'params'.

  A leaf whose path ends in that of a parameter has the parameter's shape. Where
  leaves come or go, a part of the state with the structure of the tree gets
  that of the grown tree.
  """
  pairs = [(tree, grown)]
  if isinstance(tree, Mapping) and 'params' in tree:
    pairs.insert(0, (tree['params'], grown['params']))
  structures, shapes = {}, {}
  for old, new in pairs:
    if (structure := _structure(old)) != _structure(new):
      structures[structure] = new
    after = axes_lib.by_path(new)
    for path, leaf in axes_lib.by_path(old).items():
      shapes[path] = np.shape(leaf), np.shape(after.get(path, leaf))

  def moment(path, node):
    if (structure := _structure(node)) in structures:
      was = axes_lib.by_path(node)
      other = next(iter(was.values()))
      return axes_lib.map_with_names(
          lambda path, leaf: np.zeros(
              np.shape(leaf), was.get(path, other).dtype
          ),
          structures[structure],
      )
    ends = (path[start:] for start in range(len(path)))
    shape = np.shape(node)
    old, new = next((shapes[end] for end in ends if end in shapes), (None,) * 2)
    if shape == old:
      shape = new
    elif old != new and np.size(node) != 1:
      raise ValueError(
          f"Leaf {'/'.join(path)} of the optimizer's state has shape {shape}, "
          f'its parameter {old}: give the optimizer as `tx`.'
      )
    return jax.ShapeDtypeStruct(shape, np.asarray(node).dtype)

  return jax.tree_util.tree_map_with_path(
      lambda path, node: moment(axes_lib.names(path), node),
      opt_state,
      is_leaf=lambda node: _structure(node) in structures,
  )
