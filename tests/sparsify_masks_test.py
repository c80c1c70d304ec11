"""Tests of configuration spaces, and of mask variables.

Numbers are those of the invariants that the method's specification lists.
"""

import dataclasses
import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import method as sparsify
from autogrow_jax.methods.sparsify import space as space_lib
from experiments.studies.sparsify import dynamics
import tiny_masks

NETWORKS = tuple(
    ('_'.join([network.title, *map(str, options.values())]), network, options)
    for network, options in tiny_masks.VARIANTS
)


class SpaceTest(parameterized.TestCase):

  @parameterized.parameters(
      ('BASIC', 'channels', ['s0', 's0b0.mid', 's1', 's1b0.mid', 's1b1.mid',
                             's1b2.mid'], [], {}),
      ('BASIC', 'both', ['s0', 's0b0.mid', 's1', 's1b0.mid', 's1b1.mid',
                         's1b2.mid'], ['s1b1', 's1b2'],
       {'s1b1.mid': 's1b1', 's1b2.mid': 's1b2'}),
      ('BASIC', 'layers', [], ['s1b1', 's1b2'], {}),
      ('BOTTLENECK', 'both', [
          's0', 's0b0.mid1', 's0b0.mid2', 's1', 's1b0.mid1', 's1b0.mid2',
          's1b1.mid1', 's1b1.mid2', 's1b2.mid1', 's1b2.mid2', 'stem',
      ], ['s1b1', 's1b2'], {
          's1b1.mid1': 's1b1', 's1b1.mid2': 's1b1', 's1b2.mid1': 's1b2',
          's1b2.mid2': 's1b2',
      }),
      ('PLAIN', 'channels', ['s0b0.out', 's1b0.out', 's1b1.out', 's1b2.out',
                             'stem'], [], {}),
      ('PLAIN', 'both', ['s0b0.out', 's1b0.out', 'stem'], ['s1b1', 's1b2'],
       {}),
      ('MOBILE', 'both', ['s0b0.out', 's1b0.out', 'stem'], ['s1b1', 's1b2'],
       {}),
      ('MLP', 'both', ['s0b0.out', 's1b0.out'], ['s1b1', 's1b2'], {}),
  )
  def test_of(self, network, grow, groups, layers, owners):
    """Invariant 6: what changes the shape, and first layers, always stay."""
    space = space_lib.of(
        tiny_masks.seed(getattr(tiny_masks, network)), grow
    )
    self.assertEqual([name for name, _ in space.groups], groups)
    self.assertEqual(list(space.layers), layers)
    self.assertEqual(dict(space.owners), owners)

  def test_a_chain_ties_what_a_missing_layer_would_join(self):
    space = space_lib.of(tiny_masks.seed(tiny_masks.PLAIN), 'both')
    self.assertEqual(
        dict(space.groups)['s1b0.out'], ('s1b0.out', 's1b1.out', 's1b2.out')
    )
    # From the second layer of a stage on only: the first one changes widths.
    wide = tiny_masks.full_size('plain3net', (3, 1, 1), widths=(16, 16, 16))
    groups = dict(space_lib.of(wide, 'both').groups)
    self.assertEqual(groups['stem'], ('stem',))
    self.assertEqual(groups['s0b0.out'], ('s0b0.out', 's0b1.out', 's0b2.out'))

  @parameterized.named_parameters(*NETWORKS)
  def test_every_axis_is_in_one_group(self, network, options):
    architecture = tiny_masks.seed(network, **options)
    for grow in ('channels', 'both'):
      groups = space_lib.of(architecture, grow).groups
      axes = [axis for _, members in groups for axis in members]
      self.assertCountEqual(
          axes, set(dict(architecture.sizes)) - {'image', 'classes'}
      )
      for name, members in groups:
        self.assertEqual(name, members[0])
        self.assertLen({architecture.size(axis) for axis in members}, 1)

  @parameterized.named_parameters(*NETWORKS)
  def test_density(self, network, options):
    """Invariants 7, 15: of all 1; of a sample; traced, with a gradient."""
    architecture = tiny_masks.seed(network, **options)
    space = space_lib.of(architecture, 'both')
    ones = masks.full(architecture, space, 1.0, 1.0, np.float32)
    for budget in space_lib.BUDGETS:
      density = lambda tree, budget=budget: space_lib.density(
          architecture, space, tree, budget
      )
      self.assertEqual(density(ones), 1)
      half = jax.tree.map(lambda leaf: 0.5 * leaf, ones)
      off = {**half, 'layers': {
          block: np.float32(block != tiny_masks.OFF) for block in space.layers
      }}
      without = architecture.without_block(tiny_masks.OFF)
      counts = {
          axis: architecture.size(axis) // 2
          for axis in dict(without.sizes) if axis not in ('image', 'classes')
      }
      cost = getattr(costs, budget)
      if all(size % 2 == 0 for axis, size in architecture.sizes
             if axis in counts):
        self.assertAlmostEqual(
            density(off), cost(without.resized(counts)) / cost(architecture),
            6,
        )
      slopes = jax.tree.leaves(jax.jit(jax.grad(density))(half))
      self.assertTrue(all(np.all(slope > 0) for slope in slopes))

  def test_known_networks(self):
    """Invariant 7: of the published sizes."""
    self.assertEqual(costs.params(tiny_masks.resnet20()), 269722)
    wide = tiny_masks.full_size('wrn28_10')
    self.assertEqual(costs.params(wide), 36489290)

  @parameterized.parameters(
      ((373, 315), 21_824_148, 13.36),
      ((310, 275), 20_650_240, 11.05),
  )
  def test_language_model(self, kept, params, percent):
    """Invariant 7: published widths as a sample; the embedding has no masks."""
    architecture = networks.get('lstm2').seed(
        (1, 1), input_shape=(1,), classes=10_000,
        options={'streams': 1, 'embedding': 1500},
    )
    self.check_sample(
        architecture,
        {
            name: np.arange(1500) < number
            for (name, _), number in zip(
                space_lib.of(architecture, 'channels').groups, kept,
                strict=True,
            )
        },
        params, percent,
    )

  def test_segmentation(self):
    """Invariant 7: with half of every group's channels."""
    architecture = networks.get('deeplab').seed(
        (1, 1, 2, 1), input_shape=(65, 65, 3), classes=21,
        options={'widths': (4, 4, 8, 8)},
    )
    self.check_sample(
        architecture,
        {
            name: np.arange(architecture.size(name))
            < architecture.size(name) / 2
            for name, _ in space_lib.of(architecture, 'channels').groups
        },
    )

  def check_sample(
      self, architecture, channels, params=None, percent=None
  ):
    """Costs by masks are those of what the last prune leaves."""
    method = sparsify.Sparsify()
    state, _ = dynamics.start(dynamics.Setting(method, architecture), 0)
    state = tiny_masks.masked(state, q={'channels': channels, 'layers': {}})
    pruned = method.conclude(architecture, state).target
    active = method.execution.active(architecture, state.stats['method'])
    self.assertEqual(
        costs.params(architecture, active.counts), costs.params(pruned)
    )
    self.assertEqual(
        costs.macs(architecture, active.counts), costs.macs(pruned)
    )
    seen = method.report(
        architecture, state.params['aux'], state.stats['method']
    )
    for budget in space_lib.BUDGETS:
      cost = getattr(costs, budget)
      self.assertAlmostEqual(
          seen[f'density_{budget}'], cost(pruned) / cost(architecture), 5
      )
    if params is not None:
      self.assertEqual(costs.params(pruned), params)
      self.assertAlmostEqual(100 * seen['density_macs'], percent, 2)

  def test_savings(self):
    """Invariants 28 and 29: by densities of samples, and as percent."""
    architecture = tiny_masks.resnet20()
    full = costs.macs(architecture)
    self.assertEqual(costs.savings(full, [full] * 7), 1)
    self.assertAlmostEqual(1 - 1 / costs.savings(full, [0.526 * full]), 0.474)
    self.assertEqual(f'{costs.savings(full, [0.526 * full]):.1f}', '1.9')
    method = sparsify.Sparsify(grow='both')
    state, _ = dynamics.start(dynamics.Setting(method, architecture), 0)
    spent = []
    for number in range(3):
      q, _ = tiny_masks.draw(state, number=number, off=('s1b1',))
      active = method.execution.active(
          architecture, {**state.stats['method'], 'q': q}
      )
      spent.append(costs.macs(architecture, active.counts, active.blocks))
      density = space_lib.density(
          architecture, space_lib.of(architecture, 'both'), q, 'macs'
      )
      self.assertAlmostEqual(
          costs.savings(full, [spent[-1]] * 5), 1 / density
      )
    self.assertLen(set(spent), 3)
    self.assertAlmostEqual(
        costs.savings(full, spent) * sum(spent), 3 * full, delta=1
    )


