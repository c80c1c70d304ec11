"""Rules: what each primitive of JAX does to the labels of its operands."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jax_core
from jax.extend import source_info_util
import numpy as np

from autogrow_jax.tracing import labels
from autogrow_jax.tracing import steps
from autogrow_jax.tracing.labels import Dim
from autogrow_jax.tracing.steps import Step
from autogrow_jax.tracing.steps import Uses
from autogrow_jax.tracing.steps import Value
from autogrow_jax.tracing.steps import value

_ELEMENTWISE = frozenset(
    'abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e '
    'bessel_i1e cbrt ceil clamp clz complex conj convert_element_type copy '
    'copy_p cos cosh device_put digamma div eq erf erf_inv erfc exp exp2 expm1 '
    'floor ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p '
    'logistic lt max min mul name ne neg nextafter not optimization_barrier or '
    'polygamma population_count pow pvary real reduce_precision rem round '
    'rsqrt select_n sharding_constraint shift_left shift_right_arithmetic '
    'shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh '
    'xor zeta'.split()
)
_RANDOM = frozenset(
    'random_bits random_clone random_fold_in random_gamma random_seed '
    'random_split random_unwrap random_wrap rng_bit_generator '
    'threefry2x32'.split()
)
_CALLS = {
    name: 'jaxpr call_jaxpr fun_jaxpr call'.split()
    for name in (
        'jit pjit closed_call core_call remat remat2 checkpoint custom_lin '
        'custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr '
        'custom_vmap_call'
    ).split()
}


def run(
    jaxpr: Any,
    consts: Sequence[Any],
    ins: Sequence[Value],
    uses: Uses,
    where: str = '',
) -> list[Value]:
  """Results of a jaxpr.

  Args:
    jaxpr: what to interpret.
    consts: its constants; if there are fewer, they are unknown.
    ins: its operands.
    uses: notes what leaves are used for.
    where: place in the source, of equations that have none of their own.
  """
  values = dict(zip(jaxpr.invars, ins, strict=True))
  for number, var in enumerate(jaxpr.constvars):
    values[var] = value(var.aval)
    if number < len(consts):
      _mark_constant(values[var], consts[number])
  read = lambda atom: (
      value(atom.aval) if isinstance(atom, jax_core.Literal) else values[atom]
  )
  for equation in jaxpr.eqns:
    step = Step(
        equation.primitive.name,
        equation.params,
        [read(atom) for atom in equation.invars],
        [getattr(atom.aval, 'shape', ()) for atom in equation.invars],
        [var.aval for var in equation.outvars],
        uses,
        source_info_util.summarize(equation.source_info) or where,
        run,
    )
    rule = _RULES.get(step.name, _unknown)
    values |= zip(equation.outvars, rule(step), strict=True)
  return [read(atom) for atom in jaxpr.outvars]


def _mark_constant(constant: Value, array: Any) -> None:
  """Marks dimensions along which a constant differs."""
  try:
    array = np.asarray(array)
  except TypeError:  # A random key.
    return
  for number, dim in enumerate(constant.dims):
    if not (array == np.take(array, [0], number)).all():
      labels.mark([dim], steps.CONSTANT, '')


def _unknown(step: Step) -> list[Value]:
  results = [value(aval, None) for aval in step.avals]
  reason = f'goes through {step.name}, which tracing does not know'
  for each in step.ins + results:
    step.freeze(reason, *each.dims)
  return results


def _elementwise(step: Step) -> list[Value]:
  if len(step.avals) > 1:  # Each result is the operand of its place.
    return list(step.ins)
  dims: list[Dim | None] = [None] * len(step.shape)
  for operand, shape in zip(step.ins, step.shapes_in, strict=True):
    for number, (size, own) in enumerate(zip(step.shape, shape)):
      if own != size or size == 1:  # A size of 1 meets any other.
        continue
      if (dim := dims[number]) is None:
        dims[number] = operand.dims[number]
      else:
        step.unify(dim, operand.dims[number])
  result = [
      dim or labels.dim_of(n) for dim, n in zip(dims, step.shape, strict=True)
  ]
  if step.name in ('add', 'add_any', 'sub') and step.leaves is None:
    for operand in step.ins:
      step.uses.note(step.uses.adds, operand, operand.dims)
  return step.made(result)


def _random(step: Step) -> list[Value]:
  return [value(aval, None) for aval in step.avals]


def _inner(step: Step) -> list[Value]:
  names = (name for name in _CALLS[step.name] if name in step.params)
  return step.call(step.params[next(names)], step.ins)


def _carried(operands: Sequence[Value]) -> list[Value]:
  return [Value(operand.dims, None) for operand in operands]


def _scan(step: Step) -> list[Value]:
  body = step.params['jaxpr']
  if 'num_consts' in step.params:
    consts, carry = step.params['num_consts'], step.params['num_carry']
  else:  # From JAX 0.11 on.
    consts, carry, _ = (len(part) for part in step.params['ft_in'].unpack())
  stacked = step.ins[consts + carry :]
  for operand in stacked:
    step.freeze(steps.STACKED, operand.dims[0])
    step.unify(operand.dims[0], stacked[0].dims[0])
  ins = step.ins[:consts] + _carried(step.ins[consts : consts + carry])
  ins += [Value(each.dims[1:], each.leaves) for each in stacked]
  outs = step.call(body, ins)
  for before, after in zip(ins[consts : consts + carry], outs):
    step.unify_all(before, after)
  layers = stacked[0].dims[0] if stacked else labels.dim_of(
      step.params['length']
  )
  return outs[:carry] + [
      Value([layers, *out.dims], out.leaves) for out in outs[carry:]
  ]


def _while(step: Step) -> list[Value]:
  first, body = step.params['cond_nconsts'], step.params['body_nconsts']
  consts, carry = step.ins[first : first + body], step.ins[first + body :]
  outs = step.call(step.params['body_jaxpr'], consts + _carried(carry))
  for before, after in zip(carry, outs, strict=True):
    step.unify_all(before, after)
  return outs


def _cond(step: Step) -> list[Value]:
  first, *others = (
      step.call(branch, step.ins[1:]) for branch in step.params['branches']
  )
  for outs in others:
    for left, right in zip(first, outs, strict=True):
      step.unify_all(left, right)
  return first


def _broadcast(step: Step) -> list[Value]:
  dims = [labels.dim_of(size) for size in step.params['shape']]
  for number, place in enumerate(step.params['broadcast_dimensions']):
    if step.shapes_in[0][number] == step.shape[place]:
      dims[place] = step.ins[0].dims[number]
  return step.made(dims)


def _reshape(step: Step) -> list[Value]:
  return step.made(
      labels.reshape(step.ins[0].dims, step.params['new_sizes'], step.where)
  )


def _squeeze(step: Step) -> list[Value]:
  gone = step.params['dimensions']
  return step.made(
      [dim for i, dim in enumerate(step.ins[0].dims) if i not in gone]
  )


def _expand_dims(step: Step) -> list[Value]:
  dims = iter(step.ins[0].dims)
  gone = step.params['dimensions']
  return step.made(
      [[[]] if i in gone else next(dims) for i in range(len(step.shape))]
  )


def _transpose(step: Step) -> list[Value]:
  return step.made([step.ins[0].dims[i] for i in step.params['permutation']])


def _dot(step: Step) -> list[Value]:
  contracted, batch = step.params['dimension_numbers']
  left, right = step.ins
  for pairs in (contracted, batch):
    for i, j in zip(*pairs, strict=True):
      step.unify(left.dims[i], right.dims[j])
  dims = [left.dims[i] for i in batch[0]]
  for operand, reads, shared in zip(step.ins, contracted, batch, strict=True):
    step.uses.note(step.uses.reads, operand, [operand.dims[i] for i in reads])
    free = [
        dim
        for i, dim in enumerate(operand.dims)
        if i not in (*reads, *shared)
    ]
    step.uses.note(step.uses.writes, operand, free)
    dims += free
  return step.made(dims)


def _conv(step: Step) -> list[Value]:
  image, kernel = step.ins
  numbers = step.params['dimension_numbers']
  groups = step.params['feature_group_count']
  features = image.dims[numbers.lhs_spec[1]]
  outs, reads = (kernel.dims[i] for i in numbers.rhs_spec[:2])
  if step.params['batch_group_count'] != 1:
    return _unknown(step)
  step.freeze(steps.SPACE, *(kernel.dims[i] for i in numbers.rhs_spec[2:]))
  step.freeze(steps.SPACE, *(image.dims[i] for i in numbers.lhs_spec[2:]))
  if groups == 1:
    step.unify(features, reads)
    step.uses.note(step.uses.writes, kernel, [outs])
  else:
    group = labels.Factor(groups)
    per_group = labels.Factor(labels.size_of(features) // groups)
    made = labels.Factor(labels.size_of(outs) // groups)
    step.unify(features, [[group, per_group]])
    step.unify(outs, [[group, made]])
    step.unify(reads, [[per_group]])
    step.uses.note(step.uses.both, kernel, [outs])
  step.uses.note(step.uses.reads, kernel, [reads])
  dims = [labels.dim_of(size) for size in step.shape]
  for place in numbers.out_spec[2:]:
    step.freeze(steps.SPACE, dims[place])
  dims[numbers.out_spec[0]] = image.dims[numbers.lhs_spec[0]]
  dims[numbers.out_spec[1]] = outs
  return step.made(dims)


def _reduce(step: Step) -> list[Value]:
  gone = step.params['axes']
  operand = step.ins[0]
  reduced = [operand.dims[i] for i in gone]
  if step.name.startswith('arg'):
    step.freeze(steps.ORDER, *reduced)
  elif step.leaves is None:
    step.uses.normalised += reduced
  kept = [dim for i, dim in enumerate(operand.dims) if i not in gone]
  return step.made(*([kept] * len(step.avals)))


def _window(step: Step) -> list[Value]:
  dims = []
  sizes, strides = (
      step.params[f'window_{name}'] for name in ('dimensions', 'strides')
  )
  for dim, size, stride, after in zip(
      step.ins[0].dims, sizes, strides, step.shape, strict=True
  ):
    if (size, stride) != (1, 1):
      step.freeze(steps.SPACE, dim)
      dim = labels.dim_of(after)
      step.freeze(steps.SPACE, dim)
    dims.append(dim)
  return step.made(dims)


def _concatenate(step: Step) -> list[Value]:
  axis = step.params['dimension']
  first, *others = step.ins
  for other in others:
    for i, (left, right) in enumerate(zip(first.dims, other.dims)):
      if i != axis:
        step.unify(left, right)
  dims = list(first.dims)
  dims[axis] = [segment for each in step.ins for segment in each.dims[axis]]
  return step.made(dims)


def _cut(step: Step, dim: Dim, start: int, stop: int, stride: int = 1) -> Dim:
  if (start, stop, stride) == (0, labels.size_of(dim), 1):
    return dim
  try:
    if stride != 1:
      raise labels.Conflict
    return labels.cut(dim, start, stop)
  except labels.Conflict:
    result = labels.dim_of(len(range(start, stop, stride)))
    step.freeze('is sliced across its parts', dim, result)
    return result


def _slice(step: Step) -> list[Value]:
  starts, stops = step.params['start_indices'], step.params['limit_indices']
  strides = step.params['strides'] or (1,) * len(starts)
  return step.made([
      _cut(step, *each)
      for each in zip(step.ins[0].dims, starts, stops, strides, strict=True)
  ])


def _split(step: Step) -> list[Value]:
  axis, start, results = step.params['axis'], 0, []
  for size in step.params['sizes']:
    dims = list(step.ins[0].dims)
    dims[axis] = _cut(step, dims[axis], start, start + size)
    results.append(dims)
    start += size
  return step.made(*results)


def _pad(step: Step) -> list[Value]:
  dims = []
  for dim, (low, high, inner), size in zip(
      step.ins[0].dims, step.params['padding_config'], step.shape, strict=True
  ):
    if inner == 0 and low >= 0 and high >= 0:
      before, after = ([[labels.Factor(n)]] * bool(n) for n in (low, high))
      dims.append([*before, *dim, *after])
    else:
      dims.append(labels.dim_of(size))
      step.freeze('is padded between its units', dim, dims[-1])
  return step.made(dims)


def _gather(step: Step) -> list[Value]:
  numbers, sizes = step.params['dimension_numbers'], step.params['slice_sizes']
  table, rows = step.ins
  batching = getattr(numbers, 'operand_batching_dims', ())
  kept = [
      i
      for i in range(len(table.dims))
      if i not in (*numbers.collapsed_slice_dims, *batching)
  ]
  places = iter(rows.dims[:-1])
  dims: list[Dim] = []
  whole = []
  for place, size in enumerate(step.shape):
    if place not in numbers.offset_dims:
      dims.append(next(places))
      continue
    dim = table.dims[kept[numbers.offset_dims.index(place)]]
    if size != labels.size_of(dim):
      step.freeze(steps.INDEXED, dim)
      dim = labels.dim_of(size)
    whole.append(dim)
    dims.append(dim)
  others = getattr(numbers, 'start_indices_batching_dims', ())
  for i, j in zip(batching, others):
    step.unify(table.dims[i], rows.dims[j])
  for i in numbers.collapsed_slice_dims:
    step.freeze(steps.INDEXED if table.leaves else steps.ORDER, table.dims[i])
  step.uses.note(step.uses.writes, table, whole)
  return step.made(dims)


def _dynamic(step: Step) -> list[Value]:
  is_update = step.name == 'dynamic_update_slice'
  piece = step.shapes_in[1] if is_update else step.shape
  dims = []
  for i, (dim, size) in enumerate(zip(step.ins[0].dims, piece, strict=True)):
    if size != labels.size_of(dim):
      step.freeze(steps.INDEXED if step.ins[0].leaves else steps.ORDER, dim)
      dim = dim if is_update else labels.dim_of(size)
    elif is_update:
      step.unify(dim, step.ins[1].dims[i])
    dims.append(dim)
  return [Value(dims, None if is_update else step.ins[0].leaves)]


def _ordered(step: Step) -> list[Value]:
  """Operands along one dimension of which the order counts."""
  if step.name == 'iota':
    results = [value(step.avals[0])]
    numbers = [step.params['dimension']]
  else:
    results = [Value(list(each.dims), each.leaves) for each in step.ins]
    if step.name == 'top_k':
      results = [results[0], results[0]]
      numbers = [len(step.shape) - 1]
    else:
      at = step.params
      numbers = at.get('dimensions') or [at.get('dimension', at.get('axis'))]
  for result, shape in zip(results, (aval.shape for aval in step.avals)):
    for number in numbers:
      step.freeze(steps.ORDER, result.dims[number])
      if labels.size_of(result.dims[number]) != shape[number]:
        result.dims[number] = labels.dim_of(shape[number])
  return results


_RULES: dict[str, Callable[[Step], list[Value]]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_RANDOM, _random),
    **dict.fromkeys(_CALLS, _inner),
    **dict.fromkeys(
        'cumlogsumexp cummax cummin cumprod cumsum iota rev sort top_k'.split(),
        _ordered,
    ),
    **dict.fromkeys(
        'argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod '
        'reduce_sum reduce_xor'.split(),
        _reduce,
    ),
    **dict.fromkeys(
        'reduce_window reduce_window_max reduce_window_min '
        'reduce_window_sum'.split(),
        _window,
    ),
    'broadcast_in_dim': _broadcast,
    'concatenate': _concatenate,
    'cond': _cond,
    'conv_general_dilated': _conv,
    'dot_general': _dot,
    'dynamic_slice': _dynamic,
    'dynamic_update_slice': _dynamic,
    'expand_dims': _expand_dims,
    'gather': _gather,
    'pad': _pad,
    'reshape': _reshape,
    'scan': _scan,
    'slice': _slice,
    'split': _split,
    'squeeze': _squeeze,
    'transpose': _transpose,
    'while': _while,
}
