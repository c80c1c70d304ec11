"""Sites: the axes of a network whose channels can be split one by one.

Some layers write an axis and some read it: one of each inside a block, many on
the stream of a residual stage. The axis is a site if only norms, sums and
channel-wise operations (ReLU, pooling, averages, depthwise convolutions) lie
between them. Every other axis is listed with the reason.
"""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture

# Dimensions of a kernel with the units that its layer writes and reads.
WRITTEN, READ = -1, -2


@dataclasses.dataclass(frozen=True)
class End:
  """A layer that writes or reads an axis.

  Attributes:
    layer: the layer.
    norm: the norm of the layer's output, if there is one.
  """

  layer: taps.Layer
  norm: taps.Layer | None

  @property
  def top(self) -> taps.Path:
    """Path of the layer that writes the pre-activation: norm or layer."""
    return (self.norm or self.layer).path


@dataclasses.dataclass(frozen=True)
class Site:
  """One axis whose units can be split.

  Attributes:
    axis: name of the axis.
    units: size of the axis.
    writers: layers that write it, in forward order.
    readers: layers that read it, in forward order.
    norms: all norms along it, of writers and before readers.
    chain: parts from the first writer's to the last reader's, with convolutions
      that have a forward mode.
    incoming: weights per unit, over all writers.
    outgoing: weights per unit, over all readers.
  """

  axis: str
  units: int
  writers: tuple[End, ...]
  readers: tuple[End, ...]
  norms: tuple[taps.Layer, ...]
  chain: tuple[base.Segment, ...]
  incoming: int
  outgoing: int

  def activations(
      self,
      weights: base.Tree,
      stats: base.Tree,
      x: jax.Array,
      h: tuple[jax.Array, ...],
  ) -> tuple[jax.Array, ...]:
    """Computes T: the readers' inputs for given pre-activations h.

    The inputs depend on h alone: what the writers compute is replaced.

    Args:
      weights: weights of the network.
      stats: statistics of the network.
      x: input of the chain; it has no influence unless there is a shortcut.
      h: per writer, (batch, ..., units).

    Returns:
      Per reader, (batch, ..., units).
    """
    changes = {
        writer.top: lambda _, h=h: h
        for writer, h in zip(self.writers, h, strict=True)
    }
    tapped = taps.run(self.chain, weights, stats, x, changes=changes)
    return tuple(tapped.inputs[reader.layer.path] for reader in self.readers)


@dataclasses.dataclass(frozen=True)
class Survey:
  """All axes of a network between two layers.

  Attributes:
    sites: sites in forward order of their first writers.
    uncovered: (axis, reason) of every other axis.
  """

  sites: tuple[Site, ...]
  uncovered: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=256)
def survey(architecture: Architecture) -> Survey:
  """Finds all sites of a network."""
  parts = networks.parts(architecture)
  layers = {layer.path: layer for layer in taps.layers_of(parts)}
  order = {path: index for index, path in enumerate(layers)}
  along = _layers_along(parts)
  sites, uncovered = [], []
  for axis, units in architecture.sizes:
    paths = {kind: along[kind].get(axis, ()) for kind in along}
    if unknown := {*itertools.chain(*paths.values())} - set(layers):
      names = ', '.join(sorted('.'.join(path) for path in unknown))
      uncovered.append((axis, f'{names} is of an unknown kind'))
      continue
    ends = {
        kind: tuple(layers[path] for path in sorted(found, key=order.get))
        for kind, found in paths.items()
    }
    if not ends['writes'] or not ends['reads']:
      continue  # The network's input or output.
    try:
      sites.append(_site(parts, axis, units, ends, layers))
    except _Uncovered as reason:
      uncovered.append((axis, str(reason)))
  sites.sort(key=lambda site: order[site.writers[0].layer.path])
  return Survey(tuple(sites), tuple(uncovered))


class _Uncovered(Exception):
  """The reason why an axis is no site."""


def _layers_along(
    parts: tuple[base.Part, ...],
) -> dict[str, dict[str, list[taps.Path]]]:
  """Finds the layers along each axis that 'writes', 'reads' or 'norms' it.

  Depthwise convolutions are left out.
  """
  along: dict[str, dict[str, list[taps.Path]]] = {
      'writes': {}, 'reads': {}, 'norms': {}
  }
  for part in parts:
    for path, (_, axes) in base.axes(part).items():
      for axis in axes:
        if axis is None:
          continue
        if path[-1] == 'scale':
          along['norms'].setdefault(axis.name, []).append(path[:-1])
        elif path[-1] in ('kernel', 'select') and axis.role in along:
          along[axis.role].setdefault(axis.name, []).append(path[:-1])
  return along


