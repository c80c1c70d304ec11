"""Tests for config.py."""

import dataclasses
import json
import os
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from autogrow_jax.run import config
from autogrow_jax import policies
from autogrow_jax.run import settings
from experiments import presets

RunConfig = config.RunConfig


class PathsTest(absltest.TestCase):

  def test_paths_are_what_is_meant_wherever_one_is(self):
    with mock.patch.dict(os.environ, HOME='/my/home'):
      config = RunConfig('~/run', init_from='other')
    self.assertEqual(config.workdir, '/my/home/run')
    self.assertEqual(config.init_from, os.path.abspath('other'))

  def test_null_bytes(self):
    with self.assertRaisesRegex(ValueError, 'has a null byte'):
      RunConfig('a\0b')


class JsonTest(parameterized.TestCase):

  @parameterized.parameters(*presets.PRESETS)
  def test_round_trip(self, name):
    original = dataclasses.replace(
        presets.get(name),
        workdir='somewhere',
        seed=7,
        network=config.NetworkConfig(depths=(1, 2, 3), widths=(4, 8, 16)),
    )
    text = json.dumps(original.to_json(), allow_nan=False)
    self.assertEqual(RunConfig.from_json(json.loads(text)), original)

  def test_every_field_survives(self):
    original = RunConfig.from_json({
        'workdir': 'w',
        'data': {
            'dataset': 'mnist', 'data_dir': 'd', 'holdout': 10,
            'data_fraction': '1/4', 'normalization': 'paper',
            'image_size': 32, 'channels': 1, 'stream': 'never',
            'skip_damaged': True, 'digest': 'ab', 'unroll': 5,
        },
        'network': {
            'name': 'basic4resnet', 'depths': [2, 1, 1, 1],
            'stem': 'imagenet', 'shortcut': 'A', 'bn_scale_init': 'uniform01',
            'widths': [4, 4, 4, 4], 'embedding': 5, 'keep': 0.5,
            'init_bound': 1,
        },
        'policy': {
            'name': 'convergent', 'interval': 2, 'window': 9,
            'threshold': '0.1', 'max_depths': [3, 3, 3, 3], 'max_epochs': 50,
            'error_rate': '0.1', 'target': [4, 4, 4, 4], 'patience': 1,
        },
        'method': {
            'kind': 'autogrow',
            'initializer': 'uniform', 'scale': 2, 'low': -1, 'high': 2,
            'random_bias': False,
        },
        'schedule': {
            'learning_rate': 1, 'growing': 'staircase', 'finetune_epochs': 0,
        },
        'optimizer': {
            'kind': 'sgd', 'momentum': 0, 'weight_decay': 0.1, 'clip_norm': 1,
            'accumulate': 2,
        },
        'devices': {
            'parallel': 'jit', 'num_devices': 1, 'precision': 'bfloat16',
            'decode_workers': 1, 'depth_buckets': 'exact',
            'compile_ahead': False,
            'remat': '0',
        },
        'checkpoints': {'every': '5m', 'keep': 1},
        'batch_size': 3,
        'seed': 2**32 - 1,
        'init_from': 'x',
        'own': 'task my:Task',
        'reinitialize': True,
    })
    default = RunConfig('other')
    for field in dataclasses.fields(RunConfig):
      value = getattr(original, field.name)
      if dataclasses.is_dataclass(value):
        for inner in dataclasses.fields(value):
          if (field.name, inner.name) == ('data', 'select_on'):
            continue  # Excludes `holdout`.
          self.assertNotEqual(
              getattr(value, inner.name),
              getattr(getattr(default, field.name), inner.name),
              f'{field.name}.{inner.name} is not tried',
          )
      elif field.name != 'paper_compat':  # Excludes `holdout`, too.
        self.assertNotEqual(value, getattr(default, field.name), field.name)
    text = json.dumps(original.to_json())
    self.assertEqual(RunConfig.from_json(json.loads(text)), original)

  @parameterized.parameters(
      ({}, 'incomplete.*workdir'),
      ([], 'not a JSON object'),
      ({'workdir': 'w', 'sead': 1}, r"unknown fields \['sead'\]"),
      ({'workdir': 'w', 'policy': {'K': 1}}, r"unknown fields \['policy.K'\]"),
      ({'workdir': 'w', 'policy': 'periodic'}, '^policy is not a JSON object'),
      ({'workdir': 1}, 'workdir has the wrong type: 1'),
      ({'workdir': 'w', 'seed': '1'}, "seed has the wrong type: '1'"),
      ({'workdir': 'w', 'seed': 1.5}, 'seed has the wrong type: 1.5'),
      ({'workdir': 'w', 'seed': None}, 'seed has the wrong type: None'),
      ({'workdir': 'w', 'seed': True}, 'seed has the wrong type: True'),
      (
          {'workdir': 'w', 'network': {'depths': 3}},
          'network.depths has the wrong type: 3',
      ),
      (
          {'workdir': 'w', 'network': {'depths': ['1', 1, 1]}},
          'network.depths has the wrong type',
      ),
      (
          {'workdir': 'w', 'policy': {'threshold': 0.05}},
          'policy.threshold has the wrong type: 0.05',
      ),
      (
          {'workdir': 'w', 'schedule': {'learning_rate': 'high'}},
          "schedule.learning_rate has the wrong type: 'high'",
      ),
      (
          {'workdir': 'w', 'method': {'kind': 'autogrow', 'random_bias': 1}},
          'method.random_bias has the wrong type: 1',
      ),
  )
  def test_refuses(self, value, message):
    with self.assertRaisesRegex(ValueError, message):
      RunConfig.from_json(value)

  def test_differences_name_the_fields(self):
    old = RunConfig('w').to_json()
    new = RunConfig(
        'w', seed=3, policy=config.PolicyConfig(interval=5)
    ).to_json()
    self.assertEqual(settings.differences(old, old), [])
    self.assertEqual(
        settings.differences(old, new),
        ['policy.interval: None -> 5', 'seed: 0 -> 3'],
    )
    self.assertEqual(settings.differences({'a': 1}, {}), ['a: 1 -> None'])


