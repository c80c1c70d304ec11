"""`RandomMasks`: samples of one probability, the null model of `Sparsify`."""

import dataclasses
from typing import Any

import jax
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import optimizers
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.methods import base
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import method as method_lib
from autogrow_jax.methods.sparsify import space as space_lib

Architecture = architecture_lib.Architecture
Tree = base.Tree

_CERTAIN = 40.0  # sigmoid(40) is 1 in float32: gates are the sample itself.


@dataclasses.dataclass(frozen=True)
class RandomMasks(base.Method):
  """Samples everything with one probability, which meets the budget.

  Of several samples the one nearest to the budget is taken. Masks are not
  trained.

  Attributes:
    target_sparsity: part of the full network's cost to do without.
    budget: cost that the budget counts, 'params' or 'macs'.
    grow: 'channels', 'layers' or 'both'.
    gate: weights that a mask multiplies, 'readers' or 'filter'.
    freeze: part of the queries after which the sample no longer changes.
    backend: 'compact' computes what is there, 'masked' everything.
    run: how long it grows.
  """

  target_sparsity: float = 0.5
  budget: str = 'params'
  grow: str = 'channels'
  gate: str = 'readers'
  freeze: float = 1.0
  backend: str = 'compact'
  run: method_lib.Run = method_lib.Run()

  def __post_init__(self):
    _ = self.sparsify  # Checks the settings.

  @property
  def sparsify(self) -> method_lib.Sparsify:
    """The same masks, with nothing that trains them."""
    return method_lib.Sparsify(
        lambda1=0.0,
        lambda2=0.0,
        mask=optimizers.AuxConfig(learning_rate=0.0),
        **{
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
        },
    )

  @property
  def execution(self) -> view.Execution:
    return self.sparsify.execution

  def extra(self, architecture: Architecture) -> base.Extra:
    extra = self.sparsify.extra(architecture)
    certain = lambda s: np.full_like(s, _CERTAIN)
    return extra._replace(trainable=jax.tree.map(certain, extra.trainable))

  def objective(
      self,
      network: base.Network,
      params: Tree,
      stats: Tree,
      labels: jax.Array,
      key: jax.Array,
  ) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
    return self.sparsify.objective(network, params, stats, labels, key)

  def propose(
      self, decision: policies.Decision, situation: base.Situation
  ) -> growth_lib.Growth | None:
    return self.sparsify.sampling_by(self._draw, decision, situation)

  def report(
      self, architecture: Architecture, aux: Tree, memory: Tree
  ) -> dict[str, Any]:
    return self.sparsify.report(architecture, aux, memory)

  def least_density(self, architecture: Architecture) -> float:
    """Computes the density of the seed."""
    return self.sparsify.least_density(architecture)

  def _draw(
      self,
      architecture: Architecture,
      state: state_lib.TrainState,
      key: jax.Array,
  ) -> Tree:
    space = space_lib.of(architecture, self.grow)
    same = lambda p: masks.full(architecture, space, p, p, np.float64)
    density = lambda tree: space_lib.density(
        architecture, space, tree, self.budget
    )
    target = 1 - self.target_sparsity
    p = masks.probability_of(lambda p: density(same(p)), target)
    return masks.nearest(
        key, same(p), state.params['aux'], density=density, target=target
    )
