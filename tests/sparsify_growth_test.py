"""Tests of the growths of `Sparsify`: new samples, and the last prune.

Numbers are those of the invariants that the method's specification lists.
"""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.methods.sparsify import masks
from autogrow_jax.methods.sparsify import space as space_lib
from autogrow_jax.run import steps
import tiny_masks
import tiny_networks

METHOD = tiny_masks.METHOD


def resampled(architecture, state, method=METHOD, is_last=False):
  """The state after one proposal, and the report."""
  change = tiny_masks.propose(method, architecture, state, is_last=is_last)
  return change.target, *tiny_masks.grow(state, change, method)


class GrowthTest(parameterized.TestCase):
  """New samples, and the last prune."""

  @parameterized.parameters(tiny_masks.BASIC, tiny_masks.PLAIN)
  def test_detached_units_wait_unchanged(self, network):
    """Invariants 3, 23, 24: not a bit, through a step in both views."""
    architecture = tiny_masks.seed(network)
    state = tiny_masks.sampled(architecture)
    there = tiny_masks.attached(architecture, METHOD, state)
    for compact in (True, False):
      active = METHOD.execution.active(architecture, state.stats['method'])
      active = dataclasses.replace(active, compact=compact)
      taken = active.take(state)
      # A step changes everything that is computed, padding included.
      changed = jax.tree.map(
          lambda leaf: leaf + 1 if leaf.dtype == np.float32 else leaf, taken
      )
      after = active.put(changed, state)
      for name, tree in state.params['weights'].items():
        for old, new, mask in zip(
            *map(jax.tree.leaves, (
                tree, after.params['weights'][name], there[name]
            )), strict=True,
        ):
          np.testing.assert_array_equal(new, np.where(mask, old + 1, old))
      flat = tiny_networks.leaves(after)
      for path, leaf in tiny_networks.leaves(state).items():
        if f'/{tiny_masks.OFF}/' in path:
          np.testing.assert_array_equal(flat[path], leaf, path)
      tiny_networks.assert_same(active.put(taken, state), state)

  @parameterized.parameters(True, False)
  def test_masks_of_a_detached_layer_rest(self, compact):
    """Through a training step, although moments and decay would move them."""
    architecture = tiny_masks.seed(tiny_masks.BASIC)
    state = tiny_masks.sampled(architecture)
    active = METHOD.execution.active(architecture, state.stats['method'])
    active = dataclasses.replace(active, compact=compact)
    layout = view.layout(architecture, computed=active.computed)
    computation = tiny_networks.computation(tiny_masks.TX, method=METHOD)
    step = jax.jit(
        functools.partial(steps.train_step, computation, layout),
        compiler_options=tiny_networks.FAST_COMPILE,
    )
    packed, _ = step(
        view.pack(active.take(state), layout),
        steps.new_meters(), np.zeros((6, *tiny_networks.IMAGE), np.uint8),
        tiny_masks.LABELS, None, np.float32(0.1),
    )
    after = active.put(view.unpack(packed, layout), state).params['aux']
    for name, s in state.params['aux']['channels'].items():
      rests = name.startswith(f'{tiny_masks.OFF}.')
      np.testing.assert_array_equal(
          after['channels'][name] == s, np.full(s.shape, rests), name
      )
    for name, s in state.params['aux']['layers'].items():
      self.assertNotEqual(after['layers'][name], s)

  @parameterized.parameters(tiny_masks.BASIC, tiny_masks.PLAIN)
  def test_programs_see_how_many_layers_not_which(self, network):
    """One layout, one structure; and each way the same as under masks."""
    architecture = tiny_masks.seed(network, 4)
    blocks = architecture.stages[1][1:]
    layouts, shapes = set(), set()
    for off in (blocks[:1], blocks[1:2], blocks[2:]):
      state = tiny_masks.sampled(architecture, off=off)
      q = state.stats['method']['q']
      half = {n: np.arange(on.size) < 3 for n, on in q['channels'].items()}
      state = tiny_masks.masked(state, q={**q, 'channels': half})
      active = METHOD.execution.active(architecture, state.stats['method'])
      layout = view.layout(architecture, computed=active.computed)
      taken = active.take(state)
      tiny_networks.assert_same(active.put(taken, state), state)
      layouts.add(layout)
      shapes.add(str(tiny_networks.described(view.pack(taken, layout))))
      whole, part = (
          tiny_masks.logits(METHOD, architecture, state, compact=compact)
          for compact in (False, True)
      )
      tiny_masks.same(part, whole)
    self.assertLen(layouts, 1)
    self.assertLen(shapes, 1)

  @parameterized.parameters(
      tiny_masks.BASIC, tiny_masks.PLAIN, tiny_masks.MOBILE
  )
  def test_what_returns_has_its_weights_but_no_momentum(self, network):
    """Invariants 8, 10, 23, 24."""
    architecture = tiny_masks.seed(network)
    state = tiny_masks.sampled(architecture)
    q = state.stats['method']['q']
    wanted = {
        'channels': {n: ~on | (np.arange(on.size) == 0)
                     for n, on in q['channels'].items()},
        'layers': {n: ~on for n, on in q['layers'].items()},
    }
    aux = tiny_masks.hard(wanted)
    state = tiny_masks.masked(state, s=aux)
    _, new, report = resampled(architecture, state)
    for name in ('weights', 'aux'):
      tiny_networks.assert_same(new.params[name], state.params[name])
    tiny_networks.assert_same(
        new.stats['network'], state.stats['network']
    )
    before = tiny_masks.attached(architecture, METHOD, state)
    after = tiny_masks.attached(architecture, METHOD, new)
    old, fresh = tiny_networks.leaves(state), tiny_networks.leaves(new)
    seen = 0
    for path, there in tiny_networks.leaves(after).items():
      was = tiny_networks.leaves(before)[path]
      (moment,) = (p for p in old if p.startswith('opt') and p.endswith(path))
      np.testing.assert_array_equal(fresh[moment][there & ~was], 0, path)
      kept = there & was
      np.testing.assert_array_equal(fresh[moment][kept], old[moment][kept])
      seen += np.count_nonzero(kept)
    self.assertGreater(seen, 0)
    memory, drawn = new.stats['method'], state.stats['method']
    for name, on in wanted['channels'].items():
      block = dict(space_lib.of(architecture, 'both').owners).get(name)
      if block == tiny_masks.ON:  # Not there now: its channels rest.
        on = drawn['q']['channels'][name]
        np.testing.assert_array_equal(memory['t']['channels'][name], 0)
      else:
        np.testing.assert_array_equal(memory['t']['channels'][name], on)
      np.testing.assert_array_equal(memory['q']['channels'][name], on, name)
    self.assertEqual(report['layers_grown'], 1)
    self.assertEqual(report['layers_detached'], 1)
    # Once more the other way round: nothing is grown twice.
    back = tiny_masks.masked(new, s=tiny_masks.hard(q))
    _, again, report = resampled(architecture, back)
    self.assertEqual(report['layers_reattached'], 1)
    self.assertEqual(report['layers_grown'], 0)
    for kind, leaves in again.stats['method']['grown'].items():
      for name, grown in leaves.items():
        self.assertTrue(np.all(grown | ~memory['q'][kind][name]), name)

  def test_the_first_network(self):
    """Invariants 6, 8: one filter in each layer, one layer in each stage."""
    for network, options in tiny_masks.VARIANTS:
      architecture = tiny_masks.seed(network, **options)
      memory = METHOD.extra(architecture).other
      active = METHOD.execution.active(architecture, memory)
      sizes = dict(architecture.sizes)
      self.assertEqual(
          active.counts, {a: 1 for a in sizes if a not in ('image', 'classes')}
      )
      self.assertEqual(
          dict(active.blocks), {tiny_masks.OFF: False, tiny_masks.ON: False}
      )

  @parameterized.parameters(tiny_masks.BASIC, tiny_masks.PLAIN)
  def test_the_last_prune(self, network):
    """Invariant 25; masks, statistics and moments of what is kept are kept."""
    architecture = tiny_masks.seed(network)
    state = tiny_masks.sampled(architecture)
    small, pruned, report = resampled(architecture, state, is_last=True)
    self.assertEqual(small.depths, (1, 2))
    q = state.stats['method']['q']
    space = space_lib.of(architecture, 'both')
    self.assertEqual(space_lib.of(small, 'both').layers, (tiny_masks.ON,))
    for name, axes in space.groups:
      if name not in dict(small.sizes):
        continue
      kept = np.flatnonzero(q['channels'][name])
      for leaf in ('t', 'noise', 'grown'):
        np.testing.assert_array_equal(
            pruned.stats['method'][leaf]['channels'][name],
            state.stats['method'][leaf]['channels'][name][kept],
        )
      np.testing.assert_array_equal(
          pruned.params['aux']['channels'][name],
          state.params['aux']['channels'][name][kept],
      )
      for axis in axes:
        if axis in report['widths']:
          self.assertEqual(report['widths'][axis], len(kept))
          self.assertEqual(small.size(axis), len(kept))
    table = state_lib.axis_table(small, METHOD.extra)
    for path, leaf in jax.tree_util.tree_leaves_with_path(pruned):
      axes = table.find(axes_lib.names(path))
      for axis, size in zip(axes or (), leaf.shape):
        if axis is not None:
          self.assertEqual(small.size(axis.name), size, path)
    self.assertIsNone(METHOD.execution.active(small, pruned.stats['method']))
    self.assertIsNone(tiny_masks.propose(METHOD, small, pruned))

  @parameterized.product(
      network=(tiny_masks.BASIC, tiny_masks.MLP), grow=space_lib.GROWS
  )
  def test_nothing_is_left_to_choose(self, network, grow):
    """A network that lost all its layers is a network still."""
    method = dataclasses.replace(METHOD, grow=grow)
    architecture = tiny_masks.seed(network)
    state = tiny_masks.state(architecture, method)
    small, pruned, _ = resampled(architecture, state, method, is_last=True)
    depth = 3 if grow == 'channels' else 1
    self.assertEqual(small.depths[1], depth)
    got = tiny_networks.described(pruned)
    with_axes = state_lib.abstract_state(
        small, tiny_masks.TX, extra=method.extra
    )
    self.assertEqual(got, tiny_networks.described(with_axes))

  def test_by_threshold(self):
    method = dataclasses.replace(METHOD, final='threshold')
    architecture = tiny_masks.seed(tiny_masks.BASIC)
    state = tiny_masks.sampled(architecture, method=method)
    s = state.params['aux']
    small, pruned, report = resampled(
        architecture, state, method, is_last=True
    )
    for name, kept in pruned.params['aux']['channels'].items():
      likely = s['channels'][name][s['channels'][name] >= 0]
      np.testing.assert_array_equal(
          kept, likely if likely.size else [s['channels'][name].max()]
      )
    q, likely = state.stats['method']['q'], masks.guarded(
        jax.tree.map(lambda s: s >= 0, s), s
    )
    self.assertEqual(report['unlike_threshold'], sum(
        np.sum(a != b)
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(likely))
    ))

  def test_a_sample_is_of_its_step(self):
    """Invariant 14: of seed, step, names and s alone."""
    architecture = tiny_masks.seed(tiny_masks.BASIC)
    state = tiny_masks.masked(
        tiny_masks.state(architecture),
        s=tiny_masks.draw(tiny_masks.state(architecture))[1],
    )
    draw = lambda state: resampled(architecture, state)[1].stats['method']['q']
    first = draw(state)
    other = tiny_masks.state(architecture, number=5)
    tiny_networks.assert_same(
        draw(other.replace(params={
            'weights': other.params['weights'], 'aux': state.params['aux']
        }, key=state.key)),
        first,
    )
    for changed in (
        state.replace(step=np.int32(7)), state.replace(key=other.key)
    ):
      self.assertFalse(all(
          np.array_equal(a, b)
          for a, b in zip(*map(jax.tree.leaves, (first, draw(changed))))
      ))

  def test_frozen(self):
    method = dataclasses.replace(METHOD, freeze=0.5)
    architecture = tiny_masks.seed(tiny_masks.BASIC)
    state = tiny_masks.state(architecture, method)
    for step, is_frozen in ((100, False), (101, True)):
      change = tiny_masks.propose(
          method, architecture, state.replace(step=np.int32(step))
      )
      self.assertEqual(change is None, is_frozen)

  def test_gumbel_noise_is_held_between_samples(self):
    method = dataclasses.replace(METHOD, relaxation='gumbel')
    architecture = tiny_masks.seed(tiny_masks.BASIC)
    state = tiny_masks.sampled(architecture, method=method)
    state = resampled(architecture, state, method)[1]
    noise = state.stats['method']['noise']
    self.assertGreater(np.std(np.concatenate(
        [leaf for leaf in noise['channels'].values()]
    )), 1)
    whole = tiny_masks.logits(method, architecture, state, compact=False)
    flat = tiny_masks.masked(
        state, noise=jax.tree.map(np.zeros_like, noise)
    )
    other = tiny_masks.logits(method, architecture, flat, compact=False)
    self.assertGreater(np.abs(other[0] - whole[0]).max(), 1e-3)
    change = method.conclude(architecture, state)
    pruned, _ = tiny_masks.grow(state, change, method)
    tiny_masks.same(
        tiny_masks.logits(method, change.target, pruned, compact=False),
        whole,
    )


if __name__ == '__main__':
  absltest.main()
