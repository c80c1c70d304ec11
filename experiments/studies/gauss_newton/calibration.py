"""How estimated changes of the loss compare with measured ones."""

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Agreement of pairs of estimated and measured changes.

  Attributes:
    count: pairs of finite numbers; the others are left out.
    pearson: correlation; NaN if either side is constant.
    spearman: correlation of ranks, equal values sharing their mean rank.
    slope: of the line through the origin that gives the measured changes from
      the estimated ones with least squares. 1 is right on average, below 1 the
      estimates promise too much; NaN if all of them are zero.
    estimated: mean.
    measured: mean.
  """

  count: int
  pearson: float
  spearman: float
  slope: float
  estimated: float
  measured: float


def calibration(
    estimated: jax.typing.ArrayLike, measured: jax.typing.ArrayLike
) -> Calibration:
  """Compares two vectors of changes.

  Args:
    estimated: (candidates,) nats.
    measured: (candidates,) nats.

  Returns:
    The comparison.

  Raises:
    ValueError: they are not two vectors of one length.
  """
  x, y = (np.asarray(side, np.float64) for side in (estimated, measured))
  if x.ndim != 1 or x.shape != y.shape:
    raise ValueError(
        f'Two vectors of one length are compared, got {x.shape} and {y.shape}.'
    )
  finite = np.isfinite(x) & np.isfinite(y)
  x, y = x[finite], y[finite]
  square = float(x @ x)
  mean = lambda side: float(side.mean()) if len(side) else float('nan')
  return Calibration(
      count=len(x),
      pearson=_correlation(x, y),
      spearman=_correlation(_ranks(x), _ranks(y)),
      slope=float(x @ y) / square if square > 0 else float('nan'),
      estimated=mean(x),
      measured=mean(y),
  )


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
  """Pearson's, NaN for a constant side."""
  if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
    return float('nan')
  x, y = x - x.mean(), y - y.mean()
  return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def _ranks(x: np.ndarray) -> np.ndarray:
  """Ranks from 0; equal values share their mean rank."""
  _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
  last = np.cumsum(counts) - 1
  return (last - (counts - 1) / 2)[place]
