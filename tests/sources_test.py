"""Tests of the data sets of the paper, of other TFDS sets, and of folders.

The data are tiny, but written by TFDS's own builders; see `tiny_images`.
"""

import dataclasses
import functools
import os
import pathlib
import pickle
import re
import socket
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import tiny_images

from autogrow_jax.run import config as config_lib
from autogrow_jax import data
from autogrow_jax.run import resolve
from autogrow_jax.run import workdir as workdir_lib
from autogrow_jax.data import images as images_lib
from autogrow_jax.data import prepared
from autogrow_jax.data import sources

# Name -> its splits, as `tiny_images.prepare` takes them.
SETS = {
    'svhn_cropped': lambda: {
        'train': tiny_images.fixed(60, 10, (32, 32, 3)),
        'test': tiny_images.fixed(20, 10, (32, 32, 3), seed=1),
        'extra': tiny_images.fixed(10, 10, (32, 32, 3), seed=2),
    },
    'cifar100': lambda: {
        'train': tiny_images.fixed(300, 100, (32, 32, 3)),
        'test': tiny_images.fixed(100, 100, (32, 32, 3), seed=1),
    },
    'imagenet2012': lambda: {
        'train': tiny_images.odd(40, 4),
        'validation': tiny_images.odd(12, 4, seed=1),
        # As it is: the labels of the test are secret.
        'test': [(x, -1) for x, _ in tiny_images.odd(4, 4, seed=2)],
    },
    'imagenette/160px-v2': lambda: {
        'train': tiny_images.odd(80, 10),
        'validation': tiny_images.odd(20, 10, seed=1),
    },
    'emnist/balanced': lambda: {
        'train': tiny_images.fixed(188, 47, (28, 28, 1)),
        'test': tiny_images.fixed(47, 47, (28, 28, 1), seed=1),
    },
    'oxford_iiit_pet': lambda: {
        'train': tiny_images.odd(111, 37),
        'test': tiny_images.odd(37, 37, seed=1),
    },
    'tf_flowers': lambda: {'train': tiny_images.odd(20, 5)},
    'binarized_mnist': lambda: {
        'train': tiny_images.fixed(4, 2, (28, 28, 1)),
        'test': tiny_images.fixed(4, 2, (28, 28, 1)),
    },
}


@functools.cache
def directory_of_all():
  """Keeps the directory for as long as the process."""
  return tempfile.TemporaryDirectory()


@functools.cache
def data_dir_of(name):
  """Where one of `SETS` is prepared, once for all tests; don't write there."""
  data_dir = pathlib.Path(directory_of_all().name, name.replace('/', '-'))
  tiny_images.prepare(name, data_dir, SETS[name]())
  return str(data_dir)


def load(name, *, seed=0, **config):
  if 'data_dir' not in config:
    config['data_dir'] = data_dir_of(name)
  return data.load(data.DataConfig(name, **config), seed=seed)


def records_of(name, data_dir=None):
  """Training records, not decoded."""
  source = sources.find(data.DataConfig(name, data_dir))
  return source.open(data_dir)('train')


def told_apart(split):
  """Images as bytes, with labels: what a split consists of, in any order."""
  return sorted(zip((x.tobytes() for x in split.images), split.labels.tolist()))


def decoded(examples, channels=3, size=None):
  """The same of encoded examples."""
  result = []
  for encoded, label in examples:
    image = images_lib.decode(encoded, channels)
    if size:
      image = images_lib.fit(image, size)
    result.append((image.tobytes(), label))
  return sorted(result)


