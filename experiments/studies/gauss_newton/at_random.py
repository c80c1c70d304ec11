"""Rivals that split random channels."""

import dataclasses

import jax
import numpy as np

from autogrow_jax.methods.gauss_newton import ranking

from . import common


@dataclasses.dataclass(frozen=True)
class Random(ranking.RankingByGain):
  """Splits random channels by u in random directions and e = 0.

  It shows the worth of a split without any learning. Gains are random: selected
  by gain per resource, cheap channels are split more often.

  Attributes:
    length: |u| in units of |w|.
  """

  length: float = 1e-2

  def __post_init__(self):
    common.check_positive(self)

  def rank(self, architecture, model, trees, batches, key):
    del architecture, batches
    return _ranked(model, trees, key, self.length)


@dataclasses.dataclass(frozen=True)
class Net2Net(ranking.RankingByGain):
  """Copies random channels up to a little noise (Chen et al. 2016).

  Attributes:
    noise: |u| in units of |w|.
  """

  noise: float = 1e-3

  def __post_init__(self):
    common.check_positive(self)

  def rank(self, architecture, model, trees, batches, key):
    del architecture, batches
    return _ranked(model, trees, key, self.noise)


def _ranked(model, trees, key, length):
  """Draws u of a given length in units of |w|, and gains."""
  found = {}
  for index, site in enumerate(model.sites):
    for_u, for_gains = jax.random.split(jax.random.fold_in(key, index))
    rows = jax.random.normal(for_u, (site.units, site.incoming))
    gains = np.asarray(jax.random.uniform(for_gains, (site.units,)))
    u = common.relative(site, trees, common.unit_rows(rows), length)
    split = common.without_e(site, trees, u)
    found[site.axis] = common.RankedSite(
        split, gains, np.ones(site.units, bool)
    )
  return common.ranked(model, trees, found, (), 0)
