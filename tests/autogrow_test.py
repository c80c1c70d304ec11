"""Tests of AutoGrow: what a new sub-module starts from."""

import itertools
import re
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import tiny_networks

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import autogrow
from autogrow_jax.methods import base as methods_base
from autogrow_jax.networks import base

AutoGrow = autogrow.AutoGrow
Growth = growth_lib.Growth
SGD = tiny_networks.OPTIMIZERS['sgd']
PLAIN = tuple(
    name
    for name in networks.FAMILIES
    if 'resnet' not in name and name != 'deeplab'
)


def situation(architecture, state, batches=None, **changes):
  """What `propose` sees; without batches, drawing one is an error."""
  arguments = dict(
      architecture=architecture,
      state=state,
      key=jax.random.key(0),
      task=tasks.Classes(),
      batches=batches or unexpected,
      batches_per_epoch=2,
      train_accuracy=0.5,
      weight_decay=5e-4,
  )
  return methods_base.Situation(**(arguments | changes))


def unexpected():
  raise AssertionError('This needs no batches.')


def batches_of(count=8, classes=tiny_networks.CLASSES):
  """Endless batches, and how many were drawn."""
  drawn = []

  def batches():
    for number in itertools.count():
      drawn.append(number)
      labels = np.random.default_rng(number).integers(0, classes, count)
      yield tiny_networks.images(count, number), labels.astype('i4')

  return batches, drawn


def grow(method, architecture, state, stage, number=0, **changes):
  """The growth, and the grown state."""
  key = jax.random.key(number)
  with mock.patch.object(base, 'init', tiny_networks.draw):
    change = method.propose(
        policies.Decision('grow', stage),
        situation(architecture, state, key=key, **changes),
    )
  return change, tiny_networks.grow(state, change, number=number)[0]


def appended(architecture, state, *stages):
  """The state with fresh blocks."""
  return tiny_networks.grow(state, state_lib.append(architecture, stages))[0]


def trained_state(architecture, number=0):
  """A state with momentum, and past its first step."""
  state = tiny_networks.state(architecture, number=number)
  generator = np.random.default_rng(number)
  return state.replace(
      step=np.int32(17),
      opt_state=jax.tree.map(
          lambda leaf: generator.normal(size=leaf.shape).astype(leaf.dtype),
          state.opt_state,
      ),
  )


def new_block(change, stage):
  return change.target.stages[stage][-1]


class ProposeTest(parameterized.TestCase):

  @parameterized.parameters(
      policies.KEEP, policies.FINISH, policies.Decision('keep', closed=(1,))
  )
  def test_proposes_nothing_unless_told(self, decision):
    architecture = tiny_networks.seed('basic3resnet')
    proposed = AutoGrow().propose(
        decision, situation(architecture, tiny_networks.state(architecture))
    )
    self.assertIsNone(proposed)

  @parameterized.parameters('basic3resnet', 'plain3net')
  def test_appends_all_that_a_target_lacks(self, family):
    architecture = tiny_networks.seed(family, (1, 2, 1))
    state = tiny_networks.state(architecture)
    change = AutoGrow('uniform').propose(
        policies.Decision('grow', target=(3, 2, 2)),
        situation(architecture, state),
    )
    self.assertEqual(change.target.depths, (3, 2, 2))
    self.assertStartsWith(change.note, 'append s0b1, s0b2, s2b1, ')
    grown, _ = state_lib.grow(state, change, SGD, key=jax.random.key(0))
    if family not in PLAIN:
      weights = grown.params['weights']
      scales = [
          weights[block]['norm2']['scale'] for block in ('s0b1', 's0b2', 's2b1')
      ]
      for scale in scales:
        self.assertBetween(scale.min(), 0, 1)
        self.assertGreater(scale.std(), 0)
      self.assertNotAlmostEqual(scales[0][0], scales[1][0])

  @parameterized.parameters(
      *((family, 'gauss') for family in networks.FAMILIES),
      *(('basic3resnet', name) for name in autogrow.INITIALIZERS),
  )
  def test_appends_to_the_stage(self, family, initializer):
    architecture = tiny_networks.seed(family)
    self.enter_context(
        mock.patch.object(autogrow, 'adam_last_norms', return_value=Growth())
    )
    for stage in range(len(architecture.stages)):
      change, _ = grow(
          AutoGrow(initializer),
          architecture,
          tiny_networks.state(architecture),
          stage,
      )
      self.assertEqual(change.target, architecture.with_block(stage))
      self.assertEqual(change.sources, {})
      self.assertIn(f'append {new_block(change, stage)}, ', change.note)
      if family in PLAIN and initializer != 'copy':
        self.assertIn('default initialisation', change.note)
      elif initializer != 'copy':
        self.assertIn(f'{initializer} initialisation of norm', change.note)
      # Formulas of a sub-module of this width; none of them projects.
      width = tiny_networks.WIDTHS[stage]
      formula = {
          'basic': 18 * width**2 + 4 * width,
          'bottle': 17 * width**2 + 12 * width,
          'plain': 9 * width**2 + 2 * width,
          'vgg16': 9 * width**2 + 3 * width,
          'vgg19': 9 * width**2 + 2 * width,
          'wrn': 18 * width**2 + 6 * width,
          'mobile': width**2 + 13 * width,
          'mlp': width**2 + width,
          'deeplab': 17 * width**2 + 12 * width,
          'lstm': 8 * width**2 + 4 * width,
      }
      self.assertEqual(
          costs.params(change.target) - costs.params(architecture),
          next(n for name, n in formula.items() if family.startswith(name)),
      )

  @parameterized.parameters(
      ('basic3resnet', 'norm2'),
      ('basic4resnet', 'norm2'),
      ('bottleneck4resnet', 'norm3'),
      ('plain3net', None),
  )
  def test_last_norm(self, family, norm):
    architecture = tiny_networks.seed(family)
    self.assertEqual(autogrow.last_norm(architecture, 's1b1'), norm)
    with self.assertRaisesRegex(ValueError, "No block 's1b7'"):
      autogrow.last_norm(architecture, 's1b7')

  @parameterized.parameters(
      (dict(initializer='ones'), "adam, copy, got 'ones'"),
      (dict(scale=0.0), 'scale is positive, got 0.0'),
      (dict(scale=float('nan')), 'scale is positive, got nan'),
      (dict(low=1.0, high=1.0), 'low is below high, got 1.0 and 1.0'),
  )
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      AutoGrow(**arguments)

  def test_is_hashable(self):
    self.assertEqual(hash(AutoGrow('zero')), hash(AutoGrow('zero')))


