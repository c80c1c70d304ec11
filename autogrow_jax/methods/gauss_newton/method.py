"""`GaussNewton`: grows widths by the splits that are estimated to pay most."""

from collections.abc import Callable
import dataclasses

import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import growth
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import compensation as compensation_lib
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import learning as learning_lib
from autogrow_jax.methods.gauss_newton import norms
from autogrow_jax.methods.gauss_newton import prunes as prunes_lib
from autogrow_jax.methods.gauss_newton import ranking as ranking_lib
from autogrow_jax.methods.gauss_newton import selection as selection_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.networks import common
from autogrow_jax import policies
from autogrow_jax import state as state_lib

Choose = Callable[[steps.Snapshot], steps.Step]

# Attempts at a step, each with half the u of the last. A quadratic model may
# fail on several splits at once; a measurement costs one forward pass.
ATTEMPTS = 3
# Smallest realised part of an estimated decrease.
KEPT = 0.1
ROUNDING = 1e-6  # Rounding error of a mean loss, nats.


@dataclasses.dataclass(frozen=True)
class GaussNewton(base.FixedArchitecture):
  """Splits and prunes channels where a quadratic model of the loss says so.

  A growth step happens at the end of an epoch, on frozen weights, in evaluation
  mode, with measured statistics of norms. Splits and the compensations of
  prunes are learned from some batches and estimated on others. The selection is
  estimated once more as a whole, with other labels, since the best of many
  noisy estimates are too good. It is taken only if the model still predicts a
  decrease, and if the measured change agrees; otherwise at half its length and
  without prunes, or not at all.

  Attributes:
    ranking: another way to split and rank units; None for learned splits and
      the joint model. With one, `learn` and `compensation` have no effect.
    learn: settings of learning splits.
    limits: limits of a growth step.
    compensation: compensation of prunes, see `compensation`; 'off' for no
      prunes.
    samples: number of sampled labels per example for the estimates.
    examples: number of examples to learn from, and to judge by; None for up to
      4096, and at most half an epoch.
  """

  ranking: ranking_lib.Ranking | None = None
  learn: learning_lib.LearnConfig = learning_lib.LearnConfig()
  limits: selection_lib.Limits = selection_lib.Limits()
  compensation: str = 'gauss_newton'
  samples: int = 4
  examples: int | None = None

  def __post_init__(self):
    choices = ('off', *compensation_lib.COMPENSATIONS)
    common.check_choice('compensation', self.compensation, choices)
    for name in ('samples', 'examples'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name} is at least 1, got {value}.')

  def describe(
      self, architecture: architecture_lib.Architecture, memory: base.Tree
  ) -> str:
    del memory
    axes = [site.axis for site in sites_lib.survey(architecture).sites]
    return '-'.join(str(architecture.size(axis)) for axis in axes)

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth.Growth | base.Skip | None:
    """Learns all splits, estimates them and all prunes, and selects."""
    if decision.action != 'grow':
      return None
    choose = self._learned_step if self.ranking is None else self._ranked_step
    return self.propose_by(choose, situation)

  def propose_by(
      self, choose: Choose, situation: base.Situation
  ) -> growth.Growth | base.Skip:
    """Chooses a step, measures it, and takes it, a shorter one, or none.

    Args:
      choose: function of a snapshot that returns the whole step.
      situation: situation of the run; the method has no leaves in its state.

    Returns:
      The growth, or the reason why there is none.
    """
    architecture = situation.architecture
    learning, judging = steps.draw(situation, self.examples)
    if not self.limits.allowance(architecture):
      return base.Skip(
          'no unit more is allowed (budget, growth cap)', is_final=True
      )
    snapshot = steps.Snapshot.take(situation, learning, judging)
    step = choose(snapshot)
    step = step.charged(charges.of_forward_passes(learning, judging))
    step = self._within_model(step, snapshot)
    if isinstance(step, base.Skip):
      return step
    change = step.as_growth(architecture)
    wider = change.architecture
    return dataclasses.replace(
        change,
        # The smaller network saw the images.
        patch=_measuring(
            change, snapshot, step, costs.macs(architecture) / costs.macs(wider)
        ),
    )

  def step_from(
      self,
      snapshot: steps.Snapshot,
      learned: learning_lib.Learned,
      images: int,
  ) -> steps.Step:
    """Estimates learned splits and all prunes, and selects from them.

    Args:
      snapshot: the network and examples.
      learned: learned splits of all units.
      images: cost of learning, images of training steps.

    Returns:
      The step.
    """
    model, trees, judging = snapshot.model, snapshot.trees, snapshot.judging
    curvature = self.learn.curvature
    estimates = estimates_lib.estimate(
        model, trees, learned.splits, judging, snapshot.key(1),
        curvature=curvature, samples=self.samples,
    )
    estimates = _without_failed(estimates, learned)
    prunes = prunes_lib.NONE
    if self.compensation != 'off':
      prunes = prunes_lib.estimate(
          model, trees, snapshot.learning, judging, snapshot.key(2),
          compensation=self.compensation, curvature=curvature,
      )
    draws = self.samples if curvature == 'mc' else 1
    passes = draws + self.samples + prunes.passes
    images += charges.STEPS_PER_PASS * passes * charges.count(judging)
    selected = selection_lib.select(
        snapshot.architecture, estimates, self.limits, prunes
    )
    scales = np.zeros(len(estimates.candidates))
    scales[list(selected.splits)] = selected.scales
    splits = splits_lib.balanced(
        model,
        trees,
        estimates_lib.scaled(learned.splits, estimates.candidates, scales),
        self.learn.trust,
    )
    joint = snapshot.together(
        splits, selected.prunes, snapshot.key(3), self.samples
    )
    selected = selection_lib.confirm(
        snapshot.architecture, estimates.candidates, selected, joint,
        self.limits,
    )
    return steps.Step(
        selected,
        splits,
        surgery.absorbed(model, trees, selected.prunes),
        estimates.candidates,
        estimates.dropped + prunes.dropped,
        images,
    )

  def _learned_step(self, snapshot: steps.Snapshot) -> steps.Step:
    """Learns splits from some batches, and selects from them by others."""
    learned = learning_lib.learn(
        snapshot.model, snapshot.trees, snapshot.learning, snapshot.key(0),
        self.learn,
    )
    passes = charges.of_learning(
        snapshot.architecture, snapshot.model, self.learn
    )
    images = round(passes * charges.count(snapshot.learning))
    return self.step_from(snapshot, learned, images)

  def _ranked_step(self, snapshot: steps.Snapshot) -> steps.Step:
    """Selects from splits that are ranked in another way."""
    ranked = self.ranking.rank(
        snapshot.architecture, snapshot.model, snapshot.trees,
        snapshot.learning, snapshot.key(0),
    )
    candidates = estimates_lib.candidates_of(snapshot.model)
    selected = selection_lib.by_gain(
        snapshot.architecture, candidates, ranked.gains, ranked.usable,
        self.limits,
    )
    images = ranked.examples_seen
    if ranked.one_sided:  # New channels change nothing at first.
      selected = dataclasses.replace(selected, change=0.0)
    else:
      chosen = np.zeros(len(candidates))
      chosen[list(selected.splits)] = 1
      joint = snapshot.together(
          estimates_lib.scaled(ranked.splits, candidates, chosen),
          [],
          snapshot.key(1),
          self.samples,
      )
      passes = charges.STEPS_PER_PASS * self.samples
      images += passes * charges.count(snapshot.judging)
      selected = dataclasses.replace(selected, change=joint.change([]))
    return steps.Step(
        selected,
        ranked.splits,
        {},
        candidates,
        int(np.count_nonzero(~ranked.usable)),
        images,
        one_sided=ranked.one_sided,
        must_help=False,
        refused='; '.join(f'{a}: {reason}' for a, reason in ranked.refused),
    )

  def _within_model(
      self, step: steps.Step, snapshot: steps.Snapshot
  ) -> steps.Step | base.Skip:
    """Returns the step, or a shorter one, if measurements agree with it."""
    selected = step.selected
    if not selected.splits and not selected.prunes:
      return step.skipped('no split or prune is worth it')
    if selected.splits and step.must_help and not selected.change < 0:
      return step.skipped(
          'what had been selected would not lower the loss as a whole'
      )
    for number in range(ATTEMPTS):
      step = step.measured(snapshot, step.as_growth(snapshot.architecture))
      selected = step.selected
      is_decrease = selected.change < 0 or not selected.splits
      if not step.must_help or (
          is_decrease and _is_as_promised(*step.attempts[-1])
      ):
        return step
      if not selected.splits:
        return step.skipped('the prunes would cost more than estimated')
      step = step.halved(snapshot, snapshot.key(4 + number), self.samples)
    tried = ', '.join(f'{measured:+.2g}' for _, measured in step.attempts)
    return step.skipped(f'the loss would change by {tried} nats')


