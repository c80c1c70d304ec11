"""Shared pieces of the rivals, see `rivals`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import steps

from . import by_gain

Model, Trees = signals_lib.Model, signals_lib.Trees
Site, Split = sites_lib.Site, splits_lib.Split

_POSITIVE = 1e-6


def check_positive(rival: object) -> None:
  """Raises a ValueError unless all settings of a rival are positive."""
  for field in dataclasses.fields(rival):
    value = getattr(rival, field.name)
    if not 0 < value < float('inf'):
      raise ValueError(f'{field.name} is positive, got {value}.')


def incoming(site: Site, trees: Trees) -> np.ndarray:
  """Returns w of every unit, padded (units, incoming)."""
  kernels = trees.local(site).kernels(site.form.writers)
  return splits_lib.rows_of(kernels, 'u').astype('f8')


def without_e(site: Site, trees: Trees, rows: np.ndarray) -> Split:
  """Returns the split with these u, padded (units, incoming), and e = 0."""
  local = trees.local(site)
  zeros = lambda ends: tuple(
      np.zeros(kernel.shape, kernel.dtype) for kernel in local.kernels(ends)
  )
  u = zeros(site.form.writers)
  return Split(
      splits_lib.plus(u, rows, sites_lib.WRITTEN), zeros(site.form.readers)
  )


def relative(
    site: Site, trees: Trees, rows: np.ndarray, length: float
) -> Split:
  """Returns the split with u along rows, of a length in units of |w|."""
  weights = np.linalg.norm(incoming(site, trees), axis=-1)
  norms = np.maximum(np.linalg.norm(rows, axis=-1), 1e-30)
  return without_e(site, trees, length * (weights / norms)[:, None] * rows)


def ranked(
    snapshot: steps.Snapshot,
    found: Mapping[str, tuple[Split, np.ndarray]],
    images: float,
    *,
    refused: Mapping[str, str] | None = None,
    one_sided: bool = False,
) -> by_gain.Ranked:
  """Collects splits and (units,) gains of sites; others cannot be split."""
  model, trees = snapshot.model, snapshot.trees
  splits, gains = {}, []
  for site in model.sites:
    rows = np.zeros_like(incoming(site, trees))
    nothing = without_e(site, trees, rows), np.full(site.units, np.nan)
    splits[site.axis], gain = found.get(site.axis, nothing)
    gains.append(np.asarray(gain[: site.units], 'f8'))
  return by_gain.Ranked(
      splits,
      np.concatenate(gains),
      round(images),
      one_sided,
      '; '.join(f'{axis}: {why}' for axis, why in (refused or {}).items()),
  )


def refused(model: Model) -> dict[str, str]:
  """Returns the sites with several writers, with that reason."""
  return {
      site.axis: f'written by {len(site.form.writers)} layers'
      for site in model.sites
      if len(site.form.writers) > 1
  }


def signals_of(
    snapshot: steps.Snapshot,
) -> Iterable[dict[str, signals_lib.Signal]]:
  """Yields the signals of all batches; their curvature means nothing."""
  model, trees = snapshot.model, snapshot.trees
  for batch in snapshot.learning:
    _, found = signals_lib.signals(
        model, trees, batch, np.uint32(0), curvature='rank1'
    )
    yield {s.axis: one for s, one in zip(model.sites, found, strict=True)}


def sums(
    snapshot: steps.Snapshot,
    refused: Mapping[str, str],
    measure: Callable[..., Any],
) -> Iterator[tuple[Site, Any]]:
  """Yields what a function measures at each site, summed over all batches.

  Args:
    snapshot: network and examples.
    refused: sites that are left out.
    measure: of the form of a site, its local trees and its signal.
  """
  sites = [s for s in snapshot.model.sites if s.axis not in refused]
  parts = {site.axis: [] for site in sites}
  for by_axis in signals_of(snapshot):
    for site in sites:
      local = snapshot.trees.local(site)
      parts[site.axis].append(measure(site.form, local, by_axis[site.axis]))
  for site in sites:
    yield site, signals_lib.add(parts[site.axis])


def rectified(h: jax.Array) -> jax.Array:
  """Approximates relu(h) by a positive and increasing function."""
  return jnp.maximum(h, _POSITIVE * jnp.exp(jnp.minimum(h, 0)))


def patches(
    form: sites_lib.Form, signal: signals_lib.Signal
) -> jax.Array:
  """Returns x of the only writer per position, (batch, ..., incoming)."""
  found = form.writers[0].layer.patches(signal.x[0])
  return found.reshape(*signal.h[0].shape[:-1], -1)
