r"""Studies learned splits and prunes on the network of a finished run.

    python -m experiments.morphisms --run=runs/demo --study=estimates
    python -m experiments.morphisms --run=runs/demo --study=strategies

  estimates   changes of the loss by splits and prunes of all channels, one at a
              time, estimated and measured, on training images that were not
              learned from and on the hold-out
  strategies  decreases of the loss by splits of one layer's channels, found in
              several ways

Weights are frozen. The network may come from any binary that trains one.
Settings of learning come from its run if that learned splits, and flags
override them. The answer is a table; DIR/STUDY.json has all numbers and
DIR/STUDY.svg shows them, where DIR is --out, or morphisms in the run's
directory.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import sys
import time

from absl import flags as absl_flags

from autogrow_jax import data
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import ranking as ranking_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import history as history_lib
from autogrow_jax.run import settings
from autogrow_jax.run import trained

from . import evaluate
from . import flags
from . import plots
from . import presets
from .studies.gauss_newton import answers
from .studies.gauss_newton import joint
from .studies.gauss_newton import strategies as strategies_lib
from .studies.gauss_newton import subject as subject_lib

_GIVEN = flags.FLAGS
STUDIES = ('estimates', 'strategies')


def learning(run_config: config_lib.RunConfig) -> config_lib.RunConfig:
  """Returns a configuration whose method learns splits; its own if it does."""
  method = run_config.method
  if isinstance(method, joint.JointGaussNewton):
    method = method.settings
  if not isinstance(method, method_lib.GaussNewton):
    method = method_lib.GaussNewton()
  if not isinstance(method.ranking, ranking_lib.LearnedSplits):
    ranking = ranking_lib.LearnedSplits()
    method = dataclasses.replace(method, ranking=ranking)
  return dataclasses.replace(run_config, method=method)


def main() -> None:
  flags.run(_main, __doc__, _define)


def _define(arguments: Sequence[str]) -> None:
  del arguments
  absl_flags.DEFINE_string(
      'run', None, 'Work directory of a finished run.', required=True
  )
  absl_flags.DEFINE_enum(
      'study', None, STUDIES, 'What to study.', required=True
  )
  absl_flags.DEFINE_string(
      'out', None, 'Directory of the answers; morphisms in --run by default.'
  )
  absl_flags.DEFINE_integer(
      'batch_size', None, "Images at a time; the run's own by default."
  )
  absl_flags.DEFINE_string(
      'scale',
      'best',
      'Of estimates: scale of the u of each learned split, a number or best '
      '(by the estimate of each, within trust).',
  )
  absl_flags.DEFINE_string(
      'layer', None, 'Of strategies: axis of the layer; the first by default.'
  )
  absl_flags.DEFINE_integer(
      'channels', None, 'Of strategies: how many of the layer; all by default.'
  )
  absl_flags.DEFINE_integer(
      'tries', 4, 'Of strategies: random directions, of which the best counts.'
  )
  absl_flags.DEFINE_integer(
      'morphism_epochs', 4, 'Of strategies: epochs of Adam for the oracle.'
  )
  absl_flags.DEFINE_float(
      'morphism_learning_rate',
      3e-3,
      'Of strategies: learning rate of that Adam.',
  )
  flags.define_cache()
  method = learning(presets.get('digits')).method
  for item in settings.list_all(method):
    if item.path.startswith('ranking.') or item.path == 'examples':
      absl_flags.DEFINE_string(f'method.{item.path}', None, item.help)


def _main() -> None:
  flags.use_compilation_cache()
  for name in ('batch_size', 'channels', 'tries', 'morphism_epochs'):
    value = _GIVEN[name].value
    if value is not None and value < 1:
      raise ValueError(f'--{name} is at least 1, got {value}.')
  scale = parse_scale(_GIVEN.scale)
  network, _ = evaluate.finished(_GIVEN.run)
  method = learning(network.config).method
  changes = {}
  for item in settings.list_all(method):
    name = f'method.{item.path}'
    if name in _GIVEN and _GIVEN[name].present:
      flag = _GIVEN[name]
      changes[item.path] = settings.parse(flag.value, item.hint, flag.name)
  method = settings.replace(method, changes)
  dataset = data.load(network.config.data, seed=network.config.seed)
  batch_size = _GIVEN.batch_size or network.config.batch_size
  learn = method.ranking.learn
  subject = subject_lib.prepare(
      network, dataset, examples=method.examples, batch_size=batch_size
  )
  if _GIVEN.study == 'estimates':
    answer = answers.estimates(subject, method, scale, say)
  else:
    answer = strategies(subject, learn)
  print(answer.text)
  save(answer, network)


def strategies(
    subject: subject_lib.Subject, learn: splits_lib.LearnConfig
) -> answers.Answer:
  """Compares the strategies on the channels that the flags ask for."""
  site = subject.site(_GIVEN.layer)
  units = site.units if _GIVEN.channels is None else _GIVEN.channels
  if units > site.units:
    raise ValueError(
        f'--channels={units} is more than the {site.units} of {site.axis}.'
    )
  oracle = strategies_lib.Oracle(
      _GIVEN.morphism_epochs, _GIVEN.morphism_learning_rate
  )
  return answers.strategies(
      subject, site, learn, oracle,
      units=units, tries=_GIVEN.tries, progress=say,
  )


def save(answer: answers.Answer, network: trained.TrainedNetwork) -> None:
  """Writes the numbers and the figure."""
  folder = pathlib.Path(_GIVEN.out or os.path.join(_GIVEN.run, 'morphisms'))
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{_GIVEN.study}.json'
  numbers = {
      'run': _GIVEN.run,
      'network': str(network.architecture),
      'dataset': network.config.data.dataset,
      'seed': network.config.seed,
      **answer.numbers,
  }
  path.write_text(history_lib.dumps(numbers, indent=2) + '\n')
  written = [path]
  if answer.figure is not None:
    written.append(path.with_suffix('.svg'))
    text = plots.svg(answer.figure, _GIVEN.study)
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
  """Prints a progress message."""
  print(
      f'[{time.monotonic() - _STARTED:6.1f} s] {text}', file=sys.stderr,
      flush=True,
  )


_STARTED = time.monotonic()


if __name__ == '__main__':
  main()