class MasksTest(parameterized.TestCase):

  def test_temperatures(self):
    """Invariants 11, 12."""
    t = {'a': np.array([0, 1, 9, 10])}
    np.testing.assert_allclose(
        masks.Annealing(100.0, 10).temperatures(t)['a'],
        [1, 100**0.1, 100**0.9, 100],
        rtol=1e-6,
    )

  def test_samples_have_their_probabilities(self):
    """Invariant 9, within three standard deviations."""
    p = {'channels': {'a': np.repeat([0.1, 0.5, 0.9], 20_000)}, 'layers': {}}
    q = masks.sample(jax.random.key(0), p)['channels']['a']
    self.assertEqual(q.dtype, bool)
    for mean, want in zip(q.reshape(3, -1).mean(1), (0.1, 0.5, 0.9)):
      self.assertLess(
          abs(mean - want), 3 * math.sqrt(want * (1 - want) / 20_000)
      )

  def test_samples_are_of_names(self):
    """Invariant 14: other groups do not shift a group's stream."""
    half = np.full(64, 0.5)
    draw = lambda key, *names: masks.sample(
        jax.random.key(key),
        {'channels': dict.fromkeys(names, half), 'layers': {}},
    )['channels']
    one = draw(1, 'a', 'b')
    np.testing.assert_array_equal(one['b'], draw(1, 'b')['b'])
    self.assertFalse(np.array_equal(one['a'], one['b']))
    self.assertFalse(np.array_equal(one['a'], draw(2, 'a')['a']))

  def test_no_group_is_empty(self):
    """Invariant 26."""
    s = {'channels': {'a': np.array([-3.0, -1.0, -2.0]), 'b': np.zeros(2)}}
    q = {
        'channels': {'a': np.zeros(3, bool), 'b': np.array([False, True])},
        'layers': {'c': np.array(False)},
    }
    got = masks.guarded(q, s)
    np.testing.assert_array_equal(got['channels']['a'], [False, True, False])
    np.testing.assert_array_equal(got['channels']['b'], [False, True])
    self.assertFalse(got['layers']['c'])
    self.assertFalse(q['channels']['a'].any())

  def test_ambiguous(self):
    p = {'channels': {'a': np.array([0.01, 0.06, 0.5, 0.94, 0.99])},
         'layers': {'b': np.array(0.5)}}
    self.assertAlmostEqual(masks.ambiguous(p), 4 / 6)

  def test_distances(self):
    for distance in (0.5, 3.0, 7.0):
      steps = masks.steps_to_zero(distance, 0.03)
      self.assertAlmostEqual(masks.distance_of(steps, 0.03), distance, 6)
    rate = masks.effective_rate(0.1, 0.9) * 0.025
    for distance, epochs in ((3, 2.7), (4, 6.4), (5, 16), (7, 114)):
      self.assertAlmostEqual(
          masks.steps_to_zero(distance, rate) / 391 / epochs, 1, delta=0.03
      )

  @parameterized.parameters(
      ('channels', 62560, 0.05), ('both', 62560, 0.5), ('both', 100, 0.3),
      ('layers', 500, 0.9), ('channels', 0, 0.2), ('both', 62560, 0.5, 4),
  )
  def test_start(self, grow, steps, target, accumulate=1):
    """As far as told, and never with most of the budget there at once."""
    method = sparsify.Sparsify(
        target_sparsity=1 - target, grow=grow,
        run=sparsify.Run(queries=10, steps=steps, accumulate=accumulate),
    )
    architecture = tiny_masks.resnet20()
    space = space_lib.of(architecture, grow)
    channel, layer = masks.start(architecture, space, method)
    rate = target * masks.effective_rate(0.1, 0.9)
    for distance, pressure in ((channel, 0.5), (layer, 0.1)):
      self.assertGreaterEqual(
          masks.steps_to_zero(distance, rate * pressure) + 1e-6,
          method.start * steps / accumulate,
      )
    s = method.extra(architecture).trainable
    p = jax.tree.map(lambda s: 1 / (1 + np.exp(-np.float64(s))), s)
    seed = method.least_density(architecture)
    self.assertLessEqual(
        space_lib.density(architecture, space, p, 'params'),
        max(target / 2, 1.01 * seed) + 1e-6,
    )

  def test_a_start_that_takes_its_part_of_the_updates(self):
    """To the step, where the penalty decides: with fewer of them, nearer."""
    method = sparsify.Sparsify(
        target_sparsity=0.5, run=sparsify.Run(queries=10, steps=62560)
    )
    architecture = tiny_masks.resnet20()
    space = space_lib.of(architecture, method.grow)
    rate = 0.5 * 0.5 * masks.effective_rate(0.1, 0.9)
    for accumulate in (1, 2, 4):
      run = dataclasses.replace(method.run, accumulate=accumulate)
      channel, _ = masks.start(
          architecture, space, dataclasses.replace(method, run=run)
      )
      self.assertAlmostEqual(
          accumulate * masks.steps_to_zero(channel, rate) / (0.035 * 62560), 1
      )

  def test_a_start_without_a_penalty(self):
    for changes in ({'lambda1': 0.0}, {'lambda2': 0.0},
                    {'mask': optimizers.AuxConfig(learning_rate=0.0)}):
      method = dataclasses.replace(tiny_masks.METHOD, **changes)
      s = method.extra(tiny_masks.resnet20()).trainable
      self.assertTrue(all(np.all(np.isfinite(x)) for x in jax.tree.leaves(s)))


