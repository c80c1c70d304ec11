"""What it costs to learn splits: seconds and bytes, beside a plain step.

Bytes for the sites of a network with M channels in all and d weights of a
channel on either side:

  adam       of a step on all splits, as the compiler says
  als        4 sum_channels d^2 for the side where that is more, without the
             layers that are solved without a matrix
  estimates  4 M^2, the Gram matrix of all candidates

The compiler's figure for the first is given beside it.
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
from autogrow_jax.run import parallel as parallel_lib
from autogrow_jax.run import programs
from autogrow_jax import state as state_lib
from autogrow_jax.run import trained
from autogrow_jax import view
from autogrow_jax.methods import base as methods_base
from autogrow_jax.methods.gauss_newton import joint as joint_lib
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture

FULL_VGG = 'vgg19'


@dataclasses.dataclass(frozen=True)
class Memory:
  """Predicted bytes, see the module.

  Attributes:
    channels: that can be split.
    adam: of a step that learns all splits.
    als: of the products of one block.
    estimates: of the Gram matrix.
  """

  channels: int
  adam: int
  als: int
  estimates: int


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step.

  Attributes:
    seconds: median.
    fastest: seconds.
    bytes: see `programs.compiled_bytes`.
  """

  seconds: float
  fastest: float
  bytes: int | None


@dataclasses.dataclass(frozen=True)
class Steps:
  """Steps on one batch.

  Attributes:
    batch_size: of it.
    repeats: of each step, in turn.
    plain: a training step as in a run, augmentation included.
    learning: a step of Adam on all splits, for frozen weights.
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


def predict(
    architecture: Architecture, batch_size: int, curvature: str
) -> Memory:
  """Memory for learning on an architecture, which need not exist."""
  sites = method_lib.model_of(architecture).sites
  products = {
      block: sum(
          4 * site.units * size(site) ** 2
          for site in sites
          if not splits_lib.is_wide(site, block)
      )
      for block, size in (
          ('u', lambda site: site.incoming), ('e', lambda site: site.outgoing)
      )
  }
  channels = sum(site.units for site in sites)
  return Memory(
      channels=channels,
      adam=compiled_bytes(architecture, batch_size, curvature) or 0,
      als=max(products.values()),
      estimates=4 * channels**2,
  )


def compiled_bytes(
    architecture: Architecture, batch_size: int, curvature: str
) -> int | None:
  """What the compiler says of a step that learns all splits."""
  step = jax.jit(_step(architecture, curvature))
  compiled = step.lower(*_shapes(architecture, batch_size)).compile()
  return programs.compiled_bytes(compiled)


def full_vgg() -> Architecture:
  """VGG-19 at its full width, on 32x32 colour images of 100 classes."""
  network = networks.get(FULL_VGG)
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
    say: Callable[[str], None],
) -> Steps:
  """Times all steps on one device, in turn, after each ran once.

  Args:
    network: the network.
    dataset: on which it was trained.
    curvature: of the model, see `signals.CURVATURES`.
    batch_size: of the batch.
    repeats: of each step.
    say: hears of progress.

  Returns:
    Medians, and the compiler's bytes.

  Raises:
    ValueError: the training images do not make a batch, or there is no joint
      learning with this curvature.
  """
  data.steps_per_epoch(len(dataset.train.labels), batch_size)
  batch = dataset.train.take(np.arange(batch_size))
  joint = method_lib.GaussNewton(
      learning='joint',
      timing=joint_lib.Timing(phase=repeats + 1, end=repeats + 1),
      learn=splits_lib.LearnConfig(curvature=curvature, solver='adam'),
  )
  say('compiling a plain step')
  plain = _training_step(network, batch, methods_base.FixedArchitecture())
  say('compiling a step of learning')
  learning, learning_bytes = _learning_step(network, batch, curvature)
  say('compiling a step of both')
  both = _training_step(network, batch, joint)
  say(f'timing {repeats} of each')
  runs = {'plain': plain.run, 'learning': learning, 'joint': both.run}
  sizes = {
      'plain': plain.bytes, 'learning': learning_bytes, 'joint': both.bytes
  }
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for repeat in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if repeat:
        seconds[name].append(time.perf_counter() - start)
  steps = {
      name: Step(statistics.median(each), min(each), sizes[name])
      for name, each in seconds.items()
  }
  return Steps(batch_size, repeats, **steps)


def _training_step(
    network: trained.TrainedNetwork,
    batch: data.Split,
    method: methods_base.Method,
) -> programs.TimedStep:
  """A training step as in the network's own run, but for the method."""
  config = network.config
  task = programs.Task(
      method=method,
      tx=optimizers.make(config.optimizer),
      preprocessing=network.preprocessing,
      dtype=jnp.dtype(config.devices.precision),
      parallel=parallel_lib.Parallel('single', (jax.devices()[0],)),
  )
  layout = view.layout(network.architecture)
  state = state_lib.create_state(
      network.architecture,
      task.tx,
      key=jax.random.key(config.seed),
      extra=method.extra,
      known=network.parts(),
  )
  return programs.timed_step(
      task, layout, state, (batch.images, batch.labels)
  )


def _learning_step(
    network: trained.TrainedNetwork, batch: data.Split, curvature: str
) -> tuple[Callable[[], None], int | None]:
  """A step of Adam on all splits that goes on from the last, and its bytes."""
  arguments = _arguments(
      method_lib.model_of(network.architecture),
      jax.device_put(signals_lib.Trees(network.weights, network.stats)),
      data.preprocess(batch.images, network.preprocessing),
      jnp.asarray(batch.labels),
  )
  trees, *now, factors, x, labels, key = arguments
  step = _step(network.architecture, curvature)
  compiled = jax.jit(step).lower(*arguments).compile()

  def run():
    now[:] = compiled(trees, *now, factors, x, labels, key)
    jax.block_until_ready(now)

  return run, programs.compiled_bytes(compiled)


def _step(architecture: Architecture, curvature: str) -> Callable[..., Any]:
  """A step of Adam on all splits."""
  return functools.partial(
      splits_lib.adam_step,
      method_lib.model_of(architecture),
      splits_lib.LearnConfig(curvature=curvature, solver='adam'),
  )


def _arguments(
    model: signals_lib.Model,
    trees: signals_lib.Trees,
    x: jax.Array,
    labels: jax.Array,
) -> tuple[Any, ...]:
  """What `_step` takes at the start."""
  key = jax.random.key(0)
  splits = splits_lib.start(model, trees, key)
  state = splits_lib.adam(splits_lib.LearnConfig()).init(splits)
  factors = {site.axis: jnp.ones(()) for site in model.sites}
  return trees, splits, state, factors, x, labels, key


def _shapes(architecture: Architecture, batch_size: int) -> tuple[Any, ...]:
  """Those of `_arguments`; nothing is computed."""
  parts = networks.parts(architecture)
  known = {part.name: base.shapes(part) for part in parts}
  weights, stats = (
      {name: own[which] for name, own in known.items()} for which in (0, 1)
  )
  return jax.eval_shape(
      functools.partial(_arguments, method_lib.model_of(architecture)),
      signals_lib.Trees(weights, stats),
      jax.ShapeDtypeStruct((batch_size, *parts[0].input_shape), np.float32),
      jax.ShapeDtypeStruct((batch_size,), np.int32),
  )
