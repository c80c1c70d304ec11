"""Learning splits while the weights are still trained.

Beside each step on the weights, one step of Adam on all splits, from the
signals of the same batch in the network before it. What is learned lives beside
the network's statistics, in trees that mirror its weights, and starts again in
every phase.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import view
from autogrow_jax.methods import base as methods_base
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.networks import base
from autogrow_jax.networks import taps

Memory = base.Tree
# Whose kernels u and e mirror.
_ENDS = {'u': 'writers', 'e': 'readers'}


@dataclasses.dataclass(frozen=True)
class Timing:
  """When splits are learned.

  Attributes:
    phase: training steps from one growth step to the next.
    begin: steps of each phase before learning begins.
    end: steps of the run after which nothing grows any more.
  """

  phase: int = 0
  begin: int = 0
  end: int = 0

  def __post_init__(self):
    if not 0 <= self.begin <= self.phase:
      raise ValueError(
          f'Learning begins within a phase of {self.phase} steps, not after '
          f'{self.begin}.'
      )

  @property
  def steps(self) -> int:
    """Of learning in each phase."""
    return self.phase - self.begin


def memory(
    architecture: architecture_lib.Architecture,
    config: splits_lib.LearnConfig,
) -> Memory:
  """Splits at zero, Adam's moments, and the number of steps of the run."""
  shapes = {
      part.name: base.shapes(part)[0] for part in networks.parts(architecture)
  }
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  model = _model_of(architecture)
  found = _mirrored(
      {
          site.axis: splits_lib.Split(
              tuple(_kernel(zeros, end) for end in site.writers),
              tuple(_kernel(zeros, end) for end in site.readers),
          )
          for site in model.sites
      },
      model,
  )
  return {
      'splits': found,
      'adam': splits_lib.adam(config).init(found),
      'steps': jnp.int32(0),
  }


def step(
    now: Memory,
    network: methods_base.Network,
    weights: base.Tree,
    stats: base.Tree,
    labels: jax.Array,
    key: jax.Array,
    config: splits_lib.LearnConfig,
    timing: Timing,
) -> Memory:
  """One step of Adam on all splits; runs inside a training step.

  Args:
    now: what has been learned.
    network: the network of the training step.
    weights: packed; nothing is differentiated with respect to them.
    stats: of the network, packed.
    labels: (batch,) int32.
    key: of sampled labels, and of the splits' start.
    config: of learning; its solver is of no influence.
    timing: when to learn.

  Returns:
    What has been learned then.
  """
  unpack = lambda tree: view.unpack(tree, network.layout)
  trees = signals_lib.Trees(
      *jax.lax.stop_gradient((unpack(weights), unpack(stats)))
  )
  x = network.x.astype(jnp.float32)
  model = _model_of(network.layout.architecture)
  factors = {site.axis: jnp.ones(()) for site in model.sites}
  start_key, label_key = jax.random.split(key)

  position = now['steps'] % timing.phase

  def learn(now):
    begun = _mirrored(splits_lib.start(model, trees, start_key), model)
    is_first = position == timing.begin
    fresh = begun, splits_lib.adam(config).init(begun)
    found, adam = jax.tree.map(
        lambda new, old: jnp.where(is_first, new, old),
        fresh,
        (now['splits'], now['adam']),
    )
    _, by_axis = signals_lib.signals(
        model, trees, x, labels, label_key, curvature=config.curvature
    )
    gradient = jax.grad(
        lambda found: splits_lib.modelled_change(
            model, trees, by_axis, _by_axis(found, model), factors
        )
    )(found)
    updates, adam = splits_lib.adam(config).update(gradient, adam)
    return optax.apply_updates(found, updates), adam

  splits, adam = jax.lax.cond(
      (position >= timing.begin) & (now['steps'] < timing.end),
      learn,
      lambda now: (now['splits'], now['adam']),
      now,
  )
  return {'splits': splits, 'adam': adam, 'steps': now['steps'] + 1}


def learned(
    now: Memory, architecture: architecture_lib.Architecture
) -> splits_lib.Learned:
  """What has been learned, by axis, as `splits.learn` returns it."""
  model = _model_of(architecture)
  return splits_lib.checked(model, _by_axis(now['splits'], model))


def _model_of(
    architecture: architecture_lib.Architecture,
) -> signals_lib.Model:
  chain = taps.chain_of(networks.parts(architecture))
  with jax.ensure_compile_time_eval():  # Also while a step is being traced.
    survey = sites_lib.survey(architecture)
  return signals_lib.model_of(survey, chain)


def _mirrored(splits: splits_lib.Splits, model: signals_lib.Model) -> base.Tree:
  """Splits by axis, then with the paths of the weights.

  By these paths growth carries them. An axis has writers or readers in some
  parts only, or packing would take the tree for one of the network's.
  """
  return {
      name: {
          site.axis: {
              'weights': _nested(
                  getattr(site, ends), getattr(splits[site.axis], name)
              )
          }
          for site in model.sites
      }
      for name, ends in _ENDS.items()
  }


def _by_axis(
    mirrored: base.Tree, model: signals_lib.Model
) -> splits_lib.Splits:
  """The inverse of `_mirrored`."""
  return {
      site.axis: splits_lib.Split(
          **{
              name: tuple(
                  _kernel(mirrored[name][site.axis]['weights'], end)
                  for end in getattr(site, ends)
              )
              for name, ends in _ENDS.items()
          }
      )
      for site in model.sites
  }


def _nested(
    ends: Sequence[sites_lib.End], kernels: Sequence[jax.Array]
) -> base.Tree:
  """`{part: {layer: {'kernel': ...}}}`."""
  tree: base.Tree = {}
  for end, kernel in zip(ends, kernels, strict=True):
    inner = tree
    for key in end.layer.path:
      inner = inner.setdefault(key, {})
    inner['kernel'] = kernel
  return tree


def _kernel(tree: base.Tree, end: sites_lib.End) -> jax.Array:
  return signals_lib.at(tree, end.layer.path)['kernel']
