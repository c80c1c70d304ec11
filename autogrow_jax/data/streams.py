"""Images that are decoded when they are needed.

The training batch of step t is a pure function of a key and t, so that its
position in the stream is the step itself: nothing else needs to be saved for a
restart to continue bit for bit. The order of the examples is that of data in
memory (`pipeline.epoch_permutation`), and so is all that follows on the device.

grain calls that function ahead of time, in threads or in processes; their
number changes nothing in the batches.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent import futures
import dataclasses
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from typing import Any, NamedTuple

import jax
import numpy as np

from autogrow_jax.data import extras
from autogrow_jax.data import images as images_lib
from autogrow_jax.data import pipeline

_THREADS = min(16, os.cpu_count() or 1)  # Each decodes a batch of its own.
_CHUNK = 16  # Images per read: enough for small ones, few of large ones.

_QUIET = 'ignore:resource_tracker:UserWarning'


class Batch(NamedTuple):
  """Examples of a training step.

  Attributes:
    images: uint8, (batch, height, width, channel).
    labels: int32, (batch,).
    damaged: what is wrong with each image that was skipped.
  """

  images: np.ndarray
  labels: np.ndarray
  damaged: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """A part of some records, decoded on demand.

  Attributes:
    records: a split, undecoded.
    indices: numbers of the part's examples in `records`.
    shape: (height, width, channel) of all images in the end.
    fit: brings an image to the height and width of `shape`; can be pickled;
      None if all images have them.
    crop: take random resized crops for training in place of `fit`.
    skip_damaged: train on the next good example in place of a damaged one;
      elsewhere a damaged image is black.
  """

  records: images_lib.Records
  indices: np.ndarray
  shape: tuple[int, int, int]
  fit: Callable[[np.ndarray], np.ndarray] | None = None
  crop: bool = False
  skip_damaged: bool = False

  def __call__(
      self,
      key: jax.Array,
      first_step: int,
      batch_size: int,
      *,
      workers: int = 0,
  ) -> Generator[Batch, None, None]:
    """Yields training batches without end, prepared ahead of time.

    Args:
      key: decides the order of the examples and the crops.
      first_step: number of the first batch, over all epochs.
      batch_size: number of examples, over all devices.
      workers: number of processes to decode in, for which absl's flags must
        have been parsed; 0 for threads.
    """
    grain = extras.load('grain', 'Decoding images while training needs grain')
    words = tuple(np.asarray(jax.random.key_data(key)).tolist())
    key_data = str(jax.random.key_impl(key)), words
    threads = 1 if workers else _THREADS
    steps = grain.MapDataset.source(_Steps(self, key_data, batch_size))
    ahead = steps[first_step:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    )
    if workers:
      # Python's tracker of shared memory inherits it; it would warn at the end,
      # of blocks that grain has returned already.
      known = os.environ.get('PYTHONWARNINGS', '')
      if _QUIET not in known:
        os.environ['PYTHONWARNINGS'] = f'{known},{_QUIET}'.lstrip(',')
      ahead = ahead.mp_prefetch(
          grain.MultiprocessingOptions(workers, per_worker_buffer_size=2),
          worker_init_fn=_start_worker,
      )
    batches = iter(ahead)
    try:
      while True:
        yield next(batches)
    except RuntimeError as error:  # From grain, about a worker process.
      raise OSError(
          f'The images can no longer be decoded: {error} A process dies where '
          'memory or /dev/shm, through which batches go, is too small; take '
          'fewer --devices.decode_workers, or 0 for threads.'
      ) from error
    finally:
      batches.close()
      del batches  # With shared memory, which is missed unless it is collected.
      gc.collect()

  def read(
      self,
      indices: np.ndarray,
      crops: Sequence[np.random.Philox] | None = None,
  ) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes images.

    Args:
      indices: positions in `self.indices`.
      crops: for each, the random bits of its crop; None to use `fit`.

    Returns:
      uint8, (index, *shape), and what is wrong with those that are damaged, by
      their number; they are black.
    """
    result = np.zeros((len(indices), *self.shape), np.uint8)
    damaged = {}
    for start in range(0, len(indices), _CHUNK):  # Originals may be large.
      chosen = self.indices[indices[start : start + _CHUNK]].tolist()
      originals = images_lib.read_all(self.records, chosen)
      for number, image in enumerate(originals, start):
        if isinstance(image, images_lib.Damaged):
          if not self.skip_damaged:
            raise image
          damaged[number] = str(image)
          continue
        if crops is not None:
          rng = np.random.Generator(crops[number])
          image = images_lib.random_resized_crop(rng, image, self.shape[0])
        elif self.fit is not None:
          image = self.fit(image)
        if image.shape != self.shape:
          raise ValueError(
              f'Image {chosen[number - start]} of a split has the shape '
              f'{image.shape}, not {self.shape}; give a size for all with '
              '--data.image_size.'
          )
        result[number] = image
    return result, damaged


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
  """The batches of a stream by their step, as a source for grain."""

  stream: Stream
  key_data: tuple[str, tuple[int, ...]]  # Which another process can have.
  batch_size: int

  def __len__(self) -> int:
    return np.iinfo(np.int32).max  # As many steps as a state can count.

  def __getitem__(self, step: int) -> Batch:
    stream, size = self.stream, self.batch_size
    count = len(stream.indices)
    steps = pipeline.steps_per_epoch(count, size)
    epoch, step_in_epoch = divmod(int(step), steps)
    order = _permutation(self.key_data, epoch, count)
    indices = pipeline.batch_indices(order, step_in_epoch, size).copy()
    words, crops = self.key_data[1], None
    images = np.empty((size, *stream.shape), np.uint8)
    damaged: list[str] = []
    missing = np.arange(size)
    for _ in range(count):
      if stream.crop:
        seed = (words[0] << 32) + words[-1]
        places = int(step) * size + missing
        crops = [np.random.Philox(key=[seed, place]) for place in places]
      images[missing], bad = stream.read(indices[missing], crops)
      damaged += bad.values()
      if not bad:
        labels = stream.records.labels[stream.indices[indices]]
        return Batch(images, labels, tuple(damaged))
      missing = missing[list(bad)]
      indices[missing] = (indices[missing] + 1) % count
    raise ValueError(f'All {count} training images are damaged.')


