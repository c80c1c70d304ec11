"""Splits tried out: the network after them, and its true loss.

Nothing here is an estimate. A network whose channels are split is written down
as a function of u and e that can be traced and differentiated, with the index
maps of `growth` and the deltas of `surgery`, and run. So whatever lies around
an axis, streams and depthwise layers too, is as exact as the network itself.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax.methods import base as methods_base
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import taps

Architecture = architecture_lib.Architecture
Model, Trees = signals_lib.Model, signals_lib.Trees
Batch, Split, Splits = splits_lib.Batch, splits_lib.Split, splits_lib.Splits

# Networks that are run at the same time, each with another unit split. CPUs
# have no use for more than one.
CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Tuned:
  """Splits that were optimised on the true loss.

  Attributes:
    split: of the site; u = e = 0 for all other units.
    decreases: (units,) of the mean loss by each alone, nats, float64.
  """

  split: Split
  decreases: np.ndarray


def true_changes(
    architecture: Architecture,
    model: Model,
    trees: Trees,
    splits: Splits,
    axis: str,
    units: Sequence[int],
    batches: Sequence[Batch],
    *,
    chunk: int | None = None,
) -> np.ndarray:
  """How much the loss changes if one unit is split, for each one alone.

  Every unit takes a forward pass of its own through what comes after it.

  Args:
    architecture: the network's.
    model: the network.
    trees: its arrays.
    splits: of the site at least.
    axis: the site's.
    units: to split.
    batches: the examples.
    chunk: how many of these networks are run at the same time; None for 1 on a
      CPU, else `CHUNK`.

  Returns:
    (units,) change of the mean loss in evaluation mode, nats, float64.

  Raises:
    ValueError: the axis has no such units.
  """
  units = _checked(architecture, axis, units)
  own, chunk = {axis: splits[axis]}, _chunk(chunk)
  total = sum(
      np.asarray(
          _changes(
              architecture, model, axis, chunk, trees, own, units, x, labels
          ),
          np.float64,
      )
      for x, labels in batches
  )
  return total / sum(len(labels) for _, labels in batches)


def oracle(
    architecture: Architecture,
    model: Model,
    trees: Trees,
    axis: str,
    units: Sequence[int],
    batches: Sequence[Batch],
    key: jax.Array,
    *,
    steps: int,
    learning_rate: float,
    chunk: int | None = None,
) -> Tuned:
  """Optimises each unit's split on the true loss with that split alone.

  Beside Adam on a model of the loss, with the same start and as many steps, it
  tells what the model costs. It bounds nothing: other solvers, and more steps,
  can find better splits.

  Args:
    architecture: the network's.
    model: the network.
    trees: its arrays.
    axis: the site's.
    units: to split, each in a network of its own.
    batches: the examples, one batch for each step, in turn.
    key: of the start, see `splits.start`.
    steps: of Adam.
    learning_rate: of Adam.
    chunk: as of `true_changes`.

  Returns:
    The splits, and what they gain on all batches.

  Raises:
    ValueError: as `true_changes`.
  """
  units, chunk = _checked(architecture, axis, units), _chunk(chunk)
  start = splits_lib.start(model, trees, key)[axis]
  rows = (
      splits_lib.incoming(start.u)[units],
      splits_lib.outgoing(start.e)[units],
  )
  tx = optax.adam(learning_rate, *splits_lib.ADAM_DECAYS)
  opt_state = tx.init(rows)
  for step in range(steps):
    x, labels = batches[step % len(batches)]
    gradients = _gradients(
        architecture, model, axis, chunk, trees, start, units, rows, x, labels
    )
    updates, opt_state = tx.update(gradients, opt_state)
    rows = optax.apply_updates(rows, updates)
  split = _with_rows(start, units, rows)
  changes = true_changes(
      architecture, model, trees, {axis: split}, axis, units, batches,
      chunk=chunk,
  )
  return Tuned(split, -changes)


def losses(
    architecture: Architecture,
    model: Model,
    trees: Trees,
    splits: Splits,
    units: Mapping[str, jax.Array],
    x: jax.Array,
    labels: jax.Array,
) -> jax.Array:
  """Loss of each example after units were split; traceable.

  Args:
    architecture: the network's before.
    model: the network before.
    trees: its arrays.
    splits: of all units of these sites.
    units: per axis, the distinct units to split; may be traced.
    x: (batch, height, width, channel), preprocessed.
    labels: (batch,).

  Returns:
    (batch,) cross-entropy in evaluation mode, nats.
  """
  wider = architecture.resized({
      axis: architecture.size(axis) + len(chosen)
      for axis, chosen in units.items()
  })
  after = split_trees(architecture, model, trees, splits, units)
  chain = taps.chain_of(networks.parts(wider))
  logits = taps.run(chain, after.weights, after.stats, x).output
  return methods_base.cross_entropy(logits, labels)


def split_trees(
    architecture: Architecture,
    model: Model,
    trees: Trees,
    splits: Splits,
    units: Mapping[str, jax.Array],
) -> Trees:
  """Arrays of the network after units were split; see `losses`."""
  table = state_lib.axis_table(architecture)
  sources, signs = {}, {}
  for axis, chosen in units.items():
    size, chosen = architecture.size(axis), jnp.asarray(chosen)
    sources[axis] = jnp.concatenate([jnp.arange(size), chosen])
    signs[axis] = jnp.concatenate(
        [jnp.zeros(size).at[chosen].set(1), -jnp.ones(len(chosen))]
    )
  deltas: dict[tuple[taps.Path, str], list[tuple[str, jax.Array]]] = {}
  for site in model.sites:
    if site.axis not in units:
      continue
    split = splits[site.axis]
    for role, ends, parts in (
        ('writes', site.writers, split.u), ('reads', site.readers, split.e)
    ):
      for end, delta in zip(ends, parts, strict=True):
        key = (*end.layer.path, 'kernel'), role
        deltas.setdefault(key, []).append((site.axis, delta))

  def leaf_after(root, path, leaf):
    path = state_lib.names(path)
    axes = table.get((root, *path), ())
    gather = lambda leaf: _gather(leaf, axes, sources)
    after = gather(leaf)
    for axis, delta in deltas.get((path, 'writes'), ()):
      after += _along(axes, axis, 'writes', gather(delta), signs[axis])
    for axis in units:
      if root == 'weights' and layers.Axis(axis, 'reads') in axes:
        half = jnp.where(signs[axis] == 0, 1, 0.5)
        after = _along(axes, axis, 'reads', after, half)
    for axis, delta in deltas.get((path, 'reads'), ()):
      after += _along(axes, axis, 'reads', gather(delta), signs[axis])
    return after

  return Trees(*(
      jax.tree_util.tree_map_with_path(
          functools.partial(leaf_after, root), tree
      )
      for root, tree in (('weights', trees.weights), ('network', trees.stats))
  ))


def _checked(
    architecture: Architecture, axis: str, units: Sequence[int]
) -> jax.Array:
  """Units as an array; out of range they would be clipped silently."""
  size, units = architecture.size(axis), np.asarray(units, int)
  if ((units < 0) | (units >= size)).any():
    raise ValueError(
        f'Units of {axis} are numbers from 0 to {size - 1}, got '
        f'{units.tolist()}.'
    )
  return jnp.asarray(units)


def _chunk(chunk: int | None) -> int:
  if chunk is not None:
    return chunk
  return 1 if jax.default_backend() == 'cpu' else CHUNK


def _gather(
    leaf: jax.Array, axes: layers.Axes, sources: Mapping[str, jax.Array]
) -> jax.Array:
  """A leaf with the units of its axes in their new places."""
  for dim, axis in enumerate(axes):
    if axis is not None and axis.name in sources:
      leaf = jnp.take(leaf, sources[axis.name], axis=dim)
  return leaf


def _along(axes, name, role, leaf, vector):
  """A leaf multiplied by a vector along one of its axes."""
  shape = [1] * leaf.ndim
  shape[axes.index(layers.Axis(name, role))] = -1
  return leaf * vector.reshape(shape).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _changes(
    architecture, model, axis, chunk, trees, splits, units, x, labels
):
  """Per unit, the sum over examples of the change of their loss."""
  before = losses(architecture, model, trees, {}, {}, x, labels)

  def change(unit):
    after = losses(
        architecture, model, trees, splits, {axis: unit[None]}, x, labels
    )
    return jnp.sum(after - before)

  return lax.map(change, units, batch_size=chunk)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gradients(
    architecture, model, axis, chunk, trees, start, units, rows, x, labels
):
  """Per unit, the gradient of the mean loss with its split alone."""

  def loss(rows, unit):
    alone = jax.tree.map(lambda row: row[None], rows)
    split = _with_rows(start, unit[None], alone)
    return losses(
        architecture, model, trees, {axis: split}, {axis: unit[None]}, x, labels
    ).mean()

  return lax.map(
      lambda pair: jax.grad(loss)(*pair), (rows, units), batch_size=chunk
  )


def _with_rows(
    like: Split, units: jax.Array, rows: tuple[jax.Array, jax.Array]
) -> Split:
  """A split of some units, given by their rows; zero for all others."""
  u, e = (
      jnp.zeros_like(flat(part)).at[units].set(row)
      for flat, part, row in (
          (splits_lib.incoming, like.u, rows[0]),
          (splits_lib.outgoing, like.e, rows[1]),
      )
  )
  return Split(
      splits_lib.as_incoming(u, like.u), splits_lib.as_outgoing(e, like.e)
  )
