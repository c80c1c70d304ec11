"""Estimated changes of the loss by single splits and prunes, beside measured.

Measured changes are those of the network with that one split or prune alone.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import tasks
from autogrow_jax.methods.gauss_newton import charges
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import learning as learning_lib
from autogrow_jax.methods.gauss_newton import prunes as prunes_lib
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import taps

from . import subject as subject_lib
from . import trials


@dataclasses.dataclass(frozen=True)
class Points:
  """Estimated and measured changes of the loss, nats.

  Attributes:
    candidates: (axis, unit) pairs.
    usable: (candidates,) true for candidates that a run may choose.
    estimated: (candidates,) estimates on the examples to judge by.
    measured: (candidates,) measurements on the same examples.
    held_out: (candidates,) measurements on the hold-out; None without one.
  """

  candidates: tuple[tuple[str, int], ...]
  usable: np.ndarray
  estimated: np.ndarray
  measured: np.ndarray
  held_out: np.ndarray | None


def splits(
    subject: subject_lib.Subject,
    learn: learning_lib.LearnConfig,
    *,
    scale: float | None,
    samples: int,
    progress: subject_lib.Progress,
) -> Points:
  """Estimates and measures the effect of every learned split.

  Args:
    subject: the network.
    learn: settings of learning splits.
    scale: scale of each u; None for the best scale of each by its estimate,
      within trust.
    samples: number of sampled labels per example for the estimates.
    progress: callback with progress messages.

  Returns:
    The points.
  """
  keys = [jax.random.fold_in(subject.key, number) for number in range(3)]
  progress(f'learning splits of {subject.channels}')
  learned = learning_lib.learn(
      subject.model, subject.trees, subject.learning, keys[0], learn
  )
  estimate = functools.partial(
      estimates_lib.estimate,
      subject.model,
      subject.trees,
      batches=subject.judging,
      curvature=learn.curvature,
      samples=samples,
  )
  progress('estimating them')
  estimates = estimate(splits=learned.splits, key=keys[1])
  failed = np.concatenate(
      [learned.codes[site.axis] != 0 for site in subject.model.sites]
  )
  usable = estimates.usable & ~failed
  scales = estimates.best_scales()
  if scale is not None:
    scales = np.full(len(usable), scale)
  chosen = estimates_lib.scaled(learned.splits, estimates.candidates, scales)
  estimates = estimate(splits=chosen, key=keys[2])
  measure = lambda site, batches: trials.true_changes(
      *subject.network, chosen, site.axis, range(site.units), batches
  )
  return Points(
      estimates.candidates,
      usable & estimates.usable,
      estimates.changes(),
      *_measured(subject, measure, 'splits', progress),
  )


def prunes(
    subject: subject_lib.Subject,
    *,
    compensation: str,
    curvature: str,
    progress: subject_lib.Progress,
) -> Points:
  """Estimates and measures the effect of every prune; see `splits`."""
  progress(f'estimating prunes of {subject.channels}')
  estimates = prunes_lib.estimate(
      subject.model,
      subject.trees,
      subject.learning,
      subject.judging,
      jax.random.fold_in(subject.key, 3),
      compensation=compensation,
      curvature=curvature,
  )
  measure = lambda site, batches: prune_changes(
      subject.model, subject.trees, site, estimates.weights[site.axis], batches
  )
  return Points(
      estimates.candidates,
      estimates.usable,
      estimates.changes,
      *_measured(subject, measure, 'prunes', progress),
  )


def _measured(
    subject: subject_lib.Subject,
    measure: Callable[..., np.ndarray],
    kind: str,
    progress: subject_lib.Progress,
) -> list[np.ndarray | None]:
  """Measures all units, on the examples to judge by and on the hold-out."""
  results, sites = [], subject.model.sites
  for batches in (subject.judging, subject.holdout):
    measured = []
    for number, site in enumerate(sites if batches else (), start=1):
      progress(
          f'measuring {kind} of {site.axis}, {number} of {len(sites)} layers'
      )
      measured.append(measure(site, batches))
    results.append(np.concatenate(measured) if batches else None)
  return results


def prune_changes(
    model: signals_lib.Model,
    trees: signals_lib.Trees,
    site: sites_lib.Site,
    weights: np.ndarray,
    batches: Sequence[splits_lib.Batch],
) -> np.ndarray:
  """Measures the change of the loss if one unit is pruned, for each one alone.

  Args:
    model: the network.
    trees: arrays of the network.
    site: site of the units.
    weights: (units, readers, units + 1) w of each unit, see `removals`.
    batches: examples.

  Returns:
    (units,) change of the mean loss, nats, float64.
  """
  weights = jnp.asarray(weights, jnp.float32)
  total = sum(
      np.asarray(_prune_changes(model, site, trees, weights, *batch), 'f8')
      for batch in batches
  )
  return total / charges.count(batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prune_changes(model, site, trees, weights, x, labels):
  """Sums the change of the loss over examples, (units,)."""

  def losses(trees):
    logits = taps.run(model.chain, trees.weights, trees.stats, x).output
    return tasks.cross_entropy(logits, labels)

  before = losses(trees)

  def change(unit_and_weights):
    return jnp.sum(losses(_pruned(site, trees, *unit_and_weights)) - before)

  return lax.map(change, (jnp.arange(site.units), weights))


def _pruned(site, trees, unit, weights):
  """Returns the network in which others take over from a unit."""
  for reader, w in zip(site.readers, weights, strict=True):
    kernel = trees.kernel(reader.layer)
    outgoing = jnp.take(kernel, unit, axis=-2)
    shift = w[-1] * outgoing.reshape(-1, outgoing.shape[-1]).sum(0)
    change = jnp.einsum(
        '...o,u->...uo', outgoing, w[:-1], precision=lax.Precision.HIGHEST
    )
    trees = _with_leaf(trees, 'weights', reader.layer, 'kernel', change)
    if reader.norm is not None:
      trees = _with_leaf(trees, 'stats', reader.norm, 'mean', -shift)
    elif trees.has_bias(reader.layer):
      trees = _with_leaf(trees, 'weights', reader.layer, 'bias', shift)
  return trees


def _with_leaf(trees, kind, layer, name, change):
  """Adds a change to one leaf of a layer."""

  def changed(tree, path):
    if not path:
      return tree + change
    return {**tree, path[0]: changed(tree[path[0]], path[1:])}

  tree = changed(getattr(trees, kind), (*layer.path, name))
  return trees.replace(**{kind: tree})
