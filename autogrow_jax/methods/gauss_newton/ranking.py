"""The protocol for ways to choose a growth step, and the method's own way.

A value is a frozen, hashable dataclass of settings. A configuration names it by
its kind: `KINDS`, or 'package.module:Class'.
"""

import abc
import dataclasses

import numpy as np

from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import selection as selection_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.networks import common

KINDS = {'learned': 'autogrow_jax.methods.gauss_newton.ranking:LearnedSplits'}
COMPENSATIONS = ('off', 'least_squares')


class Ranking(abc.ABC):
  """A way to choose a growth step."""

  @abc.abstractmethod
  def step(
      self, snapshot: steps.Snapshot, limits: selection_lib.Limits
  ) -> steps.Step:
    """Chooses a step at its whole length.

    Args:
      snapshot: the network and examples.
      limits: limits of the step.
    """


@dataclasses.dataclass(frozen=True)
class LearnedSplits(Ranking):
  """Splits learned by least squares, ranked by a joint model of the loss.

  Splits and the compensations of prunes are learned from some batches and
  estimated on others. The selection is estimated once more as a whole, with
  other labels, since the best of many noisy estimates are too good.

  Attributes:
    learn: settings of learning splits.
    compensation: 'least_squares', or 'off' for no prunes.
  """

  learn: splits_lib.LearnConfig = splits_lib.LearnConfig()
  compensation: str = dataclasses.field(
      default='least_squares',
      metadata={
          'help': 'How pruning makes up for what it removes: least_squares, '
                  'or off (nothing is pruned).'
      },
  )

  def __post_init__(self):
    common.check_choice('compensation', self.compensation, COMPENSATIONS)

  def step(
      self, snapshot: steps.Snapshot, limits: selection_lib.Limits
  ) -> steps.Step:
    learned = splits_lib.learn(
        snapshot.model, snapshot.trees, snapshot.learning, snapshot.rng,
        self.learn,
    )
    images = snapshot.images(2 * self.learn.sweeps, snapshot.learning)
    step = self.step_from(learned, snapshot, limits)
    return dataclasses.replace(step, images=step.images + images)

  def step_from(
      self,
      learned: splits_lib.Learned,
      snapshot: steps.Snapshot,
      limits: selection_lib.Limits,
  ) -> steps.Step:
    """Estimates learned splits and all prunes, and selects from them.

    Args:
      learned: learned splits of all units.
      snapshot: the network and examples.
      limits: limits of the step.

    Returns:
      The step, without the cost of learning.
    """
    model, trees = snapshot.model, snapshot.trees
    architecture = snapshot.architecture
    taken = None
    if self.compensation != 'off':
      taken = estimates_lib.compensated(model, trees, learned.moments)
    joint = self._estimate(snapshot, learned.splits, taken)
    selected = selection_lib.select(architecture, joint, limits)
    splits = splits_lib.balanced(
        model, trees, scaled(model, learned.splits, selected.scales),
        self.learn.trust,
    )
    whole = self._estimate(snapshot, splits, taken)
    at_one = dataclasses.replace(
        selected, scales=(selected.scales > 0).astype(float)
    )
    prunes = selection_lib.pick_prunes(
        architecture, whole, at_one, limits, selected.prunes
    )
    selected = dataclasses.replace(selected, prunes=prunes)
    draws = snapshot.samples if self.learn.curvature == 'mc' else 1
    return steps.Step.of(
        joint.candidates, selected, whole,
        parameters=splits,
        taken=taken,
        images=snapshot.images(2 * draws, snapshot.judging),
        report={
            'scales': [round(selected.scales[i], 4) for i in selected.splits],
            'price': selected.price,
            'candidates': len(joint.candidates),
            'dropped': joint.dropped,
        },
    )

  def _estimate(self, snapshot, splits, taken):
    return estimates_lib.estimate(
        snapshot.model, snapshot.trees, splits, snapshot.judging, snapshot.rng,
        taken=taken, curvature=self.learn.curvature, samples=snapshot.samples,
    )


@dataclasses.dataclass(frozen=True)
class Ranked:
  """Splits of all units of all sites, ranked by their gains.

  Attributes:
    splits: splits of every unit of every site.
    gains: (candidates,) gain of each unit: nats, or any score that is larger
      for better splits; NaN for units that cannot be split.
    images: cost, images of training steps.
    one_sided: true if units are new channels, see `surgery.morph`.
    refused: axes that cannot be split in this way, with reasons.
  """

  splits: splits_lib.Splits
  gains: np.ndarray
  images: int
  one_sided: bool = False
  refused: str = ''


class RankingByGain(Ranking):
  """A way to split and rank units whose gains are taken to add up.

  Splits are picked by gain per resource and applied without scaling. Nothing is
  pruned, and every step is taken.
  """

  @abc.abstractmethod
  def rank(self, snapshot: steps.Snapshot) -> Ranked:
    """Splits all units, in the order of `Model.candidates`."""

  def step(
      self, snapshot: steps.Snapshot, limits: selection_lib.Limits
  ) -> steps.Step:
    model, ranked = snapshot.model, self.rank(snapshot)
    usable = np.isfinite(ranked.gains)
    gains = np.where(usable, ranked.gains, 0)
    picked, price = selection_lib.greedy(
        snapshot.architecture, model.candidates, usable, limits, lambda: gains
    )
    scales = np.zeros(len(gains))
    scales[picked] = 1
    step = steps.Step(
        splits=steps.by_axis(model.candidates[i] for i in picked),
        parameters=ranked.splits,
        images=ranked.images,
        one_sided=ranked.one_sided,
        must_help=False,
        report={
            'price': max(limits.price, price),
            'candidates': len(gains),
            'dropped': int(np.count_nonzero(~usable)),
            **({'refused': ranked.refused} if ranked.refused else {}),
        },
    )
    if ranked.one_sided:  # New channels change nothing at first.
      return step
    joint = estimates_lib.estimate(
        model, snapshot.trees, scaled(model, ranked.splits, scales),
        snapshot.judging, snapshot.rng, samples=snapshot.samples,
    )
    change = joint.change(np.concatenate([scales, 0 * scales]))
    return dataclasses.replace(step, change=change)


def scaled(
    model: splits_lib.Model, splits: splits_lib.Splits, scales: np.ndarray
) -> splits_lib.Splits:
  """Multiplies the u of each candidate by its scale; 0 makes e 0, too."""
  result, begin = {}, 0
  for site in model.sites:
    split = splits[site.axis]
    factor = np.zeros(split.u[0].shape[-1])
    factor[: site.units] = scales[begin : begin + site.units]
    begin += site.units
    result[site.axis] = split.scaled(factor, factor > 0)
  return result
