"""TensorBoard files: scalars of each epoch, texts of each growth."""

import os
from typing import Any

from autogrow_jax.run import console
from autogrow_jax.run import history

# Scalars besides metrics, by the key of a record.
_SCALARS = {
    'loss/train': 'train_loss',
    'loss/selection': 'loss',
    'learning_rate': 'learning_rate',
    'cost/params': 'params',
    'cost/macs': 'macs',
    'cost/train_macs': 'train_macs',
    'cost/images_per_second': 'images_per_second',
}


def writer(directory: str | os.PathLike[str], *, resume_step: int) -> Any:
  """A writer of event files; None where tensorboardX is not installed.

  What an earlier process wrote after `resume_step` is hidden, so that no step
  appears twice.
  """
  try:
    import tensorboardX  # pylint: disable=g-import-not-at-top
  except ImportError:
    return None
  return tensorboardX.SummaryWriter(
      os.fspath(directory),
      purge_step=resume_step + 1,
      filename_suffix=f'.{resume_step}',  # Two starts within one second.
  )


def write(to: Any, record: history.Record) -> None:
  """Writes what TensorBoard shows of a record, if anything."""
  step = record['step']
  if record['event'] == 'epoch':
    for name, value in scalars(record).items():
      to.add_scalar(name, value, step)
    if record['epoch'] == 1 and record.get('select_on') == 'test':
      protocol = record.get('protocol', 'test')
      text = f'{protocol}: decisions are taken on the test set'
      to.add_text('protocol', text, step)
    to.flush()
  elif record['event'] == 'grow':
    text = console.format_growth(record).replace('\n', '\n\n')
    to.add_text('growth', text, step)
    to.flush()


def scalars(record: history.Record) -> dict[str, float]:
  """Scalars of an epoch; accuracies in percent."""
  values = {
      name: float(record[key])
      for name, key in _SCALARS.items()
      if record.get(key) is not None
  }
  for which, prefix in (('train', 'train_'), ('selection', '')):
    correct, total = record[f'{prefix}correct'], record[f'{prefix}total']
    values[f'accuracy/{which}'] = 100 * correct / max(1, total)
    for name, value in record.get(f'{prefix}metrics', {}).items():
      values[f'{name}/{which}'] = float(value)
  values['accuracy/best'] = 100 * record['best'] / record['total']
  for stage, depth in enumerate(record['depths']):
    values[f'depth/stage{stage}'] = float(depth)
  return values
