"""The cost of choosing a growth step, in images of training steps."""

from collections.abc import Sequence
import math

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import learning as learning_lib
from autogrow_jax.methods.gauss_newton import matrix_free
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib

# Training steps that a pass over an example costs: forward, two backward
# passes, and the products with u and e and their gradients.
STEPS_PER_PASS = 3


def count(batches: Sequence[splits_lib.Batch]) -> int:
  """Counts the examples of some batches."""
  return sum(len(labels) for _, labels in batches)


def of_passes(passes: int, batches: Sequence[splits_lib.Batch]) -> int:
  """Returns the cost of some passes over some batches."""
  return STEPS_PER_PASS * passes * count(batches)


def of_learning(
    architecture: architecture_lib.Architecture,
    model: signals_lib.Model,
    config: learning_lib.LearnConfig,
) -> float:
  """Returns the training steps per image that learning splits costs.

  Each block of each sweep is a pass. A matrix takes the square of its size in
  multiply-adds per example; an iteration without matrices takes two products
  with the layer.
  """
  products = {
      leaf.path[:-1]: math.prod(leaf.shape) * leaf.positions
      for leaf in costs.leaves(architecture)
      if leaf.path[-1] == 'kernel'
  }
  macs = 0
  for site in model.sites:
    for block, size, ends in (
        ('u', site.incoming, site.writers), ('e', site.outgoing, site.readers)
    ):
      macs_of_block = site.units * size**2
      if learning_lib.is_wide(site, block):
        product = sum(products[end.layer.path] for end in ends)
        macs_of_block = 2 * matrix_free.ITERATIONS * product
      macs += config.sweeps * macs_of_block
  step = (1 + costs.BACKWARD_OVER_FORWARD) * costs.macs(architecture)
  return STEPS_PER_PASS * 2 * config.sweeps + macs / step


def of_forward_passes(
    learning: Sequence[splits_lib.Batch], judging: Sequence[splits_lib.Batch]
) -> int:
  """Returns the cost of norms and losses; a forward pass is a third of a step.
  """
  return (2 * count(learning) + 3 * count(judging)) // 3
