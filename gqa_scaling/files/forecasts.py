"""Sealed forecasts: what was said of runs before they began, in files that are never rewritten.

    runs/<experiment>/forecasts/<time>-<digest>.json

The name holds the first digits of the SHA-256 of what was said, and the file all of them: another
forecast has another name, and a file that was changed since no longer fits its own. That tells of
accidents and of second thoughts; against forgery, keep the digest where others can see it.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_scaling.config import UserError, require
from gqa_scaling.fields import JsonShape
from gqa_scaling.files.runs import directory_of, read_json
from gqa_scaling.files.storage import make_folder, write_json

FOLDER = "forecasts"
SCHEMA = 1
_RUN: JsonShape = {
    "name": str,
    "digest": str,
    "evaluation_digest": str,
    "n_heads": int,
    "n_kv_heads": int,
    "n_layers": int,
    "d_model": int,
    "n": float,
    "law": str,
    "beyond": str,
    "predicted_nats": float,
    "low_nats": float,
    "high_nats": float,
}
_FORECAST: JsonShape = {
    "schema": int,
    "sealed": float,
    "level": float,
    "evaluation_hash": str,
    "corpus_hash": str,
    "runs": [_RUN],
}


@dataclass(frozen=True)
class Sealed:
    """A forecast as it was sealed; `said` is everything in it.

    Where the file is not what was sealed, `altered` says so, and `said` is empty.
    """

    path: Path
    said: dict[str, Any]
    altered: str = ""


def seal(root: Path, experiment: str, said: dict[str, Any]) -> Sealed:
    """Write a forecast of the runs in said["runs"], dated now, whole or not at all.

    Raises UserError, and writes nothing, where one of them has begun.
    """
    require_not_begun(root, experiment, {run["name"]: run["digest"] for run in said["runs"]})
    now = time.time()
    said = json.loads(json.dumps({**said, "schema": SCHEMA, "sealed": now}))  # as it is read back
    digest = _digest(said)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    sealed = Sealed(
        root / experiment / FOLDER / f"{stamp}-{digest[:12]}.json", said | {"sha256": digest}
    )
    make_folder(sealed.path.parent)
    write_json(sealed.path, sealed.said)
    return sealed


def read_forecasts(root: Path, experiment: str) -> list[Sealed]:
    """Every forecast of the experiment's runs, the earliest first, then those that were altered."""
    folder = root / experiment / FOLDER
    found = [_read(path) for path in sorted(folder.glob("*.json"))] if folder.exists() else []
    return sorted(found, key=lambda each: each.said.get("sealed", float("inf")))


def forecast_digests(forecasts: Iterable[Sealed]) -> set[str]:
    """The digests of the runs that these forecasts speak of."""
    return {run["digest"] for each in forecasts for run in each.said.get("runs", ())}


def require_not_begun(root: Path, experiment: str, runs: Mapping[str, str]) -> None:
    """Raise UserError that names those of the runs, {name: digest}, that have begun."""
    begun = [name for name, digest in runs.items() if has_begun(root, experiment, name, digest)]
    require(
        not begun,
        f"{', '.join(begun)} of {experiment} began already: a forecast is made before; leave "
        f"{'it' if len(begun) == 1 else 'them'} out",
    )


def has_begun(root: Path, experiment: str, name: str, digest: str) -> bool:
    """Whether a process was ever at this run."""
    return directory_of(root, experiment, name, digest).begun()


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Sealed:
    try:
        said = read_json(path, _FORECAST)
    except UserError:
        return _altered(path)
    return unsealed(path, said)


def unsealed(path: Path, said: dict[str, Any]) -> Sealed:
    """The forecast that a file of this name says, if it is what was sealed."""
    digest = _digest({key: value for key, value in said.items() if key != "sha256"})
    named = re.fullmatch(r"\d{8}T\d{6}Z-([0-9a-f]{12})", path.stem)
    if said.get("sha256") != digest or named is None or named[1] != digest[:12]:
        return _altered(path)
    if said["schema"] != SCHEMA:
        told = f"{path} has schema {said['schema']}, this version reads {SCHEMA}"
        return Sealed(path, {}, told)
    return Sealed(path, said)


def _altered(path: Path) -> Sealed:
    return Sealed(
        path, {}, f"{path} is not what was sealed: it was altered since and does not count"
    )
