"""Forward passes of a run: scores of the data, and probes around a growth."""

from typing import Any, NamedTuple

import numpy as np

from autogrow_jax import data
from autogrow_jax import tasks
from autogrow_jax.run import prepare
from autogrow_jax.run import state as run_state

RunState = run_state.RunState
Setup = prepare.Setup


class Probe(NamedTuple):
  """Logits of one fixed batch in both modes; mean loss in evaluation mode."""

  eval: np.ndarray
  train: np.ndarray
  loss: float

  def change(self, before: 'Probe') -> dict[str, float]:
    """Largest absolute changes of the logits since another probe, by mode."""
    largest = lambda a, b: float(np.abs(a - b).max())
    return {
        'logits_change_eval': largest(self.eval, before.eval),
        'logits_change_train': largest(self.train, before.train),
    }


def evaluate(
    setup: Setup, state: RunState, split: data.Split
) -> tuple[RunState, tasks.Score]:
  """Scores a split in evaluation mode; the costs go into the ledger."""
  score = setup.task.score(
      lambda images: forward(setup, state, images, train=False),
      split,
      setup.eval_batch,
  )
  return _charged(state, len(split.labels) * split.length), score


def probe(setup: Setup, state: RunState) -> tuple[RunState, Probe]:
  """Computes logits and loss of the first training examples."""
  train = setup.dataset.train
  images = train.images[: setup.eval_batch]
  labels = train.labels[: setup.eval_batch]
  logits, train_logits = (
      forward(setup, state, images, train=mode) for mode in (False, True)
  )
  counts = labels >= 0
  loss = tasks.exact_cross_entropy(logits[counts], labels[counts])
  state = _charged(state, 2 * len(images) * train.length)
  return state, Probe(logits, train_logits, float(np.mean(loss)))


def forward(
    setup: Setup, state: RunState, images: Any, *, train: bool
) -> np.ndarray:
  """Logits of at most `eval_batch` images."""
  missing = setup.eval_batch - len(images)
  padded = np.pad(images, [(0, missing), *[(0, 0)] * (images.ndim - 1)])
  arguments = (
      state.packed.params,
      state.packed.stats,
      setup.parallel.shard(padded),
      setup.parallel.replicate(np.bool_(train)),
      state.depths,
  )
  program = setup.programs.forward(state.layout, arguments)
  return setup.parallel.gather(program(*arguments))[: len(images)]


def _charged(state: RunState, images: int) -> RunState:
  ledger = state.progress.ledger.evaluated(state.cost[1], images)
  return state.with_progress(ledger=ledger)
