"""AutoGrow (Wen et al., KDD 2020): appends sub-modules to stages.

When and where is the policy's business (`policies.Periodic`, `OneShot` and
others); here is what is appended and how it starts. A new sub-module starts
from the network's default initialisation. In residual networks its last norm,
scale and bias alike, is then overwritten by one of the paper's initialisers. A
plain sub-module has no such norm and keeps the default.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import growth
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.methods import base
from autogrow_jax.networks import base as networks_base

INITIALIZERS = ('gauss', 'zero', 'uniform', 'adam')

# AdamInit of Wen et al. 2020: succeeds when the accuracy on training batches
# is back within half a percentage point of the shallower network's.
ADAM_LEARNING_RATE = 1e-3
ADAM_MAX_EPOCHS = 10
ADAM_TOLERANCE = 0.005


@dataclasses.dataclass(frozen=True)
class AutoGrow(base.Method):
  """Appends a sub-module to the stage that the policy names, or several to all.

  Attributes:
    initializer: of a residual sub-module's last norm. 'gauss': N(0, scale^2);
      'zero': the sub-module starts as the identity; 'uniform': U(low, high);
      'adam': the default, then up to ten epochs of Adam on that norm alone.
    scale: standard deviation of 'gauss'.
    low: lower end of 'uniform'.
    high: upper end of 'uniform'. The paper speaks of a standard deviation of
      1.0; its published runs used U(0, 1).
    random_bias: draw the norm's bias, too, and not only its scale.
  """

  initializer: str = 'gauss'
  scale: float = 1.0
  low: float = 0.0
  high: float = 1.0
  random_bias: bool = True

  def __post_init__(self):
    if self.initializer not in INITIALIZERS:
      raise ValueError(
          f'initializer is one of {", ".join(INITIALIZERS)}, got '
          f'{self.initializer!r}.'
      )
    if not self.scale > 0:
      raise ValueError(f'scale is positive, got {self.scale}.')
    if not self.low < self.high:
      raise ValueError(f'low is below high, got {self.low} and {self.high}.')

  @property
  def execution(self) -> view.Plain:
    return view.Plain(spare=True)

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth.Growth | None:
    """Alg. 1, steps 10 to 13: append blocks and initialise them."""
    if decision.action != 'grow':
      return None
    appended = growth.append_all(
        situation.architecture, decision.stages(situation.architecture.depths)
    )
    old = {name for stage in situation.architecture.stages for name in stage}
    norms = {
        block: last_norm(appended.architecture, block)
        for stage in appended.architecture.stages
        for block in stage
        if block not in old
    }
    blocks = ', '.join(norms)
    # Blocks of one family are alike: all have such a norm, or none.
    norms = {block: norm for block, norm in norms.items() if norm is not None}
    if not norms:
      return dataclasses.replace(
          appended, note=f'append {blocks}, default initialisation'
      )
    if self.initializer == 'adam':
      patch = adam_last_norms(appended.architecture, norms, situation)
    else:
      patch = draw_last_norms(norms, self._draw, self.random_bias)
    kinds = ', '.join(sorted(set(norms.values())))
    return dataclasses.replace(
        appended,
        patch=patch,
        note=f'append {blocks}, {self.initializer} initialisation of {kinds}',
    )

  def _draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if self.initializer == 'zero':
      return jnp.zeros(shape)
    if self.initializer == 'gauss':
      return self.scale * jax.random.normal(key, shape)
    return jax.random.uniform(key, shape, minval=self.low, maxval=self.high)


def last_norm(
    architecture: architecture_lib.Architecture, block: str
) -> str | None:
  """The layer that ends a block's residual branch; None in a plain block."""
  for part in networks.parts(architecture):
    if part.name == block:
      return part.module.last_norm
  raise ValueError(f'No block {block!r} in {architecture}.')


