"""The edge of a run: what stays the same, where it is, and all it touches.

`Setup` is fixed, `Progress` is a value that a checkpoint stores, and `Session`
is the one mutable thing: the arrays on the devices, the files, the screen, and
the signals that ask a run to stop.
"""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import threading
import time
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import checkpoint
from autogrow_jax import config as config_lib
from autogrow_jax import controls
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import evaluation
from autogrow_jax import feeds
from autogrow_jax import growth
from autogrow_jax import logs
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import parallel as parallel_lib
from autogrow_jax import policies
from autogrow_jax import programs as programs_lib
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax import trained
from autogrow_jax import view
from autogrow_jax.methods import base
from autogrow_jax.networks import base as networks_base
from autogrow_jax.run import settings

Architecture = architecture_lib.Architecture
RunConfig = config_lib.RunConfig

MAX_EVAL_BATCH = 256


class Interrupted(Exception):
  """The run was asked to stop; it saved and can be continued.

  Attributes:
    signum: the signal that asked.
  """

  def __init__(self, message: str, signum: int):
    super().__init__(message)
    self.signum = signum


class Diverged(ValueError):
  """The loss is no longer finite; the last good checkpoint is kept."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """Where a run is: all that is not an array.

  Attributes:
    architecture: the current one.
    policy: the policy's state.
    phase: 'growing', 'finetuning' (after it), or 'training' (nothing grows).
    epoch: epochs finished.
    phase_epoch: epochs finished in this phase.
    best: largest number of correct selection examples after any epoch.
    ledger: costs so far.
    history: all records so far.
    skipped: damaged training images skipped in the current epoch.
  """

  architecture: Architecture
  policy: policies.Policy
  phase: str
  epoch: int
  phase_epoch: int
  best: int
  ledger: costs.Ledger
  history: tuple[dict[str, Any], ...]
  skipped: int = 0

  def recorded(self, event: str, step: int, **values: Any) -> Self:
    """Adds a record to the history."""
    record = {
        'event': event,
        'epoch': self.epoch,
        'step': step,
        'depths': list(self.architecture.depths),
        **values,
    }
    return dataclasses.replace(self, history=(*self.history, record))

  def to_documents(self) -> dict[str, Any]:
    """As JSON documents for a checkpoint."""
    return {
        'architecture': self.architecture.to_json(),
        'policy': self.policy.to_json(),
        'progress': {
            'phase': self.phase,
            'epoch': self.epoch,
            'phase_epoch': self.phase_epoch,
            'best': self.best,
            'skipped': self.skipped,
            'ledger': dataclasses.asdict(self.ledger),
        },
        'history': list(self.history),
    }

  @classmethod
  def from_documents(
      cls, documents: dict[str, Any], policy: policies.Policy
  ) -> Self:
    """The inverse of `to_documents`; `policy` is the restored one."""
    progress = dict(documents['progress'])
    return cls(
        architecture=Architecture.from_json(documents['architecture']),
        policy=policy,
        ledger=costs.Ledger(**progress.pop('ledger')),
        history=tuple(documents['history']),
        **progress,
    )


@dataclasses.dataclass(frozen=True)
class Setup:
  """What stays the same during a run; `policy` is the one at its start."""

  config: RunConfig
  dataset: data.Dataset
  schedule: optimizers.Schedule
  task: programs_lib.Task
  policy: policies.Policy
  checkpoints: checkpoint.Checkpoints
  workdir: pathlib.Path

  @property
  def steps_per_epoch(self) -> int:
    return len(self.dataset.train.labels) // self.config.batch_size

  @property
  def eval_batch(self) -> int:
    """Examples evaluated at once: all devices busy, at most a small set."""
    devices = len(self.task.parallel.devices)
    split = self.dataset.selection
    wanted = evaluation.examples_at_once(
        min(MAX_EVAL_BATCH, len(self.dataset.train.labels)),
        math.prod(split.labels.shape[1:]) * self.dataset.classes,
    )
    return max(1, wanted // devices) * devices

  @property
  def eval_batches(self) -> int:
    """Batches of an evaluation call: all of the hold-out, or one.

    As with training steps, a loop is for devices that wait for the host, and
    for images in memory; of texts and masks the logits would be too many.
    """
    split = self.dataset.selection
    is_whole = isinstance(split.images, np.ndarray) and split.labels.ndim == 1
    if self.config.devices.steps_per_call == 1 or not is_whole:
      return 1
    return -(-len(split.labels) // self.eval_batch)


class Session:
  """The mutable edge of a run: devices, files, the screen, signals.

  Attributes:
    setup: what stays the same.
    progress: where the run is.
    feed: what training steps take from the data.
    packed: the packed state on the devices.
    layout: of it.
    depths: of the layout, for programs, on the devices.
    active: what of the canonical state is in it; None for all.
    meters: sums over the current epoch, on the devices.
    signals: numbers of the signals received, most recent last.
    observed: what the policy saw last; None before, or after a restart.
  """

  def __init__(
      self,
      setup: Setup,
      progress: Progress,
      state: state_lib.TrainState,
      meters: Any,
      started: float,
  ):
    self.setup = setup
    self.progress = progress
    self.signals: list[int] = []
    parallel = setup.task.parallel
    self.programs = programs_lib.Programs(setup.task, self._on_compile)
    self.feed = feeds.make(
        setup.dataset,
        parallel,
        key=randomness.stream(jax.random.key(setup.config.seed), 'data'),
        batch_size=setup.config.batch_size,
        workers=setup.config.devices.decode_workers,
        steps_per_call=setup.config.devices.steps_per_call,
    )
    self.load(state)
    self.meters = parallel.replicate(meters)
    self.observed: policies.Observation | None = None
    self._accounted = started
    self._saved = started
    self._pending: list[programs_lib.Compiling] = []
    self.history = logs.History(setup.workdir / 'history.jsonl')
    self.history.truncate_to(progress.history)
    self.tensorboard = logs.TensorBoard(
        setup.workdir / 'tensorboard', resume_step=int(state.step)
    )
    self.screen = logs.Progress()
    self._warned: set[str] = set()

  @property
  def step(self) -> int:
    return int(self.setup.task.parallel.fetch(self.packed.step))

  def load(self, state: state_lib.TrainState) -> None:
    """Puts a canonical state, or what of it is active, on the devices."""
    architecture = self.progress.architecture
    self.active = self.setup.task.method.execution.active(
        architecture, state.stats['method']
    )
    self.layout = self._layout(architecture)
    if self.active is not None:
      self._canonical = state
      state = self.active.take(state)
    self.packed, self.depths = self.setup.task.parallel.replicate(
        (view.pack(state, self.layout), self.layout.depths)
    )

  def rewind(self) -> None:
    """Goes back to the beginning of the text, if there is one."""
    if self.setup.dataset.is_text:
      stats = self.packed.stats
      network = networks_base.rewound(stats['network'])
      self.packed = self.packed.replace(stats={**stats, 'network': network})

  def fetch(self) -> state_lib.TrainState:
    """The canonical state."""
    state = view.unpack(
        self.setup.task.parallel.fetch(self.packed), self.layout
    )
    if self.active is None:
      return state
    return self.active.put(state, self._canonical)

  def own(self) -> tuple[Any, Any]:
    """The method's own leaves, (trainable, other), of the canonical state."""
    part = lambda state: (state.params['aux'], state.stats['method'])
    own = self.setup.task.parallel.fetch(part(self.packed))
    if self.active is None:
      return own
    return self.active.put(own, part(self._canonical))

  def cost(self) -> tuple[int, int]:
    """Parameters and multiply-adds of the active network."""
    chosen = ()
    if self.active is not None:
      chosen = self.active.counts, self.active.blocks
    architecture = self.progress.architecture
    return tuple(
        count(architecture, *chosen) for count in (costs.params, costs.macs)
    )

  def describe(self) -> str:
    """Returns the network's shape, as the method reports it."""
    method, own = self.setup.task.method, self.own()
    return method.report(self.progress.architecture, *own)['shape']

  def device_bytes(self) -> int | None:
    """Most bytes in use at a time so far on any device, None if none says."""
    told = [
        device.memory_stats() or {}
        for device in self.setup.task.parallel.devices
        if device.process_index == jax.process_index()
    ]
    return max(
        (stats['peak_bytes_in_use'] for stats in told
         if 'peak_bytes_in_use' in stats),
        default=None,
    )

  def record(self, event: str, **values: Any) -> None:
    """Writes a record everywhere."""
    self.progress = self.progress.recorded(event, self.step, **values)
    record = self.progress.history[-1]
    self.history.append(record)
    self.tensorboard.write(record)
    self.screen.record(record)

  def charge(self, ledger: costs.Ledger) -> None:
    """Replaces the ledger, with the wall time since the last call."""
    now = time.monotonic()
    ledger = ledger.elapsed(now - self._accounted)
    self._accounted = now
    self.progress = dataclasses.replace(self.progress, ledger=ledger)

  def flush_compilations(self) -> None:
    """Records the compilations since the last call."""
    pending, self._pending = self._pending, []
    for done in pending:
      self.charge(self.progress.ledger.compiled(done.seconds))
      values = {'bytes': done.bytes, 'waited': done.waited}
      self.record(
          'compile',
          what=done.name,
          seconds=round(done.seconds, 3),
          **{
              name: round(value, 3)
              for name, value in values.items()
              if value is not None
          },
      )

  def compile_ahead(self) -> None:
    """Begins to compile for the growth that is likely to come next."""
    execution, progress = self.setup.task.method.execution, self.progress
    is_wanted = self.setup.config.devices.compile_ahead and execution.spare
    if not is_wanted or progress.phase != 'growing' or self.observed is None:
      return
    decision = controls.next_growth(progress.policy, self.observed)
    if decision is not None:
      now = progress.architecture
      appended = growth.append_all(now, decision.stages(now.depths))
      self.programs.prepare(self._layout(appended.architecture))

  def record_compilations(
      self, what: str, spent: programs_lib.Compilations
  ) -> None:
    """Records the compilations within something else, if there were any."""
    if spent.count:
      self.charge(self.progress.ledger.compiled(spent.seconds, spent.count))
      self.record(
          'compile',
          what=what,
          seconds=round(spent.seconds, 3),
          count=spent.count,
      )

  def note_skipped(self) -> None:
    """Counts and shows the images that the feed skipped."""
    skipped, self.feed.damaged = self.feed.damaged, []
    if skipped:
      self.progress = dataclasses.replace(
          self.progress, skipped=self.progress.skipped + len(skipped)
      )
      self.warn(skipped)

  def warn(self, messages: Iterable[str]) -> None:
    """Shows warnings, each of them once."""
    for message in messages:
      if message not in self._warned:
        self._warned.add(message)
        self.screen.write(f'warning: {message}')

  def save(self) -> None:
    """Writes a checkpoint."""
    self.charge(self.progress.ledger)
    state = self.fetch()
    meters = self.setup.task.parallel.fetch(self.meters)
    check_finite(
        self, (meters['loss_sum'], state.params, state.stats['network'])
    )
    self.setup.checkpoints.save(
        int(state.step),
        {'state': state, 'meters': meters},
        {
            **self.progress.to_documents(),
            'config': self.setup.config.to_json(),
            'preprocessing': dataclasses.asdict(
                self.setup.dataset.preprocessing
            ),
        },
    )
    self._saved = time.monotonic()

  def maybe_save(self, epoch: int | None) -> None:
    """Saves if it is time; `epoch` is None within one."""
    cadence = config_lib.Cadence.parse(self.setup.config.checkpoints.every)
    if cadence.due(epoch=epoch, seconds=time.monotonic() - self._saved):
      self.save()

  def stop_if_asked(self) -> None:
    """Saves and raises `Interrupted` if a signal came."""
    if self.signals:
      self.save()
      name = signal.Signals(self.signals[-1]).name
      raise Interrupted(
          f'{name}: saved after epoch {self.progress.epoch}, step {self.step} '
          f'in {self.setup.workdir}; the same command continues.',
          self.signals[-1],
      )

  def close(self) -> None:
    self.programs.close()
    self.feed.close()
    self.screen.close()
    self.tensorboard.close()
    self.history.close()

  def _layout(self, architecture: Architecture) -> view.Layout:
    return view.layout(
        architecture,
        spare=self._may_deepen(),
        computed=None if self.active is None else self.active.computed,
        remat=self.setup.config.devices.remat_of(len(architecture.stages)),
    )

  def _may_deepen(self) -> bool:
    """Whether to leave room for blocks, so that growths seldom compile."""
    return (
        self.setup.config.devices.depth_buckets == 'powers'
        and self.setup.task.method.execution.spare
        and self.progress.phase == 'growing'
    )

  def _on_compile(self, done: programs_lib.Compiling) -> None:
    if done.bytes is not None and done.name.startswith('evaluation'):
      # Which is not given these, but they stay where they are.
      held = self.packed.opt_state, self.feed.held
      done = dataclasses.replace(
          done, bytes=done.bytes + parallel_lib.bytes_on_device(held)
      )
    self._pending.append(done)


