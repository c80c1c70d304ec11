"""Tests of the execution view: packing, and the step that runs on it."""

import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_networks

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.networks import base
from autogrow_jax.networks import loops
from autogrow_jax.run import steps

# Seldom reached by other tests: the norm over all stacks limits every step.
CLIPPED = optimizers.make(optimizers.SGD(clip_norm=0.1))


def deep(family):
  """Four blocks per stage, so that all stages have runs of equal blocks."""
  return tiny_networks.seed(family, (4,) * len(networks.get(family).widths))


class PackTest(parameterized.TestCase):

  @parameterized.parameters(
      *((family, 'sgd') for family in networks.FAMILIES),
      *(('basic3resnet', name) for name in tiny_networks.OPTIMIZERS),
  )
  def test_unpack_is_the_inverse(self, family, optimizer):
    architecture = deep(family)
    state = tiny_networks.state(
        architecture, tiny_networks.OPTIMIZERS[optimizer]
    )
    # Other values in every leaf, moments included.
    counter = iter(range(10_000))
    state = jax.tree.map(
        lambda leaf: (leaf + next(counter)).astype(leaf.dtype), state
    )
    for spare in (False, True):
      layout = view.layout(architecture, spare=spare)
      packed = view.pack(state, layout)
      tiny_networks.assert_same(view.unpack(packed, layout), state)
      self.assertLess(
          len(jax.tree.leaves(packed)), len(jax.tree.leaves(state))
      )

  @parameterized.parameters(*tiny_networks.OPTIMIZERS)
  def test_an_optimizer_starts_the_same(self, optimizer):
    architecture = deep('basic3resnet')
    tx = tiny_networks.OPTIMIZERS[optimizer]
    params = tiny_networks.state(architecture, tx).params
    stacked = view.with_stacked_init(tx, architecture)
    want = state_lib.to_host(tx.init(params))
    for many in (0, 10_000):
      with mock.patch.object(view, '_MANY_LEAVES', many):
        got = state_lib.to_host(stacked.init(params))
      tiny_networks.assert_same(got, want)

  def test_stacks_in_forward_order(self):
    architecture = tiny_networks.seed('basic3resnet', (1, 4, 1))
    state = tiny_networks.state(architecture)
    packed = view.pack(state, view.layout(architecture))
    stacked = packed.params['weights']['stage1.1']['conv1']['kernel']
    self.assertEqual(stacked.shape, (3, 3, 3, 6, 6))
    for index, block in enumerate(('s1b1', 's1b2', 's1b3')):
      np.testing.assert_array_equal(
          stacked[index],
          state.params['weights'][block]['conv1']['kernel'],
      )

  def test_touches_full_dictionaries_of_parts_only(self):
    architecture = tiny_networks.seed('basic3resnet', (1, 3, 1))
    layout = view.layout(architecture)
    names = [name for members in layout.members for name in members]
    full = {name: np.float32(index) for index, name in enumerate(names)}
    missing = {name: full[name] for name in names[:-1]}
    more = {**full, 'other': np.float32(9)}
    tree = {'aux': missing, 'more': more, 'weights': full, 'step': np.int32(4)}
    packed = view.pack(tree, layout)
    self.assertEqual(packed['aux'], missing)
    self.assertEqual(packed['more'], more)
    self.assertEqual(packed['step'], 4)
    self.assertEqual(set(packed['weights']), {s.key for s in layout.bucket})
    np.testing.assert_array_equal(packed['weights']['stage1.1'], [3, 4])
    self.assertEqual(view.unpack(packed, layout), tree)

  def test_packs_inside_jit(self):
    architecture = tiny_networks.seed('plain3net', (1, 3, 1))
    layout = view.layout(architecture)
    weights = tiny_networks.state(architecture).params['weights']
    packed = jax.jit(lambda tree: view.pack(tree, layout, stack=jnp.stack))(
        weights
    )
    tiny_networks.assert_same(packed, view.pack(weights, layout))

  @parameterized.parameters(
      *(family for family in networks.FAMILIES if family != 'basic1resnet')
  )
  def test_bucket_does_not_know_block_names(self, family):
    architecture = deep(family)
    renamed = architecture_lib.Architecture.from_json(
        rename(architecture.to_json(), {'s1b2': 's1b8', 's0b3': 's0b5'})
    )
    self.assertNotEqual(renamed, architecture)
    one, other = view.layout(architecture), view.layout(renamed)
    self.assertEqual(one.bucket, other.bucket)
    self.assertEqual(hash(one.bucket), hash(other.bucket))
    self.assertNotEqual(one.members, other.members)
    self.assertNotEqual(
        one.bucket, view.layout(architecture.with_block(1)).bucket
    )


