"""Grows the widths of a network by learned splits of its channels.

    python -m experiments.gauss_newton                  # digits, minutes
    python -m experiments.gauss_newton --strategy=net2net --seed=1
    python -m experiments.gauss_newton --preset=vgg19_cifar10_small --final=both

After Lawton et al. 2024, of which only the idea is known to us; equations,
settings and defaults are our own (see `autogrow_jax.methods.gauss_newton`).
Each phase trains for some epochs, learns how best to split every channel,
estimates the effect of each split and each prune on the loss, and applies those
that pay most per parameter or multiply-add.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
import sys
from typing import Any

from absl import flags as absl_flags

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax.methods.gauss_newton import learned_splits
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.run import config
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import parallel
from autogrow_jax.run import resolve
from autogrow_jax.run import results
from autogrow_jax.run import train

from . import compare
from . import flags
from . import presets
from . import report
from . import summary
from .studies.gauss_newton import calibration
from .studies.gauss_newton import joint
from .studies.gauss_newton import rivals

STRATEGIES = ('gauss_newton', *rivals.RIVALS)
CHOICES = {
    'strategy': STRATEGIES,
    'learn': ('frozen', 'joint'),
    'final': ('continue', 'scratch', 'both'),
}
SEED_WIDTH_DEFAULT = 16
COMPARED = ('seed', 'uniform')


def growing(preset: config.RunConfig) -> config.RunConfig:
  """Returns a preset of this method, or another one's data and training.

  The latter gets a plain network, whose layers have widths of their own, at a
  rate that is stable right after a growth.
  """
  if isinstance(preset.method, joint.JointGaussNewton):
    return dataclasses.replace(preset, method=preset.method.settings)
  if isinstance(preset.method, method_lib.GaussNewton):
    return preset
  interval = preset.policy.interval or 1
  return dataclasses.replace(
      preset,
      network=config.NetworkConfig('plain3net'),
      policy=config.PolicyConfig('every', interval, max_epochs=6 * interval),
      method=method_lib.GaussNewton(),
      schedule=dataclasses.replace(preset.schedule, learning_rate=0.02),
  )


SETTINGS = flags.Settings(
    {
        **flags.PLAIN,
        **flags.DEPTHS,
        'epochs_per_phase': 'policy.interval',
        'examples': 'method.examples',
        'budget': 'method.limits.budget',
    },
    base=growing,
    hidden=('policy', 'network.widths'),
    kinds={
        'strategy': (
            'method.ranking',
            {
                name: f'{kind.__module__}:{kind.__qualname__}'
                for name, kind in (
                    ('gauss_newton', learned_splits.LearnedSplits),
                    *rivals.RIVALS.items(),
                )
            },
        )
    },
)


def main() -> None:
  flags.run(_main, __doc__, _define)


def _define(arguments: Sequence[str]) -> None:
  absl_flags.DEFINE_enum(
      'strategy',
      None,
      STRATEGIES,
      "Strategy that chooses the splits; the preset's by default.",
  )
  absl_flags.DEFINE_enum(
      'learn',
      None,
      CHOICES['learn'],
      'When splits are learned: frozen (before each growth step, the weights '
      'held) or joint (by Adam, beside the training of the weights); the '
      "preset's by default.",
  )
  absl_flags.DEFINE_integer(
      'morphism_epochs',
      joint.EPOCHS,
      'Epochs of joint learning at the end of each phase.',
  )
  absl_flags.DEFINE_float(
      'morphism_learning_rate',
      joint.LEARNING_RATE,
      'Learning rate of joint learning.',
  )
  absl_flags.DEFINE_integer(
      'seed_width',
      None,
      "Channels of every layer to start from; the preset's, or "
      f'{SEED_WIDTH_DEFAULT}, by default.',
  )
  absl_flags.DEFINE_integer(
      'phases', None, "Growth steps; the preset's by default, of digits 6."
  )
  absl_flags.DEFINE_enum(
      'final',
      'continue',
      CHOICES['final'],
      'After growing: continue (train the grown weights for '
      '--finetune_epochs), scratch (only draw the found widths afresh, and '
      'train them for as many epochs as cost as much as growing did), or both.',
  )
  absl_flags.DEFINE_list('compare', [], compare.described(COMPARED))
  SETTINGS.define(arguments)


def _main() -> None:
  flags.use_compilation_cache()
  given = flags.FLAGS
  _check_own_flags()
  is_joint = isinstance(
      presets.get(given.preset).method, joint.JointGaussNewton
  )
  learn = given.learn or ('joint' if is_joint else 'frozen')
  run_config = complete(SETTINGS.config())
  strategy = rivals.name_of(run_config.method.ranking)
  if learn == 'joint' and strategy != 'gauss_newton':
    raise ValueError(f'The strategy {strategy} has no joint learning.')
  method = run_config.method
  dataset = data.load(run_config.data, seed=run_config.seed)
  _check_examples(run_config, len(dataset.train.labels))
  if learn == 'joint':
    run_config = learned_jointly(run_config, len(dataset.train.labels))
  resolve.resolve(run_config, dataset)  # Refuses before anything is printed.
  architecture = resolve.seed_architecture(run_config, dataset)
  method.limits.allowance(architecture)  # Refuses one beyond the budget.
  print(coverage(architecture, strategy), file=sys.stderr, flush=True)
  result = train.run(run_config, dataset=dataset)
  report.write(run_config.workdir)
  scratch = ['scratch'] * (given.final != 'continue')
  fixed = compare.run(run_config, dataset, result, scratch + given.compare)
  path = pathlib.Path(run_config.workdir, 'history.jsonl')
  growths = [
      record
      for record in history_lib.read(path)
      if record['event'] in ('grow', 'skip')
  ]
  found = calibration_of(growths)
  if found is not None:
    results.add(run_config.workdir, calibration=dataclasses.asdict(found))
    report.write(run_config.workdir)
  print(summary.of_run(result, run_config.workdir, fixed))
  print(of_growth(result, growths, found))


def complete(run_config: config.RunConfig) -> config.RunConfig:
  """Adds the flags that only this binary has to a configuration."""
  given, network, policy = flags.FLAGS, run_config.network, run_config.policy
  stages = len(networks.get(network.name).widths)
  is_other = given['network'].present  # Other widths than the preset's.
  if given.seed_width is not None or network.widths is None or is_other:
    width = given.seed_width or SEED_WIDTH_DEFAULT
    network = dataclasses.replace(network, widths=(width,) * stages)
  preset = growing(presets.get(given.preset)).policy
  phases = given.phases or preset.max_epochs // preset.interval
  schedule = run_config.schedule
  if given.final == 'scratch':
    schedule = dataclasses.replace(schedule, finetune_epochs=0)
  return dataclasses.replace(
      run_config,
      network=network,
      policy=dataclasses.replace(policy, max_epochs=phases * policy.interval),
      schedule=schedule,
  )


def learned_jointly(
    run_config: config.RunConfig, examples: int
) -> config.RunConfig:
  """Returns a configuration that learns at the end of each phase.

  Raises:
    ValueError: if each device would have a part of a batch only.
  """
  devices, policy = run_config.devices, run_config.policy
  chosen = parallel.make(devices.parallel, devices.num_devices)
  if chosen.mode == 'pmap' and len(chosen.devices) > 1:
    raise ValueError(
        'Joint learning needs whole batches, but in pmap mode each device has '
        'a part; use --parallel=jit.'
    )
  steps = examples // run_config.batch_size
  begin = max(0, policy.interval - flags.FLAGS.morphism_epochs)
  method = joint.JointGaussNewton(
      run_config.method,
      flags.FLAGS.morphism_learning_rate,
      joint.Timing(
          phase=policy.interval * steps,
          begin=begin * steps,
          end=policy.max_epochs * steps,
      ),
  )
  return dataclasses.replace(run_config, method=method)


def coverage(
    architecture: architecture_lib.Architecture, strategy: str
) -> str:
  """Lists what can be split in a network, and what cannot, and why."""
  signals.model_of(architecture)  # Refuses one without channels.
  survey = sites.survey(architecture)
  channels = sum(site.units for site in survey.sites)
  lines = [
      f'{channels} channels of {len(survey.sites)} layers can be split: '
      + ', '.join(f'{site.axis} {site.units}' for site in survey.sites)
  ]
  lines += [f'not {axis}: {reason}' for axis, reason in survey.uncovered]
  lines += [
      f'not {axis} by {strategy}: {reason}'
      for axis, reason in rivals.uncovered(strategy, survey.sites)
  ]
  return '\n'.join(lines)


def of_growth(
    result: Mapping[str, Any],
    growths: Sequence[history_lib.Record],
    found: calibration.Calibration | None,
) -> str:
  """Lists widths per layer, and the estimates beside the measurements."""
  sizes = result['architecture']['sizes']
  inner = {a: n for a, n in sizes.items() if a not in ('image', 'classes')}
  lines = ['  widths ' + ', '.join(f'{a} {n}' for a, n in inner.items()), '']
  for phase, record in enumerate(growths, start=1):
    line = f'  phase {phase:2}, epoch {record["epoch"]:3}: '
    if record['event'] == 'skip':
      lines.append(f'{line}no growth, {record["reason"]}')
      continue
    report = record['initializer']
    lines.append(
        f'{line}loss by {report["estimated_change"]:+.4f} nats estimated, '
        f'{report["actual_change"]:+.4f} measured; {record["params_before"]} '
        f'-> {record["params_after"]} parameters'
    )
  if found is not None:
    lines += [
        '',
        f'  estimates of {found.count} growth steps, taken or not: Pearson '
        f'{found.pearson:.3f},',
        f'  Spearman {found.spearman:.3f}, slope {found.slope:.2f} (measured '
        'over estimated)',
    ]
  return '\n'.join(lines)


def calibration_of(
    growths: Sequence[history_lib.Record],
) -> calibration.Calibration | None:
  """Compares the estimates of whole growth steps, taken or not.

  Returns:
    None for fewer than three, and for new channels that change nothing at
    first.
  """
  pairs = []
  for record in growths:
    pairs += record.get('initializer', record).get('attempts', [])
  if len(pairs) < 3:
    return None
  found = calibration.calibration(*zip(*pairs, strict=True))
  return None if math.isnan(found.pearson) else found


def _check_own_flags() -> None:
  """Refuses wrong values of the flags that no configuration has."""
  given = flags.FLAGS
  for name in ('seed_width', 'phases', 'morphism_epochs'):
    value = given[name].value
    if value is not None and value < 1:
      raise ValueError(f'--{name} is at least 1, got {value}.')
  if given.final == 'scratch' and given['finetune_epochs'].present:
    raise ValueError(
        '--final=scratch leaves nothing for --finetune_epochs to set; leave '
        'out the one or the other.'
    )
  compare.check(given.compare, COMPARED)


def _check_examples(run_config: config.RunConfig, available: int) -> None:
  """Refuses statistics of more examples than there are."""
  wanted, size = run_config.method.examples, run_config.batch_size
  batches = available // size
  if batches < 2:
    raise ValueError(
        'Statistics and judgement take a batch each, and an epoch of '
        f'{available} training images has {batches} of {size}; take a smaller '
        '--batch_size.'
    )
  if wanted is not None and 2 * -(-wanted // size) > batches:
    raise ValueError(
        f'--examples={wanted}, and as many to judge by, in whole batches of '
        f'{size}, are more than the {available} training images; take at most '
        f'{batches // 2 * size}.'
    )


if __name__ == '__main__':
  main()
