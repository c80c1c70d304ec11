"""Feeds: what a training step takes from the data, on the devices.

Data in memory is put on the devices as a whole, and a step gets indices into
it. Of a stream a step gets the batch itself: a thread puts it on the devices
while the steps before it run, and goes on doing so through evaluations and
across the ends of epochs. Either is asked for a step by its number, so that it
needs no state that a restart could lose.
"""

import queue
import threading
import time
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from autogrow_jax import data
from autogrow_jax.run import parallel as parallel_lib

# Batches that wait on the devices; another one is on its way.
_AHEAD = 1

_POLL_SECONDS = 0.2


class Examples(NamedTuple):
  """What `programs.train_step` takes.

  Attributes:
    images: uint8 (examples, height, width, channel), or int32 (examples, step),
      on the devices.
    labels: int32 (examples, ...), on the devices.
    rows: int32 (batch,), those of the batch; None if all are; of several steps
      (steps, batch), with -1 after the end of an epoch.
  """

  images: jax.Array
  labels: jax.Array
  rows: jax.Array | None


class Feed(Protocol):
  """Where training steps get their examples from.

  Attributes:
    waited: seconds for which the devices had nothing to do because a batch was
      not there yet; whoever reads them sets them to zero.
    damaged: what is wrong with each image that was skipped; likewise.
    held: arrays that the devices hold all the time.
    steps_per_call: training steps that `take` gives examples for; the last call
      of an epoch may hold fewer, filled up with rows of -1.
  """

  waited: float
  damaged: list[str]
  held: Any
  steps_per_call: int

  def take(self, step: int, running: Any = None) -> Examples:
    """The examples of a step, and of those that are given with it.

    Args:
      step: from 0, over all epochs.
      running: results of the last step that was started, None if it has ended.

    Returns:
      The examples.
    """

  def close(self) -> None:
    """Ends all that runs in the background."""


def make(
    dataset: data.Dataset,
    parallel: parallel_lib.Parallel,
    *,
    key: jax.Array,
    batch_size: int,
    workers: int = 0,
    steps_per_call: int = 1,
) -> Feed:
  """The feed for a data set.

  Args:
    dataset: in memory or streamed.
    parallel: where batches go.
    key: decides the order of the examples.
    batch_size: number of examples, over all devices.
    workers: processes that decode a stream; 0 for threads.
    steps_per_call: to give examples for at a time; at most an epoch, of a
      stream 1.

  Returns:
    The feed.
  """
  kind = _InMemory if dataset.stream is None else _Streamed
  return kind(dataset, parallel, key, batch_size, workers, steps_per_call)


def order(
    dataset: data.Dataset, key: jax.Array, epoch: int, batch_size: int
) -> np.ndarray:
  """Order of the training examples in an epoch: random, but that of a text."""
  examples = len(dataset.train.labels)
  if dataset.is_text:
    return data.epoch_in_order(examples, batch_size)
  return np.asarray(data.epoch_permutation(key, epoch, examples))


def place_index(
    parallel: parallel_lib.Parallel, rows: np.ndarray
) -> jax.Array:
  """The indices of a call, int32 (steps, batch), as `Examples` has them."""
  if len(rows) == 1:
    return parallel.shard(rows[0])
  return parallel.shard(rows, dim=1)


class _InMemory:
  """A training set that the devices hold."""

  def __init__(
      self, dataset, parallel, key, batch_size, workers, steps_per_call
  ):
    del workers
    self.waited = 0.0
    self.damaged: list[str] = []
    self._parallel, self._key, self._size = parallel, key, batch_size
    self._dataset, train = dataset, dataset.train
    self._steps_per_epoch = len(train.labels) // batch_size
    self.held = parallel.replicate((train.images, train.labels))
    self._epoch, self._permutation = -1, None
    self.steps_per_call = min(steps_per_call, self._steps_per_epoch)

  def take(self, step: int, running: Any = None) -> Examples:
    del running
    epoch, first = divmod(step, self._steps_per_epoch)
    if epoch != self._epoch:
      self._epoch = epoch
      self._permutation = order(self._dataset, self._key, epoch, self._size)
    chosen = np.full((self.steps_per_call, self._size), -1, np.int32)
    end = min(first + self.steps_per_call, self._steps_per_epoch)
    for row, index in enumerate(range(first, end)):
      chosen[row] = data.batch_indices(self._permutation, index, self._size)
    images, labels = self.held
    return Examples(images, labels, place_index(self._parallel, chosen))

  def close(self) -> None:
    pass


class _Streamed:
  """A training set that is decoded while it is needed."""

  def __init__(
      self, dataset, parallel, key, batch_size, workers, steps_per_call
  ):
    del steps_per_call
    self.steps_per_call = 1
    self.waited = 0.0
    self.damaged: list[str] = []
    self.held = ()
    self._parallel = parallel
    self._open = lambda step: dataset.stream(
        key, step, batch_size, workers=workers
    )
    self._next: int | None = None
    self._thread: threading.Thread | None = None

  def take(self, step: int, running: Any = None) -> Examples:
    if step != self._next:
      self._restart(step)
    if self._ready.empty() and running is not None:
      jax.block_until_ready(running)  # The devices are busy until here.
    started = time.perf_counter()
    item = self._ready.get()
    self.waited += time.perf_counter() - started
    if isinstance(item, BaseException):
      self.close()
      raise item
    self._next = step + 1
    examples, damaged = item
    self.damaged += damaged
    return examples

  def close(self) -> None:
    if self._thread is not None:
      self._stop.set()
      self._thread.join()
      self._thread, self._next = None, None

  def _restart(self, step: int) -> None:
    self.close()
    self._next = step
    self._stop = threading.Event()
    self._ready: queue.Queue[Any] = queue.Queue(_AHEAD)
    self._thread = threading.Thread(
        target=self._run, args=(step,), name='feed', daemon=True
    )
    self._thread.start()

  def _run(self, first_step: int) -> None:
    batches = None
    try:
      batches = self._open(first_step)
      while not self._stop.is_set():
        images, labels, damaged = next(batches)
        placed = self._parallel.shard((images, labels))
        self._hand_over((Examples(placed[0], placed[1], None), damaged))
    except BaseException as error:  # pylint: disable=broad-exception-caught
      self._hand_over(error)  # Raised where it can be handled.
    finally:
      if batches is not None:
        batches.close()

  def _hand_over(self, item: Any) -> None:
    while not self._stop.is_set():
      try:
        return self._ready.put(item, timeout=_POLL_SECONDS)
      except queue.Full:
        pass
