"""Memory of a compiled program, foretold from its trace.

A trace (a jaxpr) has many more arrays than the program that the compiler makes
of it. These rules tell which of them there will be, and when:

* What is computed number by number (sums, rectifiers, casts, broadcasts) is
  computed again wherever it is read, and is no array, unless it is read by what
  needs one (convolutions, products, loops), or is expensive and read twice.
* A step runs when it is needed; on CPUs, where the compiler wants many to run
  at once, as soon as it can.
* An array lives from where it is made to where it is read last; what is made
  of the arguments at the end takes the place of the arguments.
* A loop holds one set of what it carries, all that it stacks, and what its
  body needs for one turn.

The peak is the largest sum over arrays alive at the same time. Workspaces of
the libraries that a GPU calls, and gaps between arrays, are not in it.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

# Parameters of primitives that stand for the program that they hold.
_PROGRAMS = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')
# Primitives whose result is their operand in another shape.
_VIEWS = (
    'reshape', 'squeeze', 'expand_dims', 'copy', 'copy_p', 'stop_gradient',
    'sharding_constraint', 'reduce_precision',
)
# Those whose result takes the place of their first operand.
_IN_PLACE = (
    'dynamic_update_slice', 'scatter', 'scatter-add', 'scatter_add',
)
# Those that read and make whole arrays.
_WHOLE = (
    'conv_general_dilated', 'dot_general', 'sort', 'top_k',
    'select_and_scatter_add', 'select_and_gather_add', 'reduce_window_max',
    'reduce_window_sum', 'reduce_window', 'reduce_window_min', 'cumsum',
    'cumlogsumexp', 'cummax', 'cumprod', 'rng_bit_generator',
    'triangular_solve', 'cholesky', 'eigh',
)
# Those that a CPU's sums of products have in them.
_PRODUCTS = ('mul', 'square', 'integer_pow')
_EXPENSIVE = (
    'exp', 'exp2', 'log', 'log1p', 'expm1', 'tanh', 'logistic', 'div', 'pow',
    'sqrt', 'rsqrt', 'erf', 'sin', 'cos', 'rem',
)


@dataclasses.dataclass(eq=False)
class _Value:
  """Something that a program computes.

  Attributes:
    bytes: of the array, if there is one.
    sources: what it is computed from, where it is read, if there is none.
    is_array: whether there is one; what has no sources is one or a constant.
    primitive: name of what computes it; an expensive one becomes an array if
      it is read twice.
    readers: how many operations read it.
    is_early: whether it has room from the beginning of a program.
    within: the array that holds it, where that is another one's.
    new: of an array with a part replaced, that part.
  """

  bytes: int
  sources: tuple['_Value', ...] = ()
  is_array: bool = False
  primitive: str = ''
  readers: int = 0
  within: '_Value | None' = None
  is_early: bool = False
  new: '_Value | None' = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
  """An operation that makes arrays.

  Attributes:
    reads: its operands.
    makes: its results.
    replaces: operands whose room it takes over, if nothing reads them later.
    working: bytes that it needs besides.
    is_fused: whether it computes what it reads, unless that is an array.
  """

  reads: tuple[_Value, ...]
  makes: tuple[_Value, ...]
  replaces: tuple[_Value, ...] = ()
  working: int = 0
  is_fused: bool = False


def peak(program: Any, platform: str) -> int:
  """Bytes on a device for a program whose results replace its arguments.

  Args:
    program: its `jax.core.ClosedJaxpr`.
    platform: 'cpu', 'gpu' or 'tpu'.

  Returns:
    Arguments and temporaries.
  """
  arguments = sum(
      _size(variable.aval)
      for variable in (*program.jaxpr.invars, *program.jaxpr.constvars)
  )
  return arguments + _temporaries(program.jaxpr, platform)


def _temporaries(jaxpr: Any, platform: str) -> int:
  """Most bytes at a time besides those of a program's arguments."""
  trace = _Trace(platform)
  arguments = [_argument() for _ in (*jaxpr.constvars, *jaxpr.invars)]
  return trace.peak(trace.run(jaxpr, arguments))


