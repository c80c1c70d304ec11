"""Mask variables without a network, under penalty and samples alone.

The gradient of the sum of kappa q p replaces that of the task. Each structure
has a kappa of its own, drawn once, which makes it worth keeping or not. All
else is as in a run: penalty, temperatures, samples, optimizer, schedule.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax.core import carry
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import method as method_lib
from autogrow_jax.methods.sparsify import space as space_lib

Tree = base.Tree


@dataclasses.dataclass(frozen=True)
class Setting:
  """Setting of a simulation.

  Attributes:
    method: the method, with the length of the run.
    architecture: the full-size network, of which only costs matter.
    top_rate: learning rate that the schedule starts from.
    kappa: standard deviation of the worth of structures.
    s_off: start of mask variables that are off; None for the method's own.
  """

  method: method_lib.Sparsify
  architecture: architecture_lib.Architecture
  top_rate: float = 0.1
  kappa: float = 0.0
  s_off: float | None = None


class Query(NamedTuple):
  """State of the masks before the next sample is drawn.

  Attributes:
    sampled: cost of the sample over that of the full network.
    macs: multiply-adds of the sample over those of the full network.
    expected: cost by probabilities over that of the full network.
    likely: likewise for all whose probability is at least 1/2.
    ambiguous: share of probabilities that are not near 0 or 1.
  """

  sampled: float
  macs: float
  expected: float
  likely: float
  ambiguous: float


def start(setting: Setting, seed: int) -> tuple[state_lib.TrainState, Tree]:
  """Makes a state without weights, and the worth of structures."""
  method = setting.method
  aux, memory, _ = method.extra(setting.architecture)
  if setting.s_off is not None:
    off = np.float32(setting.s_off)
    aux = jax.tree.map(lambda s, q: np.where(q, s, off), aux, memory['q'])
  generator = np.random.default_rng(seed)
  worth = jax.tree.map(
      lambda s: np.float32(setting.kappa * generator.normal(size=s.shape)), aux
  )
  params = {'weights': {}, 'aux': aux}
  return state_lib.to_host(
      state_lib.TrainState(
          step=np.int32(0),
          params=params,
          stats={'network': {}, 'method': memory},
          opt_state=_optimizer(setting).init(params),
          key=jax.random.key_data(jax.random.key(seed)),
      )
  ), worth


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
    setting: Setting, steps: int, state: Any, worth: Tree, rate: jax.Array
) -> Any:
  """Takes some steps with the same samples."""
  method, memory = setting.method, state.stats['method']

  def loss(params):
    p = method.annealing.probabilities(params['aux'], memory)
    values = jax.tree.map(
        lambda p, q, worth: jnp.sum(p * q * worth), p, memory['q'], worth
    )
    return sum(jax.tree.leaves(values)) + method.penalty(
        setting.architecture, params['aux'], memory
    )

  tx = _optimizer(setting)

  def step(now, _):
    params, opt_state = now
    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    updates = method.execution.applied(
        setting.architecture, updates, state.stats
    )
    params = jax.tree.map(lambda leaf, by: leaf + by, params, updates)
    return (params, opt_state), None

  opt_state = optimizers.with_learning_rate(state.opt_state, rate)
  (params, opt_state), _ = lax.scan(
      step, (state.params, opt_state), None, steps
  )
  return state.replace(
      step=state.step + steps, params=params, opt_state=opt_state
  )


def simulate(setting: Setting, seed: int = 0) -> list[Query]:
  """Simulates a whole run; the rate drops tenfold at 1/2 and 3/4 of it.

  Args:
    setting: the setting.
    seed: seed of samples and of the worth of structures.

  Returns:
    The state after each of the run's queries.
  """
  method, architecture = setting.method, setting.architecture
  queries = method.run.queries
  schedule = optimizers.Schedule(
      setting.top_rate, 'staircase', queries, 0, 'small'
  )
  state, worth = start(setting, seed)
  course = []
  for query in range(queries):
    rate = np.float32(schedule.rate('growing', query))
    steps = method.run.steps // queries
    state = state_lib.to_host(train(setting, steps, state, worth, rate))
    course.append(_seen(setting, state))
    situation = base.Situation(
        architecture=architecture,
        state=state,
        key=jax.random.key(0),
        task=tasks.Classes(),
        batches=iter,
        batches_per_epoch=steps,
        train_accuracy=0.0,
        weight_decay=0.0,
    )
    change = method.propose(policies.grow(), situation)
    if change is not None and query + 1 < queries:
      state = after(change, state)
  return course


def after(
    sample: growth_lib.Growth, state: state_lib.TrainState
) -> state_lib.TrainState:
  """Puts a new sample in place, in a state that may have no weights."""
  return state.replace(
      stats=carry.with_values(state.stats, sample.values),
      opt_state=carry.with_values(state.opt_state, sample.moments),
  )


def _seen(setting: Setting, state: state_lib.TrainState) -> Query:
  method, architecture = setting.method, setting.architecture
  aux, memory = state.params['aux'], state.stats['method']
  p = jax.tree.map(np.asarray, method.annealing.probabilities(aux, memory))
  space = space_lib.of(architecture, method.grow)
  density = lambda tree, budget=method.budget: float(
      space_lib.density(architecture, space, tree, budget)
  )
  return Query(
      density(memory['q']),
      density(memory['q'], 'macs'),
      density(p),
      density(jax.tree.map(lambda p: p >= 0.5, p)),
      masks.ambiguous(p),
  )


def _optimizer(setting: Setting) -> Any:
  return optimizers.make(
      optimizers.SGD(),
      aux=setting.method.mask,
      top_rate=setting.top_rate,
  )
