"""DeepLab-v3 on a bottleneck ResNet-101 (Chen et al. 2017), for segmentation.

The trunk subsamples by 16 (by 4 behind the stem of small images): its last
stage has no stride but dilation 2, that is 2 x the multi-grid (1, 1, 1). The
head reads the trunk's stream through five branches (atrous spatial pyramid
pooling): a 1x1 convolution, three 3x3 ones with dilations 6, 12 and 18, and the
mean over all positions with a 1x1 convolution. A 1x1 convolution of all
branches, the projection, and a 1x1 classifier follow; bilinear interpolation
brings the logits to the size of the image.

Every branch writes an axis of its own, `aspp0` to `aspp4`, and the projection
writes `project`. The projection has one kernel per branch, whose outputs are
summed: the same as one kernel that reads the concatenation. Unlike the paper,
it computes the mean's share once and not at every position, with equal results.
"""

from collections.abc import Sequence
import dataclasses
import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from autogrow_jax import layers
from autogrow_jax import ops
from autogrow_jax.networks import base
from autogrow_jax.networks import common
from autogrow_jax.networks import residual

# Dilations of the 3x3 branches, in positions of the trunk's output.
_DILATIONS = (6, 12, 18)

BRANCHES = tuple(f'aspp{index}' for index in range(len(_DILATIONS) + 2))


class PyramidHead(base.Module):
  """Branches, projection, classifier, interpolation; logits in float32.

  Attributes:
    branches: widths of the branches.
    project: width of the projection.
    size: (height, width) of the logits, pixels.
  """

  branches: tuple[int, ...] = (256,) * len(BRANCHES)
  project: int = 256
  classes: int = 21
  size: tuple[int, int] = (513, 513)
  scale_init: str = 'ones'
  init_scheme: str = 'imagenet'

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del gate
    conv = functools.partial(common.conv, self)
    norm = lambda y, axis: ops.relu(
        common.norm(self, train, axis, f'{axis}_norm')(y)
    )
    # Size and dilation of each branch's kernel; the last one reads the mean.
    kernels = ((1, 1), *((3, dilation) for dilation in _DILATIONS), (1, 1))
    mean = jnp.mean(layers.widened(x), (1, 2), keepdims=True).astype(x.dtype)
    total = 0
    for index, (size, dilation) in enumerate(kernels):
      axis, width = BRANCHES[index], self.branches[index]
      branch = conv(
          width, size, writes=axis, dilation=dilation, name=f'{axis}_conv'
      )(mean if index == len(kernels) - 1 else x)
      total = total + conv(
          self.project, 1, reads=axis, writes='project', name=f'project_{axis}'
      )(norm(branch, axis))
    axes = {'reads': 'project', 'writes': 'classes'}
    classifier = conv(self.classes, 1, **axes, bias=True, name='classifier')
    y = classifier(layers.widened(norm(total, 'project')))
    return resized(y, self.size)


def resized(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Interpolates bilinearly, corners on corners.

  The networks' strides sample the positions 0, 16, 32, ... of an image whose
  sides are a multiple of 16 plus one; there every value stays in its place.

  Args:
    x: (batch, height, width, channel).
    size: height and width of the result, pixels.
  """
  rows, columns = (
      _interpolation(x.shape[dim + 1], size[dim]).astype(x.dtype)
      for dim in (0, 1)
  )
  return jnp.einsum(
      'nhwc,Hh,Ww->nHWc', x, rows, columns, precision=lax.Precision.HIGHEST
  )


def _interpolation(before: int, after: int) -> jax.Array:
  """Weights, (after, before), of evenly spaced points between others."""
  points = jnp.linspace(0, before - 1, after)[:, None]
  return jnp.maximum(0, 1 - jnp.abs(points - jnp.arange(before)[None]))


@dataclasses.dataclass(frozen=True)
class DeepLab(residual.Trunk):
  """A DeepLab-v3 family; branches are half as wide as the last stage's base."""

  milestones = 'poly'
  other_layers = 4  # Stem; branches, which count one; projection; classifier.

  def shared(self, widths: Sequence[int]) -> dict[str, int]:
    width = max(1, widths[-1] // 2)
    head = dict.fromkeys((*BRANCHES, 'project'), width)
    return {**super().shared(widths), **head}

  def parts(self, architecture: base.Architecture) -> common.Parts:
    sizes = dict(architecture.sizes)
    axes = (*BRANCHES, 'project')
    head = PyramidHead(
        branches=tuple(sizes[name] for name in BRANCHES),
        project=sizes['project'],
        classes=sizes['classes'],
        size=architecture.option('resolution'),
        **common.starts(architecture),
    )
    return self.chain(architecture, (head, dict(zip(axes, axes))))


DEEPLAB = DeepLab(
    'deeplab',
    'DeepLab-v3-ResNet-101',
    (64, 128, 256, 512),
    (1, 2, 2, 1),
    residual.BottleneckBlock,
    ('mid1', 'mid2'),
    expansion=4,
    dilations=(1, 1, 1, 2),
    depths=(3, 4, 23, 3),
    learning_rate=0.007,
)
