"""`GaussNewton`: grows widths by the splits that are estimated to pay most."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import costs
from autogrow_jax import growth
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import joint
from autogrow_jax.methods.gauss_newton import matrix_free
from autogrow_jax.methods.gauss_newton import norms as norms_lib
from autogrow_jax.methods.gauss_newton import prunes as prunes_lib
from autogrow_jax.methods.gauss_newton import rivals
from autogrow_jax.methods.gauss_newton import selection as selection_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.networks import base as networks_base
from autogrow_jax.networks import common
from autogrow_jax.networks import taps

Architecture = base.Architecture
Batch = splits_lib.Batch

# Examples for learning, and as many for estimates, if there are so many.
EXAMPLES = 4096
# A pass over an example costs three training steps on it: forward, two
# backward passes, and the products with u and e and their gradients.
STEPS_PER_PASS = 3
LEARNING = ('frozen', 'joint')
# Of a step, each with half the u of the one before. A quadratic model may fail
# on several splits at once; measuring costs a forward pass each.
ATTEMPTS = 3
# Of the estimated decrease, that a step must keep to be taken.
KEPT = 0.1
ROUNDING = 1e-6  # Of a mean loss, nats.


@dataclasses.dataclass(frozen=True)
class GaussNewton(base.Method):
  """Splits and prunes channels where a quadratic model of the loss says so.

  At the end of an epoch, on frozen weights, in evaluation mode, with statistics
  of norms measured anew. Splits are learned from some batches, or have been
  learned beside the weights, and are estimated on others; so are prunes, with
  what makes up for them chosen by the first. What has been selected is
  estimated once more as a whole, with other labels, since the best of many
  noisy estimates are too good; a step that then no longer lowers the loss is
  not taken, as happens when there is hardly any loss left. A step that is found
  to do something else to the loss than estimated is taken at half its length,
  without prunes, or not at all.

  Attributes:
    strategy: 'gauss_newton', or one of its rivals, see `rivals`; they choose
      their splits in their own way, and prune nothing.
    learning: of splits: on 'frozen' weights before each growth, or 'joint' with
      the training of the weights, by Adam.
    timing: of joint learning, see `joint.Timing`.
    learn: how splits are learned.
    limits: of a growth step.
    compensation: of prunes, see `prunes`; 'off' to prune nothing.
    samples: of each example's label for the estimates.
    examples: for learning, and as many for estimates; None for up to 4096, and
      at most half an epoch.
    optimizer_state: after a growth, see `surgery.morph`.
    norms: after a growth, a function of `norms`: 'settled', or only 'measured'
      anew, which normalises part of the gain away.
  """

  strategy: str = 'gauss_newton'
  learning: str = 'frozen'
  timing: joint.Timing = joint.Timing()
  learn: splits_lib.LearnConfig = splits_lib.LearnConfig()
  limits: selection_lib.Limits = selection_lib.Limits()
  compensation: str = 'gauss_newton'
  samples: int = 4
  examples: int | None = None
  optimizer_state: str = 'reset'
  norms: str = 'settled'

  def __post_init__(self):
    choices = {
        'strategy': rivals.STRATEGIES,
        'learning': LEARNING,
        'compensation': ('off', *prunes_lib.COMPENSATIONS),
        'optimizer_state': surgery.OPTIMIZER_STATES,
        'norms': ('settled', 'measured'),
    }
    for name, allowed in choices.items():
      common.check_choice(name, getattr(self, name), allowed)
    for name in ('samples', 'examples'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name} is at least 1, got {value}.')
    if self.learning == 'joint':
      if self.strategy != 'gauss_newton':
        raise ValueError(
            f'The strategy {self.strategy} has no joint learning; learn frozen.'
        )
      if self.learn.curvature == 'rank1-cal':
        raise ValueError(
            'The factor of rank1-cal is measured on frozen weights; take '
            'another curvature for joint learning, such as mc.'
        )

  @property
  def needs_whole_batches(self) -> bool:
    return self.learning == 'joint'

  def extra(self, architecture: Architecture) -> base.Extra:
    if self.learning == 'frozen':
      return base.Extra({}, {})
    if not self.timing.phase:
      raise ValueError(
          'Joint learning has to know its timing: the steps of a phase.'
      )
    return base.Extra({}, joint.memory(architecture, self.learn))

  def objective(
      self,
      network: base.Network,
      params: base.Tree,
      stats: base.Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> tuple[jax.Array, tuple[base.Tree, jax.Array]]:
    loss, (after, logits) = super().objective(
        network, params, stats, labels, key
    )
    if self.learning == 'joint':
      after['method'] = joint.step(
          stats['method'],
          network,
          params['weights'],
          stats['network'],
          labels,
          key,
          self.learn,
          self.timing,
      )
    return loss, (after, logits)

  def report(
      self, architecture: Architecture, aux: base.Tree, memory: base.Tree
  ) -> dict[str, Any]:
    del aux, memory
    axes = [site.axis for site in sites_lib.survey(architecture).sites]
    return {'shape': '-'.join(str(architecture.size(axis)) for axis in axes)}

  def metrics(
      self, architecture: Architecture, aux: base.Tree, memory: base.Tree
  ) -> dict[str, Any]:
    """Records the width of every layer that can be split."""
    del aux, memory
    sites = sites_lib.survey(architecture).sites
    return {'widths': {s.axis: architecture.size(s.axis) for s in sites}}

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth.Growth | base.Skip | None:
    """Learns all splits, estimates them and all prunes, and selects."""
    if decision.action != 'grow':
      return None
    architecture = situation.architecture
    learning, judging = self._batches(situation)
    # Joint learning: each step was one with signals instead of one without.
    images = 0
    if self.learning == 'joint':
      batch = len(learning[0][1])
      images = (STEPS_PER_PASS - 1) * self.timing.steps * batch
    if not self.limits.allowance(architecture):
      return base.Skip(
          'no unit more is allowed (budget, growth cap)',
          images,
          # Joint learning goes on by its timing, and is charged by phase.
          is_final=self.learning == 'frozen',
      )
    model = model_of(architecture)
    trees = norms_lib.measured(
        model.chain, jax.device_put(_trees_of(situation.state)), learning
    )
    scene = _Scene(situation, model, trees, learning, judging)
    choose = self._step if self.strategy == 'gauss_newton' else self._rival
    step = choose(scene)
    images += _passes_images(learning, judging)
    taken = self._within_model(step, scene)
    if isinstance(taken, base.Skip):
      return dataclasses.replace(taken, images=images + taken.images)
    images += taken.step.images
    step, change, wider = taken.step, taken.change, taken.change.architecture
    selected = step.selected
    report = {
        'estimated_change': selected.change,
        'attempts': taken.attempts,
        'widths': {site.axis: wider.size(site.axis) for site in model.sites},
        'splits': _by_axis(step.candidates[i] for i in selected.splits),
        'scales': [round(float(scale), 4) for scale in selected.scales],
        'prunes': _by_axis((r.axis, r.unit) for r in selected.prunes),
        'price': selected.price,
        'candidates': len(step.candidates),
        'dropped': step.dropped,
        **({'refused': step.refused} if step.refused else {}),
        # It was the smaller network that saw them.
        'images': round(images * costs.macs(architecture) / costs.macs(wider)),
    }
    # A new channel is normalised by statistics of its own.
    settle = norms_lib.measured if step.one_sided else getattr(
        norms_lib, self.norms
    )
    return dataclasses.replace(
        change, patch=self._measured(change, scene, settle, report)
    )

  def _within_model(
      self, step: '_Step', scene: '_Scene'
  ) -> '_Taken | base.Skip':
    """The step, or a shorter one, if it does about what is estimated."""
    selected = step.selected
    if not selected.splits and not selected.prunes:
      return step.skipped('no split or prune is worth it')
    if selected.splits and step.must_help and not selected.change < 0:
      return step.skipped(
          'what had been selected would not lower the loss as a whole'
      )
    attempts = []
    for number in range(ATTEMPTS):
      selected = step.selected
      change = self._morph(scene.situation.architecture, step)
      attempts.append((selected.change, self._change_of_loss(change, scene)))
      step = step.charged(2 * _examples(scene.judging) // 3)
      is_decrease = selected.change < 0 or not selected.splits
      if not step.must_help or (
          is_decrease and _is_as_promised(*attempts[-1])
      ):
        return _Taken(step, change, attempts)
      if not selected.splits:
        return step.skipped(
            'the prunes would cost more than estimated', attempts
        )
      key = jax.random.fold_in(scene.key, 4 + number)
      step = self._halved(step, scene, key)
    tried = ', '.join(f'{measured:+.2g}' for _, measured in attempts)
    return step.skipped(f'the loss would change by {tried} nats', attempts)

  def _morph(
      self, architecture: Architecture, step: '_Step'
  ) -> growth.Growth:
    """The growth of a step."""
    units = _by_axis(step.candidates[i] for i in step.selected.splits)
    return surgery.morph(
        architecture,
        step.splits,
        {axis: np.array(chosen) for axis, chosen in units.items()},
        removed=step.removed,
        optimizer_state=self.optimizer_state,
        one_sided=step.one_sided,
    )

  def _change_of_loss(self, change: growth.Growth, scene: '_Scene') -> float:
    """By how much a growth changes the loss, as measured, nats."""
    state, trees = scene.situation.state, scene.trees
    before = state.replace(
        stats={**state.stats, 'network': state_lib.to_host(trees.stats)},
        opt_state=optax.identity().init(()),
    )
    after, _ = growth.grow(
        before,
        change,
        optax.identity(),
        key=scene.key,
        extra=self.extra,
    )
    chain = taps.chain_of(networks.parts(change.architecture))
    return estimates_lib.mean_loss(
        chain, _trees_of(after), scene.judging
    ) - estimates_lib.mean_loss(scene.model.chain, trees, scene.judging)

  def _halved(
      self, step: '_Step', scene: '_Scene', key: jax.Array
  ) -> '_Step':
    """A step with half of each u and without prunes."""
    halves = np.full(len(step.candidates), 0.5)
    splits = estimates_lib.scaled(step.splits, step.candidates, halves)
    together = scene.together(splits, [], key, self.samples)
    selected = dataclasses.replace(
        step.selected,
        scales=step.selected.scales / 2,
        change=together.change([]),
        prunes=(),
    )
    step = dataclasses.replace(
        step, selected=selected, splits=splits, removed={}
    )
    return step.charged(
        STEPS_PER_PASS * self.samples * _examples(scene.judging)
    )

  def _step(self, scene: '_Scene') -> '_Step':
    """Learns from some batches, and judges and selects by others."""
    model, trees, judging = scene.model, scene.trees, scene.judging
    state, architecture = scene.situation.state, scene.situation.architecture
    keys = [jax.random.fold_in(scene.key, number) for number in range(4)]
    if self.learning == 'joint':
      learned = joint.learned(state.stats['method'], architecture)
      images = 0
    else:
      learned = splits_lib.learn(
          model, trees, scene.learning, keys[0], self.learn
      )
      passes = STEPS_PER_PASS * self.learn.passes
      if self.learn.solver == 'als':
        passes += _steps_of_solves(architecture, model, self.learn)
      images = round(passes * _examples(scene.learning))
    estimates = estimates_lib.estimate(
        model, trees, learned.splits, judging, keys[1],
        curvature=self.learn.curvature, samples=self.samples,
    )
    estimates = _without_failed(estimates, learned)
    prunes = prunes_lib.NONE
    if self.compensation != 'off':
      prunes = prunes_lib.estimate(
          model, trees, scene.learning, keys[2], judging=judging,
          compensation=self.compensation, curvature=self.learn.curvature,
      )
    draws = self.samples if self.learn.curvature == 'mc' else 1
    passes = draws + self.samples + prunes.passes
    images += STEPS_PER_PASS * passes * _examples(judging)
    selected = selection_lib.select(
        architecture, estimates, self.limits, prunes
    )
    scales = np.zeros(len(estimates.candidates))
    scales[list(selected.splits)] = selected.scales
    splits = splits_lib.balanced(
        model,
        trees,
        estimates_lib.scaled(learned.splits, estimates.candidates, scales),
        self.learn.trust,
    )
    together = scene.together(splits, selected.prunes, keys[3], self.samples)
    selected = selection_lib.confirm(
        architecture, estimates.candidates, selected, together, self.limits
    )
    return _Step(
        selected,
        splits,
        surgery.absorbed(model, trees, selected.prunes),
        estimates.candidates,
        estimates.dropped + prunes.dropped,
        images,
    )

  def _rival(self, scene: '_Scene') -> '_Step':
    """As `_step`, in the way of another method."""
    architecture = scene.situation.architecture
    proposal = rivals.propose(
        self.strategy,
        architecture,
        scene.model,
        scene.trees,
        scene.learning,
        jax.random.fold_in(scene.key, 0),
    )
    candidates = estimates_lib.candidates_of(scene.model)
    selected = selection_lib.by_gain(
        architecture,
        candidates,
        proposal.gains,
        proposal.usable,
        self.limits,
    )
    images = proposal.examples_seen
    if proposal.one_sided:  # Which does not change the function at first.
      selected = dataclasses.replace(selected, change=0.0)
    else:
      chosen = np.zeros(len(candidates))
      chosen[list(selected.splits)] = 1
      together = scene.together(
          estimates_lib.scaled(proposal.splits, candidates, chosen),
          [],
          jax.random.fold_in(scene.key, 1),
          self.samples,
      )
      images += STEPS_PER_PASS * self.samples * _examples(scene.judging)
      selected = dataclasses.replace(selected, change=together.change([]))
    return _Step(
        selected,
        proposal.splits,
        {},
        candidates,
        int(np.count_nonzero(~proposal.usable)),
        images,
        one_sided=proposal.one_sided,
        must_help=False,
        refused='; '.join(f'{a}: {reason}' for a, reason in proposal.refused),
    )

  def _measured(
      self,
      change: growth.Growth,
      scene: '_Scene',
      settle: Callable[..., signals_lib.Trees],
      report: dict[str, Any],
  ) -> growth.Patch:
    """The patch of a growth that also measures what it does to the loss.

    It works on the statistics of norms that splits were learned with, and
    leaves those of the grown network.
    """
    architecture = change.architecture

    def patch(state, key):
      stats, _ = growth.carry(
          {'network': scene.trees.stats},
          {'network': state.stats['network']},
          state_lib.axis_table(architecture),
          change.sources,
      )
      state = state.replace(stats={**state.stats, **stats})
      state, _ = change.patch(state, key)
      grown = taps.chain_of(networks.parts(architecture))
      before, after = (
          estimates_lib.mean_loss(*network, scene.judging)
          for network in (
              (scene.model.chain, scene.trees), (grown, _trees_of(state))
          )
      )
      settled = settle(grown, _trees_of(state), scene.learning)
      state = state.replace(
          params={
              **state.params, 'weights': state_lib.to_host(settled.weights)
          },
          stats={
              'network': state_lib.to_host(settled.stats),
              'method': self._restarted(architecture, state),
          }
      )
      return state, {
          # Side by side in the receipt.
          'estimated_change': report['estimated_change'],
          'actual_change': after - before,
          'settled_change': estimates_lib.mean_loss(
              grown, settled, scene.judging
          )
          - before,
          **report,
      }

    return patch

  def _restarted(
      self, architecture: Architecture, state: state_lib.TrainState
  ) -> networks_base.Tree:
    """The method's own leaves after a growth: all but the step count is new."""
    memory = state_lib.to_host(self.extra(architecture).other)
    if memory:
      memory['steps'] = state.stats['method']['steps']
    return memory

  def _batches(
      self, situation: base.Situation
  ) -> tuple[list[Batch], list[Batch]]:
    """Batches to learn from and others to judge by, of one epoch."""
    batches = situation.batches()
    first = next(batches)
    size, available = len(first[1]), situation.batches_per_epoch
    if available < 2:
      raise ValueError(
          'Statistics and judgement take a batch each, and an epoch has only '
          'one; take smaller batches.'
      )
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
    drawn = [
        (x.astype(jnp.float32), labels)
        for x, labels in (first, *itertools.islice(batches, 2 * count - 1))
    ]
    return drawn[:count], drawn[count:]


