"""Preparation of a run: every default filled in, everything checked.

`prepare` makes a `Setup`, which stays the same during a run: the resolved
configuration, the data, the computation, the policy at its start and the work
directory.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.methods import base
from autogrow_jax.run import checkpoint
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import feeds
from autogrow_jax.run import history
from autogrow_jax.run import parallel as parallel_lib
from autogrow_jax.run import programs as programs_lib
from autogrow_jax.run import resolve
from autogrow_jax.run import state as run_state
from autogrow_jax.run import steps
from autogrow_jax.run import trained

Architecture = architecture_lib.Architecture
RunConfig = config_lib.RunConfig

MAX_EVAL_BATCH = 256


class Given(NamedTuple):
  """Objects that `run` was given in place of settings; None for the settings'.

  Attributes:
    policy: policy at its start.
    method: method.
    optimizer: optimizer of the weights.
    task: task in place of the one that the labels belong to.
    augment: augmentation in place of that of the data set.
  """

  policy: policies.Policy | None = None
  method: base.Method | None = None
  optimizer: optax.GradientTransformation | None = None
  task: tasks.Task | None = None
  augment: steps.Augment | None = None

  @property
  def identity(self) -> str:
    """Names of the objects, and how they start.

    Without it, a run with other objects would pass for this one.
    """
    return '; '.join(
        f'{name} {_name_of(value)}'
        for name, value in self._asdict().items()
        if value is not None
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
  """Fixed part of a run.

  Attributes:
    config: the resolved configuration.
    given: the configuration as it was given.
    dataset: the data.
    schedule: learning rates.
    computation: everything that programs depend on besides the network.
    policy: the policy at its start.
    checkpoints: saved states.
    workdir: directory of all results.
  """

  config: RunConfig
  given: RunConfig
  dataset: data.Dataset
  schedule: optimizers.Schedule
  computation: steps.Computation
  policy: policies.Policy
  checkpoints: checkpoint.Checkpoints
  workdir: pathlib.Path

  @property
  def method(self) -> base.Method:
    return self.computation.method

  @property
  def task(self) -> tasks.Task:
    return self.computation.task

  @property
  def parallel(self) -> parallel_lib.Parallel:
    return self.computation.parallel

  @property
  def steps_per_epoch(self) -> int:
    return len(self.dataset.train.labels) // self.config.batch_size

  @property
  def images_per_epoch(self) -> int:
    """Training images of an epoch; of text, words."""
    size = self.steps_per_epoch * self.config.batch_size
    return size * self.dataset.train.length

  @property
  def eval_batch(self) -> int:
    """Examples evaluated at once: all devices busy, at most a small set."""
    devices = len(self.parallel.devices)
    labels = math.prod(self.dataset.selection.labels.shape[1:])
    wanted = trained.examples_at_once(
        min(MAX_EVAL_BATCH, len(self.dataset.train.labels)),
        labels * self.dataset.classes,
    )
    return max(1, wanted // devices) * devices

  @functools.cached_property
  def programs(self) -> programs_lib.Programs:
    """Cache of compiled programs."""
    return programs_lib.Programs(self.computation)

  @functools.cached_property
  def feed(self) -> feeds.Feed:
    """Source of the examples of training steps."""
    return feeds.make(
        self.dataset,
        self.parallel,
        key=self.stream('data'),
        batch_size=self.config.batch_size,
        workers=self.config.devices.decode_workers,
    )

  def close(self) -> None:
    """Ends everything that runs in the background, if it was started."""
    for name in ('programs', 'feed'):
      if (part := vars(self).get(name)) is not None:
        part.close()
    self.checkpoints.wait()

  def stream(self, name: str) -> jax.Array:
    """Key of a named stream of random numbers."""
    return randomness.stream(jax.random.key(self.config.seed), name)

  def rate(self, progress: run_state.Progress) -> float:
    """Learning rate of the current epoch."""
    return self.schedule.rate(progress.phase, progress.phase_epoch)

  def layout(
      self,
      architecture: Architecture,
      *,
      may_grow: bool = True,
      computed: Architecture | None = None,
  ) -> view.Layout:
    """Layout of a network, all of it computed or a part."""
    devices = self.config.devices
    has_spare = may_grow and self.method.execution.spare
    return view.layout(
        architecture,
        spare=has_spare and devices.depth_buckets == 'powers',
        computed=computed,
        remat=devices.remat_of(len(architecture.stages)),
    )

  def place(
      self,
      progress: run_state.Progress,
      state: state_lib.TrainState,
      meters: Any = None,
  ) -> run_state.RunState:
    """Puts a canonical state, or the active part of it, on the devices.

    Args:
      progress: the part of the run's state that is not an array.
      state: canonical state, on the host.
      meters: sums over the current epoch, on the host; None for zeros.
    """
    architecture = progress.architecture
    active = self.method.execution.active(architecture, state.stats['method'])
    layout = self.layout(
        architecture,
        may_grow=progress.phase == 'growing',
        computed=None if active is None else active.computed,
    )
    packed, depths, meters = self.parallel.replicate((
        view.pack(state if active is None else active.take(state), layout),
        layout.depths,
        steps.new_meters() if meters is None else meters,
    ))
    return run_state.RunState(
        progress, layout, packed, depths, meters, active,
        None if active is None else state,
    )


def prepare(
    config: RunConfig,
    dataset: data.Dataset | None = None,
    given: Given = Given(),
) -> Setup:
  """Resolves and checks a configuration; writes nothing.

  Args:
    config: the configuration.
    dataset: data in place of `config.data`.
    given: objects in place of other settings.

  Raises:
    ValueError: the configuration is wrong.
  """
  dataset = dataset or data.load(config.data, seed=config.seed)
  config = dataclasses.replace(
      config, own=given.identity, data=_named_data(config, dataset)
  )
  resolved = resolve.resolve(config, dataset, given.task)
  setup = set_up(resolved, dataset, pathlib.Path(config.workdir), given)
  return dataclasses.replace(setup, given=config)


def set_up(
    config: RunConfig,
    dataset: data.Dataset,
    workdir: pathlib.Path,
    given: Given = Given(),
) -> Setup:
  """The setup of a resolved configuration."""
  method, devices = given.method or config.method, config.devices
  architecture = resolve.seed_architecture(config, dataset)
  network = networks.get(config.network.name)
  rate = config.schedule.learning_rate
  assert rate is not None  # Since it is resolved.
  return Setup(
      config=config,
      given=config,
      dataset=dataset,
      schedule=optimizers.Schedule(
          learning_rate=rate,
          growing=config.schedule.growing,
          interval=config.interval,
          finetune_epochs=config.schedule.finetune_epochs,
          milestones=network.milestones or config.network.stem or 'small',
          growing_epochs=config.policy.max_epochs,
      ),
      computation=steps.Computation(
          method=method,
          task=given.task or tasks.of_labels(dataset.train.labels),
          tx=trained.make_optimizer(
              config, architecture, method, given.optimizer
          ),
          preprocessing=dataset.preprocessing,
          dtype=jnp.dtype(devices.precision),
          parallel=parallel_lib.make(devices.parallel, devices.num_devices),
          augment=given.augment,
      ),
      policy=given.policy or config.make_policy(architecture.depths),
      checkpoints=checkpoint.Checkpoints(
          workdir / 'checkpoints', keep=config.checkpoints.keep
      ),
      workdir=workdir,
  )


def start(setup: Setup) -> run_state.RunState:
  """State of a run at its start: drawn afresh, or of another run."""
  config, policy = setup.config, setup.policy
  if config.init_from is None:
    architecture = resolve.seed_architecture(config, setup.dataset)
    known = None
  else:
    network = trained.load(config.init_from)
    architecture = network.architecture
    known = None if config.reinitialize else network.parts()
  state = state_lib.create_state(
      architecture,
      view.with_stacked_init(setup.computation.tx, architecture),
      key=jax.random.key(config.seed),
      extra=setup.method.extra,
      known=known,
  )
  does_grow = not (policy.finished or isinstance(policy, policies.Fixed))
  phase = 'growing' if does_grow else 'training'
  return setup.place(run_state.Progress(architecture, policy, phase), state)


def _name_of(value: Any) -> str:
  """Module, name and settings of an object."""
  if hasattr(value, 'to_json'):
    start = history.dumps(value.to_json())
  elif dataclasses.is_dataclass(value):
    start = str(value)
  else:
    start = ''
  kind = value if hasattr(value, '__qualname__') else type(value)
  return f'{kind.__module__}:{kind.__qualname__} {start}'.rstrip()


def _named_data(
    config: RunConfig, dataset: data.Dataset
) -> data.DataConfig:
  """The data settings, with the digest of arrays that `run` was given."""
  if dataset.name == config.data.dataset:
    return config.data
  arrays = [
      (split.images, split.labels)
      for split in (dataset.train, dataset.holdout)
  ]
  name = f'{dataset.name}:{checkpoint.digest(arrays)[:16]}'
  return dataclasses.replace(config.data, dataset=name)
