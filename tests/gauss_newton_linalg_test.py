"""Tests of the solves of quadratic models, and of two theorems about them.

Lawton et al. 2024, "Learning Morphisms with Gauss-Newton Approximation for
Growing Networks" (arXiv 2411.05855), has a Theorem 1, "General Gauss-Newton
Approximation", on a step dz = t dz* with A (z + dz*) = b, and a Theorem 2,
"Rank-1 Gauss-Newton Approximation". Only the titles and that hypothesis are
known to us; the statements below and their proofs are our own derivation:

  q = dz*'A dz* = g'A^+g = 2 (L(z) - min L), the squared Newton decrement,
  s = g'dz = -t q, the slope along the step,
  L(z + dz) - L(z) = s + s^2 / (2 q) = -(t - t^2 / 2) q,
  g g'/ q <= A, so that the rank-one model never promises less than the full
  model: s + s^2 / (2 q) <= s + 1/2 dz'A dz for every dz.
"""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from autogrow_jax.methods.gauss_newton import linalg


def quadratic(seed, size=7, rank=4):
  """A singular model: (A, b, z, a step to a minimum with null components)."""
  generator = np.random.default_rng(seed)
  root = generator.normal(size=(size, rank))
  curvature = root @ root.T
  linear = curvature @ generator.normal(size=size)
  z = generator.normal(size=size)
  gradient = curvature @ z - linear
  null = np.linalg.svd(curvature)[0][:, rank:]
  step = -np.linalg.pinv(curvature) @ gradient
  step = step + null @ generator.normal(size=size - rank)
  return curvature, linear, z, step


def softmax_model(logits, label):
  """(p, A, g) of cross-entropy as a function of the logits."""
  p = np.exp(logits - logits.max())
  p /= p.sum()
  return p, np.diag(p) - np.outer(p, p), p - np.eye(len(p))[label]


def squared_newton_decrement(curvature, gradient):
  """q = g'A^+g: twice the largest decrease of the model. A may be singular."""
  inverse = np.linalg.pinv(curvature, rcond=1e-12, hermitian=True)
  return gradient @ inverse @ gradient


def change_toward_minimum(slope, decrement):
  """Change of L along a step that points to a minimum: s + s^2 / (2 q)."""
  return slope + slope**2 / (2 * decrement)


def rank_one_curvature(gradient, decrement):
  """g g'/ q, the only rank-one curvature whose model has the same minimum."""
  return np.outer(gradient, gradient) / decrement


def softmax_decrement(loss):
  """q of cross-entropy as a function of the logits: exp(loss) - 1.

  With p the softmax, y the label and A = diag(p) - pp', solving
  A x = p - onehot(y) gives q = (1 - p_y) / p_y.
  """
  return np.expm1(loss)


class DowndateTest(absltest.TestCase):

  def test_is_a_fresh_inverse(self):
    """Also after several, of what is left."""
    generator = np.random.default_rng(5)
    root = generator.normal(size=(9, 6))
    matrix = root.T @ root
    inverse, kept = np.linalg.inv(matrix), list(range(6))
    for index in (2, 5, 0):
      inverse = linalg.downdate(inverse, index)
      kept.remove(index)
      want = np.zeros((6, 6))
      want[np.ix_(kept, kept)] = np.linalg.inv(matrix[np.ix_(kept, kept)])
      np.testing.assert_allclose(inverse, want, atol=1e-10)


