"""Tests of tasks: which labels count, in the loss and in the score."""

import math
import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import data
from autogrow_jax import tasks


def score(task, logits, labels, batch_size, **split):
  """The score of logits, looked up by images that number the examples."""
  count = len(labels)
  images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
  if labels.ndim == 2:
    images = np.arange(count, dtype=np.int32).reshape(count, 1)
  split = data.Split(images, labels, **split)
  return task.score(lambda x: logits[x.reshape(-1)], split, batch_size)


class TaskTest(parameterized.TestCase):

  @parameterized.parameters(
      (tasks.Classes(), ()), (tasks.Text(), (4,)), (tasks.Masks(), (2, 2))
  )
  def test_loss_counts_and_score_agree(self, task, shape):
    """With sums by hand, over the labels that count."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, *shape, 3)).astype(np.float32)
    lowest = -1 if shape else 0
    labels = rng.integers(lowest, 3, (5, *shape)).astype(np.int32)
    self.assertEqual(tasks.of_labels(labels), task)
    counts = labels >= 0
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -log_p[counts][np.arange(counts.sum()), labels[counts]]
    correct = np.sum((logits.argmax(-1) == labels)[counts])
    loss = task.loss(jnp.asarray(logits), jnp.asarray(labels))
    self.assertAlmostEqual(float(loss), losses.mean(), places=5)
    self.assertEqual(
        tuple(map(int, task.counts(jnp.asarray(logits), jnp.asarray(labels)))),
        (correct, counts.sum()),
    )
    for batch_size in (2, 5):
      got = score(task, logits, labels, batch_size)
      self.assertEqual((got.correct, got.total), (correct, counts.sum()))
      self.assertAlmostEqual(got.loss_sum, losses.sum(), places=4)
      self.assertAlmostEqual(got.loss, losses.mean(), places=5)
      self.assertAlmostEqual(got.accuracy, 100 * correct / counts.sum())
      if shape:
        self.assertIsNone(got.hits)
      else:
        np.testing.assert_array_equal(got.hits, logits.argmax(-1) == labels)

  @parameterized.parameters(tasks.Text(), tasks.Masks())
  def test_nothing_counts(self, task):
    labels = jnp.full((5, 2, 2)[: task.label_ndim], -1)
    loss = task.loss(jnp.zeros((*labels.shape, 3)), labels)
    self.assertEqual(float(loss), 0)

  def test_void_alone(self):
    labels = np.full((1, 2, 2), -1, np.int16)
    with self.assertRaisesRegex(ValueError, 'are void; there is nothing'):
      score(tasks.Masks(), np.zeros((1, 2, 2, 3), 'f4'), labels, 1)

  @parameterized.parameters(1, 4)
  def test_mean_iou_by_hand(self, batch_size):
    labels = np.array([[[0, 0], [1, -1]], [[2, 2], [1, 0]]], np.int16)
    predicted = np.array([[[0, 1], [1, 3]], [[2, 0], [1, 0]]])
    logits = 3 * np.eye(5, dtype='f4')[predicted]
    got = score(tasks.Masks(), logits, labels, batch_size)
    # Class 3 is predicted in void only, class 4 never: neither counts.
    self.assertAlmostEqual(
        got.metrics['miou'], 100 * (2 / 4 + 2 / 3 + 1 / 2) / 3
    )
    self.assertAlmostEqual(got.metrics['accuracy'], 100 * 5 / 7)
    shift = np.log(np.exp(3) + 4)
    self.assertAlmostEqual(got.loss_sum, 7 * shift - 5 * 3, places=4)

  def test_a_class_that_is_only_predicted_counts(self):
    labels = np.zeros((1, 1, 3), np.int16)
    logits = np.eye(2, dtype='f4')[[[[0, 0, 1]]]]
    got = score(tasks.Masks(), logits, labels, 1)
    self.assertAlmostEqual(got.metrics['miou'], 100 * (2 / 3 + 0) / 2)

  def test_perplexity(self):
    self.assertAlmostEqual(
        tasks.Text().metrics(math.log(50), 1, 4)['perplexity'], 50
    )
    self.assertEqual(tasks.Text().metrics(1e6, 1, 4)['perplexity'], math.inf)

  @parameterized.parameters(
      (tasks.Classes(), (2, 2), (3,), 'N predicts a class for each pixel, but '
       'the data have one class for each example'),
      (tasks.Masks(), (), (3, 2, 2), 'N predicts one class for each example'),
      (tasks.Masks(), (4, 4), (3, 2, 2), 'N predicts a class for each pixel'),
  )
  def test_refuses_labels_that_a_network_does_not_predict(
      self, task, predicted, shape, message
  ):
    labels = np.zeros(shape, np.int32)
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      task.check('N', predicted, labels)
    task.check('N', shape[1:], labels)

  def test_a_penalty_has_a_gradient_but_no_value(self):
    value, slope = jax.value_and_grad(
        lambda x: tasks.with_penalty(2 * x, x**2)
    )(3.0)
    self.assertEqual((value, slope), (6, 8))

if __name__ == '__main__':
  absltest.main()
