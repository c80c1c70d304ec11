"""Studies of learned splits and prunes on the network of a finished run.

  splits, prunes  what each was estimated to do to the loss, and what it does
  strategies      what splits of one layer gain, by how they were found

The weights are frozen and the statistics of norms measured over the examples,
which are not augmented. Some training images are learned from and as many
others judged by, as in a run, and the hold-out besides. Measured changes are
those of the network with that one split or prune alone. The test set is not
read.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import randomness
from autogrow_jax.run import trained
from autogrow_jax.methods import base
from autogrow_jax.methods.gauss_newton import estimates as estimates_lib
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.methods.gauss_newton import norms
from autogrow_jax.methods.gauss_newton import prunes as prunes_lib
from autogrow_jax.methods.gauss_newton import rivals
from autogrow_jax.methods.gauss_newton import signals as signals_lib
from autogrow_jax.methods.gauss_newton import sites as sites_lib
from autogrow_jax.methods.gauss_newton import splits as splits_lib
from autogrow_jax.methods.gauss_newton import trials
from autogrow_jax.networks import taps

Architecture = architecture_lib.Architecture
Model, Trees = signals_lib.Model, signals_lib.Trees
Batch, Split = splits_lib.Batch, splits_lib.Split
Say = Callable[[str], None]
_EXACT = lax.Precision.HIGHEST

STRATEGIES = ('gauss_newton', 'oracle', 'steepest', 'random', 'net2net')
# Of a line search, in units of the step that a strategy proposes, which is
# small.
STEPS = (1.0, 3.0, 10.0, 30.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A trained network with examples.

  Attributes:
    architecture: the network's.
    model: of all its sites.
    trees: its arrays, in which norms have the statistics of `learning`.
    learning: batches of training images to learn from.
    judging: as many of others.
    holdout: of the hold-out; empty if the run had none.
    key: of everything random.
  """

  architecture: Architecture
  model: Model
  trees: Trees
  learning: tuple[Batch, ...]
  judging: tuple[Batch, ...]
  holdout: tuple[Batch, ...]
  key: jax.Array

  @property
  def examples(self) -> int:
    """How many are learned from."""
    return sum(len(labels) for _, labels in self.learning)

  def site(self, axis: str | None) -> sites_lib.Site:
    """The site of an axis, or the first one.

    Raises:
      ValueError: it is none.
    """
    known = {site.axis: site for site in self.model.sites}
    if axis is None:
      return self.model.sites[0]
    if axis not in known:
      raise ValueError(
          f'Layer {axis!r} of {self.architecture} cannot be split; there are '
          f'{", ".join(known)}.'
      )
    return known[axis]


