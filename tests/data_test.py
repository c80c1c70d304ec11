"""Tests of the data sets, their division, and the way to the network."""

import dataclasses
import fractions
import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_data

from autogrow_jax import data
from autogrow_jax.data import splits

GREY = data.Preprocessing(mean=(0.0,), std=(1.0,))
CIFAR10 = data.SOURCES['cifar10'].preprocessing


def arrays(examples=200, classes=5, shape=(6, 6, 1), seed=0):
  """Images of which each is told by its pixels, and labels of all classes."""
  generator = np.random.default_rng(seed)
  images = generator.integers(0, 256, (examples, *shape), dtype=np.uint8)
  return images, np.arange(examples) % classes


def own(**changes):
  """A small data set from arrays."""
  arguments = dict(holdout=50, seed=0, preprocessing=GREY) | changes
  return data.from_arrays(*arrays(), *arrays(40, seed=1), **arguments)


def augment(key, images, preprocessing, *, first=0):
  """Augments images that have one class each."""
  labels = jnp.zeros(images.shape[0], int)
  result, _ = data.augment_examples(
      key, images, labels, preprocessing, first=first
  )
  return result


def never():
  raise AssertionError('The test split was read.')


class DataConfigTest(parameterized.TestCase):

  def test_survives_json(self):
    config = data.DataConfig('cifar10', '~/x', 4000, '0.25')
    text = json.dumps(dataclasses.asdict(config))
    self.assertEqual(data.DataConfig(**json.loads(text)), config)

  @parameterized.parameters(
      ('0.1', 1, 10), ('1/3', 1, 3), ('1', 1, 1), ('.75', 3, 4)
  )
  def test_fraction_is_exact(self, text, numerator, denominator):
    self.assertEqual(
        data.DataConfig(data_fraction=text).fraction,
        fractions.Fraction(numerator, denominator),
    )

  @parameterized.parameters(
      (dict(normalization='none'), "('pixels', 'paper'), got 'none'"),
      (dict(channels=4), 'channels must be one of (None, 1, 3), got 4'),
      (dict(stream='yes'), "('auto', 'always', 'never'), got 'yes'"),
      (dict(image_size=0), 'image_size must be a whole number >= 1, got 0'),
      (dict(select_on='train'), "('holdout', 'test'), got 'train'"),
      (dict(data_fraction='0'), "above 0 and at most 1, got '0'"),
      (dict(data_fraction='1.01'), "above 0 and at most 1, got '1.01'"),
      (dict(data_fraction='a half'), "'0.25' or '1/4', got 'a half'"),
      (dict(data_fraction='1/0'), "'0.25' or '1/4', got '1/0'"),
      (dict(data_fraction=0.5), "text such as '0.25' or '1/4', got 0.5"),
      (dict(holdout=0), 'holdout must be a whole number >= 1, got 0'),
      (dict(holdout=True), 'holdout must be a whole number >= 1, got True'),
      (dict(holdout=9, select_on='test'), 'nothing is held out; leave it out'),
  )
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      data.DataConfig(**arguments)

  @parameterized.parameters('CIFAR-10', '', '../x', 'a*')
  def test_unknown_names(self, name):
    message = f'Unknown data set {name!r}; there are digits, dots, mnist, '
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      data.load(data.DataConfig(name), seed=0)

  def test_every_setting_has_a_help_of_plain_text(self):
    for field in dataclasses.fields(data.DataConfig):
      self.assertRegex(field.metadata['help'], r'^[A-Z][^\n]*\.$', field.name)
    path = data.DataConfig('mnist', pathlib.Path('x')).data_dir
    self.assertEqual(path, 'x')  # For JSON.


