"""Tests of memory: foretold, compiled, and rematerialised."""

import functools
import types

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autogrow_jax import data
from autogrow_jax import memory
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import parallel
from autogrow_jax import programs
from autogrow_jax import session
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.methods import base
from autogrow_jax.methods.sparsify import method as sparsify

ALL = frozenset(range(5))
BATCH = 32


def build(name, depths=None, widths=None, shape=(16, 16, 3), **options):
  network = networks.get(name)
  return network.seed(
      depths or network.seed_depths,
      input_shape=shape,
      classes=5,
      options={'widths': widths, **options},
  )


def task_of(architecture, method=None):
  method = method or base.FixedArchitecture()
  is_text = networks.get(architecture.family).inputs == 'tokens'
  return programs.Task(
      method=method,
      tx=optimizers.make(
          optimizers.OptimizerConfig(),
          aux=method.extra(architecture).optimizer,
          top_rate=0.1,
      ),
      preprocessing=data.Preprocessing(
          mean=(0.5,) * 3,
          std=(0.25,) * 3,
          kind='tokens' if is_text else 'images',
      ),
      dtype=jnp.dtype('float32'),
      parallel=parallel.Parallel('single', (jax.devices()[0],)),
  )


def both(architecture, layout, shape=(16, 16, 3), batch_size=BATCH):
  """Bytes foretold, and those of the compiler."""
  task = task_of(architecture)
  inputs = {'batch_size': batch_size, 'image_shape': shape, 'examples': 64}
  traced = programs.trace_step(task, layout, **inputs)
  compiled = (
      jax.jit(
          jax.extend.core.jaxpr_as_fun(traced.program),
          donate_argnums=tuple(range(len(jax.tree.leaves(traced.before)))),
          keep_unused=True,
      )
      .lower(*traced.program.in_avals)
      .compile()
  )
  return (
      programs.predicted_bytes(task, layout, **inputs),
      programs.compiled_bytes(compiled),
  )


class PredictionTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('vgg', 'vgg16', (1, 1, 1, 1, 1), (16, 24, 32, 32, 32, 64)),
      ('mlp', 'mlp', None, None),
  )
  def test_within_a_fifth_of_the_compiler(self, name, depths, widths):
    architecture = build(name, depths, widths)
    predicted, compiled = both(architecture, view.layout(architecture))
    self.assertBetween(predicted / compiled, 0.8, 1.2)

  def test_language_model(self):
    architecture = build(
        'lstm2', None, (64, 64), shape=(1,), streams=BATCH
    )
    predicted, compiled = both(
        architecture, view.layout(architecture), shape=(20,)
    )
    self.assertBetween(predicted / compiled, 0.8, 1.2)

  def test_arrays_that_are_counted(self):
    x = np.zeros((64, 64), np.float32)
    size = x.nbytes

    def peak(function, *arguments):
      return memory.peak(jax.make_jaxpr(function)(*arguments), 'gpu')

    # A sum of computed numbers is no array; a product's operands are.
    self.assertEqual(peak(lambda x: jnp.sum(jnp.abs(x + 1)), x), size + 4)
    self.assertEqual(peak(lambda x: jnp.sum((x + 1) @ x), x), 3 * size)
    # A loop carries one, and stacks what it stacks twice once.
    stack = lambda x: jax.lax.scan(lambda c, _: (2 * c, (c, c)), x, length=5)
    self.assertEqual(peak(stack, x), (1 + 1 + 5) * size)


class RematTest(absltest.TestCase):

  def test_less_memory(self):
    architecture = build('basic3resnet', (1, 4, 1))
    layout = functools.partial(view.layout, architecture, spare=True)
    kept = both(architecture, layout())
    again = both(architecture, layout(remat=frozenset({1})))
    for before, after in zip(kept, again, strict=True):
      self.assertLess(after, 0.85 * before)
    for predicted, compiled in (kept, again):
      self.assertBetween(predicted / compiled, 0.8, 1.2)

  def test_same_steps(self):
    self.assert_same_steps(spare=True, method=None)

  @pytest.mark.slow
  def test_same_steps_with_gates(self):
    self.assert_same_steps(
        spare=False, method=sparsify.Sparsify(grow='both')
    )

  def assert_same_steps(self, spare, method):
    architecture = build('basic3resnet', (1, 3, 1), (4, 6, 8), (8, 8, 3))
    task = task_of(architecture, method)
    state = state_lib.create_state(
        architecture,
        task.tx,
        key=jax.random.key(0),
        extra=task.method.extra,
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)
    labels = rng.integers(0, 5, 16).astype(np.int32)
    results = []
    for remat in (frozenset(), ALL):
      layout = view.layout(architecture, spare=spare, remat=remat)
      step = jax.jit(
          functools.partial(programs.train_step, task, layout),
          compiler_options={'xla_backend_optimization_level': 0},
      )
      packed, meters = view.pack(state, layout), programs.new_meters()
      for _ in range(2):
        packed, meters = step(
            packed, meters, images, labels, None, np.float32(0.1), layout.depths
        )
      results.append(jax.tree.leaves((packed.params, packed.stats, meters)))
    for kept, again in zip(*results, strict=True):
      np.testing.assert_allclose(again, kept, rtol=1e-5, atol=1e-6)

  def test_forward_mode(self):
    architecture = build('mlp', widths=(8, 8), shape=(4, 4, 1))
    layout = view.layout(architecture, remat=ALL)
    state = state_lib.create_state(
        architecture, task_of(architecture).tx, key=jax.random.key(0)
    )
    packed = view.pack(state, layout)
    weights, stats = packed.params['weights'], packed.stats['network']

    def logits(weights):
      return networks.base.apply(
          layout.bucket, weights, stats, jnp.ones((2, 4, 4, 1)), train=True
      )[0]

    value, tangent = jax.jvp(logits, (weights,), (weights,))
    self.assertEqual(value.shape, tangent.shape)
    self.assertGreater(float(jnp.abs(tangent).max()), 0)


class ReportTest(absltest.TestCase):

  def test_what_devices_say(self):
    tell = lambda stats: types.SimpleNamespace(
        process_index=0, memory_stats=lambda: stats
    )
    said = lambda *stats: session.Session.device_bytes(
        types.SimpleNamespace(
            setup=types.SimpleNamespace(
                task=types.SimpleNamespace(
                    parallel=types.SimpleNamespace(devices=map(tell, stats))
                )
            )
        )
    )
    self.assertIsNone(said(None, {}))
    self.assertEqual(
        said({'peak_bytes_in_use': 5}, {'peak_bytes_in_use': 7}, None), 7
    )


if __name__ == '__main__':
  absltest.main()
