"""The joint model of the loss over the splits and prunes of one step.

A compensation that lowers the loss and a split often do so by the same change
of the logits, so that their estimates do not add.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax.methods.gauss_newton import removals as removals_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib

Model, Trees = signals_lib.Model, signals_lib.Trees


@dataclasses.dataclass(frozen=True)
class Joint:
  """The model of the loss over one step.

  Attributes:
    slopes: (1 + prunes,) slope of all splits together, then of each prune.
    gram: (1 + prunes, 1 + prunes).
  """

  slopes: np.ndarray
  gram: np.ndarray

  def change(self, included: Sequence[int]) -> float:
    """Returns the change of the loss by all splits and some prunes, nats."""
    chosen = np.array([0, *(1 + number for number in included)])
    gram = self.gram[np.ix_(chosen, chosen)]
    return float(self.slopes[chosen].sum() + gram.sum() / 2)


def together(
    model: Model,
    trees: Trees,
    splits: splits_lib.Splits,
    removals: Sequence[removals_lib.Removal],
    batches: Sequence[splits_lib.Batch],
    key: jax.Array,
    *,
    samples: int,
) -> Joint:
  """Estimates a step as it will be applied, with curvature mc.

  Args:
    splits: splits of all sites, with u = 0 for units that are not split.
    removals: removals, those of an axis in their order.
  """
  numbers: dict[str, list[int]] = {}
  for number, removal in enumerate(removals):
    numbers.setdefault(removal.axis, []).append(number)
  stacked = {
      axis: tuple(
          np.asarray([getattr(removals[i], name) for i in chosen], np.float32)
          for name in ('weights', 'mixture')
      )
      for axis, chosen in numbers.items()
  }
  slopes, gram, examples = 0.0, 0.0, 0
  for sample in range(samples):
    for index, (x, labels) in enumerate(batches):
      draw = jax.random.fold_in(jax.random.fold_in(key, sample), index)
      sums = _sums(model, trees, splits, stacked, x, labels, draw)
      slopes = slopes + np.asarray(sums[0], np.float64)
      gram = gram + np.asarray(sums[1], np.float64)
      examples += len(labels)
  # The program orders axes by name.
  order = [number for axis in sorted(numbers) for number in numbers[axis]]
  back = np.array([0, *(1 + np.argsort(order))], int)
  return Joint(slopes[back] / examples, gram[np.ix_(back, back)] / examples)


@functools.partial(jax.jit, static_argnums=0)
def _sums(model, trees, splits, stacked, x, labels, key):
  """Sums slopes and Gram matrix over a batch."""
  _, by_axis = signals_lib.signals(
      model, trees, x, labels, key, curvature='mc'
  )
  by_split = [
      splits_lib.projections(
          site, trees, by_axis[site.axis], splits[site.axis]
      )
      for site in model.sites
  ]
  s, c = (
      [sum(one.sum(-1) for one in kind)[:, None]]
      for kind in zip(*by_split, strict=True)
  )
  sites = {site.axis: site for site in model.sites}
  for axis in sorted(stacked):
    signal = by_axis[axis]
    a = removals_lib.activations(sites[axis], trees, signal)
    project = functools.partial(
        removals_lib.projected, sites[axis], trees, a
    )
    s.append(project(signal.slope, *stacked[axis]))
    c.append(project(signal.curvature, *stacked[axis]))
  s, c = jnp.concatenate(s, -1), jnp.concatenate(c, -1)
  gram = jnp.einsum('bi,bj->ij', c, c, precision=lax.Precision.HIGHEST)
  return s.sum(0), gram
