"""Tests of the network families and of how chains of parts are executed."""

import dataclasses
import itertools
import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import tiny_networks

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax import view
from autogrow_jax.networks import base
from autogrow_jax.networks import residual

# A network of one's own; see `CustomTest`.
TWO_STAGES = residual.ResNet(
    'networks_test:TWO_STAGES', 'Two stages', (4, 8), (1, 2)
)


def build(family, depths=None, shape=(32, 32, 3), classes=10, **options):
  network = networks.get(family)
  return network.seed(
      depths or (1,) * len(network.widths),
      input_shape=shape,
      classes=classes,
      options=options,
  )


def part_of(architecture, name):
  return next(
      part for part in networks.parts(architecture) if part.name == name
  )


def fresh(architecture, name, number=0):
  """The weights of one part as a run with a seed draws them."""
  weights, _ = base.init(part_of(architecture, name), jax.random.key(number))
  return jax.tree.map(np.asarray, weights)


class ShapesTest(parameterized.TestCase):

  @parameterized.parameters(
      ('basic3resnet', (32, 32, 3), (32, 32, 16, 8), 64),
      ('plain3net', (32, 32, 1), (32, 32, 16, 8), 64),
      ('basic4resnet', (32, 32, 3), (32, 32, 16, 8, 4), 512),
      ('plain4net', (32, 32, 3), (32, 32, 16, 8, 4), 512),
      ('bottleneck4resnet', (32, 32, 3), (32, 32, 16, 8, 4), 2048),
      ('basic4resnet', (224, 224, 3), (56, 56, 28, 14, 7), 512),
      ('plain4net', (224, 224, 3), (56, 56, 28, 14, 7), 512),
      ('bottleneck4resnet', (224, 224, 3), (56, 56, 28, 14, 7), 2048),
  )
  def test_outputs(self, family, shape, sizes, features):
    architecture = build(family, (2,) * (len(sizes) - 1), shape)
    parts = {part.name: part for part in networks.parts(architecture)}
    ends = ('stem', *(names[-1] for names in architecture.stages))
    for name, size in zip(ends, sizes, strict=True):
      self.assertEqual(base.output_shape(parts[name])[:2], (size, size))
    self.assertEqual(parts['head'].input_shape[-1], features)
    self.assertEqual(base.output_shape(parts['head']), (10,))

  def test_chain_is_in_forward_order(self):
    architecture = build('plain3net', (1, 2, 1))
    self.assertEqual(
        [part.name for part in networks.parts(architecture)],
        ['stem', 's0b0', 's1b0', 's1b1', 's2b0', 'head'],
    )

  @parameterized.parameters(*networks.FAMILIES)
  def test_every_axis_is_used_with_its_size(self, family):
    architecture = tiny_networks.seed(family)
    used = {}
    for part in networks.parts(architecture):
      weights, stats = base.shapes(part)
      trees = {'params': weights, 'stats': stats}
      for (_, *path), (collection, axes) in base.axes(part).items():
        leaf = trees[collection]
        for name in path:
          leaf = leaf[name]
        for axis, size in zip(axes, leaf.shape, strict=True):
          if axis is not None:
            self.assertEqual(used.setdefault(axis.name, size), size)
    self.assertEqual(used, dict(architecture.sizes))

  @parameterized.parameters(
      (
          'basic3resnet', 's1', {'s1b1/conv1', 's2b0/conv1', 's2b0/shortcut'},
          {
              's1b0/shortcut', 's1b0/conv2', 's1b1/conv2', 's1b0/norm2',
              's1b1/norm2',
          },
      ),
      (
          'bottleneck4resnet', 's1',
          {'s1b1/conv1', 's2b0/conv1', 's2b0/shortcut'},
          {
              's1b0/shortcut', 's1b0/conv3', 's1b1/conv3', 's1b0/norm3',
              's1b1/norm3',
          },
      ),
      (  # Read behind norms.
          'wrn28_10', 's1', {'s1b1/conv1', 's2b0/conv1', 's2b0/shortcut_conv'},
          {
              's1b0/conv2', 's1b0/shortcut_conv', 's1b1/conv2', 's1b1/norm1',
              's2b0/norm1',
          },
      ),
      (
          'mobilenet1', 's1b0.out', {'s1b1/pointwise'},
          {'s1b0/pointwise', 's1b0/norm2', 's1b1/norm1'}, {'s1b1/depthwise'},
      ),
      (
          'lstm2', 's1b0.hidden', {'s1b0/lstm', 's1b1/lstm'}, {'s1b0/lstm'},
      ),
      (
          'deeplab', 'project', {'head/classifier'},
          {*(f'head/project_aspp{i}' for i in range(5)), 'head/project_norm'},
      ),
      (
          'deeplab', 'aspp2', {'head/project_aspp2'},
          {'head/aspp2_conv', 'head/aspp2_norm'},
      ),
  )  # pyformat: disable
  def test_roles(self, family, axis, reads, writes, both=None):
    options = {'shortcut': 'A'} if 'resnet' in family else {}
    want = {'reads': reads, 'writes': writes} | ({'both': both} if both else {})
    architecture = tiny_networks.seed(family, **options)
    self.assertEqual(tiny_networks.roles(architecture, axis), want)

  def test_grown_blocks_keep_shape_and_have_no_projection(self):
    for family, shortcut in itertools.product(
        ('basic3resnet', 'basic4resnet', 'bottleneck4resnet'), 'AB'
    ):
      architecture = build(family, shortcut=shortcut)
      for stage in range(len(architecture.stages)):
        grown = architecture.with_block(stage)
        part = part_of(grown, grown.stages[stage][-1])
        self.assertEqual(part.module.stride, 1)
        self.assertEqual(part.module.shortcut, 'identity')
        self.assertEqual(base.output_shape(part), part.input_shape)

  @parameterized.parameters(
      ('basic3resnet', (32, 32, 3), 'identity'),
      ('basic4resnet', (224, 224, 3), 'identity'),
      ('bottleneck4resnet', (32, 32, 3), 'B'),
      ('bottleneck4resnet', (224, 224, 3), 'B'),
  )
  def test_shortcut_of_the_first_block(self, family, shape, shortcut):
    architecture = build(family, shape=shape)
    self.assertEqual(part_of(architecture, 's0b0').module.shortcut, shortcut)
    self.assertEqual(part_of(architecture, 's1b0').module.shortcut, 'B')
    if shortcut == 'B':
      weights, _ = base.shapes(part_of(architecture, 's0b0'))
      self.assertEqual(
          weights['shortcut_conv']['kernel'].shape, (1, 1, 64, 256)
      )

  def test_bottlenecks_stride_is_on_the_3x3(self):
    rows = {
        layer.name: layer.output_shape[0]
        for layer in costs.table(build('bottleneck4resnet'))
    }
    self.assertEqual(rows['s1b0/conv1'], 32)
    self.assertEqual(rows['s1b0/conv2'], 16)

  @parameterized.parameters(
      ((64, 64, 3), {}, 'small'),
      ((65, 20, 3), {}, 'imagenet'),
      ((224, 224, 3), {'stem': 'small'}, 'small'),
      ((32, 32, 1), {'stem': 'imagenet'}, 'imagenet'),
  )
  def test_stem(self, shape, options, kind):
    architecture = build('basic4resnet', shape=shape, **options)
    self.assertEqual(architecture.option('stem'), kind)
    stem = part_of(architecture, 'stem')
    weights, _ = base.shapes(stem)
    size = 7 if kind == 'imagenet' else 3
    self.assertEqual(
        weights['conv']['kernel'].shape, (size, size, shape[-1], 64)
    )
    reduced = 4 if kind == 'imagenet' else 1
    self.assertEqual(
        base.output_shape(stem)[:2],
        tuple(-(-side // reduced) for side in shape[:2]),
    )


class VggTest(parameterized.TestCase):

  @parameterized.parameters(
      ('vgg16', 32, (32, 16, 8, 4, 2)),
      ('vgg19', 32, (32, 16, 8, 4, 2)),
      ('vgg16', 28, (28, 14, 7, 4, 2)),
      ('vgg19', 8, (8, 4, 2, 1, 1)),
  )
  def test_halves_after_every_stage(self, family, size, sides):
    architecture = build(
        family, networks.get(family).seed_depths, (size, size, 3)
    )
    for part in networks.parts(architecture)[:-1]:
      side = sides[architecture.stage_of(part.name)]
      width = architecture.size(f'{part.name}.out')
      self.assertEqual(base.output_shape(part), (side, side, width))
    self.assertEqual(
        base.output_shape(part_of(architecture, 'head')), (10,)
    )

  @parameterized.parameters('vgg16', 'vgg19')
  def test_every_convolution_has_an_axis_of_its_own(self, family):
    network = networks.get(family)
    architecture = build(family, network.seed_depths, widths=(16,) * 5)
    blocks = [block for stage in architecture.stages for block in stage]
    self.assertLen(blocks, int(family.removeprefix('vgg')) - 3)
    widths = {f'{block}.out': 9 + i for i, block in enumerate(blocks)}
    architecture = architecture.resized(widths)
    inside = 3
    for block in blocks:
      weights, _ = base.shapes(part_of(architecture, block))
      self.assertEqual(
          weights['conv']['kernel'].shape,
          (3, 3, inside, widths[f'{block}.out']),
      )
      self.assertEqual('bias' in weights['conv'], family == 'vgg16')
      inside = widths[f'{block}.out']

  def test_equals_its_formula(self):
    architecture = tiny_networks.seed('vgg16', (1,) * 5, widths=(4,) * 5 + (7,))
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    y, weights = x, state.params['weights']
    for stage in range(5):
      leaves, stats = weights[f's{stage}b0'], state.stats['network']
      kernel = leaves['conv']['kernel']
      y = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
      side = y.shape[1] - 2
      y = sum(
          y[:, i : i + side, j : j + side] @ kernel[i, j]
          for i, j in itertools.product(range(3), range(3))
      ) + leaves['conv']['bias'].reshape(1, 1, 1, -1)
      norm, stats = leaves['norm'], stats[f's{stage}b0']['norm']
      factor = norm['scale'] / np.sqrt(stats['var'] + 1e-5)
      shift = norm['bias'] - factor * stats['mean']
      y = np.maximum(0, y * factor + shift.reshape(1, 1, 1, -1))
      if side > 1:
        half = side // 2
        y = y.reshape(len(y), half, 2, half, 2, -1).max((2, 4))
    head = weights['head']
    y = y[:, 0, 0] @ head['hidden']['kernel'] + head['hidden']['bias'][None]
    y = np.maximum(0, y) @ head['dense']['kernel'] + head['dense']['bias'][None]
    got, _ = tiny_networks.forward(architecture, state, x, train=False)
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)

  def test_starts_with_its_published_depths(self):
    for family, depths in (
        ('vgg16', (2, 2, 3, 3, 3)),
        ('vgg19', (2, 2, 4, 4, 4)),
        ('wrn28_10', (4, 4, 4)),
        ('mobilenet1', (1, 2, 2, 6, 2)),
        ('deeplab', (3, 4, 23, 3)),
        ('basic4resnet', (1, 1, 1, 1)),
        ('mlp', (1, 1)),
    ):
      self.assertEqual(networks.get(family).seed_depths, depths)


class WideTest(parameterized.TestCase):

  def test_stride_is_on_the_second_convolution(self):
    rows = {
        layer.name: layer.output_shape
        for layer in costs.table(build('wrn28_10'))
    }
    self.assertEqual(rows['s0b0/conv2'], (32, 32, 160))
    self.assertEqual(rows['s1b0/conv1'], (32, 32, 320))
    self.assertEqual(rows['s1b0/conv2'], (16, 16, 320))
    self.assertEqual(rows['s1b0/shortcut_conv'], (16, 16, 320))
    self.assertEqual(rows['head/norm'], (8, 8, 640))

  def test_blocks_whose_second_convolution_is_zero_are_the_identity(self):
    architecture = tiny_networks.seed('wrn28_10')
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    weights = state.params['weights']
    block = weights['s1b1']
    block = {**block, 'conv2': jax.tree.map(np.zeros_like, block['conv2'])}
    zeros = state.replace(params={'weights': {**weights, 's1b1': block}})
    got, _ = tiny_networks.forward(architecture, zeros, x, train=False)
    want, _ = tiny_networks.forward(
        architecture, state, x, train=False, gates={'s1b1': 0.0}
    )
    np.testing.assert_array_equal(got, want)


class MobileNetTest(parameterized.TestCase):

  @parameterized.parameters(
      (32, (32, 32, 16, 8, 4, 2)), (224, (112, 112, 56, 28, 14, 7))
  )
  def test_outputs(self, size, sides):
    architecture = build('mobilenet1', shape=(size, size, 3))
    for part, side in zip(networks.parts(architecture), sides):
      self.assertEqual(base.output_shape(part)[:2], (side, side))

  def test_channels_are_carried_through_the_depthwise_convolution(self):
    architecture = tiny_networks.seed('mobilenet1')
    state = tiny_networks.state(architecture)
    change = tiny_networks.split(architecture, 's1b0.out', [1, 4])
    grown, _ = tiny_networks.grow(state, change)
    units = [0, 1, 2, 3, 4, 5, 1, 4]
    old, new = (s.params['weights']['s1b1'] for s in (state, grown))
    np.testing.assert_array_equal(
        new['depthwise']['kernel'], old['depthwise']['kernel'][..., units]
    )
    factor = np.array([1, 0.5, 1, 1, 0.5, 1, 0.5, 0.5], 'f4')
    np.testing.assert_array_equal(
        new['pointwise']['kernel'],
        old['pointwise']['kernel'][:, :, units] * factor.reshape(1, 1, 8, 1),
    )


class PerceptronTest(parameterized.TestCase):

  def test_equals_its_formula(self):
    architecture = tiny_networks.seed('mlp', (1, 1))
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    weights, y = state.params['weights'], x.reshape(len(x), -1)
    for part in ('s0b0', 's1b0', 'head'):
      kernel, bias = (weights[part]['dense'][n] for n in ('kernel', 'bias'))
      y = y @ kernel.reshape(-1, kernel.shape[-1]) + bias.reshape(1, -1)
      y = y if part == 'head' else np.maximum(0, y)
    got, _ = tiny_networks.forward(architecture, state, x, train=False)
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)

  def test_channels_of_images_are_an_axis(self):
    architecture = build('mlp', (2, 1), (8, 6, 3))
    first = part_of(architecture, 's0b0')
    weights, _ = base.shapes(first)
    self.assertEqual(weights['dense']['kernel'].shape, (8, 6, 3, 300))
    _, axes = base.axes(first)['s0b0', 'dense', 'kernel']
    self.assertEqual(
        [axis and (axis.name, axis.role) for axis in axes],
        [None, None, ('image', 'reads'), ('s0b0.out', 'writes')],
    )


