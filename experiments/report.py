"""The report of a run: one self-contained HTML page.

No scripts, no network: the figures are inline SVG. The same run gives the same
bytes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import html
import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from autogrow_jax import logs
from autogrow_jax import plots

if TYPE_CHECKING:
  from matplotlib import axes as mpl_axes
  from matplotlib import figure as mpl_figure

_MARK = '#444444'  # Growths; not the colour of a line.
_PHASES = {'growing': ('growing', '#e8f1fa'), 'finetuning': (
    'fine-tuning', '#fdf3e1'
)}

# Keys of a result with the words a reader sees, in the order of the table.
_SUMMARY = {
    'method': 'Method', 'network': 'Network', 'dataset': 'Dataset',
    'seed': 'Seed', 'found': 'Depth found', 'params': 'Parameters',
    'macs': 'Multiply-adds per image or word', 'layers': 'Layers',
    'growths': 'Growths', 'growing_epochs': 'Growing epochs',
    'epochs': 'Epochs', 'val_accuracy': 'Validation accuracy (%)',
    'best_val_accuracy': 'Best validation accuracy of any epoch (%)',
    'test_accuracy': 'Test accuracy (%)',
    'best_test_accuracy': 'Best test accuracy of any epoch (%)',
    'val_miou': 'Validation mean IoU (%)', 'test_miou': 'Test mean IoU (%)',
    'val_perplexity': 'Validation perplexity',
    'test_perplexity': 'Test perplexity',
    'select_on': 'Decisions taken on', 'protocol': 'Protocol',
    'data_fraction': 'Fraction of the training data',
    'train_macs': 'Training multiply-adds', 'wall_seconds': 'Wall time (s)',
    'compile_seconds': 'Compilation (s)', 'compile_count': 'Compilations',
    'floor': 'Floor', 'null_band': 'Null band', 'comparison': 'Comparison',
    'architecture': 'Architecture', 'params_digest': 'SHA-256 of parameters',
    'devices': 'Devices', 'versions': 'Versions',
}
_COUNTS = ('params', 'macs', 'train_macs', 'eval_macs')

_STYLE = '''
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: #1f2328; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; padding-bottom: .25rem;
  border-bottom: 1px solid #d8dee4; }
p { margin: .5rem 0; }
.lead { color: #57606a; margin-top: 0; }
.cards { display: grid; gap: .75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); }
.card { border: 1px solid #d8dee4; border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.25rem; line-height: 1.4;
  white-space: nowrap; }
.card span { color: #57606a; font-size: .85rem; }
.warning { border-left: .4rem solid #d55e00; background: #fff1e5;
  padding: .75rem 1rem; border-radius: .25rem; margin: 1rem 0; }
figure { margin: 1rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: #57606a; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0;
  border-bottom: 1px solid #eaeef2; }
tbody th { font-weight: 500; white-space: nowrap; width: 1%;
  padding-right: 1.5rem; }
thead th { color: #57606a; font-weight: 600; white-space: nowrap; }
.summary td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
td table { font-size: inherit; }
td table tr:last-child > * { border-bottom: 0; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 500; }
pre { background: #f6f8fa; padding: .75rem 1rem; border-radius: .4rem;
  overflow-x: auto; font-size: .85rem; }
@media (max-width: 40rem) {
  body { padding: 1rem .75rem 2rem; }
  .summary th { white-space: normal; width: 40%; }
  figure { overflow-x: auto; }
  figure svg { min-width: 34rem; }
}
@media print { details > *:not(summary) { display: block; } }
'''


def write(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    history: Sequence[logs.Record],
    result: Mapping[str, Any],
) -> None:
  """Writes the page, atomically.

  Args:
    path: The HTML file.
    config: The resolved configuration, as JSON.
    history: All records of the run; see logs.py.
    result: The content of result.json; unknown keys are shown as they are.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  page = render(config=config, history=history, result=result)
  new_path = path.with_name(path.name + '.new')
  new_path.write_text(page, encoding='utf-8')
  os.replace(new_path, path)


