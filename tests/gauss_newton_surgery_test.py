"""Tests of the application of learned splits."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import tiny_networks
from autogrow_jax import growth
from autogrow_jax import networks
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.networks import taps

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
  model = signals.model_of(
      sites.survey(architecture), taps.chain_of(networks.parts(architecture))
  )
  return architecture, state, model, trees_of(state)


def trees_of(state):
  return signals.Trees(state.params['weights'], state.stats['network'])


def random_splits(model, trees, scale=0.3, still=False):
  generator = np.random.default_rng(1)
  draw = lambda leaf: (scale * generator.normal(size=leaf.shape)).astype('f4')
  return {
      site.axis: splits.Split(
          (0 if still else 1) * draw(trees.kernel(site.writer)),
          draw(trees.kernel(site.reader)),
      )
      for site in model.sites
  }


def grow(state, change, tx=SGD):
  return growth.grow(state, change, tx, key=jax.random.key(0))[0]


def only(split, unit):
  """The split of one unit alone."""
  u, e = np.zeros_like(split.u), np.zeros_like(split.e)
  u[..., unit], e[..., unit, :] = split.u[..., unit], split.e[..., unit, :]
  return splits.Split(u, e)


class SplitTest(parameterized.TestCase):

  @parameterized.parameters(*FAMILIES)
  def test_the_applied_change_is_the_predicted_one(self, family):
    """Exactly what was predicted of z, without a Taylor expansion."""
    architecture, state, model, trees = network(family)
    x = tiny_networks.images()
    tapped = taps.run(model.chain, trees.weights, trees.stats, x)
    learned = random_splits(model, trees)
    for site in model.sites[::2]:
      signal = signals.Signal(
          entered=tapped.entered[site.writer.path[0]],
          x=tapped.inputs[site.writer.path],
          h=tapped.outputs[site.top],
          slope=None,
          curvature=None,
      )
      want = jax.jit(splits.output_change, static_argnums=0)(
          site, trees, signal, only(learned[site.axis], 1)
      )
      change = surgery.morph(
          architecture, learned, {site.axis: np.array([1])}
      )
      grown = trees_of(grow(state, change))
      after = taps.run(
          taps.chain_of(networks.parts(change.architecture)),
          grown.weights,
          grown.stats,
          x,
      )
      path = site.reader.path
      np.testing.assert_allclose(
          after.outputs[path] - tapped.outputs[path], want, atol=3e-5
      )
      self.assertGreater(np.abs(want).max(), 0.01)

  @parameterized.product(family=tuple(FAMILIES), train=(False, True))
  def test_without_u_nothing_changes(self, family, train):
    """Whatever e is, also if neighbours grow together."""
    architecture, state, model, trees = network(family)
    learned = random_splits(model, trees, still=True)
    units = {site.axis: np.array([2, 0]) for site in model.sites}
    change = surgery.morph(architecture, learned, units)
    grown = grow(state, change)
    x = tiny_networks.images()
    before, _ = tiny_networks.forward(architecture, state, x, train=train)
    after, _ = tiny_networks.forward(
        change.architecture, grown, x, train=train
    )
    np.testing.assert_allclose(after, before, atol=2e-5)
    for site in model.sites:  # The children do differ.
      kernel = trees_of(grown).kernel(
          {s.axis: s for s in sites.survey(change.architecture).sites}[
              site.axis
          ].reader
      )
      self.assertGreater(
          np.abs(kernel[..., 2, :] - kernel[..., site.units, :]).max(), 0.01
      )

  def test_neighbours_are_as_if_split_from_last_to_first(self):
    architecture, state, model, trees = network('plain3net')
    learned = random_splits(model, trees)
    first, second = 's0b0.out', 's1b0.out'
    change = surgery.morph(
        architecture, learned, {first: np.array([1]), second: np.array([0, 3])}
    )
    grown = grow(state, change)

    def split_by_hand(kernel, unit, u):
      plus, minus = kernel.copy(), kernel[..., unit : unit + 1] - u[..., None]
      plus[..., unit] += u
      return np.concatenate([plus, minus], -1)

    kernel = trees.weights['s1b0']['conv']['kernel']
    for unit in (0, 3):
      kernel = split_by_hand(kernel, unit, learned[second].u[..., unit])
    e = learned[first].e[..., 1, :][..., [0, 1, 2, 3, 0, 3]]
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

  def test_own_norms_are_exact_in_both_modes(self):
    """With running statistics equal to the batch's, there are no two modes."""
    architecture, state, model, _ = network('plain3net')
    x = tiny_networks.images()
    _, moved = tiny_networks.forward(architecture, state, x, train=True)
    old = state.stats['network']
    batch = jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.1, moved, old)
    state = state.replace(stats={**state.stats, 'network': batch})
    learned = random_splits(model, trees_of(state))
    units = {'s2b0.out': np.array([1, 2])}  # No norm comes after it.
    statistics = surgery.child_statistics(
        model, trees_of(state), learned, [(x, np.zeros(len(x)))]
    )
    logits = {}
    for rule, given in (('copied', None), ('own', statistics)):
      change = surgery.morph(architecture, learned, units, statistics=given)
      grown = grow(state, change)
      for train in (False, True):
        logits[rule, train], _ = tiny_networks.forward(
            change.architecture, grown, x, train=train
        )
    before, _ = tiny_networks.forward(architecture, state, x, train=False)
    np.testing.assert_allclose(
        logits['own', False], logits['copied', False], atol=2e-4
    )
    np.testing.assert_allclose(
        logits['own', True], logits['own', False], atol=2e-4
    )
    self.assertGreater(
        np.abs(logits['copied', True] - logits['copied', False]).max(), 2e-3
    )
    self.assertGreater(np.abs(logits['own', False] - before).max(), 2e-3)

  @parameterized.parameters('sgd', 'adamw')
  def test_optimizer_state(self, name):
    architecture, state, model, trees = network('mlp', name)
    learned = random_splits(model, trees)
    units = {'s0b0.out': np.array([1])}
    tx = tiny_networks.OPTIMIZERS[name]
    before = tiny_networks.leaves(state.opt_state)
    after = {
        kind: tiny_networks.leaves(
            grow(
                state,
                surgery.morph(
                    architecture, learned, units, optimizer_state=kind
                ),
                tx,
            ).opt_state
        )
        for kind in surgery.OPTIMIZER_STATES
    }
    kernels = [path for path in before if path.endswith('s0b0/dense/kernel')]
    self.assertLen(kernels, {'sgd': 1, 'adamw': 2}[name])
    for path in kernels:
      factor = 0.25 if 'nu' in path.split('/') else 0.5
      want = before[path][..., [0, 1, 2, 3, 4, 1]]
      want = want * np.where(np.isin(np.arange(6), (1, 5)), factor, 1)
      np.testing.assert_allclose(after['carry'][path], want, rtol=1e-6)
      reader = path.replace('s0b0', 's1b0')
      np.testing.assert_array_equal(
          after['carry'][reader], before[reader][[0, 1, 2, 3, 4, 1]]
      )
      np.testing.assert_array_equal(after['reset'][path], 0)
    for path, leaf in after['reset'].items():
      if path.endswith('learning_rate'):
        np.testing.assert_array_equal(leaf, before[path])
      else:
        np.testing.assert_array_equal(leaf, 0, err_msg=path)

  def test_bad_input(self):
    architecture, _, model, trees = network('basic3resnet')
    learned = random_splits(model, trees)
    with self.assertRaisesRegex(ValueError, r"\['s0'\] .* cannot be split"):
      surgery.morph(architecture, learned, {'s0': np.array([0])})
    with self.assertRaisesRegex(ValueError, 'one of reset, carry, got .*keep'):
      surgery.morph(architecture, learned, {}, optimizer_state='keep')
    with self.assertRaisesRegex(ValueError, 'from 0 to 2, got .7'):
      surgery.morph(architecture, learned, {'s0b0.mid': np.array([7])})


if __name__ == '__main__':
  absltest.main()
