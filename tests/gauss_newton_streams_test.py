"""Tests of splits and prunes of residual streams and of depthwise networks."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import tiny_morphisms as tiny
import tiny_networks
from autogrow_jax.methods.gauss_newton import estimates
from autogrow_jax.methods.gauss_newton import norms
from autogrow_jax.methods.gauss_newton import prunes
from autogrow_jax.methods.gauss_newton import removals
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.methods.gauss_newton import together

# Depths, widths, and all axes with the numbers of their writers and readers.
FAMILIES = {
    'basic3resnet': (
        (2, 1, 1),
        (3, 4, 4),
        {
            's0': (3, 4),
            's0b0.mid': (1, 1),
            's0b1.mid': (1, 1),
            's1b0.mid': (1, 1),
            's1': (2, 2),
            's2b0.mid': (1, 1),
            's2': (2, 1),
        },
    ),
    'bottleneck4resnet': (
        (1, 1, 1, 1),
        (2, 2, 2, 2),
        {
            'stem': (1, 2),
            **{
                f's{stage}b0.mid{number}': (1, 1)
                for stage in range(4)
                for number in (1, 2)
            },
            **{f's{stage}': (2, 2) for stage in range(3)},
            's3': (2, 1),
        },
    ),
    'wrn28_10': (
        (1, 2, 1),
        (3, 4, 4),
        {
            'stem': (1, 2),
            's0b0.mid': (1, 1),
            's0': (2, 2),
            's1b0.mid': (1, 1),
            's1': (3, 3),
            's1b1.mid': (1, 1),
            's2b0.mid': (1, 1),
            's2': (2, 1),
        },
    ),
    'mobilenet1': (
        (1, 1, 1, 1, 1),
        (3, 4, 3, 4, 3),
        {
            'stem': (1, 1),
            **{f's{stage}b0.out': (1, 1) for stage in range(5)},
        },
    ),
}


@functools.lru_cache(maxsize=None)
def network(family, tx='sgd'):
  """(architecture, state, model) with nonzero moments."""
  depths, widths, _ = FAMILIES[family]
  architecture = tiny_networks.seed(family, depths, widths=widths)
  if family == 'wrn28_10':
    architecture = architecture.resized({'stem': 3})
  state = tiny_networks.state(architecture, tiny_networks.OPTIMIZERS[tx])
  generator = np.random.default_rng(2)
  moments = jax.tree.map(
      lambda leaf: generator.uniform(1, 2, leaf.shape).astype(leaf.dtype)
      if leaf.ndim
      else leaf,
      state.opt_state,
  )
  state = state.replace(opt_state=moments)
  return architecture, state, signals.model_of(architecture)


@functools.partial(jax.jit, static_argnums=0)
def tapped(chain, trees, x):
  return taps.run(chain, trees.weights, trees.stats, x)


@functools.partial(jax.jit, static_argnums=0)
def signals_of(model, trees, x, labels):
  return signals.signals(
      model, trees, x, labels, jax.random.key(0), curvature='rank1'
  )


def logits(architecture, state, x, train=False):
  return tiny_networks.forward(architecture, state, x, train=train)[0]


class SitesTest(parameterized.TestCase):

  @parameterized.parameters(*FAMILIES)
  def test_all_axes_are_covered(self, family):
    architecture, _, model = network(family)
    found = {
        site.axis: (len(site.writers), len(site.readers))
        for site in model.sites
    }
    self.assertEqual(found, FAMILIES[family][2])
    self.assertEmpty(sites.survey(architecture).uncovered)

  def test_the_ends_of_a_stream(self):
    site = tiny.site_of(network('basic3resnet')[2], 's0')
    self.assertEqual(
        [writer.top for writer in site.writers],
        [('stem', 'norm'), ('s0b0', 'norm2'), ('s0b1', 'norm2')],
    )
    self.assertEqual(
        [reader.layer.path for reader in site.readers],
        [
            ('s0b0', 'conv1'),
            ('s0b1', 'conv1'),
            ('s1b0', 'conv1'),
            ('s1b0', 'shortcut_conv'),
        ],
    )
    self.assertEqual(site.readers[0].norm.path, ('s0b0', 'norm1'))
    self.assertEqual(site.incoming, 27 + 2 * 27)
    self.assertEqual(site.outgoing, 2 * 27 + 36 + 4)

  def test_norms_behind_sums_and_depthwise_layers_belong_to_no_writer(self):
    stream = tiny.site_of(network('wrn28_10')[2], 's1')
    self.assertEqual(
        [writer.top for writer in stream.writers],
        [('s1b0', 'conv2'), ('s1b0', 'shortcut_conv'), ('s1b1', 'conv2')],
    )
    self.assertEqual(
        [norm.path for norm in stream.norms],
        [('s1b1', 'norm1'), ('s2b0', 'norm1')],
    )
    depthwise = tiny.site_of(network('mobilenet1')[2], 's0b0.out')
    self.assertEqual(depthwise.writers[0].top, ('s0b0', 'norm2'))
    self.assertEqual(depthwise.readers[0].layer.path, ('s1b0', 'pointwise'))
    self.assertEqual(
        [norm.path for norm in depthwise.norms],
        [('s0b0', 'norm2'), ('s1b0', 'norm1')],
    )


class SplitTest(parameterized.TestCase):

  @parameterized.parameters('bottleneck4resnet', 'wrn28_10', 'mobilenet1')
  def test_without_u_nothing_changes(self, family):
    """Of all axes together, whatever e is."""
    architecture, state, model = network(family)
    learned = tiny.random_splits(model, tiny.trees_of(state), moving=False)
    units = {site.axis: np.array([1, 0]) for site in model.sites}
    change = surgery.morph(architecture, learned, units)
    grown = tiny.grow(state, change)
    for train in (False, True):
      np.testing.assert_allclose(
          logits(change.architecture, grown, tiny.batch()[0], train),
          logits(architecture, state, tiny.batch()[0], train),
          atol=3e-5,
      )
    for site in model.sites:  # The children do differ.
      for reader in site.readers:
        kernel = tiny.trees_of(grown).kernel(reader.layer)
        self.assertGreater(
            np.abs(kernel[..., 1, :] - kernel[..., site.units, :]).max(), 0.01
        )

  @parameterized.parameters(('wrn28_10', 's0'), ('mobilenet1', 's1b0.out'))
  def test_the_applied_change_is_the_predicted_one(self, family, axis):
    """Of axes whose readers change nothing that is written on them."""
    architecture, state, model = network(family)
    trees, (x, labels) = tiny.trees_of(state), tiny.batch()
    learned = tiny.random_splits(model, trees)
    signal = signals_of(model, trees, x, labels)[1][axis]
    site = tiny.site_of(model, axis)
    wants = jax.jit(tiny.output_changes, static_argnums=0)(
        site, trees, signal, learned[axis]
    )
    change = surgery.morph(
        architecture, learned, {axis: np.arange(site.units)}
    )
    after = tapped(
        tiny.chain_of(change.architecture),
        tiny.trees_of(tiny.grow(state, change)),
        x,
    )
    before = tapped(model.chain, trees, x)
    for reader, want in zip(site.readers, wants, strict=True):
      path = reader.layer.path
      np.testing.assert_allclose(
          after.outputs[path] - before.outputs[path], want, atol=5e-5
      )
      self.assertGreater(np.abs(want).max(), 0.01)

  def test_small_splits_of_a_stream_do_what_is_estimated(self):
    architecture, state, model = network('basic3resnet')
    trees, batches = tiny.trees_of(state), [tiny.batch(64)]
    key = jax.random.key(1)
    site = tiny.site_of(model, 's0')
    model = signals.Model(model.chain, (site,))
    u = tiny.random_splits(model, trees, scale=0.05)['s0'].u
    whole = {
        's0': splits.start(model, trees, key)['s0'].replace(u=u)
    }
    candidates = [('s0', unit) for unit in range(site.units)]
    quarter = estimates.scaled(whole, candidates, np.full(site.units, 0.25))
    found = estimates.estimate(model, trees, quarter, batches, key, samples=8)
    actual = []
    for _, unit in candidates:
      change = surgery.morph(architecture, quarter, {'s0': np.array([unit])})
      after = tiny.trees_of(tiny.grow(state, change))
      chain = tiny.chain_of(change.architecture)
      actual.append(estimates.mean_loss(chain, after, batches) - found.loss)
    predicted = found.changes()
    slope = predicted @ actual / (predicted @ predicted)
    self.assertAlmostEqual(slope, 1, delta=0.02)
    self.assertGreater(np.abs(actual).max(), 0.01)

  def test_settled_statistics_are_those_of_what_norms_read(self):
    """Also of the norm behind a depthwise layer."""
    architecture, state, model = network('mobilenet1')
    trees, (x, labels), axis = tiny.trees_of(state), tiny.batch(), 's1b0.out'
    site = tiny.site_of(model, axis)
    change = surgery.morph(
        architecture,
        tiny.random_splits(model, trees, scale=0.1),
        {axis: np.array([1])},
    )
    grown = tiny.trees_of(tiny.grow(state, change))
    chain = tiny.chain_of(change.architecture)
    settled = norms.settled(chain, grown, [(x, labels)])
    before, after = tapped(chain, grown, x), tapped(chain, settled, x)
    np.testing.assert_allclose(after.output, before.output, atol=1e-4)
    for norm in site.norms:
      read = np.asarray(after.inputs[norm.path])
      stats = signals.at(settled.stats, norm.path)
      np.testing.assert_allclose(
          stats['mean'], read.mean((0, 1, 2)), atol=1e-5
      )
      np.testing.assert_allclose(stats['var'], read.var((0, 1, 2)), rtol=1e-3)

  def test_a_one_sided_split_adds_a_channel_that_nothing_reads(self):
    architecture, state, model = network('basic3resnet')
    trees, axis = tiny.trees_of(state), 's0'
    site = tiny.site_of(model, axis)
    fresh = tiny.random_splits(model, trees)[axis].u
    kernels = lambda ends: [trees.kernel(end.layer) for end in ends]
    split = splits.Split(
        tuple(w - new for w, new in zip(kernels(site.writers), fresh)),
        tuple(map(np.zeros_like, kernels(site.readers))),
    )
    change = surgery.morph(
        architecture, {axis: split}, {axis: np.array([2])}, one_sided=True
    )
    grown = tiny.grow(state, change)
    x = tiny.batch()[0]
    np.testing.assert_allclose(
        logits(change.architecture, grown, x),
        logits(architecture, state, x),
        atol=1e-5,
    )
    for end, new in zip(site.writers, fresh, strict=True):
      before, after = (
          arrays.kernel(end.layer) for arrays in (trees, tiny.trees_of(grown))
      )
      np.testing.assert_array_equal(after[..., :3], before)
      np.testing.assert_allclose(after[..., 3], new[..., 2], atol=1e-6)
    for end in site.readers:
      after = tiny.trees_of(grown).kernel(end.layer)
      np.testing.assert_array_equal(after[..., 3, :], 0)

  def test_splits_and_a_prune_together(self):
    """All axes in one step: at their start, splits add nothing to a prune."""
    architecture, state, model = network('basic3resnet')
    trees, site = tiny.trees_of(state), tiny.site_of(model, 's1')
    generator = np.random.default_rng(4)
    readers = len(site.readers)
    removed = surgery.absorbed(
        model,
        trees,
        [
            removals.alone(
                's1', 1, generator.normal(size=(readers, site.units + 1))
            ),
        ],
    )

    def morphed(units):
      change = surgery.morph(
          architecture,
          tiny.random_splits(model, trees, moving=False),
          units,
          removed=removed,
      )
      grown = tiny.grow(state, change)
      return logits(change.architecture, grown, tiny.batch()[0])

    both = morphed({site.axis: np.array([0]) for site in model.sites})
    np.testing.assert_allclose(both, morphed({}), atol=3e-5)


class PruneTest(parameterized.TestCase):

  @parameterized.parameters(('basic3resnet', 's0'), ('mobilenet1', 'stem'))
  def test_a_twin_takes_over_at_every_reader(self, family, axis):
    architecture, state, _ = network(family)
    twins = tiny.grow(state, tiny_networks.split(architecture, axis, [1]))
    units = architecture.size(axis) + 1
    doubled = architecture.resized({axis: units})
    model, trees = signals.model_of(doubled), tiny.trees_of(twins)
    model = signals.Model(model.chain, (tiny.site_of(model, axis),))
    batches = [tiny.batch(32)]
    found = prunes.estimate(
        model, trees, batches, batches, jax.random.key(0),
        compensation='least_squares',
    )
    index = found.candidates.index((axis, 1))
    want = np.eye(units + 1)[units - 1] - np.eye(units + 1)[1]
    weights = found.weights[axis][1]
    self.assertLen(weights, len(model.sites[0].readers))
    np.testing.assert_allclose(
        weights, np.broadcast_to(want, weights.shape), atol=5e-3
    )
    self.assertAlmostEqual(found.changes[index], 0, delta=1e-3)
    back = surgery.morph(
        doubled, {}, {},
        removed=surgery.absorbed(model, trees, [found.alone(index)]),
    )
    self.assertEqual(back.architecture, architecture)
    x = tiny.batch()[0]
    np.testing.assert_allclose(
        logits(back.architecture, tiny.grow(twins, back), x),
        logits(architecture, state, x),
        atol=3e-3,
    )

  def test_several_are_removed_as_estimated(self):
    """The product of gradients with what the prunes do to z, at every reader.
    """
    architecture, state, model = network('wrn28_10')
    trees, (x, labels) = tiny.trees_of(state), tiny.batch()
    key = jax.random.key(0)
    model = signals.Model(model.chain, (tiny.site_of(model, 's0'),))
    batches = [(x, labels)]
    found = prunes.estimate(
        model, trees, batches, batches, key, compensation='least_squares',
        curvature='rank1',
    )
    left = found.remaining['s0']
    first = found.alone(found.candidates.index(('s0', 2)))
    second, _ = left.without(first).removal(0)
    joint = together.together(
        model,
        trees,
        splits.start(model, trees, key),
        [first, second],
        [(x, labels)],
        key,
        samples=1,
    )
    for number, removals in enumerate(([first], [first, second]), start=1):
      change = surgery.morph(
          architecture, {}, {},
          removed=surgery.absorbed(model, trees, removals),
      )
      before = tapped(model.chain, trees, x)
      after = tapped(
          tiny.chain_of(change.architecture),
          tiny.trees_of(tiny.grow(state, change)),
          x,
      )
      losses, by_axis = signals_of(model, trees, x, labels)
      slopes = by_axis['s0'].slope
      coefficient = signals.rank_one_coefficient(losses)
      s = 0
      for reader, slope in zip(model.sites[0].readers, slopes, strict=True):
        # A constant goes to the norm behind the reader, or else to its bias.
        factor = trees.factor(reader)[None, None, None]
        moved = after.outputs[reader.top] - before.outputs[reader.top]
        s = s + (slope * moved / factor).reshape(len(x), -1).sum(-1)
      np.testing.assert_allclose(
          joint.slopes[: number + 1].sum(), np.mean(s), rtol=1e-3, atol=1e-5
      )
      if number == 1:
        np.testing.assert_allclose(
            found.changes[found.candidates.index(('s0', 2))],
            np.mean(s) + np.mean(np.square(s) * coefficient) / 2,
            rtol=1e-3,
            atol=1e-5,
        )
    self.assertGreater(np.abs(joint.slopes[1:]).min(), 1e-3)


if __name__ == '__main__':
  absltest.main()
