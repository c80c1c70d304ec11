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

from autogrow_jax import policies

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
      interval=K, window=J, depths=seed, **{'threshold': '0.05', **kwargs}
  )


def convergent(K=4, seed=(1, 1, 1), **kwargs):
  return policies.Convergent(
      interval=K, depths=seed, **{'threshold': '0.05', **kwargs}
  )


def sequential(K=3, J=6, seed=(1, 1, 1), **kwargs):
  return policies.Sequential(
      interval=K, window=J, depths=seed, **{'error_rate': '0.05', **kwargs}
  )


def observe(epoch, correct, total=10_000, hits=None):
  return policies.Observation(epoch, 7 * epoch, correct, total, 1.5, 9, hits)


def observe_hits(epoch, hits):
  return observe(epoch, int(np.count_nonzero(hits)), len(hits), hits)


def stored(policy):
  """The policy through a checkpoint."""
  data = json.loads(json.dumps(policy.to_json()))
  restored = type(policy).from_json(data)
  assert restored == policy and hash(restored) == hash(policy)
  return restored


def events_of(before, after, decision):
  depths = policies.format_depths(before.depths)
  events = [(after.epoch, 'stop', stage, depths) for stage in decision.closed]
  name = {'grow': 'grow', 'finish': 'end', 'keep': None}[decision.action]
  if name:
    depths = policies.format_depths(after.depths)
    events.append((after.epoch, name, decision.stage, depths))
  return events


def play(policy, counts, total=10_000):
  """All events of a policy on counts, and the policy after them."""
  events = []
  for correct in counts:
    if policy.finished:
      break
    before = stored(policy)
    observation = observe(policy.epoch + 1, correct, total)
    policy, decision = before.update(observation)
    events += events_of(before, policy, decision)
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


@st.composite
def periodic_runs(draw):
  """A periodic policy without limits, and a curve."""
  rng = random.Random(draw(st.integers(0, 2**32)))
  total, interval = rng.choice([97, 2_000, 10_000]), rng.randint(1, 6)
  seed = tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 5)))
  policy = periodic(
      interval, interval + rng.randint(0, 25), seed, max_depths=(10**6,)
  )
  return policy, random_walk(rng, rng.randint(10, 150), total), total


quick = hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, database=None
)


