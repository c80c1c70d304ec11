"""Tests of the layers against NumPy, and of the axes that they declare."""

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import layers

def normal(*shape, seed=0):
  generator = np.random.default_rng(seed)
  return generator.normal(size=shape).astype('f4')


def variables(module, x, **arguments):
  return nn.meta.unbox(module.init(jax.random.key(0), x, **arguments))


class ConvTest(absltest.TestCase):

  def test_keeps_the_type_of_its_input(self):
    x = normal(2, 8, 8, 3).astype(jnp.bfloat16)
    module = layers.Conv(4, 3, 2)
    params = variables(module, x)
    self.assertEqual(params['params']['kernel'].dtype, jnp.float32)
    y, grads = jax.jit(
        jax.value_and_grad(
            lambda p: jnp.sum(module.apply(p, x).astype(jnp.float32))
        )
    )(params)
    del y
    self.assertEqual(module.apply(params, x).dtype, jnp.bfloat16)
    self.assertEqual(grads['params']['kernel'].dtype, jnp.float32)

  def test_dilation_spreads_the_taps(self):
    x = normal(1, 9, 9, 1)
    module = layers.Conv(1, 3, dilation=3)
    kernel = np.zeros((3, 3, 1, 1), 'f4')
    kernel[0, 2] = 1  # Three rows up, three columns to the right.
    y = module.apply({'params': {'kernel': kernel}}, x)
    np.testing.assert_array_equal(y[:, 3:, :6], x[:, :6, 3:])
    for outside in (y[:, :3], y[:, :, 6:]):
      np.testing.assert_array_equal(outside, np.zeros_like(outside))

  def test_only_plain_has_a_forward_mode(self):
    x = normal(2, 5, 5, 3)

    def slope(module, params):
      _, tangent = jax.jvp(lambda x: module.apply(params, x), (x,), (x,))
      return tangent

    plain = layers.Conv(4, 3, plain=True)
    params = variables(plain, x)
    # Convolutions are linear: the slope along x is the value at x.
    np.testing.assert_allclose(
        slope(plain, params), plain.apply(params, x), rtol=1e-5, atol=1e-6
    )
    with self.assertRaisesRegex(TypeError, 'forward-mode'):
      slope(layers.Conv(4, 3), params)

  def test_bias(self):
    x = normal(2, 5, 5, 3)
    with_bias, without = layers.Conv(4, 3, bias=True), layers.Conv(4, 3)
    trees = variables(with_bias, x)
    np.testing.assert_array_equal(trees['params']['bias'], np.zeros(4, 'f4'))
    bias = np.array([1, -2, 0, 0.5], 'f4')
    kernel = {'kernel': trees['params']['kernel']}
    np.testing.assert_allclose(
        with_bias.apply({'params': {**kernel, 'bias': bias}}, x),
        without.apply({'params': kernel}, x) + bias.reshape(1, 1, 1, 4),
        rtol=1e-6,
    )
    half = with_bias.apply(trees, x.astype(jnp.bfloat16))
    self.assertEqual(half.dtype, jnp.bfloat16)


class NormTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.x = normal(3, 4, 5, 2) * np.float32(3) + np.float32(1)
    self.variables = {
        'params': {
            'scale': np.array([0.5, -2], 'f4'),
            'bias': np.array([1, 0.25], 'f4'),
        },
        'stats': {
            'mean': np.array([0.3, 0.7], 'f4'),
            'var': np.array([2, 0.5], 'f4'),
        },
    }

  def apply(self, train, x=None):
    run = jax.jit(
        lambda x, train: layers.Norm().apply(
            self.variables, x, train=train, mutable=['stats']
        ),
        static_argnums=1 if isinstance(train, bool) else (),
    )
    y, changed = run(self.x if x is None else x, train)
    return y, changed['stats']

  def expected(self, mean, var):
    x = (self.x - mean) / np.sqrt(var + 1e-5)
    return self.variables['params']['scale'] * x + np.float32([1, 0.25])

  @parameterized.parameters(True, np.bool_(True))
  def test_train(self, train):
    y, stats = self.apply(train)
    mean, var = self.x.mean((0, 1, 2)), self.x.var((0, 1, 2))
    np.testing.assert_allclose(y, self.expected(mean, var), atol=2e-5)
    old = self.variables['stats']
    np.testing.assert_allclose(
        stats['mean'], 0.9 * old['mean'] + 0.1 * mean, rtol=1e-5
    )
    np.testing.assert_allclose(
        stats['var'], 0.9 * old['var'] + 0.1 * var, rtol=1e-5
    )

  @parameterized.parameters(False, np.bool_(False))
  def test_eval(self, train):
    y, stats = self.apply(train)
    old = self.variables['stats']
    np.testing.assert_allclose(
        y, self.expected(old['mean'], old['var']), atol=2e-5
    )
    np.testing.assert_array_equal(stats['mean'], old['mean'])
    np.testing.assert_array_equal(stats['var'], old['var'])

  def test_bfloat16_keeps_float32_statistics(self):
    y, stats = self.apply(True, self.x.astype(jnp.bfloat16))
    self.assertEqual(y.dtype, jnp.bfloat16)
    self.assertEqual(stats['mean'].dtype, jnp.float32)
    # A sum in bfloat16 would be off by percents.
    rounded = np.asarray(self.x.astype(jnp.bfloat16), 'f4')
    np.testing.assert_allclose(
        stats['var'],
        0.9 * self.variables['stats']['var'] + 0.1 * rounded.var((0, 1, 2)),
        rtol=1e-5,
    )

  def test_backward_pass_keeps_the_input_in_its_type(self):
    x = self.x.astype(jnp.bfloat16)
    apply = lambda x: layers.Norm().apply(
        self.variables, x, train=True, mutable=['stats']
    )[0]
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(apply, x)[1], x))
    self.assertEqual(
        [leaf.dtype for leaf in kept if leaf.shape == x.shape], [jnp.bfloat16]
    )
    along = jax.jvp(apply, [x], [x])[1]  # There is a forward mode, too.
    self.assertTrue(jnp.isfinite(along).all())

  def test_initialising_leaves_the_statistics_alone(self):
    stats = variables(layers.Norm(), self.x, train=True)['stats']
    np.testing.assert_array_equal(stats['mean'], [0, 0])
    np.testing.assert_array_equal(stats['var'], [1, 1])


class SelectTest(parameterized.TestCase):

  @parameterized.parameters((4, 8, 2), (3, 8, 2), (4, 4, 1), (6, 4, 2))
  def test_subsamples_and_pads_channels(self, before, after, stride):
    x = normal(2, 6, 6, before)
    module = layers.Select(after, stride)
    trees = variables(module, x)
    self.assertNotIn('params', trees)
    left = max(0, after - before) // 2
    right = max(0, after - before - left)
    want = np.pad(x[:, ::stride, ::stride], ((0, 0),) * 3 + ((left, right),))
    np.testing.assert_array_equal(module.apply(trees, x), want[..., :after])


class DenseTest(absltest.TestCase):

  def test_computes_in_float32(self):
    x = normal(3, 4).astype(jnp.bfloat16)
    module = layers.Dense(2)
    params = variables(module, x)
    y = module.apply(params, x)
    self.assertEqual(y.dtype, jnp.float32)
    leaves = params['params']
    np.testing.assert_allclose(
        y,
        np.asarray(x, 'f4') @ leaves['kernel'] + leaves['bias'][None],
        rtol=1e-5,
        atol=1e-6,
    )

  def test_sums_over_images(self):
    x = normal(3, 4, 5, 2)
    module = layers.Dense(6)
    params = variables(module, x)['params']
    self.assertEqual(params['kernel'].shape, (4, 5, 2, 6))
    bound = 1 / np.sqrt(40)
    for leaf in params.values():
      self.assertBetween(np.abs(leaf).max(), 0.5 * bound, bound)
    np.testing.assert_allclose(
        module.apply({'params': params}, x),
        np.einsum('nhwc,hwco->no', x, params['kernel'])
        + params['bias'].reshape(1, 6),
        rtol=1e-5,
        atol=1e-6,
    )


class NamedTest(absltest.TestCase):

  def test_axes_and_roles(self):
    read, write = layers.Axis('in', 'reads'), layers.Axis('mid', 'writes')
    x = jnp.zeros((1, 5, 5, 3))
    axes = lambda module, **arguments: jax.tree.map(
        lambda box: box.axes,
        jax.eval_shape(
            lambda: module.init(jax.random.key(0), x, **arguments)
        ),
        is_leaf=lambda node: isinstance(node, layers.Named),
    )
    conv, dense = layers.Conv(4, 3, writes='mid'), layers.Dense(4, writes='mid')
    for module in (conv, dense):
      kernel = axes(module)['params']['kernel']
      self.assertEqual(kernel, (None, None, read, write))
    norm = axes(layers.Norm('mid'), train=False)
    self.assertEqual(norm['params'], {'scale': (write,), 'bias': (write,)})
    still = (layers.Axis('mid', 'neither'),)
    self.assertEqual(norm['stats'], {'mean': still, 'var': still})


if __name__ == '__main__':
  absltest.main()
