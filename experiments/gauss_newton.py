"""Grows the widths of a network by learned splits of its channels.

    python -m experiments.gauss_newton                  # digits, minutes
    python -m experiments.gauss_newton --network=mlp --seed_width=4

After Lawton et al. 2024, of which only the idea is known to us; equations,
settings and defaults are our own (see `autogrow_jax.methods.gauss_newton`).
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags as absl_flags

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import config
from autogrow_jax import data
from autogrow_jax import logs
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import session
from autogrow_jax import train
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import prunes
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import surgery
from experiments import flags
from experiments import summary

FIELDS = {
    'depths': (
        'network.depths',
        'depths',
        "Blocks per stage, e.g. 3-3-3; by default the network's, mostly one "
        'each.',
    ),
    **{
        name: field
        for name, field in flags.RUN_FLAGS.items()
        if name not in ('widths', 'paper_compat', 'init_from')
    },
}

flags.define(FIELDS)
SEED_WIDTH = absl_flags.DEFINE_integer(
    'seed_width', 16, 'Channels of every layer to start from.'
)
PHASES = absl_flags.DEFINE_integer('phases', 4, 'Growth steps.')
EPOCHS_PER_PHASE = absl_flags.DEFINE_integer(
    'epochs_per_phase', 3, 'Epochs before each growth step.'
)
CURVATURE = absl_flags.DEFINE_string(
    'curvature', 'mc', f'Of the model: {", ".join(signals.CURVATURES)}.'
)
SOLVER = absl_flags.DEFINE_string(
    'solver', 'als', f'Of the splits: {", ".join(splits.SOLVERS)}.'
)
MORPHISM_EPOCHS = absl_flags.DEFINE_integer(
    'morphism_epochs', 4, 'Of adam over the examples.'
)
SWEEPS = absl_flags.DEFINE_integer(
    'sweeps', 2, 'Of alternating least squares over all splits.'
)
DAMPING = absl_flags.DEFINE_float(
    'damping', 0.3, 'Of its solves, in units of the mean eigenvalue.'
)
EXAMPLES = absl_flags.DEFINE_integer(
    'examples',
    None,
    'To learn splits from, and as many to judge by; up to 4096 by default, at '
    'most half an epoch each.',
)
RESOURCE = absl_flags.DEFINE_string(
    'resource',
    'params',
    f'What growth costs: {", ".join(selection.RESOURCES)}.',
)
GROWTH_CAP = absl_flags.DEFINE_float(
    'growth_cap', 0.35, 'Largest relative increase of it in a step.'
)
PRICE = absl_flags.DEFINE_float(
    'price', 0.0, 'Nats per unit below which no split is worth it.'
)
BUDGET = absl_flags.DEFINE_integer(
    'budget', None, 'Largest resource of the network; none by default.'
)
PRUNE = absl_flags.DEFINE_bool('prune', True, 'Prune cheap channels as well.')
COMPENSATION = absl_flags.DEFINE_string(
    'compensation',
    'gauss_newton',
    'What makes up for a pruned channel: '
    f'{", ".join(prunes.COMPENSATIONS)}.',
)
OPTIMIZER_STATE = absl_flags.DEFINE_string(
    'optimizer_state',
    'reset',
    f'After a growth: {", ".join(surgery.OPTIMIZER_STATES)}.',
)
NORMS = absl_flags.DEFINE_string(
    'norms', 'copied', 'Of children: copied from the parent, or their own.'
)


def main() -> None:
  flags.use_compilation_cache()
  run_config = flags.make_config(FIELDS, _growing)
  run_config = dataclasses.replace(run_config, network=_seed(run_config))
  method = make_method()
  if PHASES.value < 1:
    raise ValueError(f'--phases is at least 1, got {PHASES.value}.')
  # The last growth is trained for an epoch before the final phase.
  policy = policies.EveryEpochs(
      interval=EPOCHS_PER_PHASE.value,
      max_epochs=PHASES.value * EPOCHS_PER_PHASE.value + 1,
  )
  dataset = data.load(run_config.data, seed=run_config.seed)
  _check_examples(len(dataset.train.labels))
  architecture = session.seed_architecture(run_config, dataset)
  method.limits.allowance(architecture)  # Refuses one beyond the budget.
  print(coverage(architecture, SOLVER.value), file=sys.stderr, flush=True)
  result = train.run(
      run_config, dataset=dataset, policy=policy, method=method
  )
  print(summary.of_run(result, run_config.workdir))
  print(of_growth(result, run_config.workdir))


def make_method() -> method_lib.GaussNewton:
  """The method that the flags ask for."""
  return method_lib.GaussNewton(
      learn=splits.LearnConfig(
          curvature=CURVATURE.value,
          solver=SOLVER.value,
          epochs=MORPHISM_EPOCHS.value,
          sweeps=SWEEPS.value,
          damping=DAMPING.value,
      ),
      limits=selection.Limits(
          resource=RESOURCE.value,
          growth_cap=GROWTH_CAP.value,
          price=PRICE.value,
          budget=BUDGET.value,
      ),
      compensation=COMPENSATION.value if PRUNE.value else 'off',
      examples=EXAMPLES.value,
      optimizer_state=OPTIMIZER_STATE.value,
      norms=NORMS.value,
  )


def coverage(
    architecture: architecture_lib.Architecture, solver: str
) -> str:
  """What of a network can be split, and what is left as it is, and why."""
  method_lib.model_of(architecture, solver)  # Refuses one without channels.
  survey = method_lib.coverage(architecture, solver)
  channels = sum(site.units for site in survey.sites)
  lines = [
      f'{channels} channels of {len(survey.sites)} layers can be split: '
      + ', '.join(f'{site.axis} {site.units}' for site in survey.sites)
  ]
  lines += [f'not {axis}: {reason}' for axis, reason in survey.uncovered]
  return '\n'.join(lines)


def of_growth(result: Mapping[str, Any], workdir: str) -> str:
  """Widths per layer, and the estimates beside what was measured."""
  sizes = result['architecture']['sizes']
  inner = {a: n for a, n in sizes.items() if a not in ('image', 'classes')}
  lines = ['  widths ' + ', '.join(f'{a} {n}' for a, n in inner.items())]
  for record in logs.read(pathlib.Path(workdir) / 'history.jsonl'):
    if record['event'] == 'grow':
      report = record['initializer']
      lines.append(
          f'  epoch {record["epoch"]:3}: loss by '
          f'{report["estimated_change"]:+.4f} nats estimated, '
          f'{report["actual_change"]:+.4f} measured; '
          f'{record["params_before"]} -> {record["params_after"]} parameters'
      )
  return '\n'.join(lines)


def _growing(preset: config.RunConfig) -> config.RunConfig:
  """A preset with a plain network, whose layers have widths of their own."""
  return dataclasses.replace(
      preset,
      network=dataclasses.replace(preset.network, name='plain3net'),
      policy=config.PolicyConfig(interval=EPOCHS_PER_PHASE.value),
  )


def _seed(run_config: config.RunConfig) -> config.NetworkConfig:
  """The network with all layers as wide as asked."""
  if SEED_WIDTH.value < 1:
    raise ValueError(f'--seed_width is at least 1, got {SEED_WIDTH.value}.')
  stages = len(networks.get(run_config.network.name).widths)
  return dataclasses.replace(
      run_config.network, widths=(SEED_WIDTH.value,) * stages
  )


def _check_examples(available: int) -> None:
  """Refuses statistics of more examples than there are."""
  if EXAMPLES.value is not None and 2 * EXAMPLES.value > available:
    raise ValueError(
        f'--examples={EXAMPLES.value}, and as many to judge by, are more than '
        f'the {available} training images; take at most {available // 2}.'
    )


if __name__ == '__main__':
  flags.run_main(main)
