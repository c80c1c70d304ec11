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
from typing import Any, NamedTuple, TypeVar

if typing.TYPE_CHECKING:
  from _typeshed import DataclassInstance

T = TypeVar('T', bound='DataclassInstance')


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

  Raises:
    ValueError: a field is unknown, missing or of the wrong type; it is named by
      its path, which begins with `where`.
  """
  if not isinstance(value, Mapping):
    what = where.rstrip('.') or 'The configuration'
    raise ValueError(f'{what} is not a JSON object.')
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  if unknown := [where + name for name in sorted(value.keys() - fields.keys())]:
    raise ValueError(f'The configuration has unknown fields {unknown}.')
  arguments: dict[str, Any] = {}
  for name, item in value.items():
    path, hint = f'{where}{name}', hints[name]
    if (kinds := fields[name].metadata.get('kinds')) is not None:
      if not isinstance(item, Mapping) or 'kind' not in item:
        raise ValueError(
            f"{path} is a JSON object with a 'kind', one of "
            f'{", ".join(kinds)}; got {item!r}.'
        )
      rest = {key: inner for key, inner in item.items() if key != 'kind'}
      chosen = class_of(item['kind'], kinds, path, hint)
      arguments[name] = from_json(chosen, rest, f'{path}.')
      continue
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
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


def class_of(
    kind: Any, kinds: Mapping[str, str], where: str, base: type
) -> type:
  """Class of a name in a table, or of a 'module:Class'.

  Raises:
    ValueError: the setting `where` has no such kind, or it is no dataclass
      derived from `base`.
  """
  known = kinds.get(kind, kind) if isinstance(kind, str) else ''
  module, colon, name = known.partition(':')
  # `experiments` is beside `autogrow_jax` in a clone, and inside it in a wheel.
  inner = module.removeprefix('autogrow_jax.')
  for candidate in (module, inner, f'autogrow_jax.{inner}') if colon else ():
    try:
      found = getattr(importlib.import_module(candidate), name)
    except (ImportError, AttributeError, ValueError):
      continue
    if isinstance(found, type) and issubclass(found, base):
      if dataclasses.is_dataclass(found) and found is not base:
        return found
  raise ValueError(
      f"{where} is one of {', '.join(kinds)}, or 'package.module:Class' of a "
      f'dataclass derived from {base.__name__}; got {kind!r}.'
  )


class Setting(NamedTuple):
  """A single setting of a configuration.

  Attributes:
    path: path such as 'policy.interval'.
    hint: type.
    value: current value; of a choice between classes, the name of the kind.
    help: one line, with the unit.
    kinds: table of the choice; None where there is none.
  """

  path: str
  hint: Any
  value: Any
  help: str
  kinds: Mapping[str, str] | None = None


def list_all(value: Any, where: str = '') -> Iterator[Setting]:
  """All single settings of a dataclass; its own choices decide which there are.

  A dataclass may have a method `used`, which names the fields that mean
  something to what is chosen. Paths begin with `where`.
  """
  hints = typing.get_type_hints(type(value))
  used = value.used() if hasattr(value, 'used') else None
  for field in dataclasses.fields(value):
    if used is not None and field.name not in used:
      continue
    item, path = getattr(value, field.name), f'{where}{field.name}'
    text, kinds = field.metadata.get('help', ''), field.metadata.get('kinds')
    if kinds is not None:
      yield Setting(path, str, kind_of(item, kinds), text, kinds)
    if dataclasses.is_dataclass(item):
      yield from list_all(item, f'{path}.')
    elif kinds is None:
      yield Setting(path, hints[field.name], item, text)


def parse(text: str, hint: Any, where: str) -> Any:
  """Reads a value of a type: 3, 0.1, true, 3-2-2 (integers), none.

  Raises:
    ValueError: the setting `where` has another type.
  """
  options = typing.get_args(hint) if _is_union(hint) else (hint,)
  if type(None) in options and text.lower() in ('', 'none'):
    return None
  for option in options:
    try:
      if option is bool and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
      if option in (int, float):
        return option(text)
      if typing.get_origin(option) is tuple and text:
        return tuple(map(int, text.replace(',', '-').split('-')))
      if option is str:
        return text
    except ValueError:
      continue
  names = {int: 'an integer', float: 'a number', bool: 'true or false'}
  wanted = ' or '.join(
      names.get(option, "integers such as '3-2-2'")
      for option in options
      if option is not type(None)
  )
  raise ValueError(f'{where} must be {wanted}, got {text!r}.')


def with_kind(value: T, path: str, kind: str) -> T:
  """The dataclass with another kind at a path; equal settings are kept."""
  name, dot, rest = path.partition('.')
  inner = getattr(value, name)
  if dot:
    return dataclasses.replace(value, **{name: with_kind(inner, rest, kind)})
  fields = {field.name: field for field in dataclasses.fields(value)}
  base = typing.get_type_hints(type(value))[name]
  cls = class_of(kind, fields[name].metadata['kinds'], path, base)
  if isinstance(inner, cls):
    return value
  known = {field.name for field in dataclasses.fields(cls)}
  kept = {
      field.name: getattr(inner, field.name)
      for field in dataclasses.fields(inner)
      if field.name in known
  }
  try:
    return dataclasses.replace(value, **{name: cls(**kept)})
  except TypeError as error:  # An abstract class, or fields without defaults.
    raise ValueError(f'{path} cannot be {kind}: {error}.') from error


def replace(value: T, changes: Mapping[str, Any]) -> T:
  """The dataclass with other values at some paths."""
  fields: dict[str, Any] = {}
  inner: dict[str, dict[str, Any]] = {}
  for path, item in changes.items():
    name, dot, rest = path.partition('.')
    (inner.setdefault(name, {}) if dot else fields)[rest or name] = item
  for name, below in inner.items():
    fields[name] = replace(getattr(value, name), below)
  return dataclasses.replace(value, **fields)


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


def _is_of(value: Any, hint: Any) -> bool:
  """Returns True for a value of a type; ints are floats, bools not ints."""
  if _is_union(hint):
    return any(_is_of(value, option) for option in typing.get_args(hint))
  if typing.get_origin(hint) is tuple:
    item_hint, _ = typing.get_args(hint)
    return isinstance(value, tuple) and all(
        _is_of(item, item_hint) for item in value
    )
  return type(value) in ((int, float) if hint is float else (hint,))


def _is_union(hint: Any) -> bool:
  return isinstance(hint, types.UnionType) or typing.get_origin(
      hint
  ) is typing.Union
