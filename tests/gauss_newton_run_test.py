"""Tests of whole growth steps: estimates, selection, control, and a run."""

import dataclasses
import functools
import os
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import estimates
from autogrow_jax.methods.gauss_newton import method
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.networks import base as networks_base
from autogrow_jax.run import programs

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
  state = state_lib.create_state(
      architecture, optax.sgd(1.0, 0.9), key=jax.random.key(0)
  )
  chain = [
      networks_base.Segment(part.name, part.module, None)
      for part in networks.parts(architecture)
  ]

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


def situation(**changes):
  architecture, state = trained()

  def batches():
    while True:
      yield from digits()

  return dataclasses.replace(
      base.Situation(
          architecture=architecture,
          state=state,
          key=jax.random.key(7),
          task=tasks.Classes(),
          batches=batches,
          batches_per_epoch=len(digits()),
          train_accuracy=0.9,
          weight_decay=0.0,
      ),
      **changes,
  )


def propose(now=None, grower=method.GaussNewton()):
  return grower.propose(policies.grow(), now or situation())


class MethodTest(parameterized.TestCase):

  def test_proposes_what_it_estimates(self):
    now = situation()
    grower = method.GaussNewton(limits=selection.Limits(growth_cap=0.5))
    change = propose(now, grower)
    size = costs.params(now.architecture)
    self.assertBetween(costs.params(change.target), 1.1 * size, 1.5 * size)
    report = change.report
    self.assertLess(report['estimated_change'], -0.005)
    self.assertBetween(
        report['actual_change'] / report['estimated_change'], 0.6, 1.5
    )
    # There are no norms that would have to be measured.
    self.assertAlmostEqual(
        report['settled_change'], report['actual_change'], places=6
    )
    self.assertEqual(
        sum(map(len, report['splits'].values())), len(report['scales'])
    )
    # Twice 640 examples: 4 half sweeps on one half, and twice 2 samples of
    # labels on the other; forward passes for norms and losses.
    matrices = 6 * (64**2 + 5**2) + 5 * (6**2 + 10**2)
    step_macs = 3 * (64 * 6 + 6 * 5 + 5 * 10)
    images = 3 * 8 * 640 + 3 * 640 // 3 + 640 // 3
    images += 2 * matrices / step_macs * 640
    ratio = costs.macs(now.architecture) / costs.macs(change.target)
    self.assertAlmostEqual(change.examples, images * ratio, delta=2)
    state, _ = state_lib.grow(
        now.state, change, optax.sgd(1.0, 0.9), key=jax.random.key(0)
    )
    moments = [m for m in jax.tree.leaves(state.opt_state) if m.ndim]
    self.assertTrue(all(not moment.any() for moment in moments))
    self.assertEqual(propose(now, grower).report, report)

  def test_estimates_of_single_splits_and_prunes(self):
    snapshot = steps.Snapshot.take(situation(), None, 8)
    model, trees = snapshot.model, snapshot.trees
    way = ranking.LearnedSplits()
    learned = ranking.splits_lib.learn(
        model, trees, snapshot.learning, snapshot.rng, way.learn
    )
    taken = estimates.compensated(model, trees, learned.moments)
    estimate = functools.partial(
        estimates.estimate, model, trees, batches=snapshot.judging,
        rng=snapshot.rng, taken=taken, samples=8,
    )
    scales = estimate(splits=learned.splits).best_scales()
    chosen = ranking.scaled(model, learned.splits, scales)
    joint, count = estimate(splits=chosen), len(model.candidates)
    pairs = {'split': [], 'prune': []}
    for number, (axis, unit) in enumerate(model.candidates):
      for kind, index in (('split', number), ('prune', number + count)):
        split = {axis: [unit]} if kind == 'split' else {}
        change = surgery.morph(
            snapshot.architecture, *snapshot.arrays, chosen, split,
            pruned={} if split else {axis: unit}, taken=taken,
        )
        measured = snapshot.grown_loss(change) - snapshot.loss
        pairs[kind].append((joint.changes()[index], measured))
    # Prunes of so narrow a network leave the region of the quadratic model.
    for kind, least in (('split', 0.95), ('prune', 0.8)):
      self.assertGreater(np.corrcoef(np.array(pairs[kind]).T)[0, 1], least)

  def test_prunes_one_of_twins(self):
    """One of each layer goes, with hardly a change."""
    now = situation()
    snapshot = steps.Snapshot.take(now, None, 1)
    nothing = {
        axis: split.scaled(
            np.zeros(split.u[0].shape[-1]), np.zeros(split.e[0].shape[-2])
        )
        for axis, split in ranking.splits_lib.start(
            snapshot.model, snapshot.trees, snapshot.rng
        ).items()
    }
    twins = surgery.morph(
        now.architecture, *snapshot.arrays, nothing,
        {'s0b0.out': [0, 1], 's1b0.out': [2]},
    )
    state = state_lib.grown_arrays(now.state, twins, key=jax.random.key(0))
    limits = selection.Limits(growth_cap=0.01, price=1e-4)
    change = propose(
        situation(architecture=twins.target, state=state),
        method.GaussNewton(limits=limits),
    )
    self.assertNotIsInstance(change, base.Skip, change)
    self.assertEqual(set(change.report['prunes']), {'s0b0.out', 's1b0.out'})
    self.assertLess(abs(change.report['actual_change']), 0.005)
    self.assertLess(
        costs.params(change.target), costs.params(twins.target)
    )

  def test_takes_no_step_that_would_not_help(self):
    step = steps.Step({'s0b0.out': [0]}, {}, 1000, change=0.01)
    with mock.patch.object(ranking.LearnedSplits, 'step', return_value=step):
      skipped = propose()
    self.assertIn('would not lower the loss', skipped.reason)
    self.assertEqual(skipped.examples, 1000 + 3 * 640 // 3)

  def test_halves_what_is_not_as_promised(self):
    def measuring(*changes):
      changes = iter(changes)
      return mock.patch.object(
          steps.Snapshot, 'grown_loss',
          lambda snapshot, change: snapshot.loss + next(changes),
      )

    with measuring(-1.0):
      whole = propose().report
    with measuring(0.5, -1.0):
      half = propose().report
    self.assertLen(whole['attempts'], 1)
    np.testing.assert_allclose(
        [measured for _, measured in half['attempts']], [0.5, -1], atol=1e-6
    )
    self.assertEqual(half['attempts'][0][0], whole['attempts'][0][0])
    self.assertGreater(half['estimated_change'], whole['estimated_change'])
    self.assertEqual(half['prunes'], {})
    with measuring(0.5, 0.4, 0.3):
      skipped = propose()
    self.assertIn('would change by +0.5, +0.4, +0.3 nats', skipped.reason)

  def test_stops_at_the_budget(self):
    size = costs.params(trained()[0])
    limits = lambda **fields: method.GaussNewton(
        limits=selection.Limits(**fields)
    )
    for grower in (limits(budget=size), limits(growth_cap=1e-9)):
      self.assertTrue(propose(grower=grower).is_final)
    with self.assertRaisesRegex(ValueError, f'budget is {size - 1} params'):
      propose(grower=limits(budget=size - 1))

  def test_what_is_not_finite_is_dropped(self):
    now = situation()
    weights = jax.tree.map(np.array, now.state.params['weights'])
    weights['s1b0']['dense']['bias'][:] = np.nan
    broken = now.state.replace(params={**now.state.params, 'weights': weights})
    skipped = propose(situation(state=broken))
    self.assertIsInstance(skipped, base.Skip)
    self.assertRegex(
        skipped.reason,
        r'no split or prune is worth it; \d+ candidates cannot be used',
    )

  def test_growths_within_the_padding_hardly_compile(self):
    now = situation()
    grower = method.GaussNewton(limits=selection.Limits(growth_cap=0.08))
    change = propose(now, grower)
    self.assertEqual(*map(padding.padded, (now.architecture, change.target)))
    state = state_lib.grown_arrays(now.state, change, key=jax.random.key(0))
    now = situation(architecture=change.target, state=state)
    with programs.compilations() as spent:
      again = propose(now, grower)
    self.assertIsNotNone(again)
    self.assertLessEqual(spent.count, 2)  # To draw from a key.

  def test_bad_settings(self):
    for build, message in (
        (lambda: method.GaussNewton(samples=0), 'samples is at least 1'),
        (lambda: ranking.LearnedSplits(compensation='x'), 'one of off, least'),
        (lambda: selection.Limits(resource='watts'), 'one of params, macs'),
        (lambda: selection.Limits(growth_cap=0), 'growth_cap is positive'),
        (lambda: selection.Limits(price=-1), 'price is at least 0'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        build()
    with self.assertRaisesRegex(ValueError, '650 examples .* at most 640'):
      propose(grower=method.GaussNewton(examples=650))


def joint_model(count=6, seed=0):
  generator = np.random.default_rng(seed)
  c = generator.normal(size=(40, 2 * count)) * 0.05
  slopes = generator.normal(size=2 * count) * 0.02
  slopes[count:] = np.abs(slopes[count:]) * 1e-3
  candidates = [('s0b0.out', i) for i in range(count // 2)]
  candidates += [('s1b0.out', i) for i in range(count - count // 2)]
  return estimates.Joint(
      tuple(candidates), slopes, c.T @ c / len(c), np.ones(2 * count, bool)
  )


class SelectionTest(parameterized.TestCase):

  def test_picks_are_those_of_direct_solves(self):
    joint, limits = joint_model(), selection.Limits(growth_cap=10.0)
    architecture = trained()[0]
    picked, _ = selection.pick(architecture, joint, limits)

    def best(chosen):
      gram = joint.gram[np.ix_(chosen, chosen)]
      gram = gram + 1e-3 * np.diag(np.diag(gram))
      return -joint.slopes[chosen] @ np.linalg.solve(
          gram, joint.slopes[chosen]
      ) / 2

    sizes, chosen = dict(architecture.sizes), []
    for number in picked:
      gains = {}
      for other in set(range(len(joint.candidates))) - set(chosen):
        axis = joint.candidates[other][0]
        more = costs.params(architecture, {**sizes, axis: sizes[axis] + 1})
        gain = best(chosen) - best([*chosen, other]) if chosen else -best(
            [other]
        )
        if joint.slopes[other] < 0:
          gains[other] = gain / (more - costs.params(architecture, sizes))
      self.assertEqual(number, max(gains, key=gains.get))
      chosen.append(number)
      sizes[joint.candidates[number][0]] += 1
    self.assertNotEmpty(picked)

  @parameterized.parameters('params', 'macs')
  def test_limits_hold(self, resource):
    architecture = trained()[0]
    measure = getattr(costs, resource)
    limits = selection.Limits(resource, growth_cap=0.25)
    selected = selection.select(architecture, joint_model(), limits)
    sizes = dict(architecture.sizes)
    for number in selected.splits:
      sizes[joint_model().candidates[number][0]] += 1
    self.assertNotEmpty(selected.splits)
    self.assertLessEqual(
        measure(architecture, sizes), 1.25 * measure(architecture)
    )
    dear = selection.Limits(resource, price=1e3)
    self.assertEmpty(selection.pick(architecture, joint_model(), dear)[0])

  def test_scales_are_in_their_boxes_and_optimal(self):
    joint, picked = joint_model(), [0, 1, 2, 3, 4, 5]
    scales = selection.joint_scales(joint, picked)
    largest = estimates.largest_scales(np.diag(joint.gram)[:6])
    gradient = joint.slopes[:6] + joint.gram[:6, :6] @ scales
    self.assertTrue(np.all((scales >= -1e-9) & (scales <= largest + 1e-9)))
    for t, top, slope in zip(scales, largest, gradient):
      if t < top - 1e-6:
        self.assertGreater(slope, -1e-6)
      if t > 1e-6:
        self.assertLess(slope, 1e-6)

  def test_prunes_are_cheap_and_one_of_each_axis(self):
    joint, architecture = joint_model(), trained()[0]
    nothing = selection.Selection((), np.zeros(6), (), 1.0)
    limits = selection.Limits()
    pick = functools.partial(
        selection.pick_prunes, architecture, joint, limits=limits
    )
    prunes = pick(nothing, numbers=range(6))
    self.assertLen({joint.candidates[i][0] for i in prunes}, 2)
    self.assertLen(prunes, 2)
    self.assertEmpty(pick(dataclasses.replace(nothing, price=0.0),
                          numbers=range(6)))
    self.assertNotIn(prunes[0], pick(
        dataclasses.replace(nothing, splits=(prunes[0],)), numbers=range(6)
    ))
    unusable = dataclasses.replace(joint, usable=np.zeros(12, bool))
    self.assertEmpty(selection.pick_prunes(
        architecture, unusable, nothing, limits, range(6)
    ))


_LEARN = """
import tiny_morphisms as tiny
import numpy as np
from autogrow_jax.methods.gauss_newton import splits
data = tiny.case('plain3net', 64, 'f4')
for seed in range(3):
  found = splits.learn(
      data.model, data.trees, [data.batch] * 2, np.random.default_rng(seed))
print(all(np.isfinite(u).all() for split in found.splits.values()
          for u in split.u))
"""


class RunTest(parameterized.TestCase):

  def test_learning_does_not_hang(self):
    """Learns several layers in a process of its own; see `splits`."""
    folder = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([folder, os.path.dirname(folder)])
    done = subprocess.run(
        [sys.executable, '-c', _LEARN], capture_output=True, text=True,
        timeout=240, check=False,
        env={
            **os.environ, 'PYTHONPATH': path,
            'XLA_FLAGS': '--xla_backend_optimization_level=0',
        },
    )
    self.assertEqual(done.stdout.strip(), 'True', done.stderr)


if __name__ == '__main__':
  absltest.main()
