"""A trained network with frozen weights and examples, as a study needs it.

The statistics of norms are measured over the examples, which are not augmented.
Some training images are learned from and as many others judged by, as in a run,
and the hold-out besides. The test set is not read.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import steps
from autogrow_jax.run import trained

Batch = signals_lib.Batch
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Subject:
  """A trained network with examples.

  Attributes:
    architecture: architecture of the network.
    model: the network and all its sites.
    trees: arrays of the network; norms have the statistics of `learning`.
    learning: batches of training images to learn from.
    judging: as many batches of others.
    holdout: batches of the hold-out; empty if the run had none.
    seed: seed of all randomness.
  """

  architecture: architecture_lib.Architecture
  model: signals_lib.Model
  trees: signals_lib.Trees
  learning: tuple[Batch, ...]
  judging: tuple[Batch, ...]
  holdout: tuple[Batch, ...]
  seed: int

  def rng(self, number: int) -> np.random.Generator:
    """Returns the source of one of the study's draws."""
    return np.random.default_rng([self.seed, number])

  @property
  def examples(self) -> int:
    """Number of examples to learn from."""
    return signals_lib.count(self.learning)

  @property
  def channels(self) -> str:
    """Number of channels that can be split, in words."""
    sites = self.model.sites
    channels = sum(site.units for site in sites)
    return f'{channels} channels of {len(sites)} layers'

  def site(self, axis: str | None) -> sites_lib.Site:
    """Returns the site of an axis; the first one for None.

    Raises:
      ValueError: if the axis is no site.
    """
    sites = {site.axis: site for site in self.model.sites}
    if axis is None:
      return self.model.sites[0]
    if axis not in sites:
      raise ValueError(
          f'Layer {axis!r} of {self.architecture} cannot be split; there are '
          f'{", ".join(sites)}.'
      )
    return sites[axis]


def prepare(
    network: trained.TrainedNetwork,
    dataset: data.Dataset,
    *,
    examples: int | None,
    batch_size: int,
) -> Subject:
  """Prepares a study.

  Args:
    network: the network.
    dataset: data on which it was trained.
    examples: examples to learn from, and to judge by; None for up to 4096 and
      at most half of the training images. Fewer by a part of a batch where that
      makes all batches equal.
    batch_size: largest size of a batch.

  Returns:
    The subject.

  Raises:
    ValueError: if nothing can be split, or there are not so many examples.
  """
  model = signals_lib.model_of(network.architecture)
  available = len(dataset.train.labels)
  if examples is None:
    examples = min(steps.EXAMPLES, available // 2)
  if not 1 <= examples <= available // 2:
    raise ValueError(
        f'examples={examples}, and as many to judge by, must be from 1 to '
        f'{available // 2}: there are {available} training images.'
    )
  seed = network.config.seed
  order = np.random.default_rng(seed).permutation(available)
  batches = functools.partial(
      _batches, preprocessing=network.preprocessing, batch_size=batch_size
  )
  learning = batches(dataset.train, order[:examples])
  holdout = np.arange(len(dataset.holdout.labels))
  trees = signals_lib.trees_of(
      network.architecture, network.weights, network.stats
  )
  return Subject(
      architecture=network.architecture,
      model=model,
      trees=signals_lib.measured(model.chain, trees, learning),
      learning=learning,
      judging=batches(dataset.train, order[examples : 2 * examples]),
      holdout=batches(dataset.holdout, holdout),
      seed=seed,
  )


def _batches(
    split: data.Split,
    indices: np.ndarray,
    *,
    preprocessing: data.Preprocessing,
    batch_size: int,
) -> tuple[Batch, ...]:
  """Forms equal batches; fewer examples are left out than there are batches."""
  count = -(-len(indices) // batch_size)
  size = len(indices) // max(count, 1)
  batches = []
  for number in range(count):
    part = split.take(indices[number * size : (number + 1) * size])
    x = data.preprocess(part.images, preprocessing)
    batches.append((x, jnp.asarray(part.labels)))
  return tuple(batches)
