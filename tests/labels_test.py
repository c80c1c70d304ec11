"""Labels of any shape: what counts, in the loss and in the score."""

from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from autogrow_jax import data
from autogrow_jax import tasks


TASK = tasks.Masks()


class LabelsTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.logits = rng.normal(size=(5, 2, 2, 3)).astype(np.float32)
    self.labels = rng.integers(-1, 3, (5, 2, 2)).astype(np.int32)
    self.counts = self.labels >= 0
    shifted = self.logits.astype(np.float64)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    self.losses = -log_p[self.counts][
        np.arange(self.counts.sum()), self.labels[self.counts]
    ]
    self.assertBetween(self.counts.sum(), 1, self.counts.size - 1)

  def test_loss_is_the_mean_over_those_that_count(self):
    loss = TASK.loss(
        jnp.asarray(self.logits), jnp.asarray(self.labels)
    )
    self.assertAlmostEqual(float(loss), self.losses.mean(), places=5)

  def test_nothing_counts(self):
    loss = TASK.loss(
        jnp.asarray(self.logits), jnp.full((5, 2, 2), -1)
    )
    self.assertEqual(float(loss), 0)

  def test_score(self):
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    split = data.Split(images, self.labels)
    score = tasks.Text().score(
        lambda images: self.logits[images.reshape(-1)], split, batch_size=2
    )
    right = (self.logits.argmax(-1) == self.labels) & self.counts
    self.assertEqual(score.correct, right.sum())
    self.assertEqual(score.total, self.counts.sum())
    self.assertAlmostEqual(score.loss_sum, self.losses.sum(), places=5)
    self.assertIsNone(score.hits)


if __name__ == '__main__':
  absltest.main()
