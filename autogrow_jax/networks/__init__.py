"""Network families: `get(name)`, and the parts of an architecture."""

import functools
import importlib

from autogrow_jax import architecture as architecture_lib
from autogrow_jax.networks import base
from autogrow_jax.networks import config
from autogrow_jax.networks import deeplab
from autogrow_jax.networks import lstm
from autogrow_jax.networks import mlp
from autogrow_jax.networks import mobilenet
from autogrow_jax.networks import plain
from autogrow_jax.networks import residual
from autogrow_jax.networks import vgg
from autogrow_jax.networks import wide

NetworkConfig = config.NetworkConfig

FAMILIES = {
    network.name: network
    for network in (
        residual.BASIC1,
        residual.BASIC3,
        residual.BASIC4,
        residual.BOTTLENECK4,
        plain.PLAIN3,
        plain.PLAIN4,
        vgg.VGG16,
        vgg.VGG19,
        wide.WRN28,
        mobilenet.MOBILENET1,
        mlp.MLP,
        deeplab.DEEPLAB,
        lstm.LSTM2,
    )
}


def get(name: str) -> base.Network:
  """Returns the family of a name, or raises a ValueError.

  Args:
    name: a key of `FAMILIES`, in any case, or 'package.module:attribute' for a
      network from outside; checkpoints contain that text, so that a run
      restores from its directory alone.
  """
  if ':' in name:
    module, _, attribute = name.partition(':')
    try:
      network = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
      raise ValueError(
          f'Network {name!r} cannot be imported: {error}.'
      ) from error
    if not isinstance(network, base.Network):
      raise ValueError(f'{name!r} is no autogrow_jax network.')
    return network
  if name.lower() not in FAMILIES:
    raise ValueError(
        f'Unknown network {name!r}; there are {", ".join(FAMILIES)}.'
    )
  return FAMILIES[name.lower()]


@functools.lru_cache(maxsize=256)
def parts(
    architecture: architecture_lib.Architecture,
) -> tuple[base.Part, ...]:
  """The chain of parts of an architecture."""
  return get(architecture.family).parts(architecture)


def label_shape(
    architecture: architecture_lib.Architecture,
) -> tuple[int, ...]:
  """Shape of one example's labels: () for a class, or a mask's."""
  return base.output_shape(parts(architecture)[-1])[:-1]
