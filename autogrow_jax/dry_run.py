"""Walks a whole growth schedule on one batch, without training.

The policy sees a constant accuracy, so that the walk ends at its floor. Every
architecture on the way is grown, compiled and run for one step on one batch;
the last one's checkpoint is saved and restored.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
import tempfile

import jax
import numpy as np

from autogrow_jax import checkpoint
from autogrow_jax import config as config_lib
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import growth
from autogrow_jax import policies
from autogrow_jax import programs as programs_lib
from autogrow_jax import session
from autogrow_jax import state as state_lib
from autogrow_jax import train
from autogrow_jax import trained
from autogrow_jax import view
from autogrow_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Stop:
  """One architecture of the walk.

  Attributes:
    epoch: growing epoch in which a run without progress would reach it.
    depths: blocks per stage.
    params: parameters.
    macs: multiply-adds of one image's forward pass.
    memory: bytes on each device for the step's arguments, results and
      temporary arrays, as the compiler states them; without the data set.
    compile_seconds: of the training step.
    loss: on the batch; finite.
  """

  epoch: int
  depths: tuple[int, ...]
  params: int
  macs: int
  memory: int
  compile_seconds: float
  loss: float


def walk(
    config: config_lib.RunConfig, dataset: data.Dataset | None = None
) -> Iterator[Stop]:
  """Yields every architecture of a growth schedule as it is tried.

  Args:
    config: the run's configuration; nothing is written to its work directory.
    dataset: one's own data in place of `config.data`.

  Yields:
    One `Stop` per architecture.

  Raises:
    ValueError: if the configuration is wrong, a step's loss is not finite, or
      the checkpoint is not restored bit for bit.
  """
  dataset = dataset or data.load(config.data, seed=config.seed)
  config = train.resolve(config, dataset)
  if config.method.initializer == 'adam':  # Which would train.
    config = dataclasses.replace(
        config, method=dataclasses.replace(config.method, initializer='zero')
    )
  with tempfile.TemporaryDirectory() as directory:
    setup = session.set_up(config, dataset, pathlib.Path(directory))
    architecture, known = session.start(setup)
    state = state_lib.create_state(
        architecture,
        setup.task.tx,
        key=jax.random.key(config.seed),
        extra=setup.task.method.extra,
        known=known,
    )
    policy, epoch = setup.policy, 0
    yield _try_step(setup, architecture, state, epoch)
    while not policy.finished and not isinstance(policy, policies.Fixed):
      epoch += 1
      policy, decision = policy.update(
          policies.Observation(
              epoch=epoch, step=0, correct=1, total=2, loss_sum=0.0, cost=0
          )
      )
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
        state, _ = growth.grow(
            state,
            change,
            setup.task.tx,
            key=jax.random.fold_in(jax.random.key(config.seed), epoch),
            extra=setup.task.method.extra,
        )
        architecture = change.architecture
        yield _try_step(setup, architecture, state, epoch)
    _try_checkpoint(setup, architecture, state)


def _try_step(
    setup: session.Setup,
    architecture: session.Architecture,
    state: state_lib.TrainState,
    epoch: int,
) -> Stop:
  """Compiles and runs one step, whose result is thrown away."""
  parallel, size = setup.task.parallel, setup.config.batch_size
  layout = view.layout(architecture)
  compilations = []
  programs = programs_lib.Programs(
      setup.task, lambda name, seconds: compilations.append(seconds)
  )
  images = setup.dataset.train.images[:size]
  labels = setup.dataset.train.labels[:size]
  arguments = (
      parallel.replicate(view.pack(state, layout)),
      parallel.replicate(programs_lib.new_meters()),
      parallel.replicate(images),
      parallel.replicate(labels),
      parallel.shard(np.arange(size, dtype=np.int32)),
      parallel.replicate(np.float32(setup.config.schedule.learning_rate)),
  )
  program = programs.train_step(layout.bucket, arguments)
  _, meters = program(*arguments)
  meters = parallel.fetch(meters)
  loss = float(meters['loss_sum']) / int(meters['total'])
  if not np.isfinite(loss):
    raise ValueError(f'The loss of {architecture} on one batch is {loss}.')
  memory = program.memory_analysis()
  return Stop(
      epoch=epoch,
      depths=architecture.depths,
      params=costs.params(architecture),
      macs=costs.macs(architecture),
      memory=(
          memory.argument_size_in_bytes
          + memory.output_size_in_bytes
          - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes
      ),
      compile_seconds=compilations[0],
      loss=loss,
  )


def _try_checkpoint(
    setup: session.Setup,
    architecture: session.Architecture,
    state: state_lib.TrainState,
) -> None:
  """Saves a checkpoint, restores it from its directory, and compares."""
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
