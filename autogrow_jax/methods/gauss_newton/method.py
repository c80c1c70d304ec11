"""`GaussNewton`: grows widths by the splits that are estimated to pay most."""

from collections.abc import Callable
import dataclasses
from typing import Any

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import policies
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import ranking as ranking_lib
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import sites
from autogrow_jax.methods.gauss_newton import steps

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
      `steps.EXAMPLES`, and at most half an epoch.
  """

  ranking: ranking_lib.Ranking = dataclasses.field(
      default=ranking_lib.LearnedSplits(),
      metadata={'kinds': ranking_lib.KINDS},
  )
  limits: selection.Limits = selection.Limits()
  samples: int = dataclasses.field(
      default=2,
      metadata={'help': 'Sampled labels per example, for the estimates.'},
  )
  examples: int | None = dataclasses.field(
      default=None,
      metadata={
          'help': 'Examples to learn from, and to judge by; by default up '
                  f'to {steps.EXAMPLES}, at most half an epoch.'
      },
  )

  def __post_init__(self):
    for name in ('samples', 'examples'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name} is at least 1, got {value}.')

  @property
  def execution(self) -> padding.Execution:
    return padding.Execution()

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
    return self.propose_by(self.ranking.step, situation)

  def propose_by(
      self,
      choose: Callable[[steps.Snapshot, selection.Limits], steps.Step],
      situation: base.Situation,
  ) -> growth_lib.Growth | base.Skip:
    """Proposes a step that is chosen by a function.

    Args:
      choose: function of a snapshot and limits that returns the step at its
        whole length.
      situation: situation of the run, without leaves of a method.

    Returns:
      The growth, or the reason why there is none.
    """
    architecture = situation.architecture
    if not self.limits.allowance(architecture):
      return base.Skip(
          'no unit more is allowed (budget, growth cap)', is_final=True
      )
    snapshot = steps.Snapshot.take(situation, self.examples, self.samples)
    step = choose(snapshot, self.limits)
    # Forward passes for norms and losses, before and after.
    passes = [*snapshot.learning, *snapshot.learning, *snapshot.judging]
    step = dataclasses.replace(
        step, images=step.images + signals.count(passes) // 3
    )
    step = _within_model(step, snapshot)
    if isinstance(step, base.Skip):
      return step
    change, loss = steps.settled(step.growth(snapshot), snapshot)
    target = change.target
    _, measured = step.attempts[-1]
    return dataclasses.replace(
        change,
        # The smaller network saw the examples.
        examples=round(
            step.images * costs.macs(architecture) / costs.macs(target)
        ),
        report={
            'estimated_change': step.change,
            'actual_change': measured,
            'settled_change': loss - snapshot.loss,
            'attempts': step.attempts,
            'widths': {
                site.axis: target.size(site.axis)
                for site in snapshot.model.sites
            },
            'splits': step.splits,
            'prunes': {axis: [unit] for axis, unit in step.pruned.items()},
            **step.report,
        },
    )


def _within_model(
    step: steps.Step, snapshot: steps.Snapshot
) -> steps.Step | base.Skip:
  """Returns the step, or a shorter one, if measurements agree with it."""
  if not step.splits and not step.pruned:
    return step.skipped('no split or prune is worth it')
  if step.splits and step.must_help and not step.change < 0:
    return step.skipped(
        'what had been selected would not lower the loss as a whole'
    )
  for _ in range(ATTEMPTS):
    step = step.measured(snapshot)
    is_decrease = step.change < 0 or not step.splits
    if not step.must_help or (
        is_decrease and _is_as_promised(*step.attempts[-1])
    ):
      return step
    if not step.splits:
      return step.skipped('the prunes would cost more than estimated')
    step = step.halved()
  tried = ', '.join(f'{measured:+.2g}' for _, measured in step.attempts)
  return step.skipped(f'the loss would change by {tried} nats')


def _is_as_promised(estimated: float, measured: float) -> bool:
  """Returns true if a measured change is close enough to its estimate.

  At least 10 % of a predicted decrease is realised, or a predicted increase is
  exceeded by less than 90 %.
  """
  return measured <= estimated + (1 - KEPT) * abs(estimated) + ROUNDING
