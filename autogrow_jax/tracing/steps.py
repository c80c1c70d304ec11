"""Steps: equations of a jaxpr with the labels of their operands."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from autogrow_jax.tracing import labels
from autogrow_jax.tracing.labels import Dim

# Reasons that mark a factor; the first three don't freeze it (see `trace`).
INDEXED = 'rows that integers select'
STACKED = 'layers of a stack'
OUTPUT = 'an output of the model'
INPUT = 'an input of the model'
SPACE = 'positions of a window'
ORDER = 'its units are told apart by their number'
CONSTANT = 'meets a constant that is not uniform'


@dataclasses.dataclass(frozen=True)
class Value:
  """A traced array.

  Attributes:
    dims: labels of its dimensions.
    leaves: numbers of the leaves that alone it comes from; None if inputs of
      the model take part.
  """

  dims: list[Dim]
  leaves: frozenset[int] | None


def value(aval: Any, leaves: frozenset[int] | None = frozenset()) -> Value:
  """A value of which nothing is known."""
  return Value([labels.dim_of(size) for size in aval.shape], leaves)


@dataclasses.dataclass
class Uses:
  """Uses of the leaves, found on the way through a jaxpr.

  Attributes:
    reads: pairs (leaf, dimension) that are contracted with activations.
    writes: those that a contraction or a lookup puts out.
    both: output dimensions of grouped kernels, whose groups read and write.
    adds: dimensions of leaves that are added to activations.
    normalised: dimensions of activations that are reduced over.
  """

  reads: list[tuple[int, Dim]] = dataclasses.field(default_factory=list)
  writes: list[tuple[int, Dim]] = dataclasses.field(default_factory=list)
  both: list[tuple[int, Dim]] = dataclasses.field(default_factory=list)
  adds: list[tuple[int, Dim]] = dataclasses.field(default_factory=list)
  normalised: list[Dim] = dataclasses.field(default_factory=list)

  def note(self, kind: list, operand: Value, dims: Sequence[Dim]) -> None:
    """Notes that leaves use dimensions in one way."""
    kind += [(leaf, dim) for leaf in operand.leaves or () for dim in dims]


@dataclasses.dataclass
class Step:
  """One equation of a jaxpr with the labels of its operands."""

  name: str
  params: dict[str, Any]
  ins: list[Value]
  shapes_in: list[tuple[int, ...]]
  avals: list[Any]
  uses: Uses
  where: str
  run: Callable[..., list[Value]]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the first result."""
    return self.avals[0].shape

  @property
  def leaves(self) -> frozenset[int] | None:
    """Leaves of the results."""
    found: frozenset[int] = frozenset()
    for operand in self.ins:
      if operand.leaves is None:
        return None
      found |= operand.leaves
    return found

  def freeze(self, reason: str, *dims: Dim) -> None:
    """Marks dimensions."""
    labels.mark(dims, reason, self.where)

  def unify(self, left: Dim, right: Dim) -> None:
    """Joins two dimensions."""
    labels.unify(left, right, self.where)

  def unify_all(self, left: Value, right: Value) -> None:
    """Joins two values of one shape."""
    for a, b in zip(left.dims, right.dims, strict=True):
      self.unify(a, b)

  def made(self, *dims: list[Dim]) -> list[Value]:
    """Results with these dimensions."""
    return [Value(each, self.leaves) for each in dims]

  def call(self, jaxpr: Any, ins: list[Value]) -> list[Value]:
    """Results of an inner jaxpr."""
    consts = getattr(jaxpr, 'consts', ())
    return self.run(
        getattr(jaxpr, 'jaxpr', jaxpr), consts, ins, self.uses, self.where
    )
