"""Numbers of a run: first line, records of epochs, and `result.json`."""

from collections.abc import Sequence
import importlib.metadata
import json
import os
import platform
from typing import Any

import jax

from autogrow_jax import costs
from autogrow_jax import policies
from autogrow_jax import tasks
from autogrow_jax import version
from autogrow_jax.data import paths
from autogrow_jax.run import checkpoint
from autogrow_jax.run import history
from autogrow_jax.run import prepare
from autogrow_jax.run import state as run_state

Setup = prepare.Setup
RunState = run_state.RunState


def headline(setup: Setup, state: RunState) -> str:
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
      and not setup.config.has_own_policy
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


def of_epoch(
    setup: Setup,
    before: run_state.Progress,
    state: RunState,
    meters: Any,
    score: tasks.Score,
    pace: dict[str, float],
) -> dict[str, Any]:
  """Values of an epoch's record that all methods have.

  Args:
    setup: fixed part of the run.
    before: progress during the epoch.
    state: state after the evaluation.
    meters: sums over the epoch, on the host.
    score: score of the selection data.
    pace: speed of the training.
  """
  correct, total = int(meters['correct']), max(1, int(meters['total']))
  train_loss = float(meters['loss_sum']) / total
  sizes = [
      stats['peak_bytes_in_use']
      for device in setup.parallel.devices
      if device.process_index == jax.process_index()
      and 'peak_bytes_in_use' in (stats := device.memory_stats() or {})
  ]
  return {
      'phase': before.phase,
      'phase_epoch': state.progress.phase_epoch,
      'learning_rate': setup.rate(before),
      'train_loss': train_loss,
      'train_correct': correct,
      'train_total': int(meters['total']),
      'train_metrics': setup.task.metrics(train_loss, correct, total),
      'loss': score.loss,
      'correct': score.correct,
      'total': score.total,
      'metrics': dict(score.metrics),
      'select_on': setup.config.data.select_on,
      'protocol': setup.config.protocol,
      'best': state.progress.best,
      **_costs(state.progress.ledger),
      **({'device_bytes': max(sizes)} if sizes else {}),
      **pace,
      **({'skipped': before.skipped} if before.skipped else {}),
  }


def of_last_growth(records: Sequence[history.Record]) -> dict[str, float]:
  """Change of the loss by the last growth, where the method estimates it."""
  grown = (item for item in reversed(records) if item['event'] == 'grow')
  report = next(grown, {}).get('initializer', {})
  keys = ('estimated_change', 'actual_change')
  return {key: report[key] for key in keys if key in report}


def conclude(
    setup: Setup,
    state: RunState,
    records: Sequence[history.Record],
    *,
    val: tasks.Score,
    test: tasks.Score,
) -> dict[str, Any]:
  """Writes `result.json`, which marks the run as ended, and returns it.

  Args:
    setup: fixed part of the run.
    state: state at the end of the run.
    records: the whole history.
    val: score of the final network on the selection data.
    test: score of the final network on the test set.
  """
  config, progress = setup.config, state.progress
  architecture, canonical = progress.architecture, state.fetch(setup.parallel)
  epochs = [item for item in records if item['event'] == 'epoch']
  is_fixed = isinstance(setup.policy, policies.Fixed)
  result = {
      'method': 'fixed' if is_fixed else type(setup.method).__name__.lower(),
      'network': config.network.name,
      'dataset': setup.dataset.name,
      'seed': config.seed,
      'found': policies.format_depths(architecture.depths),
      'architecture': architecture.to_json(),
      'params': costs.params(architecture),
      'macs': costs.macs(architecture),
      'layers': costs.layers_of(architecture),
      'growths': sum(item['event'] == 'grow' for item in records),
      'growing_epochs': sum(item['phase'] == 'growing' for item in epochs),
      'epochs': progress.epoch,
      'val_accuracy': val.accuracy,
      **{f'val_{name}': value for name, value in val.metrics.items()},
      'best_val_accuracy': 100 * progress.best / val.total,
      'holdout': val.total,
      'test_accuracy': test.accuracy,
      **{f'test_{name}': value for name, value in test.metrics.items()},
      'test_total': test.total,
      'select_on': config.data.select_on,
      'protocol': config.protocol,
      'data_fraction': config.data.data_fraction,
      **_costs(progress.ledger),
      'memory': _memory(records),
      'params_digest': checkpoint.digest(
          {'params': canonical.params, 'stats': canonical.stats}
      ),
      'devices': {
          'parallel': setup.parallel.mode,
          'number': len(setup.parallel.devices),
          'precision': config.devices.precision,
      },
      'versions': {
          'autogrow_jax': version.__version__,
          'python': platform.python_version(),
          **{
              name: importlib.metadata.version(name)
              for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
          },
          'platform': jax.devices()[0].device_kind,
      },
  }
  if config.paper_compat:  # Where the selection data are the test set.
    result['best_test_accuracy'] = result['best_val_accuracy']
  history.write_json(setup.workdir / 'result.json', result)
  return json.loads(history.dumps(result))


def add(workdir: str | os.PathLike[str], **values: Any) -> None:
  """Adds values to the result of a finished run, atomically."""
  if (result := read_result(workdir)) is None:
    raise ValueError(f'The run in {workdir} has not ended.')
  path = paths.local(workdir) / 'result.json'
  history.write_json(path, result | values)


def read_result(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns `result.json` of a work directory; None before the run's end."""
  workdir = paths.local(workdir, 'The work directory of a run')
  return history.read_json(workdir / 'result.json')


def _costs(ledger: costs.Ledger) -> dict[str, float]:
  """Costs so far."""
  return {
      'train_macs': ledger.train_macs,
      'eval_macs': ledger.eval_macs,
      'wall_seconds': round(ledger.wall_seconds, 3),
      'compile_seconds': round(ledger.compile_seconds, 3),
      'compile_count': ledger.compile_count,
  }


def _memory(records: Sequence[history.Record]) -> dict[str, Any] | None:
  """Peak bytes on a device and their source; None where neither is recorded.

  A device reports what was in use, proposals of the method included. The
  compiler reports the largest of the run's own programs.
  """
  for source, key in (('device', 'device_bytes'), ('compiler', 'bytes')):
    sizes = [record[key] for record in records if key in record]
    if sizes:
      return {'peak_bytes': max(sizes), 'source': source}
  return None
