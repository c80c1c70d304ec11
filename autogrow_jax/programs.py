"""The compiled programs of a run: the training step and the evaluation.

Both are written once, for all networks, methods and ways of parallelism, and
compiled per bucket of architectures.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import functools
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autogrow_jax import data
from autogrow_jax import networks
from autogrow_jax import optimizers
from autogrow_jax import parallel as parallel_lib
from autogrow_jax import randomness
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.methods import base
from autogrow_jax.networks import base as networks_base

Compiled = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Compiling:
  """What is told of a program once it is there.

  Attributes:
    name: of its kind.
    seconds: of tracing and compiling.
    bytes: see `compiled_bytes`.
    waited: seconds for which a program was waited for that was begun in
      advance; None for others.
  """

  name: str
  seconds: float
  bytes: int | None
  waited: float | None = None


OnCompile = Callable[[Compiling], None]


@dataclasses.dataclass(frozen=True)
class Task:
  """What the programs depend on besides the bucket.

  Attributes:
    method: gives the objective.
    tx: the optimizer.
    preprocessing: of the images.
    dtype: of activations.
    parallel: placement.
  """

  method: base.Method
  tx: optax.GradientTransformation
  preprocessing: data.Preprocessing
  dtype: Any
  parallel: parallel_lib.Parallel


@dataclasses.dataclass
class Compilations:
  """What `compilations` saw: how many, and how long they took."""

  count: int = 0
  seconds: float = 0.0


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
  """Counts what JAX compiles meanwhile, or takes out of its cache.

  In this thread, in which nothing is that was begun in advance.
  """
  spent = Compilations()
  _watching.here.append(spent)
  try:
    yield spent
  finally:
    _watching.here.remove(spent)


class _Watching(threading.local):

  def __init__(self):
    self.here: list[Compilations] = []


_watching = _Watching()


def _on_duration(event: str, seconds: float, **unused_labels: Any) -> None:
  if event == '/jax/core/compile/backend_compile_duration':
    for spent in _watching.here:
      spent.count += 1
      spent.seconds += seconds


jax.monitoring.register_event_duration_secs_listener(_on_duration)


def new_meters() -> dict[str, np.ndarray]:
  """Sums over the labels of an epoch, at zero."""
  return {
      'loss_sum': np.float32(0),
      'correct': np.uint32(0),
      'total': np.uint32(0),
  }


def train_step(
    task: Task,
    layout: view.Layout,
    packed: Any,
    meters: Any,
    images: jax.Array,
    labels: jax.Array,
    index: jax.Array | None,
    learning_rate: jax.Array,
    depths: Any = None,
) -> tuple[Any, Any]:
  """One step on one batch.

  Args:
    task: static.
    layout: static, of the network.
    packed: the packed `TrainState`.
    meters: see `new_meters`.
    images: the whole training set, uint8 (examples, height, width, channel)
      or tokens int32 (examples, step), or the batch alone.
    labels: (examples, ...) int32; -1 does not count.
    index: (batch,) int32, into the training set; None if it is the batch
      alone. In `pmap` mode, index or batch are this device's share.
    learning_rate: scalar.
    depths: of the layout; data, so that one program serves many depths.

  Returns:
    The next packed state and meters.
  """
  key = jax.random.wrap_key_data(packed.key)
  augment_key = jax.random.fold_in(
      randomness.stream(key, 'augment'), packed.step
  )
  if index is not None:
    images, labels = images[index], labels[index]
  first = task.parallel.first(len(labels))
  x, y = data.augment_examples(
      augment_key, images, labels, task.preprocessing, first=first
  )
  x = data.preprocess(x, task.preprocessing, dtype=task.dtype)
  dropout_key = jax.random.fold_in(
      jax.random.fold_in(randomness.stream(key, 'dropout'), packed.step), first
  )

  def loss_fn(params):
    return task.method.objective(
        base.Network(task.method.execution, layout, x, dropout_key, depths),
        params,
        packed.stats,
        y,
        jax.random.fold_in(randomness.stream(key, 'method'), packed.step),
    )

  (loss, (stats, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      packed.params
  )
  grads, stats, loss = task.parallel.mean((grads, stats, loss))
  opt_state = optimizers.with_learning_rate(packed.opt_state, learning_rate)
  updates, opt_state = task.tx.update(grads, opt_state, packed.params)
  updates = task.method.execution.applied(
      layout.canonical, updates, packed.stats
  )
  count = lambda which: jnp.sum(which, dtype=jnp.uint32)
  correct, total = task.parallel.sum(  # No prediction is the label -1.
      (
          count(jnp.argmax(logits, -1) == y),
          jnp.uint32(y.size) if y.ndim == 1 else count(y >= 0),
      )
  )
  packed = packed.replace(
      step=packed.step + 1,
      params=optax.apply_updates(packed.params, updates),
      stats=stats,
      opt_state=opt_state,
  )
  return packed, {
      'loss_sum': meters['loss_sum'] + loss * total,
      'correct': meters['correct'] + correct,
      'total': meters['total'] + total,
  }


def train_steps(
    task: Task,
    layout: view.Layout,
    packed: Any,
    meters: Any,
    images: jax.Array,
    labels: jax.Array,
    index: jax.Array | None,
    *rest: Any,
) -> tuple[Any, Any]:
  """`train_step`, or with (steps, batch) indices several of them in a loop.

  Arguments and results are those of `train_step`; rows of -1, after the end of
  an epoch, are no steps.
  """
  step = functools.partial(train_step, task, layout)
  if index is None or index.ndim == 1:
    return step(packed, meters, images, labels, index, *rest)
  return jax.lax.fori_loop(
      0,
      jnp.sum(index[:, 0] >= 0),
      lambda i, now: step(*now, images, labels, index[i], *rest),
      (packed, meters),
  )


@dataclasses.dataclass(frozen=True)
class Traced:
  """A training step that was traced, with shapes in place of arrays.

  Attributes:
    program: its `jax.core.ClosedJaxpr`.
    before: the packed state and the meters that it takes.
    after: those that it gives.
  """

  program: Any
  before: Any
  after: Any


def trace_step(
    task: Task,
    layout: view.Layout,
    *,
    batch_size: int,
    image_shape: tuple[int, ...],
    examples: int | None = None,
) -> Traced:
  """Traces a training step on one device; nothing is computed or compiled.

  Args:
    task: what to train; its devices do not matter.
    layout: of the network.
    batch_size: examples per step, on the device.
    image_shape: of raw inputs, (height, width, channel) or (step,).
    examples: of the training set if the device holds it; None if a step gets
      the batch alone.

  Returns:
    The trace.
  """
  task = dataclasses.replace(
      task, parallel=parallel_lib.Parallel('single', tuple(jax.devices()[:1]))
  )
  shape = jax.ShapeDtypeStruct
  is_text = task.preprocessing.kind == 'tokens'
  labels = image_shape if is_text else networks.label_shape(layout.architecture)
  rows = examples or batch_size
  before = _packed_shapes(task, layout), jax.eval_shape(new_meters)
  program, after = jax.make_jaxpr(
      functools.partial(train_step, task, layout), return_shape=True
  )(
      *before,
      shape((rows, *image_shape), np.int32 if is_text else np.uint8),
      shape((rows, *labels), np.int32),
      shape((batch_size,), np.int32) if examples else None,
      shape((), np.float32),
      jax.eval_shape(lambda: layout.depths),
  )
  return Traced(program, before, after)


def _packed_shapes(task: Task, layout: view.Layout) -> Any:
  """Shapes and types of a layout's packed state."""
  state = state_lib.abstract_state(
      layout.architecture,
      task.tx,
      extra=lambda _: task.method.extra(layout.canonical),
  )
  return jax.eval_shape(
      lambda state: view.pack(state, layout, stack=jnp.stack), state
  )


