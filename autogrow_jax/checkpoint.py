"""Checkpoints: whole, verified, and never worse than the one before.

`<directory>/<step>/` is an ordinary Orbax checkpoint: the item `state` holds
the arrays, those of one dtype and shape as a stack, since a deep network has
thousands of small ones; every document is a JSON item of its own name. Beside
them `manifest.json` lists path, dtype and shape of every leaf in the order of
the stacks, one SHA-256 over leaves and documents, and one of every file: a
damaged file is found before Orbax reads it. A checkpoint thus restores from
its directory alone, in two phases: documents -> abstract state -> arrays.

A save is synchronous. All is written into `<step>.saving`, which is renamed
when it is complete, so a kill at any moment leaves a complete checkpoint or
none. A checkpoint that is replaced by another of the same step waits as
`<step>.old` until the new one is complete, and counts as a checkpoint while it
waits.

This is the only file that imports Orbax. Every process that calls it acts
alone: of several hosts let the first one save.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any

_FORMAT = 2
_STATE = 'state'
_MANIFEST = 'manifest.json'
_CHECKPOINT_NAME = re.compile(r'(0|[1-9]\d*)(\.old)?')
_TEMPORARY_NAME = re.compile(r'(0|[1-9]\d*)\.saving.*')
_OVERHEAD = 65_536  # Bytes of a checkpoint that do not depend on its contents.
_WRITE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM,
    errno.EROFS, errno.EIO, errno.ENOENT, errno.EMFILE, errno.ESTALE,
)


class CheckpointError(ValueError):
  """A checkpoint could not be written, or none of those there can be used."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpoints.restore` found.

  Attributes:
    step: The step of the checkpoint.
    state: The abstract state's structure with numpy arrays on the host (and
      typed PRNG keys) as leaves.
    documents: The JSON documents by name.
    refusals: One line for each newer checkpoint that could not be used.
  """

  step: int
  state: PyTree
  documents: dict[str, Any]
  refusals: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Contents:
  """A verified checkpoint: arrays by path, documents by name."""

  arrays: dict[str, np.ndarray]
  manifest: dict[str, Any]
  documents: dict[str, Any]


class _Refused(ValueError):
  """A checkpoint that cannot be used, with the reason."""


class Checkpoints:
  """The checkpoints of one run, in one directory."""

  def __init__(self, directory: str | os.PathLike[str], *, keep: int):
    """Names the directory; nothing is read or written yet.

    Args:
      directory: Where the checkpoints are, created by the first save.
      keep: How many of the newest good checkpoints to keep.
    """
    if keep < 1:
      raise ValueError(f'At least one checkpoint must be kept, not {keep}.')
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._good: dict[pathlib.Path, str] = {}  # Verified digests.

  def steps(self) -> tuple[int, ...]:
    """Steps that have a checkpoint, good or not, in ascending order."""
    return tuple(sorted({_step(path) for path in self._newest_first()}))

  def save(
      self, step: int, state: PyTree, documents: Mapping[str, Any]
  ) -> None:
    """Writes a checkpoint, then removes those that are no longer needed.

    A good checkpoint of the same step with the same content is left as it is;
    any other content of that step is replaced. Removed are the checkpoints
    older than the `keep` newest good ones, and what killed saves left. What
    is not a checkpoint of this library is never removed; where it takes the
    name of this step, it is renamed.

    Args:
      step: The training step, which names the checkpoint.
      state: Any pytree of numpy arrays, jax arrays and typed PRNG keys.
      documents: JSON-able values by name. Non-finite floats are allowed.

    Raises:
      CheckpointError: The checkpoint could not be written; those there before
        are intact.
    """
    if step < 0:
      raise ValueError(f'A step is at least 0, not {step}.')
    documents = _plain_documents(documents)
    arrays, leaves = _flatten(state)
    manifest = {
        'format': _FORMAT,
        'digest': _content_digest(arrays, leaves, documents),
        'leaves': leaves,
        'documents': sorted(documents),
    }
    path = self._directory / str(step)
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      if self._verified_digest(path) == manifest['digest']:
        return
      self._remove_temporary()
      written = path.with_suffix('.saving')
      _try_space(written, arrays, documents)
      _write(written, arrays, manifest, documents)
      self._make_room(path)
      written.rename(path)
      self._good[path] = manifest['digest']
    except Exception as error:  # Orbax and tensorstore raise all kinds.
      raise CheckpointError(self._after_failure(path, error)) from error
    self._remove_superseded(path)

  def restore(
      self, make_abstract: Callable[[dict[str, Any]], PyTree]
  ) -> Restored | None:
    """Reads the newest checkpoint that can be used.

    Args:
      make_abstract: From the documents to the state as it must be: a pytree
        of `jax.ShapeDtypeStruct` or arrays. Paths, shapes and dtypes must
        agree exactly; an exception refuses the checkpoint.

    Returns:
      The checkpoint, or None where the directory has none at all.

    Raises:
      CheckpointError: There are checkpoints, but none can be used.
    """
    refusals = []
    for path in self._newest_first():
      try:
        contents = self._read(path)
        state = _assemble(make_abstract(contents.documents), contents)
      except Exception as error:  # A damaged file can raise anything.
        refusals.append(f'Checkpoint {path} refused: {_reason(error)}')
        continue
      return Restored(
          _step(path), state, contents.documents, tuple(refusals)
      )
    if refusals:
      more = len(refusals) - 1
      raise CheckpointError(
          f'No usable checkpoint in {self._directory}. {refusals[0]}'
          + (f' ({more} older refused as well)' if more else '')
      )
    return None

  def _newest_first(self) -> list[pathlib.Path]:
    """Directories named like a checkpoint; of one step, the '.old' last."""
    try:
      found = [
          path
          for path in self._directory.iterdir()
          if _CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
      ]
    except FileNotFoundError:
      return []
    except OSError as error:
      raise CheckpointError(
          f'Cannot read checkpoints in {self._directory}: {_reason(error)}'
      ) from error
    return sorted(
        found, key=lambda path: (_step(path), path.suffix == ''), reverse=True
    )

  def _read(self, path: pathlib.Path) -> _Contents:
    contents = _read(path)
    self._good[path] = contents.manifest['digest']
    return contents

  def _verified_digest(self, path: pathlib.Path) -> str | None:
    """Digest of a good checkpoint, None for anything else."""
    if not path.is_dir():
      self._good.pop(path, None)
    elif path not in self._good:
      with contextlib.suppress(Exception):
        self._read(path)
    return self._good.get(path)

  def _make_room(self, path: pathlib.Path) -> None:
    """Renames what has the name of the checkpoint that comes."""
    if not os.path.lexists(path):
      return
    old = _old(path)
    if not _is_ours(path):
      aside = path.with_suffix('.foreign')
      while os.path.lexists(aside):
        aside = aside.with_name(aside.name + '+')
      path.rename(aside)
    elif _is_ours(old) and not self._verified_digest(path):
      shutil.rmtree(path)  # Damaged, while the one it replaced may be good.
    else:
      if old.exists():
        shutil.rmtree(old)
      path.rename(old)
    self._good.pop(path, None)

  def _after_failure(self, path: pathlib.Path, error: Exception) -> str:
    """Tidies up after a failed save; returns the line for the user."""
    with contextlib.suppress(OSError):
      self._remove_temporary()
    with contextlib.suppress(OSError):
      if _is_ours(_old(path)) and not path.exists():
        _old(path).rename(path)
    with contextlib.suppress(CheckpointError):
      for previous in self._newest_first():
        if self._verified_digest(previous):
          return (
              f'Cannot write checkpoint {path}: {_reason(error)}. The previous'
              f' checkpoint (step {_step(previous)}) is intact.'
          )
    return (
        f'Cannot write checkpoint {path}: {_reason(error)}. There is no'
        ' previous checkpoint.'
    )

  def _remove_temporary(self) -> None:
    for path in self._directory.iterdir():
      if not _TEMPORARY_NAME.fullmatch(path.name):
        continue
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink()

  def _remove_superseded(self, saved: pathlib.Path) -> None:
    """Removes what is older than the newest good ones, up to the saved one."""
    shutil.rmtree(_old(saved), ignore_errors=True)
    good = 0
    for path in self._newest_first():
      if _step(path) > _step(saved):
        continue
      if good < self._keep:
        good += bool(self._verified_digest(path))
      elif _is_ours(path):
        self._good.pop(path, None)
        # Renamed first, so that nobody takes what is half removed for damaged.
        with contextlib.suppress(OSError):
          shutil.rmtree(path.rename(path.with_suffix('.saving-removed')))


def digest(tree: PyTree) -> str:
  """SHA-256 over path, dtype, shape and bytes of all leaves, in path order."""
  return _arrays_digest(*_flatten(tree))


def _flatten(
    tree: PyTree,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
  """Host arrays and their descriptions, both by path."""
  arrays, leaves = {}, {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = _path(key_path)
    if path in arrays:
      raise ValueError(f"Two leaves of the state have the path '{path}'.")
    leaves[path] = {
        'dtype': str(np.result_type(leaf) if np.isscalar(leaf) else leaf.dtype),
        'shape': list(np.shape(leaf)),
    }
    if _is_key(leaf):
      leaves[path]['key'] = str(jax.random.key_impl(leaf))
      leaf = jax.random.key_data(leaf)
    arrays[path] = np.asarray(leaf)
  return arrays, leaves


def _assemble(abstract: PyTree, contents: _Contents) -> PyTree:
  """The state, after a check of every path, shape and dtype."""
  leaves = contents.manifest['leaves']
  wanted = {
      _path(key_path): (str(leaf.dtype), list(leaf.shape))
      for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
  }
  missing = sorted(wanted.keys() - leaves.keys())
  surplus = sorted(leaves.keys() - wanted.keys())
  if missing or surplus:
    raise _Refused(
        f'another architecture: {len(missing)} leaves are missing'
        f'{_first(missing)}, {len(surplus)} are not wanted{_first(surplus)}'
    )
  for path, (dtype, shape) in wanted.items():
    leaf = leaves[path]
    if (dtype, shape) != (leaf['dtype'], leaf['shape']):
      raise _Refused(
          f"another architecture: '{path}' is {leaf['dtype']}{leaf['shape']},"
          f' not {dtype}{shape}'
      )

  def leaf_of(key_path: Any, unused_leaf: Any) -> Any:
    del unused_leaf
    path = _path(key_path)
    if 'key' in leaves[path]:
      return jax.random.wrap_key_data(
          contents.arrays[path], impl=leaves[path]['key']
      )
    return contents.arrays[path]

  return jax.tree_util.tree_map_with_path(leaf_of, abstract)


def _try_space(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    documents: Mapping[str, Any],
) -> None:
  """Reserves the space a checkpoint takes for a moment.

  A full disk or a limit thus shows as a plain OSError, before the threads of
  Orbax meet it and print a traceback each.
  """
  size = sum(array.nbytes for array in arrays.values())
  size += size // 4 + 1024 * len(arrays) + len(json.dumps(dict(documents)))
  probe = path.with_suffix('.saving-space')
  probe.unlink(missing_ok=True)
  with open(probe, 'xb') as file:
    try:
      if hasattr(os, 'posix_fallocate'):  # Linux; not macOS.
        os.posix_fallocate(file.fileno(), 0, size + _OVERHEAD)
    finally:
      probe.unlink()


def _write(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    manifest: dict[str, Any],
    documents: Mapping[str, Any],
) -> None:
  stored = {
      name: np.stack([arrays[path] for path in paths])
      for name, paths in _stacks(manifest['leaves']).items()
  }
  items = {
      name: ocp.args.JsonSave(document) for name, document in documents.items()
  }
  if stored:
    items[_STATE] = ocp.args.StandardSave(stored)
  with _checkpointer(documents) as checkpointer:
    checkpointer.save(path, args=ocp.args.Composite(**items))
  manifest = {**manifest, 'files': _file_digests(path)}
  with open(path / _MANIFEST, 'x', encoding='utf-8') as file:
    json.dump(manifest, file)
    file.flush()
    os.fsync(file.fileno())


def _read(path: pathlib.Path) -> _Contents:
  """Reads and verifies a checkpoint.

  Raises:
    Exception: Of any kind, where it is damaged, partial or foreign.
  """
  if not _is_ours(path):
    raise _Refused('not a checkpoint of autogrow_jax')
  try:
    manifest = json.loads((path / _MANIFEST).read_bytes())
  except ValueError as error:
    raise _Refused(f"damaged: the file '{_MANIFEST}' is not JSON") from error
  if manifest['format'] != _FORMAT:
    raise _Refused(f"format {manifest['format']}, not {_FORMAT}")
  _check_files(path, manifest['files'])
  leaves = manifest['leaves']
  stacks = _stacks(leaves)
  items = {name: ocp.args.JsonRestore() for name in manifest['documents']}
  if stacks:
    items[_STATE] = ocp.args.StandardRestore()
  with _checkpointer(manifest['documents']) as checkpointer:
    restored = checkpointer.restore(path, args=ocp.args.Composite(**items))
  documents = {name: restored[name] for name in manifest['documents']}
  stored = dict(restored[_STATE]) if _STATE in items else {}
  if {name: len(stack) for name, stack in stored.items()} != {
      name: len(paths) for name, paths in stacks.items()
  }:
    raise _Refused('damaged: arrays are missing')
  arrays = {
      path: np.asarray(array)
      for name, paths in stacks.items()
      for path, array in zip(paths, np.asarray(stored[name]), strict=True)
  } | {
      path: _empty(leaf) for path, leaf in leaves.items() if 0 in leaf['shape']
  }
  if _content_digest(arrays, leaves, documents) != manifest['digest']:
    raise _Refused('damaged: the contents do not have the recorded SHA-256')
  return _Contents(arrays, manifest, documents)


def _stacks(
    leaves: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[str]]:
  """The paths of the leaves of each stack, by its name.

  Orbax refuses arrays of size zero: the manifest alone describes them.
  """
  alike = {}
  for path, leaf in leaves.items():
    if 0 not in leaf['shape']:
      alike.setdefault((leaf['dtype'], *leaf['shape']), []).append(path)
  return {
      f'stack{number}': paths for number, paths in enumerate(alike.values())
  }


def _check_files(path: pathlib.Path, recorded: Mapping[str, str]) -> None:
  """Refuses a checkpoint with a file missing or changed."""
  found = _file_digests(path)
  found.pop(_MANIFEST, None)
  missing = sorted(recorded.keys() - found.keys())
  if missing:
    raise _Refused(f"damaged: the file '{missing[0]}' is missing")
  changed = [name for name in recorded if found[name] != recorded[name]]
  if changed:
    raise _Refused(f"damaged: the file '{changed[0]}' is not as it was written")


def _file_digests(path: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file below a directory, by relative path."""
  return {
      file.relative_to(path).as_posix(): hashlib.sha256(
          file.read_bytes()
      ).hexdigest()
      for file in sorted(path.rglob('*'))
      if file.is_file()
  }


