"""`Sparsify`: grow and prune channels and layers by sampled, annealed masks."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.sparsify import execution as execution_lib
from autogrow_jax.methods.sparsify import growths
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import space as space_lib
from autogrow_jax.networks import common

Architecture = architecture_lib.Architecture
Tree = base.Tree
# A sample, from (architecture, state, key).
Draw = Callable[[Architecture, state_lib.TrainState, jax.Array], Tree]

_ORIGIN = 3.0  # s of what is there at first.
_LARGE = 1e6


def _choice(values: tuple[str, ...], text: str) -> Any:
  """A setting that has one of some values, the first by default."""
  return dataclasses.field(
      default=values[0],
      metadata={'help': f'{text}: {", ".join(values)}.', 'choices': values},
  )


def _number(default: float, low: float, high: float, text: str) -> Any:
  """A setting that is a number within bounds."""
  return dataclasses.field(
      default=default, metadata={'help': text, 'bounds': (low, high)}
  )


@dataclasses.dataclass(frozen=True)
class Run:
  """How long the run grows; binaries fill it in.

  Attributes:
    queries: T, how often masks are trained between two samples.
    steps: training steps of all of that, one per batch.
    accumulate: batches over which gradients are averaged before an update.
  """

  queries: int = 0
  steps: int = 0
  accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class Sparsify(base.Method):
  """Structured continuous sparsification.

  Unlike the paper, as far as it can be known, a gate multiplies what *reads* a
  channel and not its filter, since behind a filter stands a norm that takes a
  factor away again; lambda follows the expected cost in every step, since one
  that is held for an epoch makes the network swing from its seed to the full
  one and back; of several last samples the one nearest to the budget remains.
  Unlike the paper, the loss moves a mask by the importance of what it gates,
  -|q p G| in place of q p G, where G is the gradient by the gate. A norm behind
  a group makes the sum of q p G over the group zero, so that the signed
  gradient can say which channels matter but not how many, and masks stay
  ambiguous. The help of each setting stands beside it.
  """

  target_sparsity: float = dataclasses.field(
      default=0.5,
      metadata={
          'help': 'Part of the cost of the full network to do without: 0.9 '
          'leaves a tenth.'
      },
  )
  budget: str = _choice(space_lib.BUDGETS, 'Cost that the budget counts')
  grow: str = _choice(space_lib.GROWS, 'Parts of the network that have masks')
  lambda1: float = _number(0.5, 0, _LARGE, 'Base of the penalty on channels.')
  lambda2: float = _number(0.1, 0, _LARGE, 'Base of the penalty on layers.')
  estimator: str = _choice(
      ('importance', 'paper'),
      'Gradient of the loss by mask variables, by importance or signed as in '
      'the paper',
  )
  gate: str = _choice(
      ('readers', 'filter'),
      'Weights that a mask multiplies, those that read the channel or, as in '
      'equation 1, its filter, to whose factor a norm is blind',
  )
  lambda_update: str = _choice(
      ('step', 'epoch'),
      'How often the excess over the budget is measured, per step by the '
      'expected cost or per epoch by the cost of the sample',
  )
  temperature: str = _choice(
      ('structure', 'global'),
      'Annealing, per structure by how often it was sampled, or of all alike',
  )
  beta_final: float = _number(
      100.0, 1, _LARGE,
      'Inverse temperature of what is sampled in all queries; 1 at first.',
  )
  relaxation: str = _choice(
      ('sigmoid', 'gumbel'),
      'Relaxation of masks; gumbel adds noise that is held between samples',
  )
  final: str = _choice(
      ('sample', 'threshold'),
      'Network that remains, the last sample or all with p of at least 1/2',
  )
  freeze: float = _number(
      1.0, 0, 1,
      'Part of the growing epochs after which nothing is sampled any more.',
  )
  start: float = _number(
      0.035, 0, 1,
      "Part of the run's updates in which the penalty alone would bring what "
      'is off at first to even chances.',
  )
  mask: optimizers.AuxConfig = optimizers.AuxConfig()
  backend: str = _choice(
      ('compact', 'masked'), 'What is computed, what is there or everything'
  )
  run: Run = Run()

  def __post_init__(self):
    space_lib.check_target(self.target_sparsity)
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if 'choices' in field.metadata:
        common.check_choice(field.name, value, field.metadata['choices'])
      if 'bounds' in field.metadata:
        low, high = field.metadata['bounds']
        if not low <= value <= high:
          raise ValueError(
              f'{field.name} is from {low} to {high}, got {value}.'
          )

  @property
  def execution(self) -> execution_lib.Masked:
    return execution_lib.Masked(
        self.grow, self.gate, self.backend == 'compact', self.annealing
    )

  @property
  def annealing(self) -> masks.Annealing:
    """Probabilities of mask variables."""
    return masks.Annealing(self.beta_final, self.run.queries)

  def extra(self, architecture: Architecture) -> base.Extra:
    space = space_lib.of(architecture, self.grow)
    off = [-distance for distance in masks.start(architecture, space, self)]
    full = lambda *values: masks.full(architecture, space, *values)
    q = masks.seeded(full(False, False, bool), True)
    return base.Extra(
        trainable=masks.seeded(full(*off, np.float32), _ORIGIN),
        other={
            'q': q,
            'grown': jax.tree.map(np.copy, q),
            't': full(0, 0, np.int32),
            'noise': full(0, 0, np.float32),
            'open': np.float32(1),
        },
        optimizer=self.mask,
    )

  def objective(
      self,
      network: base.Network,
      params: Tree,
      stats: Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
    """Computes equation (6); the penalty has a gradient but no value."""
    aux = params['aux']
    if self.estimator == 'importance':
      aux = _raised(network.mean, aux)
    loss, (after, logits) = super().objective(
        network, {**params, 'aux': aux}, stats, labels, key
    )
    penalty = self.penalty(
        network.layout.canonical, params['aux'], stats['method']
    )
    # Gates have scaled the selections of shortcuts, which are constants.
    after['network'] = axes_lib.map_with_names(
        lambda path, old, new: old if path[-1] == 'select' else new,
        stats['network'],
        after['network'],
    )
    return tasks.with_penalty(loss, penalty), (after, logits)

  def penalty(
      self, architecture: Architecture, aux: Tree, memory: Tree
  ) -> jax.Array:
    """Sums lambda p over all structures, equations (4) and (6).

    Channels of a layer that is not there are left alone: otherwise a layer
    would be dense before it is first there.

    Args:
      architecture: the full-size network.
      aux: mask variables.
      memory: the method's other leaves.

    Returns:
      A scalar; lambda has no gradient.
    """
    space = space_lib.of(architecture, self.grow)
    p = self.annealing.probabilities(aux, memory)
    counted = p if self.lambda_update == 'step' else jax.tree.map(
        jnp.float32, memory['q']
    )
    density = space_lib.density(architecture, space, counted, self.budget)
    # u - u_G, where both are 1 - density.
    excess = jax.lax.stop_gradient(density - (1 - self.target_sparsity))
    is_there = space_lib.is_in_a_layer(space, memory['q'])
    channels = sum(
        is_there[name] * jnp.sum(values)
        for name, values in p['channels'].items()
    )
    layers = sum(p['layers'].values())
    penalty = self.lambda1 * channels + self.lambda2 * layers
    return memory['open'] * excess * penalty

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth_lib.Growth | None:
    """Proposes a new sample, or at the end what remains of the last one."""
    return self.sampling_by(self._draw, decision, situation)

  def sampling_by(
      self,
      draw: Draw,
      decision: policies.Decision,
      situation: base.Situation,
  ) -> growth_lib.Growth | None:
    """Proposes as `propose` does, with samples that are drawn in another way.
    """
    architecture, state = situation.architecture, situation.state
    if not state.stats['method']['open']:
      return None
    if situation.is_last:
      return self.conclude(architecture, state)
    is_frozen = self.run.steps and state.step > self.freeze * self.run.steps
    if decision.action != 'grow' or is_frozen:
      return None
    key = jax.random.fold_in(
        randomness.stream(jax.random.wrap_key_data(state.key), 'masks'),
        state.step,
    )
    return self._resample(
        architecture, state, draw(architecture, state, key), key
    )

  def conclude(
      self, architecture: Architecture, state: state_lib.TrainState
  ) -> growth_lib.Growth:
    """Proposes the sampled network for good, see `growths.last_prune`."""
    aux, q = state.params['aux'], state.stats['method']['q']
    p = masks.on_host(
        self.annealing.probabilities(aux, state.stats['method'])
    )
    likely = masks.guarded(jax.tree.map(lambda p: p >= 0.5, p), aux)
    unlike = sum(
        int(np.sum(a != b))
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(likely))
    )
    return growths.last_prune(
        architecture,
        state,
        space_lib.of(architecture, self.grow),
        likely if self.final == 'threshold' else q,
        p,
        extra=self.extra,
        scale=(
            axes_lib.scale_readers
            if self.gate == 'readers'
            else axes_lib.scale_filters
        ),
        report={'ambiguous': masks.ambiguous(p), 'unlike_threshold': unlike},
    )

  def report(
      self, architecture: Architecture, aux: Tree, memory: Tree
  ) -> dict[str, Any]:
    shape = policies.format_depths(architecture.depths)
    if not memory['open']:
      return {'shape': shape}
    space = space_lib.of(architecture, self.grow)
    if space.layers:
      off = {b for b in space.layers if not memory['q']['layers'][b]}
      shape = policies.format_depths([
          sum(block not in off for block in stage)
          for stage in architecture.stages
      ])
    density = lambda tree, budget: float(
        space_lib.density(architecture, space, tree, budget)
    )
    p = masks.on_host(self.annealing.probabilities(aux, memory))
    beta = self.annealing.temperatures(memory['t'])
    return {
        'shape': f'{shape} {100 * density(memory["q"], self.budget):.1f}%',
        'density_params': round(density(memory['q'], 'params'), 6),
        'density_macs': round(density(memory['q'], 'macs'), 6),
        'expected_density': round(density(p, self.budget), 6),
        'ambiguous': round(masks.ambiguous(p), 6),
        'units': {
            name: int(np.sum(q)) for name, q in memory['q']['channels'].items()
        },
        'mean_beta': {
            name: round(float(np.mean(beta)), 4)
            for name, beta in beta['channels'].items()
        },
    }

  def least_density(self, architecture: Architecture) -> float:
    """Computes the density of the seed: one channel in every group alone."""
    space = space_lib.of(architecture, self.grow)
    seed = masks.seeded(
        masks.full(architecture, space, False, False, bool), True
    )
    return space_lib.density(architecture, space, seed, self.budget)

  def _resample(
      self,
      architecture: Architecture,
      state: state_lib.TrainState,
      new: Tree,
      key: jax.Array,
  ) -> growth_lib.Growth:
    """Counts a new sample, and makes the growth that puts it in place."""
    memory = state.stats['method']
    space = space_lib.of(architecture, self.grow)
    for name, block in space.owners:  # Layers come before their channels.
      if not new['layers'][block]:
        new['channels'][name] = memory['q']['channels'][name]
    is_there = space_lib.is_in_a_layer(space, new)
    counted = {
        'channels': {
            name: q & is_there[name] for name, q in new['channels'].items()
        },
        'layers': new['layers'],
    }
    if self.temperature == 'global':
      counted = jax.tree.map(np.ones_like, counted)
    noise = memory['noise']
    if self.relaxation == 'gumbel':
      noise = masks.on_host(
          masks.logistic(jax.random.fold_in(key, 1), noise), np.float32
      )
    return growths.new_sample(architecture, space, state.opt_state, memory, {
        **memory,
        'q': new,
        'grown': jax.tree.map(np.logical_or, memory['grown'], new),
        't': jax.tree.map(
            lambda t, q: (t + q).astype(np.int32), memory['t'], counted
        ),
        'noise': noise,
    })

  def _draw(
      self,
      architecture: Architecture,
      state: state_lib.TrainState,
      key: jax.Array,
  ) -> Tree:
    """Draws a sample; of the last ones the one nearest to the budget."""
    aux, space = state.params['aux'], space_lib.of(architecture, self.grow)
    p = masks.on_host(
        self.annealing.probabilities(aux, state.stats['method'])
    )
    if not self._is_last_sample(int(state.step)):
      return masks.guarded(masks.sample(key, p), aux)
    return masks.nearest(
        key,
        p,
        aux,
        density=lambda q: space_lib.density(
            architecture, space, q, self.budget
        ),
        target=1 - self.target_sparsity,
    )

  def _is_last_sample(self, step: int) -> bool:
    """Tells whether no other sample comes after one at this step."""
    between = self.run.steps / max(1, self.run.queries)
    end = min(self.freeze * self.run.steps, self.run.steps - between)
    return step + between > end + 0.5  # Half a step, for rounding.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _raised(mean: Callable[[Tree], Tree], aux: Tree) -> Tree:
  """Passes mask variables on; a loss then raises those that it depends on."""
  del mean
  return aux


_raised.defvjp(
    lambda mean, aux: (aux, None),
    # `mean` makes it the gradient of the whole batch, on all devices.
    lambda mean, _, grads: (
        jax.tree.map(lambda grad: -jnp.abs(grad), mean(grads)),
    ),
)
