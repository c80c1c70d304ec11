"""Summary that a binary prints at the end of a run."""

from collections.abc import Mapping, Sequence
import fractions
from typing import Any

from autogrow_jax import policies
from autogrow_jax.run import console

from . import placebo
from . import report

Result = Mapping[str, Any]


def of_run(
    result: Result, workdir: str, fixed: Mapping[str, Result] | None = None
) -> str:
  """Returns several lines of at most 80 columns.

  Args:
    result: result of the run.
    workdir: its work directory.
    fixed: results of fixed networks by name, for comparison.
  """
  rows = {'fixed' if result['method'] == 'fixed' else 'grown': result}
  rows |= {f'{name}, fixed': other for name, other in (fixed or {}).items()}
  lines = [
      '',
      f'{result["network"]} on {_data(result)}, seed {result["seed"]}',
      *_protocol(result),
      *_networks(rows),
      '',
      *_costs(rows),
  ]
  if memory := result.get('memory'):
    size = console.format_count(memory['peak_bytes'])
    lines += [
        '',
        f'  Peak memory: {size}B on a device, by the {memory["source"]}.',
    ]
  if 'floor' in result:
    lines += ['', *_controls(result)]
  lines += ['', f'  Everything is in {workdir}: open report.html there.']
  return '\n'.join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table: the first column to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
      '  '
      + '  '.join(
          cell.ljust(width) if index == 0 else cell.rjust(width)
          for index, (cell, width) in enumerate(zip(row, widths, strict=True))
      ).rstrip()
      for row in rows
  ]


def _controls(result: Result) -> list[str]:
  """The found depth beside what is found where nothing grows or is learned."""
  band = result['null_band']
  lines = [
      f'  Growths: {result["growths"]} in {result["growing_epochs"]} epochs, '
      f'to {sum(policies.parse_depths(result["found"]))} sub-modules.',
  ]
  if control := result.get('placebo'):
    size = sum(policies.parse_depths(control['found']))
    lines += [
        f'  A network that never grows would be said to need {size} (placebo: '
        f'{control["epochs"]} epochs,',
        f'  {console.format_count(control["train_macs"])} multiply-adds, '
        f'{control["test_accuracy"]:.2f} % on the test set).',
        f'  Verdict: {placebo.verdict(result)}.',
    ]
  return [
      *lines,
      f'  Without a network, the policy finds {result["floor"]} (floor: '
      'constant accuracy) or',
      f'  {_band(band["submodules"])} sub-modules in {_band(band["epochs"])} '
      'epochs (null band: pure noise, 10-90 %).',
  ]


def _data(result: Result) -> str:
  fraction = fractions.Fraction(result['data_fraction'])
  part = '' if fraction == 1 else f'{100 * float(fraction):g} % of '
  return part + result['dataset']


def _protocol(result: Result) -> list[str]:
  """Says so where decisions were taken on the test set."""
  if result['protocol'] == 'paper_compat':
    return [
        "  THE PAPER'S PROTOCOL (paper_compat): decided on the test set; best "
        'test',
        f'  accuracy of any epoch: {result["best_test_accuracy"]:.2f} %. Not a '
        'clean result.',
    ]
  if result['select_on'] == 'test':
    return ['  DECISIONS WERE TAKEN ON THE TEST SET: not a clean result']
  return []


def _networks(rows: Mapping[str, Result]) -> list[str]:
  """A table of the networks and of their task's own metric."""
  result = next(iter(rows.values()))
  metric = report.metrics(result)[-1]
  words = report.metric_words(result)
  keys = [f'val_{metric}', f'test_{metric}']
  names = ['test' if result['select_on'] == 'test' else 'hold-out', 'test']
  if f'best_test_{metric}' in result:
    keys[0], names = f'best_test_{metric}', ['best test', 'last test']
  if metric != 'accuracy':  # What a reader expects.
    word = words[keys[1]].removeprefix('test ')
    names = [f'{name} {word}' for name in names]
  return aligned([
      ('', 'depth', 'parameters', 'multiply-adds', *names),
      *(
          (
              name,
              item['found'],
              console.format_count(item['params']),
              console.format_count(item['macs']),
              *(report.shown(key, item[key]) for key in keys),
          )
          for name, item in rows.items()
      ),
  ])


def _costs(rows: Mapping[str, Result]) -> list[str]:
  return aligned([
      ('', 'epochs', 'training cost', 'wall', 'compiling'),
      *(
          (
              name,
              str(item['epochs']),
              f'{console.format_count(item["train_macs"])} multiply-adds',
              f'{item["wall_seconds"]:.0f} s',
              f'{item["compile_seconds"]:.0f} s in {item["compile_count"]}',
          )
          for name, item in rows.items()
      ),
  ])


def _band(percentiles: Mapping[str, Any]) -> str:
  return f'{percentiles["p10"]} to {percentiles["p90"]}'