def set_up(
    config: RunConfig,
    dataset: data.Dataset,
    workdir: pathlib.Path,
    *,
    method: base.Method | None = None,
    policy: policies.Policy | None = None,
) -> Setup:
  """What stays the same during the run of a resolved configuration."""
  schedule = optimizers.Schedule(
      learning_rate=config.schedule.learning_rate,
      growing=config.schedule.growing,
      interval=config.policy.interval,
      finetune_epochs=config.schedule.finetune_epochs,
      milestones=(
          networks.get(config.network.name).milestones or config.network.stem
      ),
      growing_epochs=config.policy.max_epochs,
  )
  task = programs_lib.Task(
      method=method or config.method,
      tx=trained.optimizer(
          config, seed_architecture(config, dataset), method
      ),
      preprocessing=dataset.preprocessing,
      dtype=jnp.dtype(config.devices.precision),
      parallel=parallel_lib.make(
          config.devices.parallel, config.devices.num_devices
      ),
  )
  checkpoints = checkpoint.Checkpoints(
      workdir / 'checkpoints', keep=config.checkpoints.keep
  )
  policy = policy or config.make_policy(config.network.depths)
  return Setup(
      config, dataset, schedule, task, policy, checkpoints, workdir
  )


def restore_or_start(
    setup: Setup,
) -> tuple[Progress, state_lib.TrainState, Any]:
  """Continues from the newest good checkpoint, or starts."""
  config, task = setup.config, setup.task
  restored = setup.checkpoints.restore(
      lambda documents: trained.abstract_arrays(documents, config, task.method)
  )
  if restored is not None:
    for line in restored.refusals:
      logs.Progress().write(f'warning: {line}')
    saved = restored.documents['policy']
    progress = Progress.from_documents(
        restored.documents,
        type(setup.policy).from_json(saved),
    )
    logs.Progress().write(
        f'continuing {setup.workdir} from step {restored.step}, epoch '
        f'{progress.epoch}'
    )
    return progress, restored.state['state'], restored.state['meters']
  architecture, state = start(setup)
  policy = setup.policy
  progress = Progress(
      architecture=architecture,
      policy=policy,
      phase=(
          'training'
          if policy.finished or isinstance(policy, policies.Fixed)
          else 'growing'
      ),
      epoch=0,
      phase_epoch=0,
      best=0,
      ledger=costs.Ledger(),
      history=(),
  )
  return progress, state, programs_lib.new_meters()


