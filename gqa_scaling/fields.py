"""What configs are made of: checks that say what is wrong in one line, and JSON both ways."""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Self


class UserError(ValueError):
    """Something the user can mend. The command line prints it as one line and exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ' (did you mean n_heads?)', or '' when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def round_up(value: float, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return math.ceil(value / multiple) * multiple


def positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be greater than 0")
        require(value < math.inf, f"{name}={value} must be finite")


def one_of(config: Any, name: str, choices: Iterable[str]) -> None:
    value, choices = getattr(config, name), tuple(choices)
    require(value in choices, f"{name}={value!r} must be one of {', '.join(choices)}")


class Json:
    """JSON round trip for the configs below; unknown or missing fields are refused by name.

    Fields are checked for their type when built from Python too, and 20 becomes 20.0 where a
    float belongs: a config and its round trip are one value with one digest.
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _value(hint, getattr(self, name), name))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return _build(cls, data, "")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type, data: Any, where: str) -> Any:
    at = f" in {where.rstrip('.')}" if where else ""
    require(isinstance(data, dict), f"{cls.__name__}{at} must be a table of fields, not {data!r}")
    hints, fields = _hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        require(name in fields, f"unknown field {where}{name}{nearest(name, fields)}")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], where + name)
        else:
            needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            require(not needed, f"missing field {where}{name}")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hints = [h for h in typing.get_args(hint) if h is not type(None)]
        size = len(value) if isinstance(value, tuple | list) else None
        hint = next((h for h in hints if len(typing.get_args(h)) == size), hints[0])
    if typing.get_origin(hint) is tuple:
        return _values(typing.get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where + ".")
    if typing.get_origin(hint) is Literal:  # the class itself checks the choices
        return value
    if hint is float and type(value) is int:
        value = float(value)
    require(type(value) is hint, f"{where}={value!r} must be of type {hint.__name__}")
    return value


def _values(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A tuple, which in JSON is a list: `hints` are (int, ...) for any number, (int, int) for two.

    Of a union of tuples the one of the value's length counts.
    """
    many = hints[-1] is Ellipsis
    count = "" if many else f"{len(hints)} "
    good = isinstance(value, tuple | list) and (many or len(value) == len(hints))
    require(good, f"{where}={value!r} must be a tuple of {count}{hints[0].__name__}s")
    each = hints[:1] * len(value) if many else hints
    return tuple(
        _value(hint, v, f"{where}[{i}]")
        for i, (hint, v) in enumerate(zip(each, value, strict=True))
    )


def digest_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def non_default(config: Any, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """The fields that differ from their default, so that a new field changes no old digest."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name not in leave_out and (f.default is dataclasses.MISSING or value != f.default):
            out[f.name] = non_default(value) if isinstance(value, Json) else value
    return out
