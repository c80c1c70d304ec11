"""Tests of the presets: what they resolve to, and where their schedules lead.

The golden files hold every preset fully resolved, one file per table: what its
presets have in common, and what each has of its own. After a change that is
meant, write them anew and look at the differences:

    UPDATE_GOLDENS=1 python -m pytest tests/presets_test.py -k Golden
"""

import collections
import functools
import io
import json
import os
import pathlib
import re
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import pytest
import runs

from autogrow_jax import architecture as architecture_lib
from autogrow_jax.run import config as config_lib
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax.run import parallel
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax.run import steps
from autogrow_jax.run import resolve
from autogrow_jax.run import train
from autogrow_jax.methods import autogrow
from autogrow_jax.methods.sparsify import method as sparsify
from experiments import dry_run
from experiments import flags
from experiments import presets
from experiments.studies import null_model

Course = tuple[tuple[int, architecture_lib.Architecture], ...]

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'presets'

# Rows of the paper with something that grows, and all names.
TABLES = {2: (6, 9), 3: (12, 24), 4: (20, 40), 5: (12, 12), 6: (8, 8),
          7: (4, 4), 8: (16, 16), 9: (2, 6), 10: (6, 12)}

# Stages, J -> K -> depths where accuracy never moves. Computed by hand from
# Alg. 1: no stop before epoch J + 1, one stage at each check from then on.
FLOORS = {
    (3, 100): {
        1: '35-35-35', 2: '19-18-18', 3: '13-13-12', 4: '10-10-10', 5: '9-8-8',
        6: '7-7-7', 10: '5-5-5', 12: '5-4-4', 20: '4-3-3', 30: '3-3-2',
        50: '3-2-2',
    },
    (4, 100): {
        1: '27-27-27-26', 2: '15-14-14-14', 3: '10-10-10-10', 4: '8-8-8-8',
        5: '7-7-7-6', 6: '6-6-6-5', 10: '5-4-4-4', 12: '4-4-4-3',
        20: '3-3-3-3', 30: '3-3-2-2', 50: '3-2-2-2',
    },
    (4, 30): {2: '6-6-5-5', 3: '5-4-4-4', 5: '4-3-3-3'},
}

# Delta as the tables print it, in the order of the rows.
DELTAS = {
    2: (-0.77, -0.66, -0.27, -0.38, -0.37, -0.16),
    3: (-1.06, -0.59, 0.16, -0.41, -0.08, 0.55,
        -0.65, -0.65, 0.35, -0.50, 0.36, 0.91),
    4: (-0.03, -0.95, 0.04, -0.06, -0.03, -0.10, 1.22, -0.08, -0.17, 0.01,
        6.49, 31.53, 77.20, 0.56, None, 5.72, 29.34, 0.32, 0.72, 0.03),
    10: (0.43, 0.72, 0.83, 0.83, 0.70, 0.93),
}

# Growing epochs that follow from the depths found, K (growths + 1).
EPOCHS = {
    4: (372, 474, 300, 258, 291, 255, 291, 225, 312, 114,
        195, 243, 312, 147, 174, 195, 174, 132, 147, 138),
    5: (600, 380, 550, 325, 372, 227, 900, 540, 520, 335, 474, 202),
    9: (630, 1500),
    10: (86, 95, 64, 110, 42, 80),
}

# Millions of parameters of the networks found.
PARAMS = {
    4: (4.06, 5.14, 3.29, 2.80, 3.19, 136.6, 109.4, 118.1, 163.2, 61.4,
        1.05, 1.31, 1.68, 0.80, 0.95, 51.8, 45.6, 33.7, 39.2, 36.1),
    10: (68.5, 26.7, 88.8, 50.0, 17.8, 12.3),
}


@functools.cache
def stand_in(config: data.DataConfig) -> data.Dataset:
  return data.stand_in(config, seed=0)


@functools.cache
def resolved(name: str) -> config_lib.RunConfig:
  config = presets.get(name)
  if config.data.dataset.startswith('text:'):
    return config  # What depends on a text of one's own stays open.
  return resolve.resolve(config, stand_in(config.data))


