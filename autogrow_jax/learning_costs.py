"""What it costs to learn splits: seconds and bytes, beside a plain step.

Bytes of float32 that a network's sites will need, for a batch of B, with M
channels in all, d weights of a channel on either side, and P positions of h:

  adam       4 (MAPS B sum_channels P + COPIES sum_channels (d_in + d_out))
             ten maps of every pre-activation's size (x, h, T(h), both
             gradients at the reader and pulled back by v and by e, r), and
             (u, e) with gradient, both moments, and all three anew
  als        4 sum_channels d^2 for the side where that is more, without the
             layers that are solved without a matrix
  estimates  4 M^2, the Gram matrix of all candidates

The compiler knows better what a program needs at the same time; its figure is
given beside the first for a network that is there. (Of VGG-19 and a batch of
128 on a CPU, the first was 24 % too small with 16 channels in all layers and
30 % too large at full width.)
"""

from collections.abc import Callable
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import parallel as parallel_lib
from autogrow_jax import programs
from autogrow_jax import state as state_lib
from autogrow_jax import trained
from autogrow_jax import view
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.networks import taps

Architecture = architecture_lib.Architecture

MAPS = 10
COPIES = 7
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
  """

  batch_size: int
  repeats: int
  plain: Step
  learning: Step

  @property
  def ratio(self) -> float:
    """Seconds of learning in units of a plain step."""
    return self.learning.seconds / self.plain.seconds


def predict(architecture: Architecture, batch_size: int) -> Memory:
  """Memory for learning on an architecture, which need not exist."""
  sites, positions = _shapes(architecture)
  channels = sum(site.units for site in sites)
  weights = sum(site.units * (site.incoming + site.outgoing) for site in sites)
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
  return Memory(
      channels=channels,
      adam=4 * (MAPS * batch_size * positions + COPIES * weights),
      als=max(products.values()),
      estimates=4 * channels**2,
  )


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
  """Times both steps on one device, in turn, after each ran once.

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
    ValueError: the training images do not make a batch.
  """
  data.steps_per_epoch(len(dataset.train.labels), batch_size)
  batch = dataset.train.take(np.arange(batch_size))
  say('compiling a plain step')
  plain = _plain_step(network, batch)
  say('compiling a step of learning')
  learning, learning_bytes = _learning_step(network, batch, curvature)
  say(f'timing {repeats} of each')
  seconds: dict[str, list[float]] = {'plain': [], 'learning': []}
  for repeat in range(repeats + 1):
    for name, run in (('plain', plain.run), ('learning', learning)):
      start = time.perf_counter()
      run()
      if repeat:
        seconds[name].append(time.perf_counter() - start)
  steps = {
      name: Step(statistics.median(seconds[name]), min(seconds[name]), size)
      for name, size in (('plain', plain.bytes), ('learning', learning_bytes))
  }
  return Steps(batch_size, repeats, steps['plain'], steps['learning'])


def _plain_step(
    network: trained.TrainedNetwork, batch: data.Split
) -> programs.TimedStep:
  """A training step as in the network's own run."""
  config = network.config
  task = programs.Task(
      method=base.FixedArchitecture(),
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
      known=network.parts(),
  )
  return programs.timed_step(
      task, layout, state, (batch.images, batch.labels)
  )


def _learning_step(
    network: trained.TrainedNetwork, batch: data.Split, curvature: str
) -> tuple[Callable[[], None], int | None]:
  """A step of Adam on all splits that goes on from the last, and its bytes."""
  model = method_lib.model_of(network.architecture)
  config = splits_lib.LearnConfig(curvature=curvature, solver='adam')
  trees = jax.device_put(signals_lib.Trees(network.weights, network.stats))
  x = data.preprocess(batch.images, network.preprocessing)
  labels = jnp.asarray(batch.labels)
  factors = {site.axis: jnp.ones(()) for site in model.sites}
  key = jax.random.key(network.config.seed)
  splits = splits_lib.start(model, trees, key)
  now = [splits, splits_lib.adam(config).init(splits)]
  step = functools.partial(splits_lib.adam_step, model, config)
  compiled = (
      jax.jit(step).lower(trees, *now, factors, x, labels, key).compile()
  )

  def run():
    now[:] = compiled(trees, *now, factors, x, labels, key)
    jax.block_until_ready(now)

  return run, programs.compiled_bytes(compiled)


def _shapes(
    architecture: Architecture,
) -> tuple[list[sites_lib.Site], int]:
  """Sites with their sizes, and numbers in all pre-activations of an example.

  Sites are found by running the network, so a narrow one is run.
  """
  inner = [a for a, _ in architecture.sizes if a not in ('image', 'classes')]
  narrow = method_lib.model_of(architecture.resized(dict.fromkeys(inner, 2)))
  parts = networks.parts(architecture)
  state = state_lib.abstract_state(
      architecture, optimizers.make(optimizers.OptimizerConfig())
  )
  trees = signals_lib.Trees(state.params['weights'], state.stats['network'])
  outputs = jax.eval_shape(
      lambda trees, x: taps.run(
          taps.chain_of(parts), trees.weights, trees.stats, x
      ).outputs,
      trees,
      jax.ShapeDtypeStruct((1, *parts[0].input_shape), jnp.float32),
  )
  sites = []
  for site in narrow.sites:
    units = architecture.size(site.axis)
    per_unit = lambda ends, units=units: sum(
        trees.kernel(end.layer).size // units for end in ends
    )
    sites.append(
        dataclasses.replace(
            site,
            units=units,
            incoming=per_unit(site.writers),
            outgoing=per_unit(site.readers),
        )
    )
  tops = {writer.top for site in sites for writer in site.writers}
  return sites, sum(outputs[top].size for top in tops)
