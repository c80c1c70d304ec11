"""Tests of DeepLab-v3: its shapes, its head, and the roles of its axes."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import tiny_networks

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import base
from autogrow_jax.networks import deeplab

AXES = (*deeplab.BRANCHES, 'project')


def full(size=513, **options):
  network = networks.get('deeplab')
  return network.seed(
      network.seed_depths,
      input_shape=(size, size, 3),
      classes=21,
      options=options,
  )


class ShapesTest(parameterized.TestCase):

  def test_parameters_are_the_published_ones(self):
    rows = {layer.name: layer for layer in costs.table(full())}
    parts = {'head': 0, 'backbone': 0}
    for name, layer in rows.items():
      parts['head' if name.startswith('head/') else 'backbone'] += layer.params
    # ResNet-101 without its classifier; the rest of the head.
    self.assertEqual(parts, {'backbone': 42_500_160, 'head': 15_540_501})
    self.assertEqual(rows['head/classifier'].params, 256 * 21 + 21)

  @parameterized.parameters(
      (513, (129, 129, 65, 33, 33)),
      (224, (56, 56, 28, 14, 14)),
      (64, (64, 64, 32, 16, 16)),
  )
  def test_last_stage_has_dilation_in_place_of_a_stride(self, size, sides):
    architecture = full(size)
    parts = {part.name: part for part in networks.parts(architecture)}
    ends = ('stem', *(names[-1] for names in architecture.stages))
    for name, side in zip(ends, sides, strict=True):
      self.assertEqual(base.output_shape(parts[name])[:2], (side, side))
    for stage, names in enumerate(architecture.stages):
      for name in names:
        dilation = 2 if stage == 3 else 1
        self.assertEqual(parts[name].module.dilation, dilation)
    self.assertEqual(base.output_shape(parts['head']), (size, size, 21))
    self.assertEqual(networks.label_shape(architecture), (size, size))

  def test_head_follows_the_width(self):
    architecture = full(widths=(8, 8, 8, 12))
    for axis in AXES:
      self.assertEqual(architecture.size(axis), 6)
    self.assertEqual(full().size('project'), 256)

  def test_blocks_of_a_stage_are_fused(self):
    segments = [
        (segment.key, segment.length)
        for segment, _ in base.segments(
            full(), networks.parts(full()), fuse=True
        )
    ]
    self.assertIn(('stage2.1', 22), segments)
    self.assertIn(('stage3.1', 2), segments)


class HeadTest(parameterized.TestCase):

  def test_closed_gates_are_pruned_units(self):
    architecture = tiny_networks.seed('deeplab')
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    for name, leaves in state.params['weights']['head'].items():
      if name.endswith('norm'):
        leaves['bias'] += np.float32(3)  # So that every unit is alive.
    kept, gates = {}, {}
    for closed, axis in enumerate((*AXES, 's3')):  # 0, 1, 2, 0, 1, 2, 0.
      units = np.arange(architecture.size(axis))
      kept[axis] = units[closed % 3 :]
      gates[axis] = (units >= closed % 3).astype('f4')
    gated = axes_lib.scale_readers(
        state, state_lib.axis_table(architecture), gates
    )
    change = tiny_networks.targeted(architecture, growth_lib.Growth(kept))
    pruned, _ = tiny_networks.grow(state, change)
    run = lambda architecture, state: tiny_networks.forward(
        architecture, state, x, train=False
    )[0]
    got = run(architecture, gated)
    np.testing.assert_allclose(
        got, run(change.target, pruned), rtol=1e-5, atol=1e-5
    )
    self.assertGreater(np.abs(got - run(architecture, state)).max(), 1e-3)

  def test_equals_one_kernel_of_the_concatenation(self):
    # With convolutions by hand: taps at the distance of the dilation.
    part = networks.parts(tiny_networks.seed('deeplab'))[-1]
    weights, stats = tiny_networks.draw(part, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(2, 15, 13, 32)).astype('f4')

    def norm(y, name):
      leaves, running = weights[name], stats[name]
      factor = leaves['scale'] / np.sqrt(running['var'] + 1e-5)
      shift = leaves['bias'] - running['mean'] * factor
      return np.maximum(0, y * factor + shift)

    def branch(index, dilation):
      kernel = weights[f'aspp{index}_conv']['kernel']
      if len(kernel) == 1:
        mean = x.mean((1, 2), keepdims=True) if index == 4 else x
        return np.broadcast_to(mean @ kernel[0, 0], (*x.shape[:3], 4))
      y, reach = np.zeros((*x.shape[:3], 4)), (15, 13)
      padded = np.pad(x, ((0, 0), (dilation,) * 2, (dilation,) * 2, (0, 0)))
      for i in range(3):
        for j in range(3):
          y += padded[
              :,
              i * dilation : i * dilation + reach[0],
              j * dilation : j * dilation + reach[1],
          ] @ kernel[i, j]
      return y

    branches = [
        norm(branch(index, dilation), f'aspp{index}_norm')
        for index, dilation in enumerate((1, 6, 12, 18, 1))
    ]
    kernel = np.concatenate(
        [weights[f'project_{axis}']['kernel'] for axis in deeplab.BRANCHES], 2
    )
    y = norm(np.concatenate(branches, -1) @ kernel[0, 0], 'project_norm')
    last = weights['classifier']
    y = y @ last['kernel'][0, 0] + last['bias']
    got = part.module.clone(size=(15, 13)).apply(
        {'params': weights, 'stats': stats}, x, train=False
    )
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4)

  def test_taps_know_the_dilation(self):
    part = networks.parts(tiny_networks.seed('deeplab'))[-1]
    layers = {layer.path[-1]: layer for layer in taps.layers_of((part,))}
    self.assertEqual(layers['aspp3_conv'].dilation, 18)
    layer = layers['aspp1_conv']
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 8, 5)).astype('f4')
    kernel = rng.normal(size=(3, 3, 5, 4)).astype('f4')
    patches = layer.patches(jnp.asarray(x))
    self.assertEqual(patches.shape, (2, 9, 8, 9, 5))
    np.testing.assert_allclose(
        layer.linear(x, kernel),
        np.einsum('nhwti,tio->nhwo', patches, kernel.reshape(9, 5, 4)),
        rtol=1e-4,
        atol=1e-4,
    )


class ResizedTest(parameterized.TestCase):

  @parameterized.parameters((3, 33), (2, 2), (5, 8), (1, 4))
  def test_is_linear_between_corners(self, before, after):
    values = np.arange(before, dtype='f4') ** 2
    x = np.broadcast_to(values[None, :, None, None], (2, before, 3, 1))
    got = deeplab.resized(jnp.asarray(x), (after, 5))
    self.assertEqual(got.shape, (2, after, 5, 1))
    want = np.interp(
        np.linspace(0, before - 1, after), np.arange(before), values
    )
    for column in range(5):
      np.testing.assert_allclose(got[0, :, column, 0], want, atol=1e-5)


if __name__ == '__main__':
  absltest.main()
