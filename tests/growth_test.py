"""Tests of growth: what is carried, what is new, what stays the same."""

import copy
import dataclasses
import functools
import re
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_networks

from autogrow_jax import architecture as architecture_lib
from autogrow_jax.run import checkpoint
from autogrow_jax import data
from autogrow_jax import growth
from autogrow_jax import networks
from autogrow_jax.run import parallel
from autogrow_jax.run import programs
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.methods import base as methods_base
from autogrow_jax.networks import base

NEW = growth.NEW
FRESH = -1.0  # What `draw_fresh` puts everywhere.
KEY = jax.random.key(7)
SGD = tiny_networks.OPTIMIZERS['sgd']


def draw_fresh(part, key):
  """Stands in for `base.init`: tells new entries from all others."""
  del key
  return jax.tree.map(
      lambda leaf: np.full(leaf.shape, FRESH, leaf.dtype), base.shapes(part)
  )


def numbered(state):
  """Numbers the entries of every array from 1.

  Parameters and their moments are then equal, and stay so whatever becomes of
  them, but for new entries.
  """

  def number(leaf):
    if leaf.ndim and leaf.dtype == np.float32:
      return np.arange(1, leaf.size + 1, dtype='f4').reshape(leaf.shape)
    return leaf

  return jax.tree.map(number, state)


def grow(state, change, tx=SGD, draw=draw_fresh, **arguments):
  with mock.patch.object(base, 'init', draw):
    return growth.grow(state, change, tx, key=KEY, **arguments)


def axes_of(architecture):
  """All axes that may change their size."""
  return [
      axis for axis, _ in architecture.sizes if axis not in ('image', 'classes')
  ]


def private_axis(architecture, block='s1b1'):
  return next(a for a in axes_of(architecture) if a.startswith(block + '.'))


def streams_of(architecture):
  """The axis that leaves each stage, and that of the stem."""
  chain = networks.parts(architecture)
  ends = {'stem', *(names[-1] for names in architecture.stages)}
  return sorted({dict(p.axes)['out'] for p in chain if p.name in ends})


def splits(streams, block):
  """(family, options, axis): some streams and a block's own axis of each."""
  for family, options in tiny_networks.VARIANTS:
    architecture = tiny_networks.seed(family, **options)
    for axis in (
        *streams_of(architecture)[streams], private_axis(architecture, block)
    ):
      yield family, options, axis


def resize_all(architecture, change):
  """One event that changes all axes; `change`: old indices -> sources."""
  sources = {
      axis: np.asarray(change(list(range(architecture.size(axis)))))
      for axis in axes_of(architecture)
  }
  return growth.Growth(
      architecture.resized({a: len(source) for a, source in sources.items()}),
      sources,
  )


def changes(architecture):
  """Growths of every kind."""
  split = next(a for a in streams_of(architecture) if a.startswith('s1'))
  return {
      'append': growth.append(architecture, 1),
      'remove': growth.Growth(architecture.without_block('s1b1')),
      'widen': growth.widen(architecture, private_axis(architecture), 2),
      'split': growth.split(architecture, split, np.array([0, 2])),
      'prune': growth.prune(architecture, split, np.array([3, 0])),
      'all': resize_all(architecture, lambda old: [NEW, *old[2:]]),
  }


