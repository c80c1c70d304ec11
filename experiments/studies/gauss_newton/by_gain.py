"""The protocol for rivals, which rank splits by gains that add up."""

import abc
import dataclasses

import numpy as np

from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import selection as selection_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps


@dataclasses.dataclass(frozen=True)
class Ranked:
  """Splits of all units of all sites, ranked by their gains.

  Attributes:
    splits: splits of every unit of every site.
    gains: (candidates,) gain of each unit: nats, or any score that is larger
      for better splits; NaN for units that cannot be split.
    images: cost, images of training steps.
    one_sided: true if units are new channels, see `surgery.morph`.
    refused: axes that cannot be split in this way, with reasons.
  """

  splits: splits_lib.Splits
  gains: np.ndarray
  images: int
  one_sided: bool = False
  refused: str = ''


class RankingByGain(ranking.Ranking):
  """A way to split and rank units whose gains are taken to add up.

  Splits are picked by gain per resource and applied without scaling. Nothing is
  pruned, and every step is taken.
  """

  @abc.abstractmethod
  def rank(self, snapshot: steps.Snapshot) -> Ranked:
    """Splits all units, in the order of `Model.candidates`."""

  def step(
      self, snapshot: steps.Snapshot, limits: selection_lib.Limits
  ) -> steps.Step:
    model, ranked = snapshot.model, self.rank(snapshot)
    usable = np.isfinite(ranked.gains)
    gains = np.where(usable, ranked.gains, 0)
    picked, price = selection_lib.greedy(
        snapshot.architecture, model.candidates, usable, limits, lambda: gains
    )
    scales = np.zeros(len(gains))
    scales[picked] = 1
    step = steps.Step(
        splits=steps.by_axis(model.candidates[i] for i in picked),
        parameters=ranked.splits,
        images=ranked.images,
        one_sided=ranked.one_sided,
        must_help=False,
        report={
            'price': max(limits.price, price),
            'candidates': len(gains),
            'dropped': int(np.count_nonzero(~usable)),
            **({'refused': ranked.refused} if ranked.refused else {}),
        },
    )
    if ranked.one_sided:  # New channels change nothing at first.
      return step
    joint = estimates_lib.estimate(
        model, snapshot.trees, ranking.scaled(model, ranked.splits, scales),
        snapshot.judging, snapshot.rng, samples=snapshot.samples,
    )
    change = joint.change(np.concatenate([scales, 0 * scales]))
    return dataclasses.replace(step, change=change)
