"""What all tests share: 8 simulated CPU devices and strict checks."""

import gc
import getpass
import os
import subprocess
import sys
import tempfile

# Large programs compiled once serve the subprocesses of a process, too; writing
# many small ones takes longer than compiling them. Two processes that ran at
# the same time could read each other's half-written programs.
_CACHE = os.path.join(
    tempfile.gettempdir(), f'autogrow_jax_tests_{getpass.getuser()}'
)
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(
    _CACHE, os.environ.get('PYTEST_XDIST_WORKER', 'main')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')


def _add_flags(*added: str) -> None:
  """Adds to XLA's flags what is not set there."""
  flags = os.environ.get('XLA_FLAGS', '')
  new = [flag for flag in added if flag.split('=')[0] not in flags]
  os.environ['XLA_FLAGS'] = ' '.join([flags, *new]).strip()


_add_flags('--xla_force_host_platform_device_count=8')
# Compiling takes longer than running in tests, and a third as long this way. A
# version of JAX that no longer has one of these would end the process.
if 'PYTEST_XDIST_WORKER' not in os.environ:  # Workers inherit them.
  _without = os.environ['XLA_FLAGS']
  _add_flags(
      '--xla_backend_optimization_level=0',
      '--xla_cpu_use_fusion_emitters=false',
      '--xla_cpu_parallel_codegen_split_count=1',
  )
  if subprocess.run(
      [sys.executable, '-c', 'import jax; jax.devices()'],
      check=False,
      capture_output=True,
  ).returncode:
    os.environ['XLA_FLAGS'] = _without

# Traces are many small objects: looking for garbage takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)

from absl import flags  # pylint: disable=g-import-not-at-top
import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)


# Files of few and long tests: begun last, they would keep a worker waiting.
_FIRST = frozenset(
    f'{name}_test.py'
    for name in (
        'data', 'experiments', 'gauss_newton_binary', 'policy_runs', 'readme',
        'resume', 'sparsify_binary', 'sparsify_run', 'streams', 'train',
    )
)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.name not in _FIRST)


def pytest_configure(config):
  del config
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])  # For absltest's temporary directories.
