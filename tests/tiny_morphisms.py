"""Shared pieces of the tests of learned morphisms."""

import jax
import numpy as np

from autogrow_jax.methods.gauss_newton import splits
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.methods.gauss_newton import surgery
from autogrow_jax import state as state_lib
import tiny_networks

trees_of = steps.trees_of
chain_of = steps.chain_of


def batch(count=6):
  """Images with labels."""
  return (
      tiny_networks.images(count),
      np.arange(count) % tiny_networks.CLASSES,
  )


def site_of(model, axis):
  return {site.axis: site for site in model.sites}[axis]


def random_splits(model, trees, scale=0.3, *, moving=True):
  """Splits far from the start; u = 0 if they are not moving."""
  generator = np.random.default_rng(1)

  def draw(end, factor):
    kernel = trees.kernel(end.layer)
    return factor * generator.normal(size=kernel.shape).astype(kernel.dtype)

  return {
      site.axis: splits.Split(
          tuple(draw(end, scale * moving) for end in site.writers),
          tuple(draw(end, scale) for end in site.readers),
      )
      for site in model.sites
  }


def only(split, unit):
  """The split of one unit alone."""
  chosen = (np.arange(split.u[0].shape[-1]) == unit)[:, None]
  return splits.Split(
      splits.as_incoming(splits.incoming(split.u) * chosen, split.u),
      splits.as_outgoing(splits.outgoing(split.e) * chosen, split.e),
  )


def output_changes(site, trees, signal, split):
  """The change dz of each reader's output if all units are split.

  It is exact while pre-activations stay. If one reader's change reaches another
  writer of the same stream, dz holds the change of the logits in first order
  only.
  """
  return tuple(
      reader.layer.linear(mean, trees.kernel(reader.layer))
      + reader.layer.linear(between, e)
      for reader, (mean, between), e in zip(
          site.readers,
          splits.differences(site, trees, signal, split.u),
          split.e,
          strict=True,
      )
  )


def grow(state, change):
  """The arrays of a state after a growth or a morph, without an optimizer."""
  key = jax.random.key(0)
  if isinstance(change, surgery.Morph):
    return change.grown(state, key)
  return state_lib.grown_arrays(state, change, key=key)
