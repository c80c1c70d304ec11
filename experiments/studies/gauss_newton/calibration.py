"""Agreement of estimated with measured changes of the loss."""

import dataclasses

import jax
import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Agreement of pairs of estimated and measured changes.

  Attributes:
    count: number of finite pairs; the others are left out.
    pearson: correlation; NaN if either side is constant.
    spearman: correlation of ranks.
    slope: slope of the line through the origin that gives the measured changes
      from the estimated ones with least squares: 1 is right on average, below 1
      the estimates promise too much; NaN if all of them are zero.
    estimated: mean estimate.
    measured: mean measurement.
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
  """Compares two vectors of changes, nats.

  Raises:
    ValueError: if they are not two vectors of one length.
  """
  x, y = (np.asarray(side, np.float64) for side in (estimated, measured))
  if x.ndim != 1 or x.shape != y.shape:
    raise ValueError(
        f'Two vectors of one length are compared, got {x.shape} and {y.shape}.'
    )
  finite = np.isfinite(x) & np.isfinite(y)
  x, y = x[finite], y[finite]
  varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
  square = float(x @ x)
  mean = lambda side: float(side.mean()) if len(side) else float('nan')
  correlate = lambda rule: (
      float(rule(x, y).statistic) if varies else float('nan')
  )
  return Calibration(
      count=len(x),
      pearson=correlate(stats.pearsonr),
      spearman=correlate(stats.spearmanr),
      slope=float(x @ y) / square if square > 0 else float('nan'),
      estimated=mean(x),
      measured=mean(y),
  )