class RefusalTest(parameterized.TestCase):

  @parameterized.parameters(
      ('basic3resnet', (1, 1), {}, 'has 3 stages, but depths 1-1 name 2'),
      ('basic4resnet', (1, 1, 0, 1), {}, 'at least one block, got depths 1-1'),
      ('plain3net', None, {'shortcut': 'A'}, "leave out shortcut='A'"),
      ('basic3resnet', None, {'shortcut': 'C'}, "is one of B, A, got 'C'"),
      ('basic3resnet', None, {'stem': 'big'}, "small, imagenet, got 'big'"),
      (
          'basic3resnet',
          None,
          {'bn_scale_init': 'twos'},
          "ones, uniform01, got 'twos'",
      ),
      ('basic3resnet', None, {'widths': (1, 2)}, '3 positive widths, got 1-2'),
      ('basic3resnet', None, {'widths': (1, 2, 0)}, 'positive widths'),
      ('basic3resnet', None, {'width': 3}, "has no options ['width']"),
      ('vgg16', None, {'widths': (4,) * 4}, '5 positive widths, and one'),
      ('vgg16', None, {'widths': (4,) * 7}, 'one more for head.hidden, got'),
      ('vgg19', None, {'widths': (4,) * 5 + (0,)}, 'got 4-4-4-4-4-0'),
      ('vgg19', None, {'shortcut': 'A'}, "leave out shortcut='A'"),
      ('mlp', (1, 1, 1), {}, 'has 2 stages, but depths 1-1-1 name 3'),
  )
  def test_options(self, family, depths, options, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      build(family, depths, **options)

  def test_input_shape(self):
    for shape in ((32, 32), (0, 32, 3)):
      with self.assertRaisesRegex(ValueError, 'height, width, channel'):
        build('basic3resnet', shape=shape)

  @parameterized.parameters(
      ('resnet50', "Unknown network 'resnet50'; there are basic1resnet, "),
      ('no.such.module:NET', "'no.such.module:NET' cannot be imported"),
      ('networks_test:NOTHING', 'cannot be imported'),
      ('networks_test:build', 'is no autogrow_jax network'),
  )
  def test_names(self, name, message):
    with self.assertRaisesRegex(ValueError, message):
      networks.get(name)

  def test_names_in_any_case(self):
    self.assertIs(networks.get('Basic3ResNet'), residual.BASIC3)

  def test_plain_nets_accept_the_default_shortcut(self):
    self.assertEqual(build('plain3net', shortcut='B'), build('plain3net'))


class DtypeTest(parameterized.TestCase):

  @parameterized.parameters(*networks.FAMILIES)
  def test_leaves_are_float32_where_x64_is_on(self, family):
    network = networks.get(family)
    widths = (9, 11, 12, 10, 15)[: len(network.widths)]  # Cached by no other.
    with jax.enable_x64(True):
      parts = networks.parts(tiny_networks.seed(family, widths=widths))
      shapes = [base.shapes(part) for part in parts]
    for leaf in jax.tree.leaves(shapes):
      self.assertIn(leaf.dtype, (np.float32, np.int32))


class InitTest(parameterized.TestCase):

  def test_small(self):
    architecture = build('basic3resnet')
    weights = fresh(architecture, 's2b0')
    kernel = weights['conv2']['kernel']
    bound = 1 / np.sqrt(9 * 64)
    self.assertLessEqual(np.abs(kernel).max(), bound)
    self.assertGreater(np.abs(kernel).max(), 0.999 * bound)
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.02)
    self.assertLess(abs(kernel.mean()), 0.02 * bound)
    np.testing.assert_array_equal(weights['norm2']['scale'], 1)
    np.testing.assert_array_equal(weights['norm2']['bias'], 0)

  def test_imagenet(self):
    architecture = build(
        'basic4resnet', shape=(224, 224, 3), widths=(4, 64, 4, 4)
    )
    kernel = fresh(architecture.with_block(1), 's1b1')['conv1']['kernel']
    deviation = np.sqrt(2 / (9 * 64))
    np.testing.assert_allclose(kernel.std(), deviation, rtol=0.02)
    # Not truncated at two deviations.
    self.assertGreater(np.abs(kernel).max(), 3 * deviation)

  def test_dense(self):
    dense = fresh(build('basic3resnet', classes=200), 'head')['dense']
    for leaf in dense.values():
      self.assertLessEqual(np.abs(leaf).max(), 1 / 8)
      self.assertGreater(np.abs(leaf).max(), 0.97 / 8)
      self.assertLess(leaf.min(), -0.97 / 8)

  def test_uniform_norm_scales(self):
    architecture = build('plain3net', bn_scale_init='uniform01')
    for name in ('stem', 's2b0'):
      norm = fresh(architecture, name)['norm']
      self.assertBetween(norm['scale'].min(), 0, 0.2)
      self.assertBetween(norm['scale'].max(), 0.8, 1)
      np.testing.assert_array_equal(norm['bias'], 0)

  def test_folds_in_the_name(self):
    shallow = tiny_networks.seed('basic3resnet', (1, 2, 1))
    deep = tiny_networks.seed('basic3resnet', (3, 4, 2))
    tiny_networks.assert_same(fresh(shallow, 's1b1'), fresh(deep, 's1b1'))
    one, other = fresh(deep, 's1b1'), fresh(deep, 's1b2')
    number = fresh(deep, 's1b1', number=1)
    for layer in ('conv1', 'conv2'):
      kernel = one[layer]['kernel']
      self.assertFalse(np.isin(kernel, other[layer]['kernel']).any())
      self.assertFalse(np.isin(kernel, number[layer]['kernel']).any())
    self.assertFalse(
        np.isin(one['conv1']['kernel'], one['conv2']['kernel']).any()
    )


