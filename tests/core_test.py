"""Tests of the core on pytrees of its own: no network, no run."""

import dataclasses
import re

from absl.testing import absltest
from absl.testing import parameterized
import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from autogrow_jax.core import axes as axes_lib
from autogrow_jax.core import carry as carry_lib
from autogrow_jax.core import growth as growth_lib
from autogrow_jax.core import receipts

Axis, AxisTable = axes_lib.Axis, axes_lib.AxisTable
Growth, NEW = growth_lib.Growth, growth_lib.NEW
KEY = jax.random.key(3)


def mlp(hidden=4, number=0):
  """Parameters of a perceptron of 3 inputs and 2 outputs."""
  generator = np.random.default_rng(number)
  draw = lambda *shape: generator.normal(size=shape).astype('f4')
  return {
      'first': {'kernel': draw(3, hidden), 'bias': draw(hidden)},
      'second': {'kernel': draw(hidden, 2), 'bias': draw(2)},
  }


def apply(params, x):
  x = jnp.tanh(x @ params['first']['kernel'] + params['first']['bias'][None])
  return x @ params['second']['kernel'] + params['second']['bias'][None]


TABLE = AxisTable(
    {
        ('first', 'kernel'): (
            Axis('inputs', 'reads'),
            Axis('hidden', 'writes'),
        ),
        ('first', 'bias'): (Axis('hidden', 'writes'),),
        ('second', 'kernel'): (Axis('hidden', 'reads'), None),
    },
    {'inputs': 3, 'hidden': 4},
    {'inputs': 'the data have so many'},
)
X = np.random.default_rng(1).normal(size=(8, 3)).astype('f4')

# A fused projection to queries, keys and values, the one back, and a dense
# layer behind a map of 2 x 3 positions.
FUSED = AxisTable(
    {
        ('qkv',): (None, Axis((('heads', 'size'),) * 3, 'writes')),
        ('out',): (Axis((('heads', 'size'),), 'reads'), None),
        ('dense',): (Axis((('rows', 'columns', 'channels'),), 'reads'), None),
        ('norm',): (Axis('channels', 'writes'),),
    },
    {'heads': 2, 'size': 3, 'rows': 2, 'columns': 3, 'channels': 4},
)


def fused(heads=2, size=3, channels=4):
  """Leaves whose entries are numbered."""
  shapes = {
      'qkv': (5, 3 * heads * size),
      'out': (heads * size, 5),
      'dense': (2 * 3 * channels, 2),
      'norm': (channels,),
  }
  return {
      name: np.arange(np.prod(shape), dtype='f4').reshape(shape)
      for name, shape in shapes.items()
  }


@jax.tree_util.register_pytree_with_keys_class
class Twice(tuple):
  """A pair whose members have the same key."""

  def __new__(cls, *members):
    return super().__new__(cls, members)

  def tree_flatten_with_keys(self):
    return [(jax.tree_util.DictKey('same'), member) for member in self], None

  @classmethod
  def tree_unflatten(cls, unused_data, members):
    return cls(*members)


def moved(growth, tree, like, table=FUSED):
  return carry_lib.carry(growth, table, tree, like)[0]


