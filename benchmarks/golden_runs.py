"""Compares tiny runs of two checkouts, bit for bit.

    python benchmarks/golden_runs.py run CHECKOUT OUT [NAME ...]
    python benchmarks/golden_runs.py compare OUT_BEFORE OUT_AFTER

The runs walk through all methods, policies, tasks and kinds of parallelism.
Digests depend on the machine, so both checkouts run on the same one. Names of
settings changed after version 0.1.0: `run` uses those that the checkout knows.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image

TIMES = frozenset({
    'wall_seconds', 'compile_seconds', 'compile_count', 'images_per_second',
    'pause_seconds', 'input_wait_seconds', 'seconds', 'bytes', 'device_bytes',
    'time',
})

# Settings that had flags of their own in version 0.1.0.
PATHS = {
    'widths': 'network.widths',
    'stem': 'network.stem',
    'shortcut': 'network.shortcut',
    'bn_scale_init': 'network.bn_scale_init',
    'keep_probability': 'network.keep',
    'max_depths': 'policy.max_depths',
    'target_depths': 'policy.target',
    'initializer': 'method.initializer',
    'growing_schedule': 'schedule.growing',
    'holdout': 'data.holdout',
    'data_fraction': 'data.data_fraction',
    'stream': 'data.stream',
    'unroll': 'data.unroll',
    'compile_ahead': 'devices.compile_ahead',
    'grow': 'method.grow',
    'clip_norm': 'optimizer.clip_norm',
    'image_size': 'data.image_size',
}

_TINY = {'widths': '4-8-16', 'max_depths': '2-2-1', 'grow_interval': '1',
         'stop_window': '2', 'finetune_epochs': '2', 'learning_rate': '0.05',
         'compare': ''}
_MASKS = {'depths': '2-2-2', 'network': 'plain3net', 'widths': '8-8-8',
          'epochs': '6', 'target_sparsity': '0.6', 'compare': ''}
_WIDER = {'seed_width': '4', 'phases': '2', 'epochs_per_phase': '1',
          'finetune_epochs': '1', 'examples': '256', 'compare': ''}
_FIXED = {'dataset': 'digits', 'data_fraction': '0.2', 'epochs': '1',
          'batch_size': '16'}

# Name -> (binary, flags).
RUNS = {
    'periodic': ('autogrow', _TINY),
    'jit': ('autogrow', _TINY | {'parallel': 'jit', 'num_devices': '4'}),
    'pmap': ('autogrow', _TINY | {'parallel': 'pmap', 'num_devices': '4'}),
    'convergent': ('autogrow', _TINY | {
        'policy': 'convergent', 'stop_window': None, 'threshold': '2',
        'initializer': 'zero'}),
    'oneshot': ('autogrow', _TINY | {
        'policy': 'oneshot', 'target_depths': '3-2-2', 'max_depths': None,
        'stop_window': None, 'initializer': 'uniform'}),
    'sequential': ('autogrow', _TINY | {'policy': 'sequential', 'seed': '1'}),
    'adam': ('autogrow', _TINY | {
        'initializer': 'adam', 'network': 'bottleneck4resnet',
        'widths': '4-4-4-4', 'max_depths': '2-1-1-1',
        'data_fraction': '0.3', 'grow_interval': '1'}),
    'masks': ('sparsify', _MASKS | {'backend': 'masked'}),
    'compact': ('sparsify', _MASKS | {'grow': 'both'}),
    'pruned': ('sparsify', _MASKS | {
        'method': 'l1', 'finetune_epochs': '2', 'epochs': '2'}),
    'gauss_newton': ('gauss_newton', _WIDER),
    'net2net': ('gauss_newton', _WIDER | {'strategy': 'net2net'}),
    'joint': ('gauss_newton', _WIDER | {
        'learn': 'joint', 'phases': '1', 'epochs_per_phase': '2'}),
    'lstm': ('baseline', {
        'dataset': 'text:DATA/text', 'network': 'lstm2', 'widths': '16-16',
        'epochs': '2', 'batch_size': '8', 'unroll': '10',
        'keep_probability': '0.8', 'learning_rate': '1',
        'clip_norm': '5'}),
    'deeplab': ('sparsify', {
        'dataset': 'pairs:DATA/pairs', 'network': 'deeplab',
        'depths': '1-1-1-1', 'widths': '8-8-8-8', 'image_size': '33',
        'batch_size': '4',
        'holdout': '8', 'epochs': '2', 'target_sparsity': '0.5',
        'compare': '', 'backend': 'masked'}),
    'stream': ('autogrow', _TINY | {
        'dataset': 'folder:DATA/folder', 'stream': 'always', 'holdout': '30',
        'batch_size': '16', 'max_depths': '2-1-1', 'data_fraction': None}),
    'resumed': ('autogrow', _TINY),
    'plain': ('baseline', _FIXED | {'network': 'plain3net', 'depths': '2-1-1'}),
    'bottleneck': ('baseline', _FIXED | {
        'network': 'bottleneck4resnet', 'widths': '4-4-4-4',
        'bn_scale_init': 'uniform01'}),
    'imagenet_stem': ('baseline', _FIXED | {
        'network': 'basic4resnet', 'widths': '4-4-4-4', 'stem': 'imagenet'}),
    'shortcut': ('baseline', _FIXED | {
        'network': 'basic3resnet', 'widths': '4-8-8', 'shortcut': 'A'}),
    'wide': ('baseline', _FIXED | {
        'network': 'wrn28_10', 'widths': '4-4-4', 'depths': '1-1-1'}),
    'mobilenet': ('baseline', _FIXED | {
        'network': 'mobilenet1', 'widths': '4-4-8-8-8', 'depths': '1-1-1-1-1'}),
    'vgg': ('baseline', _FIXED | {
        'network': 'vgg16', 'widths': '4-4-8-8-8', 'depths': '1-1-1-1-1'}),
}


def make_data(folder):
  """Small data sets, always the same."""
  if folder.exists():
    return
  rng = np.random.default_rng(0)
  words = [f'w{i}' for i in range(30)]
  (folder / 'text').mkdir(parents=True)
  for name, lines in (('train', 120), ('valid', 30), ('test', 30)):
    text = '\n'.join(
        ' '.join(rng.choice(words, 9).tolist()) for _ in range(lines)
    )
    (folder / 'text' / f'{name}.txt').write_text(text + '\n')
  for name in ('images', 'masks'):
    (folder / 'pairs' / name).mkdir(parents=True)
  for index in range(40):
    mask = np.zeros((40, 40), np.uint8)
    top, left = rng.integers(4, 20, 2)
    mask[top : top + 12, left : left + 12] = 1 + index % 2
    image = (mask[..., None] * 80 + rng.integers(0, 60, (40, 40, 3)))
    image = Image.fromarray(image.astype(np.uint8))
    image.save(folder / 'pairs' / 'images' / f'{index:03}.png')
    mask = Image.fromarray(mask)
    mask.save(folder / 'pairs' / 'masks' / f'{index:03}.png')
  for split, count in (('train', 60), ('test', 10)):
    for label in range(3):
      path = folder / 'folder' / split / f'c{label}'
      path.mkdir(parents=True)
      for index in range(count):
        image = rng.integers(0, 120, (12, 12, 3)).astype(np.uint8)
        image[4 * label : 4 * label + 4] += 100
        Image.fromarray(image).save(path / f'{index:03}.png')


def command(checkout, binary, flags, data, workdir):
  """The command line of a run."""
  is_old = not (checkout / 'autogrow_jax' / 'core').exists()
  arguments = []
  for name, value in flags.items():
    if value is None:
      continue
    value = value.replace('DATA', str(data))
    if not is_old:
      name = PATHS.get(name, name)
    arguments.append(f'--{name}={value}')
  # The only one that there was before there was a setting.
  methods = checkout / 'autogrow_jax' / 'methods'
  settings = methods / 'sparsify' / 'method.py'
  if (
      binary == 'sparsify'
      and 'method' not in flags
      and settings.exists()
      and 'estimator' in settings.read_text()
  ):
    arguments.append('--method.estimator=paper')
  return [
      sys.executable, '-m', f'experiments.{binary}', f'--workdir={workdir}',
      *arguments,
  ]


def run(checkout, out, name):
  """Does one run; returns seconds and exit status."""
  binary, flags = RUNS[name]
  workdir = out / name
  shutil.rmtree(workdir, ignore_errors=True)
  line = command(checkout, binary, flags, out.parent / 'data', workdir)
  env = {
      **os.environ,
      'PYTHONPATH': str(checkout),
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
  }
  started = time.time()
  log = open(out / f'{name}.log', 'w')
  if name == 'resumed':  # Killed in the third epoch, and started again.
    process = subprocess.Popen(
        line, cwd=checkout, env=env, stdout=log, stderr=log
    )
    history = workdir / 'history.jsonl'
    while process.poll() is None:
      if history.exists() and history.read_text().count('"epoch",') >= 3:
        process.send_signal(signal.SIGKILL)
      time.sleep(0.05)
    log.write('\nKILLED\n')
  status = subprocess.call(line, cwd=checkout, env=env, stdout=log, stderr=log)
  return time.time() - started, status


def records(workdir):
  """History without times."""
  lines = (workdir / 'history.jsonl').read_text().splitlines()
  found = []
  for record in map(json.loads, lines):
    if record['event'] != 'compile':
      found.append({k: v for k, v in record.items() if k not in TIMES})
  return found


def flat(value, prefix=''):
  """Nested values by path."""
  if isinstance(value, dict):
    return {
        path: item
        for key, inner in value.items()
        for path, item in flat(inner, f'{prefix}{key}.').items()
    }
  return {prefix[:-1]: value}


def compare(before, after):
  """Prints a line for each run; returns how many differ."""
  bad = 0
  for name in RUNS:
    paths = [folder / name / 'result.json' for folder in (before, after)]
    if not paths[0].exists():
      continue
    if not paths[1].exists():
      print(f'{name:14} NOT THERE')
      bad += 1
      continue
    digests = [json.loads(p.read_text())['params_digest'][:12] for p in paths]
    old, new = (records(folder / name) for folder in (before, after))
    notes = []
    if len(old) != len(new):
      notes.append(f'{len(old)} and {len(new)} records')
    gone, come = set(), set()
    for a, b in zip(old, new):
      a, b = flat(a), flat(b)
      gone |= a.keys() - b.keys()
      come |= b.keys() - a.keys()
      notes += [
          f'epoch {a["epoch"]} {a["event"]} {k}: {a[k]} -> {b[k]}'
          for k in a.keys() & b.keys()
          if a[k] != b[k]
      ]
    is_bad = digests[0] != digests[1] or bool(notes)
    bad += is_bad
    print(
        f'{name:14} {digests[0]} {digests[1]}',
        'DIFFERENT' if is_bad else 'equal',
        f'without {sorted(gone)}' if gone else '',
        f'with {sorted(come)}' if come else '',
        '; '.join(notes[:4]),
    )
  return bad


def main():
  mode, first, second, *names = sys.argv[1:]
  first, second = (pathlib.Path(path).resolve() for path in (first, second))
  if mode == 'compare':
    sys.exit(compare(first, second) > 0)
  second.mkdir(parents=True, exist_ok=True)
  make_data(second.parent / 'data')
  for name in names or RUNS:
    seconds, status = run(first, second, name)
    print(f'{name:14} {seconds:6.1f} s  exit status {status}', flush=True)


if __name__ == '__main__':
  main()
