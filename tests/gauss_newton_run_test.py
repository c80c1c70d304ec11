"""Tests of the method as a whole: on a trained network, and in a run."""

import dataclasses
import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import tiny_morphisms as tiny
import tiny_networks

from autogrow_jax.core import growth as growth_lib
from autogrow_jax import costs
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import estimates
from autogrow_jax.methods.gauss_newton import learned_splits
from autogrow_jax.methods.gauss_newton import learning
from autogrow_jax.methods.gauss_newton import method
from autogrow_jax.methods.gauss_newton import norms
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.methods.gauss_newton import together
from autogrow_jax import networks
from autogrow_jax.networks import base as networks_base
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from experiments.studies.gauss_newton import rivals

SGD = optimizers.make(optimizers.SGD())
BATCH = 128


@functools.lru_cache(maxsize=None)
def digits():
  """1280 digits in batches."""
  data = sklearn.datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(data.target))[:1280]
  images = data.images[order, ..., None].astype('f4') / 8 - 1
  labels = data.target[order].astype('i4')
  return [
      (images[i : i + BATCH], labels[i : i + BATCH])
      for i in range(0, len(labels), BATCH)
  ]


@functools.lru_cache(maxsize=None)
def trained():
  """(architecture, state) of a narrow perceptron after 12 epochs."""
  architecture = networks.get('mlp').seed(
      (1, 1), input_shape=(8, 8, 1), classes=10, options={'widths': (6, 5)}
  )
  state = state_lib.create_state(architecture, SGD, key=jax.random.key(0))
  chain = steps.chain_of(architecture)

  @jax.jit
  def step(weights, momentum, x, labels):
    def loss(weights):
      logits, _ = networks_base.apply(
          chain, weights, state.stats['network'], x, train=True
      )
      return jnp.mean(tasks.cross_entropy(logits, labels))

    gradient = jax.grad(loss)(weights)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
    weights = jax.tree.map(lambda w, m: w - 0.05 * m, weights, momentum)
    return weights, momentum

  weights = state.params['weights']
  momentum = jax.tree.map(np.zeros_like, weights)
  for _ in range(12):
    for x, labels in digits():
      weights, momentum = step(weights, momentum, x, labels)
  params = {**state.params, 'weights': state_lib.to_host(weights)}
  return architecture, state.replace(params=params)


def grow(state, change):
  return state_lib.grow(state, change, SGD, key=jax.random.key(0))[0]


def loss_of(architecture, state):
  chain = steps.chain_of(architecture)
  return estimates.mean_loss(chain, steps.trees_of(state), digits())


def situation():
  architecture, state = trained()

  def batches():
    while True:
      yield from digits()

  return base.Situation(
      architecture=architecture,
      state=state,
      key=jax.random.key(7),
      task=tasks.Classes(),
      batches=batches,
      batches_per_epoch=len(digits()),
      train_accuracy=0.9,
      weight_decay=0.0,
  )


def learning_images():
  """What 2 sweeps over 640 examples cost, in images of training steps.

  Four passes of three steps, and two matrices for each unit of both layers.
  """
  matrices = 6 * (64**2 + 5**2) + 5 * (6**2 + 10**2)
  macs = 64 * 6 + 6 * 5 + 5 * 10
  return round((3 * 4 + 2 * matrices / (3 * macs)) * 640)


@functools.lru_cache(maxsize=None)
def learned():
  """The model of `trained`, and all splits with their estimates."""
  architecture, state = trained()
  model = signals.model_of(architecture)
  trees = steps.trees_of(state)
  found = learning.learn(model, trees, digits(), jax.random.key(1))
  return model, found.splits, estimates.estimate(
      model, steps.trees_of(state), found.splits, digits(), jax.random.key(2),
      samples=8,
  )


class TrainedTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('within_trust', None, 0.9, 0.3), ('small', 0.05, 0.999, 0.02)
  )
  def test_estimates_of_single_splits(self, scale, correlation, error):
    """Against the measured change, on frozen weights."""
    architecture, state = trained()
    model, found_splits, found = learned()
    scales = found.best_scales()
    if scale is not None:
      scales = np.full(len(scales), scale)
    scaled = estimates.scaled(found_splits, found.candidates, scales)
    predicted = estimates.estimate(
        model, steps.trees_of(state), scaled, digits(), jax.random.key(3),
        samples=16,
    ).changes()
    before = loss_of(architecture, state)
    actual = []
    for axis, unit in found.candidates:
      change = surgery.morph(architecture, scaled, {axis: np.array([unit])})
      actual.append(
          loss_of(change.architecture, tiny.grow(state, change)) - before
      )
    used = found.usable
    self.assertGreater(np.count_nonzero(used), 7)
    predicted, actual = predicted[used], np.array(actual)[used]
    self.assertLess(predicted.max(), 0)
    self.assertGreater(np.corrcoef(predicted, actual)[0, 1], correlation)
    slope = np.polyfit(predicted, actual, 1)[0]
    self.assertLess(abs(slope - 1), error)
    ratio = actual.sum() / predicted.sum()
    self.assertLess(abs(ratio - 1), error)

  def test_joint_estimates_are_nearer_than_sums(self):
    architecture, state = trained()
    _, found_splits, found = learned()
    everything = [int(index) for index in np.flatnonzero(found.usable)]
    scales = np.zeros(len(found.candidates))
    scales[everything] = selection.joint_scales(found, everything)
    scaled = estimates.scaled(found_splits, found.candidates, scales)
    units = {}
    for index in np.flatnonzero(scales):
      axis, unit = found.candidates[index]
      units.setdefault(axis, []).append(unit)
    change = surgery.morph(
        architecture, scaled, {a: np.array(u) for a, u in units.items()}
    )
    actual = loss_of(change.architecture, tiny.grow(state, change)) - loss_of(
        architecture, state
    )
    joint = found.joint_change(scales)
    apart = found.slopes @ scales + found.curvatures @ scales**2 / 2
    self.assertLess(actual, 0)
    self.assertLess(abs(joint - actual), abs(apart - actual))
    self.assertLess(abs(joint - actual), 0.4 * abs(actual))


