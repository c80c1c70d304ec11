"""Fixed networks at a grown one's training cost: what it is held to."""

from collections.abc import Mapping
import dataclasses
import os
import sys
from typing import Any

from autogrow_jax import config
from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import train
from experiments import presets


def fixed(run_config: config.RunConfig, name: str) -> config.RunConfig:
  """A configuration without growing, in a directory of a grown one's."""
  return dataclasses.replace(
      presets.fixed(run_config),
      workdir=os.path.join(run_config.workdir, f'fixed-{name}'),
  )


def at_equal_cost(
    run_config: config.RunConfig,
    dataset: data.Dataset,
    result: Mapping[str, Any],
    *,
    macs: int,
    label: str,
) -> dict[str, Any]:
  """Trains a fixed network for as many epochs as a grown one's cost allows.

  Args:
    run_config: of the fixed network, but for the epochs.
    dataset: the data.
    result: of the grown network.
    macs: multiply-adds of the fixed network per image, or per word.
    label: of the fixed network, for people.

  Returns:
    The fixed network's result.
  """
  size = run_config.batch_size
  inputs = len(dataset.train.labels) // size * size * dataset.train.length
  epoch_cost = costs.Ledger().trained(macs, inputs).train_macs
  epochs = max(1, round(result['train_macs'] / epoch_cost))
  return for_epochs(
      run_config, dataset, epochs, label=label, why=' at equal training cost'
  )


def for_epochs(
    run_config: config.RunConfig,
    dataset: data.Dataset,
    epochs: int,
    *,
    label: str,
    why: str = '',
) -> dict[str, Any]:
  """Trains a fixed network for some epochs; `label` and `why` are for people.
  """
  print(
      f'for comparison: {label}, fixed, {epochs} epochs{why}',
      file=sys.stderr,
      flush=True,
  )
  schedule = dataclasses.replace(run_config.schedule, finetune_epochs=epochs)
  return train.run(
      dataclasses.replace(run_config, schedule=schedule), dataset=dataset
  )
