"""What is handed to an engine: its own command, and the files that the command reads."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gqa_scaling.config import UserError, require
from gqa_scaling.experiment.load import split_variant
from gqa_scaling.files.storage import make_folder
from launch.jobs import Job, label

FOLDER = Path(".launch")  # of the files written for engines, in the checkout
# What machines are sent of the checkout, beside the experiment.
CODE = (
    *("gqa_scaling", "launch", "experiments"),
    *("pyproject.toml", "requirements.txt", "README.md", "LICENSE"),  # what setuptools reads
)


@dataclass(frozen=True)
class Study:
    """What every job of a launch has in common.

    `spec` is the experiment as it was named, `name` its own name, `root` the folder of the runs.
    Raises UserError for text that no job's command can hold.
    """

    spec: str
    name: str
    overrides: tuple[str, ...]
    root: str

    def __post_init__(self) -> None:
        for text in (self.spec, *self.overrides):
            require(
                text.isprintable(),
                f"{text!r} holds a line break or control character, which no job's command can",
            )

    @property
    def folder(self) -> Path:
        return FOLDER / label(self.name)

    @property
    def source(self) -> Path:
        """Where the experiment's module lies, from here."""
        place, _ = split_variant(self.spec)
        path = Path(place) if place.endswith(".py") else Path(*place.split("."))
        return path if path.exists() else path.with_suffix(".py")

    def work(self, job: Job) -> list[str]:
        """The arguments after `python` that carry the job out on a host."""
        overrides = ["--", *self.overrides] if self.overrides else []
        return ["-m", "launch.work", self.spec, *(run.name for run in job.runs), *overrides]

    def environment(self, job: Job) -> dict[str, str]:
        """What every process of the job is told: where the runs are, and its accelerator.

        `gqa-scaling run` ends with 2 where jax does not run on the first of these platforms.
        """
        platforms = "tpu,cpu" if job.slice.is_tpu else "cuda,cpu"
        return {"GQA_SCALING_RUNS": self.root, "JAX_PLATFORMS": platforms}


@dataclass(frozen=True)
class Step:
    """One command and the files it reads, by path."""

    command: tuple[str, ...]
    files: dict[Path, str] = field(default_factory=dict)

    def text(self) -> str:
        """As --dry-run prints it."""
        shown = [f"# {path}\n{text.rstrip()}\n" for path, text in self.files.items()]
        return "\n".join([*shown, f"$ {shlex.join(self.command)}\n"])


def missing_code() -> str:
    """What machines would lack if they were sent this folder; "" where it is a checkout."""
    missing = [name for name in CODE if not Path(name).exists()]
    if not missing:
        return ""
    return (
        f"machines are sent this folder, {Path.cwd()}, which has no {', '.join(missing)}: launch from the "
        "checkout"
    )


def require_tool(name: str, remedy: str) -> None:
    """Raise UserError unless the command is on the PATH."""
    require(shutil.which(name) is not None, f"{name} is not on the PATH: {remedy}")


def require_google_account() -> None:
    """Raise UserError unless gcloud is here and signed in."""
    require_tool("gcloud", "install the Google Cloud CLI, https://cloud.google.com/sdk")
    ask = ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]
    done = subprocess.run(ask, capture_output=True, text=True)
    signed_in = done.returncode == 0 and bool(done.stdout.strip())
    require(signed_in, "gcloud has no active account: gcloud auth login")


def run(steps: Sequence[Step]) -> None:
    """Write each step's files and run its command, in order.

    Raises UserError at the first that fails, saying how far it got.
    """
    for done, step in enumerate(steps):
        for path, text in step.files.items():
            make_folder(path.parent)
            path.write_text(text, encoding="utf-8")
        code = subprocess.run(step.command).returncode
        if code != 0:
            raise UserError(
                f"{shlex.join(step.command)} ended with {code}; {done} of {len(steps)} commands had "
                "succeeded before it: cancel those jobs before you launch again"
            )
