"""Tests of the execution view: packing, and the step that runs on it."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import tiny_networks

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import parallel
from autogrow_jax import programs
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.methods import base as methods_base


def deep(family):
  """Four blocks per stage, so that all stages have runs of equal blocks."""
  return tiny_networks.seed(family, (4,) * len(networks.get(family).widths))


class PackTest(parameterized.TestCase):

  @parameterized.product(
      family=tuple(networks.FAMILIES),
      optimizer=tuple(tiny_networks.OPTIMIZERS),
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
    layout = view.layout(architecture)
    packed = view.pack(state, layout)
    tiny_networks.assert_same(view.unpack(packed, layout), state)
    self.assertLess(len(jax.tree.leaves(packed)), len(jax.tree.leaves(state)))

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

  @parameterized.parameters(*networks.FAMILIES)
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


class StepTest(parameterized.TestCase):

  @parameterized.parameters(
      ('basic3resnet', 'sgd'),
      ('bottleneck4resnet', 'sgd'),
      ('plain3net', 'adamw'),
      ('mobilenet1', 'sgd'),
      ('mlp', 'sgd'),
  )
  def test_fused_equals_unfused(self, family, optimizer):
    tx = tiny_networks.OPTIMIZERS[optimizer]
    architecture = tiny_networks.seed(
        family, (1, 3, 1, 1, 1)[: len(networks.get(family).widths)]
    )
    state = tiny_networks.state(architecture, tx)
    task = programs.Task(
        method=methods_base.FixedArchitecture(),
        tx=tx,
        preprocessing=data.Preprocessing(
            mean=(0.5,) * 3, std=(0.2,) * 3, crop=1, flip=True
        ),
        dtype=jnp.float32,
        parallel=parallel.make(),
    )
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (12, 8, 8, 3), np.uint8)
    labels = generator.integers(0, 5, 12).astype('i4')
    index = np.array([3, 1, 4, 11, 5, 9, 2, 6], 'i4')
    results = []
    for fuse in (True, False):
      layout = view.layout(architecture, fuse=fuse)
      packed, meters = jax.jit(
          functools.partial(programs.train_step, task, layout),
          compiler_options=tiny_networks.FAST_COMPILE,
      )(
          view.pack(state, layout),
          programs.new_meters(),
          images,
          labels,
          index,
          np.float32(0.1),
      )
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
