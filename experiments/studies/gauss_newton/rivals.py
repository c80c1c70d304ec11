"""Rivals of Gauss-Newton, by the name of the flag.

Each splits units in its own way and ranks them by gains that add up.
"""

from collections.abc import Sequence

from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import sites as sites_lib

from . import at_random
from . import common
from . import firefly
from . import gradmax
from . import steepest

RIVALS: dict[str, type[ranking.RankingByGain]] = {
    'random': at_random.Random,
    'net2net': at_random.Net2Net,
    'steepest': steepest.Steepest,
    'firefly': firefly.Firefly,
    'gradmax': gradmax.GradMax,
}
# Rivals that can split sites of one writer only.
OF_ONE_WRITER = ('steepest', 'gradmax')
# Rivals whose gains are in nats.
IN_NATS = ('steepest', 'firefly')


def name_of(chosen: ranking.Ranking) -> str:
  """Returns the flag's name of a rival, or 'gauss_newton'."""
  names = [name for name, kind in RIVALS.items() if type(chosen) is kind]
  return names[0] if names else 'gauss_newton'


def uncovered(
    name: str, sites: Sequence[sites_lib.Site]
) -> tuple[tuple[str, str], ...]:
  """Lists (axis, reason) of sites that a rival never splits.

  It may refuse others for what lies behind them; `Ranked.refused` lists all.
  """
  return common.with_several_writers(sites) if name in OF_ONE_WRITER else ()
