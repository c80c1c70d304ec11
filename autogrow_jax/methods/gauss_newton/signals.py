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

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import layers
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax.methods.gauss_newton import padding
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import taps
from autogrow_jax.networks import base

Architecture = architecture_lib.Architecture
Batch = tuple[jax.Array, jax.Array]
at = sites_lib.at

CURVATURES = ('mc', 'rank1')
# Smaller losses count as this much in rank1; their examples would dominate.
SMALLEST_LOSS = 1e-3


@struct.dataclass
class Trees:
  """The arrays of a network, or of the part around a site.

  Attributes:
    weights: `{part: parameters}`.
    stats: `{part: statistics}`.
  """

  weights: base.Tree
  stats: base.Tree

  def local(self, site: sites_lib.Site) -> 'Trees':
    """Returns the arrays of a site's form."""
    return Trees(*(
        {str(i): tree[name] for i, name in enumerate(site.parts)}
        for tree in (self.weights, self.stats)
    ))

  def kernels(self, ends: Sequence[sites_lib.End]) -> tuple[jax.Array, ...]:
    """Returns the kernels of some layers."""
    return tuple(at(self.weights, end.layer.path)['kernel'] for end in ends)

  def takes_constant(self, end: sites_lib.End) -> bool:
    """Returns true if a norm or bias can take a constant."""
    leaves = at(self.weights, end.layer.path)
    return end.norm is not None or 'bias' in leaves

  def factor(self, writer: sites_lib.End) -> jax.Array:
    """Returns the (units,) factors of a writer's norm; (1,) of 1 without."""
    if writer.norm is None:
      return jnp.ones(1)
    variance = at(self.stats, writer.norm.path)['var']
    scale = at(self.weights, writer.norm.path)['scale']
    return scale * jax.lax.rsqrt(variance + writer.norm.epsilon)


@dataclasses.dataclass(frozen=True)
class Model:
  """A network and some of its sites: static arguments of programs.

  Attributes:
    chain: the whole network, unfused and padded.
    sites: sites to look at.
  """

  chain: tuple[base.Segment, ...]
  sites: tuple[sites_lib.Site, ...]

  @property
  def candidates(self) -> tuple[tuple[str, int], ...]:
    """(axis, unit) of all units of all sites."""
    return tuple(
        (site.axis, unit) for site in self.sites for unit in range(site.units)
    )


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


