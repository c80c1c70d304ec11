"""What a run leaves behind while it goes: history, TensorBoard, progress.

A record is a dictionary with at least `event`, `epoch`, `step` and `depths`
(blocks per stage). Each kind of event adds its own keys:

* 'epoch': shape (of the network, as the method describes it), phase ('growing',
  'finetuning' or 'training'), learning_rate; train_loss (mean), train_correct,
  train_total; loss, correct, total of the selection data, select_on ('holdout'
  or 'test') and protocol (the same, or 'paper_compat'); best (largest count so
  far); of masks miou (of the selection data, percent); of a language model
  perplexity and train_perplexity; params, macs; train_macs and eval_macs
  (multiply-adds so far); wall_seconds, compile_seconds and compile_count (so
  far); images_per_second (missing where an epoch's last step had been done
  before a restart); of a
  stream input_wait_seconds (for which the devices had no batch to work on,
  since the restart); skipped (damaged training images, if there were any);
  device_bytes (most that were in use on one device since the restart; where
  devices say); while growing estimated_change and actual_change (of the loss,
  by the last growth before the epoch, nats; where the method estimates it).
* 'grow': stage, block, shape and depths (after), note; params, macs and loss,
  each with _before and _after; logits_change_eval and logits_change_train
  (largest absolute change on one fixed batch); optimizer (leaves {'kept',
  'changed', 'new', 'dropped'}); initializer (its report); seconds.
* 'sample': the keys of 'grow'; other channels and blocks of the same network
  are there (initializer counts them).
* 'skip': reason; the policy asked for a growth, and the method had none; what
  the method reports of it, such as attempts.
* 'stop': stage, reason ('window' or 'cap').
* 'phase': name.
* 'compile': what, seconds; count where several programs were compiled; waited
  (seconds) where it was begun in advance; bytes that one of the run's own needs
  on a device, by the compiler, together with what stays there meanwhile.
* 'end'.

Of several hosts only the first one opens any of these.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Any, TextIO

import numpy as np
import tqdm

Record = Mapping[str, Any]

# Percent of the time; less is not worth mentioning.
_MUCH_WAITING = 10

# Between two looks at the numbers of a running epoch.
_NUMBERS_SECONDS = 0.1


class History:
  """An append-only file of records, one line of strict JSON each."""

  def __init__(self, path: str | os.PathLike[str]):
    """Opens a history for appending; creates it and its folder if needed.

    Args:
      path: The file. A last line that a kill left half-written is cut off.
    """
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._open()
    content = self._path.read_bytes()
    self._file.truncate(content.rfind(b'\n') + 1)

  def append(self, record: Record) -> None:
    """Writes one line, which survives a kill of the process right after."""
    self._write((dumps(record) + '\n').encode())

  def truncate_to(self, records: Iterable[Record]) -> None:
    """Replaces the whole history, atomically.

    Args:
      records: What the restored checkpoint knows: all that came later is to
        happen again.
    """
    new_path = self._path.with_name(self._path.name + '.new')
    with open(new_path, 'wb') as file:
      file.writelines((dumps(record) + '\n').encode() for record in records)
      file.flush()
      os.fsync(file.fileno())
    self._file.close()
    os.replace(new_path, self._path)
    self._open()

  def close(self) -> None:
    self._file.close()

  def _open(self) -> None:
    # Unbuffered: every line is one write, and whole in the kernel after it.
    self._file = open(self._path, 'ab', buffering=0)

  def _write(self, line: bytes) -> None:
    written = 0
    while written < len(line):  # A disk that fills up writes part of a line.
      written += self._file.write(line[written:])


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The records of a history.

  A last line that a kill left half-written is dropped.

  Raises:
    ValueError: Any other line is not a record.
  """
  lines = pathlib.Path(path).read_bytes().split(b'\n')
  records = []
  # The last piece follows the last line break: empty, or half a line.
  for number, line in enumerate(lines[:-1], start=1):
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ValueError(f'{path}, line {number}: not JSON ({error}).') from error
    if not isinstance(record, dict) or 'event' not in record:
      raise ValueError(f"{path}, line {number}: a record needs an 'event'.")
    records.append(record)
  return records


def dumps(value: Any, *, indent: int | None = None) -> str:
  """Strict JSON; non-finite floats become 'nan', 'inf' and '-inf'.

  Numbers and arrays of numpy and jax are accepted, tuples become lists.
  """
  return json.dumps(
      _plain(value), allow_nan=False, ensure_ascii=False, indent=indent
  )


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, 'tolist'):
    return _plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


