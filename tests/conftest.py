"""What all tests share: 8 simulated CPU devices and strict checks."""

import gc
import getpass
import os
import sys
import tempfile

# Programs compiled once serve all tests of a process and its subprocesses. Two
# that ran at the same time could read each other's half-written programs.
_CACHE = os.path.join(
    tempfile.gettempdir(), f'autogrow_jax_tests_{getpass.getuser()}'
)
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(
    _CACHE, os.environ.get('PYTEST_XDIST_WORKER', 'main')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
# Compiling takes longer than running in tests: a quarter less by level 1.
for _flag in (
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=1',
):
  if _flag not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_flag}'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

# Traces are many small objects: looking for garbage takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)

from absl import flags  # pylint: disable=g-import-not-at-top
import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)


def pytest_configure(config):
  del config
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])  # For absltest's temporary directories.
