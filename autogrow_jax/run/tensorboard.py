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


class TensorBoard:
  """Writes records for TensorBoard, if tensorboardX is installed."""

  def __init__(
      self,
      directory: str | os.PathLike[str],
      *,
      resume_step: int | None = None,
  ):
    """Opens a writer.

    Args:
      directory: folder of the event files.
      resume_step: step of the restored checkpoint. What an earlier process
        wrote after it is hidden, so that no step appears twice.
    """
    self._writer: Any = None
    try:
      import tensorboardX  # pylint: disable=g-import-not-at-top
    except ImportError:
      return
    self._writer = tensorboardX.SummaryWriter(
        os.fspath(directory),
        purge_step=None if resume_step is None else resume_step + 1,
    )

  @property
  def is_missing(self) -> bool:
    """True if tensorboardX is missing, so that nothing is written."""
    return self._writer is None

  def write(self, record: history.Record) -> None:
    """Writes what TensorBoard shows of a record, if anything."""
    if self._writer is None:
      return
    step = record['step']
    if record['event'] == 'epoch':
      for name, value in scalars(record).items():
        self._writer.add_scalar(name, value, step)
      if record['epoch'] == 1 and record.get('select_on') == 'test':
        protocol = record.get('protocol', 'test')
        text = f'{protocol}: decisions are taken on the test set'
        self._writer.add_text('protocol', text, step)
      self._writer.flush()
    elif record['event'] == 'grow':
      text = console.format_growth(record).replace('\n', '\n\n')
      self._writer.add_text('growth', text, step)
      self._writer.flush()

  def close(self) -> None:
    """Closes the files."""
    if self._writer is not None:
      self._writer.close()


def scalars(record: history.Record) -> dict[str, float]:
  """Scalars of an epoch; accuracies in percent."""
  values = {
      name: float(record[key])
      for name, key in _SCALARS.items()
      if record.get(key) is not None
  }
  for which, prefix in (('train', 'train_'), ('selection', '')):
    correct, total = record[f'{prefix}correct'], record[f'{prefix}total']
    values[f'accuracy/{which}'] = 100 * correct / total
    for name, value in record.get(f'{prefix}metrics', {}).items():
      values[f'{name}/{which}'] = float(value)
  values['accuracy/best'] = 100 * record['best'] / record['total']
  for stage, depth in enumerate(record['depths']):
    values[f'depth/stage{stage}'] = float(depth)
  return values
