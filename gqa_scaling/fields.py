"""What configs are made of: checks that say what is wrong in one line, and JSON both ways."""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

# Whatever a config names is computed with as one of these, so that nothing larger can be meant.
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, 2.0**128 - 2.0**104


class UserError(ValueError):
    """Something the user can mend. The command line prints it as one line and exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was most likely meant, or None when none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message: ' (did you mean n_heads?)', or '' when no known name is close."""
    found = nearest(name, known)
    return f" (did you mean {found}?)" if found else ""


def round_up(value: float, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return math.ceil(value / multiple) * multiple


# ------------------------------------------------------------------------- checks of numbers


def positive(config: Any, *names: str, most: float = math.inf) -> None:
    """Refuse fields that are not above 0, or above `most`; one that is None is passed over."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        require(value > 0, f"{name}={value} must be greater than 0")
        require(value >= FLOAT32_MIN, f"{name}={value} must be at least {FLOAT32_MIN:.1e}")
        require(value <= most, f"{name}={value} must be at most {most:,}")


def not_negative(config: Any, *names: str) -> None:
    """Refuse fields that are below 0."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{name}={value} must not be negative")


def between(name: str, value: Any, low: float, high: float, unit: str = "") -> None:
    """Refuse a value that is no number from `low` to `high`, NaN included."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        number and low <= value <= high,
        f"{name}={_shown(value, 40)} must be a number from {low:g} to {high:g} {unit}".rstrip(),
    )


# ------------------------------------------------------------------------- configs and JSON


@dataclass(frozen=True)
class Json:
    """JSON round trip for the configs that inherit it; unknown or missing fields are refused by name.

    A field must have the type it is declared with, a `Literal` one of its choices, also when the
    config is built from Python. 20 becomes 20.0 where a float belongs: a config and its round trip
    are one value with one digest.
    """

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, hint in _hints(cls).items():
            object.__setattr__(self, name, _value(hint, getattr(self, name), name))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them, nested configs as tables of their own."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The config that `to_dict` was called on. Raises UserError naming what is wrong."""
        return _build(cls, data, "")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: Any, data: Any, where: str) -> Any:
    """A config of class `cls` from its JSON table; `where` is the path to it, such as 'model.'."""
    at = f" in {where.rstrip('.')}" if where else ""
    require(
        isinstance(data, dict), f"{cls.__name__}{at} must be a table of fields, not {_shown(data)}"
    )
    hints, fields = _hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            raise UserError(f"unknown field {where}{name}{did_you_mean(str(name), fields)}")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], where + name)
        else:
            needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            require(not needed, f"missing field {where}{name}")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value of one field as its type hint has it. Raises UserError naming the field `where`."""
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hints = [h for h in typing.get_args(hint) if h is not type(None)]
        size = len(value) if isinstance(value, tuple | list) else None
        # The value's own type counts or, of a union of tuples, the one of its length.
        fitting = (h for h in hints if h is type(value) or len(typing.get_args(h)) == size)
        hint = next(fitting, hints[0])
    if typing.get_origin(hint) is tuple:
        return _values(typing.get_args(hint), value, where)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        require(value in choices, f"{where}={value!r} must be one of {', '.join(choices)}")
        return value
    if issubclass(hint, Json):
        return value if isinstance(value, hint) else _build(hint, value, where + ".")
    shown = f"{where}={_shown(value)}"
    fits = type(value) is hint or (hint is float and type(value) is int)
    require(fits, f"{shown} must be of type {hint.__name__}")
    if hint is int:
        require(abs(value) <= INT64_MAX, f"{shown} must lie between -2^63 and 2^63")
    elif hint is float:
        require(
            abs(value) <= FLOAT32_MAX,
            f"{shown} must be finite and, as float32 has it, at most {FLOAT32_MAX:.1e}",
        )
    elif hint is str:
        require("\0" not in value, f"{shown} must not hold a NUL character")
    return float(value) if hint is float else value


def _values(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A tuple, which in JSON is a list: `hints` are (int, ...) for any number, (int, int) for two."""
    many = hints[-1] is Ellipsis
    count = "" if many else f"{len(hints)} "
    good = isinstance(value, tuple | list) and (many or len(value) == len(hints))
    require(good, f"{where}={value!r} must be a tuple of {count}{hints[0].__name__}s")
    each = hints[:1] * len(value) if many else hints
    return tuple(
        _value(hint, v, f"{where}[{i}]")
        for i, (hint, v) in enumerate(zip(each, value, strict=True))
    )


