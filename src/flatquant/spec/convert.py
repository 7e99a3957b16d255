"""Specs to JSON-ready dictionaries and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

from flatquant.errors import SpecError

T = TypeVar("T")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Turn JSON data back into the annotated type, or say where it does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        return _convert(next((a for a in kinds if type(value) is a), kinds[0]), value, where)
    if origin is Literal:
        check(value in args, f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        check(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        check(len(value) == len(args), f"{where}: expected {len(args)} entries, got {value!r}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin in (dict, Mapping):
        check(isinstance(value, Mapping), f"{where}: expected an object, got {value!r}")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    check(type(value) is kind, f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def from_dict(cls: type[T], data: Any, where: str | None = None) -> T:
    """Rebuild a spec from what `to_dict` gave.

    Raises:
        SpecError: an unknown or missing key, a value of the wrong type, or one that the spec itself refuses.
    """
    where = where or cls.__name__
    check(isinstance(data, Mapping), f"{where}: expected an object, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(map(str, set(data) - set(fields)))
    check(not unknown, f"{where}: unknown key {', '.join(unknown)}")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(data))
    check(not missing, f"{where}: missing key {', '.join(missing)}")
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def later(default: Any) -> Any:
    """A field that format version 1 began without: it is written only where it is not `default`."""
    return field(default=default, metadata={"later": True})


def to_dict(spec: Any) -> Any:
    """The spec as nested dictionaries, lists, numbers and strings; `json.dumps` accepts it."""
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        values = {f: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        return {f.name: to_dict(v) for f, v in values.items() if not f.metadata.get("later") or v != f.default}
    if isinstance(spec, Mapping):
        return {k: to_dict(v) for k, v in spec.items()}
    if isinstance(spec, list | tuple):
        return [to_dict(v) for v in spec]
    return spec
