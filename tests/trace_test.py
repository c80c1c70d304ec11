"""Axes found by tracing: small Flax models, and our own families."""

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import autogrow_jax as ag
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.networks import base
from autogrow_jax import state as state_lib
from autogrow_jax import view
from tests import tiny_networks


class Convolutions(nn.Module):
  """Flattened maps, depthwise and grouped kernels, a concatenation."""

  width: int = 6

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(self.width, (3, 3))(x))
    y = nn.Conv(self.width, (3, 3), feature_group_count=self.width)(x)
    y = nn.BatchNorm(use_running_average=not train)(y)
    z = jnp.concatenate([nn.Conv(6, (1, 1))(y), nn.Conv(6, (1, 1))(x)], -1)
    z = nn.Conv(8, (3, 3), feature_group_count=4)(z)
    z = nn.max_pool(z, (2, 2), (2, 2)).reshape(len(z), -1)
    return nn.Dense(3)(nn.relu(nn.Dense(9)(z)))


class Transformer(nn.Module):
  """Attention with a fused kernel, a tied head, learned positions."""

  width: int = 12

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(11, 8, name='embed')
    x = embed(tokens) + nn.Embed(7, 8)(jnp.arange(tokens.shape[1])[None])
    h = nn.LayerNorm()(x)
    q, k, v = (
        each.reshape(*each.shape[:2], 2, 3)
        for each in jnp.split(nn.Dense(18, name='qkv')(h), 3, axis=-1)
    )
    h = nn.dot_product_attention(q, k, v).reshape(*x.shape[:2], 6)
    x = x + nn.Dense(8, name='join')(h)
    h = nn.gelu(nn.Dense(self.width, name='up')(nn.LayerNorm()(x)))
    return embed.attend(x + nn.Dense(8, name='down')(h))


class Recurrent(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.RNN(nn.OptimizedLSTMCell(5))(x)
    return nn.Dense(3)(nn.RNN(nn.GRUCell(6))(x))


class Layer(nn.Module):

  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(6)(nn.relu(nn.Dense(9)(nn.LayerNorm()(x)))), None


class Stack(nn.Module):
  """A scan over layers."""

  length: int = 3

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
        nn.remat(Layer),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=self.length,
    )
    return nn.Dense(2)(layers(name='layers')(nn.Dense(6)(x), None)[0])


class Gated(nnx.Module):
  """An NNX block with a state of random numbers."""

  def __init__(self, width, rngs):
    self.norm = nnx.RMSNorm(4, rngs=rngs)
    self.up = nnx.Linear(4, width, rngs=rngs)
    self.gate = nnx.Linear(4, width, rngs=rngs)
    self.down = nnx.Linear(width, 4, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    h = self.norm(x)
    return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


IMAGES = np.random.default_rng(0).normal(size=(3, 6, 6, 2)).astype('f4')
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 7))
VECTORS = np.random.default_rng(0).normal(size=(4, 5, 3)).astype('f4')

# Model, inputs, sizes of free factors.
MODELS = {
    'convolutions': (Convolutions(), IMAGES, (
        6, 3, 9,  # Stem, inputs of each group, hidden units.
    )),
    'transformer': (Transformer(), TOKENS, (
        2, 3, 3, 8, 12,  # Heads, their two sizes, stream, hidden units.
    )),
    'recurrent': (Recurrent(), VECTORS, (5, 6)),
    'stack': (Stack(), VECTORS, (6, 9)),
}


def _traced(name):
  model, x, _ = MODELS[name]
  variables = model.init(jax.random.key(0), x)
  return model, variables, x, ag.trace(model.apply, variables, x)