class TheoremsTest(parameterized.TestCase):

  @parameterized.product(seed=(0, 1, 2, 3), scale=(-0.7, 0.3, 1.0, 1.9))
  def test_change_along_a_step_to_a_minimum(self, seed, scale):
    curvature, linear, z, step = quadratic(seed)
    value = lambda z: 0.5 * z @ curvature @ z - linear @ z
    gradient = curvature @ z - linear
    np.testing.assert_allclose(curvature @ (z + step), linear, atol=1e-9)
    q = squared_newton_decrement(curvature, gradient)
    change = change_toward_minimum(gradient @ (scale * step), q)
    actual = value(z + scale * step) - value(z)
    lowest = value(z + step)
    self.assertAlmostEqual(change, actual, delta=1e-9)
    self.assertAlmostEqual(change, -(scale - scale**2 / 2) * q, delta=1e-9)
    self.assertAlmostEqual(q, 2 * (value(z) - lowest), delta=1e-9)
    self.assertAlmostEqual(q, step @ curvature @ step, delta=1e-9)
    self.assertAlmostEqual(
        value(z + scale * step) - lowest,
        (1 - scale) ** 2 * (value(z) - lowest),
        delta=1e-9,
    )

  @parameterized.parameters(0, 1, 2, 3)
  def test_rank_one_never_promises_less(self, seed):
    curvature, linear, z, step = quadratic(seed)
    gradient = curvature @ z - linear
    generator = np.random.default_rng(seed + 100)
    q = squared_newton_decrement(curvature, gradient)
    rank_one = rank_one_curvature(gradient, q)
    self.assertGreater(np.linalg.eigvalsh(curvature - rank_one)[0], -1e-10)
    gaps = []
    for _ in range(50):
      change = generator.normal(size=len(z))
      gaps.append(change @ (curvature - rank_one) @ change)
    self.assertGreater(min(gaps), -1e-10)
    self.assertGreater(max(gaps), 0.1)  # The inequality is strict elsewhere,
    self.assertAlmostEqual(step @ (curvature - rank_one) @ step, 0, places=9)

  @parameterized.product(classes=(2, 5, 10, 100), seed=(0, 1))
  def test_softmax_decrement(self, classes, seed):
    logits = 2 * np.random.default_rng(seed).normal(size=classes)
    p, curvature, gradient = softmax_model(logits, 1)
    general = squared_newton_decrement(curvature, gradient)
    scalar = softmax_decrement(-np.log(p[1]))
    np.testing.assert_allclose(general, scalar, rtol=1e-7)
    np.testing.assert_allclose(scalar, (1 - p[1]) / p[1], rtol=1e-12)

  @parameterized.parameters(2, 5, 10, 100)
  def test_sampled_labels_give_the_curvature(self, classes):
    logits = np.random.default_rng(classes).normal(size=classes)
    p, curvature, _ = softmax_model(logits, 0)
    expected = sum(
        p[label] * np.outer(g, g)
        for label in range(classes)
        for g in [softmax_model(logits, label)[2]]
    )
    np.testing.assert_allclose(expected, curvature, atol=1e-15)