class KnownTest(parameterized.TestCase):

  @parameterized.parameters(
      ('svhn_cropped', 10, 10, (32, 32, 3)),
      ('cifar100', 100, 100, (32, 32, 3)),
  )
  def test_load(self, name, classes, holdout, shape):
    dataset = load(name, holdout=holdout)
    splits = SETS[name]()
    self.assertEqual((dataset.name, dataset.classes), (name, classes))
    self.assertEqual(dataset.input_shape, shape)
    self.assertEqual(
        dataset.preprocessing, data.SOURCES[name].preprocessing
    )
    self.assertEqual(
        sorted(told_apart(dataset.train) + told_apart(dataset.holdout)),
        decoded(splits['train']),
    )
    self.assertEqual(
        told_apart(dataset.read_test()), decoded(splits['test'])
    )
    self.assertLen(dataset.holdout, holdout)

  def test_constants(self):
    table = {
        name: (
            source.train, source.test, source.holdout, source.classes,
            source.preprocessing.mean, source.preprocessing.std,
        )
        for name, source in data.SOURCES.items()
    }  # pyformat: disable
    self.assertEqual(
        table['svhn_cropped'],
        (73_257, 26_032, 7257, 10, (0.4377, 0.4438, 0.4728),
         (0.1980, 0.2010, 0.1970)),
    )  # pyformat: disable
    self.assertEqual(
        table['cifar100'],
        (50_000, 10_000, 5000, 100, (0.5071, 0.4865, 0.4409),
         (0.2673, 0.2564, 0.2762)),
    )  # pyformat: disable
    self.assertEqual(
        table['imagenet2012'],
        (1_281_167, 50_000, 50_000, 1000, (0.485, 0.456, 0.406),
         (0.229, 0.224, 0.225)),
    )  # pyformat: disable

  def test_sizes_and_classes_are_those_of_tfds(self):
    import tensorflow_datasets as tfds

    for name, source in data.SOURCES.items():
      if name in ('digits', 'dots') or source.has_masks:  # Not of TFDS.
        continue
      features = tfds.builder(name, data_dir='/nowhere').info.features
      self.assertEqual(features['label'].num_classes, source.classes)
      self.assertEqual(features['image'].shape[-1], source.shape[-1])
      if not source.is_resized:
        self.assertEqual(features['image'].shape, source.shape)

  def test_paper_normalization(self):
    for name, source in data.SOURCES.items():
      config = data.DataConfig(name, normalization='paper')
      found = sources.known(config).preprocessing
      self.assertEqual(found == source.preprocessing, name != 'cifar10')
      self.assertEqual(found.mean, source.preprocessing.mean)
    config = data.DataConfig('cifar10', normalization='paper')
    stand_in = data.stand_in(config, seed=0)
    self.assertEqual(stand_in.preprocessing.std, (0.2023, 0.1994, 0.2010))

  def test_imagenet(self):
    dataset = load('imagenet2012', holdout=8, image_size=32)
    splits = SETS['imagenet2012']()
    self.assertEqual(dataset.classes, 1000)
    self.assertEqual(dataset.input_shape, (32, 32, 3))
    test = dataset.read_test()
    found = data.Split(test.images[:], test.labels)
    self.assertEqual(told_apart(found), decoded(splits['validation'], size=32))
    self.assertLen(dataset.train, 32)
    with self.assertRaisesRegex(ValueError, "leave out stream='never'"):
      load('imagenet2012', holdout=8, stream='never')

  def test_channels_are_given(self):
    with self.assertRaisesRegex(ValueError, 'have 3 channels, got channels=1'):
      load('cifar100', channels=1)

  def test_resized(self):
    dataset = load('svhn_cropped', holdout=10, image_size=24)
    self.assertEqual(dataset.input_shape, (24, 24, 3))
    self.assertEqual(
        told_apart(dataset.read_test()),
        decoded(SETS['svhn_cropped']()['test'], size=24),
    )


class StandInTest(parameterized.TestCase):

  @parameterized.parameters(*data.SOURCES)
  def test_has_the_official_sizes(self, name):
    source = data.SOURCES[name]
    dataset = data.stand_in(data.DataConfig(name), seed=0)
    self.assertLen(dataset.holdout, source.holdout)
    self.assertLen(dataset.train, source.train - source.holdout)
    self.assertLen(dataset.read_test(), source.test)
    pad = 2 * source.preprocessing.pad
    height, width, channels = source.shape
    self.assertEqual(
        dataset.input_shape, (height + pad, width + pad, channels)
    )
    self.assertEqual((dataset.name, dataset.classes), (name, source.classes))
    self.assertEqual(dataset.preprocessing, source.preprocessing)
    self.assertEqual(dataset.train.images.strides[0], 0)  # Takes no memory.
    self.assertGreater(dataset.train.images[0].std(), 10)

  def test_of_digits_is_like_the_digits(self):
    config = data.DataConfig(data_fraction='0.5')
    there = data.load(config, seed=1)
    stand_in = data.stand_in(config, seed=1)
    for name in ('train', 'holdout'):
      one, two = getattr(there, name), getattr(stand_in, name)
      self.assertEqual(one.images.shape, two.images.shape)
    self.assertEqual(there.preprocessing, stand_in.preprocessing)

  def test_options(self):
    config = data.DataConfig('imagenet2012', select_on='test', image_size=64)
    dataset = data.stand_in(config, seed=0)
    self.assertEqual(dataset.train.images.shape, (1_281_167, 64, 64, 3))
    self.assertLen(dataset.selection, 50_000)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, "Only digits.*got 'tf_flowers'"):
      data.stand_in(data.DataConfig('tf_flowers'), seed=0)


