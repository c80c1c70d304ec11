"""Joint learning: splits are learned while the weights are trained.

Beside each step on the weights, Adam takes one step on all splits, from the
signals of the same batch in the network before it. The splits live beside the
network's statistics, in trees that mirror its weights, and start again in every
phase. Updates are no batch means, so every device needs the whole batch: pmap
with several devices must not be used.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import learned_splits
from autogrow_jax.methods.gauss_newton import learning as learning_lib
from autogrow_jax.methods.gauss_newton import linalg
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.networks import base as networks_base

Architecture = architecture_lib.Architecture
Model, Splits = signals_lib.Model, splits_lib.Splits

LEARNING_RATE = 3e-3
EPOCHS = 4  # Default epochs of learning at the end of each phase.
_DECAYS = (0.9, 0.99)
# The layers whose kernels u and e mirror.
_ENDS = {'u': 'writers', 'e': 'readers'}


@dataclasses.dataclass(frozen=True)
class Timing:
  """The training steps in which splits are learned.

  Attributes:
    phase: training steps from one growth step to the next.
    begin: steps of each phase before learning begins.
    end: steps of the run after which nothing grows.
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
    """Steps of learning in each phase."""
    return self.phase - self.begin


@dataclasses.dataclass(frozen=True)
class JointGaussNewton(base.Method):
  """`GaussNewton` with splits that Adam learns beside the weights.

  Attributes:
    settings: settings of growth steps by learned splits; of the settings of
      learning, the curvature and the trust have an effect.
    learning_rate: learning rate of Adam.
    timing: the steps in which splits are learned.
  """

  settings: method_lib.GaussNewton = method_lib.GaussNewton()
  learning_rate: float = LEARNING_RATE
  timing: Timing = Timing()

  def __post_init__(self):
    if not isinstance(self.settings.ranking, learned_splits.LearnedSplits):
      raise ValueError(
          f'Joint learning ranks learned splits, not {self.settings.ranking}.'
      )

  def extra(self, architecture: Architecture) -> base.Extra:
    if not self.timing.phase:
      raise ValueError(
          'Joint learning has to know its timing: the steps of a phase.'
      )
    return base.Extra({}, _memory(architecture, self.learning_rate))

  def objective(
      self,
      network: base.Network,
      params: base.Tree,
      stats: base.Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> tuple[jax.Array, tuple[base.Tree, jax.Array]]:
    loss, (after, logits) = super().objective(
        network, params, stats, labels, key
    )
    after['method'] = self.learn(
        stats['method'],
        network,
        params['weights'],
        stats['network'],
        labels,
        key,
    )
    return loss, (after, logits)

  def report(
      self, architecture: Architecture, aux: base.Tree, memory: base.Tree
  ) -> dict[str, Any]:
    return self.settings.report(architecture, aux, memory)

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth_lib.Growth | base.Skip | None:
    """Proposes a step from what was learned in the phase."""
    if decision.action != 'grow':
      return None
    memory = situation.state.stats['method']
    stats = {**situation.state.stats, 'method': {}}
    change = self.settings.propose_by(
        lambda snapshot: self._step(snapshot, memory),
        dataclasses.replace(
            situation, state=situation.state.replace(stats=stats)
        ),
    )
    if isinstance(change, base.Skip):
      if not change.is_final:
        return change
      # Learning goes on by its timing, and is charged by phase.
      _, labels = next(situation.batches())
      images = self._images(len(labels))
      return dataclasses.replace(change, examples=images, is_final=False)
    # All but the step count starts again.
    own = state_lib.to_host(self.extra(change.target).other)
    own['steps'] = memory['steps']
    return dataclasses.replace(
        change, values={**change.values, **state_lib.values(method=own)}
    )

  def learn(
      self,
      memory: base.Tree,
      network: base.Network,
      weights: base.Tree,
      stats: base.Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> base.Tree:
    """Takes one step of Adam on all splits. Runs inside a training step.

    Args:
      memory: splits, moments and step count.
      network: the network of the training step.
      weights: packed weights; nothing is differentiated by them.
      stats: packed statistics of the network.
      labels: (batch,) int32.
      key: key of sampled labels, and of the splits' start.

    Returns:
      The next splits, moments and step count.
    """
    unpack = lambda tree: view.unpack(tree, network.layout)
    trees = signals_lib.Trees(
        *jax.lax.stop_gradient((unpack(weights), unpack(stats)))
    )
    x = network.x.astype(jnp.float32)
    model = _model_of(network.layout.architecture)
    tx = adam(self.learning_rate)
    start_key, label_key = jax.random.split(key)
    position = memory['steps'] % self.timing.phase

    def learn(memory):
      start = _mirrored(splits_lib.start(model, trees, start_key), model)
      is_first = position == self.timing.begin
      splits, moments = jax.tree.map(
          lambda new, old: jnp.where(is_first, new, old),
          (start, tx.init(start)),
          (memory['splits'], memory['adam']),
      )
      _, by_axis = signals_lib.signals(
          model, trees, x, labels, label_key,
          curvature=self.settings.ranking.learn.curvature,
      )
      gradient = jax.grad(
          lambda splits: modelled_change(
              model, trees, by_axis, _by_axis(splits, model)
          )
      )(splits)
      updates, moments = tx.update(gradient, moments)
      return optax.apply_updates(splits, updates), moments

    splits, moments = jax.lax.cond(
        (position >= self.timing.begin) & (memory['steps'] < self.timing.end),
        learn,
        lambda memory: (memory['splits'], memory['adam']),
        memory,
    )
    return {'splits': splits, 'adam': moments, 'steps': memory['steps'] + 1}

  def _step(
      self, snapshot: steps.Snapshot, memory: base.Tree
  ) -> steps.Step:
    """Selects from learned splits."""
    settings = self.settings
    step = settings.ranking.step_from(
        learned(memory, snapshot.architecture),
        snapshot,
        settings.limits,
        settings.samples,
    )
    return step.charged(self._images(len(snapshot.learning[0][1])))

  def _images(self, batch_size: int) -> int:
    """Returns the cost of learning in a phase, images of training steps."""
    return (charges.STEPS_PER_PASS - 1) * self.timing.steps * batch_size


def adam(learning_rate: float) -> optax.GradientTransformation:
  """Returns the optimizer of splits."""
  return optax.adam(learning_rate, *_DECAYS)


def modelled_change(
    model: Model,
    trees: signals_lib.Trees,
    by_axis: Mapping[str, signals_lib.Signal],
    splits: Splits,
) -> jax.Array:
  """Sums mean(s) + mean(c^2) / 2, each unit's own model, over all units.

  Args:
    model: the network.
    trees: arrays of the network.
    by_axis: signals of a batch.
    splits: splits of all sites.

  Returns:
    Nats.
  """
  total = 0.0
  for site in model.sites:
    s, c = splits_lib.projections(
        site, trees, by_axis[site.axis], splits[site.axis]
    )
    total += jnp.sum(s) + jnp.sum(c**2) / 2
    examples = len(s)
  return total / examples


@functools.partial(jax.jit, static_argnums=(0, 1))
def adam_step(
    model: Model,
    curvature: str,
    trees: signals_lib.Trees,
    splits: Splits,
    state: optax.OptState,
    x: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[Splits, optax.OptState]:
  """Takes one step of Adam on all splits for frozen weights.

  Args:
    model: the network.
    curvature: one of `signals.CURVATURES`.
    trees: arrays of the network.
    splits: splits of all sites.
    state: state of `adam`, with the default learning rate.
    x: (batch, height, width, channel), preprocessed.
    labels: (batch,).
    key: key of sampled labels.

  Returns:
    The next splits and state.
  """
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature=curvature
  )
  gradient = jax.grad(
      lambda splits: modelled_change(model, trees, by_axis, splits)
  )(splits)
  updates, state = adam(LEARNING_RATE).update(gradient, state)
  return optax.apply_updates(splits, updates), state


def learned(
    memory: base.Tree, architecture: Architecture
) -> learning_lib.Learned:
  """Returns the learned splits by axis, with codes of failed ones."""
  model = _model_of(architecture)
  splits, codes = _by_axis(memory['splits'], model), {}
  for site in model.sites:
    rows = np.asarray(splits_lib.incoming(splits[site.axis].u))
    # Without a gradient Adam stays at its start.
    code = np.where(rows.any(-1), linalg.Code.OK, linalg.Code.RANK_ZERO)
    finite = np.isfinite(rows).all(-1)
    codes[site.axis] = np.where(finite, code, linalg.Code.NOT_FINITE)
  return learning_lib.Learned(splits, codes)


def _memory(architecture: Architecture, learning_rate: float) -> base.Tree:
  """Returns splits at zero, Adam's moments, and a step count."""
  shapes = {
      part.name: networks_base.shapes(part)[0]
      for part in networks.parts(architecture)
  }
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  model = _model_of(architecture)
  kernels = lambda ends: tuple(_kernel(zeros, end) for end in ends)
  splits = _mirrored(
      {
          site.axis: splits_lib.Split(
              kernels(site.writers), kernels(site.readers)
          )
          for site in model.sites
      },
      model,
  )
  return {
      'splits': splits,
      'adam': adam(learning_rate).init(splits),
      'steps': jnp.int32(0),
  }


def _model_of(architecture: Architecture) -> Model:
  with jax.ensure_compile_time_eval():  # Also while a step is being traced.
    return signals_lib.model_of(architecture)


def _mirrored(splits: Splits, model: Model) -> base.Tree:
  """Arranges splits by axis, then by the paths of the weights.

  Growth carries them by these paths. An axis has writers or readers in some
  parts only; otherwise packing would take the tree for one of the network's.
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


def _by_axis(mirrored: base.Tree, model: Model) -> Splits:
  """Inverts `_mirrored`."""
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
  """Returns `{part: {layer: {'kernel': ...}}}`."""
  tree: base.Tree = {}
  for end, kernel in zip(ends, kernels, strict=True):
    inner = tree
    for key in end.layer.path:
      inner = inner.setdefault(key, {})
    inner['kernel'] = kernel
  return tree


def _kernel(tree: base.Tree, end: sites_lib.End) -> jax.Array:
  return signals_lib.at(tree, end.layer.path)['kernel']
