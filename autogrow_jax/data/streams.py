"""Data that is decoded while a run goes on, because it does not fit in memory.

The training batch of step t is a pure function of a key and t, so that its
position in the stream is the step itself: nothing else needs to be saved for a
restart to continue bit for bit. The order of the examples is that of data in
memory (`pipeline.epoch_permutation`), and so is all that follows on the device.

grain calls that function ahead of time, in threads or in processes; their
number changes nothing in the batches.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from autogrow_jax.data import images as images_lib
from autogrow_jax.data import pipeline

# More do not help, as each decodes a batch of its own.
_MAX_THREADS = 16

# Images that are read at once: enough for small ones, few enough of large ones.
_CHUNK = 16


class Batch(NamedTuple):
  """What a training step needs.

  Attributes:
    images: uint8, (batch, height, width, channel).
    labels: int32, (batch,).
    damaged: what is wrong with each image that was skipped, if any.
  """

  images: np.ndarray
  labels: np.ndarray
  damaged: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """Training batches of a part of some records.

  Attributes:
    records: a split, undecoded.
    indices: which of its examples to train on.
    shape: (height, width, channel) of all images in the end.
    size: to which they are scaled and cut, in pixels; None if they have their
      shape already.
    crop: cut the images out at random, in place of their centre; only with a
      size.
    skip_damaged: take the next good example in place of a damaged one.
  """

  records: images_lib.Records
  indices: np.ndarray
  shape: tuple[int, int, int]
  size: int | None = None
  crop: bool = False
  skip_damaged: bool = False

  def __call__(
      self,
      key: jax.Array,
      first_step: int,
      batch_size: int,
      *,
      workers: int = 0,
  ) -> 'Batches':
    """Batches without end, prepared ahead of time.

    Args:
      key: decides the order of the examples and what is cut out.
      first_step: number of the first batch; all epochs have the same number of
        steps, `pipeline.steps_per_epoch`.
      batch_size: number of examples, over all devices.
      workers: processes to decode in; 0 for threads of this one.

    Returns:
      The iterator, to be closed at last.
    """
    steps = _Steps(self, _portable(key), batch_size)
    return Batches(steps, first_step, workers)

  def read(
      self, indices: Sequence[int], positions: Sequence[int], seed: int
  ) -> Iterator[np.ndarray | images_lib.Damaged]:
    """Decodes some images.

    Args:
      indices: of the examples, in `self.indices`.
      positions: where they are in the stream, from 0.
      seed: of what is cut out.

    Yields:
      uint8, (height, width, channel); what is wrong in place of a damaged one.

    Raises:
      ValueError: an image has another shape.
    """
    for start in range(0, len(indices), _CHUNK):  # Originals may be large.
      chosen = self.indices[list(indices[start : start + _CHUNK])]
      originals = images_lib.read_all(self.records, chosen)
      for offset, image in enumerate(originals):
        if isinstance(image, images_lib.Damaged):
          yield image
          continue
        if self.crop:
          rng = np.random.Philox(key=[seed, positions[start + offset]])
          image = images_lib.random_resized_crop(
              np.random.Generator(rng), image, self.size
          )
        elif self.size is not None:
          image = images_lib.fit(image, self.size)
        images_lib.check_shape(
            image, self.shape, name=f'Image {chosen[offset]} of a split'
        )
        yield image


class Batches(Iterator[Batch]):
  """Batches that grain prepares ahead of time.

  Attributes:
    ahead: how many.
  """

  def __init__(self, steps: '_Steps', first_step: int, workers: int):
    """Starts threads or processes.

    Args:
      steps: the batches.
      first_step: number of the first one to return.
      workers: number of processes, for which absl's flags must have been
        parsed; 0 for threads.
    """
    import grain  # pylint: disable=g-import-not-at-top  # Slow.

    threads = 1 if workers else _threads()
    self.ahead = 4 * workers if workers else threads + 1
    ahead = grain.MapDataset.source(steps)[first_step:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    )
    if workers:
      _start_quiet_tracker()
      ahead = ahead.mp_prefetch(
          grain.MultiprocessingOptions(workers, per_worker_buffer_size=2),
          worker_init_fn=_start_worker,
      )
    self._iterator = ahead.__iter__()
    self._iterator.start_prefetch()

  def __next__(self) -> Batch:
    try:
      return next(self._iterator)
    except RuntimeError as error:  # As by grain, of a worker process.
      raise OSError(
          f'The images can no longer be decoded: {error} A process dies where '
          'memory or /dev/shm, through which batches go, is too small; take '
          'fewer --decode_workers, or 0 for threads.'
      ) from error

  def close(self) -> None:
    """Ends threads and processes."""
    if self._iterator is not None:
      self._iterator.close()
      # What is left in grain's buffers is shared memory, which is returned when
      # it is collected, and missed when the program ends.
      self._iterator = None
      gc.collect()


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
  """The batches of a stream by their step, as a source for grain."""

  stream: Stream
  key_data: tuple[str, tuple[int, ...]]
  batch_size: int

  def __len__(self) -> int:
    return np.iinfo(np.int32).max  # As many steps as a state can count.

  def __getitem__(self, step: int) -> Batch:
    stream, size = self.stream, self.batch_size
    count = len(stream.indices)
    epoch, step_in_epoch = divmod(
        int(step), pipeline.steps_per_epoch(count, size)
    )
    order = _permutation(self.key_data, epoch, count)
    indices = pipeline.batch_indices(order, step_in_epoch, size).copy()
    positions = int(step) * size + np.arange(size)
    _, words = self.key_data
    seed = (words[0] << 32) + words[-1]
    images = np.empty((size, *stream.shape), np.uint8)
    damaged: list[str] = []
    missing = np.arange(size)
    for _ in range(count):
      read = stream.read(indices[missing], positions[missing], seed)
      bad = []
      for number, image in zip(missing, read, strict=True):
        if not isinstance(image, images_lib.Damaged):
          images[number] = image
        elif stream.skip_damaged:
          bad.append(number)
          damaged.append(str(image))
        else:
          raise image
      if not bad:
        labels = stream.records.labels[stream.indices[indices]]
        return Batch(images, labels, tuple(damaged))
      missing = np.array(bad)
      indices[missing] = (indices[missing] + 1) % count
    raise ValueError(f'All {count} training images are damaged.')


class LazyImages:
  """Images of a split that are decoded when they are asked for.

  In place of a uint8 array (example, height, width, channel). Whoever asks for
  one slice after the other finds the next one decoded.

  Attributes:
    shape: of that array.
    dtype: uint8.
    damaged: position -> what is wrong, of all damaged images met so far; they
      are black. Empty unless damaged images are skipped.
  """

  dtype = np.dtype(np.uint8)
  ndim = 4

  def __init__(
      self,
      records: images_lib.Records,
      indices: np.ndarray,
      *,
      shape: tuple[int, int, int],
      size: int | None = None,
      skip_damaged: bool = False,
  ):
    """Wraps a part of some records.

    Args:
      records: a split, undecoded.
      indices: which of its examples.
      shape: (height, width, channel) of an image, once it has the size.
      size: to scale and cut the images to, in pixels; None if all have one
        size already.
      skip_damaged: make damaged images black, and remember them.
    """
    self.shape = (len(indices), *shape)
    self.damaged: dict[int, str] = {}
    self._stream = Stream(records, indices, shape=shape, size=size)
    self._skip_damaged = skip_damaged
    self._ahead: tuple[range, list[futures.Future]] = (range(0), [])

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index: slice | Sequence[int] | np.ndarray | int) -> Any:
    if not isinstance(index, slice):
      positions = np.arange(len(self))[index]
      return self._decode(positions.reshape(-1).tolist()).reshape(
          *positions.shape, *self.shape[1:]
      )
    positions = range(len(self))[index]
    expected, tasks = self._ahead
    if positions != expected:
      for task in tasks:
        task.cancel()
      tasks = self._start(positions)
    step = positions.step
    length = len(positions) * step
    following = range(
        positions.start + length,
        max(0, min(positions.stop + length, len(self))),
        step,
    )
    self._ahead = following, self._start(following)
    return self._finish(positions, tasks)

  def take(self, indices: np.ndarray) -> Self:
    """A part of them, not decoded either."""
    return type(self)(
        self._stream.records,
        self._stream.indices[indices],
        shape=self.shape[1:],
        size=self._stream.size,
        skip_damaged=self._skip_damaged,
    )

  def _decode(self, positions: Sequence[int]) -> np.ndarray:
    return self._finish(positions, self._start(positions))

  def _start(self, positions: Sequence[int]) -> list[futures.Future]:
    read = lambda part: list(self._stream.read(part, part, 0))
    return [
        self._executor.submit(read, positions[start : start + _CHUNK])
        for start in range(0, len(positions), _CHUNK)
    ]

  def _finish(
      self, positions: Sequence[int], tasks: list[futures.Future]
  ) -> np.ndarray:
    images = np.zeros((len(positions), *self.shape[1:]), np.uint8)
    found = (image for task in tasks for image in task.result())
    for number, image in enumerate(found):
      if not isinstance(image, images_lib.Damaged):
        images[number] = image
      elif self._skip_damaged:
        self.damaged[int(positions[number])] = str(image)
      else:
        raise image
    return images

  @functools.cached_property
  def _executor(self) -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(_threads(), 'decode')


def _threads() -> int:
  return min(_MAX_THREADS, os.cpu_count() or 1)


def _portable(key: jax.Array) -> tuple[str, tuple[int, ...]]:
  """A key as plain values, which another process can have."""
  words = np.asarray(jax.random.key_data(key)).tolist()
  return str(jax.random.key_impl(key)), tuple(words)


@functools.lru_cache(maxsize=4)
def _permutation(
    key_data: tuple[str, tuple[int, ...]], epoch: int, count: int
) -> np.ndarray:
  """Order of the examples in an epoch."""
  implementation, words = key_data
  key = jax.random.wrap_key_data(
      np.array(words, np.uint32), impl=implementation
  )
  return np.asarray(pipeline.epoch_permutation(key, epoch, count))


def _start_quiet_tracker() -> None:
  """Starts Python's tracker of shared memory, which inherits its filter.

  It would warn at the end of blocks that grain has returned already.
  """
  name, quiet = 'PYTHONWARNINGS', 'ignore:resource_tracker:UserWarning'
  known = os.environ.get(name)
  os.environ[name] = f'{known},{quiet}' if known else quiet
  try:
    multiprocessing.resource_tracker.ensure_running()
  finally:
    if known is None:
      del os.environ[name]
    else:
      os.environ[name] = known


def _start_worker(number: int, count: int) -> None:
  """Prepares a worker process."""
  del number, count
  # The order of the examples is drawn by JAX, which must leave the accelerators
  # to the main process.
  jax.config.update('jax_platforms', 'cpu')
  for number in (signal.SIGINT, signal.SIGTERM):  # Sent to the whole group.
    signal.signal(number, signal.SIG_IGN)  # The main process will stop us.
  threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
  """Ends this process when its parent was killed, and could not."""
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)
