"""`result.json`: what a run reports at its end."""

from collections.abc import Sequence
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax

from autogrow_jax import costs
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import version
from autogrow_jax.run import checkpoint
from autogrow_jax.run import history
from autogrow_jax.run import prepare
from autogrow_jax.run import state as run_state


def conclude(
    setup: prepare.Setup,
    progress: run_state.Progress,
    state: state_lib.TrainState,
    records: Sequence[history.Record],
    *,
    val: tasks.Score,
    test: tasks.Score,
) -> dict[str, Any]:
  """Writes `result.json`, which marks the run as ended.

  Args:
    setup: the run's.
    progress: progress at the end of the run.
    state: canonical state at the end of the run.
    records: the whole history.
    val: score of the final network on the selection data.
    test: score of the final network on the test set.

  Returns:
    The content of `result.json`.
  """
  config, ledger = setup.config, progress.ledger
  architecture = progress.architecture
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
      'train_macs': ledger.train_macs,
      'eval_macs': ledger.eval_macs,
      'wall_seconds': round(ledger.wall_seconds, 3),
      'compile_seconds': round(ledger.compile_seconds, 3),
      'compile_count': ledger.compile_count,
      'memory': _memory(records),
      'params_digest': checkpoint.digest(
          {'params': state.params, 'stats': state.stats}
      ),
      'devices': {
          'parallel': setup.parallel.mode,
          'number': len(setup.parallel.devices),
          'precision': config.devices.precision,
      },
      'versions': _versions(),
  }
  if config.paper_compat:  # Where the selection data are the test set.
    result['best_test_accuracy'] = result['best_val_accuracy']
  history.write_json(setup.workdir / 'result.json', result)
  return json.loads(history.dumps(result))


def add(workdir: str | os.PathLike[str], **values: Any) -> None:
  """Adds values to the result of a finished run, atomically."""
  path = pathlib.Path(workdir) / 'result.json'
  history.write_json(path, json.loads(path.read_text()) | values)


def read_result(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns `result.json` of a work directory; None before the run's end."""
  return history.read_json(pathlib.Path(workdir) / 'result.json')


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
