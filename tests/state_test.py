"""Tests of the state of our networks through growths of every kind."""

import copy
import dataclasses
import functools
import re

from absl.testing import absltest
from absl.testing import parameterized
import chex
import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import optax
import pytest
import tiny_networks

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import networks
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.networks import base
from autogrow_jax.run import checkpoint
from autogrow_jax.run import steps

Growth = growth_lib.Growth
NEW = growth_lib.NEW
FRESH = -1.0  # What `draw_fresh` puts everywhere.
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


def grow(state, change, tx=SGD, **arguments):
  return tiny_networks.grow(
      state, change, tx, **{'draw': draw_fresh, **arguments}
  )


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


def resize(architecture, **sources):
  return tiny_networks.targeted(
      architecture, Growth({axis: np.array(s) for axis, s in sources.items()})
  )


def resize_all(architecture, change):
  """One event that changes all axes; `change`: old indices -> sources."""
  return resize(architecture, **{
      axis: change([*range(architecture.size(axis))])
      for axis in axes_of(architecture)
  })


def changes(architecture):
  """Growths of every kind."""
  split = next(a for a in streams_of(architecture) if a.startswith('s1'))
  return {
      'append': state_lib.append(architecture, [1]),
      'remove': Growth(target=architecture.without_block('s1b1')),
      'widen': tiny_networks.widen(architecture, private_axis(architecture), 2),
      'split': tiny_networks.split(architecture, split, [0, 2]),
      'prune': tiny_networks.prune(architecture, split, [3, 0]),
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
      *(
          (family, 'sgd')
          for family in tiny_networks.DISTINCT
          if family != 'basic1resnet'  # It has one stage.
      ),
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
    before = copy.deepcopy(state)
    for name, change in changes(architecture).items():
      with self.subTest(name):
        grown, _ = grow(state, change, tx)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            grown, state_lib.abstract_state(change.target, tx)
        )
        gathered, _ = grow(state, dataclasses.replace(change, scales={}), tx)
        self.assert_moments_follow(
            *map(tiny_networks.leaves, (grown, gathered, before))
        )
        tiny_networks.assert_same(state, before)

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

  def test_stream(self):
    """All that reads or writes the stage's stream, and nothing else."""
    architecture = tiny_networks.seed('basic3resnet', widths=(4, 4, 4))
    state = numbered(tiny_networks.state(architecture))
    change = tiny_networks.prune(architecture, 's1', [2, 0])
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

  def test_appending_carries_everything(self):
    architecture = tiny_networks.seed('bottleneck4resnet')
    state = numbered(tiny_networks.state(architecture))
    grown, account = grow(state, state_lib.append(architecture, [2]))
    old, new = tiny_networks.leaves(state), tiny_networks.leaves(grown)
    for path, leaf in old.items():
      np.testing.assert_array_equal(new[path], leaf, path)
    added = new.keys() - old.keys()
    self.assertEqual({path.split('/')[-3] for path in added}, {'s2b1'})
    for path in added:
      value = 0 if path.startswith('opt_state') else FRESH
      np.testing.assert_array_equal(new[path], value, path)
    # Three kernels, three norms of two leaves; momentum is the only moment.
    kept = len(jax.tree.leaves(state.opt_state))
    self.assertEqual(
        account.counts, {'kept': kept, 'changed': 0, 'new': 9, 'dropped': 0}
    )

  def test_accounts(self):
    architecture = tiny_networks.seed('basic3resnet')
    state = tiny_networks.state(architecture)
    leaves = len(jax.tree.leaves(state.opt_state))
    for change, changed, dropped in (
        (Growth(target=architecture.without_block('s1b1')), 0, 6),
        (tiny_networks.widen(architecture, 's1b1.mid', 1), 4, 0),
    ):
      kept = leaves - changed - dropped
      self.assertEqual(
          grow(state, change)[1].counts,
          {'kept': kept, 'changed': changed, 'new': 0, 'dropped': dropped},
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
    grown, _ = grow(state, state_lib.append(architecture, [0]))
    self.assertEqual(grown.step, 41)
    np.testing.assert_array_equal(
        grown.key, tiny_networks.key_data(jax.random.key(3))
    )
    self.assertEqual(optax.tree.get(grown.opt_state, 'learning_rate'), 0.25)

  def test_selection_has_no_new_entries(self):
    # A shortcut without parameters stays one: new units read and write zeros.
    architecture = tiny_networks.seed('basic3resnet', shortcut='A')
    state = tiny_networks.state(architecture)
    select = lambda state: state.stats['network']['s1b0']['shortcut']['select']
    np.testing.assert_array_equal(select(state), np.eye(4, 6, k=1))
    change = resize(
        architecture,
        s0=[0, 1, 2, 3, NEW],
        s1=[0, 1, NEW, 2, 3, 4, 5, NEW],
    )
    np.testing.assert_array_equal(
        select(grow(state, change)[0]),
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
    change = tiny_networks.widen(architecture, 's2b0.out', 2)
    kernels = [
        state_lib.grow(state, change, SGD, key=jax.random.key(number))[0]
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
      return state_lib.Extra(
          trainable={
              axis: {'logit': np.full(sizes[axis], FRESH, 'f4')}
              for axis in ('s1', 's1b0.mid')
          },
          other={
              block: {'seen': np.full((), FRESH, 'f4')}
              for stage in architecture.stages
              for block in stage
          },
      )

    architecture = tiny_networks.seed('basic3resnet')
    state = numbered(tiny_networks.state(architecture, extra=extra))
    seen = jax.tree.map(lambda _: np.float32(5), state.stats['method'])
    state = state.replace(stats={**state.stats, 'method': seen})
    wider = architecture.with_block(1).resized({'s1': 5})
    change = Growth({'s1': np.array([5, 5, NEW, 0, 1])}, target=wider)
    grown, _ = grow(state, change, extra=extra)
    aux = grown.params['aux']
    np.testing.assert_array_equal(aux['s1']['logit'], [6, 6, FRESH, 1, 2])
    np.testing.assert_array_equal(aux['s1b0.mid']['logit'], range(1, 7))
    moment = optax.tree.get(grown.opt_state, 'trace')['aux']['s1']['logit']
    np.testing.assert_array_equal(moment, [6, 6, 0, 1, 2])
    seen = grown.stats['method']
    self.assertEqual(seen['s1b1']['seen'], 5)
    self.assertEqual(seen['s1b2']['seen'], FRESH)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        grown, state_lib.abstract_state(wider, SGD, extra=extra)
    )

  def test_factored_moments(self):
    """Appending carries them as they are; of wider layers they start afresh."""
    architecture = tiny_networks.seed('basic3resnet')
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    state = numbered(tiny_networks.state(architecture, tx))
    for change, refused in (
        (state_lib.append(architecture, [1]), []),
        (tiny_networks.widen(architecture, 's1b0.mid', 1), ['conv1', 'conv2']),
    ):
      grown, account = grow(state, change, tx)
      chex.assert_trees_all_equal_shapes_and_dtypes(
          grown, state_lib.abstract_state(change.target, tx)
      )
      self.assertEqual(
          account.refused,
          {
              f'0/{leaf}/weights/s1b0/{layer}/kernel': (
                  'its rank is 3, that of its parameter 4'
              )
              for leaf in ('v_row', 'v_col')
              for layer in refused
          },
      )
      for path in account.refused:
        leaf = tiny_networks.leaves(grown.opt_state)[path]
        np.testing.assert_array_equal(leaf, 0, path)

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
        architecture = change.target
      chex.assert_trees_all_equal_shapes_and_dtypes(
          state, state_lib.abstract_state(architecture, SGD)
      )
      chex.assert_tree_all_finite(state)

    run()


def draw_change(choices, architecture):
  """A random growth that an architecture allows."""
  kind = choices.draw(
      st.sampled_from(('append', 'widen', 'split', 'prune', 'remove'))
  )
  stage = choices.draw(st.integers(0, len(architecture.stages) - 1))
  later = architecture.stages[stage][1:]
  if kind == 'append' or (kind == 'remove' and not later):
    return state_lib.append(architecture, [stage])
  if kind == 'remove':
    block = choices.draw(st.sampled_from(later))
    part = next(p for p in networks.parts(architecture) if p.name == block)
    local = dict(part.axes)
    if architecture.size(local['in']) != architecture.size(local['out']):
      return state_lib.append(architecture, [stage])
    return Growth(target=architecture.without_block(block))
  axis = choices.draw(st.sampled_from(axes_of(architecture)))
  size = architecture.size(axis)
  if kind == 'widen':
    more = choices.draw(st.integers(1, 3))
    return tiny_networks.widen(architecture, axis, more)
  units = choices.draw(
      st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True)
  )
  make = tiny_networks.split if kind == 'split' else tiny_networks.prune
  return make(architecture, axis, units)


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
    change = tiny_networks.split(architecture, axis, [2, 0])
    grown, _ = grow(state, change)
    self.assertEqual(change.target.size(axis), architecture.size(axis) + 2)
    for train in (False, True):
      want, _ = tiny_networks.forward(architecture, state, x, train=train)
      got, _ = tiny_networks.forward(change.target, grown, x, train=train)
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
    gates = {
        axis: (np.arange(architecture.size(axis)) != 1).astype('f4')
        for axis in axes_of(architecture)
    }
    gated = axes_lib.scale_readers(
        state, state_lib.axis_table(architecture), gates
    )
    change = resize_all(architecture, lambda old: [old[0], *old[2:]])
    pruned, _ = grow(state, change)
    for train in (False, True):
      want, _ = tiny_networks.forward(architecture, gated, x, train=train)
      got, _ = tiny_networks.forward(change.target, pruned, x, train=train)
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
      open_, _ = tiny_networks.forward(architecture, state, x, train=train)
      self.assertGreater(np.abs(open_ - got).max(), 1e-2)

  @parameterized.parameters(
      ('basic3resnet', 'sgd'), ('mlp', 'adamw'), ('mobilenet1', 'sgd')
  )
  def test_trains_on(self, family, optimizer):
    tx = tiny_networks.OPTIMIZERS[optimizer]
    architecture = tiny_networks.seed(
        family, (1,) * len(networks.get(family).widths)
    )
    state = tiny_networks.state(architecture, tx)
    for make in (
        lambda a: state_lib.append(a, [1]),
        lambda a: tiny_networks.widen(a, private_axis(a, 's1b1'), 2),
        lambda a: tiny_networks.split(a, private_axis(a, 's1b0'), [1]),
    ):
      change = make(architecture)
      state, _ = grow(state, change, tx, draw=tiny_networks.draw)
      architecture = change.target
    layout = view.layout(architecture)
    step = jax.jit(
        functools.partial(
            steps.train_step, tiny_networks.computation(tx), layout
        ),
        compiler_options=tiny_networks.FAST_COMPILE,
    )
    packed = view.pack(state, layout)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, 8, 8, 3), np.uint8)
    labels = generator.integers(0, 5, 8).astype('i4')
    losses = []
    for _ in range(6):
      packed, meters = step(
          packed,
          steps.new_meters(),
          images,
          labels,
          np.arange(8, dtype='i4'),
          np.float32(0.02),
      )
      losses.append(float(meters['loss_sum']) / 8)
    self.assertLess(losses[-1], losses[0])
    trained = view.unpack(state_lib.to_host(packed), layout)
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, state)
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
      ({'s1b0.mid': 5}, "'s1b0.mid' has sources for 5 units but the architec"),
      ({'s7': 5}, "sources for axis 's7', which basic3resnet-1-2-1"),
  )
  def test_sources(self, sizes, message):
    sources = {axis: np.arange(size) for axis, size in sizes.items()}
    change = Growth(sources, target=self.architecture)
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      state_lib.target_of(change, self.architecture)

  @parameterized.parameters('s1', 's1b0.mid', 'image')
  def test_size_without_sources(self, axis):
    size = self.architecture.size(axis) + 1
    change = Growth(target=self.architecture.resized({axis: size}))
    with self.assertRaisesRegex(ValueError, 'changed its size without sources'):
      grow(tiny_networks.state(self.architecture), change)

  def test_removal_that_does_not_fit(self):
    architecture = tiny_networks.seed('plain3net', (1, 3, 1))
    architecture = architecture.resized({'s1b1.out': 7})
    change = Growth(target=architecture.without_block('s1b1'))
    with self.assertRaisesRegex(ValueError, 'changed its size without sources'):
      grow(tiny_networks.state(architecture), change)

  @parameterized.parameters(
      (('weights', 's1b0', 'norm2', 'bias'), 'to shape (5,), but it has (6,)'),
      (('weights', 's1b0', 'norm9', 'bias'), 's1b0/norm9/bias'),
  )
  def test_values(self, path, message):
    change = Growth(
        values={path: np.zeros(5, 'f4')}, target=self.architecture
    )
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      grow(tiny_networks.state(self.architecture), change)


if __name__ == '__main__':
  absltest.main()