@dataclasses.dataclass(frozen=True)
class _Scene:
  """What a growth step is chosen from.

  Attributes:
    situation: of the run.
    model: the network and its sites.
    trees: its arrays, with statistics of norms over `learning`.
    learning: batches to learn splits from.
    judging: others, for estimates and measurements.
  """

  situation: base.Situation
  model: signals_lib.Model
  trees: signals_lib.Trees
  learning: Sequence[Batch]
  judging: Sequence[Batch]

  @property
  def key(self) -> jax.Array:
    """Of everything random in the step."""
    state = self.situation.state
    stream = randomness.stream(
        jax.random.wrap_key_data(state.key), 'gauss_newton'
    )
    return jax.random.fold_in(stream, state.step)

  def together(
      self,
      splits: splits_lib.Splits,
      removed: Sequence[prunes_lib.Removal],
      key: jax.Array,
      samples: int,
  ) -> prunes_lib.Joint:
    """See `prunes.together`."""
    return prunes_lib.together(
        self.model,
        self.trees,
        splits,
        removed,
        self.judging,
        key,
        samples=samples,
    )


@dataclasses.dataclass(frozen=True)
class _Step:
  """One growth step as it was selected.

  Attributes:
    selected: what.
    splits: scaled; u = 0 where nothing is split.
    removed: the prunes, by axis.
    candidates: all (axis, unit) pairs.
    dropped: how many splits and prunes could not be used.
    images: what it cost, in images of training steps.
    one_sided: whether the splits are, see `surgery.morph`.
    must_help: whether it is not taken unless it lowers the loss.
    refused: axes that a strategy cannot do, with reasons.
  """

  selected: selection_lib.Selection
  splits: splits_lib.Splits
  removed: dict[str, surgery.Absorbed]
  candidates: tuple[tuple[str, int], ...]
  dropped: int
  images: int
  one_sided: bool = False
  must_help: bool = True
  refused: str = ''

  def charged(self, images: int) -> '_Step':
    """The step with a higher cost."""
    return dataclasses.replace(self, images=self.images + images)

  def skipped(
      self, reason: str, attempts: Sequence[tuple[float, float]] = ()
  ) -> base.Skip:
    """Why it is not taken, with what could not be used, and what was tried."""
    if self.refused:
      reason += f'; not {self.refused}'
    if self.dropped:
      reason += f'; {self.dropped} candidates cannot be used'
    return base.Skip(reason, self.images, {'attempts': attempts})


