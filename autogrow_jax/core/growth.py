"""`Growth`: one growth event, as data.

Per axis whose units change, an integer vector says from which old unit each new
one comes:

    append a block      {}, with the leaves of the block in `like`
    widen 8 to 12       {'s1b0.mid': [0, 1, ..., 7, NEW, NEW, NEW, NEW]}
    split units 0, 1    {'s1b0.mid': [0, 1, ..., 7, 0, 1]}
    prune               {'s1b0.mid': kept indices}
    deepen a stack      {'layers': [0, 1, NEW, 2, 3, NEW]}
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import glob
import math
from typing import Any, Literal

import numpy as np

from autogrow_jax.core import axes as axes_lib

NEW = axes_lib.NEW
AxisTable = axes_lib.AxisTable
Path = axes_lib.Path

Start = Literal['zero_readers', 'fresh', 'mean']


@dataclasses.dataclass(frozen=True, eq=False)
class Growth:
  """One growth event.

  Attributes:
    sources: per axis, for each unit its source or `NEW`; axes that keep their
      units are left out.
    scales: per axis, a factor for each unit's readers after the growth.
    noise: per axis, for each unit the size of the random change of what writes
      it, relative to the root mean square of the leaf. Children of one parent
      share the direction, so that opposite signs cancel in first order.
    means: axes whose new units start as the mean of the old ones.
    values: leaves that are replaced after everything else, by the end of their
      path.
    moments: 'carry' moves the optimizer's state along; 'reset' makes all its
      moments and step counts zero; leaves by path within that state are carried
      along but for these, which are replaced.
    target: description of the grown model, for callers that rebuild it from
      one; not looked at here.
    examples: number of training examples that finding the growth took.
    report: figures about the growth, for its receipt.
    note: what happens, in words.
  """

  sources: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  scales: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  noise: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  means: frozenset[str] = frozenset()
  values: Mapping[Path, np.ndarray] = dataclasses.field(default_factory=dict)
  moments: Literal['carry', 'reset'] | Mapping[Path, np.ndarray] = 'carry'
  target: Any = None
  examples: int = 0
  report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  note: str = ''

  def __post_init__(self):
    for name in ('sources', 'scales', 'noise'):
      vectors = getattr(self, name).items()
      arrays = {axis: np.asarray(vector) for axis, vector in vectors}
      object.__setattr__(self, name, arrays)
    for axis, source in self.sources.items():
      if not source.size:
        raise ValueError(
            f'Axis {axis!r} would have no unit; keep at least one.'
        )
      if source.ndim != 1 or not np.issubdtype(source.dtype, np.integer):
        raise ValueError(
            f'Sources of axis {axis!r} must be a vector of integers, got '
            f'{source.dtype} of shape {source.shape}.'
        )
    for what, vectors in (('Scales', self.scales), ('Noise', self.noise)):
      for axis, vector in vectors.items():
        if axis in self.sources and len(vector) != len(self.sources[axis]):
          raise ValueError(
              f'{what} of axis {axis!r} are for {len(vector)} units, its '
              f'sources for {len(self.sources[axis])}.'
          )

  @property
  def sizes(self) -> dict[str, int]:
    """Units of each changed axis after the growth."""
    return {axis: len(source) for axis, source in self.sources.items()}

  def __add__(self, other: 'Growth') -> 'Growth':
    """Both at once; they change different axes and leaves."""
    for name in ('sources', 'scales', 'noise', 'values'):
      if both := getattr(self, name).keys() & getattr(other, name).keys():
        raise ValueError(f'Both growths have {name} of {sorted(both)}.')
    for name, none in (('target', None), ('moments', 'carry')):
      if none not in (getattr(self, name), getattr(other, name)):
        raise ValueError(f'Both growths have {name} of their own.')
    return Growth(
        {**self.sources, **other.sources},
        {**self.scales, **other.scales},
        {**self.noise, **other.noise},
        self.means | other.means,
        {**self.values, **other.values},
        other.moments if self.moments == 'carry' else self.moments,
        other.target if self.target is None else self.target,
        self.examples + other.examples,
        {**self.report, **other.report},
        '; '.join(filter(None, (self.note, other.note))),
    )

  def __str__(self) -> str:
    return self.note or 'growth of nothing'


def widen(
    table: AxisTable, pattern: str, *, to: int, start: Start = 'zero_readers'
) -> Growth:
  """Adds new units to axes.

  Args:
    table: axes of the model.
    pattern: shell pattern of the axes' names.
    to: units after the growth.
    start: 'zero_readers' reads new units with weight zero, so that the function
      stays, unless a norm reduces over the axis; 'fresh' reads them with what
      `like` has; 'mean' starts them as the mean of the old ones, for classes
      and the rows of an embedding.

  Returns:
    The growth.

  Raises:
    ValueError: no axis matches, one is frozen, or has more units already.
  """

  def sources(name, size):
    if to < size:
      raise ValueError(f'Axis {name!r} has {size} units; {to} are fewer.')
    return np.concatenate([np.arange(size), np.full(to - size, NEW)])

  growth = _for_each(table, pattern, sources, 'widen')
  if start == 'mean':
    return dataclasses.replace(growth, means=frozenset(growth.sources))
  if start == 'fresh':
    return growth
  return dataclasses.replace(growth, scales=_silenced(growth.sources))


def deepen(
    table: AxisTable,
    pattern: str,
    order: Sequence[int],
    *,
    start: Start = 'zero_readers',
) -> Growth:
  """Inserts, repeats or drops layers of a stack.

  Args:
    table: axes of the model.
    pattern: shell pattern of the stacked axes' names.
    order: for each layer after the growth, the layer that it is a copy of, or
      `NEW`: [0, NEW, 1, NEW] inserts, [0, 1, 0, 1] stacks the whole.
    start: 'zero_readers' lets new layers add nothing, so that the function of a
      residual network stays; 'fresh' takes them as `like` has them.

  Returns:
    The growth.

  Raises:
    ValueError: no axis matches, it is not one of layers, or has fewer.
  """
  for name in table[pattern]:
    if table.kinds.get(name) != 'layers':
      raise ValueError(f'Axis {name!r} is not one of stacked layers.')
  growth = _for_each(table, pattern, lambda *_: np.asarray(order), 'deepen')
  if start == 'fresh':
    return growth
  return dataclasses.replace(growth, scales=_silenced(growth.sources))


def growth_between(
    table: AxisTable, like: Any, *, start: Start = 'zero_readers'
) -> Growth:
  """Finds the growth that leads to the shapes of another model.

  Args:
    table: axes of the model.
    like: arrays or shapes of the model after, with the same paths.
    start: see `widen`.

  Returns:
    The growth: more units are added, of fewer the first ones are kept.

  Raises:
    ValueError: shapes contradict each other, or a frozen axis differs.
  """
  growth = Growth()
  for name, size in _sizes_in(table, like).items():
    if size > table.sizes[name]:
      growth += widen(table, glob.escape(name), to=size, start=start)
    elif size < table.sizes[name]:
      growth += prune(table, glob.escape(name), keep=range(size))
  return growth


def _sizes_in(table: AxisTable, like: Any) -> dict[str, int]:
  """Sizes that axes have in another model, where its shapes tell them."""
  after: dict[str, int] = {}
  for path, leaf in axes_lib.by_path(like).items():
    for dim, axis in enumerate(table.find(path) or ()):
      if axis is not None and len(axis.segments) == len(axis.segments[0]) == 1:
        name, size = axis.name, leaf.shape[dim]
        if after.setdefault(name, size) != size:
          raise ValueError(
              f'Axis {name!r} would have {after[name]} units, but {size} in '
              f'{"/".join(path)}.'
          )
  # The only unknown factor of a product follows from the others.
  for path, leaf in axes_lib.by_path(like).items():
    for dim, axis in enumerate(table.find(path) or ()):
      if axis is None:
        continue
      unknown = sorted(axis.factors - after.keys())
      size = lambda name: after.get(name, table.sizes[name])
      for name in unknown:
        counts = [
            math.prod(size(n) for n in segment if n != name)
            for segment in axis.segments
            if name in segment
        ]
        rest = leaf.shape[dim] - sum(
            math.prod(map(size, segment))
            for segment in axis.segments
            if name not in segment
        )
        if rest % sum(counts) == 0 and len(unknown) == 1:
          after[name] = rest // sum(counts)
  return after


def _silenced(sources: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Scales that let nothing read new units."""
  return {
      name: np.where(source == NEW, 0, 1).astype(np.float32)
      for name, source in sources.items()
      if (source == NEW).any()
  }