def _measuring(
    change: growth.Growth,
    snapshot: steps.Snapshot,
    step: steps.Step,
    price_of_image: float,
) -> growth.Patch:
  """Returns a growth's patch that also measures its effect on the loss.

  It starts from the statistics of norms that splits were learned with, and
  ends with those of the grown network.
  """
  architecture = change.architecture
  report = step.report(architecture, price_of_image)
  # New channels get statistics of their own.
  settle = norms.measured if step.one_sided else norms.settled

  def patch(state, key):
    stats, _ = growth.carry(
        {'network': snapshot.trees.stats},
        {'network': state.stats['network']},
        state_lib.axis_table(architecture),
        change.sources,
    )
    state = state.replace(stats={**state.stats, **stats})
    state, _ = change.patch(state, key)
    grown = steps.chain_of(architecture)
    loss = lambda chain, trees: estimates_lib.mean_loss(
        chain, trees, snapshot.judging
    )
    before = loss(snapshot.model.chain, snapshot.trees)
    after = loss(grown, steps.trees_of(state))
    settled = settle(grown, steps.trees_of(state), snapshot.learning)
    state = state.replace(
        params={**state.params, 'weights': state_lib.to_host(settled.weights)},
        stats={**state.stats, 'network': state_lib.to_host(settled.stats)},
    )
    return state, {
        'estimated_change': report['estimated_change'],
        'actual_change': after - before,
        'settled_change': loss(grown, settled) - before,
        **report,
    }

  return patch


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


def _is_as_promised(estimated: float, measured: float) -> bool:
  """Returns true if a measured change is close enough to its estimate.

  At least 10 % of a predicted decrease is realised, or a predicted increase is
  exceeded by less than 90 %.
  """
  return measured <= estimated + (1 - KEPT) * abs(estimated) + ROUNDING
