"""The history of a run: one JSON record per event, in an append-only file.

A record has at least `event`, `epoch`, `step` and `depths` (blocks per stage).
Each kind of event adds its own keys:

* 'epoch': shape (the network in a few characters, by the method), phase
  ('growing', 'finetuning' or 'training'), phase_epoch, learning_rate;
  train_loss (mean), train_correct, train_total, train_metrics; loss, correct,
  total and metrics of the selection data, select_on ('holdout' or 'test') and
  protocol (the same, or 'paper_compat'); best (largest count so far); params,
  macs; train_macs and eval_macs (multiply-adds so far); wall_seconds,
  compile_seconds and compile_count (so far); images_per_second (missing where
  an epoch's last step had been done before a restart); input_wait_seconds
  (seconds for which the devices had no batch of a stream to work on);
  skipped (damaged training images, if there were any); device_bytes (largest
  number in use on one device since the restart, where devices say); while
  growing estimated_change and actual_change (change of the loss by the last
  growth, nats, where the method estimates it).
* 'grow': stage, block, shape and depths (after), note; params, macs and loss,
  each with _before and _after; logits_change_eval and logits_change_train
  (largest absolute change on one fixed batch); optimizer (number of leaves
  'kept', 'changed', 'new', 'dropped'); initializer (figures of the method);
  seconds.
* 'sample': the keys of 'grow'; other channels and blocks of the same network
  are active (initializer counts them).
* 'skip': reason why a decision to grow was not carried out; figures of the
  method, such as attempts.
* 'stop': stage, reason ('window' or 'cap').
* 'phase': name.
* 'compile': what, seconds; count where several programs were compiled; waited
  (seconds) where it started in advance; bytes that the program needs on a
  device, by the compiler.
* 'end'.
"""

from collections.abc import Mapping
import hashlib
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

Record = Mapping[str, Any]


class History:
  """The history file of a run, open for appending."""

  def __init__(self, path: str | os.PathLike[str]):
    """Opens a history; creates it and its folder if needed.

    Args:
      path: the file. A last line that a kill left half-written is cut off.
    """
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered: every line is one write, and whole in the kernel after it.
    self._file = open(self._path, 'ab', buffering=0)
    content = self._path.read_bytes()
    self._file.truncate(content.rfind(b'\n') + 1)
    self.records = read(self._path)
    self._lines = content.splitlines(keepends=True)[: len(self.records)]

  def append(self, record: Record) -> None:
    """Writes one line, which survives a kill of the process right after."""
    line = (dumps(record) + '\n').encode()
    self._write(line)
    self._lines.append(line)
    self.records.append(json.loads(line))

  def digest(self, length: int) -> str:
    """SHA-256 of the first records."""
    return hashlib.sha256(b''.join(self._lines[:length])).hexdigest()

  def truncate(self, length: int, digest: str) -> None:
    """Goes back to the records that a checkpoint knows, and their SHA-256.

    Raises:
      ValueError: the file does not begin with these records.
    """
    if length > len(self.records) or self.digest(length) != digest:
      raise ValueError(
          f'{self._path} does not begin with the {length} records that the '
          'checkpoint was saved with: it was changed or replaced. Put the '
          'right file back, or start again in another --workdir.'
      )
    del self.records[length:], self._lines[length:]
    self._file.truncate(sum(map(len, self._lines)))

  def close(self) -> None:
    self._file.close()

  def _write(self, line: bytes) -> None:
    while line:  # A disk that fills up writes part of a line.
      line = line[self._file.write(line) :]


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
