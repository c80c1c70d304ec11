"""Named configurations; every value can be overridden by a flag.

They are in `configs`, one file per method, as settings by path: what a flag
calls them.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax.methods import autogrow
from autogrow_jax.run import config
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import settings

from .configs import autogrow as of_autogrow
from .configs import gauss_newton as of_gauss_newton
from .configs import sparsify as of_sparsify
from .studies import null_model

RunConfig = config.RunConfig


class Row(NamedTuple):
  """One row of a table of Wen et al. 2020.

  Attributes:
    config: its configuration; the work directory is empty.
    found: depths per stage that the paper found, or was given.
    accuracy: the paper's test accuracy in percent, None where it is unknown.
  """

  config: RunConfig
  found: tuple[int, ...]
  accuracy: float | None


def _configured(changes: Mapping[str, Any]) -> RunConfig:
  """A configuration of the defaults and some settings by path."""
  changes = dict(changes)
  kind = changes.pop('method', 'autogrow')
  run_config = settings.with_kind(RunConfig(workdir=''), 'method', kind)
  return settings.replace(run_config, changes)


PRESETS: dict[str, RunConfig] = {
    name: _configured(changes)
    for name, changes in (
        of_autogrow.PRESETS | of_gauss_newton.PRESETS | of_sparsify.PRESETS
    ).items()
}


@functools.cache
def rows() -> dict[str, Row]:
  """All rows of the AutoGrow paper's tables by name, in its order."""
  return {
      name: Row(_configured(changes), found, accuracy)
      for name, (changes, found, accuracy) in of_autogrow.ROWS.items()
  }


def names() -> tuple[str, ...]:
  """All presets: `PRESETS`, and the rows of the paper's tables."""
  return (*PRESETS, *rows())


def get(name: str) -> RunConfig:
  """The configuration of a name.

  Args:
    name: one of `names`, or the path of a run's config.json.

  Returns:
    Its configuration; the work directory of a preset is empty.

  Raises:
    ValueError: if there is none of that name.
  """
  if name.endswith('.json'):
    stored = history_lib.read_json(name)
    if stored is None:
      raise ValueError(f'There is no configuration {name}.')
    return RunConfig.from_json(stored)
  if name in PRESETS:
    return PRESETS[name]
  if name not in rows():
    raise ValueError(
        f'Unknown preset {name!r}; there are {", ".join(PRESETS)}, and rows of '
        'the paper such as table4/basic3resnet-cifar10; '
        '`python -m experiments.describe --presets` lists all.'
    )
  return rows()[name].config


def fixed(run_config: RunConfig) -> RunConfig:
  """A configuration without growing."""
  method = run_config.method
  if not isinstance(method, autogrow.AutoGrow):
    method = autogrow.AutoGrow()  # It does nothing in a fixed network.
  return dataclasses.replace(
      run_config,
      policy=dataclasses.replace(run_config.policy, name='fixed'),
      method=method,
  )


def listing() -> str:
  """All presets as a table for people, with what the paper found."""
  header = (
      'preset', 'network', 'data', 'policy', 'K', 'J', 'initializer', 'floor',
      "paper's depth", "paper's test %",
  )
  lines = [header, *(_described(name) for name in names())]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = '\n'.join(
      '  '.join(
          cell.ljust(width) for cell, width in zip(line, widths, strict=True)
      ).rstrip()
      for line in lines
  )
  return f'{text}\n\n{of_autogrow.CAUTION}'


def _described(name: str) -> tuple[str, ...]:
  """The row of a preset in the listing."""
  run_config = get(name)
  network = networks.get(run_config.network.name)
  depths = run_config.network.depths or network.seed_depths
  policy = run_config.make_policy(depths)
  fraction = run_config.data.fraction
  part = '' if fraction == 1 else f'{100 * float(fraction):g} % of '
  grows = not isinstance(policy, policies.Fixed)
  has_window = isinstance(policy, (policies.Periodic, policies.Sequential))
  row = rows().get(name)
  growing = run_config.schedule.growing
  appends = grows and isinstance(run_config.method, autogrow.AutoGrow)
  return (
      name,
      f'{network.name} {policies.format_depths(depths)}',
      part + run_config.data.dataset,
      run_config.policy.name
      + (f', {growing}' if growing != 'constant' else ''),
      str(run_config.interval) if grows else '-',
      str(run_config.policy.window) if has_window else '-',
      run_config.method.initializer if appends else '-',
      policies.format_depths(null_model.floor(policy).depths)
      if isinstance(policy, policies.RoundRobin)
      else '-',
      policies.format_depths(row.found) if row else '-',
      '-' if row is None or row.accuracy is None else f'{row.accuracy:.2f}',
  )