class AnyTfdsTest(parameterized.TestCase):

  def test_fixed_size(self):
    dataset = load('emnist/balanced')
    splits = SETS['emnist/balanced']()
    self.assertEqual((dataset.name, dataset.classes), ('emnist/balanced', 47))
    self.assertLen(dataset.holdout, 18)  # A tenth.
    self.assertEqual(dataset.train.images.shape, (170, 28, 28, 1))
    self.assertEqual(
        told_apart(dataset.read_test()), decoded(splits['test'], channels=1)
    )
    pixels = dataset.train.images / 255
    preprocessing = dataset.preprocessing
    self.assertAlmostEqual(preprocessing.mean[0], pixels.mean(), places=9)
    self.assertAlmostEqual(preprocessing.std[0], pixels.std(), places=9)
    self.assertEqual(
        dataclasses.replace(preprocessing, mean=(0,), std=(1,)),
        data.Preprocessing((0,), (1,)),
    )

  def test_asked_for_size_and_channels(self):
    dataset = load('emnist/balanced', image_size=20, channels=3)
    self.assertEqual(dataset.input_shape, (20, 20, 3))
    self.assertLen(dataset.preprocessing.mean, 3)

  def test_varying_size(self):
    # Beside its image it has another one, a mask, and a box.
    words = 'differ in size.*--data.image_size'
    with self.assertRaisesRegex(ValueError, words):
      load('oxford_iiit_pet')
    dataset = load('oxford_iiit_pet', image_size=40)
    splits = SETS['oxford_iiit_pet']()
    self.assertEqual(
        told_apart(dataset.read_test()), decoded(splits['test'], size=40)
    )
    self.assertEqual(dataset.train.images.shape, (100, 40, 40, 3))
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(
        dataset.preprocessing.mean, pixels.mean((0, 1, 2))
    )
    np.testing.assert_allclose(dataset.preprocessing.std, pixels.std((0, 1, 2)))

  def test_validation_where_there_is_no_test(self):
    dataset = load('imagenette/160px-v2', image_size=16)
    self.assertEqual(
        told_apart(dataset.read_test()),
        decoded(SETS['imagenette/160px-v2']()['validation'], size=16),
    )

  @parameterized.parameters(
      ('tf_flowers', r"split 'test' .* is not in .*, only \['train'\]"),
      ('binarized_mnist', r"needs .*'label' \(ClassLabel, .*, but has 'image'"),
  )
  def test_refuses(self, name, message):
    with self.assertRaisesRegex(ValueError, message):
      load(name)

  def test_config_must_be_named(self):
    with self.assertRaisesRegex(ValueError, 'name it: emnist/balanced\\.$'):
      load('emnist', data_dir=data_dir_of('emnist/balanced'))

  @parameterized.parameters('cifar11', 'emnist/letters', 'kmnist')
  def test_unknown(self, name):
    offline = AssertionError('The network was used.')
    with (
        mock.patch.object(socket.socket, 'connect', side_effect=offline),
        mock.patch.object(socket, 'getaddrinfo', side_effect=offline),
        self.assertRaisesRegex(
            ValueError,
            f'^Unknown data set {name!r}; there are digits, .*imagenet2012, '
            'voc/2012, .* prepared in /nowhere, where .*--data_dir.*folder:PATH'
            '.* pairs:PATH[^\n]*$',
        ),
    ):
      load(name, data_dir='/nowhere')


class DamagedTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.data_dir = self.enterContext(tempfile.TemporaryDirectory())
    self.train = tiny_images.odd(40, 2, damaged=(7, 11))
    tiny_images.prepare(
        'imagenette/160px-v2',
        self.data_dir,
        {
            'train': self.train,
            'validation': tiny_images.odd(8, 2, damaged=(3,), seed=1),
        },
    )
    self.load = functools.partial(
        load, 'imagenette/160px-v2', data_dir=self.data_dir, image_size=16
    )

  def test_is_named(self):
    with self.assertRaisesRegex(
        data.Damaged,
        r"^Example \d+ of the split 'train' of imagenette/160px-v2 cannot be "
        r'read \(.*[Tt]runcated.*\).*--data.skip_damaged\.$',
    ):
      self.load()

  def test_is_named_by_its_file_if_that_is_known(self):
    tiny_images.prepare(
        'imagenet2012',
        self.data_dir,
        {'train': self.train, 'validation': tiny_images.odd(4, 2)},
    )
    records = records_of('imagenet2012', self.data_dir)
    found = images_lib.read_all(records, range(40))
    bad = [str(x) for x in found if isinstance(x, data.Damaged)]
    self.assertLen(bad, 2)
    for message in bad:
      self.assertRegex(message, r'of imagenet2012 \(train_(7|11)\.JPEG\) canno')

  def test_is_left_out_and_counted(self):
    with self.assertLogs(level='WARNING') as logs:
      dataset = self.load(skip_damaged=True, holdout=10)
      test = dataset.read_test()
    good = [x for i, x in enumerate(self.train) if i not in (7, 11)]
    self.assertEqual(
        sorted(told_apart(dataset.train) + told_apart(dataset.holdout)),
        decoded(good, size=16),
    )
    self.assertLen(test, 7)
    indices = np.concatenate([dataset.train_indices, dataset.holdout_indices])
    self.assertLen(np.unique(indices), 38)
    self.assertLen(dataset.train_indices, len(dataset.train))
    text = ' '.join(logs.output)
    left_out = [int(n) for n in re.findall(r'(\d+) of \d+ images of', text)]
    self.assertEqual(sum(left_out), 3)
    self.assertIn('1 of 8 images of test', text)

  def test_whole_class(self):
    tiny_images.prepare(
        'imagenette/320px-v2',
        self.data_dir,
        {
            'train': tiny_images.odd(20, 2, damaged=range(0, 20, 2)),
            'validation': tiny_images.odd(8, 2, seed=1),
        },
    )
    with self.assertRaisesRegex(ValueError, r'No image of the classes \[0\]'):
      load(
          'imagenette/320px-v2',
          data_dir=self.data_dir,
          image_size=16,
          skip_damaged=True,
      )


class RecordsTest(parameterized.TestCase):

  def records(self):
    return records_of('cifar100', data_dir_of('cifar100'))

  def test_one_by_one_and_at_once(self):
    records = self.records()
    self.assertLen(records, 300)
    self.assertEqual(records.labels.dtype, np.int32)
    together = images_lib.read_all(records, [3, 299, 0])
    for index, image in zip([3, 299, 0], together, strict=True):
      np.testing.assert_array_equal(records[index], image)
    first = load('cifar100', holdout=100)
    number = int(first.train_indices[5])
    np.testing.assert_array_equal(records[number], first.train.images[5])
    self.assertEqual(records.labels[number], first.train.labels[5])

  @parameterized.parameters(True, False)
  def test_survive_pickling(self, used):
    records = self.records()
    if used:
      _ = records[0], records.labels
    copy = pickle.loads(pickle.dumps(records))
    np.testing.assert_array_equal(copy[17], records[17])
    np.testing.assert_array_equal(copy.labels, records.labels)

  def test_folder_and_digits_survive_pickling(self):
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    tiny_images.write_folder(root, two_classes())
    for name in (f'folder:{root}', 'digits'):
      records = records_of(name)
      copy = pickle.loads(pickle.dumps(records))
      np.testing.assert_array_equal(copy[1], records[1])
      np.testing.assert_array_equal(copy.labels, records.labels)


class LabelsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.data_dir = pathlib.Path(
        self.enterContext(tempfile.TemporaryDirectory())
    )
    tiny_images.prepare('svhn_cropped', self.data_dir, SETS['svhn_cropped']())
    home = self.data_dir / 'home'
    self.cache = home / '.cache' / 'autogrow_jax'
    self.enterContext(mock.patch.dict(os.environ, HOME=str(home)))

  def labels(self, *, reads, many=50):
    """Labels by new records, which must read the files or must not."""
    records = records_of('svhn_cropped', str(self.data_dir))
    with (
        mock.patch.object(prepared, '_MANY', many),
        mock.patch.object(prepared, '_read', wraps=prepared._read) as read,
    ):
      labels = records.labels
    self.assertEqual(read.called, reads)
    np.testing.assert_array_equal(np.bincount(labels), [6] * 10)
    return labels

  def test_many_are_kept(self):
    first = self.labels(reads=True)
    (path,) = self.cache.iterdir()
    np.testing.assert_array_equal(self.labels(reads=False), first)
    path.write_bytes(path.read_bytes()[:100])  # Damaged: as if not there.
    np.testing.assert_array_equal(self.labels(reads=True), first)
    np.testing.assert_array_equal(self.labels(reads=False), first)
    np.save(path, first[:-1])
    self.labels(reads=True)
    path.unlink()
    self.cache.rmdir()
    self.cache.touch()  # Nowhere to write.
    self.labels(reads=True)

  def test_few_are_not_kept(self):
    self.labels(reads=True, many=61)
    self.assertFalse(self.cache.exists())


def two_classes(per_class=10, size=(12, 16), prefix=''):
  """Files for `tiny_images.write_folder`."""
  return {
      f'{prefix}{name}/{number}.png': tiny_images.pixels(
          number, size, label=label
      )
      for label, name in enumerate(('ants', 'bees'))
      for number in range(per_class)
  }


class FolderTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def load(self, files=None, *, seed=0, **config):
    if files is not None:
      tiny_images.write_folder(self.root, files)
    config = data.DataConfig(f'folder:{self.root}', **config)
    return data.load(config, seed=seed)

  def test_without_a_test_split(self):
    files = two_classes(per_class=50)
    dataset = self.load(files)
    test = dataset.read_test()
    self.assertEqual(dataset.name, f'folder:{self.root}')
    self.assertEqual((dataset.classes, dataset.input_shape), (2, (12, 16, 1)))
    for split, examples in (
        (dataset.train, 72), (dataset.holdout, 8), (test, 20),
    ):  # pyformat: disable
      np.testing.assert_array_equal(
          np.bincount(split.labels), [examples // 2] * 2
      )
    found = [told_apart(x) for x in (dataset.train, dataset.holdout, test)]
    expected = [
        (pixels.tobytes(), int(name.startswith('bees')))
        for name, pixels in files.items()
    ]
    self.assertEqual(sorted(sum(found, [])), sorted(expected))
    # Another seed holds out others, but tests on the same.
    other = self.load(seed=1)
    self.assertNotEqual(told_apart(other.holdout), found[1])
    self.assertEqual(told_apart(other.read_test()), found[2])
    pixels = dataset.train.images / 255
    self.assertAlmostEqual(dataset.preprocessing.mean[0], pixels.mean())
    self.assertAlmostEqual(dataset.preprocessing.std[0], pixels.std())

  @parameterized.parameters('test', 'validation')
  def test_with_a_test_split(self, name):
    test = two_classes(3, prefix=f'{name}/')
    del test[f'{name}/ants/0.png']
    dataset = self.load(two_classes(20, prefix='train/') | test)
    self.assertLen(dataset.train, 36)
    self.assertLen(dataset.holdout, 4)
    self.assertEqual(
        told_apart(dataset.read_test()),
        sorted((x.tobytes(), int('bees' in name)) for name, x in test.items()),
    )

  def test_any_size_kind_and_mode(self):
    files = {}
    for index, (encoded, label) in enumerate(tiny_images.odd(40, 4)):
      files[f'class{label}/{index}'] = encoded
    files['class0/a.gif'] = tiny_images.encode(
        tiny_images.pixels(1, (30, 30, 3)), 'GIF'
    )
    files['class1/b.png'] = tiny_images.pixels(2, (50, 20, 4))
    with self.assertRaisesRegex(
        ValueError, r'differ in size: .* has \d+x\d+ pixels.*--data.image_size'
    ):
      self.load(files)
    dataset = self.load(image_size=24)
    self.assertEqual((dataset.classes, dataset.input_shape), (4, (24, 24, 3)))
    self.assertLen(dataset.train_indices, 31)
    everything = sorted(
        told_apart(dataset.train)
        + told_apart(dataset.holdout)
        + told_apart(dataset.read_test())
    )
    expected = []
    for name, content in files.items():
      if isinstance(content, np.ndarray):
        content = tiny_images.encode(content)
      expected.append((content, int(name[5])))
    self.assertEqual(everything, decoded(expected, size=24))
    grey = self.load(image_size=24, channels=1)
    self.assertEqual(grey.input_shape, (24, 24, 1))

  def test_channels(self):
    colour = {'ants/z.png': tiny_images.pixels(0, (12, 16, 3))}
    self.assertEqual(self.load(two_classes()).input_shape, (12, 16, 1))
    self.assertEqual(self.load(channels=3).input_shape, (12, 16, 3))
    self.assertEqual(self.load(colour).input_shape, (12, 16, 3))
    self.assertEqual(self.load(channels=1).input_shape, (12, 16, 1))

  def test_hidden_files_are_ignored(self):
    before = self.load(two_classes())
    after = self.load({
        '.git/x': b'x', 'ants/.DS_Store': b'x', '.hidden': b'', 'readme': b'x'
    })  # pyformat: disable
    self.assertEqual(before.digest, after.digest)
    self.assertEqual(told_apart(before.train), told_apart(after.train))

  @parameterized.named_parameters(
      ('no_class', {'a.png': b''}, r'at least two folders .*; it has \[\]'),
      ('one_class', {'a/a.png': b''}, r"at least two .*; it has \['a'\]"),
      ('empty_class', {'a/a': b'', 'b/.x': b''}, 'class folder .*/b is empty'),
      ('nested', {'a/b/c': b'', 'b/a': b''}, "/a holds the folder 'b'"),
      ('no_test', {'train/a/x': b''}, "'train' but none named 'test'"),
      ('bad_head', {'ants/x.png': b'?'}, '/ants/x.png cannot be read .no imag'),
      ('empty_file', {'ants/x.png': b''}, '/ants/x.png cannot .*it is empty'),
      (
          'new_class',
          two_classes(prefix='train/')
          | {'test/ants/1': b'', 'test/wasps/1': b''},
          "/test has the class 'wasps', which the training images have not",
      ),
  )
  def test_refuses(self, files, message):
    if 'ants/x.png' in files:
      files = two_classes() | files
    with self.assertRaisesRegex(ValueError, message) as caught:
      self.load(files)
    self.assertNotIn('\n', str(caught.exception))

  def test_no_such_folder(self):
    with self.assertRaisesRegex(ValueError, '^There is no folder .*/nowhere'):
      data.load(data.DataConfig('folder:/nowhere'), seed=0)
    with self.assertRaisesRegex(ValueError, 'folder of images is folder:PATH'):
      data.load(data.DataConfig('floder:/nowhere'), seed=0)

  def test_empty_classes(self):
    files = two_classes(20) | {
        f'wasps/{number}': tiny_images.pixels(number, (12, 16))
        for number in range(2)
    }
    with self.assertRaisesRegex(ValueError, r'none of the classes \[2\]'):
      self.load(files, data_fraction='0.1')

  def test_damaged_files_are_left_out_and_counted(self):
    whole = tiny_images.encode(tiny_images.pixels(0, (12, 16)))
    files = two_classes() | {'ants/x.png': whole[:-30], 'bees/y.txt': b'hello'}
    with self.assertRaisesRegex(data.Damaged, 'ants/x.png|bees/y.txt'):
      self.load(files)
    with self.assertLogs(level='WARNING') as logs:
      dataset = self.load(skip_damaged=True)
      test = dataset.read_test()
    self.assertEqual(
        len(dataset.train) + len(dataset.holdout) + len(test), 20
    )
    self.assertLen(re.findall('[12] of .* cannot be read and', str(logs)), 1)

  def test_damage_in_the_test_is_found_before_training(self):
    files = two_classes(prefix='train/') | two_classes(prefix='test/')
    whole = tiny_images.encode(tiny_images.pixels(0, (12, 16)))
    with self.assertRaisesRegex(data.Damaged, 'test/bees/x.png cannot be read'):
      self.load(files | {'test/bees/x.png': whole[:-30]})

  def test_broken_link(self):
    tiny_images.write_folder(self.root, two_classes())
    (self.root / 'ants' / 'x.png').symlink_to('nowhere')
    with self.assertRaisesRegex(
        data.Damaged, 'ants/x.png cannot be read .No such file'
    ):
      self.load()

  def test_nothing_to_learn(self):
    black = np.zeros((8, 8), np.uint8)
    files = {f'{x}/{number}': black for x in 'ab' for number in range(9)}
    with self.assertRaisesRegex(ValueError, 'nothing to learn from'):
      self.load(files)

  def test_damage_may_be_skipped_by_the_same_run(self):
    self.load(two_classes(per_class=50))
    config = config_lib.RunConfig(
        workdir=str(self.root / '.run'),
        data=data.DataConfig(f'folder:{self.root}', holdout=9),
        batch_size=8,
    )
    claim(resolve.resolve(config, data.load(config.data, seed=0)))
    skipping = dataclasses.replace(
        config, data=dataclasses.replace(config.data, skip_damaged=True)
    )
    dataset = data.load(skipping.data, seed=0)
    claim(resolve.resolve(skipping, dataset))
    with self.assertRaisesRegex(ValueError, 'skip_damaged: True -> False'):
      claim(resolve.resolve(config, dataset))

  def test_damage_does_not_change_how_many_are_asked_for(self):
    whole = tiny_images.encode(tiny_images.pixels(0, (12, 16)))
    files = two_classes(per_class=50)
    damaged = {name: whole[:-30] for name in list(files)[::7]}
    dataset = self.load(files | damaged, holdout=30, skip_damaged=True)
    self.assertLess(len(dataset.holdout), 30)
    config = config_lib.RunConfig(
        workdir='x',
        data=data.DataConfig(dataset.name, holdout=30, skip_damaged=True),
        batch_size=8,
    )
    resolved = resolve.resolve(config, dataset)
    self.assertEqual(resolved.data.holdout, 30)
    again = data.load(resolved.data, seed=0)
    np.testing.assert_array_equal(again.train_indices, dataset.train_indices)

  def test_nothing_can_be_measured(self):
    whole = tiny_images.encode(tiny_images.pixels(0, (12, 16)))
    files = {f'{x}/{n}.png': whole[:-30] for x in 'ab' for n in range(9)}
    with self.assertRaisesRegex(ValueError, 'No training image can be read'):
      self.load(files, stream='always', skip_damaged=True, holdout=2)

  def test_other_files_are_another_run(self):
    workdir = str(self.root / '.run')
    dataset = self.load(two_classes(per_class=50))
    config = config_lib.RunConfig(
        workdir=workdir, data=data.DataConfig(dataset.name), batch_size=8
    )
    resolved = resolve.resolve(config, dataset)
    claim(resolved)
    claim(resolve.resolve(config, self.load()))  # As it was.
    self.assertEqual(resolved.data.digest, dataset.digest)
    data.load(resolved.data, seed=0)
    (self.root / 'ants' / '0.png').rename(self.root / 'ants' / 'new.png')
    with self.assertRaisesRegex(ValueError, r'another run \(data.digest: '):
      claim(resolve.resolve(config, self.load()))
    with self.assertRaisesRegex(ValueError, 'are not those of this run'):
      data.load(resolved.data, seed=0)
    os.rename(self.root / 'ants' / 'new.png', self.root / 'ants' / '0.png')
    data.load(resolved.data, seed=0)


def claim(config):
  """Starts a run in its work directory, and ends it at once."""
  with workdir_lib.claimed(config):
    pass


if __name__ == '__main__':
  absltest.main()
