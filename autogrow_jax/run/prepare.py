"""Preparation of a run: every default filled in, everything checked.

`prepare` makes a `Setup`, which stays the same during a run: the resolved
configuration, the data, the computation, the policy at its start and the work
directory, which then belongs to this run alone.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

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
from autogrow_jax.run import settings
from autogrow_jax.run import state as run_state
from autogrow_jax.run import steps
from autogrow_jax.run import trained

Architecture = architecture_lib.Architecture
RunConfig = config_lib.RunConfig

MAX_EVAL_BATCH = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
  """Fixed part of a run.

  Attributes:
    config: the resolved configuration.
    given: the configuration as it was given.
    dataset: the data.
    schedule: learning rates.
    computation: what programs depend on besides the network.
    policy: the policy at its start.
    checkpoints: where states are saved.
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

  @property
  def eval_batches(self) -> int:
    """Batches of an evaluation call: all of the hold-out, or one.

    As with training steps, a loop is for devices that wait for the host, and
    for images in memory; the logits of texts and masks would be too many.
    """
    split = self.dataset.selection
    is_whole = isinstance(split.images, np.ndarray) and split.labels.ndim == 1
    if self.config.devices.steps_per_call == 1 or not is_whole:
      return 1
    return -(-len(split.labels) // self.eval_batch)

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
        steps_per_call=self.config.devices.steps_per_call,
    )

  def stream(self, name: str) -> jax.Array:
    """Key of a named stream of random numbers."""
    return randomness.stream(jax.random.key(self.config.seed), name)

  def rate(self, progress: run_state.Progress) -> float:
    """Learning rate of the current epoch."""
    return self.schedule.rate(progress.phase, progress.phase_epoch)

  def layout(self, architecture: Architecture) -> view.Layout:
    """Layout of a network that may go on growing, all of it computed."""
    devices, execution = self.config.devices, self.method.execution
    return view.layout(
        architecture,
        spare=devices.depth_buckets == 'powers' and execution.spare,
        remat=devices.remat_of(len(architecture.stages)),
    )

  def place(
      self,
      progress: run_state.Progress,
      state: state_lib.TrainState,
      meters: Any = None,
  ) -> run_state.RunState:
    """Puts a canonical state on the devices; sums start at zero."""
    devices, execution = self.config.devices, self.method.execution
    return run_state.place(
        progress,
        state,
        steps.new_meters() if meters is None else meters,
        execution=execution,
        parallel=self.parallel,
        may_grow=devices.depth_buckets == 'powers' and execution.spare,
        remat=devices.remat_of(len(progress.architecture.stages)),
    )


def prepare(
    config: RunConfig,
    dataset: data.Dataset | None = None,
    policy: policies.Policy | None = None,
    method: base.Method | None = None,
    optimizer: optax.GradientTransformation | None = None,
    task: tasks.Task | None = None,
    augment: steps.Augment | None = None,
) -> Setup:
  """Resolves and checks a configuration, and claims its work directory.

  Args:
    config: the configuration.
    dataset: data in place of `config.data`.
    policy: policy, at its start, in place of `config.policy`.
    method: method in place of `config.method`.
    optimizer: optimizer of the weights in place of `config.optimizer`.
    task: task in place of the one that the labels belong to.
    augment: augmentation in place of that of the data set.

  Returns:
    The setup.

  Raises:
    ValueError: the configuration is wrong, or the work directory holds another
      run.
  """
  dataset = dataset or data.load(config.data, seed=config.seed)
  given = dataclasses.replace(
      config,
      own=_identity(
          policy=policy, method=method, optimizer=optimizer, task=task,
          augment=augment,
      ),
      data=_named_data(config, dataset),
  )
  task = task or tasks.of_labels(dataset.train.labels)
  config = resolve.resolve(given, dataset, task)
  setup = set_up(
      config,
      dataset,
      pathlib.Path(config.workdir),
      policy=policy,
      method=method,
      optimizer=optimizer,
      task=task,
      augment=augment,
  )
  claim(config)
  return dataclasses.replace(setup, given=given)