def split(
    table: AxisTable,
    pattern: str,
    units: Sequence[int],
    *,
    noise: float = 1e-2,
) -> Growth:
  """Splits units into two, each read with half the weight.

  Args:
    table: axes of the model.
    pattern: shell pattern of the axes' names.
    units: distinct units to split.
    noise: size of the opposite random changes of the two children's incoming
      weights, relative to their root mean square. With 0 the function is kept
      exactly, but equal twins with equal readers get equal gradients for ever.

  Returns:
    The growth.
  """
  for name in table[pattern]:
    for path, _, axis in table.leaves(name):
      if axis.role == 'tied':
        raise ValueError(
            f'{"/".join(path)} reads and writes axis {name!r}: its twins would '
            'need both halves and wholes of one weight.'
        )
  growth = _for_each(
      table,
      pattern,
      lambda name, size: np.concatenate(
          [np.arange(size), checked_units(name, size, units)]
      ),
      f'split {len(units)} units of',
  )
  scales, noises = {}, {}
  for name, source in growth.sources.items():
    is_twin = np.isin(source, units)
    scales[name] = np.where(is_twin, 0.5, 1.0).astype(np.float32)
    signs = np.where(is_twin, 1.0, 0.0)
    signs[len(source) - len(units) :] = -1.0
    noises[name] = (noise * signs).astype(np.float32)
  return dataclasses.replace(
      growth, scales=scales, noise=noises if noise else {}
  )


