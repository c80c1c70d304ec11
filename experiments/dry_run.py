"""Walks a whole growth schedule on one batch, without training.

The policy sees an accuracy that never changes, so that the walk ends where a
run without progress would. Every architecture on the way is tried:

* shapes: the training step is traced with shapes in place of arrays, and must
  keep the shapes of its state. Nothing is computed or compiled.
* full: the training step is compiled and run, and at the end a checkpoint is
  saved and restored. On a CPU an architecture takes seconds to minutes.
"""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.run import checkpoint
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import console
from autogrow_jax.run import parallel as parallel_lib
from autogrow_jax.run import prepare
from autogrow_jax.run import programs
from autogrow_jax.run import resolve
from autogrow_jax.run import steps
from autogrow_jax.run import trained

from .studies import null_model

Architecture = architecture_lib.Architecture


@dataclasses.dataclass(frozen=True)
class Step:
  """One compiled training step on one batch.

  Attributes:
    memory: bytes on each device for arguments, results and temporary arrays,
      as the compiler states them, without the data set; None where it does not.
    compile_seconds: seconds of tracing and compiling.
    loss: loss on the batch; finite.
  """

  memory: int | None
  compile_seconds: float
  loss: float


@dataclasses.dataclass(frozen=True)
class Stop:
  """One architecture of the walk.

  Attributes:
    epoch: growing epoch in which a run without progress reaches it.
    architecture: the architecture.
    step: its training step; None by shapes.
  """

  epoch: int
  architecture: Architecture
  step: Step | None


def show(config: config_lib.RunConfig, *, shapes: bool) -> None:
  """Prints a walk; a known data set is replaced by noise of its shapes."""
  dataset = _any_data(config)
  stops = []
  for stop in walk(config, dataset, shapes=shapes):
    if not stops:  # Nothing is printed of a configuration that is wrong.
      print(
          'epoch  depths        parameters  multiply-adds'
          + '  peak memory  compiling  loss on one batch' * (not shapes)
      )
    stops.append(stop)
    depths = policies.format_depths(stop.architecture.depths)
    line = (
        f'{stop.epoch:5}  {depths:12}  '
        f'{console.format_count(costs.params(stop.architecture)):>10}  '
        f'{console.format_count(costs.macs(stop.architecture)):>13}'
    )
    if step := stop.step:
      size = f'{console.format_count(step.memory)}B' if step.memory else '-'
      line += f'  {size:>11}  {step.compile_seconds:7.1f} s  {step.loss:.3f}'
    print(line, flush=True)
  done = 'traced'
  if not shapes:
    seconds = sum(stop.step.compile_seconds for stop in stops)
    done = (
        f'compiled in {seconds:.0f} s; the checkpoint of the last one was '
        'saved and restored'
    )
  print(
      f'{len(stops)} architectures {done}. A run without progress ends there.'
  )
  if config.paper_compat:
    print("The paper's protocol (paper_compat): it decides on the test set.")


def _any_data(config: config_lib.RunConfig) -> data.Dataset:
  if config.data.dataset not in data.SOURCES:
    return data.load(config.data, seed=config.seed)
  dataset = data.stand_in(config.data, seed=config.seed)
  print(
      f'Noise for {dataset.name}: {len(dataset.train.labels)} training '
      f'images, {"x".join(map(str, dataset.input_shape))}, {dataset.classes} '
      'classes.'
  )
  return dataset


def walk(
    config: config_lib.RunConfig, dataset: data.Dataset, *, shapes: bool
) -> Iterator[Stop]:
  """Yields every architecture of a growth schedule when it has been tried.

  Args:
    config: configuration of a run that appends sub-modules; nothing is written
      to its work directory.
    dataset: the data.
    shapes: trace the training steps only.

  Raises:
    ValueError: The configuration is wrong, a loss is not finite, or a
      checkpoint is not restored bit for bit.
  """
  config = resolve.resolve(config, dataset)
  with tempfile.TemporaryDirectory() as directory:
    setup = prepare.set_up(config, dataset, pathlib.Path(directory))
    if shapes:
      architecture, state = resolve.seed_architecture(config, dataset), None
    else:
      started = prepare.start(setup)
      architecture = started.progress.architecture
      state = started.fetch(setup.parallel)
    yield _stop(setup, 0, architecture, state)
    for policy, decision in null_model.decisions(
        setup.policy, trained=config.init_from is not None
    ):
      if decision.action != 'grow':
        continue
      # How a block starts makes no difference here.
      change = state_lib.append(
          architecture, decision.stages(architecture.depths)
      )
      architecture = change.target
      if not shapes:
        state, _ = state_lib.grow(
            state,
            change,
            setup.computation.tx,
            key=jax.random.fold_in(jax.random.key(config.seed), policy.epoch),
            extra=setup.method.extra,
        )
      yield _stop(setup, policy.epoch, architecture, state)
    if not shapes:
      _save_and_restore(setup, architecture, state)


