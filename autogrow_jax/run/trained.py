"""A finished (or interrupted) run's network, from its directory alone."""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import state as state_lib
from autogrow_jax import tasks
from autogrow_jax import view
from autogrow_jax.data import paths
from autogrow_jax.methods import base
from autogrow_jax.networks import base as networks_base
from autogrow_jax.run import checkpoint
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import history
from autogrow_jax.run import steps

Architecture = architecture_lib.Architecture

PREDICTION_BATCH = 256
_MOST_LOGITS = 2**26  # Of a batch: 256 MB of float32.


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
  """A network out of a work directory.

  Attributes:
    architecture: its architecture.
    config: configuration of the run that made it, fully resolved.
    preprocessing: preprocessing of the images that it was trained on.
    weights: parameters, by name.
    stats: network statistics, by name.
    epoch: number of epochs that it was trained for.
  """

  architecture: Architecture
  config: config_lib.RunConfig
  preprocessing: data.Preprocessing
  weights: dict[str, Any]
  stats: dict[str, Any]
  epoch: int

  def predict(self, images: np.ndarray) -> np.ndarray:
    """Logits in evaluation mode, float32 (examples, ..., classes).

    Args:
      images: raw uint8 pixels (examples, height, width, channel), of the size
        that the network was trained on; or numbers of words, int32
        (examples, step).

    Raises:
      ValueError: the images are of another kind.
    """
    images = np.asarray(images)
    self._check(images)
    batch = self._batch(images)
    return np.concatenate([
        self._logits(images[start : start + batch], batch)
        for start in range(0, max(1, len(images)), batch)
    ])

  def score(self, split: data.Split) -> tasks.Score:
    """Scores a split by the task that its labels belong to."""
    batch = self._batch(split.images)
    return tasks.of_labels(split.labels).score(
        lambda images: self._logits(images, batch), split, batch
    )

  def _logits(self, images: np.ndarray, batch: int) -> np.ndarray:
    """Logits of at most a batch of images, by one program."""
    missing = batch - len(images)
    padded = np.pad(images, [(0, missing), *[(0, 0)] * (images.ndim - 1)])
    return self._forward(padded)[: len(images)]

  def _batch(self, images: Any) -> int:
    """How many of these examples go into a call."""
    if images.ndim == 2:  # A label for every word.
      labels = images.shape[1]
    else:
      labels = math.prod(networks.label_shape(self.architecture))
    logits = labels * self.architecture.size('classes')
    return examples_at_once(PREDICTION_BATCH, logits)

  def _check(self, images: np.ndarray) -> None:
    """Raises ValueError for inputs of another kind or size."""
    if self.preprocessing.kind == 'tokens':
      if images.dtype != np.int32 or images.ndim != 2:
        raise ValueError(
            'Words must be their numbers, int32 (examples, step), got '
            f'{images.dtype} {images.shape}.'
        )
      return
    option: dict[str, Any] = dict(self.architecture.options)
    pad = 2 * self.preprocessing.pad
    height, width = option['resolution']
    shape = height - pad, width - pad, self.architecture.size('image')
    if images.dtype != np.uint8 or images.shape[1:] != shape:
      raise ValueError(
          f'Images must be uint8 (examples, {", ".join(map(str, shape))}), got '
          f'{images.dtype} {images.shape}.'
      )

  def parts(self) -> dict[str, tuple[Any, Any]]:
    """{part: (weights, statistics)}."""
    return {
        name: (weights, self.stats[name])
        for name, weights in self.weights.items()
    }

  @functools.cached_property
  def _forward(self) -> Any:
    layout = view.layout(self.architecture)
    arrays = jax.device_put(view.pack((self.weights, self.stats), layout))
    dtype = jnp.dtype(self.config.devices.precision)

    @jax.jit
    def logits(weights, stats, images):
      x = data.preprocess(images, self.preprocessing, dtype=dtype)
      return networks_base.apply(
          layout.bucket, weights, stats, x, train=False
      )[0]

    return lambda images: np.asarray(logits(*arrays, images))


def examples_at_once(most: int, logits: int) -> int:
  """Number of examples to evaluate in a call, by the logits of each."""
  return max(1, min(most, _MOST_LOGITS // logits))


def load(
    workdir: str | os.PathLike[str],
    *,
    method: base.Method | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainedNetwork:
  """Reads the newest good checkpoint of a work directory.

  Args:
    workdir: work directory of a run.
    method: the method that the run was given, if it was given one.
    optimizer: the optimizer that the run was given, if it was given one.

  Raises:
    ValueError: the directory holds no run, or none that can be read.
  """
  workdir = paths.local(workdir, 'The work directory of a run')
  known = history.read_json(workdir / 'config.json')
  if known is None:
    raise ValueError(f'{workdir} holds no run: it has no config.json.')
  config = config_lib.RunConfig.from_json(known)
  method = method or config.method

  def abstract_of(documents):
    architecture = Architecture.from_json(documents['architecture'])
    tx = make_optimizer(config, architecture, method, optimizer)
    return abstract_arrays(documents, method, tx)

  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', keep=1)
  try:
    restored = checkpoints.restore(abstract_of)
  except checkpoint.CheckpointError as error:
    if not config.own:
      raise
    raise ValueError(
        f'{error} The run was given objects ({config.own}): pass the same '
        'method and optimizer.'
    ) from error
  if restored is None:
    raise ValueError(f'The run in {workdir} has not saved a checkpoint yet.')
  documents, state = restored.documents, restored.state['state']
  architecture = Architecture.from_json(documents['architecture'])
  active = method.execution.active(architecture, state.stats['method'])
  if active is not None and active.counts != dict(architecture.sizes):
    raise ValueError(
        f'The run in {workdir} is still choosing what its network consists of '
        f'(epoch {documents["progress"]["epoch"]}); continue it to its end.'
    )
  return TrainedNetwork(
      architecture=architecture,
      config=config,
      preprocessing=data.Preprocessing(**documents['preprocessing']),
      weights=state.params['weights'],
      stats=state.stats['network'],
      epoch=documents['progress']['epoch'],
  )


def make_optimizer(
    config: config_lib.RunConfig,
    architecture: Architecture,
    method: base.Method,
    weights: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """Makes the optimizer of a resolved configuration and its method.

  Args:
    config: the configuration.
    architecture: any network of the run.
    method: the run's method.
    weights: optimizer of the weights that replaces the configuration's own.
  """
  return optimizers.make(
      config.optimizer if weights is None else weights,
      aux=method.extra(architecture).optimizer,
      top_rate=config.schedule.learning_rate,
  )


def abstract_arrays(
    documents: dict[str, Any],
    method: base.Method,
    tx: optax.GradientTransformation,
) -> dict[str, Any]:
  """Shapes of all arrays in a checkpoint, from its documents."""
  networks = {'state': documents['architecture']}
  if twin := documents.get('progress', {}).get('twin'):
    networks['twin'] = twin
  return {'meters': steps.new_meters()} | {
      name: state_lib.abstract_state(
          Architecture.from_json(value),
          tx,
          extra=method.extra,
      )
      for name, value in networks.items()
  }
