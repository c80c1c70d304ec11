"""Training steps to be timed, one after another on the same batch."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from autogrow_jax import view
from autogrow_jax.run import programs
from autogrow_jax.run import steps


@dataclasses.dataclass(frozen=True)
class TimedStep:
  """A compiled training step that goes on from the last one.

  Attributes:
    run: does one step, and waits for it.
    bytes: bytes that it needs on a device, by the compiler.
    compile_seconds: seconds of tracing and compiling.
  """

  run: Callable[[], None]
  bytes: int | None
  compile_seconds: float


def timed_step(
    computation: steps.Computation,
    layout: view.Layout,
    state: Any,
    batch: tuple[Any, Any],
) -> TimedStep:
  """Compiles a training step; `state` is of the layout's architecture."""
  place = computation.parallel.replicate
  now = [place(view.pack(state, layout)), place(steps.new_meters())]
  rest = (
      *place(batch), None, place(np.float32(1e-3)), place(layout.depths)
  )
  compiled, seconds = computation.parallel.compile(
      functools.partial(steps.train_step, computation, layout),
      (*now, *rest),
      outputs='replicated',
      donate=(0,),
  )

  def run():
    now[:] = compiled(*now, *rest)
    jax.block_until_ready(now)

  return TimedStep(run, programs.compiled_bytes(compiled), seconds)
