"""Axes of models that others wrote: free, frozen, and never wrong.

Weights are random; nothing is downloaded. Three models are tried by
`make test-ci`, all of them by `make test-slow`.
"""

import os

from absl.testing import absltest
from absl.testing import parameterized
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autogrow_jax as ag
from autogrow_jax.core import axes as axes_lib

os.environ |= {'USE_TORCH': '0', 'USE_TF': '0'}

TOKENS = np.random.default_rng(0).integers(0, 120, (2, 9))
IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype('f4')
ONES = np.ones((2, 9), int)
POSITIONS = np.arange(9)[None].repeat(2, 0)
SMALL = dict(num_hidden_layers=2, hidden_size=48, intermediate_size=96,
             num_attention_heads=4)
TEXT = dict(vocab_size=120, max_position_embeddings=32)


def _linen(module, *inputs, **options):
  key = jax.random.key(0)
  shapes = jax.eval_shape(
      lambda: module.init({'params': key, 'dropout': key}, *inputs, **options)
  )
  function = lambda tree, *x: module.apply(tree, *x, **options)
  return function, flax.core.unfreeze(shapes), inputs


def _transformers(name, config, inputs, **settings):
  transformers = pytest.importorskip('transformers')
  model = getattr(transformers, name)(
      getattr(transformers, config)(**settings), _do_init=False
  )
  shapes = flax.core.unfreeze(model.params_shape_tree)
  shapes = shapes if 'params' in shapes else {'params': shapes}
  function = lambda tree, *x: model.module.apply(tree, *x).to_tuple()[0]
  return function, shapes, inputs


def _jax_resnet(name):
  module = pytest.importorskip('jax_resnet')
  return _linen(getattr(module, name)(n_classes=10), IMAGES)


def _vgg():
  module = pytest.importorskip('flaxmodels')
  vgg = module.VGG16(output='logits', pretrained=None, num_classes=10)
  return _linen(vgg, np.ones((1, 224, 224, 3), 'f4'), train=False)


def _unet():
  module = pytest.importorskip('diffusers')
  unet = module.FlaxUNet2DConditionModel(
      sample_size=16, block_out_channels=(32, 64), layers_per_block=1,
      down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
      up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
      cross_attention_dim=32, attention_head_dim=8,
  )
  shapes = jax.eval_shape(lambda: unet.init_weights(jax.random.key(0)))
  inputs = (
      np.ones((1, 4, 16, 16), 'f4'), np.ones(1, int), np.ones((1, 7, 32), 'f4')
  )
  function = lambda tree, *x: unet.apply(tree, *x).sample
  return function, {'params': flax.core.unfreeze(shapes)}, inputs


def _equinox():
  module = pytest.importorskip('equinox')
  layers = module.nn.MLP(5, 3, width_size=16, depth=2, key=jax.random.key(0))
  params, static = module.partition(layers, module.is_array)
  function = lambda tree, x: jax.vmap(module.combine(tree, static))(x)
  return function, params, (np.ones((4, 5), 'f4'),)


# Name -> model, and how many free factors it has at least.
MODELS = {
    'bert': (lambda: _transformers(
        'FlaxBertForMaskedLM', 'BertConfig',
        (TOKENS, ONES, 0 * ONES, POSITIONS, None), **SMALL, **TEXT), 9),
    'gpt2': (lambda: _transformers(
        'FlaxGPT2LMHeadModel', 'GPT2Config', (TOKENS, ONES, POSITIONS),
        n_layer=2, n_embd=48, n_head=4, vocab_size=120, n_positions=32), 9),
    'llama': (lambda: _transformers(
        'FlaxLlamaForCausalLM', 'LlamaConfig', (TOKENS, ONES, POSITIONS),
        **SMALL, **TEXT, num_key_value_heads=2), 9),
    'vit': (lambda: _transformers(
        'FlaxViTForImageClassification', 'ViTConfig', (IMAGES,), **SMALL,
        image_size=32, patch_size=8), 9),
    'resnet': (lambda: _transformers(
        'FlaxResNetForImageClassification', 'ResNetConfig',
        (IMAGES.transpose(0, 3, 1, 2),), embedding_size=16,
        hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]), 14),
    'resnet18': (lambda: _jax_resnet('ResNet18'), 12),
    'resnet50': (lambda: _jax_resnet('ResNet50'), 37),
    'vgg16': (_vgg, 15),
    'unet': (_unet, 49),
    'equinox': (_equinox, 2),
}
IN_CI = ('bert', 'gpt2', 'llama')


def _drawn(shapes):
  """Random weights in place of shapes; variances are positive."""
  rng = np.random.default_rng(0)

  def leaf(path, shape):
    drawn = 0.1 * rng.standard_normal(shape.shape)
    if path[-1] == 'var':
      drawn = 1 + np.abs(drawn)
    elif path[-1] in ('scale', 'weight'):
      drawn = 1 + drawn
    return jnp.asarray(drawn, shape.dtype)

  return axes_lib.map_with_names(leaf, shapes)


class ForeignModelsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.enter_context(jax.numpy_rank_promotion('allow'))

  @parameterized.parameters(*IN_CI)
  @pytest.mark.ci
  def test_some(self, name):
    self._check(name)

  @parameterized.parameters(*(name for name in MODELS if name not in IN_CI))
  @pytest.mark.slow
  def test_others(self, name):
    self._check(name)

  def _check(self, name):
    make, least = MODELS[name]
    function, shapes, inputs = make()
    axes = ag.trace(function, shapes, *inputs)
    self.assertGreaterEqual(len(axes.free), least)
    self.assertNotIn('tracing does not know', str(axes))
    free = set(axes.free)
    sizes = {True: 0, False: 0}
    for path, leaf in axes_lib.by_path(shapes).items():
      has_free = any(
          axis is not None and axis.factors & free
          for axis in axes.find(path) or ()
      )
      sizes[has_free] += int(np.prod(leaf.shape))
    self.assertGreater(sizes[True] / sum(sizes.values()), 0.95)
    if name == 'vgg16':  # 0.5 GB of weights, a minute per permutation.
      return
    tree = _drawn(shapes)
    outcome = axes.verify(function, tree, *inputs)
    self.assertLess(max(outcome.changes.values()), 1e-5)
    self._widen_and_prune(axes, tree)

  def _widen_and_prune(self, axes, tree):
    tx = optax.adamw(1e-3)
    params = tree['params'] if isinstance(tree, dict) else tree
    state = tx.init(params)
    for axis in axes.free:
      size = axes.sizes[axis]
      for growth in (
          ag.widen(axes, axis, to=size + 1),
          ag.prune(axes, axis, keep=range(size - 1)),
      ):
        moved = lambda path, leaf, growth=growth: jax.ShapeDtypeStruct(
            axes_lib.gather(
                np.zeros(leaf.shape, bool), axes.find(path), growth.sources,
                axes.sizes,
            )[0].shape, leaf.dtype,
        )
        like = axes_lib.map_with_names(moved, tree)
        grown, new_state, receipt = ag.grow(
            growth, axes, tree, state, like=like, key=jax.random.key(0)
        )
        counts = receipt.optimizer.counts
        self.assertEqual((counts['new'], counts['dropped']), (0, 0))
        self.assertNotIn('refused', counts)
        params = grown['params'] if isinstance(grown, dict) else grown
        self.assertEqual(
            jax.tree.map(jnp.shape, new_state[0].mu),
            jax.tree.map(jnp.shape, params),
        )


if __name__ == '__main__':
  absltest.main()