def render(
    *,
    config: Mapping[str, Any],
    history: Sequence[logs.Record],
    result: Mapping[str, Any],
) -> str:
  """The page as text."""
  sections = [
      _heading(result),
      _warning(result),
      _cards(result),
      _figures(history),
      '<h2>Summary</h2>' + _summary_table(result),
      '<h2>Growth receipts</h2>' + _growth_table(history),
      '<h2>Configuration</h2><details><summary>Resolved configuration'
      f'</summary><pre>{_escape(logs.dumps(config, indent=2))}</pre></details>',
  ]
  title = _escape(_title(result))
  return (
      '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f'<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
      + '\n'.join(section for section in sections if section)
      + '\n</body>\n</html>\n'
  )


def figures(history: Sequence[logs.Record]) -> dict[str, 'mpl_figure.Figure']:
  """The figures by caption; those without any data are left out."""
  epochs = [record for record in history if record['event'] == 'epoch']
  if not epochs:
    return {}
  growths = [record for record in history if record['event'] == 'grow']
  quality = 'Perplexity' if 'perplexity' in epochs[0] else 'Accuracy'
  with plots.style():
    return {
        f'{quality} and loss by epoch. Dashed: training data, solid: the data'
        ' that decisions are taken on.': _curves_figure(epochs, growths),
        **_growth_figures(epochs, growths),
        'What it cost so far: multiply-adds and seconds.': (
            _costs_figure(epochs)
        ),
    }


def _title(result: Mapping[str, Any]) -> str:
  parts = [str(result[key]) for key in ('method', 'network') if key in result]
  title = ' on '.join(
      [' '.join(parts) or 'autogrow_jax'] + (
          [str(result['dataset'])] if 'dataset' in result else []
      )
  )
  return title + (f": {result['found']}" if 'found' in result else '')


def _heading(result: Mapping[str, Any]) -> str:
  facts = []
  for key, words in (
      ('seed', 'seed {}'), ('epochs', '{} epochs'), ('growths', '{} growths')
  ):
    if result.get(key) is not None:
      facts.append(words.format(result[key]))
  return (
      f'<h1>{_escape(_title(result))}</h1>\n'
      f'<p class="lead">{_escape(", ".join(facts))}</p>'
  )


def _warning(result: Mapping[str, Any]) -> str:
  if result.get('select_on') != 'test':
    return ''
  if result.get('protocol') == 'paper_compat':
    return (
        '<p class="warning" role="alert"><b>The protocol of the paper'
        ' (--paper_compat).</b> When to grow and when to stop was decided on'
        ' the test set, and the best test accuracy of any epoch is what the'
        ' paper reports. Compare it with the paper, not with a test accuracy'
        ' measured once, at the end.</p>'
    )
  return (
      '<p class="warning" role="alert"><b>Decisions were taken on the test set'
      ' (--select_on=test).</b> When to grow, when to stop and which epoch'
      ' counts was chosen by test accuracy: the test accuracy below is'
      ' optimistic and not comparable with one measured once, at the end.</p>'
  )


def _cards(result: Mapping[str, Any]) -> str:
  cards = []
  selection = (
      ('best_test_accuracy', 'best test accuracy of any epoch')
      if 'best_test_accuracy' in result
      else ('val_accuracy', 'validation accuracy')
  )
  for key, label in (
      ('found', 'depth found'), ('test_perplexity', 'test perplexity'),
      ('val_perplexity', 'validation perplexity'),
      ('test_accuracy', 'test accuracy'), selection,
      ('test_miou', 'test mean IoU'), ('val_miou', 'validation mean IoU'),
      ('params', 'parameters'), ('macs', 'multiply-adds'),
      ('wall_seconds', 'wall time'),
  ):
    value = result.get(key)
    if value is None:
      continue
    if key.endswith(('accuracy', 'miou')):
      text = _fixed(value, 2) + ' %'
    elif key.endswith('perplexity'):
      text = f'{float(value):.4g}'
    elif key == 'wall_seconds':
      text = _duration(value)
    elif key in _COUNTS and _is_number(value):
      text = logs.format_count(value)
    else:
      text = str(value)
    cards.append(
        f'<div class="card"><b>{_escape(text)}</b><span>{label}</span></div>'
    )
  return f'<div class="cards">{"".join(cards)}</div>' if cards else ''