def start(setup: Setup) -> tuple[Architecture, state_lib.TrainState]:
  """What a run starts from: drawn afresh, or of another run."""
  if setup.config.init_from is None:
    architecture = seed_architecture(setup.config, setup.dataset)
    known = None
  else:
    network = trained.load(setup.config.init_from)
    architecture = network.architecture
    known = None if setup.config.reinitialize else network.parts()
  state = state_lib.create_state(
      architecture,
      view.with_stacked_init(setup.task.tx, architecture),
      key=jax.random.key(setup.config.seed),
      extra=setup.task.method.extra,
      known=known,
  )
  return architecture, state


def seed_architecture(
    config: RunConfig, dataset: data.Dataset
) -> Architecture:
  """The architecture that a configuration starts from."""
  network = networks.get(config.network.name)
  if network.inputs != dataset.preprocessing.kind:
    raise ValueError(
        f'{network.title} takes {network.inputs}, but {dataset.name} has '
        f'{dataset.preprocessing.kind}; choose another --network or --dataset.'
    )
  return network.seed(
      config.network.depths or network.seed_depths,
      input_shape=dataset.input_shape,
      classes=dataset.classes,
      options=network_options(config),
  )


def network_options(config: RunConfig) -> dict[str, Any]:
  """The options for `Network.seed`; a batch has a row for every stream."""
  options = config.network.options()
  if networks.get(config.network.name).inputs == 'tokens':
    options['streams'] = config.batch_size
  return options


