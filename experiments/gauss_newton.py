"""Grows the widths of a network by learned splits of its channels.

    python -m experiments.gauss_newton                  # digits, a minute
    python -m experiments.gauss_newton --strategy=net2net --seed=1
    python -m experiments.gauss_newton --preset=vgg19_cifar10_small --final=both

After Lawton et al. 2024, of which only the idea is known to us; equations,
settings and defaults are our own (see `autogrow_jax.methods.gauss_newton`).
Each phase trains for some epochs, learns how best to split every channel,
estimates the effect of each split and each prune on the loss, and applies those
that pay most per parameter or multiply-add.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import sys

from absl import flags as absl_flags

from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.run import config
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import resolve
from autogrow_jax.run import results
from autogrow_jax.run import train

from . import compare
from . import flags
from . import presets
from . import report
from . import summary
from .studies.gauss_newton import joint
from .studies.gauss_newton import receipts
from .studies.gauss_newton import rivals

STRATEGIES = ('gauss_newton', *rivals.RIVALS)
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
                    ('gauss_newton', ranking.LearnedSplits),
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
      ('frozen', 'joint'),
      'When splits are learned: frozen (before each growth step, the weights '
      'held) or joint (by Adam, beside the training of the weights); the '
      "preset's by default.",
  )
  absl_flags.DEFINE_integer(
      'morphism_epochs',
      joint.EPOCHS,
      'Epochs of joint learning at the end of each phase.',
      lower_bound=1,
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
      lower_bound=1,
  )
  absl_flags.DEFINE_integer(
      'phases',
      None,
      "Growth steps; the preset's by default, of digits 6.",
      lower_bound=1,
  )
  absl_flags.DEFINE_enum(
      'final',
      'continue',
      ('continue', 'scratch', 'both'),
      'After growing: continue (train the grown weights for '
      '--finetune_epochs), scratch (only draw the found widths afresh, and '
      'train them for as many epochs as cost as much as growing did), or both.',
  )
  absl_flags.DEFINE_list('compare', [], compare.described(COMPARED))
  SETTINGS.define(arguments)


def _main() -> None:
  flags.use_compilation_cache()
  given = flags.FLAGS
  if given.final == 'scratch' and given['finetune_epochs'].present:
    raise ValueError(
        '--final=scratch leaves nothing for --finetune_epochs to set; leave '
        'out the one or the other.'
    )
  compare.check(given.compare, COMPARED)
  run_config = complete(SETTINGS.config())
  strategy = rivals.name_of(run_config.method.ranking)
  dataset = data.load(run_config.data, seed=run_config.seed)
  examples = len(dataset.train.labels)
  receipts.check_examples(run_config, examples)
  preset = presets.get(given.preset).method
  is_joint = isinstance(preset, joint.JointGaussNewton)
  if (given.learn or ('joint' if is_joint else 'frozen')) == 'joint':
    if strategy != 'gauss_newton':
      raise ValueError(f'The strategy {strategy} has no joint learning.')
    run_config = joint.learned_jointly(
        run_config, examples, given.morphism_epochs,
        given.morphism_learning_rate,
    )
  resolve.resolve(run_config, dataset)  # Refuses before anything is printed.
  architecture = resolve.seed_architecture(run_config, dataset)
  method = getattr(run_config.method, 'settings', run_config.method)
  method.limits.allowance(architecture)  # Refuses one beyond the budget.
  print(
      receipts.coverage(architecture, strategy), file=sys.stderr, flush=True
  )
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
  found = receipts.calibration_of(growths)
  if found is not None:
    results.add(run_config.workdir, calibration=dataclasses.asdict(found))
    report.write(run_config.workdir)
  print(summary.of_run(result, run_config.workdir, fixed))
  print(receipts.of_growth(result, growths, found))


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


if __name__ == '__main__':
  main()
