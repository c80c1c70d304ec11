"""Fixed networks beside a grown one, trained from scratch on the same data.

There is one for each name in `NETWORKS`. Most are trained at equal training
cost: for as many epochs as take the multiply-adds that the grown network took.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import sys
from typing import Any

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax.run import config
from autogrow_jax.run import console
from autogrow_jax.run import resolve
from autogrow_jax.run import results
from autogrow_jax.run import train

from . import presets
from . import report

# Name -> what the network is, for people.
NETWORKS = {
    'seed': 'the network at the start',
    'found': 'the network at the end',
    'scratch': 'the network at the end',
    'uniform': 'layers of equal widths, with about as many parameters as the '
               'network at the end',
    'full': 'the full-size network, for as many epochs',
    'direct': 'the network at the end, for as many epochs',
    'cost': 'the full-size network',
}
_FOUND = ('found', 'scratch', 'direct')
_AS_MANY_EPOCHS = ('full', 'direct')
_KEYS = (
    'found', 'params', 'macs', 'epochs', 'train_macs', 'wall_seconds',
    'compile_seconds',
)


def described(names: Sequence[str]) -> str:
  """Help of a flag that takes some of these names."""
  listed = '; '.join(f'{name} ({NETWORKS[name]})' for name in names)
  return (
      'Fixed networks to train from scratch as well, at equal training cost '
      f"unless said otherwise: {listed}. '' for none."
  )


def check(names: Sequence[str], known: Sequence[str]) -> None:
  """Raises ValueError unless all names are known."""
  if unknown := set(names) - set(known):
    raise ValueError(
        f'--compare names some of {", ".join(known)}, not '
        f'{", ".join(unknown)}.'
    )


def run(
    run_config: config.RunConfig,
    dataset: data.Dataset,
    result: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, dict[str, Any]]:
  """Trains fixed networks, and adds them to a grown one's result and report.

  Args:
    run_config: configuration of the grown network.
    dataset: its data.
    result: its result.
    names: keys of `NETWORKS`.

  Returns:
    Results of the fixed networks by name.
  """
  compared = {}
  for name in names:
    fixed = configuration(run_config, dataset, result, name)
    compared[name] = train.run(fixed, dataset=dataset)
    report.write(fixed.workdir)
  if compared:
    results.add(run_config.workdir, comparison={
        name: {
            key: value
            for key, value in other.items()
            if key in _KEYS or key in report.metric_words(other)
        }
        for name, other in compared.items()
    })
    report.write(run_config.workdir)
  return compared


def configuration(
    run_config: config.RunConfig,
    dataset: data.Dataset,
    result: Mapping[str, Any],
    name: str,
) -> config.RunConfig:
  """Returns the configuration of a fixed network, and says what it is.

  Args:
    run_config: configuration of the grown network.
    dataset: its data.
    result: its result.
    name: key of `NETWORKS`.
  """
  fixed = dataclasses.replace(
      presets.fixed(resolve.resolve(run_config, dataset)),
      workdir=os.path.join(run_config.workdir, f'fixed-{name}'),
      init_from=None,
      reinitialize=False,
  )
  if name in _FOUND:
    fixed = afresh(fixed, run_config.workdir)
    architecture = architecture_lib.Architecture.from_json(
        result['architecture']
    )
  else:
    if name == 'uniform':
      fixed = uniform(fixed, dataset, result['params'])
    architecture = resolve.seed_architecture(fixed, dataset)
  if name in _AS_MANY_EPOCHS:
    epochs, why = result['epochs'], ''
  else:
    size = fixed.batch_size
    inputs = len(dataset.train.labels) // size * size * dataset.train.length
    cost = costs.Ledger().trained(costs.macs(architecture), inputs).train_macs
    epochs = max(1, round(result['train_macs'] / cost))
    why = ' at equal training cost'
  print(
      f'for comparison: {name}, {architecture} with '
      f'{console.format_count(costs.params(architecture))} parameters, fixed, '
      f'{epochs} epochs{why}',
      file=sys.stderr,
      flush=True,
  )
  schedule = dataclasses.replace(fixed.schedule, finetune_epochs=epochs)
  return dataclasses.replace(fixed, schedule=schedule)


def afresh(fixed: config.RunConfig, workdir: str) -> config.RunConfig:
  """A fixed network of another run's shape, with weights of its own."""
  return dataclasses.replace(
      fixed,
      network=config.NetworkConfig(fixed.network.name),
      init_from=workdir,
      reinitialize=True,
  )


def uniform(
    fixed: config.RunConfig, dataset: data.Dataset, params: int
) -> config.RunConfig:
  """Gives all layers the width with the nearest number of parameters."""

  def wide(width: int) -> config.RunConfig:
    widths = (width,) * len(fixed.network.widths)
    network = dataclasses.replace(fixed.network, widths=widths)
    return dataclasses.replace(fixed, network=network)

  size = lambda width: costs.params(
      resolve.seed_architecture(wide(width), dataset)
  )
  width = 1
  while size(width) < params:
    width += 1
  nearest = min((max(1, width - 1), width), key=lambda w: abs(size(w) - params))
  return wide(nearest)
