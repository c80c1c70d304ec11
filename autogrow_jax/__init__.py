"""Networks that change their size while they train, in JAX.

    import autogrow_jax as ag

    ag.run(ag.RunConfig('runs/mine'))       # a whole run, from data to result
    ag.grow(growth, axes, tree, opt_state, like=...)        # one growth event

Names are imported when they are first used.
"""

import importlib
from typing import Any, TYPE_CHECKING

from autogrow_jax.version import __version__ as __version__

if TYPE_CHECKING:
  from autogrow_jax import costs as costs
  from autogrow_jax import data as data
  from autogrow_jax import layers as layers
  from autogrow_jax import networks as networks
  from autogrow_jax import optimizers as optimizers
  from autogrow_jax import policies as policies
  from autogrow_jax import tasks as tasks
  from autogrow_jax.architecture import Architecture as Architecture
  from autogrow_jax.core.axes import Axis as Axis
  from autogrow_jax.core.axes import AxisTable as AxisTable
  from autogrow_jax.core.axes import NEW as NEW
  from autogrow_jax.core.carry import Account as Account
  from autogrow_jax.core.carry import carry as carry
  from autogrow_jax.core.growth import deepen as deepen
  from autogrow_jax.core.growth import Growth as Growth
  from autogrow_jax.core.growth import growth_between as growth_between
  from autogrow_jax.core.growth import prune as prune
  from autogrow_jax.core.growth import split as split
  from autogrow_jax.core.growth import widen as widen
  from autogrow_jax.core.receipts import grow as grow
  from autogrow_jax.core.receipts import Receipt as Receipt
  from autogrow_jax.methods.autogrow import AutoGrow as AutoGrow
  from autogrow_jax.methods.base import Method as Method
  from autogrow_jax.methods.base import Situation as Situation
  from autogrow_jax.methods.base import Skip as Skip
  from autogrow_jax.methods.gauss_newton.method import (
      GaussNewton as GaussNewton,
  )
  from autogrow_jax.methods.sparsify.method import Sparsify as Sparsify
  from autogrow_jax.models import functional as functional
  from autogrow_jax.models import shapes as shapes
  from autogrow_jax.models import trace as trace
  from autogrow_jax.policies import Decision as Decision
  from autogrow_jax.policies import Observation as Observation
  from autogrow_jax.policies import Policy as Policy
  from autogrow_jax.run.config import RunConfig as RunConfig
  from autogrow_jax.run.results import read_result as read_result
  from autogrow_jax.run.train import Diverged as Diverged
  from autogrow_jax.run.train import Interrupted as Interrupted
  from autogrow_jax.run.train import run as run
  from autogrow_jax.run.trained import load as load
  from autogrow_jax.state import append as append
  from autogrow_jax.state import axis_table as axis_table
  from autogrow_jax.state import create_state as create_state
  from autogrow_jax.state import TrainState as TrainState
  from autogrow_jax.tasks import Score as Score
  from autogrow_jax.tasks import Task as Task

# Room -> the names that it gives; '' for modules.
_ROOMS = {
    '': (
        'costs', 'data', 'layers', 'networks', 'optimizers', 'policies',
        'tasks',
    ),
    'architecture': ('Architecture',),
    'core.axes': ('Axis', 'AxisTable', 'NEW'),
    'core.carry': ('Account', 'carry'),
    'core.growth': (
        'Growth', 'deepen', 'growth_between', 'prune', 'split', 'widen',
    ),
    'core.receipts': ('Receipt', 'grow'),
    'methods.autogrow': ('AutoGrow',),
    'methods.base': ('Method', 'Situation', 'Skip'),
    'methods.gauss_newton.method': ('GaussNewton',),
    'methods.sparsify.method': ('Sparsify',),
    'models': ('functional', 'shapes', 'trace'),
    'policies': ('Decision', 'Observation', 'Policy'),
    'run.config': ('RunConfig',),
    'run.results': ('read_result',),
    'run.train': ('Diverged', 'Interrupted', 'run'),
    'run.trained': ('load',),
    'state': ('TrainState', 'append', 'axis_table', 'create_state'),
    'tasks': ('Score', 'Task'),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ['__version__', *sorted(_ROOM_OF)]


def __getattr__(name: str) -> Any:
  """Imports a public name when it is first used."""
  if name not in _ROOM_OF:
    raise AttributeError(f'autogrow_jax has no {name!r}; see its dir().')
  room = _ROOM_OF[name]
  if not room:
    return importlib.import_module(f'autogrow_jax.{name}')
  value = getattr(importlib.import_module(f'autogrow_jax.{room}'), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return __all__
