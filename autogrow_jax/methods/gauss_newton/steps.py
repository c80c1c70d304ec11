"""Growth steps before they are taken, and the examples they are chosen by."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import surgery

Architecture = architecture_lib.Architecture
Batch = signals_lib.Batch

# Largest default number of examples to learn from, and to judge by.
EXAMPLES = 2048
# Training steps that a pass over an example costs: forward, two backward
# passes, and the products with u, v and e.
STEPS_PER_PASS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
  """A network with frozen weights, and examples to choose a step by.

  Attributes:
    architecture: architecture of the network.
    state: canonical state of the run.
    model: the padded network and its sites.
    trees: its arrays, with statistics of norms over `learning`.
    learning: batches to learn splits from.
    judging: other batches, for estimates and measurements.
    samples: number of sampled labels per example for estimates.
    rng: source of all randomness in the step.
  """

  architecture: Architecture
  state: state_lib.TrainState
  model: signals_lib.Model
  trees: signals_lib.Trees
  learning: Sequence[Batch]
  judging: Sequence[Batch]
  samples: int
  rng: np.random.Generator

  @classmethod
  def take(
      cls, situation: base.Situation, examples: int | None, samples: int
  ) -> 'Snapshot':
    """Draws examples and measures the statistics of norms.

    Args:
      situation: situation of the run.
      examples: number of examples to learn from, and to judge by; None for up
        to `EXAMPLES`, and at most half an epoch.
      samples: see `Snapshot`.
    """
    learning, judging = _draw(situation, examples)
    architecture, state = situation.architecture, situation.state
    model = signals_lib.model_of(architecture)
    trees = signals_lib.trees_of(
        architecture, state.params['weights'], state.stats['network']
    )
    trees = signals_lib.measured(model.chain, trees, learning)
    stream = randomness.stream(
        jax.random.wrap_key_data(state.key), 'gauss_newton'
    )
    seed = [*np.asarray(jax.random.key_data(stream)), int(state.step)]
    return cls(
        architecture, state, model, trees, learning, judging, samples,
        np.random.default_rng(seed),
    )

  @functools.cached_property
  def loss(self) -> float:
    """Mean loss on the judging batches, nats."""
    return signals_lib.mean_loss(self.model.chain, self.trees, self.judging)

  @functools.cached_property
  def arrays(self) -> tuple[Any, Any]:
    """Weights, and statistics over `learning`, without padding."""
    weights, old = self.state.params['weights'], self.state.stats['network']
    return weights, jax.tree.map(padding.cut, self.trees.stats, old)

  def images(self, passes: float, batches: Sequence[Batch]) -> int:
    """Returns the cost of passes over batches, images of training steps."""
    return round(STEPS_PER_PASS * passes * signals_lib.count(batches))

  def grown_loss(self, change: growth_lib.Growth) -> float:
    """Mean loss on the judging batches after a growth, nats."""
    return signals_lib.mean_loss(*grown(change), self.judging)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """One selected growth step.

  Attributes:
    splits: per axis, units to split.
    parameters: splits of all sites, scaled.
    images: cost of choosing it, images of training steps.
    pruned: per axis, a unit to prune.
    taken: compensations of prunes.
    slope: slope of the estimated change of the loss by all splits, nats.
    curvature: curvature of that change.
    change: estimated change of the loss by the whole step, nats.
    one_sided: true if new units leave their parents alone, see `surgery.morph`.
    must_help: true if it is taken only if it lowers the loss as estimated.
    report: further values for the receipt.
    attempts: (estimated, measured) change of the loss by each length tried,
      nats.
  """

  splits: Mapping[str, Sequence[int]]
  parameters: splits_lib.Splits
  images: int
  pruned: Mapping[str, int] = dataclasses.field(default_factory=dict)
  taken: estimates_lib.Taken | None = None
  slope: float = 0.0
  curvature: float = 0.0
  change: float = 0.0
  one_sided: bool = False
  must_help: bool = True
  report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  attempts: tuple[tuple[float, float], ...] = ()

  def growth(self, snapshot: Snapshot) -> growth_lib.Growth:
    """Returns the growth that carries out the step."""
    return surgery.morph(
        snapshot.architecture, *snapshot.arrays, self.parameters, self.splits,
        pruned=self.pruned, taken=self.taken, one_sided=self.one_sided,
    )

  def measured(self, snapshot: Snapshot) -> 'Step':
    """Returns the step with one more attempt, its measured growth."""
    change = snapshot.grown_loss(self.growth(snapshot)) - snapshot.loss
    return dataclasses.replace(
        self,
        attempts=(*self.attempts, (self.change, change)),
        # A forward pass is a third of a training step.
        images=self.images + signals_lib.count(snapshot.judging) // 3,
    )

  def halved(self) -> 'Step':
    """Returns the step with half of each u and without prunes."""
    slope, curvature = self.slope / 2, self.curvature / 4
    return dataclasses.replace(
        self,
        parameters={
            axis: split.scaled(
                np.full(split.u[0].shape[-1], 0.5),
                np.ones(split.e[0].shape[-2]),
            )
            for axis, split in self.parameters.items()
        },
        pruned={},
        slope=slope,
        curvature=curvature,
        change=slope + curvature / 2,
    )

  def skipped(self, reason: str) -> base.Skip:
    """Returns the refusal of the step."""
    if refused := self.report.get('refused'):
      reason += f'; not {refused}'
    if dropped := self.report.get('dropped'):
      reason += f'; {dropped} candidates cannot be used'
    return base.Skip(reason, self.images, {'attempts': self.attempts})


def grown(change: growth_lib.Growth) -> tuple[Any, signals_lib.Trees]:
  """Returns the chain and the arrays after a growth that holds them all."""
  chain = signals_lib.chain_of(change.target)
  roots = {
      root: {part.key: {} for part in chain} for root in ('weights', 'network')
  }
  for path, leaf in change.values.items():
    node = roots
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return chain, signals_lib.trees_of(change.target, *roots.values())


def settled(
    change: growth_lib.Growth, snapshot: Snapshot
) -> tuple[growth_lib.Growth, float]:
  """Returns the growth with measured statistics of norms, and the mean loss."""
  chain, trees = grown(change)
  trees = signals_lib.measured(chain, trees, snapshot.learning)
  values = dict(change.values)
  for path, leaf in state_lib.values(network=trees.stats).items():
    values[path] = padding.cut(leaf, values[path])
  loss = signals_lib.mean_loss(chain, trees, snapshot.judging)
  return dataclasses.replace(change, values=values), loss


def by_axis(chosen: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
  """Groups (axis, unit) pairs by axis."""
  result: dict[str, list[int]] = {}
  for axis, unit in chosen:
    result.setdefault(axis, []).append(unit)
  return result


def _draw(
    situation: base.Situation, examples: int | None
) -> tuple[list[Batch], list[Batch]]:
  """Draws batches to learn from, and others to judge by, from one epoch."""
  batches = situation.batches()
  first = next(batches)
  size, available = len(first[1]), situation.batches_per_epoch
  if available < 2:
    raise ValueError(
        'Statistics and judgement take a batch each, and an epoch has only '
        'one; take smaller batches.'
    )
  if examples is not None:
    count = -(-examples // size)
    if 2 * count > available:
      raise ValueError(
          f'{examples} examples for statistics, and as many to judge by, are '
          f'more than the {available * size} of an epoch; take at most '
          f'{available // 2 * size}.'
      )
  else:
    count = max(1, min(EXAMPLES // size, available // 2))
  drawn = [
      (x.astype(jnp.float32), labels)
      for x, labels in (first, *itertools.islice(batches, 2 * count - 1))
  ]
  return drawn[:count], drawn[count:]
