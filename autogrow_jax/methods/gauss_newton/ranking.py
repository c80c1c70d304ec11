"""The protocol by which a study gives `GaussNewton` another way to split."""

from collections.abc import Sequence
import dataclasses
from typing import Protocol

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib


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


class Ranking(Protocol):
  """A way to split and rank units: a frozen, hashable dataclass of settings.

  Gains are taken to add up. Splits are picked by gain per resource and applied
  without scaling; nothing is pruned, and every step is taken.
  """

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
    ...