class TensorBoard:
  """Scalars of each epoch, texts of each growth and of a test-set protocol."""

  def __init__(
      self,
      directory: str | os.PathLike[str],
      *,
      resume_step: int | None = None,
  ):
    """Opens a writer.

    Args:
      directory: Where the event files are.
      resume_step: The step of the restored checkpoint. What an earlier process
        wrote after it is hidden, so that no step appears twice.
    """
    import tensorboardX  # pylint: disable=g-import-not-at-top  # Slow.

    self._writer = tensorboardX.SummaryWriter(
        os.fspath(directory),
        purge_step=None if resume_step is None else resume_step + 1,
    )

  def write(self, record: Record) -> None:
    """Writes what TensorBoard shows of a record, if anything."""
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
      text = format_growth(record).replace('\n', '\n\n')
      self._writer.add_text('growth', text, step)
      self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def scalars(record: Record) -> dict[str, float]:
  """What TensorBoard shows of an epoch; accuracies in percent."""
  names = {
      'loss/train': 'train_loss',
      'loss/selection': 'loss',
      'miou/selection': 'miou',
      'perplexity/train': 'train_perplexity',
      'perplexity/selection': 'perplexity',
      'learning_rate': 'learning_rate',
      'cost/params': 'params',
      'cost/macs': 'macs',
      'cost/train_macs': 'train_macs',
      'cost/images_per_second': 'images_per_second',
  }
  values = {
      name: float(record[key])
      for name, key in names.items()
      if record.get(key) is not None
  }
  for name, correct, total in (
      ('accuracy/train', 'train_correct', 'train_total'),
      ('accuracy/selection', 'correct', 'total'),
      ('accuracy/best', 'best', 'total'),
  ):
    accuracy = percent(record, correct, total)
    if accuracy is not None:
      values[name] = accuracy
  for stage, depth in enumerate(record.get('depths', ())):
    values[f'depth/stage{stage}'] = float(depth)
  return values


def percent(record: Record, correct: str, total: str) -> float | None:
  """The share of two counts of a record, None where either is missing."""
  if record.get(correct) is None or not record.get(total):
    return None
  return 100.0 * float(record[correct]) / float(record[total])


class Progress:
  """What a person sees: a bar on a terminal, plain lines elsewhere."""

  def __init__(self, *, stream: TextIO | None = None):
    """Chooses by the stream (default: stdout) whether there is a bar."""
    self._stream = stream or sys.stdout
    self._has_bar = bool(getattr(self._stream, 'isatty', lambda: False)())
    self._bar = None
    self._numbered = -_NUMBERS_SECONDS

  def start_epoch(self, epoch: int, steps: int, shape: str) -> None:
    """Begins the bar of an epoch of so many steps."""
    if self._has_bar:
      self._close_bar()
      self._bar = tqdm.tqdm(
          total=steps,
          desc=f'epoch {epoch}  {shape}',
          unit='step',
          file=self._stream,
          leave=False,
          dynamic_ncols=True,
      )

  def update(
      self,
      steps: int,
      numbers: Callable[[], tuple[float, float]] | None = None,
  ) -> None:
    """Moves the bar on.

    Args:
      steps: Steps since the last call.
      numbers: Gives the mean loss, and the accuracy in percent; called only
        where they are shown, at most ten times a second.
    """
    if self._bar is None:
      return
    now = time.monotonic()
    if numbers is not None and now - self._numbered > _NUMBERS_SECONDS:
      self._numbered = now
      loss, accuracy = numbers()
      self._bar.set_postfix(
          {'loss': f'{loss:.3f}', 'accuracy': f'{accuracy:.1f}%'}
      )
    self._bar.update(steps)

  def record(self, record: Record) -> None:
    """Shows a record of the history, if it is one that people want to see."""
    if record['event'] == 'epoch':
      self._close_bar()
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
    self._close_bar()

  def _close_bar(self) -> None:
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
    reasons = {
        'window': 'no gain within its window',
        'cap': 'the largest depth is reached',
    }
    reason = reasons.get(record['reason'], record['reason'])
    return f"stage {record['stage']} stops growing: {reason}"
  if event == 'phase':
    return f"phase {record['name']} at {format_depths(record['depths'])}"
  if event == 'compile':
    return (
        f"compiled {record['what']} in {record['seconds']:.1f} s"
        + (f", {format_count(record['bytes'])}B" if 'bytes' in record else '')
        + (f" ({record['count']} programs)" if 'count' in record else '')
        + (
            f", in advance (waited {record['waited']:.1f} s)"
            if 'waited' in record
            else ''
        )
    )
  return ''


