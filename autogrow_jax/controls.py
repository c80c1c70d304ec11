"""Controls: what a policy finds where there is nothing to be found.

`decisions` and `floor` let it see an accuracy that never changes, `null_band`
one that is noise alone. A depth that a policy finds there is no evidence about
any data.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import itertools

import numpy as np

from autogrow_jax import paired
from autogrow_jax import policies


@dataclasses.dataclass(frozen=True)
class Floor:
  """What a policy finds if nothing ever improves.

  Attributes:
    depths: sub-modules per stage.
    epochs: growing epochs.
  """

  depths: tuple[int, ...]
  epochs: int


def floor(policy: policies.RoundRobin, *, trained: bool = False) -> Floor:
  """Runs a policy on a constant accuracy, of the same images in every epoch.

  No stop can happen before the window J is full, so a periodic policy reaches
  about 1 + J / (K M) sub-modules per stage on *any* data: a network found there
  says nothing about the data. A sequential one does so, too, since an untrained
  network gains until its start has left the window. From a trained network it
  closes one stage at each check from the second on.

  Args:
    policy: as it is before its first epoch.
    trained: whether the network is as good from the start. If not, nothing is
      right in the first interval of a sequential policy; the other policies
      measure their first gains from zero anyway.

  Returns:
    The depths found, and the growing epochs spent.
  """
  end = _last(policy, decisions(policy, trained=trained))
  return Floor(end.depths, end.epoch)


def decisions(
    policy: policies.Policy, *, trained: bool = False
) -> Iterator[tuple[policies.Policy, policies.Decision]]:
  """What a policy decides while accuracy never moves; ends at its floor.

  Args:
    policy: as it is before its first epoch.
    trained: see `floor`.

  Yields:
    (policy, decision) after each growing epoch; nothing for a fixed one.
  """
  if isinstance(policy, policies.Fixed):
    return
  total = 1000  # Enough for a rise of all of them to be significant.
  everything = total, paired.pack_hits(np.ones(total, bool))
  yield from _run(
      policy, itertools.repeat(everything), total=total, trained=trained
  )


def next_growth(
    policy: policies.Policy, observation: policies.Observation
) -> policies.Decision | None:
  """What a policy decides to grow next, if accuracy does not move before.

  Policies are values, so that their future can be rehearsed.

  Args:
    policy: after an observation.
    observation: that one.

  Returns:
    The first decision to grow; None if there is none within 1,000 epochs.
  """
  for _ in range(1000):
    if policy.finished:
      return None
    observation = dataclasses.replace(
        observation, epoch=observation.epoch + 1, step=observation.step + 1
    )
    policy, decision = policy.update(observation)
    if decision.action == 'grow':
      return decision
  return None


@dataclasses.dataclass(frozen=True)
class Percentiles:
  """The 10th, 50th and 90th percentile of a count over runs."""

  p10: int
  p50: int
  p90: int


@dataclasses.dataclass(frozen=True)
class NullBand:
  """What a policy finds in pure noise.

  Attributes:
    runs: number of runs behind the percentiles.
    sigma: standard deviation of an epoch's accuracy, percentage points.
    epochs: growing epochs.
    submodules: sub-modules of the found network, all stages together.
    depths: sub-modules of each stage.
  """

  runs: int
  sigma: float
  epochs: Percentiles
  submodules: Percentiles
  depths: tuple[Percentiles, ...]


def null_band(
    policy: policies.RoundRobin,
    *,
    total: int,
    accuracy: float,
    runs: int | None = None,
    seed: int = 0,
    sigma: float | None = None,
    common_sigma: float = 0.0,
    trained: bool = False,
) -> NullBand:
  """Runs a policy on noise around a constant accuracy: the null model.

  It controls for depth that the policy finds by itself. A running maximum of
  noisy accuracies keeps creeping upwards although nothing is learned, each
  small record postpones the stop, and a periodic policy grows at every check
  meanwhile. So a growing phase of a length within this band could have come
  from evaluation noise alone, and its depth is no evidence that the data asked
  for depth. With K = 3, J = 100 and M = 3 the median is about 15 to 19
  sub-modules per stage for sigma from 0.1 to 1 percentage points, and 13 of the
  20 growing phases of Wen et al. 2020, Table 4, lie within the band. The null
  model has no learning curve, so it is if anything short. Report it beside
  every found network, together with `floor`.

  Single predictions, which a sequential policy is shown, are all alike here.
  Real ones are not: most are right or wrong in every epoch, fewer change, and
  noise that is common to all weighs more; see `policies.Sequential`.

  Args:
    policy: as it is before its first epoch.
    total: size of the selection set, in predictions.
    accuracy: probability that a prediction is correct, 0 to 1. Each epoch draws
      its predictions afresh, independently of one another.
    runs: number of runs; by default 400, but 200 for a policy that is shown
      single predictions, and beyond 5,000 of them fewer, down to 40.
    seed: of the noise.
    sigma: percentage points; if given, the counts are normal with this standard
      deviation instead, rounded and clipped to 0..total. Not for a policy that
      is shown single predictions.
    common_sigma: percentage points; if positive, the accuracy itself is normal
      with this standard deviation around `accuracy`, drawn anew at each epoch
      and clipped: the noise of training, common to all predictions.
    trained: see `floor`.

  Returns:
    Percentiles over the runs. Each is a value that some run took.
  """
  _require_noise(total, accuracy, sigma, common_sigma)
  with_hits = isinstance(policy, policies.Sequential)
  if with_hits and sigma is not None:
    raise ValueError(
        'Sigma is of counts, and a sequential policy needs single predictions; '
        'give common_sigma.'
    )
  if runs is None:
    runs = min(200, max(40, 1_000_000 // total)) if with_hits else 400
  if type(runs) is not int or runs < 1:
    raise ValueError(f'The number of runs is {runs!r}; it must be at least 1.')
  rng = np.random.default_rng(seed)
  if with_hits:
    noise = _hits(rng, total, accuracy, common_sigma)
  else:
    noise = _counts(rng, total, accuracy, sigma, common_sigma)
  found = [
      _last(policy, _run(policy, noise, total=total, trained=trained))
      for _ in range(runs)
  ]
  if sigma is None:
    sigma = 100 * (accuracy * (1 - accuracy) / total) ** 0.5
  return NullBand(
      runs=runs,
      sigma=(sigma**2 + common_sigma**2) ** 0.5 if common_sigma else sigma,
      epochs=_percentiles([end.epoch for end in found]),
      submodules=_percentiles([sum(end.depths) for end in found]),
      depths=tuple(
          _percentiles(list(stage)) for stage in zip(*(f.depths for f in found))
      ),
  )


def _run(
    policy: policies.Policy,
    evaluations: Iterable[tuple[int, bytes | None]],
    *,
    total: int,
    trained: bool,
) -> Iterator[tuple[policies.Policy, policies.Decision]]:
  """Feeds a policy correct predictions and their hits until it is finished."""
  if policy.epoch:
    raise ValueError(
        f'The policy has seen {policy.epoch} epochs; it must be given as it '
        'was before its first.'
    )
  if isinstance(policy, policies.EveryEpochs) and policy.max_epochs is None:
    raise ValueError(
        f'A policy that grows every {policy.interval} epochs never ends by '
        'itself; give its max_epochs.'
    )
  if isinstance(policy, policies.Sequential) and not trained:
    nothing = 0, paired.pack_hits(np.zeros(total, bool))
    untrained = itertools.repeat(nothing, policy.interval)
    evaluations = itertools.chain(untrained, evaluations)
  evaluations = iter(evaluations)
  while not policy.finished:
    correct, hits = next(evaluations)
    epoch = policy.epoch + 1
    policy, decision = policy.update(
        policies.Observation(
            epoch=epoch,
            step=epoch,
            correct=correct,
            total=total,
            loss_sum=0.0,
            cost=0,
            hits=hits,
        )
    )
    yield policy, decision


def _last(
    policy: policies.RoundRobin,
    decided: Iterable[tuple[policies.RoundRobin, policies.Decision]],
) -> policies.RoundRobin:
  """A policy at its end, which may be its start."""
  for policy, _ in decided:
    pass
  return policy


def _counts(
    rng: np.random.Generator,
    total: int,
    accuracy: float,
    sigma: float | None,
    common_sigma: float,
) -> Iterator[tuple[int, None]]:
  """Endless epochs of counts; drawn by the thousand, for speed."""
  while True:
    if common_sigma:
      accuracies = rng.normal(accuracy, common_sigma / 100, size=1024)
      accuracies = np.clip(accuracies, 0, 1)
    else:
      accuracies = accuracy
    if sigma is None:
      counts = rng.binomial(total, accuracies, size=1024)
    else:
      counts = rng.normal(accuracies * total, sigma / 100 * total, size=1024)
      counts = np.clip(np.rint(counts), 0, total).astype(np.int64)
    for count in counts.tolist():
      yield count, None


def _hits(
    rng: np.random.Generator, total: int, accuracy: float, common_sigma: float
) -> Iterator[tuple[int, bytes]]:
  """Endless epochs of single predictions."""
  while True:
    now = accuracy + common_sigma / 100 * rng.standard_normal()
    hits = rng.random(total, dtype=np.float32) < now
    yield int(np.count_nonzero(hits)), paired.pack_hits(hits)


def _percentiles(values: list[int]) -> Percentiles:
  return Percentiles(
      *np.percentile(values, (10, 50, 90), method='inverted_cdf').tolist()
  )


def _require_noise(
    total: int, accuracy: float, sigma: float | None, common_sigma: float
):
  if type(total) is not int or total < 1:
    raise ValueError(
        f'The total number of predictions is {total!r}; it must be an int, at '
        'least 1.'
    )
  if not 0 <= accuracy <= 1:
    raise ValueError(f'Accuracy {accuracy} must be a fraction from 0 to 1.')
  for name, value in (('Sigma', sigma), ('Common sigma', common_sigma)):
    if value is not None and not 0 <= value < float('inf'):
      raise ValueError(
          f'{name} {value} must be finite percentage points, at least 0.'
      )
