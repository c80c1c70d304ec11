"""The training step and the forward pass, as functions to be compiled.

Both are written once, for all networks, methods, tasks and ways of parallelism.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import data
from autogrow_jax import optimizers
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.methods import base
from autogrow_jax.networks import base as networks_base
from autogrow_jax.run import parallel as parallel_lib

Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Computation:
  """Everything that programs depend on besides the bucket.

  Attributes:
    method: the method, which gives the objective.
    task: the task, which gives the loss.
    tx: the optimizer.
    preprocessing: augmentation and normalisation of inputs.
    dtype: type of activations.
    parallel: placement on devices.
    augment: own augmentation of raw batches, (key, images, labels) -> (images,
      labels), in place of that of `preprocessing`; None without.
  """

  method: base.Method
  task: tasks.Task
  tx: optax.GradientTransformation
  preprocessing: data.Preprocessing
  dtype: Any
  parallel: parallel_lib.Parallel
  augment: Augment | None = None

  def prepared(
      self, key: jax.Array, images: jax.Array, labels: jax.Array, first: Any = 0
  ) -> tuple[jax.Array, jax.Array]:
    """Augmented and normalised inputs of a batch, and their labels.

    Args:
      key: key of the batch.
      images: raw inputs.
      labels: their labels.
      first: position of the first one in the whole batch.
    """
    if self.augment is not None:
      key = jax.random.fold_in(key, first)
      images, labels = self.augment(key, images, labels)
    else:
      images, labels = data.augment_examples(
          key, images, labels, self.preprocessing, first=first
      )
    x = data.preprocess(images, self.preprocessing, dtype=self.dtype)
    return x, labels


def new_meters() -> dict[str, np.generic]:
  """Sums over the labels of an epoch, at zero."""
  return {
      'loss_sum': np.float32(0),
      'correct': np.uint32(0),
      'total': np.uint32(0),
  }


def train_step(
    computation: Computation,
    layout: view.Layout,
    packed: Any,
    meters: Any,
    images: jax.Array,
    labels: jax.Array,
    index: jax.Array | None,
    learning_rate: jax.Array,
    depths: Any = None,
) -> tuple[Any, Any]:
  """Does one step on one batch.

  Args:
    computation: static.
    layout: static, layout of the network.
    packed: the packed `TrainState`.
    meters: sums of `new_meters`.
    images: the whole training set, uint8 (examples, height, width, channel)
      or tokens int32 (examples, step), or the batch alone.
    labels: (examples, ...) int32; -1 does not count.
    index: (batch,) int32, into the training set; None if it is the batch
      alone. In `pmap` mode, index or batch are this device's share.
    learning_rate: scalar.
    depths: depths of the layout; data, so that one program serves many.

  Returns:
    The next packed state and meters.
  """
  parallel = computation.parallel
  key = jax.random.wrap_key_data(packed.key)
  augment_key = jax.random.fold_in(
      randomness.stream(key, 'augment'), packed.step
  )
  if index is not None:
    images, labels = images[index], labels[index]
  first = parallel.first(len(labels))
  x, y = computation.prepared(augment_key, images, labels, first)
  dropout_key = jax.random.fold_in(
      jax.random.fold_in(randomness.stream(key, 'dropout'), packed.step), first
  )
  method = computation.method
  network = base.Network(
      method.execution,
      layout,
      x,
      computation.task,
      dropout_key,
      depths,
      parallel.mean,
  )

  def loss_fn(params):
    return method.objective(
        network,
        params,
        packed.stats,
        y,
        jax.random.fold_in(randomness.stream(key, 'method'), packed.step),
    )

  (loss, (stats, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      packed.params
  )
  grads, stats, loss = parallel.mean((grads, stats, loss))
  opt_state = optimizers.with_learning_rate(packed.opt_state, learning_rate)
  updates, opt_state = computation.tx.update(grads, opt_state, packed.params)
  updates = method.execution.applied(layout.canonical, updates, packed.stats)
  correct, total = parallel.sum(computation.task.counts(logits, y))
  packed = packed.replace(
      step=packed.step + 1,
      params=optax.apply_updates(packed.params, updates),
      stats=stats,
      opt_state=opt_state,
  )
  return packed, {
      'loss_sum': meters['loss_sum'] + loss * total,
      'correct': meters['correct'] + correct,
      'total': meters['total'] + total,
  }


def forward(
    computation: Computation,
    layout: view.Layout,
    params: Any,
    stats: Any,
    images: jax.Array,
    train: jax.Array,
    depths: Any = None,
) -> jax.Array:
  """Computes float32 logits of a batch; no state changes.

  Args:
    computation: static.
    layout: static, layout of the network.
    params: packed parameters, the method's own included.
    stats: packed statistics, the method's own included.
    images: uint8 (batch, height, width, channel), or int32 (batch, step).
    train: True if norms use batch statistics; a traced bool, so that one
      program serves both modes.
    depths: depths of the layout.
  """
  x = data.preprocess(
      images, computation.preprocessing, dtype=computation.dtype
  )
  gated = computation.method.execution.gated(layout, params, stats)
  logits, _ = networks_base.apply(
      layout.bucket,
      gated.weights,
      gated.stats,
      x,
      train=train,
      gates=gated.gates,
      depths=depths,
  )
  return logits


def packed_shapes(computation: Computation, layout: view.Layout) -> Any:
  """Shapes and types of a layout's packed state."""
  extra = computation.method.extra
  state = state_lib.abstract_state(
      layout.architecture,
      computation.tx,
      extra=lambda _: extra(layout.canonical),
  )
  return jax.eval_shape(
      lambda state: view.pack(state, layout, stack=jnp.stack), state
  )
