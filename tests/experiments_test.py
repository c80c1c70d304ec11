"""Tests of the binaries: what they print, leave behind and refuse."""

import json
import os
import pathlib
import re
import shutil
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import runs

from autogrow_jax.run import console
from autogrow_jax.run import history as history_lib

TINY = (
    '--network.widths=4-8-16', '--grow_interval=1', '--stop_window=2',
    '--policy.max_depths=2-1-1', '--finetune_epochs=1', '--batch_size=64',
    f'--compilation_cache={runs.CACHE}',
)

# Arguments -> what the one line must say. {cwd} is an empty directory.
BAD_AUTOGROW = (
    ('--network=resnet', "Unknown network 'resnet'; there are basic3resnet"),
    ('--network=math:pi', "'math:pi' is no autogrow_jax network"),
    ('--network=nowhere:net', "'nowhere:net' cannot be imported"),
    ('--dataset=imagenet', "Unknown data set 'imagenet'; there are digits"),
    ('--preset=paper', "Unknown preset 'paper'; there are digits"),
    ('--policy=random', "policy is one of periodic, .*got 'random'"),
    ('--policy=no:where', 'no:where is one of your own'),
    ('--policy=sequential --policy.error_rate=0.5', 'error_rate .* below 0.5'),
    ('--policy=oneshot', 'target is None'),
    ('--policy=oneshot --policy.target=1-1-1', 'must differ from'),
    ('--policy=oneshot --policy.target=x', "target_depths.*'x' must be"),
    ('--policy.error_rate=0.1', 'rate means nothing .*policy=periodic, only to seq'),
    ('--policy.target=3-3-3', 'target_depths .*=periodic, only to oneshot;'),
    (
        '--policy=sequential --threshold=0.1',
        'threshold .*=sequential, only to periodic and convergent; leave it',
    ),
    ('--policy=every --dry_run=shapes', 'every so many epochs is experiments'),
    ('--policy=convergent --stop_window=9', 'window means nothing .*=converg'),
    (
        '--policy=oneshot --policy.target=2-2-2 --stop_window=9',
        'stop_window means nothing .*=oneshot, only to periodic and seq',
    ),
    ('--method.initializer=he', 'one of gauss, zero, uniform, adam, got'),
    ('--schedule.growing=linear', 'one of constant, staircase, cosine, whole'),
    ('--data.select_on=train', "select_on must be one of .*got 'train'"),
    ('--network.stem=big', "stem is one of .*small.*got 'big'"),
    ('--network.shortcut=C', "shortcut is one of B, A, got 'C'"),
    ('--network.bn_scale_init=zeros', "one of .*uniform01.*got 'zeros'"),
    ('--devices.precision=float64', "one of float32, bfloat16, got 'float64'"),
    ('--parallel=xmap', "one of auto, pmap, jit, got 'xmap'"),
    ('--compare=best', 'compare names some of seed, found, not best'),
    ('--seed_depths=1-1', '3 stages, but depths 1-1 name 2'),
    ('--seed_depths=1-0-1', "seed_depths.*'1-0-1' must be positive"),
    ('--seed_depths=1--1-1', "'1--1-1' must be positive"),
    ('--seed_depths=one', "'one' must be positive"),
    ('--seed_depths=', "'' must be positive"),
    ('--policy.max_depths=2-2', 'same number of stages'),
    ('--policy.max_depths=2-2-0', "max_depths.*'2-2-0' must be positive"),
    ('--seed_depths=3-3-3 --policy.max_depths=2-2-2', 'max_depths is .* at least'),
    ('--network.widths=4-8', 'takes 3 positive widths, got 4-8'),
    ('--network.widths=x', "widths.*'x' must be positive"),
    ('--grow_interval=0', 'K is 0, .* 1 is the least'),
    ('--grow_interval=5 --stop_window=4', 'J is 4 epochs; .*at least K, 5'),
    ('--threshold=abc', 'threshold is abc; it must be a number'),
    ('--threshold=-1', 'threshold is -1; it must be a number'),
    ('--threshold=nan', 'threshold is nan; it must be a number'),
    ('--max_growing_epochs=0', 'max_epochs 0; 1 is the least'),
    ('--batch_size=0', 'batch_size is at least 1, got 0'),
    ('--batch_size=1078', r'larger than .* \(1077 .*; take at most 1077'),
    ('--data.holdout=0', 'holdout must be a whole number >= 1, got 0'),
    ('--data.holdout=1437', 'holdout must be below 1437.*got 1437'),
    ('--data.holdout=9 --data.select_on=test', "no use with select_on='test'"),
    ('--data.data_fraction=0', 'above 0 and at most 1'),
    ('--data.data_fraction=half', "text such as '0.25' or '1/4', got 'half'"),
    ('--seed=-1', r'seed is from 0 to 2\*\*32 - 1, got -1'),
    ('--seed=4294967296', 'seed is from 0 to'),
    ('--learning_rate=nan', 'learning_rate is a positive number, got nan'),
    ('--learning_rate=0', 'learning_rate is a positive number, got 0'),
    ('--learning_rate=-1', 'learning_rate is a positive number, got -1'),
    ('--optimizer.weight_decay=-1', 'weight_decay is a number of at least 0'),
    ('--optimizer.momentum=1', 'momentum is in'),
    ('--optimizer.clip_norm=nan', 'clip_norm is a number of at least 0'),
    ('--optimizer.accumulate=0', 'accumulate is at least 1'),
    ('--finetune_epochs=-1', 'finetune_epochs is at least 0, got -1'),
    ('--num_devices=0', 'num_devices is at least 1'),
    ('--num_devices=4096', 'num_devices is 1 to .* got 4096'),
    ('--num_devices=2 --batch_size=65', 'cannot be split evenly among 2'),
    ('--checkpoints.every=x', "epochs .* or minutes .*got 'x'"),
    ('--checkpoints.keep=0', 'keep is at least 1, got 0'),
    ('--dataset=mnist --data_dir={cwd}', 'mnist is not prepared .*Prepare it'),
    ('--init_from={cwd}', 'holds no run'),
    ('digits', "Unknown argument 'digits'; flags begin with --"),
    ('--data.image_size=0', 'image_size must be a whole number >= 1, got 0'),
    ('--data.channels=2', 'channels must be one of .*got 2'),
    ('--normalization=none', "normalization must be one of .*got 'none'"),
    ('--data.stream=some', "stream must be one of .*got 'some'"),
    (
        '--paper_compat --normalization=pixels '
        '--data.holdout=9 --data.select_on=holdout',
        'paper_compat is .*it excludes --data.select_on=holdout, --data.holdout=9, '
        r'--normalization=pixels\. Leave out',
    ),
    (
        '--paper_compat --network.stem=imagenet --network.bn_scale_init=uniform01',
        'paper_compat is .*it excludes bn_scale_init=uniform01',
    ),
    (
        '--preset=table9/basic3resnet-cifar10-scratch',
        "fixed networks are experiments.baseline's",
    ),
    (
        '--preset=table4/basic3resnet-cifar10 --data_dir={cwd}',
        'cifar10 is not prepared .*Prepare it',
    ),
    (
        '--preset=mnist --data.data_fraction=0.01 --data_dir={cwd}',
        'K is 300 epochs, by the rule',
    ),
)
# absl itself refuses these, with status 1 and in its own words.
REJECTED = (
    ('--batch_size=many', 'batch_size'),
    ('--learning_rate=fast', 'learning_rate'),
    ('--depht=3', 'depht'),
    ('--dry_run=quick', 'dry_run=quick: it is full, .* or shapes'),
)


