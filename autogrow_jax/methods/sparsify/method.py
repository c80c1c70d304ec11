"""`Sparsify`: grow and prune channels and layers by sampled, annealed masks."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import growth
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.methods import base
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import space as space_lib
from autogrow_jax.networks import common

Architecture = architecture_lib.Architecture
Tree = base.Tree
_ORIGIN = 3.0  # s of what is there at first.
_LARGE = 1e6
_DRAWS = 64  # Samples of which the one nearest to the budget is taken.

CHOICES = {
    'strategy': ('sparsify', 'random'),
    'grow': space_lib.GROWS,
    'budget': space_lib.BUDGETS,
    'gate': ('readers', 'filter'),
    'lambda_update': ('step', 'epoch'),
    'temperature': ('structure', 'global'),
    'relaxation': ('sigmoid', 'gumbel'),
    'final': ('sample', 'threshold'),
    'backend': ('compact', 'masked'),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """How long the run grows.

  Attributes:
    queries: T, how often masks are trained between two samples.
    steps: training steps of all of that, one per batch.
    accumulate: batches over which gradients are averaged before an update.
  """

  queries: int = 0
  steps: int = 0
  accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class Sparsify(base.FixedArchitecture):
  """Structured continuous sparsification.

  Unlike the paper, as far as it can be known, a gate multiplies what *reads* a
  channel and not its filter, since behind a filter stands a norm that takes a
  factor away again; lambda follows the expected cost in every step, since one
  that is held for an epoch makes the network swing from its seed to the full
  one and back; the last sample, which remains, is of several the one nearest to
  the budget.

  Attributes:
    strategy: 'sparsify', or 'random': everything is there with one and the same
      probability, which meets the budget, and of many samples the one nearest
      to it is taken; masks are not trained.
    target_sparsity: u, the part of the full network's cost to do without.
    budget: what cost is, 'params' or 'macs'.
    grow: 'channels', 'layers' or 'both'.
    lambda1: base of the penalty on channels.
    lambda2: on layers.
    gate: 'readers' or, as equation (1) has it, 'filter'.
    lambda_update: per 'step' by the expected cost, or per 'epoch' by the
      sample's.
    temperature: per 'structure', by how often it was sampled, or 'global'.
    beta_final: inverse temperature of what is sampled in all queries; from 1.
    relaxation: 'sigmoid', or 'gumbel' with noise that is held between samples.
    final: the network that remains, the last 'sample' or by 'threshold', all
      with p >= 1/2.
    freeze: part of the queries after which the sample no longer changes.
    start: part of the run's updates that the penalty alone would take to bring
      what is off at first to s = 0.
    mask: descent on the mask variables.
    backend: 'compact' computes what is there, 'masked' everything.
    run: how long it grows; what a binary fills in.
  """

  strategy: str = 'sparsify'
  target_sparsity: float = 0.5
  budget: str = 'params'
  grow: str = 'channels'
  lambda1: float = 0.5
  lambda2: float = 0.1
  gate: str = 'readers'
  lambda_update: str = 'step'
  temperature: str = 'structure'
  beta_final: float = 100.0
  relaxation: str = 'sigmoid'
  final: str = 'sample'
  freeze: float = 1.0
  start: float = 0.035
  mask: optimizers.AuxConfig = optimizers.AuxConfig()
  backend: str = 'compact'
  run: Run = Run()

  def __post_init__(self):
    for name, allowed in CHOICES.items():
      common.check_choice(name, getattr(self, name), allowed)
    space_lib.check_target(self.target_sparsity)
    for name, low, high in (
        ('lambda1', 0, _LARGE),
        ('lambda2', 0, _LARGE),
        ('beta_final', 1, _LARGE),
        ('freeze', 0, 1),
        ('start', 0, 1),
    ):
      if not low <= getattr(self, name) <= high:
        raise ValueError(
            f'{name} is from {low} to {high}, got {getattr(self, name)}.'
        )
    if self.strategy == 'random' and self.final == 'threshold':
      raise ValueError(
          'A random strategy has no probabilities to go by at the end; leave '
          'out final=threshold.'
      )

  @property
  def aux(self) -> optimizers.AuxConfig:
    if self.strategy == 'random':
      return dataclasses.replace(self.mask, learning_rate=0.0)
    return self.mask

  def extra(self, architecture: Architecture) -> tuple[Tree, Tree]:
    space = space_lib.of(architecture, self.grow)
    off = [-distance for distance in masks.start(architecture, space, self)]
    full = lambda *values: masks.full(architecture, space, *values)
    s = masks.seeded(full(*off, np.float32), _ORIGIN)
    q = masks.seeded(full(False, False, bool), True)
    return s, {
        'q': q,
        'grown': jax.tree.map(np.copy, q),
        't': full(0, 0, np.int32),
        'noise': full(0, 0, np.float32),
        'open': np.float32(1),
    }

  def active(
      self, architecture: Architecture, memory: Tree
  ) -> view.Active | None:
    if not memory['open']:
      return None
    space_lib.check(architecture, self.grow)
    space = self._space(architecture)
    q = memory['q']
    return view.Active(
        units={
            axis: np.asarray(q['channels'][name])
            for name, axes in space.groups
            for axis in axes
        },
        blocks={block: bool(q['layers'][block]) for block in space.layers},
        compact=self.backend == 'compact',
    )

  def gated(
      self, layout: view.Layout, params: Tree, stats: Tree
  ) -> base.Gated:
    architecture, memory = layout.architecture, stats['method']
    space, q = self._space(layout.canonical), memory['q']
    gates = jax.tree.map(
        lambda q, p: jnp.where(memory['open'] > 0, q * p, 1.0),
        q,
        self.probabilities(params['aux'], memory),
    )
    sizes, readers, filters = dict(architecture.sizes), {}, {}
    for name, axes in space.groups:
      for axis in axes:
        if axis in sizes:
          on = q['channels'][name]
          units = view.ordered(on, sizes[axis], numpy=jnp)
          gate = gates['channels'][name][units]
          if self.gate == 'filter':
            filters[axis] = gate
            gate = on[units].astype(jnp.float32)
          readers[axis] = gate
    tree = {
        'weights': view.unpack(params['weights'], layout),
        'network': view.unpack(stats['network'], layout),
    }
    table = state_lib.axis_table(architecture)
    tree = growth.scale_readers(tree, table, readers)
    if filters:
      tree = growth.scale_filters(tree, table, filters)
    tree = view.pack(tree, layout, stack=jnp.stack)
    return base.Gated(
        tree['weights'],
        tree['network'],
        _block_gates(layout, gates['layers']) if space.layers else None,
    )

  def objective(
      self,
      forward: base.Forward,
      params: Tree,
      stats: Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
    """Equation (6). The penalty has a gradient but does not show in the loss.
    """
    loss, (after, logits) = super().objective(
        forward, params, stats, labels, key
    )
    if self.strategy == 'sparsify':
      loss = base.with_penalty(
          loss,
          self.penalty(
              forward.layout.canonical, params['aux'], stats['method']
          ),
      )
    # What gates scaled among the statistics is not to stay scaled.
    after['network'] = jax.tree_util.tree_map_with_path(
        lambda path, old, new: (
            old if state_lib.names(path)[-1] == 'select' else new
        ),
        stats['network'],
        after['network'],
    )
    return loss, (after, logits)

  def penalty(
      self, architecture: Architecture, aux: Tree, memory: Tree
  ) -> jax.Array:
    """Sum over all structures of lambda p, equations (4) and (6).

    Channels of a layer that is not there are left alone: otherwise a layer
    would be dense before it is first there.

    Args:
      architecture: the full-size network.
      aux: mask variables.
      memory: the method's other leaves.

    Returns:
      A scalar; lambda has no gradient.
    """
    space = self._space(architecture)
    p = self.probabilities(aux, memory)
    counted = p if self.lambda_update == 'step' else jax.tree.map(
        jnp.float32, memory['q']
    )
    density = space_lib.density(architecture, space, counted, self.budget)
    # u - u_G, where both are 1 - density.
    excess = jax.lax.stop_gradient(density - (1 - self.target_sparsity))
    is_there = _is_in_a_layer(space, memory['q'])
    channels = sum(
        is_there[name] * jnp.sum(values)
        for name, values in p['channels'].items()
    )
    layers = sum(p['layers'].values())
    penalty = self.lambda1 * channels + self.lambda2 * layers
    return memory['open'] * excess * penalty

  def applied(
      self, architecture: Architecture, updates: Tree, stats: Tree
  ) -> Tree:
    """Masks of channels of a layer that is not there rest.

    Their gradients are zero, but momentum and decay would move them.
    """
    q = stats['method']['q']
    is_there = _is_in_a_layer(self._space(architecture), q)
    channels = jax.tree.map(
        jnp.multiply, is_there, updates['aux']['channels']
    )
    return {**updates, 'aux': {**updates['aux'], 'channels': channels}}

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth.Growth | None:
    """A new sample, or at the end what remains of the last one."""
    if not situation.state.stats['method']['open']:
      return None
    if situation.is_last:
      return self.conclude(situation.architecture, situation.state)
    if decision.action != 'grow':
      return None
    return self._resample(situation.architecture, situation.state)

  def conclude(
      self, architecture: Architecture, state: state_lib.TrainState
  ) -> growth.Growth:
    """The sampled network for good: the rest pruned, p folded into weights.

    Its outputs are those of the gated one. Only a gate of a block without a
    shortcut cannot be folded: it becomes 1, and the receipt says what that
    changes.
    """
    aux, memory = state.params['aux'], state.stats['method']
    space = self._space(architecture)
    p = _on_host(self.probabilities(aux, memory))
    q = memory['q']
    likely = masks.guarded(jax.tree.map(lambda p: p >= 0.5, p), aux)
    disagree = sum(
        int(np.sum(a != b))
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(likely))
    )
    if self.final == 'threshold':
      q = likely
    pruned, kept = architecture, {}
    for block in space.layers:
      if not q['layers'][block]:
        pruned = pruned.without_block(block)
    sizes = dict(pruned.sizes)
    factors = {}
    for name, axes in space.groups:
      for axis in set(axes) & sizes.keys():
        kept[axis] = np.flatnonzero(q['channels'][name])
        factors[axis] = p['channels'][name][kept[axis]]
    pruned = pruned.resized({axis: len(units) for axis, units in kept.items()})
    report = {
        'ambiguous': masks.ambiguous(p),
        'unlike_threshold': disagree,
        'widths': {axis: pruned.size(axis) for axis in sorted(kept)},
    }
    return growth.Growth(
        pruned,
        kept,
        self._folding(pruned, factors, p['layers'], report),
        note='prune for good what is not in the sample',
    )

  def _folding(
      self,
      pruned: Architecture,
      channels: Mapping[str, np.ndarray],
      layers: Mapping[str, np.ndarray],
      report: dict[str, Any],
  ) -> growth.Patch:
    """Multiplies the gates of what remains into weights, and ends masking.

    Args:
      pruned: the architecture that remains.
      channels: per axis of it, the gates of its channels.
      layers: gates of blocks.
      report: of the patch.

    Returns:
      The patch.
    """
    scale = (
        growth.scale_readers if self.gate == 'readers' else growth.scale_filters
    )

    def patch(state, key):
      del key
      tree = scale(
          {'weights': state.params['weights'], **state.stats},
          state_lib.axis_table(pruned),
          channels,
      )
      weights = _with_folded_layers(pruned, tree['weights'], layers)
      memory = {
          **state.stats['method'],
          'q': jax.tree.map(np.ones_like, state.stats['method']['q']),
          'open': np.float32(0),
      }
      return state.replace(
          params={**state.params, 'weights': weights},
          stats={'network': tree['network'], 'method': memory},
      ), report

    return patch

  def describe(self, architecture: Architecture, memory: Tree) -> str:
    text = super().describe(architecture, memory)
    if not memory['open']:
      return text
    space = self._space(architecture)
    if space.layers:
      off = {b for b in space.layers if not memory['q']['layers'][b]}
      text = policies.format_depths([
          sum(block not in off for block in stage)
          for stage in architecture.stages
      ])
    density = space_lib.density(architecture, space, memory['q'], self.budget)
    return f'{text} {100 * density:.1f}%'

  def metrics(
      self, architecture: Architecture, aux: Tree, memory: Tree
  ) -> dict[str, Any]:
    if not memory['open']:
      return {}
    space = self._space(architecture)
    p = _on_host(self.probabilities(aux, memory))
    density = lambda tree, budget: round(
        float(space_lib.density(architecture, space, tree, budget)), 6
    )
    return {
        'density_params': density(memory['q'], 'params'),
        'density_macs': density(memory['q'], 'macs'),
        'expected_density': density(p, self.budget),
        'ambiguous': round(masks.ambiguous(p), 6),
        'units': {
            name: int(np.sum(q)) for name, q in memory['q']['channels'].items()
        },
        'mean_beta': {
            name: round(float(np.mean(beta)), 4)
            for name, beta in self._beta(memory)['channels'].items()
        },
    }

  def least_density(self, architecture: Architecture) -> float:
    """Of the seed: one channel in every group, no layer that may be missing."""
    space = self._space(architecture)
    seed = masks.seeded(
        masks.full(architecture, space, False, False, bool), True
    )
    return space_lib.density(architecture, space, seed, self.budget)

  def _space(self, architecture: Architecture) -> space_lib.Space:
    return space_lib.of(architecture, self.grow)

  def _beta(self, memory: Tree) -> Tree:
    return masks.temperatures(memory['t'], self.beta_final, self.run.queries)

  def probabilities(self, aux: Tree, memory: Tree) -> Tree:
    """p, by which gates and the penalty count; 1 for a random sample."""
    if self.strategy == 'random':
      return jax.tree.map(jnp.ones_like, aux)
    return masks.probabilities(aux, memory['noise'], self._beta(memory))

  def _resample(
      self, architecture: Architecture, state: state_lib.TrainState
  ) -> growth.Growth | None:
    memory, space = state.stats['method'], self._space(architecture)
    steps = self.run.steps
    if steps and int(state.step) > self.freeze * steps:
      return None
    key = jax.random.fold_in(
        randomness.stream(jax.random.wrap_key_data(state.key), 'masks'),
        state.step,
    )
    old = memory['q']
    new = self._drawn(architecture, state, key)
    for name, block in space.owners:  # Layers come before their channels.
      if not new['layers'][block]:
        new['channels'][name] = old['channels'][name]
    owners = dict(space.owners)
    counted = {
        'channels': {
            name: q & new['layers'][owners[name]] if name in owners else q
            for name, q in new['channels'].items()
        },
        'layers': new['layers'],
    }
    if self.temperature == 'global':
      counted = jax.tree.map(np.ones_like, counted)
    noise = memory['noise']
    if self.relaxation == 'gumbel':
      noise = _on_host(
          masks.logistic(jax.random.fold_in(key, 1), noise), np.float32
      )
    memory = {
        **memory,
        'q': new,
        'grown': jax.tree.map(np.logical_or, memory['grown'], new),
        't': jax.tree.map(
            lambda t, q: (t + q).astype(np.int32), memory['t'], counted
        ),
        'noise': noise,
    }
    attached = jax.tree.map(lambda old, new: new & ~old, old, new)

    def patch(state, key):
      del key
      opt_state = _without_momentum(
          state.opt_state, architecture, space, attached
      )
      return state.replace(
          opt_state=opt_state, stats={**state.stats, 'method': memory}
      ), _changes(state.stats['method']['grown'], old, new)

    return growth.Growth(architecture, patch=patch, note='a new sample')

  def _is_last_sample(self, step: int) -> bool:
    """Whether no other sample comes after one at this step."""
    between = self.run.steps / max(1, self.run.queries)
    end = min(self.freeze * self.run.steps, self.run.steps - between)
    return step + between > end + 0.5  # Half a step, for rounding.

  def _drawn(
      self, architecture: Architecture, state: state_lib.TrainState, key: Any
  ) -> Tree:
    aux, memory = state.params['aux'], state.stats['method']
    space = self._space(architecture)
    density = lambda tree: space_lib.density(
        architecture, space, tree, self.budget
    )
    draw = lambda key, p: masks.guarded(masks.sample(key, p), aux)
    target = 1 - self.target_sparsity
    if self.strategy == 'sparsify':
      p = _on_host(self.probabilities(aux, memory))
      if not self._is_last_sample(int(state.step)):
        return draw(key, p)
    else:
      same = lambda p: masks.full(architecture, space, p, p, np.float64)
      p = same(masks.probability_of(lambda p: density(same(p)), target))
    draws = [draw(jax.random.fold_in(key, n), p) for n in range(_DRAWS)]
    return min(draws, key=lambda q: abs(density(q) - target))


def _on_host(tree: Tree, dtype: Any = None) -> Tree:
  return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def _is_in_a_layer(space: space_lib.Space, q: Tree) -> dict[str, Any]:
  """Per group, whether the layer that it is private to is there, if any is."""
  owners = dict(space.owners)
  return {
      name: q['layers'][owners[name]] if name in owners else True
      for name, _ in space.groups
  }


def _block_gates(layout: view.Layout, gates: Mapping[str, Any]) -> Tree:
  """Per segment with a block that may be missing, the gates of its blocks."""
  result = {}
  for segment, members in zip(layout.bucket, layout.members, strict=True):
    if any(name in gates for name in members):
      dtype = jnp.result_type(*gates.values())
      values = [jnp.asarray(gates.get(name, 1), dtype) for name in members]
      result[segment.key] = (
          values[0] if segment.length is None else jnp.stack(values)
      )
  return result


def _with_folded_layers(
    architecture: Architecture, weights: Tree, gates: Mapping[str, Any]
) -> Tree:
  """Weights with the gates of blocks in the last layers of their branches."""
  folded = dict(weights)
  for part in networks.parts(architecture):
    last = part.module.last_layer
    if part.name in gates and last is not None:
      gate = np.float32(gates[part.name])
      folded[part.name] = {
          **weights[part.name],
          last: jax.tree.map(
              lambda leaf, gate=gate: leaf * gate, weights[part.name][last]
          ),
      }
  return folded


def _without_momentum(
    opt_state: Any,
    architecture: Architecture,
    space: space_lib.Space,
    attached: Tree,
) -> Any:
  """Moments at zero for all that was not there before."""
  table = state_lib.axis_table(architecture)
  keep = {
      axis: ~attached['channels'][name]
      for name, axes in space.groups
      for axis in axes
      if attached['channels'][name].any()
  }
  blocks = {name for name, is_new in attached['layers'].items() if is_new}

  def reset(path, leaf):
    path = state_lib.names(path)
    axes = state_lib.find_axes(path, table)
    if axes is None:
      return leaf
    if blocks & set(path):
      return np.zeros_like(leaf)
    for dim, axis in enumerate(axes):
      if axis is not None and axis.name in keep:
        shape = [1] * leaf.ndim
        shape[dim] = -1
        leaf = leaf * keep[axis.name].reshape(shape).astype(leaf.dtype)
    return leaf

  return jax.tree_util.tree_map_with_path(reset, opt_state)


def _changes(grown: Tree, old: Tree, new: Tree) -> dict[str, int]:
  """How many channels and layers came and went, for the receipt."""
  count = lambda kind, which: sum(
      int(np.sum(which(grown[kind][name], old[kind][name], q)))
      for name, q in new[kind].items()
  )
  report = {}
  for kind in new:
    if new[kind]:
      report[f'{kind}_grown'] = count(kind, lambda g, a, b: b & ~a & ~g)
      report[f'{kind}_reattached'] = count(kind, lambda g, a, b: b & ~a & g)
      report[f'{kind}_detached'] = count(kind, lambda g, a, b: a & ~b)
  return report
