"""Sites: the axes of a network whose channels can be split one by one.

Some layers write an axis and some read it: one of each inside a block, many on
the stream of a residual stage. Between them lie norms, sums and channel-wise
operations (ReLU, pooling, averages, depthwise convolutions). Every other axis
is listed with the reason.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture

# Dimensions of a kernel with the units that its layer writes and reads.
WRITTEN, READ = -1, -2


@dataclasses.dataclass(frozen=True)
class End:
  """A layer that writes or reads an axis, and the norm of its output, if any.
  """

  layer: taps.Layer
  norm: taps.Layer | None

  @property
  def top(self) -> taps.Path:
    """Path of the layer that writes the pre-activation: norm or layer."""
    return (self.norm or self.layer).path


@dataclasses.dataclass(frozen=True)
class Form:
  """A piece of a network around a site; sites with equal forms share programs.

  Attributes:
    chain: parts from the first writer's to the last reader's, numbered.
    writers: layers that write the axis, in forward order.
    readers: layers that read it, in forward order.
  """

  chain: tuple[base.Segment, ...]
  writers: tuple[End, ...]
  readers: tuple[End, ...]

  def read(
      self,
      weights: base.Tree,
      stats: base.Tree,
      entered: jax.Array,
      h: Sequence[jax.Array],
  ) -> tuple[jax.Array, ...]:
    """Computes T: the readers' inputs (batch, ..., units) for given h.

    Args:
      weights: weights of the chain.
      stats: statistics of the chain.
      entered: input of the chain; it has an influence only through a shortcut
        that the axis does not take.
      h: per writer, pre-activations (batch, ..., units).
    """
    changes = {
        writer.top: lambda _, h=h: h
        for writer, h in zip(self.writers, h, strict=True)
    }
    tapped = taps.run(self.chain, weights, stats, entered, changes=changes)
    return tuple(tapped.inputs[reader.layer.path] for reader in self.readers)


@dataclasses.dataclass(frozen=True)
class Site:
  """One axis whose units can be split.

  Attributes:
    axis: name of the axis.
    units: number of units, without padding.
    parts: names of the parts of the form's chain.
    form: the padded network around it.
    incoming: weights per unit over all writers, without padding.
    outgoing: weights per unit over all readers, without padding.
  """

  axis: str
  units: int
  parts: tuple[str, ...]
  form: Form
  incoming: int
  outgoing: int

  def path(self, local: taps.Path) -> taps.Path:
    """Path in the network of a path in the form."""
    return (self.parts[int(local[0])], *local[1:])


@dataclasses.dataclass(frozen=True)
class Survey:
  """All axes between two layers: sites, and (axis, reason) of the others."""

  sites: tuple[Site, ...]
  uncovered: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=256)
def survey(architecture: Architecture) -> Survey:
  """Finds all sites of a network, in forward order, with padded forms."""
  parts = networks.parts(padding.padded(architecture))
  layers = {layer.path: layer for layer in taps.layers_of(parts)}
  order = {path: index for index, path in enumerate(layers)}
  along = _layers_along(parts)
  kernels = {
      part.name: base.shapes(part)[0] for part in networks.parts(architecture)
  }
  sites, uncovered = [], []
  for axis, units in architecture.sizes:
    writers, readers = (
        sorted(along[role].get(axis, ()), key=lambda path: order.get(path, 0))
        for role in ('writes', 'reads')
    )
    if not writers or not readers:
      continue  # The network's input or output.
    if reason := _refused(writers, readers, layers):
      uncovered.append((axis, reason))
      continue
    names, form = _form(parts, layers, writers, readers)
    size = lambda paths: sum(
        int(np.prod(at(kernels, path)['kernel'].shape)) for path in paths
    )
    sites.append((order[writers[0]], Site(
        axis, units, names, form, size(writers) // units,
        size(readers) // units,
    )))
  sites.sort(key=lambda pair: pair[0])
  return Survey(tuple(site for _, site in sites), tuple(uncovered))


def _layers_along(
    parts: Sequence[base.Part],
) -> dict[str, dict[str, list[taps.Path]]]:
  """Finds the layers that write and read each axis, but for depthwise ones."""
  along = {'writes': {}, 'reads': {}}
  for part in parts:
    for path, (_, axes) in base.axes(part).items():
      for axis in axes if path[-1] in ('kernel', 'select') else ():
        if axis is not None and axis.role in along:
          along[axis.role].setdefault(axis.name, []).append(path[:-1])
  return along


def _refused(
    writers: Sequence[taps.Path],
    readers: Sequence[taps.Path],
    layers: Mapping[taps.Path, taps.Layer],
) -> str:
  """Returns the reason why an axis between layers is no site, or ''."""
  listed = lambda paths: ', '.join(sorted('/'.join(path) for path in paths))
  ends = {*writers, *readers}
  if unknown := ends - set(layers):
    return f'{listed(unknown)} is of an unknown kind'
  if chosen := [path for path in ends if layers[path].kind == 'Select']:
    return (
        f'a shortcut without parameters, {listed(chosen)}, reads or writes it'
    )
  if both := set(writers) & set(readers):
    return f'{listed(both)} both reads and writes it'
  return ''


def _form(
    parts: Sequence[base.Part],
    layers: Mapping[taps.Path, taps.Layer],
    writers: Sequence[taps.Path],
    readers: Sequence[taps.Path],
) -> tuple[tuple[str, ...], Form]:
  """Returns the names of a form's parts, and the form."""
  names = [part.name for part in parts]
  reach = slice(names.index(writers[0][0]), names.index(readers[-1][0]) + 1)
  numbers = {name: str(i) for i, name in enumerate(names[reach])}

  def local(layer):
    path = numbers[layer.path[0]], *layer.path[1:]
    return dataclasses.replace(layer, path=path, source=None)

  def end(path):
    norms = (
        local(other)
        for other in layers.values()
        if other.kind == 'Norm'
        and other.source == path
        and other.path[0] == path[0]
    )
    return End(local(layers[path]), next(norms, None))

  chain = tuple(
      base.Segment(numbers[part.name], part.module.clone(plain=True), None)
      for part in parts[reach]
  )
  form = Form(chain, tuple(map(end, writers)), tuple(map(end, readers)))
  return tuple(numbers), form


def at(tree: base.Tree, path: taps.Path) -> base.Tree:
  """Returns the leaves of one layer."""
  for name in path:
    tree = tree[name]
  return tree
