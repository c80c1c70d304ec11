"""The growing part of an epoch's end: decide, propose, grow, write it down."""

from collections.abc import Generator, Iterator
import dataclasses
import itertools
import time
from typing import Any

import jax

from autogrow_jax import data
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.run import evaluation
from autogrow_jax.run import feeds
from autogrow_jax.run import journal
from autogrow_jax.run import prepare
from autogrow_jax.run import programs
from autogrow_jax.run import state as run_state
from autogrow_jax.run import twins

RunState = run_state.RunState
Setup = prepare.Setup


def observe(
    state: RunState, score: tasks.Score, twin: tasks.Score | None
) -> policies.Observation:
  """Makes the observation of an epoch for the policy."""
  progress = state.progress
  return policies.Observation(
      epoch=progress.phase_epoch,
      step=progress.step,
      correct=score.correct,
      total=score.total,
      loss_sum=score.loss_sum,
      cost=progress.ledger.train_macs,
      hits=score.hits,
      twin_hits=None if twin is None else twin.hits,
  )


def step(
    setup: Setup,
    state: RunState,
    log: journal.Journal,
    observation: policies.Observation,
    train_accuracy: float,
) -> RunState:
  """Lets the policy decide when, and the method what, and grows the state.

  Args:
    setup: fixed part of the run.
    state: state at the end of an epoch, evaluated.
    log: journal of the run.
    observation: the policy's observation of the epoch.
    train_accuracy: training accuracy of the epoch, a fraction.

  Returns:
    The state, perhaps of another architecture or in its final phase.

  Raises:
    journal.Stop: a signal came meanwhile; the decision is taken again later.
  """
  policy, decision = state.progress.policy.update(observation)
  state = state.with_progress(policy=policy)
  for stage in decision.closed:
    state = log.record(state, 'stop', stage=stage, reason='window')
  if decision.twin == 'back':
    state = log.record(twins.taken_back(setup, state), 'back')
  epoch = state.progress.epoch
  situation = base.Situation(
      architecture=state.progress.architecture,
      state=state.fetch(setup.parallel),
      key=jax.random.fold_in(setup.stream('growth'), epoch),
      task=setup.task,
      batches=lambda: _batches(setup, epoch, log),
      batches_per_epoch=setup.steps_per_epoch,
      train_accuracy=train_accuracy,
      weight_decay=setup.config.optimizer.weight_decay,
      is_last=policy.finished,
  )
  with programs.compilations() as spent:
    change = setup.method.propose(decision, situation)
  state = log.compiled(state, 'proposal', spent)
  if isinstance(change, base.Skip):
    state = _charged(setup, state, change.examples)
    state = log.record(state, 'skip', reason=change.reason, **change.report)
  elif change is not None:
    old, twin = state, state.twin
    state = _grown(setup, state, log, situation, change, decision)
    if decision.twin:
      state = state.with_progress(twin=old.progress.architecture)
      twin = situation.state
    state = dataclasses.replace(state, twin=twin)
  for stage in decision.capped:
    state = log.record(state, 'stop', stage=stage, reason='cap')
  is_final = isinstance(change, base.Skip) and change.is_final
  if not (policy.finished or is_final):
    return state
  state = state.with_progress(phase='finetuning', phase_epoch=0, twin=None)
  state = dataclasses.replace(state, twin=None)
  if state.layout.spare:  # From now on it would be of no use.
    state = setup.place(state.progress, state.fetch(setup.parallel))
  return log.record(state, 'phase', name='finetuning')


def _grown(
    setup: Setup,
    state: RunState,
    log: journal.Journal,
    situation: base.Situation,
    change: growth_lib.Growth,
    decision: policies.Decision,
) -> RunState:
  """Grows the state, and records the receipt."""
  old, size_before = state.progress.architecture, state.cost
  state, before = evaluation.probe(setup, state)
  architecture = state_lib.target_of(change, old)
  started = time.perf_counter()
  with programs.compilations() as spent:
    canonical, account = state_lib.grow(
        situation.state,
        dataclasses.replace(change, target=architecture),
        view.with_stacked_init(setup.computation.tx, architecture),
        key=situation.key,
        extra=setup.method.extra,
    )
  seconds = time.perf_counter() - started
  progress = dataclasses.replace(state.progress, architecture=architecture)
  state = setup.place(progress, canonical)
  state = log.compiled(state, 'growth', spent)
  state = _charged(setup, state, change.examples)
  state, after = evaluation.probe(setup, state)
  size_after = state.cost
  is_sample = architecture == old and not change.sources
  known = {block for stage in old.stages for block in stage}
  new = [b for stage in architecture.stages for b in stage if b not in known]
  return log.record(
      state,
      'sample' if is_sample else 'grow',
      shape=shape_of(setup, state),
      stage=decision.stage,
      block=', '.join(new),
      note=change.note,
      params_before=size_before[0],
      params_after=size_after[0],
      macs_before=size_before[1],
      macs_after=size_after[1],
      loss_before=before.loss,
      loss_after=after.loss,
      **after.change(before),
      optimizer=account.counts,
      initializer=dict(change.report),
      seconds=round(seconds, 3),
  )


def shape_of(setup: Setup, state: RunState) -> str:
  """The shape of the network, by the method."""
  own = state.own(setup.parallel)
  return setup.method.report(state.progress.architecture, *own)['shape']


def _charged(setup: Setup, state: RunState, examples: int) -> RunState:
  """The state with training on more examples in its ledger."""
  images = examples * setup.dataset.train.length
  ledger = state.progress.ledger.trained(state.cost[1], images)
  return state.with_progress(ledger=ledger)


def _batches(
    setup: Setup, epoch: int, log: journal.Journal
) -> Iterator[tuple[jax.Array, jax.Array]]:
  """Endless augmented batches from a stream of their own."""
  key = jax.random.fold_in(setup.stream('growth data'), epoch)
  prepare_batch = jax.jit(setup.computation.prepared)
  batches = _raw_batches(setup, key)
  try:
    for number in itertools.count():
      log.check_signals()
      images, labels, *_ = next(batches)
      yield prepare_batch(jax.random.fold_in(key, number), images, labels)
  finally:
    batches.close()


def _raw_batches(setup: Setup, key: jax.Array) -> Generator[Any, None, None]:
  """Endless training batches on the host; can be closed."""
  dataset, size = setup.dataset, setup.config.batch_size
  if dataset.stream is not None:
    workers = setup.config.devices.decode_workers
    yield from dataset.stream(key, 0, size, workers=workers)
  train, steps = dataset.train, setup.steps_per_epoch
  for first in itertools.count(step=steps):
    permutation = feeds.order(dataset, key, first, size)
    for index in range(steps):
      chosen = data.batch_indices(permutation, index, size)
      yield train.images[chosen], train.labels[chosen]
