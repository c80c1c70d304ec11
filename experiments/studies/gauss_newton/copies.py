"""Rivals without any learning: splits that are copies up to noise."""

import dataclasses

from autogrow_jax.methods.gauss_newton import steps

from . import by_gain
from . import common


@dataclasses.dataclass(frozen=True)
class Random(by_gain.RankingByGain):
  """Splits random channels by u in random directions and e = 0.

  It shows the worth of a split without any learning. Gains are random: selected
  by gain per resource, cheap channels are split more often.

  Attributes:
    length: |u| in units of |w|.
  """

  length: float = 1e-2

  def __post_init__(self):
    common.check_positive(self)

  def rank(self, snapshot: steps.Snapshot) -> by_gain.Ranked:
    draw = lambda units: snapshot.rng.random(units)
    return _ranked(snapshot, self.length, draw)


@dataclasses.dataclass(frozen=True)
class Net2Net(by_gain.RankingByGain):
  """Copies random channels up to a little noise (Chen et al. 2016).

  Attributes:
    noise: |u| in units of |w|.
  """

  noise: float = 1e-3

  def __post_init__(self):
    common.check_positive(self)

  def rank(self, snapshot: steps.Snapshot) -> by_gain.Ranked:
    draw = lambda units: snapshot.rng.random(units)
    return _ranked(snapshot, self.noise, draw)


@dataclasses.dataclass(frozen=True)
class Uniform(by_gain.RankingByGain):
  """Copies random channels of the layer that is least widened so far.

  Attributes:
    noise: |u| in units of |w|.
  """

  noise: float = 1e-2

  def __post_init__(self):
    common.check_positive(self)

  def rank(self, snapshot: steps.Snapshot) -> by_gain.Ranked:
    # So steep that differences of cost do not matter.
    draw = lambda units: 10.0 ** (
        -250 * snapshot.rng.permutation(units) / units
    )
    return _ranked(snapshot, self.noise, draw)


def _ranked(snapshot, length, draw):
  """Draws u of a given length in units of |w|, and gains."""
  found = {}
  for site in snapshot.model.sites:
    weights = common.incoming(site, snapshot.trees)
    # Padding has no weights, and gets no noise.
    rows = snapshot.rng.normal(size=weights.shape) * (weights != 0)
    split = common.relative(site, snapshot.trees, rows, length)
    found[site.axis] = split, draw(site.units)
  return common.ranked(snapshot, found, 0)
