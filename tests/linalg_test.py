"""Tests of the quadratic models and their solves."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import linalg


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


class TheoremsTest(parameterized.TestCase):

  @parameterized.product(seed=(0, 1, 2, 3), scale=(-0.7, 0.3, 1.0, 1.9))
  def test_change_along_a_step_to_a_minimum(self, seed, scale):
    curvature, linear, z, step = quadratic(seed)
    value = lambda z: 0.5 * z @ curvature @ z - linear @ z
    gradient = curvature @ z - linear
    np.testing.assert_allclose(curvature @ (z + step), linear, atol=1e-9)
    with jax.enable_x64(True):
      q = float(linalg.squared_newton_decrement(curvature, gradient))
      change = float(
          linalg.change_toward_minimum(gradient @ (scale * step), q)
      )
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

  def test_nothing_changes_at_a_minimum(self):
    self.assertEqual(
        float(linalg.change_toward_minimum(jnp.zeros(()), jnp.zeros(()))), 0
    )

  @parameterized.parameters(0, 1, 2, 3)
  def test_rank_one_never_promises_less(self, seed):
    curvature, linear, z, step = quadratic(seed)
    gradient = curvature @ z - linear
    generator = np.random.default_rng(seed + 100)
    with jax.enable_x64(True):
      q = linalg.squared_newton_decrement(curvature, gradient)
      rank_one = np.asarray(linalg.rank_one_curvature(gradient, q))
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
    with jax.enable_x64(True):
      general = linalg.squared_newton_decrement(curvature, gradient)
      scalar = linalg.softmax_decrement(-np.log(p[1]))
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
