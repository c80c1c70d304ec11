"""Tests of learned morphisms, on tiny networks, the exact ones in float64."""

import dataclasses
import functools
import math
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax.methods.gauss_newton import estimates
from autogrow_jax.methods.gauss_newton import learning
from autogrow_jax.methods.gauss_newton import prunes
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax import networks
from autogrow_jax import tasks
import tiny_morphisms as tiny
import tiny_networks

FAMILIES = {
    'plain3net': {'widths': (3, 4, 4)},
    'basic3resnet': {'widths': (3, 4, 4)},
    'mlp': {'widths': (5, 4)},
}
EXAMPLES = 6
EPSILON = 1e-5  # Of norms.

projections = jax.jit(splits.projections, static_argnums=0)
output_changes = jax.jit(tiny.output_changes, static_argnums=0)
incoming_rows = jax.jit(splits.incoming_rows, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny network with data; arrays are NumPy's, to be cast as wanted."""

  architecture: object
  survey: sites.Survey
  model: signals.Model
  trees: signals.Trees
  x: np.ndarray
  labels: np.ndarray


@functools.lru_cache(maxsize=None)
def case(family, dtype='f8'):
  depths = (1,) * len(FAMILIES[family]['widths'])
  architecture = tiny_networks.seed(family, depths, **FAMILIES[family])
  return case_of(architecture, tiny_networks.images(EXAMPLES), dtype)


def case_of(architecture, x, dtype='f8'):
  state = tiny_networks.state(architecture)
  survey = sites.survey(architecture)
  cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
  generator = np.random.default_rng(5)
  return Case(
      architecture,
      survey,
      signals.model_of(architecture),
      signals.Trees(
          cast(state.params['weights']), cast(state.stats['network'])
      ),
      cast(x),
      generator.integers(0, tiny_networks.CLASSES, EXAMPLES),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def signals_of(model, curvature, trees, x, labels):
  return signals.signals(
      model, trees, x, labels, jax.random.key(3), curvature=curvature
  )


def seen(case, curvature='mc'):
  return signals_of(case.model, curvature, case.trees, case.x, case.labels)


def logits_with(case, changes, plain=False):
  """Logits if something is added to what layers write."""
  chain = case.model.chain
  if plain:
    chain = tuple(
        dataclasses.replace(s, module=s.module.clone(plain=True))
        for s in chain
    )
  return taps.run(
      chain, case.trees.weights, case.trees.stats, case.x,
      changes={
          path: lambda z, change=change: z + change
          for path, change in changes.items()
      },
  ).output


# Of the convolutional network, and of the perceptron.
LAYERS = {'stem': 's0b0', 's0b0': 's0b1', 's1b0': 's1b0', 's2b0': 's1b1'}


def on_one_pixel(family, depths=(1, 1, 1), **options):
  x = tiny_networks.images(EXAMPLES)[:, :1, :1]
  architecture = networks.get(family).seed(
      depths,
      input_shape=x.shape[1:],
      classes=tiny_networks.CLASSES,
      options=options,
  )
  has_stem = 'stem' in dict(architecture.sizes)
  return case_of(architecture.resized({'stem': 3} if has_stem else {}), x)


def perceptron():
  return on_one_pixel('mlp', depths=(2, 2), widths=(3, 4))


def middle(matrix):
  """A 3x3 kernel that is zero but for its middle."""
  return np.pad(matrix[None, None], ((1, 1), (1, 1), (0, 0), (0, 0)))


def its_convolutional_twin():
  """Convolutions with the perceptron's kernels in the middle, and its biases.

  Their norms do nothing else.
  """
  twin, dense = on_one_pixel('plain3net', widths=(3, 4, 4)), perceptron()
  weights, stats = dict(twin.trees.weights), dict(twin.trees.stats)
  for name, own in LAYERS.items():
    layer = dense.trees.weights[own]['dense']
    ones = np.ones(layer['bias'].shape)
    weights[name] = {
        'conv': {'kernel': middle(np.squeeze(layer['kernel']))},
        'norm': {'scale': ones, 'bias': layer['bias']},
    }
    stats[name] = {'norm': {'mean': 0 * ones, 'var': ones - EPSILON}}
  weights['head'] = dense.trees.weights['head']
  return dataclasses.replace(twin, trees=signals.Trees(weights, stats))


def centred(data):
  """Random splits; those of convolutions change the pixel in the middle."""

  def draw(end, generator):
    kernel = data.trees.kernel(end.layer)
    delta = generator.normal(size=kernel.shape[-2:])
    if kernel.ndim == 2 or kernel.shape[0] == 1:
      return delta.reshape(kernel.shape)
    return middle(delta)

  generator = np.random.default_rng(1)
  return {
      site.axis: splits.Split(
          tuple(draw(end, generator) for end in site.writers),
          tuple(draw(end, generator) for end in site.readers),
      )
      for site in data.model.sites
  }


class OneByOneTest(absltest.TestCase):

  def test_dense_layers_are_convolutions_of_one_pixel(self):
    """Invariant 11: splits and prunes are estimated alike."""
    with jax.enable_x64(True):
      dense, convolutional = perceptron(), its_convolutional_twin()
      found = []
      for data in (dense, convolutional):
        batches = [(jnp.asarray(data.x), jnp.asarray(data.labels))]
        key = jax.random.key(3)
        found.append((
            estimates.estimate(
                data.model, data.trees, centred(data), batches, key
            ),
            prunes.estimate(data.model, data.trees, batches, batches, key),
        ))
    (splits_a, prunes_a), (splits_b, prunes_b) = found
    self.assertLen(splits_a.candidates, 3 + 3 + 4 + 4)
    self.assertGreater(np.median(np.abs(splits_a.slopes)), 1e-3)
    np.testing.assert_allclose(splits_b.slopes, splits_a.slopes, atol=1e-9)
    np.testing.assert_allclose(splits_b.gram, splits_a.gram, atol=1e-9)
    self.assertGreater(np.median(np.abs(prunes_a.changes)), 1e-3)
    np.testing.assert_allclose(prunes_b.changes, prunes_a.changes, atol=1e-9)
    for a, b in zip(
        prunes_a.weights.values(), prunes_b.weights.values(), strict=True
    ):
      np.testing.assert_allclose(b, a, atol=1e-9)


class SitesTest(parameterized.TestCase):

  def test_a_plain_network_is_covered(self):
    survey = case('plain3net').survey
    self.assertEqual(
        [site.axis for site in survey.sites],
        ['stem', 's0b0.out', 's1b0.out', 's2b0.out'],
    )
    self.assertEmpty(survey.uncovered)
    last = survey.sites[-1]
    self.assertEqual([end.top for end in last.writers], [('s2b0', 'norm')])
    (reader,) = last.readers
    self.assertEqual(reader.layer.path, ('head', 'dense'))
    self.assertIsNone(reader.norm)
    self.assertEqual((last.incoming, last.outgoing), (36, 5))
    self.assertEqual(
        survey.sites[0].readers[0].norm.path, ('s0b0', 'norm')
    )

  def test_streams_without_a_projection_are_named_as_uncovered(self):
    survey = sites.survey(tiny_networks.seed('basic3resnet', shortcut='A'))
    self.assertEqual(
        [site.axis for site in survey.sites],
        ['s0b0.mid', 's1b0.mid', 's1b1.mid', 's2b0.mid'],
    )
    reasons = dict(survey.uncovered)
    self.assertEqual(set(reasons), {'s0', 's1', 's2'})
    self.assertEqual(
        reasons['s0'],
        'a shortcut without parameters, s1b0/shortcut, reads or writes it',
    )

  def test_a_network_with_no_sites(self):
    nothing = sites.Survey((), (('s0', 'written by 2 layers: a, b'),))
    with mock.patch.object(sites, 'survey', return_value=nothing):
      with self.assertRaisesRegex(ValueError, 'no channels .*s0: written by 2'):
        signals.model_of(case('mlp').architecture)


class SignalsTest(parameterized.TestCase):

  @parameterized.parameters('plain3net', 'basic3resnet')
  def test_gradients_are_those_of_each_example(self, family):
    with jax.enable_x64(True):
      data = case(family)
      losses, by_axis = seen(data)
      slopes = {
          end.layer.path: slope
          for site in data.model.sites
          for end, slope in zip(
              site.readers, by_axis[site.axis].slope, strict=True
          )
      }

      @jax.jit
      @jax.grad
      def gradient(changes):
        logits = logits_with(data, changes)
        return tasks.cross_entropy(logits, data.labels).sum()

      wants = gradient(jax.tree.map(jnp.zeros_like, slopes))
      for path, want in wants.items():
        np.testing.assert_allclose(slopes[path], want, atol=1e-12)
      np.testing.assert_allclose(
          losses,
          tasks.cross_entropy(logits_with(data, {}), data.labels),
          rtol=1e-12,
      )

  def test_the_rank_one_curvature_is_a_scaled_slope(self):
    with jax.enable_x64(True):
      data = case('mlp')
      losses, by_axis = seen(data, 'rank1')
      signal = by_axis['s0b0.out']
      np.testing.assert_allclose(
          signal.curvature[0] ** 2,
          signal.slope[0] ** 2 / np.expm1(losses)[:, None],
          rtol=1e-9,
      )

  def test_bad_settings(self):
    for settings, message in (
        ({'curvature': 'hessian'}, 'curvature is one of mc, rank1, got'),
        ({'sweeps': 0}, 'sweeps is at least 1, got 0'),
        ({'damping': 0}, 'damping is positive, got 0'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        learning.LearnConfig(**settings)


class SplitsTest(parameterized.TestCase):

  @parameterized.parameters(
      ('plain3net', 's1b0.out'),
      ('basic3resnet', 's1'),
      ('basic3resnet', 's1b0.mid'),
      ('mlp', 's0b0.out'),
      ('mlp', 's1b0.out'),
  )
  def test_curvature_against_a_dense_gauss_newton_matrix(self, family, axis):
    """Over all labels, mc gives dz'H dz with H built by forward mode."""
    with jax.enable_x64(True):
      data = case(family)
      _, by_axis = seen(data)
      logits = np.asarray(logits_with(data, {}))
      p = np.asarray(jax.nn.softmax(logits))
      (site,) = (site for site in data.model.sites if site.axis == axis)
      split = tiny.random_splits(data.model, data.trees)[site.axis]
      slope = by_axis[site.axis].slope
      paths = [reader.layer.path for reader in site.readers]
      place = lambda changes: logits_with(
          data, dict(zip(paths, changes, strict=True)), plain=True
      )
      # (examples, classes, outputs): the Jacobian of each example's logits.
      jacobian = np.concatenate(
          [
              np.asarray(block).reshape(EXAMPLES, p.shape[1], EXAMPLES, -1)
              for block in jax.jit(jax.jacfwd(place))(
                  jax.tree.map(jnp.zeros_like, slope)
              )
          ],
          -1,
      )
      jacobian = np.stack([jacobian[n, :, n] for n in range(EXAMPLES)])
      middle = np.einsum('nk,kl->nkl', p, np.eye(p.shape[1])) - np.einsum(
          'nk,nl->nkl', p, p
      )
      dense = np.einsum('nka,nkl,nlb->nab', jacobian, middle, jacobian)

      @jax.jit
      def sampled(flat, split):
        sizes = [math.prod(leaf.shape[1:]) for leaf in slope]
        blocks = jnp.split(flat, np.cumsum(sizes)[:-1], -1)
        gradients = tuple(
            block.reshape(leaf.shape)
            for block, leaf in zip(blocks, slope, strict=True)
        )
        signal = by_axis[site.axis].replace(curvature=gradients)
        return projections(site, data.trees, signal, split)[1]

      total = 0
      for label in range(p.shape[1]):
        at_logits = p - np.eye(p.shape[1])[label]
        gradient = np.einsum('nk,nka->na', at_logits, jacobian)
        c = sampled(gradient, split)
        total = total + p[:, label, None] * np.asarray(c) ** 2
      for unit in range(site.units):
        changes = one_unit(site, data, by_axis, split, unit)
        flat = np.concatenate(
            [np.asarray(part).reshape(EXAMPLES, -1) for part in changes], -1
        )
        want = np.einsum('na,nab,nb->n', flat, dense, flat)
        np.testing.assert_allclose(total[:, unit], want, rtol=1e-8)

  @parameterized.parameters('plain3net', 'mlp')
  def test_slopes_are_products_with_the_exact_change(self, family):
    with jax.enable_x64(True):
      data = case(family)
      _, by_axis = seen(data)
      for site in data.model.sites:
        split = tiny.random_splits(data.model, data.trees)[site.axis]
        s, _ = projections(
            site, data.trees, by_axis[site.axis], split
        )
        for unit in range(site.units):
          changes = one_unit(site, data, by_axis, split, unit)
          want = sum(
              np.sum((slope * change).reshape(EXAMPLES, -1), -1)
              for slope, change in zip(
                  by_axis[site.axis].slope, changes, strict=True
              )
          )
          np.testing.assert_allclose(s[:, unit], want, atol=1e-12)

  @parameterized.parameters(*FAMILIES)
  def test_rows_against_automatic_derivatives(self, family):
    """They are each unit's own; those by another unit's weights are zero."""
    with jax.enable_x64(True):
      data = case(family)
      _, by_axis = seen(data)
      site = data.model.sites[len(data.model.sites) // 2]
      split = tiny.random_splits(data.model, data.trees)[site.axis]
      signal = by_axis[site.axis]

      @jax.jit
      def both(split):
        project = lambda split: projections(
            site, data.trees, signal, split
        )
        return (
            incoming_rows(site, data.trees, signal, split),
            splits.outgoing_rows(site, data.trees, signal, split),
            jax.jacrev(project)(split),
        )

      by_u, by_e, wants = both(split)
      for u_rows, e_rows, want in zip(by_u, by_e, wants, strict=True):
        # (examples, units, units, weights): by everybody's weights.
        all_u = jax.vmap(jax.vmap(splits.incoming))(want.u)
        all_e = jax.vmap(jax.vmap(splits.outgoing))(want.e)
        for rows, every in ((u_rows, all_u), (e_rows, all_e)):
          own = np.eye(site.units)[None, :, :, None] == 1
          np.testing.assert_array_equal(np.where(own, 0, every), 0)
          np.testing.assert_allclose(
              rows, np.sum(np.where(own, every, 0), 2), atol=1e-12
          )
          self.assertGreater(np.abs(rows).max(), 1e-3)

  def test_slopes_are_linear_in_the_outgoing_part(self):
    with jax.enable_x64(True):
      data = case('plain3net')
      _, by_axis = seen(data)
      site = data.model.sites[1]
      split = tiny.random_splits(data.model, data.trees)[site.axis]
      s = lambda factor: np.asarray(
          projections(
              site,
              data.trees,
              by_axis[site.axis],
              split.replace(e=tuple(factor * e for e in split.e)),
          )[0]
      )
      np.testing.assert_allclose(s(3) - s(0), 3 * (s(1) - s(0)), atol=1e-12)
      self.assertGreater(np.abs(s(1) - s(0)).max(), 1e-3)

  @parameterized.parameters('plain3net', 'mlp')
  def test_the_start_changes_nothing_and_can_be_learned_from(self, family):
    with jax.enable_x64(True):
      data = case(family)
      _, by_axis = seen(data)
      start = splits.start(data.model, data.trees, jax.random.key(0))
      for site in data.model.sites:
        signal, split = by_axis[site.axis], start[site.axis]
        changes = output_changes(site, data.trees, signal, split)
        for reader, change, e in zip(
            site.readers, changes, split.e, strict=True
        ):
          np.testing.assert_array_equal(change, 0)
          kernel = data.trees.kernel(reader.layer)
          np.testing.assert_allclose(np.abs(e), np.abs(kernel) / 2)
        rows, _ = incoming_rows(site, data.trees, signal, split)
        self.assertGreater(np.abs(rows).max(), 1e-4)

  @parameterized.parameters(*signals.CURVATURES)
  def test_learning_lowers_the_model(self, curvature):
    data = case('mlp', 'f4')
    batches = [(data.x[:3], data.labels[:3]), (data.x[3:], data.labels[3:])]
    learned = learning.learn(
        data.model,
        data.trees,
        batches,
        jax.random.key(1),
        learning.LearnConfig(curvature=curvature, damping=1.0),
    )
    _, by_axis = seen(data, curvature)
    for site in data.model.sites:
      alive = learned.codes[site.axis] == 0
      self.assertTrue(alive.any())
      split = learned.splits[site.axis]
      s, c = projections(
          site, data.trees, by_axis[site.axis], split
      )
      if curvature != 'mc':  # Those labels are other ones than it learned on.
        change = np.mean(s, 0) + np.mean(np.square(c), 0) / 2
        self.assertLess(change[alive].max(), 0)
      lengths = np.linalg.norm(splits.incoming(split.u), axis=-1)
      kernels = [data.trees.kernel(end.layer) for end in site.writers]
      limits = np.linalg.norm(splits.incoming(kernels), axis=-1)
      np.testing.assert_array_less(lengths, limits * (1 + 1e-5))

  def test_a_dead_unit_has_a_code(self):
    data = case('mlp', 'f4')
    weights = jax.tree.map(np.array, data.trees.weights)
    weights['s0b0']['dense']['bias'][2] = -1e3
    learned = learning.learn(
        data.model,
        data.trees.replace(weights=weights),
        [(data.x, data.labels)],
        jax.random.key(1),
    )
    self.assertEqual(learned.codes['s0b0.out'][2], 2)
    self.assertIn(0, learned.codes['s0b0.out'])
    (u,) = learned.splits['s0b0.out'].u
    np.testing.assert_array_equal(u[..., 2], 0)

  def test_nothing_to_learn_from(self):
    data = case('mlp', 'f4')
    with self.assertRaisesRegex(ValueError, 'got none'):
      learning.learn(data.model, data.trees, [], jax.random.key(0))


def one_unit(site, data, by_axis, split, unit):
  """The change of each reader's output if one unit is split."""
  alone = tiny.only(split, unit)
  return output_changes(site, data.trees, by_axis[site.axis], alone)


if __name__ == '__main__':
  absltest.main()
