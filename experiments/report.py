"""Report of a run: one self-contained HTML page.

The page has no scripts and loads nothing; its figures are inline SVG. The same
run gives the same bytes. A new section is one more entry in `render`, a new
figure one more in `plots.of_run`.
"""

from collections.abc import Callable, Mapping, Sequence
import html
import os
import pathlib
from typing import Any

from autogrow_jax import policies
from autogrow_jax.run import console
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import results

from . import plots

Result = Mapping[str, Any]
Records = Sequence[history_lib.Record]

# Words of metrics that are not called by their name.
_METRICS = {'miou': 'mean IoU'}
_SPLITS = {
    'val': 'validation {}', 'best_val': 'best validation {} of any epoch',
    'test': 'test {}', 'best_test': 'best test {} of any epoch',
}
# Keys of a result -> the words that a reader sees, in the order of the table;
# metrics come between the two.
_RUN = {
    'method': 'Method', 'network': 'Network', 'dataset': 'Dataset',
    'seed': 'Seed', 'found': 'Depth found', 'params': 'Parameters',
    'macs': 'Multiply-adds per image or word', 'layers': 'Layers',
    'growths': 'Growths', 'growing_epochs': 'Growing epochs',
    'epochs': 'Epochs',
}
_REST = {
    'select_on': 'Decisions taken on', 'protocol': 'Protocol',
    'data_fraction': 'Fraction of the training data',
    'train_macs': 'Training multiply-adds', 'wall_seconds': 'Wall time (s)',
    'compile_seconds': 'Compilation (s)', 'compile_count': 'Compilations',
    'floor': 'Floor', 'null_band': 'Null band', 'placebo': 'Placebo',
    'comparison': 'Comparison',
    'architecture': 'Architecture', 'params_digest': 'SHA-256 of parameters',
    'devices': 'Devices', 'versions': 'Versions',
}
_COUNTS = ('params', 'macs', 'train_macs', 'eval_macs')

_TEST_WARNINGS = {
    'paper_compat': (
        'The protocol of the paper (--paper_compat).',
        'When to grow and when to stop was decided on the test set, and the'
        ' best test accuracy of any epoch is what the paper reports. Compare it'
        ' with the paper, not with a test accuracy measured once, at the end.',
    ),
    'test': (
        'Decisions were taken on the test set (--data.select_on=test).',
        'When to grow, when to stop and which epoch counts was chosen by test'
        ' accuracy: the test accuracy below is optimistic and not comparable'
        ' with one measured once, at the end.',
    ),
}

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


def write(workdir: str | os.PathLike[str]) -> None:
  """Writes `report.html` into the work directory of a run, atomically."""
  workdir = pathlib.Path(workdir)
  placebo = workdir / 'placebo' / 'history.jsonl'
  page = render(
      config=history_lib.read_json(workdir / 'config.json') or {},
      history=history_lib.read(workdir / 'history.jsonl'),
      result=results.read_result(workdir) or {},
      placebo=history_lib.read(placebo) if placebo.exists() else (),
  )
  new_path = workdir / 'report.html.new'
  new_path.write_text(page, encoding='utf-8')
  os.replace(new_path, workdir / 'report.html')


def render(
    *,
    config: Mapping[str, Any],
    history: Records,
    result: Result,
    placebo: Records = (),
) -> str:
  """Returns the page as text.

  Args:
    config: content of config.json.
    history: records of history.jsonl.
    result: content of result.json; unknown keys are shown as they are.
    placebo: records of the placebo's history.jsonl.
  """
  sections = [
      _heading(result),
      _warning(result),
      _cards(result),
      _course(history, placebo),
      '<h2>Summary</h2>' + _summary_table(result),
      '<h2>Growth receipts</h2>' + _growth_table(history),
      '<h2>Configuration</h2><details><summary>Resolved configuration</summary>'
      f'<pre>{_escape(history_lib.dumps(config, indent=2))}</pre></details>',
  ]
  return (
      '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f'<title>{_escape(_title(result))}</title>\n<style>{_STYLE}</style>\n'
      '</head>\n<body>\n'
      + '\n'.join(section for section in sections if section)
      + '\n</body>\n</html>\n'
  )


def metrics(result: Result) -> list[str]:
  """Names of the metrics of a result, the task's own last."""
  return [
      key.removeprefix('test_')
      for key in result
      if key.startswith('test_') and key != 'test_total'
  ]


def metric_words(result: Result) -> dict[str, str]:
  """Keys of the metrics that a result may have, in words."""
  return {
      f'{split}_{metric}': words.format(_METRICS.get(metric, metric))
      for metric in metrics(result)
      for split, words in _SPLITS.items()
  }


def shown(key: str, value: float) -> str:
  """Text of a metric; `key` ends with its name."""
  form = console.FORMATS.get(key.rpartition('_')[2], '{:.4g}')
  return form.format(float(value)).replace('%', ' %')


def _title(result: Result) -> str:
  name = ' '.join(str(result[k]) for k in ('method', 'network') if k in result)
  return (
      (name or 'autogrow_jax')
      + (f" on {result['dataset']}" if 'dataset' in result else '')
      + (f": {result['found']}" if 'found' in result else '')
  )


def _heading(result: Result) -> str:
  facts = ', '.join(
      words.format(result[key])
      for key, words in (
          ('seed', 'seed {}'), ('epochs', '{} epochs'),
          ('growths', '{} growths'),
      )
      if result.get(key) is not None
  )
  return (
      f'<h1>{_escape(_title(result))}</h1>\n'
      f'<p class="lead">{_escape(facts)}</p>'
  )


