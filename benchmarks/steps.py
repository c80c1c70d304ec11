"""Training steps to time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.methods import base
from autogrow_jax.networks import base as networks_base
from autogrow_jax.run import parallel as parallel_lib
from autogrow_jax.run import steps

from experiments.studies import timing


def noise(
    shape: tuple[int, ...], classes: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """A batch of images and labels."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch_size, *shape), np.uint8)
  return images, rng.integers(0, classes, batch_size).astype(np.int32)


def training(
    architecture: architecture_lib.Architecture,
    batch: tuple[np.ndarray, np.ndarray],
    *,
    precision: str = 'float32',
    method: base.Method | None = None,
    memory: Callable[[Any], Any] = lambda memory: memory,
    spare: bool = False,
    remat: frozenset[int] = frozenset(),
) -> timing.TimedStep:
  """The training step of a run, augmentation included.

  Args:
    architecture: to train.
    batch: images and labels.
    precision: of activations.
    method: in place of none.
    memory: changes the method's other leaves of a fresh state; they stay as
      they are by default.
    spare: stack blocks with room for more, see `view.layout`.
    remat: stages that are computed again in the backward pass.

  Returns:
    The step.
  """
  method = method or base.FixedArchitecture()
  channels = batch[0].shape[-1]
  computation = steps.Computation(
      method=method,
      task=tasks.Classes(),
      tx=optimizers.make(
          optimizers.SGD(),
          aux=method.extra(architecture).optimizer,
          top_rate=0.1,
      ),
      preprocessing=data.Preprocessing(
          mean=(0.5,) * channels, std=(0.25,) * channels, crop=4, flip=True
      ),
      dtype=jnp.dtype(precision),
      parallel=parallel_lib.Parallel('single', (jax.devices()[0],)),
  )
  state = state_lib.create_state(
      architecture, computation.tx, key=jax.random.key(0), extra=method.extra
  )
  changed = memory(state.stats['method'])
  state = state.replace(stats={**state.stats, 'method': changed})
  active = method.execution.active(architecture, state.stats['method'])
  layout = view.layout(
      architecture,
      spare=spare,
      computed=None if active is None else active.computed,
      remat=remat,
  )
  if active is not None:
    state = active.take(state)
  return timing.timed_step(computation, layout, state, batch)


def kept_bytes(layout: view.Layout, batch_size: int, dtype: Any) -> int:
  """Bytes of a training step's forward pass that the backward pass reads.

  Args:
    layout: layout of the network.
    batch_size: number of images.
    dtype: type of activations.

  Returns:
    The activations, and the weights in the type of the activations.
  """
  architecture = layout.architecture
  packed = jax.eval_shape(
      lambda state: view.pack(state, layout, stack=jnp.stack),
      state_lib.abstract_state(architecture, optax.identity()),
  )
  image = networks.parts(architecture)[0].input_shape

  def pullback(weights, stats, x, depths):
    return jax.vjp(
        lambda weights: networks_base.apply(
            layout.bucket, weights, stats, x, train=True, depths=depths
        )[0],
        weights,
    )[1]

  kept = jax.eval_shape(
      pullback,
      packed.params['weights'],
      packed.stats['network'],
      jax.ShapeDtypeStruct((batch_size, *image), dtype),
      jax.tree.map(jnp.int32, layout.depths),
  )
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
