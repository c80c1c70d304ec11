"""Splits of channels: their effect on the readers, and how they are learned.

Symbols, per channel of a site:

  u (incoming,)   change of the incoming weights, + for one child, - for the
                  other
  e (outgoing,)   change of the outgoing weights, on top of a half each
  s, c            <d, dz> and <d', dz> of an example, see `signals`

The model of the loss is mean(s) + mean(c^2) / 2, independent for each channel.
It is quadratic in u and in e alone, so the two are found by alternating damped
least squares on frozen weights. All channels of a layer share one Gram matrix:
with psi_c the derivative of c by u or e of one channel,

  K_c = mean psi_c psi_c'  is taken to be  K tr(K_c) / tr(K),  K = sum_c K_c.

The programs here depend on the form of one site only. Linear systems are solved
on the host: on CPUs, two batched factorisations of one compiled program can
deadlock, each waiting for threads that the other holds (jaxlib 0.10.2).
"""

from collections.abc import Mapping, Sequence
import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import common

Batch, Model, Trees = signals_lib.Batch, signals_lib.Model, signals_lib.Trees
Form, Signal, Site = sites_lib.Form, signals_lib.Signal, sites_lib.Site
Kernels = tuple[jax.Array, ...]
WRITTEN, READ = sites_lib.WRITTEN, sites_lib.READ

# Below it, a Gram matrix carries no information about its channel.
DEAD_TRACE = 1e-10


@struct.dataclass
class Split:
  """Parameters of the splits of all units of a site, padded.

  Attributes:
    u: per writer, an array in the shape of its kernel.
    e: per reader, an array in the shape of its kernel.
  """

  u: Kernels
  e: Kernels

  def scaled(self, u: np.ndarray, e: np.ndarray) -> 'Split':
    """Multiplies u and e by a factor of each unit, which 0 makes 0."""
    return Split(*(
        tuple(
            np.where(factor == 0, 0, kernel * factor).astype(kernel.dtype)
            for kernel in map(np.asarray, kernels)
        )
        for kernels, factor in ((self.u, u), (self.e, e[:, None]))
    ))


Splits = dict[str, Split]  # By axis.
_DIMS = {'u': WRITTEN, 'e': READ}


@dataclasses.dataclass(frozen=True)
class LearnConfig:
  """Settings of alternating least squares.

  More sweeps, or less damping, leave the region where the quadratic model
  holds.
  """

  curvature: str = dataclasses.field(
      default='mc',
      metadata={
          'help': 'Curvature of the loss: mc (labels sampled from the '
                  'model) or rank1 (from the true labels).'
      },
  )
  sweeps: int = dataclasses.field(
      default=2,
      metadata={'help': 'Alternating sweeps over both halves of the splits.'},
  )
  damping: float = dataclasses.field(
      default=0.3,
      metadata={'help': 'Damping of each solve, in mean eigenvalues.'},
  )
  trust: float = dataclasses.field(
      default=0.5,
      metadata={'help': 'Largest step in a sweep, in norms of the weights.'},
  )

  def __post_init__(self):
    common.check_choice('curvature', self.curvature, signals_lib.CURVATURES)
    for name in ('sweeps', 'damping', 'trust'):
      if not 0 < getattr(self, name) < float('inf'):
        raise ValueError(f'{name} is positive, got {getattr(self, name)}.')


@dataclasses.dataclass(frozen=True)
class Learned:
  """Learned splits, and what the same examples say about activations.

  Attributes:
    splits: splits of every site; u = 0 where nothing can be learned.
    moments: per axis, (readers, units + 1, units + 1) second moments of the
      readers' inputs and 1, averaged over positions; padded.
  """

  splits: Splits
  moments: Mapping[str, np.ndarray]


