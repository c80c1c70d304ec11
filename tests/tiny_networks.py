"""Small networks for tests: their states, growths and forward pass."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from unittest import mock
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base as methods_base
from autogrow_jax.networks import base
from autogrow_jax.run import parallel
from autogrow_jax.run import steps

WIDTHS = (4, 6, 8, 8, 8)
IMAGE = (8, 8, 3)
CLASSES = 5

# Compiling takes longer than running in tests.
FAST_COMPILE = {'xla_backend_optimization_level': 0}

# Those that take images; a network of one stage is the start of another.
FAMILIES = tuple(
    name
    for name, network in networks.FAMILIES.items()
    if network.inputs == 'images' and name != 'basic1resnet'
)

# Without those that are another one with more stages, or with fewer leaves.
DISTINCT = tuple(
    name
    for name in networks.FAMILIES
    if name not in ('basic4resnet', 'plain4net', 'vgg19')
)

# (family, options): on images, and options that change the network.
VARIANTS = tuple(
    (n, {}) for n in DISTINCT if n in FAMILIES and n != 'vgg16'
) + (
    ('basic3resnet', {'shortcut': 'A'}),
    ('vgg16', {'widths': (*WIDTHS, 7)}),
)


def _is_kernel(params):
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key == 'kernel', params
  )


def _labels(params):
  return jax.tree.map(
      lambda kernel: 'kernel' if kernel else 'rest', _is_kernel(params)
  )


OPTIMIZERS = {
    'sgd': optimizers.make(optimizers.SGD()),
    'accumulating': optimizers.make(optimizers.SGD(accumulate=2)),
    'adamw': optax.adamw(1e-3),
    'injected': optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    'masked': optax.chain(
        optax.masked(optax.trace(0.5), _is_kernel), optax.sgd(0.1, 0.9)
    ),
    'partition': optax.partition(
        {'kernel': optax.adam(1e-3), 'rest': optax.sgd(0.1, 0.9)}, _labels
    ),
}


def seed(
    family: str, depths: tuple[int, ...] | None = None, **options
) -> architecture_lib.Architecture:
  """A narrow network on 8x8 images, or text; by default 1-2-1-1-1 blocks."""
  network = networks.get(family)
  stages = len(network.widths)
  architecture = network.seed(
      depths or (1, 2, 1, 1, 1)[:stages],
      input_shape=IMAGE if network.inputs == 'images' else (1,),
      classes=CLASSES,
      options={'widths': WIDTHS[:stages], **options},
  )
  has_stem = 'stem' in dict(architecture.sizes)
  return architecture.resized({'stem': WIDTHS[0]} if has_stem else {})


def roles(
    architecture: architecture_lib.Architecture, axis: str
) -> dict[str, set[str]]:
  """Layers, 'part/layer', that read and that write an axis, by role."""
  found = {}
  for part in networks.parts(architecture):
    for path, (_, axes) in base.axes(part).items():
      for item in filter(None, axes):
        if item.name == axis and item.role != 'neither':
          found.setdefault(item.role, set()).add('/'.join(path[:2]))
  return found


def draw(part: base.Part, key: jax.Array) -> tuple[base.Tree, base.Tree]:
  """Stands in for `base.init`, which compiles every module (about 0.5 s).

  Unlike there, no leaf is left at a constant: norms scale and shift, and the
  running statistics are not those of a fresh network.
  """
  entropy = [zlib.crc32(part.name.encode()), *np.asarray(key_data(key)).flat]
  generator = np.random.default_rng(entropy)

  def leaf(path, shape):
    name, shape = path[-1].key, shape.shape
    if name == 'select':
      return np.eye(*shape, k=max(0, shape[1] - shape[0]) // 2).astype('f4')
    if name in ('scale', 'var'):
      return generator.uniform(0.5, 1.5, shape).astype('f4')
    fan_in = np.prod(shape[:-1]) if name == 'kernel' else 10
    return (generator.normal(size=shape) / np.sqrt(fan_in)).astype('f4')

  return jax.tree_util.tree_map_with_path(leaf, base.shapes(part))


def key_data(key: jax.Array) -> np.ndarray:
  """The bits of a key."""
  return np.asarray(jax.random.key_data(key))


def state(
    architecture: architecture_lib.Architecture,
    tx: optax.GradientTransformation = OPTIMIZERS['sgd'],
    number: int = 0,
    extra: state_lib.ExtraOf = state_lib.no_extra,
) -> state_lib.TrainState:
  """A canonical state with arbitrary values in all parameters."""
  key = jax.random.key(number)
  return state_lib.create_state(
      architecture,
      tx,
      key=key,
      extra=extra,
      known={
          part.name: draw(part, key) for part in networks.parts(architecture)
      },
  )


def targeted(
    architecture: architecture_lib.Architecture, growth: growth_lib.Growth
) -> growth_lib.Growth:
  """A growth that names the architecture it leads to."""
  return dataclasses.replace(
      growth, target=state_lib.target_of(growth, architecture)
  )


def widen(
    architecture: architecture_lib.Architecture, axis: str, more: int
) -> growth_lib.Growth:
  """Adds fresh units to an axis."""
  table = state_lib.axis_table(architecture)
  size = architecture.size(axis) + more
  return targeted(
      architecture, growth_lib.widen(table, axis, to=size, start='fresh')
  )


def split(
    architecture: architecture_lib.Architecture, axis: str, units: list[int]
) -> growth_lib.Growth:
  """Splits units of an axis into equal twins."""
  table = state_lib.axis_table(architecture)
  return targeted(architecture, growth_lib.split(table, axis, units, noise=0))


def prune(
    architecture: architecture_lib.Architecture, axis: str, keep: list[int]
) -> growth_lib.Growth:
  """Keeps some units of an axis."""
  table = state_lib.axis_table(architecture)
  return targeted(architecture, growth_lib.prune(table, axis, keep=keep))


def grow(
    state: state_lib.TrainState,
    growth: growth_lib.Growth,
    tx: optax.GradientTransformation = OPTIMIZERS['sgd'],
    *,
    number: int = 0,
    extra: state_lib.ExtraOf = state_lib.no_extra,
    draw: Callable[..., Any] = draw,
) -> tuple[state_lib.TrainState, state_lib.Account]:
  """`state.grow` without compiling initialisers."""
  with mock.patch.object(base, 'init', draw):
    return state_lib.grow(
        state, growth, tx, key=jax.random.key(number), extra=extra
    )


def computation(
    tx: optax.GradientTransformation, **changes: Any
) -> steps.Computation:
  """A fixed network on one device, for `steps.train_step`."""
  arguments = dict(
      method=methods_base.FixedArchitecture(),
      task=tasks.Classes(),
      tx=tx,
      preprocessing=data.Preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3),
      dtype=jnp.float32,
      parallel=parallel.make(),
  )
  return steps.Computation(**(arguments | changes))


def images(count: int = 6, number: int = 0) -> np.ndarray:
  """Network inputs."""
  generator = np.random.default_rng(number)
  return generator.normal(size=(count, *IMAGE)).astype('f4')


def forward(
    architecture: architecture_lib.Architecture,
    trees: state_lib.TrainState,
    x: np.ndarray,
    *,
    train: bool,
    gates: dict[str, float] | None = None,
) -> tuple[np.ndarray, base.Tree]:
  """Logits and statistics of the unrolled network."""
  bucket = view.layout(architecture, fuse=False).bucket
  if gates is not None:
    gates = {name: np.float32(gate) for name, gate in gates.items()}
  return jax.tree.map(
      np.asarray,
      _program(bucket)(
          trees.params['weights'],
          trees.stats['network'],
          x,
          np.bool_(train),
          gates,
      ),
  )


@functools.lru_cache(maxsize=None)
def _program(bucket):
  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def run(weights, stats, x, train, gates):
    return base.apply(bucket, weights, stats, x, train=train, gates=gates)

  return run


def leaves(tree) -> dict[str, np.ndarray]:
  """All leaves by their path, 'params/weights/stem/conv/kernel'."""
  return {'/'.join(path): leaf for path, leaf in axes_lib.by_path(tree).items()}


def described(tree) -> dict[str, str]:
  """Type and shape of all leaves by their path."""
  return {
      path: f'{leaf.dtype}{tuple(leaf.shape)}'
      for path, leaf in leaves(tree).items()
  }


def assert_same(got, want) -> None:
  """Trees are equal: paths, types, shapes and values, bit for bit."""
  chex.assert_trees_all_equal(got, want, strict=True)


def assert_close(got, want, tolerance: float) -> None:
  """Trees have the same paths and nearly the same values."""
  chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance)
