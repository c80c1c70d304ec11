"""The protocol for ways to choose a growth step, and the method's own way.

A value is a frozen, hashable dataclass of settings. A configuration names it by
its kind: `KINDS`, or 'package.module:Class'.
"""

import abc
import dataclasses

import numpy as np

from autogrow_jax import costs
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
    # Each half sweep is a pass, and forms the Gram matrices of one block.
    macs = self.learn.sweeps * sum(
        site.units * (site.incoming**2 + site.outgoing**2)
        for site in snapshot.model.sites
    )
    step_macs = 3 * costs.macs(snapshot.architecture)
    passes = 2 * self.learn.sweeps + macs / step_macs / steps.STEPS_PER_PASS
    images = snapshot.images(passes, snapshot.learning)
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
    count, chosen = len(joint.candidates), list(selected.splits)
    scales = np.zeros(2 * count)
    scales[chosen] = 1
    slope = whole.slopes[chosen].sum()  # The rest may not be finite.
    curvature = whole.gram[np.ix_(chosen, chosen)].sum()
    scales[[count + number for number in prunes]] = 1
    draws = snapshot.samples if self.learn.curvature == 'mc' else 1
    return steps.Step(
        splits=steps.by_axis(joint.candidates[i] for i in chosen),
        parameters=splits,
        images=snapshot.images(2 * draws, snapshot.judging),
        pruned=dict(joint.candidates[i] for i in prunes),
        taken=taken,
        slope=float(slope),
        curvature=float(curvature),
        change=whole.change(scales),
        report={
            'scales': np.round(selected.scales[chosen], 4).tolist(),
            'price': selected.price,
            'candidates': count,
            'dropped': joint.dropped,
        },
    )

  def _estimate(self, snapshot, splits, taken):
    return estimates_lib.estimate(
        snapshot.model, snapshot.trees, splits, snapshot.judging, snapshot.rng,
        taken=taken, curvature=self.learn.curvature, samples=snapshot.samples,
    )


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