class _Trace:
  """The steps of a program, calls written out."""

  def __init__(self, platform: str):
    self._platform = platform
    self._values: list[_Value] = []
    self._steps: list[_Step] = []
    self._known: dict[_Value, frozenset[_Value]] = {}

  def run(self, jaxpr: Any, arguments: Sequence[_Value]) -> list[_Value]:
    """Adds a program's steps; returns its results."""
    known = dict(
        zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True)
    )

    def read(variable):
      if isinstance(variable, jax.extend.core.Literal):
        return _Value(_size(variable.aval))
      return known[variable]

    for equation in jaxpr.eqns:
      results = self._equation(equation, [read(v) for v in equation.invars])
      known.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]

  def peak(self, results: Sequence[_Value]) -> int:
    """Most bytes at a time."""
    for value in self._values:
      if value.primitive in _EXPENSIVE and value.readers > 1:
        value.is_array = True
    steps = self._scheduled()
    born, dies = {}, {}
    for number, step in enumerate(steps):
      for value in step.makes:
        born[value] = 0 if value.is_early else number
        dies[value] = number
      for array in self._read(step):
        dies[array] = number
    made = {
        value: number
        for number, step in enumerate(steps)
        for value in step.makes
    }
    for value in results:  # Which are written as soon as they can be.
      arrays = self._arrays(value)
      last = max((made.get(array, 0) for array in arrays), default=0)
      for array in arrays:
        dies[array] = max(last, dies.get(array, 0))
    for number, step in enumerate(steps):
      for value in step.replaces:
        if value in born and dies[value] == number > born[value]:
          dies[value] -= 1
    change = np.zeros(len(steps) + 2, np.int64)
    for value, first in born.items():
      change[first] += value.bytes
      change[dies[value] + 1] -= value.bytes
    working = [*(step.working for step in steps), 0, 0]
    return int((np.cumsum(change) + working).max())

  def _scheduled(self) -> list[_Step]:
    """All steps, in an order in which they may run."""
    for value in self._values:
      self._arrays(value)  # In this order no recursion is deep.
    fused = [
        _Step(value.sources, (value,), is_fused=True)
        for value in self._values
        if value.is_array
    ]
    maker = {
        value: step for step in (*self._steps, *fused) for value in step.makes
    }
    needs, pending = {}, list(self._steps)
    while pending:
      step = pending.pop()
      if step not in needs:
        makers = [
            maker[array] for array in self._read(step) if array in maker
        ]
        needs[step] = set(makers)
        pending += makers
    steps = [step for step in (*self._steps, *fused) if step in needs]
    if self._platform == 'cpu':
      return _by_breadth(steps, needs)
    return _by_need(steps, needs)

  def _read(self, step: _Step) -> set[_Value]:
    """The arrays that a step reads."""
    found = set()
    for value in step.reads:
      if step.is_fused or not value.is_array:
        found |= self._arrays(value)
      else:
        found |= {value, *_holders(value)}
    return found

  def _arrays(self, value: _Value) -> frozenset[_Value]:
    """Those from which a value is computed where it is read.

    What comes of one large array alone is computed from that, even if there is
    an array of it for others.
    """
    if value not in self._known:
      found = frozenset().union(*map(self._arrays, value.sources))
      if value.is_array:
        large = [array for array in found if array.bytes >= value.bytes]
        if not value.sources or len(large) > 1:
          found = frozenset((value, *_holders(value)))
      self._known[value] = found
    return self._known[value]

  def _equation(self, equation: Any, reads: list[_Value]) -> list[_Value]:
    name, parameters = equation.primitive.name, equation.params
    for value in reads:
      value.readers += 1
    if name == 'platform_index':
      return [_PlatformIndex(parameters['platforms'])]
    if name == 'cond' and isinstance(reads[0], _PlatformIndex):
      branch = reads[0].of(self._platform)
      return self._call(parameters['branches'][branch], reads[1:])
    if name == 'scan':
      return self._scan(equation, reads)
    if name == 'while':
      return self._while(equation, reads)
    for key in _PROGRAMS:
      if key in parameters:
        return self._call(parameters[key], reads)
    if name in _VIEWS or (
        name == 'broadcast_in_dim'
        and _size(equation.outvars[0].aval) == reads[0].bytes
    ):
      return reads[: len(equation.outvars)]
    if name in _IN_PLACE:
      reads[0].is_array = True
      made = _Value(0, is_array=True, within=reads[0], new=reads[1])
      self._steps.append(_Step(tuple(reads), (made,)))
      return [made]
    if name == 'select_and_scatter_add' and self._platform == 'cpu':
      return [self._scatter_maxima(equation, *reads)]
    sizes = [_size(variable.aval) for variable in equation.outvars]
    reduces = name.startswith(('reduce_', 'arg')) and 'axes' in parameters
    if not (reduces or name == 'cond' or name in _WHOLE):
      made = [
          _Value(size, tuple(reads), primitive=name) for size in sizes
      ]
      self._values += made
      return made
    if not reduces or self._reads_whole(equation):
      reads = _factors(reads[0]) if reduces else reads
      _materialize(reads)
    working = 0
    if name == 'cond':
      working = max(
          _temporaries(branch.jaxpr, self._platform)
          for branch in parameters['branches']
      )
    made = [_Value(size, is_array=True) for size in sizes]
    self._steps.append(_Step(tuple(reads), tuple(made), working=working))
    return made

  def _reads_whole(self, equation: Any) -> bool:
    """Whether a reduction needs an array; on CPUs unless rows are summed."""
    last = equation.invars[0].aval.ndim - 1
    return self._platform == 'cpu' and last not in equation.params['axes']

  def _scatter_maxima(
      self, equation: Any, gradient: _Value, x: _Value
  ) -> _Value:
    """The gradient of a maximum over windows as CPUs compute it.

    From a map of every dimension's indices they take those of the maxima.
    """
    source, operand = (variable.aval for variable in equation.invars)
    whole = lambda aval: [
        _Value(4 * aval.size, is_array=True) for _ in range(aval.ndim)
    ]
    indices, maxima = whole(operand), whole(source)
    joint = _Value(4 * source.size * source.ndim, tuple(maxima), is_array=True)
    result = _Value(_size(operand), is_array=True, is_early=True)
    _materialize((gradient, x))
    self._steps += [
        *(_Step((), (index,)) for index in indices),
        _Step((x, *indices), tuple(maxima)),
        _Step((gradient, joint), (result,)),
    ]
    return result

  def _call(self, program: Any, reads: list[_Value]) -> list[_Value]:
    if isinstance(program, jax.extend.core.ClosedJaxpr):
      reads = [*(_argument() for _ in program.consts), *reads]
      program = program.jaxpr
    return self.run(program, reads)

  def _scan(self, equation: Any, reads: list[_Value]) -> list[_Value]:
    parameters = equation.params
    body = parameters['jaxpr'].jaxpr
    consts, carried = parameters['num_consts'], parameters['num_carry']
    first = consts + carried
    arguments = [_argument() for _ in (*body.constvars, *body.invars[:first])]
    slices = [
        _Value(_size(variable.aval), (_argument(),))
        for variable in body.invars[first:]
    ]
    trace = _Trace(self._platform)
    results = trace.run(body, [*arguments, *slices])
    return self._loop(
        equation, reads, reads[consts:first], trace, results, carried,
        self._platform == 'cpu',
    )

  def _while(self, equation: Any, reads: list[_Value]) -> list[_Value]:
    parameters = equation.params
    body = parameters['body_jaxpr'].jaxpr
    first = parameters['cond_nconsts'] + parameters['body_nconsts']
    trace = _Trace(self._platform)
    results = trace.run(
        body, [_argument() for _ in (*body.constvars, *body.invars)]
    )
    return self._loop(
        equation, reads, reads[first:], trace, results, len(results), False,
    )

  def _loop(
      self, equation, reads, replaces, trace, results, carried, is_early
  ):
    """A loop: what it stacks twice it holds once, and nothing that is given."""
    known, outer = {}, []
    for index, (result, variable) in enumerate(
        zip(results, equation.outvars, strict=True)
    ):
      size = _size(variable.aval)
      stacked = result.new if index < carried else result
      if stacked is None:  # It is replaced in every turn.
        _materialize((result,))
        outer.append(_Value(size, is_array=True))
        continue
      if _is_constant(stacked):
        size = 0
      if stacked not in known:
        known[stacked] = _Value(
            size, is_array=True, is_early=is_early
        )
      outer.append(known[stacked])
    _materialize(reads)
    working = trace.peak(results)
    self._steps.append(
        _Step(
            tuple(reads),
            tuple(dict.fromkeys(outer)),
            tuple(replaces),
            working,
        )
    )
    return outer


