"""`carry`: moves a tree of arrays, or an optimizer's state, through a growth.

Everything happens by path and axis name; no optimizer is known by its type.
Parameters, statistics and moments of units that stay are gathered bit for bit.
New units of a moment start at zero, which is neutral for a momentum. Squares of
gradients start at the mean over the old units instead: zero would make the
first update of a new unit several times that of an old one.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any
import zlib

import jax
import numpy as np

from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib

AxisTable = axes_lib.AxisTable
Growth = growth_lib.Growth
Path = axes_lib.Path

# Names of moments that hold squares of gradients, and of sums of gradients.
SQUARES = frozenset({'nu', 'nu_max', 'sum_of_squares', 'v'})
SUMS = frozenset({'acc_grads'})


@dataclasses.dataclass(frozen=True)
class Account:
  """Outcome for every leaf of a tree; prints itself.

  Attributes:
    kept: paths of leaves that are the same arrays.
    changed: paths of leaves that were gathered, scaled or replaced.
    new: paths of leaves that had no counterpart before.
    dropped: paths of leaves that have no counterpart after.
    refused: reasons, by path, why leaves could not be carried; they started
      afresh.
  """

  kept: tuple[str, ...] = ()
  changed: tuple[str, ...] = ()
  new: tuple[str, ...] = ()
  dropped: tuple[str, ...] = ()
  refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def counts(self) -> dict[str, int]:
    """Number of leaves by what became of them; refused ones if there are."""
    names = ('kept', 'changed', 'new', 'dropped')
    counts = {name: len(getattr(self, name)) for name in names}
    return counts | ({'refused': len(self.refused)} if self.refused else {})

  def __str__(self) -> str:
    counts = [f'{count} {name}' for name, count in self.counts.items()]
    lines = [', '.join(counts)]
    lines += [f'{path}: {why}' for path, why in self.refused.items()]
    return '\n'.join(lines)


def carry(
    growth: Growth,
    table: AxisTable,
    tree: Any,
    like: Any,
    *,
    key: jax.Array | None = None,
    moments: bool = False,
) -> tuple[Any, Account]:
  """Moves what a tree knows into the shapes of another one.

  Args:
    growth: the event.
    table: axes of the tree, with sizes before the growth where dimensions have
      several factors.
    tree: arrays before.
    like: arrays after, from which new units and leaves come; or their shapes,
      and then new units are drawn with the standard deviation of the old leaf.
    key: decides those draws and the noise of the growth.
    moments: whether the tree is the state of an optimizer.

  Returns:
    The tree after, and what became of its leaves. `like` has its structure.

  Raises:
    ValueError: a leaf does not fit `like`, nothing says what new units are, or
      the growth changes an axis that is not in the table.
  """
  _check(growth, table)
  mover = _Mover(growth, table, axes_lib.by_path(tree), key, moments)
  carried = axes_lib.map_with_names(mover.move, like)
  started = _started(carried, growth, table, like, key, moments)
  before, after = axes_lib.by_path(carried), axes_lib.by_path(started)
  for path, what in mover.outcome.items():
    if what == 'kept' and after[path] is not before[path]:
      mover.outcome[path] = 'changed'
  mover.outcome.update(
      (path, 'dropped') for path in mover.before if path not in mover.outcome
  )
  return started, mover.account


def _check(growth: Growth, table: AxisTable) -> None:
  """Raises ValueError if the vectors of a growth do not fit the table."""
  sizes = {**table.sizes, **growth.sizes}
  for vectors in (growth.sources, growth.scales, growth.noise):
    for name, vector in vectors.items():
      if name not in table.sizes:
        raise ValueError(
            f'The growth changes axis {name!r}, which is not among '
            f'{", ".join(table.sizes)}.'
        )
      if len(vector) != sizes[name]:
        raise ValueError(
            f'The growth has {len(vector)} values for axis {name!r}, which '
            f'has {sizes[name]} units.'
        )


def _holds(path: Path, names: frozenset[str], table: AxisTable) -> bool:
  """Returns True if what is in front of a parameter's path has such a name."""
  end = table.end(path)
  front = path[: -len(end or path[-1:])]
  return bool((names if end else names - {'v'}) & set(front))