@dataclasses.dataclass(frozen=True)
class _Taken:
  """A step that is taken.

  Attributes:
    step: as it is taken.
    change: it, as a growth.
    attempts: (estimated, measured) change of the loss by it and by what had
      been tried before, nats.
  """

  step: _Step
  change: growth.Growth
  attempts: list[tuple[float, float]]


def model_of(architecture: Architecture) -> signals_lib.Model:
  """What programs are compiled for.

  Raises:
    ValueError: nothing can be split, or the loss is not the negative
      log-likelihood of one label for each example.
  """
  if networks.label_shape(architecture):
    raise ValueError(
        'Estimates sample a label of each example from its likelihood, but '
        f'{architecture.family} predicts a label for each word or pixel; take '
        'another network.'
    )
  chain = taps.chain_of(networks.parts(architecture))
  return signals_lib.model_of(sites_lib.survey(architecture), chain)


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


def _by_axis(chosen: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
  """Units of (axis, unit) pairs."""
  result: dict[str, list[int]] = {}
  for axis, unit in chosen:
    result.setdefault(axis, []).append(unit)
  return result


def _is_as_promised(estimated: float, measured: float) -> bool:
  """Whether a tenth of a decrease is left, or a cost is not nearly doubled."""
  return measured <= estimated + (1 - KEPT) * abs(estimated) + ROUNDING


def _steps_of_solves(
    architecture: Architecture,
    model: signals_lib.Model,
    config: splits_lib.LearnConfig,
) -> float:
  """Training steps on one image that the solves of all sweeps cost.

  A matrix takes the square of its size in multiply-adds for each example; an
  iteration without matrices two products with the layer.
  """
  products = {
      leaf.path[:-1]: math.prod(leaf.shape) * leaf.positions
      for leaf in costs.leaves(architecture)
      if leaf.path[-1] == 'kernel'
  }
  macs = 0
  for site in model.sites:
    for block, size, ends in (
        ('u', site.incoming, site.writers), ('e', site.outgoing, site.readers)
    ):
      count = site.units * size**2
      if splits_lib.is_wide(site, block):
        product = sum(products[end.layer.path] for end in ends)
        count = 2 * matrix_free.ITERATIONS * product
      macs += config.sweeps * count
  step = (1 + costs.BACKWARD_OVER_FORWARD) * costs.macs(architecture)
  return macs / step


def _examples(batches: Sequence[Batch]) -> int:
  return sum(len(labels) for _, labels in batches)


def _passes_images(
    learning: Sequence[Batch], judging: Sequence[Batch]
) -> int:
  """What norms and losses cost: a forward pass is a third of a step."""
  return (2 * _examples(learning) + 3 * _examples(judging)) // 3
