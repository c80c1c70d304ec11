"""`Journal`: all side effects of a run, and the only thing that changes.

It owns the files of the work directory, the screen, the clock, and the signals
that ask a run to stop. What it writes of a state is a new state: the ledger and
the number of records are part of it.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import signal
import threading
import time
from typing import Any

import jax
import numpy as np

from autogrow_jax import policies
from autogrow_jax.run import console
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import prepare
from autogrow_jax.run import programs
from autogrow_jax.run import state as run_state
from autogrow_jax.run import tensorboard
from autogrow_jax.run import trained

RunState = run_state.RunState


class Interrupted(Exception):
  """A run was asked to stop; it saved and can be continued.

  Attributes:
    signum: number of the signal.
  """

  def __init__(self, message: str, signum: int):
    super().__init__(message)
    self.signum = signum


class Diverged(ValueError):
  """The loss is no longer finite; the last good checkpoint is kept."""


class Stop(Exception):
  """A signal came while a state was in use that will not be saved."""


class Journal:
  """Files, screen, clock and signals of a run.

  Attributes:
    records: all records of the history.
  """

  def __init__(self, setup: prepare.Setup, started: float):
    """Opens the history of a run that started at a `time.monotonic()`."""
    self._setup = setup
    self._accounted = started
    self._save_time = started
    self._saved: tuple[int, ...] | None = None
    self._signals: list[int] = []
    self._warned: set[str] = set()
    self._screen = console.Console()
    self._tensorboard: Any = None
    self._history = history_lib.History(setup.workdir / 'history.jsonl')
    self.records: Sequence[history_lib.Record] = self._history.records

  def restore(self) -> RunState | None:
    """Continues from the newest good checkpoint; None without one."""
    setup = self._setup
    restored = setup.checkpoints.restore(
        lambda documents: trained.abstract_arrays(
            documents, setup.method, setup.computation.tx
        )
    )
    if restored is None:
      self._history.truncate(0, self._history.digest(0))
      return None
    for line in restored.refusals:
      self.write(f'warning: {line}')
    progress = run_state.Progress.from_documents(
        restored.documents, type(setup.policy)
    )
    known = restored.documents['history']
    self._history.truncate(known['length'], known['digest'])
    self.write(
        f'continuing {setup.workdir} from step {progress.step}, epoch '
        f'{progress.epoch}'
    )
    self._saved = _position(progress)
    arrays = restored.state
    state = setup.place(progress, arrays['state'], arrays['meters'])
    return dataclasses.replace(state, twin=arrays.get('twin'))

  def begin(self, state: RunState) -> None:
    """Opens what depends on where the run starts from."""
    self._tensorboard = tensorboard.writer(
        self._setup.workdir / 'tensorboard', resume_step=state.progress.step
    )
    if self._tensorboard is None:
      self.write(
          'no TensorBoard files: they need tensorboardX (pip install '
          "'autogrow-jax[tensorboard]')"
      )

  def write(self, text: str) -> None:
    """Shows a line."""
    self._screen.write(text)

  def warn(self, messages: Iterable[str]) -> None:
    """Shows warnings, each of them once."""
    for message in messages:
      if message not in self._warned:
        self._warned.add(message)
        self.write(f'warning: {message}')

  def record(self, state: RunState, event: str, **values: Any) -> RunState:
    """Writes a record everywhere, compilations since the last one first."""
    for done in self._setup.programs.drain():
      more = {'bytes': done.bytes, 'waited': done.waited}
      state = self._compiled(state, done.name, done.seconds, 1, **{
          name: round(value, 3)
          for name, value in more.items()
          if value is not None
      })
    return self._append(self.timed(state), event, **values)

  def compiled(
      self, state: RunState, what: str, spent: programs.Compilations
  ) -> RunState:
    """Records the compilations within something else, if there were any."""
    if not spent.count:
      return state
    return self._compiled(
        state, what, spent.seconds, spent.count, count=spent.count
    )

  def timed(self, state: RunState) -> RunState:
    """The state with the time since the last call in its ledger."""
    now = time.monotonic()
    ledger = state.progress.ledger.elapsed(now - self._accounted)
    self._accounted = now
    return state.with_progress(ledger=ledger)

  def start_epoch(self, state: RunState, done: int, shape: str) -> None:
    """Starts the bar of an epoch of which some steps are done."""
    steps = self._setup.steps_per_epoch
    self._screen.start_epoch(state.progress.epoch + 1, steps, shape, done)

  def tick(self, meters: Any) -> None:
    """Waits for a training step and moves the bar on."""
    jax.block_until_ready(meters)
    fetch = self._setup.parallel.fetch
    self._screen.update(lambda: run_state.running(fetch(meters)))

  def note_skipped(self, state: RunState) -> RunState:
    """Counts and shows the images that the feed skipped."""
    feed = self._setup.feed
    skipped, feed.damaged = feed.damaged, []
    self.warn(skipped)
    count = state.progress.skipped + len(skipped)
    return state.with_progress(skipped=count) if skipped else state

  def save(self, state: RunState) -> RunState:
    """Writes a checkpoint, unless the last one is of this very state."""
    setup, state = self._setup, self.timed(state)
    progress = state.progress
    if self._saved == _position(progress):
      return state
    canonical = state.fetch(setup.parallel)
    meters = setup.parallel.fetch(state.meters)
    twin = {} if state.twin is None else {'twin': state.twin}
    self.check_finite(
        state, (meters['loss_sum'], canonical.params, canonical.stats)
    )
    length = progress.records
    setup.checkpoints.save(
        progress.step,
        {'state': canonical, 'meters': meters} | twin,
        {
            **progress.to_documents(),
            'history': {
                'length': length, 'digest': self._history.digest(length)
            },
            'config': setup.config.to_json(),
            'preprocessing': dataclasses.asdict(setup.dataset.preprocessing),
        },
    )
    self._saved, self._save_time = _position(progress), time.monotonic()
    return state

  def maybe_save(self, state: RunState, *, at_epoch: bool) -> RunState:
    """Saves if it is time."""
    is_due = self._setup.config.checkpoints.is_due(
        epoch=state.progress.epoch if at_epoch else None,
        seconds=time.monotonic() - self._save_time,
    )
    return self.save(state) if is_due else state

  def stop_if_asked(self, state: RunState) -> None:
    """Saves and raises `Interrupted` if a signal came."""
    if not self._signals:
      return
    self.save(state)
    self._setup.checkpoints.wait()
    name = signal.Signals(self._signals[-1]).name
    progress = state.progress
    raise Interrupted(
        f'{name}: saved after epoch {progress.epoch}, step {progress.step} in '
        f'{self._setup.workdir}; the same command continues.',
        self._signals[-1],
    )

  def check_signals(self) -> None:
    """Raises `Stop` if a signal came."""
    if self._signals:
      raise Stop

  def check_finite(self, state: RunState, values: Any) -> None:
    """Raises `Diverged` unless all numbers in a tree are finite."""
    if all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(values)):
      return
    after = 'before any growth'
    for item in self.records:
      if item['event'] == 'grow':
        depths = policies.format_depths(item['depths'])
        after = f'after the growth to {depths} at epoch {item["epoch"]}'
    steps = self._setup.checkpoints.steps()
    kept = f'step {steps[-1]} is kept' if steps else 'none was written yet'
    epoch = -(-state.progress.step // self._setup.steps_per_epoch)
    raise Diverged(
        f'Training diverged in epoch {epoch}, {after}: the loss or a parameter '
        'is not finite; lower --learning_rate or set --optimizer.clip_norm. '
        f'Last good checkpoint: {kept}.'
    )

  @contextlib.contextmanager
  def catch_signals(self) -> Iterator[None]:
    """Collects SIGTERM and SIGINT; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return

    def receive(signum, frame):
      del frame
      if self._signals:
        raise KeyboardInterrupt
      self._signals.append(signum)

    previous = {
        number: signal.signal(number, receive)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
      yield
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)

  def close(self) -> None:
    """Ends everything that runs in the background, and closes the files."""
    self._setup.close()
    self._screen.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
    self._history.close()

  def _compiled(self, state, what, seconds, number, **values):
    ledger = state.progress.ledger.compiled(seconds, number)
    return self._append(
        state.with_progress(ledger=ledger),
        'compile', what=what, seconds=round(seconds, 3), **values,
    )

  def _append(self, state: RunState, event: str, **values: Any) -> RunState:
    progress = state.progress
    record = {
        'event': event,
        'epoch': progress.epoch,
        'step': progress.step,
        'depths': list(progress.architecture.depths),
        **values,
    }
    self._history.append(record)
    if self._tensorboard is not None:
      tensorboard.write(self._tensorboard, self.records[-1])
    self._screen.record(self.records[-1])
    return state.with_progress(records=progress.records + 1)


@contextlib.contextmanager
def open_for(setup: prepare.Setup, started: float) -> Iterator[Journal]:
  """The journal of a run, closed at its end, with signals caught."""
  log = Journal(setup, started)
  try:
    with log.catch_signals():
      yield log
  finally:
    log.close()


def _position(progress: run_state.Progress) -> tuple[int, ...]:
  """Tells the saved states of a run apart."""
  return progress.step, progress.epoch, progress.records
