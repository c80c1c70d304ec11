"""What a binary prints when a run has ended."""

from collections.abc import Mapping, Sequence
import fractions
from typing import Any

from autogrow_jax.run import console as logs
from autogrow_jax import policies


def of_run(
    result: Mapping[str, Any],
    workdir: str,
    comparisons: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> str:
  """The summary of a run.

  Args:
    result: what `train.run` returned.
    workdir: where everything lies.
    comparisons: (name, result) of fixed networks.

  Returns:
    Several lines of at most 80 columns.
  """
  lines = [
      '',
      f'{result["network"]} on {_data(result)}, seed {result["seed"]}',
  ]
  if result['protocol'] == 'paper_compat':
    lines += [
        "  THE PAPER'S PROTOCOL (paper_compat): decided on the test set; best "
        'test',
        f'  accuracy of any epoch: {result["best_test_accuracy"]:.2f} %. Not a '
        'clean result.',
    ]
  elif result['select_on'] == 'test':
    lines.append('  DECISIONS WERE TAKEN ON THE TEST SET: not a clean result')
  rows = [(_label(result), result), *comparisons]
  names, keys = {
      'holdout': (('hold-out', 'test'), ('val_accuracy', 'test_accuracy')),
      'test': (('test', 'test'), ('val_accuracy', 'test_accuracy')),
      'paper_compat': (
          ('best test', 'last test'), ('best_test_accuracy', 'test_accuracy')
      ),
  }[result['protocol']]
  unit = ' %'
  if 'test_perplexity' in result:
    keys, unit = ('val_perplexity', 'test_perplexity'), ''
    names = tuple(f'{name} perplexity' for name in names)
  header = ('', 'depth', 'parameters', 'multiply-adds', *names)
  table = [header] + [
      (
          name,
          item['found'],
          logs.format_count(item['params']),
          logs.format_count(item['macs']),
          *(f'{item[key]:.2f}{unit}' for key in keys),
      )
      for name, item in rows
  ]
  lines += aligned(table)
  if 'test_miou' in result:
    lines += [''] + [
        f'  Mean IoU of the {name} network: {item["val_miou"]:.2f} % '
        f'({names[0]}), {item["test_miou"]:.2f} % (test)'
        for name, item in rows
        if 'test_miou' in item
    ]
  spent = [('', 'epochs', 'training cost', 'wall', 'compiling')] + [
      (
          name,
          str(item['epochs']),
          f'{logs.format_count(item["train_macs"])} multiply-adds',
          f'{item["wall_seconds"]:.0f} s',
          f'{item["compile_seconds"]:.0f} s in {item["compile_count"]}',
      )
      for name, item in rows
  ]
  lines += ['', *aligned(spent)]
  if result.get('memory'):
    size = logs.format_count(result['memory']['peak_bytes'])
    lines += [
        '',
        f'  Peak memory: {size}B on a device, by the '
        f'{result["memory"]["source"]}.',
    ]
  if 'floor' in result:
    band = result['null_band']
    lines += [
        '',
        f'  Growths: {result["growths"]} in {result["growing_epochs"]} epochs, '
        f'to {sum(policies.parse_depths(result["found"]))} sub-modules. '
        'Without a signal',
        f'  the same policy finds {result["floor"]} (floor: constant accuracy) '
        f'or {_band(band["submodules"])} sub-modules',
        f'  in {_band(band["epochs"])} epochs (null band: pure noise, '
        '10-90 %).',
    ]
  lines += ['', f'  Everything is in {workdir}: open report.html there.']
  return '\n'.join(lines)


def _data(result: Mapping[str, Any]) -> str:
  fraction = fractions.Fraction(result['data_fraction'])
  part = '' if fraction == 1 else f'{100 * float(fraction):g} % of '
  return part + result['dataset']


def _label(result: Mapping[str, Any]) -> str:
  return 'fixed' if result['method'] == 'fixed' else 'grown'


def _band(percentiles: Mapping[str, Any]) -> str:
  return f'{percentiles["p10"]} to {percentiles["p90"]}'


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
