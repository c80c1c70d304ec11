"""A growth policy on a recorded accuracy curve, without training."""

from collections.abc import Iterator
import dataclasses
import os
from typing import Any

from autogrow_jax import policies
from autogrow_jax.run import history as history_lib


@dataclasses.dataclass(frozen=True)
class Curve:
  """Growing epochs of a run.

  Attributes:
    epochs: what a policy sees of them.
    protocol: {'protocol': 'test' or 'paper_compat'} if they are of a test set.
  """

  epochs: tuple[policies.Observation, ...]
  protocol: dict[str, str]


def read_curve(path: str | os.PathLike[str]) -> Curve:
  """Reads {"total": count, "correct": [counts]}, or a run's history.jsonl.

  Raises:
    ValueError: if the file holds no curve.
  """
  try:
    data = history_lib.read_json(path)
  except ValueError:  # One object per line.
    data = None
  if data and isinstance(data.get('correct'), list):
    history, total = [], data.get('total')
    rows = [(i, correct, total) for i, correct in enumerate(data['correct'], 1)]
  else:
    history = history_lib.read(path)
    rows = [
        (record['epoch'], record.get('correct'), record.get('total'))
        for record in history
        if record['event'] == 'epoch' and record.get('phase') == 'growing'
    ]
  for epoch, correct, total in rows:
    counts = isinstance(correct, int) and isinstance(total, int)
    if not counts or not 0 <= correct <= total or not total:
      raise ValueError(
          f'{path}: {correct} of {total} predictions are correct in epoch '
          f'{epoch}; these are two counts.'
      )
  if not rows:
    raise ValueError(f'{path} has no growing epochs.')
  tests = [item for item in history if item.get('select_on') == 'test']
  return Curve(
      tuple(
          policies.Observation(epoch, epoch, correct, total, 0.0, 0)
          for epoch, correct, total in rows
      ),
      {'protocol': tests[0].get('protocol', 'test')} if tests else {},
  )


def events(
    policy: policies.RoundRobin, curve: Curve
) -> Iterator[dict[str, Any]]:
  """Yields the events of a policy on a curve, as far as either lasts."""

  def event(name: str, stage: int | None = None, of: Any = None) -> Any:
    depths = policies.format_depths((of or policy).depths)
    return {
        'epoch': policy.epoch, 'event': name, 'stage': stage, 'depths': depths,
        **curve.protocol,
    }

  if policy.finished:  # All stages of the seed have their largest depths.
    yield event('end')
  for observation in curve.epochs:
    if policy.finished:
      return
    before = policy
    policy, decision = policy.update(observation)
    for stage in decision.closed:
      yield event('stop', stage, before)
    if decision.action == 'grow':
      yield event('grow', decision.stage)
    if decision.action == 'finish':
      yield event('end')
