"""`result.json` and `report.html`: what a run leaves at its end."""

from collections.abc import Sequence
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax

from autogrow_jax import checkpoint
from autogrow_jax import costs
from autogrow_jax import evaluation
from autogrow_jax import logs
from autogrow_jax import policies
from autogrow_jax import report
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
  """Writes the result and the report of a run that has ended.

  Args:
    setup: the run's.
    progress: at its end.
    state: canonical, at its end.
    selection: of the final network on the selection data.
    test: of the final network on the test set.

  Returns:
    What `result.json` holds.
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
      'val_accuracy': selection.accuracy,
      'best_val_accuracy': 100 * progress.best / selection.total,
      'holdout': selection.total,
      'test_accuracy': test.accuracy,
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
  if test.miou is not None:
    result |= {'val_miou': selection.miou, 'test_miou': test.miou}
  if setup.dataset.is_text:
    result['val_perplexity'] = selection.perplexity
    result['test_perplexity'] = test.perplexity
  if config.paper_compat:  # Where the selection data are the test set.
    result['best_test_accuracy'] = result['best_val_accuracy']
  result = json.loads(logs.dumps(result))  # As it will be read again.
  _write_result(
      setup.workdir, config.to_json(), progress.history, result
  )
  return result


def add_comparisons(
    workdir: str | os.PathLike[str], comparisons: dict[str, dict[str, Any]]
) -> None:
  """Adds results of other networks to a finished run's result and report.

  Args:
    workdir: of the finished run.
    comparisons: results by name.
  """
  keys = (
      'found', 'params', 'macs', 'epochs', 'val_accuracy', 'test_accuracy',
      'best_test_accuracy', 'val_miou', 'test_miou', 'val_perplexity',
      'test_perplexity', 'train_macs', 'wall_seconds', 'compile_seconds',
  )
  comparison = {
      name: {key: result[key] for key in keys if key in result}
      for name, result in comparisons.items()
  }
  add(workdir, comparison=comparison)


def add(workdir: str | os.PathLike[str], **values: Any) -> None:
  """Adds what a binary found to a finished run's result and report."""
  workdir = pathlib.Path(workdir)
  _write_result(
      workdir,
      logs.read_json(workdir / 'config.json'),
      logs.read(workdir / 'history.jsonl'),
      {**read_result(workdir), **values},
  )


def read_result(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """`result.json` of a work directory, None if its run has not ended."""
  return logs.read_json(pathlib.Path(workdir) / 'result.json')


def _write_result(
    workdir: pathlib.Path,
    config: dict[str, Any],
    history: Sequence[dict[str, Any]],
    result: dict[str, Any],
) -> None:
  """Writes `report.html`, then `result.json`, which marks the run as ended."""
  report.write(
      workdir / 'report.html',
      config=config,
      history=history,
      result=result,
  )
  logs.write_json(workdir / 'result.json', result)


def _memory(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """Most bytes on a device, and who says so; None if nobody does.

  A device says what was in use, proposals of the method included; otherwise it
  is the largest of the run's own programs as the compiler states it.
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
  """What the result was computed with."""
  return {
      'autogrow_jax': version.__version__,
      'python': platform.python_version(),
      **{
          name: importlib.metadata.version(name)
          for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
      },
      'platform': jax.devices()[0].device_kind,
  }
