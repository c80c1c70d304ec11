"""Sites: the axes of a network whose channels can be split one by one.

A site is an axis that one layer writes and one layer reads, with nothing but a
norm and channel-wise operations (ReLU, pooling, averages) between. An axis that
is none is named, with the reason.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax.networks import base
from autogrow_jax.networks import taps

Architecture = architecture_lib.Architecture


@dataclasses.dataclass(frozen=True)
class Site:
  """One axis whose units can be split.

  Attributes:
    axis: its name.
    units: its size.
    writer: the layer that writes it.
    norm: the norm of what the writer writes, if there is one.
    reader: the layer that reads it.
    reader_norm: the norm of what the reader writes, if there is one.
    chain: the parts from the writer's to the reader's.
    incoming: number of weights of the writer for each unit.
    outgoing: number of weights of the reader for each unit.
  """

  axis: str
  units: int
  writer: taps.Layer
  norm: taps.Layer | None
  reader: taps.Layer
  reader_norm: taps.Layer | None
  chain: tuple[base.Segment, ...]
  incoming: int
  outgoing: int

  @property
  def top(self) -> taps.Path:
    """The layer that writes the pre-activation h: the norm, or the writer."""
    return (self.norm or self.writer).path

  def activation(
      self, weights: base.Tree, stats: base.Tree, x: jax.Array, h: jax.Array
  ) -> jax.Array:
    """T: what the reader reads if the pre-activation is h.

    Args:
      weights: of the network.
      stats: of the network.
      x: what enters the chain; of no influence unless it has a shortcut.
      h: (batch, ..., units).

    Returns:
      (batch, ..., units).
    """
    tapped = taps.run(
        self.chain, weights, stats, x, changes={self.top: lambda _: h}
    )
    return tapped.inputs[self.reader.path]


@dataclasses.dataclass(frozen=True)
class Survey:
  """What a network offers.

  Attributes:
    sites: in forward order of their writers.
    uncovered: (axis, reason) for every other axis between two layers.
  """

  sites: tuple[Site, ...]
  uncovered: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=256)
def survey(architecture: Architecture) -> Survey:
  """Finds all sites of a network."""
  parts = networks.parts(architecture)
  layers = {layer.path: layer for layer in taps.layers_of(parts)}
  order = {path: index for index, path in enumerate(layers)}
  ends = _ends(parts)
  sites, uncovered = [], []
  for axis, units in architecture.sizes:
    writers = ends['writes'].get(axis, [])
    readers = ends['reads'].get(axis, [])
    if not writers or not readers:
      continue  # The network's input or output.
    try:
      sites.append(_site(architecture, axis, units, writers, readers, layers))
    except _Uncovered as reason:
      uncovered.append((axis, str(reason)))
  sites.sort(key=lambda site: order[site.writer.path])
  return Survey(tuple(sites), tuple(uncovered))


class _Uncovered(Exception):
  """Why an axis is no site."""


def _ends(
    parts: tuple[base.Part, ...],
) -> dict[str, dict[str, list[taps.Path]]]:
  """Per role, the layers at either end of each axis."""
  ends: dict[str, dict[str, list[taps.Path]]] = {'writes': {}, 'reads': {}}
  for part in parts:
    for path, (_, axes) in base.axes(part).items():
      if path[-1] not in ('kernel', 'select'):
        continue
      for axis in axes:
        if axis is None:
          continue
        for role in ends:
          if axis.role in (role, 'both'):
            ends[role].setdefault(axis.name, []).append(path[:-1])
  return ends


def _site(architecture, axis, units, writers, readers, layers):
  """The site of an axis; raises `_Uncovered` if it is none."""
  for verb, found in (('written', writers), ('read', readers)):
    if len(found) > 1:
      names = ', '.join('/'.join(path) for path in found)
      raise _Uncovered(f'{verb} by {len(found)} layers: {names}')
  writer, reader = layers[writers[0]], layers[readers[0]]
  if 'Select' in (writer.kind, reader.kind):
    raise _Uncovered('a shortcut without parameters reads or writes it')
  if writer.path == reader.path:
    raise _Uncovered(f'{"/".join(writer.path)} both reads and writes it')
  parts = networks.parts(architecture)
  names = [part.name for part in parts]
  first, last = names.index(writer.path[0]), names.index(reader.path[0])
  site = Site(
      axis=axis,
      units=units,
      writer=writer,
      norm=_norm_of(writer, layers),
      reader=reader,
      reader_norm=_norm_of(reader, layers),
      chain=taps.chain_of(parts[first : last + 1]),
      incoming=_kernel_size(parts[first], writer) // units,
      outgoing=_kernel_size(parts[last], reader) // units,
  )
  if not _is_channelwise(site, parts[first : last + 1]):
    raise _Uncovered('what lies behind it mixes its units')
  return site


def _norm_of(layer, layers):
  """The norm that reads exactly what a layer writes."""
  for norm in layers.values():
    if norm.kind == 'Norm' and norm.source == layer.path:
      return norm
  return None


def _kernel_size(part: base.Part, layer: taps.Layer) -> int:
  tree, _ = base.shapes(part)
  for name in layer.path[1:]:
    tree = tree[name]
  return math.prod(tree['kernel'].shape)


def _is_channelwise(site: Site, parts: tuple[base.Part, ...]) -> bool:
  """Whether a change of some units of h leaves the others alone behind it."""
  shapes = {part.name: base.shapes(part) for part in parts}
  generator = np.random.default_rng(0)
  draw = lambda leaf: generator.normal(size=leaf.shape).astype('f4')
  weights, stats = (
      {name: jax.tree.map(draw, trees[i]) for name, trees in shapes.items()}
      for i in range(2)
  )
  x = jnp.zeros((1, *parts[0].input_shape))
  h = jax.eval_shape(
      lambda: taps.run(site.chain, weights, stats, x).outputs[site.top]
  )
  h = draw(h)
  odd = np.arange(site.units) % 2 == 1
  changed = np.where(odd, h + 3, h)
  activation = jax.jit(
      lambda h: site.activation(weights, stats, x, h)
  )
  before, after = np.asarray(activation(h)), np.asarray(activation(changed))
  return before.shape[-1] == site.units and np.array_equal(
      before[..., ~odd], after[..., ~odd]
  )