def draw_last_norms(
    norms: Mapping[str, str],
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    random_bias: bool,
) -> growth.Patch:
  """Overwrites blocks' last norms with draws; biases zero if not random.

  Args:
    norms: the norm of each block.
    draw: values of a shape, from a key.
    random_bias: draw biases, too, and not only scales.

  Returns:
    The patch.
  """

  def patch(state, key):
    for block, norm in norms.items():
      norm_key = randomness.stream(key, f'{block}.{norm}')
      leaves = dict(state.params['weights'][block][norm])
      for index, leaf in enumerate(('scale', 'bias')):
        if leaf == 'scale' or random_bias:
          leaves[leaf] = draw(
              jax.random.fold_in(norm_key, index), leaves[leaf].shape
          )
      state = with_layer(state, block, norm, leaves)
    return state, {}

  return patch


def adam_last_norms(
    architecture: architecture_lib.Architecture,
    norms: Mapping[str, str],
    situation: base.Situation,
) -> growth.Patch:
  """AdamInit: trains the last norms of new blocks alone, in train mode.

  Whole epochs of ordinary batches, until the accuracy over an epoch exceeds the
  shallower network's last one minus half a point, at most ten. Running
  statistics of all norms move, and batch norm sees the whole batch on one
  device, whatever the run's parallelism. Neither these epochs nor their
  accuracies count for the policy, and the run's optimizer state is untouched.

  Args:
    architecture: the one with the new blocks.
    norms: the norm of each new block; all are trained together.
    situation: the run's.

  Returns:
    The patch.
  """

  def patch(state, key):
    del key
    layout = view.layout(architecture)
    tx = optax.chain(
        optax.add_decayed_weights(situation.weight_decay),
        optax.adam(ADAM_LEARNING_RATE),
    )

    def loss_fn(trained, weights, network, x, labels):
      weights = {
          **weights,
          **{
              block: {**weights[block], norm: trained[block]}
              for block, norm in norms.items()
          },
      }
      logits, network = networks_base.apply(
          layout.bucket,
          view.pack(weights, layout, stack=jnp.stack),
          network,
          x,
          train=True,
      )
      right = jnp.argmax(logits, -1) == labels
      counts = [jnp.sum(x, dtype=jnp.uint32) for x in (right, labels >= 0)]
      loss = base.mean_cross_entropy(logits, labels)
      return loss, (network, jnp.stack(counts))

    @jax.jit
    def step(trained, opt_state, network, counts, weights, x, labels):
      grads, (network, more) = jax.grad(loss_fn, has_aux=True)(
          trained, weights, network, x, labels
      )
      updates, opt_state = tx.update(grads, opt_state, trained)
      return (
          optax.apply_updates(trained, updates),
          opt_state,
          network,
          counts + more,
      )

    weights = jax.device_put(state.params['weights'])
    network = view.pack(state.stats['network'], layout)
    trained = {block: weights[block][norm] for block, norm in norms.items()}
    opt_state = tx.init(trained)
    target = situation.train_accuracy - ADAM_TOLERANCE
    batches = situation.batches()
    images, epoch, accuracy = 0, 0, 0.0
    while epoch < ADAM_MAX_EPOCHS and (epoch == 0 or accuracy <= target):
      counts = jnp.zeros(2, jnp.uint32)
      for _ in range(situation.batches_per_epoch):
        x, labels = next(batches)
        trained, opt_state, network, counts = step(
            trained, opt_state, network, counts, weights, x, labels
        )
        images += len(labels)
      correct, total = map(int, counts)
      epoch, accuracy = epoch + 1, correct / max(1, total)
    for block, norm in norms.items():
      state = with_layer(state, block, norm, trained[block])
    network = view.unpack(state_lib.to_host(network), layout)
    state = state.replace(stats={**state.stats, 'network': network})
    return state, {
        'adam_epochs': epoch,
        'adam_accuracy': round(100 * accuracy, 2),
        'adam_target': round(100 * target, 2),
        'adam_success': accuracy > target,
        'images': images,
    }

  return patch


def with_layer(
    state: state_lib.TrainState, part: str, layer: str, leaves: dict[str, Any]
) -> state_lib.TrainState:
  """Replaces the parameters of one layer."""
  weights = state.params['weights']
  weights = {
      **weights,
      part: {
          **weights[part],
          layer: {
              name: np.asarray(leaf, np.float32)
              for name, leaf in leaves.items()
          },
      },
  }
  return state.replace(params={**state.params, 'weights': weights})
