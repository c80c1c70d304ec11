"""Gains of splits of one layer, found in several ways.

All strategies see the same images.

  gauss_newton     learned splits, each at the scale that its model says is best
                   on other images, as in a run
  oracle           splits optimised by Adam on the true loss with that split
                   alone, from the start of gauss_newton
  steepest,random  the best of `STEPS` by the true loss, and for random of
                   several directions, since they have no step of their own
  net2net          copies
"""

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps as steps_lib

from . import by_gain
from . import rivals
from . import subject as subject_lib
from . import trials

Split = splits_lib.Split

STRATEGIES = ('gauss_newton', 'oracle', 'steepest', 'random', 'net2net')
# Steps of a line search, in units of the small step that a rival proposes.
STEPS = (1.0, 3.0, 10.0, 30.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Oracle:
  """Settings of the oracle.

  Attributes:
    epochs: epochs of Adam.
    learning_rate: learning rate of Adam.
  """

  epochs: int
  learning_rate: float


@dataclasses.dataclass(frozen=True)
class Decreases:
  """Decreases of the loss, nats.

  Attributes:
    learning: (units,) decreases on the images that were learned from.
    judging: (units,) decreases on the others.
  """

  learning: np.ndarray
  judging: np.ndarray


def compare(
    subject: subject_lib.Subject,
    site: sites_lib.Site,
    learn: splits_lib.LearnConfig,
    oracle: Oracle,
    *,
    units: int,
    tries: int,
    progress: subject_lib.Progress,
) -> dict[str, Decreases]:
  """Measures the gain of each unit's split by every strategy.

  Args:
    subject: the network.
    site: the layer.
    learn: settings of learning splits by gauss_newton.
    oracle: settings of the oracle.
    units: number of units, from the first.
    tries: directions of random.
    progress: callback with progress messages.

  Returns:
    The decreases of the loss, for each of `STRATEGIES` that can split the
    layer.
  """
  subject = dataclasses.replace(
      subject, model=dataclasses.replace(subject.model, sites=(site,))
  )
  model, trees = subject.model, subject.trees
  result = {}
  for number, strategy in enumerate(STRATEGIES):
    progress(f'{strategy}: splits of {units} channels of {site.axis}')
    if strategy == 'gauss_newton':
      split = _by_model(subject, site, learn)
    elif strategy == 'oracle':
      split = trials.oracle(
          subject.architecture, site, trees,
          splits_lib.start(model, trees, subject.rng(0))[site.axis],
          range(units), subject.learning,
          steps=oracle.epochs * len(subject.learning),
          learning_rate=oracle.learning_rate,
      )
    else:
      ranked = [
          rivals.RIVALS[strategy]().rank(
              _snapshot(subject, 10 + number + len(STRATEGIES) * try_)
          )
          for try_ in range(tries if strategy == 'random' else 1)
      ]
      if refused := ranked[0].refused:
        progress(f'{strategy} cannot split {refused}')
        continue
      steps = STEPS[:1] if strategy == 'net2net' else STEPS
      split = _best(subject, site, ranked, steps, units)
    result[strategy] = Decreases(*(
        _decreases(subject, site, split, units, batches)
        for batches in (subject.learning, subject.judging)
    ))
  return result


def _snapshot(
    subject: subject_lib.Subject, number: int
) -> steps_lib.Snapshot:
  """Returns the network as rivals see it."""
  return steps_lib.Snapshot(
      subject.architecture, None, subject.model, subject.trees,
      subject.learning, subject.judging, 1, subject.rng(number),
  )


def _decreases(subject, site, split, units, batches):
  """Measures the decrease of the loss by each split alone, (units,)."""
  return -trials.true_changes(
      subject.architecture, site, subject.trees, split, range(units), batches
  )


def _by_model(subject, site, learn):
  """Learns splits, each at the scale that is best on other images."""
  model, trees, rng = subject.model, subject.trees, subject.rng(0)
  learned = splits_lib.learn(model, trees, subject.learning, rng, learn)
  joint = estimates_lib.estimate(
      model, trees, learned.splits, subject.judging, rng,
      curvature=learn.curvature,
  )
  scales = joint.best_scales()
  return ranking.scaled(model, learned.splits, scales)[site.axis]


def _best(
    subject: subject_lib.Subject,
    site: sites_lib.Site,
    ranked: Sequence[by_gain.Ranked],
    steps: Sequence[float],
    units: int,
) -> Split:
  """Picks each unit's best split and step by the true loss."""
  best, result = np.full(units, -np.inf), None
  for one in ranked:
    proposed = one.splits[site.axis]
    size = proposed.u[0].shape[-1]
    for step in steps:
      split = proposed.scaled(np.full(size, step), np.ones(size))
      decreases = _decreases(subject, site, split, units, subject.learning)
      better = np.zeros(size, bool)
      better[:units] = decreases > best
      best = np.maximum(best, decreases)
      if result is None:
        result = split
      else:
        kept = result.scaled(~better, ~better)
        taken = split.scaled(better, better)
        result = jax.tree.map(np.add, kept, taken)
  return result