class CarryTest(parameterized.TestCase):

  @parameterized.parameters(
      *(
          (family, 'gauss')
          for family in tiny_networks.DISTINCT
          if family != 'basic1resnet'  # It has one stage.
      ),
      ('basic3resnet', 'zero'),
      ('basic3resnet', 'uniform'),
      ('basic3resnet', 'copy'),
  )
  def test_old_leaves_are_untouched(self, family, initializer):
    architecture = tiny_networks.seed(family)
    state = trained_state(architecture)
    change, grown = grow(AutoGrow(initializer), architecture, state, 1)
    old, new = tiny_networks.leaves(state), tiny_networks.leaves(grown)
    for path, leaf in old.items():
      np.testing.assert_array_equal(new[path], leaf, path)
    for path in new.keys() - old.keys():
      self.assertIn('/s1b2/', path)
      if path.startswith('opt_state'):
        np.testing.assert_array_equal(new[path], 0, path)
    self.assertEqual(
        tiny_networks.described(grown),
        tiny_networks.described(
            state_lib.abstract_state(change.target, SGD)
        ),
    )

  @parameterized.parameters('basic3resnet', 'plain3net', 'bottleneck4resnet')
  def test_a_copy_is_one_but_for_what_begins_a_stage(self, family):
    architecture = tiny_networks.seed(family)
    state = trained_state(architecture)
    _, grown = grow(AutoGrow('copy'), architecture, state, 1)
    old, new = (
        {
            path: leaf
            for path, leaf in tiny_networks.leaves(grown).items()
            if f'/{block}/' in path and not path.startswith('opt_state')
        }
        for block in architecture.stages[1][-1:] + ('s1b2',)
    )
    self.assertNotEmpty(new)
    for path, leaf in new.items():
      np.testing.assert_array_equal(leaf, old[path.replace('s1b2', 's1b1')])

  @parameterized.parameters('gauss', 'uniform')
  def test_draws_follow_the_key(self, initializer):
    architecture = tiny_networks.seed('basic3resnet')
    state = trained_state(architecture)
    method = AutoGrow(initializer)
    one, again, other = (
        grow(method, architecture, state, 1, number)[1] for number in (3, 3, 4)
    )
    tiny_networks.assert_same(one, again)
    block = lambda state: state.params['weights']['s1b2']
    for layer, leaf in (
        ('norm2', 'scale'),
        ('norm2', 'bias'),
        ('conv1', 'kernel'),
    ):
      self.assertFalse(
          np.isin(block(one)[layer][leaf], block(other)[layer][leaf]).any()
      )
    self.assertFalse(
        np.isin(block(one)['norm2']['scale'], block(one)['norm2']['bias']).any()
    )
    # Neither the order of the data nor the step depends on it.
    np.testing.assert_array_equal(one.key, state.key)
    self.assertEqual(one.step, other.step)

  @parameterized.parameters('plain3net', 'vgg16', 'mlp', 'lstm2')
  def test_plain_networks_know_no_initialisers(self, family):
    architecture = tiny_networks.seed(family)
    state = trained_state(architecture)
    stage = len(architecture.stages) - 1
    grown = [
        grow(AutoGrow(initializer), architecture, state, stage)
        for initializer in autogrow.INITIALIZERS
        if initializer != 'copy'
    ]
    for change, other in grown[1:]:
      tiny_networks.assert_same(other, grown[0][1])
      self.assertEqual(change.report, {})


