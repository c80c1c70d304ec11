"""The two growths of `Sparsify`: a new sample, and the last prune."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods.sparsify import space as space_lib

Architecture = architecture_lib.Architecture
Tree = Any


def new_sample(
    architecture: Architecture,
    space: space_lib.Space,
    opt_state: Any,
    before: Tree,
    memory: Tree,
) -> growth_lib.Growth:
  """Puts another sample in place; what it attaches has no momentum yet.

  Args:
    architecture: the full-size network.
    space: configuration space of the network.
    opt_state: the optimizer's state.
    before: the method's other leaves.
    memory: the same under the new sample.

  Returns:
    The growth.
  """
  old, new = before['q'], memory['q']
  attached = jax.tree.map(lambda old, new: new & ~old, old, new)
  return growth_lib.Growth(
      values=state_lib.values(method=memory),
      moments=_without_momentum(opt_state, architecture, space, attached),
      target=architecture,
      report=_changes(before['grown'], old, new),
      note='a new sample',
  )


def last_prune(
    architecture: Architecture,
    state: state_lib.TrainState,
    space: space_lib.Space,
    q: Tree,
    p: Tree,
    *,
    extra: state_lib.ExtraOf,
    scale: Callable[..., Any],
    report: Mapping[str, Any],
) -> growth_lib.Growth:
  """Prunes what is not in a sample, and multiplies gates into weights.

  The outputs are those of the gated network. Only a gate of a block without a
  shortcut cannot be folded: it becomes 1, and the receipt says what that
  changes.

  Args:
    architecture: the full-size network.
    state: its canonical state.
    space: configuration space of the network.
    q: the sample.
    p: gates of what is in the sample.
    extra: the method's own leaves.
    scale: `axes.scale_readers` or `axes.scale_filters`.
    report: values for the receipt.

  Returns:
    The growth, after which nothing is masked.
  """
  pruned, kept, gates = architecture, {}, {}
  for block in space.layers:
    if not q['layers'][block]:
      pruned = pruned.without_block(block)
  sizes = dict(pruned.sizes)
  for name, axes in space.groups:
    for axis in set(axes) & sizes.keys():
      kept[axis] = np.flatnonzero(q['channels'][name])
      gates[axis] = p['channels'][name][kept[axis]]
  pruned = pruned.resized({axis: len(units) for axis, units in kept.items()})
  widths = {axis: pruned.size(axis) for axis in sorted(kept)}

  change = growth_lib.Growth(
      kept, target=pruned, note='prune for good what is not in the sample'
  )
  # Momentum is pruned, but not scaled.
  left = state_lib.grown_arrays(
      state, change, key=jax.random.key(0), extra=extra
  )
  tree = scale(
      {'weights': left.params['weights'], 'network': left.stats['network']},
      state_lib.axis_table(pruned),
      gates,
  )
  memory = left.stats['method']
  return dataclasses.replace(
      change,
      values=state_lib.values(
          weights=_with_folded_layers(pruned, tree['weights'], p['layers']),
          network=tree['network'],
          method={
              'q': jax.tree.map(np.ones_like, memory['q']),
              'open': np.float32(0),
          },
      ),
      report={**report, 'widths': widths},
  )


def _with_folded_layers(
    architecture: Architecture, weights: Tree, gates: Mapping[str, Any]
) -> Tree:
  """Multiplies the gates of blocks into the last layers of their branches."""
  folded = dict(weights)
  for part in networks.parts(architecture):
    last = part.module.last_layer
    if part.name in gates and last is not None:
      gate = np.float32(gates[part.name])
      folded[part.name] = {
          **weights[part.name],
          last: jax.tree.map(
              lambda leaf, gate=gate: leaf * gate, weights[part.name][last]
          ),
      }
  return folded


def _without_momentum(
    opt_state: Any,
    architecture: Architecture,
    space: space_lib.Space,
    attached: Tree,
) -> dict[axes_lib.Path, np.ndarray]:
  """Moments of an optimizer, zero where something is attached."""
  table = state_lib.axis_table(architecture)
  keep = {
      axis: ~attached['channels'][name]
      for name, axes in space.groups
      for axis in axes
      if attached['channels'][name].any()
  }
  blocks = {name for name, is_new in attached['layers'].items() if is_new}

  reset = {}
  for path, leaf in axes_lib.by_path(opt_state).items():
    axes = table.find(path)
    if axes is None:
      continue
    kept = leaf * (not blocks & set(path))
    for dim, axis in enumerate(axes):
      if axis is not None and axis.name in keep:
        is_kept = axes_lib.along(keep[axis.name], dim, leaf.ndim)
        kept = kept * is_kept.astype(leaf.dtype)
    reset[path] = kept
  return reset


def _changes(grown: Tree, old: Tree, new: Tree) -> dict[str, int]:
  """Counts channels and layers that come and go, for the receipt."""
  count = lambda kind, which: sum(
      int(np.sum(which(grown[kind][name], old[kind][name], q)))
      for name, q in new[kind].items()
  )
  report = {}
  for kind in new:
    if new[kind]:
      report[f'{kind}_grown'] = count(kind, lambda g, a, b: b & ~a & ~g)
      report[f'{kind}_reattached'] = count(kind, lambda g, a, b: b & ~a & g)
      report[f'{kind}_detached'] = count(kind, lambda g, a, b: a & ~b)
  return report
