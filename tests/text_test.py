"""Tests of text: its words, its windows, and runs of language models on it."""

import math
import os
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest
import runs

from autogrow_jax.run import config as config_lib
from autogrow_jax import data
from autogrow_jax.run import feeds
from autogrow_jax.run import console
from autogrow_jax.run import parallel
from autogrow_jax.run import train
from autogrow_jax.run import trained
from autogrow_jax.data import text
from experiments import report
from experiments import summary

_PTB = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'ptb'

POEM = 'the rain the sea\nand the rain again <unk>\n' * 20


def write(folder, train=POEM, valid=POEM, test=POEM, names='{}.txt'):
  for split, content in zip(text.SPLITS, (train, valid, test), strict=True):
    if content is not None:
      path = pathlib.Path(folder, names.format(split))
      path.write_text(content)
  return f'text:{folder}'


class CorpusTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.enter_context(tempfile.TemporaryDirectory())

  def test_vocabulary_by_frequency_and_alphabet(self):
    name = write(self.folder, 'b a\nc b\n', 'a\n', 'c b\n')
    corpus = text.read(name)
    self.assertEqual(corpus.vocabulary, ('<eos>', 'b', 'a', 'c'))
    self.assertEqual(corpus.tokens['train'].tolist(), [1, 2, 0, 3, 1, 0])
    self.assertEqual(corpus.tokens['valid'].tolist(), [2, 0])
    self.assertEqual(corpus.tokens['test'].tolist(), [3, 1, 0])

  def test_unknown_words(self):
    name = write(self.folder, 'a <unk>\n', 'a b\n', 'c\n')
    corpus = text.read(name)
    unknown = corpus.vocabulary.index('<unk>')
    self.assertEqual(corpus.tokens['valid'][1], unknown)
    self.assertEqual(corpus.tokens['test'][0], unknown)

  @parameterized.parameters('ptb.{}.txt', 'wiki.{}.tokens', 'my_{}.raw')
  def test_names_with_the_split_in_them(self, names):
    name = write(self.folder, names=names)
    write(self.folder, names=f'._{names}')  # As macOS leaves behind.
    self.assertLen(text.read(name).tokens['train'], 220)

  @parameterized.parameters('\u2028', '\u2029', '\x85', '\f', '\v', '\x1c', '')
  def test_lines_end_at_newlines_only(self, mark):
    words = POEM.replace('rain ', f'rain {mark} ')
    for end in ('\n', '\r\n', '\r'):
      for split in text.SPLITS:
        path = pathlib.Path(self.folder, f'{split}.txt')
        path.write_bytes(words.replace('\n', end).encode())
      corpus = text.read(f'text:{self.folder}')
      self.assertLen(corpus.tokens['train'], 220)
      self.assertLen(corpus.vocabulary, 7)

  @parameterized.parameters('train', 'valid', 'test')
  def test_a_byte_order_mark_is_no_word(self, split):
    name = write(self.folder)
    digest = text.read(name).digest
    path = pathlib.Path(self.folder, f'{split}.txt')
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    self.assertEqual(text.read(name).digest, digest)

  @parameterized.parameters(
      (POEM.encode('utf-16'), r'byte 0 \(0xff, in line 1\).*may be UTF-16'),
      ('a\nthé\n'.encode('latin-1'), r'byte 4 \(0xe9, in line 2\)'),
      (b'\xef\xbb\xbfa\x80', r'byte 4 \(0x80, in line 1\)'),
  )
  def test_other_encodings_are_named_by_file_and_place(self, content, message):
    name = write(self.folder)
    pathlib.Path(self.folder, 'valid.txt').write_bytes(content)
    with self.assertRaisesRegex(ValueError, f'valid.txt cannot.*{message}'):
      text.read(name)

  @parameterized.parameters(
      ({'test': None}, 'needs one file test.txt, .* there is none'),
      ({'valid': ' \n'}, 'valid.txt has no words'),
      ({'train': ''}, 'train.txt has no words'),
      (
          {'train': 'a\n', 'valid': 'a b\n', 'test': 'a\n'},
          "The word 'b' of .*valid.txt is not in .*train.txt; write <unk>",
      ),
  )
  def test_refusals(self, texts, message):
    name = write(self.folder, **texts)
    with self.assertRaisesRegex(ValueError, message) as raised:
      text.read(name)
    self.assertNotIn('\n', str(raised.exception))

  def test_folders_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'There is no folder .*/nowhere'):
      text.read(f'text:{self.folder}/nowhere')
    pathlib.Path(self.folder, 'my.train.1.txt').write_text(POEM)
    pathlib.Path(self.folder, 'my.train.2.txt').write_text(POEM)
    with self.assertRaisesRegex(ValueError, 'is my.train.1.txt, my.train'):
      text.read(f'text:{self.folder}')
    write(self.folder)
    pathlib.Path(self.folder, 'test.txt').write_bytes(b'\xff\xfe')
    with self.assertRaisesRegex(ValueError, 'test.txt cannot be read as text'):
      text.read(f'text:{self.folder}')

  def test_another_text_has_another_digest(self):
    name = write(self.folder)
    digest = text.read(name).digest
    self.assertEqual(text.read(name).digest, digest)
    write(self.folder, test=POEM.replace('again', 'sea'))
    self.assertNotEqual(text.read(name).digest, digest)
    config = data.DataConfig(name, digest=digest)
    with self.assertRaisesRegex(ValueError, 'not those of this run'):
      data.load(config, seed=0)

  def test_penn_treebank(self):
    if not _PTB.is_dir():
      self.skipTest(f'There is no {_PTB}.')
    corpus = text.read(f'text:{_PTB}')
    self.assertLen(corpus.vocabulary, 10_000)
    self.assertEqual(
        {name: len(tokens) for name, tokens in corpus.tokens.items()},
        {'train': 929_589, 'valid': 73_760, 'test': 82_430},
    )


