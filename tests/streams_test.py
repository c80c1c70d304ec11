"""Tests of streams: batches, lazy images, feeds, and whole runs on a stream."""

import contextlib
import io
import os
import pathlib
import pickle
import re
import signal
import tempfile
import threading
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest
import jax
import jax.numpy as jnp
import numpy as np
import runs
import tiny_images

from autogrow_jax.run import checkpoint
from autogrow_jax import data
from autogrow_jax import tasks
from autogrow_jax.run import feeds
from autogrow_jax.run import console
from autogrow_jax.run import parallel
from autogrow_jax.run import growing
from autogrow_jax.run import train
from autogrow_jax.data import streams

KEY = jax.random.key(7)
SHAPE = (6, 5, 3)
STREAMED = {'data': {'stream': 'always'}}


class Noise:
  """`data.Records` of noise, some of them damaged."""

  def __init__(self, examples=40, *, damaged=(), shape=SHAPE):
    generator = np.random.default_rng(0)
    self.pixels = generator.integers(0, 256, (examples, *shape), np.uint8)
    self.labels = np.arange(examples, dtype=np.int32) % 4
    self.damaged = damaged

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    if index in self.damaged:
      raise data.Damaged(f'Image {index} cannot be read.')
    return self.pixels[index]


def part_of(records):
  """Indices of a training part: all but every fifth."""
  return np.flatnonzero(np.arange(len(records)) % 5)


def stream_of(records, **options):
  return streams.Stream(records, part_of(records), shape=SHAPE, **options)


def lazy(records, **options):
  return streams.LazyImages(stream_of(records, **options))


def batches_of(stream, first_step, count, batch_size=8, **options):
  batches = stream(KEY, first_step, batch_size, **options)
  with contextlib.closing(batches):
    return [next(batches) for _ in range(count)]


