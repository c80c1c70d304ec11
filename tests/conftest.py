"""What all tests share: 8 simulated CPU devices and strict checks."""

import getpass
import os
import sys
import tempfile

# Programs compiled once serve all tests and their subprocesses.
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR',
    os.path.join(
        tempfile.gettempdir(), f'autogrow_jax_tests_{getpass.getuser()}'
    ),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import flags  # pylint: disable=g-import-not-at-top
import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)


def pytest_configure(config):
  del config
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])  # For absltest's temporary directories.
