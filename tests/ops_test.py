"""Tests of convolution and pooling, and of their derivatives."""

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import ops

# Kernel size, stride, dilation and inputs of a kernel for three channels: the
# convolutions of the networks, and one that reaches beyond the image.
CONVOLUTIONS = (
    (3, 1, 1, 3), (3, 2, 1, 3), (1, 1, 1, 3), (1, 2, 1, 3), (7, 2, 1, 3),
    (3, 1, 2, 3), (3, 2, 2, 3), (3, 1, 9, 3),
    (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 1),
)  # pyformat: disable


def normal(*shape, seed=0):
  generator = np.random.default_rng(seed)
  return generator.normal(size=shape).astype('f4')


def with_gradients(function, *arguments):
  """Value, and gradients of a weighted sum by all arguments."""

  def run():
    y, pullback = jax.vjp(function, *arguments)
    return y, *pullback(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

  return jax.jit(run)()


def assert_close(got, want, tolerance=1e-5):
  for leaf, expected in zip(got, want, strict=True):
    np.testing.assert_allclose(leaf, expected, rtol=tolerance, atol=tolerance)


class ConvTest(parameterized.TestCase):

  @parameterized.parameters(*CONVOLUTIONS)
  def test_equals_plain(self, size, stride, dilation, inputs):
    """So do its derivatives, and those of its gradient by the input."""
    x, kernel = normal(2, 8, 7, 3), normal(size, size, inputs, 3, seed=1)
    how = stride, dilation * (size // 2), dilation
    plain = lambda x, kernel: ops.plain_conv(x, kernel, *how)
    got = with_gradients(lambda x, k: ops.conv(x, k, *how), x, kernel)
    assert_close(got, with_gradients(plain, x, kernel))
    self.assertEqual(got[0].shape, (2, 8 // stride, -(-7 // stride), 3))
    got = with_gradients(
        lambda dy, k: ops.conv_input_gradient(dy, k, x.shape, *how),
        got[0],
        kernel,
    )
    want = with_gradients(
        lambda dy, k: jax.vjp(lambda x: plain(x, k), x)[1](dy)[0],
        plain(x, kernel),
        kernel,
    )
    assert_close(got, want, 1e-4)

  @parameterized.product(
      size=((1, 2), (1, 1)), stride=(1, 2), dilation=(1, 2)
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

    got = with_gradients(lambda x, k: ops.conv(x, k, *how), x, kernel)
    assert_close(got, with_gradients(by_hand, x, kernel))
    # A convolution is linear: its slope along x is its value at x.
    plain = lambda x: ops.plain_conv(x, kernel, *how)
    assert_close([jax.jvp(plain, [x], [x])[1]], [got[0]])

  def test_depthwise_channels_are_separate(self):
    x, kernel = normal(2, 7, 6, 4), normal(3, 3, 1, 4, seed=1)
    y = ops.conv(x, kernel, 2, 1)
    for channel in range(4):
      alone = ops.plain_conv(x[..., [channel]], kernel[..., [channel]], 2, 1)
      assert_close([y[..., [channel]]], [alone])

  @parameterized.parameters(1, 2)
  def test_equals_plain_in_a_loop(self, dilation):
    how = 1, dilation, dilation
    x, kernels = normal(2, 6, 5, 3), normal(4, 3, 3, 3, 3, seed=1) / 5

    def looped(x, kernels):
      step = lambda x, kernel: (jnp.tanh(ops.conv(x, kernel, *how)), None)
      return lax.scan(step, x, kernels)[0]

    def unrolled(x, kernels):
      for kernel in kernels:
        x = jnp.tanh(ops.plain_conv(x, kernel, *how))
      return x

    assert_close(
        with_gradients(looped, x, kernels), with_gradients(unrolled, x, kernels)
    )

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
    self.assertEqual(fast(ops.conv), [True] * (2 if inputs == 1 else 3))
    self.assertIn(False, fast(ops.plain_conv))

  def test_stride_two_samples_even_positions(self):
    # As PyTorch with padding 1; XLA's 'SAME' would sample 1, 3, 5, 7.
    x = np.arange(64, dtype='f4').reshape(1, 8, 8, 1)
    centre = np.zeros((3, 3, 1, 1), 'f4')
    centre[1, 1] = 1
    y = ops.conv(x, centre, 2, 1)
    np.testing.assert_array_equal(y, x[:, 0:8:2, 0:8:2])


class ReluTest(absltest.TestCase):

  def test_equals_that_of_jax_and_keeps_a_mask(self):
    x, dx = jnp.asarray([-2.0, 0, 3, jnp.nan]), jnp.arange(1.0, 5)
    for run in (
        lambda relu: jax.jvp(relu, [x], [dx]),
        lambda relu: jax.vjp(relu, x)[1](dx),
    ):
      for got, want in zip(run(ops.relu), run(nn.relu), strict=True):
        np.testing.assert_array_equal(got, want)
    kept = jax.tree.leaves(jax.vjp(ops.relu, x)[1])
    self.assertEqual([leaf.dtype for leaf in kept], [jnp.bool_])


class PoolTest(parameterized.TestCase):

  @parameterized.parameters((8, 6), (7, 5), (1, 1))
  def test_halves_like_pooling(self, height, width):
    """So do its derivatives; of equal numbers the first has the gradient."""
    noise = jnp.asarray(normal(2, height, width, 3))
    for x in (noise, nn.relu(noise), noise.at[0, 0, 0, 0].set(jnp.nan)):
      y, pull = jax.vjp(ops.halve, x)
      want, pull_plain = jax.vjp(
          lambda x: nn.max_pool(x, (2, 2), (2, 2), 'SAME'), x
      )
      np.testing.assert_array_equal(y, want)
      if np.isfinite(x).all():
        dy = normal(*y.shape, seed=1)
        np.testing.assert_array_equal(pull(dy)[0], pull_plain(dy)[0])
        along = jax.jvp(ops.halve, [x], [noise])[1]
        np.testing.assert_allclose(
            jnp.vdot(along, dy), jnp.vdot(pull(dy)[0], noise), rtol=1e-5
        )

  def test_pads_with_minus_infinity(self):
    x = -np.arange(1, 17, dtype='f4').reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(
        ops.max_pool(x)[0, :, :, 0], [[-1, -2], [-5, -6]]
    )
    np.testing.assert_array_equal(
        ops.halve(x[:, :3, :3])[0, :, :, 0], [[-1, -3], [-9, -11]]
    )


if __name__ == '__main__':
  absltest.main()
