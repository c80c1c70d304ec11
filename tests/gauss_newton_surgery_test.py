"""Tests of the application of learned splits."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import tiny_morphisms as tiny
import tiny_networks
from autogrow_jax.core import carry
from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import norms
from autogrow_jax.methods.gauss_newton import removals
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax import networks
from autogrow_jax import state as state_lib

SGD = tiny_networks.OPTIMIZERS['sgd']
FAMILIES = {
    'plain3net': {'widths': (3, 4, 4)},
    'basic3resnet': {'widths': (3, 4, 4)},
    'mlp': {'widths': (5, 4)},
}


@functools.lru_cache(maxsize=None)
def network(family, tx='sgd'):
  """(architecture, state with nonzero moments, model, arrays)."""
  depths = (1,) * len(FAMILIES[family]['widths'])
  architecture = tiny_networks.seed(family, depths, **FAMILIES[family])
  state = tiny_networks.state(architecture, tiny_networks.OPTIMIZERS[tx])
  generator = np.random.default_rng(2)
  moments = jax.tree.map(
      lambda leaf: generator.uniform(1, 2, leaf.shape).astype(leaf.dtype)
      if leaf.ndim
      else leaf,
      state.opt_state,
  )
  state = state.replace(opt_state=moments)
  model = signals.model_of(architecture)
  return architecture, state, model, tiny.trees_of(state)


def wide(tree):
  """With float64 in place of float32."""
  return jax.tree.map(
      lambda leaf: leaf.astype('f8') if leaf.dtype == np.float32 else leaf, tree
  )


def grow_wide(state, change):
  """As `grow`, which has float32 alone, in float64."""
  fresh = state_lib.create_state(
      change.architecture, SGD, key=jax.random.key(0)
  )
  state, fresh = (wide(one.replace(opt_state=())) for one in (state, fresh))
  carried, _ = carry.carry(change.change, change.table, state, fresh)
  return change.changed(carried)


class SplitTest(parameterized.TestCase):

  @parameterized.parameters(*FAMILIES)
  def test_the_applied_change_is_the_predicted_one(self, family):
    """Exactly what was predicted of z, without a Taylor expansion.

    The stream s0 is left out: what its first reader changes is written on it.
    """
    architecture, state, model, trees = network(family)
    x = tiny_networks.images()
    tapped = taps.run(model.chain, trees.weights, trees.stats, x)
    _, by_axis = jax.jit(
        signals.signals, static_argnums=0, static_argnames='curvature'
    )(
        model, trees, x, np.zeros(len(x), int), jax.random.key(0),
        curvature='rank1',
    )
    learned = tiny.random_splits(model, trees)
    for site in [site for site in model.sites if site.axis != 's0'][::2]:
      wants = jax.jit(tiny.output_changes, static_argnums=0)(
          site, trees, by_axis[site.axis], tiny.only(learned[site.axis], 1)
      )
      change = surgery.morph(
          architecture, learned, {site.axis: np.array([1])}
      )
      grown = tiny.trees_of(tiny.grow(state, change))
      after = taps.run(
          tiny.chain_of(change.architecture),
          grown.weights,
          grown.stats,
          x,
      )
      for reader, want in zip(site.readers, wants, strict=True):
        path = reader.layer.path
        np.testing.assert_allclose(
            after.outputs[path] - tapped.outputs[path], want, atol=3e-5
        )
        self.assertGreater(np.abs(want).max(), 0.01)

  @parameterized.product(family=tuple(FAMILIES), train=(False, True))
  def test_without_u_nothing_changes(self, family, train):
    """Whatever e is, also if neighbours grow together."""
    architecture, state, model, trees = network(family)
    learned = tiny.random_splits(model, trees, moving=False)
    units = {site.axis: np.array([2, 0]) for site in model.sites}
    change = surgery.morph(architecture, learned, units)
    grown = tiny.grow(state, change)
    x = tiny_networks.images()
    before, _ = tiny_networks.forward(architecture, state, x, train=train)
    after, _ = tiny_networks.forward(
        change.architecture, grown, x, train=train
    )
    np.testing.assert_allclose(after, before, atol=2e-5)
    with jax.enable_x64(True):
      exact = [
          tiny_networks.forward(
              of, wide(trees), x.astype('f8'), train=train
          )[0]
          for of, trees in (
              (architecture, state),
              (change.architecture, grow_wide(state, change)),
          )
      ]
    np.testing.assert_allclose(*exact, atol=1e-12)
    for site in model.sites:  # The children do differ.
      for reader in site.readers:
        kernel = tiny.trees_of(grown).kernel(reader.layer)
        self.assertGreater(
            np.abs(kernel[..., 2, :] - kernel[..., site.units, :]).max(), 0.01
        )

  @parameterized.parameters(('mlp', 1), ('plain3net', 2))
  def test_neighbours_cost_their_product_on_top(self, family, vectors):
    """Of p and q more units, with a bias, or the scale and bias of a norm."""
    architecture, _, model, trees = network(family)
    *_, a, b = model.sites
    self.assertEqual(a.readers[0].layer, b.writers[0].layer)
    p, q = 2, 3
    change = surgery.morph(
        architecture,
        tiny.random_splits(model, trees),
        {a.axis: np.arange(p), b.axis: np.arange(q)},
    )
    self.assertEqual(
        costs.params(change.architecture) - costs.params(architecture),
        p * (a.incoming + a.outgoing + vectors)
        + q * (b.incoming + b.outgoing + vectors)
        + p * q * b.incoming // a.units,
    )

  def test_neighbours_are_as_if_split_from_last_to_first(self):
    architecture, state, model, trees = network('plain3net')
    learned = tiny.random_splits(model, trees)
    first, second = 's0b0.out', 's1b0.out'
    change = surgery.morph(
        architecture, learned, {first: np.array([1]), second: np.array([0, 3])}
    )
    grown = tiny.grow(state, change)

    def split_by_hand(kernel, unit, u):
      plus, minus = kernel.copy(), kernel[..., unit : unit + 1] - u[..., None]
      plus[..., unit] += u
      return np.concatenate([plus, minus], -1)

    kernel = trees.weights['s1b0']['conv']['kernel']
    for unit in (0, 3):
      kernel = split_by_hand(kernel, unit, learned[second].u[0][..., unit])
    e = learned[first].e[0][..., 1, :][..., [0, 1, 2, 3, 0, 3]]
    half = kernel[..., 1, :] / 2
    kernel = np.concatenate([kernel, (half - e)[..., None, :]], -2)
    kernel[..., 1, :] = half + e
    got = grown.params['weights']['s1b0']['conv']['kernel']
    np.testing.assert_allclose(got, kernel, atol=1e-6)
    for leaf in ('scale', 'bias'):
      norm = trees.weights['s1b0']['norm'][leaf]
      np.testing.assert_array_equal(
          grown.params['weights']['s1b0']['norm'][leaf],
          norm[[0, 1, 2, 3, 0, 3]],
      )

  @parameterized.parameters('sgd', 'adamw')
  def test_moments_are_reset(self, name):
    architecture, state, model, trees = network('mlp', name)
    learned = tiny.random_splits(model, trees)
    change = surgery.morph(architecture, learned, {'s0b0.out': np.array([1])})
    before = tiny_networks.leaves(state.opt_state)
    grown, _ = state_lib.grow(
        state, change.change, tiny_networks.OPTIMIZERS[name],
        key=jax.random.key(0),
    )
    for path, leaf in tiny_networks.leaves(grown.opt_state).items():
      stays = path.endswith('learning_rate')
      want = before[path] if stays else np.zeros_like(leaf)
      np.testing.assert_array_equal(leaf, want, err_msg=path)

  def test_bad_input(self):
    architecture, _, model, trees = network('basic3resnet')
    learned = tiny.random_splits(model, trees)
    with self.assertRaisesRegex(ValueError, r"\['image'\] .* cannot be split"):
      surgery.morph(architecture, learned, {'image': np.array([0])})
    with self.assertRaisesRegex(ValueError, 'from 0 to 2, got .7'):
      surgery.morph(architecture, learned, {'s0b0.mid': np.array([7])})


@functools.lru_cache(maxsize=None)
def grown():
  """(architecture, state) after splits and prunes of norms' axes."""
  architecture, state, model, trees = network('plain3net')
  generator = np.random.default_rng(6)
  removed = surgery.absorbed(
      model,
      trees,
      [
          removals.alone('s1b0.out', unit, generator.normal(size=(1, 5)) / 5)
          for unit in (0, 2)
      ],
  )
  units = {'s0b0.out': np.array([1]), 's1b0.out': np.array([3])}
  change = surgery.morph(
      architecture, tiny.random_splits(model, trees), units, removed=removed
  )
  return change.architecture, tiny.grow(state, change)


