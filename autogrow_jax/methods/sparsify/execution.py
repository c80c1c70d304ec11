"""`Masked`: a network under the gates of its masks, whole or in part."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.methods.sparsify import compact as compact_lib
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import space as space_lib

Architecture = architecture_lib.Architecture
Tree = Any


@dataclasses.dataclass(frozen=True)
class Masked:
  """Computes a network under gates q p, see `view.Execution`.

  Attributes:
    grow: one of `space.GROWS`.
    gate: where gates multiply, 'readers' or 'filter'.
    compact: whether only what is in the sample is computed.
    annealing: probabilities p of mask variables.
    spare: whether stacks have spare room; never, since gates are per block.
  """

  grow: str
  gate: str
  compact: bool
  annealing: masks.Annealing
  spare: Literal[False] = dataclasses.field(default=False, init=False)

  def active(
      self, architecture: Architecture, memory: Tree
  ) -> compact_lib.Subset | None:
    if not memory['open']:
      return None
    space_lib.check(architecture, self.grow)
    space = space_lib.of(architecture, self.grow)
    q = memory['q']
    return compact_lib.Subset(
        architecture,
        units={
            axis: np.asarray(q['channels'][name])
            for name, axes in space.groups
            for axis in axes
        },
        blocks={block: bool(q['layers'][block]) for block in space.layers},
        compact=self.compact,
    )

  def gated(self, layout: view.Layout, params: Tree, stats: Tree) -> view.Gated:
    architecture, memory = layout.architecture, stats['method']
    space, q = space_lib.of(layout.canonical, self.grow), memory['q']
    gates = jax.tree.map(
        lambda q, p: jnp.where(memory['open'] > 0, q * p, 1.0),
        q,
        self.annealing.probabilities(params['aux'], memory),
    )
    sizes, readers, filters = dict(architecture.sizes), {}, {}
    for name, axes in space.groups:
      for axis in axes:
        if axis in sizes:
          on = q['channels'][name]
          units = compact_lib.ordered(on, sizes[axis], numpy=jnp)
          gate = gates['channels'][name][units]
          if self.gate == 'filter':
            filters[axis] = gate
            gate = on[units].astype(jnp.float32)
          readers[axis] = gate
    tree = {
        'weights': view.unpack(params['weights'], layout),
        'network': view.unpack(stats['network'], layout),
    }
    table = state_lib.axis_table(architecture)
    tree = axes_lib.scale_readers(tree, table, readers)
    if filters:
      tree = axes_lib.scale_filters(tree, table, filters)
    tree = view.pack(tree, layout, stack=jnp.stack)
    return view.Gated(
        tree['weights'],
        tree['network'],
        _block_gates(layout, gates['layers']) if space.layers else None,
    )

  def applied(
      self, architecture: Architecture, updates: Tree, stats: Tree
  ) -> Tree:
    """Freezes the masks of channels in absent layers.

    Their gradients are zero, but momentum and decay would move them.
    """
    space = space_lib.of(architecture, self.grow)
    channels = jax.tree.map(
        jnp.multiply,
        space_lib.is_in_a_layer(space, stats['method']['q']),
        updates['aux']['channels'],
    )
    return {**updates, 'aux': {**updates['aux'], 'channels': channels}}


def _block_gates(layout: view.Layout, gates: Mapping[str, Any]) -> Tree:
  """Collects gates of blocks by segments that have such a block."""
  result = {}
  for segment, members in zip(layout.bucket, layout.members, strict=True):
    if any(name in gates for name in members):
      dtype = jnp.result_type(*gates.values())
      values = [jnp.asarray(gates.get(name, 1), dtype) for name in members]
      result[segment.key] = (
          values[0] if segment.length is None else jnp.stack(values)
      )
  return result
