"""Walks a whole growth schedule on one batch, without training.

The policy sees a constant accuracy, so that the walk ends at its floor. Every
architecture on the way is grown and tried, in one of two ways:

* in full: compiled and run for one step; the last one's checkpoint is saved and
  restored. On a CPU that takes seconds to minutes for each architecture.
* by shapes: the training step is traced with shapes in place of arrays, which
  must lead to a state of the same shapes; nothing is computed or compiled.
"""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import tempfile
import time
from typing import Any, Protocol

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import checkpoint
from autogrow_jax import config as config_lib
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import feeds
from autogrow_jax import growth
from autogrow_jax import programs as programs_lib
from autogrow_jax import session
from autogrow_jax import state as state_lib
from autogrow_jax import train
from autogrow_jax import trained
from autogrow_jax import view
from autogrow_jax.methods import base
from experiments.studies import null_model

Architecture = architecture_lib.Architecture

# Images per batch while a stream is measured: small, so that it starts soon.
_BURST = 32


@dataclasses.dataclass(frozen=True)
class Tried:
  """What one compiled step on one batch showed.

  Attributes:
    memory: bytes on each device for the step's arguments, results and
      temporary arrays, as the compiler states them; without the data set.
      None where it does not.
    compile_seconds: of the training step.
    loss: on the batch; finite.
  """

  memory: int | None
  compile_seconds: float
  loss: float


@dataclasses.dataclass(frozen=True)
class Stop:
  """One architecture of the walk.

  Attributes:
    epoch: growing epoch in which a run without progress would reach it.
    depths: blocks per stage.
    params: parameters.
    macs: multiply-adds of one image's forward pass.
    tried: what its step showed; None by shapes.
  """

  epoch: int
  depths: tuple[int, ...]
  params: int
  macs: int
  tried: Tried | None


def walk(
    config: config_lib.RunConfig,
    dataset: data.Dataset | None = None,
    *,
    shapes: bool = False,
) -> Iterator[Stop]:
  """Yields every architecture of a growth schedule as it is tried.

  Args:
    config: the run's configuration; nothing is written to its work directory.
    dataset: one's own data in place of `config.data`, or `stand_in`.
    shapes: only trace the training steps.

  Yields:
    One `Stop` per architecture.

  Raises:
    ValueError: if the configuration is wrong, a step's loss is not finite or
      changes shapes, or the checkpoint is not restored bit for bit.
  """
  dataset = dataset or data.load(config.data, seed=config.seed)
  config = train.resolve(config, dataset)
  if config.method.initializer == 'adam':  # Which would train.
    config = dataclasses.replace(
        config, method=dataclasses.replace(config.method, initializer='zero')
    )
  with tempfile.TemporaryDirectory() as directory:
    setup = session.set_up(config, dataset, pathlib.Path(directory))
    rehearsal = _Shapes(setup) if shapes else _Full(setup)
    architecture, state = rehearsal.start()
    stop = functools.partial(_stop, rehearsal)
    yield stop(0, architecture, state)
    for policy, decision in null_model.decisions(
        setup.policy, trained=config.init_from is not None
    ):
      change = setup.task.method.propose(
          decision,
          base.Situation(
              architecture=architecture,
              state=state,
              batches=lambda: iter(()),
              batches_per_epoch=0,
              train_accuracy=0.5,
              weight_decay=0.0,
          ),
      )
      if change is not None:
        state = rehearsal.grow(state, change, policy.epoch)
        architecture = change.architecture
        yield stop(policy.epoch, architecture, state)
    rehearsal.try_checkpoint(architecture, state)


def input_rate(
    stream: data.Stream, *, workers: int, seconds: float = 3.0
) -> float:
  """How many images a second a stream alone delivers, on an idle machine.

  Args:
    stream: of a data set.
    workers: processes that decode; 0 for threads.
    seconds: to measure for.

  Returns:
    Images per second, once it is under way.
  """
  size = min(_BURST, len(stream.indices))
  batches = stream(jax.random.key(0), 0, size, workers=workers)
  try:
    for _ in range(2 * batches.ahead):  # These were begun before the clock.
      next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
      next(batches)
      count += size
    return count / (time.perf_counter() - started)
  finally:
    batches.close()


def trace_step(
    task: programs_lib.Task,
    architecture: Architecture,
    *,
    batch_size: int,
    image_shape: tuple[int, ...],
) -> None:
  """Traces a training step, with shapes in place of arrays.

  Args:
    task: what to train; its devices do not matter.
    architecture: of the network.
    batch_size: images per step.
    image_shape: (height, width, channel) of raw images.

  Raises:
    ValueError: if the state after the step is of other shapes or types.
  """
  traced = programs_lib.trace_step(
      task,
      view.layout(architecture),
      batch_size=batch_size,
      image_shape=image_shape,
  )
  if _signature(traced.after) != _signature(traced.before):
    raise ValueError(
        f'A training step of {architecture} changes shapes or types of its '
        'state.'
    )