def _figures(history: Sequence[logs.Record]) -> str:
  parts = [
      f'<figure>{plots.svg(figure, f"figure{i}")}'
      f'<figcaption>{_escape(caption)}</figcaption></figure>'
      for i, (caption, figure) in enumerate(figures(history).items())
  ]
  if not parts:
    return '<p>No epoch was completed.</p>'
  return '<h2>Course</h2>' + '\n'.join(parts)


def _summary_table(result: Mapping[str, Any]) -> str:
  keys = [key for key in _SUMMARY if key in result]
  keys += sorted(key for key in result if key not in _SUMMARY)
  rows = ''.join(
      f'<tr><th scope="row">{_escape(_SUMMARY.get(key, key))}</th>'
      f'<td>{_value(result[key], key)}</td></tr>'
      for key in keys
  )
  return f'<table class="summary"><tbody>{rows}</tbody></table>'


def _value(value: Any, key: str = '') -> str:
  """HTML of a value; dictionaries become rows of their own."""
  if isinstance(value, Mapping):
    rows = ''.join(
        f'<tr><th scope="row">{_escape(str(name))}</th>'
        f'<td>{_value(item, str(name))}</td></tr>'
        for name, item in value.items()
    )
    return f'<table><tbody>{rows}</tbody></table>'
  if isinstance(value, (list, tuple)):
    if any(isinstance(item, (Mapping, list, tuple)) for item in value):
      return '<br>'.join(_value(item) for item in value)
    return ', '.join(_value(item) for item in value)
  if value is None:
    return '–'
  if key in _COUNTS and _is_number(value) and abs(value) >= 1000:
    return _escape(f'{value:,.0f} ({logs.format_count(value)})')
  if isinstance(value, float):
    return _escape(f'{value:.6g}')
  return _escape(str(value))


def _growth_table(history: Sequence[logs.Record]) -> str:
  """One row for each growth, each without one, and each stage that stopped."""
  rows = []
  for record in history:
    if record['event'] == 'grow':
      rows.append(_growth_row(record))
    elif record['event'] in ('stop', 'skip'):
      text = logs.format_record(record)
      rows.append(
          f'<tr><td class="number">{_escape(str(record["epoch"]))}</td>'
          f'<td colspan="8">{_escape(text)}</td></tr>'
      )
  if not any(record['event'] in ('grow', 'skip') for record in history):
    return '<p>The network did not grow.</p>'
  names = (
      'Epoch', 'Stage', 'Shape', 'Parameters', 'Multiply-adds', 'Loss',
      'Change of logits<br>evaluation / training',
      'Optimizer state<br>kept / new / dropped', 'Note',
  )
  head = ''.join(f'<th scope="col">{name}</th>' for name in names)
  return (
      f'<div class="scroll"><table class="growths"><thead><tr>{head}</tr>'
      f'</thead><tbody>{"".join(rows)}</tbody></table></div>'
  )


def _growth_row(record: logs.Record) -> str:
  optimizer = record.get('optimizer') or {}
  changes = [
      _significant(record.get(f'logits_change_{mode}'))
      for mode in ('eval', 'train')
  ]
  stage = record.get('stage')
  stage = '–' if stage is None else str(stage)  # None if several grow at once.
  cells = [
      str(record['epoch']),
      f"{stage} ({record['block']})" if record.get('block') else stage,
      record.get('shape') or logs.format_depths(record['depths']),
      _before_after(record, 'params'),
      _before_after(record, 'macs'),
      _before_after(record, 'loss'),
      ' / '.join(changes),
      ' / '.join(
          str(optimizer.get(key, '–')) for key in ('kept', 'new', 'dropped')
      ),
      str(record.get('note') or ''),
  ]
  text = ''.join(f'<td>{_escape(cell)}</td>' for cell in cells)
  return f'<tr>{text}</tr>'


def _before_after(record: logs.Record, key: str) -> str:
  before, after = record.get(f'{key}_before'), record.get(f'{key}_after')
  if before is None or after is None:
    return '–'
  if key == 'loss':
    return f'{_fixed(before, 4)} → {_fixed(after, 4)}'
  return f'{logs.format_count(before)} → {logs.format_count(after)}'


