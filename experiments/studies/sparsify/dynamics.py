"""Mask variables without a network: what penalty and samples alone would do.

The gradient of the task is replaced by that of the sum of kappa q p, where each
structure has a kappa of its own, drawn once: it is worth keeping or not. All
else is what a run has: penalty, temperatures, samples, optimizer, schedule.
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
from autogrow_jax.methods import base
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import method as method_lib
from autogrow_jax.methods.sparsify import space as space_lib

Tree = base.Tree


@dataclasses.dataclass(frozen=True)
class Scene:
  """What a simulation is of.

  Attributes:
    method: how masks are trained; its `run` as well.
    architecture: the full-size network, of which only costs matter.
    top_rate: learning rate that the schedule starts from.
    kappa: standard deviation of what structures are worth.
    s_off: where what is off at first starts; None for the method's own.
  """

  method: method_lib.Sparsify
  architecture: architecture_lib.Architecture
  top_rate: float = 0.1
  kappa: float = 0.0
  s_off: float | None = None


class Query(NamedTuple):
  """At the end of training between two samples.

  Attributes:
    sampled: cost of the sample over that of the full network.
    macs: multiply-adds of the sample over those of the full network.
    expected: cost by probabilities.
    likely: cost of all whose probability is at least 1/2.
    ambiguous: share of probabilities that are not near 0 or 1.
  """

  sampled: float
  macs: float
  expected: float
  likely: float
  ambiguous: float


def start(scene: Scene, seed: int) -> tuple[state_lib.TrainState, Tree]:
  """A state without weights, and what structures are worth."""
  method = scene.method
  aux, memory, _ = method.extra(scene.architecture)
  if scene.s_off is not None:
    off = np.float32(scene.s_off)
    aux = jax.tree.map(lambda s, q: np.where(q, s, off), aux, memory['q'])
  generator = np.random.default_rng(seed)
  worth = jax.tree.map(
      lambda s: np.float32(scene.kappa * generator.normal(size=s.shape)), aux
  )
  params = {'weights': {}, 'aux': aux}
  return state_lib.to_host(
      state_lib.TrainState(
          step=np.int32(0),
          params=params,
          stats={'network': {}, 'method': memory},
          opt_state=_optimizer(scene).init(params),
          key=jax.random.key_data(jax.random.key(seed)),
      )
  ), worth


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
    scene: Scene, steps: int, state: Any, worth: Tree, rate: jax.Array
) -> Any:
  """The state after some steps with the same samples."""
  method, memory = scene.method, state.stats['method']

  def loss(params):
    p = method.annealing.probabilities(params['aux'], memory)
    values = jax.tree.map(
        lambda p, q, worth: jnp.sum(p * q * worth), p, memory['q'], worth
    )
    return sum(jax.tree.leaves(values)) + method.penalty(
        scene.architecture, params['aux'], memory
    )

  tx = _optimizer(scene)

  def step(carry, _):
    params, opt_state = carry
    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    updates = method.execution.applied(
        scene.architecture, updates, state.stats
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


def simulate(scene: Scene, seed: int = 0) -> list[Query]:
  """A whole run; the schedule drops tenfold at 1/2 and 3/4 of it.

  Args:
    scene: what it is of.
    seed: of samples and of what structures are worth.

  Returns:
    What there is after each of the run's queries.
  """
  method, architecture = scene.method, scene.architecture
  queries = method.run.queries
  schedule = optimizers.Schedule(
      scene.top_rate, 'staircase', queries, 0, 'small'
  )
  state, worth = start(scene, seed)
  course = []
  for query in range(queries):
    rate = np.float32(schedule.rate('growing', query))
    steps = method.run.steps // queries
    state = state_lib.to_host(train(scene, steps, state, worth, rate))
    course.append(_seen(scene, state))
    change = method.propose(
        policies.grow(),
        base.Situation(architecture, state, iter, steps, 0.0, 0.0),
    )
    if change is not None and query + 1 < queries:
      state, _ = change.patch(state, jax.random.key(0))
  return course


def _seen(scene: Scene, state: state_lib.TrainState) -> Query:
  method, architecture = scene.method, scene.architecture
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


def _optimizer(scene: Scene) -> Any:
  return optimizers.make(
      optimizers.SGD(),
      aux=scene.method.mask,
      top_rate=scene.top_rate,
  )