class NormsTest(absltest.TestCase):

  def test_settled_norms_are_exact_in_both_modes(self):
    """Norms as they were copied only are in evaluation mode."""
    architecture, copied = grown()
    chain = tiny.chain_of(architecture)
    x = tiny_networks.images(12)
    trees = norms.settled(
        chain, tiny.trees_of(copied), [(x[:6], range(6)), (x[6:], range(6))]
    )
    settled = copied.replace(
        params={**copied.params, 'weights': trees.weights},
        stats={**copied.stats, 'network': trees.stats},
    )
    logits = {
        (rule, train): tiny_networks.forward(
            architecture, state, x, train=train
        )[0]
        for rule, state in (('copied', copied), ('settled', settled))
        for train in (False, True)
    }
    np.testing.assert_allclose(
        logits['settled', False], logits['copied', False], atol=1e-5
    )
    np.testing.assert_allclose(
        logits['settled', True], logits['settled', False], atol=1e-4
    )
    self.assertGreater(
        np.abs(logits['copied', True] - logits['copied', False]).max(), 0.1
    )

  def test_leaves_other_statistics_alone(self):
    """A shortcut without parameters keeps its matrix among the statistics."""
    architecture = networks.get('basic3resnet').seed(
        (1, 1, 1), input_shape=(8, 8, 3), classes=3,
        options={'widths': (3, 4, 4), 'shortcut': 'A'},
    )
    state = tiny_networks.state(architecture)
    chain = tiny.chain_of(architecture)
    x = tiny_networks.images(6)
    batches = [(x[:3], range(3)), (x[3:], range(3))]
    for function in (norms.measured, norms.settled):
      trees = function(chain, tiny.trees_of(state), batches)
      got = tiny_networks.leaves(trees.stats)
      stats = tiny_networks.leaves(tiny.trees_of(state).stats)
      for path, leaf in stats.items():
        self.assertTrue(np.isfinite(got[path]).all(), path)
        if path.endswith('select'):
          np.testing.assert_array_equal(got[path], leaf)
      self.assertTrue(any(path.endswith('select') for path in got))

  def test_settled_statistics_are_true(self):
    architecture, copied = grown()
    chain = tiny.chain_of(architecture)
    x = tiny_networks.images(12)
    trees = norms.settled(chain, tiny.trees_of(copied), [(x, range(12))])
    inputs = taps.run(chain, trees.weights, trees.stats, x).inputs
    for part in ('s0b0', 's1b0', 's2b0'):
      read = np.asarray(inputs[part, 'norm'])
      stats = trees.stats[part]['norm']
      np.testing.assert_allclose(
          stats['mean'], read.mean((0, 1, 2)), atol=1e-5
      )
      np.testing.assert_allclose(stats['var'], read.var((0, 1, 2)), rtol=1e-4)

  def test_measured_statistics_are_those_of_training(self):
    """Of each batch by itself, pooled; weights stay."""
    architecture, state = grown()
    chain = tiny.chain_of(architecture)
    x = tiny_networks.images(12)
    halves = x[:6], x[6:]
    trees = norms.measured(
        chain, tiny.trees_of(state), [(half, range(6)) for half in halves]
    )
    tiny_networks.assert_same(trees.weights, state.params['weights'])
    old = state.stats['network']
    new = []
    for half in halves:
      moved = tiny_networks.forward(architecture, state, half, train=True)[1]
      new.append(
          jax.tree.map(lambda to, was: (to - 0.9 * was) / 0.1, moved, old)
      )
    for part in ('s0b0', 's1b0', 's2b0'):
      first, second = (stats[part]['norm'] for stats in new)
      got = trees.stats[part]['norm']
      means = np.stack([first['mean'], second['mean']])
      np.testing.assert_allclose(got['mean'], means.mean(0), atol=1e-4)
      np.testing.assert_allclose(
          got['var'],
          (first['var'] + second['var']) / 2 + means.var(0),
          rtol=1e-3,
      )

  def test_nothing_to_measure_without_norms(self):
    _, _, model, trees = network('mlp')
    data = [(tiny_networks.images(), range(6))]
    for function in (norms.measured, norms.settled):
      tiny_networks.assert_same(function(model.chain, trees, data), trees)


if __name__ == '__main__':
  absltest.main()
