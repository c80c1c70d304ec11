"""The answers of the studies: tables, numbers and figures."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import splits as splits_lib

from ... import plots
from ... import summary
from . import calibration
from . import estimates as estimates_lib
from . import strategies as strategies_lib
from . import subject as subject_lib

Progress = subject_lib.Progress


@dataclasses.dataclass(frozen=True)
class Answer:
  """Answer of a study.

  Attributes:
    text: text for people.
    numbers: all numbers, for JSON.
    figure: the figure; None for a study without one.
  """

  text: str
  numbers: Mapping[str, Any]
  figure: Any


def estimates(
    subject: subject_lib.Subject,
    method: method_lib.GaussNewton,
    scale: float | None,
    progress: Progress,
) -> Answer:
  """Compares estimated with measured changes of the loss by one morphism."""
  settings = method.ranking
  found = estimates_lib.points(
      subject, settings, scale=scale, samples=method.samples, progress=progress
  )
  comparisons = [
      (label, which, calibration.calibration(*pair))
      for kind, points in found.items()
      for label, shown in _subsets(kind, points).items()
      for which, pair in _pairs(points, shown).items()
  ]
  logarithmic = {
      which: _on_logarithmic_axes(*pair)
      for kind, points in found.items() if kind == 'prunes'
      for which, pair in _pairs(points, slice(None)).items()
  }
  lines = _comparison_lines(subject, comparisons) + [
      f'  prunes on logarithmic axes, {which}: Pearson {pearson:.3f} of the '
      f'{count} that cost by both.'
      for which, (pearson, count) in logarithmic.items()
  ]
  numbers = {
      'examples': subject.examples,
      'learn': dataclasses.asdict(settings.learn),
      'samples': method.samples,
      'compensation': settings.compensation,
      'scale': 'best' if scale is None else scale,
      'calibration': [
          {'of': kind, 'on': which, **dataclasses.asdict(one)}
          for kind, which, one in comparisons
      ],
      'prunes_on_logarithmic_axes': logarithmic,
      'points': {
          kind: dataclasses.asdict(points) for kind, points in found.items()
      },
  }
  panels = [_panel(kind, points) for kind, points in found.items()]
  return Answer('\n'.join(lines), numbers, plots.scatter(panels))


def strategies(
    subject: subject_lib.Subject,
    site: sites.Site,
    learn: splits_lib.LearnConfig,
    oracle: strategies_lib.Oracle,
    *,
    units: int,
    tries: int,
    progress: Progress,
) -> Answer:
  """Measures decreases of the loss by splits of one layer."""
  found = strategies_lib.compare(
      subject, site, learn, oracle, units=units, tries=tries, progress=progress
  )
  steps = oracle.epochs * len(subject.learning)
  lines = [
      f'{subject.architecture}: decrease of the loss (nats) if one of {units} '
      'channels',
      f'of {site.axis} is split, found with {subject.examples} training '
      'images.',
      '',
      *summary.aligned([
          ('', 'on these:', '', '', '', 'on others:', '', '', ''),
          ('', *('median', 'mean', 'ratio', 'each') * 2),
          *_strategy_rows(found),
      ]),
      '',
      f'  oracle: {steps} steps of Adam on the true loss of each split alone, '
      'from the start of',
      '  gauss_newton. ratio: of the medians, to the oracle; each: median of '
      'the ratios of the',
      '  channels that gain by the oracle. steepest, random: the best of '
      f'{len(strategies_lib.STEPS)} steps by the',
      f'  true loss, and of {tries} random directions. gauss_newton: at '
      'the scale that its',
      '  estimate on the others says is best.',
  ]
  numbers = {
      'examples': subject.examples,
      'layer': site.axis,
      'learn': dataclasses.asdict(learn),
      'oracle': dataclasses.asdict(oracle),
      'oracle_steps': steps,
      'tries': tries,
      'steps': strategies_lib.STEPS,
      'decreases': {
          name: dataclasses.asdict(one) for name, one in found.items()
      },
  }
  figure = plots.bars(
      {name: decreases.learning for name, decreases in found.items()},
      x_label=f'channel of {site.axis}',
      y_label='decrease of the loss (nats)',
  )
  return Answer('\n'.join(lines), numbers, figure)


def _comparison_lines(subject, comparisons):
  """Tabulates the agreement of estimates with measurements."""
  header = (
      '', 'on', 'count', 'estimated', 'measured', 'Pearson', 'Spearman', 'slope'
  )
  rows = [
      (
          kind, which, str(one.count), f'{one.estimated:+.2e}',
          f'{one.measured:+.2e}', f'{one.pearson:.3f}', f'{one.spearman:.3f}',
          f'{one.slope:.3f}',
      )
      for kind, which, one in comparisons
  ]
  return [
      f'{subject.architecture}: changes of the loss (nats) by one split or '
      'prune alone;',
      f'learned from {subject.examples} training images, estimated on as many '
      'others.',
      '',
      *summary.aligned([header, *rows]),
      '',
      '  estimated, measured: means. slope: of the line through the origin, '
      'measured',
      '  over estimated; 1 is right, below 1 the estimates promise too much. '
      'trusted:',
      '  those that a run may choose.',
  ]


def _strategy_rows(found):
  """Formats the decreases of each strategy, beside the oracle's."""
  rows = []
  for name, decreases in found.items():
    cells = [name]
    for images in ('learning', 'judging'):
      values = getattr(decreases, images)
      cells += [
          f'{np.median(values):+.2e}',
          f'{values.mean():+.2e}',
          *_ratios(values, getattr(found['oracle'], images)),
      ]
    rows.append(cells)
  return rows