class LazyImages:
  """Stands for a uint8 array (example, ...), and decodes what is asked for.

  Whoever asks for one slice after the other finds the next one decoded.

  Attributes:
    shape: shape of that array.
    damaged: position -> what is wrong, for all damaged images met so far; they
      are black. Empty unless damaged images are skipped.
  """

  dtype = np.dtype(np.uint8)
  ndim = 4

  def __init__(self, stream: Stream):
    self.shape = (len(stream.indices), *stream.shape)
    self.damaged: dict[int, str] = {}
    self._stream = stream
    self._ahead: dict[bytes, list[futures.Future]] = {}

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index: Any) -> np.ndarray:
    positions = np.arange(len(self))[index]
    tasks = self._ahead.pop(positions.tobytes(), None)
    tasks = self._start(positions.ravel()) if tasks is None else tasks
    self._ahead = {}
    if isinstance(index, slice):
      following = positions + len(positions) * (index.step or 1)
      following = following[following < len(self)]
      self._ahead[following.tobytes()] = self._start(following)
    images = np.empty((positions.size, *self.shape[1:]), np.uint8)
    for number, task in enumerate(tasks):
      part = slice(number * _CHUNK, (number + 1) * _CHUNK)
      images[part], bad = task.result()
      where = positions.ravel()[part].tolist()
      self.damaged |= {where[place]: what for place, what in bad.items()}
    return images.reshape(*positions.shape, *self.shape[1:])

  def _start(self, positions: np.ndarray) -> list[futures.Future]:
    cuts = range(_CHUNK, len(positions), _CHUNK)
    parts = np.split(positions, cuts) if len(positions) else []
    return [self._executor.submit(self._stream.read, part) for part in parts]

  @functools.cached_property
  def _executor(self) -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(_THREADS, 'decode')


@functools.lru_cache(maxsize=4)
def _permutation(
    key_data: tuple[str, tuple[int, ...]], epoch: int, count: int
) -> np.ndarray:
  kind, words = key_data
  key = jax.random.wrap_key_data(np.array(words, np.uint32), impl=kind)
  return np.asarray(pipeline.epoch_permutation(key, epoch, count))


def _start_worker(number: int, count: int) -> None:
  """Prepares a worker process for what grain leaves to its users."""
  del number, count
  # JAX draws the order of the examples; accelerators are the main process's.
  jax.config.update('jax_platforms', 'cpu')
  for number in (signal.SIGINT, signal.SIGTERM):  # Sent to the whole group.
    signal.signal(number, signal.SIG_IGN)  # The main process will stop us.
  threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
  """Ends this process when its parent was killed, and could not."""
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)