class DrawTest(parameterized.TestCase):

  def draws(self, method, count=60):
    """Scales and biases of many growths of a stage of width 64."""
    architecture = tiny_networks.seed('basic3resnet', widths=(4, 4, 64))
    state = trained_state(architecture)
    changes = [
        method.propose(
            policies.Decision('grow', 2),
            situation(architecture, state, key=jax.random.key(number)),
        )
        for number in range(count)
    ]
    path = 'weights', 's2b1', 'norm2'
    return {
        leaf: np.stack([change.values[*path, leaf] for change in changes])
        for leaf in ('scale', 'bias')
    }

  @parameterized.parameters(1.0, 0.25)
  def test_gauss(self, scale):
    for values in self.draws(AutoGrow('gauss', scale=scale)).values():
      self.assertEqual(values.dtype, np.float32)
      np.testing.assert_allclose(values.mean(), 0, atol=0.06 * scale)
      np.testing.assert_allclose(values.std(), scale, rtol=0.04)
      # A normal distribution has 4.55 % beyond two deviations.
      beyond = np.mean(np.abs(values) > 2 * scale)
      np.testing.assert_allclose(beyond, 0.0455, atol=0.012)

  def test_uniform(self):
    for values in self.draws(AutoGrow('uniform')).values():
      self.assertBetween(values.min(), 0, 0.01)
      self.assertBetween(values.max(), 0.99, 1)
      np.testing.assert_allclose(values.mean(), 0.5, atol=0.02)
      np.testing.assert_allclose(values.std(), 0.2887, rtol=0.04)

  def test_uniform_between(self):
    draws = self.draws(AutoGrow('uniform', low=-1.75, high=1.75), count=20)
    for values in draws.values():
      self.assertBetween(values.min(), -1.75, -1.7)
      self.assertBetween(values.max(), 1.7, 1.75)

  def test_scale_and_bias_are_independent(self):
    draws = self.draws(AutoGrow('gauss'))
    correlation = np.corrcoef(draws['scale'].ravel(), draws['bias'].ravel())
    self.assertLess(abs(correlation[0, 1]), 0.07)

  def test_bias_may_keep_its_default(self):
    architecture = tiny_networks.seed('basic3resnet')
    state = trained_state(architecture)
    default, random = (
        grow(
            AutoGrow('gauss', random_bias=random_bias), architecture, state, 1
        )[1].params['weights']['s1b2']
        for random_bias in (False, True)
    )
    fresh = appended(architecture, state, 1)
    fresh = fresh.params['weights']['s1b2']
    np.testing.assert_array_equal(
        default['norm2']['bias'], fresh['norm2']['bias']
    )
    np.testing.assert_array_equal(
        default['norm2']['scale'], random['norm2']['scale']
    )
    # The last norm apart, a new block is what it would be anyway.
    del default['norm2'], random['norm2'], fresh['norm2']
    tiny_networks.assert_same(default, fresh)
    tiny_networks.assert_same(random, fresh)

  @parameterized.parameters(
      ('basic3resnet', 'norm2'), ('bottleneck4resnet', 'norm3')
  )
  def test_zero(self, family, norm):
    architecture = tiny_networks.seed(family)
    _, grown = grow(
        AutoGrow('zero'), architecture, trained_state(architecture), 0
    )
    block = grown.params['weights']['s0b1']
    for leaf in ('scale', 'bias'):
      np.testing.assert_array_equal(block[norm][leaf], 0)
    self.assertTrue(np.all(block['norm1']['scale'] > 0))

  def test_real_default_initialisation(self):
    # Without the stand-in of the other tests.
    architecture = tiny_networks.seed('basic3resnet', (1, 1, 1))
    state = trained_state(architecture)
    change = AutoGrow('gauss').propose(
        policies.Decision('grow', 1), situation(architecture, state)
    )
    grown, _ = state_lib.grow(state, change, SGD, key=jax.random.key(0))
    block = grown.params['weights']['s1b1']
    np.testing.assert_array_equal(block['norm1']['scale'], 1)
    np.testing.assert_array_equal(block['norm1']['bias'], 0)
    self.assertNotIn(1, block['norm2']['scale'])
    bound = 1 / np.sqrt(9 * 6)
    self.assertBetween(
        np.abs(block['conv1']['kernel']).max(), 0.9 * bound, bound
    )
    stats = grown.stats['network']['s1b1']
    for norm in ('norm1', 'norm2'):
      np.testing.assert_array_equal(stats[norm]['mean'], 0)
      np.testing.assert_array_equal(stats[norm]['var'], 1)


