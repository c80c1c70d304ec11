"""Masks on segmentation and on language models: whole tiny runs."""

import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest
import runs

from autogrow_jax.run import config as config_lib
from autogrow_jax import data
from autogrow_jax import optimizers
from autogrow_jax.run import trained
from autogrow_jax.methods.sparsify import method as sparsify

BACKENDS = ('masked', 'compact')


def config(workdir, network, backend, **changes):
  return config_lib.RunConfig(
      workdir=str(workdir),
      network=network,
      policy=config_lib.PolicyConfig('every', interval=1, max_epochs=3),
      method=sparsify.Sparsify(
          target_sparsity=0.4,
          run=sparsify.Run(queries=3, steps=12),
          mask=optimizers.AuxConfig(learning_rate=1.0),
          backend=backend,
      ),
      schedule=config_lib.ScheduleConfig(
          learning_rate=0.01, growing='whole', finetune_epochs=1
      ),
      **changes,
  )


class TaskTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(
        self.enter_context(tempfile.TemporaryDirectory())
    )

  def check(self, results):
    """Both ways of execution agree, and end with the network they had."""
    for workdir, result in results.items():
      (end,) = runs.records(workdir, 'grow')
      self.assertLess(end['logits_change_eval'], 1e-4)
      self.assertEqual(end['params_after'], result['params'])
      seed, then = runs.records(workdir, 'epoch')[:2]
      self.assertGreater(then['params'], seed['params'])
      network = trained.load(workdir)
      self.assertEqual(
          dict(network.architecture.sizes), result['architecture']['sizes']
      )
    masked, compact = results.values()
    first = [runs.records(path, 'epoch')[1] for path in results]
    self.assertEqual(first[0]['params'], first[1]['params'])
    self.assertAlmostEqual(
        first[0]['train_loss'], first[1]['train_loss'], places=3
    )
    self.assertEqual(
        masked['architecture']['sizes'].keys(),
        compact['architecture']['sizes'].keys(),
    )

  @pytest.mark.slow
  def test_segmentation(self):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 3, (24, 16, 16)).astype(np.int32)
    images = (80 * (labels[..., None] + 1)).astype(np.uint8)
    images = np.repeat(images, 3, -1)
    dataset = data.from_arrays(
        images[:16], labels[:16], images[16:], labels[16:],
        holdout=4, seed=0, classes=3,
        preprocessing=data.Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3),
    )
    results = {}
    for backend in BACKENDS:
      workdir = self.workdir / backend
      results[workdir] = runs.quietly(
          config(
              workdir,
              config_lib.NetworkConfig(
                  'deeplab', depths=(1, 1, 1, 1), widths=(4, 4, 4, 8)
              ),
              backend,
              batch_size=4,
          ),
          dataset=dataset,
      )
      self.assertIn('test_miou', results[workdir])
    self.check(results)

  @pytest.mark.slow
  def test_language(self):
    words = 'the quick brown fox jumps over a lazy dog while it rains'.split()
    rng = np.random.default_rng(0)
    for name, size in (('train', 500), ('valid', 80), ('test', 80)):
      (self.workdir / f'{name}.txt').write_text(
          ' '.join([*words, *rng.choice(words, size)]) + '\n'
      )
    results = {}
    for backend in BACKENDS:
      workdir = self.workdir / backend
      results[workdir] = runs.quietly(
          config(
              workdir,
              config_lib.NetworkConfig('lstm2', widths=(9, 10), keep=0.9),
              backend,
              data=data.DataConfig(f'text:{self.workdir}', unroll=10),
              batch_size=10,
          )
      )
      self.assertIn('test_perplexity', results[workdir])
      sizes = results[workdir]['architecture']['sizes']
      self.assertEqual(sizes['embedding'], 9)  # Never masked.
    self.check(results)


if __name__ == '__main__':
  absltest.main()
