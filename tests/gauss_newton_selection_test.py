"""Tests of pruning estimates, and of what is selected together."""

import dataclasses
import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import tiny_morphisms as tiny
import tiny_networks
from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import compensation
from autogrow_jax.methods.gauss_newton import estimates
from autogrow_jax.methods.gauss_newton import prunes
from autogrow_jax.methods.gauss_newton import removals
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.methods.gauss_newton import together

SGD = tiny_networks.OPTIMIZERS['sgd']
WIDTHS = {'plain3net': (3, 4, 4), 'mlp': (5, 4)}


def seed(family, widths=None):
  widths = widths or WIDTHS[family]
  return tiny_networks.seed(family, (1,) * len(widths), widths=widths)


def estimate(model, trees, learning, judging=None, **settings):
  """Estimated prunes; examples judge what they choose, if there are no others.
  """
  return prunes.estimate(
      model, trees, learning, judging or learning, jax.random.key(0), **settings
  )


def run(architecture, state, x):
  trees = tiny.trees_of(state)
  chain = tiny.chain_of(architecture)
  return taps.run(chain, trees.weights, trees.stats, x)


class PrunesTest(parameterized.TestCase):

  @parameterized.parameters(
      ('plain3net', 'least_squares'),
      ('plain3net', 'gauss_newton'),
      ('mlp', 'gauss_newton'),
  )
  def test_the_applied_change_is_the_predicted_one(self, family, kind):
    """Of what the reader writes, and so of the slope, exactly."""
    architecture = seed(family)
    state = tiny_networks.state(architecture)
    model = signals.model_of(architecture)
    x, labels = tiny.batch()
    trees = tiny.trees_of(state)
    found = estimate(
        model, trees, [(x, labels)], compensation=kind,
        curvature='rank1',
    )
    before = run(architecture, state, x)
    losses, by_axis = signals.signals(
        model, trees, x, labels, jax.random.key(0), curvature='rank1'
    )
    coefficient = signals.rank_one_coefficient(losses)
    for site in model.sites[-2:]:
      index = found.candidates.index((site.axis, 1))
      removal = found.alone(index)
      self.assertEqual(removal.weights[0, 1], -1)
      removed = surgery.absorbed(model, trees, [removal])
      change = surgery.morph(architecture, {}, {}, removed=removed)
      after = run(change.architecture, tiny.grow(state, change), x)
      # The constant goes to the norm behind the reader, if there is one.
      (reader,), layer = site.readers, site.readers[0].layer
      factor = 1
      if reader.norm is not None:
        norm = layer_of(trees.weights, reader.top)['scale']
        var = layer_of(trees.stats, reader.top)['var']
        factor = norm / np.sqrt(var + reader.norm.epsilon)
      got = after.outputs[reader.top] - before.outputs[reader.top]
      got = np.asarray(got) / factor
      (w,) = removal.weights
      a = np.asarray(before.inputs[layer.path])
      v = np.asarray(trees.kernel(layer))
      mixed = np.zeros_like(v) + v[..., 1:2, :]
      mixed = mixed * w[:-1].reshape(-1, 1)
      want = layer.linear(a, mixed.astype('f4'))
      want = want + w[-1] * np.asarray(removals.outgoing_sum(v))[1][
          (None,) * (want.ndim - 1)
      ]
      np.testing.assert_allclose(got, want, atol=1e-4)
      (slope,) = by_axis[site.axis].slope
      s = (slope * want).reshape(len(x), -1).sum(-1)
      curvature = np.mean(np.square(s) * coefficient)
      predicted = s.mean() + curvature / 2
      np.testing.assert_allclose(
          found.changes[index], predicted, rtol=1e-3, atol=1e-5
      )
      np.testing.assert_allclose(
          found.curvatures[index], curvature, rtol=1e-3, atol=1e-5
      )

  def test_pruning_undoes_a_split(self):
    """A twin takes over all of it, and nothing changes."""
    architecture = seed('plain3net')
    state = tiny_networks.state(architecture)
    change = tiny_networks.split(architecture, 's0b0.out', [1])
    twins = tiny.grow(state, change)
    x, labels = tiny.batch()
    model, trees = signals.model_of(change.target), tiny.trees_of(twins)
    found = estimate(
        model, trees, [(x, labels)], compensation='least_squares'
    )
    index = found.candidates.index(('s0b0.out', 1))
    (w,) = found.weights['s0b0.out'][1]
    np.testing.assert_allclose(w, np.eye(5)[3] - np.eye(5)[1], atol=2e-3)
    self.assertAlmostEqual(found.changes[index], 0, delta=1e-4)
    self.assertTrue(found.usable[index])
    back = surgery.morph(
        change.target, {}, {},
        removed=surgery.absorbed(model, trees, [found.alone(index)]),
    )
    after = run(back.architecture, tiny.grow(twins, back), x).output
    np.testing.assert_allclose(
        after, run(architecture, state, x).output, atol=1e-3
    )
    self.assertEqual(back.architecture, architecture)

  def test_gauss_newton_costs_less(self):
    architecture = seed('plain3net')
    trees = tiny.trees_of(tiny_networks.state(architecture))
    changes = [
        estimate(
            signals.model_of(architecture), trees, [tiny.batch(64)],
            compensation=compensation, curvature='rank1',
        ).changes
        for compensation in ('gauss_newton', 'least_squares')
    ]
    np.testing.assert_array_less(changes[0], changes[1] + 1e-9)

  def test_splits_and_prunes_in_the_same_step(self):
    """The compensation is that of what is split; neighbours change as well."""
    architecture = seed('plain3net')
    state = tiny_networks.state(architecture)
    model = signals.model_of(architecture)
    trees, (x, labels) = tiny.trees_of(state), tiny.batch()
    found = estimate(
        model, trees, [(x, labels)], compensation='least_squares'
    )
    start = splits.start(model, trees, jax.random.key(1))
    chosen = ('s0b0.out', 2), ('s1b0.out', 0)
    removed = surgery.absorbed(
        model, trees, [found.alone(found.candidates.index(c)) for c in chosen]
    )
    alone = surgery.morph(architecture, {}, {}, removed=removed)
    units = {'s0b0.out': np.array([0]), 's1b0.out': np.array([1, 3])}
    both = surgery.morph(architecture, start, units, removed=removed)
    sources = both.change.sources
    np.testing.assert_array_equal(sources['s0b0.out'], [0, 1, 0])
    np.testing.assert_array_equal(sources['s1b0.out'], [1, 2, 3, 1, 3])
    # Splits at their start add nothing to what the prunes do.
    want = run(alone.architecture, tiny.grow(state, alone), x).output
    got = run(both.architecture, tiny.grow(state, both), x).output
    np.testing.assert_allclose(got, want, atol=1e-4)
    self.assertGreater(
        np.abs(want - run(architecture, state, x).output).max(), 1e-3
    )

  @parameterized.parameters(('plain3net', (1, 3, 0)), ('mlp', (1, 3)))
  def test_several_of_an_axis_are_applied_as_estimated(self, family, units):
    """What was taken over is removed in turn, exactly."""
    architecture, axis = seed(family), 's1b0.out'
    state = tiny_networks.state(architecture)
    model = signals.model_of(architecture)
    (site,) = (site for site in model.sites if site.axis == axis)
    trees, (x, labels) = tiny.trees_of(state), tiny.batch()
    key = jax.random.key(0)
    found = estimate(
        model, trees, [(x, labels)], compensation='least_squares'
    )
    removals = in_order(found, axis, units)
    change = surgery.morph(
        architecture, {}, {}, removed=surgery.absorbed(model, trees, removals)
    )
    before = run(architecture, state, x)
    after = run(change.architecture, tiny.grow(state, change), x)
    (reader,) = site.readers
    moved = after.outputs[reader.top] - before.outputs[reader.top]
    if reader.norm is not None:  # It has the constant.
      moved = moved / trees.factor(reader)[None, None, None]
    self.assertGreater(np.abs(moved).max(), 0.01)
    still = splits.start(model, trees, key)
    joint = together.together(
        model, trees, still, removals, [(x, labels)], key, samples=1
    )
    draw = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    _, by_axis = signals.signals(
        model, trees, x, labels, draw, curvature='mc'
    )
    signal = by_axis[axis]
    s, c = (
        (gradient * moved).reshape(len(x), -1).sum(-1)
        for (gradient,) in (signal.slope, signal.curvature)
    )
    self.assertAlmostEqual(joint.slopes.sum(), s.mean(), delta=1e-4)
    self.assertAlmostEqual(joint.gram.sum(), np.mean(c**2), delta=1e-4)
    self.assertGreater(np.abs(joint.slopes[2:]).min(), 1e-4)

  def test_what_is_left_is_as_if_estimated_anew(self):
    """After a twin, whose removal changes nothing; its half is taken over."""
    architecture, axis = seed('plain3net'), 's0b0.out'
    state = tiny_networks.state(architecture)
    change = tiny_networks.split(architecture, axis, [1])
    model = signals.model_of(change.target)
    trees = tiny.trees_of(tiny.grow(state, change))
    settings = {'compensation': 'least_squares', 'curvature': 'rank1'}
    data = [tiny.batch()]
    want = estimate(
        signals.model_of(architecture), tiny.trees_of(state), data,
        **settings,
    )
    found = estimate(model, trees, data, **settings)
    with mock.patch.object(prunes, 'LARGEST_GRAMS', 0):
      wide = estimate(model, trees, data, **settings)
    index = found.candidates.index((axis, 3))
    left, rough = (
        one.remaining[axis].without(one.alone(index)) for one in (found, wide)
    )
    for unit in range(3):
      with mock.patch.object(compensation, 'LARGEST_DIVERGENCE', np.inf):
        (removal, cost), (_, rough_cost) = (
            one.removal(unit) for one in (left, rough)
        )
      np.testing.assert_allclose(
          removal.weights[:, [0, 1, 2, 4]], want.weights[axis][unit], atol=5e-3
      )
      np.testing.assert_array_equal(removal.weights[:, 3], 0)
      index = want.candidates.index((axis, unit))
      expected, curvature = want.changes[index], want.curvatures[index]
      self.assertAlmostEqual(cost, expected, delta=0.02 * curvature)
      # Without K the slope is exact, and the curvature of the right size.
      slope = expected - curvature / 2
      self.assertBetween((rough_cost - slope) / (curvature / 2), 0.3, 3)

  @parameterized.parameters('least_squares', 'gauss_newton')
  def test_what_some_examples_choose_others_judge(self, kind):
    architecture, axis = seed('plain3net'), 's0b0.out'
    trees = tiny.trees_of(tiny_networks.state(architecture))
    x, labels = tiny.batch(12)
    first, second = [(x, labels)], [(x[::-1] + 0.5, labels)]
    of = functools.partial(
        estimate, signals.model_of(architecture), trees, curvature='rank1'
    )
    chosen, other = of(first, compensation=kind), of(second, compensation=kind)
    got = of(first, judging=second, compensation=kind)
    least = of(first, compensation='least_squares')
    by = other.remaining[axis]
    for unit, w in enumerate(got.weights[axis]):
      # Whichever of both the others find better.
      options = [one.weights[axis][unit].ravel() for one in (chosen, least)]
      changes = [
          by.slopes[unit].ravel() @ w + w @ by.gram[unit] @ w / 2
          for w in options
      ]
      index = got.candidates.index((axis, unit))
      np.testing.assert_allclose(got.changes[index], min(changes), atol=1e-5)
      np.testing.assert_allclose(
          w.ravel(), options[int(np.argmin(changes))], atol=1e-5
      )
    # Those who chose are too hopeful.
    self.assertLess(chosen.changes.sum(), got.changes.sum())

  def test_a_choice_beyond_trust_gives_way_to_least_squares(self):
    architecture = seed('plain3net')
    trees = tiny.trees_of(tiny_networks.state(architecture))
    x, labels = tiny.batch(12)
    of = functools.partial(
        estimate, signals.model_of(architecture), trees, [(x, labels)],
        judging=[(x[::-1] + 0.5, labels)],
    )
    found, least = of(), of(compensation='least_squares')
    larger = found.curvatures > least.curvatures * 1.01
    self.assertTrue(larger.any())
    limit = np.median(least.curvatures[larger])
    with mock.patch.object(compensation, 'LARGEST_DIVERGENCE', limit / 2):
      careful = of()
      usable = of(compensation='least_squares').usable
    np.testing.assert_array_equal(careful.usable | ~usable, True)
    self.assertFalse(((found.curvatures <= limit) | ~usable).all())

  def test_gauss_newton_leaves_no_more_than_trusted(self):
    architecture = seed('plain3net')
    trees = tiny.trees_of(tiny_networks.state(architecture))
    of = functools.partial(
        estimate, signals.model_of(architecture), trees,
        [tiny.batch()],
    )
    found, least = of(), of(compensation='least_squares')

    def residues(found):
      return np.array([
          np.sum(w @ moments * w)
          for axis, unit in found.candidates
          for w in [found.weights[axis][unit]]
          for moments in found.remaining[axis].moments
      ])

    own = np.array([
        moments[unit, unit]
        for axis, unit in found.candidates
        for moments in found.remaining[axis].moments
    ])
    limit = np.maximum(residues(least), compensation.LARGEST_RESIDUE * own)
    np.testing.assert_array_less(residues(found), limit * (1 + 1e-6) + 1e-9)
    with mock.patch.object(compensation, 'LARGEST_RESIDUE', 1e9):
      self.assertGreater((residues(of()) / (limit + 1e-9)).max(), 1.5)

  def test_without_room_for_the_curvature_of_each(self):
    """The changes are measured; least squares in place of gauss_newton."""
    architecture = seed('mlp')
    trees = tiny.trees_of(tiny_networks.state(architecture))
    of = functools.partial(
        estimate, signals.model_of(architecture), trees,
        [tiny.batch(), tiny.batch()], curvature='rank1',
    )
    want = of(compensation='least_squares')
    # There is room for 4 units, not for 5.
    with mock.patch.object(prunes, 'LARGEST_GRAMS', 8 * 5 * 6 * 6 - 1):
      found = of()
    self.assertEqual((want.passes, found.passes), (2, 3))
    axes = np.array([axis for axis, _ in found.candidates])
    first = axes == 's0b0.out'
    for name in ('changes', 'curvatures'):
      got, expected = getattr(found, name), getattr(want, name)
      np.testing.assert_allclose(
          got[first], expected[first], rtol=1e-3, atol=1e-7
      )
      self.assertGreater(np.abs(got - expected)[~first].max(), 1e-5)
    np.testing.assert_allclose(
        found.weights['s0b0.out'], want.weights['s0b0.out'], atol=1e-6
    )

  def test_products_in_chunks(self):
    architecture = seed('mlp')
    trees = tiny.trees_of(tiny_networks.state(architecture))
    model = signals.model_of(architecture)
    want = estimate(model, trees, [tiny.batch()])
    with mock.patch.object(prunes, 'LARGEST_PRODUCTS', 2 * 4 * 6 * 6):
      found = estimate(model, trees, [tiny.batch()])
    np.testing.assert_allclose(found.changes, want.changes, rtol=1e-4)

  def test_the_joint_model_of_a_step(self):
    """Its parts are those of the splits, and of each prune."""
    architecture = seed('mlp')
    trees = tiny.trees_of(tiny_networks.state(architecture))
    model = signals.model_of(architecture)
    batches, key = [tiny.batch()], jax.random.key(0)
    found = estimate(model, trees, batches)
    start = splits.start(model, trees, key)
    moved = {
        axis: split.replace(u=tuple(u + 0.1 for u in split.u))
        for axis, split in start.items()
    }
    index = found.candidates.index(('s1b0.out', 1))
    joint = together.together(
        model, trees, moved, [found.alone(index)], batches, key, samples=3
    )
    _, by_axis = signals.signals(
        model, trees, *batches[0], key, curvature='rank1'
    )
    s = sum(
        splits.projections(
            site, trees, by_axis[site.axis], moved[site.axis]
        )[0].sum(-1)
        for site in model.sites
    )
    np.testing.assert_allclose(joint.slopes[0], np.mean(s), rtol=1e-4)
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
    still = together.together(model, trees, start, [], batches, key, samples=1)
    np.testing.assert_array_equal(still.gram, 0)

  def test_bad_input(self):
    architecture = seed('mlp')
    trees = tiny.trees_of(tiny_networks.state(architecture))
    model = signals.model_of(architecture)
    found = estimate(model, trees, [tiny.batch()])
    for units, message in (
        ((1, 1), r'distinct numbers .*, got \[1, 1\]'),
        (range(4), "one unit of axis 's1b0.out' stays, but all 4 are"),
    ):
      removals = [
          found.alone(found.candidates.index(('s1b0.out', unit)))
          for unit in units
      ]
      removed = surgery.absorbed(model, trees, removals)
      with self.assertRaisesRegex(ValueError, message):
        surgery.morph(architecture, {}, {}, removed=removed)


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
    limits = selection.Limits(growth_cap=2.0)
    chosen = selection.select(architecture, found, limits)
    index = np.array(chosen.splits)
    self.assertLessEqual(chosen.scales.max(), 1)
    half = chosen.scales**2 * found.curvatures[index] / 2
    self.assertLessEqual(half.max(), estimates.LARGEST_DIVERGENCE + 1e-9)
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

  @mock.patch.object(compensation, 'LARGEST_DIVERGENCE', np.inf)
  def test_prunes_are_the_cheapest_per_resource_each_time(self):
    architecture, found = estimated_prunes()
    split, price = [('s0b0.out', 0)], 1.0
    sizes = dict(architecture.sizes)
    sizes['s0b0.out'] += 1
    picked = selection.pick_prunes(
        architecture, split, found, selection.Limits(), price
    )
    # Half of 8 and of 5, rounded down.
    self.assertCountEqual(
        [removal.axis for removal in picked],
        ['s0b0.out'] * 4 + ['s1b0.out'] * 2,
    )
    left, gone = dict(found.remaining), set(split)
    params = lambda sizes: costs.params(architecture, sizes)
    ratios = []
    for pick in picked:
      now = {}
      for axis, unit in found.candidates:
        if (axis, unit) in gone or len(left[axis].removed) == left[axis].most:
          continue
        freed = params(sizes) - params({**sizes, axis: sizes[axis] - 1})
        now[axis, unit] = left[axis].removal(unit)[1] / freed
      ratios.append(now[pick.axis, pick.unit])
      self.assertAlmostEqual(ratios[-1], min(now.values()), places=9)
      want, _ = left[pick.axis].removal(pick.unit)
      np.testing.assert_allclose(pick.weights, want.weights, atol=1e-5)
      np.testing.assert_allclose(pick.mixture, want.mixture, atol=1e-5)
      gone.add((pick.axis, pick.unit))
      sizes[pick.axis] -= 1
      left[pick.axis] = left[pick.axis].without(pick)
    self.assertGreater(ratios[-1], ratios[0])
    fewer = selection.pick_prunes(
        architecture, split, found, selection.Limits(), ratios[3]
    )
    self.assertEqual(
        [(removal.axis, removal.unit) for removal in fewer],
        [(removal.axis, removal.unit) for removal in picked[:3]],
    )

  def test_prunes_below_the_price_of_splits_are_selected(self):
    _, found = random_estimates(seed('mlp', (8, 5)))
    architecture, cheap = estimated_prunes()
    limits = selection.Limits(price=1e-3)
    chosen = selection.select(architecture, found, limits, cheap)
    self.assertGreaterEqual(chosen.price, 1e-3)
    split = {found.candidates[index] for index in chosen.splits}
    pruned = {(removal.axis, removal.unit) for removal in chosen.prunes}
    self.assertLen(pruned, len(chosen.prunes))
    self.assertNotEmpty(pruned)
    self.assertFalse(split & pruned)

  def test_prunes_that_clash_are_dropped_with_all_that_count_on_them(self):
    architecture, found = random_estimates(seed('mlp', (8, 5)))
    _, prunable = estimated_prunes()
    selected = selection.Selection(
        (),
        np.zeros(0),
        0.0,
        tuple(
            prunable.alone(prunable.candidates.index(candidate))
            for candidate in (
                ('s0b0.out', 0), ('s1b0.out', 0), ('s1b0.out', 3),
                ('s0b0.out', 2),
            )
        ),
        1e-3,
    )
    # Each is free, or better, but the second undoes what splits have gained.
    gram = np.diag([0.2, 0.0, 0.1, 0.0, 0.0])
    gram[0, 2] = gram[2, 0] = 0.1
    joint = together.Joint(np.array([-0.2, 0.0, 0.0, -0.1, 0.0]), gram)
    kept = selection.confirm(
        architecture, found.candidates, selected, joint, selection.Limits()
    )
    self.assertEqual(
        kept.prunes, (selected.prunes[0], selected.prunes[3])
    )
    self.assertAlmostEqual(kept.change, -0.1)

  def test_bad_limits(self):
    for settings, message in (
        ({'resource': 'watts'}, 'one of params, macs, got .watts'),
        ({'growth_cap': 0.0}, 'growth_cap is positive'),
        ({'price': -1.0}, 'price is at least 0'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        selection.Limits(**settings)


def in_order(found, axis, units):
  """Removals of units of an axis, each counting on those before it."""
  left, found = found.remaining[axis], []
  for unit in units:
    found.append(left.removal(unit)[0])
    left = left.without(found[-1])
  return found


def layer_of(tree, path):
  for name in path:
    tree = tree[name]
  return tree


@functools.lru_cache(maxsize=None)
def estimated_prunes():
  """An architecture and its prunes, all of which are trusted."""
  architecture = seed('mlp', (8, 5))
  with mock.patch.object(compensation, 'LARGEST_DIVERGENCE', np.inf):
    return architecture, estimate(
        signals.model_of(architecture),
        tiny.trees_of(tiny_networks.state(architecture)),
        [tiny.batch(64)],
    )


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