def _curves_figure(
    epochs: Sequence[logs.Record], growths: Sequence[logs.Record]
) -> 'mpl_figure.Figure':
  figure, (top, bottom) = plots.new_figure(2, 1, height=6.0, sharex=True)
  x = [record['epoch'] for record in epochs]
  _shade_phases(top, epochs, named=True)
  _shade_phases(bottom, epochs, named=False)
  _mark_growths((top, bottom), growths)
  if 'perplexity' in epochs[0]:
    for key, style in (
        ('train_perplexity', _line('train', plots.BLUE, '--')),
        ('perplexity', _line('selection', plots.ORANGE, '-')),
    ):
      _plot(top, x, [_float(record.get(key)) for record in epochs], style)
    top.set_yscale('log')
    top.set_ylabel('perplexity')
  else:
    _accuracies(top, x, epochs)
  losses = []
  for key, style in (
      ('train_loss', _line('train', plots.BLUE, '--')),
      ('loss', _line('selection', plots.ORANGE, '-')),
  ):
    y = [_float(record.get(key)) for record in epochs]
    losses += [value for value in y if 0.0 < value < float('inf')]
    _plot(bottom, x, y, style)
  if losses and max(losses) > 20.0 * min(losses):
    bottom.set_yscale('log')
  bottom.set_ylabel('loss')
  _epoch_axis(bottom, x)
  plots.legend(top)
  return figure


def _accuracies(
    top: 'mpl_axes.Axes', x: Sequence[int], epochs: Sequence[logs.Record]
) -> None:
  for correct, total, style in (
      ('train_correct', 'train_total', _line('train', plots.BLUE, '--')),
      ('correct', 'total', _line('selection', plots.ORANGE, '-')),
      ('best', 'total', _line('best so far', plots.INK, ':')),
  ):
    y = [_float(logs.percent(record, correct, total)) for record in epochs]
    _plot(top, x, y, style)
  top.set_ylabel('accuracy (%)')


def _growth_figures(
    epochs: Sequence[logs.Record], growths: Sequence[logs.Record]
) -> dict[str, 'mpl_figure.Figure']:
  """What grew: blocks of stages, or widths of layers and their estimates."""
  reports = [record.get('initializer') or {} for record in growths]
  reports = [report for report in reports if 'estimated_change' in report]
  if not reports:
    return {
        'Blocks of each stage by epoch. The number behind a stage is its depth'
        ' at the end.': _sizes_figure(
            epochs,
            growths,
            [record['depths'] for record in epochs],
            lambda stage: f'stage {stage}',
            'blocks',
        )
    }
  layers = list(reports[0]['widths'])
  decreases = tuple(
      np.array([-_float(report[f'{kind}_change']) for report in reports])
      for kind in ('estimated', 'actual')
  )
  return {
      'Channels of each layer by epoch. The number behind a layer is its width'
      ' at the end.': _sizes_figure(
          epochs,
          growths,
          [[int(n) for n in record['shape'].split('-')] for record in epochs],
          lambda number: layers[number],
          'channels',
      ),
      'By how much each growth step lowered the loss, in nats.': plots.scatter(
          [
              plots.Scatter(
                  'growth steps',
                  'estimated',
                  'measured',
                  {'on the examples that it was chosen by': decreases},
              )
          ]
      ),
  }


def _sizes_figure(
    epochs: Sequence[logs.Record],
    growths: Sequence[logs.Record],
    sizes: Sequence[Sequence[int]],
    name: Callable[[int], str],
    label: str,
) -> 'mpl_figure.Figure':
  """A line of steps for each of several sizes, given for each epoch."""
  figure, (axes,) = plots.new_figure(1, 1, height=3.2)
  _shade_phases(axes, epochs, named=False)
  _mark_growths((axes,), growths)
  lines = max(len(own) for own in sizes)
  highest = max(max(own, default=0) for own in sizes)
  # A slight shift keeps lines of equal size apart.
  shift = 0.018 * max(highest, 4) / max(1, lines / 4)
  edges = [epochs[0]['epoch'] - 0.5] + [
      record['epoch'] + 0.5 for record in epochs
  ]
  for line in range(lines):
    offset = shift * (line - (lines - 1) / 2)
    values = [
        own[line] + offset if line < len(own) else float('nan')
        for own in sizes
    ]
    axes.stairs(
        values, edges, baseline=None, linewidth=2.2,
        color=plots.COLORS[line % len(plots.COLORS)],
        linestyle='-' if line < len(plots.COLORS) else '--',
        label=f'{name(line)} ({sizes[-1][line]})'
        if line < len(sizes[-1]) else name(line),
    )
  axes.set_ylim(0, highest + 0.1 * max(highest, 4))
  axes.yaxis.get_major_locator().set_params(integer=True)
  axes.set_ylabel(label)
  _epoch_axis(axes, [record['epoch'] for record in epochs])
  plots.legend(axes)
  return figure


