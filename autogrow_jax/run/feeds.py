"""Feeds: what a training step takes from the data, on the devices.

Data in memory is put on the devices as a whole, and a step gets indices into
it. Of a stream a step gets the batch itself: a thread puts it on the devices
while the steps before it run, and goes on doing so through evaluations and
across the ends of epochs. Either is asked for a step by its number, so that it
needs no state that a restart could lose.
"""

import abc
import collections
from concurrent import futures
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from autogrow_jax import data
from autogrow_jax.run import parallel as parallel_lib

# Batches that wait on the devices, or are on their way.
_AHEAD = 2


class Examples(NamedTuple):
  """Examples of a training step, on the devices.

  Attributes:
    images: uint8 (examples, height, width, channel), or int32 (examples, step),
      on the devices.
    labels: int32 (examples, ...), on the devices.
    rows: int32 (batch,), those of the batch; None if all are.
  """

  images: jax.Array
  labels: jax.Array
  rows: jax.Array | None


class Feed(abc.ABC):
  """Source of the examples of training steps.

  Attributes:
    waited: seconds for which the devices had nothing to do because a batch was
      not there yet; whoever reads them sets them to zero.
    damaged: reasons of the images that were skipped; likewise.
  """

  def __init__(self):
    self.waited = 0.0
    self.damaged: list[str] = []

  @abc.abstractmethod
  def take(self, step: int, running: Any = None) -> Examples:
    """The examples of a step.

    Args:
      step: number of the step, from 0, over all epochs.
      running: results of the last step that was started, None if it has ended.
    """

  def close(self) -> None:
    """Ends everything that runs in the background."""


def make(
    dataset: data.Dataset,
    parallel: parallel_lib.Parallel,
    *,
    key: jax.Array,
    batch_size: int,
    workers: int = 0,
) -> Feed:
  """The feed for a data set, in memory or streamed.

  Args:
    dataset: the data.
    parallel: placement of the examples.
    key: key of the order of the examples.
    batch_size: number of examples, over all devices.
    workers: processes that decode a stream; 0 for threads.
  """
  if dataset.stream is None:
    return _InMemory(dataset, parallel, key, batch_size)
  return _Streamed(dataset, parallel, key, batch_size, workers)


def order(
    dataset: data.Dataset, key: jax.Array, epoch: int, batch_size: int
) -> np.ndarray:
  """Order of the training examples in an epoch: random, but that of a text."""
  examples = len(dataset.train.labels)
  if dataset.is_text:
    return data.epoch_in_order(examples, batch_size)
  return np.asarray(data.epoch_permutation(key, epoch, examples))


class _InMemory(Feed):
  """A training set that the devices hold."""

  def __init__(self, dataset, parallel, key, batch_size):
    super().__init__()
    train = dataset.train
    self._steps_per_epoch = len(train.labels) // batch_size
    self._parallel, self._size = parallel, batch_size
    self._order = lambda epoch: order(dataset, key, epoch, batch_size)
    self._held = parallel.replicate((train.images, train.labels))
    self._epoch, self._permutation = -1, None

  def take(self, step: int, running: Any = None) -> Examples:
    del running
    epoch, index = divmod(step, self._steps_per_epoch)
    if epoch != self._epoch:
      self._epoch, self._permutation = epoch, self._order(epoch)
    rows = data.batch_indices(self._permutation, index, self._size)
    images, labels = self._held
    rows = self._parallel.shard(rows.astype(np.int32))
    return Examples(images, labels, rows)


class _Streamed(Feed):
  """A training set that is decoded while it is needed."""

  def __init__(self, dataset, parallel, key, batch_size, workers):
    super().__init__()
    self._parallel = parallel
    self._open = lambda step: dataset.stream(
        key, step, batch_size, workers=workers
    )
    self._next: int | None = None
    self._thread: Any = None  # An executor with one thread.
    self._batches: Any = None

  def take(self, step: int, running: Any = None) -> Examples:
    if step != self._next:
      self._restart(step)
    ready = self._ready.popleft()
    if not ready.done() and running is not None:
      jax.block_until_ready(running)  # The devices are busy until here.
    started = time.perf_counter()
    examples, damaged = ready.result()
    self.waited += time.perf_counter() - started
    self.damaged += damaged
    self._next = step + 1
    self._ready.append(self._thread.submit(self._place, step))
    return examples

  def close(self) -> None:
    if self._thread is not None:
      self._thread.shutdown(cancel_futures=True)
    if self._batches is not None:
      self._batches.close()
    self._thread = self._batches = self._next = None

  def _restart(self, step: int) -> None:
    self.close()
    self._thread = futures.ThreadPoolExecutor(1, 'feed')
    self._ready = collections.deque(
        self._thread.submit(self._place, step) for _ in range(_AHEAD)
    )

  def _place(self, first_step: int) -> tuple[Examples, list[str]]:
    """The next batch on the devices; runs in the thread."""
    if self._batches is None:
      self._batches = self._open(first_step)
    images, labels, damaged = next(self._batches)
    images, labels = self._parallel.shard((images, labels))
    return Examples(images, labels, None), damaged