def prune(table: AxisTable, pattern: str, *, keep: Sequence[int]) -> Growth:
  """Keeps only some units, in the given order.

  Args:
    table: axes of the model.
    pattern: shell pattern of the axes' names.
    keep: distinct units.

  Returns:
    The growth.
  """
  return _for_each(
      table,
      pattern,
      lambda name, size: checked_units(name, size, keep),
      'prune',
  )


def checked_units(name: str, size: int, units: Sequence[int]) -> np.ndarray:
  """Distinct units of an axis, as an array.

  Raises:
    ValueError: they are not.
  """
  array = np.asarray(units)
  if len(set(array.tolist()) & set(range(size))) != array.size:
    raise ValueError(
        f'Units of axis {name!r} are distinct numbers from 0 to {size - 1}, '
        f'got {array.tolist()}.'
    )
  return array.astype(int)


def _for_each(
    table: AxisTable,
    pattern: str,
    sources_of: Callable[[str, int], np.ndarray],
    verb: str,
) -> Growth:
  """The growth of all axes that match a pattern, but for frozen ones."""
  matching = table[pattern]
  if not matching:
    raise ValueError(
        f'No axis matches {pattern!r}; there are {", ".join(table.sizes)}.'
    )
  can_change = [name for name in matching if name not in table.frozen]
  if not can_change:
    name = matching[0]
    raise ValueError(f'Axis {name!r} is frozen: {table.frozen[name]}.')
  # A pattern that matches free axes means these.
  chosen = [name for name in can_change if name in table.free] or can_change
  sources, notes = {}, []
  for name in chosen:
    size = table.sizes[name]
    source = sources[name] = sources_of(name, size)
    why = _why_not_kept(table, name) if NEW in source else ''
    notes.append(f'{verb} {name}, {size} to {len(source)} units{why}')
  if others := [name for name in matching if name not in chosen]:
    notes.append(f'left alone, though they match: {", ".join(others)}')
  return Growth(sources, note='; '.join(notes))


def _why_not_kept(table: AxisTable, name: str) -> str:
  """Why new units of an axis change the outputs even if nothing reads them."""
  if name in table.normalised:
    return ' (a norm reduces over it, so outputs change)'
  roles = {axis.role for _, _, axis in table.leaves(name)}
  if not roles & {'reads', 'tied'} and table.kinds.get(name) != 'outputs':
    return ' (no weight reads it, so outputs change)'
  return ''
