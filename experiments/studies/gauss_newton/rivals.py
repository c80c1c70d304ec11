"""Rivals of Gauss-Newton, by the name of the flag.

Each splits units in its own way and ranks them by gains that add up.
"""

from collections.abc import Sequence

from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import sites as sites_lib

from . import by_gain
from . import copies
from . import firefly
from . import gradmax
from . import steepest

RIVALS: dict[str, type[by_gain.RankingByGain]] = {
    'random': copies.Random,
    'net2net': copies.Net2Net,
    'uniform': copies.Uniform,
    'steepest': steepest.Steepest,
    'firefly': firefly.Firefly,
    'gradmax': gradmax.GradMax,
}
# Rivals that can split sites of one writer only.
OF_ONE_WRITER = ('steepest', 'gradmax')


def name_of(chosen: ranking.Ranking) -> str:
  """Returns the flag's name of a rival, or 'gauss_newton'."""
  names = [name for name, kind in RIVALS.items() if type(chosen) is kind]
  return names[0] if names else 'gauss_newton'


def uncovered(
    name: str, sites: Sequence[sites_lib.Site]
) -> dict[str, str]:
  """Returns reasons, by axis, of sites that a rival never splits."""
  return {
      site.axis: f'written by {len(site.form.writers)} layers'
      for site in sites
      if name in OF_ONE_WRITER and len(site.form.writers) > 1
  }