class _Rehearsal(Protocol):
  """One of the two ways to try architectures."""

  def start(self) -> tuple[Architecture, Any]:
    """What the run starts from: the architecture and its state."""

  def grow(self, state: Any, change: growth.Growth, epoch: int) -> Any:
    """The state after a growth."""

  def try_step(self, architecture: Architecture, state: Any) -> Tried | None:
    """Tries a step, whose result is thrown away."""

  def try_checkpoint(self, architecture: Architecture, state: Any) -> None:
    """Tries to store a state."""


class _Full:
  """Compiles and runs."""

  def __init__(self, setup: session.Setup):
    self._setup = setup

  def start(self) -> tuple[Architecture, state_lib.TrainState]:
    return session.start(self._setup)

  def grow(
      self, state: state_lib.TrainState, change: growth.Growth, epoch: int
  ) -> state_lib.TrainState:
    task, seed = self._setup.task, self._setup.config.seed
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    return growth.grow(
        state, change, task.tx, key=key, extra=task.method.extra
    )[0]

  def try_step(
      self, architecture: Architecture, state: state_lib.TrainState
  ) -> Tried:
    setup = self._setup
    parallel = setup.task.parallel
    layout = view.layout(
        architecture,
        remat=setup.config.devices.remat_of(len(architecture.stages)),
    )
    compilations = []
    programs = programs_lib.Programs(setup.task, compilations.append)
    arguments = (
        parallel.replicate(view.pack(state, layout)),
        parallel.replicate(programs_lib.new_meters()),
        *self._examples(),
        parallel.replicate(np.float32(setup.config.schedule.learning_rate)),
        layout.depths,
    )
    program = programs.train_step(layout, arguments)
    _, meters = program(*arguments)
    meters = parallel.fetch(meters)
    loss = float(meters['loss_sum']) / int(meters['total'])
    if not np.isfinite(loss):
      raise ValueError(f'The loss of {architecture} on one batch is {loss}.')
    (done,) = compilations
    return Tried(
        memory=done.bytes, compile_seconds=done.seconds, loss=loss
    )

  def _examples(self) -> feeds.Examples:
    """A batch, placed as in training; a call of several steps has no others."""
    parallel, size = self._setup.task.parallel, self._setup.config.batch_size
    devices = self._setup.config.devices
    dataset = self._setup.dataset
    batch = dataset.train.images[:size], dataset.train.labels[:size]
    if dataset.stream is not None:
      return feeds.Examples(*parallel.shard(batch), None)
    steps = min(devices.steps_per_call, self._setup.steps_per_epoch)
    rows = np.full((steps, size), -1, np.int32)
    rows[0] = np.arange(size)
    index = feeds.place_index(parallel, rows)
    return feeds.Examples(*parallel.replicate(batch), index)

  def try_checkpoint(
      self, architecture: Architecture, state: state_lib.TrainState
  ) -> None:
    """Saves a checkpoint, restores it from its directory, and compares."""
    setup = self._setup
    arrays = {'state': state, 'meters': programs_lib.new_meters()}
    setup.checkpoints.save(
        int(state.step), arrays, {'architecture': architecture.to_json()}
    )
    restored = setup.checkpoints.restore(
        lambda documents: trained.abstract_arrays(
            documents, setup.config, setup.task.method
        )
    )
    if checkpoint.digest(restored.state) != checkpoint.digest(arrays):
      raise ValueError(f'The checkpoint of {architecture} changed on its way.')


class _Shapes:
  """Traces; its states are of `jax.ShapeDtypeStruct`s."""

  def __init__(self, setup: session.Setup):
    self._setup = setup

  def start(self) -> tuple[Architecture, Any]:
    setup = self._setup
    architecture = session.seed_architecture(setup.config, setup.dataset)
    return architecture, self._abstract(architecture)

  def grow(self, state: Any, change: growth.Growth, epoch: int) -> Any:
    del state, epoch
    return self._abstract(change.architecture)

  def try_step(self, architecture: Architecture, state: Any) -> None:
    del state
    setup = self._setup
    trace_step(
        setup.task,
        architecture,
        batch_size=setup.config.batch_size,
        image_shape=setup.dataset.train.images.shape[1:],
    )

  def try_checkpoint(self, architecture: Architecture, state: Any) -> None:
    """Sees that a checkpoint's documents lead to the same shapes."""
    setup = self._setup
    arrays = trained.abstract_arrays(
        {'architecture': architecture.to_json()},
        setup.config,
        setup.task.method,
    )
    if _signature(arrays['state']) != _signature(state):
      raise ValueError(
          f'A checkpoint of {architecture} would be restored in other shapes.'
      )

  def _abstract(self, architecture: Architecture) -> Any:
    task = self._setup.task
    return state_lib.abstract_state(
        architecture, task.tx, extra=task.method.extra
    )


def _stop(
    rehearsal: _Rehearsal, epoch: int, architecture: Architecture, state: Any
) -> Stop:
  return Stop(
      epoch=epoch,
      depths=architecture.depths,
      params=costs.params(architecture),
      macs=costs.macs(architecture),
      tried=rehearsal.try_step(architecture, state),
  )


def _signature(tree: Any) -> Any:
  """Structure, shapes and types of a tree of arrays."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
