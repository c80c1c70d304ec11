"""Trains a network of fixed depths from scratch.

    python -m experiments.baseline --depths=3-3-3
"""

from autogrow_jax.run import train

from . import flags
from . import presets
from . import report
from . import summary

SETTINGS = flags.Settings(
    {**flags.PLAIN, **flags.DEPTHS, 'epochs': 'schedule.finetune_epochs'},
    base=presets.fixed,
    hidden=('policy.name', 'method'),
    help={
        'epochs': 'Epochs of training.',
        'finetune_epochs': 'The same as --epochs.',
    },
)


def main() -> None:
  flags.run(_main, __doc__, SETTINGS.define)


def _main() -> None:
  flags.use_compilation_cache()
  run_config = SETTINGS.config()
  result = train.run(run_config)
  report.write(run_config.workdir)
  print(summary.of_run(result, run_config.workdir))


if __name__ == '__main__':
  main()