def trace_step(
    computation: steps.Computation,
    architecture: Architecture,
    *,
    batch_size: int,
    input_shape: tuple[int, ...],
) -> None:
  """Traces a training step on one device, with shapes in place of arrays.

  Args:
    computation: what to train; its devices do not matter.
    architecture: architecture of the network.
    batch_size: examples per step.
    input_shape: shape of a raw example, (height, width, channel) or (step,).

  Raises:
    AssertionError: The step changes shapes or types of its state.
  """
  shape = jax.ShapeDtypeStruct
  one = parallel_lib.Parallel('single', tuple(jax.devices()[:1]))
  computation = dataclasses.replace(computation, parallel=one)
  layout = view.layout(architecture)
  state = state_lib.abstract_state(
      architecture, computation.tx, extra=computation.method.extra
  )
  pack = functools.partial(view.pack, layout=layout, stack=jnp.stack)
  before = jax.eval_shape(pack, state), jax.eval_shape(steps.new_meters)
  is_text = computation.preprocessing.kind == 'tokens'
  labels = input_shape if is_text else networks.label_shape(architecture)
  after = jax.eval_shape(
      functools.partial(steps.train_step, computation, layout),
      *before,
      shape((batch_size, *input_shape), np.int32 if is_text else np.uint8),
      shape((batch_size, *labels), np.int32),
      None,
      shape((), np.float32),
      jax.eval_shape(lambda: layout.depths),
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


def _stop(
    setup: prepare.Setup, epoch: int, architecture: Architecture, state: Any
) -> Stop:
  """Tries the training step of an architecture."""
  if state is not None:
    return Stop(epoch, architecture, _run_step(setup, architecture, state))
  trace_step(
      setup.computation,
      architecture,
      batch_size=setup.config.batch_size,
      input_shape=setup.dataset.train.images.shape[1:],
  )
  return Stop(epoch, architecture, None)


def _run_step(
    setup: prepare.Setup, architecture: Architecture, state: Any
) -> Step:
  config, parallel = setup.config, setup.parallel
  remat = config.devices.remat_of(len(architecture.stages))
  layout = view.layout(architecture, remat=remat)
  rows = slice(config.batch_size)
  train_split = setup.dataset.train
  packed, meters, rate, depths = parallel.replicate((
      view.pack(state, layout), steps.new_meters(),
      np.float32(config.schedule.learning_rate), layout.depths,
  ))
  batch = parallel.shard((train_split.images[rows], train_split.labels[rows]))
  arguments = (packed, meters, *batch, None, rate, depths)
  step, seconds = parallel.compile(
      functools.partial(steps.train_step, setup.computation, layout),
      arguments, outputs='replicated', donate=(0,),
  )
  memory = programs.compiled_bytes(step)
  meters = parallel.fetch(step(*arguments)[1])
  loss = float(meters['loss_sum']) / int(meters['total'])
  if not np.isfinite(loss):
    raise ValueError(f'The loss of {architecture} on one batch is {loss}.')
  return Step(memory, seconds, loss)


def _save_and_restore(
    setup: prepare.Setup, architecture: Architecture, state: Any
) -> None:
  """Raises ValueError unless a checkpoint gives the state back."""
  arrays = {'state': state, 'meters': steps.new_meters()}
  setup.checkpoints.save(
      int(state.step), arrays, {'architecture': architecture.to_json()}
  )
  restored = setup.checkpoints.restore(
      lambda documents: trained.abstract_arrays(
          documents, setup.method, setup.computation.tx
      )
  )
  if checkpoint.digest(restored.state) != checkpoint.digest(arrays):
    raise ValueError(f'The checkpoint of {architecture} was not restored.')
