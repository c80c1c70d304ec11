"""Shared pieces of the tests of learned morphisms."""

import dataclasses
import functools

import jax
import numpy as np

from autogrow_jax.methods.gauss_newton import signals
from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import steps
import tiny_networks

# Depths and widths.
FAMILIES = {
    'plain3net': ((1, 1, 1), (3, 4, 4)),
    'mlp': ((1, 1), (5, 4)),
    'basic3resnet': ((2, 1, 1), (3, 4, 4)),
    'wrn28_10': ((1, 2, 1), (3, 4, 4)),
    'mobilenet1': ((1, 1, 1, 1, 1), (3, 4, 3, 4, 3)),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny network with examples, in float64 within `jax.enable_x64`."""

  architecture: object
  state: object
  model: signals.Model
  trees: signals.Trees
  batch: tuple

  @property
  def snapshot(self):
    """The network as a step sees it."""
    return steps.Snapshot(
        self.architecture, self.state, self.model, self.trees, [self.batch],
        [self.batch], 1, np.random.default_rng(4),
    )

  def signals(self, curvature='rank1'):
    """Losses, and the signals by axis."""
    losses, found = signals.signals(
        self.model, self.trees, self.batch, np.uint32(3), curvature=curvature
    )
    axes = [site.axis for site in self.model.sites]
    return losses, dict(zip(axes, found, strict=True))


@functools.lru_cache(maxsize=None)
def case(family, count=6, dtype='f8'):
  with jax.enable_x64(dtype == 'f8'):
    return _case(family, count, dtype)


def _case(family, count, dtype):
  depths, widths = FAMILIES[family]
  architecture = tiny_networks.seed(family, depths, widths=widths)
  if family == 'wrn28_10':
    architecture = architecture.resized({'stem': 3})
  state = tiny_networks.state(architecture)
  cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
  state = state.replace(
      params=cast(state.params), stats=cast(state.stats), opt_state=()
  )
  batch = (
      tiny_networks.images(count).astype(dtype),
      np.arange(count) % tiny_networks.CLASSES,
  )
  return Case(
      architecture,
      state,
      signals.model_of(architecture),
      signals.trees_of(
          architecture, state.params['weights'], state.stats['network']
      ),
      batch,
  )


def random_splits(data, scale=0.3):
  """Splits far from the start, zero where there is padding."""
  generator = np.random.default_rng(1)
  result = {}
  for site in data.model.sites:
    local, form = data.trees.local(site), site.form
    draw = lambda ends, local=local: tuple(
        scale * generator.normal(size=kernel.shape) * (np.asarray(kernel) != 0)
        for kernel in local.kernels(ends)
    )
    result[site.axis] = splits.Split(draw(form.writers), draw(form.readers))
  return result
