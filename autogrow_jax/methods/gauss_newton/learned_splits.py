"""`LearnedSplits`: the method's own way to choose a step."""

import dataclasses

import numpy as np

from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import compensation as compensation_lib
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import learning as learning_lib
from autogrow_jax.methods.gauss_newton import prunes as prunes_lib
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import selection as selection_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.networks import common


@dataclasses.dataclass(frozen=True)
class LearnedSplits(ranking.Ranking):
  """Splits learned by least squares, ranked by a joint model of the loss.

  Splits and the compensations of prunes are learned from some batches and
  estimated on others. The selection is estimated once more as a whole, with
  other labels, since the best of many noisy estimates are too good.

  Attributes:
    learn: settings of learning splits.
    compensation: compensation of prunes, see `compensation`; 'off' for no
      prunes.
  """

  learn: learning_lib.LearnConfig = learning_lib.LearnConfig()
  compensation: str = dataclasses.field(
      default='gauss_newton',
      metadata={
          'help': 'How pruning makes up for what it removes: gauss_newton, '
                  'least_squares, or off (nothing is pruned).'
      },
  )

  def __post_init__(self):
    choices = ('off', *compensation_lib.COMPENSATIONS)
    common.check_choice('compensation', self.compensation, choices)

  def step(
      self,
      snapshot: steps.Snapshot,
      limits: selection_lib.Limits,
      samples: int,
  ) -> steps.Step:
    learned = learning_lib.learn(
        snapshot.model, snapshot.trees, snapshot.learning, snapshot.key(0),
        self.learn,
    )
    passes = charges.of_learning(
        snapshot.architecture, snapshot.model, self.learn
    )
    images = round(passes * charges.count(snapshot.learning))
    return self.step_from(learned, snapshot, limits, samples).charged(images)

  def step_from(
      self,
      learned: learning_lib.Learned,
      snapshot: steps.Snapshot,
      limits: selection_lib.Limits,
      samples: int,
  ) -> steps.Step:
    """Estimates learned splits and all prunes, and selects from them.

    Args:
      learned: learned splits of all units.

    Returns:
      The step, without the cost of learning.
    """
    architecture, judging = snapshot.architecture, snapshot.judging
    model, trees = snapshot.model, snapshot.trees
    curvature = self.learn.curvature
    estimates = estimates_lib.estimate(
        model, trees, learned.splits, judging, snapshot.key(1),
        curvature=curvature, samples=samples,
    )
    estimates = _without_failed(estimates, learned)
    prunes = prunes_lib.NONE
    if self.compensation != 'off':
      prunes = prunes_lib.estimate(
          model, trees, snapshot.learning, judging, snapshot.key(2),
          compensation=self.compensation, curvature=curvature,
      )
    selected = selection_lib.select(architecture, estimates, limits, prunes)
    scales = np.zeros(len(estimates.candidates))
    scales[list(selected.splits)] = selected.scales
    splits = splits_lib.balanced(
        model,
        trees,
        estimates_lib.scaled(learned.splits, estimates.candidates, scales),
        self.learn.trust,
    )
    joint = snapshot.together(
        splits, selected.prunes, snapshot.key(3), samples
    )
    selected = selection_lib.confirm(
        architecture, estimates.candidates, selected, joint, limits
    )
    draws = samples if curvature == 'mc' else 1
    return steps.Step(
        selected,
        splits,
        surgery.absorbed(model, trees, selected.prunes),
        estimates.candidates,
        estimates.dropped + prunes.dropped,
        charges.of_passes(draws + samples + prunes.passes, judging),
    )


def _without_failed(
    estimates: estimates_lib.Estimates, learned: learning_lib.Learned
) -> estimates_lib.Estimates:
  """Marks candidates with failed solves as unusable."""
  codes = np.array(
      [learned.codes[axis][unit] for axis, unit in estimates.candidates]
  )
  return dataclasses.replace(
      estimates, usable=estimates.usable & (codes == 0)
  )
