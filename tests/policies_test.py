"""Tests of the growth policies."""

import dataclasses
import fractions
import json
import math
import random

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import numpy as np

from autogrow_jax import paired
from autogrow_jax import policies

TAU = '0.05'

# Traces A to D: (epoch, event, stage, depths) for accuracies in percent.
TRACE_A = (
    40, 50, 60, 55, 65, 70, 62, 71, 73, 60, 73.02, 72.50, 73.03, 72, 73.01,
    70, 74.00, 73.90, 73.80, 74.05, 74.01, 74.00, 73.97, 74.05, 74.06, 73, 73,
    73, 74.07, 74,
)
EVENTS_A = (
    (3, 'grow', 0, '2-1-1'),
    (6, 'grow', 1, '2-2-1'),
    (9, 'grow', 2, '2-2-2'),
    (12, 'grow', 0, '3-2-2'),
    (15, 'stop', 0, '3-2-2'),
    (15, 'grow', 1, '3-3-2'),
    (18, 'grow', 2, '3-3-3'),
    (21, 'grow', 1, '3-4-3'),
    (24, 'grow', 2, '3-4-4'),
    (27, 'stop', 2, '3-4-4'),
    (27, 'grow', 1, '3-5-4'),
    (30, 'stop', 1, '3-5-4'),
    (30, 'end', None, '3-5-4'),
)
TRACE_B = (
    30, 40, 50, 52, 54, 55, 56, 57, 58, 60, 60, 61, 62, 61, 62, 62, 62, 61,
    61.9, 62.01,
)
EVENTS_B = (
    (2, 'grow', 0, '2-1-1-1'),
    (4, 'grow', 1, '2-2-1-1'),
    (6, 'grow', 2, '2-2-2-1'),
    (8, 'grow', 3, '2-2-2-2'),
    (10, 'grow', 0, '3-2-2-2'),
    (12, 'grow', 2, '3-2-3-2'),
    (14, 'grow', 3, '3-2-3-3'),
    (16, 'grow', 2, '3-2-4-3'),
    (18, 'stop', 2, '3-2-4-3'),
    (18, 'grow', 3, '3-2-4-4'),
    (20, 'stop', 3, '3-2-4-4'),
    (20, 'end', None, '3-2-4-4'),
)
TRACE_C = (
    50, 60, 65, 70, 70.1, 70.0, 70.2, 70.1, 70.2, 70.22, 70.1, 70.2,
    71, 71.5, 72, 72.3, 72.0, 72.31, 72.3, 72.2, 72.2, 72.33, 72.1, 72.2,
    73, 73.4, 73.3, 73.2, 73.41, 73.42, 73.40, 73.3, 73.2, 73.43, 73.3, 73.4,
    73, 73, 73.44, 73,
)
EVENTS_C = (
    (12, 'grow', 0, '2-1-1'),
    (20, 'grow', 1, '2-2-1'),
    (24, 'stop', 1, '2-2-1'),
    (24, 'grow', 2, '2-2-2'),
    (32, 'grow', 0, '3-2-2'),
    (36, 'stop', 0, '3-2-2'),
    (36, 'grow', 2, '3-2-3'),
    (40, 'stop', 2, '3-2-3'),
    (40, 'end', None, '3-2-3'),
)

class LiteralController:
  """The pseudo-code of the specification (2.6), word for word."""

  def __init__(self, seed_depths, K, J, tau, caps, policy, total):
    self.depth = list(seed_depths)
    self.best = []
    self.grown = None
    self.last_growth = None
    self.K, self.J, self.tau, self.total = K, J, tau, total
    self.caps, self.policy = caps, policy
    stages = range(len(seed_depths))
    self.open = [i for i in stages if self.depth[i] < caps[i]]
    self.growing = self.open[0] if self.open else None
    self.finished = not self.open

  def on_epoch(self, acc):
    self.best.append(acc if not self.best else max(acc, self.best[-1]))
    return self.run_check() if len(self.best) % self.K == 0 else []

  def below_tau(self, W):
    n, best = len(self.best), self.best
    gain = best[-1] - best[-1 - W] if n > W else best[-1]
    return fractions.Fraction(gain * 100, self.total) < self.tau

  def run_check(self):
    e, events = len(self.best), []
    if self.policy == 'periodic':
      stop, grow = self.below_tau(self.J), True
    else:
      flat = self.below_tau(self.K)
      stop, grow = flat and self.last_growth == e - self.K, flat
    if stop and self.grown in self.open:
      self.open.remove(self.grown)
      events.append((e, 'stop', self.grown, self.text()))
    if not self.open:
      self.finished = True
      return events + [(e, 'end', None, self.text())]
    if grow:
      g = self.growing
      self.depth[g] += 1
      self.grown = g
      self.last_growth = e
      events.append((e, 'grow', g, self.text()))
      M = len(self.depth)
      self.growing = next(
          (
              i % M
              for i in range(g + 1, g + M + 1)
              if i % M in self.open and self.depth[i % M] < self.caps[i % M]
          ),
          None,
      )
      if self.depth[g] >= self.caps[g]:
        self.open.remove(g)
    return events

  def text(self):
    return '-'.join(str(d) for d in self.depth)


