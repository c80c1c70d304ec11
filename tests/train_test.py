"""Tests of `train.run`, in this process, on tiny runs."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import tempfile
import unittest
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import optax
import pytest
import runs

from autogrow_jax import architecture as architecture_lib
from autogrow_jax.run import config as config_lib
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import tasks
from autogrow_jax.run import history as history_lib
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax.run import programs
from autogrow_jax import randomness
from autogrow_jax.run import prepare
from autogrow_jax.run import resolve
from autogrow_jax.run import train
from autogrow_jax.run import trained
from experiments import report
from autogrow_jax.methods import autogrow

RESULT_KEYS = {
    'method', 'network', 'dataset', 'seed', 'found', 'architecture', 'params',
    'macs', 'layers', 'growths', 'growing_epochs', 'epochs', 'val_accuracy',
    'test_accuracy', 'select_on', 'train_macs', 'wall_seconds',
    'compile_seconds', 'compile_count', 'params_digest', 'versions',
    'memory',
}


def setUpModule():
  global BASE, RESULT
  directory = tempfile.TemporaryDirectory()
  unittest.addModuleCleanup(directory.cleanup)
  BASE = pathlib.Path(directory.name, 'base')
  RESULT = runs.quietly(runs.tiny(BASE))


class RunTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    directory = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(directory, 'run')

  def run_tiny(self, **changes):
    """A tiny run in `self.workdir`."""
    return runs.quietly(runs.tiny(self.workdir, **changes))


class ResultTest(RunTest):
  """What the usual run left behind."""

  def test_grows_as_the_policy_says(self):
    growths = runs.records(BASE, 'grow')
    self.assertEqual(
        [(item['epoch'], item['stage'], item['depths']) for item in growths],
        [(1, 0, [2, 1, 1]), (2, 1, [2, 2, 1])],
    )
    self.assertEqual(RESULT['found'], '2-2-1')
    self.assertEqual(
        [item['reason'] for item in runs.records(BASE, 'stop')], ['cap'] * 2
    )

  def test_policy_sees_the_selection_counts_only(self):
    # The counts of the history alone make the same decisions.
    policy = runs.tiny('').make_policy((1, 1, 1))
    found = []
    for item in runs.records(BASE, 'epoch'):
      if item['phase'] == 'growing':
        policy, decision = policy.update(
            policies.Observation(
                epoch=item['phase_epoch'],
                step=0,
                correct=item['correct'],
                total=item['total'],
                loss_sum=0,
                cost=0,
            )
        )
        if decision.action == 'grow':
          found.append((item['epoch'], decision.stage, list(policy.depths)))
    self.assertTrue(policy.finished)
    self.assertEqual(
        found,
        [
            (item['epoch'], item['stage'], item['depths'])
            for item in runs.records(BASE, 'grow')
        ],
    )

  def test_result_has_all_keys(self):
    self.assertContainsSubset(RESULT_KEYS, RESULT)
    self.assertEqual(RESULT, json.loads((BASE / 'result.json').read_text()))
    self.assertEqual(RESULT['method'], 'autogrow')
    self.assertEqual(RESULT['network'], 'basic3resnet')
    self.assertEqual(RESULT['dataset'], 'digits')
    self.assertEqual(RESULT['layers'], 2 * (2 + 2 + 1) + 2)
    self.assertEqual(RESULT['versions']['jax'], jax.__version__)
    # Runs of these tests share programs, which an earlier one compiled.
    self.assertGreater(RESULT['wall_seconds'], 0)
    self.assertGreater(RESULT['compile_seconds'], 0)
    self.assertEqual(RESULT['memory']['source'], 'compiler')
    self.assertGreater(RESULT['memory']['peak_bytes'], 8 * RESULT['params'])

  def test_result_agrees_with_the_history(self):
    epochs = runs.records(BASE, 'epoch')
    self.assertLen(epochs, RESULT['epochs'])
    self.assertEqual(
        [item['epoch'] for item in epochs], [*range(1, RESULT['epochs'] + 1)]
    )
    growing = [item for item in epochs if item['phase'] == 'growing']
    self.assertLen(growing, RESULT['growing_epochs'])
    self.assertLen(runs.records(BASE, 'grow'), RESULT['growths'])
    compilations = runs.records(BASE, 'compile')
    self.assertEqual(
        sum(item.get('count', 1) for item in compilations),
        RESULT['compile_count'],
    )
    self.assertLen(runs.records(BASE, 'end'), 1)
    last = epochs[-1]
    self.assertEqual(
        RESULT['val_accuracy'], 100 * last['correct'] / runs.HOLDOUT
    )
    self.assertEqual(
        RESULT['best_val_accuracy'],
        100 * max(item['correct'] for item in epochs) / runs.HOLDOUT,
    )
    self.assertEqual([item['total'] for item in epochs], [runs.HOLDOUT] * 5)
    self.assertEqual(
        [item['step'] for item in epochs],
        [runs.STEPS * item['epoch'] for item in epochs],
    )

  def test_ledger(self):
    spent = {'train': 0, 'eval': 0}
    architecture = architecture_lib.Architecture.from_json(
        RESULT['architecture']
    )
    self.assertEqual(RESULT['macs'], costs.macs(architecture))
    self.assertEqual(RESULT['params'], costs.params(architecture))
    macs = {}
    for item in runs.records(BASE):
      if item['event'] == 'epoch':
        macs[tuple(item['depths'])] = item['macs']
        spent['train'] += 3 * runs.STEPS * 64 * item['macs']
        spent['eval'] += runs.HOLDOUT * item['macs']
        self.assertEqual(item['train_macs'], spent['train'])
        self.assertEqual(item['eval_macs'], spent['eval'])
      if item['event'] == 'grow':  # Its receipt: a batch, twice, two modes.
        spent['eval'] += 2 * 256 * (item['macs_before'] + item['macs_after'])
    self.assertLen(macs, 3)
    self.assertEqual(RESULT['train_macs'], spent['train'])
    self.assertEqual(
        RESULT['eval_macs'], spent['eval'] + (360 + 360) * RESULT['macs']
    )

  def test_growth_receipts(self):
    for item in runs.records(BASE, 'grow'):
      self.assertGreater(item['params_after'], item['params_before'])
      self.assertGreater(item['macs_after'], item['macs_before'])
      self.assertGreater(item['logits_change_eval'], 0)
      self.assertGreater(item['logits_change_train'], 0)
      self.assertGreater(item['optimizer']['new'], 0)
      self.assertEqual(item['optimizer']['dropped'], 0)

  def test_learning_rates(self):
    rates = [item['learning_rate'] for item in runs.records(BASE, 'epoch')]
    np.testing.assert_allclose(rates, [0.05, 0.05, 0.05, 0.05, 0.0005])

  def test_config_is_resolved_and_repeats_the_run(self):
    value = json.loads((BASE / 'config.json').read_text())
    self.assertEqual(value['network']['depths'], [1, 1, 1])
    self.assertEqual(value['network']['stem'], 'small')
    self.assertEqual(value['network']['shortcut'], 'B')
    self.assertEqual(value['data']['holdout'], runs.HOLDOUT)
    config = config_lib.RunConfig.from_json(value)
    dataset = data.load(config.data, seed=config.seed)
    self.assertEqual(resolve.resolve(config, dataset), config)
    again = runs.quietly(
        dataclasses.replace(config, workdir=str(self.workdir))
    )
    self.assertEqual(again['params_digest'], RESULT['params_digest'])
    self.assertEqual(runs.course(self.workdir), runs.course(BASE))

  def test_report_and_tensorboard(self):
    self.assertFalse((BASE / 'report.html').exists())  # The binaries write it.
    report.write(BASE)
    page = (BASE / 'report.html').read_text()
    self.assertIn(RESULT['found'], page)
    self.assertIn(RESULT['params_digest'][:8], page)
    (events,) = (BASE / 'tensorboard').iterdir()
    content = events.read_bytes()
    self.assertEqual(content.count(b'accuracy/selection'), RESULT['epochs'])
    self.assertEqual(content.count(b'append s'), RESULT['growths'])

  def test_predict(self):
    network = trained.load(BASE)
    self.assertEqual(network.epoch, RESULT['epochs'])
    dataset = data.load(network.config.data, seed=0)
    for split, accuracy in (
        (dataset.holdout, RESULT['val_accuracy']),
        (dataset.read_test(), RESULT['test_accuracy']),
    ):
      logits = network.predict(split.images)
      self.assertEqual(logits.shape, (len(split), 10))
      correct = int(np.sum(np.argmax(logits, -1) == split.labels))
      self.assertEqual(100 * correct / len(split), accuracy)
      self.assertEqual(network.score(split).correct, correct)
    self.assertEqual(network.predict(split.images[:0]).shape, (0, 10))
    for images in (split.images[..., 0], split.images.astype(np.float32)):
      with self.assertRaisesRegex(ValueError, r'uint8 \(examples, 8, 8, 1\)'):
        network.predict(images)

  def test_finished_run_returns_its_result_without_training(self):
    files = {path: path.stat().st_mtime_ns for path in BASE.rglob('*')}
    with runs.watch_steps(lambda *_: self.fail('It trained.')):
      self.assertEqual(runs.quietly(runs.tiny(BASE)), RESULT)
    self.assertEqual(
        {path: path.stat().st_mtime_ns for path in BASE.rglob('*')}, files
    )

  def test_another_run_is_refused_and_left_alone(self):
    with self.assertRaisesRegex(
        ValueError, r'holds another run \(policy.window: 2 -> 3; seed: 0 -> 1\)'
    ):
      runs.quietly(runs.tiny(BASE, seed=1, policy={'window': 3}))
    self.assertEqual(runs.quietly(runs.tiny(BASE)), RESULT)

  def test_a_method_of_ones_own_is_another_run(self):
    with self.assertRaisesRegex(
        ValueError,
        r'run \(own:  -> method .*:AutoGrow AutoGrow\(.*scale=0.5.*\)\); '
        'choose',
    ):
      runs.quietly(runs.tiny(BASE), method=autogrow.AutoGrow(scale=0.5))
    changes = dict(policy={'name': 'fixed'}, schedule={'finetune_epochs': 0})
    begin = functools.partial(
        runs.quietly, runs.tiny(self.workdir, **changes)
    )
    result = begin(method=autogrow.AutoGrow(scale=0.5))
    self.assertEqual(begin(method=autogrow.AutoGrow(scale=0.5)), result)
    with self.assertRaisesRegex(ValueError, 'scale=0.5.* -> .*scale=0.25'):
      begin(method=autogrow.AutoGrow(scale=0.25))
    with self.assertRaisesRegex(ValueError, 'scale=0.5.* -> \\);'):
      begin()

  def test_loads_a_run_with_an_optimizer_of_ones_own(self):
    untrained = runs.tiny(
        self.workdir, policy={'name': 'fixed'}, schedule={'finetune_epochs': 0}
    )
    runs.quietly(untrained, optimizer=optax.adamw(1e-3))
    with self.assertRaisesRegex(
        ValueError,
        r"method or optimizer: 'state/opt_state/.* given objects \(optimizer ",
    ):
      trained.load(self.workdir)
    network = trained.load(self.workdir, optimizer=optax.adamw(1e-3))
    self.assertEqual(network.epoch, 0)

  def test_what_does_not_matter_may_change(self):
    again = runs.quietly(runs.tiny(BASE, checkpoints={'every': '3', 'keep': 9}))
    self.assertEqual(again, RESULT)

  def test_an_earlier_version_knew_fewer_fields(self):
    path = BASE / 'config.json'
    text = path.read_text()
    self.addCleanup(path.write_text, text)
    value = json.loads(text)
    del value['paper_compat'], value['data']['normalization']
    path.write_text(json.dumps(value))
    self.assertEqual(runs.quietly(runs.tiny(BASE)), RESULT)
    del value['seed'], value['batch_size']  # Not its default, which is 128.
    path.write_text(json.dumps(value))
    with self.assertRaisesRegex(ValueError, r'run \(batch_size: 128 -> 64\);'):
      runs.quietly(runs.tiny(BASE))

  def test_a_directory_with_other_files_is_refused(self):
    self.workdir.mkdir()
    (self.workdir / 'thesis.tex').write_text('Chapter 1')
    with self.assertRaisesRegex(ValueError, 'not empty and holds no run'):
      self.run_tiny()
    self.assertLen([*self.workdir.iterdir()], 1)


  def test_a_directory_that_a_kill_left_is_none_of_these(self):
    self.workdir.mkdir()
    (self.workdir / 'config.json.new').write_text('{"workd')
    result = self.run_tiny(
        policy={'name': 'fixed'}, schedule={'finetune_epochs': 0}
    )
    self.assertEqual((result['epochs'], result['train_macs']), (0, 0))


class SameRunTest(RunTest):
  """What must and what must not change a run."""

  def test_own_arrays_of_the_same_images(self):
    digits = data.load(data.DataConfig('digits'), seed=0)
    order = np.argsort(
        np.concatenate([digits.train_indices, digits.holdout_indices])
    )
    images = np.concatenate([digits.train.images, digits.holdout.images])[order]
    labels = np.concatenate([digits.train.labels, digits.holdout.labels])[order]
    test = digits.read_test()
    arrays = data.from_arrays(
        images,
        labels,
        test.images,
        test.labels,
        holdout=360,
        seed=0,
        preprocessing=digits.preprocessing,
        name='mine',
    )
    reads = []

    def read_test():  # Allowed once, when all epochs are over.
      self.assertLen(runs.records(self.workdir, 'epoch'), RESULT['epochs'])
      reads.append(True)
      return test

    result = runs.quietly(
        runs.tiny(self.workdir),
        dataset=dataclasses.replace(arrays, read_test=read_test),
    )
    self.assertLen(reads, 1)
    self.assertEqual(result['dataset'], 'mine')
    self.assertEqual(result['params_digest'], RESULT['params_digest'])
    self.assertEqual(result['test_accuracy'], RESULT['test_accuracy'])
    self.assertEqual(runs.course(self.workdir), runs.course(BASE))

  def test_batches_depend_on_seed_and_step_only(self):
    # Without growth, another policy, saving always: the very same batches.
    expected = []
    for epoch in range(3):
      permutation = data.epoch_permutation(
          randomness.stream(jax.random.key(0), 'data'), epoch, 1077
      )
      expected += [
          np.asarray(data.batch_indices(permutation, step, 64))
          for step in range(runs.STEPS)
      ]
    seen = []
    watch = runs.watch_steps(
        lambda step, arguments: seen.append(np.asarray(arguments[4]))
    )
    self.enter_context(watch)
    self.run_tiny(policy={'max_depths': [2, 1, 1]})
    grown, seen[:] = seen[: len(expected)], []
    self.assertLen(runs.records(self.workdir, 'grow'), 1)
    runs.quietly(
        runs.tiny(
            self.workdir.with_name('fixed'),
            policy={'name': 'fixed'},
            schedule={'finetune_epochs': 3},
        )
    )
    np.testing.assert_array_equal(grown, expected)
    np.testing.assert_array_equal(seen, expected)

  def test_another_seed_is_another_run(self):
    result = self.run_tiny(
        seed=1, policy={'max_epochs': 1}, schedule={'finetune_epochs': 0}
    )
    self.assertNotEqual(
        runs.course(self.workdir)[0]['train_loss'],
        runs.course(BASE)[0]['train_loss'],
    )
    self.assertEqual(result['seed'], 1)
    self.assertNotEqual(result['params_digest'], RESULT['params_digest'])

  def test_growing_must_not_happen_at_the_last_check(self):
    result = self.run_tiny(policy={'max_epochs': 2})
    self.assertEqual(result['found'], '2-1-1')
    self.assertEqual(result['growing_epochs'], 2)
    # Up to there it is the usual run.
    both = [
        [item for item in runs.course(path) if item['event'] == 'epoch'][:2]
        for path in (BASE, self.workdir)
    ]
    self.assertEqual(*both)

  def test_a_policy_at_its_caps_is_the_baseline(self):
    changes = {'schedule': {'finetune_epochs': 2}}
    fixed = self.run_tiny(policy={'name': 'fixed'}, **changes)
    other = self.workdir.with_name('capped')
    capped = runs.quietly(
        runs.tiny(other, policy={'max_depths': [1, 1, 1]}, **changes)
    )
    self.assertEqual(fixed['method'], 'fixed')
    self.assertEqual(fixed['params_digest'], capped['params_digest'])
    self.assertEqual((fixed['growths'], fixed['growing_epochs']), (0, 0))
    phases = [item['phase'] for item in runs.records(self.workdir, 'epoch')]
    self.assertEqual(phases, ['training'] * 2)


def copy_of_head(packed):
  """The last layer's kernel."""
  return np.array(packed.params['weights']['head']['dense']['kernel'])


