"""What benchmarks share: fair timing, one table, and a JSON file.

Rivals are timed in turn, in one process, so that a busy machine slows all of
them alike; look at ratios, not at seconds.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any

from absl import flags
import jax

REPEATS = flags.DEFINE_integer('repeats', 7, 'How often everything is timed.')
OUT = flags.DEFINE_string('out', None, 'File for the figures, as JSON.')


@dataclasses.dataclass(frozen=True)
class Spread:
  """Seconds of several repetitions: their median and extremes."""

  median: float
  low: float
  high: float

  @classmethod
  def of(cls, seconds: Sequence[float]) -> 'Spread':
    return cls(statistics.median(seconds), min(seconds), max(seconds))

  def __str__(self) -> str:
    """In milliseconds."""
    scale = lambda value: f'{1e3 * value:.1f}'
    return f'{scale(self.median)} ({scale(self.low)}-{scale(self.high)})'

  def seconds(self) -> str:
    return f'{self.median:.2f} ({self.low:.2f}-{self.high:.2f})'


def in_turn(
    runs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, Spread]:
  """Times functions in turn, after each ran once."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for run in runs.values():
    run()
  for _ in range(repeats):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  return {name: Spread.of(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
  """What the figures depend on."""
  versions = {}
  for name in ('jax', 'jaxlib', 'flax', 'torch'):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return {
      'device': jax.devices()[0].device_kind,
      'platform': jax.devices()[0].platform,
      'cores': len(os.sched_getaffinity(0)),
      'load': round(os.getloadavg()[0], 2),
      'python': platform.python_version(),
      **versions,
  }


def report(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]],
    figures: Mapping[str, Any],
) -> None:
  """Prints a table, and writes the figures where --out says.

  Args:
    title: what was measured.
    header: names of the columns.
    rows: cells.
    figures: the same for machines.
  """
  found = machine()
  print(title)
  print('  ' + ', '.join(f'{name} {value}' for name, value in found.items()))
  cells = [tuple(map(str, row)) for row in (header, *rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  for row in cells:
    print('  ' + '  '.join(
        cell.ljust(width) if not index else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ))
  if OUT.value:
    path = pathlib.Path(OUT.value)
    path.write_text(json.dumps(
        {'title': title, 'machine': found, **figures}, indent=1, default=_plain
    ) + '\n')


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return dataclasses.asdict(value)
  return str(value)