def periodic(K=3, J=100, seed=(1, 1, 1), **kwargs):
  return policies.Periodic(
      interval=K,
      window=J,
      depths=seed,
      **{'threshold': TAU, **kwargs},
  )


def convergent(K=4, seed=(1, 1, 1), **kwargs):
  return policies.Convergent(
      interval=K, depths=seed, **{'threshold': TAU, **kwargs}
  )


def observe(epoch, correct, total=10_000, **kwargs):
  rest = dict(step=epoch * 7, loss_sum=1.5, cost=epoch * 11)
  return policies.Observation(
      epoch=epoch, correct=correct, total=total, **{**rest, **kwargs}
  )


def events_of(epoch, before, after, decision):
  events = [
      (epoch, 'stop', stage, policies.format_depths(before.depths))
      for stage in decision.closed
  ]
  name = {'grow': 'grow', 'finish': 'end', 'keep': None}[decision.action]
  if name:
    text = policies.format_depths(after.depths)
    events.append((epoch, name, decision.stage, text))
  return events


def play(policy, counts, total=10_000):
  """All events of a policy on counts, and the policy after them."""
  events = []
  for correct in counts:
    if policy.finished:
      break
    before = policy
    policy, decision = policy.update(
        observe(policy.epoch + 1, correct, total)
    )
    events += events_of(policy.epoch, before, policy, decision)
  return events, policy


def to_counts(percents):
  return [round(100 * percent) for percent in percents]


def random_walk(rng, epochs, total):
  """A noisy rising curve, of a steepness that makes all branches likely."""
  level = rng.uniform(0, 0.6)
  rate = rng.choice([0, 1e-4, 5e-4, 3e-3, 2e-2])
  noise = rng.choice([0, 2e-4, 2e-3, 2e-2])
  counts = []
  for _ in range(epochs):
    level = min(1.0, level + rate * rng.random())
    value = level + rng.gauss(0, noise)
    counts.append(min(total, max(0, round(total * value))))
  return counts


def random_policy(rng, convergent_too=True):
  stages = rng.randint(1, 5)
  seed = tuple(rng.randint(1, 3) for _ in range(stages))
  caps = tuple(d + rng.choice([0, 1, 2, 5, 100]) for d in seed)
  interval = rng.randint(1, 6)
  if convergent_too and rng.random() < 0.5:
    return convergent(interval, seed, caps=caps)
  return periodic(interval, interval + rng.randint(0, 25), seed, caps=caps)


@st.composite
def runs(draw, convergent_too=True):
  """A policy and a curve."""
  rng = random.Random(draw(st.integers(0, 2**32)))
  total = rng.choice([97, 2_000, 10_000])
  counts = random_walk(rng, rng.randint(10, 150), total)
  return random_policy(rng, convergent_too), counts, total


quick = hypothesis.settings(
    max_examples=150, deadline=None, derandomize=True, database=None
)


class TraceTest(parameterized.TestCase):
  """Invariant 1: the worked traces, event for event."""

  @parameterized.named_parameters(
      ('a', periodic(3, 6), TRACE_A, EVENTS_A),
      (
          'b',
          periodic(2, 5, (1, 1, 1, 1), caps=(3, 2, 9, 9)),
          TRACE_B,
          EVENTS_B,
      ),
      ('c', convergent(4), TRACE_C, EVENTS_C),
  )
  def test_trace(self, policy, percents, expected):
    events, end = play(policy, to_counts(percents))
    self.assertEqual(tuple(events), expected)
    self.assertTrue(end.finished)
    self.assertEqual(end.epoch, len(percents))

  @parameterized.parameters(
      (3, '13-13-12', 108, 2), (4, '10-10-10-10', 111, None)
  )
  def test_trace_d(self, stages, found, epochs, first_stop):
    events, end = play(periodic(seed=(1,) * stages), [5_000] * 200)
    self.assertEqual(policies.format_depths(end.depths), found)
    self.assertEqual(end.epoch, epochs)
    stops = [event for event in events if event[1] == 'stop']
    self.assertEqual(stops[0][0], 102)
    if first_stop is not None:
      self.assertEqual(stops[0][2], first_stop)

  def test_caps_of_trace_b_are_in_the_decisions(self):
    policy = periodic(2, 5, (1, 1, 1, 1), caps=(3, 2, 9, 9))
    capped = {}
    for epoch, correct in enumerate(to_counts(TRACE_B), 1):
      policy, decision = policy.update(observe(epoch, correct))
      if decision.capped:
        capped[epoch] = decision.capped
        self.assertEqual(decision.closed, ())
    self.assertEqual(capped, {4: (1,), 10: (0,)})