class AxesTest(parameterized.TestCase):

  def test_heads_of_a_fused_kernel(self):
    """Each segment is gathered by itself, and only whole heads come and go."""
    old, fresh = fused(), jax.tree.map(lambda x: -1 - x, fused(heads=3))
    growth = Growth({'heads': np.array([1, NEW, 0])})
    new = moved(growth, old, fresh)
    parts = lambda kernel, heads: kernel.reshape(5, 3, heads, 3)
    got, was = parts(new['qkv'], 3), parts(old['qkv'], 2)
    np.testing.assert_array_equal(got[:, :, [0, 2]], was[:, :, [1, 0]])
    np.testing.assert_array_equal(
        got[:, :, 1], parts(fresh['qkv'], 3)[:, :, 1]
    )
    np.testing.assert_array_equal(
        new['out'].reshape(3, 3, 5)[[0, 2]], old['out'].reshape(2, 3, 5)[[1, 0]]
    )
    chex.assert_trees_all_equal(new['dense'], old['dense'])

  def test_channels_of_a_flattened_map(self):
    growth = Growth({'channels': np.array([3, 1])})
    new = moved(growth, fused(), fused(channels=2))
    np.testing.assert_array_equal(
        new['dense'].reshape(2, 3, 2, 2),
        fused()['dense'].reshape(2, 3, 4, 2)[:, :, [3, 1]],
    )
    np.testing.assert_array_equal(new['norm'], [3, 1])

  def test_readers_of_a_structured_axis(self):
    vectors = {
        'channels': np.array([1, 0, 2, 1], 'f4'),
        'heads': np.array([3, 1], 'f4'),
    }
    new = axes_lib.scale_readers(fused(), FUSED, vectors)
    np.testing.assert_array_equal(
        new['dense'],
        fused()['dense'] * np.tile(vectors['channels'], 6)[:, None],
    )
    np.testing.assert_array_equal(
        new['out'], fused()['out'] * np.repeat(vectors['heads'], 3)[:, None]
    )
    chex.assert_trees_all_equal(new['qkv'], fused()['qkv'])
    # Also traced, and along all segments.
    table = dataclasses.replace(FUSED, axes={
        ('qkv',): (None, Axis((('heads', 'size'),) * 3, 'reads'))
    })
    slope = jax.jit(jax.grad(lambda gate: axes_lib.scale_readers(
        {'qkv': fused()['qkv']}, table, {'heads': gate}
    )['qkv'].sum()))(jnp.ones(2))
    np.testing.assert_allclose(
        slope, fused()['qkv'].reshape(5, 3, 2, 3).sum((0, 1, 3))
    )

  def test_filters_are_kernels_that_write(self):
    vectors = {'hidden': np.array([1, 2, 0, 1], 'f4')}
    old = mlp()
    new = axes_lib.scale_filters(old, TABLE, vectors)
    kernel = old['first']['kernel'] * vectors['hidden'][None]
    np.testing.assert_array_equal(new['first']['kernel'], kernel)
    new['first']['kernel'] = old['first']['kernel']
    chex.assert_trees_all_equal(new, old)

  @hypothesis.settings(max_examples=50, derandomize=True, database=None)
  @hypothesis.given(st.data())
  def test_gathering_commutes_with_naming(self, choices):
    """Entries keep the names of their units: any factors, segments, sources."""
    sizes = {
        name: choices.draw(st.integers(1, 4), label=name) for name in 'abc'
    }
    segments = choices.draw(st.lists(
        st.permutations('abc').flatmap(
            lambda names: st.integers(1, 3).map(lambda n: tuple(names[:n]))
        ), min_size=1, max_size=3,
    ))
    sources = {
        name: np.array(choices.draw(
            st.lists(st.integers(NEW, sizes[name] - 1), min_size=1, max_size=5)
        ))
        for name in choices.draw(st.sets(st.sampled_from('abc')))
    }

    def entries(units):
      """(segment, its factors' units) of each entry; None for new ones."""
      found = []
      for number, names in enumerate(segments):
        grid = np.meshgrid(*(units[name] for name in names), indexing='ij')
        for entry in zip(*(axis.ravel() for axis in grid)):
          found.append(None if NEW in entry else (number, *map(int, entry)))
      return found

    old = {name: np.arange(size) for name, size in sizes.items()}
    before, after = entries(old), entries({**old, **sources})
    axis = Axis(tuple(segments), 'neither')
    leaf = np.arange(len(before))
    got, is_new = axes_lib.gather(leaf, (axis,), sources, sizes)
    is_new = np.broadcast_to(is_new, got.shape)
    self.assertEqual(
        [None if new else before[i] for i, new in zip(got, is_new)], after
    )

  def test_the_longest_end_of_a_path_counts(self):
    table = AxisTable(
        {('kernel',): (None,), ('a', 'kernel'): (Axis('x', 'reads'),)}, {'x': 1}
    )
    self.assertEqual(table.find(('mu', 'a', 'kernel')), (Axis('x', 'reads'),))
    self.assertEqual(table.find(('mu', 'b', 'kernel')), (None,))
    self.assertIsNone(table.find(('mu', 'b', 'bias')))

  def test_prints(self):
    self.assertEqual(
        str(TABLE).splitlines(),
        [
            'hidden 4  writes: first/kernel, first/bias; reads: second/kernel',
            'frozen, the data have so many: inputs',
        ],
    )
    self.assertEqual(
        FUSED.axes['qkv',][1].name, 'heads*size + heads*size + heads*size'
    )
    self.assertEqual(FUSED['*s'], ('heads', 'rows', 'columns', 'channels'))

  def test_two_leaves_with_the_same_path(self):
    with self.assertRaisesRegex(ValueError, 'have the same path'):
      axes_lib.by_path(({'a': 1}, Twice({'a': 1}, {'a': 2})))