def forward_batches(
    task: Task,
    layout: view.Layout,
    params: Any,
    stats: Any,
    images: jax.Array,
    train: jax.Array,
    count: jax.Array | None = None,
    depths: Any = None,
) -> jax.Array:
  """Logits of a batch, for evaluations and receipts; state is not changed.

  Or with a count those of several batches, in a loop.

  Args:
    task: static.
    layout: static, of the network.
    params: packed, the method's own included.
    stats: packed, the method's own included.
    images: uint8 (batch, height, width, channel), or int32 (batch, step); with
      a count (batches, batch, ...).
    train: normalise by batch statistics; a traced bool, so that one program
      serves both modes.
    count: how many of the batches; None if images are one batch.
    depths: see `train_step`.

  Returns:
    (batch, ..., classes) float32; with a count (batch, batches, ..., classes),
    zero behind it.
  """

  def forward(images):
    x = data.preprocess(images, task.preprocessing, dtype=task.dtype)
    gated = task.method.execution.gated(layout, params, stats)
    logits, _ = networks_base.apply(
        layout.bucket,
        gated.weights,
        gated.stats,
        x,
        train=train,
        gates=gated.gates,
        depths=depths,
    )
    return logits

  if count is None:
    return forward(images)
  one = jax.eval_shape(forward, images[0])
  logits = jax.lax.fori_loop(
      0,
      count,
      lambda i, logits: logits.at[i].set(forward(images[i])),
      jnp.zeros((len(images), *one.shape), one.dtype),
  )
  return jnp.moveaxis(logits, 0, 1)  # Devices divide the first dimension.


