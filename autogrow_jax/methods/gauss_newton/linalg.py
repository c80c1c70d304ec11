"""Solves many small quadratic models at once.

A model is

    L(z) = 1/2 z'Az - b'z + c,   A symmetric and positive semidefinite,

with gradient g = Az - b. A solve never raises inside a compiled program: it
returns a `Code` for each problem.
"""

from collections.abc import Callable, Mapping
import enum
import functools
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Below it, a matrix carries no information about its problem.
DEAD_TRACE = 1e-10
# Smallest shift of a diagonal.
JITTER = 1e-12
# Bytes of the matrices that are factored at the same time.
CHUNK_BYTES = 2**30
# Coordinate descent over a box ends when no coordinate moves by more.
BOX_TOLERANCE = 1e-10
BOX_SWEEPS = 2000


class Code(enum.IntEnum):
  """Outcome of a solve."""

  OK = 0
  NOT_FINITE = 1  # The matrix or the right side holds NaN or infinity.
  RANK_ZERO = 2  # The trace is below `DEAD_TRACE`.
  INDEFINITE = 3  # The damped matrix is not positive definite.


@struct.dataclass
class Solution:
  """Solutions of several problems.

  Attributes:
    x: (problems, dimension); zero where the code is not OK.
    code: (problems,) int32 `Code`.
  """

  x: jax.Array
  code: jax.Array
