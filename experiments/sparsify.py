"""Grows and prunes channels and layers within a budget, by sampled masks.

    python -m experiments.sparsify                      # digits, minutes
    python -m experiments.sparsify --target_sparsity=0.8 --compare=full,direct
    python -m experiments.sparsify --method=random --seed=1
    python -m experiments.sparsify --method=l1 --finetune_epochs=10
    python -m experiments.sparsify --method.grow=both --depths=4-4-4

Structured continuous sparsification (Yuan, Savarese, Maire, ICLR 2021). The
network of --depths and --network.widths is the largest there can be; the run
starts from one channel per layer, and at its end has --target_sparsity of the
full cost less.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
import sys
from typing import Any

from absl import flags as absl_flags

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax.methods.sparsify import method as method_lib
from autogrow_jax.run import config
from autogrow_jax.run import console
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import resolve
from autogrow_jax.run import settings
from autogrow_jax.run import train

from . import compare
from . import flags
from . import presets
from . import report
from . import summary
from .studies.sparsify import pruning
from .studies.sparsify import random_masks

# Method -> its class, whose fields say which settings it has.
_KINDS = {
    'sparsify': method_lib.Sparsify,
    'random': random_masks.RandomMasks,
    **dict.fromkeys(pruning.STRATEGIES, pruning.Pruned),
}
METHODS = (*_KINDS, 'direct')
BACKENDS = ('auto', 'masked', 'compact')
COMPARED = ('full', 'direct', 'cost')

# Multiply-adds of training between two samples from which on a compact network
# saves more than the compilations that it costs. On two CPU cores, which do
# 2e10 a second, ResNet-20 breaks even at 3e11; the rest is a margin, since
# other machines compile no faster but train faster.
_WORTH_COMPILING = 5e11


def sparsifying(preset: config.RunConfig) -> config.RunConfig:
  """A preset of this method, or the data and training of another one."""
  if isinstance(preset.method, method_lib.Sparsify):
    return preset
  return dataclasses.replace(
      preset,
      policy=config.PolicyConfig('every', interval=1, max_epochs=40),
      # A short run: see the small presets.
      method=method_lib.Sparsify(
          target_sparsity=0.7,
          mask=optimizers.AuxConfig(learning_rate=10.0),
          freeze=0.8,
      ),
      schedule=dataclasses.replace(
          preset.schedule, growing='whole', finetune_epochs=0
      ),
  )


SETTINGS = flags.Settings(
    {
        **flags.PLAIN,
        **flags.DEPTHS,
        'epochs': 'policy.max_epochs',
        'query_epochs': 'policy.interval',
        'target_sparsity': 'method.target_sparsity',
        'budget': 'method.budget',
    },
    base=sparsifying,
    hidden=('policy', 'method.backend', 'method.run', 'method.strategy'),
    kinds={
        'method': (
            'method',
            {
                name: f'{kind.__module__}:{kind.__qualname__}'
                for name, kind in _KINDS.items()
            },
        )
    },
    help={
        'depths': "Most blocks per stage, e.g. 4-4-4; the published network's "
        'by default, else 2 each.',
        'epochs': 'Epochs with sampled masks, or before pruning at once.',
        'query_epochs': 'Epochs between two samples of the masks.',
        'finetune_epochs': 'Epochs of the final network, after --epochs.',
    },
)


def main() -> None:
  flags.run(_main, __doc__, _define)


def _define(arguments: Sequence[str]) -> None:
  absl_flags.DEFINE_enum(
      'method',
      'sparsify',
      METHODS,
      'sparsify; random (masks drawn with one probability, never trained); '
      'trained in full for --epochs, pruned at once and trained for '
      '--finetune_epochs (a quarter as many by default): uniform (L1 norm of '
      'filters, the same part of every layer), l1 (over the whole network), '
      'soft (filters that would go are zeroed after every sample, and may '
      'recover), morphnet (penalty on the scales of norms by cost); direct '
      '(the final network of the run --init_from, from scratch).',
  )
  absl_flags.DEFINE_enum(
      'backend',
      'auto',
      BACKENDS,
      'How masks are computed: masked (everything, one program), compact (what '
      'is there, a program for each shape), or auto: compact where steps cost '
      'more than compiling.',
  )
  absl_flags.DEFINE_list('compare', [], compare.described(COMPARED))
  SETTINGS.define(arguments)


def _main() -> None:
  flags.use_compilation_cache()
  given = flags.FLAGS
  compare.check(given.compare, COMPARED)
  run_config = _with_depths(SETTINGS.config())
  dataset = data.load(run_config.data, seed=run_config.seed)
  if given.method == 'direct':
    result = train.run(direct(run_config), dataset=dataset)
    report.write(run_config.workdir)
    print(summary.of_run(result, run_config.workdir))
    return
  run_config = complete(run_config, dataset)
  result = train.run(run_config, dataset=dataset)
  report.write(run_config.workdir)
  fixed = compare.run(run_config, dataset, result, given.compare)
  print(summary.of_run(result, run_config.workdir, fixed))
  print(of_masks(run_config, dataset, result, fixed))


def _with_depths(run_config: config.RunConfig) -> config.RunConfig:
  """Gives a network that was published in no depths two blocks per stage."""
  network = networks.get(run_config.network.name)
  depths = run_config.network.depths or network.depths
  depths = depths or (2,) * len(network.widths)
  return settings.replace(run_config, {'network.depths': depths})


def complete(
    run_config: config.RunConfig, dataset: data.Dataset
) -> config.RunConfig:
  """The configuration with what depends on its length and on the network.

  Raises:
    ValueError: the budget is below what the smallest network costs.
  """
  policy = run_config.policy
  if policy.name != 'every' or not policy.max_epochs:
    raise ValueError('Masks are sampled every so many epochs: give --epochs.')
  steps = len(dataset.train.labels) // run_config.batch_size
  architecture = _full(run_config, dataset)
  method, schedule = run_config.method, run_config.schedule
  name = flags.FLAGS.method
  if name in pruning.STRATEGIES:
    method = dataclasses.replace(method, strategy=name)
    if not schedule.finetune_epochs:
      schedule = dataclasses.replace(
          schedule, finetune_epochs=max(1, policy.max_epochs // 4)
      )
    how = 'trained in full, then pruned'
  else:
    examples = policy.interval * steps * run_config.batch_size
    spent = costs.Ledger().trained(
        costs.macs(architecture), examples * dataset.train.length
    )
    backend = flags.FLAGS.backend
    if backend == 'auto':
      is_worth = spent.train_macs > _WORTH_COMPILING
      backend = 'compact' if is_worth else 'masked'
    method = dataclasses.replace(
        method,
        backend=backend,
        run=method_lib.Run(
            queries=-(-policy.max_epochs // policy.interval),
            steps=policy.max_epochs * steps,
            accumulate=run_config.optimizer.accumulate,
        ),
    )
    how = f'{backend} execution'
  # Both refuse networks that the method has no use for.
  method.execution.active(architecture, method.extra(architecture).other)
  least = method.least_density(architecture)
  if 1 - method.target_sparsity < least:
    raise ValueError(
        f'--target_sparsity={method.target_sparsity} leaves less than the '
        f'smallest network, of one channel per layer; it is at most '
        f'{math.floor(1e4 * (1 - least)) / 1e4:.4f}.'
    )
  print(
      f'{architecture} in full: {costs.params(architecture)} parameters, '
      f'{costs.macs(architecture)} multiply-adds; {how}',
      file=sys.stderr,
      flush=True,
  )
  return dataclasses.replace(run_config, method=method, schedule=schedule)


def direct(run_config: config.RunConfig) -> config.RunConfig:
  """The network that another run found, from scratch for as many epochs."""
  if run_config.init_from is None:
    raise ValueError(
        '--method=direct trains the network of another run from scratch; name '
        'that run with --init_from.'
    )
  schedule = dataclasses.replace(
      run_config.schedule, finetune_epochs=run_config.policy.max_epochs
  )
  return dataclasses.replace(
      compare.afresh(presets.fixed(run_config), run_config.init_from),
      schedule=schedule,
  )


def of_masks(
    run_config: config.RunConfig,
    dataset: data.Dataset,
    result: Mapping[str, Any],
    comparisons: Mapping[str, Mapping[str, Any]],
) -> str:
  """Lists widths, cost and savings of the pruned network."""
  full = _full(run_config, dataset)
  history = history_lib.read(pathlib.Path(run_config.workdir) / 'history.jsonl')
  epochs = [record for record in history if record['event'] == 'epoch']
  (end,) = [record for record in history if record['event'] == 'grow']
  sizes = result['architecture']['sizes']
  percent = lambda part, whole: f'{100 * part / whole:.2f} %'
  # The stage of the method itself: of pruning what follows the dense network.
  is_masked = not isinstance(run_config.method, pruning.Pruned)
  stage = 'growing' if is_masked else 'finetuning'
  of_stage = [record for record in epochs if record['phase'] == stage]
  saved = lambda epochs: costs.savings(
      costs.macs(full), [record['macs'] for record in epochs]
  )
  lines = [
      '  widths '
      + ', '.join(
          f'{axis} {sizes[axis]}/{size}'
          for axis, size in full.sizes
          if axis in end['initializer']['widths']
      ),
      f'  {percent(result["params"], costs.params(full))} of '
      f'{console.format_count(costs.params(full))} parameters, '
      f'{percent(result["macs"], costs.macs(full))} of '
      f'{console.format_count(costs.macs(full))} multiply-adds; '
      f'{percent(1 - run_config.method.target_sparsity, 1)} of the '
      f'{run_config.method.budget} were asked for',
      f'  training multiply-adds saved: {saved(of_stage):.2f}x while {stage}, '
      f'{saved(epochs):.2f}x in all',
  ]
  if is_masked:
    lines.append(
        f'  the compact network is the masked one up to '
        f'{end["logits_change_eval"]:.2g} in its logits; '
        f'{100 * end["initializer"]["ambiguous"]:.1f} % of the masks were '
        'ambiguous'
    )
  if 'full' in comparisons:
    seconds = lambda item: item['wall_seconds'] - item['compile_seconds']
    other = comparisons['full']
    lines.append(
        '  wall time saved against the full network: '
        f'{seconds(other) / seconds(result):.2f}x without compiling, '
        f'{other["wall_seconds"] / result["wall_seconds"]:.2f}x with it'
    )
  return '\n'.join(lines)


def _full(
    run_config: config.RunConfig, dataset: data.Dataset
) -> architecture_lib.Architecture:
  """The largest network that there can be."""
  return resolve.seed_architecture(
      resolve.resolve(run_config, dataset), dataset
  )


if __name__ == '__main__':
  main()