class OptionalPackagesTest(parameterized.TestCase):

  def test_imports_none_of_them(self):
    optional = 'PIL', 'grain', 'sklearn', 'array_record', 'tensorflow_datasets'
    program = (
        'import sys, autogrow_jax.data\n'
        f'sys.exit(any(name in sys.modules for name in {optional}))'
    )
    subprocess.run([sys.executable, '-c', program], check=True)

  @parameterized.parameters(
      ('sklearn.datasets', 'digits', '[demo]'),
      ('PIL.Image', 'folder:{}/images', '[data]'),
      ('tensorflow_datasets', 'tiny', '[data]'),
  )
  def test_names_the_extra_of_a_missing_one(self, module, dataset, extra):
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    images = [f'images/{name}/{number}' for name in 'ab' for number in '123']
    for name in (*images, 'tiny/1.0.0/dataset_info.json'):
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).touch()
    config = data.DataConfig(dataset.format(root), str(root))
    with mock.patch.dict(sys.modules, {module: None}):
      message = rf"^.* needs \S+: pip install 'autogrow-jax\{extra}'\.$"
      with self.assertRaisesRegex(ValueError, message):
        data.load(config, seed=0)

  def test_a_stream_needs_grain(self):
    config = data.DataConfig(stream='always')
    batches = data.load(config, seed=0).stream(jax.random.key(0), 0, 8)
    with mock.patch.dict(sys.modules, {'grain': None}):
      with self.assertRaisesRegex(ValueError, 'needs grain: pip install'):
        next(batches)


class StratifiedTest(parameterized.TestCase):

  def test_order_is_pinned(self):
    # The digits' test split and the hold-out of every seed depend on it.
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(
        splits.order(labels, seed=0),
        [11, 3, 6, 2, 8, 7, 1, 4, 10, 0, 5, 9],
    )

  @parameterized.parameters(range(5))
  def test_all_stretches_are_proportional(self, seed):
    labels = np.random.default_rng(seed).permutation(
        np.repeat([0, 1, 2, 3], [500, 250, 60, 7])
    )
    order = splits.order(labels, seed=seed)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(labels)))
    cumulative = np.cumsum(np.eye(4)[labels[order]], axis=0)
    quota = np.arange(1, 818)[:, None] * np.bincount(labels) / len(labels)
    # Within one example of the quota, for prefixes of all lengths.
    self.assertLess(np.abs(cumulative - quota).max(), 1)

  def test_shuffles_within_classes(self):
    labels = np.zeros(1000, np.int64)
    order = splits.order(labels, seed=3)
    self.assertLess(abs(np.corrcoef(order, np.arange(1000))[0, 1]), 0.1)
    self.assertFalse(np.array_equal(order, splits.order(labels, seed=4)))