def start(model: Model, trees: Trees, rng: np.random.Generator) -> Splits:
  """Returns splits that change nothing and can be learned from.

  u = 0, and each child feeds a random half of the consumers: e = +-v/2. With
  e = 0, too, all gradients would be zero.
  """
  splits = {}
  for site in model.sites:
    local = trees.local(site)
    writers, readers = (
        tuple(map(np.asarray, local.kernels(ends)))
        for ends in (site.form.writers, site.form.readers)
    )
    splits[site.axis] = Split(
        tuple(map(np.zeros_like, writers)),
        tuple(
            kernel * rng.choice(np.float32([-0.5, 0.5]), kernel.shape[-2:])
            for kernel in readers
        ),
    )
  return splits


def learn(
    model: Model,
    trees: Trees,
    batches: Sequence[Batch],
    rng: np.random.Generator,
    config: LearnConfig = LearnConfig(),
) -> Learned:
  """Learns the splits of all units of all sites.

  Each block of each sweep sees all examples, with other sampled labels.
  """
  splits = start(model, trees, rng)
  local = {site.axis: trees.local(site) for site in model.sites}
  for number in range(2 * config.sweeps):
    block = 'ue'[number % 2]
    parts = {site.axis: [] for site in model.sites}
    for batch in batches:
      seed = rng.integers(2**32, dtype='u4')
      _, found = signals_lib.signals(
          model, trees, batch, seed, curvature=config.curvature
      )
      for site, signal in zip(model.sites, found, strict=True):
        axis = site.axis
        parts[axis].append(
            moments(site.form, block, local[axis], signal, splits[axis])
        )
    sums = {axis: signals_lib.add(parts[axis]) for axis in parts}
    splits = {
        site.axis: _stepped(
            site, local[site.axis], splits[site.axis], block,
            sums[site.axis], signals_lib.count(batches), config,
        )
        for site in model.sites
    }
  count = signals_lib.count(batches)
  activations = {axis: one['activations'] / count for axis, one in sums.items()}
  return Learned(splits, activations)


def _stepped(
    site: Site,
    local: Trees,
    split: Split,
    block: str,
    sums: Mapping[str, np.ndarray],
    count: int,
    config: LearnConfig,
) -> Split:
  """Takes the damped Gauss-Newton step of one block, that of u within trust."""
  gram, traces = sums['gram'] / count, sums['traces'] / count
  size = site.incoming if block == 'u' else site.outgoing
  trace = np.trace(gram)
  steps = np.zeros(sums['gradient'].shape)
  if trace > DEAD_TRACE and np.isfinite(trace):
    damped = gram + config.damping * trace / size * np.eye(len(gram))
    alive = (traces > DEAD_TRACE) & np.isfinite(sums['gradient']).all(-1)
    gradient = np.where(alive[:, None], sums['gradient'] / count, 0)
    share = np.where(alive, traces / trace, 1)
    solution = linalg.solve(damped, gradient.T, assume_a='pos').T
    steps = -solution / share[:, None]
  kernels = getattr(split, block)
  if block == 'u':
    weights = rows_of(local.kernels(site.form.writers), 'u')
    limits = config.trust * np.linalg.norm(weights, axis=-1)
    lengths = np.maximum(np.linalg.norm(steps, axis=-1), 1e-30)
    steps *= np.minimum(1, limits / lengths)[:, None]
  return split.replace(**{block: plus(kernels, steps, _DIMS[block])})


def plus(kernels: Kernels, rows: np.ndarray, dim: int) -> Kernels:
  """Adds (units, weights) to kernels whose units are along a dimension."""
  result, begin = [], 0
  for kernel in map(np.asarray, kernels):
    shape = np.moveaxis(kernel, dim, 0).shape
    end = begin + kernel.size // shape[0]
    block = np.moveaxis(rows[:, begin:end].reshape(shape), 0, dim)
    result.append((kernel + block).astype(kernel.dtype))
    begin = end
  return tuple(result)


def rows_of(kernels: Kernels, block: str) -> np.ndarray:
  """Flattens kernels along u or e of each unit, to (units, weights)."""
  kernels = (np.moveaxis(np.asarray(k), _DIMS[block], 0) for k in kernels)
  return np.concatenate([k.reshape(len(k), -1) for k in kernels], -1)


