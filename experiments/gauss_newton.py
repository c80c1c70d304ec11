"""Grows the widths of a network by learned splits of its channels.

    python -m experiments.gauss_newton                  # digits, minutes
    python -m experiments.gauss_newton --strategy=net2net --seed=1
    python -m experiments.gauss_newton --preset=vgg19_cifar10_small --final=both

After Lawton et al. 2024, of which only the idea is known to us; equations,
settings and defaults are our own (see `autogrow_jax.methods.gauss_newton`).
Each phase trains for some epochs, learns how best to split every channel,
estimates what each split and each prune would do to the loss, and applies those
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
from autogrow_jax.run import console as logs
from autogrow_jax import networks
from autogrow_jax.run import results
from autogrow_jax.run import resolve
from autogrow_jax.run import train
from autogrow_jax.methods.gauss_newton import calibration
from autogrow_jax.methods.gauss_newton import joint
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import rivals
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import surgery
from experiments import compare
from experiments import flags
from experiments import presets
from experiments import report
from experiments import summary

FIELDS = {
    'depths': flags.DEPTHS,
    'epochs_per_phase': (
        'policy.interval', 'int', 'Epochs before each growth step.'
    ),
    'strategy': (
        'method.strategy',
        'text',
        f'Who chooses the splits: {", ".join(rivals.STRATEGIES)}.',
    ),
    'learn': (
        'method.learning',
        'text',
        'When splits are learned: frozen (before each growth step, the weights '
        'held) or joint (by Adam, beside the training of the weights).',
    ),
    **flags.LEARNING_FLAGS,
    'resource': (
        'method.limits.resource',
        'text',
        f'What growth costs: {", ".join(selection.RESOURCES)}.',
    ),
    'growth_cap': (
        'method.limits.growth_cap',
        'float',
        'Largest relative increase of it in a step.',
    ),
    'price': (
        'method.limits.price',
        'float',
        'Nats per unit below which no split is worth it.',
    ),
    'budget': (
        'method.limits.budget',
        'int',
        'Largest resource of the network, at which growing (learn=frozen) '
        'ends; none by default.',
    ),
    'optimizer_state': (
        'method.optimizer_state',
        'text',
        f'After a growth: {", ".join(surgery.OPTIMIZER_STATES)}.',
    ),
    'norms': (
        'method.norms',
        'text',
        'After a growth: settled (scales and biases make up for new '
        'statistics) or measured (statistics alone).',
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
        ('curvature', 'solver', *flags.SOLVER_FLAGS, 'compensation', 'prune'),
        ('gauss_newton',),
    ),
    'price': ('gauss_newton', 'steepest', 'firefly'),  # Whose gains are nats.
    'norms': tuple(s for s in rivals.STRATEGIES if s != 'gradmax'),
}
SEED_WIDTH_DEFAULT = 16
FINALS = ('continue', 'scratch', 'both')
COMPARED = ('seed', 'uniform')


def growing(preset: config.RunConfig) -> config.RunConfig:
  """A preset of this method, or the data and training of another one.

  The latter with a plain network, whose layers have widths of their own, at a
  rate that it also stands right after a growth.
  """
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
  run_config = complete(flags.make_config(FIELDS, growing))
  dataset = data.load(run_config.data, seed=run_config.seed)
  _check_learning(run_config)
  run_config = with_timing(run_config, len(dataset.train.labels))
  _check_examples(run_config, len(dataset.train.labels))
  resolve.resolve(run_config, dataset)  # Refuses before anything is said.
  architecture = resolve.seed_architecture(run_config, dataset)
  # Refuses a network beyond the budget.
  run_config.method.limits.allowance(architecture)
  said = coverage(architecture, run_config.method.strategy)
  print(said, file=sys.stderr, flush=True)
  result = train.run(run_config, dataset=dataset)
  report.write(run_config.workdir)
  scratch = ['scratch'] * (FINAL.value != 'continue')
  fixed = compare.run(run_config, dataset, result, scratch + COMPARE.value)
  growths = [
      record
      for record in logs.read(pathlib.Path(run_config.workdir, 'history.jsonl'))
      if record['event'] in ('grow', 'skip')
  ]
  found = calibration_of(growths)
  if found is not None:
    results.add(run_config.workdir, calibration=dataclasses.asdict(found))
    report.write(run_config.workdir)
  print(summary.of_run(result, run_config.workdir, fixed))
  print(of_growth(result, growths, found))


def complete(run_config: config.RunConfig) -> config.RunConfig:
  """The configuration with what the flags of this binary alone say."""
  network, policy = run_config.network, run_config.policy
  stages = len(networks.get(network.name).widths)
  is_other = flags.FLAGS['network'].present  # Than the preset's, with widths.
  if SEED_WIDTH.value is not None or network.widths is None or is_other:
    width = SEED_WIDTH.value or SEED_WIDTH_DEFAULT
    network = dataclasses.replace(network, widths=(width,) * stages)
  preset = growing(presets.get(flags.FLAGS.preset)).policy
  phases = PHASES.value or preset.max_epochs // preset.interval
  method, schedule = run_config.method, run_config.schedule
  if PRUNE.value == 'off':
    method = dataclasses.replace(method, compensation='off')
  if FINAL.value == 'scratch':
    schedule = dataclasses.replace(schedule, finetune_epochs=0)
  return dataclasses.replace(
      run_config,
      network=network,
      policy=dataclasses.replace(policy, max_epochs=phases * policy.interval),
      method=method,
      schedule=schedule,
  )


def with_timing(
    run_config: config.RunConfig, examples: int
) -> config.RunConfig:
  """Joint learning is at the end of each phase, and ends with the last one."""
  method, policy = run_config.method, run_config.policy
  if method.learning != 'joint':
    return run_config
  steps = examples // run_config.batch_size
  begin = max(0, policy.interval - method.learn.epochs)
  timing = joint.Timing(
      phase=policy.interval * steps,
      begin=begin * steps,
      end=policy.max_epochs * steps,
  )
  return dataclasses.replace(
      run_config, method=dataclasses.replace(method, timing=timing)
  )


def coverage(
    architecture: architecture_lib.Architecture, strategy: str
) -> str:
  """What of a network can be split, and what is left as it is, and why."""
  method_lib.model_of(architecture)  # Refuses one without channels.
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
    growths: Sequence[logs.Record],
    found: calibration.Calibration | None,
) -> str:
  """Widths per layer, and the estimates beside what was measured."""
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
    growths: Sequence[logs.Record],
) -> calibration.Calibration | None:
  """How good the estimates of whole growth steps were, taken or not.

  None for fewer than three, and for new channels that change nothing at first.
  """
  pairs = []
  for record in growths:
    pairs += record.get('initializer', record).get('attempts', [])
  if len(pairs) < 3:
    return None
  found = calibration.calibration(*zip(*pairs, strict=True))
  return None if math.isnan(found.pearson) else found


def _check_own_flags() -> None:
  """Refuses values of the flags that no configuration has."""
  for flag in (SEED_WIDTH, PHASES):
    if flag.value is not None and flag.value < 1:
      raise ValueError(f'--{flag.name} is at least 1, got {flag.value}.')
  if FINAL.value not in FINALS:
    raise ValueError(
        f'--final is one of {", ".join(FINALS)}, got {FINAL.value!r}.'
    )
  given = lambda *names: [n for n in names if flags.FLAGS[n].present]
  if FINAL.value == 'scratch' and given('finetune_epochs'):
    raise ValueError(
        '--final=scratch has no final phase for --finetune_epochs; leave out '
        'the one or the other.'
    )
  if PRUNE.value not in ('on', 'off'):
    raise ValueError(f'--prune is on or off, got {PRUNE.value!r}.')
  if PRUNE.value == 'off' and given('compensation'):
    raise ValueError(
        '--compensation is of prunes, which --prune=off excludes; leave out '
        'the one or the other.'
    )
  compare.check(COMPARE.value, COMPARED)


def _check_learning(run_config: config.RunConfig) -> None:
  """Refuses flags that mean nothing to, or exclude, how splits are learned."""
  method = run_config.method
  flags.refuse_unused(STRATEGY_FLAGS, 'strategy', method.strategy)
  if method.learning == 'joint':
    flags.refuse_unused(
        {name: ('frozen',) for name in ('sweeps', 'damping')}, 'learn', 'joint'
    )
  else:
    flags.refuse_unused(flags.SOLVER_FLAGS, 'solver', method.learn.solver)


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
