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

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import itertools
import os
import time
from typing import Any
import warnings

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import checkpoint
from autogrow_jax import config as config_lib
from autogrow_jax import data
from autogrow_jax import evaluation
from autogrow_jax import feeds
from autogrow_jax import growth
from autogrow_jax import logs
from autogrow_jax import networks
from autogrow_jax import parallel as parallel_lib
from autogrow_jax import policies
from autogrow_jax import programs as programs_lib
from autogrow_jax import randomness
from autogrow_jax import results
from autogrow_jax import session as session_lib
from autogrow_jax import state as state_lib
from autogrow_jax import trained
from autogrow_jax import view
from autogrow_jax.methods import base

RunConfig = config_lib.RunConfig
Interrupted = session_lib.Interrupted
Diverged = session_lib.Diverged
read_result = results.read_result


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
  config = _naming(config, dataset, policy, method)
  asked, config = config, resolve(config, dataset, method)
  if policy is None:
    policy = config.make_policy(config.network.depths)
    if method is not None:
      config = _growing_by(config, policy, method)
  workdir = session_lib.claim(config)
  if (result := read_result(workdir)) is not None:
    return result
  setup = session_lib.set_up(
      config, dataset, workdir, method=method, policy=policy
  )
  with programs_lib.compilations() as spent:
    progress, state, meters = session_lib.restore_or_start(setup)
  with contextlib.ExitStack() as stack:
    session = session_lib.Session(setup, progress, state, meters, started)
    stack.callback(session.close)
    session.signals = stack.enter_context(session_lib.catch_signals())
    session.screen.write(_headline(setup, progress, asked))
    session.screen.write(_cache_line())
    session.record_compilations('initialisation', spent)
    while not _is_done(session.progress, config):
      pace = _train_epoch(session)
      _finish_epoch(session, pace)
    result = _conclude(session)
    session.stop_if_asked()  # Nobody else would hear of a signal until here.
    return result


def _headline(
    setup: session_lib.Setup, progress: session_lib.Progress, asked: RunConfig
) -> str:
  """What a run says first; `asked` is its configuration as it was given."""
  dataset, devices = setup.dataset, setup.task.parallel.devices
  selection = {
      'holdout': f'{len(dataset.holdout.labels)} held out',
      'test': 'DECIDING ON THE TEST SET',
      'paper_compat': "THE PAPER'S PROTOCOL (paper_compat): DECIDING ON THE "
      'TEST SET, THE BEST TEST ACCURACY REPORTED',
  }[setup.config.protocol]
  rule = ''
  by_rule = asked.policy.is_named and asked.policy.interval is None
  if progress.phase == 'growing' and by_rule:
    rule = (
        f'; K = {setup.config.interval}, by the rule 3 / '
        f'{float(setup.config.data.fraction):g} of the data'
    )
  return (
      f'{progress.architecture} on {dataset.name}: '
      f'{len(dataset.train.labels)} training '
      f'{"windows" if dataset.is_text else "images"}, {selection}; '
      f'{len(devices)} {devices[0].platform} device'
      f'{"s" if len(devices) > 1 else ""}{rule}; results in {setup.workdir}'
  )


def resolve(
    config: RunConfig,
    dataset: data.Dataset,
    method: base.Method | None = None,
) -> RunConfig:
  """Fills in every default, and checks what depends on data and devices.

  Args:
    config: a configuration that may leave things open.
    dataset: the data.
    method: one's own in place of `config.method`.

  Returns:
    The fully resolved configuration.
  """
  if config.data.select_on != dataset.select_on:
    raise ValueError(
        f'The data are divided to decide on {dataset.select_on}, but the '
        f'configuration has select_on={config.data.select_on}.'
    )
  network = networks.get(config.network.name)
  if config.paper_compat and config.network.bn_scale_init is None:
    config = _with_paper_scales(config, dataset)
  if config.init_from is not None:
    config = dataclasses.replace(config, network=_from_origin(config, dataset))
  architecture = session_lib.seed_architecture(config, dataset)
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
  _check_task(architecture, dataset)
  is_divided = parallel.mode == 'pmap' and len(parallel.devices) > 1
  # Joint learning alone has this attribute.
  if is_divided and getattr(
      method or config.method, 'needs_whole_batches', False
  ):
    raise ValueError(
        'What this method learns beside the weights needs whole batches, but '
        'in pmap mode each device has a part; use --parallel=jit.'
    )
  _check_text_devices(config, dataset, parallel)
  rate = config.schedule.learning_rate
  resolved = dataclasses.replace(
      config,
      network=dataclasses.replace(
          config.network,
          name=network.name if ':' not in config.network.name
          else config.network.name,
          depths=architecture.depths,
          **{
              name: option.get(name)
              for name in config.network.options()
              if name not in ('widths', 'embedding')  # Which are sizes.
          },
      ),
      data=dataclasses.replace(
          config.data,
          holdout=_asked_holdout(dataset),
          digest=dataset.digest,
      ),
      policy=dataclasses.replace(config.policy, interval=config.interval),
      schedule=dataclasses.replace(
          config.schedule,
          learning_rate=network.learning_rate if rate is None else rate,
      ),
  )
  if resolved.policy.is_named:
    resolved.make_policy(architecture.depths)
  return resolved