class CarryTest(parameterized.TestCase):

  @parameterized.parameters(
      ('append', ['s1b2']), ('widen', ['s1b1']), ('remove', []), ('split', []),
      ('prune', []),
  )
  def test_draws_only_what_is_new(self, kind, want):
    """A program for each initialiser takes longer than a whole growth."""
    architecture = tiny_networks.seed('basic3resnet', (1, 2, 1))
    drawn = []

    def draw(part, key):
      drawn.append(part.name)
      return draw_fresh(part, key)

    state = tiny_networks.state(architecture, SGD)
    grow(state, changes(architecture)[kind], draw=draw)
    self.assertEqual(drawn, want)

  @parameterized.parameters(
      *((family, 'sgd') for family in networks.FAMILIES),
      *(('basic3resnet', name) for name in tiny_networks.OPTIMIZERS),
  )
  def test_every_network_and_every_optimizer(self, family, optimizer):
    self.assert_grows(family, optimizer)

  @parameterized.product(
      family=tuple(networks.FAMILIES),
      optimizer=tuple(tiny_networks.OPTIMIZERS),
  )
  @pytest.mark.slow
  def test_every_network_with_every_optimizer(self, family, optimizer):
    self.assert_grows(family, optimizer)

  def assert_grows(self, family, optimizer):
    tx = tiny_networks.OPTIMIZERS[optimizer]
    architecture = tiny_networks.seed(family)
    state = numbered(tiny_networks.state(architecture, tx))
    before = tiny_networks.leaves(copy.deepcopy(state))
    for name, change in changes(architecture).items():
      with self.subTest(name):
        grown, _ = grow(state, change, tx)
        self.assertEqual(
            tiny_networks.described(grown),
            tiny_networks.described(
                state_lib.abstract_state(change.architecture, tx)
            ),
        )
        gathered, _ = grow(
            state, dataclasses.replace(change, patch=growth.no_patch), tx
        )
        self.assert_moments_follow(
            tiny_networks.leaves(grown), tiny_networks.leaves(gathered), before
        )
        # The old state is as it was.
        for path, leaf in tiny_networks.leaves(state).items():
          np.testing.assert_array_equal(leaf, before[path], path)

  def assert_moments_follow(self, grown, gathered, before):
    """Moments are where their parameters are; new ones as documented."""
    moments = 0
    for path, leaf in grown.items():
      if not path.startswith('opt_state/') or '/weights/' not in path:
        continue
      moments += 1
      # Momentum is scaled with its parameter; what sums gradients is not.
      is_gradient = {'nu', 'acc_grads'} & set(path.split('/'))
      parameters = gathered if is_gradient else grown
      parameter = parameters['params/weights/' + path.partition('/weights/')[2]]
      default = 0.0
      if 'nu' in path.split('/'):
        *slot, _, layer, name = path.split('/')
        same = [path] if path in before else [
            other
            for other, old in before.items()
            if other.split('/')[:-3] == slot
            and other.split('/')[-2:] == [layer, name]
            and old.shape == leaf.shape
        ]
        default = np.float32(
            np.mean([before[other].mean(dtype=np.float64) for other in same])
        )
      np.testing.assert_array_equal(
          leaf, np.where(parameter == FRESH, default, parameter), path
      )
    self.assertGreater(moments, 0)

  @parameterized.parameters(
      ('widen', [0, 1, 2, 3, NEW, NEW], 6),
      ('split', [0, 1, 2, 3, 2, 0], 6),
      ('prune', [3, 1], 2),
      ('shuffle', [2, NEW, 0, 0, 1], 5),
  )
  def test_private_axis(self, name, source, size):
    del name
    architecture = tiny_networks.seed('basic3resnet', widths=(4, 4, 4))
    state = numbered(tiny_networks.state(architecture))
    change = growth.Growth(
        architecture.resized({'s1b0.mid': size}), {'s1b0.mid': np.array(source)}
    )
    old = tiny_networks.leaves(state)
    new = tiny_networks.leaves(grow(state, change)[0])
    is_new = np.array(source) == NEW
    vector = old['params/weights/s1b0/norm1/bias'][source]
    vector[is_new] = FRESH
    for leaf in ('scale', 'bias'):
      np.testing.assert_array_equal(
          new[f'params/weights/s1b0/norm1/{leaf}'], vector
      )
    for leaf in ('mean', 'var'):
      np.testing.assert_array_equal(
          new[f'stats/network/s1b0/norm1/{leaf}'], vector
      )
    writer = old['params/weights/s1b0/conv1/kernel'][..., source]
    writer[..., is_new] = FRESH
    np.testing.assert_array_equal(
        new['params/weights/s1b0/conv1/kernel'], writer
    )
    reader = old['params/weights/s1b0/conv2/kernel'][:, :, source]
    reader[:, :, is_new] = FRESH
    np.testing.assert_array_equal(
        new['params/weights/s1b0/conv2/kernel'], reader
    )
    reader[:, :, is_new] = 0
    trace = next(
        path for path in new if path.endswith('trace/weights/s1b0/conv2/kernel')
    )
    np.testing.assert_array_equal(new[trace], reader)
    touched = ('s1b0/conv1', 's1b0/norm1', 's1b0/conv2')
    for path, leaf in new.items():
      if not any(part in path for part in touched):
        np.testing.assert_array_equal(leaf, old[path], path)

  def test_stream(self):
    # Everything that reads or writes the stage's stream, and nothing else.
    architecture = tiny_networks.seed('basic3resnet', widths=(4, 4, 4))
    state = numbered(tiny_networks.state(architecture))
    change = growth.prune(architecture, 's1', np.array([2, 0]))
    old = tiny_networks.leaves(state)
    new = tiny_networks.leaves(grow(state, change)[0])
    sides = {
        's1b0/conv2/kernel': 3,
        's1b0/shortcut_conv/kernel': 3,
        's1b1/conv1/kernel': 2,
        's1b1/conv2/kernel': 3,
        's2b0/conv1/kernel': 2,
        's2b0/shortcut_conv/kernel': 2,
        **{
            f'{layer}/{leaf}': 0
            for layer in ('s1b0/norm2', 's1b0/shortcut_norm', 's1b1/norm2')
            for leaf in ('scale', 'bias', 'mean', 'var')
        },
    }
    for path, leaf in new.items():
      side = sides.get('/'.join(path.split('/')[-3:]))
      want = old[path]
      if side is not None:
        want = np.take(want, [2, 0], axis=side)
      np.testing.assert_array_equal(leaf, want, path)

  def test_several_axes_of_one_leaf(self):
    architecture = tiny_networks.seed('basic3resnet', widths=(4, 4, 4))
    state = numbered(tiny_networks.state(architecture))
    change = growth.Growth(
        architecture.resized({'s1': 5, 's1b1.mid': 3}),
        {'s1': np.array([0, 1, 2, 3, NEW]), 's1b1.mid': np.array([1, NEW, 1])},
    )
    path = 'params/weights/s1b1/conv1/kernel'
    old = tiny_networks.leaves(state)[path]
    new = tiny_networks.leaves(grow(state, change)[0])[path]
    want = np.full((3, 3, 5, 3), FRESH)
    want[:, :, :4, [0, 2]] = old[:, :, :, [1, 1]]
    np.testing.assert_array_equal(new, want)

  def test_appending_carries_everything(self):
    architecture = tiny_networks.seed('bottleneck4resnet')
    state = numbered(tiny_networks.state(architecture))
    grown, carried = grow(state, growth.append(architecture, 2))
    old, new = tiny_networks.leaves(state), tiny_networks.leaves(grown)
    for path, leaf in old.items():
      np.testing.assert_array_equal(new[path], leaf, path)
    added = new.keys() - old.keys()
    self.assertEqual({path.split('/')[-3] for path in added}, {'s2b1'})
    for path in added:
      value = 0 if path.startswith('opt_state') else FRESH
      np.testing.assert_array_equal(new[path], value, path)
    # Three kernels, three norms of two leaves; momentum is the only moment.
    self.assertEqual(carried.optimizer['new'], 9)
    self.assertEqual(carried.optimizer['changed'], 0)
    self.assertEqual(carried.optimizer['dropped'], 0)
    self.assertEqual(
        carried.optimizer['kept'], len(jax.tree.leaves(state.opt_state))
    )

  def test_counts_of_optimizer_leaves(self):
    architecture = tiny_networks.seed('basic3resnet')
    state = numbered(tiny_networks.state(architecture))
    leaves = len(jax.tree.leaves(state.opt_state))
    _, carried = grow(state, growth.Growth(architecture.without_block('s1b1')))
    self.assertEqual(
        carried.optimizer,
        {'kept': leaves - 6, 'changed': 0, 'new': 0, 'dropped': 6},
    )
    _, carried = grow(state, growth.widen(architecture, 's1b1.mid', 1))
    self.assertEqual(
        carried.optimizer,
        {'kept': leaves - 4, 'changed': 4, 'new': 0, 'dropped': 0},
    )

  def test_step_key_and_learning_rate_stay(self):
    architecture = tiny_networks.seed('plain3net')
    state = tiny_networks.state(architecture, number=3)
    state = state.replace(
        step=np.int32(41),
        opt_state=optax.tree.set(
            state.opt_state, learning_rate=np.float32(0.25)
        ),
    )
    grown, _ = grow(state, growth.append(architecture, 0))
    self.assertEqual(grown.step, 41)
    np.testing.assert_array_equal(
        grown.key, tiny_networks.key_data(jax.random.key(3))
    )
    self.assertEqual(optax.tree.get(grown.opt_state, 'learning_rate'), 0.25)

  def test_appending_twice_reaches_the_deeper_network(self):
    architecture = tiny_networks.seed('plain4net')
    state = tiny_networks.state(architecture)
    for stage in (3, 0):
      change = growth.append(architecture, stage)
      state, _ = grow(state, change)
      architecture = change.architecture
    deeper = tiny_networks.seed('plain4net', (2, 2, 1, 2))
    self.assertEqual(architecture, deeper)
    self.assertEqual(
        tiny_networks.described(state),
        tiny_networks.described(tiny_networks.state(deeper)),
    )

  def test_selection_has_no_new_entries(self):
    # A shortcut without parameters stays one: new units read and write zeros.
    architecture = tiny_networks.seed('basic3resnet', shortcut='A')
    state = tiny_networks.state(architecture)
    path = 'stats/network/s1b0/shortcut/select'
    old = tiny_networks.leaves(state)[path]
    np.testing.assert_array_equal(old, np.eye(4, 6, k=1))
    change = growth.Growth(
        architecture.resized({'s0': 5, 's1': 8}),
        {
            's0': np.array([0, 1, 2, 3, NEW]),
            's1': np.array([0, 1, NEW, 2, 3, 4, 5, NEW]),
        },
    )
    new = tiny_networks.leaves(grow(state, change)[0])[path]
    np.testing.assert_array_equal(
        new,
        [
            [0, 1, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
        ],
    )

  def test_fresh_units_are_drawn(self):
    # With the real initialiser: no zeros, and other keys give other draws.
    architecture = tiny_networks.seed('plain3net', (1, 1, 1))
    state = tiny_networks.state(architecture)
    change = growth.widen(architecture, 's2b0.out', 2)
    kernels = [
        growth.grow(state, change, SGD, key=jax.random.key(number))[0]
        .params['weights']['s2b0']['conv']['kernel']
        for number in (0, 0, 1)
    ]
    bound = 1 / np.sqrt(9 * 6)
    new = kernels[0][..., 8:]
    self.assertBetween(np.abs(new).max(), 0.8 * bound, bound)
    self.assertGreater(np.abs(new).min(), 0)
    np.testing.assert_array_equal(kernels[0], kernels[1])
    self.assertFalse(np.isin(new, kernels[2][..., 8:]).any())
    np.testing.assert_array_equal(kernels[0][..., :8], kernels[2][..., :8])

  def test_leaves_of_a_method(self):
    def extra(architecture):
      sizes = dict(architecture.sizes)
      return (
          {
              axis: {'logit': np.full(sizes[axis], FRESH, 'f4')}
              for axis in ('s1', 's1b0.mid')
          },
          {
              block: {'seen': np.full((), FRESH, 'f4')}
              for stage in architecture.stages
              for block in stage
          },
      )

    architecture = tiny_networks.seed('basic3resnet')
    state = numbered(tiny_networks.state(architecture, extra=extra))
    state = state.replace(
        stats={
            **state.stats,
            'method': jax.tree.map(
                lambda _: np.float32(5), state.stats['method']
            ),
        }
    )
    wider = architecture.with_block(1).resized({'s1': 5})
    change = growth.Growth(wider, {'s1': np.array([5, 5, NEW, 0, 1])})
    grown, _ = grow(state, change, extra=extra)
    np.testing.assert_array_equal(
        grown.params['aux']['s1']['logit'], [6, 6, FRESH, 1, 2]
    )
    np.testing.assert_array_equal(
        grown.params['aux']['s1b0.mid']['logit'], [1, 2, 3, 4, 5, 6]
    )
    moment = optax.tree.get(grown.opt_state, 'trace')['aux']['s1']['logit']
    np.testing.assert_array_equal(moment, [6, 6, 0, 1, 2])
    seen = grown.stats['method']
    self.assertEqual(seen['s1b1']['seen'], 5)
    self.assertEqual(seen['s1b2']['seen'], FRESH)
    self.assertEqual(
        tiny_networks.described(grown),
        tiny_networks.described(
            state_lib.abstract_state(wider, SGD, extra=extra)
        ),
    )

  def test_random_sequences(self):
    @hypothesis.settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
    )
    @hypothesis.given(st.data())
    def run(choices):
      family = choices.draw(st.sampled_from(sorted(networks.FAMILIES)))
      architecture = tiny_networks.seed(family)
      state = tiny_networks.state(architecture)
      for _ in range(choices.draw(st.integers(1, 5))):
        change = draw_change(choices, architecture)
        state, _ = grow(state, change, draw=tiny_networks.draw)
        architecture = change.architecture
      self.assertEqual(
          tiny_networks.described(state),
          tiny_networks.described(state_lib.abstract_state(architecture, SGD)),
      )
      for path, leaf in tiny_networks.leaves(state).items():
        self.assertTrue(np.isfinite(leaf).all(), path)

    run()