@dataclasses.dataclass
class _Mover:
  """Moves leaf by leaf and notes what it does."""

  growth: Growth
  table: AxisTable
  before: dict[Path, Any]
  key: jax.Array | None
  moments: bool
  outcome: dict[Path, str] = dataclasses.field(default_factory=dict)

  def move(self, path: Path, fresh: Any) -> np.ndarray:
    """The leaf at a path after the growth."""
    if path not in self.before:
      self.outcome[path] = 'new'
      return self._new(path, fresh)
    old, axes = self.before[path], self.table.find(path) or ()
    is_scalar = np.size(old) == 1 and np.shape(old) == np.shape(fresh)
    if self.moments and is_scalar or not axes_lib.changes(
        axes, self.growth.sources
    ):
      self.outcome[path] = 'kept'
      return self._checked(path, old, fresh)
    if self.moments and np.ndim(old) != len(axes):
      self.outcome[path] = (
          f'its rank is {np.ndim(old)}, that of its parameter {len(axes)}'
      )
      return self._drawn(path, old, fresh)
    moved, is_new = axes_lib.gather(
        np.asarray(old), axes, self.growth.sources, self.table.sizes,
        '/'.join(path),
    )
    self.outcome[path] = 'changed'
    moved = self._checked(path, moved, fresh)
    if is_new.any():
      moved = np.where(is_new, self._drawn(path, old, fresh), moved)
    return moved

  @property
  def account(self) -> Account:
    """Outcome for every leaf."""
    kinds = ('kept', 'changed', 'new', 'dropped')
    of_kind = lambda kind: tuple(
        '/'.join(path) for path, what in self.outcome.items() if what == kind
    )
    return Account(
        **{kind: of_kind(kind) for kind in kinds},
        refused={
            '/'.join(path): what
            for path, what in self.outcome.items()
            if what not in kinds
        },
    )

  def _new(self, path: Path, fresh: Any) -> np.ndarray:
    """A leaf without a counterpart; squares are those of sibling layers."""
    if not hasattr(fresh, '__array__'):
      raise ValueError(
          f'Leaf {"/".join(path)} is new, and only its shape is known; give '
          'arrays as `like`.'
      )
    if not self.moments or not _holds(path, SQUARES, self.table):
      return fresh
    means = [
        leaf.mean(dtype=np.float64)
        for other, leaf in self.before.items()
        if len(other) == len(path)
        and other[:-3] == path[:-3]
        and other[-2:] == path[-2:]
        and leaf.shape == fresh.shape
    ]
    return np.full_like(fresh, np.mean(means)) if means else fresh

  def _drawn(self, path: Path, old: Any, fresh: Any) -> np.ndarray:
    """Returns the values of new units of a leaf."""
    if (
        self.moments
        and np.shape(old)
        and _holds(path, SQUARES, self.table)
    ):
      return np.full(
          fresh.shape, np.asarray(old).mean(dtype=np.float64), fresh.dtype
      )
    if self.moments and not hasattr(fresh, '__array__'):
      return np.zeros(fresh.shape, fresh.dtype)
    for dim, axis in enumerate(self.table.find(path) or ()):
      if axis and axis.factors & self.growth.means and not self.moments:
        mean = np.asarray(old).mean(dim, keepdims=True, dtype=np.float64)
        return np.broadcast_to(mean, fresh.shape).astype(fresh.dtype)
    if hasattr(fresh, '__array__'):
      return np.asarray(fresh)
    if self.key is None:
      raise ValueError(
          f'New units of {"/".join(path)} are to be drawn: give a key, or '
          'arrays as `like`.'
      )
    draw = jax.random.normal(key_of(self.key, path), fresh.shape)
    return np.asarray(draw * np.std(old), fresh.dtype)

  def _checked(self, path: Path, moved: Any, fresh: Any) -> Any:
    where = '/'.join(path)
    if moved.dtype != fresh.dtype:
      raise ValueError(
          f'Leaf {where} is {moved.dtype}; it should be {fresh.dtype}.'
      )
    if moved.shape != fresh.shape:
      raise ValueError(
          f'Leaf {where} would have shape {moved.shape}, but the grown model '
          f'has {fresh.shape}: an axis changed its size without sources.'
      )
    return moved


