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
from autogrow_jax.run import config
from autogrow_jax import data
from autogrow_jax.run import history as history_lib
from autogrow_jax import networks
from autogrow_jax.run import parallel
from autogrow_jax.run import results
from autogrow_jax.run import train
from autogrow_jax.methods.gauss_newton import learned_splits
from autogrow_jax.run import resolve
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from experiments import compare
from experiments import flags
from experiments import presets
from experiments import report
from experiments import summary
from experiments.studies.gauss_newton import calibration
from experiments.studies.gauss_newton import joint
from experiments.studies.gauss_newton import rivals

STRATEGIES = ('gauss_newton', *rivals.RIVALS)
FIELDS = {
    'depths': flags.DEPTHS,
    'epochs_per_phase': (
        'policy.interval', 'int', 'Epochs before each growth step.'
    ),
    **flags.LEARNING_FLAGS,
    'resource': (
        'method.limits.resource',
        'text',
        f'Resource that growth costs: {", ".join(selection.RESOURCES)}.',
    ),
    'growth_cap': (
        'method.limits.growth_cap',
        'float',
        'Largest relative increase of the resource in a step.',
    ),
    'price': (
        'method.limits.price',
        'float',
        'Smallest gain of a split, nats per unit of the resource.',
    ),
    'budget': (
        'method.limits.budget',
        'int',
        'Largest resource of the network, at which growing (learn=frozen) '
        'ends; none by default.',
    ),
    'growing_schedule': flags.GROWING_FLAGS['growing_schedule'],
    **{
        name: field
        for name, field in flags.RUN_FLAGS.items()
        if name not in ('widths', 'paper_compat', 'init_from', 'reinitialize')
    },
}
# Flag -> the strategies that it means something to.
STRATEGY_FLAGS = {
    **dict.fromkeys(
        ('curvature', 'sweeps', 'damping', 'compensation', 'prune', 'learn'),
        ('gauss_newton',),
    ),
    'price': ('gauss_newton', *rivals.IN_NATS),
}
# Flag -> the ways to learn that it means something to.
LEARN_FLAGS = {
    **dict.fromkeys(('sweeps', 'damping'), ('frozen',)),
    **dict.fromkeys(('morphism_epochs', 'morphism_learning_rate'), ('joint',)),
}
CHOICES = {
    'strategy': STRATEGIES,
    'learn': ('frozen', 'joint'),
    'final': ('continue', 'scratch', 'both'),
    'prune': ('on', 'off'),
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


flags.define(FIELDS, growing)
STRATEGY = absl_flags.DEFINE_string(
    'strategy',
    None,
    f'Strategy that chooses the splits: {", ".join(STRATEGIES)}; '
    "the preset's by default.",
)
LEARN = absl_flags.DEFINE_string(
    'learn',
    None,
    'When splits are learned: frozen (before each growth step, the weights '
    'held) or joint (by Adam, beside the training of the weights); the '
    "preset's by default.",
)
MORPHISM_EPOCHS = absl_flags.DEFINE_integer(
    'morphism_epochs',
    joint.EPOCHS,
    'Epochs of joint learning at the end of each phase.',
)
MORPHISM_LEARNING_RATE = absl_flags.DEFINE_float(
    'morphism_learning_rate',
    joint.LEARNING_RATE,
    'Learning rate of joint learning.',
)
SEED_WIDTH = absl_flags.DEFINE_integer(
    'seed_width',
    None,
    f"Channels of every layer to start from; the preset's, or "
    f'{SEED_WIDTH_DEFAULT}, by default.',
)
PHASES = absl_flags.DEFINE_integer(
    'phases',
    None,
    "Growth steps; the preset's by default, of digits 6.",
)
PRUNE = absl_flags.DEFINE_string(
    'prune',
    'on',
    'on or off: prune cheap channels as well (gauss_newton only).',
)
FINAL = absl_flags.DEFINE_string(
    'final',
    'continue',
    'After growing: continue (train the grown weights for --finetune_epochs), '
    'scratch (only draw the found widths afresh, and train them for as many '
    'epochs as cost as much as growing did), or both.',
)
COMPARE = absl_flags.DEFINE_list('compare', [], compare.described(COMPARED))


def main() -> None:
  flags.use_compilation_cache()
  _check_own_flags()
  preset = presets.get(flags.FLAGS.preset)
  is_joint = isinstance(preset.method, joint.JointGaussNewton)
  learn = LEARN.value or ('joint' if is_joint else 'frozen')
  ranking = growing(preset).method.ranking
  strategy = STRATEGY.value or rivals.name_of(ranking)
  flags.refuse_unused(STRATEGY_FLAGS, 'strategy', strategy)
  flags.refuse_unused(LEARN_FLAGS, 'learn', learn)
  run_config = complete(flags.make_config(FIELDS, growing))
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
  scratch = ['scratch'] * (FINAL.value != 'continue')
  fixed = compare.run(run_config, dataset, result, scratch + COMPARE.value)
  growths = [
      record
      for record in history_lib.read(pathlib.Path(run_config.workdir, 'history.jsonl'))
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
  network, policy = run_config.network, run_config.policy
  stages = len(networks.get(network.name).widths)
  is_other = flags.FLAGS['network'].present  # Other widths than the preset's.
  if SEED_WIDTH.value is not None or network.widths is None or is_other:
    width = SEED_WIDTH.value or SEED_WIDTH_DEFAULT
    network = dataclasses.replace(network, widths=(width,) * stages)
  preset = growing(presets.get(flags.FLAGS.preset)).policy
  phases = PHASES.value or preset.max_epochs // preset.interval
  ranking, schedule = run_config.method.ranking, run_config.schedule
  if PRUNE.value == 'off':
    ranking = dataclasses.replace(ranking, compensation='off')
  if STRATEGY.value not in (None, rivals.name_of(ranking)):
    kind = rivals.RIVALS.get(STRATEGY.value, learned_splits.LearnedSplits)
    ranking = kind()
  if FINAL.value == 'scratch':
    schedule = dataclasses.replace(schedule, finetune_epochs=0)
  return dataclasses.replace(
      run_config,
      network=network,
      policy=dataclasses.replace(policy, max_epochs=phases * policy.interval),
      method=dataclasses.replace(run_config.method, ranking=ranking),
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
  begin = max(0, policy.interval - MORPHISM_EPOCHS.value)
  method = joint.JointGaussNewton(
      run_config.method,
      MORPHISM_LEARNING_RATE.value,
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
  for flag in (SEED_WIDTH, PHASES, MORPHISM_EPOCHS):
    if flag.value is not None and flag.value < 1:
      raise ValueError(f'--{flag.name} is at least 1, got {flag.value}.')
  for name, choices in CHOICES.items():
    value = flags.FLAGS[name].value
    if value is not None and value not in choices:
      raise ValueError(
          f'--{name} is one of {", ".join(choices)}, got {value!r}.'
      )
  is_given = lambda name: flags.FLAGS[name].present
  for name, value, excluded in (
      ('final', 'scratch', 'finetune_epochs'), ('prune', 'off', 'compensation')
  ):
    if flags.FLAGS[name].value == value and is_given(excluded):
      raise ValueError(
          f'--{name}={value} leaves nothing for --{excluded} to set; leave out '
          'the one or the other.'
      )
  compare.check(COMPARE.value, COMPARED)


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
  flags.run_main(main)
