"""Grows the depth of a network while it trains (Wen et al., KDD 2020).

    python -m experiments.autogrow                      # digits, minutes
    python -m experiments.autogrow --preset=cifar10 --data_dir=DIR

A row of the paper's tables, at first without training:

    python -m experiments.autogrow --preset=table5/basic3resnet-cifar10-k50 \\
        --dry_run=shapes
"""

from collections.abc import Sequence
import sys

from absl import flags as absl_flags

from autogrow_jax import data
from autogrow_jax.run import config
from autogrow_jax.run import results
from autogrow_jax.run import settings
from autogrow_jax.run import train

from . import compare
from . import dry_run
from . import flags
from . import placebo
from . import report
from . import summary
from .studies import null_model

COMPARED = ('seed', 'found')
NEXT = """
Next: other policies on this very run, without training:
    python -m experiments.replay --curve=WORKDIR/history.jsonl --stop_window=8
its network on the test set, from its directory alone:
    python -m experiments.evaluate --workdir=WORKDIR --split=test
and real images, once TFDS has prepared them:
    python -m experiments.autogrow --preset=fashion_mnist_small"""


def main() -> None:
  flags.run(_main, __doc__, _define)


def _appending(run_config: config.RunConfig) -> config.RunConfig:
  """Returns a configuration, if its method appends sub-modules."""
  kind = settings.kind_of(run_config.method, config.METHODS)
  if kind in config.METHODS and kind != 'autogrow':
    raise ValueError(
        f'The method {kind} does not append sub-modules; it is for '
        f'experiments.{kind}.'
    )
  return run_config


SETTINGS = flags.Settings(
    {**flags.PLAIN, **flags.GROWING, 'method': 'method'},
    base=_appending,
    help={
        'method': "autogrow, or 'package.module:Class' of a method of your own "
        'that appends sub-modules.',
        'policy': 'periodic, convergent, sequential (stops when an exact '
        'paired test finds no improvement), or oneshot (all stages at once).',
    },
)


def _define(arguments: Sequence[str]) -> None:
  absl_flags.DEFINE_list('compare', ['seed'], compare.described(COMPARED))
  absl_flags.DEFINE_enum('placebo', 'auto', placebo.CHOICES, placebo.HELP)
  absl_flags.DEFINE_enum(
      'dry_run',
      'no',
      ['no', 'shapes', 'full'],
      'Walk the whole growth schedule on one batch, without training: shapes '
      'traces every architecture, within seconds or minutes; full compiles and '
      'runs them, and saves and restores a checkpoint. The embedded data and '
      'those of the paper need not be there.',
  )
  # --dry_run alone means --dry_run=full.
  sys.argv = ['--dry_run=full' if a == '--dry_run' else a for a in sys.argv]
  SETTINGS.define(arguments)


def _main() -> None:
  flags.use_compilation_cache()
  run_config = _appending(SETTINGS.config())
  is_dry = flags.FLAGS.dry_run != 'no'
  policy = run_config.policy.name
  if policy == 'every' or policy == 'fixed' and not is_dry:
    raise ValueError(
        '--policy is periodic, convergent, sequential, twin or oneshot; fixed '
        "networks are experiments.baseline's, and what grows widths every so "
        "many epochs is experiments.gauss_newton's."
    )
  if is_dry:
    dry_run.show(run_config, shapes=flags.FLAGS.dry_run == 'shapes')
    return
  compare.check(flags.FLAGS.compare, COMPARED)
  dataset = data.load(run_config.data, seed=run_config.seed)
  result = train.run(run_config, dataset=dataset)
  controls = null_model.of_run(run_config.workdir)
  results.add(run_config.workdir, **controls)
  report.write(run_config.workdir)
  controls |= placebo.run(run_config, dataset, result, flags.FLAGS.placebo)
  report.write(run_config.workdir)
  fixed = compare.run(run_config, dataset, result, flags.FLAGS.compare)
  print(summary.of_run({**result, **controls}, run_config.workdir, fixed))
  if run_config.data.dataset == 'digits':
    print(NEXT.replace('WORKDIR', run_config.workdir))


if __name__ == '__main__':
  main()