class DigitsTest(parameterized.TestCase):

  def test_shapes_and_values(self):
    dataset = data.load(data.DataConfig(), seed=0)
    test = dataset.read_test()
    self.assertEqual(dataset.train.images.shape, (1077, 8, 8, 1))
    self.assertEqual(dataset.holdout.images.shape, (360, 8, 8, 1))
    self.assertEqual(test.images.shape, (360, 8, 8, 1))
    self.assertEqual(dataset.input_shape, (8, 8, 1))
    self.assertEqual((dataset.name, dataset.classes), ('digits', 10))
    for split in (dataset.train, dataset.holdout, test):
      self.assertEqual(split.images.dtype, np.uint8)
      self.assertEqual(split.labels.dtype, np.int32)
      self.assertEqual((split.images.min(), split.images.max()), (0, 255))
    self.assertLen(np.unique(dataset.train.images), 17)

  def test_splits_are_disjoint_and_complete(self):
    dataset = data.load(data.DataConfig(), seed=1)
    indices = np.concatenate([dataset.train_indices, dataset.holdout_indices])
    np.testing.assert_array_equal(np.sort(indices), np.arange(1437))
    distinct = set()
    for split in (dataset.train, dataset.holdout, dataset.read_test()):
      distinct |= {image.tobytes() for image in split.images}
    self.assertLen(distinct, 1797)  # No two digits are equal.

  def test_stratified(self):
    dataset = data.load(data.DataConfig(), seed=2)
    everything = data.load(data.DataConfig(select_on='test'), seed=2)
    totals = np.bincount(everything.train.labels)
    for split in (dataset.train, dataset.holdout):
      quota = totals * len(split) / 1437
      self.assertLess(np.abs(np.bincount(split.labels) - quota).max(), 1)

  def test_normalisation_is_measured(self):
    dataset = data.load(data.DataConfig(select_on='test'), seed=0)
    pixels = dataset.train.images / 255
    preprocessing = dataset.preprocessing
    self.assertEqual(round(pixels.mean(), 4), preprocessing.mean[0])
    self.assertEqual(round(pixels.std(), 4), preprocessing.std[0])

  def test_same_seed_is_bit_identical(self):
    config = data.DataConfig(data_fraction='0.5')
    one, two = data.load(config, seed=7), data.load(config, seed=7)
    for name in ('train', 'holdout'):
      first, second = getattr(one, name), getattr(two, name)
      np.testing.assert_array_equal(first.images, second.images)
      np.testing.assert_array_equal(first.labels, second.labels)

  def test_seed_changes_holdout_and_subset_but_not_test(self):
    config = data.DataConfig(data_fraction='0.5')
    one, two = data.load(config, seed=7), data.load(config, seed=8)
    for name in ('train_indices', 'holdout_indices'):
      first, second = getattr(one, name), getattr(two, name)
      self.assertEqual(first.shape, second.shape)
      self.assertFalse(np.array_equal(first, second))
    np.testing.assert_array_equal(
        one.read_test().images, two.read_test().images
    )

  def test_fractions_nest(self):
    previous, sizes = set(), []
    for fraction in ('0.02', '0.25', '1/3', '0.5', '0.75', '1'):
      dataset = data.load(data.DataConfig(data_fraction=fraction), seed=3)
      current = set(dataset.train_indices.tolist())
      self.assertTrue(previous <= current)
      self.assertTrue(current.isdisjoint(dataset.holdout_indices.tolist()))
      np.testing.assert_array_equal(
          dataset.holdout_indices,
          data.load(data.DataConfig(), seed=3).holdout_indices,
      )
      share = np.bincount(dataset.train.labels) / len(dataset.train)
      self.assertLess(np.abs(share - 0.1).max(), 2 / len(dataset.train) + 0.01)
      previous = current
      sizes.append(len(current))
    self.assertEqual(sizes, [22, 269, 359, 538, 808, 1077])

  def test_holdout_is_configurable(self):
    dataset = data.load(data.DataConfig(holdout=100), seed=0)
    self.assertLen(dataset.holdout, 100)
    self.assertLen(dataset.train, 1337)
    counts = np.bincount(dataset.holdout.labels)
    np.testing.assert_array_equal(counts, [10] * 10)

  @parameterized.parameters(
      (dict(data_fraction='0.005'), 'leave 5 of 1437 training examples'),
      (dict(holdout=1437), 'holdout must be below 1437'),
      (dict(holdout=1430), 'leave 7 of 1437 training examples'),
  )
  def test_refuses_empty_classes(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      data.load(data.DataConfig(**arguments), seed=0)


class TestSplitGuardTest(parameterized.TestCase):

  def load(self, **config):
    """Loads digits; returns them with the list of the splits read so far."""
    source, reads = data.SOURCES['digits'], []

    def open_(data_dir):
      read = source.open(data_dir)
      return lambda split: reads.append(split) or read(split)

    guarded = {'digits': dataclasses.replace(source, open=open_)}
    with mock.patch.dict(data.SOURCES, guarded):
      return data.load(data.DataConfig(**config), seed=0), reads

  def test_test_split_is_read_on_request_only_and_once(self):
    dataset, reads = self.load()
    self.assertIs(dataset.selection, dataset.holdout)
    dataset = dataclasses.replace(dataset, preprocessing=GREY)
    self.assertEqual(dataset.input_shape, (8, 8, 1))
    self.assertEqual(reads, ['train'])
    self.assertIs(dataset.read_test(), dataset.read_test())
    self.assertEqual(reads, ['train', 'test'])

  def test_guard_can_replace_it(self):
    dataset = dataclasses.replace(own(), read_test=never)
    self.assertLen(dataset.selection, 50)
    with self.assertRaisesRegex(AssertionError, 'was read'):
      dataset.read_test()

  def test_select_on_test(self):
    dataset, reads = self.load(select_on='test')
    self.assertEqual(dataset.select_on, 'test')
    self.assertLen(dataset.train, 1437)
    self.assertEmpty(dataset.holdout)
    self.assertEmpty(dataset.holdout_indices)
    self.assertIs(dataset.selection, dataset.read_test())
    self.assertIs(dataset.selection, dataset.selection)
    self.assertEqual(reads, ['train', 'test'])
    guarded = dataclasses.replace(dataset, read_test=never)
    with self.assertRaisesRegex(AssertionError, 'was read'):
      _ = guarded.selection


class FromArraysTest(parameterized.TestCase):

  def test_splits_are_what_the_indices_say(self):
    images, labels = arrays()
    dataset = own()
    self.assertLen(dataset.train, 150)
    for split, indices in (
        (dataset.train, dataset.train_indices),
        (dataset.holdout, dataset.holdout_indices),
    ):
      np.testing.assert_array_equal(split.images, images[indices])
      np.testing.assert_array_equal(split.labels, labels[indices])
      self.assertEqual(split.labels.dtype, np.int32)
    np.testing.assert_array_equal(
        dataset.read_test().images, arrays(40, seed=1)[0]
    )
    np.testing.assert_array_equal(np.bincount(dataset.holdout.labels), [10] * 5)
    self.assertEqual((dataset.name, dataset.classes), ('arrays', 5))

  def test_channel_axis_may_be_missing(self):
    images, labels = arrays()
    dataset = data.from_arrays(
        images[..., 0],
        labels.astype(np.uint8),
        images[..., 0],
        labels,
        holdout=5,
        seed=0,
        preprocessing=dataclasses.replace(GREY, pad=2),
        classes=np.int64(7),
    )
    self.assertEqual(dataset.train.images.shape, (195, 6, 6, 1))
    self.assertEqual(dataset.input_shape, (10, 10, 1))
    self.assertEqual(dataset.classes, 7)

  def test_user_arrays_are_not_changed(self):
    images, labels = arrays()
    before = images.copy(), labels.copy()
    data.from_arrays(
        images, labels, images, labels, holdout=9, seed=0, preprocessing=GREY
    )
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])

  @parameterized.named_parameters(
      ('float', 0, lambda x: x / 255, 'train: Images must be a uint8.*float64'),
      ('int64', 2, lambda x: x.astype(int), 'test: Images must be a uint8'),
      ('flat', 0, lambda x: x.reshape(200, -1), r'got .* \(200, 36\)'),
      ('short', 1, lambda y: y[:-1], r'train: Labels .*200 images.*\(199,\)'),
      ('one_hot', 1, lambda y: np.eye(5, dtype=int)[y], r'\(200, 5\)'),
      ('float_labels', 3, lambda y: y + 0.5, 'test_labels must be integers'),
      ('negative', 1, lambda y: y - 1, 'from 0 to classes - 1, got -1'),
      ('extra_class', 3, lambda y: y + 1, 'test must be from 0 to 4.*got 5'),
      ('huge', 1, lambda y: y + 2**40, 'below 2\\*\\*31'),
      ('other_size', 2, lambda x: x[:, 1:], r'test have the shape \(5, 6, 1\)'),
      ('rgb', 2, lambda x: x.repeat(3, -1), r'test have the shape \(6, 6, 3\)'),
      ('no_examples', 1, lambda y: y[:0], r'train_labels must be .*\(0,\)'),
  )
  def test_refuses_arrays(self, position, change, message):
    values = [*arrays(), *arrays(40, seed=1)]
    values[position] = change(values[position])
    with self.assertRaisesRegex(ValueError, message):
      data.from_arrays(*values, holdout=50, seed=0, preprocessing=GREY)

  @parameterized.parameters(
      (dict(holdout=0), 'holdout must be a whole number >= 1, got 0'),
      (dict(holdout=200), 'holdout must be below 200'),
      (dict(classes=4), 'train must be from 0 to 3.*4 classes, got 4'),
      (dict(classes=0), 'classes must be a whole number >= 1, got 0'),
      (dict(preprocessing=CIFAR10), r'\(6, 6, 1\), but .* is \(6, 6, 3\)'),
  )
  def test_refuses_arguments(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      own(**changes)


class NotPreparedTest(parameterized.TestCase):

  @parameterized.parameters('mnist', 'fashion_mnist', 'cifar10')
  def test_says_how_to_prepare_and_stays_off_the_network(self, name):
    data_dir = self.enterContext(tempfile.TemporaryDirectory())
    config = data.DataConfig(name, data_dir)
    offline = AssertionError('The network was used.')
    with (
        mock.patch.object(socket.socket, 'connect', side_effect=offline),
        mock.patch.object(socket, 'getaddrinfo', side_effect=offline),
        self.assertRaises(ValueError) as caught,
    ):
      data.load(config, seed=0)
    message = str(caught.exception)
    self.assertStartsWith(
        message, f'The data set {name} is not prepared in {data_dir}.'
    )
    self.assertIn('pip install tensorflow', message)
    self.assertIn(f'tfds.builder("{name}", data_dir="{data_dir}"', message)
    self.assertIn('--data_dir', message)
    self.assertNotIn('\n', message)

  def test_default_data_dir(self):
    directory = self.enterContext(tempfile.TemporaryDirectory())
    for environment, expected in (
        (dict(TFDS_DATA_DIR=directory), directory),
        (dict(HOME=directory), f'{directory}/tensorflow_datasets'),
    ):
      with mock.patch.dict('os.environ', environment, clear=True):
        with self.assertRaisesRegex(ValueError, f'prepared in {expected}. '):
          data.load(data.DataConfig('mnist'), seed=0)


class TfdsTest(parameterized.TestCase):
  """On the real data, where it is at hand; see `shared_data`."""

  @staticmethod
  @functools.cache
  def load(name):
    config = data.DataConfig(name, shared_data.prepared(name))
    return data.load(config, seed=0)

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as said:
      try:
        for number in (1, 2):
          os.dup2(said.fileno(), number)
        cls.load('fashion_mnist')
      finally:
        for number, old in zip((1, 2), kept):
          os.dup2(old, number)
          os.close(old)
      said.seek(0)
      cls.said = said.read()

  @classmethod
  def tearDownClass(cls):
    super().tearDownClass()
    cls.load.cache_clear()

  def test_load(self):
    self.check('fashion_mnist', 55_000, (32, 32, 1))
    self.assertEqual(self.said, b'')

  @pytest.mark.slow
  def test_load_in_colour(self):
    self.check('cifar10', 45_000, (32, 32, 3))

  def check(self, name, train, input_shape):
    dataset = self.load(name)
    self.assertLen(dataset.train, train)
    self.assertEqual(dataset.input_shape, input_shape)
    for split, examples in (
        (dataset.train, train),
        (dataset.holdout, 5000),
        (dataset.read_test(), 10_000),
    ):
      np.testing.assert_array_equal(
          np.bincount(split.labels), [examples // 10] * 10
      )
    indices = np.concatenate([dataset.train_indices, dataset.holdout_indices])
    np.testing.assert_array_equal(np.sort(indices), np.arange(train + 5000))

  def test_pixels(self):
    self.check_pixels('fashion_mnist', (0.2860,), (0.3530,))

  @pytest.mark.slow
  def test_pixels_in_colour(self):
    self.check_pixels('cifar10', CIFAR10.mean, CIFAR10.std)

  def check_pixels(self, name, mean, std):
    dataset = self.load(name)
    images = np.concatenate([dataset.train.images, dataset.holdout.images])
    levels = np.arange(256) / 255
    for channel in range(images.shape[-1]):
      counts = np.bincount(images[..., channel].ravel(), minlength=256)
      average = np.average(levels, weights=counts)
      variance = np.average((levels - average) ** 2, weights=counts)
      self.assertAlmostEqual(average, mean[channel], delta=1e-4)
      self.assertAlmostEqual(variance**0.5, std[channel], delta=1e-4)

  def test_order_and_pairing_are_those_of_tfds(self):
    import tensorflow_datasets as tfds

    dataset = self.load('fashion_mnist')
    source = tfds.data_source(
        'fashion_mnist',
        split='train',
        data_dir=shared_data.prepared('fashion_mnist'),
    )
    for position in (0, 999, 1000, 54_999):
      example = source[int(dataset.train_indices[position])]
      np.testing.assert_array_equal(
          dataset.train.images[position], example['image']
      )
      self.assertEqual(dataset.train.labels[position], example['label'])

  def test_damage_is_found_before_training(self):
    source = shared_data.prepared('fashion_mnist')
    data_dir = self.enterContext(tempfile.TemporaryDirectory())
    config = data.DataConfig('fashion_mnist', data_dir)
    copy = pathlib.Path(data_dir, 'fashion_mnist')
    shutil.copytree(pathlib.Path(source, 'fashion_mnist'), copy)
    (train,) = copy.glob('*/*-train.array_record*')
    (test,) = copy.glob('*/*-test.array_record*')
    (info,) = copy.glob('*/dataset_info.json')

    train.write_bytes(train.read_bytes()[:1_000_000])
    with self.assertRaisesRegex(ValueError, 'cannot be read.*prepare it again'):
      data.load(config, seed=0)
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    for path in (train, test):
      path.rename(path.with_name(path.name.replace('array_record', 'tfrecord')))
    with self.assertRaisesRegex(ValueError, 'not of the format array_record'):
      data.load(config, seed=0)
    next(copy.glob('*/*-test.tfrecord*')).unlink()
    with self.assertRaisesRegex(ValueError, "split 'test' .* is not in"):
      data.load(config, seed=0)
    info.write_text('{')
    with self.assertRaisesRegex(ValueError, 'cannot be read.*prepare it again'):
      data.load(config, seed=0)


class PreprocessingTest(parameterized.TestCase):

  def test_as_in_the_papers(self):
    tables = {
        name: (s.preprocessing.pad, s.preprocessing.crop, s.preprocessing.flip)
        for name, s in data.SOURCES.items()
    }
    self.assertEqual(
        tables,
        dict(
            digits=(0, 0, False),
            dots=(0, 0, False),
            mnist=(2, 0, False),
            fashion_mnist=(2, 0, True),
            svhn_cropped=(0, 4, False),
            cifar10=(0, 4, True),
            cifar100=(0, 4, True),
            imagenet2012=(0, 0, True),
            **{'voc/2012': (0, 0, True)},
        ),
    )
    self.assertEqual(
        data.SOURCES['cifar10'].paper_std, (0.2023, 0.1994, 0.2010)
    )
    for name in ('mnist', 'fashion_mnist'):
      preprocessing = data.SOURCES[name].preprocessing
      self.assertEqual((preprocessing.mean, preprocessing.std), ((0,), (1,)))

  def test_hashable_and_survives_json(self):
    text = json.dumps(dataclasses.asdict(CIFAR10))
    restored = data.Preprocessing(**json.loads(text))
    self.assertEqual(restored, CIFAR10)
    self.assertEqual(hash(restored), hash(CIFAR10))

  @parameterized.parameters(
      (dict(std=(0.0,)), r'std must be\s+above 0'),
      (dict(std=(1.0, 1.0)), 'one number per channel'),
      (dict(pad=-1), 'pad must be a whole number >= 0, got -1'),
      (dict(crop=1.5), 'crop must be a whole number >= 0, got 1.5'),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(GREY, **changes)


class PreprocessTest(parameterized.TestCase):

  def test_values(self):
    images = jnp.array([[[[0], [51]], [[102], [255]]]], jnp.uint8)
    preprocessing = data.Preprocessing(mean=(0.2,), std=(0.4,), pad=1)
    result = data.preprocess(images, preprocessing)
    self.assertEqual(result.dtype, jnp.float32)
    np.testing.assert_allclose(
        result[0, :, :, 0],
        [
            [-0.5, -0.5, -0.5, -0.5],
            [-0.5, -0.5, 0.0, -0.5],
            [-0.5, 0.5, 2.0, -0.5],
            [-0.5, -0.5, -0.5, -0.5],
        ],
        atol=1e-6,
    )

  def test_padded_border_is_minus_mean_over_std(self):
    # Invariant 33, for CIFAR-10's constants, by pad and by crop.
    border = -np.array(CIFAR10.mean) / np.array(CIFAR10.std)
    images = jnp.full((64, 8, 8, 3), 255, jnp.uint8)
    padded = dataclasses.replace(CIFAR10, pad=2)
    result = data.preprocess(images, padded)
    np.testing.assert_allclose(
        result[:, 0], np.broadcast_to(border, (64, 12, 3)), rtol=1e-6
    )
    shifted = augment(jax.random.key(0), images, CIFAR10)
    result = np.asarray(data.preprocess(shifted, CIFAR10)).reshape(-1, 3)
    white = (1 - np.array(CIFAR10.mean)) / np.array(CIFAR10.std)
    is_white = np.isclose(result, white, rtol=1e-5).all(-1)
    is_border = np.isclose(result, border, rtol=1e-5).all(-1)
    self.assertTrue(np.all(is_white ^ is_border))
    self.assertBetween(is_border.mean(), 0.2, 0.8)

  def test_mnist_trains_and_tests_alike(self):
    # Invariant 33.
    preprocessing = data.SOURCES['mnist'].preprocessing
    images = jnp.asarray(arrays(4, shape=(28, 28, 1))[0])
    augmented = augment(jax.random.key(0), images, preprocessing)
    result = data.preprocess(images, preprocessing)
    np.testing.assert_array_equal(
        data.preprocess(augmented, preprocessing), result
    )
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_allclose(result, padded / 255, rtol=1e-6)

  def test_dtype_and_jit(self):
    images = jnp.asarray(arrays(4, shape=(8, 8, 3))[0])
    expected = data.preprocess(images, CIFAR10)
    jitted = jax.jit(data.preprocess, static_argnums=1)(images, CIFAR10)
    np.testing.assert_allclose(jitted, expected, atol=1e-6)
    half = data.preprocess(images, CIFAR10, dtype=jnp.bfloat16)
    self.assertEqual(half.dtype, jnp.bfloat16)

  @parameterized.parameters(
      ((2, 8, 8, 3), jnp.float32, 'must be raw pixels, uint8.*got float32'),
      ((8, 8, 3), jnp.uint8, r'got uint8 \(8, 8, 3\)'),
      ((2, 8, 8, 1), jnp.uint8, r'width, 3\), got uint8 \(2, 8, 8, 1\)'),
  )
  def test_refuses(self, shape, dtype, message):
    images = jnp.zeros(shape, dtype)
    with self.assertRaisesRegex(ValueError, message):
      data.preprocess(images, CIFAR10)
    with self.assertRaisesRegex(ValueError, message):
      augment(jax.random.key(0), images, CIFAR10)


class AugmentTest(parameterized.TestCase):

  def test_every_image_is_a_crop_and_perhaps_mirrored(self):
    preprocessing = data.Preprocessing((0.0,), (1.0,), crop=2, flip=True)
    images = arrays(600, shape=(5, 6, 1))[0]
    result = np.asarray(
        augment(jax.random.key(0), jnp.asarray(images), preprocessing)
    )
    self.assertEqual((result.shape, result.dtype), (images.shape, np.uint8))
    found = []
    for image, output in zip(images, result):
      padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
      crops = {}
      for row in range(5):
        for column in range(5):
          crop = padded[row : row + 5, column : column + 6]
          crops[crop.tobytes()] = row, column, False
          crops[crop[:, ::-1].tobytes()] = row, column, True
      self.assertLen(crops, 50)
      found.append(crops[output.tobytes()])
    # All 50 occur, none much more than its share of 12.
    counts = {outcome: found.count(outcome) for outcome in found}
    self.assertLen(counts, 50)
    self.assertLess(max(counts.values()), 30)

  @parameterized.parameters((0, True), (2, False))
  def test_crop_and_flip_are_independent_options(self, crop, flip):
    preprocessing = dataclasses.replace(GREY, crop=crop, flip=flip)
    images = np.zeros((64, 5, 5, 1), np.uint8)
    images[:, 2, 2], images[:, 2, 3] = 1, 2  # Centre, and right of it.
    result = np.asarray(
        augment(jax.random.key(1), jnp.asarray(images), preprocessing)
    )[..., 0]
    rows = np.argwhere(result == 1)[:, 1]
    self.assertLen(np.unique(rows), 2 * crop + 1)
    # Flattened, a mirrored image has the 2 before the 1.
    marks = [row[row > 0].tolist() for row in result.reshape(64, -1)]
    self.assertEqual([2, 1] in marks, flip)

  def test_nothing_to_do(self):
    images = jnp.asarray(arrays(4)[0])
    self.assertIs(augment(jax.random.key(0), images, GREY), images)

  def test_depends_on_the_key_only(self):
    images = jnp.asarray(arrays(32, shape=(8, 8, 3))[0])
    one = augment(jax.random.key(0), images, CIFAR10)
    np.testing.assert_array_equal(
        one, augment(jax.random.key(0), images, CIFAR10)
    )
    self.assertFalse(
        np.array_equal(one, augment(jax.random.key(1), images, CIFAR10))
    )

  def test_parts_of_a_batch(self):
    key, step = jax.random.key(5), jax.jit(
        augment, static_argnames='preprocessing'
    )
    images = jnp.asarray(arrays(32, shape=(8, 8, 3))[0])
    whole = augment(key, images, CIFAR10)
    parts = [
        step(key, images[first : first + 8], preprocessing=CIFAR10, first=first)
        for first in range(0, 32, 8)
    ]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
    # A larger batch doesn't change what happens to the first images.
    np.testing.assert_array_equal(
        whole[:20], augment(key, images[:20], CIFAR10)
    )

  def test_sharding(self):
    devices = jax.devices()
    mesh = jax.make_mesh(
        (len(devices),), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec('data')
    images = jnp.asarray(arrays(32, shape=(8, 8, 3))[0])
    key = jax.random.key(2)
    expected = augment(key, images, CIFAR10)
    step = jax.jit(augment, static_argnums=2)
    sharded = jax.device_put(images, jax.sharding.NamedSharding(mesh, spec))
    np.testing.assert_array_equal(step(key, sharded, CIFAR10), expected)

    per_device = 32 // len(devices)

    def part(images):
      first = jax.lax.axis_index('data') * per_device
      return augment(key, images, CIFAR10, first=first)

    result = jax.pmap(part, axis_name='data')(
        images.reshape(len(devices), per_device, 8, 8, 3)
    )
    np.testing.assert_array_equal(result.reshape(images.shape), expected)


class BatchOrderTest(parameterized.TestCase):

  def test_permutation(self):
    key = jax.random.key(0)
    first = data.epoch_permutation(key, 0, 1000)
    self.assertEqual(first.dtype, jnp.int32)
    np.testing.assert_array_equal(jnp.sort(first), np.arange(1000))
    second = data.epoch_permutation(key, 1, 1000)
    other = data.epoch_permutation(jax.random.key(1), 0, 1000)
    for different in (second, other):
      self.assertLess(np.mean(np.asarray(first == different)), 0.02)

  def test_depends_on_key_and_epoch_only(self):
    # Invariant 26: whatever else is drawn and computed, in whatever order.
    key = jax.random.key(3)
    late = data.epoch_permutation(key, 5, 100)
    jax.random.normal(jax.random.fold_in(key, 99), (3,))
    for epoch in range(4):
      data.epoch_permutation(key, epoch, 100)
    traced = jax.jit(data.epoch_permutation, static_argnums=2)
    np.testing.assert_array_equal(late, traced(key, jnp.int32(5), 100))
    np.testing.assert_array_equal(late, data.epoch_permutation(key, 5, 100))

  def test_batches_are_disjoint_and_the_rest_is_dropped(self):
    self.assertEqual(data.steps_per_epoch(103, 10), 10)
    permutation = data.epoch_permutation(jax.random.key(0), 0, 103)
    take = jax.jit(data.batch_indices, static_argnums=2)
    batches = [take(permutation, step, 10) for step in range(10)]
    np.testing.assert_array_equal(jnp.concatenate(batches), permutation[:100])

  def test_the_dropped_examples_change(self):
    key = jax.random.key(0)
    dropped = [
        set(np.asarray(data.epoch_permutation(key, epoch, 103)[100:]).tolist())
        for epoch in range(5)
    ]
    self.assertGreater(len(set.union(*dropped)), 8)

  @parameterized.parameters(0, 104)
  def test_refuses_batch_size(self, batch_size):
    with self.assertRaisesRegex(ValueError, f'size {batch_size} must be .*103'):
      data.steps_per_epoch(103, batch_size)

  def test_under_the_strictest_checks(self):
    images = jnp.asarray(arrays(16, shape=(8, 8, 3))[0])

    @jax.jit
    def step(key, number):
      permutation = data.epoch_permutation(key, number // 2, 16)
      indices = data.batch_indices(permutation, number % 2, 8)
      batch = augment(jax.random.fold_in(key, 1), images[indices], CIFAR10)
      return data.preprocess(batch, CIFAR10)

    with (
        jax.debug_key_reuse(True),
        jax.numpy_rank_promotion('raise'),
        jax.debug_nans(True),
    ):
      self.assertEqual(step(jax.random.key(0), 3).shape, (8, 8, 8, 3))


if __name__ == '__main__':
  absltest.main()