class HelpTest(parameterized.TestCase):

  def test_own_flags_first(self):
    own = {
        'autogrow': (
            'grow_interval', 'threshold', 'dataset', 'dry_run', 'paper_compat',
        ),
        'baseline': ('depths', 'dataset', 'learning_rate'),
        'describe': ('input_shape', 'classes'),
        'evaluate': ('workdir', 'split'),
        'gauss_newton': ('seed_width', 'curvature', 'budget', 'dataset'),
        'replay': ('curve', 'stop_window'),
    }
    started = {name: runs.start(name, '--help') for name in own}
    for name, flags in own.items():
      outcome = runs.finish(started[name])
      self.assertEqual(outcome.status, 1, outcome)  # As absl has it.
      text = outcome.stdout
      introduction, _, described = text.partition('flags:\n')
      self.assertIn(f'python -m experiments.{name}', introduction)
      self.assertRegex(described, rf'^\n.*experiments/{name}.py:\n  --')
      for flag in flags:
        self.assertRegex(described, rf'--(\[no\])?{flag}\b')
      self.assertIn('default: ', described)
      self.assertNotIn('--logtostderr', text)


class DescribeTest(parameterized.TestCase):

  def test_golden_numbers(self):
    outcomes = runs.call(
        'describe',
        [
            ['--network=basic3resnet', '--depths=3-3-3', '--format=json'],
            [
                '--network=basic4resnet', '--depths=2-2-2-2',
                '--input_shape=224x224x3', '--classes=1000', '--format=json',
            ],
            ['--network=basic3resnet', '--depths=3-3-3'],
        ],
    )
    for outcome in outcomes:
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

  def test_lists_presets(self):
    (outcome,) = runs.call('describe', [['--presets']])
    self.assertEqual((outcome.status, outcome.stderr), (0, ''))
    self.assertRegex(outcome.stdout, r'table8/plain4net-svhn_cropped-25pct +')
    self.assertIn('Do not aim at the depths of Table 10', outcome.stdout)

  def test_bad_input(self):
    bad = (
        ('--network=resnet', 'Unknown network'),
        ('--depths=1-1', '3 stages, but depths 1-1 name 2'),
        ('--depths=0-1-1', 'must be positive'),
        ('--input_shape=32', r'\(height, width, channel\)|height x width'),
        ('--input_shape=axbxc', 'height x width x channels'),
        ('--input_shape=32x32x0', 'input shape'),
        ('--classes=0', 'classes is at least 1'),
        ('--network.stem=big', 'stem is one of'),
        ('--network.widths=1-2', '3 positive widths'),
        ('more', "Unknown argument 'more'"),
    )
    check_refused(
        self, runs.call('describe', [item[0].split() for item in bad]), bad
    )


