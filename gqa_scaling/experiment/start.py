"""A starter experiment as a file of one's own, made from `starter.py`."""

import ast
import json
import os
import re
import shlex
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from gqa_scaling.config import require
from gqa_scaling.files.storage import write_atomic

STARTER = Path(__file__).with_name("starter.py")
FOLDER = "experiments"  # where experiments lie in a checkout


def start(name: str, corpus: str | None = None) -> tuple[Path, str]:
    """Write a starter experiment; its file, and what commands call it.

    `name` is a plain name, of a module in experiments/ where there is such a folder and else of a file
    here, or the path of a .py file. `corpus` is that of its runs. Raises UserError for a name that no
    experiment can have and for a file that is there already.
    """
    path, spec = _place(name)
    require(not path.exists(), f"{path} is there already: take another name, or change that file")
    require(
        path.parent.is_dir(),
        f"there is no folder {path.parent} for {path.name}: make it, or name another",
    )
    text = STARTER.read_text(encoding="utf-8").replace("SPEC", shlex.quote(spec))
    if corpus is not None:
        text = text.replace('corpus="stdlib"', f"corpus={json.dumps(corpus, ensure_ascii=False)}")
    ast.parse(text)
    write_atomic(path, text)
    return path, spec


def _place(name: str) -> tuple[Path, str]:
    """The file of an experiment of this name, and what commands call it."""
    if name.endswith(".py") or os.sep in name:
        path = Path(name if name.endswith(".py") else f"{name}.py")
    else:
        here = Path(FOLDER).is_dir()
        path = Path(FOLDER, f"{name}.py") if here else Path(f"{name}.py")
    stem = path.stem
    require(
        re.fullmatch(r"[A-Za-z]\w*", stem) is not None,
        f"{stem!r} cannot name an experiment: take letters, digits and _, beginning with a letter",
    )
    # modules are imported from the working folder, before those of Python
    if path.parent.resolve() == Path.cwd() and not path.exists():
        require(
            not _is_installed(stem),
            f"{path} would be taken for the module {stem} of Python or a package: take another name",
        )
    module = path.parent == Path(FOLDER)
    return path, f"{FOLDER}.{stem}" if module else path.as_posix()


def _is_installed(name: str) -> bool:
    """Whether Python itself, this program or an installed package has a module of this name."""
    if name in sys.stdlib_module_names or name == __name__.partition(".")[0]:
        return True
    places = sysconfig.get_paths()
    found = PathFinder.find_spec(name, [places["purelib"], places["platlib"]])
    return found is not None and found.origin is not None
