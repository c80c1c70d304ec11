"""Small networks under masks, for tests of `Sparsify`."""

import dataclasses
import functools
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.methods import base as methods_base
from autogrow_jax.methods.sparsify import compact as compact_lib
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import method as sparsify
from autogrow_jax.networks import base
from autogrow_jax.networks import mlp
from autogrow_jax.networks import mobilenet
from autogrow_jax.networks import plain
from autogrow_jax.networks import residual
from autogrow_jax.networks import vgg
from autogrow_jax.networks import wide
import tiny_networks

# All kinds of blocks, in two stages: compiling takes most of the time.
_WIDTHS = (4, 6)
_OWN = (
    plain.PlainNet('tiny_masks:PLAIN', 'Plain', _WIDTHS, (1, 2)),
    residual.ResNet('tiny_masks:BASIC', 'Basic', _WIDTHS, (1, 2)),
    residual.ResNet(
        'tiny_masks:BOTTLENECK',
        'Bottleneck',
        _WIDTHS,
        (1, 2),
        residual.BottleneckBlock,
        ('mid1', 'mid2'),
        expansion=2,
    ),
    wide.WideResNet('tiny_masks:WIDE', 'Wide', _WIDTHS, stem=4),
    mobilenet.MobileNet('tiny_masks:MOBILE', 'Mobile', (8, 6)),
    vgg.VGG('tiny_masks:VGG', 'VGG', _WIDTHS, bias=True),
    mlp.Perceptron('tiny_masks:MLP', 'MLP', _WIDTHS),
)
PLAIN, BASIC, BOTTLENECK, WIDE, MOBILE, VGG, MLP = _OWN

# (network, options). Append those of new families.
VARIANTS = (
    (PLAIN, {}),
    (BASIC, {'shortcut': 'A'}),
    (BOTTLENECK, {}),
    (WIDE, {}),
    (MOBILE, {}),
    (VGG, {'widths': (*_WIDTHS, 7)}),
    (MLP, {}),
)
# Those whose layers have no shortcut: their soft gates cannot be folded.
CHAINS = (PLAIN, MOBILE, VGG, MLP)
# Where gradients are compared, too, and not logits alone.
DERIVED = (PLAIN, BASIC, MOBILE)
OFF, ON = 's1b1', 's1b2'  # A layer that is not there, and one behind it.
FAR = 40.0  # sigmoid(FAR) is 1.

METHOD = sparsify.Sparsify(
    grow='both', run=sparsify.Run(queries=10, steps=200)
)
TX = optimizers.make(
    optimizers.SGD(), aux=METHOD.mask, top_rate=0.1
)
LABELS = np.array([3, 1, 4, 1, 0, 2])


class Outcome(NamedTuple):
  """What one batch says; trees are canonical, but zero for what is off.

  Attributes:
    loss: in nats.
    grads: as `params`.
    stats: new ones.
    train: logits in training mode.
    raw: {'params': gradients, 'stats'} as they were computed.
  """

  loss: float
  grads: Any
  stats: Any
  train: np.ndarray
  raw: Any


def same(got, want, tolerance=1e-5):
  """Asserts that arrays are equal to a relative and absolute tolerance."""
  np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def seed(network, depth=3, **options):
  """A narrow network, deep in its second stage."""
  return network.seed(
      (1, depth),
      input_shape=tiny_networks.IMAGE,
      classes=tiny_networks.CLASSES,
      options=options,
  )


def full_size(family, depths=None, **options):
  """A network of the library, for 32 pixels and ten classes."""
  network = networks.get(family)
  return network.seed(
      depths or network.seed_depths,
      input_shape=(32, 32, 3),
      classes=10,
      options=options,
  )


def resnet20():
  return full_size('basic3resnet', (3, 3, 3), shortcut='A')


def propose(
    method, architecture, state, *, decision=policies.grow(), is_last=False
):
  """What a method proposes, by default where it may grow."""
  return method.propose(
      decision,
      methods_base.Situation(
          architecture, state, key=jax.random.key(0), task=tasks.Classes(),
          batches=None, batches_per_epoch=1, train_accuracy=0.0,
          weight_decay=0.0, is_last=is_last,
      ),
  )


def state(architecture, method=METHOD, number=0):
  """A canonical state whose optimizer moments are not zero either."""
  fresh = tiny_networks.state(
      architecture, TX, number=number, extra=method.extra
  )
  generator = np.random.default_rng(number)

  def moved(leaf):
    if leaf.dtype != np.float32 or not leaf.ndim:
      return leaf
    return generator.normal(size=leaf.shape).astype('f4')

  return fresh.replace(opt_state=jax.tree.map(moved, fresh.opt_state))