def solve_damped(
    matrices: jax.Array, vectors: jax.Array, *, damping: float
) -> Solution:
  """Solves (A + m I) x = b for many positive semidefinite A by Cholesky.

  Waits for the result. Must not run inside a compiled program: on CPUs, two
  batched factorisations that run at the same time can deadlock, each waiting
  for threads that the other holds (jaxlib 0.10.2).

  Args:
    matrices: (problems, dimension, dimension) A.
    vectors: (problems, dimension) b.
    damping: m in units of the mean eigenvalue of each A.

  Returns:
    The solutions, each with a code.
  """
  solution = _solve_all(matrices, vectors, damping, CHUNK_BYTES)
  return jax.block_until_ready(solution)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _solve_all(
    matrices: jax.Array, vectors: jax.Array, damping: float, chunk_bytes: int
) -> Solution:
  """Solves all problems, a chunk at a time."""
  size = matrices.shape[-1]
  chunk = max(1, chunk_bytes // (size * size * matrices.dtype.itemsize))
  if chunk >= len(matrices):
    solve = jax.vmap(functools.partial(_solve_damped, damping))
    return solve(matrices, vectors)
  return lax.map(
      lambda problem: _solve_damped(damping, *problem),
      (matrices, vectors),
      batch_size=chunk,
  )


def _solve_damped(
    damping: float, matrix: jax.Array, vector: jax.Array
) -> Solution:
  """Solves one problem of `solve_damped`."""
  size = len(vector)
  trace = jnp.trace(matrix)
  shift = jnp.maximum(damping * trace / size, JITTER)
  damped = matrix + shift * jnp.eye(size, dtype=matrix.dtype)
  factor = jnp.linalg.cholesky(damped)
  x = jax.scipy.linalg.cho_solve((factor, True), vector)
  finite = jnp.isfinite(matrix).all() & jnp.isfinite(vector).all()
  code = jnp.where(jnp.isfinite(x).all(), Code.OK, Code.INDEFINITE)
  code = jnp.where(trace < DEAD_TRACE, Code.RANK_ZERO, code)
  code = jnp.where(finite, code, Code.NOT_FINITE).astype(jnp.int32)
  return Solution(jnp.where(code == Code.OK, x, 0), code)


Vectors = Mapping[str, jax.Array]


def conjugate_gradients(
    product: Callable[[Vectors], Vectors],
    vectors: Vectors,
    traces: Vectors,
    *,
    damping: float,
    tolerance: float,
    iterations: int,
) -> dict[str, Solution]:
  """Solves (A + m I) x = b for many positive semidefinite A given by products.

  Problems come in groups of equal dimension. All advance together, with one
  product per iteration; a converged problem stays as it is. The host reads the
  residuals between iterations, so this must not run inside a compiled program.

  Args:
    product: function of one v per problem, in the shape of `vectors`, that
      returns every A v. Problems are independent.
    vectors: per group, (problems, dimension) b.
    traces: per group, (problems,) trace of each A, or an estimate of it.
    damping: m in units of the mean eigenvalue, trace / dimension.
    tolerance: length of a converged residual, in units of the length of b.
    iterations: largest number of iterations.

  Returns:
    The solutions of each group, each with a code.
  """
  descents = _start_descents(vectors, traces, damping, tolerance)
  for _ in range(iterations):
    if not any(descent.active.any() for descent in descents.values()):
      break
    images = product(
        {name: descent.direction for name, descent in descents.items()}
    )
    descents = _advance_all(descents, images)
  return {
      name: Solution(
          jnp.where(descent.code[:, None] == Code.OK, descent.x, 0),
          descent.code,
      )
      for name, descent in descents.items()
  }


@struct.dataclass
class _Descent:
  """State of conjugate gradients for one group of problems.

  Attributes:
    x: (problems, dimension).
    residual: b - (A + m I) x.
    direction: direction of the next step; zero for converged problems.
    shift: (problems,) m.
    target: (problems,) squared length of a converged residual.
    code: (problems,) int32.
  """

  x: jax.Array
  residual: jax.Array
  direction: jax.Array
  shift: jax.Array
  target: jax.Array
  code: jax.Array

  @property
  def active(self) -> jax.Array:
    """(problems,) true for problems that have not converged."""
    return (self.code == Code.OK) & (_dot(self.residual) > self.target)


@jax.jit
def _start_descents(vectors, traces, damping, tolerance):
  """Starts all descents at zero."""

  def start(vector, trace):
    finite = jnp.isfinite(vector).all(-1) & jnp.isfinite(trace)
    code = jnp.where(trace < DEAD_TRACE, Code.RANK_ZERO, Code.OK)
    code = jnp.where(finite, code, Code.NOT_FINITE).astype(jnp.int32)
    residual = jnp.where(code[:, None] == Code.OK, vector, 0)
    return _Descent(
        x=jnp.zeros_like(vector),
        residual=residual,
        direction=residual,
        shift=jnp.maximum(damping * trace / vector.shape[-1], JITTER),
        target=tolerance**2 * _dot(residual),
        code=code,
    )

  return {name: start(vectors[name], traces[name]) for name in vectors}


@jax.jit
def _advance_all(descents, images):
  """Takes one step of every problem."""
  return {
      name: _advance(descent, images[name])
      for name, descent in descents.items()
  }


def _advance(descent: _Descent, image: jax.Array) -> _Descent:
  """Takes one step of a group, given A times its directions."""
  column = lambda numbers: numbers[:, None]
  image = image + column(descent.shift) * descent.direction
  curvature = _dot(descent.direction, image)
  code = jnp.where(curvature > 0, Code.OK, Code.INDEFINITE)
  code = jnp.where(jnp.isfinite(curvature), code, Code.NOT_FINITE)
  code = jnp.where(descent.active, code, descent.code).astype(jnp.int32)
  moves = descent.active & (code == Code.OK)
  before = _dot(descent.residual)
  step = column(jnp.where(moves, before / curvature, 0))
  moved = descent.replace(
      x=descent.x + step * descent.direction,
      residual=descent.residual
      - step * jnp.where(column(moves), image, 0),
      code=code,
  )
  after = _dot(moved.residual)
  turn = column(jnp.where(moved.active, after / before, 0))
  direction = moved.residual + turn * descent.direction
  return moved.replace(
      direction=jnp.where(column(moved.active), direction, 0)
  )


def _dot(left: jax.Array, right: jax.Array | None = None) -> jax.Array:
  """Returns each problem's inner product, or its squared length."""
  return jnp.sum(left * (left if right is None else right), -1)


@jax.jit
def plus(first: Any, second: Any) -> Any:
  """Adds two trees leaf by leaf in one compiled program."""
  return jax.tree.map(jnp.add, first, second)


def downdate(inverse: np.ndarray, index: int) -> np.ndarray:
  """Inverts a matrix without one row and column, from the whole inverse.

  The result is P - p p'/ P_cc with p the column c of P.

  Args:
    inverse: (size, size) P, the symmetric inverse of the whole matrix.
    index: c, the row and column to leave out.

  Returns:
    (size, size), with zeros in that row and column.
  """
  column = inverse[:, index]
  rest = inverse - np.outer(column, column) / column[index]
  rest[index] = rest[:, index] = 0
  return rest


def best_scale(slopes: np.ndarray, curvatures: np.ndarray) -> np.ndarray:
  """Minimises t s + t^2 Q / 2 over t in [0, 1], for each problem alone."""
  safe = np.where(curvatures > 0, curvatures, 1)
  inside = np.clip(-slopes / safe, 0, 1)
  return np.where(curvatures > 0, inside, (slopes < 0).astype(float))


def minimize_in_box(
    slopes: np.ndarray, gram: np.ndarray, largest: np.ndarray
) -> np.ndarray:
  """Minimises s't + 1/2 t'Gt over a box by coordinate descent.

  Args:
    slopes: (candidates,) float64.
    gram: (candidates, candidates) positive semidefinite, float64.
    largest: (candidates,) upper bounds; the lower ones are 0.

  Returns:
    (candidates,) scales.
  """
  scales = np.zeros(len(slopes))
  gradient = np.array(slopes, np.float64)
  for _ in range(BOX_SWEEPS):
    moved = 0.0
    for index, curvature in enumerate(np.diag(gram)):
      if curvature > 0:
        wanted = scales[index] - gradient[index] / curvature
      else:
        wanted = largest[index] * (gradient[index] < 0)
      wanted = min(max(wanted, 0.0), largest[index])
      step = wanted - scales[index]
      if step:
        scales[index] = wanted
        gradient += step * gram[:, index]
        moved = max(moved, abs(step))
    if moved < BOX_TOLERANCE:
      break
  return scales
