"""Rivals without any learning: splits that are copies up to noise."""

import dataclasses

import numpy as np

from autogrow_jax.methods.gauss_newton import steps

from . import by_gain
from . import common


@dataclasses.dataclass(frozen=True)
class _Drawn(by_gain.RankingByGain):
  """Splits by u in random directions and e = 0, with random gains.

  Attributes:
    noise: |u| in units of |w|.
  """

  noise: float = 1e-2

  def __post_init__(self):
    common.check_positive(self)

  def rank(self, snapshot: steps.Snapshot) -> by_gain.Ranked:
    found = {}
    for site in snapshot.model.sites:
      weights = common.incoming(site, snapshot.trees)
      # Padding has no weights, and gets no noise.
      rows = snapshot.rng.normal(size=weights.shape) * (weights != 0)
      split = common.relative(site, snapshot.trees, rows, self.noise)
      found[site.axis] = split, self._gains(snapshot.rng, site.units)
    return common.ranked(snapshot, found, 0)

  def _gains(self, rng: np.random.Generator, units: int) -> np.ndarray:
    return rng.random(units)


@dataclasses.dataclass(frozen=True)
class Random(_Drawn):
  """Splits random channels in random directions.

  It shows the worth of a split without any learning: selected by gain per
  resource, cheap channels are split more often.
  """


@dataclasses.dataclass(frozen=True)
class Net2Net(_Drawn):
  """Copies random channels up to a little noise (Chen et al. 2016)."""

  noise: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Uniform(_Drawn):
  """Copies random channels of the layer that is least widened so far."""

  def _gains(self, rng: np.random.Generator, units: int) -> np.ndarray:
    # So steep that differences of cost do not matter.
    return 10.0 ** (-250 * rng.permutation(units) / units)
