"""Axes: which dimensions of which leaves belong together, by name.

A dimension of a leaf is a concatenation of segments, and each segment is a
product of named factors, the last one fastest. Most dimensions are a single
factor. A fused kernel of queries, keys and values has three segments of heads x
head size; a flattened map has one of height x width x channel.

Whatever knows the axes of a tree by path knows those of an optimizer's moments,
too, since the path of a moment ends in that of its parameter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import fnmatch
import math
from typing import Any, Literal

import jax
import numpy as np

NEW = -1  # In a source vector: a unit without a parent.

Path = tuple[str, ...]
Role = Literal[
    'reads', 'writes', 'both', 'tied', 'indexed', 'layers', 'neither'
]
Sources = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, init=False)
class Axis:
  """One dimension of a leaf.

  Attributes:
    segments: names of the factors of each segment, slowest first; the name
      alone where there is one factor.
    role: 'reads' for the input side of a kernel; 'writes' for its output side,
      a bias or the scale of a norm; 'both' for a depthwise kernel; 'tied' for a
      leaf that reads it in one place and writes it in another; 'indexed' for
      rows that integers select; 'layers' for a stack, but 'reads' where the
      leaf adds to what is outside of the stack; 'neither' for statistics.
  """

  segments: tuple[tuple[str, ...], ...]
  role: Role

  def __init__(self, segments: str | tuple[tuple[str, ...], ...], role: Role):
    if isinstance(segments, str):
      segments = ((segments,),)
    object.__setattr__(self, 'segments', segments)
    object.__setattr__(self, 'role', role)

  @property
  def name(self) -> str:
    """The factor's name; of several 'heads*size + heads*size'."""
    return ' + '.join('*'.join(factors) for factors in self.segments)

  @property
  def factors(self) -> frozenset[str]:
    """Names of all factors."""
    return frozenset(name for names in self.segments for name in names)


