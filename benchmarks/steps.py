"""Training steps to time."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import optimizers
from autogrow_jax import parallel as parallel_lib
from autogrow_jax import programs
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled training step that goes on from where it was.

  Attributes:
    run: one step, waited for.
    compile_seconds: tracing and compiling.
    bytes: arguments and temporaries by the compiler.
  """

  run: Callable[[], None]
  compile_seconds: float
  bytes: int


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
    memory: Any = None,
) -> Step:
  """The training step of a run, augmentation included.

  Args:
    architecture: to train.
    batch: images and labels.
    precision: of activations.
    method: in place of none.
    memory: changes the method's other leaves of a fresh state.

  Returns:
    The step.
  """
  method = method or base.FixedArchitecture()
  channels = batch[0].shape[-1]
  task = programs.Task(
      method=method,
      tx=optimizers.make(
          optimizers.OptimizerConfig(), aux=method.aux, top_rate=0.1
      ),
      preprocessing=data.Preprocessing(
          mean=(0.5,) * channels, std=(0.25,) * channels, crop=4, flip=True
      ),
      dtype=jnp.dtype(precision),
      parallel=parallel_lib.Parallel('single', (jax.devices()[0],)),
  )
  state = state_lib.create_state(
      architecture, task.tx, key=jax.random.key(0), extra=method.extra
  )
  if memory is not None:
    stats = {**state.stats, 'method': memory(state.stats['method'])}
    state = state.replace(stats=stats)
  active = method.active(architecture, state.stats['method'])
  layout = view.layout(architecture, active=active)
  if active is not None:
    state = view.take(state, layout, active)
  place = task.parallel.replicate
  now = [place(view.pack(state, layout)), place(programs.new_meters())]
  rest = (*place(batch), None, place(np.float32(1e-3)))
  compiled, seconds = task.parallel.compile(
      functools.partial(programs.train_step, task, layout),
      (*now, *rest),
      outputs='replicated',
      donate=(0,),
  )

  def run():
    now[:] = compiled(*now, *rest)
    jax.block_until_ready(now)

  analysis = compiled.memory_analysis()
  size = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
  return Step(run, seconds, size)
