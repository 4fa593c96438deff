"""docs/architecture.md lists every file of the code, and its floors are those of the imports."""

import ast
import re
from pathlib import Path

from test_imports import FLOORS

CHECKOUT = Path(__file__).parents[1]
MAP, FILES = (CHECKOUT / "docs/architecture.md").read_text(encoding="utf-8").split("## Every file")


def holds_code(path: Path) -> bool:
    """Whether a module has more than its docstring, as the __init__.py of most rooms has not."""
    return not all(
        isinstance(node, ast.Expr) for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def test_the_map_lists_every_module_once_and_no_other():
    rooms = re.split(r"^### `(.+?)`: .*$", FILES, flags=re.MULTILINE)[1:]
    listed = [
        room + name
        for room, files in zip(rooms[::2], rooms[1::2], strict=True)
        for name in re.findall(r"^\* `(\w+\.py)`: .", files, flags=re.MULTILINE)
    ]
    there = [
        path.relative_to(CHECKOUT).as_posix()
        for folder in ("gqa_scaling", "launch", "experiments")
        for path in (CHECKOUT / folder).rglob("*.py")
        if holds_code(path)
    ]
    assert len(listed) == len(set(listed))
    assert set(there) - set(listed) == set(), "docs/architecture.md lacks these modules"
    assert set(listed) - set(there) == set(), "docs/architecture.md lists modules that are gone"


def test_what_the_map_speaks_of_is_there():
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", MAP))
    assert len(named) > 40
    places = (CHECKOUT, CHECKOUT / "gqa_scaling")
    gone = {name for name in named if not any((place / name).exists() for place in places)}
    assert gone == set()


def test_the_floors_of_the_map_are_those_that_imports_are_held_to():
    lines = re.findall(r"^\d+\. (`\w+`(?:, `\w+`)*)$", MAP, flags=re.MULTILINE)
    assert [tuple(re.findall(r"\w+", line)) for line in lines] == list(FLOORS)