@contextlib.contextmanager
def _checkpointer(document_names: Iterable[str]) -> Iterator[ocp.Checkpointer]:
  """An Orbax checkpointer that waits for no other process and is quiet."""
  alone = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
      primary_host=alone,
      active_processes={alone},
      barrier_sync_key_prefix=f'process{alone}',
  )
  # Each layer of Orbax waits for all processes unless it is told by itself.
  handler = ocp.CompositeCheckpointHandler(
      composite_options=ocp.CompositeOptions(
          multiprocessing_options=options
      ),
      **{
          name: ocp.JsonCheckpointHandler(multiprocessing_options=options)
          for name in document_names
      },
      state=ocp.StandardCheckpointHandler(multiprocessing_options=options),
  )
  absl_logger = logging.getLogger('absl')
  asyncio_logger = logging.getLogger('asyncio')
  absl_logger.addFilter(_is_not_of_orbax)
  asyncio_logger.addFilter(_is_of_no_interest)
  try:
    with ocp.Checkpointer(
        handler, multiprocessing_options=options
    ) as checkpointer:
      yield checkpointer
  finally:
    absl_logger.removeFilter(_is_not_of_orbax)
    asyncio_logger.removeFilter(_is_of_no_interest)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return f'{os.sep}orbax{os.sep}' not in record.pathname


