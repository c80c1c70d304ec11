"""Paired comparison on the same images before and after, decided exactly.

An evaluation is one bit per example, right or wrong: its hits. A tally counts,
per example, the hits of several evaluations. Between two tallies of equally
many evaluations an example gains, loses or ties, and the one-sided sign test
asks whether the gains outnumber the losses by more than chance.

Hits and tallies are kept as text or bytes, one or a few bits per example, since
they travel through checkpoints.
"""

import base64
import binascii
import fractions
import functools
import math

import numpy as np


def pack_hits(hits: np.ndarray) -> bytes:
  """Packs hits: bool (examples,) -> one bit each, the first one highest."""
  return np.packbits(hits).tobytes()


def check_hits(hits: bytes, *, correct: int, total: int) -> None:
  """Raises ValueError unless hits are `correct` ones among `total` bits."""
  if not isinstance(hits, bytes) or len(hits) != -(-total // 8):
    raise ValueError(
        f'The hits must be {-(-total // 8)} bytes, one bit for each of {total} '
        'examples.'
    )
  bits = int.from_bytes(hits, 'big')
  padding = 8 * len(hits) - total
  if bits.bit_count() != correct or bits & ((1 << padding) - 1):
    raise ValueError(
        f'The hits of {total} examples have {bits.bit_count()} ones; there are '
        f'{correct} correct predictions.'
    )


def empty_tally(*, total: int, most: int) -> str:
  """The tally of no evaluation; see `add_hits`."""
  return _encode(np.zeros(total, np.min_scalar_type(most)), most)


def add_hits(tally: str, hits: bytes, *, total: int, most: int) -> str:
  """Adds one evaluation to a tally.

  Args:
    tally: counts per example, as bit planes in base64: 4/3 characters per byte
      and one bit per example for most = 1, two for 2 or 3, and so on.
    hits: as of `pack_hits`.
    total: number of examples.
    most: number of evaluations that a tally is made for.

  Returns:
    The new tally.
  """
  counts = counts_of(tally, total=total, most=most)
  bits = np.unpackbits(np.frombuffer(hits, np.uint8), count=total)
  return _encode(counts + bits.astype(counts.dtype), most)


@functools.lru_cache(maxsize=512)  # A policy checks its tallies at every epoch.
def counts_of(tally: str, *, total: int, most: int) -> np.ndarray:
  """Hits per example, read-only (total,).

  Raises:
    ValueError: if this is no tally of so many examples and evaluations.
  """
  bits, width = most.bit_length(), -(-total // 8)
  try:
    raw = base64.b64decode(tally, validate=True)
  except (TypeError, ValueError, binascii.Error):
    raw = b''
  if len(raw) != bits * width:
    raise ValueError(
        f'A tally of {total} examples must be {bits * width} bytes in base64, '
        f'got {len(raw)}.'
    )
  planes = np.frombuffer(raw, np.uint8).reshape(bits, width)
  planes = np.unpackbits(planes, axis=-1)
  kind = np.min_scalar_type(most)
  counts = np.zeros(8 * width, kind)
  for bit, plane in enumerate(planes):
    counts |= plane.astype(kind) << kind.type(bit)
  if counts.max() > most or counts[total:].any():
    raise ValueError(
        f'A tally of {total} examples counts up to {counts.max()} hits; it '
        f'must count at most {most}, and no more examples.'
    )
  counts = counts[:total]
  counts.flags.writeable = False
  return counts


def gains_and_losses(
    before: np.ndarray, after: np.ndarray
) -> tuple[int, int]:
  """Numbers of examples that are hit more often, and less often, than before.

  Args:
    before: hits per example, (examples,).
    after: the same, of as many evaluations.
  """
  return (
      int(np.count_nonzero(after > before)),
      int(np.count_nonzero(after < before)),
  )


def p_value(gains: int, losses: int) -> fractions.Fraction:
  """One-sided exact sign test (McNemar's exact test), as an exact fraction.

    p = P(X >= gains),  X ~ Binomial(gains + losses, 1/2)

  If every example is as likely to gain as to lose, independently of the others,
  then p is at most alpha with a probability of at most alpha, whatever alpha.

  Args:
    gains: examples that improved.
    losses: examples that worsened.

  Returns:
    p, from 0 to 1.
  """
  pairs = gains + losses
  if gains <= losses:  # P(X >= g) = 1 - P(X <= g - 1) = 1 - P(X >= pairs-g+1).
    return 1 - _upper_tail(losses + 1, pairs)
  return _upper_tail(gains, pairs)


def _upper_tail(least: int, pairs: int) -> fractions.Fraction:
  """P(X >= least) for X ~ Binomial(pairs, 1/2), least above the mean.

  Sums whichever has fewer terms: the tail, or what lies between it and its
  mirror image, which is the rest.
  """
  if least > pairs:
    return fractions.Fraction(0)
  ways = math.comb(pairs, least)
  if pairs - least < 2 * least - pairs:
    tail = 0
    for successes in range(least, pairs + 1):
      tail += ways
      ways = ways * (pairs - successes) // (successes + 1)
    return fractions.Fraction(tail, 2**pairs)
  middle = 0
  for successes in range(least - 1, pairs - least, -1):
    ways = ways * (successes + 1) // (pairs - successes)
    middle += ways
  return fractions.Fraction(2**pairs - middle, 2 ** (pairs + 1))


def _encode(counts: np.ndarray, most: int) -> str:
  shifts = range(most.bit_length())
  planes = [np.packbits((counts >> counts.dtype.type(b)) & 1) for b in shifts]
  return base64.b64encode(np.concatenate(planes).tobytes()).decode('ascii')
