"""Sites: the axes of a network whose channels can be split one by one.

Some layers write an axis and some read it: one of each inside a block, many on
the stream of a residual stage. The axis is a site if only norms, sums and
channel-wise operations (ReLU, pooling, averages, depthwise convolutions) lie
between them. Every other axis is listed with the reason.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.methods.gauss_newton import padding
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
    """Computes T: the readers' inputs for given pre-activations h.

    Args:
      weights: weights of the chain.
      stats: statistics of the chain.
      entered: input of the chain; it has an influence only through a shortcut
        that the axis does not take.
      h: per writer, (batch, ..., units).

    Returns:
      Per reader, (batch, ..., units).
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
  """All axes of a network between two layers.

  Attributes:
    sites: sites in forward order of their first writers.
    uncovered: (axis, reason) of every other axis.
  """

  sites: tuple[Site, ...]
  uncovered: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=256)
def survey(architecture: Architecture) -> Survey:
  """Finds all sites of a network, with padded forms."""
  # Widths don't matter to what is covered.
  tiny = architecture.resized(dict.fromkeys(padding.inner(architecture), 2))
  covered, uncovered = _coverage(tiny)
  forms, _ = _found(networks.parts(padding.padded(architecture)), architecture)
  parts = {part.name: part for part in networks.parts(architecture)}
  sites = []
  for axis in covered:
    names, form = forms[axis]
    units = architecture.size(axis)

    def weights(ends, names=names, units=units):
      sizes = []
      for end in ends:
        tree, _ = base.shapes(parts[names[int(end.layer.path[0])]])
        for name in end.layer.path[1:]:
          tree = tree[name]
        sizes.append(math.prod(tree['kernel'].shape) // units)
      return sum(sizes)

    sites.append(
        Site(
            axis, units, names, form,
            weights(form.writers), weights(form.readers),
        )
    )
  return Survey(tuple(sites), uncovered)


@functools.lru_cache(maxsize=64)
def _coverage(
    architecture: Architecture,
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
  """Lists axes that are sites, and (axis, reason) of those that are not."""
  parts = networks.parts(architecture)
  forms, uncovered = _found(parts, architecture)
  names = [part.name for part in parts]
  reached = {
      axis: [parts[names.index(name)] for name in found]
      for axis, (found, _) in forms.items()
  }
  mixed = _mixing({axis: form for axis, (_, form) in forms.items()}, reached)
  uncovered += [(axis, 'what lies behind it mixes its units') for axis in mixed]
  return tuple(axis for axis in forms if axis not in mixed), tuple(uncovered)


def _found(
    parts: tuple[base.Part, ...], architecture: Architecture
) -> tuple[dict[str, tuple[tuple[str, ...], Form]],
           list[tuple[str, str]]]:
  """Finds the parts and forms of axes, and reasons against other axes."""
  layers = {layer.path: layer for layer in taps.layers_of(parts)}
  order = {path: index for index, path in enumerate(layers)}
  along: dict[str, dict[str, list[taps.Path]]] = {'writes': {}, 'reads': {}}
  for part in parts:
    for path, (_, axes) in base.axes(part).items():
      for axis in axes:
        is_layer = path[-1] in ('kernel', 'select')
        if is_layer and axis is not None and axis.role in along:
          along[axis.role].setdefault(axis.name, []).append(path[:-1])
  forms, uncovered = {}, []
  for axis, _ in architecture.sizes:
    paths = {kind: along[kind].get(axis, ()) for kind in along}
    unknown = {*itertools.chain(*paths.values())} - set(layers)
    if unknown:
      names = ', '.join(sorted('.'.join(path) for path in unknown))
      uncovered.append((axis, f'{names} is of an unknown kind'))
      continue
    writers, readers = (
        [layers[path] for path in sorted(found, key=order.get)]
        for found in paths.values()
    )
    if not writers or not readers:
      continue  # The network's input or output.
    if reason := _refused(writers, readers):
      uncovered.append((axis, reason))
    else:
      forms[axis] = _form(parts, layers, writers, readers)
  in_order = sorted(
      forms, key=lambda axis: order[min(along['writes'][axis], key=order.get)]
  )
  return {axis: forms[axis] for axis in in_order}, uncovered


def _refused(
    writers: Sequence[taps.Layer], readers: Sequence[taps.Layer]
) -> str:
  """Returns the reason why an axis between layers is no site, or ''."""
  name = lambda layer: '/'.join(layer.path)
  for layer in (*writers, *readers):
    if layer.kind == 'Select':
      return (
          f'a shortcut without parameters, {name(layer)}, reads or writes it'
      )
  if both := set(writers) & set(readers):
    return f'{", ".join(sorted(map(name, both)))} both reads and writes it'
  return ''


def _form(
    parts: tuple[base.Part, ...],
    layers: Mapping[taps.Path, taps.Layer],
    writers: Sequence[taps.Layer],
    readers: Sequence[taps.Layer],
) -> tuple[tuple[str, ...], Form]:
  """Returns the names of a form's parts, and the form."""
  names = [part.name for part in parts]
  first = names.index(writers[0].path[0])
  last = names.index(readers[-1].path[0])
  numbers = {name: str(i) for i, name in enumerate(names[first : last + 1])}
  local = lambda path: path and (numbers[path[0]], *path[1:])

  def end(layer):
    norm = next((
        other
        for other in layers.values()
        if other.kind == 'Norm'
        and other.source == layer.path
        and other.path[0] == layer.path[0]
    ), None)
    return End(*(
        one and dataclasses.replace(one, path=local(one.path), source=None)
        for one in (layer, norm)
    ))

  chain = tuple(
      base.Segment(numbers[part.name], part.module.clone(plain=True), None)
      for part in parts[first : last + 1]
  )
  form = Form(chain, tuple(map(end, writers)), tuple(map(end, readers)))
  return tuple(numbers), form


def _mixing(
    forms: Mapping[str, Form], reached: Mapping[str, Sequence[base.Part]]
) -> list[str]:
  """Lists axes where a unit that is read depends on more than h of this unit.
  """
  generator = np.random.default_rng(0)
  draw = lambda leaf: generator.uniform(0.5, 1.5, leaf.shape).astype('f4')

  def trees(axis, number):
    shapes = map(base.shapes, reached[axis])
    return {
        str(index): jax.tree.map(draw, pair[number])
        for index, pair in enumerate(shapes)
    }

  def shifted(form, weights):
    kernels = {w.layer.path for w in form.writers if w.norm is not None}
    return axes_lib.map_with_names(
        lambda path, leaf: leaf + (path[:-1] in kernels), weights
    )

  def arguments(axis):
    form, weights, stats = forms[axis], trees(axis, 0), trees(axis, 1)
    x = np.ones((1, *reached[axis][0].input_shape), np.float32)
    outputs = jax.eval_shape(
        lambda: taps.run(form.chain, weights, stats, x).outputs
    )
    h = [draw(outputs[writer.top]) for writer in form.writers]
    changed = [one + np.array([0, 3], one.dtype) for one in h]
    return (weights, stats, x, h), (shifted(form, weights), stats, x, changed)

  def read(given):
    return {
        axis: [forms[axis].read(*one) for one in both]
        for axis, both in given.items()
    }

  # It runs only once, so compilation dominates.
  read = jax.jit(read, compiler_options={'xla_backend_optimization_level': 0})
  found = read({axis: arguments(axis) for axis in forms})
  is_alone = lambda a, b: a.shape[-1] == 2 and np.array_equal(
      a[..., 0], b[..., 0]
  )
  return [a for a, both in found.items() if not all(map(is_alone, *both))]


def rows(kernels: Sequence[jax.Array], dim: int) -> jax.Array:
  """Flattens kernels with units along one dimension to (units, weights)."""
  moved = (jnp.moveaxis(kernel, dim, 0) for kernel in kernels)
  return jnp.concatenate([row.reshape(len(row), -1) for row in moved], -1)
