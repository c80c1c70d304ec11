"""Atomic, verified checkpoints that plain Orbax can read.

`<directory>/<number>/` is one checkpoint with three items:

* `arrays`: nested dictionaries of arrays. Their names are the keys of
  dictionaries, the fields of dataclasses and NamedTuples, and the indices of
  sequences. A typed PRNG key is stored as its data.
* `documents`: JSON.
* `digest`: the training step, and a SHA-256 of everything.

The number is the training step, or the next free one if that step was saved
before: a save touches no checkpoint that is there. Orbax writes beside them and
commits by renaming, so that a kill leaves a whole checkpoint or none.

This is the only file that imports Orbax. All calls of it run in a worker
thread, which has no event loop (that of a notebook would be in the way) and
which writes while the caller goes on. Of several hosts only the first writes.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import threading
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any
_Leaves = dict[tuple[str, ...], tuple[np.ndarray, dict[str, Any]]]


class CheckpointError(ValueError):
  """A checkpoint cannot be written, or none of those there can be used."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read and verified.

  Attributes:
    step: training step.
    state: structure of the abstract state with numpy arrays (and typed PRNG
      keys) as leaves.
    documents: JSON documents by name.
    refusals: one line for each newer checkpoint that cannot be used.
  """

  step: int
  state: PyTree
  documents: dict[str, Any]
  refusals: tuple[str, ...]


class Checkpoints:
  """Checkpoints of one run in one directory. Several threads may use it."""

  def __init__(self, directory: str | os.PathLike[str], *, keep: int):
    """Names the directory, without reading or writing.

    Args:
      directory: local path or URL (`gs://...`). The first save creates it.
      keep: number of newest checkpoints that stay after a save.
    """
    path = os.fspath(directory)
    self._directory = epath.Path(
        path if '://' in path else os.path.abspath(path)
    )
    self._keep = keep
    self._worker = futures.ThreadPoolExecutor(1, 'checkpoint')
    self._lock = threading.RLock()
    self._pending: futures.Future[None] | None = None

  def steps(self) -> tuple[int, ...]:
    """Numbers of the checkpoints, in ascending order."""
    return tuple(self._submit(lambda orbax: orbax.all_steps()).result())

  def save(
      self, step: int, state: PyTree, documents: Mapping[str, Any]
  ) -> None:
    """Copies a state to the host and starts to write it.

    Waits for the save before. When the new checkpoint is committed, older ones
    are removed. What a killed save left is removed first.

    Args:
      step: training step.
      state: pytree of numpy arrays, jax arrays and typed PRNG keys.
      documents: JSON values by name. Non-finite floats are allowed.

    Raises:
      CheckpointError: The save before could not be written.
    """
    if jax.process_index():
      return
    leaves = {
        names: (array.copy(), header)
        for names, (array, header) in _flatten(state).items()
    }
    copied = json.loads(json.dumps(dict(documents)))
    with self._lock:
      self.wait()
      self._pending = self._submit(
          lambda orbax: self._write(orbax, step, leaves, copied)
      )

  def wait(self) -> None:
    """Waits until the last save is committed. Call it before a run ends.

    Raises:
      CheckpointError: It could not be written; checkpoints before are intact.
    """
    with self._lock:
      pending, self._pending = self._pending, None
      if pending is not None:
        pending.result()

  def restore(
      self, abstract_of: Callable[[dict[str, Any]], PyTree]
  ) -> Restored | None:
    """Reads the newest good checkpoint.

    Args:
      abstract_of: function from the documents to the expected state, a pytree
        of `jax.ShapeDtypeStruct` or arrays. A checkpoint with other paths,
        shapes or types is refused, and so is one for which it raises.

    Returns:
      The checkpoint, or None if the directory has none.

    Raises:
      CheckpointError: There are checkpoints, but none is good; or the last
        save could not be written.
    """
    self.wait()
    refused = {}
    for number in reversed(self.steps()):
      try:
        restored = self._read(number, abstract_of)
      except Exception as error:  # A damaged file can raise anything.
        refused[self._directory / str(number)] = _reason(error)
        continue
      lines = tuple(
          f'Checkpoint {path} refused: {reason}. {number} is used instead; '
          f'remove {path}.'
          for path, reason in refused.items()
      )
      return dataclasses.replace(restored, refusals=lines)
    if refused:
      reasons = '; '.join(f'{path}: {why}' for path, why in refused.items())
      raise CheckpointError(
          f'No checkpoint can be used. {reasons}. Start again in another '
          '--workdir.'
      )
    return None

  def _write(
      self,
      orbax: ocp.CheckpointManager,
      step: int,
      leaves: _Leaves,
      documents: dict[str, Any],
  ) -> None:
    """Writes a checkpoint in the worker."""
    checksum = _checksum(step, leaves, documents)
    try:
      arrays = _nested(leaves)
      self._directory.mkdir(parents=True, exist_ok=True)
      self._remove_unfinished()
      self._find_space(leaves)
      orbax.save(
          max([step, *(number + 1 for number in orbax.all_steps())]),
          args=ocp.args.Composite(
              arrays=ocp.args.PyTreeSave(arrays),
              documents=ocp.args.JsonSave(documents),
              digest=ocp.args.JsonSave({'step': step, 'sha256': checksum}),
          ),
          force=True,  # Orbax would choose among the steps.
      )
    except Exception as error:  # Orbax and TensorStore raise all kinds.
      with contextlib.suppress(Exception):
        self._remove_unfinished()
      raise CheckpointError(
          f'Cannot save step {step} in {self._directory}: {_reason(error)}. '
          'Earlier checkpoints are intact.'
      ) from error

  def _read(
      self, number: int, abstract_of: Callable[[dict[str, Any]], PyTree]
  ) -> Restored:
    """Reads and verifies a checkpoint."""

    def read(**items):
      args = ocp.args.Composite(**items)
      try:
        return self._submit(
            lambda orbax: orbax.restore(number, args=args)
        ).result()
      except Exception as error:
        raise ValueError(f'damaged: {_reason(error)}') from error

    texts = read(
        documents=ocp.args.JsonRestore(), digest=ocp.args.JsonRestore()
    )
    documents, step = texts['documents'], texts['digest']['step']
    abstract = abstract_of(documents)
    arrays = read(arrays=ocp.args.PyTreeRestore())['arrays']
    state = _assemble(abstract, arrays)
    if _checksum(step, _flatten(state), documents) != texts['digest']['sha256']:
      raise ValueError('damaged: the contents do not match their SHA-256')
    return Restored(step, state, documents, ())

  def _remove_unfinished(self) -> None:
    for path in ocp.utils.tmp_checkpoints(self._directory):
      path.get().rmtree()

  def _find_space(self, leaves: _Leaves) -> None:
    """Raises OSError if the disk is full.

    The threads of TensorStore would print a traceback each.
    """
    size = sum(array.nbytes for array, _ in leaves.values())
    size += size // 4 + 1024 * len(leaves) + 65_536  # Names and metadata.
    if hasattr(os, 'posix_fallocate') and '://' not in str(self._directory):
      with tempfile.TemporaryFile(dir=self._directory) as file:
        os.posix_fallocate(file.fileno(), 0, size)

  def _submit(
      self, function: Callable[[ocp.CheckpointManager], Any]
  ) -> futures.Future[Any]:
    """Calls a function of a manager in the worker."""

    def call():
      with _manager(self._directory, self._keep) as manager:
        return function(manager)

    return self._worker.submit(call)


def digest(tree: PyTree) -> str:
  """Computes a SHA-256 over path, dtype, shape and bytes of all leaves."""
  return _digest(_flatten(tree))


class _NumpyHandler(ocp.type_handlers.NumpyHandler):
  """Waits for all reads before it raises what one of them raised.

  The other ones would end without an event loop and print a traceback each.
  """

  async def deserialize(
      self, infos: Sequence[Any], args: Sequence[Any] | None = None
  ) -> Sequence[np.ndarray]:
    read = super().deserialize
    results = await asyncio.gather(
        *(
            read([info], [arg])
            for info, arg in zip(infos, args or (), strict=True)
        ),
        return_exceptions=True,
    )
    arrays: list[np.ndarray] = []
    for result in results:
      if isinstance(result, BaseException):
        raise result
      arrays += result
    return arrays


def _manager(directory: epath.Path, keep: int) -> ocp.CheckpointManager:
  """Makes a manager that waits for no other process."""
  alone = jax.process_index()
  processes = ocp.options.MultiprocessingOptions(
      primary_host=alone,
      active_processes={alone},
      barrier_sync_key_prefix=f'process{alone}',
  )
  tree = ocp.PyTreeCheckpointHandler(
      multiprocessing_options=processes,
      type_handler_registry=ocp.type_handlers.create_type_handler_registry(
          (np.ndarray, _NumpyHandler(deepcopy_host_arrays=False)),
          (jax.Array, ocp.type_handlers.ArrayHandler()),
      ),
  )
  text = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add('arrays', ocp.args.PyTreeSave, tree)
  registry.add('arrays', ocp.args.PyTreeRestore, tree)
  for name in ('documents', 'digest'):
    registry.add(name, ocp.args.JsonSave, text)
    registry.add(name, ocp.args.JsonRestore, text)
  options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=False,
      # Threads of Orbax wait for the operation that its process counted last.
      # With saves in several threads that may be the one of another.
      enable_async_checkpointing=False,
      lightweight_initialize=True,  # Reads no checkpoint, which may be damaged.
      multiprocessing_options=processes,
  )
  return ocp.CheckpointManager(
      directory, options=options, handler_registry=registry
  )


def _flatten(tree: PyTree) -> _Leaves:
  """Host array (of a key its data) and JSON description of leaves, by path."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    header: dict[str, Any] = {}
    if _is_key(leaf):
      header['key'] = str(jax.random.key_impl(leaf))
      array = np.asarray(jax.random.key_data(leaf))
    else:
      leaf = array = np.asarray(leaf)
    header |= {'dtype': str(leaf.dtype), 'shape': list(leaf.shape)}
    leaves[_names(path)] = array, header
  return leaves


