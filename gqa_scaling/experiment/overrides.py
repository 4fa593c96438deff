"""Fields of a run changed from the command line, such as --model.n-layers 4, for a whole grid."""

import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from gqa_scaling.config import RunConfig, UserError, require
from gqa_scaling.fields import Json, nearest


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """{"model.n_layers": 4} from ["--model.n-layers", "4"] or ["--model.n-layers=4"].

    A table that may be left out is cleared by "none": --model.pattern none; several numbers are
    separated by commas: --evaluation.contexts 256,512. Raises UserError for an
    unknown field and for a value that is not of the field's type; the config itself checks the rest.
    """
    known, out = field_types(), {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        require(
            flag.startswith("--"), f"unexpected argument {flag!r}: overrides look like --seed 1"
        )
        flag, equals, value = flag.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in known:
            raise UserError(f"unknown field {flag}{_flag_hint(name, known)}")
        if not equals:
            require(bool(rest), f"{flag} needs a value")
            value = rest.pop(0)
        out[name] = _parse_value(flag, known[name], value)
    return out


def field_types(cls: type[Json] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """The type of every field of a run by its dotted name, as it can be changed.

    A table is there field by field, and as a whole with type None if it may be left out.
    """
    out: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        kinds = [h for h in (hint, *typing.get_args(hint)) if isinstance(h, type)]
        table = next((h for h in kinds if issubclass(h, Json)), None)
        if table is not None:
            out |= field_types(table, f"{prefix}{name}.")
        if table is not hint:
            out[prefix + name] = hint if table is None else type(None)
    return out


def _flag_hint(name: str, known: Iterable[str]) -> str:
    """What to try instead of an unknown field; the table of a field may have been forgotten."""
    by_leaf = {k.rpartition(".")[2]: k for k in known}
    found = nearest(name, known) or by_leaf.get(nearest(name.rpartition(".")[2], by_leaf) or "")
    if found is None:
        return "; see --help for the fields"
    return f" (did you mean --{found.replace('_', '-')}?)"


def _parse_value(flag: str, hint: Any, text: str) -> Any:
    """The value of a field of that type, which may also be "none" where it may be None."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        require(text in choices, f"{flag}={text!r} must be one of {', '.join(choices)}")
        return text
    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    kind = kinds[0]
    if typing.get_origin(hint) is tuple:
        return [_parse_value(flag, kind, part) for part in text.split(",") if part.strip()]
    require(kind is not type(None), f"{flag}={text!r} must be one of none")
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        what = {int: "a whole number such as 1000000", bool: "True or False"}.get(kind, "a number")
        raise UserError(f"{flag}={text!r} must be {what}") from None


def apply_overrides(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The run with fields replaced; setting one token budget clears the other."""
    if not changes:
        return run
    data = run.to_dict()
    if "tokens" in changes and "tokens_per_param" not in changes:
        data["tokens_per_param"] = None
    if "tokens_per_param" in changes and "tokens" not in changes:
        data["tokens"] = None
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        table = data
        for parent in parents:
            if table[parent] is None:
                needed = {"model.pattern.block", "model.pattern.local"}
                require(
                    parent != "pattern" or needed <= changes.keys(),
                    f"{run.name} is dense: a pattern needs --model.pattern.block and "
                    "--model.pattern.local",
                )
                table[parent] = {}
            table = table[parent]
        table[leaf] = value
    return RunConfig.from_dict(data)


def overrides_to(runs: Sequence[RunConfig], target: RunConfig) -> list[str]:
    """The arguments that turn every one of these runs into `target`, for `parse_overrides`."""
    out = []
    for name in field_types():
        value, table = _value_of(target, name), _value_of(target, name.rpartition(".")[0])
        if all(_value_of(run, name) == value for run in runs):
            continue
        if isinstance(value, Json) or table is None:
            continue  # said field by field; cleared as a whole
        if value is None and name in ("tokens", "tokens_per_param"):
            continue  # the other budget is set
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        text = "none" if value is None else text
        out += [f"--{name.replace('_', '-')}", text]
    return out


def _value_of(run: RunConfig, name: str) -> Any:
    """The value of a dotted field; None inside a table that is None, as a dense model's pattern."""
    value: Any = run
    for part in name.split(".") if name else ():
        value = None if value is None else getattr(value, part)
    return value
