"""Joint learning: splits are learned while the weights are trained.

Beside each step on the weights, Adam takes one step on all splits, from the
signals of the same batch in the network before it. The splits live beside the
network's statistics, in trees that mirror its weights, and start again in every
phase. Updates are no batch means, so every device needs the whole batch: pmap
with several devices must not be used.
"""

from collections.abc import Sequence
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
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import ranking
from autogrow_jax.methods.gauss_newton import selection
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.networks import base as networks_base
from autogrow_jax.run import config
from autogrow_jax.run import parallel

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
    if not isinstance(self.settings.ranking, ranking.LearnedSplits):
      raise ValueError(
          f'Joint learning ranks learned splits, not {self.settings.ranking}.'
      )

  @property
  def execution(self) -> padding.Execution:
    return self.settings.execution

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
        lambda snapshot, limits: self._step(snapshot, limits, memory),
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
    batch = network.x.astype(jnp.float32), labels
    model = _model_of(network.layout.canonical)
    tx = _adam(self.learning_rate)
    start_key, label_key = jax.random.split(key)
    position = memory['steps'] % self.timing.phase

    def learn(memory):
      start = _mirrored(_start(model, trees, start_key), model)
      is_first = position == self.timing.begin
      splits, moments = jax.tree.map(
          lambda new, old: jnp.where(is_first, new, old),
          (start, tx.init(start)),
          (memory['splits'], memory['adam']),
      )
      _, found = signals_lib.signals(
          model, trees, batch, jax.random.bits(label_key),
          curvature=self.settings.ranking.learn.curvature,
      )
      gradient = jax.grad(
          lambda splits: modelled_change(
              model, trees, found, _by_axis(splits, model)
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
      self,
      snapshot: steps.Snapshot,
      limits: selection.Limits,
      memory: base.Tree,
  ) -> steps.Step:
    """Selects from learned splits."""
    model, trees = snapshot.model, snapshot.trees
    splits = padding.pad(
        memory['splits'], padding.padded(snapshot.architecture)
    )
    learned = splits_lib.Learned(
        _by_axis(splits, model), _moments(model, trees, snapshot.learning)
    )
    step = self.settings.ranking.step_from(learned, snapshot, limits)
    images = self._images(len(snapshot.learning[0][1]))
    return dataclasses.replace(step, images=step.images + images)

  def _images(self, batch_size: int) -> int:
    """Returns the cost of learning in a phase, images of training steps."""
    return (steps.STEPS_PER_PASS - 1) * self.timing.steps * batch_size


def _adam(learning_rate: float) -> optax.GradientTransformation:
  return optax.adam(learning_rate, *_DECAYS)


def modelled_change(
    model: Model,
    trees: signals_lib.Trees,
    signals: Sequence[signals_lib.Signal],
    splits: Splits,
) -> jax.Array:
  """Sums mean(s) + mean(c^2) / 2, each unit's own model, over all units.

  Args:
    model: the network.
    trees: arrays of the network.
    signals: signals of a batch, of each site.
    splits: splits of all sites.

  Returns:
    Nats.
  """
  total, taken = 0.0, splits_lib.no_prunes(model, trees)
  for site, signal in zip(model.sites, signals, strict=True):
    s, c = splits_lib.project(
        site.form, trees.local(site), signal, splits[site.axis],
        taken[site.axis],
    )
    total += (jnp.sum(s) + jnp.sum(c**2) / 2) / len(s)
  return total


def _start(model: Model, trees: signals_lib.Trees, key: jax.Array) -> Splits:
  """Draws `splits.start` inside a training step."""
  splits = {}
  for site in model.sites:
    local, form = trees.local(site), site.form
    e = []
    for kernel in local.kernels(form.readers):
      key, draw = jax.random.split(key)
      signs = jax.random.rademacher(draw, kernel.shape[-2:], kernel.dtype)
      shape = (1,) * (kernel.ndim - 2) + signs.shape
      e.append(kernel / 2 * signs.reshape(shape))
    u = tuple(map(jnp.zeros_like, local.kernels(form.writers)))
    splits[site.axis] = splits_lib.Split(u, tuple(e))
  return splits


def _moments(
    model: Model,
    trees: signals_lib.Trees,
    batches: Sequence[signals_lib.Batch],
) -> dict[str, np.ndarray]:
  """Returns `splits.Learned.moments`."""
  sums = signals_lib.add(
      [
          _moments_of(site.form, trees.local(site), signal)
          for site, signal in zip(model.sites, found, strict=True)
      ]
      for _, found in (
          signals_lib.signals(
              model, trees, batch, np.uint32(0), curvature='rank1'
          )
          for batch in batches
      )
  )
  count = signals_lib.count(batches)
  return {
      site.axis: one / count
      for site, one in zip(model.sites, sums, strict=True)
  }


@functools.partial(jax.jit, static_argnums=0)
def _moments_of(form, local, signal):
  return splits_lib.second_moments(
      form.read(local.weights, local.stats, signal.entered, signal.h)
  )


def _memory(architecture: Architecture, learning_rate: float) -> base.Tree:
  """Returns splits at zero, Adam's moments, and a step count."""
  shapes = {
      part.name: networks_base.shapes(part)[0]
      for part in networks.parts(architecture)
  }
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  model = _model_of(architecture)
  kernels = lambda site, ends: tuple(
      _kernel(zeros, site, end) for end in ends
  )
  splits = _mirrored(
      {
          site.axis: splits_lib.Split(
              kernels(site, site.form.writers), kernels(site, site.form.readers)
          )
          for site in model.sites
      },
      model,
  )
  return {
      'splits': splits,
      'adam': _adam(learning_rate).init(splits),
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
                  site, getattr(site.form, ends),
                  getattr(splits[site.axis], name),
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
                  _kernel(mirrored[name][site.axis]['weights'], site, end)
                  for end in getattr(site.form, ends)
              )
              for name, ends in _ENDS.items()
          }
      )
      for site in model.sites
  }