def _nested(leaves: _Leaves) -> dict[str, Any]:
  """Nested dictionaries of the arrays, without those of size zero.

  Orbax refuses arrays of size zero. The abstract state restores them.
  """
  if len({'.'.join(names) for names in leaves}) < len(leaves):
    raise ValueError('two arrays have the same path')  # Orbax would mix them.
  tree: dict[str, Any] = {}
  for names, (array, _) in leaves.items():
    if array.size:
      node = tree
      for name in names[:-1]:
        node = node.setdefault(name, {})
      node[names[-1]] = array
  return tree


def _assemble(abstract: PyTree, arrays: PyTree) -> PyTree:
  """Puts stored arrays into the structure of an abstract state."""
  stored = {names: array for names, (array, _) in _flatten(arrays).items()}
  blank = jax.tree.map(
      lambda leaf: (jnp if _is_key(leaf) else np).empty(leaf.shape, leaf.dtype),
      abstract,
  )
  wanted = _flatten(blank)
  found, expected = (
      {names: f'{x.dtype}{list(x.shape)}' for names, x in leaves if x.size}
      for leaves in (
          stored.items(), ((names, x) for names, (x, _) in wanted.items())
      )
  )
  for names in sorted(found.keys() | expected.keys()):
    if found.get(names) != expected.get(names):
      raise ValueError(
          "another architecture, method or optimizer: "
          f"'{'/'.join(names)}' is "
          f"{found.get(names, 'missing')}, not {expected.get(names, 'wanted')}"
      )
  leaves = []
  for names, (array, header) in wanted.items():
    leaf: Any = stored.get(names, array)  # Of size zero it is not stored.
    if 'key' in header:
      leaf = jax.random.wrap_key_data(leaf, impl=header['key'])
    leaves.append(leaf)
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _digest(leaves: _Leaves) -> str:
  sha = hashlib.sha256()
  by_path = {'/'.join(names): leaf for names, leaf in leaves.items()}
  for path, (array, header) in sorted(by_path.items()):
    what = [path, header, str(array.dtype), list(array.shape)]
    sha.update(json.dumps(what, sort_keys=True).encode())
    sha.update(array.tobytes())
  return sha.hexdigest()


def _checksum(step: int, leaves: _Leaves, documents: dict[str, Any]) -> str:
  contents = json.dumps([step, _digest(leaves), documents], sort_keys=True)
  return hashlib.sha256(contents.encode()).hexdigest()


def _names(path: Any) -> tuple[str, ...]:
  """Names on the way to a leaf; '.' for a tree that is a leaf."""
  names = (jax.tree_util.keystr((entry,), simple=True) for entry in path)
  return tuple(names) or ('.',)


def _is_key(leaf: Any) -> bool:
  dtype = getattr(leaf, 'dtype', np.float32)
  return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _reason(error: BaseException) -> str:
  """The cause of an error in one line."""
  text = ' '.join(str(error).split())
  if number := re.search(r"os_error_code='(\d+)'", text):  # Of TensorStore.
    return os.strerror(int(number[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if not isinstance(error, ValueError):
    text = f'{type(error).__name__}: {text}'
  return text if len(text) < 200 else f'{text[:200]}...'
