r"""Studies learned splits and prunes on the network of a finished run.

    python -m experiments.morphisms --run=runs/demo --study=estimates
    python -m experiments.morphisms --run=runs/demo --study=strategies
    python -m experiments.morphisms --run=runs/demo --study=cost

  estimates   splits and prunes all channels, one at a time: how much the loss
              changes, estimated and measured, on training images that were not
              learned from and on the hold-out
  strategies  splits the channels of one layer in several ways: how much each
              lowers the loss
  cost        seconds and memory of learning splits beside a plain step

Weights are frozen. The network may come from any binary that trains one; how
splits are learned is taken from its run if that learned any, and flags override
it; the oracle among the strategies takes --morphism_epochs of adam. The answer
is a table; DIR/STUDY.json has all numbers and DIR/STUDY.svg shows them, where
DIR is --out, or morphisms in the run's directory.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

from absl import flags as absl_flags
import numpy as np

from autogrow_jax.run import config as config_lib
from autogrow_jax import data
from autogrow_jax import learning_costs
from autogrow_jax.run import console as logs
from autogrow_jax import studies
from autogrow_jax.run import train
from autogrow_jax.run import trained
from autogrow_jax.methods.gauss_newton import calibration
from autogrow_jax.methods.gauss_newton import method as method_lib
from experiments import flags
from experiments import plots
from experiments import presets
from experiments import summary

STUDIES = ('estimates', 'strategies', 'cost')
# Flag -> the studies that it means something to.
STUDY_FLAGS = {
    'scale': ('estimates',),
    'layer': ('strategies',),
    'channels': ('strategies',),
    'tries': ('strategies',),
    'repeats': ('cost',),
    'compensation': ('estimates',),
    **dict.fromkeys(
        ('examples', 'solver', *flags.SOLVER_FLAGS), ('estimates', 'strategies')
    ),
}


def learning(run_config: config_lib.RunConfig) -> config_lib.RunConfig:
  """A configuration whose method learns splits; its own if it does."""
  if isinstance(run_config.method, method_lib.GaussNewton):
    return run_config
  return dataclasses.replace(run_config, method=method_lib.GaussNewton())


RUN = absl_flags.DEFINE_string(
    'run', None, 'Work directory of a finished run.', required=True
)
STUDY = absl_flags.DEFINE_enum(
    'study', None, STUDIES, 'What to study.', required=True
)
OUT = absl_flags.DEFINE_string(
    'out', None, 'Directory of the answers; morphisms in --run by default.'
)
BATCH_SIZE = absl_flags.DEFINE_integer(
    'batch_size', None, "Images at a time; the run's own by default."
)
SCALE = absl_flags.DEFINE_string(
    'scale',
    'best',
    'Of estimates: what to multiply the u of each learned split with, a number '
    'or best (for each what its estimate says, within trust).',
)
LAYER = absl_flags.DEFINE_string(
    'layer', None, 'Of strategies: axis of the layer; the first by default.'
)
CHANNELS = absl_flags.DEFINE_integer(
    'channels', None, 'Of strategies: how many of the layer; all by default.'
)
TRIES = absl_flags.DEFINE_integer(
    'tries', 4, 'Of strategies: random directions, of which the best counts.'
)
REPEATS = absl_flags.DEFINE_integer(
    'repeats', 9, 'Of cost: how often each step is timed.'
)
flags.define_cache()
flags.define_fields(flags.LEARNING_FLAGS, learning(presets.get('digits')))


def main() -> None:
  flags.use_compilation_cache()
  for flag in (BATCH_SIZE, CHANNELS, TRIES, REPEATS):
    if flag.value is not None and flag.value < 1:
      raise ValueError(f'--{flag.name} is at least 1, got {flag.value}.')
  flags.refuse_unused(STUDY_FLAGS, 'study', STUDY.value)
  scale = parse_scale(SCALE.value)
  if train.read_result(RUN.value) is None:
    network = trained.load(RUN.value)
    raise ValueError(
        f'The run in {RUN.value} has not ended (epoch {network.epoch}); start '
        'its command again to continue it.'
    )
  network = trained.load(RUN.value)
  method = flags.overridden(
      learning(network.config), flags.LEARNING_FLAGS
  ).method
  if STUDY.value == 'estimates':  # Among the strategies an oracle has adam.
    flags.refuse_unused(flags.SOLVER_FLAGS, 'solver', method.learn.solver)
  dataset = data.load(network.config.data, seed=network.config.seed)
  batch_size = BATCH_SIZE.value or network.config.batch_size
  if STUDY.value == 'cost':
    answer = cost(network, dataset, method, batch_size)
  else:
    about = studies.subject(
        network, dataset, examples=method.examples, batch_size=batch_size
    )
    if STUDY.value == 'estimates':
      answer = estimates(about, method, scale)
    else:
      answer = strategies(about, method)
  print(answer.text)
  save(answer, network)


@dataclasses.dataclass(frozen=True)
class Answer:
  """Of a study.

  Attributes:
    text: for people.
    numbers: all of it, for JSON.
    figure: None for a study without one.
  """

  text: str
  numbers: Mapping[str, Any]
  figure: Any


def estimates(
    about: studies.Subject,
    method: method_lib.GaussNewton,
    scale: float | None,
) -> Answer:
  """Estimated and measured changes of the loss by single morphisms."""
  found = {
      'splits': studies.splits(
          about, method.learn, scale=scale, samples=method.samples, say=say
      )
  }
  if method.compensation != 'off':
    found['prunes'] = studies.prunes(
        about,
        compensation=method.compensation,
        curvature=method.learn.curvature,
        say=say,
    )
  comparisons = [
      (label, which, calibration.calibration(*pair))
      for kind, points in found.items()
      for label, shown in _subsets(kind, points).items()
      for which, pair in _pairs(points, shown).items()
  ]
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
  lines = [
      f'{about.architecture}: changes of the loss (nats) by one split or prune '
      'alone;',
      f'learned from {about.examples} training images, estimated on as many '
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
  logarithmic = {
      which: _on_logarithmic_axes(*pair)
      for kind, points in found.items() if kind == 'prunes'
      for which, pair in _pairs(points, slice(None)).items()
  }
  lines += [
      f'  prunes on logarithmic axes, {which}: Pearson {pearson:.3f} of the '
      f'{count} that cost by both.'
      for which, (pearson, count) in logarithmic.items()
  ]
  numbers = {
      'examples': about.examples,
      'learn': dataclasses.asdict(method.learn),
      'samples': method.samples,
      'compensation': method.compensation,
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
    about: studies.Subject, method: method_lib.GaussNewton
) -> Answer:
  """Decreases of the loss by splits of one layer, found in several ways."""
  site = about.site(LAYER.value)
  units = site.units if CHANNELS.value is None else CHANNELS.value
  if units > site.units:
    raise ValueError(
        f'--channels={units} is more than the {site.units} of {site.axis}.'
    )
  found = studies.strategies(
      about, method.learn, site, units=units, tries=TRIES.value, say=say
  )
  rows = []
  for name, decreases in found.items():
    cells = [name]
    for images in ('learning', 'judging'):
      own = getattr(decreases, images)
      cells += [
          f'{np.median(own):+.2e}',
          f'{own.mean():+.2e}',
          *_ratios(own, getattr(found['oracle'], images)),
      ]
    rows.append(cells)
  steps = method.learn.epochs * len(about.learning)
  lines = [
      f'{about.architecture}: by how much the loss (nats) falls if one of '
      f'{units} channels',
      f'of {site.axis} is split, found with {about.examples} training images.',
      '',
      *summary.aligned([
          ('', 'on these:', '', '', '', 'on others:', '', '', ''),
          ('', *('median', 'mean', 'ratio', 'each') * 2),
          *rows,
      ]),
      '',
      f'  oracle: {steps} steps of Adam on the true loss of each split alone, '
      'from the start of',
      '  gauss_newton. ratio: of the medians, to the oracle; each: median of '
      'the ratios of the',
      '  channels that gain by the oracle. steepest, random: the best of '
      f'{len(studies.STEPS)} steps by the',
      f'  true loss, and of {TRIES.value} random directions. gauss_newton: at '
      'the scale that its',
      '  estimate on the others says is best.',
  ]
  numbers = {
      'examples': about.examples,
      'layer': site.axis,
      'learn': dataclasses.asdict(method.learn),
      'oracle_steps': steps,
      'tries': TRIES.value,
      'steps': studies.STEPS,
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


def cost(
    network: trained.TrainedNetwork,
    dataset: data.Dataset,
    method: method_lib.GaussNewton,
    batch_size: int,
) -> Answer:
  """Seconds and memory of learning."""
  steps = learning_costs.measure(
      network,
      dataset,
      curvature=method.learn.curvature,
      batch_size=batch_size,
      repeats=REPEATS.value,
      say=say,
  )
  say('compiling it for a full VGG-19')
  full, curvature = learning_costs.full_vgg(), method.learn.curvature
  predicted = {
      name: learning_costs.predict(architecture, batch_size, curvature)
      for name, architecture in (
          ('this network', network.architecture), ('full VGG-19', full)
      )
  }
  compiled = {
      'this network': steps.learning.bytes,
      'full VGG-19': learning_costs.compiled_bytes(full, batch_size, curvature),
  }
  size = lambda count: f'{logs.format_count(count)}B' if count else '-'
  seconds = [('', 'median', 'fastest', 'over plain', 'memory')] + [
      (
          name, f'{step.seconds:.2e} s', f'{step.fastest:.2e} s',
          f'{step.seconds / steps.plain.seconds:.2f}', size(step.bytes),
      )
      for name, step in (
          ('plain step', steps.plain),
          ('learning splits', steps.learning),
          ('both: joint learning', steps.joint),
      )
  ]
  memory = [
      ('memory', *predicted),
      *(
          (name, *(size(getattr(one, field)) for one in predicted.values()))
          for name, field in (
              ('learning splits, adam, predicted', 'adam'),
              ('learning splits, als: matrices', 'als'),
              ('estimates: Gram matrix', 'estimates'),
          )
      ),
      ('learning splits, adam, compiled', *map(size, compiled.values())),
      ('channels', *(str(one.channels) for one in predicted.values())),
  ]
  lines = [
      f'{network.architecture}: one step on {batch_size} images, '
      f'{steps.repeats} times each',
      '',
      *summary.aligned(seconds),
      '',
      *summary.aligned(memory),
      '',
      '  Learning is a step of adam on all splits, '
      f'curvature {method.learn.curvature}; the memory of steps',
      '  is that of arguments and temporaries, by the compiler.',
  ]
  numbers = {
      'batch_size': batch_size,
      'curvature': method.learn.curvature,
      'ratio': steps.ratio,
      'steps': dataclasses.asdict(steps),
      'predicted': {
          name: dataclasses.asdict(one) for name, one in predicted.items()
      },
      'compiled': compiled,
  }
  return Answer('\n'.join(lines), numbers, None)


def save(answer: Answer, network: trained.TrainedNetwork) -> None:
  """Writes the numbers and the figure."""
  folder = pathlib.Path(OUT.value or os.path.join(RUN.value, 'morphisms'))
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{STUDY.value}.json'
  numbers = {
      'run': RUN.value,
      'network': str(network.architecture),
      'dataset': network.config.data.dataset,
      'seed': network.config.seed,
      **answer.numbers,
  }
  path.write_text(logs.dumps(numbers, indent=2) + '\n')
  written = [path]
  if answer.figure is not None:
    written.append(path.with_suffix('.svg'))
    text = plots.svg(answer.figure, STUDY.value)
    written[-1].write_text(text + '\n', encoding='utf-8')
  print('\n  ' + ' and '.join(map(str, written)))


def parse_scale(text: str) -> float | None:
  """Reads --scale; None for 'best'."""
  if text == 'best':
    return None
  try:
    scale = float(text)
  except ValueError:
    scale = 0.0
  if not 0 < scale < float('inf'):
    raise ValueError(f'--scale is best or a positive number, got {text!r}.')
  return scale


def say(text: str) -> None:
  """Tells of progress."""
  print(
      f'[{time.monotonic() - _STARTED:6.1f} s] {text}', file=sys.stderr,
      flush=True,
  )


_STARTED = time.monotonic()


def _ratios(decreases: np.ndarray, best: np.ndarray) -> tuple[str, str]:
  """Of the medians, and the median of those of channels; '-' without gains."""
  gains = best > 0
  middle = np.median(best)
  return (
      f'{np.median(decreases) / middle:.2f}' if middle > 0 else '-',
      f'{np.median(decreases[gains] / best[gains]):.2f}' if any(gains) else '-',
  )


def _on_logarithmic_axes(
    estimated: np.ndarray, measured: np.ndarray
) -> tuple[float, int]:
  """Pearson's correlation of the pairs of two costs, and their number."""
  both = (estimated > 0) & (measured > 0)
  found = calibration.calibration(
      np.log(estimated[both]), np.log(measured[both])
  )
  return found.pearson, found.count


def _subsets(
    kind: str, points: studies.Points
) -> dict[str, np.ndarray]:
  """All candidates; and those that a run may choose, if they are fewer."""
  subsets = {kind: np.ones(len(points.candidates), bool)}
  if not points.usable.all():
    subsets['  trusted'] = points.usable
  return subsets


def _pairs(
    points: studies.Points, shown: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """(estimated, measured) of some candidates, by the images."""
  sides = {'training': points.measured}
  if points.held_out is not None:
    sides['hold-out'] = points.held_out
  return {
      which: (points.estimated[shown], measured[shown])
      for which, measured in sides.items()
  }


def _panel(kind: str, points: studies.Points) -> plots.Scatter:
  """Decreases by splits; of changes by prunes the size, on logarithmic axes."""
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


if __name__ == '__main__':
  flags.run_main(main)