def _site(parts, axis, units, ends, layers):
  """Returns the site of an axis; raises `_Uncovered` if it is none."""
  writers, readers = ends['writes'], ends['reads']
  for layer in (*writers, *readers):
    if layer.kind == 'Select':
      raise _Uncovered(
          f'a shortcut without parameters, {_name(layer)}, reads or writes it'
      )
  if both := set(writers) & set(readers):
    names = ', '.join(sorted(map(_name, both)))
    raise _Uncovered(f'{names} both reads and writes it')
  names = [part.name for part in parts]
  part_of = lambda layer: names.index(layer.path[0])
  reach = parts[part_of(writers[0]) : part_of(readers[-1]) + 1]
  weights = lambda ends: sum(
      _kernel_size(parts[part_of(layer)], layer) for layer in ends
  )
  site = Site(
      axis=axis,
      units=units,
      writers=tuple(End(layer, _norm_of(layer, layers)) for layer in writers),
      readers=tuple(End(layer, _norm_of(layer, layers)) for layer in readers),
      norms=ends['norms'],
      chain=taps.chain_of(
          dataclasses.replace(part, module=part.module.clone(plain=True))
          for part in reach
      ),
      incoming=weights(writers) // units,
      outgoing=weights(readers) // units,
  )
  if not _is_channelwise(site, reach):
    raise _Uncovered('what lies behind it mixes its units')
  return site


def _name(layer: taps.Layer) -> str:
  return '/'.join(layer.path)


def _norm_of(layer, layers):
  """Finds the norm in the same part that reads a layer's unchanged output."""
  for norm in layers.values():
    if (
        norm.kind == 'Norm'
        and norm.source == layer.path
        and norm.path[0] == layer.path[0]
    ):
      return norm
  return None


def _kernel_size(part: base.Part, layer: taps.Layer) -> int:
  tree, _ = base.shapes(part)
  for name in layer.path[1:]:
    tree = tree[name]
  return math.prod(tree['kernel'].shape)


def _is_channelwise(site: Site, parts: tuple[base.Part, ...]) -> bool:
  """Tests that each unit a reader reads depends on the same unit of h alone."""
  shapes = {part.name: base.shapes(part) for part in parts}
  generator = np.random.default_rng(0)
  draw = lambda leaf: generator.uniform(0.5, 1.5, leaf.shape).astype('f4')
  weights, stats = (
      {name: jax.tree.map(draw, trees[i]) for name, trees in shapes.items()}
      for i in range(2)
  )
  x = np.zeros((1, *parts[0].input_shape), np.float32)
  outputs = jax.eval_shape(
      lambda: taps.run(site.chain, weights, stats, x).outputs
  )
  paths = {writer.layer.path for writer in site.writers}
  tops = {writer.top for writer in site.writers}
  values = {path: draw(outputs[path]) for path in paths | tops}
  odd = np.arange(site.units) % 2 == 1
  changed = {
      path: np.where(odd | (path not in tops), value + 3, value)
      for path, value in values.items()
  }

  def read(values, weights, stats):
    changes = {
        path: lambda _, value=value: value for path, value in values.items()
    }
    tapped = taps.run(site.chain, weights, stats, x, changes=changes)
    return [tapped.inputs[reader.layer.path] for reader in site.readers]

  # It runs only twice, so compilation dominates.
  read = jax.jit(
      read, compiler_options={'xla_backend_optimization_level': 0}
  )
  before, after = (
      map(np.asarray, read(given, weights, stats))
      for given in (values, changed)
  )
  return all(
      a.shape[-1] == site.units
      and np.array_equal(a[..., ~odd], b[..., ~odd])
      for a, b in zip(before, after, strict=True)
  )


def rows(kernels: Sequence[jax.Array], dim: int) -> jax.Array:
  """Flattens kernels with units along one dimension to (units, weights)."""
  moved = (jnp.moveaxis(kernel, dim, 0) for kernel in kernels)
  return jnp.concatenate([row.reshape(len(row), -1) for row in moved], -1)


def kernels_of(
    rows: jax.Array, like: Sequence[jax.Array], dim: int
) -> tuple[jax.Array, ...]:
  """Inverts `rows`."""
  kernels = []
  sizes = [kernel.size // kernel.shape[dim] for kernel in like]
  for block, kernel in zip(cut(rows, sizes), like, strict=True):
    shape = jnp.moveaxis(kernel, dim, 0).shape
    kernels.append(jnp.moveaxis(block.reshape(shape), 0, dim))
  return tuple(kernels)


def cut(rows: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
  """Cuts the last dimension into blocks of given sizes."""
  return jnp.split(rows, np.cumsum(sizes)[:-1], -1)
