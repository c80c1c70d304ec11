"""Records of a run in words and figures: its first line, and its epochs."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax

from autogrow_jax import tasks
from autogrow_jax.run import history
from autogrow_jax.run import prepare
from autogrow_jax.run import state as run_state

Setup = prepare.Setup


@dataclasses.dataclass(frozen=True)
class Pace:
  """Speed of an epoch, compilation left out.

  Attributes:
    images_per_second: images per second of training.
    waited: seconds for which the devices had no batch to work on.
  """

  images_per_second: float
  waited: float


def headline(setup: Setup, state: run_state.RunState) -> str:
  """First line of a run."""
  dataset, devices = setup.dataset, setup.parallel.devices
  selection = {
      'holdout': f'{len(dataset.holdout.labels)} held out',
      'test': 'DECIDING ON THE TEST SET',
      'paper_compat': "THE PAPER'S PROTOCOL (paper_compat): DECIDING ON THE "
      'TEST SET, THE BEST TEST ACCURACY REPORTED',
  }[setup.config.protocol]
  rule = ''
  if (
      state.progress.phase == 'growing'
      and 'policy' not in setup.config.own
      and setup.given.policy.interval is None
  ):
    rule = (
        f'; K = {setup.config.interval}, by the rule 3 / '
        f'{float(setup.config.data.fraction):g} of the data'
    )
  return (
      f'{state.progress.architecture} on {dataset.name}: '
      f'{len(dataset.train.labels)} training '
      f'{"windows" if dataset.is_text else "images"}, {selection}; '
      f'{len(devices)} {devices[0].platform} device'
      f'{"s" if len(devices) > 1 else ""}{rule}; results in {setup.workdir}'
  )


def epoch(
    setup: Setup,
    before: run_state.Progress,
    state: run_state.RunState,
    meters: Any,
    score: tasks.Score,
    pace: Pace | None,
    records: Sequence[history.Record],
) -> dict[str, Any]:
  """Values of an epoch's record that all methods have.

  Args:
    setup: the run's.
    before: progress during the epoch.
    state: after the evaluation.
    meters: sums over the epoch, on the host.
    score: of the selection data.
    pace: of the training.
    records: all records so far.
  """
  ledger = state.progress.ledger
  correct, total = int(meters['correct']), int(meters['total'])
  train_loss = float(meters['loss_sum']) / total
  values = {
      'phase': before.phase,
      'phase_epoch': state.progress.phase_epoch,
      'learning_rate': setup.rate(before),
      'train_loss': train_loss,
      'train_correct': correct,
      'train_total': total,
      'train_metrics': setup.task.metrics(train_loss, correct, total),
      'loss': score.loss,
      'correct': score.correct,
      'total': score.total,
      'metrics': dict(score.metrics),
      'select_on': setup.config.data.select_on,
      'protocol': setup.config.protocol,
      'best': state.progress.best,
      'train_macs': ledger.train_macs,
      'eval_macs': ledger.eval_macs,
      'wall_seconds': round(ledger.wall_seconds, 3),
      'compile_seconds': round(ledger.compile_seconds, 3),
      'compile_count': ledger.compile_count,
      **_device_values(setup),
  }
  if pace is not None:
    values['images_per_second'] = round(pace.images_per_second, 1)
    if setup.dataset.stream is not None:
      values['input_wait_seconds'] = round(pace.waited, 3)
  if before.skipped:
    values['skipped'] = before.skipped
  if before.phase == 'growing':
    values |= _growth_values(records)
  return values


def _growth_values(records: Sequence[history.Record]) -> dict[str, float]:
  """Change of the loss by the last growth, where the method estimates it."""
  grown = (item for item in reversed(records) if item['event'] == 'grow')
  report = next(grown, {}).get('initializer', {})
  keys = ('estimated_change', 'actual_change')
  return {key: report[key] for key in keys if key in report}


def _device_values(setup: Setup) -> dict[str, int]:
  """Most bytes in use on any device so far, where devices tell."""
  sizes = [
      stats['peak_bytes_in_use']
      for device in setup.parallel.devices
      if device.process_index == jax.process_index()
      and 'peak_bytes_in_use' in (stats := device.memory_stats() or {})
  ]
  return {'device_bytes': max(sizes)} if sizes else {}
