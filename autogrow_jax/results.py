"""`result.json`: what a run reports at its end."""

from collections.abc import Sequence
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax

from autogrow_jax import checkpoint
from autogrow_jax import controls
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import evaluation
from autogrow_jax import logs
from autogrow_jax import policies
from autogrow_jax import session
from autogrow_jax import state as state_lib
from autogrow_jax import version


def conclude(
    setup: session.Setup,
    progress: session.Progress,
    state: state_lib.TrainState,
    *,
    selection: evaluation.Score,
    test: evaluation.Score,
) -> dict[str, Any]:
  """Writes `result.json`, which marks the run as ended.

  Args:
    setup: fixed setup of the run.
    progress: progress at the end of the run.
    state: canonical state at the end of the run.
    selection: score of the final network on the selection data.
    test: score of the final network on the test set.

  Returns:
    The content of `result.json`.
  """
  config, ledger = setup.config, progress.ledger
  architecture = progress.architecture
  epochs = [item for item in progress.history if item['event'] == 'epoch']
  growths = [item for item in progress.history if item['event'] == 'grow']
  result = {
      'method': _method_name(setup),
      'network': config.network.name,
      'dataset': setup.dataset.name,
      'seed': config.seed,
      'found': policies.format_depths(architecture.depths),
      'architecture': architecture.to_json(),
      'params': costs.params(architecture),
      'macs': costs.macs(architecture),
      'layers': costs.layers_of(architecture),
      'growths': len(growths),
      'growing_epochs': sum(item['phase'] == 'growing' for item in epochs),
      'epochs': progress.epoch,
      **{f'val_{k}': v for k, v in metrics(setup.dataset, selection).items()},
      'best_val_accuracy': 100 * progress.best / selection.total,
      'holdout': selection.total,
      **{f'test_{k}': v for k, v in metrics(setup.dataset, test).items()},
      'test_total': test.total,
      'select_on': config.data.select_on,
      'protocol': config.protocol,
      'data_fraction': config.data.data_fraction,
      'train_macs': ledger.train_macs,
      'eval_macs': ledger.eval_macs,
      'wall_seconds': round(ledger.wall_seconds, 3),
      'compile_seconds': round(ledger.compile_seconds, 3),
      'compile_count': ledger.compile_count,
      'memory': _memory(progress.history),
      'params_digest': checkpoint.digest(
          {'params': state.params, 'stats': state.stats}
      ),
      'devices': {
          'parallel': setup.task.parallel.mode,
          'number': len(setup.task.parallel.devices),
          'precision': config.devices.precision,
      },
      'versions': _versions(),
  }
  if config.paper_compat:  # Where the selection data are the test set.
    result['best_test_accuracy'] = result['best_val_accuracy']
  if isinstance(setup.policy, policies.RoundRobin):
    result |= _controls(
        setup.policy,
        epochs,
        selection.total,
        trained=config.init_from is not None,
    )
  result = json.loads(logs.dumps(result))  # As it will be read again.
  logs.write_json(setup.workdir / 'result.json', result)
  return result


def metrics(
    dataset: data.Dataset, score: evaluation.Score
) -> dict[str, float]:
  """Returns what a task reports of a score, by name; its own metric last."""
  values = {'accuracy': score.accuracy}
  if score.miou is not None:
    values['miou'] = score.miou
  if dataset.is_text:
    values['perplexity'] = score.perplexity
  return values


def add(workdir: str | os.PathLike[str], **values: Any) -> None:
  """Adds values to the result of a finished run, atomically."""
  result = {**read_result(workdir), **values}
  logs.write_json(pathlib.Path(workdir) / 'result.json', result)


def read_result(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns `result.json` of a work directory; None before the run's end."""
  return logs.read_json(pathlib.Path(workdir) / 'result.json')


def _controls(
    policy: policies.RoundRobin,
    epochs: Sequence[dict[str, Any]],
    total: int,
    *,
    trained: bool,
) -> dict[str, Any]:
  """What the policy finds without a signal: the floor and the null band.

  The noise is that of counting `total` examples at the mean accuracy of the
  last growing epochs, as many as the policy looks back.
  """
  growing = [item for item in epochs if item['phase'] == 'growing']
  recent = growing[-getattr(policy, 'window', policy.interval) :]
  if not recent:
    return {}
  correct = sum(item['correct'] for item in recent)
  floor = controls.floor(policy, trained=trained)
  band = controls.null_band(
      policy,
      total=total,
      accuracy=correct / sum(item['total'] for item in recent),
      trained=trained,
  )
  return {
      'floor': policies.format_depths(floor.depths),
      'null_band': dataclasses.asdict(band),
  }


def _memory(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """Peak bytes on a device and their source; None where neither is recorded.

  A device reports what was in use, proposals of the method included. The
  compiler reports the largest of the run's own programs.
  """
  for source, key in (('device', 'device_bytes'), ('compiler', 'bytes')):
    sizes = [record[key] for record in history if key in record]
    if sizes:
      return {'peak_bytes': max(sizes), 'source': source}
  return None


def _method_name(setup: session.Setup) -> str:
  if isinstance(setup.policy, policies.Fixed):
    return 'fixed'
  return type(setup.task.method).__name__.lower()


def _versions() -> dict[str, str]:
  """Versions of the software, and the kind of device."""
  return {
      'autogrow_jax': version.__version__,
      'python': platform.python_version(),
      **{
          name: importlib.metadata.version(name)
          for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
      },
      'platform': jax.devices()[0].device_kind,
  }
