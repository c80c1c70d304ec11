"""Splits of channels, and their effect on the readers.

Symbols, per channel of a site:

  u (incoming,)   change of the incoming weights, + for one child, - for the
                  other
  e (outgoing,)   change of the outgoing weights, on top of a half each
  s, c            <d, dz> and <d', dz> of an example, see `signals`

The model of the loss is mean(s) + mean(c^2) / 2, independent for each channel.
"""

from collections.abc import Sequence
import functools

from flax import struct
import jax
import jax.numpy as jnp

from autogrow_jax.methods.gauss_newton import matrix_free
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib

Model, Trees = signals_lib.Model, signals_lib.Trees
Site, Signal = sites_lib.Site, signals_lib.Signal
Batch = tuple[jax.Array, jax.Array]


@struct.dataclass
class Split:
  """Parameters of the splits of all units of a site.

  Attributes:
    u: per writer, an array in the shape of its kernel.
    e: per reader, an array in the shape of its kernel.
  """

  u: tuple[jax.Array, ...]
  e: tuple[jax.Array, ...]


Splits = dict[str, Split]  # By axis.


@functools.partial(jax.jit, static_argnums=0)
def start(model: Model, trees: Trees, key: jax.Array) -> Splits:
  """Returns splits that change nothing and can be learned from.

  u = 0, and each child feeds a random half of the consumers: e = +-v/2. With
  e = 0, too, all gradients would be zero.
  """
  splits = {}
  for index, site in enumerate(model.sites):
    kernels = [trees.kernel(reader.layer) for reader in site.readers]
    widths = [kernel.shape[-1] for kernel in kernels]
    signs = jax.random.rademacher(
        jax.random.fold_in(key, index),
        (site.units, sum(widths)),
        kernels[0].dtype,
    )
    splits[site.axis] = Split(
        u=tuple(
            jnp.zeros_like(trees.kernel(writer.layer))
            for writer in site.writers
        ),
        e=tuple(
            kernel / 2 * jnp.expand_dims(own, range(kernel.ndim - 2))
            for kernel, own in zip(
                kernels, sites_lib.cut(signs, widths), strict=True
            )
        ),
    )
  return splits


def differences(
    site: Site, trees: Trees, signal: Signal, u: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, jax.Array], ...]:
  """Computes the change of the readers' input.

  Args:
    u: u of a `Split`.

  Returns:
    Per reader the change of the mean over the children, (T(h+r) + T(h-r)) / 2 -
    T(h), and their difference, T(h+r) - T(h-r), each (batch, ..., units).
  """
  return _differences(site, trees, signal, responses(site, trees, signal, u))


