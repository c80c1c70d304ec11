"""Settings: frozen dataclasses as JSON, and by paths such as 'policy.interval'.

A field that holds one of several classes has `metadata={'kinds': {...}}`, a
table of names and 'module:Class'. In JSON it says which one under 'kind', and a
class that is not in the table goes by its own 'module:Class'.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import importlib
import types
import typing
from typing import Any, TypeVar

T = TypeVar('T')


def to_json(value: Any) -> Any:
  """Plain dictionaries, lists and scalars."""
  if dataclasses.is_dataclass(value):
    result = {}
    for field in dataclasses.fields(value):
      item = getattr(value, field.name)
      result[field.name] = to_json(item)
      if (kinds := field.metadata.get('kinds')) is not None:
        kind = {'kind': kind_of(item, kinds)}
        result[field.name] = kind | result[field.name]
    return result
  if isinstance(value, (list, tuple)):
    return [to_json(item) for item in value]
  return value


def from_json(cls: type[T], value: Mapping[str, Any], where: str = '') -> T:
  """Makes a dataclass of what `to_json` gave; missing fields have defaults.

  Args:
    cls: the dataclass.
    value: a JSON object.
    where: path of the value, for messages.

  Returns:
    The dataclass.

  Raises:
    ValueError: a field is unknown, missing or of the wrong type.
  """
  if not isinstance(value, Mapping):
    what = where.rstrip('.') or 'The configuration'
    raise ValueError(f'{what} is not a JSON object.')
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  if unknown := [where + name for name in sorted(value.keys() - fields.keys())]:
    raise ValueError(f'The configuration has unknown fields {unknown}.')
  arguments = {}
  for name, item in value.items():
    path, hint = f'{where}{name}', hints[name]
    if 'kinds' in fields[name].metadata:
      arguments[name] = _of_kind(fields[name].metadata['kinds'], item, path)
      continue
    if dataclasses.is_dataclass(hint):
      item = from_json(hint, item, f'{path}.')
    item = tuple(item) if isinstance(item, list) else item
    if not _is_of(item, hint):
      raise ValueError(f'{path} has the wrong type: {item!r}.')
    arguments[name] = item
  try:
    return cls(**arguments)
  except TypeError as error:
    raise ValueError(f'The configuration is incomplete: {error}.') from error


def kind_of(value: Any, kinds: Mapping[str, str]) -> str:
  """Name of an object's class in a table, or its 'module:Class'."""
  path = f'{type(value).__module__}:{type(value).__qualname__}'
  return next((name for name, known in kinds.items() if known == path), path)


def class_of(kind: str, kinds: Mapping[str, str], where: str) -> type:
  """Class of a name in a table, or of a 'module:Class'.

  Args:
    kind: the name.
    kinds: the table.
    where: path of the setting, for messages.

  Raises:
    ValueError: there is none.
  """
  module, colon, name = kinds.get(kind, kind).partition(':')
  try:
    if not colon:
      raise ImportError
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise ValueError(
        f"{where} is one of {', '.join(kinds)}, or 'package.module:Class', got "
        f'{kind!r}.'
    ) from error


def paths(value: Any, where: str = '') -> Iterator[tuple[str, Any, Any]]:
  """All single settings of a dataclass: path, field and value.

  Args:
    value: the dataclass; its own choices decide which paths there are.
    where: path of the dataclass with a final dot, or nothing.

  Yields:
    Paths such as 'policy.interval', their `dataclasses.Field` and their value.
  """
  for field in dataclasses.fields(value):
    item = getattr(value, field.name)
    if dataclasses.is_dataclass(item):
      yield from paths(item, f'{where}{field.name}.')
    else:
      yield f'{where}{field.name}', field, item


def replace(value: T, changes: Mapping[str, Any]) -> T:
  """The dataclass with other values at some paths."""
  inner: dict[str, dict[str, Any]] = {}
  own = {}
  for path, item in changes.items():
    name, dot, rest = path.partition('.')
    if dot:
      inner.setdefault(name, {})[rest] = item
    else:
      own[name] = item
  own |= {
      name: replace(getattr(value, name), rest) for name, rest in inner.items()
  }
  return dataclasses.replace(value, **own)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ''
) -> list[str]:
  """Fields in which two JSON forms differ, as 'name: old -> new'."""
  result = []
  for name in sorted(old.keys() | new.keys()):
    before, after = old.get(name), new.get(name)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      result += differences(before, after, f'{prefix}{name}.')
    elif before != after:
      result.append(f'{prefix}{name}: {before} -> {after}')
  return result


def _of_kind(kinds: Mapping[str, str], value: Any, path: str) -> Any:
  """The object of a JSON object that says its kind."""
  if not isinstance(value, Mapping) or 'kind' not in value:
    raise ValueError(
        f"{path} is a JSON object with a 'kind', one of {', '.join(kinds)}; "
        f'got {value!r}.'
    )
  rest = {name: item for name, item in value.items() if name != 'kind'}
  return from_json(class_of(value['kind'], kinds, path), rest, f'{path}.')


def _is_of(value: Any, hint: Any) -> bool:
  """Whether a value has a type; ints are floats, but bools are not ints."""
  if isinstance(hint, types.UnionType):
    return any(_is_of(value, option) for option in typing.get_args(hint))
  if typing.get_origin(hint) is tuple:
    item_hint, _ = typing.get_args(hint)
    return isinstance(value, tuple) and all(
        _is_of(item, item_hint) for item in value
    )
  return type(value) in ((int, float) if hint is float else (hint,))
