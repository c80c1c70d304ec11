"""Tests of `Sparsify` on one batch: gates and gradients.

Numbers are those of the invariants that the method's specification lists.
"""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from autogrow_jax import costs
from autogrow_jax import view
from autogrow_jax.methods import base as methods_base
from autogrow_jax.methods.sparsify import method as sparsify
from autogrow_jax.methods.sparsify import space as space_lib
from autogrow_jax.run import parallel
import tiny_masks
import tiny_networks

METHOD = tiny_masks.METHOD
EVERYWHERE = tuple(
    ('_'.join([network.title, *map(str, options.values())]), network, options)
    for network, options in tiny_masks.VARIANTS
)


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


class EquivalenceTest(parameterized.TestCase):
  """What is computed, against all of it with gates, and against the slice."""

  @parameterized.named_parameters(*EVERYWHERE)
  def test_compact_masked_and_sliced_agree(self, network, options):
    """Invariants 1, 2, 7: soft gates, both modes."""
    architecture = tiny_masks.seed(network, **options)
    state = tiny_masks.sampled(architecture)
    if network in tiny_masks.CHAINS:  # A gate that can be folded.
      s = state.params['aux']
      layers = tiny_masks.hard(state.stats['method']['q']['layers'])
      state = tiny_masks.masked(state, s={**s, 'layers': layers})
    whole, part = (
        tiny_masks.logits(METHOD, architecture, state, compact=compact)
        for compact in (False, True)
    )
    tiny_masks.same(part, whole)
    change = METHOD.conclude(architecture, state)
    pruned, _ = tiny_masks.grow(state, change)
    small = change.target
    sliced = tiny_masks.logits(METHOD, small, pruned, compact=False)
    tiny_masks.same(sliced, whole)
    q = state.stats['method']['q']
    space = space_lib.of(architecture, 'both')
    counts = space_lib.counts(space, q), q['layers']
    self.assertEqual(
        costs.params(architecture, *counts),
        sum(leaf.size for leaf in jax.tree.leaves(pruned.params['weights'])),
    )
    self.assertEqual(costs.macs(architecture, *counts), costs.macs(small))

  @parameterized.parameters(*tiny_masks.DERIVED)
  def test_compact_and_masked_learn_alike(self, network):
    """Invariant 3: loss, gradients, statistics; none of what is not there."""
    architecture = tiny_masks.seed(network)
    state = tiny_masks.sampled(architecture)
    whole = tiny_masks.outcome(METHOD, architecture, state, compact=False)
    part = tiny_masks.outcome(METHOD, architecture, state, compact=True)
    self.assertLess(
        sum(np.size(leaf) for leaf in jax.tree.leaves(part.raw)),
        sum(np.size(leaf) for leaf in jax.tree.leaves(whole.raw)),
    )
    tiny_masks.same(part.loss, whole.loss)
    tiny_masks.same(part.train, whole.train)
    tiny_networks.assert_close(part.grads, whole.grads, 1e-5)
    tiny_networks.assert_close(
        part.stats['network'], whole.stats['network'], 1e-5
    )
    # Weights that are not there have no gradient at all.
    for outcome in (part, whole):
      computed, kept = (
          sum(map(np.count_nonzero, jax.tree.leaves(grads['weights'])))
          for grads in (outcome.raw['params'], outcome.grads)
      )
      self.assertEqual(computed, kept)

  @parameterized.named_parameters(*EVERYWHERE)
  def test_what_is_not_there_says_nothing(self, network, options):
    """Invariants 5, 24, 31: whatever its weights, bias and channels."""
    architecture = tiny_masks.seed(network, **options)
    state = tiny_masks.sampled(architecture)
    before = tiny_masks.logits(METHOD, architecture, state, compact=False)
    there = tiny_masks.attached(architecture, METHOD, state)
    generator = np.random.default_rng(2)
    weights = jax.tree.map(
        lambda leaf, there: np.where(
            there, leaf, generator.normal(3, 5, leaf.shape)
        ).astype('f4'),
        state.params['weights'], there,
    )
    aux = state.params['aux']
    q = state.stats['method']['q']
    owned = [
        group for group, block in space_lib.of(architecture, 'both').owners
        if block == tiny_masks.OFF
    ]
    flipped = {name: ~q['channels'][name] for name in owned}
    q = {**q, 'channels': {**q['channels'], **flipped}}
    other = tiny_masks.masked(
        state.replace(params={'weights': weights, 'aux': aux}), q=q
    )
    after = tiny_masks.logits(METHOD, architecture, other, compact=False)
    np.testing.assert_array_equal(after, before)

  @parameterized.parameters(tiny_masks.PLAIN, tiny_masks.BASIC)
  def test_all_on_is_the_network_itself(self, network):
    """Invariant 4, bit for bit."""
    architecture = tiny_masks.seed(network)
    state = tiny_masks.state(architecture)
    q = jax.tree.map(np.ones_like, state.stats['method']['q'])
    state = tiny_masks.masked(state, q=q, s=tiny_masks.hard(q))
    got = tiny_masks.outcome(METHOD, architecture, state, compact=True)
    fixed = methods_base.FixedArchitecture()
    want = tiny_masks.outcome(fixed, architecture, state, compact=True)
    for name in ('loss', 'train'):
      np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    tiny_networks.assert_same(got.grads['weights'], want.grads['weights'])
    tiny_networks.assert_same(got.stats['network'], want.stats['network'])

  def test_cold_gates_are_signs(self):
    """Invariant 13: at beta = 1e4, soft is hard."""
    architecture = tiny_masks.seed(tiny_masks.BASIC, shortcut='A')
    state = tiny_masks.sampled(architecture, soft=False)
    hard = tiny_masks.logits(METHOD, architecture, state, compact=False)
    q = state.stats['method']['q']
    state = tiny_masks.masked(  # 100 ** (20 / 10)
        state, s=tiny_masks.hard(q, 0.01),
        t=jax.tree.map(lambda q: np.full(q.shape, 20, 'i4'), q),
    )
    soft = tiny_masks.logits(METHOD, architecture, state, compact=False)
    tiny_masks.same(soft, hard)

  def test_a_chain_says_what_it_cannot_fold(self):
    """A soft gate of a block without a shortcut becomes 1."""
    architecture = tiny_masks.seed(tiny_masks.PLAIN)
    state = tiny_masks.sampled(architecture)
    soft = tiny_masks.logits(METHOD, architecture, state, compact=False)
    change = METHOD.conclude(architecture, state)
    pruned, _ = tiny_masks.grow(state, change)
    sliced = tiny_masks.logits(
        METHOD, change.target, pruned, compact=False
    )
    self.assertGreater(np.abs(sliced[1] - soft[1]).max(), 1e-3)
    layers = {tiny_masks.OFF: -40.0, tiny_masks.ON: 40.0}
    state = tiny_masks.masked(state, s={
        **state.params['aux'],
        'layers': {name: np.float32(s) for name, s in layers.items()},
    })
    hard = tiny_masks.logits(METHOD, architecture, state, compact=False)
    tiny_masks.same(sliced, hard)

  def test_filter_gates(self):
    """Equation (1) to the letter, in both views and when folded."""
    method = dataclasses.replace(METHOD, gate='filter')
    architecture = tiny_masks.seed(tiny_masks.BASIC, shortcut='A')
    state = tiny_masks.sampled(architecture, method=method)
    whole, part = (
        tiny_masks.logits(method, architecture, state, compact=compact)
        for compact in (False, True)
    )
    tiny_masks.same(part, whole)
    readers = tiny_masks.logits(METHOD, architecture, state, compact=False)
    self.assertGreater(np.abs(readers[0] - whole[0]).max(), 1e-3)
    change = method.conclude(architecture, state)
    pruned, _ = tiny_masks.grow(state, change, method)
    tiny_masks.same(
        tiny_masks.logits(method, change.target, pruned, compact=False),
        whole,
    )


