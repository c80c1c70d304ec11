"""`GaussNewton`: grows widths by the splits that are estimated to pay most."""

from collections.abc import Callable
import dataclasses
from typing import Any

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import estimates
from autogrow_jax.methods.gauss_newton import learned_splits
from autogrow_jax.methods.gauss_newton import norms
from autogrow_jax.methods.gauss_newton import ranking as ranking_lib
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.methods.gauss_newton import surgery

# Attempts at a step, each with half the u of the last. A quadratic model may
# fail on several splits at once; a measurement costs one forward pass.
ATTEMPTS = 3
# Smallest realised part of an estimated decrease.
KEPT = 0.1
ROUNDING = 1e-6  # Rounding error of a mean loss, nats.


@dataclasses.dataclass(frozen=True)
class GaussNewton(base.Method):
  """Splits and prunes channels where a quadratic model of the loss says so.

  A growth step happens at the end of an epoch, on frozen weights, in evaluation
  mode, with measured statistics of norms. A step of learned splits is taken
  only if the model predicts a decrease for it as a whole and the measured
  change agrees; otherwise at half its length and without prunes, or not at all.

  Attributes:
    ranking: way to choose a step; its kind is one of `ranking.KINDS`, or
      'package.module:Class'.
    limits: limits of a growth step.
    samples: number of sampled labels per example for the estimates.
    examples: number of examples to learn from, and to judge by; None for up to
      4096, and at most half an epoch.
  """

  ranking: ranking_lib.Ranking = dataclasses.field(
      default=learned_splits.LearnedSplits(),
      metadata={'kinds': ranking_lib.KINDS},
  )
  limits: selection.Limits = selection.Limits()
  samples: int = dataclasses.field(
      default=4,
      metadata={'help': 'Sampled labels per example, for the estimates.'},
  )
  examples: int | None = dataclasses.field(
      default=None,
      metadata={
          'help': 'Examples to learn from, and to judge by; by default up '
                  'to 4096, at most half an epoch.'
      },
  )

  def __post_init__(self):
    for name in ('samples', 'examples'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name} is at least 1, got {value}.')

  def report(
      self,
      architecture: architecture_lib.Architecture,
      aux: base.Tree,
      memory: base.Tree,
  ) -> dict[str, Any]:
    del aux, memory
    axes = [site.axis for site in sites.survey(architecture).sites]
    widths = {axis: architecture.size(axis) for axis in axes}
    return {'shape': '-'.join(map(str, widths.values())), 'widths': widths}

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth_lib.Growth | base.Skip | None:
    """Chooses a step, measures it, and takes it, a shorter one, or none."""
    if decision.action != 'grow':
      return None
    return self.propose_by(
        lambda snapshot: self.ranking.step(snapshot, self.limits, self.samples),
        situation,
    )

  def propose_by(
      self,
      choose: Callable[[steps.Snapshot], steps.Step],
      situation: base.Situation,
  ) -> growth_lib.Growth | base.Skip:
    """Proposes a step that is chosen by a function.

    Args:
      choose: function of a snapshot that returns the step at its whole length.
      situation: situation of the run, without leaves of a method.

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
    step = choose(snapshot).charged(
        charges.of_forward_passes(learning, judging)
    )
    step = self._within_model(step, snapshot)
    if isinstance(step, base.Skip):
      return step
    morph = step.as_morph(architecture)
    # The smaller network saw the examples.
    ratio = costs.macs(architecture) / costs.macs(morph.architecture)
    return dataclasses.replace(
        _measured(morph, snapshot, step.report(morph.architecture)),
        examples=round(step.images * ratio),
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
      step = step.measured(snapshot)
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


def _measured(
    morph: surgery.Morph,
    snapshot: steps.Snapshot,
    report: dict[str, Any],
) -> growth_lib.Growth:
  """Returns the growth with settled norms, and with its effect on the loss.

  It starts from the statistics of norms that splits were learned with, and
  ends with those of the grown network.
  """
  state, grown = snapshot.grown(morph), steps.chain_of(morph.architecture)
  before = snapshot.loss()
  after = estimates.mean_loss(grown, steps.trees_of(state), snapshot.judging)
  # New channels get statistics of their own.
  settle = norms.measured if morph.one_sided else norms.settled
  settled = settle(grown, steps.trees_of(state), snapshot.learning)
  settled_loss = estimates.mean_loss(grown, settled, snapshot.judging)
  return dataclasses.replace(
      morph.change,
      values=state_lib.values(
          weights=state_lib.to_host(settled.weights),
          network=state_lib.to_host(settled.stats),
      ),
      report={
          'estimated_change': report['estimated_change'],
          'actual_change': after - before,
          'settled_change': settled_loss - before,
          **report,
      },
  )


def _is_as_promised(estimated: float, measured: float) -> bool:
  """Returns true if a measured change is close enough to its estimate.

  At least 10 % of a predicted decrease is realised, or a predicted increase is
  exceeded by less than 90 %.
  """
  return measured <= estimated + (1 - KEPT) * abs(estimated) + ROUNDING