class ChecksTest(parameterized.TestCase):

  @parameterized.parameters(
      ({'batch_size': 0}, 'batch_size is at least 1, got 0'),
      ({'seed': -1}, 'seed is from 0 to'),
      ({'seed': 2**32}, 'seed is from 0 to'),
      ({'network': {'name': 'resnet'}}, 'Unknown network.*basic3resnet'),
      ({'network': {'name': 'math:pi'}}, 'no autogrow_jax network'),
      ({'network': {'name': 'nowhere:x'}}, 'cannot be imported'),
      ({'network': {'depths': [1, 1]}}, '3 stages, but depths 1-1 name 2'),
      ({'network': {'depths': [1, 0, 1]}}, 'positive|at least one'),
      ({'policy': {'name': 'p'}}, 'periodic, convergent, .*fixed'),
      ({'policy': {'interval': 0}}, 'K'),
      ({'policy': {'interval': 3, 'window': 2}}, 'at least K, 3'),
      ({'policy': {'threshold': '-1'}}, 'threshold is -1'),
      ({'policy': {'threshold': 'nan'}}, 'threshold is nan'),
      ({'policy': {'max_depths': [2, 2]}}, 'stages'),
      ({'policy': {'max_epochs': 0}}, 'max_epochs 0'),
      ({'method': {'kind': 'autogrow', 'initializer': 'he'}},
       'gauss, zero, uniform, adam'),
      ({'schedule': {'growing': 'linear'}}, 'constant, staircase, cosine'),
      ({'schedule': {'learning_rate': 0}}, 'positive'),
      ({'schedule': {'learning_rate': float('nan')}}, 'positive'),
      ({'schedule': {'finetune_epochs': -1}}, 'at least 0'),
      ({'optimizer': {'kind': 'sgd', 'momentum': 1}}, r'\[0, 1\)'),
      ({'optimizer': {'kind': 'sgd', 'accumulate': 0}}, 'at least 1'),
      ({'optimizer': {'kind': 'sgd', 'clip_norm': float('nan')}}, 'at least 0'),
      ({'devices': {'precision': 'float16'}}, 'float32, bfloat16'),
      ({'devices': {'parallel': 'xmap'}}, 'auto, pmap, jit'),
      ({'devices': {'num_devices': 0}}, 'at least 1'),
      ({'devices': {'remat': 'some'}}, 'none, all, or numbers of stages'),
      ({'devices': {'remat': '0,3'}}, 'stage 3, but the network has 3'),
      ({'checkpoints': {'every': '0'}}, 'epochs .* or minutes'),
      ({'checkpoints': {'keep': 0}}, 'keep is at least 1'),
      ({'data': {'select_on': 'train'}}, 'select_on must be'),
      ({'data': {'holdout': 0}}, 'holdout'),
      ({'data': {'data_fraction': '2'}}, 'at most 1'),
  )
  def test_refuses_at_construction(self, value, message):
    with self.assertRaisesRegex(ValueError, message):
      RunConfig.from_json({'workdir': 'w', **value})

  def test_a_fixed_policy_does_not_care_about_growing(self):
    value = {'policy': {'name': 'fixed', 'window': 1}}
    policy = RunConfig.from_json({'workdir': 'w', **value}).make_policy((1, 1))
    self.assertEqual(policy, policies.Fixed())