@dataclasses.dataclass(frozen=True)
class TimedStep:
  """A compiled training step that goes on from the last, on the same batch.

  Attributes:
    run: does one, and waits for it.
    bytes: see `compiled_bytes`.
    compile_seconds: of tracing and compiling.
  """

  run: Callable[[], None]
  bytes: int | None
  compile_seconds: float


def timed_step(
    task: Task, layout: view.Layout, state: Any, batch: tuple[Any, Any]
) -> TimedStep:
  """A training step to be timed; `state` is of the layout's architecture."""
  place = task.parallel.replicate
  now = [place(view.pack(state, layout)), place(new_meters())]
  rest = (
      *place(batch), None, place(np.float32(1e-3)), place(layout.depths)
  )
  compiled, seconds = task.parallel.compile(
      functools.partial(train_step, task, layout),
      (*now, *rest),
      outputs='replicated',
      donate=(0,),
  )

  def run():
    now[:] = compiled(*now, *rest)
    jax.block_until_ready(now)

  return TimedStep(run, compiled_bytes(compiled), seconds)


def compiled_bytes(compiled: Any) -> int | None:
  """What a compiled program needs on a device, by the compiler.

  Returns:
    Arguments, results that do not take their place, and temporaries; None where
    the compiler does not say.
  """
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  return (
      analysis.argument_size_in_bytes
      + analysis.output_size_in_bytes
      - analysis.alias_size_in_bytes
      + analysis.temp_size_in_bytes
  )


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A kind of program: a function of (task, layout, state, rest, depths).

  Attributes:
    function: the program, with task and layout.
    state: what it takes of the packed state, as its first arguments; the last
      one is depths.
    outputs: how its results are placed.
    donate: positions of the arguments that it consumes.
  """

  function: Callable[..., Any]
  state: Callable[[Any], tuple[Any, ...]]
  outputs: parallel_lib.Role
  donate: tuple[int, ...] = ()


_KINDS = {
    'train step': _Kind(
        train_steps, lambda packed: (packed,), 'replicated', donate=(0,)
    ),
    'evaluation': _Kind(
        forward_batches,
        lambda packed: (packed.params, packed.stats),
        'sharded',
    ),
}


class Programs:
  """Compiles programs when first needed; keeps those of the last two buckets.

  Two, because a growth's receipt compares the networks before and after. What
  will be needed can be compiled in advance, by one thread; which program runs
  does not depend on it, since one that is not ready is waited for.
  """

  def __init__(self, task: Task, on_compile: OnCompile):
    """Programs of a task.

    Args:
      task: what they depend on besides the bucket.
      on_compile: called for each one, once it is there.
    """
    self._task = task
    self._on_compile = on_compile
    self._compiled: dict[view.Bucket, dict[Any, Compiled]] = {}
    self._last: dict[str, Any] = {}
    self._thread = futures.ThreadPoolExecutor(1, 'compile ahead')
    self._ahead: dict[tuple[view.Bucket, str], futures.Future] = {}

  def train_step(self, layout: view.Layout, arguments: Any) -> Compiled:
    """`train_steps` for arguments like these; consumes the packed state."""
    return self._get(layout, 'train step', arguments)

  def forward(self, layout: view.Layout, arguments: Any) -> Compiled:
    """`forward_batches` for arguments like these."""
    return self._get(layout, 'evaluation', arguments)

  def prepare(self, layout: view.Layout) -> None:
    """Begins to compile for another layout what the last one was compiled for.

    Args:
      layout: the one that is likely to come; all of its network is computed.
    """
    if layout.bucket in self._compiled:
      return
    for name, last in self._last.items():
      if (layout.bucket, name) not in self._ahead:
        self._ahead[layout.bucket, name] = self._thread.submit(
            self._prepare, layout, name, last
        )

  def close(self) -> None:
    """Waits for what is being compiled; tells of what was not needed."""
    self._thread.shutdown(cancel_futures=True)
    for (_, name), ahead in self._ahead.items():
      if not ahead.cancelled() and ahead.exception() is None:
        *_, seconds = ahead.result()
        self._on_compile(Compiling(f'{name}, not needed', seconds, None, 0.0))
    self._ahead.clear()

  def _prepare(self, layout, name, last):
    """A program for arguments like the last ones, but of another layout."""
    packed, depths = self._task.parallel.abstract(
        (_packed_shapes(self._task, layout), layout.depths)
    )
    state = _KINDS[name].state(packed)
    arguments = (*state, *last[len(state) : -1], depths)
    return _key(layout, name, arguments), *self._compile(
        layout, name, arguments
    )

  def _get(self, layout, name, arguments):
    known = self._compiled.pop(layout.bucket, {})
    self._compiled[layout.bucket] = known
    while len(self._compiled) > 2:
      del self._compiled[next(iter(self._compiled))]
    key = _key(layout, name, arguments)
    if key not in known:
      known[key] = self._obtain(layout, name, arguments)
    return known[key]

  def _obtain(self, layout, name, arguments):
    """A program that is not there yet."""
    self._last[name] = self._task.parallel.like(arguments)
    ahead = self._ahead.pop((layout.bucket, name), None)
    if ahead is not None:
      started = time.perf_counter()
      key, compiled, seconds = ahead.result()
      self._tell(name, compiled, seconds, time.perf_counter() - started)
      if key == _key(layout, name, arguments):
        return compiled
    compiled, seconds = self._compile(layout, name, arguments)
    self._tell(name, compiled, seconds)
    return compiled

  def _tell(self, name, compiled, seconds, waited=None):
    size = compiled_bytes(compiled)
    self._on_compile(Compiling(name, seconds, size, waited))

  def _compile(self, layout, name, arguments):
    kind = _KINDS[name]
    return self._task.parallel.compile(
        functools.partial(kind.function, self._task, layout),
        arguments,
        outputs=kind.outputs,
        donate=kind.donate,
    )


def _key(layout: view.Layout, name: str, arguments: Any) -> Any:
  """What tells programs of a bucket apart.

  A method's own leaves are not packed and may differ within a bucket, and so
  may what it makes of the blocks' names, and windows of text in length.
  """
  names = None
  if layout.architecture != layout.canonical:
    names = layout.architecture
  leaves, structure = jax.tree.flatten(arguments)
  return name, names, structure, tuple(leaf.shape for leaf in leaves)
