"""Tests of sites, signals, splits, prunes and surgery on tiny networks."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax.methods.gauss_newton import estimates
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.networks import base
import tiny_morphisms as tiny
import tiny_networks

# All axes with the numbers of their writers and readers.
ENDS = {
    'mlp': {'s0b0.out': (1, 1), 's1b0.out': (1, 1)},
    'basic3resnet': {
        's0': (3, 4), 's0b0.mid': (1, 1), 's0b1.mid': (1, 1),
        's1b0.mid': (1, 1), 's1': (2, 2), 's2b0.mid': (1, 1), 's2': (2, 1),
    },
    'wrn28_10': {
        'stem': (1, 2), 's0b0.mid': (1, 1), 's0': (2, 2), 's1b0.mid': (1, 1),
        's1': (3, 3), 's1b1.mid': (1, 1), 's2b0.mid': (1, 1), 's2': (2, 1),
    },
    'mobilenet1': {
        'stem': (1, 1), **{f's{stage}b0.out': (1, 1) for stage in range(5)},
    },
}


class SitesTest(parameterized.TestCase):

  @parameterized.parameters(*ENDS)
  def test_all_axes_are_covered(self, family):
    survey = sites.survey(tiny.case(family).architecture)
    found = {
        site.axis: (len(site.form.writers), len(site.form.readers))
        for site in survey.sites
    }
    self.assertEqual(found, ENDS[family])
    self.assertEmpty(survey.uncovered)

  def test_what_is_uncovered_has_a_reason(self):
    architecture = tiny_networks.seed(
        'basic3resnet', (1, 1, 1), widths=(3, 4, 4), shortcut='A'
    )
    reasons = dict(sites.survey(architecture).uncovered)
    self.assertEqual(set(reasons), {'s0', 's1', 's2'})
    self.assertIn('a shortcut without parameters', reasons['s1'])
    with self.assertRaisesRegex(ValueError, 'a label for each word or pixel'):
      signals.model_of(tiny_networks.seed('lstm2', (1, 1)))

  def test_forms_are_shared(self):
    """Within the padding, and among layers that are alike."""
    seed = lambda width: networks.get('plain3net').seed(
        (3, 1, 1), input_shape=(8, 8, 3), classes=5,
        options={'widths': (width, 4, 4)},
    )
    one, other = (sites.survey(seed(width)).sites for width in (3, 8))
    for before, after in zip(one, other, strict=True):
      self.assertEqual(before.form, after.form)
    forms = {site.axis: site.form for site in one}
    self.assertEqual(forms['s0b0.out'], forms['s0b1.out'])
    self.assertNotEqual(forms['s0b0.out'], forms['s1b0.out'])
    self.assertEqual((one[1].incoming, one[1].outgoing), (27, 27))


class PaddingTest(parameterized.TestCase):

  def test_four_to_eight_steps_per_doubling(self):
    sizes = dict.fromkeys(('s0', 's0b0.mid', 's1', 's2'))
    seed = tiny_networks.seed('basic3resnet', (1, 1, 1))
    for size, want in ((1, 8), (8, 8), (9, 16), (65, 80), (300, 320)):
      wide = seed.resized(dict.fromkeys(sizes, size))
      self.assertEqual(padding.padded(wide).size('s0b0.mid'), want)
    self.assertEqual(padding.padded(seed).size('classes'), seed.size('classes'))

  @parameterized.parameters(*tiny.FAMILIES)
  def test_padded_networks_are_the_same(self, family):
    """Logits, new statistics and gradients; none reaches the padding."""
    with jax.enable_x64(True):
      data = tiny.case(family)
      whole = padding.Whole(data.architecture)
      x, labels = data.batch

      def run(architecture, state):
        chain = [
            base.Segment(part.name, part.module, None)
            for part in networks.parts(architecture)
        ]

        @jax.jit
        def loss(weights):
          logits, stats = base.apply(
              chain, weights, state.stats['network'], x, train=True
          )
          return jnp.mean(logits[jnp.arange(len(x)), labels]), stats

        (_, stats), weights = jax.value_and_grad(loss, has_aux=True)(
            state.params['weights']
        )
        params = {**state.params, 'weights': weights}
        stats = {**state.stats, 'network': stats}
        return state_lib.to_host(state.replace(params=params, stats=stats))

      want = run(data.architecture, data.state)
      got = run(whole.computed, whole.take(data.state))
      tiny_networks.assert_close(whole.put(got, data.state), want, 1e-9)
      again = whole.take(whole.put(got, data.state))
      for path, leaf in tiny_networks.leaves(again.params).items():
        np.testing.assert_array_equal(
            leaf, tiny_networks.leaves(got.params)[path]
        )


class SignalsTest(parameterized.TestCase):

  def test_rank_one_is_a_scaled_slope(self):
    data = tiny.case('mlp', dtype='f4')
    losses, found = data.signals()
    for signal in found.values():
      slope, curvature = signal.slope[0], signal.curvature[0]
      np.testing.assert_allclose(
          np.square(curvature) * np.expm1(losses)[:, None], np.square(slope),
          rtol=1e-4,
      )

  def test_sampled_labels_give_the_curvature(self):
    """Over all labels, the mean of c^2 is dz'(diag p - pp')dz."""
    with jax.enable_x64(True):
      data = tiny.case('mlp')
      _, found = data.signals()
      site = data.model.sites[-1]  # Its reader writes the logits.
      x, labels = data.batch
      slope = np.asarray(found[site.axis].slope[0])
      p = slope + np.eye(slope.shape[-1])[labels]
      local, split = data.trees.local(site), tiny.random_splits(data)[site.axis]
      taken = splits.no_prunes(data.model, data.trees)[site.axis]
      project = lambda gradient: np.asarray(splits.project(
          site.form, local, found[site.axis].replace(curvature=(gradient,)),
          split, taken,
      )[1])
      # c is linear in the gradient: dz of every unit, one output at a time.
      eye = np.eye(p.shape[-1])
      dz = np.stack([project(np.tile(row, (len(x), 1))) for row in eye], -1)
      mean = sum(
          p[:, label, None] * project(p - eye[label]) ** 2
          for label in range(len(eye))
      )
      inner = np.einsum('nk,nuk->nu', p, dz)
      want = np.einsum('nk,nuk->nu', p, dz**2) - inner**2
      np.testing.assert_allclose(mean, want, rtol=1e-9, atol=1e-12)

  def test_measured_statistics_are_those_of_training(self):
    data = tiny.case('plain3net', dtype='f4')
    measured = signals.measured(data.model.chain, data.trees, [data.batch])
    _, stats = base.apply(
        data.model.chain, data.trees.weights,
        jax.tree.map(jnp.zeros_like, data.trees.stats), data.batch[0],
        train=True,
    )
    # A running statistic moves by a tenth of the way.
    want = jax.tree.map(lambda leaf: 10 * leaf, stats)
    tiny_networks.assert_close(measured.stats, want, 1e-4)


class SplitsTest(parameterized.TestCase):

  @parameterized.parameters(*tiny.FAMILIES)
  def test_small_splits_do_what_is_estimated(self, family):
    """The slope of every split, at all its readers, is the measured one."""
    with jax.enable_x64(True):
      data = tiny.case(family)
      count = len(data.model.candidates)
      small = ranking.scaled(
          data.model, tiny.random_splits(data), np.full(count, 1e-5)
      )
      joint = estimates.estimate(
          data.model, data.trees, small, [data.batch],
          np.random.default_rng(0), curvature='rank1',
      )
      snapshot, step = data.snapshot, max(1, count // 9)
      for number in range(0, count, step):
        axis, unit = joint.candidates[number]
        growth = surgery.morph(
            data.architecture, *snapshot.arrays, small, {axis: [unit]}
        )
        change = snapshot.grown_loss(growth) - snapshot.loss
        self.assertAlmostEqual(
            change, joint.slopes[number], delta=1e-3 * abs(change) + 1e-9
        )

  @parameterized.parameters('mlp', 'basic3resnet')
  def test_all_changes_of_the_last_layer_are_exact(self, family):
    """Splits and prunes change the logits by what they are said to."""
    with jax.enable_x64(True):
      data = tiny.case(family)
      model, trees, snapshot = data.model, data.trees, data.snapshot
      site, (x, labels) = model.sites[-1], data.batch
      chosen = tiny.random_splits(data)
      found = splits.learn(model, trees, [data.batch], np.random.default_rng(0))
      taken = estimates.compensated(model, trees, found.moments)
      _, seen = data.signals()
      s, _ = splits.project(
          site.form, trees.local(site), seen[site.axis], chosen[site.axis],
          taken[site.axis],
      )
      s, slope = np.asarray(s), np.asarray(seen[site.axis].slope[0])

      def logits(chain, trees):
        return np.asarray(base.apply(
            chain, trees.weights, trees.stats, x, train=False
        )[0])

      before = logits(model.chain, trees)
      for kind in ('split', 'prune'):
        split = {site.axis: [1]} if kind == 'split' else {}
        growth = surgery.morph(
            data.architecture, *snapshot.arrays, chosen, split,
            pruned={} if split else {site.axis: 1}, taken=taken,
        )
        moved = logits(*steps.grown(growth)) - before
        column = 1 if split else s.shape[1] // 2 + 1
        np.testing.assert_allclose(
            s[:, column], np.sum(moved * slope, -1), atol=1e-10
        )

  @parameterized.product(family=('mlp', 'plain3net'), block=('u', 'e'))
  def test_gram_and_gradient_against_automatic_derivatives(self, family, block):
    with jax.enable_x64(True):
      data = tiny.case(family)
      _, found = data.signals()
      split = tiny.random_splits(data)
      site = data.model.sites[1]
      local, signal = data.trees.local(site), found[site.axis]
      taken = splits.no_prunes(data.model, data.trees)[site.axis]
      units = site.form.readers and split[site.axis].u[0].shape[-1]
      project = lambda split: tuple(
          part[:, :units]
          for part in splits.project(site.form, local, signal, split, taken)
      )
      s_by, c_by = jax.jit(jax.jacrev(project))(split[site.axis])
      _, c = project(split[site.axis])

      def rows(tree):
        """By each unit's own weights: (batch, units, weights)."""
        kernels = getattr(tree, block)
        result = []
        for unit in range(units):
          parts = [
              np.take(np.asarray(k)[:, unit], unit, -1 if block == 'u' else -2)
              for k in kernels
          ]
          result.append(np.concatenate(
              [part.reshape(len(part), -1) for part in parts], -1
          ))
        return np.stack(result, 1)

      psi, slopes = rows(c_by), rows(s_by)
      learned = splits.moments(
          site.form, block, local, signal, split[site.axis]
      )
      np.testing.assert_allclose(
          learned['gram'], np.einsum('bud,bue->de', psi, psi), atol=1e-9
      )
      np.testing.assert_allclose(
          learned['traces'], np.sum(psi**2, (0, 2)), atol=1e-9
      )
      np.testing.assert_allclose(
          learned['gradient'],
          slopes.sum(0) + np.einsum('bu,bud->ud', c, psi),
          atol=1e-9,
      )

  def test_learning_lowers_the_model_within_trust(self):
    data = tiny.case('mlp', dtype='f4')
    weights = jax.tree.map(np.array, data.trees.weights)
    weights['s0b0']['dense']['bias'][2] = -1e3  # A dead unit.
    trees = data.trees.replace(weights=weights)
    config = splits.LearnConfig('rank1', damping=1.0)
    found = splits.learn(
        data.model, trees, [data.batch], np.random.default_rng(1), config
    )
    joint = estimates.estimate(
        data.model, trees, found.splits, [data.batch],
        np.random.default_rng(1), curvature='rank1',
    )
    self.assertGreater(joint.dropped, 0)
    count = len(joint.candidates)
    self.assertLess(joint.changes()[:count][joint.usable[:count]].max(), 0)
    self.assertFalse(joint.usable[2])
    for site in data.model.sites:
      kernels = trees.local(site).kernels(site.form.writers)
      u = splits.rows_of(found.splits[site.axis].u, 'u')
      lengths = np.linalg.norm(u, axis=-1)
      limits = np.linalg.norm(splits.rows_of(kernels, 'u'), axis=-1)
      np.testing.assert_array_less(lengths, limits * (1 + 1e-5) + 1e-9)
      balanced = splits.balanced(data.model, trees, found.splits, 0.5)
      for block, sign in (('u', 1), ('e', -1)):
        before, after = (
            splits.rows_of(getattr(one[site.axis], block), block)
            for one in (found.splits, balanced)
        )
        before, after = (np.linalg.norm(r, axis=-1) for r in (before, after))
        self.assertTrue(np.all(sign * (after - before) >= -1e-6))

  def test_linear_systems_are_not_solved_in_programs(self):
    """See `splits`: two of them in one program can hang."""
    data = tiny.case('plain3net', dtype='f4')
    _, found = data.signals()
    site, split = data.model.sites[1], tiny.random_splits(data)
    arguments = data.trees.local(site), found[site.axis], split[site.axis]
    text = splits.moments.lower(site.form, 'u', *arguments).as_text()
    self.assertIn('stablehlo', text)
    self.assertNotIn('lapack', text.lower())

  def test_bad_settings(self):
    for settings, message in (
        ({'curvature': 'x'}, 'one of mc, rank1'),
        ({'sweeps': 0}, 'sweeps is positive'),
        ({'damping': 0.0}, 'damping is positive'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        splits.LearnConfig(**settings)


class SurgeryTest(parameterized.TestCase):

  @parameterized.parameters(*tiny.FAMILIES)
  def test_without_u_nothing_changes(self, family):
    """All axes at once, whatever e is, in both modes; and the size is right."""
    with jax.enable_x64(True):
      data = tiny.case(family)
      chosen = {
          axis: split.replace(u=jax.tree.map(np.zeros_like, split.u))
          for axis, split in tiny.random_splits(data).items()
      }
      units = {site.axis: [1, 0] for site in data.model.sites}
      growth = surgery.morph(
          data.architecture, *data.snapshot.arrays, chosen, units
      )
      grown = state_lib.grown_arrays(
          data.state, growth, key=jax.random.key(0)
      )
      size = sum(map(np.size, jax.tree.leaves(grown.params)))
      self.assertEqual(size, costs.params(growth.target))
      chains = (data.model.chain, data.trees), steps.grown(growth)
      for train in (False, True):
        before, after = (
            base.apply(
                chain, trees.weights, trees.stats, data.batch[0], train=train
            )[0]
            for chain, trees in chains
        )
        np.testing.assert_allclose(before, after, atol=1e-9)

  @parameterized.parameters('plain3net', 'basic3resnet', 'wrn28_10')
  def test_a_twin_takes_over_at_every_reader(self, family):
    """Least squares undo a split, beside another split of the same step."""
    with jax.enable_x64(True):
      data = tiny.case(family)
      site = data.model.sites[len(data.model.sites) // 2]
      chosen = {
          axis: split.replace(u=jax.tree.map(np.zeros_like, split.u))
          for axis, split in tiny.random_splits(data).items()
      }
      wider = surgery.morph(
          data.architecture, *data.snapshot.arrays, chosen, {site.axis: [0]}
      )
      state = state_lib.grown_arrays(
          data.state, wider, key=jax.random.key(0)
      )
      chain, trees = steps.grown(wider)
      model = signals.model_of(wider.target)
      found = splits.learn(model, trees, [data.batch], np.random.default_rng(0))
      taken = estimates.compensated(model, trees, found.moments)
      others = {s.axis: [0] for s in model.sites if s.axis != site.axis}
      still = {
          axis: split.scaled(
              np.zeros(split.u[0].shape[-1]), np.ones(split.e[0].shape[-2])
          )
          for axis, split in found.splits.items()
      }
      back = surgery.morph(
          wider.target, state.params['weights'], state.stats['network'], still,
          others, pruned={site.axis: site.units}, taken=taken,
      )
      self.assertEqual(back.target.size(site.axis), site.units)
      self.assertAlmostEqual(
          signals.mean_loss(*steps.grown(back), [data.batch]),
          signals.mean_loss(chain, trees, [data.batch]), places=4,
      )

  def test_bad_input(self):
    data = tiny.case('mlp', dtype='f4')
    morph = lambda units, **more: surgery.morph(
        data.architecture, *data.snapshot.arrays, tiny.random_splits(data),
        units, **more,
    )
    with self.assertRaisesRegex(ValueError, "Axes .*'classes'.* cannot"):
      morph({'classes': [0]})
    with self.assertRaisesRegex(ValueError, 'distinct numbers from 0 to 4'):
      morph({'s0b0.out': [5]})
    with self.assertRaisesRegex(ValueError, 'distinct numbers from 0 to 4'):
      morph({'s0b0.out': [1]}, pruned={'s0b0.out': 1})


if __name__ == '__main__':
  absltest.main()
