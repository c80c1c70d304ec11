"""Tests of the stacked LSTM: its formula, its state, its axes, its dropout."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import tiny_networks

from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.networks import base

WORDS = 7
STREAMS = 3


def build(depths=(1, 1), **options):
  return networks.get('lstm2').seed(
      depths,
      input_shape=(1,),
      classes=WORDS,
      options={'widths': (4, 6), 'streams': STREAMS, **options},
  )


def tokens(rows, steps, number=0):
  generator = np.random.default_rng(number)
  return generator.integers(0, WORDS, (rows, steps)).astype(np.int32)


def run(architecture, state, x, *, train, fuse=False, key=None):
  """Logits and canonical statistics."""
  layout = view.layout(architecture, fuse=fuse)
  packed = view.pack(state, layout)
  logits, stats = jax.jit(
      lambda weights, stats, x, key: base.apply(
          layout.bucket, weights, stats, x, train=train, key=key
      )
  )(packed.params['weights'], packed.stats['network'], x, key)
  return np.asarray(logits), view.unpack(stats, layout)


def followed_by(state, stats):
  """A state with other network statistics."""
  return state.replace(stats={**state.stats, 'network': stats})


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def by_formula(weights, x):
  """Logits by Yuan et al. 2021, eq. 9, step by step and gate by gate."""
  inputs = weights['stem']['embedding']['table'][x]
  for block in ('s0b0', 's1b0'):
    leaf = {
        name: value.astype(np.float64)
        for name, value in weights[block]['lstm'].items()
    }
    units = leaf['bias'].shape[-1]
    outputs = np.zeros((*x.shape, units))
    for row in range(len(x)):
      h, c = np.zeros(units), np.zeros(units)
      for step in range(x.shape[1]):
        i, f, o, candidate = (
            inputs[row, step] @ leaf['kernel'][:, gate]
            + h @ leaf['recurrent_kernel'][:, gate]
            + leaf['bias'][gate]
            for gate in range(4)
        )
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(candidate)
        h = sigmoid(o) * np.tanh(c)
        outputs[row, step] = h
    inputs = outputs
  dense = weights['head']['dense']
  return inputs @ dense['kernel'] + dense['bias']


class ForwardTest(parameterized.TestCase):

  def test_equals_its_formula(self):
    architecture = build()
    state = tiny_networks.state(architecture)
    x = tokens(2, 5)
    # Statistics of `tiny_networks` are arbitrary, but evaluations ignore them.
    logits, _ = run(architecture, state, x, train=False)
    np.testing.assert_allclose(
        logits, by_formula(state.params['weights'], x), atol=1e-5
    )

  def test_parameters_start_within_their_bound(self):
    architecture = build(init_bound=0.5)
    for part in networks.parts(architecture):
      weights, stats = base.init(part, jax.random.key(0))
      for leaf in jax.tree.leaves(weights):
        self.assertBetween(np.abs(leaf).max(), 0.25, 0.5)
      for leaf in jax.tree.leaves(stats):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))

  @parameterized.parameters(
      ({'keep': 0}, 'keep is above 0 and at most 1, got 0.0'),
      ({'init_bound': -1}, 'init_bound is a positive number'),
      ({'widths': (4,)}, '2 positive widths, got 4'),
      ({'stem': 'small'}, "has no options ['stem']"),
  )
  def test_refusals(self, options, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      build(**options)

  def test_images_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'reads text, not inputs of'):
      networks.get('lstm2').seed(
          (1, 1), input_shape=(8, 8, 3), classes=10, options={}
      )


class StateTest(parameterized.TestCase):

  def test_windows_go_on_as_one_long_window(self):
    architecture = build((2, 1))
    start = tiny_networks.state(architecture)
    x = tokens(STREAMS, 10)
    want, stats = run(architecture, start, x, train=True)
    state, got = start, []
    for window in (x[:, :4], x[:, 4:]):
      logits, kept = run(architecture, state, window, train=True)
      got.append(logits)
      state = followed_by(state, kept)
    np.testing.assert_allclose(np.concatenate(got, 1), want, atol=1e-5)
    tiny_networks.assert_close(state.stats['network'], stats, 1e-5)
    fresh, _ = run(architecture, start, x[:, 4:], train=True)
    self.assertGreater(np.abs(fresh - want[:, 4:]).max(), 1e-3)

  def test_no_gradient_crosses_windows(self):
    architecture = build()
    layout = view.layout(architecture, fuse=False)
    state = tiny_networks.state(architecture)
    x = tokens(STREAMS, 4)

    def kept(weights):
      _, stats = base.apply(
          layout.bucket, weights, state.stats['network'], x, train=True
      )
      return sum(leaf.sum() for leaf in jax.tree.leaves(stats))

    for leaf in jax.tree.leaves(jax.grad(kept)(state.params['weights'])):
      np.testing.assert_array_equal(leaf, np.zeros_like(leaf))

  @parameterized.parameters(False, np.True_)
  def test_evaluations_begin_at_zero_and_leave_the_state(self, train):
    architecture = build()
    state = tiny_networks.state(architecture)
    rewound = base.rewound(state.stats['network'])
    x = tokens(STREAMS + 2, 4)
    if train is not False:  # Traced, as for a receipt.
      bucket = view.layout(architecture, fuse=False).bucket
      got, stats = jax.jit(
          lambda train: base.apply(
              bucket,
              state.params['weights'],
              state.stats['network'],
              x,
              train=train,
          )
      )(train)
    else:
      got, stats = run(architecture, state, x, train=False)
    tiny_networks.assert_same(stats, state.stats['network'])
    want, _ = run(
        architecture, followed_by(state, rewound), x[:STREAMS], train=True
    )
    np.testing.assert_allclose(got[:STREAMS], want, atol=1e-5)

  def test_rewinding(self):
    state = tiny_networks.state(build())
    for leaf in jax.tree.leaves(base.rewound(state.stats['network'])):
      np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    resnet = tiny_networks.state(tiny_networks.seed('basic3resnet'))
    tiny_networks.assert_same(
        base.rewound(resnet.stats['network']), resnet.stats['network']
    )

  def test_other_batches_are_refused(self):
    architecture = build()
    with self.assertRaisesRegex(ValueError, '4 rows, but .* 3 streams'):
      run(
          architecture,
          tiny_networks.state(architecture),
          tokens(4, 2),
          train=True,
      )


class AxesTest(parameterized.TestCase):

  @parameterized.product(axis=('s0b0.hidden', 's1b0.hidden'), train=(0, 1))
  def test_unread_units_are_as_good_as_pruned(self, axis, train):
    architecture = build()
    state = tiny_networks.state(architecture)
    kept = np.array([0, 2, 3])
    gate = np.zeros(architecture.size(axis), np.float32)
    gate[kept] = 1
    gated = state.replace(
        params=axes_lib.scale_readers(
            state.params, state_lib.axis_table(architecture), {axis: gate}
        )
    )
    pruned = tiny_networks.prune(architecture, axis, kept)
    sliced, _ = tiny_networks.grow(state, pruned, draw=base.init)
    x = tokens(STREAMS, 5)
    want, _ = run(architecture, gated, x, train=bool(train))
    got, _ = run(pruned.target, sliced, x, train=bool(train))
    np.testing.assert_allclose(got, want, atol=1e-6)
    ungated, _ = run(architecture, state, x, train=bool(train))
    self.assertGreater(np.abs(ungated - want).max(), 1e-3)

  def test_new_units_have_no_past(self):
    architecture = build()
    state = tiny_networks.state(architecture)
    change = tiny_networks.widen(architecture, 's0b0.hidden', 2)
    grown, _ = tiny_networks.grow(state, change, draw=base.init)
    for name in base.CARRIED:
      leaf = grown.stats['network']['s0b0'][name]
      np.testing.assert_array_equal(leaf[:, 4:], np.zeros((STREAMS, 2)))
      np.testing.assert_array_equal(
          leaf[:, :4], state.stats['network']['s0b0'][name]
      )

  def test_a_gate_of_zero_removes_a_block(self):
    architecture = build((2, 1))
    state = tiny_networks.state(architecture)
    bucket = view.layout(architecture, fuse=False).bucket
    x = tokens(2, 3)
    got, _ = base.apply(
        bucket,
        state.params['weights'],
        state.stats['network'],
        x,
        train=False,
        gates={'s0b1': np.float32(0)},
    )
    shallow = architecture.without_block('s0b1')
    want, _ = run(shallow, state, x, train=False)
    np.testing.assert_allclose(got, want, atol=1e-6)


class DropoutTest(parameterized.TestCase):

  def test_the_same_with_spare_room(self):
    architecture = build((3, 3), keep=0.6)
    state = tiny_networks.state(architecture)
    x, key = tokens(STREAMS, 4), jax.random.key(5)

    def results(layout):
      packed = view.pack(state, layout)

      def loss(weights):
        logits, stats = base.apply(
            layout.bucket,
            weights,
            packed.stats['network'],
            x,
            train=True,
            key=key,
            depths=layout.depths,
        )
        return jnp.sum(jnp.sin(logits)), (logits, stats)

      grads, (logits, stats) = jax.jit(
          jax.grad(loss, has_aux=True),
          compiler_options=tiny_networks.FAST_COMPILE,
      )(packed.params['weights'])
      unpack = lambda tree: view.unpack(tree, layout)
      return {'x': logits, 'grads': unpack(grads), 'stats': unpack(stats)}

    spare = view.layout(architecture, spare=True)
    self.assertEqual(list(spare.depths.values()), [3, 2])
    want = results(view.layout(architecture, fuse=False))
    tiny_networks.assert_close(results(spare), want, 1e-5)

  @parameterized.parameters(1.0, 0.6)
  def test_fused_equals_unfused(self, keep):
    architecture = build((3, 2), keep=keep)
    self.assertLen(view.layout(architecture).bucket, 5)
    state = tiny_networks.state(architecture)
    x, key = tokens(STREAMS, 4), jax.random.key(5)
    exact = run(architecture, state, x, train=True, key=key)
    fused = run(architecture, state, x, train=True, key=key, fuse=True)
    np.testing.assert_allclose(fused[0], exact[0], atol=1e-6)
    tiny_networks.assert_close(fused[1], exact[1], 1e-6)

  def test_drops_in_training_only(self):
    architecture = build(keep=0.6)
    state = tiny_networks.state(architecture)
    x = tokens(STREAMS, 4)
    zero = followed_by(state, base.rewound(state.stats['network']))
    whole, _ = run(architecture, zero, x, train=False)
    without_key, _ = run(architecture, zero, x, train=True)
    np.testing.assert_allclose(without_key, whole, atol=1e-6)
    others = []
    for number in (0, 1):
      key = jax.random.key(number)
      evaluated, _ = run(architecture, zero, x, train=False, key=key)
      np.testing.assert_array_equal(evaluated, whole)
      dropped, _ = run(architecture, zero, x, train=True, key=key)
      self.assertGreater(np.abs(dropped - whole).max(), 1e-2)
      others.append(dropped)
    self.assertGreater(np.abs(others[0] - others[1]).max(), 1e-2)

  def test_scales_up_what_stays(self):
    class Passing(networks.lstm.RecurrentBlock):

      def __call__(self, x, *, train, gate=None):
        return self.dropped(x, train)

    x = np.ones((50, 40, 5), np.float32)
    y = Passing(keep=0.8).apply(
        {}, x, train=True, rngs={'dropout': jax.random.key(0)}
    )
    self.assertEqual(set(np.unique(y)), {0, np.float32(1 / 0.8)})
    self.assertAlmostEqual(float(y.mean()), 1, delta=0.03)


class ScheduleTest(absltest.TestCase):

  def rates(self, epochs):
    schedule = optimizers.Schedule(1.0, 'constant', 1, epochs, 'zaremba')
    return [schedule.rate('training', epoch) for epoch in range(epochs)]

  def test_published(self):
    rates = self.rates(55)
    np.testing.assert_array_equal(rates[:14], 1)
    np.testing.assert_allclose(rates[14:17], [1.15**-1, 1.15**-2, 1.15**-3])
    self.assertAlmostEqual(rates[-1], 1.15**-41)

  def test_shorter_ones_are_the_same_in_their_time(self):
    np.testing.assert_allclose(self.rates(11), self.rates(55)[4::5])


if __name__ == '__main__':
  absltest.main()
