"""What was meant by an option that a verb does not have: nothing is guessed, it is only said.

A verb's own options are never abbreviated (`allow_abbrev`): what it does not know is either a field of a
run or wrong, and a shortened option would change its meaning when a field of that name comes.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence

from gqa_scaling.config import UserError
from gqa_scaling.fields import nearest


def refuse_near_misses(
    verb: argparse.ArgumentParser, arguments: Sequence[str], rest: Sequence[str]
) -> None:
    """Raise UserError where `rest`, what the verb does not know, was meant as one of its options.

    `arguments` are all that were typed.
    """
    options = verb._option_string_actions
    for flag in _unknown(rest):
        if flag == "--only" and "--without" in options:
            raise UserError(f"{verb.prog.split()[-1]} has no --only; leave runs out with --without")
        if found := _meant(flag, options):
            raise UserError(f"{verb.prog.split()[-1]} has no {flag} (did you mean {found}?)")
    for word in rest:
        before = _option_before(word, arguments)
        if before in options and options[before].nargs is None:
            several = [
                name
                for name in (f"{before}s", f"{before}es")
                if name in options and options[name].nargs is not None
            ]
            also = f" (did you mean {several[0]}, which takes several?)" if several else ""
            raise UserError(f"{before} takes one value, not {word!r} as well{also}")


def _unknown(rest: Sequence[str]) -> Iterator[str]:
    """The options among what is left that are no fields of a run."""
    from gqa_scaling.experiment.overrides import field_types

    fields = field_types()
    for word in rest:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag[2:].replace("-", "_") not in fields:
            yield flag


def _meant(flag: str, options: Iterable[str]) -> str:
    """The options that begin with what was typed, else the nearest; "" where none is near."""
    names = [name.removeprefix("--") for name in options if name.startswith("--")]
    typed = flag.removeprefix("--")
    longer = sorted(name for name in names if name.startswith(typed))
    near = longer or list(filter(None, [nearest(typed, names)]))
    return " or ".join(f"--{name}" for name in near)


def _option_before(word: str, arguments: Sequence[str]) -> str:
    """The option whose second value this word would be; "" where it is none."""
    if word.startswith("-") or word not in arguments:
        return ""
    at = len(arguments) - 1 - list(reversed(arguments)).index(word)
    if at < 2 or arguments[at - 1].startswith("-"):
        return ""
    return arguments[at - 2]