class SpareTest(parameterized.TestCase):

  @parameterized.parameters(
      (1, 4), (4, 4), (5, 6), (8, 8), (9, 11), (42, 48)
  )
  def test_capacities(self, length, expected):
    self.assertEqual(loops.capacity(length), expected)

  @parameterized.parameters(
      ((1, 1, 1), {}),
      ((2, 1, 1), {'stage0.0': 2}),
      ((2, 2, 9), {'stage0.0': 2, 'stage1.1': 1, 'stage2.1': 8}),
  )
  def test_is_where_a_run_can_grow(self, depths, expected):
    # The first blocks of the later stages are unlike those that follow.
    layout = view.layout(
        tiny_networks.seed('basic3resnet', depths), spare=True
    )
    self.assertEqual(layout.depths, expected)
    for segment in layout.bucket:
      length = expected.get(segment.key)
      self.assertEqual(
          segment.length, None if length is None else loops.capacity(length)
      )

  @parameterized.parameters('basic3resnet', 'mlp', 'lstm2')
  def test_few_buckets_for_many_depths(self, family):
    architecture = tiny_networks.seed(family)
    exact, spare = set(), set()
    for number in range(len(architecture.stages) * 16):
      exact.add(view.layout(architecture).bucket)
      spare.add(view.layout(architecture, spare=True).bucket)
      architecture = architecture.with_block(number % len(architecture.stages))
    # Depths of 18 blocks or fewer: no run, and runs of 4, 6, 8, 11, 15 or 20.
    self.assertLessEqual(len(spare), 1 + 6 * len(architecture.stages))
    self.assertGreater(len(exact), 14 * len(architecture.stages))

  def test_exact_layouts_have_no_depths(self):
    self.assertIsNone(view.layout(deep('basic3resnet')).depths)

  def test_is_not_for_methods_that_unpack_in_programs(self):
    layout = view.layout(tiny_networks.seed('mlp', (3, 1)), spare=True)
    tree = {segment.key: np.zeros(4, 'f4') for segment in layout.bucket}
    with self.assertRaisesRegex(ValueError, 'depth_buckets=exact'):
      jax.jit(lambda tree: view.unpack(tree, layout))(tree)

  @parameterized.parameters(
      ('basic3resnet', 'clipped', 'float32'),
      ('mlp', 'adamw', 'float32'),
      ('mlp', 'sgd', 'bfloat16'),
  )
  def test_one_program_takes_steps_at_many_depths(
      self, family, optimizer, dtype
  ):
    tx = {**tiny_networks.OPTIMIZERS, 'clipped': CLIPPED}[optimizer]
    stages = len(networks.get(family).widths)
    program = None
    for depth in (2, 5):
      architecture = tiny_networks.seed(family, (1, depth, 1)[:stages])
      state = tiny_networks.state(architecture, tx)
      layout = view.layout(architecture, spare=True)
      packed = view.pack(state, layout)
      rest = batch(layout.depths)
      if program is None:
        program = compile_step(layout, tx, dtype, packed, rest)
      after, meters = program(packed, *rest)
      after = state_lib.to_host(after)
      exact = view.layout(architecture)  # Below, it is itself tested.
      rest = batch(None)
      packed = view.pack(state, exact)
      reference = compile_step(exact, tx, dtype, packed, rest)
      want, want_meters = reference(packed, *rest)
      want = view.unpack(state_lib.to_host(want), exact)
      # Adam divides by the gradient's size, noise of tiny gradients included.
      tolerance = {'adamw': 2e-4, 'sgd': 2e-2, 'clipped': 1e-5}[optimizer]
      tiny_networks.assert_close(view.unpack(after, layout), want, tolerance)
      tiny_networks.assert_close(meters, want_meters, tolerance)
      self.assert_spare_is_zero(after, layout)

  def assert_spare_is_zero(self, packed, layout):
    """Weights, statistics and moments, all over the tree."""
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(packed):
      for key, depth in layout.depths.items():
        if key in axes_lib.names(path):
          found += 1
          np.testing.assert_array_equal(leaf[depth:], 0)
          self.assertTrue(np.any(leaf[depth - 1]) or 'mu' in str(path), path)
    self.assertGreater(found, 0)

  def test_derivatives_with_gates(self):
    architecture = tiny_networks.seed('basic3resnet', (1, 3, 1))
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    spare = view.layout(architecture, spare=True)
    unrolled = view.layout(architecture, fuse=False)
    runs_and_gates = (
        (derivatives(spare, state, x), {'stage1.1': [0.7, 0.4, 9, 9]}),
        (derivatives(unrolled, state, x), {'s1b1': 0.7, 's1b2': 0.4}),
    )
    for train in (True, False):
      (weights, stats, by_gate, by_x, logits, new), want = (
          state_lib.to_host(
              run({k: np.float32(v) for k, v in gates.items()}, np.bool_(train))
          )
          for run, gates in runs_and_gates
      )
      trees = [view.unpack(tree, spare) for tree in (weights, stats, new)]
      tiny_networks.assert_close(
          (*trees, by_x, logits), (*want[:2], want[5], *want[3:5]), 2e-5
      )
      gates = by_gate['stage1.1']
      np.testing.assert_array_equal(gates[2:], 0)
      np.testing.assert_allclose(gates[:2], list(want[2].values()), rtol=1e-4)
      self.assertGreater(np.abs(gates[:2]).min(), 1e-4)


