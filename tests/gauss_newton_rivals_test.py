"""Tests of rival ways to split, and of the true loss after splits."""

import dataclasses
import functools
import json
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

import tiny_morphisms as tiny
import tiny_networks
from autogrow_jax import costs
from autogrow_jax import tasks
from autogrow_jax.methods.gauss_newton import estimates
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.run import config as config_lib
from experiments.studies.gauss_newton import rivals
from experiments.studies.gauss_newton import steepest
from experiments.studies.gauss_newton import trials

OPTIONS = {
    'plain3net': {'widths': (3, 4, 4)},
    'basic3resnet': {'widths': (3, 4, 4)},
    'mlp': {'widths': (5, 4)},
    'vgg16': {'widths': (3, 3, 3, 3, 3)},
    'mobilenet1': {'widths': (4, 4, 4, 4, 4)},
}
EXAMPLES = 12


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny network with data."""

  architecture: object
  state: object
  model: signals.Model
  trees: signals.Trees
  batches: tuple

  @property
  def site(self):
    return {site.axis: site for site in self.model.sites}

  @property
  def network(self):
    return self.architecture, self.model, self.trees

  def only(self, *axes):
    """The case with some of its sites."""
    chosen = tuple(self.site[axis] for axis in axes)
    return dataclasses.replace(
        self, model=dataclasses.replace(self.model, sites=chosen)
    )

  def propose(self, strategy, **settings):
    return rivals.RIVALS[strategy](**settings).rank(
        *self.network, self.batches, jax.random.key(1)
    )

  def at(self, proposal, values, axis):
    """What a proposal has for the units of one axis."""
    found = candidates(self.model)
    return np.array([v for (a, _), v in zip(found, values) if a == axis])


@functools.lru_cache(maxsize=None)
def case(family, dtype='f4'):
  stages = len(OPTIONS[family]['widths'])
  architecture = tiny_networks.seed(family, (1,) * stages, **OPTIONS[family])
  state = tiny_networks.state(architecture)
  if family in ('vgg16', 'mobilenet1'):
    state = opened(state)
  model = signals.model_of(architecture)
  cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
  x = tiny_networks.images(EXAMPLES).astype(dtype)
  labels = np.arange(EXAMPLES) % tiny_networks.CLASSES
  half = EXAMPLES // 2
  return Case(
      architecture,
      state,
      model,
      signals.Trees(
          cast(state.params['weights']), cast(state.stats['network'])
      ),
      ((x[:half], labels[:half]), (x[half:], labels[half:])),
  )


def opened(state):
  """A state whose norms leave most ReLUs open; so deep a network were dead."""
  weights = jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf + 1 if path[-1].key == 'bias' else leaf,
      state.params['weights'],
  )
  return state.replace(params={**state.params, 'weights': weights})


def candidates(model):
  return [(s.axis, unit) for s in model.sites for unit in range(s.units)]


def mean_loss(architecture, trees, batches):
  return estimates.mean_loss(tiny.chain_of(architecture), trees, batches)


def grown(data, change):
  return tiny.trees_of(tiny.grow(data.state, change))


def loss_with_all(data, found):
  """Mean loss with every unit of every site split."""
  units = {site.axis: np.arange(site.units) for site in data.model.sites}
  total = jax.jit(
      lambda splits, x, labels: trials.losses(
          *data.network, splits, units, x, labels
      ).sum()
  )
  return sum(float(total(found, *batch)) for batch in data.batches) / EXAMPLES


class TrialsTest(parameterized.TestCase):

  @parameterized.parameters(
      ('plain3net', 's0b0.out'),
      ('basic3resnet', 's0'),
      ('mobilenet1', 's3b0.out'),
  )
  def test_changes_are_those_after_surgery(self, family, axis):
    """Streams too, where estimates have the first order only."""
    data = case(family)
    found = tiny.random_splits(data.model, data.trees)
    units = [2, 0]
    changes = trials.true_changes(
        *data.network, found, axis, units, data.batches
    )
    before = mean_loss(data.architecture, data.trees, data.batches)
    for unit, got in zip(units, changes, strict=True):
      change = surgery.morph(
          data.architecture, found, {axis: np.array([unit])}
      )
      after = mean_loss(
          change.architecture, grown(data, change), data.batches
      )
      self.assertAlmostEqual(got, after - before, delta=2e-5)
    self.assertGreater(np.abs(changes).max(), 1e-3)

  def test_neighbours_are_split_as_by_surgery(self):
    data = case('plain3net')
    found = tiny.random_splits(data.model, data.trees)
    units = {'s0b0.out': np.array([1]), 's1b0.out': np.array([0, 3])}
    change = surgery.morph(data.architecture, found, units)
    want = grown(data, change)
    got = jax.jit(
        lambda splits: trials.split_trees(*data.network, splits, units)
    )(found)
    tiny_networks.assert_close(got.weights, want.weights, 1e-6)
    tiny_networks.assert_close(got.stats, want.stats, 1e-6)

  def test_the_oracle_gains_by_each_unit_alone(self):
    data = case('mlp')
    still, tuned = (
        trials.oracle(
            *data.network, 's0b0.out', [1, 3], data.batches, jax.random.key(2),
            steps=steps, learning_rate=3e-2,
        )
        for steps in (0, 12)
    )
    np.testing.assert_allclose(still.decreases, 0, atol=1e-6)
    self.assertGreater(tuned.decreases.min(), 1e-3)
    (u,), (e,) = tuned.split.u, tuned.split.e
    np.testing.assert_array_equal(u[..., [0, 2, 4]], 0)
    np.testing.assert_array_equal(e[..., [0, 2, 4], :], 0)
    with self.assertRaisesRegex(ValueError, r'from 0 to 4, got \[5\]'):
      trials.true_changes(
          *data.network, {'s0b0.out': tuned.split}, 's0b0.out', [5],
          data.batches,
      )
    alone = trials.true_changes(
        *data.network, {'s0b0.out': tuned.split}, 's0b0.out', [1, 3],
        data.batches,
    )
    np.testing.assert_allclose(-alone, tuned.decreases, atol=1e-7)


class RivalsTest(parameterized.TestCase):

  @parameterized.parameters('random', 'net2net')
  def test_random_splits_hardly_change_anything(self, strategy):
    data = case('plain3net')
    before = mean_loss(data.architecture, data.trees, data.batches)
    setting = {'random': 'length', 'net2net': 'noise'}[strategy]
    moved = []
    for length in (0.3, 0.03):
      found = data.propose(strategy, **{setting: length})
      for site in data.model.sites:
        split = found.splits[site.axis]
        kernels = [data.trees.kernel(end.layer) for end in site.writers]
        norm = lambda parts: np.linalg.norm(splits.incoming(parts), axis=-1)
        np.testing.assert_allclose(
            norm(split.u), length * norm(kernels), rtol=1e-4
        )
      moved.append(abs(loss_with_all(data, found.splits) - before))
    self.assertBetween(moved[0], 1e-4, 0.3)
    self.assertLess(moved[1], 0.2 * moved[0])
    self.assertTrue(found.usable.all())
    self.assertLen(set(found.gains), len(candidates(data.model)))
    self.assertEqual((found.examples_seen, found.refused), (0, ()))

  @parameterized.parameters(
      ('plain3net', 's0b0.out'),  # What reads it has a stride.
      ('vgg16', 's0b0.out'),  # A maximum comes after it.
  )
  def test_splitting_matrices_against_a_hessian(self, family, axis):
    with jax.enable_x64(True):
      data = case(family, 'f8').only(axis)
      found = data.propose('steepest', length=0.1)
      site = data.site[axis]
      hessians = sum(
          hessians_of(data, site, x, labels) for x, labels in data.batches
      )
      values, vectors = np.linalg.eigh(np.asarray(hessians) / EXAMPLES)
      lowest = values[:, 0]
      lengths = 0.1 * np.linalg.norm(
          splits.incoming([data.trees.kernel(site.writers[0].layer)]), axis=-1
      )
      np.testing.assert_allclose(
          data.at(found, found.gains, axis), -lengths**2 * lowest / 2,
          rtol=1e-6, atol=1e-12,
      )
      np.testing.assert_array_equal(
          data.at(found, found.usable, axis), lowest < 0
      )
      self.assertLess(lowest.min(), -1e-4)
      rows = splits.incoming(found.splits[axis].u)
      np.testing.assert_allclose(
          np.abs(np.sum(rows * vectors[..., 0], -1)), lengths, rtol=1e-6
      )

  def test_without_matrices(self):
    data = case('mlp').only('s1b0.out')
    whole = tuple(map(np.concatenate, zip(*data.batches, strict=True)))
    data = dataclasses.replace(data, batches=(whole,))
    exact = data.propose('steepest')
    with mock.patch.object(steepest, 'LARGEST_MATRIX', 0):
      found = data.propose(
          'steepest', rayleigh_epochs=300, learning_rate=1e-2
      )
    large = exact.gains > np.median(exact.gains)
    np.testing.assert_array_less(found.gains, exact.gains * 1.001 + 1e-9)
    np.testing.assert_array_less(
        0.9 * exact.gains[large], found.gains[large]
    )
    # Four matrices of 5 x 5 beside three passes through the network.
    image = np.prod(tiny_networks.IMAGE)
    network = image * 5 + 5 * 4 + 4 * tiny_networks.CLASSES
    self.assertAlmostEqual(
        exact.examples_seen, EXAMPLES * (1 + 100 / (3 * network)), delta=1
    )
    self.assertEqual(found.examples_seen, 602 * EXAMPLES)

  @parameterized.parameters('steepest', 'gradmax')
  def test_what_cannot_be_done_is_named(self, strategy):
    data = case('basic3resnet').only('s0', 's0b0.mid')
    found = data.propose(strategy)
    reasons = dict(found.refused)
    self.assertEqual(reasons['s0'], 'written by 2 layers')
    # Which is known before there are any examples.
    self.assertEqual(
        rivals.uncovered(strategy, data.model.sites),
        (('s0', 'written by 2 layers'),),
    )
    self.assertEmpty(rivals.uncovered('firefly', data.model.sites))
    self.assertFalse(data.at(found, found.usable, 's0').any())
    for u in found.splits['s0'].u:
      np.testing.assert_array_equal(u, 0)
    self.assertTrue(data.at(found, found.usable, 's0b0.mid').any())
    refused = case('mobilenet1').only('stem').propose(strategy).refused
    if strategy == 'steepest':
      self.assertEmpty(refused)
    else:
      why = 'what lies behind it differs from unit to unit'
      self.assertEqual(refused, (('stem', why),))

  def test_firefly(self):
    """Its contributions add up, and it stays within its trust region."""
    data = case('mlp')
    found = data.propose('firefly', epochs=5, learning_rate=1e-2, trust=0.2)
    before = mean_loss(data.architecture, data.trees, data.batches)
    decrease = before - loss_with_all(data, found.splits)
    self.assertGreater(decrease, 0.02)
    self.assertAlmostEqual(found.gains.sum(), decrease, delta=0.1 * decrease)
    start = splits.start(data.model, data.trees, jax.random.key(1))
    largest = {}
    for site in data.model.sites:
      split = found.splits[site.axis]
      w, v = (
          [data.trees.kernel(end.layer) for end in ends]
          for ends in (site.writers, site.readers)
      )
      moved = jax.tree.map(jnp.subtract, split.e, start[site.axis].e)
      for name, rows, limits in (
          ('u', splits.incoming(split.u), splits.incoming(w)),
          ('e', splits.outgoing(moved), splits.outgoing(v)),
      ):
        norms = (np.linalg.norm(part, axis=-1) for part in (rows, limits))
        largest[site.axis, name] = np.divide(*norms).max()
    self.assertLess(max(largest.values()), 0.2001)
    self.assertGreater(max(largest.values()), 0.1999)
    # (Inputs + outputs) * 5 and 5 * 4 multiply-adds, all axes twice as wide.
    image = np.prod(tiny_networks.IMAGE)
    before, wider = (
        (image + tiny_networks.CLASSES * k) * 5 * k for k in (1, 2)
    )
    self.assertAlmostEqual(
        found.examples_seen, 8 * EXAMPLES * wider / before, delta=1
    )

  def test_gradmax_adds_channels_that_nothing_reads(self):
    """Also if neighbours get some at the same time."""
    data = case('plain3net').only('s0b0.out', 's1b0.out')
    found = data.propose('gradmax')
    self.assertTrue(found.one_sided)
    units = {site.axis: np.array([0, 2]) for site in data.model.sites}
    change = surgery.morph(
        data.architecture, found.splits, units, one_sided=True
    )
    x, _ = data.batches[0]
    before, after = (
        taps.run(
            tiny.chain_of(architecture),
            trees.weights, trees.stats, x,
        ).output
        for architecture, trees in (
            (data.architecture, data.trees),
            (change.architecture, grown(data, change)),
        )
    )
    np.testing.assert_allclose(after, before, atol=1e-5)

  def test_gradmax_keeps_its_new_channels_as_they_are_beside_others(self):
    data = case('plain3net').only('s0b0.out', 's1b0.out')
    splits = data.propose('gradmax').splits
    units = {site.axis: np.array([0, 2]) for site in data.model.sites}
    change = surgery.morph(data.architecture, splits, units, one_sided=True)
    old, new = data.trees, grown(data, change)
    site = data.site['s1b0.out']
    layer, split = site.writers[0].layer, splits[site.axis]
    is_found = np.any(np.asarray(split.u[0]), axis=(0, 1, 2))
    self.assertTrue(is_found[units[site.axis]].all())
    found = np.asarray(old.kernel(layer) - split.u[0])
    kernel = np.asarray(new.kernel(layer))
    width, before = found.shape[-1], found.shape[-2]
    np.testing.assert_allclose(
        kernel[..., :before, width:], found[..., units[site.axis]], atol=1e-6
    )
    np.testing.assert_array_equal(kernel[..., before:, :], 0)

  @parameterized.parameters('plain3net', 'vgg16')
  def test_gradmax_has_the_largest_gradients(self, family):
    axis = 's1b0.out'
    data = case(family).only(axis)
    split, site = data.propose('gradmax').splits[axis], data.site[axis]
    w = np.asarray(data.trees.kernel(site.writers[0].layer))
    new = (w - split.u[0])[..., 0]
    norm = lambda split: np.linalg.norm(gradients_of_new(data, site, split, 0))
    generator, others = np.random.default_rng(0), []
    for _ in range(5):
      other = generator.normal(size=new.shape)
      other *= np.linalg.norm(new) / np.linalg.norm(other)
      others.append(norm(split.replace(u=(w - other[..., None].astype('f4'),))))
    self.assertGreater(norm(split), 1.2 * np.mean(others))

  def test_gradmax_is_exact_without_kinks(self):
    """Its gain is the squared gradient where all ReLUs are open."""
    data = case('mlp')
    weights = jax.tree.map(np.array, data.trees.weights)
    layers = [weights[name]['dense'] for name in ('s0b0', 's1b0', 'head')]
    for layer, following in zip(layers, layers[1:]):
      layer['bias'] += 50
      following['bias'] -= 50 * following['kernel'].sum(0)
    trees = data.trees.replace(weights=weights)
    state = data.state.replace(params={**data.state.params, 'weights': weights})
    axis = 's0b0.out'
    data = dataclasses.replace(data, trees=trees, state=state).only(axis)
    found = data.propose('gradmax')
    self.assertTrue(found.usable[:4].all())
    self.assertFalse(found.usable[4])  # Only four units read it.
    self.assertTrue((np.diff(found.gains) < 0).all())
    site, split = data.site[axis], found.splits[axis]
    # The shift by 50 has a gradient of its own.
    nothing = split.replace(u=(trees.kernel(site.writers[0].layer),))
    for unit in (0, 3):
      moved = gradients_of_new(data, site, split, unit)
      moved = moved - gradients_of_new(data, site, nothing, unit)
      np.testing.assert_allclose(
          np.sum(moved**2), found.gains[unit], rtol=1e-3
      )

  @parameterized.parameters('steepest', 'gradmax')
  def test_a_network_that_has_diverged(self, strategy):
    data = case('mlp').only('s1b0.out')
    broken = tuple((x * np.nan, labels) for x, labels in data.batches)
    found = dataclasses.replace(data, batches=broken).propose(strategy)
    self.assertFalse(found.usable.any())
    self.assertTrue(np.isfinite(found.splits['s1b0.out'].u[0]).all())
    self.assertEmpty(found.refused)

  def test_bad_settings(self):
    with self.assertRaisesRegex(ValueError, 'trust is positive, got -1'):
      rivals.RIVALS['firefly'](trust=-1)
    with self.assertRaisesRegex(ValueError, 'rayleigh_epochs is positive, got'):
      rivals.RIVALS['steepest'](rayleigh_epochs=0)

  @parameterized.parameters(*rivals.RIVALS)
  def test_a_configuration_names_its_kind(self, name):
    """And finds it again."""
    method = method_lib.GaussNewton(ranking=rivals.RIVALS[name]())
    config = config_lib.RunConfig(workdir='', method=method)
    stored = json.loads(json.dumps(config.to_json()))
    self.assertStartsWith(
        stored['method']['ranking']['kind'], 'experiments.studies.gauss_newton'
    )
    self.assertEqual(config_lib.RunConfig.from_json(stored), config)
    self.assertEqual(rivals.name_of(method.ranking), name)


class SelectionTest(parameterized.TestCase):

  @parameterized.parameters(*selection.RESOURCES)
  def test_picks_by_gain_within_limits(self, resource):
    architecture, model, _ = case('plain3net').network
    found = candidates(model)
    generator = np.random.default_rng(3)
    gains = generator.uniform(0.1, 1, len(found))
    usable = np.ones(len(found), bool)
    gains[2], usable[4] = np.nan, False
    usable[2] = False
    gains[5] = -1
    measure = getattr(costs, resource)
    used = measure(architecture)

    def chosen(**settings):
      limits = selection.Limits(resource=resource, **settings)
      picked = selection.by_gain(architecture, found, gains, usable, limits)
      sizes = dict(architecture.sizes)
      for index in picked.splits:
        sizes[found[index][0]] += 1
      return picked, measure(architecture, sizes)

    free, size = chosen(growth_cap=50.0)
    self.assertCountEqual(
        free.splits, set(range(len(found))) - {2, 4, 5}
    )
    np.testing.assert_array_equal(free.scales, 1)
    self.assertAlmostEqual(free.change, -gains[list(free.splits)].sum())
    self.assertEqual(free.prunes, ())
    sizes = dict(architecture.sizes)
    ratios = np.array([
        gains[index] / (
            measure(architecture, {**sizes, axis: sizes[axis] + 1}) - used
        )
        for index, (axis, _) in enumerate(found)
    ])
    self.assertEqual(free.splits[0], np.argmax(np.where(usable, ratios, 0)))
    _, size = chosen(growth_cap=0.5)
    self.assertBetween(size, 1.2 * used, 1.5 * used)
    _, size = chosen(growth_cap=10.0, budget=int(1.4 * used))
    self.assertBetween(size, 1.1 * used, 1.4 * used)
    fewer, _ = chosen(growth_cap=50.0, price=2 * free.price)
    self.assertLess(len(fewer.splits), len(free.splits))
    none, _ = chosen(growth_cap=10.0, price=1e9)
    self.assertEqual((none.splits, none.change), ((), 0))


def hessians_of(data, site, x, labels):
  """Per unit, the second derivative by its incoming weights, one by one.

  Of the loss as a function of the softplus of h, linear in that function: the
  slope is the gradient at what the writer's part hands on.
  """
  keys = [segment.key for segment in data.model.chain]
  (writer,) = site.writers
  behind = data.model.chain[keys.index(writer.layer.path[0]) + 1 :]
  tapped = taps.run(data.model.chain, data.trees.weights, data.trees.stats, x)
  h, read = tapped.outputs[writer.top], tapped.inputs[writer.layer.path]

  def loss(a):
    after = taps.run(behind, data.trees.weights, data.trees.stats, a)
    return tasks.cross_entropy(after.output, labels).sum()

  slope = jax.jit(jax.grad(loss))(tapped.entered[behind[0].key])
  kernel = data.trees.kernel(writer.layer)
  h, factor = jnp.asarray(h), jnp.asarray(data.trees.factor(writer))

  def surrogate(change, unit):
    shifted = h[..., unit] + factor[unit] * writer.layer.linear(
        read, change[..., None]
    )[..., 0]
    return jnp.sum(
        slope[..., unit] * jax.nn.softplus(3.0 * shifted) / 3.0
    )

  zeros = jnp.zeros(kernel.shape[:-1])
  hessian = jax.jit(
      jax.vmap(jax.jacrev(jax.grad(surrogate)), in_axes=(None, 0))
  )(zeros, jnp.arange(site.units))
  return np.asarray(hessian).reshape(site.units, zeros.size, zeros.size)


def gradients_of_new(data, site, split, unit):
  """Gradient of the mean loss by the outgoing weights of a new channel."""
  change = surgery.morph(
      data.architecture, {site.axis: split}, {site.axis: np.array([unit])},
      one_sided=True,
  )
  trees = grown(data, change)
  (reader,) = site.readers
  gradients = gradients_of(
      change.architecture, reader.layer.path, trees, data.batches
  )
  return np.asarray(gradients)[..., -1, :]


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients_of(architecture, path, trees, batches):
  """Gradient of the mean loss by one layer's kernel."""
  chain = tiny.chain_of(architecture)
  x, labels = map(jnp.concatenate, zip(*batches, strict=True))
  part, name = path
  own = trees.weights[part]

  def loss(kernel):
    layer = {**own[name], 'kernel': kernel}
    weights = {**trees.weights, part: {**own, name: layer}}
    logits = taps.run(chain, weights, trees.stats, x).output
    return tasks.cross_entropy(logits, labels).mean()

  return jax.grad(loss)(own[name]['kernel'])


if __name__ == '__main__':
  absltest.main()