class FindTest(parameterized.TestCase):

  @parameterized.parameters(*MODELS)
  def test_free_factors_pass_the_permutation_test(self, name):
    model, variables, x, axes = _traced(name)
    sizes = [axes.sizes[name] for name in axes.free]
    self.assertCountEqual(sizes, MODELS[name][2])
    outcome = axes.verify(model.apply, variables, x)
    self.assertLess(max(outcome.changes.values()), 1e-5)
    for _, leaf in outcome.unnoticed:  # Softmax cancels a key's bias.
      self.assertIn('qkv/bias', leaf)

  def test_shapes_are_enough(self):
    model, variables, x, axes = _traced('transformer')
    shapes = jax.eval_shape(lambda tree: tree, variables)
    inputs = jax.ShapeDtypeStruct(x.shape, x.dtype)
    other = ag.trace(model.apply, shapes, inputs)
    self.assertEqual(str(other), str(axes))

  def test_training_and_evaluation_agree(self):
    model, variables, x, axes = _traced('convolutions')
    train = lambda tree, x: model.apply(
        tree, x, train=True, mutable=['batch_stats']
    )[0]
    found = ag.trace(train, variables, x)
    self.assertEqual(found.axes, axes.axes)

  def test_every_axis_that_is_not_free_says_why(self):
    _, _, _, axes = _traced('transformer')
    self.assertEqual(axes.kinds['embed/embedding:rows'], 'outputs')
    self.assertEqual(axes.kinds['Embed_0/embedding:rows'], 'indexed')
    _, _, _, axes = _traced('convolutions')
    self.assertIn('window', axes.frozen['Conv_0/kernel:0'])
    self.assertIn('input', axes.frozen['Conv_0/kernel:in'])
    self.assertIn('frozen, an input of the model', str(axes))

  def test_roles(self):
    _, _, _, axes = _traced('transformer')
    roles = lambda *path: [axis.role for axis in axes.axes[path]]
    self.assertEqual(roles('qkv', 'bias'), ['writes'])
    self.assertEqual(roles('down', 'kernel'), ['reads', 'writes'])
    self.assertEqual(roles('embed', 'embedding'), ['indexed', 'tied'])
    self.assertEqual(
        axes.normalised & {*axes.free}, {axes.axes['down', 'bias'][0].name}
    )

  def test_unknown_primitives_freeze_what_they_touch(self):
    tree = {'a': np.eye(3, dtype='f4'), 'b': np.ones((3, 2), 'f4')}
    axes = ag.trace(
        lambda tree, x: x @ jnp.linalg.cholesky(tree['a']) @ tree['b'],
        tree, np.ones((1, 3), 'f4'),
    )
    self.assertIn('cholesky', axes.frozen['a:out'])
    self.assertIn('trace_test.py', axes.frozen['a:out'])

  @parameterized.named_parameters(
      ('order', lambda x: x * jnp.arange(4.0)[None], 'their number'),
      ('constant', lambda x: x * np.float32([[1, 2, 3, 4]]), 'not uniform'),
      ('sorted', jnp.sort, 'their number'),
      ('sliced', lambda x: x[..., ::2].repeat(2, -1), 'sliced'),
      (
          'reshaped',
          lambda x: (x[:, :3].sum(1, keepdims=True) + x)
          .reshape(2, 2, 2)
          .max(1),
          'reshaped',
      ),
  )
  def test_frozen_by(self, function, reason):
    tree = {'a': np.ones((3, 4), 'f4'), 'b': np.ones((4, 4), 'f4')}
    axes = ag.trace(
        lambda tree, x: (function(x @ tree['a']) @ tree['b'][:2]).sum(-1)
        if function(np.ones((2, 4))).shape[-1] == 2
        else (function(x @ tree['a']) @ tree['b']).sum(-1),
        tree, np.ones((2, 3), 'f4'),
    )
    self.assertTrue(
        any(reason in why for why in axes.frozen.values()), str(axes)
    )

  def test_wrong_axes_fail_the_permutation_test(self):
    model, variables, x, axes = _traced('stack')
    wrong = axes_lib.AxisTable(
        axes.axes | {('Dense_0', 'kernel'): (None, None)}, axes.sizes
    )
    with self.assertRaisesRegex(ValueError, 'permuted changes them'):
      wrong.verify(model.apply, variables, x)
    with self.assertRaisesRegex(ValueError, 'the tree has shapes'):
      axes.verify(model.apply, ag.shapes(model, x), x)