def balanced(
    model: Model, trees: Trees, splits: Splits, trust: float
) -> Splits:
  """Replaces (u, e) by (t u, e / t), t >= 1, which is equal to leading order.

  A small u with a large e acts through the difference of two large and nearly
  equal children, which the first training steps destroy. So u and e get the
  same length in units of w and v, as far as u stays within trust.
  """
  result = {}
  for site in model.sites:
    local, split = trees.local(site), splits[site.axis]

    def share(block, ends, local=local, split=split):
      whole = np.linalg.norm(rows_of(local.kernels(ends), block), axis=-1)
      rows = rows_of(getattr(split, block), block)
      return np.linalg.norm(rows, axis=-1) / np.maximum(whole, 1e-30)

    u, e = share('u', site.form.writers), share('e', site.form.readers)
    safe = np.where(u > 0, u, 1)
    t = np.maximum(np.minimum(np.sqrt(e / safe), trust / safe), 1)
    t = np.where(u > 0, t, 1)
    result[site.axis] = split.scaled(t, 1 / t)
  return result


def no_prunes(model: Model, trees: Trees) -> dict[str, np.ndarray]:
  """Returns w = 0 for all units, see `estimates.compensated`."""
  result = {}
  for site in model.sites:
    kernel, *rest = trees.local(site).kernels(site.form.readers)
    units = kernel.shape[READ]
    result[site.axis] = np.zeros((units, 1 + len(rest), units + 1), 'f4')
  return result


