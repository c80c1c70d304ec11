"""Compiled programs of a run: the training step and the forward pass.

They are compiled per bucket of architectures, on demand or in advance.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import functools
import os
import threading
import time
from typing import Any
import warnings

import jax

from autogrow_jax import view
from autogrow_jax.run import console
from autogrow_jax.run import steps

Compiled = Callable[..., Any]

# Names of the two kinds of program.
_TRAINING, _EVALUATION = 'train step', 'evaluation'


@dataclasses.dataclass(frozen=True)
class Compilation:
  """A compiled program, for the history.

  Attributes:
    name: name of its kind.
    seconds: seconds of tracing and compiling.
    bytes: bytes that it needs on a device, by the compiler.
    waited: seconds spent waiting for a program compiled in advance; None for
      others.
  """

  name: str
  seconds: float
  bytes: int | None
  waited: float | None = None


@dataclasses.dataclass(eq=False)
class Compilations:
  """Number of compilations that `compilations` counted, and their seconds."""

  count: int = 0
  seconds: float = 0.0


class _Watching(threading.local):

  def __init__(self):
    self.here: list[Compilations] = []


_watching = _Watching()


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
  """Counts programs that JAX compiles meanwhile, or takes out of its cache.

  Counts this thread only; background compilations run in another one.
  """
  spent = Compilations()
  _watching.here.append(spent)
  try:
    yield spent
  finally:
    _watching.here.remove(spent)


def _on_duration(
    event: str, duration_secs: float, **unused_labels: Any
) -> None:
  if event == '/jax/core/compile/backend_compile_duration':
    for spent in _watching.here:
      spent.count += 1
      spent.seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_on_duration)


def cache_compilations(directory: str | os.PathLike[str]) -> None:
  """Keeps compiled programs in a directory, for the next process.

  An entry that was damaged by a kill, or that a full disk has no room for, only
  costs its compilation.
  """
  warnings.filterwarnings(
      'ignore', 'Error (reading|writing) persistent compilation cache'
  )
  jax.config.update('jax_compilation_cache_dir', os.fspath(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def cache_line() -> str:
  """Where compiled programs are kept, and how many are there already."""
  directory = jax.config.values['jax_compilation_cache_dir']
  if not directory:
    return 'compiled programs are not kept for the next start'
  sizes = []
  # Others may write and remove there.
  with contextlib.suppress(OSError), os.scandir(directory) as entries:
    for entry in entries:
      if entry.name.endswith('-cache'):
        sizes.append(entry.stat().st_size)
  size = console.format_count(sum(sizes))
  return f'compiled programs: {len(sizes)} of {size}B in {directory}'


def compiled_bytes(compiled: Any) -> int | None:
  """Bytes that a compiled program needs on a device, by the compiler.

  Arguments, results that do not take their place, and temporaries; None where
  the compiler does not say.
  """
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  return (
      analysis.argument_size_in_bytes
      + analysis.output_size_in_bytes
      - analysis.alias_size_in_bytes
      + analysis.temp_size_in_bytes
  )


class Programs:
  """Compiles programs when first needed; keeps those of the last two buckets.

  Two, because a growth's receipt compares the networks before and after. The
  programs of a likely bucket can be compiled in advance, by one thread; which
  program runs does not depend on it, since one that is not ready is waited for.
  """

  def __init__(self, computation: steps.Computation):
    self._computation = computation
    self._compiled: dict[view.Bucket, dict[Any, Compiled]] = {}
    self._last: dict[str, Any] = {}
    self._thread = futures.ThreadPoolExecutor(1, 'compile ahead')
    self._ahead: dict[tuple[view.Bucket, str], futures.Future] = {}
    self._done: list[Compilation] = []

  def train_step(self, layout: view.Layout, arguments: Any) -> Compiled:
    """`train_step` for arguments like these; consumes the packed state."""
    return self._get(layout, _TRAINING, arguments)

  def forward(self, layout: view.Layout, arguments: Any) -> Compiled:
    """`forward` for arguments like these."""
    return self._get(layout, _EVALUATION, arguments)

  def prepare(self, layout: view.Layout) -> None:
    """Starts to compile the programs compiled last for another layout, too.

    Args:
      layout: the layout that is likely to come; its whole network is computed.
    """
    if layout.bucket in self._compiled:
      return
    for name, last in self._last.items():
      if (layout.bucket, name) not in self._ahead:
        self._ahead[layout.bucket, name] = self._thread.submit(
            self._prepare, layout, name, last
        )

  def drain(self) -> list[Compilation]:
    """Compilations since the last call."""
    done, self._done = self._done, []
    return done

  def close(self) -> None:
    """Waits for background compilations; notes those that were not needed."""
    self._thread.shutdown(cancel_futures=True)
    for (_, name), ahead in self._ahead.items():
      if not ahead.cancelled() and ahead.exception() is None:
        *_, seconds = ahead.result()
        self._done.append(
            Compilation(f'{name}, not needed', seconds, None, 0.0)
        )
    self._ahead.clear()

  def _prepare(self, layout, name, last):
    """Compiles for arguments like the last ones, but of another layout."""
    packed, depths = self._computation.parallel.abstract(
        (steps.packed_shapes(self._computation, layout), layout.depths)
    )
    state = (packed,)
    if name == _EVALUATION:
      state = packed.params, packed.stats
    arguments = (*state, *last[len(state) : -1], depths)
    return _key(layout, name, arguments), *self._compile(
        layout, name, arguments
    )

  def _get(self, layout, name, arguments):
    known = self._compiled.pop(layout.bucket, {})
    self._compiled[layout.bucket] = known
    while len(self._compiled) > 2:
      del self._compiled[next(iter(self._compiled))]
    key = _key(layout, name, arguments)
    if key not in known:
      known[key] = self._obtain(layout, name, arguments)
    return known[key]

  def _obtain(self, layout, name, arguments):
    """Waits for a program that is being compiled, or compiles it."""
    self._last[name] = self._computation.parallel.like(arguments)
    ahead = self._ahead.pop((layout.bucket, name), None)
    if ahead is not None:
      started = time.perf_counter()
      key, compiled, seconds = ahead.result()
      self._note(name, compiled, seconds, time.perf_counter() - started)
      if key == _key(layout, name, arguments):
        return compiled
    compiled, seconds = self._compile(layout, name, arguments)
    self._note(name, compiled, seconds)
    return compiled

  def _note(self, name, compiled, seconds, waited=None):
    size = compiled_bytes(compiled)
    self._done.append(Compilation(name, seconds, size, waited))

  def _compile(self, layout, name, arguments):
    is_training = name == _TRAINING
    function = steps.train_step if is_training else steps.forward
    return self._computation.parallel.compile(
        functools.partial(function, self._computation, layout),
        arguments,
        outputs='replicated' if is_training else 'sharded',
        donate=(0,) if is_training else (),
    )


def _key(layout: view.Layout, name: str, arguments: Any) -> Any:
  """Tells programs of a bucket apart.

  A method's own leaves are not packed and may differ within a bucket, and so
  may what it makes of the blocks' names, and windows of text in length.
  """
  names = None
  if layout.architecture != layout.canonical:
    names = layout.architecture
  leaves, structure = jax.tree.flatten(arguments)
  return name, names, structure, tuple(leaf.shape for leaf in leaves)