class IntervalTest(parameterized.TestCase):

  @parameterized.parameters(
      ('1', 3), ('0.75', 4), ('3/4', 4), ('0.5', 6), ('0.25', 12),
      ('2/3', 4), ('9/10', 3), ('1/33', 99),
  )
  def test_rule_of_the_data_set_study(self, fraction, interval):
    run_config = RunConfig(
        'w', data=config.data_lib.DataConfig(data_fraction=fraction)
    )
    self.assertIsNone(run_config.policy.interval)
    policy = run_config.make_policy((1, 1, 1))
    self.assertEqual((policy.interval, policy.window), (interval, 100))

  def test_given(self):
    run_config = RunConfig.from_json({
        'workdir': 'w',
        'data': {'data_fraction': '0.25'},
        'policy': {'interval': 2},
    })
    self.assertEqual(run_config.make_policy((1, 1)).interval, 2)

  def test_rule_beyond_the_window(self):
    with self.assertRaisesRegex(ValueError, 'at least K, 300'):
      RunConfig('w', data=config.data_lib.DataConfig(data_fraction='0.01'))


class PaperProtocolTest(parameterized.TestCase):

  def test_protocols(self):
    clean = RunConfig('w', data=config.data_lib.DataConfig(holdout=100))
    on_test = RunConfig('w', data=config.data_lib.DataConfig(select_on='test'))
    paper = config.in_paper_protocol(clean)
    self.assertEqual(
        [clean.protocol, on_test.protocol, paper.protocol],
        ['holdout', 'test', 'paper_compat'],
    )
    self.assertEqual(paper.data.select_on, 'test')
    self.assertEqual(paper.data.normalization, 'paper')
    self.assertIsNone(paper.data.holdout)
    self.assertEqual(config.in_paper_protocol(paper), paper)
    self.assertEqual(
        RunConfig.from_json(json.loads(json.dumps(paper.to_json()))), paper
    )

  @parameterized.parameters(
      ({}, 'excludes select_on=holdout, normalization=pixels. Leave'),
      (
          {'data': {'holdout': 7, 'normalization': 'paper'}},
          'excludes select_on=holdout, holdout=7. Leave',
      ),
      (
          {
              'data': {'select_on': 'test', 'normalization': 'paper'},
              'network': {'stem': 'small', 'bn_scale_init': 'ones'},
          },
          'excludes bn_scale_init=ones. Leave',
      ),
      (
          {
              'data': {'select_on': 'test', 'normalization': 'paper'},
              'network': {'stem': 'imagenet', 'bn_scale_init': 'uniform01'},
          },
          'excludes bn_scale_init=uniform01. Leave',
      ),
  )
  def test_refuses_what_contradicts(self, value, message):
    with self.assertRaisesRegex(ValueError, f'paper_compat.*{message}'):
      RunConfig.from_json({'workdir': 'w', 'paper_compat': True, **value})


class CheckpointsTest(parameterized.TestCase):

  def test_epochs(self):
    config_of = config.CheckpointConfig(every='3')
    due = [config_of.is_due(epoch=epoch, seconds=1e9) for epoch in range(1, 8)]
    self.assertEqual(due, [False, False, True, False, False, True, False])
    self.assertFalse(config_of.is_due(epoch=None, seconds=1e9))

  def test_minutes(self):
    config_of = config.CheckpointConfig(every='2m')
    for epoch in (None, 1, 2):
      self.assertFalse(config_of.is_due(epoch=epoch, seconds=119.9))
      self.assertTrue(config_of.is_due(epoch=epoch, seconds=120.0))

  @parameterized.parameters(
      '', '0', '0m', 'x', 'm', '1.5', '-1', '1h', ' 1', '2\n'
  )
  def test_refuses(self, text):
    with self.assertRaisesRegex(ValueError, 'checkpoints.every .* or minutes'):
      config.CheckpointConfig(every=text)


if __name__ == '__main__':
  absltest.main()
