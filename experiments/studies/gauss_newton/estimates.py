"""Estimated changes of the loss by single splits and prunes, beside measured.

Measured changes are those of the network with that one split or prune alone.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import tasks
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import ranking as ranking_lib
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


def points(
    subject: subject_lib.Subject,
    ranking: ranking_lib.LearnedSplits,
    *,
    scale: float | None,
    samples: int,
    progress: subject_lib.Progress,
) -> dict[str, Points]:
  """Estimates and measures the effect of every learned split and prune.

  Args:
    subject: the network.
    ranking: settings of learning.
    scale: scale of each u; None for the best scale of each by its estimate,
      within trust.
    samples: number of sampled labels per example for the estimates.
    progress: callback with progress messages.

  Returns:
    Points of 'splits', and of 'prunes' unless there are none.
  """
  model, trees, rng = subject.model, subject.trees, subject.rng(0)
  progress(f'learning splits of {subject.channels}')
  learned = splits_lib.learn(model, trees, subject.learning, rng, ranking.learn)
  taken = None
  if ranking.compensation != 'off':
    taken = estimates_lib.compensated(model, trees, learned.moments)
  estimate = functools.partial(
      estimates_lib.estimate, model, trees, batches=subject.judging, rng=rng,
      taken=taken, curvature=ranking.learn.curvature, samples=samples,
  )
  progress('estimating them')
  joint = estimate(splits=learned.splits)
  scales = joint.best_scales()
  if scale is not None:
    scales = np.full(len(scales), scale)
  chosen = ranking_lib.scaled(model, learned.splits, scales)
  joint, usable = estimate(splits=chosen), joint.usable
  count = len(joint.candidates)
  result = {}
  for kind, part in (('splits', slice(count)), ('prunes', slice(count, None))):
    if kind == 'prunes' and taken is None:
      continue
    measured = []
    for batches in (subject.judging, subject.holdout):
      progress(f'measuring {kind} of {subject.channels}')
      measured.append(np.concatenate([
          trials.true_changes(
              subject.architecture, site, trees, chosen[site.axis],
              range(site.units), batches,
          )
          if kind == 'splits'
          else prune_changes(model, trees, site, taken[site.axis], batches)
          for site in model.sites
      ]) if batches else None)
    result[kind] = Points(
        joint.candidates, (usable & joint.usable)[part],
        joint.changes()[part], *measured,
    )
  return result


def prune_changes(
    model: signals_lib.Model,
    trees: signals_lib.Trees,
    site: sites_lib.Site,
    taken: np.ndarray,
    batches: Sequence[signals_lib.Batch],
) -> np.ndarray:
  """Measures the change of the loss if one unit is pruned, for each one alone.

  Args:
    model: the network.
    trees: arrays of the network.
    site: site of the units.
    taken: (units, readers, units + 1) w of each unit, see `estimates`.
    batches: examples.

  Returns:
    (units,) change of the mean loss, nats, float64.
  """
  total = signals_lib.add(
      _prune_changes(model.chain, site, trees, taken, *batch)
      for batch in batches
  )
  return total[: site.units] / signals_lib.count(batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prune_changes(chain, site, trees, taken, x, labels):
  """Sums the change of the loss over examples, (units,)."""

  def losses(trees):
    logits = taps.run(chain, trees.weights, trees.stats, x).output
    return tasks.cross_entropy(logits, labels)

  before = losses(trees)
  change = lambda pair: jnp.sum(losses(_pruned(site, trees, *pair)) - before)
  return lax.map(change, (jnp.arange(len(taken)), taken))


def _pruned(site, trees, unit, taken):
  """Returns the network in which others take over from a unit."""
  weights, stats = trees.weights, trees.stats
  for reader, w in zip(site.form.readers, taken, strict=True):
    path = site.path(reader.layer.path)
    leaves = signals_lib.at(weights, path)
    outgoing = jnp.take(leaves['kernel'], unit, axis=-2)
    shift = w[-1] * outgoing.reshape(-1, outgoing.shape[-1]).sum(0)
    change = outgoing[..., None, :] * w[:-1, None]
    weights = _plus(weights, path, 'kernel', change)
    if reader.norm is not None:
      stats = _plus(stats, site.path(reader.norm.path), 'mean', -shift)
    elif 'bias' in leaves:
      weights = _plus(weights, path, 'bias', shift)
  return signals_lib.Trees(weights, stats)


def _plus(tree, path, name, change):
  """Adds a change to one leaf of a layer."""
  if path:
    return {**tree, path[0]: _plus(tree[path[0]], path[1:], name, change)}
  return {**tree, name: tree[name] + change}