def seed_of(name: str) -> architecture_lib.Architecture:
  config = resolved(name)
  return resolve.seed_architecture(config, stand_in(config.data))


def course(name: str) -> Course:
  """All architectures of a preset where accuracy never moves, with epochs."""
  architecture = seed_of(name)
  return _course(architecture, resolved(name).make_policy(architecture.depths))


@functools.cache
def _course(
    architecture: architecture_lib.Architecture, policy: policies.Policy
) -> Course:
  result = [(0, architecture)]
  for policy, decision in null_model.decisions(policy):
    if decision.action == 'grow':
      stages = decision.stages(architecture.depths)
      architecture = state_lib.append(architecture, stages).target
      result.append((policy.epoch, architecture))
  return tuple(result)


def rows_of(table: int, *, grown: bool) -> list[tuple[str, presets.Row]]:
  return [
      (name, row)
      for name, row in presets.rows().items()
      if name.startswith(f'table{table}/')
      and (not grown or row.config.policy.name != 'fixed')
  ]


def table_of(name: str) -> str:
  if '/' in name:
    return name.partition('/')[0]
  if isinstance(presets.get(name).method, sparsify.Sparsify):
    return 'masks'
  return 'depths' if name in of_depths() else 'widths'


def of_depths() -> list[str]:
  """The presets that append sub-modules."""
  return [
      name
      for name in presets.names()
      if isinstance(presets.get(name).method, autogrow.AutoGrow)
  ]


class NamesTest(parameterized.TestCase):

  def test_names_say_what_is_in_them(self):
    for name, row in presets.rows().items():
      _, network, dataset, variant = re.fullmatch(
          r'(table\d+)/([^-]+)-([^-]+)(.*)', name
      ).groups()
      self.assertEqual(row.config.network.name, network, name)
      self.assertEqual(row.config.data.dataset, dataset, name)
      is_fixed = row.config.policy.name == 'fixed'
      self.assertEqual(variant.endswith('-scratch'), is_fixed, name)
      if is_fixed:
        self.assertEqual(row.config.network.depths, row.found, name)
      self.assertLen(row.found, len(networks.get(network).widths), name)
      self.assertEqual(row.config.data.select_on, 'holdout')
      self.assertFalse(row.config.paper_compat)

  @parameterized.parameters(*TABLES)
  def test_every_row_has_a_name(self, table):
    self.assertEqual(
        (len(rows_of(table, grown=True)), len(rows_of(table, grown=False))),
        TABLES[table],
    )

  @parameterized.parameters(
      ('table5/basic3resnet-cifar10-k50', 'table5/basic3resnet-cifar10-k50'),
      ('cifar10', 'basic3resnet-cifar10'),
      ('runs/demo/config.json', 'basic3resnet-cifar10'),
  )
  def test_default_directory(self, preset, name):
    config = presets.get('cifar10')
    self.assertEqual(flags.run_name(preset, config), name)

  def test_default_directory_of_a_folder(self):
    config = config_lib.RunConfig(
        'w', data=data.DataConfig(dataset='folder:/my data/cats')
    )
    name = flags.run_name('digits', config)
    self.assertEqual(name, 'basic3resnet-folder:_my_data_cats')

  def test_unknown_names(self):
    for name in ('table1/basic3resnet-cifar10', 'table4', 'cifar', ''):
      with self.assertRaisesRegex(ValueError, 'Unknown preset.*--presets'):
        presets.get(name)
    with self.assertRaisesRegex(ValueError, 'no configuration nowhere.json'):
      presets.get('nowhere.json')