class _PlatformIndex(_Value):
  """Which branch of what depends on the platform is taken."""

  def __init__(self, platforms: Sequence[Sequence[str] | None]):
    super().__init__(0)
    self._platforms = platforms

  def of(self, platform: str) -> int:
    names = {'gpu': ('gpu', 'cuda', 'rocm')}.get(platform, (platform,))
    return next(
        index
        for index, listed in enumerate(self._platforms)
        if listed is None or set(names) & set(listed)
    )


def _by_breadth(
    steps: Sequence[_Step], needs: dict[_Step, set[_Step]]
) -> list[_Step]:
  """First come, first served: a step runs as soon as its operands are there."""
  waits = {step: len(needs[step]) for step in steps}
  readers = {step: [] for step in steps}
  for step in steps:
    for needed in needs[step]:
      readers[needed].append(step)
  order = [step for step in steps if not waits[step]]
  for step in order:
    for reader in readers[step]:
      waits[reader] -= 1
      if not waits[reader]:
        order.append(reader)
  return order


def _by_need(
    steps: Sequence[_Step], needs: dict[_Step, set[_Step]]
) -> list[_Step]:
  """As traced, with what is computed for a step right before it."""
  place = {step: number for number, step in enumerate(steps)}
  order, pending = {}, list(reversed(steps))
  while pending:
    missing = [step for step in needs[pending[-1]] if step not in order]
    if missing:
      pending += sorted(missing, key=place.get, reverse=True)
    else:
      order[pending.pop()] = None
  return list(order)


def _materialize(values: Iterable[_Value]) -> None:
  """Makes arrays of values, but of what is not computed at all."""
  for value in values:
    value.is_array = value.is_array or bool(value.sources)


def _factors(value: _Value) -> list[_Value]:
  """What a sum of products reads on a CPU: whole factors."""
  if value.is_array or value.primitive not in _PRODUCTS:
    return [value]
  return [
      factor
      for factor in value.sources
      if factor.primitive != 'broadcast_in_dim'
  ]


def _is_constant(value: _Value) -> bool:
  pending = [value]
  for value in pending:
    if value.is_array and not value.sources:
      return False
    pending += value.sources
  return True


def _holders(value: _Value) -> Iterator[_Value]:
  while value.within is not None:
    value = value.within
    yield value


def _argument() -> _Value:
  """Something that is there from the beginning, and not counted."""
  return _Value(0, is_array=True)


def _size(aval: Any) -> int:
  """Bytes."""
  if not hasattr(aval, 'shape'):
    return 0
  return int(np.prod(aval.shape)) * getattr(aval.dtype, 'itemsize', 8)
