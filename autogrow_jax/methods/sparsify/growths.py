"""The two growths of `Sparsify`: a new sample, and the last prune."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import growth
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax.methods.sparsify import space as space_lib

Architecture = architecture_lib.Architecture
Tree = Any


def new_sample(
    architecture: Architecture,
    space: space_lib.Space,
    before: Tree,
    memory: Tree,
) -> growth.Growth:
  """Puts another sample in place; what it attaches has no momentum yet.

  Args:
    architecture: the full-size network.
    space: configuration space of the network.
    before: the method's other leaves.
    memory: the same under the new sample.

  Returns:
    The growth.
  """
  old, new = before['q'], memory['q']
  attached = jax.tree.map(lambda old, new: new & ~old, old, new)

  def patch(state, key):
    del key
    opt_state = _without_momentum(
        state.opt_state, architecture, space, attached
    )
    return state.replace(
        opt_state=opt_state, stats={**state.stats, 'method': memory}
    ), _changes(before['grown'], old, new)

  return growth.Growth(architecture, patch=patch, note='a new sample')


def last_prune(
    architecture: Architecture,
    space: space_lib.Space,
    q: Tree,
    p: Tree,
    *,
    scale: Callable[..., Any],
    report: Mapping[str, Any],
) -> growth.Growth:
  """Prunes what is not in a sample, and multiplies gates into weights.

  The outputs are those of the gated network. Only a gate of a block without a
  shortcut cannot be folded: it becomes 1, and the receipt says what that
  changes.

  Args:
    architecture: the full-size network.
    space: configuration space of the network.
    q: the sample.
    p: gates of what is in the sample.
    scale: `growth.scale_readers` or `growth.scale_filters`.
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

  def patch(state, key):
    del key
    tree = scale(
        {'weights': state.params['weights'], **state.stats},
        state_lib.axis_table(pruned),
        gates,
    )
    weights = _with_folded_layers(pruned, tree['weights'], p['layers'])
    memory = {
        **state.stats['method'],
        'q': jax.tree.map(np.ones_like, state.stats['method']['q']),
        'open': np.float32(0),
    }
    return state.replace(
        params={**state.params, 'weights': weights},
        stats={'network': tree['network'], 'method': memory},
    ), {**report, 'widths': widths}

  return growth.Growth(
      pruned, kept, patch, note='prune for good what is not in the sample'
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
) -> Any:
  """Sets the moments of what is attached to zero."""
  table = state_lib.axis_table(architecture)
  keep = {
      axis: ~attached['channels'][name]
      for name, axes in space.groups
      for axis in axes
      if attached['channels'][name].any()
  }
  blocks = {name for name, is_new in attached['layers'].items() if is_new}

  def reset(path, leaf):
    path = state_lib.names(path)
    axes = state_lib.find_axes(path, table)
    if axes is None:
      return leaf
    if blocks & set(path):
      return np.zeros_like(leaf)
    for dim, axis in enumerate(axes):
      if axis is not None and axis.name in keep:
        shape = [1] * leaf.ndim
        shape[dim] = -1
        leaf = leaf * keep[axis.name].reshape(shape).astype(leaf.dtype)
    return leaf

  return jax.tree_util.tree_map_with_path(reset, opt_state)


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
