"""`run`: one loop for all methods, from a configuration to a result.

Everything that changes is a value, the `RunState`; everything that is written
goes through the `Journal`. Killed anywhere and started again, a run continues
from its last checkpoint and ends as if undisturbed, bit for bit.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
import optax

from autogrow_jax import data
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax.methods import base
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import evaluation
from autogrow_jax.run import growing
from autogrow_jax.run import journal
from autogrow_jax.run import prepare
from autogrow_jax.run import programs
from autogrow_jax.run import results
from autogrow_jax.run import state as run_state
from autogrow_jax.run import steps
from autogrow_jax.run import twins
from autogrow_jax.run import workdir

Interrupted = journal.Interrupted
Diverged = journal.Diverged
RunConfig = config_lib.RunConfig
RunState = run_state.RunState
Setup = prepare.Setup
read_result = results.read_result
cache_compilations = programs.cache_compilations


def run(
    config: RunConfig,
    *,
    dataset: data.Dataset | None = None,
    policy: policies.Policy | None = None,
    method: base.Method | None = None,
    optimizer: optax.GradientTransformation | None = None,
    task: tasks.Task | None = None,
    augment: steps.Augment | None = None,
) -> dict[str, Any]:
  """Trains and grows a network, or continues to.

  Args:
    config: the configuration.
    dataset: data in place of `config.data`.
    policy: policy, at its start, in place of `config.policy`.
    method: method in place of `config.method`.
    optimizer: any optax optimizer of the weights in place of
      `config.optimizer`; its learning rate follows the schedule if it is one
      of `optax.inject_hyperparams`.
    task: task, such as one with another loss, in place of the data's own.
    augment: augmentation of raw training batches inside jit, (key, images,
      labels) -> (images, labels), in place of the data's own.

  Returns:
    The content of `result.json`. A run that had already ended returns it at
    once.

  Raises:
    ValueError: the configuration is wrong, or the work directory holds another
      run, or one that still works.
    Interrupted: after SIGTERM or SIGINT, with everything saved.
    Diverged: the loss is not finite.
  """
  started = time.monotonic()
  given = prepare.Given(policy, method, optimizer, task, augment)
  setup = prepare.prepare(config, dataset, given)
  with workdir.claimed(setup.config):
    if (result := read_result(setup.workdir)) is not None:
      return result
    with journal.open_for(setup, started) as log:
      return _train(setup, log)


def _train(setup: Setup, log: journal.Journal) -> dict[str, Any]:
  """Trains and grows a network to its end; returns the result."""
  with programs.compilations() as spent:
    state = log.restore() or prepare.start(setup)
  log.begin(state)
  log.write(results.headline(setup, state))
  log.write(programs.cache_line())
  state = log.compiled(state, 'initialisation', spent)

  observation = None
  while not is_done(setup, state):
    state, pace = _train_epoch(setup, state, log, observation)
    trained = state
    state, score, train_accuracy = _end_epoch(setup, state, log, pace)
    if state.progress.phase == 'growing':
      try:
        state, twin = twins.train(setup, state, log)
        observation = growing.observe(state, score, twin)
        state = growing.step(setup, state, log, observation, train_accuracy)
      except journal.Stop:  # A restart evaluates and decides again.
        log.stop_if_asked(log.timed(trained))
    state = log.maybe_save(state, at_epoch=True)
    log.stop_if_asked(state)

  result = _conclude(setup, state, log)
  log.stop_if_asked(state)  # Nobody else would hear of a signal until here.
  return result


def is_done(setup: Setup, state: RunState) -> bool:
  """Returns True once the final phase is over."""
  progress = state.progress
  return (
      progress.phase != 'growing'
      and progress.phase_epoch >= setup.config.schedule.finetune_epochs
  )


def _train_epoch(
    setup: Setup,
    state: RunState,
    log: journal.Journal,
    observation: policies.Observation | None,
) -> tuple[RunState, dict[str, float]]:
  """Trains to the end of the current epoch, from wherever it is.

  Returns:
    The state, and figures of the epoch's speed, compilation left out; none if
    no step was left.
  """
  per_epoch, feed = setup.steps_per_epoch, setup.feed
  first, rate = state.progress.step, setup.rate(state.progress)
  rate = setup.parallel.replicate(np.float32(rate))
  end = (state.progress.epoch + 1) * per_epoch
  log.start_epoch(
      state, per_epoch - (end - first), growing.shape_of(setup, state)
  )
  if first == end - per_epoch and setup.task.is_stateful:
    state = state.rewound()
  late = program = None
  started, feed.waited = time.perf_counter(), 0.0
  for number in range(first, end):
    log.stop_if_asked(state)
    examples = feed.take(number, late)
    state = log.note_skipped(state)
    arguments = (state.packed, state.meters, *examples, rate, state.depths)
    if program is None:
      compiling = time.perf_counter()
      program = setup.programs.train_step(state.layout, arguments)
      started += time.perf_counter() - compiling
    packed, meters = program(*arguments)
    state = dataclasses.replace(
        state.with_progress(step=number + 1), packed=packed, meters=meters
    )
    if late is None:
      _compile_ahead(setup, state, observation)
    else:  # One step late, so that the device never waits.
      log.tick(late)
    late = meters
    if number + 1 < end:
      state = log.maybe_save(state, at_epoch=False)
  if late is None:
    return state, {}
  jax.block_until_ready(late)
  seconds = time.perf_counter() - started
  images = (end - first) * setup.config.batch_size
  pace = {
      'images_per_second': round(images / seconds, 1),
      'seconds': round(seconds, 3),
  }
  if setup.dataset.stream is not None:
    pace['input_wait_seconds'] = round(feed.waited, 3)
  return state, pace


def _end_epoch(
    setup: Setup,
    state: RunState,
    log: journal.Journal,
    pace: dict[str, float],
) -> tuple[RunState, tasks.Score, float]:
  """Evaluates, and records the epoch.

  Returns:
    The state at the start of the next epoch, the score of the selection data,
    and the training accuracy, a fraction.
  """
  parallel, before = setup.parallel, state.progress
  meters = parallel.fetch(state.meters)
  log.check_finite(state, meters['loss_sum'])
  report = dict(
      setup.method.report(before.architecture, *state.own(parallel))
  )
  params, macs = state.cost
  state = state.with_progress(
      epoch=before.epoch + 1,
      phase_epoch=before.phase_epoch + 1,
      skipped=0,
      ledger=before.ledger.trained(macs, setup.images_per_epoch),
  )
  state, score = evaluation.evaluate(setup, state, setup.dataset.selection)
  log.warn(setup.dataset.selection.damaged.values())
  log.check_finite(state, score.loss_sum)
  state = log.timed(
      state.with_progress(best=max(before.best, score.correct))
  )
  values = results.of_epoch(setup, before, state, meters, score, pace)
  if before.phase == 'growing':
    values |= results.of_last_growth(log.records)
  state = log.record(
      state, 'epoch', **values, params=params, macs=macs, **report
  )
  meters_at_zero = parallel.replicate(steps.new_meters())
  state = dataclasses.replace(state, meters=meters_at_zero)
  return state, score, int(meters['correct']) / max(1, int(meters['total']))


def _compile_ahead(
    setup: Setup, state: RunState, observation: policies.Observation | None
) -> None:
  """Starts to compile for the growth that is likely to come next."""
  progress = state.progress
  is_wanted = (
      setup.config.devices.compile_ahead and setup.method.execution.spare
  )
  if not is_wanted or progress.phase != 'growing' or observation is None:
    return
  decision = policies.next_growth(progress.policy, observation)
  if decision is not None:
    stages = decision.stages(progress.architecture.depths)
    likely = state_lib.append(progress.architecture, stages).target
    setup.programs.prepare(setup.layout(likely))


def _conclude(
    setup: Setup, state: RunState, log: journal.Journal
) -> dict[str, Any]:
  """Reads the test set, once, and writes the result."""
  state = log.save(state)  # What follows is done again if it is interrupted.
  dataset = setup.dataset
  scores = {}
  splits = {'val': dataset.selection, 'test': dataset.read_test()}
  for name, split in splits.items():
    state, scores[name] = evaluation.evaluate(setup, state, split)
    log.warn(split.damaged.values())
  setup.programs.close()
  state = log.record(state, 'end')
  setup.checkpoints.wait()
  return results.conclude(setup, state, log.records, **scores)
