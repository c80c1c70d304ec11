"""Growth steps before they are taken, and the examples they are chosen by."""

from collections.abc import Iterable, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import norms
from autogrow_jax.methods.gauss_newton import removals as removals_lib
from autogrow_jax.methods.gauss_newton import selection as selection_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.methods.gauss_newton import together as together_lib

Architecture = architecture_lib.Architecture
Batch = splits_lib.Batch

# Largest default number of examples to learn from, and to judge by.
EXAMPLES = 4096


def trees_of(state: state_lib.TrainState) -> signals_lib.Trees:
  """Returns the arrays of the network of a state."""
  return signals_lib.Trees(state.params['weights'], state.stats['network'])


def chain_of(architecture: Architecture) -> Any:
  """Returns the unfused chain of a network."""
  return taps.chain_of(networks.parts(architecture))


def draw(
    situation: base.Situation, examples: int | None
) -> tuple[list[Batch], list[Batch]]:
  """Draws batches to learn from, and others to judge by, from one epoch.

  Args:
    situation: situation of the run.
    examples: number of examples to learn from; None for up to `EXAMPLES`, and
      at most half an epoch.

  Raises:
    ValueError: if an epoch does not have so many examples.
  """
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


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A network with frozen weights, and examples to choose a step by.

  Attributes:
    architecture: architecture of the network.
    state: canonical state of the run.
    model: the network and its sites.
    trees: arrays of the network, with statistics of norms over `learning`.
    learning: batches to learn splits from.
    judging: other batches, for estimates and measurements.
  """

  architecture: Architecture
  state: state_lib.TrainState
  model: signals_lib.Model
  trees: signals_lib.Trees
  learning: Sequence[Batch]
  judging: Sequence[Batch]

  @classmethod
  def take(
      cls,
      situation: base.Situation,
      learning: Sequence[Batch],
      judging: Sequence[Batch],
  ) -> 'Snapshot':
    """Takes a snapshot and measures the statistics of its norms."""
    architecture, state = situation.architecture, situation.state
    model = signals_lib.model_of(architecture)
    trees = norms.measured(
        model.chain, jax.device_put(trees_of(state)), learning
    )
    return cls(architecture, state, model, trees, learning, judging)

  @property
  def root_key(self) -> jax.Array:
    """Key of all randomness in the step."""
    stream = randomness.stream(
        jax.random.wrap_key_data(self.state.key), 'gauss_newton'
    )
    return jax.random.fold_in(stream, self.state.step)

  def key(self, number: int) -> jax.Array:
    """Returns the key of one of the step's draws."""
    return jax.random.fold_in(self.root_key, number)

  def together(
      self,
      splits: splits_lib.Splits,
      removals: Sequence[removals_lib.Removal],
      key: jax.Array,
      samples: int,
  ) -> together_lib.Joint:
    """Estimates a step as a whole, see `together.together`."""
    return together_lib.together(
        self.model, self.trees, splits, removals, self.judging, key,
        samples=samples,
    )

  def grown(self, morph: surgery.Morph) -> state_lib.TrainState:
    """The arrays after a growth, with statistics that splits learned with."""
    stats = state_lib.to_host(self.trees.stats)
    before = self.state.replace(stats={**self.state.stats, 'network': stats})
    return morph.grown(before, self.root_key)

  def loss(self, morph: surgery.Morph | None = None) -> float:
    """Mean loss on the judging batches, nats; after a growth if given."""
    if morph is None:
      chain, trees = self.model.chain, self.trees
    else:
      chain, trees = chain_of(morph.architecture), trees_of(self.grown(morph))
    return estimates_lib.mean_loss(chain, trees, self.judging)


@dataclasses.dataclass(frozen=True)
class Step:
  """One selected growth step.

  Attributes:
    selected: selected splits and prunes.
    splits: scaled splits; u = 0 where nothing is split.
    removed: compensated prunes, by axis.
    candidates: all (axis, unit) pairs.
    dropped: number of splits and prunes that could not be used.
    images: cost so far, images of training steps.
    one_sided: true if new units leave their parents alone, see `surgery.morph`.
    must_help: true if it is taken only if it lowers the loss as estimated.
    refused: axes that a ranking cannot split, with reasons.
    attempts: (estimated, measured) change of the loss by each length tried,
      nats.
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
  attempts: tuple[tuple[float, float], ...] = ()

  def charged(self, images: int) -> 'Step':
    """Returns the step with a higher cost."""
    return dataclasses.replace(self, images=self.images + images)

  def skipped(self, reason: str) -> base.Skip:
    """Returns the refusal of the step."""
    if self.refused:
      reason += f'; not {self.refused}'
    if self.dropped:
      reason += f'; {self.dropped} candidates cannot be used'
    return base.Skip(reason, self.images, {'attempts': self.attempts})

  def as_morph(self, architecture: Architecture) -> surgery.Morph:
    """Returns the growth that carries out the step."""
    units = by_axis(self.candidates[i] for i in self.selected.splits)
    return surgery.morph(
        architecture,
        self.splits,
        {axis: np.array(chosen) for axis, chosen in units.items()},
        removed=self.removed,
        one_sided=self.one_sided,
    )

  def measured(self, snapshot: Snapshot) -> 'Step':
    """Returns the step with one more attempt, its measured growth."""
    after = snapshot.loss(self.as_morph(snapshot.architecture))
    attempt = self.selected.change, after - snapshot.loss()
    step = self.charged(2 * charges.count(snapshot.judging) // 3)
    return dataclasses.replace(step, attempts=(*self.attempts, attempt))

  def halved(self, snapshot: Snapshot, key: jax.Array, samples: int) -> 'Step':
    """Returns the step with half of each u and without prunes."""
    halves = np.full(len(self.candidates), 0.5)
    splits = estimates_lib.scaled(self.splits, self.candidates, halves)
    joint = snapshot.together(splits, [], key, samples)
    selected = dataclasses.replace(
        self.selected,
        scales=self.selected.scales / 2,
        change=joint.change([]),
        prunes=(),
    )
    step = dataclasses.replace(
        self, selected=selected, splits=splits, removed={}
    )
    return step.charged(charges.of_passes(samples, snapshot.judging))

  def report(self, wider: Architecture) -> dict[str, Any]:
    """Returns the receipt of the step.

    Args:
      wider: architecture after the step.
    """
    selected = self.selected
    return {
        'estimated_change': selected.change,
        'attempts': self.attempts,
        'widths': {axis: wider.size(axis) for axis in self.splits},
        'splits': by_axis(self.candidates[i] for i in selected.splits),
        'scales': [round(float(scale), 4) for scale in selected.scales],
        'prunes': by_axis((r.axis, r.unit) for r in selected.prunes),
        'price': selected.price,
        'candidates': len(self.candidates),
        'dropped': self.dropped,
        **({'refused': self.refused} if self.refused else {}),
    }


def by_axis(chosen: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
  """Groups (axis, unit) pairs by axis."""
  result: dict[str, list[int]] = {}
  for axis, unit in chosen:
    result.setdefault(axis, []).append(unit)
  return result