class StepTest(parameterized.TestCase):

  @parameterized.parameters(('basic3resnet', 'sgd'), ('plain3net', 'adamw'))
  def test_fused_equals_unfused(self, family, optimizer):
    self.assert_fused_equals_unfused(family, optimizer)

  @parameterized.parameters('bottleneck4resnet', 'mobilenet1', 'mlp')
  @pytest.mark.slow
  def test_fused_equals_unfused_in_other_networks(self, family):
    self.assert_fused_equals_unfused(family, 'sgd')

  def assert_fused_equals_unfused(self, family, optimizer):
    tx = tiny_networks.OPTIMIZERS[optimizer]
    architecture = tiny_networks.seed(
        family, (1, 3, 1, 1, 1)[: len(networks.get(family).widths)]
    )
    state = tiny_networks.state(architecture, tx)
    results = []
    for fuse in (True, False):
      layout = view.layout(architecture, fuse=fuse)
      arguments = view.pack(state, layout), batch(None)
      step = compile_step(layout, tx, 'float32', *arguments)
      packed, meters = step(arguments[0], *arguments[1])
      results.append((view.unpack(state_lib.to_host(packed), layout), meters))
    (fused, fused_meters), (unfused, unfused_meters) = results
    self.assertIsNotNone(
        next(s for s in view.layout(architecture).bucket if s.length)
    )
    # Adam divides by the gradient's size, noise of tiny gradients included.
    tolerance = 1e-5 if optimizer == 'sgd' else 2e-4
    tiny_networks.assert_close(fused, unfused, tolerance)
    tiny_networks.assert_close(fused_meters, unfused_meters, 1e-5)
    self.assertEqual(fused_meters['total'], 8)
    kernels = [
        s.params['weights']['s1b2'][layer]['kernel']
        for s in (state, fused)
        for layer in sorted(s.params['weights']['s1b2'])
        if layer in ('conv', 'conv1', 'dense', 'pointwise')
    ]
    self.assertGreater(np.abs(kernels[0] - kernels[1]).max(), 1e-4)


def derivatives(layout, state, x):
  """Program (gates, train) -> derivatives by all inputs, logits, statistics."""
  packed = view.pack(state, layout)

  def loss(weights, stats, gates, x, train):
    logits, new = base.apply(
        layout.bucket,
        weights,
        stats,
        x,
        train=train,
        gates=gates,
        depths=layout.depths,
    )
    return jnp.sum(jnp.sin(logits)), (logits, new)

  @functools.partial(jax.jit, compiler_options=tiny_networks.FAST_COMPILE)
  def run(gates, train):
    found, others = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(
        packed.params['weights'], packed.stats['network'], gates, x, train
    )
    return *found, *others

  return run


def batch(depths):
  """What `steps.train_step` gets besides the state."""
  generator = np.random.default_rng(0)
  return (
      steps.new_meters(),
      generator.integers(0, 256, (12, 8, 8, 3), np.uint8),
      generator.integers(0, 5, 12).astype('i4'),
      np.array([3, 1, 4, 11, 5, 9, 2, 6], 'i4'),
      np.float32(0.1),
      depths,
  )


def compile_step(layout, tx, dtype, packed, rest):
  """`steps.train_step` for arguments like these."""
  computation = tiny_networks.computation(
      tx,
      preprocessing=data.Preprocessing(
          mean=(0.5,) * 3, std=(0.2,) * 3, crop=1, flip=True
      ),
      dtype=jnp.dtype(dtype),
  )
  step = functools.partial(steps.train_step, computation, layout)
  return (
      jax.jit(step)
      .lower(packed, *rest)
      .compile(compiler_options=tiny_networks.FAST_COMPILE)
  )


def rename(value, names):
  """Replaces block names, also at the start of axis names."""
  if isinstance(value, dict):
    return {rename(k, names): rename(v, names) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [rename(item, names) for item in value]
  if isinstance(value, str):
    block, dot, rest = value.partition('.')
    return names.get(block, block) + dot + rest
  return value


if __name__ == '__main__':
  absltest.main()
