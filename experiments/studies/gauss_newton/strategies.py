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
import jax.numpy as jnp
import numpy as np

from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import learning as learning_lib
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib

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
    learn: learning_lib.LearnConfig,
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
  result = {}
  for number, strategy in enumerate(STRATEGIES):
    progress(f'{strategy}: splits of {units} channels of {site.axis}')
    if strategy == 'gauss_newton':
      split = _by_model(subject, learn)
    elif strategy == 'oracle':
      split = _by_truth(subject, oracle, units)
    else:
      key = jax.random.fold_in(subject.key, 10 + number)
      ranked = [
          rivals.RIVALS[strategy]().rank(
              *subject.network, subject.learning, jax.random.fold_in(key, try_)
          )
          for try_ in range(tries if strategy == 'random' else 1)
      ]
      if refused := ranked[0].refused:
        progress(f'{strategy} cannot split it: {refused[0][1]}')
        continue
      steps = STEPS[:1] if strategy == 'net2net' else STEPS
      split = _best(subject, ranked, steps, units)
    result[strategy] = Decreases(
        _decreases(subject, split, units, subject.learning),
        _decreases(subject, split, units, subject.judging),
    )
  return result


def _decreases(
    subject: subject_lib.Subject,
    split: Split,
    units: int,
    batches: Sequence[splits_lib.Batch],
) -> np.ndarray:
  """Measures the decrease of the loss by each split alone, (units,)."""
  (site,) = subject.model.sites
  return -trials.true_changes(
      *subject.network, {site.axis: split}, site.axis, range(units), batches
  )


def _by_model(
    subject: subject_lib.Subject, learn: learning_lib.LearnConfig
) -> Split:
  """Learns splits, each at the scale that is best on other images."""
  keys = [jax.random.fold_in(subject.key, number) for number in range(2)]
  learned = learning_lib.learn(
      subject.model, subject.trees, subject.learning, keys[0], learn
  )
  estimates = estimates_lib.estimate(
      subject.model, subject.trees, learned.splits, subject.judging, keys[1],
      curvature=learn.curvature,
  )
  scaled = estimates_lib.scaled(
      learned.splits, estimates.candidates, estimates.best_scales()
  )
  (site,) = subject.model.sites
  return scaled[site.axis]


def _by_truth(
    subject: subject_lib.Subject, oracle: Oracle, units: int
) -> Split:
  """Optimises splits on the true loss, from the start of `learning.learn`."""
  (site,) = subject.model.sites
  start_key = jax.random.fold_in(jax.random.fold_in(subject.key, 0), 0)
  return trials.oracle(
      *subject.network,
      site.axis,
      range(units),
      subject.learning,
      start_key,
      steps=oracle.epochs * len(subject.learning),
      learning_rate=oracle.learning_rate,
  ).split


def _best(
    subject: subject_lib.Subject,
    ranked: Sequence[ranking.Ranked],
    steps: Sequence[float],
    units: int,
) -> Split:
  """Picks each unit's best split and step by the true loss."""
  (site,) = subject.model.sites
  best, result = np.full(units, -np.inf), None
  for one in ranked:
    proposed = one.splits[site.axis]
    for step in steps:
      split = proposed.replace(
          u=jax.tree.map(lambda u, step=step: step * u, proposed.u)
      )
      decreases = _decreases(subject, split, units, subject.learning)
      better = np.zeros(site.units, bool)
      better[:units] = decreases > best
      best = np.maximum(best, decreases)
      result = split if result is None else _where(better, split, result)
  return result


def _where(units: np.ndarray, one: Split, other: Split) -> Split:
  """Takes some units of one split, and all others of another."""
  pick = lambda rows, others: jnp.where(units[:, None], rows, others)
  u = pick(splits_lib.incoming(one.u), splits_lib.incoming(other.u))
  e = pick(splits_lib.outgoing(one.e), splits_lib.outgoing(other.e))
  return Split(
      splits_lib.as_incoming(u, one.u), splits_lib.as_outgoing(e, one.e)
  )