class AutogrowTest(parameterized.TestCase):
  """A whole run, and what the other binaries make of it."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.directory = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.workdir = pathlib.Path(cls.directory, 'run')
    cls.dry = pathlib.Path(cls.directory, 'dry')
    cls.flags = [f'--workdir={cls.workdir}', *TINY, '--compare=seed']
    cls.outcome, cls.dry_outcome, cls.other, cls.diverged = runs.call(
        'autogrow',
        [
            cls.flags,
            [f'--workdir={cls.dry}', *TINY, '--dry_run'],
            [*cls.flags, '--seed=1'],
            [
                f'--workdir={cls.directory}/diverged', *TINY,
                '--learning_rate=1e30',
            ],
        ],
    )
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
    for word in ('floor', 'null band', '10-90 %'):
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
    calls = (
        (TINY, ['1-1-1', '2-1-1']),
        ((*TINY[:3], '--policy=sequential'), None),
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
    outcomes = runs.call(
        'autogrow',
        [['--dry_run=shapes', *arguments] for arguments, _ in calls],
    )
    for (arguments, depths), outcome in zip(calls, outcomes, strict=True):
      with self.subTest(arguments):
        self.assertEqual((outcome.status, outcome.stderr), (0, ''))
        first, _, *stops = outcome.stdout.splitlines()
        if '--paper_compat' in arguments:
          self.assertIn('decides on the test set', stops.pop())
        last = stops.pop()
        self.assertRegex(first, r'^Noise for \w+: \d+ training images')
        found = [line.split()[1] for line in stops]
        if depths is not None:
          self.assertEqual(found, depths)
        self.assertIn(f'{len(found)} architectures traced', last)
        for line in (first, *stops):
          self.assertLess(len(line), 81)

  def test_another_run_in_the_directory(self):
    check_refused(
        self,
        [self.other],
        [('', r'holds another run \(seed: 0 -> 1\); choose another')],
    )
    result = history_lib.read_json(self.workdir / 'result.json')
    self.assertEqual(result, self.result)

  def test_divergence(self):
    check_refused(
        self, [self.diverged], [('', 'diverged in epoch 1, before any growth')]
    )

  def test_evaluate(self):
    outcomes = runs.call(
        'evaluate',
        [
            [f'--workdir={self.workdir}', f'--split={split}']
            for split in ('holdout', 'test')
        ],
    )
    keys = ('val_accuracy', 'test_accuracy')
    for outcome, key in zip(outcomes, keys, strict=True):
      self.assertEqual((outcome.status, outcome.stderr), (0, ''))
      found = json.loads(outcome.stdout)
      self.assertEqual(found['accuracy'], self.result[key])
      self.assertEqual(found['found'], self.result['found'])
      self.assertEqual(found['select_on'], 'holdout')

  def test_evaluate_bad_input(self):
    empty = self.enter_context(tempfile.TemporaryDirectory())
    unfinished = pathlib.Path(empty, 'unfinished')
    shutil.copytree(self.workdir, unfinished)
    (unfinished / 'result.json').unlink()
    bad = (
        (f'--workdir={empty}', 'holds no run'),
        (f'--workdir={empty}/nowhere', 'holds no run'),
        (f'--workdir={unfinished}', r'has not ended \(epoch 3\)'),
        (f'--workdir={self.workdir} more', "Unknown argument 'more'"),
    )
    check_refused(
        self, runs.call('evaluate', [item[0].split() for item in bad]), bad
    )

  def test_replay_gives_the_growths_of_the_run(self):
    outcome = runs.finish(
        runs.start(
            'replay',
            f'--curve={self.workdir / "history.jsonl"}',
            '--grow_interval=1', '--stop_window=2', '--policy.max_depths=2-1-1',
        )
    )
    self.assertEqual((outcome.status, outcome.stderr), (0, ''))
    events = [json.loads(line) for line in outcome.stdout.splitlines()]
    self.assertEqual(
        [
            (item['epoch'], item['stage'], item['depths'])
            for item in events
            if item['event'] == 'grow'
        ],
        [
            (item['epoch'], item['stage'], console.format_depths(item['depths']))
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
        ('--depths=0-0-0', 'must be positive'),
        ('--epochs=-1', 'at least 0, got -1'),
        ('--batch_size=2000', 'at most 1077'),
    )
    compat = directory / 'compat'
    outcome, as_paper, *refused = runs.call(
        'baseline',
        [
            [
                f'--workdir={workdir}', '--depths=2-1-1', '--epochs=2',
                '--network.widths=4-8-16', '--data.select_on=test', '--batch_size=64',
                f'--compilation_cache={runs.CACHE}',
            ],
            [
                f'--workdir={compat}', '--epochs=2', '--network.widths=4-8-16',
                '--paper_compat', '--data.data_fraction=1/2', '--batch_size=64',
                f'--compilation_cache={runs.CACHE}',
            ],
            *(
                [*item[0].split(), f'--workdir={directory}/bad',
                 '--compilation_cache=']
                for item in bad
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
    check_refused(self, refused, bad)
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
    evaluated = runs.finish(
        runs.start('evaluate', f'--workdir={workdir}', '--split=test')
    )
    self.assertEqual(json.loads(evaluated.stdout)['protocol'], 'paper_compat')
    curve = workdir / 'history.jsonl'  # As if it had grown.
    curve.write_text(curve.read_text().replace('"training"', '"growing"'))
    replayed = runs.finish(
        runs.start('replay', f'--curve={curve}', '--grow_interval=1')
    )
    events = [json.loads(line) for line in replayed.stdout.splitlines()]
    self.assertEqual(
        [event['protocol'] for event in events], ['paper_compat'] * 2
    )


class BadInputTest(parameterized.TestCase):

  def test_autogrow(self):
    cwd = self.enter_context(tempfile.TemporaryDirectory())
    workdir = os.path.join(cwd, 'run')
    calls = [
        [*arguments.format(cwd=cwd).split(), f'--workdir={workdir}',
         '--compilation_cache=']
        for arguments, _ in BAD_AUTOGROW + REJECTED
    ]
    # A file in the way, and a directory that is not a run's.
    file = os.path.join(cwd, 'file')
    pathlib.Path(file).write_text('mine')
    bad = BAD_AUTOGROW + (
        ('', 'cannot be used: Not a directory; choose another'),
        ('', 'cannot be used: File exists; choose another'),
        ('', 'is not empty and holds no run; choose another'),
    )
    calls[len(BAD_AUTOGROW):len(BAD_AUTOGROW)] = [
        [f'--workdir={path}', '--compilation_cache=']
        for path in (os.path.join(file, 'run'), file, cwd)
    ]
    outcomes = runs.call('autogrow', calls)
    check_refused(self, outcomes[: len(bad)], bad)
    check_refused(self, outcomes[len(bad) :], REJECTED, status=1)
    self.assertEqual(os.listdir(cwd), ['file'])
    self.assertEqual(pathlib.Path(file).read_text(), 'mine')

  def test_as_users_see_it(self):
    process = runs.start('autogrow', '--dataset=imagenet', '--workdir=/x/y')
    outcome = runs.finish(process)
    self.assertEqual(outcome.status, 2)
    self.assertEqual(outcome.stdout, '')
    self.assertRegex(outcome.stderr, "^error: Unknown data set 'imagenet'.*\n$")


def check_refused(test, outcomes, bad, *, status=2):
  """Checks for one line each that says what is wrong."""
  for outcome, (arguments, message) in zip(outcomes, bad, strict=True):
    with test.subTest(arguments):
      test.assertEqual(outcome.status, status, outcome)
      test.assertNotIn('Traceback', outcome.stderr)
      test.assertRegex(outcome.stderr, message)
      if status == 2:
        test.assertRegex(outcome.stderr, r'^error: .*\n$')
        test.assertEqual(outcome.stderr.count('\n'), 1)


if __name__ == '__main__':
  absltest.main()