class VariantTest(RunTest):
  """One run of every other kind."""

  @pytest.mark.slow
  def test_staircase(self):
    self.run_tiny(
        policy={'interval': 4, 'window': 4, 'max_epochs': 8},
        schedule={'growing': 'staircase', 'finetune_epochs': 4},
    )
    rates = [
        item['learning_rate'] for item in runs.records(self.workdir, 'epoch')
    ]
    np.testing.assert_allclose(rates, [0.05, 0.05, 0.005, 0.0005] * 3)
    self.assertEqual(runs.records(self.workdir, 'grow')[0]['epoch'], 4)

  @pytest.mark.slow
  def test_convergent(self):
    # A point in an epoch is progress at first, later it is none.
    result = self.run_tiny(
        policy={
            'name': 'convergent', 'interval': 2, 'threshold': '1',
            'max_depths': [2, 1, 1],
        }
    )
    self.assertEqual(result['found'], '2-1-1')
    (growth,) = runs.records(self.workdir, 'grow')
    epochs = runs.records(self.workdir, 'epoch')[: growth['epoch']]
    best = np.maximum.accumulate([item['correct'] for item in epochs])
    checks = range(2, len(epochs) + 1, 2)
    gains = [
        100 * (best[end - 1] - (best[end - 3] if end > 2 else 0)) / 360
        for end in checks
    ]
    self.assertLess(gains[-1], 1)
    self.assertGreaterEqual(min(gains[:-1]), 1)

  @pytest.mark.slow
  def test_adam_initializer(self):
    changes = {
        'method': {'kind': 'autogrow', 'initializer': 'adam'},
        'policy': {'max_depths': [2, 1, 1]},
        'schedule': {'finetune_epochs': 0},
    }
    result = self.run_tiny(**changes)
    (growth,) = runs.records(self.workdir, 'grow')
    report = growth['initializer']
    self.assertBetween(report['adam_epochs'], 1, 10)
    self.assertEqual(
        report['images'], report['adam_epochs'] * runs.STEPS * 64
    )
    epochs = runs.records(self.workdir, 'epoch')
    self.assertEqual(
        result['train_macs'],
        3 * 64 * runs.STEPS * sum(item['macs'] for item in epochs)
        + 3 * report['images'] * growth['macs_after'],
    )
    # Its epochs are not the policy's, nor the schedule's.
    self.assertLen(epochs, result['growing_epochs'])
    self.assertEqual(epochs[1]['step'], 2 * runs.STEPS)
    # A signal does not wait for them, and a restart repeats the growth.
    undisturbed, course = result['params_digest'], runs.course(self.workdir)
    self.workdir = self.workdir.with_name('disturbed')
    calls, batch_indices = 0, data.batch_indices

    def stop(*arguments):
      nonlocal calls
      calls += 1
      if calls == runs.STEPS + 3:
        os.kill(os.getpid(), signal.SIGTERM)
      return batch_indices(*arguments)

    with mock.patch.object(data, 'batch_indices', stop):
      with self.assertRaises(train.Interrupted):
        self.run_tiny(**changes)
    self.assertEqual(calls, runs.STEPS + 3)
    self.assertEmpty(runs.records(self.workdir, 'grow'))
    result = self.run_tiny(**changes)
    self.assertEqual(result['params_digest'], undisturbed)
    self.assertEqual(runs.course(self.workdir), course)

  @pytest.mark.slow
  def test_plain_network(self):
    result = self.run_tiny(
        network={'name': 'plain3net'},
        schedule={'learning_rate': 0.01},
        policy={'max_depths': [2, 1, 1]},
    )
    self.assertEqual(result['found'], '2-1-1')
    self.assert_learns(result)

  @pytest.mark.slow
  def test_perceptron(self):
    result = self.run_tiny(
        network={'name': 'mlp', 'widths': [32, 16]},
        policy={'max_depths': [1, 2]},
    )
    self.assertEqual(result['found'], '1-2')
    self.assertEqual(result['layers'], 4)
    self.assert_learns(result)
    again = runs.quietly(
        runs.tiny(
            self.workdir.with_name('again'),
            init_from=str(self.workdir),
            network={'name': 'mlp', 'widths': None},
            policy={'name': 'fixed'},
            schedule={'finetune_epochs': 0},
        )
    )
    self.assertEqual(again['params_digest'], result['params_digest'])
    self.assertEqual(again['test_accuracy'], result['test_accuracy'])

  @pytest.mark.slow
  def test_bfloat16(self):
    result = self.run_tiny(
        devices={'precision': 'bfloat16'}, policy={'name': 'fixed'}
    )
    self.assert_learns(result)
    self.assertNotEqual(
        runs.course(self.workdir)[0]['train_loss'],
        runs.course(BASE)[0]['train_loss'],
    )

  @pytest.mark.slow
  def test_accumulate(self):
    weights = []
    watch = runs.watch_steps(
        lambda step, arguments: weights.append(
            copy_of_head(arguments[0])
        )
    )
    with watch:
      result = self.run_tiny(
          optimizer={'accumulate': 2, 'clip_norm': 1},
          policy={'name': 'fixed'},
          schedule={'finetune_epochs': 4},
      )
    changed = [
        not np.array_equal(old, new) for old, new in zip(weights, weights[1:])
    ]
    self.assertEqual(changed, [step % 2 == 1 for step in range(len(changed))])
    self.assert_learns(result)

  def assert_learns(self, result):
    losses = [
        item['train_loss'] for item in runs.records(self.workdir, 'epoch')
    ]
    self.assertLess(losses[-1], 0.8 * losses[0])
    network = trained.load(self.workdir)
    for leaf in jax.tree.leaves((network.weights, network.stats)):
      self.assertEqual(leaf.dtype, np.float32)
    holdout = data.load(network.config.data, seed=0).holdout
    self.assertEqual(network.score(holdout).accuracy, result['val_accuracy'])

  def test_select_on_test(self):
    changes = {'data': {'select_on': 'test'}, 'policy': {'max_epochs': 1}}
    result = runs.quietly(
        runs.tiny(self.workdir, schedule={'finetune_epochs': 0}, **changes),
    )
    self.assertEqual(result['select_on'], 'test')
    self.assertEqual(result['val_accuracy'], result['test_accuracy'])
    config = trained.load(self.workdir).config
    self.assertEqual(config.data.select_on, 'test')
    self.assertIsNone(config.data.holdout)
    (epoch,) = runs.records(self.workdir, 'epoch')
    self.assertEqual(epoch['train_total'], 1437 // 64 * 64)


class InitFromTest(RunTest):

  def test_starts_from_the_final_network(self):
    result = self.run_tiny(
        init_from=str(BASE),
        policy={'name': 'fixed'},
        schedule={'finetune_epochs': 0},
    )
    self.assertEqual(result['params_digest'], RESULT['params_digest'])
    self.assertEqual(result['test_accuracy'], RESULT['test_accuracy'])
    self.assertEqual(result['train_macs'], 0)

  def test_draws_its_weights_afresh(self):
    """As those of the same depths from the start, whatever grew them."""
    changes = {'policy': {'name': 'fixed'}, 'schedule': {'finetune_epochs': 0}}
    result = self.run_tiny(init_from=str(BASE), reinitialize=True, **changes)
    self.assertNotEqual(result['params_digest'], RESULT['params_digest'])
    fresh = runs.quietly(
        runs.tiny(
            self.workdir.with_name('fresh'),
            network={'depths': [2, 2, 1]},
            **changes,
        )
    )
    self.assertEqual(result['params_digest'], fresh['params_digest'])

  def test_grows_on(self):
    origin = self.workdir.with_name('origin')
    runs.quietly(runs.tiny(origin, policy={'name': 'fixed'}))
    self.run_tiny(
        init_from=str(origin),
        policy={'max_depths': [2, 1, 1]},
        schedule={'finetune_epochs': 0},
    )
    (growth,) = runs.records(self.workdir, 'grow')
    self.assertEqual((growth['epoch'], growth['depths']), (1, [2, 1, 1]))
    first = runs.records(self.workdir, 'epoch')[0]
    self.assertGreater(first['train_correct'], 0.8 * first['train_total'])

  def test_continues_without_its_origin(self):
    origin = self.workdir.with_name('origin')
    changes = {
        'init_from': str(origin),
        'network': {'depths': None},
        'policy': {'name': 'fixed'},
    }
    runs.quietly(runs.tiny(origin, policy={'name': 'fixed'}))
    expected = runs.quietly(
        runs.tiny(self.workdir.with_name('undisturbed'), **changes)
    )

    def stop(count, unused_arguments):
      if count == runs.STEPS + 3:
        os.kill(os.getpid(), signal.SIGTERM)

    with runs.watch_steps(stop), self.assertRaises(train.Interrupted):
      self.run_tiny(**changes)
    shutil.rmtree(origin)
    with self.assertRaisesRegex(ValueError, 'depths'):
      self.run_tiny(**{**changes, 'network': {'depths': [3, 1, 1]}})
    result = self.run_tiny(**changes)
    self.assertEqual(result['params_digest'], expected['params_digest'])

  @parameterized.parameters(
      ({'network': {'name': 'plain3net'}}, 'network basic3resnet, but'),
      (
          {'network': {'depths': [2, 1, 1]}},
          r'depths \(2, 2, 1\), but \(2, 1, 1\) is asked for',
      ),
      ({'network': {'widths': [8, 8, 8]}}, 'widths'),
      ({'network': {'shortcut': 'A'}}, 'shortcut'),
  )
  def test_refuses_another_network(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      self.run_tiny(init_from=str(BASE), **changes)
    self.assertFalse(self.workdir.exists())

  def test_refuses_other_data(self):
    dataset = data.load(data.DataConfig('digits'), seed=0)
    with self.assertRaisesRegex(ValueError, 'classes'):
      runs.quietly(
          runs.tiny(self.workdir, init_from=str(BASE)),
          dataset=dataclasses.replace(dataset, classes=11),
      )
    self.assertFalse(self.workdir.exists())

  def test_refuses_what_is_no_run(self):
    with self.assertRaisesRegex(ValueError, 'holds no run'):
      self.run_tiny(init_from=str(self.workdir))
    self.assertFalse(self.workdir.exists())


class StopTest(RunTest):
  """Runs that end before their end."""

  def test_a_second_start_is_refused_while_the_first_works(self):
    fixed = {'policy': {'name': 'fixed'}, 'schedule': {'finetune_epochs': 1}}
    holder = f'process {os.getpid()} on {socket.gethostname()}; wait'

    def at_step(count, unused_arguments):
      if count == 3:
        with self.assertRaisesRegex(ValueError, f'in use by {holder}'):
          self.run_tiny(**fixed)

    with runs.watch_steps(at_step):
      result = self.run_tiny(**fixed)
    self.assertEqual(self.run_tiny(**fixed), result)

  @parameterized.parameters(
      (signal.SIGTERM, 21, False),
      (signal.SIGINT, 48, False),
      (signal.SIGINT, 80, True),
  )
  def test_signal_saves_and_the_run_continues(self, signum, step, is_damaged):
    # In the middle of an epoch, in the last step of one, in the very last.
    def at_step(count, unused_arguments):
      if count == step:
        os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with runs.watch_steps(at_step):
      with self.assertRaisesRegex(
          train.Interrupted,
          f'{signum.name}: saved .*step {step} .* the same command continues',
      ) as caught:
        self.run_tiny()
    self.assertEqual(caught.exception.signum, signum)
    self.assertEqual(signal.getsignal(signum), before)
    self.assertFalse((self.workdir / 'result.json').exists())
    if is_damaged:
      saved = (self.workdir / 'checkpoints').iterdir()
      newest = max(saved, key=lambda path: int(path.name))
      for path in newest.rglob('*'):
        if path.is_file():
          path.write_bytes(b'x')
    said = io.StringIO()
    result = runs.quietly(runs.tiny(self.workdir), stdout=said)
    lines = said.getvalue().splitlines()
    if is_damaged:
      self.assertStartsWith(
          lines.pop(0), f'warning: Checkpoint {newest} refused: damaged'
      )
    first = 64 if is_damaged else step  # The end of the epoch before.
    self.assertRegex(lines[0], f'continuing .* from step {first}, epoch')
    self.assertEqual(result['params_digest'], RESULT['params_digest'])
    self.assertEqual(runs.course(self.workdir), runs.course(BASE))
    self.assertEqual(result['train_macs'], RESULT['train_macs'])

  def test_signal_at_the_very_end_is_heard(self):
    write = history_lib.write_json

    def write_json(path, value):
      if path.name == 'result.json':
        os.kill(os.getpid(), signal.SIGTERM)
      write(path, value)

    changes = {'policy': {'name': 'fixed'}, 'schedule': {'finetune_epochs': 1}}
    with mock.patch.object(history_lib, 'write_json', write_json):
      with self.assertRaises(train.Interrupted):
        self.run_tiny(**changes)
    self.assertEqual(self.run_tiny(**changes)['epochs'], 1)

  def test_diverges_at_once(self):
    with self.assertRaisesRegex(
        train.Diverged,
        'diverged in epoch 1, before any growth: .*lower --learning_rate.*none',
    ):
      self.run_tiny(schedule={'learning_rate': 1e30})

  def test_diverges_after_a_growth(self):
    rate = optimizers.Schedule.rate
    late = lambda self, phase, epoch: (
        1e30 if epoch == 2 else rate(self, phase, epoch)
    )
    with mock.patch.object(optimizers.Schedule, 'rate', late):
      with self.assertRaisesRegex(
          train.Diverged,
          'epoch 3, after the growth to 2-2-1 at epoch 2: .* step 32 is kept',
      ):
        self.run_tiny()
    self.assertLen(runs.records(self.workdir, 'epoch'), 2)
    network = trained.load(self.workdir)  # The last good checkpoint.
    self.assertEqual(network.epoch, 2)
    # With the cause removed it continues, as if nothing had been.
    result = self.run_tiny()
    self.assertEqual(result['params_digest'], RESULT['params_digest'])
    self.assertEqual(runs.course(self.workdir), runs.course(BASE))

  def test_never_saves_what_is_not_finite(self):
    # The loss is that of before the update: it still is finite.
    infinite = lambda self, phase, epoch: float('inf') if epoch else 0.05
    with mock.patch.object(optimizers.Schedule, 'rate', infinite):
      with mock.patch.object(
          config_lib.CheckpointConfig, 'is_due', lambda *_, **__: True
      ):
        with self.assertRaisesRegex(train.Diverged, 'epoch 2'):
          self.run_tiny()
    network = trained.load(self.workdir)
    for leaf in jax.tree.leaves((network.weights, network.stats)):
      self.assertTrue(np.all(np.isfinite(leaf)))

  def test_diverges_in_evaluation(self):
    score = tasks.Score(1, 360, float('nan'), {'accuracy': 1.0})
    with mock.patch.object(tasks.Task, 'score', lambda *_: score):
      with self.assertRaisesRegex(train.Diverged, 'epoch 1'):
        self.run_tiny()


if __name__ == '__main__':
  absltest.main()