class TranscriptionTest(parameterized.TestCase):
  """Sums that only come out if depths and accuracies were copied well."""

  @parameterized.parameters(*DELTAS)
  def test_delta_is_between_grown_and_scratch(self, table):
    accuracy = {
        name: row.accuracy for name, row in rows_of(table, grown=False)
    }
    grown = rows_of(table, grown=True)
    for (name, row), delta in zip(grown, DELTAS[table], strict=True):
      shared = name.rpartition('-')[0] if table == 2 else name
      scratch = accuracy[f'{shared}-scratch']
      if delta is None:
        self.assertIsNone(scratch)
      else:
        self.assertAlmostEqual(row.accuracy - scratch, delta, 6, name)

  @parameterized.parameters(*EPOCHS)
  def test_growing_epochs(self, table):
    self.assertEqual(
        tuple(
            resolved(name).interval
            * (sum(row.found) - len(row.found) + 1)
            for name, row in rows_of(table, grown=True)
        ),
        EPOCHS[table],
    )

  def test_both_seeds_had_as_many_growths(self):
    self.assertEqual(
        [
            sum(row.found) - sum(resolved(name).network.depths)
            for name, row in rows_of(7, grown=True)
        ],
        [123, 123, 84, 69],
    )

  @parameterized.parameters(*PARAMS)
  def test_parameters_of_the_networks_found(self, table):
    for (name, row), millions in zip(
        rows_of(table, grown=True), PARAMS[table], strict=True
    ):
      dataset = stand_in(row.config.data)
      found = networks.get(row.config.network.name).seed(
          row.found, input_shape=dataset.input_shape, classes=dataset.classes,
          options={},
      )
      digits = 2 if millions < 10 else 1
      self.assertEqual(round(costs.params(found) / 1e6, digits), millions, name)

  def test_equal_rows_of_different_tables(self):
    rows = presets.rows()
    same = (
        ('table4/basic3resnet-cifar10', 'table6/basic3resnet-cifar10-gauss',
         'table7/basic3resnet-cifar10-seed1',
         'table8/basic3resnet-cifar10-100pct',
         'table5/basic3resnet-cifar10-k3'),
        ('table4/basic3resnet-cifar100', 'table6/basic3resnet-cifar100-gauss',
         'table5/basic3resnet-cifar100-k3'),
        ('table4/basic4resnet-cifar10', 'table7/basic4resnet-cifar10-seed1'),
        ('table4/basic4resnet-cifar100', 'table8/basic4resnet-cifar100-100pct'),
        ('table4/plain3net-mnist', 'table8/plain3net-mnist-100pct'),
        ('table4/plain4net-svhn_cropped',
         'table8/plain4net-svhn_cropped-100pct'),
    )
    for names in same:
      self.assertLen({(rows[n].found, rows[n].accuracy) for n in names}, 1)
      self.assertLen({resolved(name) for name in names}, 1)


class GoldenTest(absltest.TestCase):

  def test_resolved_configurations(self):
    tables = collections.defaultdict(dict)
    for name in presets.names():
      tables[table_of(name)][name] = _flat(resolved(name).to_json())
    texts = {
        f'{table}.json': _golden_text(configs)
        for table, configs in tables.items()
    }
    if os.environ.get('UPDATE_GOLDENS'):
      GOLDEN.mkdir(parents=True, exist_ok=True)
      for path in GOLDEN.iterdir():
        path.unlink()
      for file, text in texts.items():
        (GOLDEN / file).write_text(text)
    self.assertEqual({path.name for path in GOLDEN.iterdir()}, set(texts))
    for file, text in texts.items():
      self.assertMultiLineEqual((GOLDEN / file).read_text(), text, file)

  def test_a_golden_file_is_a_configuration(self):
    golden = json.loads((GOLDEN / 'table8.json').read_text())
    name = 'table8/plain4net-svhn_cropped-25pct'
    value = _nested({**golden['all'], **golden['each'][name]})
    config = config_lib.RunConfig.from_json(value)
    self.assertEqual(config, resolved(name))
    self.assertEqual(config.policy.interval, 12)
    self.assertEqual(config.policy.window, 100)
    self.assertEqual(config.data.holdout, 7257)
    self.assertEqual(config.schedule.learning_rate, 0.01)