class MethodTest(parameterized.TestCase):

  def test_proposes_what_it_estimates(self):
    now = situation()
    grower = method.GaussNewton(limits=selection.Limits(growth_cap=0.5))
    change = grower.propose(policies.grow(), now)
    self.assertBetween(
        costs.params(change.target),
        1.1 * costs.params(now.architecture),
        1.5 * costs.params(now.architecture),
    )
    state, report = grow(now.state, change), change.report
    self.assertLess(report['estimated_change'], -0.005)
    self.assertBetween(
        report['actual_change'] / report['estimated_change'], 0.6, 1.5
    )
    # There are no norms that would have to be settled.
    self.assertAlmostEqual(
        report['settled_change'], report['actual_change'], places=6
    )
    self.assertEqual(report['candidates'], 11)
    self.assertEqual(
        sum(map(len, report['splits'].values())), len(report['scales'])
    )
    # 640 examples twice: 4 half sweeps, then twice 4 samples of labels, and
    # prunes on both. Forward passes for norms, before and after, and for five
    # losses.
    images = learning_images() + 3 * 10 * 640 + 5 * 640 // 3 + 2 * 640 // 3
    self.assertEqual(
        change.examples,
        round(
            images * costs.macs(now.architecture) / costs.macs(change.target)
        ),
    )
    moments = [m for m in jax.tree.leaves(state.opt_state) if m.ndim]
    self.assertTrue(all(not moment.any() for moment in moments))
    again = grower.propose(policies.grow(), now)
    self.assertEqual(again.report, report)
    # What follows is drawn as if nothing had grown.
    np.testing.assert_array_equal(state.key, now.state.key)
    self.assertEqual(state.step, now.state.step)

  def test_prunes_one_of_each_pair_of_twins(self):
    self.assert_prunes_twins('gauss_newton', 3)

  @pytest.mark.slow
  def test_prunes_one_of_each_pair_of_twins_exactly(self):
    self.assert_prunes_twins('least_squares', 5)

  def assert_prunes_twins(self, compensation, fewest):
    """Half of all units in one step, and the loss hardly notices."""
    now = situation()
    architecture, state = now.architecture, now.state
    for axis in ('s0b0.out', 's1b0.out'):
      units = np.arange(architecture.size(axis))
      change = tiny_networks.split(architecture, axis, units)
      state, architecture = grow(state, change), change.target
    twins = dataclasses.replace(now, architecture=architecture, state=state)
    grower = method.GaussNewton(
        ranking=learned_splits.LearnedSplits(compensation=compensation),
        limits=selection.Limits(price=4e-3),
    )
    change = grower.propose(policies.grow(), twins)
    report = change.report
    self.assertEmpty(report['splits'])
    for axis, units in report['prunes'].items():
      size = now.architecture.size(axis)
      self.assertBetween(len(units), fewest, size)
      self.assertEqual(change.target.size(axis), 2 * size - len(units))
    if compensation == 'least_squares':  # Which is exact for twins.
      self.assertEqual(change.target, now.architecture)
      for axis, units in report['prunes'].items():
        size = now.architecture.size(axis)
        self.assertCountEqual([unit % size for unit in units], range(size))
      self.assertAlmostEqual(report['actual_change'], 0, delta=1e-4)
      self.assertAlmostEqual(report['estimated_change'], 0, delta=1e-4)
    self.assertLess(report['actual_change'], 1e-4)

  @parameterized.parameters(*rivals.RIVALS)
  def test_rivals_grow_in_the_same_way(self, strategy):
    now = situation()
    grower = method.GaussNewton(ranking=rivals.RIVALS[strategy]())
    change = grower.propose(policies.grow(), now)
    size = costs.params(now.architecture)
    self.assertBetween(
        costs.params(change.target), 1.05 * size, 1.35 * size
    )
    report = change.report
    self.assertEqual(report['prunes'], {})
    self.assertGreater(change.examples, 0)
    # What they do to the loss at once is small, but for firefly.
    largest = {'net2net': 1e-5, 'gradmax': 1e-5, 'firefly': 0.1}
    self.assertLess(
        abs(report['actual_change']), largest.get(strategy, 0.01)
    )
    if strategy == 'firefly':
      self.assertLess(report['actual_change'], 0)

  def test_keeps_when_told_to(self):
    self.assertIsNone(
        method.GaussNewton().propose(policies.KEEP, situation())
    )

  def test_takes_no_step_that_would_not_help(self):
    joint = together.Joint(np.array([-0.1]), np.array([[0.3]]))
    ranking = learned_splits.LearnedSplits(compensation='off')
    grower = method.GaussNewton(ranking=ranking)
    with mock.patch.object(together, 'together', return_value=joint):
      skipped = grower.propose(policies.grow(), situation())
    self.assertIsInstance(skipped, base.Skip)
    self.assertIn('would not lower the loss', skipped.reason)
    # As much work as for a step that is taken.
    self.assertEqual(
        skipped.examples, learning_images() + 3 * 8 * 640 + 5 * 640 // 3
    )
    joint = together.Joint(np.array([-0.1]), np.array([[0.1]]))
    with mock.patch.object(together, 'together', return_value=joint):
      change = grower.propose(policies.grow(), situation())
    self.assertIsInstance(change, growth_lib.Growth)

  def test_halves_what_is_not_as_promised(self):
    grower = method.GaussNewton()
    loss = steps.Snapshot.loss

    def measuring(*changes):
      changes = iter(changes)
      return mock.patch.object(
          steps.Snapshot,
          'loss',
          lambda snapshot, morph=None: loss(snapshot)
          + (0 if morph is None else next(changes)),
      )

    reports = []
    for changes in ([-1.0], [0.5, -1.0]):
      with measuring(*changes):
        change = grower.propose(policies.grow(), situation())
      reports.append(change.report)
    whole, half = reports
    self.assertLen(whole['attempts'], 1)
    np.testing.assert_allclose(
        [measured for _, measured in half['attempts']], [0.5, -1], atol=1e-6
    )
    self.assertEqual(half['attempts'][0][0], whole['attempts'][0][0])
    self.assertEqual(half['attempts'][1][0], half['estimated_change'])
    np.testing.assert_allclose(
        half['scales'], np.array(whole['scales']) / 2, atol=1e-4
    )
    self.assertEqual(half['prunes'], {})
    self.assertLess(half['actual_change'], 0)
    with measuring(0.5, 0.4, 0.3):
      skipped = grower.propose(policies.grow(), situation())
    self.assertIn('would change by +0.5, +0.4, +0.3 nats', skipped.reason)

  def test_stops_at_the_budget(self):
    now = situation()
    size = costs.params(now.architecture)
    limits = lambda budget: method.GaussNewton(
        limits=selection.Limits(budget=budget)
    )
    self.assertEqual(
        limits(size).propose(policies.grow(), now),
        base.Skip(
            'no unit more is allowed (budget, growth cap)', is_final=True
        ),
    )
    with self.assertRaisesRegex(ValueError, f'budget is {size - 1} params'):
      limits(size - 1).propose(policies.grow(), now)

  def test_half_precision_is_widened(self):
    """What a run of bfloat16 activations hands over is float32 here."""
    wide = situation()

    def batches():
      for x, labels in wide.batches():
        yield jnp.asarray(x, jnp.bfloat16), labels

    now = dataclasses.replace(wide, batches=batches)
    change = method.GaussNewton().propose(policies.grow(), now)
    self.assertLess(change.report['actual_change'], 0)

  def test_statistics_that_are_not_finite(self):
    """Candidates are dropped, and nothing is proposed if none is left."""
    now = situation()
    weights = jax.tree.map(np.array, now.state.params['weights'])
    weights['s1b0']['dense']['bias'][:] = np.nan
    broken = now.state.replace(params={**now.state.params, 'weights': weights})
    now = dataclasses.replace(now, state=broken)
    skipped = method.GaussNewton().propose(policies.grow(), now)
    self.assertIsInstance(skipped, base.Skip)
    self.assertRegex(
        skipped.reason,
        r'no split or prune is worth it; \d+ candidates cannot be used',
    )
    self.assertGreater(skipped.examples, 0)

  def test_nothing_more_is_allowed(self):
    limits = selection.Limits(growth_cap=1e-9)
    skipped = method.GaussNewton(limits=limits).propose(
        policies.grow(), situation()
    )
    self.assertTrue(skipped.is_final)

  def test_a_network_with_norms(self):
    """What is done to the loss lasts when norms get statistics anew."""
    architecture = networks.get('plain3net').seed(
        (1, 1, 1), input_shape=(8, 8, 1), classes=10,
        options={'widths': (4, 4, 4)},
    )
    state = state_lib.create_state(architecture, SGD, key=jax.random.key(0))
    now = dataclasses.replace(
        situation(), architecture=architecture, state=state
    )
    change = method.GaussNewton().propose(policies.grow(), now)
    grown, report = grow(state, change), change.report
    self.assertLess(report['actual_change'], 0)
    self.assertBetween(
        report['actual_change'] / report['estimated_change'], 0.3, 2
    )
    self.assertBetween(
        report['settled_change'] / report['actual_change'], 0.7, 1.4
    )
    # Of the grown network as it is left, and on all images.
    model = signals.model_of(architecture)
    before = estimates.mean_loss(
        model.chain,
        norms.measured(model.chain, steps.trees_of(state), digits()),
        digits(),
    )
    self.assertLess(loss_of(change.target, grown) - before, 0)

  def test_bad_settings(self):
    with self.assertRaisesRegex(ValueError, 'compensation is one of off, leas'):
      learned_splits.LearnedSplits(compensation='magic')
    with self.assertRaisesRegex(ValueError, 'samples is at least 1'):
      method.GaussNewton(samples=0)

  def test_more_statistics_than_data(self):
    grower = method.GaussNewton(examples=1000)
    with self.assertRaisesRegex(ValueError, 'more than the 1280 of an epoch'):
      grower.propose(policies.grow(), situation())


if __name__ == '__main__':
  absltest.main()