def _costs_figure(epochs: Sequence[logs.Record]) -> 'mpl_figure.Figure':
  figure, (left, right) = plots.new_figure(1, 2, height=3.2)
  x = [record['epoch'] for record in epochs]
  for axes, label, lines in (
      (left, 'multiply-adds so far', (
          ('train_macs', _line('training', plots.BLUE, '-')),
          ('eval_macs', _line('evaluation', plots.ORANGE, '--')),
      )),
      (right, 'seconds so far', (
          ('wall_seconds', _line('wall time', plots.INK, '-')),
          ('compile_seconds', _line('compilation', plots.ORANGE, '--')),
      )),
  ):
    for key, style in lines:
      _plot(axes, x, [_float(record.get(key)) for record in epochs], style)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(
        lambda value, unused_position: logs.format_count(float(f'{value:.6g}'))
    )
    _epoch_axis(axes, x)
    plots.legend(axes)
  return figure


def _line(label: str, color: str, style: str) -> dict[str, Any]:
  return {
      'label': label, 'color': color, 'linestyle': style,
      'linewidth': 1.4 if style == ':' else 1.9,
  }


def _plot(
    axes: 'mpl_axes.Axes',
    x: Sequence[float],
    y: Sequence[float],
    style: Mapping[str, Any],
) -> None:
  """A line; with few epochs also a dot for each."""
  if any(value == value for value in y):  # All NaN: nothing to show.
    axes.plot(x, y, marker='o' if len(x) <= 3 else None, markersize=5, **style)


def _shade_phases(
    axes: 'mpl_axes.Axes', epochs: Sequence[logs.Record], *, named: bool
) -> None:
  start = 0
  shaded = set()
  for i, record in enumerate(epochs):
    phase = record.get('phase')
    if i + 1 < len(epochs) and epochs[i + 1].get('phase') == phase:
      continue
    if phase in _PHASES:
      name, color = _PHASES[phase]
      axes.axvspan(
          epochs[start]['epoch'] - 0.5, record['epoch'] + 0.5, color=color,
          linewidth=0, zorder=0,
          label=name if named and phase not in shaded else None,
      )
      shaded.add(phase)
    start = i + 1


def _mark_growths(
    all_axes: Iterable['mpl_axes.Axes'], growths: Sequence[logs.Record]
) -> None:
  """A triangle between the epochs before and after a growth; few: lines."""
  x = [record['epoch'] + 0.5 for record in growths]
  for i, axes in enumerate(all_axes):
    if x and i == 0:
      axes.plot(
          x, [0.0] * len(x), linestyle='', marker='^', markersize=6,
          color=_MARK, clip_on=False, zorder=5, label='growth',
          transform=axes.get_xaxis_transform(),
      )
    for position in x if len(x) <= 40 else ():
      axes.axvline(position, color=_MARK, linewidth=0.7, alpha=0.35, zorder=1)


def _epoch_axis(axes: 'mpl_axes.Axes', x: Sequence[int]) -> None:
  axes.set_xlabel('epoch')
  axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
  if len(x) <= 10:
    axes.set_xticks(x)
  else:
    axes.xaxis.get_major_locator().set_params(integer=True)


def _escape(text: str) -> str:
  return html.escape(text, quote=True)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _float(value: Any) -> float:
  return float('nan') if value is None else float(value)


def _fixed(value: Any, digits: int) -> str:
  try:
    return f'{float(value):.{digits}f}'
  except (TypeError, ValueError):
    return str(value)


def _significant(value: Any) -> str:
  return '–' if value is None else f'{float(value):.2g}'


def _duration(seconds: Any) -> str:
  """3725 -> '1 h 02 min'."""
  if not _is_number(seconds):
    return str(seconds)
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest:02d} s'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min'
