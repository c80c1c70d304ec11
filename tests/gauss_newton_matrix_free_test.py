"""Tests of least squares by products against those with matrices."""

import dataclasses
import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from autogrow_jax.methods.gauss_newton import learning
from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import matrix_free
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax import networks
import tiny_morphisms as tiny
import tiny_networks

# Per family, widths, and axes; the stream has several writers and readers.
CASES = {
    'basic3resnet': ((2, 3, 3), ('s1',)),
    'mlp': ((5, 4), ('s0b0.out', 's1b0.out')),
}
EXAMPLES = 8


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny network, with examples in two batches."""

  model: signals.Model
  trees: signals.Trees
  batches: tuple[splits.Batch, ...]


@functools.lru_cache(maxsize=None)
def case(family):
  widths, axes = CASES[family]
  architecture = tiny_networks.seed(
      family, (1,) * len(widths), widths=widths
  )
  state = tiny_networks.state(architecture)
  x = tiny_networks.images(EXAMPLES)
  labels = np.arange(EXAMPLES) % tiny_networks.CLASSES
  covered = sites.survey(architecture).sites
  chosen = tuple(site for site in covered if site.axis in axes)
  assert len(chosen) == len(axes), covered
  return Case(
      signals.Model(tiny.chain_of(architecture), chosen),
      tiny.trees_of(state),
      ((x[:5], labels[:5]), (x[5:], labels[5:])),
  )


def begun(data):
  """Splits that one sweep over u has left."""
  start = splits.start(data.model, data.trees, jax.random.key(0))
  generator = np.random.default_rng(1)
  nudge = lambda u: 0.1 * generator.normal(size=u.shape).astype('f4')
  return {
      axis: split.replace(u=jax.tree.map(nudge, split.u))
      for axis, split in start.items()
  }


def learn(data, *, largest, held=matrix_free.HELD_BYTES):
  """Splits learned with matrices of units with so many weights at most."""
  with (
      mock.patch.object(learning, 'LARGEST_SOLVE', largest),
      mock.patch.object(matrix_free, 'HELD_BYTES', held),
      mock.patch.object(matrix_free, 'TOLERANCE', 1e-5),
  ):
    return learning.learn(
        data.model,
        data.trees,
        data.batches,
        jax.random.key(1),
    )


class MatrixFreeTest(parameterized.TestCase):

  @parameterized.product(family=tuple(CASES), block=('u', 'e'))
  def test_equals_the_matrices_of_real_sites(self, family, block):
    """Products with them, and damped solves."""
    data = case(family)
    found, (x, labels) = begun(data), data.batches[0]
    like = {axis: getattr(split, block) for axis, split in found.items()}
    linears, vectors = learning.linearized(
        data.model, block, 'mc', data.trees, found, x, labels,
        jax.random.key(7),
    )
    rows = {axis: np.asarray(one.rows()) for axis, one in linears.items()}
    matrices = {
        axis: np.einsum('bcd,bce->cde', psi, psi) for axis, psi in rows.items()
    }
    products = matrix_free.product(linears, vectors, like)
    for axis, matrix in matrices.items():
      want = np.einsum('cde,ce->cd', matrix, vectors[axis])
      self.assertGreater(np.abs(want).max(), 0)
      np.testing.assert_allclose(
          products[axis], want, atol=1e-5 * np.abs(want).max()
      )
    solutions = linalg.conjugate_gradients(
        lambda vectors: matrix_free.product(linears, vectors, like),
        vectors,
        {axis: np.einsum('cdd->c', gram) for axis, gram in matrices.items()},
        damping=0.3,
        tolerance=1e-5,
        iterations=20,
    )
    for axis, solution in solutions.items():
      want = linalg.solve_damped(matrices[axis], vectors[axis], damping=0.3)
      np.testing.assert_array_equal(solution.code, want.code)
      self.assertIn(0, want.code)
      error = np.linalg.norm(solution.x - want.x, axis=-1)
      np.testing.assert_array_less(
          error, 1e-3 * np.linalg.norm(want.x, axis=-1) + 1e-12
      )

  @parameterized.parameters(0, 5)  # 5: some blocks by matrices, some without.
  def test_learns_the_same(self, largest):
    data = case('mlp')
    wants = learn(data, largest=1000)
    found = learn(data, largest=largest)
    self.assertEqual(set(found.splits), set(wants.splits))
    for axis, want in wants.splits.items():
      np.testing.assert_array_equal(found.codes[axis], wants.codes[axis])
      for block in 'ue':
        got, exact = (
            np.concatenate([np.ravel(leaf) for leaf in getattr(split, block)])
            for split in (found.splits[axis], want)
        )
        length = np.linalg.norm(exact)
        self.assertBetween(np.linalg.norm(got - exact) / length, 0, 2e-3)

  def test_what_is_not_kept_is_computed_again(self):
    """Bit by bit: every iteration sees the same sampled labels."""
    data = case('mlp')
    wants = learn(data, largest=0)
    for held in (0, 3000):  # Nothing, and the first batch.
      found = learn(data, largest=0, held=held)
      tiny_networks.assert_same(found.splits, wants.splits)

  def test_codes(self):
    data = case('mlp')

    def with_bias(part, unit, value):
      weights = jax.tree.map(np.array, data.trees.weights)
      weights[part]['dense']['bias'][unit] = value
      trees = data.trees.replace(weights=weights)
      return dataclasses.replace(data, trees=trees)

    learned = learn(with_bias('s0b0', 2, -1e3), largest=0)
    self.assertEqual(
        list(learned.codes['s0b0.out'] == linalg.Code.RANK_ZERO),
        [unit == 2 for unit in range(5)],
    )
    np.testing.assert_array_equal(learned.splits['s0b0.out'].u[0][..., 2], 0)
    learned = learn(with_bias('head', 1, np.nan), largest=0)
    for codes in learned.codes.values():
      self.assertIn(linalg.Code.NOT_FINITE, codes)
      self.assertNotIn(linalg.Code.OK, codes)

  def test_what_is_wide(self):
    survey = sites.survey(
        networks.get('plain3net').seed(
            (1, 1, 1),
            input_shape=(8, 8, 3),
            classes=10,
            options={'widths': (8, 130, 16)},
        )
    )
    wide = {
        (site.axis, block)
        for site in survey.sites
        for block in 'ue'
        if learning.is_wide(site, block)
    }
    self.assertEqual(wide, {('s0b0.out', 'e'), ('s2b0.out', 'u')})
    site = survey.sites[0]
    self.assertFalse(learning.is_wide(site, 'u'))
    many = dataclasses.replace(site, units=10**6)  # 27 x 27 numbers of each.
    self.assertTrue(learning.is_wide(many, 'u'))


if __name__ == '__main__':
  absltest.main()
