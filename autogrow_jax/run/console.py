"""Screen output of a run: a bar on a terminal, and plain lines.

Only the first of several hosts prints.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import re
import sys
import time
from typing import Any, TextIO

import tqdm

from autogrow_jax import policies
from autogrow_jax.run import history

Record = history.Record

# Percent of the time; less waiting for input is not worth mentioning.
_MUCH_WAITING = 10

# Seconds between two looks at the numbers of a running epoch.
_NUMBERS_SECONDS = 0.1

# How the values of metrics are shown.
FORMATS = {
    'accuracy': '{:.2f}%', 'miou': '{:.2f}%', 'perplexity': '{:.4g}'
}
LABELS = {'accuracy': 'acc', 'miou': 'mIoU'}

_PHASES = {'growing': 'grow', 'finetuning': 'tune', 'training': 'train'}
_REASONS = {
    'window': 'no gain within its window',
    'cap': 'the largest depth is reached',
}


class Console:
  """A bar on a terminal, plain lines elsewhere."""

  def __init__(self, *, stream: TextIO | None = None):
    """Chooses by the stream (default: stdout) whether there is a bar."""
    self._stream = stream or sys.stdout
    self._has_bar = bool(getattr(self._stream, 'isatty', lambda: False)())
    self._bar = None
    self._numbered = -_NUMBERS_SECONDS

  def start_epoch(self, epoch: int, steps: int, shape: str, done: int) -> None:
    """Starts the bar of an epoch of which some steps are done."""
    if self._has_bar:
      self.close()
      self._bar = tqdm.tqdm(
          total=steps,
          desc=f'epoch {epoch}  {shape}',
          unit='step',
          file=self._stream,
          leave=False,
          dynamic_ncols=True,
          initial=done,
      )

  def update(self, numbers: Callable[[], tuple[float, float]]) -> None:
    """Moves the bar on by a step.

    Args:
      numbers: gives the mean loss, and the accuracy in percent; called only
        where they are shown, at most ten times a second.
    """
    if self._bar is None:
      return
    now = time.monotonic()
    if now - self._numbered > _NUMBERS_SECONDS:
      self._numbered = now
      loss, accuracy = numbers()
      self._bar.set_postfix(
          {'loss': f'{loss:.3f}', 'accuracy': f'{accuracy:.1f}%'}
      )
    self._bar.update()

  def record(self, record: Record) -> None:
    """Shows a record of the history, if it is one that people want to see."""
    if record['event'] == 'epoch':
      self.close()
    text = format_record(record)
    if text:
      self.write(text)

  def write(self, text: str) -> None:
    """Writes lines above the bar, if there is one."""
    if self._has_bar:
      tqdm.tqdm.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the bar, if there is one."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None


def format_record(record: Record) -> str:
  """The lines of any record, empty where it has none."""
  event = record['event']
  if event == 'epoch':
    return format_epoch(record)
  if event == 'grow':
    return format_growth(record)
  if event == 'sample':
    return format_sample(record)
  if event == 'skip':
    return f"no growth: {record['reason']}"
  if event == 'stop':
    reason = _REASONS.get(record['reason'], record['reason'])
    return f"stage {record['stage']} stops growing: {reason}"
  if event == 'back':
    depths = policies.format_depths(record['depths'])
    return f'growing did not help: back to {depths}'
  if event == 'phase':
    depths = policies.format_depths(record['depths'])
    return f"phase {record['name']} at {depths}"
  if event == 'compile':
    text = f"compiled {record['what']} in {record['seconds']:.1f} s"
    if 'bytes' in record:
      text += f", {format_count(record['bytes'])}B"
    if 'count' in record:
      text += f" ({record['count']} program{'s' * (record['count'] > 1)})"
    if 'waited' in record:
      text += f", in advance (waited {record['waited']:.1f} s)"
    return text
  return ''


def format_epoch(record: Record) -> str:
  """One line of at most 100 columns, or as many more as the shape takes."""
  phase = record.get('phase', '')
  columns = [
      f"epoch {record['epoch']:>3}",
      f'{_PHASES.get(phase, phase):<5}',
      f'{_shape(record):<7}',
      f"loss {_number(record.get('train_loss'))}/{_number(record.get('loss'))}",
      _metrics(record),
  ]
  if record.get('select_on') == 'test':
    columns[-1] += ' ON TEST'
    if record.get('protocol') == 'paper_compat':
      columns[-1] += ' (paper_compat)'
  if 'estimated_change' in record:
    changes = '/'.join(
        re.sub(r'^([+-])0\.', r'\1.', f'{float(record[key]):+.3f}')
        for key in ('estimated_change', 'actual_change')
    )
    columns.append(f'grew {changes}')
  if (waited := record.get('input_wait_seconds')) and record.get('seconds'):
    waiting = 100 * waited / record['seconds']
    if waiting > _MUCH_WAITING:
      columns.append(f'{waiting:.0f}% waiting')
  if record.get('skipped'):
    columns.append(f"{record['skipped']} skipped")
  if record.get('learning_rate') is not None:
    columns.append(f"lr {float(record['learning_rate']):.2g}")
  if record.get('params') is not None:
    columns.append(f"{format_count(record['params']).replace(' ', '')} params")
  line = '  '.join(columns)
  most = max(100, 86 + len(_shape(record)))
  while len(line) > most and len(columns) > 5:
    columns.pop()
    line = '  '.join(columns)
  return line


def _metrics(record: Record) -> str:
  """Metrics of an epoch as training/selection, and the best accuracy."""
  train = record.get('train_metrics', {})
  columns = []
  for name, value in record.get('metrics', {}).items():
    show = lambda number, name=name: FORMATS.get(name, '{:.4g}').format(
        float(number)
    )
    text = show(value)
    if name in train:
      text = f"{show(train[name]).rstrip('%')}/{text}"
    columns.append(f'{LABELS.get(name, name)} {text}')
    if name == 'accuracy':
      columns.append(f"best {show(100 * record['best'] / record['total'])}")
  return '  '.join(columns)


def format_growth(record: Record) -> str:
  """The receipt of a growth: a headline and a few short lines."""
  block = f" by {record['block']}" if record.get('block') else ''
  stage = record['stage']  # None if several grow at once.
  where = f' stage {stage}' if stage is not None else ' at once' * bool(block)
  lines = [
      f'grow{where}{block} -> {_shape(record)}'
      + (f"  ({record['note']})" if record.get('note') else '')
  ]
  if 'params_before' in record:
    costs = (
        f'{format_count(record[f"{key}_before"])} ->'
        f' {format_count(record[f"{key}_after"])} {unit}'
        for key, unit in (('params', 'parameters'), ('macs', 'multiply-adds'))
    )
    lines.append(', '.join(costs))
    lines.append(
        f"loss {_number(record['loss_before'], 4)} ->"
        f" {_number(record['loss_after'], 4)}"
    )
    changes = (
        f'{float(record[f"logits_change_{mode}"]):.2g} ({name})'
        for mode, name in (('eval', 'evaluation'), ('train', 'training'))
    )
    lines.append(f"largest change of the logits {', '.join(changes)}")
  if record.get('optimizer'):
    states = ', '.join(
        f'{count} {name}' for name, count in record['optimizer'].items()
    )
    lines.append(f'optimizer state: {states}')
  if record.get('initializer'):
    report = ', '.join(
        f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}'
        for name, value in record['initializer'].items()
        if not isinstance(value, (Mapping, Sequence)) or isinstance(value, str)
    )
    lines += [f'initializer: {report}'] if report else []
  return '\n  '.join(lines)


def format_sample(record: Record) -> str:
  """One line: what a new sample of the masks changed."""
  changes = ', '.join(
      f'{name.replace("_", " ")} {count}'
      for name, count in record['initializer'].items()
      if count
  )
  return (
      f'  sample -> {_shape(record)}, '
      f'{format_count(record["params_before"])} -> '
      f'{format_count(record["params_after"])} parameters, loss '
      f'{_number(record["loss_before"])} -> {_number(record["loss_after"])}'
      f' ({changes or "nothing changed"})'
  )


def format_count(count: float) -> str:
  """Three significant digits with a unit: 78042 -> '78.0 k'."""
  count = float(count)
  if not math.isfinite(count):
    return str(count)
  if abs(count) < 999.5:
    return f'{count:.0f}' if count.is_integer() else f'{count:.3g}'
  units = ('', 'k', 'M', 'G', 'T', 'P', 'E')
  power = 0
  while abs(count) >= 999.5 and power < len(units) - 1:
    count /= 1000.0
    power += 1
  digits = 2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0
  return f'{count:.{digits}f} {units[power]}'


def _shape(record: Record) -> str:
  """Shape of a network by the method, or its depths."""
  return record.get('shape') or policies.format_depths(record['depths'])


def _number(value: Any, digits: int = 3) -> str:
  if value is None:
    return '-'
  value = float(value)  # Also 'nan' and 'inf', as a history stores them.
  if math.isfinite(value) and abs(value) >= 1000.0:
    return f'{value:.2g}'
  return f'{value:.{digits}f}'
