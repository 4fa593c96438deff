"""A script that completes the command in a shell: verbs, options, fields, experiments and files.

It is written once from the parsers, by shtab, and completes without starting Python.
"""

import argparse
import typing
from typing import Any, Literal

# Experiments of the folder here, the published points, and files: a CSV, a run, an experiment elsewhere.
COMPLETES = "_gqa_scaling_experiments"
PREAMBLE = {
    "bash": f"""
{COMPLETES}() {{
  local file names=chen2025
  for file in experiments/*.py; do
    file=${{file##*/}}
    case $file in '*.py' | __init__.py) ;; *) names+=" experiments.${{file%.py}}" ;; esac
  done
  compgen -W "$names" -- "$1"
  compgen -f -- "$1"
}}
""",
    "zsh": f"""
{COMPLETES}() {{
  local -a names
  names=(experiments/*.py(N:t:r))
  names=(${{names:#__init__}})
  compadd -- chen2025 experiments.${{^names}}
  _files
}}
""",
    "fish": f"""
function {COMPLETES}
  for file in experiments/*.py
    set -l name (string replace -r '.*/(.*)[.]py$' '$1' $file)
    test $name = __init__; or echo experiments.$name
  end
  echo chen2025
  __fish_complete_path (commandline -ct)
end
""",
}
FUNCTION = {"bash": COMPLETES, "zsh": COMPLETES, "fish": f"({COMPLETES})"}


def script(shell: str) -> str:
    """The script for bash, zsh or fish."""
    import shtab

    from gqa_scaling.cli import VERBS, parser_of
    from gqa_scaling.experiment.overrides import field_types

    parser, fields = parser_of(VERBS), field_types()
    for verb in verb_parsers(parser).values():
        if not takes_an_experiment(verb):
            continue
        for action in _positionals(verb):
            action.complete = FUNCTION  # type: ignore[attr-defined]
        for name, hint in fields.items():
            option = f"--{name.replace('_', '-')}"
            if option not in verb._option_string_actions:  # generate has a --tokens of its own
                verb.add_argument(option, choices=_choices(hint))
    return shtab.complete(parser, shell=shell, preamble=PREAMBLE[shell])


def verb_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    choices = parser._subparsers and parser._subparsers._group_actions[0].choices
    assert isinstance(choices, dict)
    return choices


def takes_an_experiment(verb: argparse.ArgumentParser) -> bool:
    """Whether a verb is about an experiment or one of its runs, whose fields can follow."""
    return any("xperiment" in (each.help or "").lower() for each in _positionals(verb))


def _positionals(verb: argparse.ArgumentParser) -> list[argparse.Action]:
    return [each for each in verb._actions if not each.option_strings]


def _choices(hint: Any) -> list[str] | None:
    """What a field of this type may be, where that is a list."""
    if hint is bool:
        return ["True", "False"]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else None
