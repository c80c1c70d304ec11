"""Trains a network of fixed depths from scratch.

    python -m experiments.baseline --depths=3-3-3
"""

from autogrow_jax.run import train
from experiments import flags
from experiments import presets
from experiments import report
from experiments import summary

FIELDS = {
    'depths': flags.DEPTHS,
    'epochs': (
        'schedule.finetune_epochs',
        'int',
        'Training epochs, with tenfold drops of the rate at 1/2 and 3/4.',
    ),
    **{
        name: field
        for name, field in flags.RUN_FLAGS.items()
        if name != 'finetune_epochs'
    },
}

flags.define(FIELDS)


def main() -> None:
  flags.use_compilation_cache()
  run_config = flags.make_config(FIELDS, presets.fixed)
  result = train.run(run_config)
  report.write(run_config.workdir)
  print(summary.of_run(result, run_config.workdir))


if __name__ == '__main__':
  flags.run_main(main)
