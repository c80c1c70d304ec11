"""Paths that users give, turned into what they mean."""

import os
import pathlib
import re
from typing import Any

from autogrow_jax.data import extras

_REMOTE = re.compile(r'([a-zA-Z][\w+.-]+):/+(.*)', re.DOTALL)


def local(path: str | os.PathLike[str], use: str = 'It') -> pathlib.Path:
  """An absolute path on this machine, with `~` expanded.

  Args:
    path: path as a user gave it.
    use: beginning of the sentence that refuses other places.

  Raises:
    ValueError: the path is on another machine, or is not a path.
  """
  given = os.fspath(path)
  if found := _REMOTE.match(given):
    raise ValueError(
        f'{use} must be on a local or mounted disk, but {given} is of '
        f'{found[1]}: copy it, or mount it, for example with gcsfuse or '
        'mountpoint-s3.'
    )
  try:
    given.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
        f'The path {given!r} is not UTF-8 at character {error.start}; rename '
        'what it is the name of.'
    ) from error
  if '\0' in given:
    raise ValueError(f'The path {given!r} has a null byte.')
  try:
    return pathlib.Path(given).expanduser().absolute()
  except RuntimeError as error:
    raise ValueError(
        f'There is no home directory for the ~ in {given}; set HOME or give '
        'the path in full.'
    ) from error


def find(path: str | os.PathLike[str]) -> Any:
  """A path to read, as `local` or as an `epath.Path` of a remote place.

  Raises:
    ValueError: it is not a path, or its files cannot be reached.
  """
  if not _REMOTE.match(os.fspath(path)):
    return local(path)
  try:
    result = _remote(path)
    result.exists()
    return result
  # Each file system has errors of its own, and says them in many lines.
  except Exception as error:  # pylint: disable=broad-exception-caught
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise ValueError(
        f'{path} cannot be reached ({reason}). Install what reads it (gcsfs, '
        's3fs or adlfs), copy it, or mount it.'
    ) from error


def _remote(path: str | os.PathLike[str]) -> Any:
  scheme, rest = _REMOTE.match(os.fspath(path)).groups()
  # A pathlib.Path has lost a slash.
  given = f'{scheme}://{rest}'
  result = extras.load('etils.epath', 'It needs etils').Path(given)
  if not str(result).startswith(f'{scheme}:'):
    raise ValueError(f'{scheme} is not a scheme that etils.epath knows')
  return result
