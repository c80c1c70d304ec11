"""The true loss of a network after splits.

A network with split channels is written as a function of u and e that can be
traced and differentiated, with the index maps of `growth` and the deltas of
`surgery`. So everything around an axis, streams and depthwise layers too, is as
exact as the network itself.
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
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import taps

from . import joint

Architecture = architecture_lib.Architecture
Model, Trees = signals_lib.Model, signals_lib.Trees
Batch, Split, Splits = splits_lib.Batch, splits_lib.Split, splits_lib.Splits

# Networks that run at the same time on an accelerator, each with another unit
# split; on a CPU it is one.
CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Tuned:
  """Splits that were optimised on the true loss.

  Attributes:
    split: split of the site; u = e = 0 for all other units.
    decreases: (units,) decrease of the mean loss by each alone, nats, float64.
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
) -> np.ndarray:
  """Measures the change of the loss if one unit is split, for each one alone.

  Args:
    architecture: architecture of the network.
    model: the network.
    trees: arrays of the network.
    splits: splits of the site at least.
    axis: axis of the site.
    units: units to split.
    batches: examples.

  Returns:
    (units,) change of the mean loss in evaluation mode, nats, float64.

  Raises:
    ValueError: if the axis has no such units.
  """
  units = _checked(architecture, axis, units)
  total = sum(
      np.asarray(
          _changes(
              architecture, model, axis, _chunk(), trees, {axis: splits[axis]},
              units, x, labels,
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
) -> Tuned:
  """Optimises each unit's split on the true loss with that split alone.

  It is no bound: other solvers, and more steps, can find better splits.

  Args:
    architecture: architecture of the network.
    model: the network.
    trees: arrays of the network.
    axis: axis of the site.
    units: units to split, each in a network of its own.
    batches: examples, one batch for each step, in turn.
    key: key of the start, see `splits.start`.
    steps: steps of Adam.
    learning_rate: learning rate of Adam.

  Returns:
    The splits, and their gains on all batches.

  Raises:
    ValueError: if the axis has no such units.
  """
  units, chunk = _checked(architecture, axis, units), _chunk()
  start = splits_lib.start(model, trees, key)[axis]
  rows = (
      splits_lib.incoming(start.u)[units],
      splits_lib.outgoing(start.e)[units],
  )
  tx = joint.adam(learning_rate)
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
      architecture, model, trees, {axis: split}, axis, units, batches
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
  """Computes the loss of each example after splits; traceable.

  Args:
    architecture: architecture before the splits.
    model: the network before the splits.
    trees: arrays of that network.
    splits: splits of all units of these sites.
    units: per axis, distinct units to split; may be traced.
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
  return tasks.cross_entropy(logits, labels)


def split_trees(
    architecture: Architecture,
    model: Model,
    trees: Trees,
    splits: Splits,
    units: Mapping[str, jax.Array],
) -> Trees:
  """Returns the arrays of the network after splits; see `losses`."""
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
    axes = table.axes.get((root, *path), ())
    gather = lambda leaf: _gather(leaf, axes, sources)
    after = gather(leaf)
    for axis, delta in deltas.get((path, 'writes'), ()):
      after += _along(axes, axis, 'writes', gather(delta), signs[axis])
    for axis in units:
      if root == 'weights' and axes_lib.Axis(axis, 'reads') in axes:
        half = jnp.where(signs[axis] == 0, 1, 0.5)
        after = _along(axes, axis, 'reads', after, half)
    for axis, delta in deltas.get((path, 'reads'), ()):
      after += _along(axes, axis, 'reads', gather(delta), signs[axis])
    return after

  return Trees(*(
      axes_lib.map_with_names(functools.partial(leaf_after, root), tree)
      for root, tree in (('weights', trees.weights), ('network', trees.stats))
  ))


def _checked(
    architecture: Architecture, axis: str, units: Sequence[int]
) -> jax.Array:
  """Converts units to an array; JAX would clip numbers out of range."""
  size, units = architecture.size(axis), np.asarray(units, int)
  if ((units < 0) | (units >= size)).any():
    raise ValueError(
        f'Units of {axis} are numbers from 0 to {size - 1}, got '
        f'{units.tolist()}.'
    )
  return jnp.asarray(units)


def _chunk() -> int:
  return 1 if jax.default_backend() == 'cpu' else CHUNK


def _gather(
    leaf: jax.Array, axes: axes_lib.Axes, sources: Mapping[str, jax.Array]
) -> jax.Array:
  """Gathers the units of a leaf's axes."""
  for dim, axis in enumerate(axes):
    if axis is not None and axis.name in sources:
      leaf = jnp.take(leaf, sources[axis.name], axis=dim)
  return leaf


def _along(axes, name, role, leaf, vector):
  """Multiplies a leaf by a vector along one of its axes."""
  dim = axes.index(axes_lib.Axis(name, role))
  return leaf * axes_lib.along(vector, dim, leaf.ndim).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _changes(
    architecture, model, axis, chunk, trees, splits, units, x, labels
):
  """Sums the change of the loss over examples, (units,)."""
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
  """Computes the gradient of the mean loss with each unit's split alone."""

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
  """Builds the split of some units from their rows; zero for all others."""
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
