"""What a study can be asked for, by name. Nothing is imported here, so that `--help` is quick."""

from typing import Literal

PUBLISHED = "chen2025"  # the published points, which are shipped with the package

Law = Literal["separate", "product", "fading"]
Objective = Literal["z", "memory", "flops", "bytes", "seconds", "dollars"]
OBJECTIVES: dict[str, str] = {  # of each `Objective`
    "z": "Z",
    "memory": "memory",
    "flops": "FLOPs",
    "bytes": "bytes held",
    "seconds": "seconds per token",
    "dollars": "dollars per million tokens",
}


def is_experiment(source: str) -> bool:
    """Whether a study's source names an experiment, whose runs are ours."""
    return source != PUBLISHED and not source.endswith(".csv")
