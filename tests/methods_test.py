"""Tests of the protocol that all methods share."""

from absl.testing import absltest
from absl.testing import parameterized

from autogrow_jax.methods import autogrow
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import method as gauss_newton
from autogrow_jax.methods.sparsify import method as sparsify
from experiments.studies.sparsify import pruning
from experiments.studies.sparsify import random_masks
import tiny_networks

METHODS = (
    base.FixedArchitecture(),
    autogrow.AutoGrow(),
    autogrow.Placebo(),
    sparsify.Sparsify(),
    gauss_newton.GaussNewton(),
    pruning.Pruned(),
    random_masks.RandomMasks(),
)


class MethodsTest(parameterized.TestCase):

  @parameterized.parameters(*METHODS)
  def test_none_derives_from_another(self, method):
    self.assertEqual(type(method).__bases__, (base.Method,))

  @parameterized.parameters(*METHODS)
  def test_own_leaves(self, method):
    """Trained leaves come with an optimizer; a report fits the network."""
    architecture = tiny_networks.seed('basic3resnet')
    extra = method.extra(architecture)
    self.assertEqual(bool(extra.trainable), extra.optimizer is not None)
    report = method.report(architecture, extra.trainable, extra.other)
    self.assertNotEmpty(report['shape'])

  def test_only_a_proposal_has_no_default(self):
    self.assertEqual(base.Method.__abstractmethods__, {'propose'})


if __name__ == '__main__':
  absltest.main()