class CountersTest(absltest.TestCase):

  def test_counters_add_up_samples(self):
    """Invariants 10, 11, 12, over several samples."""
    architecture = tiny_masks.seed(tiny_masks.BASIC)
    for temperature in ('structure', 'global'):
      method = dataclasses.replace(
          tiny_masks.METHOD, temperature=temperature, grow='channels'
      )
      state, _ = dynamics.start(
          dynamics.Setting(method, architecture, s_off=0.0), 0
      )
      total = jax.tree.map(np.zeros_like, state.stats['method']['t'])
      for number in range(4):
        state = state.replace(step=np.int32(number))
        change = tiny_masks.propose(method, architecture, state)
        state = dynamics.after(change, state)
        memory = state.stats['method']
        total = jax.tree.map(
            lambda t, q: t + (q if temperature == 'structure' else 1),
            total, memory['q'],
        )
        for name, t in total['channels'].items():
          np.testing.assert_array_equal(memory['t']['channels'][name], t)
          self.assertEqual(memory['t']['channels'][name].dtype, np.int32)
      counts = np.concatenate(list(total['channels'].values()))
      self.assertEqual(counts.max(), 4)
      self.assertEqual(
          counts.min() == 4, temperature == 'global', counts
      )


if __name__ == '__main__':
  absltest.main()