def _warning(result: Result) -> str:
  if result.get('select_on') != 'test':
    return ''
  is_paper = result.get('protocol') == 'paper_compat'
  name, text = _TEST_WARNINGS['paper_compat' if is_paper else 'test']
  return f'<p class="warning" role="alert"><b>{name}</b> {text}</p>'


def _cards(result: Result) -> str:
  """The most important numbers, those of the task's own metric first."""
  known = metric_words(result)
  words = {'found': 'depth found'}
  for metric in reversed(metrics(result)):
    best = f'best_test_{metric}'
    keys = f'test_{metric}', best if best in result else f'val_{metric}'
    words |= {key: known[key] for key in keys}
  words |= {
      'params': 'parameters', 'macs': 'multiply-adds',
      'wall_seconds': 'wall time',
  }
  cards = []
  for key, label in words.items():
    value = result.get(key)
    if value is None:
      continue
    if key in known:
      text = shown(key, value)
    elif key == 'wall_seconds':
      text = _duration(value)
    else:
      text = console.format_count(value) if key in _COUNTS else str(value)
    cards.append(
        f'<div class="card"><b>{_escape(text)}</b><span>{_escape(label)}</span>'
        '</div>'
    )
  return f'<div class="cards">{"".join(cards)}</div>' if cards else ''


def _course(history: Records, placebo: Records) -> str:
  try:
    drawn = plots.of_run(history, placebo)
  except ImportError as error:
    return f'<h2>Course</h2><p>{_escape(str(error))}</p>'
  if not drawn:
    return '<p>No epoch was completed.</p>'
  return '<h2>Course</h2>' + '\n'.join(
      f'<figure>{plots.svg(figure, f"figure{i}")}'
      f'<figcaption>{_escape(caption)}</figcaption></figure>'
      for i, (caption, figure) in enumerate(drawn.items())
  )


def _summary_table(result: Result) -> str:
  words = dict(_RUN)
  for key, text in metric_words(result).items():
    unit = ' (%)' if shown(key, 0).endswith('%') else ''
    words[key] = text[0].upper() + text[1:] + unit
  words |= _REST
  keys = [key for key in words if key in result]
  keys += sorted(key for key in result if key not in words)
  rows = _rows((words.get(key, key), result[key], key) for key in keys)
  return f'<table class="summary"><tbody>{rows}</tbody></table>'


def _rows(entries) -> str:
  """Rows of a table; `entries` are (words, value, key)."""
  return ''.join(
      f'<tr><th scope="row">{_escape(words)}</th>'
      f'<td>{_value(value, key)}</td></tr>'
      for words, value, key in entries
  )


def _value(value: Any, key: str = '') -> str:
  """HTML of a value; a dictionary becomes a table."""
  if isinstance(value, Mapping):
    rows = _rows((str(name), item, str(name)) for name, item in value.items())
    return f'<table><tbody>{rows}</tbody></table>'
  if isinstance(value, (list, tuple)):
    is_flat = not any(isinstance(v, (Mapping, list, tuple)) for v in value)
    return (', ' if is_flat else '<br>').join(map(_value, value))
  if value is None:
    return '–'
  if key in _COUNTS and abs(float(value)) >= 1000:
    return f'{float(value):,.0f} ({console.format_count(value)})'
  return _escape(f'{value:.6g}' if isinstance(value, float) else str(value))


def _growth_table(history: Records) -> str:
  """A row for each growth, each skipped growth and each stage that stopped."""
  if not any(record['event'] in ('grow', 'skip') for record in history):
    return '<p>The network did not grow.</p>'
  rows = []
  for record in history:
    if record['event'] == 'grow':
      cells = ''.join(f'<td>{_escape(c)}</td>' for c in _growth_cells(record))
      rows.append(f'<tr>{cells}</tr>')
    elif record['event'] in ('stop', 'skip'):
      rows.append(
          f'<tr><td class="number">{_escape(str(record["epoch"]))}</td>'
          f'<td colspan="8">{_escape(console.format_record(record))}</td></tr>'
      )
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


def _growth_cells(record: history_lib.Record) -> tuple[str, ...]:

  def change(key: str, form: Callable[[float], str]) -> str:
    pair = record.get(f'{key}_before'), record.get(f'{key}_after')
    return '–' if None in pair else ' → '.join(form(float(x)) for x in pair)

  def listed(values: Sequence[Any], form: Callable[[Any], str] = str) -> str:
    return ' / '.join('–' if v is None else form(v) for v in values)

  optimizer = record.get('optimizer') or {}
  stage = listed([record.get('stage')])  # None if several grow at once.
  return (
      str(record['epoch']),
      f"{stage} ({record['block']})" if record.get('block') else stage,
      record.get('shape') or policies.format_depths(record['depths']),
      change('params', console.format_count),
      change('macs', console.format_count),
      change('loss', '{:.4f}'.format),
      listed(
          [record.get(f'logits_change_{mode}') for mode in ('eval', 'train')],
          lambda value: f'{float(value):.2g}',
      ),
      listed([optimizer.get(key) for key in ('kept', 'new', 'dropped')]),
      str(record.get('note') or ''),
  )


def _escape(text: str) -> str:
  return html.escape(text, quote=True)


def _duration(seconds: float) -> str:
  """3725 -> '1 h 02 min'."""
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest:02d} s'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min'