def subject(
    network: trained.TrainedNetwork,
    dataset: data.Dataset,
    *,
    examples: int | None,
    batch_size: int,
) -> Subject:
  """Prepares a study.

  Args:
    network: the network.
    dataset: on which it was trained.
    examples: to learn from, and as many to judge by; None for up to 4096 and at
      most half of the training images. Fewer by a part of a batch where that
      makes all batches equal.
    batch_size: largest size of a batch.

  Returns:
    The subject.

  Raises:
    ValueError: nothing can be split, or there are not so many examples.
  """
  model = method_lib.model_of(network.architecture)
  available = len(dataset.train.labels)
  if examples is None:
    examples = min(method_lib.EXAMPLES, available // 2)
  if not 1 <= examples <= available // 2:
    raise ValueError(
        f'examples={examples}, and as many to judge by, must be from 1 to '
        f'{available // 2}: there are {available} training images.'
    )
  key = randomness.stream(jax.random.key(network.config.seed), 'studies')
  order = np.asarray(
      jax.random.permutation(jax.random.fold_in(key, 0), available)
  )
  batches = functools.partial(
      _batches, preprocessing=network.preprocessing, batch_size=batch_size
  )
  learning = batches(dataset.train, order[:examples])
  holdout = np.arange(len(dataset.holdout.labels))
  trees = jax.device_put(Trees(network.weights, network.stats))
  return Subject(
      architecture=network.architecture,
      model=model,
      trees=norms.measured(model.chain, trees, learning),
      learning=learning,
      judging=batches(dataset.train, order[examples : 2 * examples]),
      holdout=batches(dataset.holdout, holdout),
      key=jax.random.fold_in(key, 1),
  )


@dataclasses.dataclass(frozen=True)
class Points:
  """Estimated and measured changes of the loss, nats.

  Attributes:
    candidates: (axis, unit) pairs.
    usable: (candidates,) whether a run might choose it.
    estimated: (candidates,) on the examples to judge by.
    measured: (candidates,) on the same.
    held_out: (candidates,) measured on the hold-out; None without one.
  """

  candidates: tuple[tuple[str, int], ...]
  usable: np.ndarray
  estimated: np.ndarray
  measured: np.ndarray
  held_out: np.ndarray | None


def splits(
    about: Subject,
    learn: splits_lib.LearnConfig,
    *,
    scale: float | None,
    samples: int,
    say: Say,
) -> Points:
  """Estimates what every learned split does, and measures it.

  Args:
    about: the network.
    learn: how splits are learned.
    scale: what to multiply each u with; None for the best scale of each by its
      estimate, within trust.
    samples: of the label of each example for the estimates.
    say: hears of progress.

  Returns:
    The points.
  """
  keys = [jax.random.fold_in(about.key, number) for number in range(3)]
  say(f'learning splits of {_channels(about.model)}')
  learned = splits_lib.learn(
      about.model, about.trees, about.learning, keys[0], learn
  )
  estimate = functools.partial(
      estimates_lib.estimate,
      about.model,
      about.trees,
      batches=about.judging,
      curvature=learn.curvature,
      samples=samples,
  )
  say('estimating them')
  estimates = estimate(splits=learned.splits, key=keys[1])
  failed = np.concatenate(
      [learned.codes[site.axis] != 0 for site in about.model.sites]
  )
  usable = estimates.usable & ~failed
  scales = estimates.best_scales()
  if scale is not None:
    scales = np.full(len(usable), scale)
  chosen = estimates_lib.scaled(learned.splits, estimates.candidates, scales)
  estimates = estimate(splits=chosen, key=keys[2])

  def measure(batches):
    return _by_site(
        about,
        lambda site: trials.true_changes(
            about.architecture, about.model, about.trees, chosen, site.axis,
            range(site.units), batches,
        ),
        'splits',
        say,
    )

  return Points(
      estimates.candidates,
      usable & estimates.usable,
      estimates.changes(),
      measure(about.judging),
      measure(about.holdout) if about.holdout else None,
  )


def prunes(
    about: Subject, *, compensation: str, curvature: str, say: Say
) -> Points:
  """Estimates what every prune does, and measures it; see `splits`."""
  say(f'estimating prunes of {_channels(about.model)}')
  estimates = prunes_lib.estimate(
      about.model,
      about.trees,
      about.learning,
      jax.random.fold_in(about.key, 3),
      judging=about.judging,
      compensation=compensation,
      curvature=curvature,
  )

  def measure(batches):
    return _by_site(
        about,
        lambda site: prune_changes(
            about.model, about.trees, site, estimates.weights[site.axis],
            batches,
        ),
        'prunes',
        say,
    )

  return Points(
      estimates.candidates,
      estimates.usable,
      estimates.changes,
      measure(about.judging),
      measure(about.holdout) if about.holdout else None,
  )


def prune_changes(
    model: Model,
    trees: Trees,
    site: sites_lib.Site,
    weights: np.ndarray,
    batches: Sequence[Batch],
) -> np.ndarray:
  """How much the loss changes if one unit is pruned, for each one alone.

  Args:
    model: the network.
    trees: its arrays.
    site: whose units.
    weights: (units, ...) what makes up for each, see `prunes.Prunes`.
    batches: the examples.

  Returns:
    (units,) change of the mean loss, nats, float64.
  """
  weights = jnp.asarray(weights, jnp.float32)
  total = sum(
      np.asarray(_prune_changes(model, site, trees, weights, *batch), 'f8')
      for batch in batches
  )
  return total / _count(batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prune_changes(model, site, trees, weights, x, labels):
  """Per unit, the sum over examples of the change of their loss."""

  def losses(trees):
    logits = taps.run(model.chain, trees.weights, trees.stats, x).output
    return base.cross_entropy(logits, labels)

  before = losses(trees)

  def change(unit_and_weights):
    return jnp.sum(losses(_pruned(site, trees, *unit_and_weights)) - before)

  return lax.map(change, (jnp.arange(site.units), weights))


def _pruned(site, trees, unit, weights):
  """The network in which nothing reads a unit, and others make up for it."""
  per_reader = weights.reshape(len(site.readers), site.units + 1)
  for reader, w in zip(site.readers, per_reader, strict=True):
    kernel = trees.kernel(reader.layer)
    own = jnp.take(kernel, unit, axis=-2)
    shift = w[-1] * own.reshape(-1, own.shape[-1]).sum(0)
    change = jnp.einsum('...o,u->...uo', own, w[:-1], precision=_EXACT)
    trees = _with_leaf(trees, 'weights', reader.layer, 'kernel', change)
    if reader.norm is not None:
      trees = _with_leaf(trees, 'stats', reader.norm, 'mean', -shift)
    elif trees.has_bias(reader.layer):
      trees = _with_leaf(trees, 'weights', reader.layer, 'bias', shift)
  return trees


def _with_leaf(trees, kind, layer, name, change):
  """Arrays in which one leaf of a layer is changed."""

  def changed(tree, path):
    if not path:
      return tree + change
    return {**tree, path[0]: changed(tree[path[0]], path[1:])}

  tree = changed(getattr(trees, kind), (*layer.path, name))
  return trees.replace(**{kind: tree})


@dataclasses.dataclass(frozen=True)
class Decreases:
  """By how much the loss falls, nats.

  Attributes:
    learning: (units,) on the images that were learned from.
    judging: (units,) on the others.
  """

  learning: np.ndarray
  judging: np.ndarray


def strategies(
    about: Subject,
    learn: splits_lib.LearnConfig,
    site: sites_lib.Site,
    *,
    units: int,
    tries: int,
    say: Say,
) -> dict[str, Decreases]:
  """What the split of each unit of a layer gains, by how it was found.

  All see the same images; 'gauss_newton' takes the scale that its model says is
  best on those judged by, as a run does. 'oracle' is optimised on the true loss
  with that split alone, from the same start, by as many steps as Adam would
  take on the model. The others know no step: 'steepest' and 'random' take the
  best of `STEPS` by the true loss, and 'random' the best of several directions.

  Args:
    about: the network.
    learn: how splits are learned by 'gauss_newton'; epochs and learning rate
      are those of 'oracle', too.
    site: the layer.
    units: how many, from the first.
    tries: directions of 'random'.
    say: hears of progress.

  Returns:
    For each of `STRATEGIES` that can split the layer, by how much the loss
    falls.
  """
  about = dataclasses.replace(
      about, model=dataclasses.replace(about.model, sites=(site,))
  )
  result = {}
  for number, strategy in enumerate(STRATEGIES):
    say(f'{strategy}: splits of {units} channels of {site.axis}')
    if strategy == 'gauss_newton':
      split = _by_model(about, learn)
    elif strategy == 'oracle':
      split = _by_truth(about, learn, units)
    else:
      key = jax.random.fold_in(about.key, 10 + number)
      proposals = [
          rivals.propose(
              strategy, about.architecture, about.model, about.trees,
              about.learning, jax.random.fold_in(key, number),
          )
          for number in range(tries if strategy == 'random' else 1)
      ]
      if refused := proposals[0].refused:
        say(f'{strategy} cannot split it: {refused[0][1]}')
        continue
      steps = STEPS[:1] if strategy == 'net2net' else STEPS
      split = _best(about, proposals, steps, units)
    result[strategy] = Decreases(
        _decreases(about, split, units, about.learning),
        _decreases(about, split, units, about.judging),
    )
  return result


def _decreases(
    about: Subject, split: Split, units: int, batches: Sequence[Batch]
) -> np.ndarray:
  """(units,) by which each split alone lowers the loss; of the one site."""
  (site,) = about.model.sites
  return -trials.true_changes(
      about.architecture, about.model, about.trees, {site.axis: split},
      site.axis, range(units), batches,
  )


def _by_model(about: Subject, learn: splits_lib.LearnConfig) -> Split:
  """Learned splits, each at the scale that is best on other images."""
  keys = [jax.random.fold_in(about.key, number) for number in range(2)]
  learned = splits_lib.learn(
      about.model, about.trees, about.learning, keys[0], learn
  )
  estimates = estimates_lib.estimate(
      about.model, about.trees, learned.splits, about.judging, keys[1],
      curvature=learn.curvature,
  )
  scaled = estimates_lib.scaled(
      learned.splits, estimates.candidates, estimates.best_scales()
  )
  (site,) = about.model.sites
  return scaled[site.axis]


def _by_truth(
    about: Subject, learn: splits_lib.LearnConfig, units: int
) -> Split:
  """Splits that were optimised on the true loss, from where `learn` starts."""
  (site,) = about.model.sites
  start_key = jax.random.fold_in(jax.random.fold_in(about.key, 0), 0)
  return trials.oracle(
      about.architecture,
      about.model,
      about.trees,
      site.axis,
      range(units),
      about.learning,
      start_key,
      steps=learn.epochs * len(about.learning),
      learning_rate=learn.learning_rate,
  ).split


def _best(
    about: Subject,
    proposals: Sequence[rivals.Proposal],
    steps: Sequence[float],
    units: int,
) -> Split:
  """The best of some proposals and steps, for each unit, by the true loss."""
  (site,) = about.model.sites
  best, found = np.full(units, -np.inf), None
  for proposal in proposals:
    proposed = proposal.splits[site.axis]
    for step in steps:
      split = proposed.replace(
          u=jax.tree.map(lambda u, step=step: step * u, proposed.u)
      )
      decreases = _decreases(about, split, units, about.learning)
      better = np.zeros(site.units, bool)
      better[:units] = decreases > best
      best = np.maximum(best, decreases)
      found = split if found is None else _where(better, split, found)
  return found


def _where(units: np.ndarray, one: Split, other: Split) -> Split:
  """Some units of one split, and all others of another."""
  pick = lambda rows, others: jnp.where(units[:, None], rows, others)
  u = pick(splits_lib.incoming(one.u), splits_lib.incoming(other.u))
  e = pick(splits_lib.outgoing(one.e), splits_lib.outgoing(other.e))
  return Split(
      splits_lib.as_incoming(u, one.u), splits_lib.as_outgoing(e, one.e)
  )


def _batches(
    split: data.Split,
    indices: np.ndarray,
    *,
    preprocessing: data.Preprocessing,
    batch_size: int,
) -> tuple[Batch, ...]:
  """Examples in equal batches; fewer are left out than there are batches."""
  count = -(-len(indices) // batch_size)
  size = len(indices) // max(count, 1)
  batches = []
  for number in range(count):
    part = split.take(indices[number * size : (number + 1) * size])
    x = data.preprocess(part.images, preprocessing)
    batches.append((x, jnp.asarray(part.labels)))
  return tuple(batches)


def _by_site(
    about: Subject,
    measure: Callable[[sites_lib.Site], np.ndarray],
    kind: str,
    say: Say,
) -> np.ndarray:
  """A measure of all units, one site after the other."""
  measured = []
  for number, site in enumerate(about.model.sites, start=1):
    say(
        f'measuring {kind} of {site.axis}, {number} of '
        f'{len(about.model.sites)} layers'
    )
    measured.append(measure(site))
  return np.concatenate(measured)


def _channels(model: Model) -> str:
  channels = sum(site.units for site in model.sites)
  return f'{channels} channels of {len(model.sites)} layers'


def _count(batches: Sequence[Batch]) -> int:
  return sum(len(labels) for _, labels in batches)
