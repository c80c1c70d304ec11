"""Grows the depth of a network while it trains (Wen et al., KDD 2020).

    python -m experiments.autogrow                      # digits, minutes
    python -m experiments.autogrow --preset=cifar10 --data_dir=DIR

A row of the paper's tables, at first without training:

    python -m experiments.autogrow --preset=table5/basic3resnet-cifar10-k50 \\
        --dry_run=shapes
"""

from absl import flags as absl_flags

from autogrow_jax.run import config
from autogrow_jax import data
from autogrow_jax.run import results
from autogrow_jax.run import train
from autogrow_jax.methods import autogrow
from experiments import compare
from experiments import dry_run
from experiments import flags
from experiments import report
from experiments import summary
from experiments.studies import null_model

COMPARED = ('seed', 'found')
FIELDS = {**flags.GROWING_FLAGS, **flags.RUN_FLAGS}

flags.define(FIELDS)
COMPARE = absl_flags.DEFINE_list(
    'compare', ['seed'], compare.described(COMPARED)
)


class _DryRunParser(absl_flags.ArgumentParser):
  """Reads --dry_run, --dry_run=shapes and --nodry_run."""

  syntactic_help = ''

  def parse(self, argument: str) -> str:
    given = {'true': 'full', 'false': 'no'}.get(argument, argument)
    if given not in ('no', 'full', 'shapes'):
      raise ValueError('it is full, which --dry_run alone means, or shapes')
    return given


DRY_RUN = absl_flags.DEFINE_flag(
    absl_flags.Flag(
        _DryRunParser(),
        absl_flags.ArgumentSerializer(),
        'dry_run',
        'no',
        'Walk the whole growth schedule on one batch, without training. '
        '--dry_run or --dry_run=full compiles and runs every architecture, and '
        'saves and restores a checkpoint; --dry_run=shapes only traces them, '
        'within seconds or minutes. The embedded data and those of the paper '
        'are replaced by noise, and need not be there.',
        boolean=True,  # So that it may stand alone.
    )
)

NEXT = """
Next: other policies on this very run, without training:
    python -m experiments.replay --curve=WORKDIR/history.jsonl --stop_window=8
its network on the test set, from its directory alone:
    python -m experiments.evaluate --workdir=WORKDIR --split=test
and real images, once TFDS has prepared them:
    python -m experiments.autogrow --preset=fashion_mnist_small"""


def main() -> None:
  flags.use_compilation_cache()
  run_config = flags.make_config(FIELDS, _appending)
  is_dry = DRY_RUN.value != 'no'
  policy = run_config.policy.name
  if policy == 'every' or policy == 'fixed' and not is_dry:
    raise ValueError(
        '--policy is periodic, convergent, sequential or oneshot; fixed '
        "networks are experiments.baseline's, and what grows widths every so "
        "many epochs is experiments.gauss_newton's."
    )
  if is_dry:
    dry_run.show(run_config, shapes=DRY_RUN.value == 'shapes')
    return
  compare.check(COMPARE.value, COMPARED)
  dataset = data.load(run_config.data, seed=run_config.seed)
  result = train.run(run_config, dataset=dataset)
  controls = null_model.of_run(run_config.workdir)
  results.add(run_config.workdir, **controls)
  report.write(run_config.workdir)
  fixed = compare.run(run_config, dataset, result, COMPARE.value)
  print(summary.of_run({**result, **controls}, run_config.workdir, fixed))
  if run_config.data.dataset == 'digits':
    print(NEXT.replace('WORKDIR', run_config.workdir))


def _appending(preset: config.RunConfig) -> config.RunConfig:
  """Returns the preset, if it is one that appends sub-modules."""
  if not isinstance(preset.method, autogrow.AutoGrow):
    raise ValueError(
        'The preset does not append sub-modules; it is for '
        'experiments.gauss_newton or experiments.sparsify.'
    )
  return preset


if __name__ == '__main__':
  flags.run_main(main)
