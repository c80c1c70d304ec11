"""Texts about growing widths, for people."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from autogrow_jax import architecture as architecture_lib
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.run import config
from autogrow_jax.run import history as history_lib

from . import calibration
from . import rivals


def coverage(
    architecture: architecture_lib.Architecture, strategy: str
) -> str:
  """Lists what can be split in a network, and what cannot, and why."""
  signals.model_of(architecture)  # Refuses one without channels.
  survey = sites.survey(architecture)
  channels = sum(site.units for site in survey.sites)
  lines = [
      f'{channels} channels of {len(survey.sites)} layers can be split: '
      + ', '.join(f'{site.axis} {site.units}' for site in survey.sites)
  ]
  lines += [f'not {axis}: {reason}' for axis, reason in survey.uncovered]
  refused = rivals.uncovered(strategy, survey.sites).items()
  lines += [f'not {axis} by {strategy}: {reason}' for axis, reason in refused]
  return '\n'.join(lines)


def of_growth(
    result: Mapping[str, Any],
    growths: Sequence[history_lib.Record],
    found: calibration.Calibration | None,
) -> str:
  """Lists widths per layer, and the estimates beside the measurements."""
  sizes = result['architecture']['sizes']
  inner = {a: n for a, n in sizes.items() if a not in ('image', 'classes')}
  lines = ['  widths ' + ', '.join(f'{a} {n}' for a, n in inner.items()), '']
  for phase, record in enumerate(growths, start=1):
    line = f'  phase {phase:2}, epoch {record["epoch"]:3}: '
    if record['event'] == 'skip':
      lines.append(f'{line}no growth, {record["reason"]}')
      continue
    report = record['initializer']
    lines.append(
        f'{line}loss by {report["estimated_change"]:+.4f} nats estimated, '
        f'{report["actual_change"]:+.4f} measured; {record["params_before"]} '
        f'-> {record["params_after"]} parameters'
    )
  if found is not None:
    lines += [
        '',
        f'  estimates of {found.count} growth steps, taken or not: Pearson '
        f'{found.pearson:.3f},',
        f'  Spearman {found.spearman:.3f}, slope {found.slope:.2f} (measured '
        'over estimated)',
    ]
  return '\n'.join(lines)


def calibration_of(
    growths: Sequence[history_lib.Record],
) -> calibration.Calibration | None:
  """Compares the estimates of whole growth steps, taken or not.

  Returns:
    None for fewer than three, and for new channels that change nothing at
    first.
  """
  pairs = []
  for record in growths:
    pairs += record.get('initializer', record).get('attempts', [])
  if len(pairs) < 3:
    return None
  found = calibration.calibration(*zip(*pairs, strict=True))
  return None if math.isnan(found.pearson) else found


def check_examples(run_config: config.RunConfig, available: int) -> None:
  """Refuses statistics of more examples than there are."""
  wanted, size = run_config.method.examples, run_config.batch_size
  batches = available // size
  if batches < 2:
    raise ValueError(
        'Statistics and judgement take a batch each, and an epoch of '
        f'{available} training images has {batches} of {size}; take a smaller '
        '--batch_size.'
    )
  if wanted is not None and 2 * -(-wanted // size) > batches:
    raise ValueError(
        f'--examples={wanted}, and as many to judge by, in whole batches of '
        f'{size}, are more than the {available} training images; take at most '
        f'{batches // 2 * size}.'
    )
