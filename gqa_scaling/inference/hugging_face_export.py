"""A trained model as a folder that the tools of Hugging Face, and those built on them, read."""

import json
import math
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from gqa_scaling import __version__, costs
from gqa_scaling.config import require
from gqa_scaling.data.tokenizer import EOS, Tokenizer
from gqa_scaling.files.storage import make_folder, require_folder, sync, write_json
from gqa_scaling.inference.hugging_face import (
    ARRAYS,
    ARRAYS_OF_LAYER,
    INDEX,
    WHOLE,
    Place,
    architecture_of,
    config_of,
    name_in_layer,
)
from gqa_scaling.inference.trained import Trained, named

SHARD_BYTES = 5 * 10**9  # of one file of weights
PROVENANCE = "gqa_scaling.json"  # where the model came from, and the sign that a folder is ours
DTYPES = {  # of the weights
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Every attention of vLLM, and of what is derived from it, has taken these; others differ by version.
COMMON_HEAD_SIZES = (64, 128, 256)


@dataclass(frozen=True)
class _Array:
    """An array to be written: its shape is known before it is made."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    def bytes(self, dtype: np.dtype) -> int:
        return math.prod(self.shape) * dtype.itemsize


@dataclass(frozen=True)
class Exported:
    """What was written: where, in whose format, how many bytes of weights in how many files."""

    path: Path
    architecture: str
    weight_bytes: int
    files: int
    notes: tuple[str, ...]


def export(
    trained: Trained, output: Path, dtype: str = "float32", shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Write the model to a folder, at once or not at all; an export that is there is replaced.

    `dtype` is that of the weights. Raises UserError where no format expresses the model, where its
    tokenizer is not to be found, or where something else lies at that place.
    """
    run, output = trained.run, check_output(output)
    architecture = architecture_of(run.model)
    tokenizer = trained.tokenizer()
    arrays = _arrays(trained)
    first = trained.first_token
    config = config_of(run.model, run.context_length, trained.stops, dtype, first)
    notes = notes_on(trained)
    make_folder(output.parent)
    aside = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir()
        weight_bytes, files = _write_weights(aside, arrays, DTYPES[dtype], shard_bytes)
        write_json(aside / "config.json", config)
        ends = {"eos_token_id": config["eos_token_id"], "pad_token_id": tokenizer.eos}
        write_json(aside / "generation_config.json", ends | {"do_sample": False})
        _write_tokenizer(aside, tokenizer, run.context_length, bool(run.imported), first)
        provenance = _provenance(trained, architecture, dtype)
        write_json(aside / PROVENANCE, provenance)
        (aside / "README.md").write_text(_readme(provenance, notes, first), encoding="utf-8")
        sync(aside)
        _put(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(output, architecture, weight_bytes, files, notes)


# ---------------------------------------------------------------------------------- the folder


def check_output(output: Path) -> Path:
    """The folder to be written. Raises UserError where it holds anything but an earlier export."""
    output = output.absolute()
    require_folder(output)
    ours = (output / PROVENANCE).is_file() or not output.exists() or not any(output.iterdir())
    require(
        ours, f"{output} exists and is no export of this program: name another folder, or remove it"
    )
    return output


def _put(aside: Path, output: Path) -> None:
    """Rename the finished folder into place; an earlier export goes away once it is there."""
    earlier = output.with_name(f"{aside.name}.earlier")
    if output.exists():
        output.rename(earlier)
    aside.rename(output)
    shutil.rmtree(earlier, ignore_errors=True)


# --------------------------------------------------------------------------------- the weights


def _arrays(trained: Trained) -> list[_Array]:
    """The arrays of the format, layer by layer, each made from ours when it is written."""
    ours = {name: np.asarray(value) for name, value in named(trained.parameters()).items()}

    def of(place: Place, name: str, values: np.ndarray) -> _Array:
        return _Array(name, place.shape(values.shape), lambda: place.theirs(values))

    whole = {
        name: of(place, place.name, ours[name]) for name, place in ARRAYS.items() if name in ours
    }
    out = [whole.pop("embedding_VD")]
    for layer in range(trained.run.model.n_layers):
        for name, place in ARRAYS_OF_LAYER.items():
            stack = ours.get(f"layers/{name}")
            if stack is not None:
                out.append(of(place, name_in_layer(place, layer), stack[layer]))
    return [*out, *whole.values()]


def _write_weights(
    folder: Path, arrays: list[_Array], dtype: np.dtype, shard_bytes: int
) -> tuple[int, int]:
    """Files of at most `shard_bytes`, but for an array that is larger; their bytes and number."""
    shards: list[list[_Array]] = [[]]
    held = 0
    for array in arrays:
        if shards[-1] and held + array.bytes(dtype) > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(array)
        held += array.bytes(dtype)
    total, count = sum(array.bytes(dtype) for array in arrays), len(shards)
    if count == 1:
        _write(folder / WHOLE, arrays, dtype)
        return total, count
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        _write(folder / name, shard, dtype)
        where |= {array.name: name for array in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return total, count


def _write(path: Path, arrays: list[_Array], dtype: np.dtype) -> None:
    made = {}
    for array in arrays:
        values = np.ascontiguousarray(array.make())
        with np.errstate(over="ignore"):  # refused below
            made[array.name] = values.astype(dtype)
        require(
            bool(np.isfinite(made[array.name]).all() or not np.isfinite(values).all()),
            f"{array.name} has weights up to {abs(values).max():.3g}, more than {dtype} holds: export "
            "it as bfloat16 or float32",
        )
    save_file(made, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------- the tokenizer


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer, context_length: int, whole: bool, first: int | None
) -> None:
    """tokenizer.json and what transformers must know beside it.

    Training here puts nothing before a text, so what would is taken out of the tokenizer, but for
    one that came with an imported model, which is left `whole`, and puts `first` there.
    """
    definition = json.loads(tokenizer.definition or bytes_definition(tokenizer.eos))
    definition |= {"truncation": None, "padding": None}
    if not whole:
        definition["post_processor"] = None
    write_json(folder / "tokenizer.json", definition)
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    eos = library.id_to_token(tokenizer.eos)
    before = {} if first is None else {"bos_token": library.id_to_token(first)}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **before,
            "eos_token": eos,
            "pad_token": eos,
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": not whole,  # a text cannot forge a special token
        },
    )


def bytes_definition(eos: int) -> str:
    """The tokenizer "bytes" as a tokenizer.json: a BPE without merges whose token i is byte i."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as ByteLevel writes bytes
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocabulary = {letter: byte for byte, letter in letters.items()}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = level
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens([EOS])
    assert library.token_to_id(EOS) == eos == len(vocabulary)
    return library.to_str()


# ------------------------------------------------------------------------ what is said about it


def notes_on(trained: Trained) -> tuple[str, ...]:
    """What a user of the folder should know before it is served."""
    model, notes = trained.run.model, []
    if model.head_dim not in COMMON_HEAD_SIZES:
        notes.append(
            f"head_dim={model.head_dim} is not among {', '.join(map(str, COMMON_HEAD_SIZES))}, the "
            "head sizes that all versions of vLLM and its derivatives take: some refuse it; "
            "transformers takes any"
        )
    if model.d_model % model.n_heads:
        notes.append(
            f"hidden_size={model.d_model} is no multiple of num_attention_heads={model.n_heads}: "
            "readers must take head_dim from config.json, as transformers does"
        )
    return tuple(notes)


def _provenance(trained: Trained, architecture: str, dtype: str) -> dict[str, Any]:
    run, result = trained.run, trained.result
    parameters = costs.parameters(run.model)
    evaluations = result["evaluations"]
    return {
        "run": {"name": run.name, "digest": run.digest, "imported": run.imported or None},
        "model": run.model.to_dict(),
        "parameters": {"total": parameters.total, "non_embedding": parameters.non_embedding},
        "context_length": run.context_length,
        "trained_tokens": result.get("tokens"),
        "data": result.get("data", {}),
        "evaluations": {
            digest: {key: each.get(key) for key in ("loss", "bits_per_byte", "targets", "hash")}
            for digest, each in evaluations.items()
        },
        "weights": {"architecture": architecture, "dtype": dtype},
        "tool": {"gqa-scaling": __version__, "jax": jax.__version__},
    }


def _readme(provenance: dict[str, Any], notes: tuple[str, ...], first: int | None) -> str:
    """The model card: what it is, where it came from, how it is loaded, with what texts begin."""
    run, data = provenance["run"], provenance["data"]
    model, weights = provenance["model"], provenance["weights"]
    rows = [
        ("run", f"{run['name']}, digest {run['digest']}"),
        (
            "parameters",
            "{total:,} ({non_embedding:,} without embeddings)".format(**provenance["parameters"]),
        ),
        (
            "heads",
            f"{model['n_heads']} query heads, {model['n_kv_heads']} KV heads of {model['head_dim']}",
        ),
        ("context length", f"{provenance['context_length']:,} tokens"),
    ]
    if run["imported"]:
        rows.append(("imported", f"weights with SHA-256 {run['imported']}, trained elsewhere"))
    else:
        rows.append(("trained on", f"{provenance['trained_tokens']:,} tokens"))
    if "corpus" in data:
        rows.append(("text", f"{data['corpus']}, token store with SHA-256 {data['store_hash']}"))
    for each in provenance["evaluations"].values():
        rows.append(
            (
                "held-out loss",
                f"{each['loss']:.4f} nats per token, {each['bits_per_byte']:.4f} bits per byte, on "
                f"{each['targets']:,} tokens with SHA-256 {each['hash']}",
            )
        )
    rows.append(("weights", f"{weights['architecture']}, {weights['dtype']}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    before = "nothing" if first is None else f"token {first}, which the tokenizer puts there,"
    remarks = "".join(f"* {note}\n" for note in notes)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {run["name"]}

A grouped-query transformer, exported by gqa-scaling {provenance["tool"]["gqa-scaling"]}.

| | |
| --- | --- |
{table}

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(".")
    tokenizer = AutoTokenizer.from_pretrained(".")

Documents end with the end-of-text token, and {before} stands before a text. `{PROVENANCE}` holds all
of this for programs.
{remarks and chr(10)}{remarks}"""
