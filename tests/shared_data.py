"""Real image data sets for tests, from `../shared/data` beside the repository.

They are prepared for TFDS once (9 to 17 s) and then kept in the system's
temporary directory for all later test runs.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest
import zlib

_SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'


def prepared(name: str) -> str:
  """The `data_dir` in which a TFDS data set is prepared.

  Args:
    name: 'mnist', 'fashion_mnist' or 'cifar10'.

  Returns:
    The directory, which holds this data set alone. Don't write there.

  Raises:
    unittest.SkipTest: there is no `../shared/data`.
  """
  script = _SHARED / 'prepare_tfds.py'
  if not script.exists() or not (_SHARED / name).exists():
    raise unittest.SkipTest(f'There is no {_SHARED / name} to prepare.')
  root = pathlib.Path(tempfile.gettempdir(), f'autogrow_jax_{os.getuid()}')
  root.mkdir(mode=0o700, exist_ok=True)
  data_dir = root / f'{name}-{zlib.crc32(script.read_bytes()):08x}'
  if data_dir.exists():
    return str(data_dir)
  # A directory gets its final name when it is complete, so that neither a kill
  # nor a concurrent test run leaves or sees a half-written one.
  incomplete = tempfile.mkdtemp(prefix=f'incomplete-{name}-', dir=root)
  try:
    subprocess.run(
        [sys.executable, script, f'--data_dir={incomplete}', name],
        check=True,
        capture_output=True,
        text=True,
    )
    try:
      os.rename(incomplete, data_dir)
    except OSError:
      if not data_dir.exists():  # Else another test run was faster.
        raise
  except subprocess.CalledProcessError as error:
    raise RuntimeError(f'Preparing {name} failed: {error.stderr}') from error
  finally:
    shutil.rmtree(incomplete, ignore_errors=True)
  return str(data_dir)