class LiteralTest(parameterized.TestCase):

  @parameterized.parameters('periodic', 'convergent')
  def test_equals_the_pseudo_code(self, kind):
    rng = random.Random(kind)
    seen = set()
    for _ in range(2_000):
      stages = rng.randint(1, 5)
      seed = tuple(rng.randint(1, 3) for _ in range(stages))
      caps = tuple(d + rng.choice([0, 1, 2, 5, 100]) for d in seed)
      interval = rng.randint(1, 6)
      window = interval + rng.randint(0, 25)
      total = rng.choice([97, 2_000, 10_000])
      tau = rng.choice(['0.05', '.5', '1', '3'])
      if kind == 'periodic':
        policy = periodic(interval, window, seed, caps=caps, threshold=tau)
      else:
        policy = convergent(interval, seed, caps=caps, threshold=tau)
      literal = LiteralController(
          seed, interval, window, fractions.Fraction(tau), caps, kind, total
      )
      self.assertEqual(policy.finished, literal.finished)
      for epoch, correct in enumerate(random_walk(rng, 120, total), 1):
        if literal.finished:
          break
        before = policy
        policy, decision = policy.update(observe(epoch, correct, total))
        events = events_of(epoch, before, policy, decision)
        self.assertEqual(events, literal.on_epoch(correct))
        self.assertEqual(policy.finished, literal.finished)
        self.assertEqual(policy.depths, tuple(literal.depth))
        self.assertEqual(policy.open_stages, tuple(literal.open))
        seen.update((event[1], len(events)) for event in events)
    self.assertContainsSubset(
        {('grow', 1), ('grow', 2), ('stop', 2), ('end', 1), ('end', 2)}, seen
    )