@taps.program(0)
def project(
    form: Form, local: Trees, signal: Signal, split: Split, taken: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes s and c of every split and every prune of a site on a batch.

  Args:
    form: the site's form.
    local: its arrays.
    signal: its signal.
    split: splits of all units.
    taken: (units, readers, units + 1) w of prunes, see `estimates`.

  Returns:
    s and c over all readers, (batch, 2 * units) each, splits first.
  """
  with jax.default_matmul_precision('highest'):
    r = _responses(form, local, signal, split.u)
    changes, inputs = _spread(form, local, signal, r)
    shapes = [a.shape for a in inputs]
    return tuple(
        jnp.concatenate([
            _projected(changes, _received(form, local, split, g, shapes)),
            _pruned(form, local, inputs, g, taken),
        ], -1)
        for g in (signal.slope, signal.curvature)
    )


@taps.program(0, 1)
def moments(
    form: Form, block: str, local: Trees, signal: Signal, split: Split
) -> dict[str, jax.Array]:
  """Sums the statistics of a block's solve over a batch.

  Returns:
    'gram' (d, d), sum of outer products of all psi; 'traces' (units,), the sum
    of their squares; 'gradient' (units, d) of the model; and 'activations'.
  """
  with jax.default_matmul_precision('highest'):
    r = _responses(form, local, signal, split.u)
    changes, pull, inputs = jax.vjp(
        lambda r: _spread(form, local, signal, r), r, has_aux=True
    )
    shapes = [a.shape for a in inputs]
    slopes, curvatures = (
        _received(form, local, split, gradients, shapes)
        for gradients in (signal.slope, signal.curvature)
    )
    c = _projected(changes, curvatures)
    if block == 'u':
      pulled = [
          _scaled(form, local, pull(received)[0])
          for received in (slopes, curvatures)
      ]
      ends, reads = form.writers, signal.x
      products = ['bptd,bpu->butd'] * len(ends)
    else:
      pulled = signal.slope, signal.curvature
      ends, reads = form.readers, [between for _, between in changes]
      products = ['bptu,bpo->buto'] * len(ends)
    slope, psi = (
        _rows(ends, reads, gradients, products) for gradients in pulled
    )
    flat = psi.reshape(-1, psi.shape[-1])
    return {
        'gram': flat.T @ flat,
        'traces': jnp.square(psi).sum((0, 2)),
        'gradient': slope.sum(0) + jnp.einsum('bu,bud->ud', c, psi),
        'activations': second_moments(inputs),
    }


def _responses(form, local, signal, u):
  """Computes r: the change of the children's pre-activations per writer."""
  linear = [
      writer.layer.linear(x, kernel)
      for writer, x, kernel in zip(form.writers, signal.x, u, strict=True)
  ]
  return _scaled(form, local, linear)


def _scaled(form, local, values):
  """Multiplies values at the writers by the factors of their norms."""
  return tuple(
      value * local.factor(writer).reshape((1,) * (value.ndim - 1) + (-1,))
      for writer, value in zip(form.writers, values, strict=True)
  )


def _spread(form, local, signal, r):
  """Computes the change of the readers' inputs for changes r of h.

  Returns:
    Per reader the change of the mean over the children, (T(h+r) + T(h-r)) / 2 -
    T(h), and their difference, T(h+r) - T(h-r), each (batch, ..., units); and
    T(h) of each reader.
  """
  # One pass for all three is traced and compiled once.
  h = tuple(
      jnp.concatenate([h + r, h - r, h])
      for h, r in zip(signal.h, r, strict=True)
  )
  entered = jnp.concatenate([signal.entered] * 3)
  changes, inputs = [], []
  for a in form.read(local.weights, local.stats, entered, h):
    plus, minus, middle = jnp.split(a, 3)
    changes.append(((plus + minus) / 2 - middle, plus - minus))
    inputs.append(middle)
  return tuple(changes), tuple(inputs)


def _received(form, local, split, gradients, shapes):
  """Pulls output gradients back through v and e of each reader."""
  return tuple(
      tuple(
          reader.layer.transposed(gradient, kernel, shape)
          for kernel in (v, e)
      )
      for reader, v, e, gradient, shape in zip(
          form.readers, local.kernels(form.readers), split.e, gradients, shapes,
          strict=True,
      )
  )


def _projected(changes, received):
  """Computes <gradient, dz> of every split over all readers, (batch, units)."""
  products = jax.tree.map(jnp.multiply, changes, received)
  return sum(
      product.sum(tuple(range(1, product.ndim - 1)))
      for product in jax.tree.leaves(products)
  )


def _pruned(form, local, inputs, gradients, taken):
  """Computes <gradient, dz> of every prune over all readers, (batch, units)."""
  total = 0.0
  for number, reader in enumerate(form.readers):
    (kernel,), a = local.kernels([reader]), inputs[number]
    pulled = reader.layer.transposed(gradients[number], kernel, a.shape)
    weights = taken[:, number]
    product = pulled * jnp.einsum('...j,uj->...u', a, weights[:, :-1])
    # The reader's response to a constant 1, also at the border.
    whole = kernel.reshape(-1, *kernel.shape[-2:]).sum(0)
    summed = _flat(gradients[number]).sum(1) @ whole.T
    total += product.sum(tuple(range(1, product.ndim - 1)))
    total += summed * weights[None, :, -1]
  return total


def _rows(ends, reads, gradients, products):
  """Derives <gradient, dz> by each unit's u or e: (batch, units, weights)."""
  blocks = []
  for end, x, gradient, product in zip(
      ends, reads, gradients, products, strict=True
  ):
    gradient = _flat(gradient)
    patches = end.layer.patches(x)
    patches = patches.reshape(*gradient.shape[:2], -1, x.shape[-1])
    block = jnp.einsum(product, patches, gradient)
    blocks.append(block.reshape(*block.shape[:2], -1))
  return jnp.concatenate(blocks, -1)


def second_moments(inputs):
  """Sums second moments of inputs and 1 over a batch, (readers, ...)."""
  result = []
  for a in map(_flat, inputs):
    a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)
    result.append(jnp.einsum('bpi,bpj->ij', a, a) / a.shape[1])
  return jnp.stack(result)


def _flat(a: jax.Array) -> jax.Array:
  """Flattens positions: (batch, positions, channels)."""
  return a.reshape(len(a), -1, a.shape[-1])
