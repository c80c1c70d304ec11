"""Models of Flax as a function and a tree: the one place where they meet."""

from collections.abc import Callable
from typing import Any

from flax import linen
from flax import nnx
import jax

from autogrow_jax.core import axes as axes_lib
from autogrow_jax.tracing import trace as trace_lib


def functional(module: nnx.Module) -> tuple[Callable[..., Any], Any]:
  """An NNX module as a function of its state and inputs, and its state."""
  definition, state = nnx.split(module)
  return lambda tree, *inputs: nnx.merge(definition, tree)(*inputs), state


def trace(model: Any, *args: Any) -> axes_lib.AxisTable:
  """Finds which dimensions of a model's leaves belong together.

  Args:
    model: an NNX module; or any function of a tree and inputs, such as `apply`
      of a Linen module.
    *args: the tree, if the model is a function; then the inputs. Shapes do.

  Returns:
    The axes; see `tracing.trace.trace`. Those of an NNX module are of
    `nnx.state(module)`.
  """
  if isinstance(model, nnx.Module):
    function, tree = functional(model)
    return trace_lib.trace(function, tree, *args)
  if isinstance(model, linen.Module):
    raise TypeError('Of a Linen module give `model.apply` and its variables.')
  return trace_lib.trace(model, *args)


def shapes(model: Any, *inputs: Any) -> Any:
  """Shapes of a model's arrays, without computing them.

  Args:
    model: an NNX module or a Linen module.
    *inputs: inputs that a Linen module is initialised with.
  """
  if isinstance(model, nnx.Module):
    tree = nnx.state(model)
  else:
    tree = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree
  )
