"""Tests of parameter and multiply-add counts, and of the ledger."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import tiny_networks

from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.networks import base

# Network, depths, options, input, classes, parameters, multiply-adds, layers.
GOLDEN = (
    ('basic1resnet', '1', {}, (20, 1), 2, 1_290, 489_616, 4),
    ('basic3resnet', '1-1-1', {}, (32, 3), 10, 78_042, 12_501_632, 8),
    ('basic3resnet', '1-1-1', {}, (32, 1), 10, 77_754, 12_206_720, 8),
    ('basic3resnet', '1-1-1', {}, (32, 3), 100, 83_892, 12_507_392, 8),
    ('plain3net', '1-1-1', {}, (32, 3), 10, 26_682, 5_161_600, 5),
    ('plain3net', '1-1-1', {}, (32, 1), 10, 26_394, 4_866_688, 5),
    ('basic4resnet', '1-1-1-1', {}, (32, 3), 10, 4_903_242, 253_432_832, 10),
    ('plain4net', '1-1-1-1', {}, (32, 3), 10, 1_594_058, 96_146_432, 6),
    ('basic3resnet', '3-3-3', {}, (32, 3), 10, 272_474, 40_813_184, 20),
    (
        'basic3resnet', '3-3-3', {'shortcut': 'A'}, (32, 3), 10,
        269_722, 40_551_040, 20,
    ),
    ('basic3resnet', '42-42-42', {}, (32, 3), 10, 4_063_898, 592_888_448, 254),
    ('basic4resnet', '2-2-2-2', {}, (32, 3), 10, 11_173_962, 555_422_720, 18),
    ('plain4net', '6-6-6-6', {}, (32, 3), 10, 17_270_858, 851_121_152, 26),
    ('basic4resnet', '3-3-3-3', {}, (32, 3), 10, 17_444_682, 857_412_608, 26),
    ('plain3net', '11-11-10', {}, (32, 3), 10, 475_770, 73_581_184, 34),
    ('basic3resnet', '6-6-5', {}, (32, 3), 10, 490_138, 78_561_920, 36),
    (
        'basic4resnet', '1-1-1-1', {}, (224, 3), 1000,
        5_418_792, 889_229_312, 10,
    ),
    (
        'bottleneck4resnet', '1-1-1-1', {}, (224, 3), 1000,
        10_064_936, 1_468_792_832, 14,
    ),
    ('plain4net', '1-1-1-1', {}, (224, 3), 1000, 2_109_608, 407_539_712, 6),
    (
        'bottleneck4resnet', '3-4-6-3', {}, (224, 3), 1000,
        25_557_032, 4_089_184_256, 50,
    ),
    (
        'basic4resnet', '3-4-6-3', {}, (224, 3), 1000,
        21_797_672, 3_663_761_408, 34,
    ),
    ('vgg16', '2-2-3-3-3', {}, (32, 3), 10, 14_728_266, 313_201_664, 14),
    (
        'vgg16', '2-2-3-3-3', {'widths': (64, 128, 256, 512, 512, 512)},
        (32, 3), 10, 14_990_922, 313_463_808, 14,
    ),
    ('vgg19', '2-2-4-4-4', {}, (32, 3), 10, 20_035_018, 398_136_320, 17),
    ('vgg19', '2-2-4-4-4', {}, (32, 3), 100, 20_081_188, 398_182_400, 17),
    (
        'vgg19', '2-2-4-4-4', {'widths': (16,) * 5}, (32, 3), 10,
        35_674, 4_755_616, 17,
    ),
    (
        'vgg19', '2-2-4-4-4', {'widths': (16,) * 5}, (32, 3), 100,
        37_204, 4_757_056, 17,
    ),
    ('wrn28_10', '4-4-4', {}, (32, 3), 10, 36_489_290, 5_951_117_568, 26),
    (
        'mobilenet1', '1-2-2-6-2', {}, (224, 3), 1000,
        4_231_976, 568_740_352, 28,
    ),
    (
        'mobilenet1', '1-2-2-6-2', {'widths': (32, 64, 128, 256, 512)},
        (128, 3), 1000, 1_331_592, 49_160_192, 28,
    ),
    (
        'mobilenet1', '1-2-2-6-2', {'widths': (16, 32, 64, 128, 256)},
        (128, 3), 1000, 470_072, 13_570_048, 28,
    ),
    ('mobilenet1', '1-2-2-6-2', {}, (32, 3), 10, 3_217_226, 46_354_432, 28),
    ('mlp', '1-1', {}, (28, 1), 10, 266_610, 266_200, 3),
    (
        'deeplab', '3-4-23-3', {}, (513, 3), 21,
        58_040_661, 70_990_084_544, 103,
    ),
    # Multiply-adds of a word.
    ('lstm2', '1-1', {}, None, 10_000, 66_022_000, 51_000_000, 2),
    (
        'lstm2', '1-1', {'widths': (373, 315), 'embedding': 1500}, None, 10_000,
        21_824_148, 6_811_396, 2,
    ),
)  # pyformat: disable


def build(family, depths, image=(32, 3), classes=10, **options):
  if networks.get(family).inputs == 'tokens':
    shape, options = (1,), {'streams': 1, **options}
  else:
    size, channels = image
    shape = (size, size, channels)
  return networks.get(family).seed(
      tuple(map(int, depths.split('-'))),
      input_shape=shape,
      classes=classes,
      options=options,
  )


def count_macs(jaxpr: core.Jaxpr) -> int:
  """Multiply-adds of all convolutions and products in a program."""
  total = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == 'conv_general_dilated':
      kernel = equation.invars[1].aval.shape
      spec = equation.params['dimension_numbers'].rhs_spec
      total += equation.outvars[0].aval.size * math.prod(
          kernel[dim] for dim in spec[1:]
      )
    elif name == 'dot_general':
      contracted, _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval.shape
      total += equation.outvars[0].aval.size * math.prod(
          left[dim] for dim in contracted[0]
      )
    times = equation.params.get('length', 1) if name == 'scan' else 1
    for value in equation.params.values():
      if isinstance(value, core.ClosedJaxpr):
        total += times * count_macs(value.jaxpr)
      elif isinstance(value, core.Jaxpr):
        total += times * count_macs(value)
  return total


def counted_macs(architecture, *, fuse):
  """Multiply-adds of the program that runs on one image."""
  layout = view.layout(architecture, fuse=fuse)
  parts = networks.parts(architecture)

  def run():
    zeros = lambda tree: jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree
    )
    trees = {part.name: zeros(base.shapes(part)) for part in parts}
    weights = {name: weights for name, (weights, _) in trees.items()}
    stats = {name: stats for name, (_, stats) in trees.items()}
    logits, _ = base.apply(
        layout.bucket,
        view.pack(weights, layout, stack=jnp.stack),
        view.pack(stats, layout, stack=jnp.stack),
        jnp.zeros((1, *parts[0].input_shape)),
        train=True,
    )
    return logits

  return count_macs(jax.make_jaxpr(run)().jaxpr)


class GoldenTest(parameterized.TestCase):

  @parameterized.parameters(*GOLDEN)
  def test_counts(
      self, family, depths, options, image, classes, params, macs, layers
  ):
    architecture = build(family, depths, image, classes, **options)
    self.assertEqual(costs.params(architecture), params)
    self.assertEqual(costs.macs(architecture), macs)
    self.assertEqual(costs.layers_of(architecture), layers)

  def test_no_family_is_missing(self):
    self.assertEqual({row[0] for row in GOLDEN}, set(networks.FAMILIES))

  @parameterized.parameters(
      ('basic3resnet', (32, 3), 4_718_592, lambda w: 18 * w**2 + 4 * w),
      ('basic4resnet', (32, 3), 75_497_472, lambda w: 18 * w**2 + 4 * w),
      ('basic4resnet', (224, 3), 231_211_008, lambda w: 18 * w**2 + 4 * w),
      ('plain3net', (32, 3), 2_359_296, lambda w: 9 * w**2 + 2 * w),
      ('plain4net', (224, 3), 115_605_504, lambda w: 9 * w**2 + 2 * w),
      (
          'bottleneck4resnet',
          (224, 3),
          218_365_952,
          lambda w: 17 * w**2 + 12 * w,
      ),
      ('vgg16', (32, 3), None, lambda w: 9 * w**2 + 3 * w),
      ('mlp', (32, 3), None, lambda w: w**2 + w),
  )
  def test_increments(self, family, image, macs, params):
    widths = networks.get(family).widths
    before = build(family, '-'.join('1' * len(widths)), image)
    for stage, width in enumerate(widths):
      after = before.with_block(stage)
      self.assertEqual(
          costs.params(after) - costs.params(before), params(width)
      )
      # Where widths don't double as sides halve, stages differ.
      side = image[0] >> stage if family == 'vgg16' else 1
      weights = 9 * width**2 if family == 'vgg16' else width**2
      self.assertEqual(
          costs.macs(after) - costs.macs(before),
          side**2 * weights if macs is None else macs,
      )


class CountsTest(parameterized.TestCase):

  @parameterized.parameters(*tiny_networks.VARIANTS)
  def test_params_are_the_sizes_of_all_leaves(self, family, options):
    architecture = tiny_networks.seed(family, **options)
    state = state_lib.abstract_state(
        architecture, tiny_networks.OPTIMIZERS['sgd']
    )
    self.assertEqual(
        costs.params(architecture),
        sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    )

  @parameterized.parameters(
      *((family, (32, 3)) for family in networks.FAMILIES),
      ('basic4resnet', (224, 3)),
      ('mobilenet1', (224, 3)),
      ('deeplab', (224, 3)),
  )
  def test_macs_are_those_of_the_program(self, family, image):
    stages = len(networks.get(family).widths)
    depths = '-'.join('13121'[:stages])
    architecture = build(family, depths, image, 7)
    macs = costs.macs(architecture)
    if family == 'deeplab':  # Interpolation has no weights.
      size, side = image[0], 14 if image[0] == 224 else 8
      macs += 7 * (size * side * side + size * size * side)
    self.assertEqual(counted_macs(architecture, fuse=False), macs)
    self.assertEqual(counted_macs(architecture, fuse=True), macs)

  def test_selection_costs_nothing(self):
    architecture = build('basic3resnet', '1-1-1', shortcut='A')
    selections = 16**2 * 16 * 32 + 8**2 * 32 * 64
    self.assertEqual(
        counted_macs(architecture, fuse=False),
        costs.macs(architecture) + selections,
    )

  def test_counts_take_the_place_of_sizes(self):
    architecture = tiny_networks.seed('bottleneck4resnet')
    counts = {'s1': 5, 's1b1.mid2': 2, 'stem': 1}
    smaller = architecture.resized(counts)
    for count in (costs.params, costs.macs):
      self.assertEqual(count(architecture, counts), count(smaller))
      self.assertNotEqual(count(architecture, counts), count(architecture))

  def test_counts_are_differentiable(self):
    architecture = tiny_networks.seed('basic3resnet')
    axes = {'s1': 6.0, 's1b0.mid': 6.0, 's2b0.mid': 8.0}
    for count in (costs.params, costs.macs):
      gradient = jax.jit(jax.grad(lambda x, f=count: f(architecture, x)))(axes)
      # A count is linear in each of these axes.
      for axis, size in axes.items():
        step = count(architecture, {axis: size + 1}) - count(architecture)
        self.assertGreater(step, 0)
        np.testing.assert_allclose(gradient[axis], step, rtol=1e-6)

  @parameterized.parameters(*tiny_networks.VARIANTS)
  def test_table_adds_up(self, family, options):
    architecture = tiny_networks.seed(family, **options)
    table = costs.table(architecture)
    self.assertEqual(
        sum(layer.params for layer in table), costs.params(architecture)
    )
    self.assertEqual(
        sum(layer.macs for layer in table), costs.macs(architecture)
    )
    self.assertLen({layer.name for layer in table}, len(table))
    first = networks.parts(architecture)[0].name
    self.assertStartsWith(table[0].name, f'{first}/')
    last = 'head/classifier' if family == 'deeplab' else 'head/dense'
    self.assertEqual(table[-1].name, last)
    self.assertEqual(
        costs.activation_bytes(architecture),
        4 * sum(math.prod(layer.output_shape) for layer in table),
    )

  def test_table_rows(self):
    architecture = build('basic3resnet', '1-1-1', shortcut='A')
    rows = {layer.name: layer for layer in costs.table(architecture)}
    for row in (
        costs.Row(
            's1b0/conv1', 'Conv', (16, 16, 32), 9 * 16 * 32, 9 * 16 * 32 * 256
        ),
        costs.Row('s1b0/norm1', 'Norm', (16, 16, 32), 64, 0),
        costs.Row('s1b0/shortcut', 'Select', (16, 16, 32), 0, 0),
        costs.Row('head/dense', 'Dense', (10,), 650, 640),
    ):
      self.assertEqual(rows[row.name], row)


class LedgerTest(absltest.TestCase):

  def test_adds(self):
    start = costs.Ledger()
    ledger = (
        start.trained(10, 3)
        .trained(100, 2)
        .evaluated(10, 7)
        .compiled(1.5)
        .compiled(0.25)
        .elapsed(4.0)
    )
    self.assertEqual(
        ledger,
        costs.Ledger(
            forward_macs=230,
            backward_macs=460,
            eval_macs=70,
            wall_seconds=4.0,
            compile_seconds=1.75,
            compile_count=2,
        ),
    )
    self.assertEqual(ledger.train_macs, 690)
    self.assertEqual(start, costs.Ledger())


if __name__ == '__main__':
  absltest.main()