class ZeroTest(parameterized.TestCase):
  """ZeroInit is the identity, exactly (on CPUs, in the unrolled network)."""

  @parameterized.parameters('basic3resnet', 'bottleneck4resnet')
  def test_preserves_exactly(self, family):
    stages = len(networks.get(family).widths)
    architecture = tiny_networks.seed(family, (1,) * stages)
    state, x = trained_state(architecture), tiny_networks.images()
    for stage in (0, stages - 1):
      change, grown = grow(AutoGrow('zero'), architecture, state, stage)
      for train in (False, True):
        want, stats = tiny_networks.forward(
            architecture, state, x, train=train
        )
        got, new_stats = tiny_networks.forward(
            change.target, grown, x, train=train
        )
        np.testing.assert_array_equal(got, want)
        del new_stats[new_block(change, stage)]
        tiny_networks.assert_same(new_stats, stats)

  @parameterized.parameters('gauss', 'uniform')
  def test_others_do_not(self, initializer):
    architecture = tiny_networks.seed('basic3resnet')
    state, x = trained_state(architecture), tiny_networks.images()
    change, grown = grow(AutoGrow(initializer), architecture, state, 1)
    want, _ = tiny_networks.forward(architecture, state, x, train=False)
    got, _ = tiny_networks.forward(change.target, grown, x, train=False)
    self.assertGreater(np.abs(got - want).max(), 1e-2)

  def test_gradients(self):
    architecture = tiny_networks.seed('basic3resnet', (1, 1, 1))
    state, x = trained_state(architecture), tiny_networks.images()
    labels = np.arange(len(x), dtype='i4') % tiny_networks.CLASSES
    change, grown = grow(AutoGrow('zero'), architecture, state, 1)

    def gradient(architecture, state):
      bucket = view.layout(architecture, fuse=False).bucket

      def loss(weights):
        logits, _ = base.apply(
            bucket, weights, state.stats['network'], x, train=True
        )
        return jnp.mean(tasks.cross_entropy(logits, labels))

      return jax.jit(
          jax.grad(loss), compiler_options=tiny_networks.FAST_COMPILE
      )(state.params['weights'])

    old = gradient(architecture, state)
    new = gradient(change.target, grown)
    block = new.pop('s1b1')
    tiny_networks.assert_close(new, old, 1e-6)
    for layer, leaves in block.items():
      for name, leaf in leaves.items():
        if layer == 'norm2':
          self.assertGreater(np.abs(leaf).max(), 1e-5, name)
        else:
          np.testing.assert_array_equal(leaf, 0, f'{layer}/{name}')


