"""Tests of data placement on 8 simulated devices, also across a growth."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_networks

from autogrow_jax import data
from autogrow_jax import optimizers
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.networks import base
from autogrow_jax.run import parallel
from autogrow_jax.run import programs
from autogrow_jax.run import steps

DEVICES = 8
BATCH = 32
RATE = np.float32(0.1)
TX = tiny_networks.OPTIMIZERS['sgd']
PREPROCESSING = data.Preprocessing(
    mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), crop=2, flip=True
)


def training_set():
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (40, *tiny_networks.IMAGE), np.uint8)
  labels = generator.integers(0, tiny_networks.CLASSES, 40).astype('i4')
  order = generator.permutation(40)[:BATCH].astype('i4')
  return images, labels, order


def compiler_for(placement):
  return programs.Programs(
      tiny_networks.computation(
          TX, preprocessing=PREPROCESSING, parallel=placement
      )
  )


def grow_between_steps(
    placement, state, architecture, *, spare=False, ahead=False
):
  """One step, a growth and another step; (state, meters) after either step.

  `ahead` compiles for the second network before it is there.
  """
  compiler = compiler_for(placement)
  images, labels, order = training_set()
  results = []
  for _ in range(2):
    layout = view.layout(architecture, spare=spare)
    arguments = (
        placement.replicate(view.pack(state, layout)),
        placement.replicate(steps.new_meters()),
        placement.replicate(images),
        placement.replicate(labels),
        placement.shard(order),
        placement.replicate(RATE),
        placement.replicate(layout.depths),
    )
    packed, meters = compiler.train_step(layout, arguments)(*arguments)
    state = view.unpack(placement.fetch(packed), layout)
    results.append((state, placement.fetch(meters)))
    if ahead:
      deeper = architecture.with_block(1)
      compiler.prepare(view.layout(deeper, spare=spare))
    state, architecture = grown(state, architecture)
  compiler.close()
  # What was never needed is told; spare room serves the third network, too.
  waited = [compilation.waited for compilation in compiler.drain()]
  want = [False, ahead, *[True] * (ahead and not spare)]
  assert [seconds is not None for seconds in waited] == want, waited
  return results


def grown(state, architecture):
  change = state_lib.append(architecture, [1])
  return tiny_networks.grow(state, change, TX, number=1)[0], change.target


def device_norm_steps(state, architecture):
  """Computes on one device, without `steps`, what `pmap` mode should.

  The batch is augmented as a whole; then every share has its own batch norm,
  and gradients, losses and running statistics are averaged.
  """
  images, labels, order = training_set()
  results = []
  for _ in range(2):
    bucket = view.layout(architecture, fuse=False).bucket
    key = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(randomness.stream(key, 'augment'), state.step)
    x, y = data.augment_examples(
        key, images[order], labels[order], PREPROCESSING
    )
    x = data.preprocess(x, PREPROCESSING)
    x = x.reshape(DEVICES, -1, *tiny_networks.IMAGE)
    y = y.reshape(DEVICES, -1)

    def loss_fn(params, x, y, bucket=bucket, stats=state.stats['network']):
      logits, new = base.apply(bucket, params['weights'], stats, x, train=True)
      losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
      hits = jnp.sum(logits.argmax(-1) == y)
      return jnp.mean(losses), (new, hits)

    gradient = jax.jit(
        jax.vmap(jax.value_and_grad(loss_fn, has_aux=True), (None, 0, 0)),
        compiler_options=tiny_networks.FAST_COMPILE,
    )
    (losses, (stats, hits)), grads = gradient(state.params, x, y)
    average = lambda tree: jax.tree.map(lambda leaf: leaf.mean(0), tree)
    updates, opt_state = TX.update(
        average(grads),
        optimizers.with_learning_rate(state.opt_state, RATE),
        state.params,
    )
    state = state_lib.to_host(
        state.replace(
            step=state.step + np.int32(1),
            params=optax.apply_updates(state.params, updates),
            stats={**state.stats, 'network': average(stats)},
            opt_state=opt_state,
        )
    )
    meters = {
        'loss_sum': losses.mean() * BATCH,
        'correct': hits.sum(),
        'total': np.int32(BATCH),
    }
    results.append((state, meters))
    state, architecture = grown(state, architecture)
  return results


class StepTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.architecture = tiny_networks.seed('plain3net', (1, 1, 1))
    self.state = tiny_networks.state(self.architecture)

  def compare(self, got, want):
    for (state, meters), (expected, expected_meters) in zip(
        got, want, strict=True
    ):
      tiny_networks.assert_close(state, expected, 1e-5)
      tiny_networks.assert_close(meters, expected_meters, 1e-5)
    # The step did something, and so did the growth.
    self.assertEqual(got[-1][0].step, 2)
    self.assertIn('s1b1', got[-1][0].params['weights'])

  def test_jit_equals_one_device(self):
    one = grow_between_steps(parallel.make(), self.state, self.architecture)
    many = grow_between_steps(
        parallel.make('jit', DEVICES),
        self.state,
        self.architecture,
        spare=True,
        ahead=True,
    )
    self.compare(many, one)

  def test_nothing_changes_by_compiling_ahead(self):
    run = lambda ahead: grow_between_steps(
        parallel.make(), self.state, self.architecture, ahead=ahead
    )
    for got, want in zip(run(True), run(False), strict=True):
      tiny_networks.assert_same(got, want)

  def test_pmap_has_batch_norm_per_device(self):
    many = grow_between_steps(
        parallel.make('pmap', DEVICES),
        self.state,
        self.architecture,
        spare=True,
        ahead=True,
    )
    self.compare(many, device_norm_steps(self.state, self.architecture))


class PlacementTest(parameterized.TestCase):

  @parameterized.parameters(('auto', None), ('jit', DEVICES), ('pmap', DEVICES))
  def test_round_trips(self, mode, count):
    placement = parallel.make(mode, count)
    tree = {'a': np.arange(16, dtype='i4').reshape(8, 2), 'b': np.ones(8, 'f4')}
    tiny_networks.assert_same(
        placement.fetch(placement.replicate({**tree, 'c': np.int32(3)})),
        {**tree, 'c': np.int32(3)},
    )
    tiny_networks.assert_same(placement.gather(placement.shard(tree)), tree)

  @parameterized.parameters(('jit', DEVICES), ('pmap', DEVICES))
  def test_uses_all_devices(self, mode, count):
    placement = parallel.make(mode, count)
    for array in (
        placement.shard(np.arange(16)), placement.replicate(np.arange(3))
    ):
      self.assertLen(array.sharding.device_set, DEVICES)
    sharded = placement.shard(np.arange(16))
    self.assertEqual(
        {shard.data.size for shard in sharded.addressable_shards}, {2}
    )

  def test_pmap_knows_the_position_of_a_share(self):
    placement = parallel.make('pmap', DEVICES)
    index = placement.shard(np.arange(16, dtype='i4'))
    run, _ = placement.compile(
        lambda index: index - placement.first(index.size),
        (index,),
        outputs='sharded',
    )
    np.testing.assert_array_equal(placement.gather(run(index)), [0, 1] * 8)

  def test_pmap_averages_real_numbers_only(self):
    placement = parallel.make('pmap', DEVICES)
    tree = {
        'mean': placement.shard(np.arange(DEVICES, dtype='f4')),
        'count': placement.replicate(np.int32(7)),
    }
    run, _ = placement.compile(placement.mean, (tree,), outputs='replicated')
    done = placement.fetch(run(tree))
    self.assertEqual(float(done['mean'][0]), (DEVICES - 1) / 2)
    self.assertEqual(done['count'].dtype, np.int32)
    self.assertEqual(int(done['count']), 7)

  def test_compiles_where_an_option_is_unknown(self):
    jax.jit(lambda: 0).lower().compile(parallel.CPU_OPTIONS)
    placement = parallel.make()
    with mock.patch.dict(parallel.CPU_OPTIONS, {'xla_no_such_option': '1'}):
      run, _ = placement.compile(lambda: 7, (), outputs='replicated')
    self.assertEqual(run(), 7)

  @parameterized.parameters(
      ('pmap', 4, 'pmap'),
      ('jit', 1, 'jit'),
      ('auto', 1, 'single'),
      ('auto', 3, 'jit'),
      ('auto', None, 'single'),
  )
  def test_make(self, mode, count, want):
    placement = parallel.make(mode, count)
    self.assertEqual(placement.mode, want)
    self.assertLen(placement.devices, count or 1)

  @parameterized.parameters(
      (('auto', 9), 'num_devices is 1 to 8 on this machine, got 9'),
      (('jit', 0), 'num_devices is 1 to 8 on this machine, got 0'),
      (('single', 1), "parallel is auto, pmap or jit, got 'single'"),
  )
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      parallel.make(*arguments)

  def test_single_has_one_device(self):
    with self.assertRaisesRegex(ValueError, 'one device, not 2'):
      parallel.Parallel('single', tuple(jax.devices()[:2]))


if __name__ == '__main__':
  absltest.main()
