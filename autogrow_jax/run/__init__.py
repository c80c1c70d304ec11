"""Runs: from a configuration to a result, with everything written on the way.

The package itself can be called: `autogrow_jax.run(config)` is
`autogrow_jax.run.train.run(config)`.
"""

import importlib
import sys
import types
from typing import Any


class _Package(types.ModuleType):
  """A package whose call is a run."""

  def __call__(self, config: Any, **objects: Any) -> dict[str, Any]:
    """Trains and grows a network; see `autogrow_jax.run.train.run`."""
    train = importlib.import_module('autogrow_jax.run.train')
    return train.run(config, **objects)


sys.modules[__name__].__class__ = _Package
