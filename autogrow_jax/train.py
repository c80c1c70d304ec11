"""`run`: one loop for all methods, from a configuration to a result.

    for epoch:
      for step:  train_step                                   (programs.py)
      evaluate on the selection data -> Observation
      Policy.update(observation)     -> Decision               WHEN
      Method.propose(decision, ...)  -> Growth | None          WHAT
      grow(state, growth)            -> architecture, state    HOW
      append to the history; save a checkpoint

Everything that changes is a value: `Progress` (what a checkpoint stores as
JSON) and the arrays. Killed anywhere and started again, a run continues from
its last checkpoint and ends as if undisturbed, bit for bit.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
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
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import evaluation
from autogrow_jax import growth
from autogrow_jax import logs
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import parallel as parallel_lib
from autogrow_jax import policies
from autogrow_jax import programs as programs_lib
from autogrow_jax import randomness
from autogrow_jax import report
from autogrow_jax import state as state_lib
from autogrow_jax import trained
from autogrow_jax import version
from autogrow_jax import view
from autogrow_jax.methods import base

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
  """

  architecture: Architecture
  policy: policies.Policy
  phase: str
  epoch: int
  phase_epoch: int
  best: int
  ledger: costs.Ledger
  history: tuple[dict[str, Any], ...]

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
    """Examples per evaluation call: all devices busy, at most a small set."""
    devices = len(self.task.parallel.devices)
    wanted = min(MAX_EVAL_BATCH, len(self.dataset.train.labels))
    return max(1, wanted // devices) * devices


def run(
    config: RunConfig,
    *,
    dataset: data.Dataset | None = None,
    policy: policies.Policy | None = None,
    method: base.Method | None = None,
) -> dict[str, Any]:
  """Trains and grows a network, or continues to.

  Args:
    config: the configuration.
    dataset: one's own data in place of `config.data`.
    policy: one's own policy, at its start, in place of `config.policy`.
    method: one's own method in place of `config.method`.

  Returns:
    What `result.json` holds. A run that had already ended returns it at once.

  Raises:
    ValueError: if the configuration is wrong, or the work directory holds
      another run.
    Interrupted: after SIGTERM or SIGINT, with everything saved.
    Diverged: if the loss is not finite.
  """
  started = time.monotonic()
  dataset = dataset or data.load(config.data, seed=config.seed)
  if policy is not None:
    config = _naming(config, policy)
  config = resolve(config, dataset)
  policy = policy or config.make_policy(config.network.depths)
  workdir = _claim(config)
  if (result := read_result(workdir)) is not None:
    return result
  setup = set_up(config, dataset, workdir, method=method, policy=policy)
  progress, state, meters = _restore_or_start(setup)
  with contextlib.ExitStack() as stack:
    session = _Session(setup, progress, state, meters, started)
    stack.callback(session.close)
    session.signals = stack.enter_context(_catch_signals())
    session.screen.write(_headline(setup, progress))
    while not _is_done(session.progress, config):
      _train_epoch(session)
      _finish_epoch(session)
    result = _conclude(session)
    session.stop_if_asked()  # Nobody else would hear of a signal until here.
    return result


def _headline(setup: Setup, progress: Progress) -> str:
  """What a run says first."""
  dataset, devices = setup.dataset, setup.task.parallel.devices
  selection = (
      'DECIDING ON THE TEST SET'
      if setup.config.data.select_on == 'test'
      else f'{len(dataset.holdout.labels)} held out'
  )
  return (
      f'{progress.architecture} on {dataset.name}: '
      f'{len(dataset.train.labels)} training images, {selection}; '
      f'{len(devices)} {devices[0].platform} device'
      f'{"s" if len(devices) > 1 else ""}; results in {setup.workdir}'
  )


def resolve(config: RunConfig, dataset: data.Dataset) -> RunConfig:
  """Fills in every default, and checks what depends on the data.

  Args:
    config: a configuration that may leave things open.
    dataset: the data.

  Returns:
    The fully resolved configuration.
  """
  network = networks.get(config.network.name)
  widths = config.network.widths
  if config.init_from is not None:
    origin = trained.load(config.init_from)
    _check_origin(origin, config, dataset)
    architecture = origin.architecture
    widths = origin.config.network.widths
  else:
    architecture = seed_architecture(config, dataset)
  option = dict(architecture.options)
  examples = len(dataset.train.labels)
  if config.batch_size > examples:
    raise ValueError(
        f'batch_size {config.batch_size} is larger than the training data '
        f'({examples} examples); take at most {examples}.'
    )
  parallel = parallel_lib.make(
      config.devices.parallel, config.devices.num_devices
  )
  if config.batch_size % len(parallel.devices):
    raise ValueError(
        f'batch_size {config.batch_size} cannot be split evenly among '
        f'{len(parallel.devices)} devices.'
    )
  rate = config.schedule.learning_rate
  resolved = dataclasses.replace(
      config,
      network=dataclasses.replace(
          config.network,
          name=network.name if ':' not in config.network.name
          else config.network.name,
          depths=architecture.depths,
          stem=option['stem'],
          shortcut=option.get('shortcut'),
          bn_scale_init=option['bn_scale_init'],
          widths=widths,
      ),
      data=dataclasses.replace(
          config.data,
          holdout=(
              len(dataset.holdout.labels)
              if config.data.select_on == 'holdout'
              else None
          ),
      ),
      schedule=dataclasses.replace(
          config.schedule,
          learning_rate=network.learning_rate if rate is None else rate,
      ),
  )
  if resolved.policy.is_named:
    resolved.make_policy(architecture.depths)
  return resolved


def _check_origin(
    origin: trained.TrainedNetwork, config: RunConfig, dataset: data.Dataset
) -> None:
  """Raises unless another run's network is what is asked for."""
  architecture = origin.architecture
  network = networks.get(architecture.family)
  option = dict(architecture.options)
  found = {
      'network': network.name,
      'depths': architecture.depths,
      **{name: option.get(name) for name in config.network.options()},
      'widths': origin.config.network.widths or network.widths,
      'input_shape': (*option['resolution'], architecture.size('image')),
      'classes': architecture.size('classes'),
  }
  wanted = {
      'network': networks.get(config.network.name).name,
      'depths': config.network.depths,
      **config.network.options(),
      'input_shape': dataset.input_shape,
      'classes': dataset.classes,
  }
  for name, value in wanted.items():
    if value is not None and value != found[name]:
      raise ValueError(
          f'init_from {config.init_from} holds a network with {name} '
          f'{found[name]}, but {value} is asked for.'
      )


def start(setup: Setup) -> tuple[Architecture, dict[str, Any] | None]:
  """What a run starts from.

  Args:
    setup: the run's.

  Returns:
    The architecture, and {part: (weights, statistics)} if they are known from
    another run.
  """
  if setup.config.init_from is None:
    return seed_architecture(setup.config, setup.dataset), None
  network = trained.load(setup.config.init_from)
  return network.architecture, network.parts()


def seed_architecture(
    config: RunConfig, dataset: data.Dataset
) -> Architecture:
  """The architecture that a configuration starts from."""
  network = networks.get(config.network.name)
  return network.seed(
      config.network.depths or (1,) * len(network.widths),
      input_shape=dataset.input_shape,
      classes=dataset.classes,
      options=config.network.options(),
  )


def read_result(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """`result.json` of a work directory, None if its run has not ended."""
  return logs.read_json(pathlib.Path(workdir) / 'result.json')


def cache_compilations(directory: str | os.PathLike[str]) -> None:
  """Keeps compiled programs in a directory, for the next process."""
  jax.config.update('jax_compilation_cache_dir', os.fspath(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


class _Session:
  """The mutable edge of a run: devices, files, the screen, signals.

  Attributes:
    setup: what stays the same.
    progress: where the run is.
    packed: the packed state on the devices.
    meters: sums over the current epoch, on the devices.
    signals: numbers of the signals received, most recent last.
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
    self.train_data = parallel.replicate(
        (setup.dataset.train.images, setup.dataset.train.labels)
    )
    self.load(state)
    self.meters = parallel.replicate(meters)
    self._accounted = started
    self._saved = started
    self._pending: list[tuple[str, float]] = []
    self.history = logs.History(setup.workdir / 'history.jsonl')
    self.history.truncate_to(progress.history)
    self.tensorboard = logs.TensorBoard(
        setup.workdir / 'tensorboard', resume_step=int(state.step)
    )
    self.screen = logs.Progress()

  @property
  def layout(self) -> view.Layout:
    return view.layout(self.progress.architecture)

  @property
  def step(self) -> int:
    return int(self.setup.task.parallel.fetch(self.packed.step))

  def load(self, state: state_lib.TrainState) -> None:
    """Puts a canonical state on the devices."""
    self.packed = self.setup.task.parallel.replicate(
        view.pack(state, self.layout)
    )

  def fetch(self) -> state_lib.TrainState:
    """The canonical state."""
    return view.unpack(
        self.setup.task.parallel.fetch(self.packed), self.layout
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
    for name, seconds in pending:
      self.charge(self.progress.ledger.compiled(seconds))
      self.record('compile', what=name, seconds=round(seconds, 3))

  def save(self) -> None:
    """Writes a checkpoint."""
    self.charge(self.progress.ledger)
    state = self.fetch()
    meters = self.setup.task.parallel.fetch(self.meters)
    _check_finite(
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
    self.screen.close()
    self.tensorboard.close()
    self.history.close()

  def _on_compile(self, name: str, seconds: float) -> None:
    self._pending.append((name, seconds))


def _train_epoch(session: _Session) -> None:
  """Trains to the end of the current epoch, from wherever it is."""
  setup, progress = session.setup, session.progress
  parallel, config = setup.task.parallel, setup.config
  step, steps = session.step, setup.steps_per_epoch
  permutation = np.asarray(
      data.epoch_permutation(
          randomness.stream(jax.random.key(config.seed), 'data'),
          progress.epoch,
          len(setup.dataset.train.labels),
      )
  )
  rate = parallel.replicate(
      np.float32(setup.schedule.rate(progress.phase, progress.phase_epoch))
  )
  first = step - progress.epoch * steps
  session.screen.start_epoch(
      progress.epoch + 1, steps, progress.architecture.depths
  )
  session.screen.update(first)
  late = None
  for index in range(first, steps):
    session.stop_if_asked()
    batch = parallel.shard(
        data.batch_indices(permutation, index, config.batch_size)
    )
    arguments = (
        session.packed, session.meters, *session.train_data, batch, rate
    )
    program = session.programs.train_step(session.layout.bucket, arguments)
    session.flush_compilations()
    session.packed, session.meters = program(*arguments)
    if late is not None:  # One step late, so that the device never waits.
      meters = parallel.fetch(late)
      session.screen.update(
          1,
          loss=float(meters['loss_sum']) / int(meters['total']),
          accuracy=100 * int(meters['correct']) / int(meters['total']),
      )
    late = session.meters
    if index + 1 < steps:
      session.maybe_save(None)


def _finish_epoch(session: _Session) -> None:
  """Evaluates, decides, grows, records and saves."""
  setup, before = session.setup, session.progress
  parallel = setup.task.parallel
  meters = parallel.fetch(session.meters)
  images = int(meters['total'])
  macs = costs.macs(before.architecture)
  session.progress = dataclasses.replace(
      before, epoch=before.epoch + 1, phase_epoch=before.phase_epoch + 1
  )
  seconds = -session.progress.ledger.wall_seconds
  session.charge(session.progress.ledger.trained(macs, images))
  seconds += session.progress.ledger.wall_seconds
  _check_finite(session, meters['loss_sum'])
  score = _evaluate(session, setup.dataset.selection)
  _check_finite(session, score.loss_sum)
  session.flush_compilations()
  session.charge(session.progress.ledger)
  session.progress = dataclasses.replace(
      session.progress, best=max(session.progress.best, score.correct)
  )
  ledger = session.progress.ledger
  session.record(
      'epoch',
      phase=before.phase,
      phase_epoch=session.progress.phase_epoch,
      learning_rate=setup.schedule.rate(before.phase, before.phase_epoch),
      train_loss=float(meters['loss_sum']) / images,
      train_correct=int(meters['correct']),
      train_total=images,
      loss=score.loss_sum / score.total,
      correct=score.correct,
      total=score.total,
      best=session.progress.best,
      params=costs.params(before.architecture),
      macs=macs,
      train_macs=ledger.train_macs,
      eval_macs=ledger.eval_macs,
      wall_seconds=round(ledger.wall_seconds, 3),
      compile_seconds=round(ledger.compile_seconds, 3),
      compile_count=ledger.compile_count,
      images_per_second=round(images / max(seconds, 1e-9), 1),
  )
  session.meters = parallel.replicate(programs_lib.new_meters())
  if before.phase == 'growing':
    _decide(session, score, meters)
  session.maybe_save(session.progress.epoch)
  session.stop_if_asked()


def _decide(session: _Session, score: evaluation.Score, meters: Any) -> None:
  """Lets the policy decide, and carries it out."""
  setup, progress = session.setup, session.progress
  policy, decision = progress.policy.update(
      policies.Observation(
          epoch=progress.phase_epoch,
          step=session.step,
          correct=score.correct,
          total=score.total,
          loss_sum=score.loss_sum,
          cost=progress.ledger.train_macs,
      )
  )
  session.progress = dataclasses.replace(progress, policy=policy)
  for stage in decision.closed:
    session.record('stop', stage=stage, reason='window')
  situation = base.Situation(
      architecture=progress.architecture,
      state=session.fetch(),
      batches=lambda: _extra_batches(setup, progress.epoch),
      batches_per_epoch=setup.steps_per_epoch,
      train_accuracy=int(meters['correct']) / int(meters['total']),
      weight_decay=setup.config.optimizer.weight_decay,
  )
  change = setup.task.method.propose(decision, situation)
  if change is not None:
    _apply(session, change, situation.state, decision)
  for stage in decision.capped:
    session.record('stop', stage=stage, reason='cap')
  if policy.finished:
    session.progress = dataclasses.replace(
        session.progress, phase='finetuning', phase_epoch=0
    )
    session.record('phase', name='finetuning')


def _apply(
    session: _Session,
    change: growth.Growth,
    state: state_lib.TrainState,
    decision: policies.Decision,
) -> None:
  """Grows the state, and records the receipt."""
  setup, old = session.setup, session.progress.architecture
  before = _probe(session)
  key = jax.random.fold_in(
      randomness.stream(jax.random.key(setup.config.seed), 'growth'),
      session.progress.epoch,
  )
  started = time.perf_counter()
  state, carried = growth.grow(
      state, change, setup.task.tx, key=key, extra=setup.task.method.extra
  )
  seconds = time.perf_counter() - started
  session.progress = dataclasses.replace(
      session.progress, architecture=change.architecture
  )
  session.load(state)
  images = carried.report.get('images', 0)
  session.charge(
      session.progress.ledger.trained(costs.macs(change.architecture), images)
  )
  after = _probe(session)
  session.flush_compilations()
  new_blocks = [
      block
      for stage in change.architecture.stages
      for block in stage
      if not any(block in names for names in old.stages)
  ]
  session.record(
      'grow',
      stage=decision.stage,
      block=', '.join(new_blocks),
      note=change.note,
      params_before=costs.params(old),
      params_after=costs.params(change.architecture),
      macs_before=costs.macs(old),
      macs_after=costs.macs(change.architecture),
      loss_before=before.loss,
      loss_after=after.loss,
      logits_change_eval=float(np.abs(after.eval - before.eval).max()),
      logits_change_train=float(np.abs(after.train - before.train).max()),
      optimizer=carried.optimizer,
      initializer=carried.report,
      seconds=round(seconds, 3),
  )


@dataclasses.dataclass(frozen=True)
class _Probe:
  """Logits of one fixed batch in both modes; mean loss in eval mode."""

  eval: np.ndarray
  train: np.ndarray
  loss: float


def _probe(session: _Session) -> _Probe:
  train = session.setup.dataset.train
  images = train.images[: session.setup.eval_batch]
  labels = train.labels[: session.setup.eval_batch]
  logits = _forward(session, images, train=False)
  train_logits = _forward(session, images, train=True)
  session.charge(
      session.progress.ledger.evaluated(
          costs.macs(session.progress.architecture), 2 * len(images)
      )
  )
  return _Probe(
      logits, train_logits, float(np.mean(evaluation.cross_entropy(logits, labels)))
  )


def _evaluate(session: _Session, split: data.Split) -> evaluation.Score:
  """Counts over a split, in eval mode."""
  score = evaluation.score(
      lambda images: _forward(session, images, train=False),
      split,
      session.setup.eval_batch,
  )
  session.charge(
      session.progress.ledger.evaluated(
          costs.macs(session.progress.architecture), len(split.labels)
      )
  )
  return score


def _forward(
    session: _Session, images: np.ndarray, *, train: bool
) -> np.ndarray:
  """Logits of `eval_batch` images."""
  parallel = session.setup.task.parallel
  arguments = (
      session.packed.params['weights'],
      session.packed.stats['network'],
      parallel.shard(images),
      parallel.replicate(np.bool_(train)),
  )
  program = session.programs.forward(session.layout.bucket, arguments)
  return parallel.gather(program(*arguments))


def _conclude(session: _Session) -> dict[str, Any]:
  """Reads the test set, once, and writes the result and the report."""
  setup, progress = session.setup, session.progress
  config = setup.config
  selection = _evaluate(session, setup.dataset.selection)
  test = _evaluate(session, setup.dataset.read_test())
  session.flush_compilations()
  if all(item['event'] != 'end' for item in progress.history):
    session.record('end')
  state = session.fetch()
  session.save()
  progress, ledger = session.progress, session.progress.ledger
  architecture = progress.architecture
  epochs = [item for item in progress.history if item['event'] == 'epoch']
  growths = [item for item in progress.history if item['event'] == 'grow']
  result = {
      'method': _method_name(setup),
      'network': config.network.name,
      'dataset': setup.dataset.name,
      'seed': config.seed,
      'found': policies.format_depths(architecture.depths),
      'architecture': architecture.to_json(),
      'params': costs.params(architecture),
      'macs': costs.macs(architecture),
      'layers': costs.layers_of(architecture),
      'growths': len(growths),
      'growing_epochs': sum(item['phase'] == 'growing' for item in epochs),
      'epochs': progress.epoch,
      'val_accuracy': selection.accuracy,
      'best_val_accuracy': 100 * progress.best / selection.total,
      'holdout': selection.total,
      'test_accuracy': test.accuracy,
      'test_total': test.total,
      'select_on': config.data.select_on,
      'train_macs': ledger.train_macs,
      'eval_macs': ledger.eval_macs,
      'wall_seconds': round(ledger.wall_seconds, 3),
      'compile_seconds': round(ledger.compile_seconds, 3),
      'compile_count': ledger.compile_count,
      'params_digest': checkpoint.digest(
          {'params': state.params, 'stats': state.stats}
      ),
      'versions': _versions(),
  }
  if isinstance(setup.policy, policies.RoundRobin):
    result |= _controls(setup.policy, epochs, selection.total)
  result = json.loads(logs.dumps(result))  # As it will be read again.
  _write_result(
      setup.workdir, config.to_json(), progress.history, result
  )
  return result


def add_comparisons(
    workdir: str | os.PathLike[str], comparisons: dict[str, dict[str, Any]]
) -> None:
  """Adds results of other networks to a finished run's result and report.

  Args:
    workdir: of the finished run.
    comparisons: results by name.
  """
  workdir = pathlib.Path(workdir)
  keys = (
      'found', 'params', 'macs', 'epochs', 'val_accuracy', 'test_accuracy',
      'train_macs', 'wall_seconds', 'compile_seconds',
  )
  comparison = {
      name: {key: result[key] for key in keys}
      for name, result in comparisons.items()
  }
  _write_result(
      workdir,
      logs.read_json(workdir / 'config.json'),
      logs.read(workdir / 'history.jsonl'),
      {**read_result(workdir), 'comparison': comparison},
  )


def _write_result(
    workdir: pathlib.Path,
    config: dict[str, Any],
    history: Sequence[dict[str, Any]],
    result: dict[str, Any],
) -> None:
  """Writes `report.html`, then `result.json`, which marks the run as ended."""
  report.write(
      workdir / 'report.html',
      config=config,
      history=history,
      result=result,
  )
  logs.write_json(workdir / 'result.json', result)


def _controls(
    policy: policies.RoundRobin, epochs: Sequence[dict[str, Any]], total: int
) -> dict[str, Any]:
  """What the policy finds without a signal: the floor and the null band.

  The noise is that of counting `total` examples at the mean accuracy of the
  last growing epochs, as many as the policy looks back.
  """
  growing = [item for item in epochs if item['phase'] == 'growing']
  recent = growing[-getattr(policy, 'window', policy.interval) :]
  if not recent:
    return {}
  correct = sum(item['correct'] for item in recent)
  floor = policies.floor(policy)
  band = policies.null_band(
      policy, total=total, accuracy=correct / sum(x['total'] for x in recent)
  )
  return {
      'floor': policies.format_depths(floor.depths),
      'null_band': dataclasses.asdict(band),
  }


def _method_name(setup: Setup) -> str:
  if isinstance(setup.policy, policies.Fixed):
    return 'fixed'
  return type(setup.task.method).__name__.lower()


def _naming(config: RunConfig, policy: policies.Policy) -> RunConfig:
  """The configuration with the name of a policy that `run` was given."""
  kind = type(policy)
  return dataclasses.replace(
      config,
      policy=dataclasses.replace(
          config.policy, name=f'{kind.__module__}:{kind.__qualname__}'
      ),
  )


def _is_done(progress: Progress, config: RunConfig) -> bool:
  return (
      progress.phase != 'growing'
      and progress.phase_epoch >= config.schedule.finetune_epochs
  )


def _claim(config: RunConfig) -> pathlib.Path:
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
  strip = lambda value: {
      name: item for name, item in value.items() if name not in neutral
  }
  if changed := config_lib.differences(
      strip(known), strip(json.loads(logs.dumps(config.to_json())))
  ):
    raise ValueError(
        f'Work directory {workdir} holds another run ('
        + '; '.join(changed)
        + '); choose another, or repeat its configuration to continue it.'
    )
  return workdir


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
      milestones=config.network.stem,
  )
  task = programs_lib.Task(
      method=method or config.method,
      tx=optimizers.make(config.optimizer),
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


def _restore_or_start(
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
  architecture, known = start(setup)
  state = state_lib.create_state(
      architecture,
      task.tx,
      key=jax.random.key(config.seed),
      extra=task.method.extra,
      known=known,
  )
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


def _extra_batches(
    setup: Setup, epoch: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
  """Endless augmented batches from a stream of their own."""
  key = jax.random.fold_in(
      randomness.stream(jax.random.key(setup.config.seed), 'growth data'), epoch
  )
  train, size = setup.dataset.train, setup.config.batch_size
  @jax.jit
  def prepare(key, images):
    return data.preprocess(
        data.augment(key, images, setup.task.preprocessing),
        setup.task.preprocessing,
        dtype=setup.task.dtype,
    )

  step = 0
  while True:
    permutation = np.asarray(
        data.epoch_permutation(key, step, len(train.labels))
    )
    for index in range(setup.steps_per_epoch):
      chosen = data.batch_indices(permutation, index, size)
      yield (
          prepare(jax.random.fold_in(key, step), train.images[chosen]),
          jnp.asarray(train.labels[chosen]),
      )
      step += 1


def _check_finite(session: _Session, values: Any) -> None:
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
      f'Training diverged in epoch {epoch}, {after}: the loss or a parameter is '
      'not finite; lower --learning_rate or set --clip_norm. Last good '
      f'checkpoint: {kept}.'
  )


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
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


def _versions() -> dict[str, str]:
  """What the result was computed with."""
  return {
      'autogrow_jax': version.__version__,
      'python': platform.python_version(),
      **{
          name: importlib.metadata.version(name)
          for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
      },
      'platform': jax.devices()[0].device_kind,
  }