class TraceTest(parameterized.TestCase):
  """The worked traces of the specification, event for event."""

  @parameterized.named_parameters(
      ('a', periodic(3, 6), TRACE_A, EVENTS_A),
      (
          'b',
          periodic(2, 5, (1, 1, 1, 1), max_depths=(3, 2, 9, 9)),
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

  @parameterized.parameters((3, '13-13-12', 108), (4, '10-10-10-10', 111))
  def test_trace_d(self, stages, found, epochs):
    events, end = play(periodic(seed=(1,) * stages), [5_000] * 200)
    self.assertEqual(policies.format_depths(end.depths), found)
    self.assertEqual(end.epoch, epochs)
    stops = [event for event in events if event[1] == 'stop']
    self.assertEqual(stops[0][0], 102)

  def test_growths_to_the_largest_depth_are_in_the_decisions(self):
    policy = periodic(2, 5, (1, 1, 1, 1), max_depths=(3, 2, 9, 9))
    capped = {}
    for epoch, correct in enumerate(to_counts(TRACE_B), 1):
      policy, decision = policy.update(observe(epoch, correct))
      if decision.capped:
        capped[epoch] = decision.capped
        self.assertEqual(decision.closed, ())
    self.assertEqual(capped, {4: (1,), 10: (0,)})


class RunningMaximumTest(parameterized.TestCase):

  @parameterized.parameters('periodic', 'convergent')
  def test_equals_the_pseudo_code(self, kind):
    rng = random.Random(kind)
    seen = set()
    for _ in range(200):
      seed = tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 5)))
      largest = tuple(d + rng.choice([0, 1, 2, 5, 100]) for d in seed)
      interval = rng.randint(1, 6)
      window = interval + rng.randint(0, 25)
      total = rng.choice([97, 2_000, 10_000])
      tau = rng.choice(['0.05', '.5', '1', '3'])
      policy = policies.make(
          kind, interval=interval, window=window, depths=seed,
          max_depths=largest, threshold=tau, error_rate='not for it',
      )
      literal = LiteralController(
          seed, interval, window, fractions.Fraction(tau), largest, kind, total
      )
      self.assertEqual(policy.finished, literal.finished)
      for epoch, correct in enumerate(random_walk(rng, 120, total), 1):
        if literal.finished:
          break
        before = policy
        policy, decision = policy.update(observe(epoch, correct, total))
        events = events_of(before, policy, decision)
        self.assertEqual(events, literal.on_epoch(correct))
        self.assertEqual(policy.finished, literal.finished)
        self.assertEqual(policy.depths, tuple(literal.depth))
        self.assertEqual(policy.open_stages, tuple(literal.open))
        seen.update((event[1], len(events)) for event in events)
    self.assertContainsSubset(
        {('grow', 1), ('grow', 2), ('stop', 2), ('end', 1), ('end', 2)}, seen
    )

  @quick
  @hypothesis.given(periodic_runs(), st.integers(0, 50))
  def test_timing_shift_and_running_maximum(self, run, shift):
    policy, counts, total = run
    counts = [count // 2 + total // 20 for count in counts]
    events, end = play(policy, counts, total)
    first_stop = policy.interval * math.ceil(
        (policy.window + 1) / policy.interval
    )
    for epoch, event, _, _ in events:
      if event == 'stop':
        self.assertGreaterEqual(epoch, first_stop)
    if end.finished:
      growths = sum(end.depths) - sum(policy.depths)
      self.assertEqual(end.epoch, policy.interval * (growths + 1))
    # Neither falls of the curve nor its height matter once it has begun.
    maxima = [max(counts[: i + 1]) for i in range(len(counts))]
    self.assertEqual(play(policy, maxima, total)[0], events)
    shift = min(shift, total // 3)
    shifted = [count + shift for count in counts]
    self.assertEqual(play(policy, shifted, total)[0], events)

  @parameterized.parameters(periodic(1, 1), periodic(3, 3), convergent(3))
  def test_no_stop_before_the_first_growth(self, policy):
    events, _ = play(policy, [5_000] * 40)
    self.assertEqual(events[0][1], 'grow')
    self.assertEqual(events[1][1:3], ('stop', events[0][2]))

  def test_gains_are_compared_exactly(self):
    # Five images in 10,000 are 0.05 points: help; four are not.
    curve = [[1_000 + gain * (e // 6) for e in range(200)] for gain in (5, 4)]
    events, end = play(periodic(3, 6, max_depths=(3, 5, 4)), curve[0])
    self.assertEqual(end.depths, (3, 5, 4))
    self.assertNotIn('stop', {event[1] for event in events})
    events, _ = play(periodic(3, 6), curve[1])
    self.assertEqual(events[2], (9, 'stop', 1, '2-2-1'))

  @parameterized.parameters(
      ('0.05', '1/20'), (0.05, '1/20'), ('.5', '1/2'), (1, '1'), ('1/3', '1/3'),
      ('0', '0'),
  )
  def test_threshold(self, given, held):
    self.assertEqual(
        periodic(threshold=given).threshold, fractions.Fraction(held)
    )


class LimitTest(parameterized.TestCase):

  @parameterized.parameters((6, '2-1-1'), (7, '2-2-1'), (8, '2-2-1'))
  def test_the_limit_ends_without_a_growth(self, limit, found):
    policy = periodic(3, 6, max_epochs=limit)
    events, end = play(policy, to_counts(TRACE_A))
    self.assertEqual(events[-1], (limit, 'end', None, found))
    self.assertTrue(end.finished)
    self.assertLen([e for e in events if e[0] == limit], 1)

  def test_a_stop_at_the_limit_is_in_the_decision(self):
    events, _ = play(periodic(3, 6, max_epochs=15), to_counts(TRACE_A))
    self.assertEqual(
        events[-2:], [(15, 'stop', 0, '3-2-2'), (15, 'end', None, '3-2-2')]
    )

  def test_a_limit_before_the_first_check(self):
    policy, decision = convergent(4, max_epochs=1).update(observe(1, 0))
    self.assertEqual(decision, policies.FINISH)
    self.assertTrue(policy.finished)

  def test_the_last_growth_is_trained_until_the_next_check(self):
    events, end = play(periodic(3, 6, (1,), max_depths=(2,)), [5_000] * 9)
    self.assertEqual(events, [(3, 'grow', 0, '2'), (6, 'end', None, '2')])
    self.assertEqual(end.epoch, 6)

  def test_largest_depths(self):
    self.assertTrue(periodic(seed=(2, 2), max_depths=(2, 2)).finished)
    self.assertEqual(periodic(max_depths=(9,)).max_depths, (9, 9, 9))
    events, end = play(periodic(1, 1, (1,), threshold='0'), [7_000] * 300)
    self.assertEqual(end.depths, (200,))
    self.assertNotIn('stop', {event[1] for event in events})


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
      largest = tuple(d + int(rng.choice([0, 1, 3, 50])) for d in seed)
      policy = sequential(K, J, seed, max_depths=largest, error_rate=alpha)
      literal = LiteralSequential(K, J, policy.error_rate, seed, largest)
      total = int(rng.choice([5, 16, 61]))
      for epoch, hits in enumerate(hits_of_a_curve(rng, 40, total), 1):
        self.assertEqual(policy.finished, literal.finished)
        before = stored(policy)
        if policy.finished:
          break
        policy, decision = before.update(observe_hits(epoch, hits))
        events = events_of(before, policy, decision)
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

  def test_growths_by_chance_are_as_few_as_stated(self):
    rng, alpha = np.random.default_rng(0), 0.2
    # Nothing is right in the first interval, and nothing improves after it.
    policy = sequential(1, 6, error_rate=alpha)
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

  def test_state_stays_small(self):
    policy, hits = sequential(3, 10, (1,)), np.zeros(50_000, bool)
    for epoch in range(1, 31):
      hits[: 1_000 * epoch] = True
      policy, _ = policy.update(observe_hits(epoch, hits))
    self.assertLen(policy.memory, 5 * 3)
    self.assertLess(len(json.dumps(policy.to_json())), 15 * 8_500)

  def test_refuses_counts_alone(self):
    with self.assertRaisesRegex(ValueError, 'needs hits'):
      sequential().update(observe(1, 5, 10))


class OtherPoliciesTest(parameterized.TestCase):

  def test_one_shot(self):
    policy = policies.OneShot(interval=3, depths=(1, 2), target=(4, 2))
    for epoch in (1, 2):
      policy, decision = stored(policy).update(observe(epoch, 0))
      self.assertEqual(decision, policies.KEEP)
      self.assertEqual(policy.depths, (1, 2))
    policy, decision = stored(policy).update(observe(3, 0))
    self.assertEqual(decision, policies.Decision('grow', target=(4, 2)))
    self.assertEqual(decision.stages((1, 2)), (0, 0, 0))
    self.assertEqual(stored(policy).depths, (4, 2))
    self.assertTrue(policy.finished)

  @parameterized.parameters((2, policies.grow()), (3, policies.FINISH))
  def test_every_epochs(self, max_epochs, last):
    policy, decision = policies.EveryEpochs(2, max_epochs), None
    for epoch in range(1, max_epochs + 1):
      self.assertFalse(policy.finished)
      policy, decision = stored(policy).update(observe(epoch, 0))
    self.assertEqual(decision, last)
    self.assertTrue(policy.finished)

  def test_fixed(self):
    policy = stored(policies.Fixed())
    self.assertEqual(policy.update(observe(9, 0)), (policy, policies.KEEP))
    self.assertFalse(policy.finished)

  def test_a_policy_of_ones_own_is_stored(self):
    @dataclasses.dataclass(frozen=True)
    class Shallowest(policies.Policy):
      depths: tuple[int, ...]
      blocks: int

      @property
      def finished(self):
        return sum(self.depths) >= self.blocks

      def update(self, observation):
        stage = self.depths.index(min(self.depths))
        depths = list(self.depths)
        depths[stage] += 1
        policy = dataclasses.replace(self, depths=tuple(depths))
        return policy, policies.grow(stage)

    policy, decision = stored(Shallowest((2, 1), 4)).update(observe(1, 0))
    self.assertEqual(decision, policies.grow(1))
    self.assertTrue(stored(policy).finished)

  def test_make_takes_the_settings_of_all(self):
    settings = dict(
        interval=2, window=4, threshold='1', error_rate='0.1', depths=(1, 2),
        max_depths=None, max_epochs=8, target=(2, 2), patience=0,
    )
    for name, kind in policies.POLICIES.items():
      policy = policies.make(name, **settings)
      self.assertIsInstance(policy, kind)
      for field in dataclasses.fields(policy):
        if field.metadata:
          self.assertNotEmpty(field.metadata['help'])
          self.assertIn(field.name, settings)


class NextGrowthTest(parameterized.TestCase):

  @parameterized.product(
      policy=(periodic(2, 9), convergent(2), sequential(2, 9))
  )
  def test_is_the_one_that_comes(self, policy):
    observations = [
        observe(epoch, 100, 100, np.ones(100, bool)) for epoch in range(1, 60)
    ]
    course = []
    for observation in observations:
      if not policy.finished:
        policy, decision = policy.update(observation)
        course.append((policy, observation, decision))
    self.assertTrue(policy.finished)
    for index, (policy, observation, _) in enumerate(course):
      growths = [d for _, _, d in course[index + 1 :] if d.action == 'grow']
      self.assertEqual(
          policies.next_growth(policy, observation),
          growths[0] if growths else None,
      )

  def test_none_of_a_policy_that_never_grows(self):
    self.assertIsNone(policies.next_growth(policies.Fixed(), observe(1, 1)))


class RefusedTest(parameterized.TestCase):

  @parameterized.parameters(
      (periodic, dict(K=0), 'K is 0'),
      (periodic, dict(max_epochs=0), 'max_epochs 0'),
      (periodic, dict(J=2), 'J is 2 epochs.* at least K, 3'),
      (periodic, dict(seed=()), r'depths, \(\)'),
      (periodic, dict(seed=(1, 0)), r'depths, \(1, 0\)'),
      (periodic, dict(seed=(1, 3), max_depths=(5, 2)), r'depths is \(5, 2\)'),
      (periodic, dict(seed=(1, 3), max_depths=(5, 3, 4)), 'number of stages'),
      (periodic, dict(threshold='nan'), 'threshold is nan'),
      (periodic, dict(threshold='-1'), 'threshold is -1'),
      (convergent, dict(threshold='1/0'), 'threshold is 1/0'),
      (sequential, dict(J=2), 'J is 2 epochs'),
      (sequential, dict(error_rate='0.5'), 'error_rate is 0.5.* below 0.5'),
      (sequential, dict(error_rate='5%'), 'like 0.05'),
  )
  def test_settings(self, kind, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      kind(**arguments)

  @parameterized.parameters(
      ((1, 3), r'target is \(1, 3\)'),
      ((2, 2), 'must differ'),
      ((3, 3, 3), 'number of stages'),
      (None, 'needs a target'),
  )
  def test_targets(self, target, message):
    with self.assertRaisesRegex(ValueError, message):
      policies.OneShot(interval=4, depths=(2, 2), target=target)

  @parameterized.parameters(0, 1, 3)
  def test_another_epoch(self, epoch):
    _, policy = play(periodic(), [1])
    with self.assertRaisesRegex(ValueError, f'Epoch {epoch} cannot follow 1'):
      policy.update(observe(epoch, 1))

  @parameterized.parameters(periodic(max_epochs=1), policies.EveryEpochs(1, 1))
  def test_epochs_after_the_end(self, policy):
    policy, _ = policy.update(observe(1, 1))
    with self.assertRaisesRegex(ValueError, 'Epoch 2 cannot follow 1'):
      policy.update(observe(2, 1))


class DepthsTest(parameterized.TestCase):

  @parameterized.parameters(('3-2-2', (3, 2, 2)), ('200', (200,)))
  def test_round_trip(self, text, depths):
    self.assertEqual(policies.parse_depths(text), depths)
    self.assertEqual(policies.format_depths(depths), text)

  @parameterized.parameters(
      '3-x', '0-1', '', '-1-2', '1-', '1--2', '1,2', ' 1', '1\n', '٣', '01'
  )
  def test_refuses(self, text):
    with self.assertRaisesRegex(ValueError, "such as '3-2-2'"):
      policies.parse_depths(text)


if __name__ == '__main__':
  absltest.main()
