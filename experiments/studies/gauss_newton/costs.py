"""Seconds and bytes of learning splits, beside a plain training step.

Bytes for sites with M channels in all and d weights of a channel on either
side:

  als        4 sum_channels d^2 of matrices for the larger side, without the
             layers that are solved without a matrix
  estimates  4 M^2, the Gram matrix of all candidates

The compiler gives the bytes of a step of Adam on all splits.
"""

from collections.abc import Callable
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.methods import base as methods_base
from autogrow_jax.methods.gauss_newton import learned_splits
from autogrow_jax.methods.gauss_newton import learning as learning_lib
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.networks import base
from autogrow_jax.run import parallel as parallel_lib
from autogrow_jax.run import programs
from autogrow_jax.run import steps as steps_lib
from autogrow_jax.run import trained

from .. import timing
from . import joint as joint_lib

Architecture = architecture_lib.Architecture


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Predicted bytes, see the module.

  Attributes:
    channels: number of channels that can be split.
    als: bytes of the matrices of one block.
    estimates: bytes of the Gram matrix.
  """

  channels: int
  als: int
  estimates: int


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step.

  Attributes:
    seconds: median seconds.
    fastest: smallest seconds.
    bytes: bytes by the compiler; None if it gives none.
  """

  seconds: float
  fastest: float
  bytes: int | None


@dataclasses.dataclass(frozen=True)
class Steps:
  """Steps on one batch.

  Attributes:
    batch_size: size of the batch.
    repeats: repetitions of each step, in turn.
    plain: a training step as in a run, augmentation included.
    learning: a step of Adam on all splits for frozen weights.
    joint: a training step with a step of Adam on all splits beside it.
  """

  batch_size: int
  repeats: int
  plain: Step
  learning: Step
  joint: Step

  @property
  def ratio(self) -> float:
    """Seconds of learning in units of a plain step."""
    return self.learning.seconds / self.plain.seconds


def predict(architecture: Architecture) -> Sizes:
  """Predicts bytes for an architecture, which need not exist."""
  sites = signals_lib.model_of(architecture).sites
  matrices = {
      block: sum(
          4 * site.units * size(site) ** 2
          for site in sites
          if not learning_lib.is_wide(site, block)
      )
      for block, size in (
          ('u', lambda site: site.incoming), ('e', lambda site: site.outgoing)
      )
  }
  channels = sum(site.units for site in sites)
  return Sizes(channels, max(matrices.values()), 4 * channels**2)


def compiled_bytes(
    architecture: Architecture, batch_size: int, curvature: str
) -> int | None:
  """Compiles a step of Adam on all splits for its bytes."""
  parts = networks.parts(architecture)
  shapes = {part.name: base.shapes(part) for part in parts}
  weights, stats = (
      {name: trees[which] for name, trees in shapes.items()}
      for which in (0, 1)
  )
  model = signals_lib.model_of(architecture)
  arguments = jax.eval_shape(
      functools.partial(_arguments, model),
      signals_lib.Trees(weights, stats),
      jax.ShapeDtypeStruct((batch_size, *parts[0].input_shape), np.float32),
      jax.ShapeDtypeStruct((batch_size,), np.int32),
  )
  return programs.compiled_bytes(_compiled(model, curvature, arguments))


def full_vgg() -> Architecture:
  """Returns VGG-19 at full width, on 32x32 colour images of 100 classes."""
  network = networks.get('vgg19')
  return network.seed(
      network.seed_depths, input_shape=(32, 32, 3), classes=100, options={}
  )


def measure(
    network: trained.TrainedNetwork,
    dataset: data.Dataset,
    *,
    curvature: str,
    batch_size: int,
    repeats: int,
    progress: Callable[[str], None],
) -> Steps:
  """Times all steps on one device, in turn, after a first run of each.

  Args:
    network: the network.
    dataset: data on which it was trained.
    curvature: one of `signals.CURVATURES`.
    batch_size: size of the batch.
    repeats: repetitions of each step.
    progress: callback with progress messages.

  Returns:
    Medians, and the compiler's bytes.

  Raises:
    ValueError: if the training images do not make a batch.
  """
  data.steps_per_epoch(len(dataset.train.labels), batch_size)
  batch = dataset.train.take(np.arange(batch_size))
  joint = joint_lib.JointGaussNewton(
      method_lib.GaussNewton(
          learned_splits.LearnedSplits(learning_lib.LearnConfig(curvature))
      ),
      timing=joint_lib.Timing(phase=repeats + 1, end=repeats + 1),
  )
  progress('compiling a plain step')
  plain = _training_step(network, batch, methods_base.FixedArchitecture())
  progress('compiling a step of learning')
  learning, learning_bytes = _learning_step(network, batch, curvature)
  progress('compiling a step of both')
  both = _training_step(network, batch, joint)
  progress(f'timing {repeats} of each')
  steps = {
      'plain': (plain.run, plain.bytes),
      'learning': (learning, learning_bytes),
      'joint': (both.run, both.bytes),
  }
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for repeat in range(repeats + 1):
    for name, (run, _) in steps.items():
      start = time.perf_counter()
      run()
      if repeat:
        seconds[name].append(time.perf_counter() - start)
  return Steps(batch_size, repeats, **{
      name: Step(statistics.median(each), min(each), steps[name][1])
      for name, each in seconds.items()
  })


def _training_step(
    network: trained.TrainedNetwork,
    batch: data.Split,
    method: methods_base.Method,
) -> timing.TimedStep:
  """Compiles a training step as in the network's run, with another method."""
  config = network.config
  computation = steps_lib.Computation(
      method=method,
      task=tasks.Classes(),
      tx=optimizers.make(config.optimizer),
      preprocessing=network.preprocessing,
      dtype=jnp.dtype(config.devices.precision),
      parallel=parallel_lib.Parallel('single', (jax.devices()[0],)),
  )
  layout = view.layout(network.architecture)
  state = state_lib.create_state(
      network.architecture,
      computation.tx,
      key=jax.random.key(config.seed),
      extra=method.extra,
      known=network.parts(),
  )
  return timing.timed_step(
      computation, layout, state, (batch.images, batch.labels)
  )


def _learning_step(
    network: trained.TrainedNetwork, batch: data.Split, curvature: str
) -> tuple[Callable[[], None], int | None]:
  """Compiles a step of Adam that continues from the last; and its bytes."""
  model = signals_lib.model_of(network.architecture)
  arguments = _arguments(
      model,
      jax.device_put(signals_lib.Trees(network.weights, network.stats)),
      data.preprocess(batch.images, network.preprocessing),
      jnp.asarray(batch.labels),
  )
  trees, *state, x, labels, key = arguments
  compiled = _compiled(model, curvature, arguments)

  def run():
    state[:] = compiled(trees, *state, x, labels, key)
    jax.block_until_ready(state)

  return run, programs.compiled_bytes(compiled)


def _compiled(model: signals_lib.Model, curvature: str, arguments: Any) -> Any:
  """Compiles a step of Adam on all splits."""
  step = functools.partial(joint_lib.adam_step, model, curvature)
  return jax.jit(step).lower(*arguments).compile()


def _arguments(
    model: signals_lib.Model,
    trees: signals_lib.Trees,
    x: jax.Array,
    labels: jax.Array,
) -> tuple[Any, ...]:
  """Returns the arguments of the first step of Adam."""
  key = jax.random.key(0)
  splits = splits_lib.start(model, trees, key)
  state = joint_lib.adam(joint_lib.LEARNING_RATE).init(splits)
  return trees, splits, state, x, labels, key
