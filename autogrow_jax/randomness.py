"""Named random streams.

One root key per run; a stream is the root with the CRC-32 of a name folded in,
and a draw is the stream with an index (step, epoch) folded in. Nothing is ever
split, so adding a stream cannot shift another.
"""

import zlib

import jax


def stream(key: jax.Array, name: str) -> jax.Array:
  """The stream of a name: 'init', 'data', 'augment', 'growth', a block, ..."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))
