r"""Runs a growth policy on a recorded accuracy curve, without training.

So K, J and tau can be chosen on old runs. The curve is a file with

  {"total": 10000, "correct": [4000, 5000, ...]}

(correct predictions on the selection set after each epoch), or the
history.jsonl that a run left behind. The answer is one JSON object per line,
one line per event ("grow", "stop" or "end"), such as

  {"epoch": 3, "event": "grow", "stage": 0, "depths": "2-1-1"}

The curve does not react: growing at another epoch would have changed what
follows. Example:

  python -m experiments.replay --curve=runs/demo/history.jsonl --grow_interval=2

With --noise in place of --curve the policies see nothing but noise around a
constant accuracy, many times over. There is one line for each policy, with
percentiles of the growing epochs and of the sub-modules per stage that it
finds; that of 'sequential' comes twice, for an untrained and for a trained
start. Example, for a hold-out of 5,000 images:

  python -m experiments.replay --noise=94 --total=5000 --common_sigma=0.3
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app
from absl import flags

from autogrow_jax import controls
from autogrow_jax import policies

_CURVE = flags.DEFINE_string('curve', None, 'File with the recorded curve.')
_NOISE = flags.DEFINE_float(
    'noise', None, 'Accuracy, percent, around which there is only noise.'
)
_TOTAL = flags.DEFINE_integer(
    'total', 5000, 'Size of the selection set of --noise, images.'
)
_COMMON_SIGMA = flags.DEFINE_float(
    'common_sigma',
    0.0,
    'Standard deviation, percentage points, of the accuracy from epoch to '
    'epoch in --noise, beside the noise of counting --total images.',
)
_RUNS = flags.DEFINE_integer('runs', 400, 'Simulated runs of --noise.')
_POLICY = flags.DEFINE_enum(
    'policy',
    'periodic',
    ['periodic', 'convergent', 'sequential'],
    'Grow at every check (p-AutoGrow), when converged (c-AutoGrow), or until '
    'an exact test finds no improvement (--noise only). With --noise all '
    'three unless one is named.',
)
_GROW_INTERVAL = flags.DEFINE_integer(
    'grow_interval', 3, 'K: epochs between two checks.'
)
_STOP_WINDOW = flags.DEFINE_integer(
    'stop_window',
    100,
    'J: epochs over which the stop check measures the gain (not convergent).',
)
_THRESHOLD = flags.DEFINE_string(
    'threshold', '0.05', 'tau: a gain below it is none; percentage points.'
)
_ERROR_RATE = flags.DEFINE_string(
    'error_rate',
    '0.05',
    'alpha: how often noise may pass for a gain (sequential only).',
)
_SEED_DEPTHS = flags.DEFINE_string(
    'seed_depths', '1-1-1', 'Sub-modules per stage of the seed network.'
)
_MAX_DEPTHS = flags.DEFINE_string(
    'max_depths',
    None,
    'Most sub-modules per stage: one number for all stages, or one for each, '
    'such as 9-9-9. Unset: 200.',
)


def replay(
    policy: policies.RoundRobin,
    curve: Sequence[policies.Observation],
) -> Iterator[dict[str, Any]]:
  """Yields the events of a policy on a curve, as far as either lasts."""
  if policy.finished:  # All stages of the seed are at their caps.
    yield _event(policy.epoch, 'end', None, policy.depths)
  for observation in curve:
    if policy.finished:
      return
    before = policy.depths
    policy, decision = policy.update(observation)
    for stage in decision.closed:
      yield _event(observation.epoch, 'stop', stage, before)
    if decision.action == 'grow':
      yield _event(observation.epoch, 'grow', decision.stage, policy.depths)
    if decision.action == 'finish':
      yield _event(observation.epoch, 'end', None, policy.depths)


def read_curve(path: str) -> list[policies.Observation]:
  """Reads either form of a curve, complete and checked.

  Raises:
    ValueError: if there is no possible curve in the file.
  """
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8')
  except OSError as error:
    raise ValueError(f'Cannot read the curve {path!r}: {error.strerror}.')
  except UnicodeDecodeError:
    raise ValueError(f'The curve {path!r} is not a text file in UTF-8.')
  try:
    data = json.loads(text)
  except (ValueError, RecursionError):
    data = None  # Not one JSON value: it may be one per line.
  if isinstance(data, dict) and 'event' not in data:
    epochs = _epochs_of_object(data)
  else:
    epochs = _epochs_of_history(path, text)
  if not epochs:
    raise ValueError(
        f'The curve {path!r} has no epochs; it needs at least one count in '
        '"correct", or one line with event "epoch" and phase "growing".'
    )
  return [
      _observation(epoch, correct, total, index)
      for index, (epoch, correct, total) in enumerate(epochs, 1)
  ]


def protocol_of(path: str) -> dict[str, str]:
  """What to add to the events of a curve that is of a test set.

  Args:
    path: of a curve that `read_curve` can read.

  Returns:
    {'protocol': 'test' or 'paper_compat'}, or nothing for a hold-out.
  """
  for line in pathlib.Path(path).read_text(encoding='utf-8').split('\n'):
    try:
      entry = json.loads(line)
    except (ValueError, RecursionError):
      continue  # Empty, or a line of one object over several.
    if isinstance(entry, dict) and entry.get('select_on') == 'test':
      return {'protocol': entry.get('protocol', 'test')}
  return {}


def main(argv: Sequence[str]) -> int:
  """Prints the events; returns the exit status."""
  try:
    if len(argv) > 1:
      raise ValueError(
          f'Unexpected argument {argv[1]!r}; the curve is given by '
          '--curve=FILE.'
      )
    if (_CURVE.value is None) == (_NOISE.value is None):
      raise ValueError('Give either --curve=FILE or --noise=PERCENT.')
    if _NOISE.value is not None:
      answers = list(_noise())
    elif _POLICY.value == 'sequential':
      raise ValueError(
          'A curve has counts only, and --policy=sequential compares single '
          'images; take another policy, or --noise.'
      )
    else:
      policy = _policy_of_flags(_POLICY.value)
      _refuse_unused(policy)
      events = list(replay(policy, read_curve(_CURVE.value)))
      protocol = protocol_of(_CURVE.value)
      answers = [{**event, **protocol} for event in events]
  except ValueError as error:
    print(f'replay: {error}', file=sys.stderr)
    return 2
  try:
    print(''.join(json.dumps(answer) + '\n' for answer in answers), end='')
    sys.stdout.flush()
  except BrokenPipeError:  # The reader, such as `head`, has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 0


def _noise() -> Iterator[dict[str, Any]]:
  """What policies find in noise, one answer each."""
  if not 0 <= _NOISE.value <= 100:
    raise ValueError(
        f'--noise is {_NOISE.value}; it must be an accuracy from 0 to 100 '
        'percent.'
    )
  names = ['periodic', 'convergent', 'sequential']
  if flags.FLAGS['policy'].present:
    names = [_POLICY.value]
    _refuse_unused(_policy_of_flags(_POLICY.value))
  # All flags are checked before anything takes time.
  for name, policy in [(name, _policy_of_flags(name)) for name in names]:
    # Only one of them knows whether it starts from a trained network.
    for trained in (False, True) if name == 'sequential' else (False,):
      band = controls.null_band(
          policy,
          total=_TOTAL.value,
          accuracy=_NOISE.value / 100,
          runs=_RUNS.value,
          common_sigma=_COMMON_SIGMA.value,
          trained=trained,
      )
      yield {
          'policy': name,
          'start': 'trained' if trained else 'untrained',
          'floor': policies.format_depths(
              controls.floor(policy, trained=trained).depths
          ),
          **dataclasses.asdict(band),
      }


def _policy_of_flags(name: str) -> policies.RoundRobin:
  depths = policies.parse_depths(_SEED_DEPTHS.value)
  caps = None
  if _MAX_DEPTHS.value is not None:
    caps = policies.parse_depths(_MAX_DEPTHS.value)
    if len(caps) == 1:
      caps *= len(depths)
  shared = dict(
      interval=_GROW_INTERVAL.value,
      depths=depths,
      caps=caps,
  )
  if name == 'sequential':
    return policies.Sequential(
        window=_STOP_WINDOW.value, error_rate=_ERROR_RATE.value, **shared
    )
  shared['threshold'] = _THRESHOLD.value
  if name == 'convergent':
    return policies.Convergent(**shared)
  return policies.Periodic(window=_STOP_WINDOW.value, **shared)


def _refuse_unused(policy: policies.RoundRobin) -> None:
  """Raises a ValueError if flags are given that mean nothing to a policy."""
  for flag, name in (
      (_STOP_WINDOW, 'window'),
      (_THRESHOLD, 'threshold'),
      (_ERROR_RATE, 'error_rate'),
  ):
    if flag.present and not hasattr(policy, name):
      raise ValueError(
          f'--{flag.name} means nothing to --policy={_POLICY.value}; leave it '
          'out, or choose another --policy.'
      )


def _epochs_of_object(data: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
  """The (epoch, correct, total) of a curve in one JSON object."""
  if 'total' not in data or not isinstance(data.get('correct'), list):
    raise ValueError(
        f'The curve has the keys {sorted(data)}; it needs a number "total" and '
        'a list "correct" with one count per epoch.'
    )
  return [
      (epoch, correct, data['total'])
      for epoch, correct in enumerate(data['correct'], 1)
  ]


def _epochs_of_history(path: str, text: str) -> list[tuple[Any, Any, Any]]:
  """The (epoch, correct, total) of the growing epochs of a history.jsonl."""
  epochs = []
  for number, line in enumerate(text.split('\n'), 1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
    except (ValueError, RecursionError):
      entry = None
    if not isinstance(entry, dict):
      raise ValueError(
          f'Line {number} of the curve {path!r} is not a JSON object; the file '
          'must be {"total": ..., "correct": [...]} or the history.jsonl of a '
          'run.'
      )
    if entry.get('event') != 'epoch' or entry.get('phase') != 'growing':
      continue
    if missing := sorted({'epoch', 'correct', 'total'} - set(entry)):
      raise ValueError(
          f'Line {number} of the curve {path!r} lacks {missing}; a growing '
          'epoch needs "epoch", "correct" and "total".'
      )
    epochs.append((entry['epoch'], entry['correct'], entry['total']))
  return epochs


def _observation(
    epoch: Any, correct: Any, total: Any, index: int
) -> policies.Observation:
  try:
    return policies.Observation(
        epoch=epoch, step=index, correct=correct, total=total, loss_sum=0.0,
        cost=0,
    )
  except ValueError as error:
    raise ValueError(f'Entry {index} of the curve: {error}')


def _event(
    epoch: int, event: str, stage: int | None, depths: tuple[int, ...]
) -> dict[str, Any]:
  return {
      'epoch': epoch,
      'event': event,
      'stage': stage,
      'depths': policies.format_depths(depths),
  }


if __name__ == '__main__':
  app.run(main)
