"""Computes activations and two gradients of one batch for all sites.

One forward pass and one or two backward passes through the whole network serve
every channel of every site. Gradients are those of each example's own loss,
never of the mean over the batch.

Symbols: p the softmax, l the loss of an example, d = dl/dz its gradient at the
output z of a reader of a site. The curvature of a change dz is modelled per
example as Q = <d', dz>^2 with

  mc     d' is d for a label drawn from p; its mean over draws is exactly the
         generalised Gauss-Newton form dz'J'(diag p - pp')J dz
  rank1  d' = d / sqrt(exp(l) - 1), the exact rank-one form
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import tasks
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import base

CURVATURES = ('mc', 'rank1')
# Smaller losses count as this much in rank1; their examples would dominate.
SMALLEST_LOSS = 1e-3


@dataclasses.dataclass(frozen=True)
class Model:
  """A network and some of its sites: static arguments of programs.

  Attributes:
    chain: the whole network, unfused.
    sites: sites to look at.
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
    """Returns the kernel of a layer."""
    return at(self.weights, layer.path)['kernel']

  def has_bias(self, layer: taps.Layer) -> bool:
    """Returns true if a layer adds a bias."""
    return 'bias' in at(self.weights, layer.path)

  def factor(self, writer: sites_lib.End) -> jax.Array:
    """Returns the (units,) factors of a writer's norm; ones without a norm."""
    if writer.norm is None:
      kernel = self.kernel(writer.layer)
      return jnp.ones_like(kernel, shape=kernel.shape[-1:])
    variance = at(self.stats, writer.norm.path)['var']
    scale = at(self.weights, writer.norm.path)['scale']
    return scale * jax.lax.rsqrt(variance + writer.norm.epsilon)


@struct.dataclass
class Signal:
  """Activations and gradients of a batch at one site.

  Attributes:
    entered: input of the site's chain.
    x: input of each writer, (batch, ..., in).
    h: pre-activation of each writer, (batch, ..., units).
    slope: d at the output of each reader, (batch, ..., out).
    curvature: d' at the output of each reader, (batch, ..., out).
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
  losses = tasks.cross_entropy(logits, labels)
  probabilities = jax.nn.softmax(logits)
  one_hot = lambda labels: jax.nn.one_hot(
      labels, logits.shape[-1], dtype=logits.dtype
  )
  (slopes,) = pull(probabilities - one_hot(labels))
  if curvature == 'mc':
    sampled = jax.random.categorical(key, logits)
    (curvatures,) = pull(probabilities - one_hot(sampled))
  else:
    factor = jnp.sqrt(rank_one_coefficient(losses))
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


def rank_one_coefficient(losses: jax.Array) -> jax.Array:
  """Computes Q / s^2 of each example under the rank-one curvature."""
  return 1 / jnp.expm1(jnp.maximum(losses, SMALLEST_LOSS))


def at(tree: base.Tree, path: taps.Path) -> base.Tree:
  """Returns the leaves of one layer."""
  for name in path:
    tree = tree[name]
  return tree


def with_leaves(
    tree: base.Tree, path: taps.Path, **leaves: np.ndarray
) -> base.Tree:
  """Replaces leaves of one layer, each keeping its type."""
  if path:
    inner = with_leaves(tree[path[0]], path[1:], **leaves)
    return {**tree, path[0]: inner}
  return tree | {
      name: np.asarray(leaf, tree[name].dtype) for name, leaf in leaves.items()
  }


def model_of(architecture: architecture_lib.Architecture) -> Model:
  """Returns a network with all its sites.

  Raises:
    ValueError: if nothing can be split, or if an example has several labels.
  """
  if networks.label_shape(architecture):
    raise ValueError(
        'Estimates sample a label of each example from its likelihood, but '
        f'{architecture.family} predicts a label for each word or pixel; take '
        'another network.'
    )
  survey = sites_lib.survey(architecture)
  if not survey.sites:
    reasons = '; '.join(f'{axis}: {why}' for axis, why in survey.uncovered)
    raise ValueError(
        f'The network has no channels that can be split ({reasons or "none"}).'
    )
  return Model(taps.chain_of(networks.parts(architecture)), survey.sites)