def _check_task(
    architecture: architecture_lib.Architecture, dataset: data.Dataset
) -> None:
  """Raises unless a network predicts what a data set has labels of."""
  labels = dataset.train.labels
  predicted, wanted = networks.label_shape(architecture), labels.shape[1:]
  if not dataset.is_text and predicted != wanted:  # Texts have any length.
    kind = {0: 'one class for each example', 2: 'a class for each pixel'}
    raise ValueError(
        f'{architecture.family} predicts {kind.get(len(predicted), predicted)},'
        f' but {dataset.name} has {kind.get(len(wanted), wanted)}: choose '
        'another --network or --dataset.'
    )
  if labels.size >= 2**32:  # What meters count.
    raise ValueError(
        f'An epoch has {labels.size} labels, but must have less than 2**32: '
        'take a smaller --image_size or --data_fraction.'
    )


def _check_text_devices(
    config: RunConfig,
    dataset: data.Dataset,
    parallel: parallel_lib.Parallel,
) -> None:
  """Raises if the devices are to do what they cannot do with text."""
  if not dataset.is_text:
    return
  if parallel.mode == 'pmap' and len(parallel.devices) > 1:
    raise ValueError(
        'In pmap mode statistics are averaged over devices, but each stream of '
        'text has a state of its own; use --parallel=jit for text.'
    )
  if config.devices.precision != 'float32':
    raise ValueError(
        f'Text is computed in float32, got {config.devices.precision}.'
    )


def _asked_holdout(dataset: data.Dataset) -> int | None:
  """By which the same data are divided the same way."""
  if dataset.select_on != 'holdout' or dataset.is_text:
    return None
  asked = dataset.asked_holdout
  return len(dataset.holdout.labels) if asked is None else asked


def _with_paper_scales(config: RunConfig, dataset: data.Dataset) -> RunConfig:
  """The batch norm scales that the paper's runs started from."""
  option = dict(session_lib.seed_architecture(config, dataset).options)
  start = config_lib.paper_scale_init(option.get('stem', 'small'))
  return dataclasses.replace(
      config, network=dataclasses.replace(config.network, bn_scale_init=start)
  )


def _from_origin(
    config: RunConfig, dataset: data.Dataset
) -> config_lib.NetworkConfig:
  """The network of `init_from`, in full.

  A run that has begun knows it from its own directory, and needs its origin no
  longer.
  """
  own = logs.read_json(os.path.join(config.workdir, 'config.json')) or {}
  if own.get('init_from') == config.init_from:
    known = RunConfig.from_json(own).network
  else:
    origin = trained.load(config.init_from)
    _check_origin(origin, config, dataset)
    known = dataclasses.replace(
        origin.config.network, depths=origin.architecture.depths
    )
  given = {
      name: value
      for name, value in dataclasses.asdict(config.network).items()
      if value is not None
  }
  return dataclasses.replace(known, **given)


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
      **option,
      'embedding': dict(architecture.sizes).get('embedding'),
      'widths': origin.config.network.widths or network.widths,
      'input_shape': networks.parts(architecture)[0].input_shape,
      'classes': architecture.size('classes'),
  }
  wanted = {
      'network': networks.get(config.network.name).name,
      'depths': config.network.depths,
      **session_lib.network_options(config),
      'input_shape': dataset.input_shape,
      'classes': dataset.classes,
  }
  for name, value in wanted.items():
    if value is not None and value != found.get(name):
      raise ValueError(
          f'init_from {config.init_from} holds a network with {name} '
          f'{found[name]}, but {value} is asked for.'
      )


