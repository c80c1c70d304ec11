"""Figures: those of a run, and scatter plots and bars for studies.

The same numbers give the same SVG, byte for byte. Matplotlib is optional and
slow to import, so that functions import it.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import io
import re
from typing import Any

import numpy as np

from autogrow_jax.run import console
from autogrow_jax.run import history as history_lib

Axes = Figure = Any  # Matplotlib's.
Records = Sequence[history_lib.Record]

# Colours of Okabe and Ito, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN = '#0072b2', '#d55e00', '#009e73'
COLORS = (BLUE, ORANGE, GREEN, '#cc79a7', '#e69f00', '#56b4e9', '#000000')
INK, GREY = '#1f2328', '#8c959f'
_GROWTH = '#444444'  # Marks of growths; not the colour of a line.
# Phase -> its words and its shade.
_PHASES = {
    'growing': ('growing', '#e8f1fa'), 'finetuning': ('fine-tuning', '#fdf3e1')
}


def of_run(history: Records, placebo: Records = ()) -> dict[str, Figure]:
  """Returns the figures of a run by caption; none before its first epoch.

  Args:
    history: records of the run.
    placebo: those of the same run of a network that never grew.
  """
  epochs = [record for record in history if record['event'] == 'epoch']
  if not epochs:
    return {}
  growths = [record for record in history if record['event'] == 'grow']
  with style():
    return {
        **_curves(epochs, growths, placebo),
        **_sizes(epochs, growths),
        **_estimates(growths),
        **_costs(epochs),
    }


@contextlib.contextmanager
def style(**settings: Any) -> Iterator[None]:
  """Applies our style, whatever the user's is, with some settings of its own.

  Raises:
    ImportError: Matplotlib is not installed.
  """
  try:
    import matplotlib  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise ImportError(
        "Figures need matplotlib: pip install 'autogrow-jax[report]'."
    ) from error

  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({
        'svg.fonttype': 'none', 'font.size': 10.5,
        'font.family': 'sans-serif', 'text.color': INK,
        'axes.labelcolor': INK, 'axes.edgecolor': GREY,
        'axes.spines.top': False, 'axes.spines.right': False,
        'axes.grid': True, 'axes.axisbelow': True, 'grid.color': '#e4e8ec',
        'grid.linewidth': 0.7, 'xtick.color': '#57606a',
        'ytick.color': '#57606a', 'legend.fontsize': 9.5, **settings,
    })
    yield


def new_figure(
    rows: int, columns: int, *, height: float, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
  """Makes a figure that pyplot does not keep, and its axes; within `style`."""
  # pylint: disable-next=g-import-not-at-top
  from matplotlib import figure as mpl_figure

  figure = mpl_figure.Figure(figsize=(9.0, height), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
  return figure, list(axes.flat)


def legend(axes: Axes) -> None:
  """Puts a legend above the axes, if anything has a label."""
  if axes.get_legend_handles_labels()[1]:
    axes.legend(
        loc='lower left', bbox_to_anchor=(0.0, 1.0), ncols=7, frameon=False,
        borderaxespad=0.2, handlelength=1.8, columnspacing=1.3,
    )


def svg(figure: Figure, name: str) -> str:
  """Returns the figure as an SVG element; `name` makes its ids unique."""
  buffer = io.StringIO()
  with style(**{'svg.hashsalt': name}):
    figure.savefig(buffer, format='svg', metadata={'Date': None})
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  # Group names like "axes_1" would appear in every figure.
  text = re.sub(r' id="[\w.]+_\d+"', '', text)
  return text.replace('<svg', '<svg role="img"', 1).strip()


@dataclasses.dataclass(frozen=True)
class Scatter:
  """One panel of a scatter plot.

  Attributes:
    title: text above the panel.
    x_label: what was estimated.
    y_label: what was measured.
    series: name to (x, y), each (points,).
    logarithmic: both axes; points that are not positive are left out.
  """

  title: str
  x_label: str
  y_label: str
  series: Mapping[str, tuple[np.ndarray, np.ndarray]]
  logarithmic: bool = False


def scatter(panels: Sequence[Scatter]) -> Figure:
  """Draws points beside the diagonal, on which x and y are equal."""
  with style():
    figure, all_axes = new_figure(1, len(panels), height=4.6)
    for axes, panel in zip(all_axes, panels, strict=True):
      for (name, (x, y)), color in zip(panel.series.items(), COLORS):
        shown = np.isfinite(x) & np.isfinite(y)
        if panel.logarithmic:
          shown &= (x > 0) & (y > 0)
        axes.plot(
            x[shown], y[shown], linestyle='', marker='o', markersize=4,
            alpha=0.7, markeredgewidth=0, color=color, label=name,
        )
      if panel.logarithmic:
        axes.set_xscale('log')
        axes.set_yscale('log')
      low, high = zip(axes.get_xlim(), axes.get_ylim(), strict=True)
      ends = min(low), max(high)
      axes.plot(ends, ends, color=GREY, linewidth=1, zorder=0, label='equal')
      axes.set_title(panel.title, pad=24, fontsize=10.5)
      axes.set_xlabel(panel.x_label)
      axes.set_ylabel(panel.y_label)
      legend(axes)
  return figure


def bars(
    series: Mapping[str, np.ndarray], *, x_label: str, y_label: str
) -> Figure:
  """Draws a cluster of bars for each entry, one bar for each series.

  Args:
    series: name to values (entries,).
    x_label: label of the entries, which are numbered from 0.
    y_label: label of the values.

  Returns:
    The figure.
  """
  with style():
    figure, (axes,) = new_figure(1, 1, height=3.6)
    width = 0.84 / len(series)
    for number, ((name, values), color) in enumerate(
        zip(series.items(), COLORS)
    ):
      offset = (number - (len(series) - 1) / 2) * width
      axes.bar(
          np.arange(len(values)) + offset, values, width, color=color,
          label=name,
      )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    legend(axes)
  return figure


def _curves(
    epochs: Records, growths: Records, placebo: Records
) -> dict[str, Figure]:
  """Metric above loss, of the training and of the selection data."""
  metric = next(iter(epochs[0]['metrics']))
  figure, both = new_figure(2, 1, height=6.0, sharex=True)
  _background(both, epochs, growths, names=True)
  for axes, name in zip(both, (metric, 'loss'), strict=True):
    values = _lines(axes, epochs, {
        f'train_{name}': ('train', BLUE, '--'),
        name: ('selection', ORANGE, '-'),
        f'best_{name}': ('best so far', INK, ':'),
    })
    values = values[(values > 0) & np.isfinite(values)]
    is_wide = values.size and values.max() > 20 * values.min()
    if name == 'perplexity' or name == 'loss' and is_wide:
      axes.set_yscale('log')
    axes.set_ylabel('accuracy (%)' if name == 'accuracy' else name)
  ungrown = [record for record in placebo if record['event'] == 'epoch']
  if ungrown:
    _lines(both[0], ungrown, {metric: ('never grows', GREEN, '-.')})
  _epoch_axis(both[1], epochs)
  legend(both[0])
  caption = (
      f'{metric.capitalize()} and loss by epoch. Dashed: training data, solid:'
      ' the data that decisions are taken on.'
  )
  if ungrown:
    caption += ' Dash-dotted: the same run of a network that never grows.'
  return {caption: figure}


def _sizes(epochs: Records, growths: Records) -> dict[str, Figure]:
  """Draws channels of layers where they are recorded, else blocks."""
  if 'widths' in epochs[0]:
    what, where, size = 'channels', 'layer', 'width'
    sizes = [record['widths'] for record in epochs]
  else:
    what, where, size = 'blocks', 'stage', 'depth'
    sizes = [
        {f'stage {i}': depth for i, depth in enumerate(record['depths'])}
        for record in epochs
    ]
  figure, (axes,) = new_figure(1, 1, height=3.2)
  _background([axes], epochs, growths, names=False)
  names = list(dict.fromkeys(name for one in sizes for name in one))
  highest = max((n for one in sizes for n in one.values()), default=0)
  # A slight shift keeps lines of equal size apart.
  shift = 0.018 * max(highest, 4) / max(1, len(names) / 4)
  edges = [epochs[0]['epoch'] - 0.5, *(r['epoch'] + 0.5 for r in epochs)]
  for line, name in enumerate(names):
    offset = shift * (line - (len(names) - 1) / 2)
    axes.stairs(
        [one.get(name, np.nan) + offset for one in sizes], edges,
        baseline=None, linewidth=2.2, color=COLORS[line % len(COLORS)],
        linestyle='-' if line < len(COLORS) else '--',
        label=f'{name} ({sizes[-1][name]})' if name in sizes[-1] else name,
    )
  axes.set_ylim(0, highest + 0.1 * max(highest, 4))
  axes.yaxis.get_major_locator().set_params(integer=True)
  axes.set_ylabel(what)
  _epoch_axis(axes, epochs)
  legend(axes)
  caption = (
      f'{what.capitalize()} of each {where} by epoch. The number behind a'
      f' {where} is its {size} at the end.'
  )
  return {caption: figure}


def _estimates(growths: Records) -> dict[str, Figure]:
  """Estimated and measured decrease of the loss, where growths have them."""
  reports = [record.get('initializer') or {} for record in growths]
  decreases = [
      [-float(report[f'{kind}_change']) for kind in ('estimated', 'actual')]
      for report in reports
      if 'estimated_change' in report
  ]
  if not decreases:
    return {}
  series = {'on the examples that it was chosen by': np.array(decreases).T}
  return {
      'By how much each growth step lowered the loss, in nats.': scatter(
          [Scatter('growth steps', 'estimated', 'measured', series)]
      )
  }


def _costs(epochs: Records) -> dict[str, Figure]:
  figure, (left, right) = new_figure(1, 2, height=3.2)
  _lines(left, epochs, {
      'train_macs': ('training', BLUE, '-'),
      'eval_macs': ('evaluation', ORANGE, '--'),
  })
  _lines(right, epochs, {
      'wall_seconds': ('wall time', INK, '-'),
      'compile_seconds': ('compilation', ORANGE, '--'),
  })
  for axes, unit in ((left, 'multiply-adds'), (right, 'seconds')):
    axes.set_ylabel(f'{unit} so far')
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(
        lambda value, position: console.format_count(float(f'{value:.6g}'))
    )
    _epoch_axis(axes, epochs)
    legend(axes)
  return {'What it cost so far: multiply-adds and seconds.': figure}


def _lines(
    axes: Axes, epochs: Records, lines: Mapping[str, tuple[str, str, str]]
) -> np.ndarray:
  """Draws a line for each key of the records; returns all their values.

  Args:
    axes: where to draw.
    epochs: records, of which each may lack a key.
    lines: key to label, colour and style of the line.
  """
  drawn = []
  for key, (label, color, style_) in lines.items():
    y = np.array([_number(record, key) for record in epochs])
    if not np.isnan(y).all():
      axes.plot(
          [record['epoch'] for record in epochs], y, label=label, color=color,
          linestyle=style_, linewidth=1.4 if style_ == ':' else 1.9,
          marker='o' if len(y) <= 3 else None, markersize=5,
      )
    drawn.append(y)
  return np.concatenate(drawn)


def _number(record: history_lib.Record, key: str) -> float:
  """A number or metric of a record, NaN if there is none."""
  if key == 'best_accuracy':
    return 100 * record['best'] / record['total']
  prefix = 'train_' if key.startswith('train_') else ''
  metrics = record.get(f'{prefix}metrics', {})
  value = metrics.get(key.removeprefix(prefix), record.get(key))
  return np.nan if value is None else float(value)


def _background(
    all_axes: Sequence[Axes], epochs: Records, growths: Records, *, names: bool
) -> None:
  """Shades phases, and marks growths between two epochs; few also by lines.

  Args:
    all_axes: where to draw; what is in the legend goes to the first one.
    epochs: records of the epochs.
    growths: records of the growths.
    names: whether the legend names the phases.
  """
  x = [record['epoch'] + 0.5 for record in growths]
  for axes in all_axes:
    for phase, (name, color) in _PHASES.items():
      inside = [r['epoch'] for r in epochs if r.get('phase') == phase]
      if inside:
        axes.axvspan(
            inside[0] - 0.5, inside[-1] + 0.5, color=color, linewidth=0,
            zorder=0, label=name if names and axes is all_axes[0] else None,
        )
    for position in x if len(x) <= 40 else ():
      axes.axvline(position, color=_GROWTH, linewidth=0.7, alpha=0.35, zorder=1)
  if x:
    all_axes[0].plot(
        x, [0.0] * len(x), linestyle='', marker='^', markersize=6,
        color=_GROWTH, clip_on=False, zorder=5, label='growth',
        transform=all_axes[0].get_xaxis_transform(),
    )


def _epoch_axis(axes: Axes, epochs: Records) -> None:
  x = [record['epoch'] for record in epochs]
  axes.set_xlabel('epoch')
  axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
  if len(x) <= 10:
    axes.set_xticks(x)
  else:
    axes.xaxis.get_major_locator().set_params(integer=True)
