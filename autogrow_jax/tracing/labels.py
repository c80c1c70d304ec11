"""Labels: what a dimension of a traced value consists of.

A dimension is a concatenation of segments, a segment a product of factors, the
last one fastest. Factors that must have one size are joined (union-find). What
a model does with a dimension refines a factor into a product (a reshape) or a
sum (a slice). Marks say why the units of a factor cannot come and go.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import math


class Conflict(Exception):
  """A dimension that is not a concatenation of products."""


@dataclasses.dataclass(eq=False)
class Factor:
  """A set of units that dimensions of several values share.

  Attributes:
    size: number of units.
    parts: factors that it consists of; their product, or their concatenation.
    is_sum: whether it is the concatenation of its parts.
    marks: reasons why it is special, with the place in the source.
    joined: the factor that it was joined to.
  """

  size: int
  parts: tuple['Factor', ...] = ()
  is_sum: bool = False
  marks: dict[str, str] = dataclasses.field(default_factory=dict)
  joined: 'Factor | None' = None

  @property
  def root(self) -> 'Factor':
    """The factor that stands for all that are joined with it."""
    factor = self
    while factor.joined is not None:
      factor = factor.joined
    return factor

  def mark(self, marks: dict[str, str]) -> None:
    """Adds marks to the factor and to what it consists of."""
    root = self.root
    root.marks = marks | root.marks
    for part in root.parts:
      part.mark(marks)

  def refine(self, sizes: Sequence[int], is_sum: bool) -> tuple['Factor', ...]:
    """Its parts of these sizes.

    Raises:
      Conflict: it consists of others.
    """
    root = self.root
    if root.parts and (
        root.is_sum != is_sum
        or [part.root.size for part in root.parts] != list(sizes)
    ):
      raise Conflict
    if not root.parts:
      root.is_sum = is_sum
      root.parts = tuple(Factor(size, marks=dict(root.marks)) for size in sizes)
    return root.parts


Segment = list[Factor]
Dim = list[Segment]


def dim_of(size: int) -> Dim:
  """A dimension of which nothing is known."""
  return [[Factor(size)]]


def expand(dim: Dim) -> Dim:
  """A dimension with every factor replaced by what it consists of.

  A concatenation stays one factor where faster factors stand before it.
  """
  segments: Dim = []
  for segment in dim:
    expanded: Dim = [[]]
    for factor in segment:
      root = factor.root
      if root.size == 1:
        continue
      if root.is_sum and expanded == [[]]:
        expanded = [piece for part in root.parts for piece in expand([[part]])]
      elif root.parts and not root.is_sum:
        pieces = expand([list(root.parts)])
        if len(pieces) == 1:
          expanded = [piece + pieces[0] for piece in expanded]
        elif expanded == [[]]:
          expanded = pieces
        else:
          expanded = [piece + [root] for piece in expanded]
      else:
        expanded = [piece + [root] for piece in expanded]
    segments += expanded
  return segments


def size_of(dim: Dim) -> int:
  """Number of entries of a dimension."""
  return sum(length(segment) for segment in dim)


def length(segment: Segment) -> int:
  """Number of entries of a segment."""
  return math.prod(factor.root.size for factor in segment)


def mark(dims: Iterable[Dim], reason: str, where: str) -> None:
  """Marks all factors of dimensions."""
  for dim in dims:
    for segment in dim:
      for factor in segment:
        if factor.root.size > 1:
          factor.mark({reason: where})


def unify(left: Dim, right: Dim, where: str) -> None:
  """Joins two dimensions; where that is impossible, it marks both."""
  a, b = expand(left), expand(right)
  try:
    while a and b:
      size, other = length(a[0]), length(b[0])
      if size < other:
        b[:1] = _cut(b[0], [size, other - size])
      elif size > other:
        a[:1] = _cut(a[0], [other, size - other])
      _unify_segments(a.pop(0), b.pop(0), where)
  except Conflict:
    mark((left, right), 'meets an axis of other parts', where)


def _unify_segments(a: Segment, b: Segment, where: str) -> None:
  """Joins two products of equal size."""
  a, b = list(a), list(b)
  while a and b:
    left, right = a[0].root, b[0].root
    if left.size == right.size:
      _join(a.pop(0).root, b.pop(0).root, where)
    elif left.size < right.size:
      b[:1] = _factored(right, left.size)
    else:
      a[:1] = _factored(left, right.size)


def _join(a: Factor, b: Factor, where: str) -> None:
  if a is b:
    return
  if not a.parts:
    a, b = b, a
  parts = expand([[a]]), expand([[b]])
  has_both = bool(b.parts)
  b.joined = a
  marks = a.marks | b.marks
  a.mark(marks)
  if has_both:
    unify(*parts, where)


def _factored(factor: Factor, size: int) -> tuple[Factor, ...]:
  """A factor as the product of one of a size and the rest."""
  if factor.size % size:
    raise Conflict
  return factor.refine((size, factor.size // size), is_sum=False)


def _cut(segment: Segment, sizes: Sequence[int]) -> Dim:
  """A segment as a concatenation of pieces of these sizes."""
  inner = length(segment[1:])
  if any(size % inner for size in sizes):
    raise Conflict
  parts = segment[0].refine([size // inner for size in sizes], is_sum=True)
  return [[part, *segment[1:]] for part in parts]


def cut(dim: Dim, start: int, stop: int) -> Dim:
  """Entries from start to stop of a dimension.

  Raises:
    Conflict: the cut goes through a factor that is not the slowest.
  """
  pieces, position = [], 0
  for segment in expand(dim):
    size = length(segment)
    low, high = max(start - position, 0), min(stop - position, size)
    position += size
    if low >= high:
      continue
    if (low, high) == (0, size):
      pieces.append(segment)
    else:
      sizes = [n for n in (low, high - low, size - high) if n]
      pieces.append(_cut(segment, sizes)[bool(low)])
  return [piece for whole in pieces for piece in expand([whole])]


def reshape(dims: Sequence[Dim], shape: Sequence[int], where: str) -> list[Dim]:
  """Labels of a reshaped value.

  Args:
    dims: before.
    shape: after.
    where: place in the source.

  Returns:
    A dimension for each number of the shape. Those whose parts do not fit are
    marked, and what follows them is fresh.
  """
  result: list[Dim] = [[[]] for _ in shape]
  old = [dim for dim in dims if size_of(dim) != 1]
  new = [index for index, size in enumerate(shape) if size != 1]
  while old and new:
    taken, given = [old.pop(0)], [new.pop(0)]
    before, after = size_of(taken[0]), shape[given[0]]
    while before != after:
      if before < after:
        taken.append(old.pop(0))
        before *= size_of(taken[-1])
      else:
        given.append(new.pop(0))
        after *= shape[given[-1]]
    if len(taken) == len(given) == 1:
      result[given[0]] = taken[0]
      continue
    sizes = [shape[index] for index in given]
    try:
      made = _split(_merged(taken), sizes, where)
    except Conflict:
      mark(taken, 'is reshaped across its parts', where)
      made = [dim_of(size) for size in sizes]
      mark(made, 'is reshaped across its parts', where)
    for index, dim in zip(given, made, strict=True):
      result[index] = dim
  return result


def _merged(dims: Sequence[Dim]) -> Dim:
  """The product of dimensions; only the first may be a concatenation."""
  first, *rest = [expand(dim) for dim in dims]
  if any(len(dim) != 1 for dim in rest):
    raise Conflict
  return [segment + [f for dim in rest for f in dim[0]] for segment in first]


def _split(dim: Dim, sizes: Sequence[int], where: str) -> list[Dim]:
  """A dimension as a product; pieces of a sum share the inner ones."""
  inner = math.prod(sizes[1:])
  outer: Dim = []
  others: list[Dim] = []
  for segment in expand(dim):
    if length(segment) % inner:
      raise Conflict
    rest = list(segment)
    pieces = [
        [_taken(rest, size)]
        for size in (length(segment) // inner, *sizes[1:])
    ]
    outer += pieces[0]
    if others:
      for left, right in zip(others, pieces[1:], strict=True):
        unify(left, right, where)
    else:
      others = pieces[1:]
  return [outer, *others]


def _taken(segment: Segment, size: int) -> Segment:
  """Takes factors of a size from the front of a segment."""
  taken = []
  while size > 1:
    factor = segment.pop(0).root
    if size % factor.size == 0:
      taken.append(factor)
      size //= factor.size
    else:
      segment[:0] = _factored(factor, size)
  return taken