def set_up(
    config: RunConfig,
    dataset: data.Dataset,
    workdir: pathlib.Path,
    *,
    policy: policies.Policy | None = None,
    method: base.Method | None = None,
    optimizer: optax.GradientTransformation | None = None,
    task: tasks.Task | None = None,
    augment: steps.Augment | None = None,
) -> Setup:
  """The setup of a resolved configuration; writes nothing."""
  method = method or config.method
  architecture = resolve.seed_architecture(config, dataset)
  computation = steps.Computation(
      method=method,
      task=task or tasks.of_labels(dataset.train.labels),
      tx=trained.optimizer(config, architecture, method, optimizer),
      preprocessing=dataset.preprocessing,
      dtype=jnp.dtype(config.devices.precision),
      parallel=parallel_lib.make(
          config.devices.parallel, config.devices.num_devices
      ),
      augment=augment,
  )
  return Setup(
      config=config,
      given=config,
      dataset=dataset,
      schedule=_schedule(config),
      computation=computation,
      policy=policy or config.make_policy(architecture.depths),
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


def claim(config: RunConfig) -> pathlib.Path:
  """Makes the work directory this run's own, or checks that it is."""
  workdir = pathlib.Path(config.workdir)
  path = workdir / 'config.json'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if (stored := history.read_json(path)) is None:
      # A kill may have left the file that was to become config.json.
      if any(item.name != 'config.json.new' for item in workdir.iterdir()):
        raise ValueError(
            f'Work directory {workdir} is not empty and holds no run; choose '
            'another.'
        )
      history.write_json(path, config.to_json())
      return workdir
  except OSError as error:
    raise ValueError(
        f'Work directory {workdir} cannot be used: {error.strerror}; choose '
        'another with --workdir.'
    ) from error
  try:
    known = RunConfig.from_json(stored)
  except ValueError as error:
    raise ValueError(
        f'{path} is not of a run: {error} Choose another work directory.'
    ) from error
  continued = known
  if config.data.skip_damaged and not known.data.skip_damaged:
    # Nothing read so far was damaged: that would have raised.
    continued = settings.replace(known, {'data.skip_damaged': True})
  if changed := settings.differences(_outcome(continued), _outcome(config)):
    raise ValueError(
        f'Work directory {workdir} holds another run ('
        + '; '.join(changed)
        + '); choose another, or repeat its configuration to continue it.'
    )
  if continued != known:
    history.write_json(path, continued.to_json())
  return workdir


def _outcome(config: RunConfig) -> dict[str, Any]:
  """The fields of a configuration that its result depends on, as JSON."""
  neutral = settings.replace(config, {
      'workdir': '',
      'checkpoints': config_lib.CheckpointConfig(),
      'data.data_dir': None,
      'devices.decode_workers': 0,
      'devices.compile_ahead': True,
      'devices.remat': 'none',
      'devices.steps_per_call': 1,
  })
  return json.loads(history.dumps(neutral.to_json()))


def _schedule(config: RunConfig) -> optimizers.Schedule:
  """Learning rates of a resolved configuration."""
  network = networks.get(config.network.name)
  return optimizers.Schedule(
      learning_rate=config.schedule.learning_rate or network.learning_rate,
      growing=config.schedule.growing,
      interval=config.interval,
      finetune_epochs=config.schedule.finetune_epochs,
      milestones=network.milestones or config.network.stem or 'small',
      growing_epochs=config.policy.max_epochs,
  )


def _identity(**objects: Any) -> str:
  """Names the objects that `run` was given, and how they start.

  Without it, a run with other objects would pass for this one.
  """
  return '; '.join(
      f'{name} {_name_of(value)}'
      for name, value in objects.items()
      if value is not None
  )


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
