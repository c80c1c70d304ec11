"""`GaussNewton`: grows widths by the splits that are estimated to pay most."""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from autogrow_jax import growth
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import prunes as prunes_lib
from autogrow_jax.methods.gauss_newton import selection as selection_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.networks import taps

Architecture = base.Architecture
Batch = splits_lib.Batch

# Examples for learning, and as many for estimates, if there are so many.
EXAMPLES = 4096
# A pass over an example costs three training steps on it: forward, two
# backward passes, and the products with u and e and their gradients.
STEPS_PER_PASS = 3


@dataclasses.dataclass(frozen=True)
class GaussNewton(base.FixedArchitecture):
  """Splits and prunes channels where a quadratic model of the loss says so.

  All is learned on frozen weights, in evaluation mode, at the end of an epoch.
  Splits are learned from some batches and estimated on others. What has been
  selected is estimated once more as a whole, with other labels, since the best
  of many noisy estimates are too good; a step that then no longer lowers the
  loss is not taken, as happens when there is hardly any loss left.

  Attributes:
    learn: how splits are learned.
    limits: of a growth step.
    compensation: of prunes, see `prunes`; 'off' to prune nothing.
    samples: of each example's label for the estimates.
    examples: for learning, and as many for estimates; None for up to 4096, and
      at most half an epoch.
    optimizer_state: after a growth, see `surgery.morph`.
    norms: of children: 'copied' from the parent, or their 'own'.
  """

  learn: splits_lib.LearnConfig = splits_lib.LearnConfig()
  limits: selection_lib.Limits = selection_lib.Limits()
  compensation: str = 'gauss_newton'
  samples: int = 4
  examples: int | None = None
  optimizer_state: str = 'reset'
  norms: str = 'copied'

  def __post_init__(self):
    choices = {
        'compensation': ('off', *prunes_lib.COMPENSATIONS),
        'optimizer_state': surgery.OPTIMIZER_STATES,
        'norms': ('copied', 'own'),
    }
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise ValueError(
            f'{name} is one of {", ".join(allowed)}, got '
            f'{getattr(self, name)!r}.'
        )
    for name in ('samples', 'examples'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name} is at least 1, got {value}.')

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth.Growth | None:
    """Learns all splits, estimates them and all prunes, and selects."""
    if decision.action != 'grow':
      return None
    architecture = situation.architecture
    if not self.limits.allowance(architecture):
      return None
    model = model_of(architecture, self.learn.solver)
    trees = jax.device_put(_trees_of(situation.state))
    learning, judging = self._batches(situation)
    step = self._step(model, trees, situation, learning, judging)
    selected = step.selected
    if not selected.splits and not selected.prunes:
      return None
    if selected.splits and not selected.change < 0:
      return None
    units = _by_axis(step.candidates, selected.splits)
    statistics = None
    if self.norms == 'own':
      statistics = surgery.child_statistics(
          model, trees, step.splits, learning
      )
    change = surgery.morph(
        architecture,
        step.splits,
        {axis: np.array(chosen) for axis, chosen in units.items()},
        removed=step.removed,
        optimizer_state=self.optimizer_state,
        statistics=statistics,
    )
    passes = self.learn.passes * len(learning)
    passes += 2 * self.samples * len(judging)
    report = {
        'estimated_change': selected.change,
        'widths': {
            site.axis: change.architecture.size(site.axis)
            for site in model.sites
        },
        'splits': units,
        'scales': [round(float(scale), 4) for scale in selected.scales],
        'prunes': _by_axis(step.candidates, selected.prunes),
        'price': selected.price,
        'candidates': len(step.candidates),
        'dropped': step.dropped,
        'images': STEPS_PER_PASS * passes * len(learning[0][1]),
    }
    before = estimates_lib.mean_loss(model.chain, trees, judging)
    return dataclasses.replace(
        change, patch=_measured(change, judging, before, report)
    )

  def _step(
      self,
      model: signals_lib.Model,
      trees: signals_lib.Trees,
      situation: base.Situation,
      learning: Sequence[Batch],
      judging: Sequence[Batch],
  ) -> '_Step':
    """Learns from some batches, and judges and selects by others."""
    stream = randomness.stream(
        jax.random.wrap_key_data(situation.state.key), 'gauss_newton'
    )
    stream = jax.random.fold_in(stream, situation.state.step)
    keys = [jax.random.fold_in(stream, number) for number in range(4)]
    learned = splits_lib.learn(model, trees, learning, keys[0], self.learn)
    estimates = estimates_lib.estimate(
        model, trees, learned.splits, judging, keys[1],
        curvature=self.learn.curvature, samples=self.samples,
    )
    estimates = _without_failed(estimates, learned)
    prunes = prunes_lib.NONE
    if self.compensation != 'off':
      prunes = prunes_lib.estimate(
          model, trees, judging, keys[2],
          compensation=self.compensation, curvature=self.learn.curvature,
      )
    architecture = situation.architecture
    selected = selection_lib.select(
        architecture, estimates, self.limits, prunes
    )
    scales = np.zeros(len(estimates.candidates))
    scales[list(selected.splits)] = selected.scales
    splits = estimates_lib.scaled(learned.splits, estimates.candidates, scales)
    removed = surgery.removals(model, trees, prunes, selected.prunes)
    joint = prunes_lib.together(
        model,
        trees,
        splits,
        [(axis, one.unit, one.weights) for axis, one in removed.items()],
        judging,
        keys[3],
        samples=self.samples,
    )
    selected = selection_lib.confirm(
        architecture, selected, prunes, joint, self.limits
    )
    return _Step(
        selected,
        splits,
        surgery.removals(model, trees, prunes, selected.prunes),
        estimates.candidates,
        estimates.dropped,
    )

  def _batches(
      self, situation: base.Situation
  ) -> tuple[list[Batch], list[Batch]]:
    """Batches to learn from and others to judge by, of one epoch."""
    batches = situation.batches()
    first = next(batches)
    size, available = len(first[1]), situation.batches_per_epoch
    if self.examples is not None:
      count = -(-self.examples // size)
      if 2 * count > available:
        raise ValueError(
            f'{self.examples} examples for statistics, and as many to judge '
            f'by, are more than the {available * size} of an epoch; take at '
            f'most {available // 2 * size}.'
        )
    else:
      count = max(1, min(EXAMPLES // size, available // 2))
    drawn = [first, *itertools.islice(batches, 2 * count - 1)]
    return drawn[:count], drawn[count:]


@dataclasses.dataclass(frozen=True)
class _Step:
  """One growth step as it was selected.

  Attributes:
    selected: what.
    splits: scaled; u = 0 where nothing is split.
    removed: the prunes, by axis.
    candidates: all (axis, unit) pairs.
    dropped: how many splits could not be used.
  """

  selected: selection_lib.Selection
  splits: splits_lib.Splits
  removed: dict[str, surgery.Removal]
  candidates: tuple[tuple[str, int], ...]
  dropped: int


def coverage(
    architecture: Architecture, solver: str = 'als'
) -> sites_lib.Survey:
  """What of a network is covered, and what is not.

  Args:
    architecture: the network's.
    solver: als needs dense solves, adam does not.

  Returns:
    The sites, and the other axes with reasons.
  """
  survey = sites_lib.survey(architecture)
  return splits_lib.within_reach(survey) if solver == 'als' else survey


def model_of(
    architecture: Architecture, solver: str = 'als'
) -> signals_lib.Model:
  """What programs are compiled for.

  Raises:
    ValueError: nothing can be split.
  """
  chain = taps.chain_of(networks.parts(architecture))
  return signals_lib.model_of(coverage(architecture, solver), chain)


def _trees_of(state: state_lib.TrainState) -> signals_lib.Trees:
  return signals_lib.Trees(state.params['weights'], state.stats['network'])


def _without_failed(
    estimates: estimates_lib.Estimates, learned: splits_lib.Learned
) -> estimates_lib.Estimates:
  """Estimates without the candidates whose solves failed."""
  codes = np.array(
      [learned.codes[axis][unit] for axis, unit in estimates.candidates]
  )
  return dataclasses.replace(
      estimates, usable=estimates.usable & (codes == 0)
  )


def _by_axis(
    candidates: Sequence[tuple[str, int]], indices: Sequence[int]
) -> dict[str, list[int]]:
  """Units of selected candidates."""
  result: dict[str, list[int]] = {}
  for index in indices:
    axis, unit = candidates[index]
    result.setdefault(axis, []).append(unit)
  return result


def _measured(
    change: growth.Growth,
    batches: Sequence[Batch],
    before: float,
    report: dict[str, Any],
) -> growth.Patch:
  """The patch of a growth, which then measures the change of the loss."""

  def patch(state, key):
    state, _ = change.patch(state, key)
    chain = taps.chain_of(networks.parts(change.architecture))
    after = estimates_lib.mean_loss(chain, _trees_of(state), batches)
    return state, {**report, 'actual_change': after - before}

  return patch
