"""Presets of sampled masks: each leaves its seed within its own length."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized

from autogrow_jax import data
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import method as sparsify
from autogrow_jax.methods.sparsify import space as space_lib
from autogrow_jax.run import resolve
from experiments import presets

NAMES = tuple(
    name
    for name in presets.PRESETS
    if isinstance(presets.get(name).method, sparsify.Sparsify)
    and presets.get(name).data.dataset in data.SOURCES
)


@functools.cache
def distances(name):
  """(how far off is off, of channels; steps of the run; the method)."""
  config = presets.get(name)
  dataset = data.stand_in(config.data, seed=0)
  architecture = resolve.seed_architecture(
      resolve.resolve(config, dataset), dataset
  )
  epochs = config.policy.max_epochs
  steps = epochs * (len(dataset.train.labels) // config.batch_size)
  method = dataclasses.replace(
      config.method, run=sparsify.Run(queries=epochs, steps=steps)
  )
  space = space_lib.of(architecture, method.grow)
  channels, _ = masks.start(architecture, space, method)
  return channels, steps, method


class PresetsTest(parameterized.TestCase):

  @parameterized.parameters(*NAMES)
  def test_leaves_its_seed(self, name):
    channels, steps, method = distances(name)
    rate = method.lambda1 * (1 - method.target_sparsity)
    rate *= masks.effective_rate(
        method.mask.learning_rate, method.mask.momentum
    )
    # Within a twentieth of the run the penalty alone brings it to even chances.
    self.assertLess(masks.steps_to_zero(channels, rate), 0.05 * steps)
    self.assertGreater(channels, 0)


if __name__ == '__main__':
  absltest.main()
