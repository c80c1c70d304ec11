"""The protocol for ways to choose splits, and the one for ways that rank them.

A value is a frozen, hashable dataclass of settings. A configuration names it by
its kind: `KINDS`, or 'package.module:Class'.
"""

import abc
from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps

KINDS = {
    'learned': 'autogrow_jax.methods.gauss_newton.learned_splits:LearnedSplits'
}


class Ranking(abc.ABC):
  """A way to choose a growth step."""

  @abc.abstractmethod
  def step(
      self, snapshot: steps.Snapshot, limits: selection.Limits, samples: int
  ) -> steps.Step:
    """Chooses a step.

    Args:
      snapshot: the network and examples.
      limits: limits of the step.
      samples: number of sampled labels per example for estimates.

    Returns:
      The step at its whole length, and its cost.
    """


@dataclasses.dataclass(frozen=True)
class Ranked:
  """Splits of all units of all sites, ranked by their gains.

  Attributes:
    splits: splits of every unit of every site.
    gains: (candidates,) float64 gain of each unit, in the order of the sites
      and their units: nats, or any score that is larger for better splits.
    usable: (candidates,) true for units that may be split.
    one_sided: true if units are new channels, see `surgery.morph`.
    examples_seen: images of training steps spent.
    refused: (axis, reason) of sites that cannot be split in this way.
  """

  splits: splits_lib.Splits
  gains: np.ndarray
  usable: np.ndarray
  one_sided: bool
  examples_seen: int
  refused: tuple[tuple[str, str], ...]


class RankingByGain(Ranking):
  """A way to split and rank units whose gains are taken to add up.

  Splits are picked by gain per resource and applied without scaling. Nothing is
  pruned, and every step is taken.
  """

  @abc.abstractmethod
  def rank(
      self,
      architecture: architecture_lib.Architecture,
      model: signals_lib.Model,
      trees: signals_lib.Trees,
      batches: Sequence[splits_lib.Batch],
      key: jax.Array,
  ) -> Ranked:
    """Splits all units.

    Args:
      architecture: architecture of the network.
      model: the network and its sites.
      trees: arrays of the network.
      batches: examples to learn from, at least one batch.
      key: key of all randomness.

    Returns:
      The splits and their gains.
    """

  def step(
      self, snapshot: steps.Snapshot, limits: selection.Limits, samples: int
  ) -> steps.Step:
    architecture, model = snapshot.architecture, snapshot.model
    ranked = self.rank(
        architecture, model, snapshot.trees, snapshot.learning, snapshot.key(0)
    )
    candidates = estimates_lib.candidates_of(model)
    selected = selection.by_gain(
        architecture, candidates, ranked.gains, ranked.usable, limits
    )
    images, change = ranked.examples_seen, 0.0
    if not ranked.one_sided:  # New channels change nothing at first.
      chosen = np.zeros(len(candidates))
      chosen[list(selected.splits)] = 1
      splits = estimates_lib.scaled(ranked.splits, candidates, chosen)
      joint = snapshot.together(splits, [], snapshot.key(1), samples)
      change = joint.change([])
      images += charges.of_passes(samples, snapshot.judging)
    return steps.Step(
        dataclasses.replace(selected, change=change),
        ranked.splits,
        {},
        candidates,
        int(np.count_nonzero(~ranked.usable)),
        images,
        one_sided=ranked.one_sided,
        must_help=False,
        refused='; '.join(f'{a}: {reason}' for a, reason in ranked.refused),
    )