class TopicsTest(absltest.TestCase):

  def test_splits(self):
    corpus = text.read('topics')
    sizes = {name: len(tokens) for name, tokens in corpus.tokens.items()}
    self.assertGreater(sizes['train'], 50_000)
    self.assertBetween(sizes['valid'] / sum(sizes.values()), 0.05, 0.25)
    self.assertBetween(sizes['test'] / sum(sizes.values()), 0.05, 0.25)
    self.assertGreater(len(corpus.vocabulary), 1000)
    self.assertEqual(text.read('topics').digest, corpus.digest)
    known = corpus.vocabulary.index('<unk>')
    for tokens in corpus.tokens.values():
      self.assertBetween(np.mean(tokens == known), 0.01, 0.1)

  def test_no_paragraph_is_in_two_splits(self):
    corpus = text.read('topics')
    end = corpus.vocabulary.index('<eos>')
    unknown = corpus.vocabulary.index('<unk>')
    paragraphs = []
    for tokens in corpus.tokens.values():
      ends = np.flatnonzero(tokens == end)
      paragraphs.append({
          tuple(part.tolist())
          for part in np.split(tokens, ends + 1)
          if len(part) > 15 and unknown not in part
      })
    train_text, valid, test = paragraphs
    self.assertGreater(min(map(len, paragraphs)), 20)
    self.assertFalse(train_text & valid | train_text & test | valid & test)


