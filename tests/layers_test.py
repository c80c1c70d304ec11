"""Tests of the layers against XLA's own derivatives and NumPy."""

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import layers

# Kernel size, stride and dilation of all convolutions in the networks, and of
# one that reaches beyond the image.
CONVOLUTIONS = (
    (3, 1, 1), (3, 2, 1), (1, 1, 1), (1, 2, 1), (7, 2, 1),
    (3, 1, 2), (3, 2, 2), (3, 1, 9),
)  # pyformat: disable


def normal(*shape, seed=0):
  generator = np.random.default_rng(seed)
  return generator.normal(size=shape).astype('f4')


def variables(module, x, **arguments):
  return nn.meta.unbox(module.init(jax.random.key(0), x, **arguments))


class ConvTest(parameterized.TestCase):

  @parameterized.parameters(*CONVOLUTIONS)
  def test_equals_plain(self, size, stride, dilation):
    x, kernel = normal(2, 8, 7, 3), normal(size, size, 3, 4, seed=1)
    how = stride, dilation * (size // 2), dilation

    def results(function):
      y, pullback = jax.vjp(lambda x, k: function(x, k, *how), x, kernel)
      return y, *pullback(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    own = jax.jit(lambda: results(layers.conv))()
    plain = jax.jit(lambda: results(layers.plain_conv))()
    self.assertEqual(own[0].shape, (2, 8 // stride, -(-7 // stride), 4))
    for got, want in zip(own, plain, strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

  @parameterized.parameters((1, 1), (2, 1), (1, 2))
  def test_depthwise(self, stride, dilation):
    x, kernel = normal(2, 7, 6, 4), normal(3, 3, 1, 4, seed=1)
    how = stride, dilation, dilation

    def results(function):
      y, pullback = jax.vjp(lambda x, k: function(x, k, *how), x, kernel)
      return y, *pullback(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    own = jax.jit(lambda: results(layers.conv))()
    plain = jax.jit(lambda: results(layers.plain_conv))()
    for got, want in zip(own, plain, strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # Every channel on its own.
    for channel in range(4):
      alone = layers.plain_conv(
          x[..., [channel]], kernel[..., [channel]], *how
      )
      np.testing.assert_allclose(
          own[0][..., [channel]], alone, rtol=1e-5, atol=1e-5
      )

  @parameterized.product(
      size=((1, 2), (2, 2), (1, 1)), stride=(1, 2), dilation=(1, 2)
  )
  def test_images_smaller_than_the_kernel(self, size, stride, dilation):
    height, width = size
    x, kernel = normal(2, height, width, 3), normal(3, 3, 3, 4, seed=1)
    how = stride, dilation, dilation

    def by_hand(x, kernel):
      pads = (dilation, dilation)
      x = jnp.pad(x, ((0, 0), pads, pads, (0, 0)))
      return sum(
          x[:, row : row + height : stride, column : column + width : stride]
          @ kernel[row // dilation, column // dilation]
          for row in range(0, 3 * dilation, dilation)
          for column in range(0, 3 * dilation, dilation)
      )

    def results(function):
      y, pullback = jax.vjp(function, x, kernel)
      return y, *pullback(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    own = jax.jit(lambda: results(lambda x, k: layers.conv(x, k, *how)))()
    for got, want in zip(own, results(by_hand), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    plain = lambda x: layers.plain_conv(x, kernel, *how)
    np.testing.assert_allclose(
        jax.jvp(plain, [x], [x])[1], own[0], rtol=1e-5, atol=1e-5
    )

  @parameterized.parameters(
      (3, 1, 1, 3), (3, 2, 1, 3), (3, 1, 2, 3), (3, 1, 1, 1)
  )
  def test_input_gradient_and_its_derivatives(
      self, size, stride, dilation, inputs
  ):
    x, kernel = normal(2, 8, 7, 3), normal(size, size, inputs, 3, seed=1)
    how = stride, dilation * (size // 2), dilation
    plain = lambda x, kernel: layers.plain_conv(x, kernel, *how)
    dy = normal(*jax.eval_shape(plain, x, kernel).shape, seed=2)

    def results(function):
      dx, pullback = jax.vjp(function, dy, kernel)
      return dx, *pullback(x)

    own = jax.jit(lambda: results(
        lambda dy, kernel: layers.conv_input_gradient(
            dy, kernel, x.shape, *how
        )
    ))()
    want = jax.jit(lambda: results(
        lambda dy, kernel: jax.vjp(lambda x: plain(x, kernel), x)[1](dy)[0]
    ))()
    for got, other in zip(own, want, strict=True):
      np.testing.assert_allclose(got, other, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(1, 2)
  def test_equals_plain_in_a_loop(self, dilation):
    how = 1, dilation, dilation
    x, kernels = normal(2, 6, 5, 3), normal(4, 3, 3, 3, 3, seed=1) / 5

    def looped(x, kernels):
      y, _ = lax.scan(
          lambda x, kernel: (jnp.tanh(layers.conv(x, kernel, *how)), None),
          x,
          kernels,
      )
      return jnp.sum(jnp.square(y))

    def unrolled(x, kernels):
      for kernel in kernels:
        x = jnp.tanh(layers.plain_conv(x, kernel, *how))
      return jnp.sum(jnp.square(x))

    got = jax.jit(jax.value_and_grad(looped, (0, 1)))(x, kernels)
    want = jax.jit(jax.value_and_grad(unrolled, (0, 1)))(x, kernels)
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)

  @parameterized.parameters((3, 4), (1, 4), (3, 1))
  def test_loops_have_fast_convolutions_only(self, size, inputs):
    # XLA:CPU is slow at others (transposed, reversed) inside loops.
    x, kernels = normal(2, 6, 5, 4), normal(3, size, size, inputs, 4, seed=1)

    def fast(function):
      def looped(x, kernels):
        step = lambda x, kernel: (function(x, kernel, 1, size // 2), None)
        return jnp.sum(jnp.square(lax.scan(step, x, kernels)[0]))

      text = jax.jit(jax.grad(looped, (0, 1))).lower(x, kernels).as_text()
      return [
          '[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]' in line
          and 'reverse = [true' not in line
          for line in text.splitlines()
          if 'stablehlo.convolution' in line
      ]

    # A depthwise kernel's gradient is a sum of products.
    self.assertEqual(fast(layers.conv), [True] * (2 if inputs == 1 else 3))
    self.assertIn(False, fast(layers.plain_conv))

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

  def test_stride_two_samples_even_positions(self):
    # As PyTorch with padding 1; XLA's 'SAME' would sample 1, 3, 5, 7.
    x = np.arange(64, dtype='f4').reshape(1, 8, 8, 1)
    centre = np.zeros((3, 3, 1, 1), 'f4')
    centre[1, 1] = 1
    y = layers.conv(x, centre, 2, 1)
    np.testing.assert_array_equal(y, x[:, 0:8:2, 0:8:2])

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


class PoolTest(parameterized.TestCase):

  @parameterized.parameters((8, 6), (7, 5), (1, 1))
  def test_halves_like_pooling(self, height, width):
    """With its derivatives; of equal numbers the first one has the gradient."""
    noise = jnp.asarray(normal(2, height, width, 3))
    for x in (noise, nn.relu(noise), noise.at[0, 0, 0, 0].set(jnp.nan)):
      y, pull = jax.vjp(layers.halve, x)
      want, pull_plain = jax.vjp(
          lambda x: nn.max_pool(x, (2, 2), (2, 2), 'SAME'), x
      )
      np.testing.assert_array_equal(y, want)
      if np.isfinite(x).all():
        dy = normal(*y.shape, seed=1)
        np.testing.assert_array_equal(pull(dy)[0], pull_plain(dy)[0])
        along = jax.jvp(layers.halve, [x], [noise])[1]
        np.testing.assert_allclose(
            jnp.vdot(along, dy), jnp.vdot(pull(dy)[0], noise), rtol=1e-5
        )

  @parameterized.parameters(
      (4, [[-1, -3], [-9, -11]]), (3, [[-1, -3], [-7, -9]]), (1, [[-1]])
  )
  def test_halves(self, side, want):
    x = -np.arange(1, side**2 + 1, dtype='f4').reshape(1, side, side, 1)
    np.testing.assert_array_equal(layers.halve(x)[0, :, :, 0], want)

  def test_pads_with_minus_infinity(self):
    x = -np.arange(1, 17, dtype='f4').reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(
        layers.max_pool(x)[0, :, :, 0], [[-1, -2], [-5, -6]]
    )


class NamedTest(absltest.TestCase):

  def test_axes_and_roles(self):
    read, write = layers.Axis('in', 'reads'), layers.Axis('mid', 'writes')
    boxes = jax.eval_shape(
        lambda: layers.Conv(4, 3, writes='mid').init(
            jax.random.key(0), jnp.zeros((1, 5, 5, 3))
        )
    )
    self.assertEqual(
        boxes['params']['kernel'].axes, (None, None, read, write)
    )
    boxes = jax.eval_shape(
        lambda: layers.Dense(4, writes='mid').init(
            jax.random.key(0), jnp.zeros((1, 5, 5, 3))
        )
    )
    self.assertEqual(
        boxes['params']['kernel'].axes, (None, None, read, write)
    )
    boxes = jax.eval_shape(
        lambda: layers.Norm('mid').init(
            jax.random.key(0), jnp.zeros((1, 5, 5, 3)), train=False
        )
    )
    self.assertEqual(boxes['params']['scale'].axes, (write,))
    self.assertEqual(
        boxes['stats']['mean'].axes, (layers.Axis('mid', 'neither'),)
    )


if __name__ == '__main__':
  absltest.main()