def claim(config: RunConfig) -> pathlib.Path:
  """Makes the work directory this run's own, or sees that it is."""
  workdir = pathlib.Path(config.workdir)
  path = workdir / 'config.json'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if (known := logs.read_json(path)) is None:
      # A kill may have left the file that was to become config.json.
      if any(item.name != 'config.json.new' for item in workdir.iterdir()):
        raise ValueError(
            f'Work directory {workdir} is not empty and holds no run; choose '
            'another.'
        )
      logs.write_json(path, config.to_json())
      return workdir
  except OSError as error:
    raise ValueError(
        f'Work directory {workdir} cannot be used: {error.strerror}; choose '
        'another with --workdir.'
    ) from error
  neutral = ('workdir', 'checkpoints')  # What does not change the outcome.
  try:  # Of an earlier version it lacks fields, which had their defaults.
    known = config_lib.RunConfig.from_json(known)
  except ValueError as error:
    raise ValueError(
        f'{path} is not of a run: {error} Choose another work directory.'
    ) from error

  continued = known
  if config.data.skip_damaged and not known.data.skip_damaged:
    # What was read so far was whole, or it would have raised.
    continued = dataclasses.replace(
        known, data=dataclasses.replace(known.data, skip_damaged=True)
    )

  def strip(config):
    value = json.loads(logs.dumps(config.to_json()))
    return {
        **{name: item for name, item in value.items() if name not in neutral},
        'data': {**value['data'], 'data_dir': None},
        'devices': {
            **value['devices'],
            'decode_workers': 0,
            'compile_ahead': True,
            'remat': 'none',
            'steps_per_call': 1,
        },
    }

  if changed := settings.differences(strip(continued), strip(config)):
    raise ValueError(
        f'Work directory {workdir} holds another run ('
        + '; '.join(changed)
        + '); choose another, or repeat its configuration to continue it.'
    )
  if continued != known:
    logs.write_json(path, continued.to_json())
  return workdir


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
  """Collects SIGTERM and SIGINT; a second one interrupts at once."""
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received
    return

  def receive(signum, frame):
    del frame
    if received:
      raise KeyboardInterrupt
    received.append(signum)

  previous = {
      number: signal.signal(number, receive)
      for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def check_finite(session: Session, values: Any) -> None:
  """Raises `Diverged` unless all numbers in a tree are finite."""
  if all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(values)):
    return
  growths = [
      item for item in session.progress.history if item['event'] == 'grow'
  ]
  after = (
      f'after the growth to {"-".join(map(str, growths[-1]["depths"]))} at '
      f'epoch {growths[-1]["epoch"]}'
      if growths
      else 'before any growth'
  )
  steps = session.setup.checkpoints.steps()
  kept = f'step {steps[-1]} is kept' if steps else 'none was written yet'
  epoch = -(-session.step // session.setup.steps_per_epoch)
  raise Diverged(
      f'Training diverged in epoch {epoch}, {after}: the loss or a parameter '
      'is not finite; lower --learning_rate or set --clip_norm. Last good '
      f'checkpoint: {kept}.'
  )