class WindowsTest(parameterized.TestCase):

  def test_labels_are_the_next_words(self):
    tokens = np.arange(100, 124, dtype=np.int32)
    split = text.training_windows(tokens, 5)
    np.testing.assert_array_equal(split.images, tokens[:20].reshape(4, 5))
    np.testing.assert_array_equal(split.labels, split.images + 1)
    self.assertEqual(split.length, 5)
    # The last word is a label only.
    self.assertLen(text.training_windows(tokens[:21], 5), 4)
    self.assertLen(text.training_windows(tokens[:20], 5), 3)
    with self.assertRaisesRegex(ValueError, '24 words, but a window of 24'):
      text.training_windows(tokens, 24)

  @parameterized.parameters(2, 512, 513, 514, 1025, 1500)
  def test_every_word_but_the_first_is_evaluated_once(self, count):
    tokens = np.arange(count, dtype=np.int32)
    split = text.evaluation_windows(tokens)
    self.assertEqual(split.images.shape[1], text.EVALUATION_STEPS)
    counts = split.labels >= 0
    np.testing.assert_array_equal(split.labels[counts], tokens[1:])
    np.testing.assert_array_equal(split.images[counts], tokens[:-1])
    self.assertLess(np.count_nonzero(~counts), text.EVALUATION_STEPS)

  def test_rows_go_on_from_batch_to_batch(self):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    words = ' '.join(f'w{number}' for number in range(130))
    name = write(folder, words, 'w1', 'w2')
    dataset = data.load(data.DataConfig(name, unroll=4), seed=0)
    feed = feeds.make(
        dataset,
        parallel.make('auto', 1),
        key=jax.random.key(0),
        batch_size=3,
    )
    batches = []
    for step in range(10):  # Of 32 windows, two are left over.
      images, labels, index = feed.take(step)
      batches.append(np.asarray(images)[index])
      self.assertEqual(batches[-1].shape, (3, 4))
    rows = np.concatenate(batches, axis=1)
    corpus = text.read(name).tokens['train']
    np.testing.assert_array_equal(rows, corpus[:120].reshape(3, 40))
    images, _, index = feed.take(10)  # The next epoch begins anew.
    np.testing.assert_array_equal(np.asarray(images)[index], batches[0])

  def test_fractions_are_first_parts(self):
    whole = data.load(data.DataConfig('topics'), seed=0)
    part = data.load(data.DataConfig('topics', data_fraction='1/4'), seed=5)
    count = round(len(whole.train) / 4)
    np.testing.assert_array_equal(part.train.images, whole.train.images[:count])
    self.assertEqual(part.classes, whole.classes)
    self.assertEqual(part.digest, whole.digest)

  @parameterized.parameters(
      ({'holdout': 5}, 'holdout=5 means nothing to text'),
      ({'image_size': 8}, 'image_size=8 means nothing to text'),
      ({'unroll': 0}, 'unroll must be a whole number >= 1, got 0'),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      data.DataConfig('topics', **options)


STEPS = 10  # Of an epoch: 105 windows in batches of ten.


def tiny(workdir, **changes):
  """A run of two epochs of ten steps."""
  value = {
      'workdir': str(workdir),
      'data': {'dataset': RunTest.text, 'unroll': 10},
      'network': {
          'name': 'lstm2', 'widths': [8, 8], 'keep': 0.9, 'init_bound': 0.1
      },
      'policy': {'name': 'fixed'},
      'schedule': {'finetune_epochs': 2},
      'optimizer': {
          'kind': 'sgd', 'momentum': 0.0, 'weight_decay': 0.0, 'clip_norm': 10.0
      },
      'batch_size': 10,
  }
  return config_lib.RunConfig.from_json(value | changes)


class RunTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    walk = np.cumsum(np.random.default_rng(0).integers(1, 4, 1500)) % 29
    words = [f'w{number}' for number in walk]
    cls.text = write(
        folder.name,
        *(' '.join(part) for part in np.split(words, (1050, 1250))),
    )
    cls.base = pathlib.Path(folder.name, 'base')
    cls.result = runs.quietly(tiny(cls.base))

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder, 'run')

  def test_perplexity_everywhere(self):
    epoch = runs.records(self.base, 'epoch')[-1]
    found = epoch['metrics']['perplexity']
    self.assertAlmostEqual(found, math.exp(epoch['loss']), 3)
    self.assertAlmostEqual(
        epoch['train_metrics']['perplexity'], math.exp(epoch['train_loss']), 3
    )
    self.assertEqual(self.result['val_perplexity'], found)
    line = console.format_record(epoch)
    self.assertIn(f'/{found:.4g}  ', line)
    self.assertLessEqual(len(line), 100)
    value = self.result['test_perplexity']
    shown = summary.of_run(self.result, 'w')
    self.assertRegex(shown, f'test perplexity(.|\n)* {value:.4g}\n')
    report.write(self.base)
    page = (self.base / 'report.html').read_text()
    self.assertIn(f'<b>{value:.4g}</b><span>test perplexity', page)

  def test_learns(self):
    first, second = (
        epoch['train_metrics']['perplexity']
        for epoch in runs.records(self.base, 'epoch')
    )
    self.assertLess(second, first)
    self.assertLess(second, 31)  # There are 30 words.

  def test_words_are_counted_and_charged(self):
    corpus = text.read(self.text)
    epoch = runs.records(self.base, 'epoch')[-1]
    words = 10 * 10 * STEPS
    self.assertEqual(epoch['train_total'], words)
    self.assertEqual(epoch['total'], len(corpus.tokens['valid']) - 1)
    self.assertEqual(epoch['train_macs'], 2 * 3 * words * epoch['macs'])
    sizes = dict(self.result['architecture']['sizes'])
    self.assertEqual(
        epoch['macs'], 2 * 4 * (8 + 8) * 8 + 8 * sizes['classes']
    )

  @parameterized.parameters(3, 17)
  def test_continues_bit_for_bit(self, step):
    self.interrupt(self.workdir, step)
    network = trained.load(self.workdir)
    carried = network.stats['s0b0']['cell']
    self.assertEqual(carried.shape, (10, 8))
    self.assertGreater(np.abs(carried).max(), 0)
    again = runs.quietly(tiny(self.workdir))
    self.assertEqual(again['params_digest'], self.result['params_digest'])
    self.assertEqual(runs.course(self.workdir), runs.course(self.base))

  def interrupt(self, workdir, step):
    def at_step(number, arguments):
      del arguments
      if number == step:
        os.kill(os.getpid(), 15)

    with runs.watch_steps(at_step), self.assertRaises(train.Interrupted):
      runs.quietly(tiny(workdir))

  def test_epochs_begin_without_a_past(self):
    seen = []

    def at_step(number, arguments):
      del number
      stats = arguments[0].stats['network']['stage0.0']
      seen.append(float(np.abs(stats['cell']).max()))

    with runs.watch_steps(at_step):
      runs.quietly(tiny(self.workdir))
    self.assertLen(seen, 2 * STEPS)
    zero = [number for number, value in enumerate(seen) if value == 0]
    self.assertEqual(zero, [0, STEPS])

  def test_trained_networks_predict_and_score(self):
    network = trained.load(self.base)
    dataset = data.load(network.config.data, seed=0)
    self.assertAlmostEqual(
        network.score(dataset.read_test()).metrics['perplexity'],
        self.result['test_perplexity'],
        places=3,
    )
    windows = dataset.train.images[:3]
    logits = network.predict(windows)
    self.assertEqual(logits.shape, (3, 10, dataset.classes))
    with self.assertRaisesRegex(ValueError, 'Words must be their numbers'):
      network.predict(windows.astype(np.uint8))

  @parameterized.parameters(
      (
          {'devices': {'parallel': 'pmap', 'num_devices': 2}},
          'use --parallel=jit for text',
      ),
      ({'devices': {'precision': 'bfloat16'}}, 'Text is computed in float32'),
      ({'batch_size': 200}, 'batch_size 200 is larger than the training data'),
      (
          {'network': {'name': 'mlp'}},
          'MLP takes images, but text:.* has tokens',
      ),
      (
          {'data': {'dataset': 'digits'}},
          'LSTM takes tokens, but digits has images',
      ),
  )
  def test_refusals(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      runs.quietly(tiny(self.workdir, **changes))

  def test_starts_from_a_run_with_as_many_streams(self):
    init_from = {'init_from': str(self.base), 'network': {'name': 'lstm2'}}
    with self.assertRaisesRegex(ValueError, 'streams 10, but 5 is asked for'):
      runs.quietly(tiny(self.workdir, **init_from, batch_size=5))
    result = runs.quietly(
        tiny(self.workdir, **init_from, schedule={'finetune_epochs': 1})
    )
    self.assertEqual(
        result['architecture'], self.result['architecture']
    )

  def test_two_devices_give_what_one_gives(self):
    result = runs.quietly(
        tiny(self.workdir, devices={'parallel': 'jit', 'num_devices': 2})
    )
    self.assertAlmostEqual(
        result['val_perplexity'], self.result['val_perplexity'], places=1
    )

  @pytest.mark.slow
  def test_grows_by_a_layer(self):
    result = runs.quietly(
        tiny(
            self.workdir,
            policy={'name': 'periodic', 'interval': 1, 'window': 1,
                    'max_depths': [2, 1]},
            schedule={'finetune_epochs': 1},
        )
    )
    self.assertEqual(result['found'], '2-1')
    (grown,) = runs.records(self.workdir, 'grow')
    self.assertEqual(grown['block'], 's0b1')


if __name__ == '__main__':
  absltest.main()