def expected(records, step, batch_size=8):
  """What data in memory would give."""
  part = part_of(records)
  epoch, index = divmod(step, len(part) // batch_size)
  order = np.asarray(data.epoch_permutation(KEY, epoch, len(part)))
  chosen = part[data.batch_indices(order, index, batch_size)]
  return records.pixels[chosen], records.labels[chosen]


class StreamTest(parameterized.TestCase):

  @parameterized.parameters(0, 3, 4, 9)
  def test_is_in_the_order_of_data_in_memory(self, first_step):
    records = Noise()
    batches = batches_of(stream_of(records), first_step, 6)
    for number, batch in enumerate(batches):
      pixels, labels = expected(records, first_step + number)
      np.testing.assert_array_equal(batch.images, pixels)
      np.testing.assert_array_equal(batch.labels, labels)
      self.assertEqual(batch.labels.dtype, np.int32)
      self.assertEqual(batch.damaged, ())

  def test_crops_depend_on_key_and_position_only(self):
    records = Noise(shape=(50, 40, 3))
    stream = streams.Stream(
        records, part_of(records), shape=(16, 16, 3), crop=True
    )
    all_ = batches_of(stream, 0, 9)
    for first, other in zip(all_[5:], batches_of(stream, 5, 4), strict=True):
      np.testing.assert_array_equal(first.images, other.images)
    # Crops, in the order of the stream, that differ from epoch to epoch.
    order = np.asarray(data.epoch_permutation(KEY, 0, 32))
    by_index = {}
    for step, batch in enumerate(all_[:8]):
      order = np.asarray(data.epoch_permutation(KEY, step // 4, 32))
      chosen = data.batch_indices(order, step % 4, 8)
      np.testing.assert_array_equal(
          batch.labels, records.labels[part_of(records)[chosen]]
      )
      for index, image in zip(chosen.tolist(), batch.images, strict=True):
        self.assertEqual(image.shape, (16, 16, 3))
        by_index.setdefault(index, []).append(image)
    self.assertLen(by_index, 32)
    self.assertGreater(
        sum(not np.array_equal(*both) for both in by_index.values()), 30
    )

  def test_replaces_damaged_images_by_the_next(self):
    part = part_of(Noise()).tolist()
    bad = [part[-1], part[0], part[9]]  # The first follows the last.
    records = Noise(damaged=bad)
    skipped = []
    for step, batch in enumerate(
        batches_of(stream_of(records, skip_damaged=True), 0, 4)
    ):
      order = np.asarray(data.epoch_permutation(KEY, 0, 32))
      for image, label, index in zip(
          batch.images,
          batch.labels,
          data.batch_indices(order, step, 8).tolist(),
          strict=True,
      ):
        while part[index] in bad:
          index = (index + 1) % 32
        np.testing.assert_array_equal(image, records.pixels[part[index]])
        self.assertEqual(label, records.labels[part[index]])
      skipped += batch.damaged
    # The last one is skipped for itself, and so is the one after it.
    self.assertCountEqual(
        skipped,
        [
            f'Image {index} cannot be read.'
            for index in (part[-1], part[0], part[0], part[9])
        ],
    )

  def test_names_a_damaged_image(self):
    records = Noise(damaged=[11])
    with self.assertRaisesRegex(data.Damaged, 'Image 11 cannot be read'):
      batches_of(stream_of(records), 0, 4)
    with self.assertRaisesRegex(data.Damaged, 'Image 11 cannot be read'):
      lazy(records)[:]

  def test_all_are_damaged(self):
    stream = stream_of(Noise(damaged=range(40)), skip_damaged=True)
    with self.assertRaisesRegex(ValueError, 'All 32 training images are dam'):
      batches_of(stream, 0, 1)

  def test_refuses_other_shapes(self):
    stream = streams.Stream(Noise(), np.arange(40), shape=(9, 9, 3))
    with self.assertRaisesRegex(ValueError, r'shape \(6, 5, 3\), not \(9, 9'):
      batches_of(stream, 0, 1)

  def test_leaves_no_thread(self):
    batches = stream_of(Noise())(KEY, 0, 8)
    next(batches)
    self.assertNotEmpty(background_threads())
    batches.close()
    wait_until(lambda: not background_threads())

  def test_processes(self):
    records = Noise(damaged=[11])
    stream = stream_of(records, skip_damaged=True)
    for one, other in zip(
        batches_of(stream, 2, 5),
        batches_of(stream, 2, 5, workers=2),
        strict=True,
    ):
      np.testing.assert_array_equal(one.images, other.images)
      np.testing.assert_array_equal(one.labels, other.labels)
      self.assertEqual(one.damaged, other.damaged)

  def test_a_worker_process_names_a_damaged_image(self):
    self.assertEqual(str(pickle.loads(pickle.dumps(data.Damaged('x')))), 'x')
    stream = stream_of(Noise(damaged=[11]))
    with self.assertRaisesRegex(data.Damaged, 'Image 11 cannot be read'):
      batches_of(stream, 0, 4, workers=1)

  def test_a_worker_process_dies(self):
    class Deadly(Noise):

      def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    with self.assertRaisesRegex(OSError, 'can no longer be decoded'):
      batches_of(stream_of(Deadly()), 0, 1, workers=1)


class LazyImagesTest(absltest.TestCase):

  def test_is_like_an_array(self):
    records = Noise()
    array, images_ = records.pixels[part_of(records)], lazy(records)
    self.assertEqual(
        (images_.shape, images_.dtype, images_.ndim, len(images_)),
        (array.shape, array.dtype, array.ndim, len(array)),
    )
    for index in (
        slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 40), slice(30, 33),
        slice(None), slice(3, 3), slice(None, 9, 2), slice(-5, None), 4,
        np.array([7, 1, 1]), [5, 2], np.arange(32) % 3 == 0,
    ):
      np.testing.assert_array_equal(images_[index], array[index])
    self.assertEqual(images_[3:3].dtype, np.uint8)

  def test_reads_the_next_slice_ahead_and_nothing_twice(self):
    read = []

    class Watched(Noise):

      def __getitem__(self, index):
        read.append(index)
        return super().__getitem__(index)

    records = Watched()
    images_, part = lazy(records), part_of(records).tolist()
    images_[:8]
    wait_until(lambda: len(read) == 16)  # Without anybody asking for it.
    self.assertCountEqual(read, part[:16])
    for start in range(8, 32, 8):
      images_[start : start + 8]
    self.assertCountEqual(read, part)

  def test_scores_as_in_memory(self):
    records = Noise()
    part = part_of(records)

    def forward(pixels):
      return pixels.reshape(len(pixels), -1)[:, :4].astype(np.float32)

    in_memory = data.Split(records.pixels[part], records.labels[part])
    streamed = data.Split(lazy(records), records.labels[part])
    score = lambda split: tasks.Classes().score(forward, split, 5)
    one, other = score(streamed), score(in_memory)
    self.assertEqual(
        (one.correct, one.loss_sum), (other.correct, other.loss_sum)
    )
    # Without two of them.
    bad = [int(part[4]), int(part[30])]
    broken = Noise(damaged=bad)
    streamed = data.Split(lazy(broken, skip_damaged=True), records.labels[part])
    keep = np.delete(np.arange(32), [4, 30])
    for _ in range(2):
      got, want = score(streamed), score(in_memory.take(keep))
      self.assertAlmostEqual(got.loss_sum, want.loss_sum, places=9)
      self.assertEqual(
          (got.correct, got.total, got.hits.tolist()),
          (want.correct, 30, want.hits.tolist()),
      )
    self.assertEqual(
        streamed.damaged,
        {4: f'Image {bad[0]} cannot be read.',
         30: f'Image {bad[1]} cannot be read.'},
    )
    nothing = lazy(Noise(damaged=range(40)), skip_damaged=True)
    with self.assertRaisesRegex(ValueError, 'All 32 images are damaged'):
      score(data.Split(nothing, records.labels[part]))


class FeedTest(parameterized.TestCase):

  def feed(self, mode, records, *, streamed=True, batch_size=16):
    part = part_of(records)
    split = data.Split(records.pixels[part], records.labels[part])
    dataset = mock.Mock(
        stream=stream_of(records) if streamed else None,
        train=split,
        is_text=False,
    )
    placement = parallel.make(mode, 1 if mode == 'auto' else 8)
    feed = feeds.make(
        dataset,
        placement,
        key=KEY,
        batch_size=batch_size,
    )
    self.addCleanup(feed.close)
    return feed, placement

  @parameterized.parameters('auto', 'pmap', 'jit')
  def test_gives_the_batch_of_the_step(self, mode):
    records = Noise()
    feed, placement = self.feed(mode, records)
    known, _ = self.feed(mode, records, streamed=False)
    for step in (0, 1, 2, 3, 9, 10, 2):  # With jumps, as after a restart.
      pixels, labels = expected(records, step, 16)
      examples = feed.take(step)
      self.assertIsNone(examples.rows)
      np.testing.assert_array_equal(placement.gather(examples.images), pixels)
      np.testing.assert_array_equal(placement.gather(examples.labels), labels)
      everything = known.take(step)
      chosen = placement.gather(everything.rows)
      np.testing.assert_array_equal(
          placement.fetch(everything.images)[chosen], pixels
      )
      if mode != 'auto':  # A share for each device.
        shards = examples.labels.addressable_shards
        self.assertEqual([shard.data.size for shard in shards], [2] * 8)
        for number, shard in enumerate(shards):
          np.testing.assert_array_equal(
              np.ravel(shard.data), labels[2 * number : 2 * number + 2]
          )

  def test_next_batches_are_on_the_devices_before_they_are_asked_for(self):
    feed, placement = self.feed('auto', Noise())
    placed = []
    shard = parallel.Parallel.shard

    def watch(self, tree):
      placed.append(threading.current_thread())
      return shard(self, tree)

    with mock.patch.object(parallel.Parallel, 'shard', watch):
      feed.take(0)
      wait_until(lambda: len(placed) == 3)
    self.assertNotIn(threading.current_thread(), placed)
    del placement

  def test_counts_only_what_the_devices_wait_for(self):
    class Slow(Noise):

      def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)

    with mock.patch.object(streams, '_THREADS', 1):
      feed, _ = self.feed('auto', Slow())
    feed.take(0)
    self.assertGreater(feed.waited, 0.1)
    feed.waited = 0.0
    with mock.patch.object(
        jax, 'block_until_ready', lambda running: time.sleep(1)
    ):
      feed.take(1, running=jnp.zeros(()))
    self.assertLess(feed.waited, 0.1)

  def test_errors_reach_the_loop(self):
    feed, _ = self.feed('auto', Noise(damaged=[11]))
    with self.assertRaisesRegex(data.Damaged, 'Image 11'):
      for step in range(2):
        feed.take(step)
    feed.close()

  def test_a_stream_that_cannot_be_opened(self):
    feed, _ = self.feed('auto', Noise())
    with mock.patch.object(
        streams.Stream, '__call__', side_effect=OSError('no /dev/shm')
    ):
      with self.assertRaisesRegex(OSError, 'no /dev/shm'):
        feed.take(0)
    feed.close()


class ExtraBatchesTest(absltest.TestCase):

  def test_are_those_of_data_in_memory(self):
    drawn = []
    for stream in ('never', 'always'):
      config = runs.tiny('unused', data={'stream': stream})
      dataset = data.load(config.data, seed=0)
      setup = mock.Mock(
          config=config, dataset=dataset, steps_per_epoch=runs.STEPS
      )
      setup.stream.return_value = KEY
      setup.computation.prepared = lambda unused_key, *batch: batch
      log = mock.Mock()
      batches = growing._batches(setup, 3, log)
      drawn.append([next(batches) for _ in range(4)])
      self.assertEqual(log.check_signals.call_count, 4)
      batches.close()
    wait_until(lambda: not background_threads())
    for (x, labels), (other, others) in zip(*drawn, strict=True):
      np.testing.assert_array_equal(x, other)
      np.testing.assert_array_equal(labels, others)
    self.assertFalse(np.array_equal(drawn[0][0][0], drawn[0][1][0]))


class RunTest(parameterized.TestCase):
  """On digits the stream must not matter at all."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    directory = tempfile.TemporaryDirectory()
    cls.addClassCleanup(directory.cleanup)
    cls.base = pathlib.Path(directory.name, 'base')
    cls.result = runs.quietly(runs.tiny(cls.base))

  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(directory, 'run')

  def assert_as_in_memory(self):
    result = train.read_result(self.workdir)
    for key in ('params_digest', 'found', 'test_accuracy', 'train_macs'):
      self.assertEqual(result[key], self.result[key], key)
    strip = lambda course: [
        {k: v for k, v in record.items() if k != 'input_wait_seconds'}
        for record in course
    ]
    self.assertEqual(
        strip(runs.course(self.workdir)), strip(runs.course(self.base))
    )

  @pytest.mark.slow
  def test_interrupted_and_continued(self):
    def at_step(count, unused_arguments):
      if count in (7, 30):
        os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
      with runs.watch_steps(at_step):
        with self.assertRaises(train.Interrupted):
          runs.quietly(runs.tiny(self.workdir, **STREAMED))
    self.assertEqual(saved_step(self.workdir), 7 + 7)
    runs.quietly(runs.tiny(self.workdir, **STREAMED))
    self.assert_as_in_memory()
    wait_until(lambda: not background_threads())
    for record in runs.records(self.workdir, 'epoch'):
      self.assertGreaterEqual(record['input_wait_seconds'], 0)
      self.assertNotIn('skipped', record)


  @pytest.mark.slow
  def test_killed_with_a_worker_process(self):
    flags = [
        f'--workdir={self.workdir}', '--network.widths=4-8-16',
        '--grow_interval=1',
        '--stop_window=2', '--policy.max_depths=2-2-1', '--learning_rate=0.05',
        '--finetune_epochs=2', '--batch_size=64', '--compare=',
        f'--compilation_cache={runs.CACHE}', '--data.stream=always',
        '--devices.decode_workers=1',
    ]
    process = runs.start('autogrow', *flags)
    history = self.workdir / 'history.jsonl'
    wait_until(
        lambda: process.poll() is not None
        or (history.exists() and runs.records(self.workdir, 'epoch')),
        120,
    )
    self.assertIsNone(process.poll())
    workers = children_of(process.pid)
    self.assertNotEmpty(workers)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(map(is_alive, workers)))
    # Whoever decodes, it is the same run.
    runs.quietly(runs.tiny(self.workdir, **STREAMED))
    self.assert_as_in_memory()


class DamagedTest(absltest.TestCase):
  """A folder like ImageNet: odd sizes, grey, CMYK, and damaged files."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    directory = tempfile.TemporaryDirectory()
    cls.addClassCleanup(directory.cleanup)
    cls.root = pathlib.Path(directory.name)
    cls.folder = tiny_images.write_folder(
        cls.root / 'images',
        {
            f'{split}/class{label}/{index}.jpg': encoded
            for split, count, bad in (
                ('train', 60, range(2, 60, 6)), ('test', 20, (8,))
            )
            for index, (encoded, label) in enumerate(
                tiny_images.odd(count, 3, damaged=bad)
            )
        },
    )

  def config(self, name, **changes):
    return runs.tiny(
        self.root / name,
        data={
            'dataset': f'folder:{self.folder}', 'image_size': 16, 'holdout': 15,
            'channels': 3, **STREAMED['data'], **changes,
        },
        policy={'name': 'fixed'},
        batch_size=10,
    )

  def test_names_a_damaged_image(self):
    with self.assertRaisesRegex(ValueError, r'class\d/\d+.jpg cannot be read'):
      runs.quietly(self.config('named'))
    wait_until(lambda: not background_threads())

  def test_skips_and_counts_them(self):
    result = runs.quietly(
        self.config('base', skip_damaged=True), stdout=(stdout := io.StringIO())
    )
    dataset = data.load(self.config('base', skip_damaged=True).data, seed=0)
    held_out = dataset.holdout.images
    held_out[:]
    self.assertNotEmpty(held_out.damaged)  # The seed is such.
    self.assertEqual(result['test_total'], 19)
    for record in runs.records(self.root / 'base', 'epoch'):
      self.assertEqual(record['train_total'], 40)
      self.assertEqual(record['total'], 15 - len(held_out.damaged))
      self.assertGreater(record['skipped'], 0)
    self.assertRegex(stdout.getvalue(), r'warning: .*\.jpg cannot be read')
    self.assertRegex(stdout.getvalue(), r'epoch .* \d skipped')
    names = re.findall(r'warning: (.*\.jpg)', stdout.getvalue())
    self.assertLen(set(names), len(names))  # Each of them once.
    damaged = {
        f'{self.folder}/{split}/class{index % 3}/{index}.jpg'
        for split, indices in (('train', range(2, 60, 6)), ('test', [8]))
        for index in indices
    }
    self.assertContainsSubset(names, damaged)
    self.assertContainsSubset(
        [message.split()[0] for message in held_out.damaged.values()], names
    )

    # Stopped and continued, the counts are the same.
    def at_step(count, unused_arguments):
      if count == 2:
        os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(2):
      with runs.watch_steps(at_step), self.assertRaises(train.Interrupted):
        runs.quietly(self.config('stopped', skip_damaged=True))
    again = runs.quietly(self.config('stopped', skip_damaged=True))
    self.assertEqual(again['params_digest'], result['params_digest'])
    volatile = lambda course: [
        {k: v for k, v in record.items() if k != 'input_wait_seconds'}
        for record in course
    ]
    self.assertEqual(
        volatile(runs.course(self.root / 'stopped')),
        volatile(runs.course(self.root / 'base')),
    )


class ShownTest(absltest.TestCase):

  def test_waiting_and_skipped(self):
    record = {
        'event': 'epoch', 'epoch': 3, 'depths': [1, 1], 'train_total': 1000,
        'seconds': 10.0, 'input_wait_seconds': 0.9,
    }
    self.assertNotIn('wait', console.format_epoch(record))
    record |= {'input_wait_seconds': 2.5, 'skipped': 4}
    self.assertIn('25% waiting  4 skipped', console.format_epoch(record))


def saved_step(workdir):
  return checkpoint.Checkpoints(workdir / 'checkpoints', keep=2).steps()[-1]


def background_threads():
  """Threads that read training batches."""
  return [
      thread.name
      for thread in threading.enumerate()
      if thread.name.startswith(('feed', 'grain'))
  ]


def children_of(pid):
  """Processes that a process started; empty where there is no /proc."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):
      if int(path.read_text().rpartition(')')[2].split()[1]) == pid:
        found.append(int(path.parent.name))
  return found


def is_alive(pid):
  with contextlib.suppress(OSError):
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
    return state.split()[0] != 'Z'
  return False


def wait_until(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > end:
      raise AssertionError('It never came true.')
    time.sleep(0.01)


if __name__ == '__main__':
  absltest.main()
