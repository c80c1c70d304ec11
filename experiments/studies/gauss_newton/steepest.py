"""Splitting steepest descent (Liu et al. 2019).

u points along the eigenvector of the smallest eigenvalue of each channel's
splitting matrix S, (incoming, incoming): the mean over examples of the sum over
positions of g relu''(h) f^2 x x', with g the gradient of an example's loss at
the output of the site's ReLU, f the norm's factor, and relu'' that of a
softplus. The curvature of ReLUs behind the site's first one is left out.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import costs
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import steps

from . import by_gain
from . import common

# Sharpness of the softplus log(1 + exp(beta h)) / beta in place of ReLU.
BETA = 3.0


@dataclasses.dataclass(frozen=True)
class Steepest(by_gain.RankingByGain):
  """Splits by the smallest eigenvalue lambda: gain -lambda |u|^2 / 2.

  Attributes:
    length: |u| in units of |w|.
  """

  length: float = 1e-2

  def __post_init__(self):
    common.check_positive(self)

  def rank(self, snapshot: steps.Snapshot) -> by_gain.Ranked:
    model, trees = snapshot.model, snapshot.trees
    refused = common.refused(model)
    count, found, macs = signals_lib.count(snapshot.learning), {}, 0
    summed = common.sums(snapshot, refused, _splitting_matrices)
    for site, (matrices, is_rectified) in summed:
      if is_rectified < len(snapshot.learning):
        refused[site.axis] = 'what lies behind it does not begin with a ReLU'
        continue
      found[site.axis] = self._ranked(site, trees, matrices / count)
      macs += site.units * site.incoming**2
    step = (1 + costs.BACKWARD_OVER_FORWARD) * costs.macs(snapshot.architecture)
    return common.ranked(
        snapshot, found, (1 + macs / step) * count, refused=refused
    )

  def _ranked(self, site, trees, matrices):
    finite = np.isfinite(matrices).all((1, 2))
    matrices = np.where(finite[:, None, None], matrices, 0)
    values, vectors = np.linalg.eigh(matrices)
    values = values[:, 0]
    weights = np.linalg.norm(common.incoming(site, trees), axis=-1)
    gains = -np.square(self.length * weights) * values / 2
    split = common.relative(site, trees, vectors[..., 0], self.length)
    return split, np.where(finite & (values < 0), gains, np.nan)


@functools.partial(jax.jit, static_argnums=0)
def _splitting_matrices(form, local, signal):
  """Sums S over a batch, and tests that T(h) is T(relu(h))."""
  (writer,), (h,) = form.writers, signal.h
  read = lambda h: form.read(local.weights, local.stats, signal.entered, (h,))
  is_rectified = jnp.stack([
      jnp.array_equal(one, other, equal_nan=True)
      for h in (h, -h)
      for one, other in zip(read(h), read(jax.nn.relu(h)), strict=True)
  ]).all()

  def written(h):
    return tuple(
        reader.layer.linear(a, kernel)
        for reader, a, kernel in zip(
            form.readers, read(h), local.kernels(form.readers), strict=True
        )
    )

  # T is differentiated at a nearby positive place with the maxima of h.
  (gradient,) = jax.vjp(written, common.rectified(h))[1](signal.slope)
  gate = jax.nn.sigmoid(BETA * h)
  density = gradient * BETA * gate * (1 - gate)
  if writer.norm is not None:
    density *= local.factor(writer).reshape((1,) * (h.ndim - 1) + (-1,)) ** 2
  patches = common.patches(form, signal)
  patches = patches.reshape(-1, patches.shape[-1])
  return jax.lax.map(
      lambda weights: (weights[:, None] * patches).T @ patches,
      density.reshape(-1, h.shape[-1]).T,
  ), is_rectified
