"""Packages that not everybody needs, imported where they are used."""

from collections.abc import Callable, Iterator
import contextlib
import importlib
import sys
from typing import Any


def load(module: str, need: str, *, extra: str = 'data') -> Any:
  """Imports a module of an optional package.

  The error where it is missing is what needs which package (`need`), and the
  extra of autogrow-jax that installs it.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
        f"{need}: pip install 'autogrow-jax[{extra}]'."
    ) from error


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], Any]]:
  """Shows a bar for work on `total` images once it has taken a few seconds.

  Yields:
    A function to call with the number of images just done.
  """
  try:
    import tqdm  # pylint: disable=g-import-not-at-top
  except ImportError:  # TFDS, which has the large data sets, brings it along.
    yield lambda count: None
    return
  interval = 0.5 if sys.stderr.isatty() else 60
  with tqdm.tqdm(
      total=total, desc=what, unit=' images', delay=5, mininterval=interval,
      leave=False,
  ) as bar:
    yield bar.update