class InvariantTest(parameterized.TestCase):
  """Invariants 2 to 16 of the specification; 9 is in controls_test."""

  @quick
  @hypothesis.given(runs())
  def test_single_steps(self, run):  # 2, 3, 5
    policy, counts, total = run
    latest, closed = None, set()
    for correct in counts:
      if policy.finished:
        break
      before = policy
      policy, decision = policy.update(
          observe(policy.epoch + 1, correct, total)
      )
      grew = [
          i
          for i, (a, b) in enumerate(zip(before.depths, policy.depths))
          if a != b
      ]
      self.assertEqual(
          grew, [decision.stage] if decision.action == 'grow' else []
      )
      self.assertEqual(sum(policy.depths) - sum(before.depths), len(grew))
      self.assertLessEqual(len(decision.closed), 1)
      for stage in decision.closed:
        self.assertEqual(stage, latest)
      closed |= set(decision.closed)
      if grew:
        self.assertNotIn(grew[0], closed)
        latest = grew[0]
        self.assertEqual(policy.epoch % policy.interval, 0)
      closed |= set(decision.capped)
      self.assertEqual(policy.finished, decision.action == 'finish')

  @quick
  @hypothesis.given(runs())
  def test_turns_keep_the_circular_order(self, run):  # 4
    policy, counts, total = run
    stages = len(policy.depths)
    still_open = set(policy.open_stages)
    latest = stages - 1
    for correct in counts:
      if policy.finished:
        break
      policy, decision = policy.update(
          observe(policy.epoch + 1, correct, total)
      )
      still_open -= set(decision.closed)
      if decision.action == 'grow':
        turns = [(latest + 1 + i) % stages for i in range(stages)]
        expected = next(stage for stage in turns if stage in still_open)
        self.assertEqual(decision.stage, expected)
        latest = decision.stage
      still_open -= set(decision.capped)

  def test_plain_round_robin(self):  # 4
    events, _ = play(periodic(2, 50), range(0, 3_000, 100))
    stages = [stage for _, event, stage, _ in events if event == 'grow']
    self.assertEqual(stages, [0, 1, 2] * 5)

  @parameterized.parameters(periodic(1, 1), periodic(3, 3), convergent(3))
  def test_no_stop_before_the_first_growth(self, policy):  # 6
    events, _ = play(policy, [5_000] * 40)
    self.assertEqual(events[0][1], 'grow')
    self.assertEqual(events[1][1:3], ('stop', events[0][2]))

  @quick
  @hypothesis.given(st.integers(1, 8), st.integers(0, 60), st.integers(1, 5))
  def test_first_stop(self, interval, more, stages):  # 7
    window = interval + more
    policy = periodic(interval, window, (1,) * stages)
    events, _ = play(policy, [5_000] * 300)
    first = next(event[0] for event in events if event[1] == 'stop')
    self.assertEqual(first, interval * math.ceil((window + 1) / interval))

  @quick
  @hypothesis.given(runs(convergent_too=False))
  def test_growing_epochs(self, run):  # 7, 8
    policy, counts, total = run
    policy = dataclasses.replace(policy, caps=(10**6,) * len(policy.caps))
    policy = dataclasses.replace(
        policy, open_stages=tuple(range(len(policy.caps)))
    )
    counts = [max(count, total // 10) for count in counts]
    events, end = play(policy, counts, total)
    for epoch, event, _, _ in events:
      if event == 'stop':
        K = policy.interval
        self.assertGreaterEqual(epoch, K * math.ceil((policy.window + 1) / K))
    if end.finished:
      growths = sum(end.depths) - sum(policy.depths)
      self.assertEqual(end.epoch, policy.interval * (growths + 1))

  @parameterized.parameters(5, 6, 50)
  def test_steady_gain_ends_at_the_caps(self, step):  # 10, 12
    caps = (3, 5, 4)
    curve = [1_000 + step * (epoch // 6) for epoch in range(200)]
    events, end = play(periodic(3, 6, caps=caps), curve)
    self.assertTrue(end.finished)
    self.assertEqual(end.depths, caps)
    self.assertNotIn('stop', {event[1] for event in events})

  def test_a_gain_one_count_short_stops(self):  # 12
    curve = [1_000 + 4 * (epoch // 6) for epoch in range(200)]
    events, _ = play(periodic(3, 6), curve)
    self.assertEqual(events[2], (9, 'stop', 1, '2-2-1'))

  @quick
  @hypothesis.given(runs(), st.integers(0, 50))
  def test_shift_and_running_maximum(self, run, shift):  # 11
    policy, counts, total = run
    counts = [count // 2 + total // 20 for count in counts]
    maxima = [max(counts[: i + 1]) for i in range(len(counts))]
    shift = min(shift, total // 3)
    expected, _ = play(policy, counts, total)
    self.assertEqual(play(policy, maxima, total)[0], expected)
    shifted = [count + shift for count in counts]
    self.assertEqual(play(policy, shifted, total)[0], expected)

  @quick
  @hypothesis.given(runs())
  def test_convergent_growths(self, run):  # 13
    policy, counts, total = run
    counts = [max(count, total // 10) for count in counts]
    policy = convergent(policy.interval, policy.depths)
    K = policy.interval
    events, _ = play(policy, counts, total)
    maxima = [max(counts[: i + 1]) for i in range(len(counts))]
    grown_at = None
    for epoch, event, _, _ in events:
      if event == 'grow':
        self.assertGreaterEqual(epoch, 2 * K)
        grown_at = epoch
      if event == 'stop':
        self.assertEqual(grown_at, epoch - K)
        gain = maxima[epoch - 1] - maxima[grown_at - 1]
        self.assertLess(fractions.Fraction(100 * gain, total), policy.threshold)

  @parameterized.parameters(periodic(2, 5, (1,)), convergent(2, (1,)))
  def test_one_stage(self, policy):  # 14
    events, end = play(policy, [5_000] * 30)
    self.assertEqual({event[2] for event in events[:-1]}, {0})
    self.assertEqual([e[1] for e in events[-2:]], ['stop', 'end'])
    self.assertTrue(end.finished)

  @quick
  @hypothesis.given(runs())
  def test_stored_and_restored_at_every_epoch(self, run):  # 15
    policy, counts, total = run
    expected, end = play(policy, counts, total)
    events = []
    for correct in counts:
      restored = policies.from_json(json.loads(json.dumps(policy.to_json())))
      self.assertEqual(restored, policy)
      self.assertEqual(hash(restored), hash(policy))
      self.assertEqual(restored.to_json(), policy.to_json())
      if policy.finished:
        break
      more, policy = play(restored, [correct], total)
      events += more
    self.assertEqual(events, expected)
    self.assertEqual(policy, end)

  @quick
  @hypothesis.given(runs(), st.integers(0, 10**9), st.floats(allow_nan=True))
  def test_only_the_selection_accuracy_counts(self, run, number, loss):  # 16
    policy, counts, total = run
    other = policy
    for epoch, correct in enumerate(counts, 1):
      if policy.finished:
        break
      policy, decision = policy.update(observe(epoch, correct, total))
      other, same = other.update(
          observe(
              epoch, correct, total, step=number, loss_sum=loss, cost=number
          )
      )
      self.assertEqual(same, decision)
      self.assertEqual(other, policy)


class LimitTest(parameterized.TestCase):

  @parameterized.parameters((6, '2-1-1'), (7, '2-2-1'), (8, '2-2-1'))
  def test_the_limit_ends_without_a_growth(self, limit, found):
    policy = periodic(3, 6, max_epochs=limit)
    events, end = play(policy, to_counts(TRACE_A))
    self.assertEqual(events[-1], (limit, 'end', None, found))
    self.assertEqual(end.epoch, limit)
    self.assertTrue(end.finished)
    self.assertLen([e for e in events if e[0] == limit], 1)

  def test_a_stop_at_the_limit_is_told(self):
    events, _ = play(periodic(3, 6, max_epochs=15), to_counts(TRACE_A))
    self.assertEqual(
        events[-2:], [(15, 'stop', 0, '3-2-2'), (15, 'end', None, '3-2-2')]
    )

  def test_a_limit_before_the_first_check(self):
    policy, decision = convergent(4, max_epochs=1).update(observe(1, 0))
    self.assertEqual(decision, policies.FINISH)
    self.assertTrue(policy.finished)

  def test_a_last_stage_at_its_cap_is_trained_until_the_next_check(self):
    events, end = play(periodic(3, 6, (1,), caps=(2,)), [5_000] * 9)
    self.assertEqual(events, [(3, 'grow', 0, '2'), (6, 'end', None, '2')])
    self.assertEqual(end.epoch, 6)

  def test_seed_at_its_caps_is_finished(self):
    policy = periodic(seed=(2, 2), caps=(2, 2))
    self.assertTrue(policy.finished)

  def test_default_caps(self):
    self.assertEqual(periodic().caps, (200, 200, 200))
    events, end = play(periodic(1, 1, (1,), threshold=0), [7_000] * 300)
    self.assertEqual(end.depths, (200,))
    self.assertNotIn('stop', {event[1] for event in events})


class ExactnessTest(parameterized.TestCase):

  def test_records_stay_within_the_window(self):
    _, policy = play(periodic(3, 6, max_epochs=900), range(0, 10_000, 20))
    self.assertLen(policy.records, 7)
    self.assertEqual(policy.records[0][0], policy.epoch - 6)

  @parameterized.parameters(
      ('0.05', '1/20'), ('.5', '1/2'), ('1', '1'), (1, '1'), ('1.', '1'),
      (fractions.Fraction(1, 3), '1/3'), ('0', '0'),
  )
  def test_threshold(self, given, held):
    policy = periodic(threshold=given)
    self.assertIsInstance(policy.threshold, fractions.Fraction)
    self.assertEqual(str(policy.threshold), held)

  @parameterized.parameters(0.05, 1.0, float('nan'))
  def test_refuses_a_float(self, value):
    with self.assertRaisesRegex(ValueError, "float.*string, such as '0.05'"):
      periodic(threshold=value)

  @parameterized.parameters(
      'nan', 'inf', '', '-1', '-0.05', '1/0', '0,05', '5%', '1e-2', '.', ' 1',
      '٣', -1, True, None,
  )
  def test_refuses_a_threshold(self, value):
    with self.assertRaisesRegex(ValueError, "such as '0.05'"):
      periodic(threshold=value)

  @parameterized.parameters(
      (dict(K=0), 'K .* is 0'),
      (dict(K=3.0), 'K .* is 3.0'),
      (dict(K=True), 'K .* is True'),
      (dict(J=2), 'J is 2 epochs.* at least .* 3'),
      (dict(J='100'), "J .* is '100'"),
      (dict(seed=()), r'depths are \(\)'),
      (dict(seed=(1, 0)), r'depths are \(1, 0\)'),
      (dict(seed='1-1'), "depths are '1-1'"),
      (dict(seed=(1, 3), caps=(5, 2)), 'Stage 1 has depth 3 .* cap of 2'),
      (dict(seed=(1, 3), caps=(5,)), 'differ in their number'),
      (dict(caps=(5, 5, 0)), 'caps are'),
      (dict(max_epochs=0), 'limit .* is 0'),
  )
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      periodic(**arguments)

  def test_convergent_refuses_a_zero_threshold(self):
    with self.assertRaisesRegex(ValueError, 'nothing would ever grow'):
      convergent(threshold='0')

  @parameterized.parameters(
      (dict(correct=11), 'is 11; .* at most the total, 10'),
      (dict(correct=-1), 'is -1'),
      (dict(correct=5.0), 'is 5.0'),
      (dict(correct=True), 'is True'),
      (dict(total=0), 'is 0'),
      (dict(epoch=0), 'is 0'),
  )
  def test_refuses_an_observation(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      observe(**{**dict(epoch=1, correct=5, total=10), **arguments})

  @parameterized.parameters(0, 1, 3)
  def test_refuses_another_epoch(self, skipped):
    _, policy = play(periodic(), [1])
    with self.assertRaises(ValueError):
      policy.update(observe(skipped, 1))

  def test_refuses_another_total(self):
    _, policy = play(periodic(), [1])
    with self.assertRaisesRegex(ValueError, '20 predictions.*10000'):
      policy.update(observe(2, 1, 20))

  def test_refuses_epochs_after_the_end(self):
    _, policy = play(periodic(max_epochs=1), [1])
    with self.assertRaisesRegex(ValueError, 'finished at epoch 1'):
      policy.update(observe(2, 1))

  def test_update_leaves_the_policy_unchanged(self):
    policy = periodic(1, 1)
    copy = dataclasses.replace(policy)
    first = policy.update(observe(1, 1))
    self.assertEqual(policy, copy)
    self.assertEqual(policy.update(observe(1, 1)), first)
    self.assertLen({policy, copy}, 1)
    with self.assertRaises(dataclasses.FrozenInstanceError):
      policy.epoch = 3


class StoredTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    _, policy = play(periodic(3, 6), to_counts(TRACE_A[:16]))
    self.data = policy.to_json()

  def test_content(self):
    self.assertEqual(
        self.data,
        {
            'policy': 'periodic',
            'interval': 3,
            'window': 6,
            'threshold': '1/20',
            'depths': [3, 3, 2],
            'caps': [200, 200, 200],
            'max_epochs': None,
            'epoch': 16,
            'total': 10_000,
            'records': [[9, 7300], [11, 7302], [13, 7303]],
            'open_stages': [1, 2],
            'grown': 1,
            'last_growth': 15,
        },
    )

  @parameterized.parameters(
      dict(policy='nova'),
      dict(policy=None),
      dict(policy=['periodic']),
      dict(extra=1),
      dict(interval='3'),
      dict(interval=17),
      dict(window=None),
      dict(threshold=0.05),
      dict(threshold='x'),
      dict(depths=None),
      dict(depths=[3, 3]),
      dict(depths={'0': 3}),
      dict(caps=None),
      dict(epoch=-1),
      dict(epoch=0),
      dict(epoch=12),
      dict(epoch='16'),
      dict(max_epochs=15),
      dict(total=None),
      dict(total=7000),
      dict(total=True),
      dict(records=[]),
      dict(records=None),
      dict(records=[9, 7300]),
      dict(records=[[9, 7300], [11, 7300]]),
      dict(records=[[9, 7300], [9, 7301]]),
      dict(records=[[9, 7300], [11, 7302], [17, 7303]]),
      dict(records=[[11, 7302], [13, 7303]]),
      dict(records=[[6, 7000], [9, 7300], [11, 7302]]),
      dict(records=[[9, 7300.0]]),
      dict(open_stages=None),
      dict(open_stages=[2, 1]),
      dict(open_stages=[1, 1]),
      dict(open_stages=[3]),
      dict(open_stages=['1']),
      dict(grown=None),
      dict(grown=3),
      dict(grown=-1),
      dict(last_growth=None),
      dict(last_growth=14),
      dict(last_growth=18),
  )
  def test_refuses(self, **changes):
    with self.assertRaises(ValueError) as caught:
      policies.from_json({**self.data, **changes})
    self.assertNotIn('\n', str(caught.exception))

  def test_each_kind_restores_its_own(self):
    restored = policies.Periodic.from_json(self.data)
    self.assertEqual(restored, policies.from_json(self.data))
    for kind in (
        policies.Convergent,
        policies.Sequential,
        policies.OneShot,
        policies.EveryEpochs,
        policies.Fixed,
    ):
      with self.assertRaisesRegex(ValueError, f'not a {kind.__name__}'):
        kind.from_json(self.data)

  def test_refuses_a_missing_field(self):
    for field in self.data:
      data = {k: v for k, v in self.data.items() if k != field}
      with self.assertRaisesRegex(ValueError, field):
        policies.from_json(data)

  @parameterized.parameters((None,), (3,), ('periodic',), ([],), ({},))
  def test_refuses_anything_else(self, data):
    with self.assertRaises(ValueError):
      policies.from_json(data)


class LiteralSequential:
  """The rule of `Sequential`, with everything kept and nothing clever."""

  def __init__(self, K, J, alpha, depths, caps):
    self.K, self.J, self.alpha = K, J, alpha
    self.depths, self.caps = list(depths), caps
    self.open = [i for i, d in enumerate(depths) if d < caps[i]]
    self.epochs, self.grown = [], None
    self.finished = not self.open

  def on_epoch(self, hits):
    self.epochs.append(hits)
    e = len(self.epochs)
    if e % self.K:
      return []
    events = []
    if self.grown in self.open and not self.improved():
      self.open.remove(self.grown)
      events.append((e, 'stop', self.grown, self.text()))
    if not self.open:
      self.finished = True
      return events + [(e, 'end', None, self.text())]
    last = -1 if self.grown is None else self.grown
    M = len(self.depths)
    turns = [(last + 1 + i) % M for i in range(M)]
    self.grown = next(stage for stage in turns if stage in self.open)
    self.depths[self.grown] += 1
    events.append((e, 'grow', self.grown, self.text()))
    if self.depths[self.grown] == self.caps[self.grown]:
      self.open.remove(self.grown)
    return events

  def improved(self):
    e, K = len(self.epochs), self.K
    end = max(e - K * math.ceil(self.J / K), K)
    if end >= e:
      return True
    now = np.sum(self.epochs[e - K : e], axis=0)
    then = np.sum(self.epochs[end - K : end], axis=0)
    gains, losses = int((now > then).sum()), int((now < then).sum())
    ways = sum(
        math.comb(gains + losses, k) for k in range(gains, gains + losses + 1)
    )
    return fractions.Fraction(ways, 2 ** (gains + losses)) <= self.alpha

  def text(self):
    return policies.format_depths(tuple(self.depths))


def sequential(K=3, J=6, seed=(1, 1, 1), **kwargs):
  return policies.Sequential(
      interval=K, window=J, depths=seed, **{'error_rate': '0.05', **kwargs}
  )


def observe_hits(epoch, hits, **kwargs):
  return observe(
      epoch,
      int(np.count_nonzero(hits)),
      len(hits),
      hits=paired.pack_hits(hits),
      **kwargs,
  )


def hits_of_a_curve(rng, epochs, total):
  """Hits of images of different difficulty, under a random learning curve."""
  difficulty = rng.normal(size=total)
  rate = rng.choice([0.0, 0.02, 0.2])
  for epoch in range(epochs):
    level = rate * epoch + 0.1 * rng.normal()
    yield rng.normal(size=total) < level - difficulty


class SequentialTest(parameterized.TestCase):

  def test_equals_a_literal_one_and_survives_storing(self):
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(120):
      stages, K = int(rng.integers(1, 4)), int(rng.integers(1, 5))
      J = K + int(rng.integers(0, 9))
      alpha = str(rng.choice(['0.05', '1/32', '0.3']))
      seed = tuple(int(d) for d in rng.integers(1, 3, size=stages))
      caps = tuple(d + int(rng.choice([0, 1, 3, 50])) for d in seed)
      policy = sequential(K, J, seed, caps=caps, error_rate=alpha)
      literal = LiteralSequential(K, J, policy.error_rate, seed, caps)
      total = int(rng.choice([5, 16, 61]))
      for epoch, hits in enumerate(hits_of_a_curve(rng, 40, total), 1):
        self.assertEqual(policy.finished, literal.finished)
        restored = policies.from_json(json.loads(json.dumps(policy.to_json())))
        self.assertEqual(restored, policy)
        self.assertEqual(hash(restored), hash(policy))
        if policy.finished:
          break
        observation = observe_hits(epoch, hits)
        policy, decision = restored.update(observation)
        self.assertEqual(restored.update(observation), (policy, decision))
        events = events_of(epoch, restored, policy, decision)
        self.assertEqual(events, literal.on_epoch(hits))
        self.assertEqual(policy.open_stages, tuple(literal.open))
        seen.update((event[1], len(events)) for event in events)
    self.assertEqual(
        seen, {('grow', 1), ('grow', 2), ('stop', 2), ('end', 1), ('end', 2)}
    )

  def run_to_the_end(self, rng, policy, accuracy, total=400):
    """Feeds independent images; `accuracy` is a function of the epoch."""
    while not policy.finished:
      epoch = policy.epoch + 1
      hits = rng.random(total) < accuracy(epoch)
      policy, _ = policy.update(observe_hits(epoch, hits))
    return policy

  def test_superfluous_growths_are_as_few_as_stated(self):
    rng, alpha = np.random.default_rng(0), 0.2
    # Nothing is right in the first interval, and nothing improves after it.
    policy = sequential(1, 6, error_rate='0.2')
    checks = [
        self.run_to_the_end(rng, policy, lambda e: 0.9 * (e > 1)).epoch - 7
        for _ in range(500)
    ]
    # M stages, each closed by a check with a probability of at least 1 - alpha.
    spread = math.sqrt(3 * alpha) / (1 - alpha) / math.sqrt(len(checks))
    self.assertLess(np.mean(checks), 3 / (1 - alpha) + 3 * spread)
    self.assertGreater(np.mean(checks), 3.2)

  def test_power(self):
    # One point per interval, of 94 %, in 5,000 images: never overlooked.
    rng = np.random.default_rng(0)
    policy = sequential(3, 3, (1,), max_epochs=18)
    rising = lambda epoch: 0.94 + 0.01 * ((epoch - 1) // 3)
    end = self.run_to_the_end(rng, policy, rising, total=5_000)
    self.assertEqual((end.epoch, end.depths), (18, (6,)))
    self.assertEqual(end.open_stages, (0,))
    end = self.run_to_the_end(rng, policy, lambda _: 0.94, total=5_000)
    self.assertEqual((end.epoch, end.depths), (6, (2,)))

  def test_gains_exactly_at_the_error_rate_count(self):
    nothing, five = np.zeros(9, bool), np.arange(9) < 5  # p = 1/32.
    for alpha, open_stages in (('1/32', (0,)), ('0.031', ())):
      policy = sequential(1, 1, (1,), error_rate=alpha)
      for epoch, hits in enumerate((nothing, five), 1):
        policy, _ = policy.update(observe_hits(epoch, hits))
      self.assertEqual(policy.open_stages, open_stages)

  def test_keeps_what_a_check_needs(self):
    rng = np.random.default_rng(0)
    policy, sizes = sequential(3, 10, error_rate='0.49'), []
    for epoch in range(1, 19):
      hits = rng.random(20) < epoch / 20
      policy, _ = policy.update(observe_hits(epoch, hits))
      sizes.append(len(policy.tallies))
    self.assertEqual(sizes, [min(-(-e // 3), 5) for e in range(1, 19)])

  def test_large_state_is_as_small_as_stated(self):
    policy = sequential(3, 100, max_epochs=120)
    rng = np.random.default_rng(0)
    for epoch in range(1, 111):
      policy, _ = policy.update(observe_hits(epoch, rng.random(50_000) < 0.5))
      if policy.finished:
        break
    self.assertLess(len(json.dumps(policy.to_json())), 35 * 17_000)

  @parameterized.parameters(
      (dict(K=0), 'K .* is 0'),
      (dict(J=2), 'J is 2 epochs.* at least .* 3'),
      (dict(error_rate=0.05), "float.*string, such as '0.05'"),
      (dict(error_rate='0'), 'above 0'),
      (dict(error_rate='0.5'), 'below 0.5'),
      (dict(error_rate='5%'), "such as '0.05'"),
      (dict(seed=(2,), caps=(1,)), 'cap of 1'),
  )
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      sequential(**arguments)

  def test_refuses_counts_alone(self):
    with self.assertRaisesRegex(ValueError, 'epoch 1 .* needs its hits'):
      sequential().update(observe(1, 5, 10))

  def test_refuses_hits_of_another_count(self):
    with self.assertRaisesRegex(ValueError, '3 ones.* 2 correct'):
      observe(1, 2, 8, hits=b'\xe0')

  @parameterized.parameters(
      dict(tallies=None),
      dict(tallies=[]),
      dict(tallies=['AA==']),
      dict(tallies=['AAAA', '']),
      dict(tallies=['AAAA', 3]),
      dict(tallies=['////', '////']),
      dict(epoch=7),
      dict(total=17),
      dict(error_rate=0.05),
      dict(window=None),
  )
  def test_refuses_a_stored(self, **changes):
    policy = sequential(2, 4)
    for epoch in range(1, 4):
      policy, _ = policy.update(observe_hits(epoch, np.ones(12, bool)))
    data = policy.to_json()
    self.assertEqual(policies.from_json(data), policy)
    with self.assertRaises(ValueError) as caught:
      policies.from_json({**data, **changes})
    self.assertNotIn('\n', str(caught.exception))


class OneShotTest(parameterized.TestCase):

  def test_grows_once(self):
    policy = policies.OneShot(interval=3, depths=(1, 2), target=(4, 2))
    self.assertFalse(policy.finished)
    for epoch in (1, 2):
      policy, decision = policy.update(observe(epoch, 0))
      self.assertEqual(decision, policies.KEEP)
      self.assertEqual(policies.from_json(policy.to_json()), policy)
      self.assertEqual(policy.depths, (1, 2))
    policy, decision = policy.update(observe(3, 0))
    self.assertEqual(decision, policies.Decision('grow', target=(4, 2)))
    self.assertEqual(decision.stages((1, 2)), (0, 0, 0))
    self.assertEqual(policy.depths, (4, 2))
    self.assertTrue(policy.finished)
    data = json.loads(json.dumps(policy.to_json()))
    self.assertEqual(policies.from_json(data), policy)
    with self.assertRaisesRegex(ValueError, 'finished at epoch 3'):
      policy.update(observe(4, 0))

  @parameterized.parameters(
      (dict(interval=0), 'K .* is 0'),
      (dict(target=(1, 3)), '1-3 are below the depths 2-2'),
      (dict(target=(2, 2)), 'must differ before the growth'),
      (dict(target=(3, 3, 3)), '3-3-3 .* number of stages'),
      (dict(target=None), 'target depths are None'),
      (dict(target=(3, 0)), 'target depths are'),
      (dict(epoch=5), 'beyond the growth at epoch 4'),
      (dict(epoch=4), 'be equal from then on'),
      (dict(epoch=-1), 'epoch is -1'),
  )
  def test_refuses(self, changes, message):
    arguments = dict(interval=4, depths=(2, 2), target=(3, 3))
    with self.assertRaisesRegex(ValueError, message):
      policies.OneShot(**{**arguments, **changes})


class OtherPoliciesTest(parameterized.TestCase):

  def test_every_epochs(self):
    policy, decisions = policies.EveryEpochs(2), []
    for epoch in range(1, 6):
      policy, decision = policy.update(observe(epoch, 0))
      decisions.append(decision)
      self.assertEqual(policies.from_json(policy.to_json()), policy)
    self.assertEqual(
        decisions,
        [policies.KEEP, policies.grow()] * 2 + [policies.KEEP],
    )
    self.assertFalse(policy.finished)
    self.assertEqual(policy.depths, ())

  @parameterized.parameters((2, policies.grow()), (3, policies.FINISH))
  def test_every_epochs_ends(self, max_epochs, last):
    policy = policies.EveryEpochs(2, max_epochs)
    for epoch in range(1, max_epochs + 1):
      self.assertFalse(policy.finished)
      policy, decision = policy.update(observe(epoch, 0))
    self.assertEqual(decision, last)
    self.assertTrue(policy.finished)
    with self.assertRaisesRegex(ValueError, 'finished'):
      policy.update(observe(max_epochs + 1, 0))

  def test_every_epochs_refuses(self):
    with self.assertRaisesRegex(ValueError, 'is 0'):
      policies.EveryEpochs(0)
    with self.assertRaisesRegex(ValueError, 'next one is 1'):
      policies.EveryEpochs(1).update(observe(2, 0))

  @parameterized.parameters(((),), ((3, 2, 2),))
  def test_fixed(self, depths):
    policy = policies.Fixed(depths)
    for epoch in (1, 2, 9):
      self.assertEqual(
          policy.update(observe(epoch, 0)), (policy, policies.KEEP)
      )
    self.assertFalse(policy.finished)
    self.assertEqual(policy.depths, depths)
    data = json.loads(json.dumps(policy.to_json()))
    self.assertEqual(policies.from_json(data), policy)

  @parameterized.parameters(
      (('stay',), 'unknown'),
      (('keep', 1), 'only a decision to grow'),
      (('finish', None, (), (1,)), 'only a decision to grow'),
      (('keep', None, (), (), (2, 2)), 'only a decision to grow'),
      (('grow', 1, (), (), (2, 2)), 'one of them'),
  )
  def test_refuses_a_decision(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      policies.Decision(*arguments)


class DepthsTest(parameterized.TestCase):

  @parameterized.parameters(('3-2-2', (3, 2, 2)), ('200', (200,)))
  def test_round_trip(self, text, depths):
    self.assertEqual(policies.parse_depths(text), depths)
    self.assertEqual(policies.format_depths(depths), text)

  @parameterized.parameters(
      '3-x', '0-1', '', '-1-2', '1-', '1--2', '1,2', ' 1', '1\n', '٣', '01'
  )
  def test_refuses(self, text):
    with self.assertRaisesRegex(ValueError, "such as '3-2-2'") as caught:
      policies.parse_depths(text)
    self.assertNotIn('\n', str(caught.exception))


if __name__ == '__main__':
  absltest.main()
