"""How figures of this project look: scatter plots, bars, and what they share.

A figure is an SVG; the same numbers give the same bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import io
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from matplotlib import axes as mpl_axes
  from matplotlib import figure as mpl_figure

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN = '#0072b2', '#d55e00', '#009e73'
COLORS = (BLUE, ORANGE, GREEN, '#cc79a7', '#e69f00', '#56b4e9', '#000000')
INK, GREY = '#1f2328', '#8c959f'


@dataclasses.dataclass(frozen=True)
class Scatter:
  """One panel of a scatter plot.

  Attributes:
    title: of it.
    x_label: of what is told.
    y_label: of what is.
    series: by name, (x, y), each (points,).
    logarithmic: both axes; points that are not positive are then left out.
  """

  title: str
  x_label: str
  y_label: str
  series: Mapping[str, tuple[np.ndarray, np.ndarray]]
  logarithmic: bool = False


def scatter(panels: Sequence[Scatter]) -> 'mpl_figure.Figure':
  """Points beside the diagonal, on which x and y are equal."""
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
) -> 'mpl_figure.Figure':
  """A cluster of bars for each entry, one bar for each series.

  Args:
    series: by name, (entries,).
    x_label: of the entries, which are numbered from 0.
    y_label: of the values.

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


def new_figure(
    rows: int, columns: int, *, height: float, sharex: bool = False
) -> tuple['mpl_figure.Figure', list['mpl_axes.Axes']]:
  """A figure that pyplot never knows of, and its axes."""
  # pylint: disable-next=g-import-not-at-top
  from matplotlib import figure as mpl_figure

  figure = mpl_figure.Figure(figsize=(9.0, height), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
  return figure, list(axes.flat)


def legend(axes: 'mpl_axes.Axes') -> None:
  """A legend above the axes, if anything has a label."""
  if axes.get_legend_handles_labels()[1]:
    axes.legend(
        loc='lower left', bbox_to_anchor=(0.0, 1.0), ncols=7, frameon=False,
        borderaxespad=0.2, handlelength=1.8, columnspacing=1.3,
    )


def svg(figure: 'mpl_figure.Figure', name: str) -> str:
  """The figure as an SVG element whose names are its own."""
  buffer = io.StringIO()
  with style():
    import matplotlib  # pylint: disable=g-import-not-at-top

    matplotlib.rcParams['svg.hashsalt'] = name
    figure.savefig(buffer, format='svg', metadata={'Date': None})
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  # Group names like "axes_1" would appear in every figure.
  text = re.sub(r' id="[\w.]+_\d+"', '', text)
  return text.replace('<svg', '<svg role="img"', 1).strip()


@contextlib.contextmanager
def style() -> Iterator[None]:
  """Matplotlib's own defaults and ours, whatever the user's are."""
  import matplotlib  # pylint: disable=g-import-not-at-top

  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({
        'svg.fonttype': 'none', 'font.size': 10.5,
        'font.family': 'sans-serif', 'text.color': INK,
        'axes.labelcolor': INK, 'axes.edgecolor': GREY,
        'axes.spines.top': False, 'axes.spines.right': False,
        'axes.grid': True, 'axes.axisbelow': True, 'grid.color': '#e4e8ec',
        'grid.linewidth': 0.7, 'xtick.color': '#57606a',
        'ytick.color': '#57606a', 'legend.fontsize': 9.5,
    })
    yield
