"""Tests of the optimizer and of the learning-rate schedule."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tiny_networks

from autogrow_jax import optimizers


def parameters():
  return {
      'conv': {'kernel': np.array([[1.0, -2.0], [0.5, 4.0]], 'f4')},
      'norm': {'scale': np.ones(2, 'f4'), 'bias': np.zeros(2, 'f4')},
  }


def gradients(number):
  generator = np.random.default_rng(number)
  return jax.tree.map(
      lambda leaf: generator.normal(size=leaf.shape).astype('f4'), parameters()
  )


def run(tx, grads, rates):
  """Parameters after every update."""
  update = jax.jit(tx.update)
  params, history = parameters(), []
  state = tx.init(params)
  for grad, rate in zip(grads, rates, strict=True):
    state = optimizers.with_learning_rate(state, rate)
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history


class UpdateTest(parameterized.TestCase):

  def test_coupled_weight_decay_momentum(self):
    # As PyTorch's SGD: the rate is outside the buffer, the decay inside, and
    # norms decay like everything else.
    tx = optimizers.make(optimizers.SGD(momentum=0.9, weight_decay=0.01))
    grads, rates = [gradients(n) for n in range(3)], (0.1, 0.1, 0.01)
    history = run(tx, grads, rates)
    for path in (('conv', 'kernel'), ('norm', 'scale'), ('norm', 'bias')):
      value = parameters()[path[0]][path[1]].astype('f8')
      buffer = np.zeros_like(value)
      for grad, rate, got in zip(grads, rates, history, strict=True):
        buffer = 0.9 * buffer + grad[path[0]][path[1]] + 0.01 * value
        value = value - rate * buffer
        np.testing.assert_allclose(got[path[0]][path[1]], value, rtol=1e-5)

  def test_starts_with_rate_zero(self):
    tx = optimizers.make(optimizers.SGD())
    updates, _ = tx.update(gradients(0), tx.init(parameters()), parameters())
    for leaf in jax.tree.leaves(updates):
      np.testing.assert_array_equal(leaf, 0)

  @parameterized.parameters(
      (optimizers.AdamW(weight_decay=0.3), optax.adamw(0.1, weight_decay=0.3)),
      (optimizers.Lion(weight_decay=0.3), optax.lion(0.1, weight_decay=0.3)),
      (
          optimizers.Adafactor(weight_decay=0.3),
          optax.adafactor(0.1, weight_decay_rate=0.03),
      ),
      (
          optimizers.Muon(weight_decay=0.3),
          optax.contrib.muon(0.1, weight_decay=0.3, adam_weight_decay=0.3),
      ),
  )
  def test_others_are_those_of_optax(self, optimizer, want):
    grads, rates = [gradients(n) for n in range(2)], [0.1] * 2
    tiny_networks.assert_close(
        run(optimizers.make(optimizer), grads, rates)[1],
        run(want, grads, rates)[1],
        1e-6,
    )

  def test_muon_treats_stacked_blocks_one_by_one(self):
    tx = optimizers.make(optimizers.Muon(weight_decay=0.1))
    rng = np.random.default_rng(0)
    params, grads = (
        {'kernel': rng.normal(size=(3, 4, 5)), 'bias': rng.normal(size=(3, 5))}
        for _ in range(2)
    )
    update = lambda params, grads: tx.update(
        grads,
        optimizers.with_learning_rate(tx.init(params), 0.5),
        params,
    )[0]
    part = lambda tree, n: jax.tree.map(lambda leaf: jnp.float32(leaf[n]), tree)
    stacked = update(*jax.tree.map(jnp.float32, (params, grads)))
    for n in range(3):
      tiny_networks.assert_close(
          part(stacked, n), update(part(params, n), part(grads, n)), 1e-5
      )

  def test_clips_the_global_norm(self):
    config = optimizers.SGD(momentum=0.0, weight_decay=0.0, clip_norm=0.5)
    (got,) = run(optimizers.make(config), [gradients(0)], [1.0])
    grads = gradients(0)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    self.assertGreater(norm, 0.5)
    tiny_networks.assert_close(
        got,
        jax.tree.map(lambda p, g: p - g * 0.5 / norm, parameters(), grads),
        1e-5,
    )

  def test_clips_before_the_decay(self):
    config = optimizers.SGD(momentum=0.0, weight_decay=0.1, clip_norm=1e-9)
    (got,) = run(optimizers.make(config), [gradients(0)], [1.0])
    tiny_networks.assert_close(
        got, jax.tree.map(lambda p: 0.9 * p, parameters()), 1e-5
    )

  def test_small_gradients_are_not_clipped(self):
    configs = [
        optimizers.SGD(clip_norm=clip_norm) for clip_norm in (0.0, 1e3)
    ]
    one, other = (
        run(optimizers.make(config), [gradients(0)], [0.1])[0]
        for config in configs
    )
    tiny_networks.assert_close(one, other, 1e-6)

  @parameterized.parameters(0.0, 0.5)
  def test_accumulating_equals_a_large_batch(self, clip_norm):
    config = dict(weight_decay=0.01, clip_norm=clip_norm)
    grads = [gradients(n) for n in range(6)]
    means = [
        jax.tree.map(lambda *leaves: sum(leaves) / 3, *grads[start : start + 3])
        for start in (0, 3)
    ]
    small = run(
        optimizers.make(optimizers.SGD(accumulate=3, **config)),
        grads,
        [0.1] * 6,
    )
    large = run(optimizers.make(optimizers.SGD(**config)), means, [0.1] * 2)
    tiny_networks.assert_same(small[1], parameters())
    tiny_networks.assert_close(small[2], large[0], 1e-5)
    tiny_networks.assert_same(small[4], small[2])
    tiny_networks.assert_close(small[5], large[1], 1e-5)

  @parameterized.parameters('sgd', 'accumulating', 'injected')
  def test_learning_rate_is_data(self, name):
    tx = tiny_networks.OPTIMIZERS[name]
    state = tx.init(parameters())
    described = tiny_networks.described(state)
    # Traced, as in a step.
    changed = jax.jit(optimizers.with_learning_rate)(state, 0.375)
    self.assertEqual(optax.tree.get(changed, 'learning_rate'), 0.375)
    self.assertEqual(tiny_networks.described(changed), described)

  @parameterized.parameters('adamw', 'masked', 'partition')
  def test_optimizers_without_one_keep_theirs(self, name):
    state = tiny_networks.OPTIMIZERS[name].init(parameters())
    changed = optimizers.with_learning_rate(state, jnp.float32(0.375))
    tiny_networks.assert_same(changed, state)

  @parameterized.parameters(
      (dict(momentum=1.0), 'momentum is in [0, 1), got 1.0'),
      (dict(momentum=-0.1), 'momentum is a number of at least 0, got -0.1'),
      (dict(momentum=float('nan')), 'momentum is a number of at least 0, got'),
      (dict(weight_decay=-1e-4), 'weight_decay is a number of at least 0'),
      (dict(weight_decay=float('inf')), 'weight_decay is a number'),
      (dict(clip_norm=-1.0), 'clip_norm is a number of at least 0, got -1.0'),
      (dict(clip_norm=float('nan')), 'clip_norm is a number'),
      (dict(accumulate=0), 'accumulate is at least 1, got 0'),
  )
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      optimizers.SGD(**arguments)


def schedule(**changes):
  arguments = dict(
      learning_rate=0.1,
      growing='constant',
      interval=3,
      finetune_epochs=200,
      milestones='small',
  )
  return optimizers.Schedule(**(arguments | changes))


class ScheduleTest(parameterized.TestCase):

  @parameterized.parameters(
      ('small', 200, (100, 50, 50)),
      ('imagenet', 90, (30, 30, 30)),
      ('small', 100, (50, 25, 25)),
      ('small', 10, (5, 2, 3)),
      ('imagenet', 10, (3, 3, 4)),
  )
  def test_finetuning(self, milestones, epochs, lengths):
    rates = schedule(milestones=milestones, finetune_epochs=epochs)
    got = [rates.rate('finetuning', epoch) for epoch in range(epochs)]
    want = np.repeat([0.1, 0.01, 0.001], lengths)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    self.assertEqual(
        got, [rates.rate('training', epoch) for epoch in range(epochs)]
    )

  def test_growing_is_constant(self):
    rates = schedule()
    self.assertEqual(
        {rates.rate('growing', epoch) for epoch in range(1000)}, {0.1}
    )

  @parameterized.parameters(
      ('small', 3, (1, 1, 1)),
      ('small', 4, (2, 1, 1)),
      ('small', 100, (50, 25, 25)),
      ('imagenet', 3, (1, 1, 1)),
      ('imagenet', 4, (1, 1, 2)),
      ('imagenet', 100, (33, 33, 34)),
  )
  def test_staircase_restarts_every_interval(
      self, milestones, interval, lengths
  ):
    rates = schedule(
        growing='staircase', interval=interval, milestones=milestones
    )
    got = [rates.rate('growing', epoch) for epoch in range(3 * interval)]
    want = np.tile(np.repeat([0.1, 0.01, 0.001], lengths), 3)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    self.assertEqual(rates.rate('finetuning', 0), 0.1)

  def test_cosine_restarts_every_interval(self):
    rates = schedule(growing='cosine', interval=3)
    got = [rates.rate('growing', epoch) for epoch in range(6)]
    np.testing.assert_allclose(got, [0.1, 0.075, 0.025] * 2, rtol=1e-12)
    self.assertEqual(rates.rate('finetuning', 0), 0.1)


if __name__ == '__main__':
  absltest.main()