def _ratios(decreases: np.ndarray, best: np.ndarray) -> tuple[str, str]:
  """Returns the ratio of medians and the median ratio; '-' without gains."""
  gains = best > 0
  middle = np.median(best)
  return (
      f'{np.median(decreases) / middle:.2f}' if middle > 0 else '-',
      f'{np.median(decreases[gains] / best[gains]):.2f}' if any(gains) else '-',
  )


def _on_logarithmic_axes(
    estimated: np.ndarray, measured: np.ndarray
) -> tuple[float, int]:
  """Correlates the logarithms of pairs of two costs; and counts the pairs."""
  both = (estimated > 0) & (measured > 0)
  found = calibration.calibration(
      np.log(estimated[both]), np.log(measured[both])
  )
  return found.pearson, found.count


def _subsets(
    kind: str, points: estimates_lib.Points
) -> dict[str, np.ndarray]:
  """Marks all candidates; and those a run may choose, if they are fewer."""
  subsets = {kind: np.ones(len(points.candidates), bool)}
  if not points.usable.all():
    subsets['  trusted'] = points.usable
  return subsets


def _pairs(
    points: estimates_lib.Points, shown: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns (estimated, measured) of some candidates, by the images."""
  sides = {'training': points.measured}
  if points.held_out is not None:
    sides['hold-out'] = points.held_out
  return {
      which: (points.estimated[shown], measured[shown])
      for which, measured in sides.items()
  }


def _panel(kind: str, points: estimates_lib.Points) -> plots.Scatter:
  """Plots decreases by splits, or sizes of changes by prunes, logarithmically.
  """
  pairs = _pairs(points, np.ones(len(points.candidates), bool))
  if kind == 'splits':
    return plots.Scatter(
        'one split alone',
        'estimated decrease of the loss (nats)',
        'measured',
        {which: (-x, -y) for which, (x, y) in pairs.items()},
    )
  series, others = {}, []
  for which, (x, y) in pairs.items():
    alike = np.sign(x) == np.sign(y)
    series[which] = np.abs(x[alike]), np.abs(y[alike])
    others.append((np.abs(x[~alike]), np.abs(y[~alike])))
  series['signs differ'] = tuple(map(np.concatenate, zip(*others)))
  return plots.Scatter(
      'one prune alone',
      'estimated size of the change (nats)',
      'measured',
      series,
      logarithmic=True,
  )