def _shown(value: Any, most: int = 200) -> str:
    """The value for a message of one line."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= most else text[:most] + "..."


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.n_layers": 4} for {"model": {"n_layers": 4}}: every field by its dotted name."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def digest_of(value: Any) -> str:
    """12 hex digits over a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def non_default(config: Any) -> dict[str, Any]:
    """The fields that differ from their default, so that a new field changes no old digest."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.default is dataclasses.MISSING or value != f.default:
            out[f.name] = non_default(value) if isinstance(value, Json) else value
    return out


# ------------------------------------------------------------ JSON that others may have damaged

# What a JSON value must be: a type; a list of one kind of elements; a table of fields, the optional
# ones with a question mark after their name, "*" for any name; (shape,) may also be null.
JsonShape: TypeAlias = Any
_NAMES = {dict: "a table", list: "a list", str: "a text", int: "a whole number", float: "a number"}


def misfit(value: Any, shape: JsonShape, where: str = "") -> str:
    """What is wrong with a JSON value that must have this shape, in words; "" for nothing."""
    return next(_misfits(value, shape, where), "")


def _misfits(value: Any, shape: JsonShape, where: str) -> Iterator[str]:
    """Everything that is wrong with the value, in the order of its shape."""
    if isinstance(shape, tuple):
        if value is not None:
            yield from _misfits(value, shape[0], where)
        return
    kind = type(shape) if isinstance(shape, dict | list) else shape
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or isinstance(value, bool):
        yield f"{where or 'it'} must be {_NAMES[kind]}, not {_shown(value, 40)}"
        return
    if isinstance(value, int) and abs(value) > INT64_MAX:
        yield f"{where}={_shown(value, 40)} is too large"
    elif kind is float and not math.isfinite(value):
        yield f"{where or 'it'} must be a finite number, not {value}"
    elif isinstance(shape, list):
        for each in value:
            yield from _misfits(each, shape[0], f"each of {where}")
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            key = name.removesuffix("?")
            below = f"{where}.{key}" if where else key
            if name == "*":
                for each, v in value.items():
                    yield from _misfits(v, inner, f"{where}.{each}")
            elif key in value:
                yield from _misfits(value[key], inner, below)
            elif key == name:
                yield f"{below} is missing"


# ------------------------------------------------------------------------- other classes as JSON


def shape_of(hint: Any) -> JsonShape:
    """What JSON of a value of this type must be: of a class all its fields, of a config any table."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        cls: Any = hint
        whole = issubclass(cls, Json)  # whose `from_dict` says what is wrong in it
        return dict if whole else {name: shape_of(each) for name, each in _hints(cls).items()}
    if kind is Mapping:
        return {"*": shape_of(inner[1])}
    if kind is tuple:
        return [shape_of(inner[0])]
    if kind is types.UnionType:
        return (shape_of(inner[0]),)
    return str if kind is Literal else hint


def value_of(hint: Any, said: Any) -> Any:
    """The value of this type that JSON of its shape says; what its class has no field for is left out."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if said is None:
        return math.nan if hint is float else None
    if dataclasses.is_dataclass(hint):
        cls: Any = hint
        if issubclass(cls, Json):
            return cls.from_dict(said)
        hints = _hints(cls).items()
        return cls(**{name: value_of(each, said[name]) for name, each in hints if name in said})
    if kind is Mapping:
        return {name: value_of(inner[1], each) for name, each in said.items()}
    if kind is tuple:
        return tuple(value_of(inner[0], each) for each in said)
    return value_of(inner[0], said) if kind is types.UnionType else said
