"""What one batch says about all sites: activations and two gradients.

One forward pass and one or two backward passes through the whole network serve
every channel of every site. Gradients are of each example's own loss, never of
the mean over the batch.

Symbols: p the softmax, y the label, l the loss of an example, d = dl/dz its
gradient at the output z of a reader of a site. The curvature of a change dz is
modelled per example as Q = <d', dz>^2 with

  mc           d' as d, for a label drawn from p; its mean over that draw is the
               generalised Gauss-Newton form dz'J'(diag p - pp')J dz exactly
  rank1-ce     d' = d / sqrt(exp(l) - 1), the exact rank-one form
  rank1-sqrt   d' = d / sqrt(2 l), the Gauss-Newton form of the residual
               sqrt(2 l)
  rank1-cal    as rank1-sqrt, times a factor per site that is measured with mc
  emp-fisher   d' = d
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from autogrow_jax.methods import base as methods_base
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.networks import base
from autogrow_jax.networks import taps

CURVATURES = ('mc', 'rank1-ce', 'rank1-sqrt', 'rank1-cal', 'emp-fisher')
# Below it an example's loss counts as this much, or it would outweigh all.
SMALLEST_LOSS = 1e-3


@dataclasses.dataclass(frozen=True)
class Model:
  """What programs are compiled for.

  Attributes:
    chain: the whole network, unfused.
    sites: those to look at.
  """

  chain: tuple[base.Segment, ...]
  sites: tuple[sites_lib.Site, ...]


@struct.dataclass
class Trees:
  """The arrays of a network.

  Attributes:
    weights: `{part: parameters}`.
    stats: `{part: statistics}`.
  """

  weights: base.Tree
  stats: base.Tree

  def kernel(self, layer: taps.Layer) -> jax.Array:
    """The kernel of a layer."""
    return at(self.weights, layer.path)['kernel']

  def has_bias(self, layer: taps.Layer) -> bool:
    """Whether a layer adds a bias."""
    return 'bias' in at(self.weights, layer.path)

  def factor(self, writer: sites_lib.End) -> jax.Array:
    """(units,) by which a writer's norm multiplies; ones without a norm."""
    if writer.norm is None:
      kernel = self.kernel(writer.layer)
      return jnp.ones_like(kernel, shape=kernel.shape[-1:])
    variance = at(self.stats, writer.norm.path)['var']
    scale = at(self.weights, writer.norm.path)['scale']
    return scale * jax.lax.rsqrt(variance + writer.norm.epsilon)


@struct.dataclass
class Signal:
  """What a batch says about one site.

  Attributes:
    entered: what enters the site's chain.
    x: what each writer reads, (batch, ..., in).
    h: the pre-activation of each writer, (batch, ..., units).
    slope: d, (batch, ..., out) at the output of each reader.
    curvature: d', likewise.
  """

  entered: jax.Array
  x: tuple[jax.Array, ...]
  h: tuple[jax.Array, ...]
  slope: tuple[jax.Array, ...]
  curvature: tuple[jax.Array, ...]


def signals(
    model: Model,
    trees: Trees,
    x: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    curvature: str,
) -> tuple[jax.Array, dict[str, Signal]]:
  """Runs the network forward once, and backward once or twice.

  Args:
    model: the network and its sites.
    trees: its arrays.
    x: (batch, height, width, channel), preprocessed.
    labels: (batch,).
    key: of the sampled labels.
    curvature: one of `CURVATURES`.

  Returns:
    The losses (batch,) in nats, and the signal of each site by its axis.
  """

  def forward(shifts):
    changes = {
        path: lambda z, shift=shift: z + shift for path, shift in shifts.items()
    }
    tapped = taps.run(
        model.chain, trees.weights, trees.stats, x, changes=changes
    )
    return tapped.output, tapped

  shapes = jax.eval_shape(lambda: forward({})[1].outputs)
  readers = [
      reader.layer.path for site in model.sites for reader in site.readers
  ]
  zeros = {path: jnp.zeros_like(shapes[path]) for path in readers}
  logits, pull, tapped = jax.vjp(forward, zeros, has_aux=True)
  losses = methods_base.cross_entropy(logits, labels)
  probabilities = jax.nn.softmax(logits)
  one_hot = lambda labels: jax.nn.one_hot(
      labels, logits.shape[-1], dtype=logits.dtype
  )
  (slopes,) = pull(probabilities - one_hot(labels))
  if curvature == 'mc':
    sampled = jax.random.categorical(key, logits)
    (curvatures,) = pull(probabilities - one_hot(sampled))
  else:
    factor = jnp.sqrt(coefficient(losses, curvature))
    curvatures = {
        path: slope * factor.reshape((-1,) + (1,) * (slope.ndim - 1))
        for path, slope in slopes.items()
    }
  return losses, {
      site.axis: Signal(
          entered=tapped.entered[site.chain[0].key],
          x=tuple(tapped.inputs[end.layer.path] for end in site.writers),
          h=tuple(tapped.outputs[end.top] for end in site.writers),
          slope=tuple(slopes[end.layer.path] for end in site.readers),
          curvature=tuple(curvatures[end.layer.path] for end in site.readers),
      )
      for site in model.sites
  }


def coefficient(losses: jax.Array, curvature: str) -> jax.Array:
  """Q / s^2 of each example under a rank-one curvature."""
  losses = jnp.maximum(losses, SMALLEST_LOSS)
  return {
      'rank1-ce': lambda: 1 / jnp.expm1(losses),
      'rank1-sqrt': lambda: 1 / (2 * losses),
      'rank1-cal': lambda: 1 / (2 * losses),
      'emp-fisher': lambda: jnp.ones_like(losses),
  }[curvature]()


def check_curvature(curvature: str) -> None:
  """Raises a ValueError unless there is such a curvature."""
  if curvature not in CURVATURES:
    raise ValueError(
        f'curvature is one of {", ".join(CURVATURES)}, got {curvature!r}.'
    )


def at(tree: base.Tree, path: taps.Path) -> base.Tree:
  """The leaves of one layer."""
  for name in path:
    tree = tree[name]
  return tree


def model_of(
    survey: sites_lib.Survey, chain: tuple[base.Segment, ...]
) -> Model:
  """The model of all sites of a network."""
  if not survey.sites:
    reasons = '; '.join(f'{axis}: {why}' for axis, why in survey.uncovered)
    raise ValueError(
        f'The network has no channels that can be split ({reasons or "none"}).'
    )
  return Model(chain, survey.sites)