class ApplyTest(parameterized.TestCase):

  @parameterized.parameters(*tiny_networks.VARIANTS)
  def test_gate_zero_removes_a_block(self, family, options):
    architecture = tiny_networks.seed(family, **options)
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    shorter = architecture.without_block('s1b1')
    removed = state.replace(
        params={'weights': without(state.params['weights'], 's1b1')},
        stats={'network': without(state.stats['network'], 's1b1')},
    )
    for train in (True, False):
      run = lambda gate, train=train: tiny_networks.forward(
          architecture, state, x, train=train, gates={'s1b1': gate}
      )
      want, stats = tiny_networks.forward(shorter, removed, x, train=train)
      got, gated_stats = run(0.0)
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
      tiny_networks.assert_close(without(gated_stats, 's1b1'), stats, 1e-6)
      open_, _ = run(1.0)
      self.assertGreater(np.abs(open_ - got).max(), 1e-2)
      half, _ = run(0.5)
      self.assertGreater(np.abs(half - got).max(), 1e-3)
      self.assertGreater(np.abs(half - open_).max(), 1e-3)

  def test_an_open_gate_is_none(self):
    architecture = tiny_networks.seed('basic3resnet')
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    for train in (True, False):
      open_, ungated = (
          tiny_networks.forward(
              architecture, state, x, train=train, gates=gates
          )[0]
          for gates in ({'s1b1': 1.0}, None)
      )
      np.testing.assert_allclose(open_, ungated, rtol=1e-6, atol=1e-6)

  def test_gates_of_fused_blocks(self):
    architecture = tiny_networks.seed('basic3resnet', (1, 4, 1))
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    layout = view.layout(architecture)
    self.assertEqual(layout.members[3], ('s1b1', 's1b2', 's1b3'))
    packed = view.pack(state, layout)
    gates = {'stage1.1': np.array([0.5, 0, 1], 'f4')}
    got, _ = jax.jit(
        lambda weights, stats: base.apply(
            layout.bucket, weights, stats, x, train=False, gates=gates
        )
    )(packed.params['weights'], packed.stats['network'])
    want, _ = tiny_networks.forward(
        architecture,
        state,
        x,
        train=False,
        gates={'s1b1': 0.5, 's1b2': 0.0, 's1b3': 1.0},
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(
      ('basic3resnet', True), ('plain3net', False)
  )
  def test_blocks_of_zeros(self, family, unchanged):
    # A residual network's logits don't notice them, a plain network's do.
    architecture = tiny_networks.seed(family)
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    deeper = architecture.with_block(1).with_block(2)
    padded = tiny_networks.state(deeper)
    new = ('s1b2', 's2b1')
    weights = dict(padded.params['weights'])
    for name in new:
      weights[name] = jax.tree.map(np.zeros_like, weights[name])
      self.assertNotIn(name, state.params['weights'])
    padded = padded.replace(params={'weights': weights})
    want, _ = tiny_networks.forward(architecture, state, x, train=False)
    got, _ = tiny_networks.forward(deeper, padded, x, train=False)
    if unchanged:
      np.testing.assert_array_equal(got, want)
    else:
      self.assertGreater(np.abs(got - want).max(), 1e-2)

  @parameterized.parameters('basic3resnet', 'plain3net')
  def test_plain_convolutions_give_the_same_and_a_forward_mode(self, family):
    architecture = tiny_networks.seed(family, (1, 1, 1))
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    bucket = view.layout(architecture, fuse=False).bucket
    plain = tuple(
        dataclasses.replace(segment, module=segment.module.clone(plain=True))
        for segment in bucket
    )

    def loss(chain, weights):
      logits, _ = base.apply(
          chain, weights, state.stats['network'], x, train=True
      )
      return jnp.mean(jnp.square(logits))

    weights = state.params['weights']
    direction = jax.tree.map(np.ones_like, weights)
    _, slope = jax.jit(
        lambda w, d: jax.jvp(lambda w: loss(plain, w), (w,), (d,))
    )(weights, direction)
    gradient = jax.jit(jax.grad(lambda w: loss(bucket, w)))(weights)
    total = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(slope, total, rtol=1e-3, atol=1e-4)

  def test_bfloat16_gives_float32_logits_and_statistics(self):
    architecture = tiny_networks.seed('basic3resnet', (1, 1, 1))
    state = tiny_networks.state(architecture)
    x = tiny_networks.images()
    want, _ = tiny_networks.forward(architecture, state, x, train=True)
    got, stats = tiny_networks.forward(
        architecture, state, x.astype(jnp.bfloat16), train=True
    )
    self.assertEqual(got.dtype, np.float32)
    for leaf in jax.tree.leaves(stats):
      self.assertEqual(leaf.dtype, np.float32)
    np.testing.assert_allclose(got, want, atol=0.2)
    self.assertGreater(np.abs(got - want).max(), 0)


  @parameterized.parameters(*networks.FAMILIES)
  def test_any_number_of_examples(self, family):
    architecture = tiny_networks.seed(family)
    parts = networks.parts(architecture)
    trees = {part.name: base.shapes(part) for part in parts}
    weights, stats = (
        {name: tree[i] for name, tree in trees.items()} for i in (0, 1)
    )
    (count,) = jax.export.symbolic_shape('count')
    dtype = jnp.int32 if family == 'lstm2' else jnp.float32
    x = jax.ShapeDtypeStruct((count, *parts[0].input_shape), dtype)
    bucket = view.layout(architecture, fuse=False).bucket
    logits, _ = jax.eval_shape(
        lambda *trees: base.apply(bucket, *trees, train=False),
        weights,
        stats,
        x,
    )
    want = (count, *base.output_shape(parts[-1]))
    self.assertEqual(logits.shape, want)


class SegmentsTest(parameterized.TestCase):

  def test_runs_of_equal_blocks(self):
    architecture = tiny_networks.seed('basic3resnet', (3, 4, 1))
    architecture = architecture.resized({'s1b2.mid': 9})
    pairs = base.segments(
        architecture, networks.parts(architecture), fuse=True
    )
    self.assertEqual(
        [(segment.key, segment.length, names) for segment, names in pairs],
        [
            ('stem', None, ('stem',)),
            # Stage 0 does not subsample: its first block is like the others.
            ('stage0.0', 3, ('s0b0', 's0b1', 's0b2')),
            ('stage1.0', None, ('s1b0',)),
            ('stage1.1', None, ('s1b1',)),
            ('stage1.2', None, ('s1b2',)),
            ('stage1.3', None, ('s1b3',)),
            ('stage2.0', None, ('s2b0',)),
            ('head', None, ('head',)),
        ],
    )

  def test_unfused(self):
    architecture = tiny_networks.seed('plain3net', (2, 3, 1))
    pairs = base.segments(
        architecture, networks.parts(architecture), fuse=False
    )
    for segment, names in pairs:
      self.assertEqual((segment.key,), names)
      self.assertIsNone(segment.length)
    self.assertLen(pairs, 8)

  @parameterized.parameters(*networks.FAMILIES)
  def test_grown_blocks_are_fused_with_their_neighbours(self, family):
    deep = tiny_networks.seed(family, (5,) * len(networks.get(family).widths))
    # The stem, a first block and a run per stage, the head.
    self.assertLessEqual(
        len(view.layout(deep).bucket), 2 + 2 * len(deep.stages)
    )


class CustomTest(absltest.TestCase):

  def test_a_network_of_ones_own(self):
    network = networks.get('networks_test:TWO_STAGES')
    self.assertEqual(network, TWO_STAGES)
    architecture = network.seed(
        (1, 2), input_shape=(8, 8, 3), classes=5, options={}
    )
    restored = type(architecture).from_json(architecture.to_json())
    self.assertLen(networks.parts(restored), 5)
    self.assertEqual(costs.layers_of(restored), 8)
    # Stem, two basic blocks of a stage, projection, head: the formulas of 1.7.
    basic = lambda inside, out: 9 * (inside + out) * out + 4 * out
    self.assertEqual(
        costs.params(restored),
        9 * 3 * 4 + 8
        + basic(4, 4)
        + basic(4, 8) + 4 * 8 + 16
        + basic(8, 8)
        + 8 * 5 + 5,
    )  # pyformat: disable


def without(tree, name):
  return {key: value for key, value in tree.items() if key != name}


if __name__ == '__main__':
  absltest.main()