def cache_compilations(directory: str | os.PathLike[str]) -> None:
  """Keeps compiled programs in a directory, for the next process.

  An entry that was damaged by a kill, or that a full disk has no room for, only
  costs its compilation.
  """
  warnings.filterwarnings(
      'ignore', 'Error (reading|writing) persistent compilation cache'
  )
  jax.config.update('jax_compilation_cache_dir', os.fspath(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def _cache_line() -> str:
  """Where compiled programs are kept, and what is there already."""
  directory = jax.config.jax_compilation_cache_dir
  if not directory:
    return 'compiled programs are not kept for the next start'
  sizes = []
  # Others may write and remove there.
  with contextlib.suppress(OSError), os.scandir(directory) as entries:
    for entry in entries:
      if entry.name.endswith('-cache'):
        sizes.append(entry.stat().st_size)
  return (
      f'compiled programs: {len(sizes)} of {logs.format_count(sum(sizes))}B in '
      f'{directory}'
  )


@dataclasses.dataclass(frozen=True)
class _Pace:
  """How fast an epoch went, compilation left out.

  Attributes:
    images_per_second: in training.
    input_wait_seconds: for which the devices had nothing to do, because a batch
      was not there yet.
  """

  images_per_second: float
  input_wait_seconds: float


def _train_epoch(session: session_lib.Session) -> _Pace | None:
  """Trains to the end of the current epoch, from wherever it is.

  Returns:
    Its pace; None if no step was left.
  """
  setup, progress = session.setup, session.progress
  parallel, config = setup.task.parallel, setup.config
  step, steps = session.step, setup.steps_per_epoch
  rate = parallel.replicate(
      np.float32(setup.schedule.rate(progress.phase, progress.phase_epoch))
  )
  end = (progress.epoch + 1) * steps
  session.screen.start_epoch(
      progress.epoch + 1,
      steps,
      session.describe(),
  )
  session.screen.update(steps - (end - step))
  if step == end - steps:
    session.rewind()
  late, program = None, None
  started, session.feed.waited = time.perf_counter(), 0.0
  for number in range(step, end, session.feed.steps_per_call):
    session.stop_if_asked()
    examples = session.feed.take(number, late)
    session.note_skipped()
    arguments = (
        session.packed, session.meters, *examples, rate, session.depths
    )
    if program is None:
      compiling = time.perf_counter()
      program = session.programs.train_step(session.layout, arguments)
      session.flush_compilations()
      started += time.perf_counter() - compiling
    session.packed, session.meters = program(*arguments)
    if late is None:
      session.compile_ahead()
    else:  # One call late, so that the device never waits.
      jax.block_until_ready(late)
      session.screen.update(
          session.feed.steps_per_call, lambda: _running(parallel.fetch(late))
      )
    late = session.meters
    if number + session.feed.steps_per_call < end:
      session.maybe_save(None)
  if late is None:
    return None
  jax.block_until_ready(late)
  return _Pace(
      (end - step) * config.batch_size / (time.perf_counter() - started),
      session.feed.waited,
  )


def _running(meters: Any) -> tuple[float, float]:
  """Mean loss, and accuracy in percent, of an epoch so far."""
  total = int(meters['total'])
  return float(meters['loss_sum']) / total, 100 * int(meters['correct']) / total


def _finish_epoch(
    session: session_lib.Session, pace: _Pace | None
) -> None:
  """Evaluates, decides, grows, records and saves."""
  setup, before = session.setup, session.progress
  parallel = setup.task.parallel
  meters = parallel.fetch(session.meters)
  labels = int(meters['total'])
  images = setup.steps_per_epoch * setup.config.batch_size
  images *= setup.dataset.train.length
  params, macs = session.cost()
  report = dict(
      setup.task.method.report(before.architecture, *session.own())
  )
  session.progress = dataclasses.replace(
      before,
      epoch=before.epoch + 1,
      phase_epoch=before.phase_epoch + 1,
      skipped=0,
  )
  session.charge(session.progress.ledger.trained(macs, images))
  session_lib.check_finite(session, meters['loss_sum'])
  score = _evaluate(session, setup.dataset.selection)
  session_lib.check_finite(session, score.loss_sum)
  session.flush_compilations()
  session.charge(session.progress.ledger)
  session.progress = dataclasses.replace(
      session.progress, best=max(session.progress.best, score.correct)
  )
  ledger = session.progress.ledger
  session.record(
      'epoch',
      shape=report.pop('shape'),
      phase=before.phase,
      phase_epoch=session.progress.phase_epoch,
      learning_rate=setup.schedule.rate(before.phase, before.phase_epoch),
      train_loss=float(meters['loss_sum']) / labels,
      train_correct=int(meters['correct']),
      train_total=labels,
      loss=score.loss_sum / score.total,
      correct=score.correct,
      total=score.total,
      select_on=setup.config.data.select_on,
      protocol=setup.config.protocol,
      best=session.progress.best,
      **_task_values(setup, float(meters['loss_sum']) / labels, score),
      params=params,
      macs=macs,
      train_macs=ledger.train_macs,
      eval_macs=ledger.eval_macs,
      wall_seconds=round(ledger.wall_seconds, 3),
      compile_seconds=round(ledger.compile_seconds, 3),
      compile_count=ledger.compile_count,
      **_pace_values(setup, pace),
      **_memory_values(session),
      **_growth_values(before),
      **report,
      **({'skipped': before.skipped} if before.skipped else {}),
  )
  undecided = dataclasses.replace(
      before,
      ledger=dataclasses.replace(
          before.ledger, wall_seconds=session.progress.ledger.wall_seconds
      ),
  )
  epoch_meters, session.meters = (
      session.meters,
      parallel.replicate(programs_lib.new_meters()),
  )

  def stop_if_asked():
    if session.signals:  # A restart decides again.
      session.progress, session.meters = undecided, epoch_meters
      session.stop_if_asked()

  if before.phase == 'growing':
    _decide(session, score, meters, stop_if_asked)
  session.maybe_save(session.progress.epoch)
  session.stop_if_asked()


def _pace_values(
    setup: session_lib.Setup, pace: _Pace | None
) -> dict[str, float]:
  """The keys of an epoch's record that tell its pace."""
  if pace is None:
    return {}
  values = {'images_per_second': round(pace.images_per_second, 1)}
  if setup.dataset.stream is not None:
    values['input_wait_seconds'] = round(pace.input_wait_seconds, 3)
  return values


def _memory_values(session: session_lib.Session) -> dict[str, int]:
  """The key of an epoch's record that only some devices tell."""
  size = session.device_bytes()
  return {} if size is None else {'device_bytes': size}


def _growth_values(progress: session_lib.Progress) -> dict[str, float]:
  """The keys of an epoch's record that tell what the last growth did."""
  if progress.phase != 'growing':
    return {}
  grown = (
      record
      for record in reversed(progress.history)
      if record['event'] == 'grow'
  )
  report = next(grown, {}).get('initializer', {})
  keys = ('estimated_change', 'actual_change')
  return {key: report[key] for key in keys if key in report}


def _task_values(
    setup: session_lib.Setup, train_loss: float, score: evaluation.Score
) -> dict[str, float]:
  """The keys of an epoch's record that only some tasks have."""
  if score.miou is not None:
    return {'miou': score.miou}
  if not setup.dataset.is_text:
    return {}
  return {
      'train_perplexity': evaluation.perplexity(train_loss),
      'perplexity': score.perplexity,
  }


def _decide(
    session: session_lib.Session,
    score: evaluation.Score,
    meters: Any,
    stop_if_asked: Callable[[], None],
) -> None:
  """Lets the policy decide, and carries it out.

  Args:
    session: at the end of an epoch.
    score: on the selection data.
    meters: of the epoch.
    stop_if_asked: called before each batch that the method draws.
  """
  setup, progress = session.setup, session.progress
  session.observed = policies.Observation(
      epoch=progress.phase_epoch,
      step=session.step,
      correct=score.correct,
      total=score.total,
      loss_sum=score.loss_sum,
      cost=progress.ledger.train_macs,
      hits=score.hits,
  )
  policy, decision = progress.policy.update(session.observed)
  session.progress = dataclasses.replace(progress, policy=policy)
  for stage in decision.closed:
    session.record('stop', stage=stage, reason='window')
  situation = base.Situation(
      architecture=progress.architecture,
      state=session.fetch(),
      batches=lambda: _extra_batches(setup, progress.epoch, stop_if_asked),
      batches_per_epoch=setup.steps_per_epoch,
      train_accuracy=int(meters['correct']) / int(meters['total']),
      weight_decay=setup.config.optimizer.weight_decay,
      is_last=policy.finished,
  )
  with programs_lib.compilations() as spent:
    change = setup.task.method.propose(decision, situation)
  session.record_compilations('proposal', spent)
  if isinstance(change, base.Skip):
    _, macs = session.cost()
    images = change.images * setup.dataset.train.length
    session.charge(session.progress.ledger.trained(macs, images))
    session.record('skip', reason=change.reason, **change.report)
  elif change is not None:
    _apply(session, change, situation.state, decision)
  for stage in decision.capped:
    session.record('stop', stage=stage, reason='cap')
  is_final = isinstance(change, base.Skip) and change.is_final
  if policy.finished or is_final:
    session.progress = dataclasses.replace(
        session.progress, phase='finetuning', phase_epoch=0
    )
    if session.layout.spare:  # From now on it would be of no use.
      session.load(session.fetch())
    session.record('phase', name='finetuning')


def _apply(
    session: session_lib.Session,
    change: growth.Growth,
    state: state_lib.TrainState,
    decision: policies.Decision,
) -> None:
  """Grows the state, and records the receipt."""
  setup, old = session.setup, session.progress.architecture
  before, (params_before, macs_before) = _probe(session), session.cost()
  key = jax.random.fold_in(
      randomness.stream(jax.random.key(setup.config.seed), 'growth'),
      session.progress.epoch,
  )
  tx = view.with_stacked_init(setup.task.tx, change.architecture)
  started = time.perf_counter()
  with programs_lib.compilations() as spent:
    state, carried = growth.grow(
        state, change, tx, key=key, extra=setup.task.method.extra
    )
  seconds = time.perf_counter() - started
  session.progress = dataclasses.replace(
      session.progress, architecture=change.architecture
  )
  session.load(state)
  session.record_compilations('growth', spent)
  images = carried.report.get('images', 0) * setup.dataset.train.length
  params_after, macs_after = session.cost()
  session.charge(session.progress.ledger.trained(macs_after, images))
  after = _probe(session)
  session.flush_compilations()
  new_blocks = [
      block
      for stage in change.architecture.stages
      for block in stage
      if not any(block in names for names in old.stages)
  ]
  is_sample = change.architecture == old and not change.sources
  session.record(
      'sample' if is_sample else 'grow',
      shape=session.describe(),
      stage=decision.stage,
      block=', '.join(new_blocks),
      note=change.note,
      params_before=params_before,
      params_after=params_after,
      macs_before=macs_before,
      macs_after=macs_after,
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


def _probe(session: session_lib.Session) -> _Probe:
  train = session.setup.dataset.train
  images = train.images[: session.setup.eval_batch]
  labels = train.labels[: session.setup.eval_batch]
  logits, train_logits = (
      _forward(session, images, train=train) for train in (False, True)
  )
  session.charge(
      session.progress.ledger.evaluated(
          session.cost()[1], 2 * len(images) * train.length
      )
  )
  counts = labels >= 0
  loss = evaluation.cross_entropy(logits[counts], labels[counts])
  return _Probe(logits, train_logits, float(np.mean(loss)))


def _evaluate(
    session: session_lib.Session, split: data.Split
) -> evaluation.Score:
  """Counts over a split, in eval mode."""
  score = evaluation.score(
      lambda images: _forward(session, images, train=False),
      split,
      session.setup.eval_batch * session.setup.eval_batches,
  )
  session.warn(split.damaged.values())
  session.charge(
      session.progress.ledger.evaluated(
          session.cost()[1], len(split.labels) * split.length
      )
  )
  return score


def _forward(
    session: session_lib.Session, images: np.ndarray, *, train: bool
) -> np.ndarray:
  """Logits of at most `eval_batch * eval_batches` images, in one call."""
  setup, examples = session.setup, len(images)
  parallel, batches = setup.task.parallel, setup.eval_batches
  if missing := setup.eval_batch * batches - examples:
    images = np.pad(images, [(0, missing), *[(0, 0)] * (images.ndim - 1)])
  count = None
  if batches > 1:
    images = images.reshape(batches, setup.eval_batch, *images.shape[1:])
    count = np.int32(-(-examples // setup.eval_batch))
  arguments = (
      session.packed.params,
      session.packed.stats,
      parallel.shard(images, dim=int(batches > 1)),
      *parallel.replicate((np.bool_(train), count)),
      session.depths,
  )
  program = session.programs.forward(session.layout, arguments)
  logits = parallel.gather(program(*arguments))
  if batches > 1:
    logits = np.moveaxis(logits, 1, 0).reshape(-1, *logits.shape[2:])
  return logits[:examples]


def _conclude(session: session_lib.Session) -> dict[str, Any]:
  """Reads the test set, once, and writes what is left to write."""
  dataset = session.setup.dataset
  session.save()  # What follows is done again if it is interrupted.
  selection = _evaluate(session, dataset.selection)
  test = _evaluate(session, dataset.read_test())
  session.programs.close()
  session.flush_compilations()
  session.record('end')
  return results.conclude(
      session.setup,
      session.progress,
      session.fetch(),
      selection=selection,
      test=test,
  )


def _naming(
    config: RunConfig,
    dataset: data.Dataset,
    policy: policies.Policy | None,
    method: base.Method | None,
) -> RunConfig:
  """The configuration with the identity of objects that `run` was given.

  Without it, another run on other arrays would pass for this one.
  """
  if dataset.name != config.data.dataset:
    arrays = [
        (split.images, split.labels)
        for split in (dataset.train, dataset.holdout)
    ]
    name = f'{dataset.name}:{checkpoint.digest(arrays)[:16]}'
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, dataset=name)
    )
  return config if policy is None else _growing_by(config, policy, method)


def _growing_by(
    config: RunConfig, policy: policies.Policy, method: base.Method | None
) -> RunConfig:
  """The configuration with a policy and a method in the policy's name."""
  kind, start = type(policy), logs.dumps(policy.to_json())
  name = f'{kind.__module__}:{kind.__qualname__} {start}'
  if dataclasses.is_dataclass(method):
    name = f'{name} for {method}'
  return dataclasses.replace(
      config, policy=dataclasses.replace(config.policy, name=name)
  )


def _is_done(progress: session_lib.Progress, config: RunConfig) -> bool:
  return (
      progress.phase != 'growing'
      and progress.phase_epoch >= config.schedule.finetune_epochs
  )


def _extra_batches(
    setup: session_lib.Setup, epoch: int, stop_if_asked: Callable[[], None]
) -> Iterator[tuple[jax.Array, jax.Array]]:
  """Endless augmented batches from a stream of their own."""
  key = jax.random.fold_in(
      randomness.stream(jax.random.key(setup.config.seed), 'growth data'), epoch
  )

  @jax.jit
  def prepare(key, images, labels):
    how = setup.task.preprocessing
    images, labels = data.augment_examples(key, images, labels, how)
    return data.preprocess(images, how, dtype=setup.task.dtype), labels

  batches = _raw_batches(setup, key)
  try:
    for step in itertools.count():
      stop_if_asked()
      images, labels, *_ = next(batches)
      yield prepare(jax.random.fold_in(key, step), images, labels)
  finally:
    batches.close()


def _raw_batches(setup: session_lib.Setup, key: jax.Array) -> Iterator[Any]:
  """Endless training batches on the host; can be closed."""
  dataset, size = setup.dataset, setup.config.batch_size
  if dataset.stream is not None:
    workers = setup.config.devices.decode_workers
    return dataset.stream(key, 0, size, workers=workers)
  train, steps = dataset.train, setup.steps_per_epoch

  def generate():
    for first in itertools.count(step=steps):
      permutation = feeds.order(dataset, key, first, size)
      for index in range(steps):
        chosen = data.batch_indices(permutation, index, size)
        yield train.images[chosen], train.labels[chosen]

  return generate()