Axes = tuple[Axis | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class AxisTable:
  """Axes of all leaves of a tree, by the end of their paths; prints itself.

  Attributes:
    axes: per path, an `Axis` or None per dimension; leaves without any named
      dimension may be absent.
    sizes: number of units of each factor.
    frozen: reasons, by factor, why its units cannot come and go.
    kinds: by factor whose units are told apart by their number, what they are:
      'outputs' of the model, 'indexed' rows, 'layers' of a stack.
    normalised: factors that a norm or a softmax reduces over: new units change
      the function, even if nothing reads them.
  """

  axes: Mapping[Path, Axes]
  sizes: Mapping[str, int]
  frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
  kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
  normalised: frozenset[str] = frozenset()

  def end(self, path: Path) -> Path | None:
    """The longest end of a path that is in the table."""
    ends = (path[start:] for start in range(len(path)))
    return next((end for end in ends if end in self.axes), None)

  def find(self, path: Path) -> Axes | None:
    """Axes of the leaf at a path, by the longest matching end of it."""
    end = self.end(path)
    return None if end is None else self.axes[end]

  def __getitem__(self, pattern: str) -> tuple[str, ...]:
    """Names of the factors that a shell pattern such as '*.mid' matches."""
    return tuple(fnmatch.filter(self.sizes, pattern))

  def leaves(self, name: str) -> Iterator[tuple[Path, int, Axis]]:
    """All (path, dimension, axis) with a factor of this name."""
    for path, axes in self.axes.items():
      for dim, axis in enumerate(axes):
        if axis is not None and name in axis.factors:
          yield path, dim, axis

  @property
  def free(self) -> tuple[str, ...]:
    """Factors whose units are alike and may come and go."""
    return tuple(
        name
        for name in self.sizes
        if name not in self.frozen and name not in self.kinds
    )

  def verify(
      self,
      function: Callable[..., Any],
      tree: Any,
      *inputs: Any,
      key: jax.Array | None = None,
      tolerance: float = 1e-5,
  ) -> 'Verification':
    """Checks the axes by permuting the units of every free factor.

    With the units permuted in all leaves, the outputs stay; with one leaf left
    out, they change. Noise is added to the leaves, so that zeros count, too.

    Args:
      function: computes the outputs from the tree and the inputs.
      tree: arrays of the model.
      *inputs: further arguments.
      key: decides noise and permutations; 0 by default.
      tolerance: largest change that counts as none, relative to the largest
        output.

    Returns:
      What was measured.

    Raises:
      ValueError: outputs change with a permutation, or do not change although a
        leaf that they depend on was left out; or leaves are mere shapes.
    """
    if not all(hasattr(leaf, '__array__') for leaf in jax.tree.leaves(tree)):
      raise ValueError('Units are permuted in arrays; the tree has shapes.')
    rng = np.random.default_rng(
        0 if key is None else np.asarray(jax.random.key_data(key)).ravel()
    )
    compiled = jax.jit(function)
    tree = map_with_names(lambda _, leaf: _noisy(leaf, rng), tree)
    before = jax.tree.leaves(compiled(tree, *inputs))
    largest = max(float(np.abs(output).max()) for output in before)

    def change(sources, skip=None, noise=False):
      def moved(path, leaf):
        if noise and path == skip:
          return _noisy(leaf, rng)
        if path == skip:
          return leaf
        return gather(leaf, self.find(path), sources, self.sizes)[0]

      outputs = compiled(map_with_names(moved, tree), *inputs)
      return max(
          float(np.abs(np.asarray(a) - np.asarray(b)).max()) / largest
          for a, b in zip(jax.tree.leaves(outputs), before, strict=True)
      )

    permuted, unnoticed, wrong = {}, {}, []
    for name in self.free:
      order = rng.permutation(self.sizes[name])  # All in one cycle.
      sources = {name: np.roll(order, 1)[np.argsort(order)]}
      permuted[name] = change(sources)
      if not permuted[name] <= tolerance:
        wrong.append(f'{name} permuted changes them by {permuted[name]:.1e}')
      for path in by_path(tree):
        axes = self.find(path) or ()
        if not changes(axes, sources) or change(sources, path) > tolerance:
          continue
        if change({}, path, noise=True) > tolerance:
          wrong.append(f'{name} does not seem to belong to {"/".join(path)}')
        unnoticed[name, '/'.join(path)] = 'the outputs do not depend on it'
    if wrong:
      raise ValueError('Outputs contradict the axes: ' + '; '.join(wrong))
    return Verification(permuted, unnoticed)

  def __str__(self) -> str:
    lines: list[str] = []
    reasons: dict[str, list[str]] = {}
    for name, size in self.sizes.items():
      if name in self.frozen:
        reasons.setdefault(self.frozen[name], []).append(name)
        continue
      ends: dict[str, list[str]] = {}
      for path, _, axis in self.leaves(name):
        ends.setdefault(axis.role, []).append('/'.join(path))
      members = '; '.join(f'{k}: {", ".join(v)}' for k, v in ends.items())
      kind = f' ({self.kinds[name]})' if name in self.kinds else ''
      lines.append(f'{name} {size}{kind}  {members}')
    lines += [f'frozen, {why}: {", ".join(n)}' for why, n in reasons.items()]
    return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Verification:
  """Outcome of a permutation test; prints itself.

  Attributes:
    changes: per free factor, the change of the outputs when its units are
      permuted in all leaves, relative to the largest output.
    unnoticed: reasons, by factor and leaf, why outputs stay although the leaf
      is left out.
  """

  changes: Mapping[str, float]
  unnoticed: Mapping[tuple[str, str], str]

  def __str__(self) -> str:
    lines = [
        f'{len(self.changes)} factors permuted; largest relative change of the '
        f'outputs {max(self.changes.values(), default=0.0):.1e}'
    ]
    lines += [
        f'{name}: {leaf} left out goes unnoticed: {why}'
        for (name, leaf), why in self.unnoticed.items()
    ]
    return '\n'.join(lines)


def _noisy(leaf: Any, rng: np.random.Generator) -> Any:
  """A leaf with noise; what is never negative, such as a variance, stays so."""
  if not jax.numpy.issubdtype(leaf.dtype, np.floating):
    return leaf
  leaf = np.asarray(leaf)
  noisy = leaf + 0.05 * rng.standard_normal(leaf.shape)
  if leaf.ndim == 1 and leaf.any() and leaf.min() >= 0:
    noisy = np.abs(noisy) + 0.1
  return noisy.astype(leaf.dtype)


def names(path: Sequence[Any]) -> Path:
  """A key path of `jax.tree_util` as strings."""
  return tuple(
      str(
          getattr(
              entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', entry))
          )
      )
      for entry in path
  )


def map_with_names(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """`jax.tree.map` of a function that takes a `Path` first."""
  return jax.tree_util.tree_map_with_path(
      lambda path, *leaves: function(names(path), *leaves), tree, *rest
  )


def by_path(tree: Any) -> dict[Path, Any]:
  """All leaves by path.

  Raises:
    ValueError: two leaves have the same path.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  found = {names(path): leaf for path, leaf in leaves}
  if len(found) != len(leaves):
    raise ValueError('Two leaves of the tree have the same path.')
  return found


def along(vector: Any, dim: int, ndim: int) -> Any:
  """A vector in a shape that broadcasts along one of `ndim` dimensions."""
  shape = [1] * ndim
  shape[dim] = -1
  return vector.reshape(shape)


def source_of(
    axis: Axis, sources: Sources, sizes: Mapping[str, int]
) -> np.ndarray | None:
  """Old entry of each new entry of a dimension.

  Args:
    axis: of the dimension.
    sources: per factor that changes, the source of each unit, or `NEW`.
    sizes: units of each factor before; only needed where there are several.

  Returns:
    int (entries,), `NEW` where any factor is new; None if nothing changes.
  """
  if not axis.factors & sources.keys():
    return None
  if len(axis.segments) == 1 and len(axis.segments[0]) == 1:
    return np.asarray(sources[axis.segments[0][0]])
  pieces, offset = [], 0
  for segment in axis.segments:
    piece, is_new = np.zeros(1, int), np.zeros(1, bool)
    for name in segment:
      source = np.asarray(sources.get(name, np.arange(sizes[name])))
      piece = (piece[:, None] * sizes[name] + source).ravel()
      is_new = (is_new[:, None] | (source == NEW)).ravel()
    pieces.append(np.where(is_new, NEW, offset + piece))
    offset += math.prod(sizes[name] for name in segment)
  return np.concatenate(pieces)


def gather(
    leaf: np.ndarray,
    axes: Axes | None,
    sources: Sources,
    sizes: Mapping[str, int],
    where: str = 'A leaf',
) -> tuple[np.ndarray, np.ndarray]:
  """Gathers a leaf along its changed dimensions.

  Args:
    leaf: before.
    axes: of its dimensions.
    sources: see `source_of`.
    sizes: see `source_of`.
    where: name of the leaf, for messages.

  Returns:
    The leaf after, itself where nothing changes, with arbitrary values in new
    entries; and where it is new, bool, in a shape that broadcasts.

  Raises:
    ValueError: a source is not one of the leaf's units.
  """
  is_new = np.zeros((1,) * leaf.ndim, bool)
  for dim, axis in enumerate(axes or ()):
    if axis is None or (source := source_of(axis, sources, sizes)) is None:
      continue
    if source.max() >= leaf.shape[dim] or source.min() < NEW:
      raise ValueError(
          f'Sources of axis {axis.name!r} go from {source.min()} to '
          f'{source.max()}, but {where} has units 0 to {leaf.shape[dim] - 1}.'
      )
    leaf = np.take(leaf, np.maximum(source, 0), axis=dim)
    is_new = is_new | along(source == NEW, dim, leaf.ndim)
  return leaf, is_new


def changes(axes: Axes | None, sources: Sources) -> bool:
  """Returns True if a leaf with these axes changes."""
  return any(axis and axis.factors & sources.keys() for axis in axes or ())


def scale(
    tree: Any,
    table: AxisTable,
    vectors: Mapping[str, Any],
    is_meant: Callable[[Path, Axis], bool],
) -> Any:
  """Multiplies leaves by vectors along some of their dimensions.

  Args:
    tree: any tree whose paths end in the table's; leaves may be traced.
    table: axes of the tree.
    vectors: per factor, a vector of its size; may be traced.
    is_meant: chooses dimensions by the path of the leaf and their axis.

  Returns:
    The scaled tree.
  """

  def scaled(path, leaf):
    axes = table.find(path) or ()
    if len(axes) != leaf.ndim:  # A factored moment.
      return leaf
    for dim, axis in enumerate(axes):
      if axis is None or not is_meant(path, axis):
        continue
      vector = vector_of(axis, vectors, table.sizes)
      if vector is not None:
        leaf = leaf * along(vector, dim, leaf.ndim).astype(leaf.dtype)
    return leaf

  return map_with_names(scaled, tree)


def scale_readers(
    tree: Any, table: AxisTable, vectors: Mapping[str, Any]
) -> Any:
  """Multiplies all readers of an axis: a soft gate, its fold, the halving.

  Depthwise kernels read and write their axis; they are left alone, and the
  reader behind them is scaled.
  """
  return scale(
      tree, table, vectors, lambda path, axis: axis.role in ('reads', 'tied')
  )


def scale_filters(
    tree: Any, table: AxisTable, vectors: Mapping[str, Any]
) -> Any:
  """Multiplies all kernels that write an axis."""
  return scale(
      tree,
      table,
      vectors,
      lambda path, axis: axis.role == 'writes' and path[-1].endswith('kernel'),
  )


def vector_of(
    axis: Axis, vectors: Mapping[str, Any], sizes: Mapping[str, int]
) -> Any:
  """One factor per entry of a dimension: the product over its factors.

  Returns:
    (entries,), or None where no factor has a vector.
  """
  if not axis.factors & vectors.keys():
    return None
  if len(axis.segments) == 1 and len(axis.segments[0]) == 1:
    return vectors[axis.segments[0][0]]
  pieces = []
  for segment in axis.segments:
    piece = np.ones(1, np.float32)
    for name in segment:
      vector = vectors.get(name, np.ones(sizes[name], np.float32))
      piece = (piece[:, None] * vector[None]).ravel()
    pieces.append(piece)
  return pieces[0] if len(pieces) == 1 else jax.numpy.concatenate(pieces)
