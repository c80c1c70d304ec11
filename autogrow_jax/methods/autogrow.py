"""AutoGrow (Wen et al., KDD 2020): appends sub-modules to stages.

When and where is the policy's business (`policies.Periodic`, `OneShot` and
others); here is what is appended and how it starts. A new sub-module starts
from the network's default initialisation. In residual networks its last norm,
scale and bias alike, is then overwritten by one of the paper's initialisers. A
plain sub-module has no such norm and keeps the default.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.networks import base as networks_base

Path = axes_lib.Path

INITIALIZERS = ('gauss', 'zero', 'uniform', 'adam', 'copy')

# AdamInit of Wen et al. 2020: succeeds when the accuracy on training batches
# is back within half a percentage point of the shallower network's.
ADAM_LEARNING_RATE = 1e-3
ADAM_MAX_EPOCHS = 10
ADAM_TOLERANCE = 0.005


@dataclasses.dataclass(frozen=True)
class AutoGrow(base.Method):
  """Appends a sub-module to the stage that the policy names, or several to all.
  """

  initializer: str = dataclasses.field(
      default='gauss',
      metadata={
          'help': "Start of a residual sub-module's last norm: gauss (N(0, "
          'scale^2)), zero (the identity), uniform (between low and high), '
          'adam (the default, then up to ten epochs of Adam on it alone), or '
          'copy (not in the paper: all layers that are alike start as in the '
          'preceding sub-module, in plain networks, too).'
      },
  )
  scale: float = dataclasses.field(
      default=1.0, metadata={'help': 'Standard deviation of gauss.'}
  )
  # The paper speaks of a standard deviation of 1.0; its published runs used
  # U(0, 1).
  low: float = dataclasses.field(
      default=0.0, metadata={'help': 'Lower end of uniform.'}
  )
  high: float = dataclasses.field(
      default=1.0, metadata={'help': 'Upper end of uniform.'}
  )
  random_bias: bool = dataclasses.field(
      default=True,
      metadata={'help': "Draw the norm's bias, too, and not only its scale."},
  )

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
  ) -> growth_lib.Growth | base.Skip | None:
    """Alg. 1, steps 10 to 13: append blocks and initialise them."""
    if decision.action != 'grow':
      return None
    stages = decision.stages(situation.architecture.depths)
    if not stages:
      return base.Skip(
          'the policy names no stage to grow; take one that does',
          is_final=True,
      )
    appended = state_lib.append(situation.architecture, stages)
    architecture = appended.target
    old = {name for stage in situation.architecture.stages for name in stage}
    norms = {
        block: last_norm(architecture, block)
        for stage in architecture.stages
        for block in stage
        if block not in old
    }
    blocks = ', '.join(norms)
    if self.initializer == 'copy':
      return dataclasses.replace(
          appended,
          values=copied(architecture, norms.keys(), situation.state),
          note=f'append {blocks}, copy of the preceding sub-module',
      )
    # Blocks of one family are alike: all have such a norm, or none.
    norms = {block: norm for block, norm in norms.items() if norm is not None}
    if not norms:
      return dataclasses.replace(
          appended, note=f'append {blocks}, default initialisation'
      )
    kinds = ', '.join(sorted(set(norms.values())))
    appended = dataclasses.replace(
        appended,
        note=f'append {blocks}, {self.initializer} initialisation of {kinds}',
    )
    if self.initializer == 'adam':
      grown = state_lib.grown_arrays(
          situation.state, appended, key=situation.key, extra=self.extra
      )
      return appended + adam_last_norms(grown, architecture, norms, situation)
    return dataclasses.replace(
        appended,
        values=draw_last_norms(
            architecture,
            norms,
            self._draw,
            situation.key,
            random_bias=self.random_bias,
        ),
    )

  def _draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if self.initializer == 'zero':
      return jnp.zeros(shape)
    if self.initializer == 'gauss':
      return self.scale * jax.random.normal(key, shape)
    return jax.random.uniform(key, shape, minval=self.low, maxval=self.high)


@dataclasses.dataclass(frozen=True)
class Placebo(base.Method):
  """Declines every growth, so that a policy sees a network that never grows.

  The loop, the batches and the learning rates are those of `AutoGrow`.
  """

  @property
  def execution(self) -> view.Plain:
    return view.Plain(spare=True)

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> base.Skip | None:
    """Declines; the stages that would have grown are recorded."""
    if decision.action != 'grow':
      return None
    stages = decision.stages(situation.architecture.depths)
    return base.Skip('a placebo never grows', report={'stages': stages})


def last_norm(
    architecture: architecture_lib.Architecture, block: str
) -> str | None:
  """The layer that ends a block's residual branch; None in a plain block."""
  for part in networks.parts(architecture):
    if part.name == block:
      return part.module.last_norm
  raise ValueError(f'No block {block!r} in {architecture}.')


