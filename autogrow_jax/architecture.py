"""`Architecture`: the frozen description that determines a network.

An architecture names the blocks of every stage in forward order, gives every
*named axis* its size, and holds the options that shape the network. It alone
determines every parameter shape, so a growth event is one architecture turned
into the next.

Axis names: `image` (input channels), `s0`, `s1`, ... (the stream of a stage,
which all its blocks share), `s1b3.mid` (private to block `s1b3`), `classes`. A
block's name is never reused or renumbered, so that a parameter path keeps its
meaning.
"""

from collections.abc import Mapping
import dataclasses
import numbers
from typing import Any, Self

Option = str | int | float | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Determines a network and all its shapes; hashable, and JSON-able.

  Attributes:
    family: name of the network family, e.g. 'basic3resnet', or
      'package.module:attribute' for a network from outside.
    stages: block names per stage, in forward order.
    sizes: (axis name, size) pairs, sorted by name.
    options: (name, value) pairs, sorted by name: stem, resolution, ...
    minted: number in the next new block's name, per stage.
  """

  family: str
  stages: tuple[tuple[str, ...], ...]
  sizes: tuple[tuple[str, int], ...]
  options: tuple[tuple[str, Option], ...]
  minted: tuple[int, ...]

  def __post_init__(self):
    blocks = [block for stage in self.stages for block in stage]
    if len(set(blocks)) != len(blocks):
      raise ValueError(f'Block names must be unique, got {blocks}.')
    if len(self.minted) != len(self.stages):
      raise ValueError(
          f'minted has {len(self.minted)} entries for {len(self.stages)} '
          'stages.'
      )
    for stage, names in enumerate(self.stages):
      if not names:
        raise ValueError(f'Stage {stage} has no block; it needs at least one.')
    for axis, size in self.sizes:
      if not isinstance(size, int) or size < 1:
        raise ValueError(f'Axis {axis!r} has size {size!r}; sizes are >= 1.')

  @property
  def depths(self) -> tuple[int, ...]:
    """Number of blocks per stage."""
    return tuple(len(stage) for stage in self.stages)

  def __str__(self) -> str:
    return f'{self.family}-{"-".join(map(str, self.depths))}'

  def size(self, axis: str) -> int:
    """Size of a named axis."""
    return dict(self.sizes)[axis]

  def option(self, name: str) -> Option:
    """Value of an option."""
    return dict(self.options)[name]

  def stage_of(self, block: str) -> int:
    """Index of the stage that holds a block."""
    for index, stage in enumerate(self.stages):
      if block in stage:
        return index
    raise ValueError(f'No block {block!r} in {self.stages}.')

  def with_block(self, stage: int) -> Self:
    """Appends a newly named block, as wide as its stage's last, to a stage."""
    if not 0 <= stage < len(self.stages):
      raise ValueError(
          f'Stage {stage} does not exist; there are {len(self.stages)} stages.'
      )
    before = self.stages[stage][-1]
    block = f's{stage}b{self.minted[stage]}'
    private = {
        block + axis.removeprefix(before): size
        for axis, size in self.sizes
        if axis.startswith(before + '.')
    }
    return dataclasses.replace(
        self,
        stages=_replaced(self.stages, stage, (*self.stages[stage], block)),
        sizes=tuple(sorted({**dict(self.sizes), **private}.items())),
        minted=_replaced(self.minted, stage, self.minted[stage] + 1),
    )

  def without_block(self, block: str) -> Self:
    """Removes a block that is not its stage's first, and its private axes."""
    stage = self.stage_of(block)
    if block == self.stages[stage][0]:
      raise ValueError(
          f'Block {block!r} enters stage {stage}: it sets the resolution and '
          'width of the stage and cannot be removed.'
      )
    return dataclasses.replace(
        self,
        stages=_replaced(
            self.stages,
            stage,
            tuple(name for name in self.stages[stage] if name != block),
        ),
        sizes=tuple(
            (axis, size)
            for axis, size in self.sizes
            if not axis.startswith(block + '.')
        ),
    )

  def resized(self, sizes: Mapping[str, int]) -> Self:
    """Gives named axes new sizes."""
    if unknown := sorted(set(sizes) - set(dict(self.sizes))):
      raise ValueError(f'No axes {unknown} in {self}.')
    new = {
        axis: int(size) if isinstance(size, numbers.Integral) else size
        for axis, size in sizes.items()
    }
    return dataclasses.replace(
        self, sizes=tuple(sorted({**dict(self.sizes), **new}.items()))
    )

  def to_json(self) -> dict[str, Any]:
    """Converts to plain dictionaries and lists."""
    return {
        'family': self.family,
        'stages': [list(stage) for stage in self.stages],
        'sizes': dict(self.sizes),
        'options': dict(self.options),
        'minted': list(self.minted),
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Self:
    """Inverts `to_json`."""
    return cls(
        family=data['family'],
        stages=tuple(tuple(stage) for stage in data['stages']),
        sizes=tuple(sorted(data['sizes'].items())),
        options=sorted_options(data['options']),
        minted=tuple(data['minted']),
    )


def sorted_options(
    options: Mapping[str, Any],
) -> tuple[tuple[str, Option], ...]:
  """Canonical form of options: sorted pairs, lists as tuples."""
  return tuple(
      (name, tuple(value) if isinstance(value, list) else value)
      for name, value in sorted(options.items())
  )


def _replaced(
    values: tuple[Any, ...], index: int, value: Any
) -> tuple[Any, ...]:
  return (*values[:index], value, *values[index + 1 :])