def _is_of_no_interest(record: logging.LogRecord) -> bool:
  del record
  return False


def _plain_documents(documents: Mapping[str, Any]) -> dict[str, Any]:
  """The documents as they come back from JSON."""
  reserved = documents.keys() & {_STATE, _MANIFEST, 'metrics'}
  if reserved:
    raise ValueError(f"'{reserved.pop()}' is no name for a document.")
  return json.loads(json.dumps(dict(documents), default=_number))


def _number(value: Any) -> Any:
  """A number of numpy as one of Python."""
  if isinstance(value, (np.generic, np.ndarray, jax.Array)):
    return value.tolist()
  raise TypeError(f'{value!r} is not JSON-able.')


def _arrays_digest(
    arrays: Mapping[str, np.ndarray], leaves: Mapping[str, dict[str, Any]]
) -> str:
  sha = hashlib.sha256()
  for path in sorted(arrays):
    array = arrays[path]
    # The stored array counts, the description only names it.
    header = [path, leaves[path], str(array.dtype), list(array.shape)]
    sha.update(json.dumps(header, sort_keys=True).encode())
    sha.update(np.ascontiguousarray(array).tobytes())
  return sha.hexdigest()


def _content_digest(
    arrays: Mapping[str, np.ndarray],
    leaves: Mapping[str, dict[str, Any]],
    documents: Mapping[str, Any],
) -> str:
  contents = [_arrays_digest(arrays, leaves), documents]
  return hashlib.sha256(
      json.dumps(contents, sort_keys=True).encode()
  ).hexdigest()