class GrowthTest(parameterized.TestCase):

  def test_sums(self):
    one = Growth(
        {'a': np.arange(2)}, {'a': np.ones(2)}, examples=3, report={'x': 1},
        note='one',
    )
    other = Growth(
        {'b': np.arange(3)}, values={('k',): np.zeros(1)}, moments='reset',
        target='T', examples=4, report={'y': 2}, note='other',
    )
    for both in (one + other, other + one):
      self.assertEqual(both.sizes, {'a': 2, 'b': 3})
      self.assertEqual(both.scales.keys(), {'a'})
      self.assertEqual(both.values.keys(), {('k',)})
      self.assertEqual((both.moments, both.target), ('reset', 'T'))
      self.assertEqual((both.examples, both.report), (7, {'x': 1, 'y': 2}))
    self.assertEqual(str(one + other), 'one; other')
    self.assertEqual(str(Growth()), 'growth of nothing')

  @parameterized.parameters(
      ({'sources': {'a': np.arange(2)}}, "Both growths have sources of ['a']"),
      ({'values': {('k',): np.zeros(1)}}, "Both growths have values of [('k',"),
      ({'target': 'T'}, 'Both growths have target of their own'),
      ({'moments': 'reset'}, 'Both growths have moments of their own'),
  )
  def test_sums_that_clash(self, fields, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      Growth(**fields) + Growth(**fields)

  @parameterized.parameters(
      ({'a': np.zeros(6)}, {}, "'a' must be a vector of integers, got float64"),
      ({'a': np.zeros((6, 1), int)}, {}, 'got int64 of shape (6, 1)'),
      ({'a': np.ones(6, bool)}, {}, 'vector of integers, got bool'),
      ({'a': np.arange(6)}, {'a': np.ones(5)}, "'a' are for 5 units, its so"),
      ({'a': []}, {}, "Axis 'a' would have no unit; keep at least one."),
  )
  def test_refuses(self, sources, vectors, message):
    for name in ('scales', 'noise')[: 1 + bool(vectors)]:
      with self.assertRaisesRegex(ValueError, re.escape(message)):
        Growth(sources, **{name: vectors})

  def test_makers(self):
    wider = growth_lib.widen(TABLE, 'hid*', to=6)
    np.testing.assert_array_equal(
        wider.sources['hidden'], [0, 1, 2, 3, NEW, NEW]
    )
    np.testing.assert_array_equal(wider.scales['hidden'], [1, 1, 1, 1, 0, 0])
    self.assertEqual(str(wider), 'widen hidden, 4 to 6 units')
    fresh = growth_lib.widen(TABLE, 'hidden', to=6, start='fresh')
    self.assertEmpty(fresh.scales)
    twins = growth_lib.split(TABLE, 'hidden', [2, 0], noise=0.5)
    np.testing.assert_array_equal(twins.sources['hidden'], [0, 1, 2, 3, 2, 0])
    np.testing.assert_array_equal(
        twins.scales['hidden'], [.5, 1, .5, 1, .5, .5]
    )
    np.testing.assert_array_equal(
        twins.noise['hidden'], [.5, 0, .5, 0, -.5, -.5]
    )
    self.assertEqual(str(twins), 'split 2 units of hidden, 4 to 6 units')
    self.assertEqual(
        str(growth_lib.widen(TABLE, '*', to=5)),
        'widen hidden, 4 to 5 units; left alone, though they match: inputs',
    )
    fewer = growth_lib.prune(TABLE, 'hidden', keep=[3, 1])
    np.testing.assert_array_equal(fewer.sources['hidden'], [3, 1])

  @parameterized.parameters(
      (lambda: growth_lib.widen(TABLE, 'hidden', to=3), '4 units; 3 are fewer'),
      (lambda: growth_lib.widen(TABLE, 'h', to=9),
       "No axis matches 'h'; there are inputs, hidden."),
      (lambda: growth_lib.widen(TABLE, 'in*', to=9),
       "'inputs' is frozen: the data have so many."),
      # A unit of -1 would be taken for a new one; a unit split twice would be
      # read with one and a half times its weight.
      (lambda: growth_lib.split(TABLE, 'hidden', [0, 4]), 'got [0, 4]'),
      (lambda: growth_lib.prune(TABLE, 'hidden', keep=[-1, 0]), 'got [-1, 0]'),
      (lambda: growth_lib.split(TABLE, 'hidden', [2, 2]), 'got [2, 2]'),
      (lambda: growth_lib.prune(TABLE, 'hidden', keep=[0.7]), 'got [0.7]'),
      (lambda: growth_lib.prune(TABLE, 'hidden', keep=[]), 'have no unit'),
  )
  def test_makers_refuse(self, make, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      make()


class CarryTest(parameterized.TestCase):

  def test_accounts(self):
    old = {**mlp(), 'gone': np.zeros(1)}
    like = {**mlp(6, number=1), 'third': np.ones(3, 'f4')}
    growth = growth_lib.widen(TABLE, 'hidden', to=6, start='fresh')
    new, account = carry_lib.carry(growth, TABLE, old, like)
    self.assertEqual(account.kept, ('second/bias',))
    self.assertEqual(
        account.changed, ('first/bias', 'first/kernel', 'second/kernel')
    )
    self.assertEqual((account.new, account.dropped), (('third',), ('gone',)))
    self.assertEqual(str(account), '1 kept, 3 changed, 1 new, 1 dropped')
    self.assertIs(new['second']['bias'], old['second']['bias'])
    kernel = new['first']['kernel']
    np.testing.assert_array_equal(kernel[:, :4], old['first']['kernel'])
    np.testing.assert_array_equal(kernel[:, 4:], like['first']['kernel'][:, 4:])

  @parameterized.parameters(
      (Growth(), mlp(5), 'first/bias would have shape (4,), but the grown mod'),
      (Growth({'hidden': np.array([0, 4])}), mlp(2), 'go from 0 to 4, but'),
      (Growth({'hidden': np.array([-2])}), mlp(1), 'go from -2 to -2, but'),
      (Growth(), jax.tree.map(lambda x: x.astype('f2'), mlp()),
       'first/bias is float32; it should be float16.'),
      (Growth(values={('bias',): np.zeros(3)}), mlp(),
       'sets first/bias to shape (3,), but it has (4,)'),
      (Growth(values={('first', 'x'): np.zeros(3), ('y',): 0}), mlp(),
       'sets leaves that are not there: first/x, y.'),
      (growth_lib.split(TABLE, 'hidden', [0]), mlp(5), 'noise to twins: give'),
      (Growth(scales={'hide': [1.0]}), mlp(),
       "changes axis 'hide', which is not among inputs, hidden."),
      (Growth(scales={'hidden': [1.0]}), mlp(),
       "has 1 values for axis 'hidden', which has 4 units."),
      (growth_lib.widen(TABLE, 'hidden', to=5), jax.eval_shape(lambda: mlp(5)),
       'New units of first/bias are to be drawn: give a key'),
      (Growth(), {**mlp(), 'z': jax.ShapeDtypeStruct((1,), 'f4')},
       'Leaf z is new, and only its shape is known'),
  )
  def test_refuses(self, growth, like, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      carry_lib.carry(growth, TABLE, mlp(), like)

  def test_what_is_replaced_counts_as_changed(self):
    values = {('second', 'bias'): np.zeros(2)}
    _, account = carry_lib.carry(Growth(values=values), TABLE, mlp(), mlp())
    self.assertEqual(account.changed, ('second/bias',))

  def test_values_go_by_the_end_of_their_path(self):
    values = {('second', 'bias'): np.array([7.0, 8.0])}
    new = moved(Growth(values=values), {'m': mlp()}, {'m': mlp()}, TABLE)
    np.testing.assert_array_equal(new['m']['second']['bias'], [7, 8])
    self.assertEqual(new['m']['second']['bias'].dtype, np.float32)

  def test_new_units_are_drawn_as_wide_as_the_old(self):
    old = {'kernel': 5 * np.random.default_rng(0).normal(size=(9, 400))}
    table = AxisTable(
        {('kernel',): (Axis('x', 'writes'), None)}, {'x': 9}
    )
    growth = growth_lib.widen(table, 'x', to=12)
    like = {'kernel': jax.ShapeDtypeStruct((12, 400), 'f8')}
    draw = lambda number: carry_lib.carry(
        growth, table, old, like, key=jax.random.key(number)
    )[0]['kernel'][9:]
    self.assertAlmostEqual(draw(0).std(), 5, delta=0.3)
    np.testing.assert_array_equal(draw(0), draw(0))
    self.assertFalse(np.isin(draw(0), draw(1)).any())


class TwinsTest(parameterized.TestCase):

  def outputs(self, noise, size=4):
    growth = growth_lib.split(TABLE, 'hidden', [1, 3], noise=noise)
    params = mlp()
    grown, _ = carry_lib.carry(growth, TABLE, params, mlp(6), key=KEY)
    return grown, np.asarray(apply(grown, X) - apply(params, X))

  def test_equal_twins_are_exact(self):
    grown, change = self.outputs(0)
    np.testing.assert_allclose(change, 0, atol=1e-6)
    for unit, twin in ((1, 4), (3, 5)):
      np.testing.assert_array_equal(
          grown['first']['kernel'][:, unit], grown['first']['kernel'][:, twin]
      )

  def test_twins_of_few_survivors(self):
    growth = Growth({'hidden': [3, 3]}, noise={'hidden': [0.1, -0.1]})
    tree, _ = carry_lib.carry(
        growth, TABLE, mlp(), mlp(2), key=jax.random.key(0)
    )
    kernel, old = tree['first']['kernel'], mlp()['first']['kernel']
    np.testing.assert_allclose(kernel.mean(1), old[:, 3], rtol=1e-5)
    self.assertGreater(np.abs(kernel[:, 0] - kernel[:, 1]).min(), 0)

  def test_opposite_twins_cancel_in_first_order(self):
    """Half the noise, a quarter of the change."""
    kernel = mlp()['first']['kernel']
    changes = []
    for noise in (0.2, 0.1):
      grown, change = self.outputs(noise)
      changes.append(np.abs(change).max())
      delta = grown['first']['kernel'] - kernel[:, [0, 1, 2, 3, 1, 3]]
      np.testing.assert_array_equal(delta[:, [0, 2]], 0)
      np.testing.assert_allclose(
          delta[:, [1, 3]], -delta[:, [4, 5]], atol=1e-6
      )
      rms = np.sqrt(np.mean(kernel**2))
      self.assertBetween(delta[:, [1, 3]].std() / rms / noise, 0.3, 3)
      # A bias stays as it is.
      np.testing.assert_array_equal(
          grown['first']['bias'], mlp()['first']['bias'][[0, 1, 2, 3, 1, 3]]
      )
    self.assertGreater(changes[0], 1e-3)
    self.assertBetween(changes[0] / changes[1], 3.5, 4.5)


def begun(tx, params):
  """A state of an optimizer without zeros; counters are 3."""
  return jax.tree.map(
      lambda leaf: (3 + np.arange(leaf.size) / 8)
      .reshape(leaf.shape)
      .astype(leaf.dtype),
      tx.init(params),
  )


class MomentsTest(parameterized.TestCase):

  def test_squares_start_at_their_mean_and_momentum_at_zero(self):
    tx = optax.adam(0.1)
    state = begun(tx, mlp())
    growth = growth_lib.widen(TABLE, 'hidden', to=6)
    new, account = carry_lib.carry(
        growth, TABLE, state, tx.init(mlp(6)), moments=True
    )
    self.assertEqual(
        account.counts, {'kept': 3, 'changed': 6, 'new': 0, 'dropped': 0}
    )
    mu, nu = (tree['first']['kernel'] for tree in (state[0].mu, state[0].nu))
    np.testing.assert_array_equal(
        new[0].mu['first']['kernel'], np.pad(mu, [(0, 0), (0, 2)])
    )
    np.testing.assert_allclose(
        new[0].nu['first']['kernel'],
        np.concatenate([nu, np.full((3, 2), nu.mean())], 1),
        rtol=1e-6,
    )
    self.assertEqual(new[0].count, 3)

  def test_twins_share_momentum_but_not_squares(self):
    """Halved readers have halved momentum, and unchanged squares."""
    tx = optax.adam(0.1)
    state = begun(tx, mlp())
    growth = growth_lib.split(TABLE, 'hidden', [1])
    new, _ = carry_lib.carry(
        growth, TABLE, state, tx.init(mlp(5)), moments=True
    )
    of = lambda tree: tree['second']['kernel'][1]
    np.testing.assert_array_equal(of(new[0].mu), of(state[0].mu) / 2)
    np.testing.assert_array_equal(of(new[0].nu), of(state[0].nu))

  def test_reset(self):
    tx = optax.inject_hyperparams(optax.adam)(0.1)
    state = begun(tx, mlp())
    new, _ = carry_lib.carry(
        Growth(moments='reset'), TABLE, state, tx.init(mlp()), moments=True
    )
    for path, leaf in axes_lib.by_path(new).items():
      if path[-1] in ('kernel', 'count') or path[-2:] == ('first', 'bias'):
        np.testing.assert_array_equal(leaf, 0, path)
    self.assertEqual(new.hyperparams['learning_rate'], 3)

  def test_reset_is_a_fresh_state(self):
    """Also of leaves without named axes, further counts and copies."""
    params = {**mlp(), 'gain': np.ones((), 'f4')}
    tx = optax.contrib.schedule_free_sgd(0.1)
    tx = optax.MultiSteps(tx, 4).gradient_transformation()
    _, new, receipt = receipts.grow(
        Growth(moments='reset'), TABLE, params, begun(tx, params), like=params,
        tx=tx,
    )
    chex.assert_trees_all_equal(new, tx.init(params))
    self.assertEmpty(receipt.optimizer.kept)

  def test_moments_that_a_growth_sets(self):
    tx = optax.trace(0.9)
    state = tx.init(mlp())
    value = np.full(4, 5, 'f4')
    growth = Growth(moments={('trace', 'first', 'bias'): value})
    new, _ = carry_lib.carry(growth, TABLE, state, state, moments=True)
    np.testing.assert_array_equal(new.trace['first']['bias'], value)
    np.testing.assert_array_equal(new.trace['second']['bias'], 0)

  def test_factored_moments_start_afresh(self):
    """By name; what stands for nothing, of shape (1,), is kept."""
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    state = begun(tx, mlp())
    growth = growth_lib.widen(TABLE, 'hidden', to=6)
    fresh = tx.init(mlp(6))
    new, account = carry_lib.carry(growth, TABLE, state, fresh, moments=True)
    why = 'its rank is 1, that of its parameter 2'
    self.assertEqual(
        account.refused,
        {
            f'0/{leaf}/{layer}/kernel': why
            for leaf in ('v_row', 'v_col') for layer in ('first', 'second')
        },
    )
    self.assertStartsWith(
        str(account), '8 kept, 1 changed, 0 new, 0 dropped, 4 refused'
    )
    self.assertIn(f'\n0/v_row/first/kernel: {why}', str(account))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, fresh)
    for leaf in (new[0].v_row, new[0].v_col):
      np.testing.assert_array_equal(leaf['first']['kernel'], 0)
      np.testing.assert_array_equal(leaf['second']['kernel'], 0)
    np.testing.assert_array_equal(
        new[0].v['first']['bias'][:4], state[0].v['first']['bias']
    )


OPTIMIZERS = {
    'sgd': optax.sgd(0.1, 0.9),
    'adamw': optax.adamw(0.1),
    'injected': optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    'accumulating': optax.MultiSteps(optax.adam(0.1), 2),
    'masked': optax.masked(
        optax.adam(0.1), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    ),
    'schedule_free': optax.contrib.schedule_free_sgd(0.1),
}


class ReceiptsTest(parameterized.TestCase):

  def test_a_wider_perceptron(self):
    params = mlp()
    state = begun(optax.adamw(0.1), params)
    average = jax.tree.map(lambda leaf: 2 * leaf, params)
    growth = growth_lib.widen(TABLE, 'hidden', to=6)
    grown, opt_state, mean, receipt = receipts.grow(
        growth, TABLE, params, state, like=mlp(6, number=2), extra=[average],
        probe=(apply, apply, X),
    )
    np.testing.assert_allclose(apply(grown, X), apply(params, X), atol=1e-6)
    self.assertLess(receipt.outputs_change[''], 1e-6)
    self.assertGreater(np.abs(grown['first']['kernel'][:, 4:]).min(), 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        opt_state, optax.adamw(0.1).init(grown)
    )
    np.testing.assert_array_equal(
        mean['second']['kernel'], 2 * grown['second']['kernel']
    )
    self.assertEqual(receipt.size, (26, 38))
    self.assertEqual(
        receipt.optimizer.counts,
        {'kept': 3, 'changed': 6, 'new': 0, 'dropped': 0},
    )
    change = receipt.outputs_change['']
    self.assertEqual(
        str(receipt).splitlines(),
        [
            'widen hidden, 4 to 6 units',
            '  parameters: 26 -> 38; leaves: 1 kept, 3 changed, 0 new, '
            '0 dropped',
            f'  largest change of the outputs: {change:.2g}',
            '  optimizer: 3 kept, 6 changed, 0 new, 0 dropped',
        ],
    )

  def test_by_shapes_alone(self):
    params = mlp()
    growth = growth_lib.widen(TABLE, 'hidden', to=6)
    like = jax.eval_shape(lambda: mlp(6))
    grown, state, receipt = receipts.grow(
        growth, TABLE, params, like=like, key=KEY
    )
    self.assertIsNone(state)
    self.assertIsNone(receipt.optimizer)
    self.assertIn('outputs: not measured', str(receipt))
    np.testing.assert_allclose(apply(grown, X), apply(params, X), atol=1e-6)
    self.assertGreater(np.abs(grown['first']['kernel'][:, 4:]).min(), 0)

  @parameterized.product(
      optimizer=tuple(OPTIMIZERS), collection=('', 'params')
  )
  def test_any_optimizer(self, optimizer, collection):
    """Trains on from what `init` of the wider model would have the shape of."""
    tx = OPTIMIZERS[optimizer]
    wrapped = lambda params: {collection: params} if collection else params
    params = mlp()
    state = begun(tx, params)
    growth = growth_lib.split(TABLE, 'hidden', [1, 2])
    grown, state, receipt = receipts.grow(
        growth, TABLE, wrapped(params), state, like=wrapped(mlp(6)), key=KEY
    )
    grown = grown[collection] if collection else grown
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(grown))
    self.assertEmpty(receipt.optimizer.refused)
    # New twins have the moments of their parents.
    mine = [
        leaf
        for path, leaf in axes_lib.by_path(state).items()
        if path[-2:] == ('first', 'kernel')
    ]
    self.assertNotEmpty(mine)
    for leaf in mine:
      np.testing.assert_array_equal(leaf[:, [4, 5]], leaf[:, [1, 2]])

  def test_an_optimizer_whose_state_has_other_shapes(self):
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    params, growth = mlp(), growth_lib.widen(TABLE, 'hidden', to=6)
    state = begun(tx, params)
    grow = lambda tree, like, **arguments: receipts.grow(
        growth, TABLE, tree, state, like=like, **arguments
    )
    message = "0/v_row/first/kernel of the optimizer's state has shape (3,)"
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      grow(params, mlp(6))
    grown, new, receipt = grow(params, mlp(6), tx=tx)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, tx.init(grown))
    self.assertLen(receipt.optimizer.refused, 4)
    _, also, _ = grow({'params': params}, {'params': mlp(6)}, tx=tx)
    chex.assert_trees_all_equal(also, new)

  def test_an_optimizer_of_another_kind(self):
    state = optax.adam(0.1).init(mlp())
    with self.assertRaisesRegex(ValueError, 'not a state of `tx` over the'):
      receipts.grow(
          Growth(), TABLE, mlp(), state, like=mlp(), tx=optax.sgd(0.1)
      )

  def test_a_frozen_axis_of_several_factors(self):
    fused_axis = Axis((('heads', 'size'),), 'writes')
    table = AxisTable(
        {('w',): (fused_axis,)}, {'heads': 2, 'size': 3}, {'heads': 'fused'}
    )
    with self.assertRaisesRegex(ValueError, "'heads' is frozen: fused"):
      growth_lib.widen(table, 'heads', to=3)
    self.assertIn('frozen, fused: heads', str(table))

  def test_a_layer_that_comes(self):
    params = mlp()
    state = begun(optax.adamw(0.1), params)
    like = {**mlp(), 'third': {'bias': np.ones(2, 'f4')}}
    grown, state, receipt = receipts.grow(
        Growth(note='append third'), TABLE, params, state, like=like
    )
    self.assertEqual(receipt.parameters.new, ('third/bias',))
    self.assertEqual(
        receipt.optimizer.new, ('0/mu/third/bias', '0/nu/third/bias')
    )
    np.testing.assert_array_equal(state[0].mu['third']['bias'], 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state, optax.adamw(0.1).init(grown)
    )


if __name__ == '__main__':
  absltest.main()