class SolveTest(parameterized.TestCase):

  def test_solves_and_codes(self):
    generator = np.random.default_rng(0)
    root = generator.normal(size=(5, 3, 6)).astype('f4')
    matrices = np.einsum('prd,pre->pde', root, root)  # Rank 3 of 6.
    matrices[1] = 0
    matrices[2, 0, 0] = np.nan
    matrices[3] = np.diag([9, 9, 9, 9, 9, -5])
    vectors = generator.normal(size=(5, 6)).astype('f4')
    solution = linalg.solve_damped(matrices, vectors, damping=0.1)
    code = linalg.Code
    self.assertSequenceEqual(
        list(solution.code),
        [code.OK, code.RANK_ZERO, code.NOT_FINITE, code.INDEFINITE, code.OK],
    )
    np.testing.assert_array_equal(solution.x[1:4], 0)
    for index in (0, 4):
      shift = 0.1 * np.trace(matrices[index]) / 6
      want = np.linalg.solve(
          matrices[index] + shift * np.eye(6), vectors[index]
      )
      np.testing.assert_allclose(solution.x[index], want, rtol=1e-3, atol=1e-4)

  def test_chunks_change_nothing(self):
    generator = np.random.default_rng(1)
    root = generator.normal(size=(7, 4, 4)).astype('f4')
    matrices = np.einsum('prd,pre->pde', root, root)
    vectors = generator.normal(size=(7, 4)).astype('f4')
    whole = linalg.solve_damped(matrices, vectors, damping=0.3)
    with mock.patch.object(linalg, 'CHUNK_BYTES', 3 * 16 * 4):
      chunked = linalg.solve_damped(matrices, vectors, damping=0.3)
    np.testing.assert_allclose(chunked.x, whole.x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(chunked.code, whole.code)


class ConjugateGradientsTest(parameterized.TestCase):

  def solve(self, matrices, vectors, damping=0.3):
    """Groups of problems whose matrices are at hand, but only multiplied."""
    calls = []

    def product(directions):
      calls.append(None)
      return {
          name: jnp.einsum('pde,pe->pd', matrices[name], direction)
          for name, direction in directions.items()
      }

    traces = {
        name: np.einsum('pdd->p', group) for name, group in matrices.items()
    }
    solutions = linalg.conjugate_gradients(
        product, vectors, traces, damping=damping, tolerance=1e-4, iterations=20
    )
    return solutions, len(calls)

  def test_equals_cholesky(self):
    generator = np.random.default_rng(2)
    matrices, vectors = {}, {}
    for name, size, rank in (('wide', 40, 90), ('narrow', 6, 3)):
      root = generator.normal(size=(5, rank, size)).astype('f4')
      root *= np.linspace(0.1, 2, size, dtype='f4')
      matrices[name] = np.einsum('prd,pre->pde', root, root)
      vectors[name] = generator.normal(size=(5, size)).astype('f4')
    solutions, products = self.solve(matrices, vectors)
    self.assertLess(products, 20)  # It ends when there is nothing to gain.
    for name, solution in solutions.items():
      want = linalg.solve_damped(matrices[name], vectors[name], damping=0.3)
      np.testing.assert_array_equal(solution.code, 0)
      error = np.linalg.norm(solution.x - want.x, axis=-1)
      np.testing.assert_array_less(
          error, 1e-3 * np.linalg.norm(want.x, axis=-1)
      )

  def test_codes_of_a_problem_are_its_own(self):
    generator = np.random.default_rng(0)
    root = generator.normal(size=(7, 3, 6)).astype('f4')
    matrices = np.einsum('prd,pre->pde', root, root)
    matrices[1] = 0
    matrices[2, 0, 0] = np.nan
    matrices[3] = np.diag([9, 9, 9, 9, 9, -5])
    vectors = generator.normal(size=(7, 6)).astype('f4')
    vectors[4, 2] = np.inf
    vectors[5] = 0
    solutions, _ = self.solve({'all': matrices}, {'all': vectors}, damping=0.1)
    code = linalg.Code
    self.assertSequenceEqual(
        list(solutions['all'].code),
        [
            code.OK,
            code.RANK_ZERO,
            code.NOT_FINITE,
            code.INDEFINITE,
            code.NOT_FINITE,
            code.OK,
            code.OK,
        ],
    )
    np.testing.assert_array_equal(solutions['all'].x[1:6], 0)
    alone, _ = self.solve(
        {'all': matrices[[0, 6]]}, {'all': vectors[[0, 6]]}, damping=0.1
    )
    together = solutions['all'].x[np.array([0, 6])]
    np.testing.assert_allclose(together, alone['all'].x, rtol=1e-4)
    self.assertTrue(np.any(together, axis=-1).all())

  def test_not_finite_on_the_way(self):
    matrices = np.eye(3, dtype='f4')[None]
    solution = linalg.conjugate_gradients(
        lambda directions: {'a': directions['a'] * np.float32(np.nan)},
        {'a': np.ones((1, 3), 'f4')},
        {'a': np.einsum('pdd->p', matrices)},
        damping=0.1,
        tolerance=1e-4,
        iterations=3,
    )['a']
    self.assertEqual(solution.code[0], linalg.Code.NOT_FINITE)
    np.testing.assert_array_equal(solution.x, 0)


class BoxTest(absltest.TestCase):

  def test_scales_satisfy_the_optimality_conditions(self):
    generator = np.random.default_rng(3)
    root = generator.normal(size=(20, 8))
    gram, slopes = root.T @ root / 20, generator.normal(size=8) / 2
    largest = np.where(np.arange(8) % 2, 1, 0.1)
    scales = linalg.minimize_in_box(slopes, gram, largest)
    gradient = slopes + gram @ scales
    np.testing.assert_array_less(-1e-8, gradient[scales == 0])
    np.testing.assert_array_less(gradient[scales == largest], 1e-8)
    inside = (scales > 0) & (scales < largest)
    np.testing.assert_allclose(gradient[inside], 0, atol=1e-8)
    self.assertTrue(
        inside.any() and (scales == 0).any() and (scales == largest).any()
    )

  def test_twins_share_what_one_would_do(self):
    gram = np.full((2, 2), 2.0)
    scales = linalg.minimize_in_box(
        np.array([-1.0, -1.0]), gram, np.ones(2)
    )
    self.assertAlmostEqual(scales.sum(), 0.5)

  def test_best_scale_of_one(self):
    scales = linalg.best_scale(
        np.array([-1.0, -1.0, 1.0, -1.0, 1.0]),
        np.array([2.0, 0.5, 1.0, 0.0, 0.0]),
    )
    np.testing.assert_allclose(scales, [0.5, 1, 0, 1, 0])


if __name__ == '__main__':
  absltest.main()