def _empty(leaf: Mapping[str, Any]) -> np.ndarray:
  """An array of size zero, from its description."""
  if 'key' in leaf:
    words = jax.random.key_data(jax.random.key(0, impl=leaf['key'])).shape
    return np.zeros((*leaf['shape'], *words), np.uint32)
  return np.zeros(leaf['shape'], jax.numpy.dtype(leaf['dtype']))


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
      leaf.dtype, jax.dtypes.prng_key
  )


def _is_ours(path: pathlib.Path) -> bool:
  return (path / _MANIFEST).is_file()


def _path(key_path: Any) -> str:
  # The path of a state that is a single leaf would be empty.
  return jax.tree_util.keystr(key_path, simple=True, separator='/') or '.'


def _step(path: pathlib.Path) -> int:
  return int(_CHECKPOINT_NAME.fullmatch(path.name).group(1))


def _old(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix('.old')


def _first(names: list[str]) -> str:
  return f" (first: '{names[0]}')" if names else ''


def _reason(error: BaseException) -> str:
  """The cause of an error in a few words, without line breaks."""
  if isinstance(error, _Refused):
    return str(error)
  causes, cause = [], error
  while cause is not None and cause not in causes:
    causes.append(cause)
    cause = cause.__cause__ or cause.__context__
  for cause in causes:
    for number in _WRITE_ERRORS:
      if getattr(cause, 'errno', None) == number or (
          os.strerror(number) in str(cause)
      ):
        return os.strerror(number)
  text = ' '.join(str(error).split()) or 'no message'
  if len(text) > 160:
    text = text[:157] + '...'
  return f'{type(error).__name__}: {text}'
