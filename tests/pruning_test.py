"""Tests of the criteria by which rivals prune a dense network."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import tiny_masks
import tiny_networks

from autogrow_jax import costs
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.methods import base
from experiments.studies.sparsify import pruning

SGD = tiny_networks.OPTIMIZERS['sgd']
COSTS = {'params': costs.params, 'macs': costs.macs}
FIRST, SECOND = 's0b0.out', 's1b0.out'  # Groups of a perceptron.


def perceptron(first, second):
  """A perceptron of two layers."""
  return tiny_networks.seed('mlp', (1, 1), widths=(first, second))


def normalised(first, second):
  """Two convolutions, each with a norm behind it."""
  return tiny_masks.VGG.seed(
      (1, 1),
      input_shape=tiny_networks.IMAGE,
      classes=tiny_networks.CLASSES,
      options={'widths': (first, second)},
  )


def written(architecture, kernels, scales=None):
  """A state in which filters have given norms, and norms given scales.

  Args:
    architecture: of a perceptron, or normalised.
    kernels: per group, one or more weights of each channel's filter.
    scales: per group, of each channel.

  Returns:
    The state.
  """
  state = tiny_networks.state(architecture)
  weights = jax.tree.map(np.copy, state.params['weights'])
  for group, rows in kernels.items():
    layers = weights[group[:4]]
    kernel = layers['conv' if 'conv' in layers else 'dense']['kernel']
    kernel[...] = 0
    flat = kernel.reshape(-1, kernel.shape[-1])
    for unit, values in enumerate(rows):
      flat[: len(values), unit] = values
  for group, values in (scales or {}).items():
    weights[group[:4]]['norm']['scale'][:] = values
  return state.replace(params={**state.params, 'weights': weights})


def sparsity(architecture, first, second):
  """What is saved by some widths of a perceptron."""
  sizes = {FIRST: first, SECOND: second}
  return 1 - costs.params(architecture, sizes) / costs.params(architecture)


def kept(strategy, state, architecture, widths, **changes):
  """What a strategy keeps if widths of the same cost would do."""
  method = pruning.Pruned(
      strategy, sparsity(architecture, *widths), **changes
  )
  channels = method.kept(architecture, state.params['weights'])
  return channels[FIRST].tolist(), channels[SECOND].tolist()


class CriteriaTest(parameterized.TestCase):

  # L1 norms 7, 6, 4.5; L2 norms 5, 6, 4.5.
  @parameterized.parameters(
      ('l1', [0, 1]), ('uniform', [0, 1]), ('soft', [1]), ('morphnet', [2])
  )
  def test_norms_by_hand(self, strategy, best):
    architecture = normalised(3, 2)
    state = written(
        architecture,
        {FIRST: [(3, -4), (6,), (0, 0, 4.5)], SECOND: [(1,), (1,)]},
        {FIRST: (0.5, 0.1, -2), SECOND: (1, 1)},
    )
    method = pruning.Pruned(strategy)
    scores = method.scores(architecture, state.params['weights'])
    want = {
        'l1': (7, 6, 4.5),
        'uniform': (7, 6, 4.5),
        'soft': (5, 6, 4.5),
        'morphnet': (0.5, 0.1, 2),
    }[strategy]
    np.testing.assert_allclose(scores[FIRST], want, rtol=1e-6)
    widths = len(best), 2
    got, _ = kept(strategy, state, architecture, widths)
    self.assertEqual(got, best)

  def test_streams_sum_over_their_writers(self):
    architecture = tiny_networks.seed('basic3resnet')
    weights = tiny_networks.state(architecture).params['weights']
    square = lambda part, layer: np.sqrt(
        np.square(weights[part][layer]['kernel']).sum((0, 1, 2))
    )
    scores = pruning.Pruned('soft').scores(architecture, weights)
    np.testing.assert_allclose(
        scores['s1'],
        square('s1b0', 'conv2')
        + square('s1b0', 'shortcut_conv')
        + square('s1b1', 'conv2'),
        rtol=1e-6,
    )
    np.testing.assert_allclose(scores['s1b1.mid'], square('s1b1', 'conv1'))

  def test_l1_compares_layers_and_uniform_does_not(self):
    architecture = perceptron(5, 2)
    state = written(architecture, {
        FIRST: [(4,), (1,), (1.2,), (1.1,), (0.9,)], SECOND: [(0.3,), (0.4,)]
    })
    # In units of the means 2.4, .6, .7, .7, .5 and .9, 1.1.
    self.assertEqual(kept('l1', state, architecture, (1, 2)), ([0], [0, 1]))
    # .3, .5, .7, .9 of the first, in that order, and .75 of the second.
    for widths, want in (
        ((2, 1), ([0, 2], [1])),
        ((4, 1), ([0, 1, 2, 3], [1])),
        ((4, 2), ([0, 1, 2, 3], [0, 1])),
    ):
      self.assertEqual(kept('uniform', state, architecture, widths), want)

  def test_morphnet_multiplies_what_is_left(self):
    architecture = normalised(4, 2)
    state = written(
        architecture, {}, {FIRST: (1, 0.01, -0.5, 0.02), SECOND: (1, -1)}
    )
    # 2 and 2 are left: half as much again, one of them new.
    got = kept('morphnet', state, architecture, (3, 3), threshold=0.1)
    self.assertEqual(got, ([0, 2, 3], [0, 1, axes_lib.NEW]))
    # With 3 left of the first, its widths are 3/2 of the other's.
    got = kept('morphnet', state, architecture, (3, 2), threshold=0.015)
    self.assertEqual(got, ([0, 2, 3], [0, 1]))
    # Nothing is left: as if one were.
    got = kept('morphnet', state, architecture, (1, 1), threshold=9.0)
    self.assertEqual(got, ([0], [0]))

  def test_morphnet_where_some_channels_have_no_norm(self):
    architecture = tiny_networks.seed(
        'vgg16', widths=(*tiny_networks.WIDTHS, 7)
    )
    state = tiny_networks.state(architecture)
    method = pruning.Pruned('morphnet', threshold=0.8)
    left = method.left(architecture, state.params['weights'])
    self.assertEqual(left['head.hidden'], 7)
    self.assertLess(left['s4b0.out'], 8)
    method.extra(architecture)
    with self.assertRaisesRegex(ValueError, 'no norms.*another strategy'):
      method.extra(perceptron(4, 2))


class BudgetTest(parameterized.TestCase):

  @parameterized.parameters(*tiny_networks.VARIANTS)
  def test_is_met_as_nearly_as_channels_allow(self, family, options):
    architecture = tiny_networks.seed(family, **options)
    weights = tiny_networks.state(architecture).params['weights']
    for strategy in pruning.STRATEGIES:
      for budget, cost in COSTS.items():
        with self.subTest(strategy=strategy, budget=budget):
          method = pruning.Pruned(strategy, 0.6, budget, threshold=0.8)
          widths = {
              name: len(units)
              for name, units in method.kept(architecture, weights).items()
          }
          more = [
              cost(architecture, {**widths, name: width + 1})
              for name, width in widths.items()
          ]
          full, got = cost(architecture), cost(architecture, widths)
          self.assertLess(abs(got / full - 0.4), (max(more) - got) / full)

  def test_marginal_costs_by_hand(self):
    architecture = perceptron(4, 2)
    total = 192 * 4 + 4 + 4 * 2 + 2 + 2 * 5 + 5
    got = pruning.marginal_costs(architecture, 'params')
    self.assertAlmostEqual(got[FIRST], (192 + 1 + 2) / total)
    self.assertAlmostEqual(got[SECOND], (4 + 1 + 5) / total)

  def test_no_group_is_ever_empty(self):
    architecture = tiny_networks.seed('basic3resnet')
    state = tiny_networks.state(architecture)
    for strategy in pruning.STRATEGIES:
      method = pruning.Pruned(strategy, 0.999)
      pruned = method.conclude(architecture, state).target
      sizes = dict(pruned.sizes)
      for axis in ('image', 'classes'):
        self.assertEqual(sizes.pop(axis), architecture.size(axis))
      self.assertEqual(set(sizes.values()), {1})
      self.assertAlmostEqual(
          method.least_density(architecture),
          costs.params(pruned) / costs.params(architecture),
      )

  @parameterized.parameters(
      ({'strategy': 'l2'}, 'strategy is one of l1, uniform'),
      ({'budget': 'bytes'}, 'budget is one of params, macs'),
      ({'target_sparsity': 1.0}, 'target_sparsity .* below 1, got 1.0'),
      ({'penalty': -1.0}, 'penalty is .* at least 0'),
      ({'threshold': float('nan')}, 'threshold is .* at least 0'),
  )
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      pruning.Pruned(**arguments)


class SoftTest(absltest.TestCase):

  def test_zeroed_filters_may_recover(self):
    architecture = perceptron(4, 2)
    state = written(
        architecture, {FIRST: [(4,), (1,), (2,), (3,)], SECOND: [(2,), (1,)]}
    )
    method = pruning.Pruned('soft', sparsity(architecture, 2, 1))
    state = state.replace(
        stats={**state.stats, 'method': method.extra(architecture).other}
    )
    change = tiny_masks.propose(method, architecture, state)
    self.assertEqual(change.target, architecture)
    after, report = tiny_masks.grow(state, change, method, SGD)
    self.assertEqual(report, {'zeroed': {FIRST: 2, SECOND: 1}})
    old, new = state.params['weights'], after.params['weights']
    got = new['s0b0']['dense']['kernel']
    np.testing.assert_array_equal(
        got, old['s0b0']['dense']['kernel'] * np.array([1, 0, 0, 1], 'f4')
    )
    got[0, 0, 0, 1] = 5  # As training may do.
    self.assertEqual(
        method.kept(architecture, new)[FIRST].tolist(), [0, 1]
    )
    got[0, 0, 0, 1] = 0
    for tree in (old, new):
      del tree['s0b0']['dense']['kernel'], tree['s1b0']['dense']['kernel']
    tiny_networks.assert_same(new, old)  # Nothing else has changed.
    tiny_networks.assert_same(after.opt_state, state.opt_state)

  def test_only_soft_does_anything_before_the_end(self):
    architecture = normalised(4, 2)
    for strategy in pruning.STRATEGIES:
      method = pruning.Pruned(strategy)
      state = tiny_networks.state(architecture, extra=method.extra)
      propose = functools.partial(
          tiny_masks.propose, method, architecture, state
      )
      self.assertIsNone(propose(decision=policies.KEEP))
      if strategy != 'soft':
        self.assertIsNone(propose())


class PenaltyTest(absltest.TestCase):

  def test_gradient(self):
    """On scales, in proportion to marginal costs; also where blocks are fused.
    """
    architecture = tiny_masks.seed(tiny_masks.PLAIN, 4)
    state = tiny_networks.state(architecture)
    layout = view.layout(architecture)
    self.assertIn(3, [segment.length for segment in layout.bucket])
    packed = view.pack((state.params, state.stats), layout)
    network = base.Network(view.Plain(), layout, tiny_networks.images())
    labels = np.arange(6) % tiny_networks.CLASSES

    @functools.partial(jax.jit, compiler_options=tiny_networks.FAST_COMPILE)
    def losses(params, is_open):
      stats = {**packed[1], 'method': {'open': is_open}}
      return [
          jax.value_and_grad(
              lambda params, method=method: method.objective(
                  network, params, stats, labels, None
              )[0]
          )(params)
          for method in (
              base.FixedArchitecture(), pruning.Pruned('morphnet', penalty=3.0)
          )
      ]

    marginal = pruning.marginal_costs(architecture, 'params')
    for is_open in (1.0, 0.0):
      (plain_loss, plain), (loss, got) = losses(packed[0], np.float32(is_open))
      self.assertAlmostEqual(loss, plain_loss, places=6)
      got = view.unpack(jax.tree.map(np.subtract, got, plain), layout)
      for path, leaf in tiny_networks.leaves(got['weights']).items():
        part, layer, name = path.split('/')
        want = 0.0
        if name == 'scale':
          sign = np.sign(state.params['weights'][part][layer][name])
          group = 'stem' if part == 'stem' else f'{part}.out'
          want = is_open * 3.0 * marginal[group] * sign
        np.testing.assert_allclose(leaf, want + 0 * leaf, atol=1e-5)


class FunctionTest(parameterized.TestCase):

  @parameterized.parameters('A', 'B')
  def test_channels_that_nothing_reads_go_unnoticed(self, shortcut):
    architecture = tiny_networks.seed('basic3resnet', shortcut=shortcut)
    half = {
        axis: size // 2
        for axis, size in architecture.sizes
        if axis not in ('image', 'classes')
    }
    method = pruning.Pruned(
        'uniform', 1 - costs.params(architecture, half) / costs.params(
            architecture
        )
    )
    state = tiny_networks.state(architecture, extra=method.extra)
    table = state_lib.axis_table(architecture)
    stays = {
        axis: (np.arange(architecture.size(axis)) % 2).astype('f4')
        for axis in half
    }
    tree = {
        'weights': axes_lib.scale_filters(
            state.params, table, {a: 1e-3 + on for a, on in stays.items()}
        )['weights'],
        'network': state.stats['network'],
    }
    tree = axes_lib.scale_readers(tree, table, stays)
    state = state.replace(
        params={**state.params, 'weights': tree['weights']},
        stats={**state.stats, 'network': tree['network']},
    )
    change = method.conclude(architecture, state)
    for axis, source in change.sources.items():
      np.testing.assert_array_equal(source, np.flatnonzero(stays[axis]))
    pruned, _ = tiny_masks.grow(state, change, method, SGD)
    self.assertEqual(pruned.stats['method']['open'], 0)
    for is_training in (False, True):
      before, _ = tiny_networks.forward(
          architecture, state, tiny_networks.images(), train=is_training
      )
      after, _ = tiny_networks.forward(
          change.target, pruned, tiny_networks.images(),
          train=is_training,
      )
      np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


if __name__ == '__main__':
  absltest.main()
