"""Tests of the binaries: what they print, leave behind and refuse."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import runs

from autogrow_jax import policies
from autogrow_jax.run import history as history_lib
from experiments.studies import replay

TINY = (
    '--network.widths=4-8-16', '--grow_interval=1', '--stop_window=2',
    '--policy.max_depths=2-1-1', '--finetune_epochs=1', '--batch_size=64',
    f'--compilation_cache={runs.CACHE}',
)
# Arguments -> depths of the architectures that a dry run by shapes walks.
WALKS = (
    ((*TINY, '--policy=sequential', '--threshold=0.1'), ['1-1-1', '2-1-1']),
    (
        ('--preset=table2/basic3resnet-cifar10-3to5-adam',
         '--network.widths=4-4-4', '--batch_size=8'),
        ['3-3-3', '5-5-5'],
    ),
    (
        ('--preset=table10/plain4net-imagenet2012-k5', '--paper_compat',
         '--network.widths=4-4-4-4', '--policy.max_depths=2-1-1-1'),
        ['1-1-1-1', '2-1-1-1'],
    ),
    (
        ('--preset=table9/basic3resnet-cifar10-scratch',
         '--network.widths=4-4-4', '--batch_size=8'),
        ['6-6-5'],
    ),
)
# Arguments -> what the one line must say; config_test has the values that
# configurations refuse. {folder} has nothing but a file.
BAD_AUTOGROW = (
    ('--batch_sise=3', 'flag --batch_sise; did you mean --batch_size. See'),
    ('--max_depths=2-1-1', 'did you mean --policy.max_depths'),
    ('--optimizer=adamw --optimizer.momentum=0', 'flag --optimizer.momentum;'),
    ('--policy.error_rate=0.1', 'Unknown flag --policy.error_rate;'),
    ('digits', "Unknown argument 'digits'; flags begin with --"),
    ('--batch_size=many', "--batch_size must be an integer, got 'many'"),
    ('--network.widths=x', "widths must be integers such as '3-2-2', got 'x'"),
    ('--reinitialize=3', "Non-boolean argument .*'3'"),
    ('--dry_run=quick', 'should be one of <no|shapes|full>'),
    ('--optimizer=magic', "is one of sgd, .* or 'package.module:Class' of"),
    ('--optimizer=optax:adamw', "derived from Optimizer; got 'optax:adamw'"),
    ('--optimizer=autogrow_jax.costs:Ledger', 'derived from Optimizer; got'),
    ('--optimizer=autogrow_jax.optimizers:Optimizer', 'derived from Optimizer'),
    ('--policy=no:where', "policy is one of periodic, .*got 'no:where'"),
    ('--policy=every --dry_run=shapes', 'every so many epochs is experiments'),
    ('--policy=oneshot', 'needs a target, .*--policy.target=5-5-5'),
    ('--method=sparsify', 'sparsify does not append .*experiments.sparsify'),
    ('--compare=best', 'compare names some of seed, found, not best'),
    ('--preset=paper', "Unknown preset 'paper'; there are digits"),
    ('--preset=vgg19_cifar10_small', 'gauss_newton does not append'),
    (
        '--preset=table9/basic3resnet-cifar10-scratch',
        "fixed networks are experiments.baseline's",
    ),
    (
        '--preset=table4/basic3resnet-cifar10 --data_dir={folder}',
        'cifar10 is not prepared .*Prepare it',
    ),
    ('--dataset=imagenet', "Unknown data set 'imagenet'; there are digits"),
    ('--network=nowhere:net', "'nowhere:net' cannot be imported"),
    ('--network.widths=4-8', 'takes 3 positive widths, got 4-8'),
    (
        '--paper_compat --data.normalization=pixels',
        'it excludes normalization=pixels',
    ),
    ('--batch_size=1078', r'larger than .* \(1077 .*; take at most 1077'),
    ('--num_devices=4096', 'num_devices is 1 to .* got 4096'),
    ('--num_devices=2 --batch_size=65', 'cannot be split evenly among 2'),
    ('--init_from={folder}', 'holds no run'),
    ('--workdir={folder}/file/run', 'be used: Not a directory; choose another'),
    ('--workdir=gs://bucket/run', 'must be on a local .* is of gs: copy it'),
    ('--init_from=s3://bucket/run', 'must be on a local .* is of s3: copy it'),
    ('--workdir={folder}/file', 'cannot be used: File exists; choose another'),
    ('--workdir={folder}', 'is not empty and holds no run; choose another'),
)
BAD_DESCRIBE = (
    ('--network=resnet', 'Unknown network'),
    ('--depths=1-1', '3 stages, but depths 1-1 name 2'),
    ('--input_shape=axbxc', 'height x width x channels'),
    ('--input_shape=32x32x0', 'input shape'),
    ('--classes=0', 'classes is at least 1'),
    ('--network.widths=1-2', '3 positive widths'),
    ('--width=1-2-3', 'did you mean --network.widths'),
)


class DescribeTest(parameterized.TestCase):

  def test_golden_numbers(self):
    help_, presets, *outcomes = runs.call(
        'describe',
        [
            ['-h'],
            ['--presets'],
            ['--network=basic3resnet', '--depths=3-3-3', '--format=json'],
            [
                '--network=basic4resnet', '--depths=2-2-2-2',
                '--input_shape=224x224x3', '--classes=1000', '--format=json',
            ],
            ['--network=basic3resnet', '--depths=3-3-3'],
            *runs.arguments_of(BAD_DESCRIBE),
        ],
    )
    runs.check_help(self, help_, 'describe', 'input_shape',
                    'network.widths')
    runs.check_refused(self, outcomes[3:], BAD_DESCRIBE)
    self.assertRegex(presets.stdout, r'table8/plain4net-svhn_cropped-25pct +')
    self.assertIn('Do not aim at the depths of Table 10', presets.stdout)
    for outcome in (presets, *outcomes[:3]):
      self.assertEqual((outcome.status, outcome.stderr), (0, ''))
    small, large = [json.loads(outcome.stdout) for outcome in outcomes[:2]]
    # ResNet-20 and ResNet-18, with 1x1 projections.
    self.assertEqual((small['params'], small['layers']), (272_474, 20))
    self.assertEqual((large['params'], large['layers']), (11_689_512, 18))
    self.assertEqual(large['macs'], 1_814_073_344)
    self.assertGreater(large['activation_bytes'], small['activation_bytes'])
    self.assertEqual(
        sum(layer['macs'] for layer in small['table']), small['macs']
    )
    self.assertIn('272,474 parameters', outcomes[2].stdout)
    self.assertIn(f'{small["macs"]:,} multiply-adds', outcomes[2].stdout)


  def test_ends_quietly_where_nobody_reads(self):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.describe', '--network=vgg16'],
        cwd=runs.ROOT, stdout=writer, stderr=subprocess.PIPE, check=False,
    )
    os.close(writer)
    self.assertEqual((done.returncode, done.stderr), (128 + 13, b''))


class AutogrowTest(parameterized.TestCase):
  """A whole run, and what the other binaries make of it."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.directory = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.workdir = pathlib.Path(cls.directory, 'run')
    cls.dry = pathlib.Path(cls.directory, 'dry')
    cls.folder = pathlib.Path(cls.directory, 'folder')
    cls.folder.mkdir()
    (cls.folder / 'file').write_text('mine')
    flags = [
        f'--workdir={cls.workdir}', *TINY, '--compare=seed', '--placebo=yes'
    ]
    cls.outcome, cls.dry_outcome, cls.help, *others = runs.call(
        'autogrow',
        [
            flags,
            [f'--workdir={cls.dry}', *TINY, '--dry_run'],
            ['-h'],
            *(['--dry_run=shapes', *arguments] for arguments, _ in WALKS),
            [
                f'--workdir={cls.directory}/diverged', *TINY,
                '--learning_rate=1e30',
            ],
            [*flags, '--seed=1'],
            *runs.arguments_of(
                BAD_AUTOGROW, f'--workdir={cls.folder}/run',
                '--compilation_cache=', folder=str(cls.folder),
            ),
        ],
    )
    cls.walks = others[:len(WALKS)]
    cls.diverged, *cls.refused = others[len(WALKS):]
    cls.result = history_lib.read_json(cls.workdir / 'result.json')

  def test_output(self):
    self.assertEqual(self.outcome.status, 0, self.outcome.stderr)
    both = self.outcome.stdout + self.outcome.stderr
    self.assertNotIn('\x1b', both)
    self.assertNotIn('\r', both)
    self.assertRegex(
        self.outcome.stdout,
        rf'compiled programs: \d+ of [\d.]+ .?B in {re.escape(runs.CACHE)}\n',
    )
    self.assertRegex(
        self.outcome.stderr,
        r'^for comparison: seed, basic3resnet-1-1-1 .* \d+ epochs at .*\n$',
    )
    summary = self.outcome.stdout.partition('\n\n')[2]
    fixed = history_lib.read_json(self.workdir / 'fixed-seed' / 'result.json')
    for name, result in (('grown', self.result), ('seed, fixed', fixed)):
      self.assertRegex(
          summary,
          rf'{name} +{result["found"]} .* {result["val_accuracy"]:.2f} % +'
          rf'{result["test_accuracy"]:.2f} %\n',
      )
    self.assertIn(self.result['floor'], summary[summary.index('Growths:'):])
    placebo = history_lib.read_json(self.workdir / 'placebo' / 'result.json')
    self.assertEqual(placebo['found'], '1-1-1')
    self.assertEqual(
        self.result['placebo'],
        {'found': '2-1-1'} | {
            key: placebo[key]
            for key in ('epochs', 'test_accuracy', 'train_macs')
        },
    )
    for word in ('floor', 'null band', '10-90 %', 'need 4 ', 'Verdict: '):
      self.assertIn(word, summary)
    self.assertIn(f'Everything is in {self.workdir}', summary)
    for line in summary.replace(str(self.workdir), 'W').splitlines():
      self.assertLess(len(line), 81, line)
    # At equal training cost, to half an epoch of the fixed network.
    epoch = 3 * 1024 * fixed['macs']
    self.assertLessEqual(
        abs(self.result['train_macs'] - fixed['train_macs']), epoch / 2
    )

  def test_dry_run_writes_nothing(self):
    self.assertEqual(
        (self.dry_outcome.status, self.dry_outcome.stderr), (0, '')
    )
    self.assertFalse(self.dry.exists())
    lines = self.dry_outcome.stdout.splitlines()
    self.assertIn('1077 training images, 8x8x1, 10 classes', lines[0])
    self.assertEqual(
        [line.split()[1] for line in lines[2:4]], ['1-1-1', '2-1-1']
    )
    self.assertIn('2 architectures compiled', lines[-1])

  def test_dry_run_by_shapes(self):
    for (arguments, depths), outcome in zip(WALKS, self.walks, strict=True):
      with self.subTest(arguments):
        self.assertEqual(outcome.status, 0, outcome.stderr)
        first, _, *stops = outcome.stdout.splitlines()
        if '--paper_compat' in arguments:
          self.assertIn('decides on the test set', stops.pop())
        last = stops.pop()
        self.assertRegex(first, r'^Noise for \w+: \d+ training images')
        self.assertEqual([line.split()[1] for line in stops], depths)
        self.assertIn(f'{len(depths)} architectures traced', last)
        for line in (first, *stops):
          self.assertLess(len(line), 81)
    self.assertEqual(
        [outcome.stderr for outcome in self.walks],
        ['ignored: --threshold means nothing to the policy that is chosen\n',
         '', '', ''],
    )

  def test_help(self):
    runs.check_help(
        self, self.help, 'autogrow', 'workdir', 'grow_interval', 'dry_run',
        'policy.max_depths', 'method.initializer', 'paper_compat',
    )

  def test_refuses(self):
    bad = (
        ('another run', r'holds another run \(seed: 0 -> 1\); choose another'),
        *BAD_AUTOGROW,
    )
    runs.check_refused(self, self.refused, bad)
    self.assertEqual(self.diverged.status, 2)
    self.assertRegex(
        self.diverged.stderr,
        '^error: .* diverged in epoch 1, before any growth.*\n$',
    )
    self.assertEqual([p.name for p in self.folder.iterdir()], ['file'])
    self.assertEqual((self.folder / 'file').read_text(), 'mine')

  def test_evaluate(self):
    unfinished = pathlib.Path(self.directory, 'unfinished')
    shutil.copytree(self.workdir, unfinished)
    (unfinished / 'result.json').unlink()
    bad = (
        (f'--workdir={self.folder}', 'holds no run'),
        (f'--workdir={unfinished}', r'has not ended \(epoch 3\)'),
        ('--split=test', 'workdir'),
    )
    help_, *outcomes = runs.call(
        'evaluate',
        [
            ['-h'],
            *(
                [f'--workdir={self.workdir}', f'--split={split}']
                for split in ('holdout', 'test')
            ),
            *runs.arguments_of(bad),
        ],
    )
    runs.check_help(self, help_, 'evaluate', 'workdir', 'split')
    runs.check_refused(self, outcomes[2:], bad)
    for outcome, key in zip(outcomes, ('val_accuracy', 'test_accuracy')):
      self.assertEqual((outcome.status, outcome.stderr), (0, ''))
      found = json.loads(outcome.stdout)
      self.assertEqual(found['accuracy'], self.result[key])
      self.assertEqual(found['found'], self.result['found'])
      self.assertEqual(found['protocol'], 'holdout')

  def test_replay_gives_the_growths_of_the_run(self):
    policy = policies.Periodic(
        interval=1, window=2, threshold='0.05', depths=(1, 1, 1),
        max_depths=(2, 1, 1),
    )
    curve = replay.read_curve(self.workdir / 'history.jsonl')
    events = list(replay.events(policy, curve))
    self.assertEqual(
        [
            (item['epoch'], item['stage'], item['depths'])
            for item in events
            if item['event'] == 'grow'
        ],
        [
            (item['epoch'], item['stage'], '-'.join(map(str, item['depths'])))
            for item in runs.records(self.workdir, 'grow')
        ],
    )
    (end,) = [item for item in events if item['event'] == 'end']
    (phase,) = runs.records(self.workdir, 'phase')
    self.assertEqual(
        (end['epoch'], end['depths']), (phase['epoch'], self.result['found'])
    )


