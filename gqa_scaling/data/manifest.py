"""store.json: what a token store is made of, and the checks that it says so.

It lists every file with its size and SHA-256, so that a store that was cut short, changed or mixed
with another is noticed. `verification.py` reads the files themselves.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gqa_scaling.config import UserError, require
from gqa_scaling.fields import JsonShape, misfit

SCHEMA = 1
AGAIN = "build it again with `gqa-scaling prepare EXPERIMENT --rebuild`"

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
DTYPES = ("<u2", "<u4")

_FILE: JsonShape = {"file": str, "bytes": int, "sha256": str}
_SPLIT: JsonShape = {"tokens": int, "text_bytes": int, "shards": [_FILE], "documents_file": _FILE}
_MANIFEST: JsonShape = {
    "hash": str,
    "dtype": str,
    "declaration": dict,
    "corpus": {"sha256": str, "fingerprint": str},
    "tokenizer": {"name": str, "sha256": str, "vocab_size": int, "eos": int, "file": (_FILE,)},
    "splits": {"train": _SPLIT, "heldout": _SPLIT},
}


def file_entry(path: Path) -> dict[str, Any]:
    """What store.json says of one small file."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"file": path.name, "bytes": len(content), "sha256": digest}


def shard_entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The files that hold tokens."""
    return [entry for split in SPLITS for entry in manifest["splits"][split]["shards"]]


def file_entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Every file but store.json itself."""
    ends = [manifest["splits"][split]["documents_file"] for split in SPLITS]
    tokenizer = manifest["tokenizer"]["file"]
    return [*shard_entries(manifest), *ends, *([] if tokenizer is None else [tokenizer])]


def content_hash(manifest: dict[str, Any]) -> str:
    """Over what a training run can see: the files and what the ids in them mean."""
    seen = {
        "dtype": manifest["dtype"],
        "tokenizer": {k: manifest["tokenizer"][k] for k in ("sha256", "vocab_size", "eos")},
        "corpus": manifest["corpus"]["sha256"],
        "splits": manifest["splits"],
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The store.json of a store. Raises UserError where it is damaged or of another schema."""
    file = folder / "store.json"
    try:
        manifest = json.loads(file.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): {AGAIN}") from None
    wrong = misfit(manifest, {"schema": int})
    if not wrong:
        schema = manifest["schema"]
        require(
            schema == SCHEMA, f"{file} has schema {schema}, this version reads {SCHEMA}: {AGAIN}"
        )
        wrong = misfit(manifest, _MANIFEST) or _contradiction(manifest)
    require(not wrong, f"{file} is damaged ({wrong}): {AGAIN}")
    return manifest


def _contradiction(manifest: dict[str, Any]) -> str:
    """In which a store.json of the right shape contradicts itself, in words; "" for nothing."""
    if manifest["hash"] != content_hash(manifest):
        return "its hash is not that of its content"
    if manifest["dtype"] not in DTYPES:
        return f"dtype={manifest['dtype']!r} is no token's"
    size = np.dtype(manifest["dtype"]).itemsize
    for name in SPLITS:
        tokens, shards = manifest["splits"][name]["tokens"], manifest["splits"][name]["shards"]
        held = sum(shard["bytes"] for shard in shards)
        if held != tokens * size:
            return f"{name} has {tokens} tokens of {size} bytes in {held} bytes"
    return ""
