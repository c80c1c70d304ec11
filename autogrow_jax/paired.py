"""Paired comparisons of the same examples before and after.

An evaluation is kept as its hits: one bit for each example, right or wrong, in
an order that never changes. Hits are text, since policies carry them through
checkpoints.
"""

import base64
from collections.abc import Sequence

import numpy as np
import scipy


def pack_hits(hits: np.ndarray) -> str:
  """Packs hits, bool (examples,), into base64 text of one bit for each."""
  return base64.b64encode(np.packbits(hits).tobytes()).decode('ascii')


def counts(evaluations: Sequence[str]) -> np.ndarray:
  """Counts the hits of each example, int (examples,), over evaluations.

  Up to seven more examples, which are never hit, fill the last byte.
  """
  packed = np.stack([
      np.frombuffer(base64.b64decode(hits), np.uint8) for hits in evaluations
  ])
  return np.unpackbits(packed, axis=-1).sum(0, dtype=np.int64)


def p_value(before: np.ndarray, after: np.ndarray) -> float:
  """Tests for an improvement by the exact sign test (McNemar), one-sided.

    p = P(X >= gains),  X ~ Binomial(gains + losses, 1/2)

  If every example is as likely to gain as to lose, independently of the others,
  then p is at most alpha with a probability of at most alpha, whatever alpha.

  Args:
    before: hits of each example, int (examples,).
    after: the same after as many evaluations.

  Returns:
    p, from 0 to 1.
  """
  gains = int(np.count_nonzero(after > before))
  losses = int(np.count_nonzero(after < before))
  return float(scipy.stats.binom.sf(gains - 1, gains + losses, 0.5))
