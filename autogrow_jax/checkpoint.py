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
  """Computes the SHA-256 over path, dtype, shape and bytes of all leaves."""
  return _digest(_flatten(tree))


class _Damaged(ValueError):
  """A checkpoint whose files are not as they were written."""

  def __init__(self, reason: str):
    super().__init__(f'damaged: {reason}')


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """A leaf on the host.

  Attributes:
    data: the array, or the data of a typed PRNG key.
    header: dtype, shape and PRNG implementation as JSON.
  """

  data: np.ndarray
  header: dict[str, Any]


def _flatten(tree: PyTree) -> dict[_Names, _Leaf]:
  """Leaves on the host by path."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    header = {}
    if _is_key(leaf):
      header['key'] = str(jax.random.key_impl(leaf))
      data = np.asarray(jax.random.key_data(leaf))
    else:
      leaf = data = np.asarray(leaf)
    header |= {'dtype': str(leaf.dtype), 'shape': list(leaf.shape)}
    leaves[_names(path)] = _Leaf(data, header)
  return leaves


def _nested(leaves: Mapping[_Names, _Leaf]) -> dict[str, Any]:
  """Nested dictionaries of arrays.

  Orbax takes no arrays of size zero: their shape restores them.
  """
  if len({'.'.join(names) for names in leaves}) < len(leaves):
    # Orbax would write both to one place.
    raise ValueError('two arrays have the same path')
  tree = {}
  for names, leaf in leaves.items():
    if leaf.data.size:
      node = tree
      for name in names[:-1]:
        node = node.setdefault(name, {})
      node[names[-1]] = leaf.data
  return tree


def _assemble(abstract: PyTree, arrays: PyTree) -> PyTree:
  """Puts stored arrays into the structure of an abstract state."""
  stored = {names: leaf.data for names, leaf in _flatten(arrays).items()}
  wanted = {
      _names(path): jax.eval_shape(_data, leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
  }
  for names, leaf in wanted.items():
    if not leaf.size:
      stored.setdefault(names, np.zeros(leaf.shape, leaf.dtype))
  for kind, paths in (
      ('misses', wanted.keys() - stored.keys()),
      ('has unwanted', stored.keys() - wanted.keys()),
  ):
    if paths:
      first = '/'.join(min(paths))
      raise ValueError(
          f"another architecture: it {kind} {len(paths)} arrays ('{first}')"
      )
  for names, leaf in wanted.items():
    found = stored[names]
    if (found.dtype, found.shape) != (leaf.dtype, leaf.shape):
      raise ValueError(
          f"another architecture: '{'/'.join(names)}' is "
          f'{found.dtype}{list(found.shape)}, not '
          f'{leaf.dtype}{list(leaf.shape)}'
      )

  def fill(path: Any, leaf: Any) -> Any:
    data = stored[_names(path)]
    if not _is_key(leaf):
      return data
    return jax.random.wrap_key_data(data, impl=_key_impl(leaf))

  return jax.tree_util.tree_map_with_path(fill, abstract)


def _digest(leaves: Mapping[_Names, _Leaf]) -> str:
  sha = hashlib.sha256()
  by_path = {'/'.join(names): leaf for names, leaf in leaves.items()}
  for path, leaf in sorted(by_path.items()):
    header = [path, leaf.header, str(leaf.data.dtype), list(leaf.data.shape)]
    sha.update(json.dumps(header, sort_keys=True).encode())
    sha.update(leaf.data.tobytes())
  return sha.hexdigest()


def _json_digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _names(path: Any) -> _Names:
  """Names on the way to a leaf; a tree that is a leaf has the path '.'."""
  return tuple(
      jax.tree_util.keystr((entry,), simple=True) for entry in path
  ) or ('.',)


def _is_key(leaf: Any) -> bool:
  dtype = getattr(leaf, 'dtype', np.float32)
  return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _key_impl(leaf: Any) -> Any:
  """Implementation of an abstract PRNG key."""
  found = []
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
  return found[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Orbax from logging what is raised as well."""
  muted = lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname
  loggers = [logging.getLogger(name) for name in ('absl', 'asyncio')]
  for logger in loggers:
    logger.addFilter(muted)
  try:
    yield
  finally:
    for logger in loggers:
      logger.removeFilter(muted)


def _reason(error: BaseException) -> str:
  """The cause of an error in one line."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = ' '.join(str(error).split())
  if number := re.search(r'OS error (\d+)', text):  # TensorStore.
    return os.strerror(int(number[1]))
  if isinstance(error, CheckpointError | _Damaged):
    return text
  return f'{type(error).__name__}: {text[:160]}'