class GrowTest(parameterized.TestCase):

  @parameterized.parameters(
      ('convolutions', 'Dense_0*', 16), ('transformer', 'up*', 16),
      ('transformer', 'qkv/kernel:out.5', 5),
  )
  def test_widening_keeps_the_outputs_and_the_moments(self, name, pattern, to):
    model, variables, x, axes = _traced(name)
    tx = optax.adamw(1e-2)
    state = tx.init(variables['params'])
    state = tx.update(variables['params'], state, variables['params'])[1]
    growth = ag.widen(axes, pattern, to=to)
    (grown_axis,) = growth.sources
    like = {
        path: jax.ShapeDtypeStruct(
            tuple(
                size if axis is None or grown_axis not in axis.factors
                else len(axes_lib.source_of(axis, growth.sources, axes.sizes))
                for size, axis in zip(leaf.shape, axes.find(path))
            ), leaf.dtype,
        )
        for path, leaf in axes_lib.by_path(variables).items()
    }
    like = axes_lib.map_with_names(lambda path, _: like[path], variables)
    grown, state, receipt = ag.grow(
        growth, axes, variables, state, like=like, key=jax.random.key(1)
    )
    self.assertEqual(receipt.optimizer.counts['dropped'], 0)
    self.assertNotIn('refused', receipt.optimizer.counts)
    chex_shapes = jax.tree.map(jnp.shape, grown['params'])
    self.assertEqual(jax.tree.map(jnp.shape, state[0].mu), chex_shapes)
    if name == 'transformer' and pattern == 'up*':
      wider = Transformer(width=to)
      np.testing.assert_allclose(
          wider.apply(grown, x), model.apply(variables, x), atol=1e-6
      )

  def test_layers_of_a_stack(self):
    model, variables, x, axes = _traced('stack')
    (name,) = axes['*layers']
    for order, change in (([0, ag.NEW, 1, 2], 0.0), ([0, 1, 2] * 2, 0.1)):
      deeper = Stack(length=len(order))
      growth = ag.deepen(axes, '*layers', order)
      _, _, receipt = ag.grow(
          growth, axes, variables, like=deeper.init(jax.random.key(1), x),
          probe=(model.apply, deeper.apply, x),
      )
      self.assertBetween(receipt.outputs_change[''], change, 100 * change)
    with self.assertRaisesRegex(ValueError, 'not one of stacked layers'):
      ag.deepen(axes, 'layers/Dense_1*out', [0])
    found = ag.growth_between(axes, ag.shapes(Stack(length=5), x))
    self.assertEqual(found.sizes, {name: 5})

  def test_an_nnx_module(self):
    x = VECTORS[..., :1].repeat(4, -1)
    narrow, wide = Gated(6, nnx.Rngs(0)), Gated(10, nnx.Rngs(1))
    axes = ag.trace(narrow, x)
    self.assertEqual(axes.verify(*ag.functional(narrow), x).unnoticed, {})
    growth = ag.growth_between(axes, ag.shapes(wide))
    tree, _, receipt = ag.grow(
        growth, axes, nnx.state(narrow), like=nnx.state(wide),
        probe=(ag.functional(narrow)[0], ag.functional(wide)[0], x),
    )
    self.assertLess(receipt.outputs_change[''], 1e-6)
    nnx.update(wide, tree)
    np.testing.assert_allclose(wide(x), narrow(x), atol=1e-6)

  def test_new_classes_are_the_mean_of_the_old(self):
    _, variables, x, axes = _traced('stack')
    growth = ag.widen(axes, 'Dense_0/kernel:out', to=3, start='mean')
    like = jax.tree.map(lambda leaf: leaf, ag.shapes(Stack(), x))
    like['params']['Dense_0'] = {
        'kernel': jax.ShapeDtypeStruct((6, 3), 'f4'),
        'bias': jax.ShapeDtypeStruct((3,), 'f4'),
    }
    grown, *_ = ag.grow(growth, axes, variables, like=like)
    old, new = (
        tree['params']['Dense_0']['kernel'] for tree in (variables, grown)
    )
    np.testing.assert_array_equal(new[:, :2], old)
    np.testing.assert_allclose(new[:, 2], old.mean(1), rtol=1e-6)

  def test_what_cannot_be_kept_is_said(self):
    _, _, _, axes = _traced('transformer')
    stream = axes.axes['down', 'bias'][0].name
    self.assertIn('norm reduces', str(ag.widen(axes, stream, to=10)))
    self.assertIn('no weight', str(ag.widen(axes, 'qkv/kernel:out.1', to=4)))
    with self.assertRaisesRegex(ValueError, 'reads and writes'):
      ag.split(axes, stream, [0])
    _, _, _, axes = _traced('convolutions')
    with self.assertRaisesRegex(ValueError, 'frozen'):
      ag.widen(axes, 'Conv_0/kernel:in', to=4)


class OwnFamiliesTest(parameterized.TestCase):

  @parameterized.parameters(*tiny_networks.VARIANTS)
  def test_traced_axes_are_the_declared_ones(self, family, options):
    architecture = tiny_networks.seed(family, **options)
    bucket = view.layout(architecture, fuse=False).bucket
    state = tiny_networks.state(architecture)
    tree = {
        'params': state.params['weights'],
        'batch_stats': state.stats['network'],
    }
    x = tiny_networks.images(2)
    traced = ag.trace(
        lambda tree, x: base.apply(
            bucket, tree['params'], tree['batch_stats'], x, train=False
        )[0],
        tree, x,
    )
    declared = state_lib.axis_table(architecture)
    names = {}
    for path, axes in declared.axes.items():
      for own, found in zip(axes, traced.find(path), strict=True):
        if own is None or own.name not in declared.sizes:
          continue
        self.assertEqual(own.role, found.role, str(path))
        self.assertLen(own.segments, len(found.segments), str(path))
        for left, right in zip(own.factors, found.factors):
          names.setdefault(left, set()).add(right)
    self.assertNotEmpty(names)
    self.assertTrue(all(len(found) == 1 for found in names.values()), names)


if __name__ == '__main__':
  absltest.main()