def format_epoch(record: Record) -> str:
  """One line of at most 100 columns, or as many more as the shape takes."""
  phases = {'growing': 'grow', 'finetuning': 'tune', 'training': 'train'}
  phase = record.get('phase', '')
  columns = [
      f"epoch {record['epoch']:>3}",
      f'{phases.get(phase, phase):<5}',
      f'{_shape(record):<7}',
      f"loss {_number(record.get('train_loss'))}/{_number(record.get('loss'))}",
      'acc {}/{}%'.format(
          _percent(percent(record, 'train_correct', 'train_total')),
          _percent(percent(record, 'correct', 'total')),
      ),
      f"best {_percent(percent(record, 'best', 'total'))}%",
  ]
  if record.get('miou') is not None:
    columns[-1] += f"  mIoU {_percent(record['miou'])}%"
  if 'perplexity' in record:
    columns[-2:] = [
        'perplexity {:.4g}/{:.4g}'.format(
            float(record['train_perplexity']), float(record['perplexity'])
        )
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
  if (waiting := _waiting(record)) > _MUCH_WAITING:
    columns.append(f'{waiting:.0f}% waiting')
  if record.get('skipped'):
    columns.append(f"{record['skipped']} skipped")
  if record.get('learning_rate') is not None:
    columns.append(f"lr {float(record['learning_rate']):.2g}")
  if record.get('params') is not None:
    columns.append(f"{format_count(record['params']).replace(' ', '')} params")
  line = '  '.join(columns)
  most = max(100, 86 + len(_shape(record)))
  while len(line) > most and len(columns) > 6:
    columns.pop()
    line = '  '.join(columns)
  return line


def format_growth(record: Record) -> str:
  """The receipt of a growth: a headline and a few short lines."""
  block = f" by {record['block']}" if record.get('block') else ''
  stage = record['stage']  # None if several grow at once.
  where = f' stage {stage}' if stage is not None else ' at once' * bool(block)
  lines = [
      f'grow{where}{block} -> {_shape(record)}'
      + (f"  ({record['note']})" if record.get('note') else '')
  ]
  cost = [
      f'{format_count(record[f"{key}_before"])} ->'
      f' {format_count(record[f"{key}_after"])} {unit}'
      for key, unit in (('params', 'parameters'), ('macs', 'multiply-adds'))
      if f'{key}_before' in record and f'{key}_after' in record
  ]
  if cost:
    lines.append(', '.join(cost))
  if 'loss_before' in record and 'loss_after' in record:
    lines.append(
        f"loss {_number(record['loss_before'], 4)} ->"
        f" {_number(record['loss_after'], 4)}"
    )
  changes = [
      f'{float(record[key]):.2g} ({mode})'
      for key, mode in (
          ('logits_change_eval', 'evaluation'),
          ('logits_change_train', 'training'),
      )
      if record.get(key) is not None
  ]
  if changes:
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


def format_depths(depths: Iterable[int]) -> str:
  """(3, 2, 2) -> '3-2-2'."""
  return '-'.join(str(depth) for depth in depths)


def _shape(record: Record) -> str:
  """What a method says of a network, or its depths."""
  return record.get('shape') or format_depths(record['depths'])


def _waiting(record: Record) -> float:
  """Part of an epoch's training for which it waited for input, percent."""
  rate, seconds = (
      record.get(key) for key in ('images_per_second', 'input_wait_seconds')
  )
  if not rate or not seconds:
    return 0.0
  return 100 * seconds * rate / record['train_total']


def _number(value: Any, digits: int = 3) -> str:
  if value is None:
    return '-'
  value = float(value)  # Also 'nan' and 'inf', as a history stores them.
  if math.isfinite(value) and abs(value) >= 1000.0:
    return f'{value:.2g}'
  return f'{value:.{digits}f}'


def _percent(value: float | None) -> str:
  return '-' if value is None else f'{value:.2f}'


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """A JSON object from a file, None if there is no file.

  Raises:
    ValueError: The file cannot be read, or holds something else.
  """
  try:
    value = json.loads(pathlib.Path(path).read_text())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as error:
    raise ValueError(f'{path} cannot be read as JSON: {error}.') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} holds no JSON object.')
  return value


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
  """Writes a JSON object, atomically."""
  path = pathlib.Path(path)
  new_path = path.with_name(path.name + '.new')
  new_path.write_text(dumps(value, indent=2) + '\n')
  os.replace(new_path, path)
