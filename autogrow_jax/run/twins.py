"""The ungrown twin of a growing network, for policies that compare the two.

The twin is the network of before a growth. It trains on with the same batches
and learning rates, so that growth is all that differs. Its architecture is
`Progress.twin`, its canonical state `RunState.twin`.
"""

import dataclasses

import numpy as np

from autogrow_jax import tasks
from autogrow_jax.run import evaluation
from autogrow_jax.run import journal
from autogrow_jax.run import prepare
from autogrow_jax.run import state as run_state

RunState = run_state.RunState
Setup = prepare.Setup


def train(
    setup: Setup, state: RunState, log: journal.Journal
) -> tuple[RunState, tasks.Score | None]:
  """Trains the twin for the epoch that just ended, and evaluates it.

  Args:
    setup: fixed part of the run.
    state: state of the run at the end of an epoch.
    log: journal of the run.

  Returns:
    The state with the twin trained and its costs in the ledger, and the twin's
    score of the selection data; None without a twin.

  Raises:
    journal.Stop: a signal came; a restart trains the twin again.
  """
  progress, feed = state.progress, setup.feed
  if progress.twin is None:
    return state, None
  twin = _placed(setup, state, phase_epoch=progress.phase_epoch - 1)
  rate = np.float32(setup.rate(twin.progress))
  rate, program = setup.parallel.replicate(rate), None
  twin = twin.rewound() if setup.task.is_stateful else twin
  last = progress.epoch * setup.steps_per_epoch
  first = last - setup.steps_per_epoch
  for number in range(first, last):
    log.check_signals()
    arguments = (
        twin.packed, twin.meters, *feed.take(number), rate, twin.depths
    )
    program = program or setup.programs.train_step(twin.layout, arguments)
    packed, meters = program(*arguments)
    twin = dataclasses.replace(twin, packed=packed, meters=meters)
  ledger = progress.ledger.trained(twin.cost[1], setup.images_per_epoch)
  twin, score = evaluation.evaluate(
      setup, twin.with_progress(ledger=ledger), setup.dataset.selection
  )
  log.check_finite(state, score.loss_sum)
  state = state.with_progress(ledger=twin.progress.ledger)
  return dataclasses.replace(state, twin=twin.fetch(setup.parallel)), score


def taken_back(setup: Setup, state: RunState) -> RunState:
  """The state with the twin, if there is one, in the network's place."""
  is_there = state.progress.twin is not None
  return _placed(setup, state, twin=None) if is_there else state


def _placed(setup: Setup, state: RunState, **progress: object) -> RunState:
  """The twin on the devices."""
  assert state.twin is not None
  twin = state.with_progress(architecture=state.progress.twin, **progress)
  return setup.place(twin.progress, state.twin)
