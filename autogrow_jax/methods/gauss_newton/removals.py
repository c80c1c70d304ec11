"""Removal of units, and its effect on the readers.

Unit c is removed, and others take over: a reader's input a_c is replaced by

  r_0 + sum over j != c of r_j a_j,

which adds r_j v_c to the outgoing weights of a_j, and a constant to the
reader's output. With weights w = r and w_c = -1, and R_nj the product of the
gradient of example n with v_c a_j (with the constant for j = 0), s_n = R_n'w.

Several units of an axis are removed one after another. Unit d has then taken
over from those before it: its outgoing weights are no longer v_d but a mixture

  sum_i m_i v_i,   m = e_d + sum over the c before it of r_cd m_c,

and its R is the same mixture of their R.
"""

from collections.abc import Sequence
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import taps

_EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Removal:
  """One unit to prune, after the earlier removals of its axis.

  Attributes:
    axis: axis of the unit.
    unit: number of the unit before the step.
    weights: (readers, units + 1) w, the constant's last; 0 for removed units.
    mixture: (readers, units) m.
  """

  axis: str
  unit: int
  weights: np.ndarray
  mixture: np.ndarray


def alone(axis: str, unit: int, weights: np.ndarray) -> Removal:
  """Returns the first removal of an axis; see `Removal` for the weights."""
  return Removal(axis, unit, weights, unmixed(weights.shape, unit))


def unmixed(shape: tuple[int, int], unit: int) -> np.ndarray:
  """Returns the mixture of a unit that has taken over nothing."""
  mixture = np.zeros((shape[0], shape[1] - 1))
  mixture[:, unit] = 1
  return mixture


def activations(
    site: sites_lib.Site, trees: signals_lib.Trees, signal: signals_lib.Signal
) -> tuple[jax.Array, ...]:
  """Returns the input of each reader, (batch, ..., units)."""
  return site.activations(
      trees.weights, trees.stats, signal.entered, signal.h
  )


def flat(a: jax.Array) -> jax.Array:
  """Flattens positions: (batch, positions, channels)."""
  return a.reshape(len(a), -1, a.shape[-1])


def outgoing_sum(kernel: jax.Array) -> jax.Array:
  """Computes a reader's response to a constant 1 inside the border."""
  return kernel.reshape(-1, *kernel.shape[-2:]).sum(0)


def received(
    layer: taps.Layer,
    kernel: jax.Array,
    shape: tuple[int, ...],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Pulls an output gradient back to each input unit of a kernel.

  Args:
    layer: a reader.
    kernel: (..., units, out) of any units.
    shape: (batch, ..., channels), shape of the reader's input.
    gradient: (batch, ..., out).

  Returns:
    (batch, positions, units); and (batch, units) for a constant at every output
    position, also at the border.
  """
  pulled = layer.transposed(gradient, kernel, (*shape[:-1], kernel.shape[-2]))
  constant = jnp.einsum(
      'bpo,co->bc', flat(gradient), outgoing_sum(kernel), precision=_EXACT
  )
  return flat(pulled), constant


def projected(
    site: sites_lib.Site,
    trees: signals_lib.Trees,
    inputs: Sequence[jax.Array],
    gradients: Sequence[jax.Array],
    weights: jax.Array,
    mixtures: jax.Array,
) -> jax.Array:
  """Computes <gradients, dz> of some removals.

  Args:
    inputs: per reader, (batch, ..., units) as by `activations`.
    gradients: per reader, (batch, ..., out).
    weights: (removals, readers, units + 1).
    mixtures: (removals, readers, units).

  Returns:
    (batch, removals).
  """
  total = 0.0
  for reader, a, gradient, w, m in zip(
      site.readers,
      inputs,
      gradients,
      jnp.moveaxis(weights, 1, 0),
      jnp.moveaxis(mixtures, 1, 0),
      strict=True,
  ):
    kernel = jnp.einsum(
        '...io,ni->...no', trees.kernel(reader.layer), m, precision=_EXACT
    )
    pulled, constant = received(reader.layer, kernel, a.shape, gradient)
    read = jnp.einsum('bpj,nj->bpn', flat(a), w[:, :-1], precision=_EXACT)
    total += (pulled * read).sum(1) + constant * w[None, :, -1]
  return total