def _started(
    tree: Any,
    growth: Growth,
    table: AxisTable,
    like: Any,
    key: jax.Array | None,
    moments: bool,
) -> Any:
  """The carried tree with scales, noise and values, or reset moments."""
  if moments and growth.moments == 'reset':
    return axes_lib.map_with_names(_reset, tree, like)
  after = AxisTable(table.axes, {**table.sizes, **growth.sizes})
  if growth.scales:
    # The gradient of a reader does not change when its weight and that of its
    # twin are halved: its sums and squares stay.
    tree = axes_lib.scale(
        tree,
        after,
        growth.scales,
        lambda path, axis: axis.role in ('reads', 'tied')
        and not (moments and _holds(path, SQUARES | SUMS, table)),
    )
  if moments:
    if isinstance(growth.moments, Mapping):
      tree = with_values(tree, growth.moments)
    return tree
  if growth.noise:
    tree = axes_lib.map_with_names(
        lambda path, leaf: _noisy(path, leaf, growth, after, key), tree
    )
  if growth.values:
    tree = with_values(tree, growth.values)
  return tree


def _reset(path: Path, leaf: Any, fresh: Any) -> Any:
  """A leaf of a fresh optimizer; its hyperparameters stay."""
  if 'hyperparams' in path:
    return leaf
  if hasattr(fresh, '__array__'):
    return np.asarray(fresh)
  return np.zeros_like(leaf)


def _noisy(
    path: Path,
    leaf: np.ndarray,
    growth: Growth,
    table: AxisTable,
    key: jax.Array | None,
) -> np.ndarray:
  """A leaf with opposite changes of the children of one parent."""
  for dim, axis in enumerate(table.find(path) or ()):
    if axis is None or axis.role not in ('writes', 'both') or leaf.ndim < 2:
      continue
    size = axes_lib.vector_of(axis, growth.noise, table.sizes)
    if size is None:
      continue
    if key is None:
      raise ValueError('The growth adds noise to twins: give a key.')
    source = axes_lib.source_of(axis, growth.sources, table.sizes)
    shape = list(leaf.shape)
    if source is not None:  # Siblings share the draw of their parent.
      shape[dim] = max(shape[dim], source.max() + 1)
    draw = np.asarray(jax.random.normal(key_of(key, path), shape))
    if source is not None:
      draw = np.take(draw, np.maximum(source, 0), axis=dim)
    draw = draw * axes_lib.along(np.asarray(size), dim, leaf.ndim)
    rms = np.sqrt(np.mean(np.square(leaf, dtype=np.float64)))
    leaf = (leaf + draw * rms).astype(leaf.dtype)
  return leaf


def with_values(tree: Any, values: Mapping[Path, np.ndarray]) -> Any:
  """A tree whose leaves at some paths, by their ends, are replaced.

  Raises:
    ValueError: there is no such leaf, or it has another shape.
  """
  lengths = {len(path) for path in values}
  used = set()

  def replaced(path, leaf):
    for length in lengths:
      if (end := path[-length:]) in values:
        used.add(end)
        new = np.asarray(values[end], leaf.dtype)
        if new.shape != leaf.shape:
          raise ValueError(
              f'The growth sets {"/".join(path)} to shape {new.shape}, but it '
              f'has {leaf.shape}.'
          )
        return new
    return leaf

  tree = axes_lib.map_with_names(replaced, tree)
  if unused := values.keys() - used:
    missing = ', '.join(sorted('/'.join(path) for path in unused))
    raise ValueError(f'The growth sets leaves that are not there: {missing}.')
  return tree


def key_of(key: jax.Array, path: Path) -> jax.Array:
  """A key of a leaf's own."""
  return jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
