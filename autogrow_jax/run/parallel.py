"""Data parallelism: one file, one class, three modes.

`single` runs on one device. `pmap` runs one program per device and averages
gradients and metrics; batch norm sees each device's share of the batch, as in
the papers' runs on several GPUs, and running statistics are averaged. `jit`
sees the batch as a whole on a mesh, batch norm included, so that its results
are those of one device. The step is written once for all three: it calls
`Parallel.mean` and `Parallel.sum`, which do nothing outside `pmap`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import Any, Literal

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import state as state_lib

Mode = Literal['single', 'pmap', 'jit']
Role = Literal['replicated', 'sharded']

AXIS = 'devices'

# Without it XLA's CPU compiler gives convolutions to YNNPACK, which takes up to
# ten times as long for kernel gradients, but is good at reductions.
CPU_OPTIONS = {
    'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'
}


@dataclasses.dataclass(frozen=True)
class Parallel:
  """Places data on devices and compiles functions for them.

  Attributes:
    mode: one of the three modes.
    devices: the devices that are used.
  """

  mode: Mode
  devices: tuple[jax.Device, ...]

  def __post_init__(self):
    if self.mode == 'single' and len(self.devices) != 1:
      raise ValueError(f'single mode has one device, not {len(self.devices)}.')

  def mean(self, tree: Any) -> Any:
    """Averages over devices, inside a compiled function.

    Leaves that are no real numbers, such as counters, are the same everywhere.
    """
    if self.mode != 'pmap':
      return tree
    return jax.tree.map(
        lambda leaf: (
            lax.pmean(leaf, AXIS)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
            else leaf
        ),
        tree,
    )

  def sum(self, tree: Any) -> Any:
    """Sums over devices, inside a compiled function."""
    return lax.psum(tree, AXIS) if self.mode == 'pmap' else tree

  def first(self, size: int) -> int | jax.Array:
    """Position in a batch of this device's share of a size; in a program."""
    return lax.axis_index(AXIS) * size if self.mode == 'pmap' else 0

  def replicate(self, tree: Any) -> Any:
    """Puts a host tree on every device."""
    if self.mode == 'pmap':
      count = len(self.devices)
      tree = jax.tree.map(
          lambda leaf: np.broadcast_to(leaf, (count, *np.shape(leaf))), tree
      )
    return self._put(tree, sharded=self.mode == 'pmap')

  def abstract(self, tree: Any) -> Any:
    """Shapes and places of what `replicate` makes of arrays, or of shapes."""
    copies = (len(self.devices),) if self.mode == 'pmap' else ()
    sharding = self._sharding(sharded=self.mode == 'pmap')
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (*copies, *leaf.shape), leaf.dtype, sharding=sharding
        ),
        tree,
    )

  def like(self, tree: Any) -> Any:
    """Shapes and places of arrays that are on the devices."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        tree,
    )

  def shard(self, tree: Any) -> Any:
    """Splits the first dimension of a host tree, which the devices divide.

    In `pmap` mode the result has another first dimension, of devices.
    """
    if self.mode == 'pmap':
      count = len(self.devices)
      tree = jax.tree.map(
          lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), tree
      )
    return self._put(tree, sharded=self.mode != 'single')

  def fetch(self, tree: Any) -> Any:
    """Copies a replicated tree to the host."""
    if self.mode == 'pmap':
      tree = jax.tree.map(lambda leaf: leaf[0], tree)
    return state_lib.to_host(tree)

  def gather(self, tree: Any) -> Any:
    """Copies a sharded tree to the host, as one batch."""
    tree = state_lib.to_host(tree)
    if self.mode == 'pmap':
      tree = jax.tree.map(
          lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree
      )
    return tree

  def compile(
      self,
      function: Callable[..., Any],
      arguments: Sequence[Any],
      *,
      outputs: Role,
      donate: tuple[int, ...] = (),
  ) -> tuple[Callable[..., Any], float]:
    """Compiles a function for arguments that are already placed.

    Args:
      function: function of the arguments; in `pmap` mode, of each device's
        share of them.
      arguments: arrays placed by `replicate` or `shard`; not consumed.
      outputs: placement of the results.
      donate: positions of arguments that a call consumes.

    Returns:
      The compiled function, and the seconds that tracing and compiling took.
    """
    start = time.perf_counter()
    if self.mode == 'pmap':
      mapped = jax.pmap(
          function, AXIS, devices=self.devices, donate_argnums=donate
      )
    else:
      place = self._sharding(
          sharded=self.mode == 'jit' and outputs == 'sharded'
      )
      mapped = jax.jit(function, donate_argnums=donate, out_shardings=place)
    compiled = _compiled(mapped.lower(*arguments), self.devices[0].platform)
    return compiled, time.perf_counter() - start

  def _sharding(self, *, sharded: bool) -> jax.sharding.Sharding:
    if self.mode == 'single':
      return jax.sharding.SingleDeviceSharding(self.devices[0])
    spec = jax.sharding.PartitionSpec(*[AXIS] * sharded)
    return jax.sharding.NamedSharding(_mesh(self.devices), spec)

  def _put(self, tree: Any, *, sharded: bool) -> Any:
    # `may_alias=False`: an alias of host memory could not be donated.
    sharding = self._sharding(sharded=sharded)
    return jax.device_put(tree, sharding, may_alias=False)


def _compiled(lowered: Any, platform: str) -> Callable[..., Any]:
  """Compiles with our options for CPUs, or without where they are unknown."""
  if platform != 'cpu':
    return lowered.compile()
  try:
    return lowered.compile(compiler_options=CPU_OPTIONS)
  except jax.errors.JaxRuntimeError:
    return lowered.compile()


@functools.lru_cache(maxsize=1)
def _mesh(devices: tuple[jax.Device, ...]) -> jax.sharding.Mesh:
  return jax.make_mesh(
      (len(devices),),
      (AXIS,),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=devices,
  )


def make(mode: str = 'auto', num_devices: int | None = None) -> Parallel:
  """Chooses devices.

  Args:
    mode: 'auto', 'pmap' or 'jit'; 'auto' is one plain device if there is one,
      else 'jit', whose results do not depend on the number of devices.
    num_devices: number of devices; None for all accelerators, or one CPU.

  Raises:
    ValueError: there are fewer devices, or there is no such mode.
  """
  devices = jax.devices()
  if num_devices is None:
    num_devices = 1 if devices[0].platform == 'cpu' else len(devices)
  if not 1 <= num_devices <= len(devices):
    raise ValueError(
        f'num_devices is 1 to {len(devices)} on this machine, got '
        f'{num_devices}.'
    )
  auto: Mode = 'single' if num_devices == 1 else 'jit'
  modes: dict[str, Mode] = {'auto': auto, 'pmap': 'pmap', 'jit': 'jit'}
  if mode not in modes:
    raise ValueError(f'parallel is auto, pmap or jit, got {mode!r}.')
  return Parallel(modes[mode], tuple(devices[:num_devices]))