def masked(state, *, s=None, **memory):
  """A state with other mask variables and other leaves of the method."""
  params, stats = state.params, state.stats
  return state.replace(
      params={**params, 'aux': params['aux'] if s is None else s},
      stats={**stats, 'method': {**stats['method'], **memory}},
  )


def draw(state, *, number=0, off=(OFF,)):
  """A random sample, but for layers: (q, s), s soft and q not its sign."""
  generator = np.random.default_rng(number)
  s = state.params['aux']
  normal = lambda leaf: generator.normal(size=leaf.shape).astype('f4')
  s = jax.tree.map(normal, s)
  channels = {
      name: generator.random(leaf.shape) < 0.6
      for name, leaf in s['channels'].items()
  }
  layers = {block: np.array(block not in off) for block in s['layers']}
  return masks.guarded({'channels': channels, 'layers': layers}, s), s


def hard(q, far=FAR):
  """Mask variables far from 0, as a sample says."""
  return jax.tree.map(lambda q: np.where(q, far, -far).astype('f4'), q)


def sampled(architecture, *, method=METHOD, number=0, off=(OFF,), soft=True):
  """A state under a random sample."""
  fresh = state(architecture, method)
  q, s = draw(fresh, number=number, off=off)
  grown = jax.tree.map(np.logical_or, fresh.stats['method']['grown'], q)
  return masked(fresh, q=q, grown=grown, s=s if soft else hard(q))


def outcome(method, architecture, state, *, compact, dtype='f4'):
  """Loss, gradients, statistics and logits on one batch.

  Args:
    method: of the masks.
    architecture: of the canonical state.
    state: canonical.
    compact: compute what is there alone.
    dtype: of the images.

  Returns:
    The outcome.
  """
  trees, layout, active = _taken(method, architecture, state, compact)
  packed = view.pack(trees, layout)
  x = tiny_networks.images(len(LABELS)).astype(dtype)
  loss, grads, stats, train = jax.tree.map(
      np.asarray,
      _step(method, layout)(packed['params'], packed['stats'], x, LABELS),
  )
  computed = view.unpack({'params': grads, 'stats': stats}, layout)
  result = computed
  if active is not None:
    zeros = jax.tree.map(np.zeros_like, _trees(state))
    result = active.put(computed, zeros)
  return Outcome(loss, result['params'], result['stats'], train, computed)


def logits(method, architecture, state, *, compact):
  """Logits of one batch: those of training, those of evaluation."""
  trees, layout, _ = _taken(method, architecture, state, compact)
  packed = view.pack(trees, layout)
  x = tiny_networks.images(len(LABELS))
  return [
      np.asarray(
          _forward(method, layout)(
              packed['params'], packed['stats'], x, np.bool_(train)
          )
      )
      for train in (True, False)
  ]


def _trees(state):
  return {'params': state.params, 'stats': state.stats}


def _taken(method, architecture, state, compact):
  """Widths are rounded up to multiples of 2, so that some are padded."""
  active = method.execution.active(architecture, state.stats['method'])
  if active is None:
    return _trees(state), view.layout(architecture), None
  active = dataclasses.replace(active, compact=compact)
  with mock.patch.object(compact_lib, 'QUANTUM', 2):
    layout = view.layout(architecture, computed=active.computed)
  return active.take(_trees(state)), layout, active


@functools.lru_cache(maxsize=None)
def _step(method, layout):
  @functools.partial(jax.jit, compiler_options=tiny_networks.FAST_COMPILE)
  def run(params, stats, x, labels):
    network = methods_base.Network(method.execution, layout, x)
    objective = lambda params: method.objective(
        network, params, stats, labels, jax.random.key(0)
    )
    (loss, (new, logits)), grads = jax.value_and_grad(
        objective, has_aux=True
    )(params)
    return loss, grads, new, logits

  return run


@functools.lru_cache(maxsize=None)
def _forward(method, layout):
  @functools.partial(jax.jit, compiler_options=tiny_networks.FAST_COMPILE)
  def run(params, stats, x, train):
    gated = method.execution.gated(layout, params, stats)
    logits, _ = base.apply(
        layout.bucket, gated.weights, gated.stats, x, train=train,
        gates=gated.gates,
    )
    return logits

  return run


def grow(state, change, method=METHOD, tx=TX):
  """`state.grow` without compiling initialisers; and the growth's report."""
  grown, _ = tiny_networks.grow(state, change, tx, extra=method.extra)
  return grown, change.report


def attached(architecture, method, state):
  """Per weight, whether its units and its block are there: a tree of bools."""
  ones = jax.tree.map(
      lambda leaf: np.ones(leaf.shape, bool), state.params
  )
  active = method.execution.active(architecture, state.stats['method'])
  active = dataclasses.replace(active, compact=False)
  return active.put(ones, jax.tree.map(np.zeros_like, ones))['weights']
