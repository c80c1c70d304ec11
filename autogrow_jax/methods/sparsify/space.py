"""The configuration space: channels and blocks that may be there or not."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture

GROWS = ('channels', 'layers', 'both')
BUDGETS = ('params', 'macs')


@dataclasses.dataclass(frozen=True)
class Space:
  """Channels and layers that may be there or not.

  Attributes:
    groups: (name, axes) of channels that are there together: channel i of
      every axis of a group. A group has the name of its first axis.
    layers: the blocks that may be missing: all that keep the shape of their
      input, except the first of each stage.
    owners: (group, block) of the groups that are private to such a block.
  """

  groups: tuple[tuple[str, tuple[str, ...]], ...]
  layers: tuple[str, ...]
  owners: tuple[tuple[str, str], ...]


@functools.lru_cache(maxsize=256)
def of(architecture: Architecture, grow: str) -> Space:
  """Finds the configuration space of a network.

  A stream is one group, which all layers that write it share. Where a block may
  be missing that has no shortcut, what it reads and what it writes are one
  group too: without it, its output is its input, channel by channel.

  Args:
    architecture: the full-size network.
    grow: one of `GROWS`.

  Returns:
    The space; a network that was pruned may have nothing more to choose.
  """
  fixed = networks.get(architecture.family).fixed_axes
  axes = [axis for axis, _ in architecture.sizes if axis not in fixed]
  layers = _layers(architecture) if grow != 'channels' else ()
  groups = {} if grow == 'layers' else _tied(architecture, axes, layers)
  owners = [
      (name, block)
      for name, members in groups.items()
      for block in layers
      if all(axis.startswith(f'{block}.') for axis in members)
  ]
  return Space(tuple(groups.items()), layers, tuple(owners))


def check(architecture: Architecture, grow: str) -> None:
  """Raises a ValueError if a full-size network leaves nothing to choose."""
  space = of(architecture, grow)
  if grow == 'channels' and not space.groups:
    raise ValueError(f'{architecture} has no channels of its own to choose.')
  if grow != 'channels' and not space.layers:
    raise ValueError(
        f'{architecture} has no layers that may be missing: the first of each '
        'stage always stays; give more with --depths.'
    )


def check_target(sparsity: float) -> None:
  """Raises a ValueError unless a sparsity is between 0 and 1."""
  if not 0 < sparsity < 1:
    raise ValueError(
        'target_sparsity is the part of the cost to do without, above 0 and '
        f'below 1, got {sparsity}.'
    )


def is_in_a_layer(space: Space, q: Mapping[str, Any]) -> dict[str, Any]:
  """Tells for every group whether the layer that it is private to is there.

  Args:
    space: the configuration space.
    q: the sample.

  Returns:
    Bools by group; True for groups that are private to no layer.
  """
  owners = dict(space.owners)
  return {
      name: q['layers'][owners[name]] if name in owners else True
      for name, _ in space.groups
  }


def counts(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
  """Sums channels in a tree of masks, by axis."""
  return {
      axis: values['channels'][name].sum()
      for name, axes in space.groups
      for axis in axes
  }


def density(
    architecture: Architecture,
    space: Space,
    values: Mapping[str, Any],
    budget: str,
) -> Any:
  """Divides a network's cost by the full one's: 1 - sparsity, equation (4).

  Args:
    architecture: the full-size network.
    space: configuration space of the network.
    values: {'channels': {group: (size,)}, 'layers': {block: ()}}, samples or
      probabilities; may be traced. A product of probabilities is the expected
      cost only approximately, since channels of an axis are drawn apart.
    budget: one of `BUDGETS`.

  Returns:
    The ratio.
  """
  cost = {'params': costs.params, 'macs': costs.macs}[budget]
  return cost(
      architecture, counts(space, values), values['layers']
  ) / cost(architecture)


def _layers(architecture: Architecture) -> tuple[str, ...]:
  parts = {part.name: part for part in networks.parts(architecture)}
  return tuple(
      block
      for stage in architecture.stages
      for block in stage[1:]
      if base.output_shape(parts[block]) == parts[block].input_shape
  )


def _tied(
    architecture: Architecture, axes: list[str], layers: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
  """Groups axes by name, in the order of the axes' names."""
  root = {axis: axis for axis in axes}

  def find(axis):
    while root[axis] != axis:
      axis = root[axis]
    return axis

  for part in networks.parts(architecture):
    if part.name in layers:
      names = dict(part.axes)
      ends = sorted(find(names[end]) for end in ('in', 'out'))
      root[ends[1]] = ends[0]
  groups: dict[str, list[str]] = {}
  for axis in axes:
    groups.setdefault(find(axis), []).append(axis)
  return {name: tuple(members) for name, members in groups.items()}