def _nested(
    site: Any, ends: Sequence[Any], kernels: Sequence[jax.Array]
) -> base.Tree:
  """Returns `{part: {layer: {'kernel': ...}}}`."""
  tree: base.Tree = {}
  for end, kernel in zip(ends, kernels, strict=True):
    inner = tree
    for key in site.path(end.layer.path):
      inner = inner.setdefault(key, {})
    inner['kernel'] = kernel
  return tree


def _kernel(tree: base.Tree, site: Any, end: Any) -> jax.Array:
  return signals_lib.at(tree, site.path(end.layer.path))['kernel']


def learned_jointly(
    run_config: config.RunConfig,
    examples: int,
    epochs: int,
    learning_rate: float,
) -> config.RunConfig:
  """Returns a configuration that learns at the end of each phase.

  Args:
    run_config: configuration of frozen learning.
    examples: number of training examples.
    epochs: epochs of learning in each phase.
    learning_rate: learning rate of Adam.

  Raises:
    ValueError: if each device would have a part of a batch only.
  """
  devices, policy = run_config.devices, run_config.policy
  chosen = parallel.make(devices.parallel, devices.num_devices)
  if chosen.mode == 'pmap' and len(chosen.devices) > 1:
    raise ValueError(
        'Joint learning needs whole batches, but in pmap mode each device has '
        'a part; use --parallel=jit.'
    )
  steps_per_epoch = examples // run_config.batch_size
  timing = Timing(
      phase=policy.interval * steps_per_epoch,
      begin=max(0, policy.interval - epochs) * steps_per_epoch,
      end=policy.max_epochs * steps_per_epoch,
  )
  method = JointGaussNewton(run_config.method, learning_rate, timing)
  return dataclasses.replace(run_config, method=method)