def model_of(architecture: Architecture) -> Model:
  """Returns a padded network with all its sites.

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
  return Model(chain_of(architecture), survey.sites)


def chain_of(architecture: Architecture) -> tuple[base.Segment, ...]:
  """Returns the padded chain of a network."""
  return taps.chain_of(networks.parts(padding.padded(architecture)))


def trees_of(
    architecture: Architecture, weights: base.Tree, stats: base.Tree
) -> Trees:
  """Returns the padded arrays of a network, on the device."""
  tree = {'weights': weights, 'network': stats}
  tree = padding.pad(tree, padding.padded(architecture))
  return jax.device_put(Trees(tree['weights'], tree['network']))


def signals(
    model: Model, trees: Trees, batch: Batch, seed: Any, *, curvature: str
) -> tuple[jax.Array, tuple[Signal, ...]]:
  """Runs the network forward once, and backward once or twice.

  Args:
    model: the network.
    trees: its arrays.
    batch: examples.
    seed: seed of sampled labels, uint32.
    curvature: one of `CURVATURES`.

  Returns:
    The losses (batch,) in nats, and the signal of each site.
  """
  nodes = tuple(
      (
          site.parts[0],
          *(
              tuple(site.path(path) for path in paths)
              for paths in (
                  [end.layer.path for end in site.form.writers],
                  [end.top for end in site.form.writers],
                  [end.layer.path for end in site.form.readers],
              )
          ),
      )
      for site in model.sites
  )
  return _signals(model.chain, nodes, curvature, trees, *batch, seed)


@taps.program(0, 1, 2)
def _signals(chain, nodes, curvature, trees, x, labels, seed):
  """Computes losses and signals."""

  def forward(shifts):
    changes = {
        path: lambda z, shift=shift: z + shift for path, shift in shifts.items()
    }
    tapped = taps.run(chain, trees.weights, trees.stats, x, changes=changes)
    return tapped.output, tapped

  shapes = jax.eval_shape(lambda: forward({})[1].outputs)
  readers = [path for *_, paths in nodes for path in paths]
  zeros = {path: jnp.zeros_like(shapes[path]) for path in readers}
  logits, pull, tapped = jax.vjp(forward, zeros, has_aux=True)
  losses = tasks.cross_entropy(logits, labels)
  one_hot = lambda labels: jax.nn.one_hot(
      labels, logits.shape[-1], dtype=logits.dtype
  )
  error = lambda labels: jax.nn.softmax(logits) - one_hot(labels)
  if curvature == 'mc':
    drawn = jax.random.categorical(jax.random.key(seed), logits)
    both = jax.vmap(pull)(jnp.stack([error(labels), error(drawn)]))[0]
    slopes, curvatures = ({p: g[i] for p, g in both.items()} for i in range(2))
  else:
    (slopes,) = pull(error(labels))
    factor = jnp.sqrt(rank_one_coefficient(losses))
    curvatures = {
        path: slope * factor.reshape((-1,) + (1,) * (slope.ndim - 1))
        for path, slope in slopes.items()
    }
  collect = lambda found, paths: tuple(found[path] for path in paths)
  return losses, tuple(
      Signal(
          entered=tapped.entered[part],
          x=collect(tapped.inputs, inputs),
          h=collect(tapped.outputs, tops),
          slope=collect(slopes, readers),
          curvature=collect(curvatures, readers),
      )
      for part, inputs, tops, readers in nodes
  )


def rank_one_coefficient(losses: jax.Array) -> jax.Array:
  """Computes Q / s^2 of each example under the rank-one curvature."""
  return 1 / jnp.expm1(jnp.maximum(losses, SMALLEST_LOSS))


def mean_loss(
    chain: tuple[base.Segment, ...], trees: Trees, batches: Sequence[Batch]
) -> float:
  """Computes the mean cross-entropy in evaluation mode, nats."""
  sums = [_forward(chain, trees, *batch, False)[0] for batch in batches]
  return sum(map(float, sums)) / count(batches)


def measured(
    chain: tuple[base.Segment, ...], trees: Trees, batches: Sequence[Batch]
) -> Trees:
  """Replaces the statistics of norms by those of some batches of equal size.

  Each batch runs in training mode, so that a norm sees the outputs of the
  layers before it in that mode; statistics are then pooled.
  """
  total = add(_forward(chain, trees, *batch, True)[1] for batch in batches)
  stats = state_lib.to_host(trees.stats)
  for path, (mean, square) in total.items():
    mean, square = mean / len(batches), square / len(batches)
    norm = at(stats, path)
    norm['mean'] = mean.astype(norm['mean'].dtype)
    norm['var'] = np.maximum(square - mean**2, 0).astype(norm['var'].dtype)
  return trees.replace(stats=jax.device_put(stats))


@taps.program(0)
def _forward(chain, trees, x, labels, train):
  """Sums losses; and returns means and mean squares of norms' inputs."""
  moments = {}

  def note(path, module, x, y):
    del y
    if isinstance(module, layers.Norm):
      x = x.reshape(-1, x.shape[-1])
      moments[path] = x.mean(0), jnp.square(x).mean(0)

  tapped = taps.run(
      chain, trees.weights, trees.stats, x, on_layer=note, train=train
  )
  return tasks.cross_entropy(tapped.output, labels).sum(), moments


def count(batches: Sequence[Batch]) -> int:
  """Counts the examples of some batches."""
  return sum(len(labels) for _, labels in batches)


def add(parts: Iterable[Any]) -> Any:
  """Adds trees on the host, in float64."""
  total = None
  for part in parts:
    part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
    total = part if total is None else jax.tree.map(np.add, total, part)
  return total
