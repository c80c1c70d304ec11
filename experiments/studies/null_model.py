"""The null model: what a policy finds where there is nothing to be found.

`decisions` and `floor` let it see an accuracy that never changes, `null_band`
one that is noise alone. A depth that a policy finds there is no evidence about
any data. Neither has a learning curve, so both find less than a network would
that learns but never grows.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import itertools
import os
import pathlib
from typing import Any

import numpy as np

from autogrow_jax import policies
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import history as history_lib


def decisions(
    policy: policies.Policy, *, trained: bool = False
) -> Iterator[tuple[policies.Policy, policies.Decision]]:
  """Yields what a policy decides while accuracy never moves.

  Args:
    policy: policy at its start.
    trained: True if the network is as good from the start. If not, nothing is
      right in the first interval of a sequential policy; the other policies
      measure their first gains from zero anyway.

  Yields:
    The policy and its decision after each growing epoch; none of a fixed one.
  """
  if isinstance(policy, policies.Fixed):
    return
  total = 1000  # Enough for a rise of all of them to be significant.
  evaluation = total, np.ones(total, bool)
  yield from _run(policy, itertools.repeat(evaluation), total, trained)


def floor(
    policy: policies.RoundRobin, *, trained: bool = False
) -> policies.RoundRobin:
  """Returns the end of a policy that sees a constant accuracy.

  No stop can happen before the window J is full, so a periodic policy reaches
  about 1 + J / (K M) sub-modules per stage on *any* data: a network found there
  says nothing about the data. A sequential one does so, too, since an untrained
  network gains until its start has left the window. From a trained network it
  closes one stage at each check from the second on.

  Args:
    policy: policy at its start.
    trained: see `decisions`.
  """
  return _last(policy, decisions(policy, trained=trained))


@dataclasses.dataclass(frozen=True)
class Percentiles:
  """The 10th, 50th and 90th percentile of a count over simulated runs."""

  p10: int
  p50: int
  p90: int

  @classmethod
  def of(cls, values: Iterable[int]) -> 'Percentiles':
    """Takes percentiles that are values of some run."""
    values = np.percentile(list(values), (10, 50, 90), method='inverted_cdf')
    return cls(*values.tolist())


@dataclasses.dataclass(frozen=True)
class NullBand:
  """Depths that a policy finds in pure noise.

  Attributes:
    runs: number of simulated runs.
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
    common_sigma: float = 0.0,
    trained: bool = False,
) -> NullBand:
  """Runs a policy on noise around a constant accuracy.

  A running maximum of noisy accuracies keeps creeping upwards although nothing
  is learned, each small record postpones the stop, and a periodic policy grows
  at every check meanwhile. So a growing phase of a length within this band
  could have come from evaluation noise alone. With K = 3, J = 100 and M = 3 the
  median is about 15 to 19 sub-modules per stage for sigma from 0.1 to 1
  percentage points, and 13 of the 20 growing phases of Wen et al. 2020, Table
  4, lie within the band.

  A sequential policy grows by chance at most M alpha / (1 - alpha) times on
  average while J / K checks cover all its unwarranted ones: if since the
  earlier interval every image is as likely to have gained as to have lost,
  independently of the others and of other intervals, a check grows on with
  probability at most alpha. Noise that is common to all images raises that
  rate, to at most 1/2 while it is symmetric. Simulated for alpha = 0.05, K = 3
  and 94 % right, with a common standard deviation of 0.1, 0.3 and 0.5
  percentage points: 5, 9 and 18 % of 5,000 images that all change alike (28 %
  of them do from interval to interval), 6, 22 and 29 % if most are always right
  or always wrong (5 % change). Here all images are alike.

  Args:
    policy: policy at its start.
    total: size of the selection set, in predictions.
    accuracy: probability that a prediction is correct. Each epoch draws its
      predictions afresh, independently of one another.
    runs: number of runs; by default 400, but 200 for a sequential policy, and
      beyond 5,000 predictions fewer, down to 40.
    common_sigma: standard deviation, percentage points, of the accuracy itself,
      drawn anew at each epoch: the noise of training.
    trained: see `decisions`.
  """
  rng = np.random.default_rng(0)
  if isinstance(policy, (policies.Sequential, policies.Twin)):
    runs = runs or min(200, max(40, 1_000_000 // total))
    noise = _hits(rng, total, accuracy, common_sigma)
  else:
    runs = runs or 400
    noise = _counts(rng, total, accuracy, common_sigma)
  ends = [
      _last(policy, _run(policy, noise, total, trained)) for _ in range(runs)
  ]
  variance = 100**2 * accuracy * (1 - accuracy) / total
  return NullBand(
      runs=runs,
      sigma=(variance + common_sigma**2) ** 0.5,
      epochs=Percentiles.of(end.epoch for end in ends),
      submodules=Percentiles.of(sum(end.depths) for end in ends),
      depths=tuple(map(Percentiles.of, zip(*(end.depths for end in ends)))),
  )


def of_run(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Computes the controls of a finished run.

  The noise is that of counting the run's predictions at the mean accuracy of
  the last growing epochs, as many as the policy looks back.

  Returns:
    `floor` and `null_band` for `result.json`; nothing unless a policy closed
    stages by what it saw.
  """
  workdir = pathlib.Path(workdir)
  config = config_lib.RunConfig.from_json(
      history_lib.read_json(workdir / 'config.json')
  )
  policy = config.make_policy(config.network.depths)
  epochs = [
      record
      for record in history_lib.read(workdir / 'history.jsonl')
      if record['event'] == 'epoch' and record['phase'] == 'growing'
  ]
  if not epochs or not isinstance(policy, policies.RoundRobin):
    return {}
  recent = epochs[-policy.window :]
  accuracy = sum(item['correct'] for item in recent)
  accuracy /= sum(item['total'] for item in recent)
  trained = config.init_from is not None
  band = null_band(
      policy, total=recent[-1]['total'], accuracy=accuracy, trained=trained
  )
  end = floor(policy, trained=trained)
  return {
      'floor': policies.format_depths(end.depths),
      'null_band': dataclasses.asdict(band),
  }


def _run(
    policy: policies.Policy,
    evaluations: Iterator[tuple[int, np.ndarray | None]],
    total: int,
    trained: bool,
) -> Iterator[tuple[policies.Policy, policies.Decision]]:
  """Feeds a policy correct predictions and their hits until it is finished."""
  if isinstance(policy, policies.Sequential) and not trained:
    nothing = 0, np.zeros(total, bool)
    untrained = itertools.repeat(nothing, policy.interval)
    evaluations = itertools.chain(untrained, evaluations)
  while not policy.finished:
    epoch = policy.epoch + 1
    correct, hits = next(evaluations)
    is_twin = isinstance(policy, policies.Twin)
    twin = next(evaluations)[1] if is_twin else None
    policy, decision = policy.update(
        policies.Observation(epoch, epoch, correct, total, 0.0, 0, hits, twin)
    )
    yield policy, decision


def _last(
    policy: policies.RoundRobin,
    decided: Iterable[tuple[policies.RoundRobin, policies.Decision]],
) -> policies.RoundRobin:
  """Returns a policy at its end, which may be its start."""
  for policy, _ in decided:
    pass
  return policy


def _counts(
    rng: np.random.Generator, total: int, accuracy: float, common_sigma: float
) -> Iterator[tuple[int, None]]:
  """Yields endless epochs of counts; draws them by the thousand, for speed."""
  while True:
    accuracies = accuracy
    if common_sigma:
      accuracies = rng.normal(accuracy, common_sigma / 100, size=1024)
      accuracies = np.clip(accuracies, 0, 1)
    for count in rng.binomial(total, accuracies, size=1024).tolist():
      yield count, None


def _hits(
    rng: np.random.Generator, total: int, accuracy: float, common_sigma: float
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields endless epochs of single predictions."""
  while True:
    now = accuracy + common_sigma / 100 * rng.standard_normal()
    hits = rng.random(total, dtype=np.float32) < now
    yield int(np.count_nonzero(hits)), hits