class AdamTest(parameterized.TestCase):

  def test_trains_the_last_norm_alone(self):
    architecture = tiny_networks.seed('basic3resnet', (1, 1, 1))
    state = trained_state(architecture)
    fresh = appended(architecture, state, 1)
    batches, drawn = batches_of()
    change, grown = grow(
        AutoGrow('adam'),
        architecture,
        state,
        1,
        batches=batches,
        batches_per_epoch=1,
        train_accuracy=0.0,
        weight_decay=0.0,
    )
    self.assertEqual(drawn, [0])
    old, new = tiny_networks.leaves(fresh), tiny_networks.leaves(grown)
    self.assertEqual(old.keys(), new.keys())
    for path, leaf in new.items():
      if path.startswith('params/weights/s1b1/norm2/'):
        # The first step of Adam has the size of its rate, whatever the
        # gradient, unless that is zero.
        np.testing.assert_allclose(
            np.abs(leaf - old[path]), 1e-3, rtol=0.02, err_msg=path
        )
      elif path.startswith('stats/network/'):
        self.assertGreater(np.abs(leaf - old[path]).max(), 1e-4, path)
      else:
        np.testing.assert_array_equal(leaf, old[path], path)
    self.assertEqual(
        {**change.report, 'adam_accuracy': None},
        {
            'adam_epochs': 1,
            'adam_accuracy': None,
            'adam_target': -0.5,
            'adam_success': True,
        },
    )
    # The first step's accuracy is that of the fresh block, in train mode.
    x, labels = next(batches_of()[0]())
    logits, stats = tiny_networks.forward(
        architecture.with_block(1), fresh, x, train=True
    )
    accuracy = 100 * np.mean(logits.argmax(-1) == labels)
    self.assertAlmostEqual(change.report['adam_accuracy'], accuracy, 2)
    tiny_networks.assert_close(grown.stats['network'], stats, 1e-5)

  def test_trains_the_norms_of_all_new_blocks_together(self):
    architecture = tiny_networks.seed('basic3resnet', (1, 1, 1))
    state = trained_state(architecture)
    fresh = appended(architecture, state, 0, 0, 2)
    with mock.patch.object(base, 'init', tiny_networks.draw):
      change = AutoGrow('adam').propose(
          policies.Decision('grow', target=(3, 1, 2)),
          situation(
              architecture,
              state,
              batches=batches_of()[0],
              batches_per_epoch=1,
              train_accuracy=0.0,
              weight_decay=0.0,
          ),
      )
    grown, _ = tiny_networks.grow(state, change)
    old, new = tiny_networks.leaves(fresh), tiny_networks.leaves(grown)
    moved = {
        path
        for path, leaf in new.items()
        if path.startswith('params/') and not np.array_equal(leaf, old[path])
    }
    self.assertEqual(
        moved,
        {
            f'params/weights/{block}/norm2/{leaf}'
            for block in ('s0b1', 's0b2', 's2b1')
            for leaf in ('scale', 'bias')
        },
    )
    for path in moved:
      np.testing.assert_allclose(
          np.abs(new[path] - old[path]), 1e-3, rtol=0.02, err_msg=path
      )
    self.assertEqual(change.examples, 8)  # One batch for all.

  @parameterized.parameters(1, 5, 10)
  def test_stops_when_it_succeeds_or_after_ten_epochs(self, epochs):
    # The labels decide from which epoch on the network is right.
    architecture = tiny_networks.seed('basic3resnet', (1, 1, 1))
    state = trained_state(architecture)
    fresh = appended(architecture, state, 1)
    x = tiny_networks.images(8)
    logits, _ = tiny_networks.forward(
        architecture.with_block(1), fresh, x, train=True
    )
    right = logits.argmax(-1).astype('i4')
    wrong = (right + 1) % tiny_networks.CLASSES
    right_from = 2 * (epochs - 1) if epochs < 10 else 10_000
    drawn = []

    def batches():
      for number in itertools.count():
        drawn.append(number)
        yield x, right if number >= right_from else wrong

    # A learning rate of zero keeps the predictions as they are.
    with mock.patch.object(autogrow, 'ADAM_LEARNING_RATE', 0.0):
      change, _ = grow(
          AutoGrow('adam'),
          architecture,
          state,
          1,
          batches=batches,
          train_accuracy=1.0,
      )
    self.assertEqual(change.report['adam_epochs'], epochs)
    self.assertEqual(change.report['adam_success'], epochs < 10)
    self.assertEqual(
        change.report['adam_accuracy'], 100.0 if epochs < 10 else 0.0
    )
    self.assertEqual(change.report['adam_target'], 99.5)
    self.assertEqual(change.examples, 8 * 2 * epochs)
    self.assertLen(drawn, 2 * epochs)

  def test_weight_decay_is_coupled(self):
    # Decay so strong that it decides the sign of Adam's first step.
    architecture = tiny_networks.seed('basic3resnet', (1, 1, 1))
    state = trained_state(architecture)
    _, grown = grow(
        AutoGrow('adam'),
        architecture,
        state,
        2,
        batches=batches_of()[0],
        batches_per_epoch=1,
        train_accuracy=0.0,
        weight_decay=1e6,
    )
    fresh = appended(architecture, state, 2)
    for leaf in ('scale', 'bias'):
      before = fresh.params['weights']['s2b1']['norm2'][leaf]
      after = grown.params['weights']['s2b1']['norm2'][leaf]
      np.testing.assert_allclose(
          after - before, -1e-3 * np.sign(before), rtol=1e-2
      )


if __name__ == '__main__':
  absltest.main()
