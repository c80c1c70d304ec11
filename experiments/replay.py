"""Runs a growth policy on a recorded accuracy curve, without training.

So K, J and tau can be chosen on old runs. The curve is a file with

  {"total": 10000, "correct": [4000, 5000, ...]}

(correct predictions on the selection data after each epoch), or the
history.jsonl that a run left behind. The answer is one JSON object per line,
one line per event ("grow", "stop" or "end"), such as

  {"epoch": 3, "event": "grow", "stage": 0, "depths": "2-1-1"}

The curve does not react: growing at another epoch would have changed what
follows. Example:

  python -m experiments.replay --curve=runs/demo/history.jsonl --grow_interval=2

With --noise in place of --curve the policies see nothing but noise around a
constant accuracy, many times over. There is one line for each policy, with
percentiles of the growing epochs and of the sub-modules per stage that it
finds, and two of 'sequential': for an untrained and for a trained start.
Example, for a hold-out of 5,000 images:

  python -m experiments.replay --noise=94 --total=5000 --common_sigma=0.3
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import sys
from typing import Any

from absl import flags as absl_flags

from autogrow_jax import policies
from autogrow_jax.run import config
from autogrow_jax.run import settings

from . import flags
from .studies import null_model
from .studies import replay

NAMES = ('periodic', 'convergent', 'sequential')
FLAGS = absl_flags.FLAGS


def main() -> None:
  flags.run(_main, __doc__, _define)


def _define(arguments: Sequence[str]) -> None:
  del arguments
  absl_flags.DEFINE_string('curve', None, 'File with the recorded curve.')
  absl_flags.DEFINE_float(
      'noise', None, 'Accuracy around which there is only noise, percent.',
      lower_bound=0, upper_bound=100,
  )
  absl_flags.DEFINE_integer(
      'total', 5000, 'Size of the selection set of --noise, images.',
      lower_bound=1,
  )
  absl_flags.DEFINE_float(
      'common_sigma', 0.0,
      'Standard deviation, percentage points, of the accuracy from epoch to '
      'epoch in --noise, beside the noise of counting --total images.',
      lower_bound=0,
  )
  absl_flags.DEFINE_integer(
      'runs', 400, 'Simulated runs of --noise.', lower_bound=1
  )
  absl_flags.DEFINE_enum(
      'policy', None, NAMES,
      'Policy; by default periodic with --curve, and all three with --noise. A '
      'curve has no single images, which sequential compares.',
  )
  absl_flags.DEFINE_string(
      'seed_depths', '1-1-1', 'Blocks per stage to start from.'
  )
  for name in NAMES:
    for flag, item in policy_flags(name).items():
      if flag not in FLAGS:
        default = None if item.value is None else str(item.value)
        absl_flags.DEFINE_string(flag, default, item.help)


def _main() -> None:
  if (FLAGS.curve is None) == (FLAGS.noise is None):
    raise ValueError('Give either --curve=FILE or --noise=PERCENT.')
  names = NAMES if FLAGS.curve is None else ('periodic',)
  if FLAGS.policy:
    names = (FLAGS.policy,)
  used = {flag for name in names for flag in policy_flags(name)}
  for flag in sorted({f for name in NAMES for f in policy_flags(name)} - used):
    if FLAGS[flag].present:
      text = f'ignored: --{flag} means nothing to {" and ".join(names)}'
      print(text, file=sys.stderr)
  chosen = {name: make_policy(name) for name in names}
  if FLAGS.curve is None:
    answers = noise(chosen)
  else:
    (policy,) = chosen.values()
    answers = replay.events(policy, replay.read_curve(FLAGS.curve))
  for answer in list(answers):  # All or none.
    print(json.dumps(answer))


def policy_flags(name: str) -> dict[str, settings.Setting]:
  """Returns the settings of a policy by their flags."""
  plain = {path: flag for flag, path in flags.GROWING.items()}
  return {
      plain.get(f'policy.{item.path}', item.path): item
      for item in settings.list_all(config.PolicyConfig(name, interval=3))
      if item.path != 'name'
  }


def make_policy(name: str) -> policies.RoundRobin:
  """Makes a policy from the flags."""
  values = {
      item.path: settings.parse(FLAGS[flag].value or '', item.hint, f'--{flag}')
      for flag, item in policy_flags(name).items()
  }
  depths = flags.parse_depths('seed_depths', FLAGS.seed_depths)
  return policies.make(name, depths=depths, **values)


def noise(chosen: Mapping[str, policies.RoundRobin]) -> Iterator[Any]:
  """Yields what policies find in noise."""
  for name, policy in chosen.items():
    # Only one of them knows whether it starts from a trained network.
    for trained in (False, True) if name == 'sequential' else (False,):
      band = null_model.null_band(
          policy, total=FLAGS.total, accuracy=FLAGS.noise / 100,
          runs=FLAGS.runs, common_sigma=FLAGS.common_sigma, trained=trained,
      )
      end = null_model.floor(policy, trained=trained)
      yield {
          'policy': name,
          'start': 'trained' if trained else 'untrained',
          'floor': policies.format_depths(end.depths),
          **dataclasses.asdict(band),
      }


if __name__ == '__main__':
  main()