class ScheduleTest(parameterized.TestCase):

  def test_floors(self):
    tried = set()
    for name in of_depths():
      config = resolved(name)
      depths = config.network.depths
      if config.policy.name != 'periodic' or max(depths) > 1:
        continue
      key = len(depths), config.policy.window
      if key in FLOORS:
        floor = FLOORS[key][config.interval]
        end, architecture = course(name)[-1]
        found = policies.format_depths(architecture.depths)
        self.assertEqual(found, floor, name)
        growths = sum(architecture.depths) - sum(depths)
        self.assertEqual(end, config.interval * growths, name)
        tried.add((key, config.interval))
    self.assertLen(tried, 9 + 5 + 3)

  def test_morphing_trains_by_the_whole_schedule_twice(self):
    name = 'table2/basic3resnet-cifar10-3to5-zero'
    config = resolved(name)
    (_, before), (epoch, after) = course(name)
    self.assertEqual((before.depths, after.depths), ((3, 3, 3), (5, 5, 5)))
    self.assertEqual(epoch, 200)
    schedule = optimizers.Schedule(
        learning_rate=config.schedule.learning_rate,
        growing=config.schedule.growing,
        interval=config.policy.interval,
        finetune_epochs=config.schedule.finetune_epochs,
        milestones=config.network.stem,
    )
    for epoch in range(200):
      self.assertEqual(
          schedule.rate('growing', epoch), schedule.rate('finetuning', epoch)
      )

  def test_every_architecture_has_a_cost(self):
    known = {}
    for name in of_depths():
      before = None
      for _, architecture in course(name):
        if architecture not in known:
          known[architecture] = (
              costs.params(architecture), costs.macs(architecture)
          )
        if before is not None:
          self.assertGreater(known[architecture][0], known[before][0])
          self.assertGreater(known[architecture][1], known[before][1])
        before = architecture
    # Multiply-adds grow by the same amount whichever stage grows.
    for network, step in (
        ('basic3resnet-cifar10', 4_718_592),
        ('basic4resnet-svhn_cropped', 75_497_472),
    ):
      stops = course(f'table4/{network}')
      macs = [known[architecture][1] for _, architecture in stops]
      self.assertEqual({b - a for a, b in zip(macs, macs[1:])}, {step})

  @pytest.mark.slow
  def test_deepest_architectures_can_be_trained(self):
    """Of every network, input and number of classes."""
    deepest = {}
    for name in of_depths():
      config = resolved(name)
      dataset = stand_in(config.data)
      key = config.network.name, dataset.input_shape, dataset.classes
      *_, (_, architecture) = course(name)
      depth, _, _ = deepest.get(key, (0, None, None))
      if sum(architecture.depths) > depth:
        deepest[key] = sum(architecture.depths), name, architecture
    self.assertLen(deepest, 3 * 4 + 3 + 1)  # And digits.
    for _, name, architecture in deepest.values():
      _trace(name, architecture)

  @pytest.mark.slow
  def test_all_architectures_can_be_trained(self):
    tried = set()
    for name in of_depths():
      for _, architecture in course(name):
        if architecture not in tried:
          tried.add(architecture)
          _trace(name, architecture)
    self.assertGreater(len(tried), 500)


class PaperProtocolTest(parameterized.TestCase):

  @parameterized.parameters(
      ('table4/plain3net-cifar10', 'uniform01', (0.2023, 0.1994, 0.2010)),
      ('table4/basic3resnet-mnist', 'uniform01', (1.0,)),
      ('table10/plain4net-imagenet2012-k2', 'ones', (0.229, 0.224, 0.225)),
      ('table9/basic3resnet-cifar10-scratch', 'uniform01',
       (0.2023, 0.1994, 0.2010)),
  )
  def test_on_top_of_a_row(self, name, scales, std):
    config = config_lib.in_paper_protocol(presets.get(name))
    dataset = stand_in(config.data)
    config = resolve.resolve(config, dataset)
    self.assertEqual(config.protocol, 'paper_compat')
    self.assertEqual(config.network.bn_scale_init, scales)
    self.assertEqual(dataset.preprocessing.std, std)
    self.assertEqual(len(dataset.holdout.labels), 0)
    self.assertIsNone(config.data.holdout)
    option = dict(resolve.seed_architecture(config, dataset).options)
    self.assertEqual(option['bn_scale_init'], scales)
    # Resolving again changes nothing, so that config.json is a fixed point.
    again = config_lib.RunConfig.from_json(
        json.loads(json.dumps(config.to_json()))
    )
    self.assertEqual(resolve.resolve(again, dataset), config)


  def test_not_on_data_with_a_hold_out(self):
    config = presets.get('cifar10')
    with self.assertRaisesRegex(ValueError, 'on holdout, but .*=test'):
      resolve.resolve(
          config_lib.in_paper_protocol(config), stand_in(config.data)
      )


