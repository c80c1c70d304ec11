"""Grows the depth of a network while it trains (Wen et al., KDD 2020).

    python -m experiments.autogrow                      # digits, minutes
    python -m experiments.autogrow --preset=cifar10 --data_dir=DIR

A row of the paper's tables, at first without training:

    python -m experiments.autogrow --preset=table5/basic3resnet-cifar10-k50 \\
        --dry_run=shapes
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from absl import flags as absl_flags

from autogrow_jax import config
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import dry_run
from autogrow_jax import logs
from autogrow_jax import policies
from autogrow_jax import results
from autogrow_jax import session
from autogrow_jax import train
from autogrow_jax.methods import autogrow
from experiments import comparison
from experiments import flags
from experiments import summary
from experiments.studies import null_model

FIELDS = {**flags.GROWING_FLAGS, **flags.RUN_FLAGS}

flags.define(FIELDS)
COMPARE = absl_flags.DEFINE_list(
    'compare',
    ['seed'],
    'Fixed networks to train from scratch at equal training cost: seed, found, '
    "both (seed,found) or '' for none.",
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
        'Walk the whole growth schedule on one batch, without training. Alone '
        'or as --dry_run=full every architecture is compiled and run, and a '
        'checkpoint saved and restored; --dry_run=shapes only traces them, '
        'within seconds or minutes. Digits and the data of the paper need not '
        'be there.',
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
    walk(run_config, shapes=DRY_RUN.value == 'shapes')
    return
  if unknown := set(COMPARE.value) - {'seed', 'found'}:
    raise ValueError(
        f'--compare names seed, found or both, not {", ".join(unknown)}.'
    )
  dataset = data.load(run_config.data, seed=run_config.seed)
  result = train.run(run_config, dataset=dataset)
  controls = null_model.of_run(run_config.workdir)
  results.add(run_config.workdir, **controls)
  comparisons = [
      (f'{name}, fixed', compare(run_config, dataset, result, name))
      for name in COMPARE.value
  ]
  if comparisons:
    results.add_comparisons(run_config.workdir, dict(comparisons))
  print(summary.of_run({**result, **controls}, run_config.workdir, comparisons))
  if run_config.data.dataset == 'digits':
    print(NEXT.replace('WORKDIR', run_config.workdir))


def _appending(preset: config.RunConfig) -> config.RunConfig:
  """The preset, if it is one that appends sub-modules."""
  if not isinstance(preset.method, autogrow.AutoGrow):
    raise ValueError(
        'The preset does not append sub-modules; it is for '
        'experiments.gauss_newton or experiments.sparsify.'
    )
  return preset


def compare(
    run_config: config.RunConfig,
    dataset: data.Dataset,
    result: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:
  """Trains a fixed network from scratch at a grown one's training cost.

  Args:
    run_config: of the grown network.
    dataset: its data.
    result: its result.
    name: 'seed' or 'found', the depths to train.

  Returns:
    The fixed network's result.
  """
  resolved = train.resolve(run_config, dataset)
  depths = (
      resolved.network.depths
      if name == 'seed'
      else policies.parse_depths(result['found'])
  )
  fixed = dataclasses.replace(
      comparison.fixed(resolved, name),
      network=dataclasses.replace(resolved.network, depths=depths),
      init_from=None,
      reinitialize=False,
  )
  return comparison.at_equal_cost(
      fixed,
      dataset,
      result,
      macs=costs.macs(session.seed_architecture(fixed, dataset)),
      label=policies.format_depths(depths),
  )


def walk(run_config: config.RunConfig, *, shapes: bool) -> None:
  """Prints a dry run."""
  header = 'epoch  depths        parameters  multiply-adds'
  tried = '  peak memory  compiling  loss on one batch'
  end = 'A run without progress ends there.'
  if run_config.paper_compat:
    end += (
        "\nThe paper's own protocol (paper_compat): it decides on the test set."
    )
  stops = []
  for stop in dry_run.walk(run_config, _any_data(run_config), shapes=shapes):
    if not stops:  # Nothing is printed of a configuration that is wrong.
      print(header if shapes else header + tried)
    stops.append(stop)
    print(
        f'{stop.epoch:5}  {policies.format_depths(stop.depths):12}  '
        f'{logs.format_count(stop.params):>10}  '
        f'{logs.format_count(stop.macs):>13}'
        + (_tried(stop.tried) if stop.tried else ''),
        flush=True,
    )
  if shapes:
    print(
        f'{len(stops)} architectures traced; the checkpoint of the last one '
        f'has its shapes. {end}'
    )
    return
  seconds = sum(stop.tried.compile_seconds for stop in stops)
  print(
      f'{len(stops)} architectures compiled in {seconds:.0f} s; the checkpoint '
      f'of the last one was saved and restored. {end}'
  )
  _print_input_rate(run_config)


def _print_input_rate(run_config: config.RunConfig) -> None:
  """Says how fast a stream is, if the data set is one and is there."""
  try:
    stream = data.load(run_config.data, seed=run_config.seed).stream
  except ValueError as error:
    print(f'The input pipeline was not tried: {error}')
    return
  if stream is not None:
    rate = dry_run.input_rate(
        stream, workers=run_config.devices.decode_workers
    )
    print(f'The input pipeline alone delivers {rate:.0f} images per second.')


def _any_data(run_config: config.RunConfig) -> data.Dataset:
  """A known data set's shapes with noise in them, or the data themselves."""
  if run_config.data.dataset not in data.SOURCES:
    return data.load(run_config.data, seed=run_config.seed)
  dataset = data.stand_in(run_config.data, seed=run_config.seed)
  print(
      f'Noise for {dataset.name}: {len(dataset.train.labels)} training '
      f'images, {"x".join(map(str, dataset.input_shape))}, {dataset.classes} '
      'classes.'
  )
  return dataset


def _bytes(count: int | None) -> str:
  return '-' if count is None else f'{logs.format_count(count)}B'


def _tried(tried: dry_run.Tried) -> str:
  return (
      f'  {_bytes(tried.memory):>11}  '
      f'{tried.compile_seconds:7.1f} s  {tried.loss:.3f}'
  )


if __name__ == '__main__':
  flags.run_main(main)
