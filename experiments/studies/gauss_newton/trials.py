"""The true loss of a network after splits, as a function of u and e.

It can be traced and differentiated, with the index maps of `growth` and the
deltas of `surgery`. So everything around an axis, streams and depthwise layers
too, is as exact as the network itself. All networks are padded.
"""

from collections.abc import Mapping, Sequence
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
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import taps

Architecture = architecture_lib.Architecture
Trees = signals_lib.Trees
Batch, Split, Splits = signals_lib.Batch, splits_lib.Split, splits_lib.Splits
Sites = tuple[sites_lib.Site, ...]

DECAYS = (0.9, 0.99)  # Of Adam.


def true_changes(
    architecture: Architecture,
    site: sites_lib.Site,
    trees: Trees,
    split: Split,
    units: Sequence[int],
    batches: Sequence[Batch],
) -> np.ndarray:
  """Measures the change of the loss if one unit is split, for each one alone.

  Args:
    architecture: architecture of the network.
    site: the site.
    trees: arrays of the network.
    split: split of the site.
    units: units to split.
    batches: examples.

  Returns:
    (units,) change of the mean loss in evaluation mode, nats, float64.
  """
  padded, units = padding.padded(architecture), np.asarray(units)
  total = signals_lib.add(
      _changes(padded, site, trees, split, units, *batch) for batch in batches
  )
  return total / signals_lib.count(batches)


def oracle(
    architecture: Architecture,
    site: sites_lib.Site,
    trees: Trees,
    start: Split,
    units: Sequence[int],
    batches: Sequence[Batch],
    *,
    steps: int,
    learning_rate: float,
) -> Split:
  """Optimises each unit's split on the true loss with that split alone.

  It is no bound: other solvers, and more steps, can find better splits.

  Args:
    architecture: architecture of the network.
    site: the site.
    trees: arrays of the network.
    start: where the descent begins, see `splits.start`.
    units: units to split, each in a network of its own.
    batches: examples, one batch for each step, in turn.
    steps: steps of Adam.
    learning_rate: learning rate of Adam.
  """
  padded, units = padding.padded(architecture), np.asarray(units)
  tx, split = optax.adam(learning_rate, *DECAYS), start
  state = tx.init(split)
  for step in range(steps):
    batch = batches[step % len(batches)]
    gradients = _gradients(padded, site, trees, split, units, *batch)
    updates, state = tx.update(gradients, state)
    split = optax.apply_updates(split, updates)
  return split


def losses(
    architecture: Architecture,
    sites: Sites,
    trees: Trees,
    splits: Splits,
    units: Mapping[str, jax.Array],
    x: jax.Array,
    labels: jax.Array,
) -> jax.Array:
  """Computes the loss of each example after splits; traceable.

  Args:
    architecture: padded architecture before the splits.
    sites: the sites of the splits.
    trees: arrays before the splits.
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
  after = _split_trees(architecture, sites, trees, splits, units)
  chain = taps.chain_of(networks.parts(wider))
  logits = taps.run(chain, after.weights, after.stats, x).output
  return tasks.cross_entropy(logits, labels)


def _split_trees(architecture, sites, trees, splits, units):
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
  for site in sites:
    split = splits[site.axis]
    for role, ends, parts in (
        ('writes', site.form.writers, split.u),
        ('reads', site.form.readers, split.e),
    ):
      for end, delta in zip(ends, parts, strict=True):
        key = (*site.path(end.layer.path), 'kernel'), role
        deltas.setdefault(key, []).append((site.axis, delta))

  def leaf_after(root, path, leaf):
    axes = table.axes.get((root, *path), ())

    def gather(leaf):
      for dim, axis in enumerate(axes):
        if axis is not None and axis.name in sources:
          leaf = jnp.take(leaf, sources[axis.name], axis=dim)
      return leaf

    def along(name, role, leaf, vector):
      dim = axes.index(axes_lib.Axis(name, role))
      return leaf * axes_lib.along(vector, dim, leaf.ndim).astype(leaf.dtype)

    after = gather(leaf)
    for axis, delta in deltas.get((path, 'writes'), ()):
      after += along(axis, 'writes', gather(delta), signs[axis])
    for axis in units:
      if root == 'weights' and axes_lib.Axis(axis, 'reads') in axes:
        half = jnp.where(signs[axis] == 0, 1, 0.5)
        after = along(axis, 'reads', after, half)
    for axis, delta in deltas.get((path, 'reads'), ()):
      after += along(axis, 'reads', gather(delta), signs[axis])
    return after

  return Trees(*(
      axes_lib.map_with_names(functools.partial(leaf_after, root), tree)
      for root, tree in (('weights', trees.weights), ('network', trees.stats))
  ))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _changes(architecture, site, trees, split, units, x, labels):
  """Sums the change of the loss over examples, (units,)."""
  before = losses(architecture, (), trees, {}, {}, x, labels)

  def change(unit):
    after = losses(
        architecture, (site,), trees, {site.axis: split},
        {site.axis: unit[None]}, x, labels,
    )
    return jnp.sum(after - before)

  return lax.map(change, units)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(architecture, site, trees, split, units, x, labels):
  """Computes the gradient of the mean loss with each unit's split alone."""

  def loss(split, unit):
    return losses(
        architecture, (site,), trees, {site.axis: split},
        {site.axis: unit[None]}, x, labels,
    ).mean()

  def add(unit, total):
    return jax.tree.map(jnp.add, total, jax.grad(loss)(split, unit))

  # Other units' splits have no gradient in the network of one.
  return lax.fori_loop(
      0,
      len(units),
      lambda i, total: add(units[i], total),
      jax.tree.map(jnp.zeros_like, split),
  )
