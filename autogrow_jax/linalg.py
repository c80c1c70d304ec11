"""Small dense linear algebra of quadratic models, vmapped over problems.

Everything here is about the model

    L(z) = 1/2 z'Az - b'z + c,   A symmetric and positive semidefinite,

with gradient g = Az - b, or about many such models at once. A solve never
raises inside a compiled program: it returns a `Code` for each problem.

Lawton et al. 2024, "Learning Morphisms with Gauss-Newton Approximation for
Growing Networks" (arXiv 2411.05855), has a Theorem 1, "General Gauss-Newton
Approximation", on a step dz = t dz* with A (z + dz*) = b, and a Theorem 2,
"Rank-1 Gauss-Newton Approximation". Titles and that hypothesis are all that we
know of them. The statements here are our own derivation, and so are their
proofs:

  q = dz*'A dz* = g'A^+g = 2 (L(z) - min L), the squared Newton decrement,
  s = g'dz = -t q, the slope along the step,
  L(z + dz) - L(z) = s + s^2 / (2 q) = -(t - t^2 / 2) q,
  g g'/ q <= A, so that the rank-one model never promises less than the whole
  one: s + s^2 / (2 q) <= s + 1/2 dz'A dz for every dz.
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
# Added to the diagonal whatever the damping.
JITTER = 1e-12
# Of the matrices that are factored at the same time.
CHUNK_BYTES = 2**30
# Coordinate descent over a box ends when no coordinate moves further.
BOX_TOLERANCE = 1e-10
BOX_SWEEPS = 2000


class Code(enum.IntEnum):
  """How a solve ended."""

  OK = 0
  NOT_FINITE = 1  # The matrix or the right side holds NaN or infinity.
  RANK_ZERO = 2  # The trace is below `DEAD_TRACE`.
  INDEFINITE = 3  # The damped matrix is not positive definite.


@struct.dataclass
class Solution:
  """Solutions of several problems.

  Attributes:
    x: (problems, dimension); zero where the code is not OK.
    code: (problems,) int32, see `Code`.
  """

  x: jax.Array
  code: jax.Array


def solve_damped(
    matrices: jax.Array, vectors: jax.Array, *, damping: float
) -> Solution:
  """Solves (A + m I) x = b for many positive semidefinite A by Cholesky.

  It waits for the result, and is not to be called inside a compiled program:
  on CPUs, two batched factorisations that run at the same time can each wait
  for the threads that the other one holds, for ever (jaxlib 0.10.2).

  Args:
    matrices: (problems, dimension, dimension).
    vectors: (problems, dimension).
    damping: m in units of the mean eigenvalue of each A.

  Returns:
    The solutions, with a code each.
  """
  solution = _solve_all(matrices, vectors, damping, CHUNK_BYTES)
  return jax.block_until_ready(solution)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _solve_all(
    matrices: jax.Array, vectors: jax.Array, damping: float, chunk_bytes: int
) -> Solution:
  """All problems, a chunk at a time."""
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
  """One problem of `solve_damped`."""
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
  """Solves (A + m I) x = b for many positive semidefinite A known by products.

  Problems come in groups, each with a dimension of its own. All of them advance
  together, with one product for each iteration. A problem that has ended stays
  as it is. The host looks at the residuals between iterations, so this is not
  to be called inside a compiled program.

  Args:
    product: A v for one v of each problem, of the shape of `vectors`. Neither
      problem nor group may depend on another.
    vectors: per group, b, (problems, dimension).
    traces: per group, (problems,) trace of each A, or an estimate.
    damping: m in units of the mean eigenvalue, trace / dimension.
    tolerance: a problem has ended when its residual is this part of b.
    iterations: at most so many.

  Returns:
    The solutions of each group, with a code each.
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
  """Where conjugate gradients are, for one group of problems.

  Attributes:
    x: (problems, dimension).
    residual: b - (A + m I) x.
    direction: of the next step; zero for problems that have ended.
    shift: (problems,) m.
    target: (problems,) squared length of a residual that is small enough.
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
    """(problems,) whether a problem has not ended."""
    return (self.code == Code.OK) & (_dot(self.residual) > self.target)


@jax.jit
def _start_descents(vectors, traces, damping, tolerance):
  """Descents from zero."""

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
  """One step of every problem."""
  return {
      name: _advance(descent, images[name])
      for name, descent in descents.items()
  }


def _advance(descent: _Descent, image: jax.Array) -> _Descent:
  """One step of a group, given A times its directions."""
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
  """Inner product of each problem's vectors, or squared length."""
  return jnp.sum(left * (left if right is None else right), -1)


@jax.jit
def plus(first: Any, second: Any) -> Any:
  """The sum of two trees, leaf by leaf, as one compiled program."""
  return jax.tree.map(jnp.add, first, second)


def downdate(inverse: np.ndarray, index: int) -> np.ndarray:
  """The inverse of a matrix without one of its rows and columns.

  P - p p'/ P_cc, p the column c of P, in the place of P_{-c,-c}.

  Args:
    inverse: (size, size) P, symmetric, of the whole matrix.
    index: c.

  Returns:
    (size, size), with zeros where the row and the column were.
  """
  column = inverse[:, index]
  rest = inverse - np.outer(column, column) / column[index]
  rest[index] = rest[:, index] = 0
  return rest


def squared_newton_decrement(
    curvature: jax.Array, gradient: jax.Array
) -> jax.Array:
  """q = g'A^+g: twice what the model can still fall. A may be singular."""
  return gradient @ jnp.linalg.pinv(curvature, hermitian=True) @ gradient


def change_toward_minimum(
    slope: jax.Array, decrement: jax.Array
) -> jax.Array:
  """Change of L along a step that points to a minimum: s + s^2 / (2 q).

  Args:
    slope: s = g'dz.
    decrement: q, the squared Newton decrement; where it is zero, so is s.

  Returns:
    The change.
  """
  safe = jnp.where(decrement > 0, decrement, 1)
  return slope + jnp.where(decrement > 0, slope**2 / (2 * safe), 0)


def rank_one_curvature(
    gradient: jax.Array, decrement: jax.Array
) -> jax.Array:
  """g g'/ q, the one rank-one curvature whose model has the same minimum."""
  return jnp.outer(gradient, gradient) / decrement


def softmax_decrement(loss: jax.Array) -> jax.Array:
  """q of cross-entropy as a function of the logits: exp(loss) - 1.

  With p the softmax, y the label and A = diag(p) - pp', solving
  A x = p - onehot(y) gives q = (1 - p_y) / p_y.

  Args:
    loss: -log p_y, nats.

  Returns:
    q, of the same shape.
  """
  return jnp.expm1(loss)


def best_scale(slopes: np.ndarray, curvatures: np.ndarray) -> np.ndarray:
  """Minimisers over [0, 1] of t s + t^2 Q / 2, for each problem apart."""
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
    largest: (candidates,) where each t ends; it starts at 0.

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
