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
from typing import Any, Literal

import numpy as np

from autogrow_jax.core import axes as axes_lib

NEW = axes_lib.NEW
AxisTable = axes_lib.AxisTable
Path = axes_lib.Path

Start = Literal['zero_readers', 'fresh']


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
      `like` has.

  Returns:
    The growth.

  Raises:
    ValueError: no axis matches, one is frozen, or has more units already.
  """

  def sources(name, size):
    if to < size:
      raise ValueError(f'Axis {name!r} has {size} units; {to} are fewer.')
    return np.concatenate([np.arange(size), np.full(to - size, NEW)])

  return _for_each(table, pattern, sources, 'widen', start)


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
    start: Start = 'fresh',
) -> Growth:
  """The growth of all axes that match a pattern."""
  matching = table[pattern]
  if not matching:
    raise ValueError(
        f'No axis matches {pattern!r}; there are {", ".join(table.sizes)}.'
    )
  frozen = table.frozen
  sources, scales, notes = {}, {}, []
  for name in matching:
    if name in frozen:
      raise ValueError(f'Axis {name!r} is frozen: {frozen[name]}.')
    size = table.sizes[name]
    source = sources[name] = sources_of(name, size)
    if start == 'zero_readers' and (source == NEW).any():
      scales[name] = np.where(source == NEW, 0, 1).astype(np.float32)
    notes.append(f'{verb} {name}, {size} to {len(source)} units')
  return Growth(sources, scales, note='; '.join(notes))