def responses(
    site: Site, trees: Trees, signal: Signal, u: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
  """Computes r: the change of the children's pre-activations per writer."""
  return tuple(
      _by_unit(writer.layer.linear(x, own), trees.factor(writer))
      for writer, x, own in zip(site.writers, signal.x, u, strict=True)
  )


def projections(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, jax.Array]:
  """Computes s and c of every unit, over all readers: (batch, units) each."""
  both = differences(site, trees, signal, split.u)
  return tuple(
      _project(site, trees, split.e, both, gradients)
      for gradients in (signal.slope, signal.curvature)
  )


def incoming_rows(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, jax.Array]:
  """Derives s and c by each unit's u: (batch, units, incoming) each."""
  return _rows(site, trees, signal, split, 'u')


def outgoing_rows(
    site: Site, trees: Trees, signal: Signal, split: Split
) -> tuple[jax.Array, jax.Array]:
  """Derives s and c by each unit's e: (batch, units, outgoing) each."""
  return _rows(site, trees, signal, split, 'e')


def _rows(site, trees, signal, split, block):
  return tuple(
      linear(site, trees, signal, split, block, gradients).rows()
      for gradients in (signal.slope, signal.curvature)
  )


def linear(
    site: Site,
    trees: Trees,
    signal: Signal,
    split: Split,
    block: str,
    gradients: tuple[jax.Array, ...],
) -> matrix_free.Linear:
  """Writes <gradients, dz> of all units as a linear function of a block.

  Args:
    split: point of the linearisation.
    block: 'u' or 'e'.
    gradients: per reader, gradient at its output.
  """
  if block == 'e':
    both = differences(site, trees, signal, split.u)
    return matrix_free.Linear(
        reads=tuple(between for _, between in both),
        gradients=gradients,
        layers=tuple(reader.layer for reader in site.readers),
        dim=sites_lib.READ,
    )

  def total(r):
    both = _differences(site, trees, signal, r)
    return _project(site, trees, split.e, both, gradients).sum()

  # Examples and units are independent, so the gradient of the sum holds the
  # gradient of each.
  at_h = jax.grad(total)(responses(site, trees, signal, split.u))
  return matrix_free.Linear(
      reads=signal.x,
      gradients=tuple(
          _by_unit(values, trees.factor(writer))
          for writer, values in zip(site.writers, at_h, strict=True)
      ),
      layers=tuple(writer.layer for writer in site.writers),
      dim=sites_lib.WRITTEN,
  )


@functools.partial(jax.jit, static_argnums=0)
def balanced(
    model: Model, trees: Trees, splits: Splits, trust: float
) -> Splits:
  """Replaces (u, e) by (t u, e / t), t >= 1, which is equal to leading order.

  A small u with a large e acts through the difference of two large and nearly
  equal children, which the first training steps destroy. So u and e get the
  same length in units of w and v, as far as u stays within trust.

  Args:
    trust: largest length of u in units of w.
  """
  kernels = lambda ends: tuple(trees.kernel(end.layer) for end in ends)
  return {
      site.axis: _balanced(
          splits[site.axis], kernels(site.writers), kernels(site.readers), trust
      )
      for site in model.sites
  }


def _balanced(split, writers, readers, trust):
  norm = lambda rows: jnp.linalg.norm(rows, axis=-1)
  share = lambda part, whole: norm(part) / jnp.maximum(norm(whole), 1e-30)
  u = share(incoming(split.u), incoming(writers))
  e = share(outgoing(split.e), outgoing(readers))
  safe = jnp.where(u > 0, u, 1)
  t = jnp.maximum(jnp.minimum(jnp.sqrt(e / safe), trust / safe), 1)
  t = jnp.where(u > 0, t, 1)[:, None]
  return Split(
      as_incoming(incoming(split.u) * t, split.u),
      as_outgoing(outgoing(split.e) / t, split.e),
  )


def incoming(kernels: Sequence[jax.Array]) -> jax.Array:
  """Flattens arrays in the shapes of writers' kernels to (units, incoming)."""
  return sites_lib.rows(kernels, sites_lib.WRITTEN)


def as_incoming(
    rows: jax.Array, like: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
  """Inverts `incoming`."""
  return sites_lib.kernels_of(rows, like, sites_lib.WRITTEN)


def outgoing(kernels: Sequence[jax.Array]) -> jax.Array:
  """Flattens arrays in the shapes of readers' kernels to (units, outgoing)."""
  return sites_lib.rows(kernels, sites_lib.READ)


def as_outgoing(
    rows: jax.Array, like: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
  """Inverts `outgoing`."""
  return sites_lib.kernels_of(rows, like, sites_lib.READ)


def _differences(site, trees, signal, r):
  plus, minus, middle = (
      site.activations(trees.weights, trees.stats, signal.entered, h)
      for h in (
          jax.tree.map(jnp.add, signal.h, r),
          jax.tree.map(jnp.subtract, signal.h, r),
          signal.h,
      )
  )
  return tuple(
      ((one + other) / 2 - old, one - other)
      for one, other, old in zip(plus, minus, middle, strict=True)
  )


def _project(site, trees, e, both, gradients):
  """Computes <gradient, dz> of every unit over all readers, (batch, units).

  The gradient is pulled back through each reader, so that no unit's dz is
  formed.
  """
  total = 0
  for reader, differences_, own, gradient in zip(
      site.readers, both, e, gradients, strict=True
  ):
    kernels = trees.kernel(reader.layer), own
    for difference, kernel in zip(differences_, kernels, strict=True):
      product = difference * reader.layer.transposed(
          gradient, kernel, difference.shape
      )
      total = total + product.sum(tuple(range(1, product.ndim - 1)))
  return total


def _by_unit(values, factor):
  """Scales values, units in the last dimension, by a factor of each."""
  return values * factor.reshape((1,) * (values.ndim - 1) + (-1,))