class BaselineTest(parameterized.TestCase):

  def test_run_and_bad_input(self):
    directory = pathlib.Path(
        self.enter_context(tempfile.TemporaryDirectory())
    )
    workdir = directory / 'run'
    bad = (
        ('--depths=1-1', '3 stages, but depths 1-1 name 2'),
        ('--epochs=-1', 'at least 0, got -1'),
        ('--policy=fixed', 'Unknown flag --policy'),
    )
    compat = directory / 'compat'
    help_, outcome, as_paper, *refused = runs.call(
        'baseline',
        [
            ['-h'],
            [
                f'--workdir={workdir}', '--depths=2-1-1', '--epochs=2',
                '--network.widths=4-8-16', '--data.select_on=test',
                '--batch_size=64',
                f'--compilation_cache={runs.CACHE}',
            ],
            [
                f'--workdir={compat}', '--epochs=2', '--network.widths=4-8-16',
                '--paper_compat', '--data.data_fraction=1/2', '--batch_size=64',
                f'--compilation_cache={runs.CACHE}',
            ],
            *runs.arguments_of(
                bad, f'--workdir={directory}/bad', '--compilation_cache='
            ),
        ],
    )
    self.assertEqual((outcome.status, outcome.stderr), (0, ''))
    self.assertIn('DECISIONS WERE TAKEN ON THE TEST SET', outcome.stdout)
    result = history_lib.read_json(workdir / 'result.json')
    self.assertEqual(result['method'], 'fixed')
    self.assertEqual((result['found'], result['epochs']), ('2-1-1', 2))
    self.assertEqual(result['select_on'], 'test')
    self.assertEqual(result['protocol'], 'test')
    self.assertNotIn('best_test_accuracy', result)
    runs.check_help(self, help_, 'baseline', 'workdir', 'depths', 'epochs')
    runs.check_refused(self, refused, bad)
    self.assertFalse((directory / 'bad').exists())
    self._check_paper_protocol(compat, as_paper)

  def _check_paper_protocol(self, workdir, outcome):
    """Every output of such a run says so."""
    self.assertEqual((outcome.status, outcome.stderr), (0, ''))
    result = history_lib.read_json(workdir / 'result.json')
    self.assertEqual(result['protocol'], 'paper_compat')
    epochs = runs.records(workdir, 'epoch')
    self.assertEqual(
        result['best_test_accuracy'],
        max(100 * item['correct'] / item['total'] for item in epochs),
    )
    self.assertEqual({item['total'] for item in epochs}, {360})  # The test set.
    self.assertEqual({item['protocol'] for item in epochs}, {'paper_compat'})
    config = history_lib.read_json(workdir / 'config.json')
    self.assertEqual(config['network']['bn_scale_init'], 'uniform01')
    headline, rest = outcome.stdout.split('\n', 1)
    progress, summary = rest.split('\n\n', 1)
    self.assertIn('(paper_compat): DECIDING ON THE TEST SET', headline)
    self.assertIn('ON TEST (paper_compat)', progress)
    self.assertIn('on 50 % of digits, seed 0', summary)
    self.assertIn('(paper_compat): decided on the test set', summary)
    self.assertIn(f'{result["best_test_accuracy"]:.2f} %. Not a', summary)
    self.assertRegex(
        summary,
        rf'best test +last test\n  fixed .* {result["best_test_accuracy"]:.2f} '
        rf'% +{result["test_accuracy"]:.2f} %\n',
    )
    for line in summary.replace(str(workdir), 'W').splitlines():
      self.assertLess(len(line), 81, line)
    page = (workdir / 'report.html').read_text()
    self.assertIn('The protocol of the paper (--paper_compat).', page)


if __name__ == '__main__':
  absltest.main()
