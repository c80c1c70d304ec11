"""Tests of pruning estimates, and of what is selected together."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import tiny_networks
from autogrow_jax import costs
from autogrow_jax import growth
from autogrow_jax import networks
from autogrow_jax.methods.gauss_newton import estimates
from autogrow_jax.methods.gauss_newton import prunes
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.networks import taps

SGD = tiny_networks.OPTIMIZERS['sgd']
FAMILIES = {
    'plain3net': {'widths': (3, 4, 4)},
    'mlp': {'widths': (5, 4)},
}


def seed(family):
  depths = (1,) * len(FAMILIES[family]['widths'])
  return tiny_networks.seed(family, depths, **FAMILIES[family])


def model_of(architecture):
  return signals.model_of(
      sites.survey(architecture), taps.chain_of(networks.parts(architecture))
  )


def trees_of(state):
  return signals.Trees(state.params['weights'], state.stats['network'])


def grow(state, change):
  return growth.grow(state, change, SGD, key=jax.random.key(0))[0]


def batch(count=6):
  x = tiny_networks.images(count)
  return x, np.arange(count) % tiny_networks.CLASSES


def run(architecture, state, x):
  trees = trees_of(state)
  chain = taps.chain_of(networks.parts(architecture))
  return taps.run(chain, trees.weights, trees.stats, x)


class PrunesTest(parameterized.TestCase):

  @parameterized.parameters(
      ('plain3net', 'none'),
      ('plain3net', 'mean'),
      ('plain3net', 'least_squares'),
      ('plain3net', 'gauss_newton'),
      ('mlp', 'gauss_newton'),
  )
  def test_the_applied_change_is_the_predicted_one(self, family, compensation):
    """Of what the reader writes, and so of the slope, exactly."""
    architecture = seed(family)
    state, model = tiny_networks.state(architecture), model_of(architecture)
    x, labels = batch()
    trees = trees_of(state)
    found = prunes.estimate(
        model, trees, [(x, labels)], jax.random.key(0),
        compensation=compensation, curvature='emp-fisher',
    )
    before = run(architecture, state, x)
    _, by_axis = signals.signals(
        model, trees, x, labels, jax.random.key(0), curvature='emp-fisher'
    )
    for site in model.sites[-2:]:
      index = found.candidates.index((site.axis, 1))
      removed = surgery.removals(model, trees, found, [index])
      self.assertEqual(removed[site.axis].weights[1], -1)
      change = surgery.morph(architecture, {}, {}, removed=removed)
      after = run(change.architecture, grow(state, change), x)
      # The constant goes to the norm behind the reader, if there is one.
      top = (site.reader_norm or site.reader).path
      factor = 1
      if site.reader_norm is not None:
        norm = layer_of(trees.weights, top)['scale']
        var = layer_of(trees.stats, top)['var']
        factor = norm / np.sqrt(var + site.reader_norm.epsilon)
      got = np.asarray(after.outputs[top] - before.outputs[top]) / factor
      w = removed[site.axis].weights
      a = np.asarray(before.inputs[site.reader.path])
      v = np.asarray(trees.kernel(site.reader))
      mixed = np.zeros_like(v) + v[..., 1:2, :]
      mixed = mixed * w[:-1].reshape(-1, 1)
      want = site.reader.linear(a, mixed.astype('f4'))
      want = want + w[-1] * np.asarray(prunes.outgoing_sum(v))[1][
          (None,) * (want.ndim - 1)
      ]
      np.testing.assert_allclose(got, want, atol=1e-4)
      s = (by_axis[site.axis].slope * want).reshape(len(x), -1).sum(-1)
      predicted = s.mean() + np.square(s).mean() / 2
      np.testing.assert_allclose(
          found.changes[index], predicted, rtol=1e-3, atol=1e-5
      )
      np.testing.assert_allclose(
          found.curvatures[index], np.square(s).mean(), rtol=1e-3, atol=1e-5
      )

  def test_pruning_undoes_a_split(self):
    """A twin takes over all of it, and nothing changes."""
    architecture = seed('plain3net')
    state = tiny_networks.state(architecture)
    change = growth.split(architecture, 's0b0.out', np.array([1]))
    twins = grow(state, change)
    x, labels = batch()
    model, trees = model_of(change.architecture), trees_of(twins)
    found = prunes.estimate(
        model, trees, [(x, labels)], jax.random.key(0),
        compensation='least_squares',
    )
    index = found.candidates.index(('s0b0.out', 1))
    w = found.weights['s0b0.out'][1]
    np.testing.assert_allclose(w, np.eye(5)[3] - np.eye(5)[1], atol=2e-3)
    self.assertAlmostEqual(found.changes[index], 0, delta=1e-4)
    self.assertTrue(found.usable[index])
    back = surgery.morph(
        change.architecture, {}, {},
        removed=surgery.removals(model, trees, found, [index]),
    )
    after = run(back.architecture, grow(twins, back), x).output
    np.testing.assert_allclose(
        after, run(architecture, state, x).output, atol=1e-3
    )
    self.assertEqual(back.architecture, architecture)

  def test_better_compensations_cost_less(self):
    architecture = seed('plain3net')
    trees = trees_of(tiny_networks.state(architecture))
    models = {
        compensation: prunes.estimate(
            model_of(architecture), trees, [batch(64)], jax.random.key(0),
            compensation=compensation,
        )
        for compensation in prunes.COMPENSATIONS
    }
    changes = {name: found.changes for name, found in models.items()}
    spread = lambda name: models[name].curvatures.mean()
    self.assertLess(spread('least_squares'), spread('mean'))
    self.assertLess(spread('mean'), spread('none'))
    np.testing.assert_array_less(
        changes['gauss_newton'], changes['least_squares'] + 1e-9
    )

  def test_splits_and_prunes_in_the_same_step(self):
    """The compensation is that of what is split; neighbours change as well."""
    architecture = seed('plain3net')
    state, model = tiny_networks.state(architecture), model_of(architecture)
    trees, (x, labels) = trees_of(state), batch()
    found = prunes.estimate(
        model, trees, [(x, labels)], jax.random.key(0),
        compensation='least_squares',
    )
    start = splits.start(model, trees, jax.random.key(1))
    chosen = ('s0b0.out', 2), ('s1b0.out', 0)
    removed = surgery.removals(
        model, trees, found, [found.candidates.index(c) for c in chosen]
    )
    alone = surgery.morph(architecture, {}, {}, removed=removed)
    units = {'s0b0.out': np.array([0]), 's1b0.out': np.array([1, 3])}
    both = surgery.morph(architecture, start, units, removed=removed)
    np.testing.assert_array_equal(both.sources['s0b0.out'], [0, 1, 0])
    np.testing.assert_array_equal(both.sources['s1b0.out'], [1, 2, 3, 1, 3])
    # Splits at their start add nothing to what the prunes do.
    want = run(alone.architecture, grow(state, alone), x).output
    got = run(both.architecture, grow(state, both), x).output
    np.testing.assert_allclose(got, want, atol=1e-4)
    self.assertGreater(
        np.abs(want - run(architecture, state, x).output).max(), 1e-3
    )

  def test_the_joint_model_of_a_step(self):
    """Its parts are those of the splits, and of each prune."""
    architecture = seed('mlp')
    trees = trees_of(tiny_networks.state(architecture))
    model, batches, key = model_of(architecture), [batch()], jax.random.key(0)
    found = prunes.estimate(model, trees, batches, key)
    start = splits.start(model, trees, key)
    moved = {
        axis: split.replace(u=split.u + 0.1) for axis, split in start.items()
    }
    removed = surgery.removals(
        model, trees, found, [found.candidates.index(('s1b0.out', 1))]
    )
    joint = prunes.together(
        model, trees, moved,
        [(axis, one.unit, one.weights) for axis, one in removed.items()],
        batches, key, samples=3,
    )
    _, by_axis = signals.signals(
        model, trees, *batches[0], key, curvature='emp-fisher'
    )
    s = sum(
        splits.projections(
            site, trees, by_axis[site.axis], moved[site.axis]
        )[0].sum(-1)
        for site in model.sites
    )
    np.testing.assert_allclose(joint.slopes[0], np.mean(s), rtol=1e-4)
    index = found.candidates.index(('s1b0.out', 1))
    np.testing.assert_allclose(
        joint.slopes[1],
        found.changes[index] - found.curvatures[index] / 2,
        rtol=1e-3,
        atol=1e-5,
    )
    self.assertAlmostEqual(
        joint.change([0]),
        joint.change([])
        + joint.slopes[1]
        + joint.gram[0, 1]
        + joint.gram[1, 1] / 2,
    )
    still = prunes.together(model, trees, start, [], batches, key, samples=1)
    np.testing.assert_array_equal(still.gram, 0)

  def test_bad_input(self):
    architecture = seed('mlp')
    trees, model = trees_of(tiny_networks.state(architecture)), model_of(
        architecture
    )
    with self.assertRaisesRegex(ValueError, 'one of none, .*, got .exact'):
      prunes.estimate(
          model, trees, [batch()], jax.random.key(0), compensation='exact'
      )
    found = prunes.estimate(model, trees, [batch()], jax.random.key(0))
    with self.assertRaisesRegex(ValueError, 'Two units of s0b0.out'):
      surgery.removals(model, trees, found, [0, 1])


class SelectionTest(parameterized.TestCase):

  def test_picks_are_those_of_direct_solves(self):
    architecture, found = random_estimates(seed('plain3net'))
    limits = selection.Limits(growth_cap=2.0)
    picked, ratio = selection.pick(architecture, found, limits)
    ridged = found.gram + np.diag(
        selection.RELATIVE_RIDGE * np.diag(found.gram)
    )

    def value(chosen):
      chosen = np.array(chosen, int)
      slopes = found.slopes[chosen]
      return -slopes @ np.linalg.solve(
          ridged[np.ix_(chosen, chosen)], slopes
      ) / 2

    self.assertGreater(len(picked), 3)
    allowance = limits.allowance(architecture)
    counts, sizes = costs.params(architecture), dict(architecture.sizes)
    for number, pick in enumerate(picked):
      before = np.array(picked[:number], int)
      gains = {}
      for other, (axis, _) in enumerate(found.candidates):
        grown = {**sizes, axis: sizes[axis] + 1}
        resource = costs.params(architecture, grown) - counts
        spent = costs.params(architecture, grown) - costs.params(architecture)
        rho = found.slopes[other] - ridged[other, before] @ np.linalg.solve(
            ridged[np.ix_(before, before)], found.slopes[before]
        )
        if other not in before and spent <= allowance and rho < 0:
          gains[other] = (value(before) - value([*before, other])) / resource
      self.assertAlmostEqual(gains[pick], max(gains.values()), places=9)
      axis = found.candidates[pick][0]
      sizes[axis] += 1
      counts = costs.params(architecture, sizes)
    self.assertAlmostEqual(ratio, gains[pick], places=9)

  @parameterized.parameters(*selection.RESOURCES)
  def test_limits_hold(self, resource):
    architecture, found = random_estimates(seed('plain3net'))
    used = getattr(costs, resource)(architecture)

    def grown(**settings):
      limits = selection.Limits(resource=resource, **settings)
      chosen = selection.select(architecture, found, limits)
      sizes = dict(architecture.sizes)
      for index in chosen.splits:
        sizes[found.candidates[index][0]] += 1
      return chosen, getattr(costs, resource)(architecture, sizes)

    free, size = grown(growth_cap=10.0)
    self.assertGreater(size, 1.4 * used)
    _, size = grown(growth_cap=0.5)
    self.assertBetween(size, 1.2 * used, 1.5 * used)
    _, size = grown(growth_cap=10.0, budget=int(1.4 * used))
    self.assertBetween(size, 1.05 * used, 1.4 * used)
    fewer, _ = grown(growth_cap=10.0, price=3 * free.price)
    self.assertLess(len(fewer.splits), len(free.splits))
    with self.assertRaisesRegex(ValueError, f'budget is 5 {resource}, but .*'):
      grown(budget=5)

  def test_scales_are_in_their_boxes_and_joint(self):
    architecture, found = random_estimates(seed('plain3net'))
    limits = selection.Limits(growth_cap=2.0, largest_divergence=0.05)
    chosen = selection.select(architecture, found, limits)
    index = np.array(chosen.splits)
    self.assertLessEqual(chosen.scales.max(), 1)
    half = chosen.scales**2 * found.curvatures[index] / 2
    self.assertLessEqual(half.max(), 0.05 + 1e-9)
    every = np.zeros(len(found.candidates))
    every[index] = chosen.scales
    self.assertAlmostEqual(chosen.change, found.joint_change(every))
    self.assertLess(chosen.change, 0)
    generator = np.random.default_rng(0)
    for _ in range(20):
      other = every.copy()
      other[index] *= generator.uniform(0.8, 1, len(index))
      self.assertLess(chosen.change, found.joint_change(other))

  def test_unusable_candidates_are_left_out_and_counted(self):
    architecture, found = random_estimates(seed('plain3net'))
    best = selection.pick(architecture, found, selection.Limits())[0][0]
    usable = np.ones(len(found.usable), bool)
    usable[best] = False
    slopes, gram = found.slopes.copy(), found.gram.copy()
    slopes[best] = gram[best] = gram[:, best] = np.nan
    found = dataclasses.replace(
        found, slopes=slopes, gram=gram, usable=usable
    )
    self.assertEqual(found.dropped, 1)
    chosen = selection.select(architecture, found, selection.Limits())
    self.assertNotEmpty(chosen.splits)
    self.assertNotIn(best, chosen.splits)
    self.assertTrue(np.isfinite(chosen.change))

  def test_cheap_prunes_are_selected(self):
    architecture, found = random_estimates(seed('plain3net'))
    count = len(found.candidates)
    changes = np.full(count, 10.0)
    changes[[1, 2, 5]] = 1e-9, -1e-9, 1e-9
    cheap = prunes.Prunes(
        found.candidates, changes, np.zeros(count), {}, np.ones(count, bool)
    )
    limits = selection.Limits(price=1e-3)
    chosen = selection.select(architecture, found, limits, cheap)
    split = {found.candidates[index] for index in chosen.splits}
    pruned = [found.candidates[index] for index in chosen.prunes]
    self.assertEqual(len({axis for axis, _ in pruned}), len(pruned))
    self.assertFalse(split & set(pruned))
    self.assertTrue(set(chosen.prunes) <= {1, 2, 5} and chosen.prunes)

  def test_prunes_that_clash_with_splits_are_dropped(self):
    architecture, found = random_estimates(seed('plain3net'))
    count = len(found.candidates)
    cheap = prunes.Prunes(
        found.candidates, np.zeros(count), np.zeros(count), {},
        np.ones(count, bool),
    )
    first, second = 0, found.candidates.index(('s1b0.out', 0))
    selected = selection.Selection((), np.zeros(0), 0.0, (first, second), 1e-3)
    # Each is free, but the second undoes what the splits have gained.
    joint = prunes.Joint(
        np.array([-0.2, 0.0, 0.0]),
        np.array([[0.2, 0.0, 0.1], [0.0, 0.0, 0.0], [0.1, 0.0, 0.1]]),
    )
    limits = selection.Limits()
    kept = selection.confirm(architecture, selected, cheap, joint, limits)
    self.assertEqual(kept.prunes, (first,))
    self.assertAlmostEqual(kept.change, -0.1)

  def test_bad_limits(self):
    for settings, message in (
        ({'resource': 'watts'}, 'one of params, macs, got .watts'),
        ({'growth_cap': 0.0}, 'growth_cap is positive'),
        ({'price': -1.0}, 'price is at least 0'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        selection.Limits(**settings)


def layer_of(tree, path):
  for name in path:
    tree = tree[name]
  return tree


def random_estimates(architecture):
  """Correlated candidates, one for each unit, most of them of use."""
  generator = np.random.default_rng(7)
  candidates = tuple(
      (site.axis, unit)
      for site in sites.survey(architecture).sites
      for unit in range(site.units)
  )
  count = len(candidates)
  root = generator.normal(size=(2 * count, count)) + generator.normal(
      size=(2 * count, 1)
  )
  gram = root.T @ root / (2 * count) / 20
  slopes = -generator.uniform(0, 0.1, count)
  return architecture, estimates.Estimates(
      candidates, slopes, gram, 1.0, 100, np.ones(count, bool)
  )


if __name__ == '__main__':
  absltest.main()
