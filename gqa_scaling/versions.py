"""Which code is at work: versions of this package and of those that a result may depend on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from gqa_scaling import __version__

MATTERING = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    ours = {"python": platform.python_version(), "gqa-scaling": __version__}
    return ours | {name: importlib.metadata.version(name) for name in MATTERING}


def commit() -> str:
    """The commit of the checkout that this package lies in; "" where it lies in none, or git is away."""
    return _git("rev-parse", "HEAD") if (_folder() / ".git").exists() else ""


def said() -> str:
    """All of it for people: this package with its commit, then a line for each of the others."""
    made = commit()
    changed = made and _git("status", "--porcelain", "--untracked-files=no")
    of = f" (commit {made[:12]}{', with changes' if changed else ''})" if made else ""
    others = {name: value for name, value in versions().items() if name != "gqa-scaling"}
    return "\n".join([f"gqa-scaling {__version__}{of}", *(f"{k} {v}" for k, v in others.items())])


def _folder() -> Path:
    return Path(__file__).parents[1]


def _git(*words: str) -> str:
    """What git says of the checkout; "" where it cannot be asked."""
    command = ["git", "-C", str(_folder()), *words]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip() if told.returncode == 0 else ""