def copied(
    architecture: architecture_lib.Architecture,
    blocks: Collection[str],
    state: state_lib.TrainState,
) -> dict[Path, Any]:
  """Takes layers of new blocks from the last old one of their stage.

  A layer of another shape, as where a stage begins, keeps its default start.

  Args:
    architecture: the architecture with the new blocks.
    blocks: the new blocks.
    state: the canonical state without them.
  """
  parts = {part.name: part for part in networks.parts(architecture)}
  roots = state.params['weights'], state.stats['network']
  found: tuple[dict[str, Any], dict[str, Any]] = {}, {}
  for stage in architecture.stages:
    source = [block for block in stage if block not in blocks][-1]
    for block in blocks & set(stage):
      for root, shapes, new in zip(
          roots, networks_base.shapes(parts[block]), found, strict=True
      ):
        new[block] = {
            layer: root[source][layer]
            for layer, wanted in shapes.items()
            if _shapes(wanted) == _shapes(root[source].get(layer))
        }
  return state_lib.values(weights=found[0], network=found[1])


def _shapes(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.shape, tree)


def draw_last_norms(
    architecture: architecture_lib.Architecture,
    norms: Mapping[str, str],
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    key: jax.Array,
    *,
    random_bias: bool,
) -> dict[Path, np.ndarray]:
  """Draws blocks' last norms.

  Args:
    architecture: the architecture with the new blocks.
    norms: the norm of each block.
    draw: values of a shape, from a key.
    key: key of the growth.
    random_bias: whether biases are drawn, too; else they start at zero.

  Returns:
    Leaves that the growth replaces.
  """
  parts = {part.name: part for part in networks.parts(architecture)}
  leaves = ('scale', 'bias') if random_bias else ('scale',)
  values = {}
  for block, norm in norms.items():
    norm_key = randomness.stream(key, f'{block}.{norm}')
    shapes = networks_base.shapes(parts[block])[0][norm]
    for index, leaf in enumerate(leaves):
      value = draw(jax.random.fold_in(norm_key, index), shapes[leaf].shape)
      values['weights', block, norm, leaf] = np.asarray(value, np.float32)
  return values


def adam_last_norms(
    grown: state_lib.TrainState,
    architecture: architecture_lib.Architecture,
    norms: Mapping[str, str],
    situation: base.Situation,
) -> growth_lib.Growth:
  """AdamInit: trains the last norms of new blocks alone, in train mode.

  Whole epochs of ordinary batches, until the accuracy over an epoch exceeds the
  shallower network's last one minus half a point, at most ten. Running
  statistics of all norms move, and batch norm sees the whole batch on one
  device, whatever the run's parallelism. Neither these epochs nor their
  accuracies count for the policy, and the run's optimizer state is untouched.

  Args:
    grown: the state with the new blocks.
    architecture: its architecture.
    norms: the norm of each new block; all are trained together.
    situation: the run's.

  Returns:
    A growth that sets the trained norms and all statistics.
  """
  layout = view.layout(architecture)
  tx = optax.chain(
      optax.add_decayed_weights(situation.weight_decay),
      optax.adam(ADAM_LEARNING_RATE),
  )

  def loss_fn(trained, weights, network, x, labels):
    weights = weights | {
        block: {**weights[block], norm: trained[block]}
        for block, norm in norms.items()
    }
    logits, network = networks_base.apply(
        layout.bucket,
        view.pack(weights, layout, stack=jnp.stack),
        network,
        x,
        train=True,
    )
    counts = jnp.stack(situation.task.counts(logits, labels))
    return situation.task.loss(logits, labels), (network, counts)

  @jax.jit
  def step(trained, opt_state, network, counts, weights, x, labels):
    grads, (network, more) = jax.grad(loss_fn, has_aux=True)(
        trained, weights, network, x, labels
    )
    updates, opt_state = tx.update(grads, opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    return trained, opt_state, network, counts + more

  weights = jax.device_put(grown.params['weights'])
  network = view.pack(grown.stats['network'], layout)
  trained = {block: weights[block][norm] for block, norm in norms.items()}
  opt_state = tx.init(trained)
  target = situation.train_accuracy - ADAM_TOLERANCE
  batches = situation.batches()
  examples, epoch, accuracy = 0, 0, 0.0
  while epoch < ADAM_MAX_EPOCHS and (epoch == 0 or accuracy <= target):
    counts = jnp.zeros(2, jnp.uint32)
    for _ in range(situation.batches_per_epoch):
      x, labels = next(batches)
      trained, opt_state, network, counts = step(
          trained, opt_state, network, counts, weights, x, labels
      )
      examples += len(labels)
    correct, total = map(int, counts)
    epoch, accuracy = epoch + 1, correct / max(1, total)
  weights = {block: {norm: trained[block]} for block, norm in norms.items()}
  return growth_lib.Growth(
      values=state_lib.values(
          weights=state_lib.to_host(weights),
          network=view.unpack(state_lib.to_host(network), layout),
      ),
      examples=examples,
      report={
          'adam_epochs': epoch,
          'adam_accuracy': round(100 * accuracy, 2),
          'adam_target': round(100 * target, 2),
          'adam_success': accuracy > target,
      },
  )
