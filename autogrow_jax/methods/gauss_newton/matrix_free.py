"""Solves least squares of wide layers without forming their matrices.

A block of the splits of a site is either u or e. On frozen weights, c of
example n changes with a unit's part v of the block by

  psi_n'v = sum over ends and positions of <gradient, layer(reads; v)>,

and a solve needs K = mean of psi_n psi_n', which has d^2 entries per unit for d
weights. Here K is only multiplied: K v is a forward pass of one layer with v in
place of its weights, and a backward pass to these weights, for all units at the
same time. Only the trace needs the psi_n themselves, a few at a time. For u, an
end is a writer and `gradient` is pulled back to its output; for e, an end is a
reader that reads the difference of the children.
"""

from collections.abc import Callable, Mapping

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import taps

Kernels = tuple[jax.Array, ...]

# With 576 weights and a damping of 0.3, about 30 iterations gave two to three
# digits, and 20 reached 99.9 % of the largest decrease of the model.
TOLERANCE = 1e-3
ITERATIONS = 40
# Bytes of linear functions kept between iterations; those of further batches
# are computed again in each iteration.
HELD_BYTES = 2**32


@struct.dataclass
class Linear:
  """c of all units of a site as a linear function of a block, on a batch.

  Attributes:
    reads: per end, (batch, ..., in) input of the layer.
    gradients: per end, (batch, ..., out); c is its inner product with the
      layer's output.
    layers: the ends.
    dim: `sites.WRITTEN` if the layers write the units, as for u, or
      `sites.READ`, as for e.
  """

  reads: tuple[jax.Array, ...]
  gradients: tuple[jax.Array, ...]
  layers: tuple[taps.Layer, ...] = struct.field(pytree_node=False)
  dim: int = struct.field(pytree_node=False)

  def __call__(self, kernels: Kernels) -> jax.Array:
    """Computes c, (batch, units), from kernels of all ends."""
    total = 0
    for layer, x, gradient, kernel in zip(
        self.layers, self.reads, self.gradients, kernels, strict=True
    ):
      if self.dim == sites_lib.WRITTEN:
        product = layer.linear(x, kernel) * gradient
      else:
        product = layer.transposed(gradient, kernel, x.shape) * x
      total = total + product.sum(tuple(range(1, product.ndim - 1)))
    return total

  def rows(self) -> jax.Array:
    """Returns psi, c's derivative by each unit's weights, (batch, units, d)."""
    blocks = []
    for layer, x, gradient in zip(
        self.layers, self.reads, self.gradients, strict=True
    ):
      units = x.shape[-1]
      gradient = gradient.reshape(len(x), -1, gradient.shape[-1])
      patches = layer.patches(x).reshape(*gradient.shape[:-1], -1)
      if self.dim == sites_lib.WRITTEN:
        formula = 'bpd,bpc->bcd'
      else:
        formula = 'bpkc,bpo->bcko'
        patches = patches.reshape(*gradient.shape[:-1], -1, units)
      block = jnp.einsum(
          formula, patches, gradient, precision=lax.Precision.HIGHEST
      )
      blocks.append(block.reshape(*block.shape[:2], -1))
    return jnp.concatenate(blocks, -1)

  def transposed(self, c: jax.Array, like: Kernels) -> Kernels:
    """Pulls (batch, units) back to kernels."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    (kernels,) = jax.vjp(self, zeros)[1](c)
    return kernels


Linears = dict[str, Linear]  # By axis.


def solve(
    linearized: Callable[[int], tuple[Linears, Mapping[str, jax.Array]]],
    like: Mapping[str, Kernels],
    *,
    batches: int,
    examples: int,
    damping: float,
) -> dict[str, linalg.Solution]:
  """Minimises damped quadratic models of a block, all sites together.

  Args:
    linearized: function of a batch's number that returns c, and the gradient of
      the model summed over the batch, (units, weights). It is deterministic,
      sampled labels included.
    like: kernels of the ends of each site, for their shapes.
    batches: number of batches.
    examples: number of examples in all batches.
    damping: damping of `linalg.conjugate_gradients`.

  Returns:
    Per axis, the steps (units, weights), and a code for each unit.
  """
  held, room, sums = [], HELD_BYTES, None
  for index in range(batches):
    linears, gradients = linearized(index)
    sums = _plus(sums, (gradients, _traces(linears)))
    room -= sum(leaf.nbytes for leaf in jax.tree.leaves(linears))
    if room >= 0:
      held.append(linears)

  def curved(vectors):
    total = None
    for index in range(batches):
      known = index < len(held)
      linears = held[index] if known else linearized(index)[0]
      total = _plus(total, product(linears, vectors, like))
    return jax.tree.map(lambda leaf: leaf / examples, total)

  gradients, traces = sums
  return linalg.conjugate_gradients(
      curved,
      jax.tree.map(lambda leaf: -leaf / examples, gradients),
      jax.tree.map(lambda leaf: leaf / examples, traces),
      damping=damping,
      tolerance=TOLERANCE,
      iterations=ITERATIONS,
  )


@jax.jit
def product(
    linears: Linears,
    vectors: Mapping[str, jax.Array],
    like: Mapping[str, Kernels],
) -> dict[str, jax.Array]:
  """Sums psi psi'v over a batch; per axis, (units, weights)."""
  products = {}
  with jax.default_matmul_precision('float32'):
    for axis, linear in linears.items():
      kernels = sites_lib.kernels_of(vectors[axis], like[axis], linear.dim)
      back = linear.transposed(linear(kernels), like[axis])
      products[axis] = sites_lib.rows(back, linear.dim)
  return products


@jax.jit
def _traces(linears):
  """Sums |psi|^2 over a batch; per axis, (units,)."""
  return {axis: _lengths(linear).sum(0) for axis, linear in linears.items()}


def _lengths(linear: Linear) -> jax.Array:
  """Computes |psi|^2, (batch, units), for a few examples at a time."""

  def of_one(reads, gradients):
    one = linear.replace(
        reads=jax.tree.map(lambda leaf: leaf[None], reads),
        gradients=jax.tree.map(lambda leaf: leaf[None], gradients),
    )
    return jnp.sum(one.rows()[0] ** 2, -1)

  rows = jax.eval_shape(linear.rows)
  size = rows.dtype.itemsize * rows.size // len(rows)
  return lax.map(
      lambda example: of_one(*example),
      (linear.reads, linear.gradients),
      batch_size=max(1, linalg.CHUNK_BYTES // size),
  )


def _plus(total, part):
  """Adds trees; None counts as zero."""
  return part if total is None else linalg.plus(total, part)