def draw_change(choices, architecture):
  """A random growth that an architecture allows."""
  kind = choices.draw(
      st.sampled_from(('append', 'widen', 'split', 'prune', 'remove'))
  )
  stage = choices.draw(st.integers(0, len(architecture.stages) - 1))
  later = architecture.stages[stage][1:]
  if kind == 'append' or (kind == 'remove' and not later):
    return growth.append(architecture, stage)
  if kind == 'remove':
    block = choices.draw(st.sampled_from(later))
    part = next(p for p in networks.parts(architecture) if p.name == block)
    local = dict(part.axes)
    if architecture.size(local['in']) != architecture.size(local['out']):
      return growth.append(architecture, stage)
    return growth.Growth(architecture.without_block(block))
  axis = choices.draw(st.sampled_from(axes_of(architecture)))
  size = architecture.size(axis)
  if kind == 'widen':
    return growth.widen(architecture, axis, choices.draw(st.integers(1, 3)))
  units = choices.draw(
      st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True)
  )
  make = growth.split if kind == 'split' else growth.prune
  return make(architecture, axis, np.array(units))


class FunctionTest(parameterized.TestCase):

  @parameterized.parameters(*splits(slice(-2, None), 's1b0'))
  def test_split_preserves(self, family, options, axis):
    self.assert_split_preserves(family, options, axis)

  @parameterized.parameters(*splits(slice(-2), 's1b1'))
  @pytest.mark.slow
  def test_split_of_other_axes_preserves(self, family, options, axis):
    self.assert_split_preserves(family, options, axis)

  def assert_split_preserves(self, family, options, axis):
    architecture = tiny_networks.seed(family, **options)
    state, x = tiny_networks.state(architecture), tiny_networks.images()
    change = growth.split(architecture, axis, np.array([2, 0]))
    grown, _ = grow(state, change)
    self.assertEqual(
        change.architecture.size(axis), architecture.size(axis) + 2
    )
    for train in (False, True):
      want, _ = tiny_networks.forward(architecture, state, x, train=train)
      got, _ = tiny_networks.forward(
          change.architecture, grown, x, train=train
      )
      # A norm over the six means of six images magnifies what is rounded.
      tolerance = 1e-4 if family == 'deeplab' else 1e-5
      np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)

  @parameterized.parameters(*tiny_networks.VARIANTS)
  def test_closed_gates_equal_slices(self, family, options):
    # Of all axes at once: every reader of every axis must be scaled.
    architecture = tiny_networks.seed(family, **options)
    # Number 0 leaves of a tiny MobileNet hardly a living channel.
    state = tiny_networks.state(architecture, number=1)
    x = tiny_networks.images()
    kept = {
        axis: np.arange(architecture.size(axis)) != 1
        for axis in axes_of(architecture)
    }
    gated = growth.scale_readers(
        state,
        state_lib.axis_table(architecture),
        {axis: gate.astype('f4') for axis, gate in kept.items()},
    )
    change = resize_all(architecture, lambda old: [old[0], *old[2:]])
    pruned, _ = grow(state, change)
    for train in (False, True):
      want, _ = tiny_networks.forward(architecture, gated, x, train=train)
      got, _ = tiny_networks.forward(
          change.architecture, pruned, x, train=train
      )
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
      open_, _ = tiny_networks.forward(architecture, state, x, train=train)
      self.assertGreater(np.abs(open_ - got).max(), 1e-2)

  def test_scale_readers_leaves_writers_alone(self):
    architecture = tiny_networks.seed('basic3resnet', widths=(4, 4, 4))
    state = numbered(tiny_networks.state(architecture))
    vector = np.array([0, 0.5, 1, 2], 'f4')
    scaled, _ = growth.scale_readers_patch(architecture, {'s1': vector})(
        state, KEY
    )
    readers = ('s1b1/conv1', 's2b0/conv1', 's2b0/shortcut_conv')
    old, new = tiny_networks.leaves(state), tiny_networks.leaves(scaled)
    for path, leaf in new.items():
      want = old[path]
      if any(reader in path for reader in readers):
        want = want * vector.reshape(1, 1, 4, 1)
      np.testing.assert_array_equal(leaf, want, path)

  def test_scale_readers_is_differentiable(self):
    architecture = tiny_networks.seed('plain3net')
    state = tiny_networks.state(architecture)
    table = state_lib.axis_table(architecture)

    def total(gate):
      scaled = growth.scale_readers(state.params, table, {'s1b0.out': gate})
      return jnp.sum(scaled['weights']['s1b1']['conv']['kernel'])

    np.testing.assert_allclose(
        jax.jit(jax.grad(total))(jnp.ones(6)),
        state.params['weights']['s1b1']['conv']['kernel'].sum((0, 1, 3)),
        rtol=1e-5,
        atol=1e-6,
    )

  @parameterized.product(
      family=('basic3resnet', 'plain3net', 'mlp'),
      optimizer=('sgd', 'adamw'),
  )
  def test_trains_on(self, family, optimizer):
    self.check_trains_on(family, optimizer)

  @parameterized.parameters('vgg16', 'wrn28_10', 'mobilenet1')
  def test_trains_on_with_momentum(self, family):
    self.check_trains_on(family, 'sgd')

  def check_trains_on(self, family, optimizer):
    tx = tiny_networks.OPTIMIZERS[optimizer]
    architecture = tiny_networks.seed(
        family, (1,) * len(networks.get(family).widths)
    )
    state = tiny_networks.state(architecture, tx)
    for make in (
        functools.partial(growth.append, stage=1),
        lambda a: growth.widen(a, private_axis(a, 's1b1'), 2),
        lambda a: growth.split(a, private_axis(a, 's1b0'), np.array([1])),
    ):
      change = make(architecture)
      state, _ = grow(state, change, tx, draw=tiny_networks.draw)
      architecture = change.architecture
    task = programs.Task(
        method=methods_base.FixedArchitecture(),
        tx=tx,
        preprocessing=data.Preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3),
        dtype=jnp.float32,
        parallel=parallel.make(),
    )
    layout = view.layout(architecture)
    step = jax.jit(
        functools.partial(programs.train_step, task, layout),
        compiler_options=tiny_networks.FAST_COMPILE,
    )
    packed, meters = view.pack(state, layout), programs.new_meters()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, 8, 8, 3), np.uint8)
    labels = generator.integers(0, 5, 8).astype('i4')
    losses = []
    for _ in range(6):
      packed, meters = step(
          packed,
          programs.new_meters(),
          images,
          labels,
          np.arange(8, dtype='i4'),
          np.float32(0.02),
      )
      losses.append(float(meters['loss_sum']) / 8)
    self.assertLess(losses[-1], losses[0])
    trained = view.unpack(state_lib.to_host(packed), layout)
    self.assertEqual(
        tiny_networks.described(trained), tiny_networks.described(state)
    )
    self.assertEqual(trained.step, 6)
    directory = self.create_tempdir().full_path
    checkpoints = checkpoint.Checkpoints(directory, keep=1)
    checkpoints.save(6, trained, {'architecture': architecture.to_json()})
    restored = checkpoints.restore(
        lambda documents: state_lib.abstract_state(
            architecture_lib.Architecture.from_json(documents['architecture']),
            tx,
        )
    )
    tiny_networks.assert_same(restored.state, trained)


class RefusalTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.architecture = tiny_networks.seed('basic3resnet')

  @parameterized.parameters(
      (
          {'s1b0.mid': np.arange(5)},
          "Axis 's1b0.mid' has sources for 5 units but the architecture says 6",
      ),
      ({'s7': np.arange(5)}, "sources for axis 's7', which basic3resnet-1-2-1"),
      ({'s1': np.zeros(6)}, "'s1' must be a vector of integers, got float64"),
      ({'s1': np.zeros((6, 1), int)}, 'got int64 of shape (6, 1)'),
      ({'s1': np.ones(6, bool)}, 'vector of integers, got bool'),
  )
  def test_sources(self, sources, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      growth.Growth(self.architecture, sources)

  @parameterized.parameters(
      ([0, 1, 2, 3, 4, 6], 'go from 0 to 6, but .* has units 0 to 5'),
      ([-2, 1, 2, 3, 4, 5], 'go from -2 to 5, but'),
  )
  def test_sources_out_of_range(self, source, message):
    change = growth.Growth(self.architecture, {'s1b0.mid': np.array(source)})
    with self.assertRaisesRegex(ValueError, message):
      grow(tiny_networks.state(self.architecture), change)

  @parameterized.parameters('s1', 's1b0.mid', 'image')
  def test_size_without_sources(self, axis):
    change = growth.Growth(
        self.architecture.resized({axis: self.architecture.size(axis) + 1})
    )
    with self.assertRaisesRegex(ValueError, 'changed its size without sources'):
      grow(tiny_networks.state(self.architecture), change)

  def test_removal_that_does_not_fit(self):
    architecture = tiny_networks.seed('plain3net', (1, 3, 1))
    architecture = architecture.resized({'s1b1.out': 7})
    change = growth.Growth(architecture.without_block('s1b1'))
    with self.assertRaisesRegex(ValueError, 'changed its size without sources'):
      grow(tiny_networks.state(architecture), change)

  @parameterized.product(
      make=(growth.split, growth.prune), units=([0, 6], [-1, 0], [2, 2])
  )
  def test_units(self, make, units):
    # A unit of -1 would be taken for a new one; a unit split twice would be
    # read with one and a half times its weight.
    message = f"'s1' are distinct numbers from 0 to 5, got {units}"
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      make(self.architecture, 's1', np.array(units))

  @parameterized.parameters(
      (lambda leaf: leaf[:-1], 'float32(5,)'),
      (lambda leaf: leaf.astype('f2'), 'float16(6,)'),
      (lambda leaf: {'x': leaf}, 'None'),
  )
  def test_patch(self, change_leaf, got):
    def patch(state, key):
      del key
      weights = copy.deepcopy(state.params['weights'])
      bias = weights['s1b0']['norm2']['bias']
      weights['s1b0']['norm2']['bias'] = change_leaf(bias)
      return state.replace(params={**state.params, 'weights': weights}), {}

    change = growth.Growth(self.architecture, patch=patch)
    message = f'norm2/bias as {got}; it should be float32(6,).'
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      grow(tiny_networks.state(self.architecture), change)

  def test_report_of_a_patch(self):
    change = growth.Growth(
        self.architecture, patch=lambda state, key: (state, {'images': 3})
    )
    _, carried = grow(tiny_networks.state(self.architecture), change)
    self.assertEqual(carried.report, {'images': 3})

  def test_factored_moments(self):
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    state = tiny_networks.state(self.architecture, tx)
    # Appending carries them as they are, but they cannot be widened.
    change = growth.append(self.architecture, 1)
    grown, _ = grow(state, change, tx)
    self.assertEqual(
        tiny_networks.described(grown),
        tiny_networks.described(
            state_lib.abstract_state(change.architecture, tx)
        ),
    )
    with self.assertRaisesRegex(
        ValueError,
        r'Optimizer leaf opt_state/.*/v_row/weights/s1b0/conv1/kernel has rank '
        '3, its parameter has rank 4; factored moments cannot be grown',
    ):
      grow(state, growth.widen(self.architecture, 's1b0.mid', 1), tx)


if __name__ == '__main__':
  absltest.main()