class GradientTest(parameterized.TestCase):
  """What trains mask variables."""

  def test_samples_that_are_off_feel_the_penalty_alone(self):
    """Invariants 17, 19: exactly."""
    architecture = tiny_masks.seed(tiny_masks.BASIC)
    state = tiny_masks.sampled(architecture)
    memory, aux = state.stats['method'], state.params['aux']
    grads = tiny_masks.outcome(
        METHOD, architecture, state, compact=True
    ).grads['aux']
    penalty = jax.grad(
        lambda aux: METHOD.penalty(architecture, aux, memory)
    )(aux)
    q = memory['q']
    for kind, leaves in q.items():
      for name, on in leaves.items():
        got, alone = grads[kind][name], np.asarray(penalty[kind][name])
        tiny_masks.same(got[~on], alone[~on], 1e-6)
        if f'{tiny_masks.OFF}.' not in name:
          self.assertTrue(np.all(alone[~on] != 0), name)
          self.assertTrue(np.all(np.abs(got - alone)[on] > 1e-6), name)
        else:  # A channel of a layer that is not there waits for it.
          np.testing.assert_array_equal(got, 0)

  @parameterized.product(update=('step', 'epoch'), budget=space_lib.BUDGETS)
  def test_the_penalty(self, update, budget):
    """Invariants 15, 16, 18, 19: lambda beta p (1 - p), for all structures."""
    method = dataclasses.replace(
        METHOD, lambda_update=update, budget=budget, lambda1=0.7, lambda2=0.3
    )
    architecture = tiny_masks.seed(tiny_masks.BASIC, shortcut='A')
    state = tiny_masks.sampled(architecture, method=method)
    generator = np.random.default_rng(3)
    t = jax.tree.map(
        lambda q: generator.integers(0, 6, q.shape, 'i4'),
        state.stats['method']['t'],
    )
    memory, aux = {**state.stats['method'], 't': t}, state.params['aux']
    p = jax.tree.map(
        lambda s, t: sigmoid(100 ** (np.float64(t) / 10) * s), aux, t
    )
    space = space_lib.of(architecture, 'both')
    density = space_lib.density(
        architecture, space, p if update == 'step' else memory['q'], budget
    )
    for target in (density / 2, density, min(0.99, 2 * density)):
      method = dataclasses.replace(method, target_sparsity=float(1 - target))
      value, got = jax.value_and_grad(
          lambda aux, method=method: method.penalty(architecture, aux, memory)
      )(aux)
      self.assertEqual(np.sign(round(float(value), 4)), np.sign(
          round(density - target, 6)
      ))
      for kind, base in (('channels', 0.7), ('layers', 0.3)):
        for name, leaf in got[kind].items():
          beta = 100 ** (t[kind][name] / 10)
          want = base * (density - target) * beta * p[kind][name] * (
              1 - p[kind][name]
          )
          if name.startswith(tiny_masks.OFF + '.'):
            want = 0 * want
          np.testing.assert_allclose(leaf, want, rtol=2e-3, atol=2e-6)
          self.assertTrue(np.all(np.abs(leaf) <= base * beta / 4))

  @parameterized.parameters(tiny_masks.PLAIN, tiny_masks.BASIC)
  def test_finite_differences(self, network):
    """Invariant 22, in float64: gates of both kinds, norms and loss."""
    method = dataclasses.replace(
        METHOD, estimator='paper', lambda1=0.0, lambda2=0.0
    )
    architecture = tiny_masks.seed(network)
    state = tiny_masks.sampled(architecture, method=method)
    cast = lambda tree: jax.tree.map(
        lambda leaf: leaf.astype('f8') if leaf.dtype == np.float32 else leaf,
        tree,
    )
    with jax.enable_x64(True):
      state = cast(state)
      at = lambda aux: tiny_masks.outcome(
          method, architecture, tiny_masks.masked(state, s=aux),
          compact=True, dtype='f8',
      )
      aux, step = state.params['aux'], 1e-5
      grads = at(aux).grads['aux']
      generator = np.random.default_rng(7)
      for only in ('channels', 'layers'):
        towards = jax.tree_util.tree_map_with_path(
            lambda path, leaf, only=only: (
                generator.normal(size=leaf.shape) * (path[0].key == only)
            ),
            aux,
        )
        plus, minus = (
            at(jax.tree.map(lambda s, d, h=h: s + h * d, aux, towards)).loss
            for h in (step, -step)
        )
        want = sum(
            np.sum(g * d)
            for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(towards))
        )
        self.assertGreater(abs(want), 1e-5)
        np.testing.assert_allclose((plus - minus) / (2 * step), want, rtol=1e-4)

  @parameterized.parameters('jit', 'pmap')
  def test_importance_of_what_a_norm_hides(self, mode):
    """Signed gradients of a group cancel; importance is that of all devices.

    Unless a group is what the classifier reads, a norm follows.
    """
    architecture = tiny_masks.seed(tiny_masks.PLAIN, 1)
    placement = parallel.make(mode, 2)
    state = tiny_masks.sampled(architecture, off=())
    layout = view.layout(architecture)
    trees = view.pack({'params': state.params, 'stats': state.stats}, layout)
    x = tiny_networks.images(8)
    labels = np.arange(8) % tiny_networks.CLASSES

    def computed(trees, x, labels):
      grads = []
      for estimator in ('paper', 'importance'):
        method = dataclasses.replace(
            METHOD, estimator=estimator, grow='channels', lambda1=0.0
        )
        network = methods_base.Network(
            method.execution, layout, x, mean=placement.mean
        )
        objective = lambda aux, method=method, network=network: (
            method.objective(
                network, {**trees['params'], 'aux': aux}, trees['stats'],
                labels, jax.random.key(0),
            )[0]
        )
        grads.append(jax.grad(objective)(trees['params']['aux'])['channels'])
      return placement.mean(grads)

    arguments = placement.replicate(trees), *placement.shard((x, labels))
    compiled, _ = placement.compile(computed, arguments, outputs='replicated')
    signed, important = placement.fetch(compiled(*arguments))
    q, s = state.stats['method']['q'], state.params['aux']
    for name, grad in signed.items():
      on = q['channels'][name]
      tiny_masks.same(important[name], -abs(grad))
      self.assertTrue(np.all(important[name][on] < 0))
      # q p G, without the factor beta p (1 - p) of equation (7); beta is 1.
      effects = grad / (1 - sigmoid(s['channels'][name]))
      ratio = abs(effects.sum()) / abs(effects).sum()
      with self.subTest(name):
        if name == 's1b0.out':
          self.assertGreater(ratio, 0.05)
        elif on.sum() > 1:
          self.assertLess(ratio, 0.01)

  def test_norms_hide_gates_of_filters(self):
    """Invariant 30: a filter's factor is taken away by the norm behind it."""
    sizes = []
    for gate in ('readers', 'filter'):
      method = dataclasses.replace(
          METHOD, gate=gate, grow='channels', lambda1=0.0
      )
      architecture = tiny_masks.seed(tiny_masks.PLAIN, 1)
      state = tiny_masks.state(architecture, method)
      _, s = tiny_masks.draw(state)
      q = jax.tree.map(np.ones_like, state.stats['method']['q'])
      grads = tiny_masks.outcome(
          method, architecture, tiny_masks.masked(state, q=q, s=s),
          compact=True,
      ).grads['aux']
      sizes.append(
          np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
      )
    self.assertGreater(sizes[0], 100 * sizes[1])


class ConfigurationTest(parameterized.TestCase):

  @parameterized.parameters(
      ({'target_sparsity': 1.0}, 'target_sparsity is'),
      ({'target_sparsity': 0.0}, 'target_sparsity is'),
      ({'lambda1': -0.1}, 'lambda1 is'),
      ({'lambda2': float('nan')}, 'lambda2 is'),
      ({'beta_final': 0.5}, 'beta_final is'),
      ({'beta_final': float('inf')}, 'beta_final is'),
      ({'freeze': 1.5}, 'freeze is'),
      ({'start': -1.0}, 'start is'),
      ({'grow': 'depth'}, 'grow is one of channels, layers, both'),
  )
  def test_refuses(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      sparsify.Sparsify(**fields)

  def test_refuses_a_network_with_nothing_to_choose(self):
    architecture = tiny_masks.seed(tiny_masks.BASIC, 1)
    for grow in ('layers', 'both'):
      method = dataclasses.replace(METHOD, grow=grow)
      memory = method.extra(architecture).other
      with self.assertRaisesRegex(ValueError, 'give more with --depths'):
        method.execution.active(architecture, memory)


if __name__ == '__main__':
  absltest.main()