class HeadlineTest(parameterized.TestCase):

  @parameterized.parameters(
      ({'interval': None}, '; K = 4, by the rule 3 / 0.75 of the data;'),
      ({'interval': 2}, None),
  )
  def test_says_what_the_rule_chose(self, policy, words):
    workdir = self.enter_context(tempfile.TemporaryDirectory())
    config = runs.tiny(
        f'{workdir}/run',
        data={'data_fraction': '0.75'},
        policy={'window': 9, **policy},
    )
    stdout = io.StringIO()
    with mock.patch.object(
        train, '_train_epoch', side_effect=train.Interrupted('', 2)
    ):
      with self.assertRaises(train.Interrupted):
        runs.quietly(config, stdout=stdout)
    headline = stdout.getvalue().splitlines()[0]
    if words:
      self.assertRegex(headline, words)
    else:
      self.assertNotIn('K = ', headline)
    stored = json.loads(pathlib.Path(workdir, 'run/config.json').read_text())
    self.assertEqual(stored['policy']['interval'], policy['interval'] or 4)


class ListingTest(absltest.TestCase):

  def test_has_all_presets(self):
    table, _, caution = presets.listing().partition('\n\n')
    header, *lines = table.splitlines()
    self.assertEqual([line.split()[0] for line in lines], [*presets.names()])
    self.assertIn("paper's depth", header)
    by_name = {line.split()[0]: line for line in lines}
    self.assertRegex(
        by_name['table8/basic3resnet-cifar10-25pct'],
        r'25 % of cifar10 +periodic +12 +100 +gauss +5-4-4 +21-12-7 +88.18',
    )
    self.assertRegex(
        by_name['table3/basic3resnet-cifar100-staircase-adam-scratch'],
        r'basic3resnet 3-3-3 +cifar100 +fixed +- +- +- +- +3-3-3 +70.50',
    )
    for words in ('selected on its\ntest set', 'depths of Table 10'):
      self.assertIn(words, caution)


def _trace(name: str, architecture: architecture_lib.Architecture) -> None:
  config = resolved(name)
  dataset = stand_in(config.data)
  dry_run.trace_step(
      steps.Computation(
          method=config.method,
          task=tasks.of_labels(dataset.train.labels),
          tx=optimizers.make(config.optimizer),
          preprocessing=dataset.preprocessing,
          dtype=jnp.float32,
          parallel=parallel.make('jit', 1),
      ),
      architecture,
      batch_size=config.batch_size,
      input_shape=dataset.train.images.shape[1:],
  )


def _flat(value: dict, prefix: str = '') -> dict:
  result = {}
  for key, item in value.items():
    if isinstance(item, dict):
      result |= _flat(item, f'{prefix}{key}.')
    else:
      result[prefix + key] = list(item) if isinstance(item, tuple) else item
  return result


def _nested(flat: dict) -> dict:
  result = {}
  for key, item in flat.items():
    *outer, last = key.split('.')
    inner = result
    for part in outer:
      inner = inner.setdefault(part, {})
    inner[last] = item
  return result


def _golden_text(configs: dict[str, dict]) -> str:
  """What all have in common, and what each has of its own."""
  first = next(iter(configs.values()))
  common = {
      key: value
      for key, value in first.items()
      if all(config[key] == value for config in configs.values())
  }
  own = {
      name: {k: v for k, v in config.items() if k not in common}
      for name, config in configs.items()
  }
  text = json.dumps({'all': common, 'each': own}, indent=1)
  # One line for each list.
  return re.sub(
      r'\[\s+([^\[\]]*?)\s+\]',
      lambda match: '[' + re.sub(r'\s+', ' ', match[1]) + ']',
      text,
  ) + '\n'


if __name__ == '__main__':
  absltest.main()
