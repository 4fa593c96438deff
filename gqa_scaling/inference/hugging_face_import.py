"""A Llama, Mistral or Qwen3 folder becomes the directory of a run that is done.

What reads runs then reads the model: it has a config, parameters with checksums and a tokenizer
beside them. `RunConfig.imported` says that it was trained elsewhere, and on which weights its
digest stands.
"""

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gqa_scaling import costs
from gqa_scaling.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    UserError,
    require,
)
from gqa_scaling.data.tokenizer import Tokenizer, read_tokenizer
from gqa_scaling.files.checkpoint import save_parameters
from gqa_scaling.files.claims import claim
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.files.storage import expanded, write_atomic
from gqa_scaling.inference.hugging_face import (
    ARRAYS,
    ARRAYS_OF_LAYER,
    INDEX,
    WHOLE,
    Place,
    architecture_named,
    model_of,
    name_in_layer,
    read_json,
)
from gqa_scaling.inference.trained import TOKENIZER_NAME, name_of, named, shapes_of

EXPERIMENT = "imported"  # the folder of such runs below the root
READERS = 8  # files hashed at once
DTYPES = ("F32", "F16", "BF16")  # of weights, as the format calls them
IGNORED = ("rotary_emb.inv_freq",)  # tables that the config defines, kept by some older files


def import_folder(
    folder: Path,
    name: str,
    root: Path,
    dtype: Literal["bfloat16", "float32"] | None = None,
) -> tuple[RunDirectory, bool]:
    """The run directory that holds the folder's model, and whether it was made just now.

    `dtype` is what it computes in, by default that of the folder's weights, float32 for float16; the
    parameters are kept in float32, which holds all of them exactly. The same weights under the same
    name are found again. Raises UserError, with nothing written, where the folder is not whole, or
    is of an architecture or a tokenizer that is not supported.
    """
    folder = expanded(folder)
    require(folder.is_dir(), f"{folder} is no folder")
    file = folder / "config.json"
    require(file.is_file(), f"{folder} holds no model: it has no config.json")
    config = read_json(file)
    architecture_named(config, file)
    weights = weight_files(folder)
    arrays = Weights(weights)
    model = model_of(
        config, file, dtype or ("bfloat16" if arrays.dtypes == {"BF16"} else "float32")
    )
    check_arrays(arrays, model, folder)
    ends = _ends(config, model, file)
    tokenizer = _tokenizer(folder, model)
    run = _run(name, model, config["max_position_embeddings"], _hash(weights))
    directory = run_directory(root, EXPERIMENT, run)
    with claim(directory.claim_file) as mine:
        require(mine, f"{directory.path} is being imported by another process")
        if directory.result() is not None:
            return directory, False
        data = {"tokenizer_hash": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
        directory.begin(run, data)
        definition = tokenizer.definition
        assert definition is not None
        write_atomic(directory.path / TOKENIZER_NAME, definition)
        save_parameters(directory.parameters, _parameters(arrays, run))
        directory.finish(_result(run, config, ends, weights, data), {})
    return directory, True


# ----------------------------------------------------------------------------------- the files


def weight_files(folder: Path) -> list[Path]:
    """The files of weights. Raises UserError where there are none, or one of them is missing."""
    if not (folder / INDEX).exists():
        whole = folder / WHOLE
        require(
            whole.is_file(),
            f"{folder} has neither {WHOLE} nor {INDEX}: only weights as safetensors are read",
        )
        return [whole]
    index = read_json(folder / INDEX)
    named = index.get("weight_map")
    named = named if isinstance(named, dict) else {}
    sound = bool(named) and all(isinstance(n, str) and Path(n).name == n for n in named.values())
    require(sound, f"{folder / INDEX} is damaged: its weight_map must name a file for each array")
    files = [folder / name for name in sorted(set(named.values()))]
    missing = [file.name for file in files if not file.is_file()]
    require(
        not missing,
        f"{folder} lacks {len(missing)} of its {len(files)} files of weights: {missing[:1]} is missing",
    )
    return files


class Weights:
    """The arrays of all files by their names, read when they are asked for.

    Raises UserError where a file is damaged or cut short, holds an array of another dtype than
    `DTYPES`, or one that another file holds as well.
    """

    def __init__(self, files: list[Path]) -> None:
        self._file: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[str] = set()
        for path in files:
            try:
                file: Any = safe_open(path, framework="np")
            except SafetensorError as error:
                raise UserError(
                    f"{path} is damaged or cut short, or no safetensors file ({error})"
                ) from None
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
            for name in file.keys():  # noqa: SIM118  # it is no dict
                require(
                    name not in self._file,
                    f"{path} holds {[name]}, and so does another file of the folder",
                )
                entry = file.get_slice(name)
                kind = entry.get_dtype()
                require(
                    kind in DTYPES,
                    f"{path}: {name} is of dtype {kind}; only {', '.join(DTYPES)} are read, no "
                    "quantized weights",
                )
                self._file[name] = file
                self.shapes[name] = tuple(entry.get_shape())
                self.dtypes.add(kind)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[name].get_tensor(name)


def _hash(files: list[Path]) -> str:
    """64 hex digits over the files of weights."""

    def of(file: Path) -> bytes:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").digest()

    with ThreadPoolExecutor(READERS) as pool:
        return hashlib.sha256(b"".join(pool.map(of, files))).hexdigest()


def _tokenizer(folder: Path, model: ModelConfig) -> Tokenizer:
    file = folder / "tokenizer.json"
    require(
        file.is_file(),
        f"{folder} has no tokenizer.json, the only kind of tokenizer that is read",
    )
    tokenizer = read_tokenizer(file)
    require(
        tokenizer.vocab_size <= model.vocab_size,
        f"{file} has {tokenizer.vocab_size:,} tokens, more than the vocab_size={model.vocab_size:,} "
        "of config.json",
    )
    before = tokenizer.put_before
    require(
        len(before) <= 1,
        f"{file} puts {len(before)} tokens before a text; one at most is supported",
    )
    return tokenizer


def _ends(config: Mapping[str, Any], model: ModelConfig, file: Path) -> list[int]:
    """The tokens that end a text, as config.json names them: one, several or none."""
    said = config.get("eos_token_id")
    ends = said if isinstance(said, list) else [] if said is None else [said]
    require(
        all(type(token) is int and 0 <= token < model.vocab_size for token in ends),
        f"{file}: eos_token_id={said!r} must be tokens below vocab_size={model.vocab_size:,}, or null",
    )
    return ends


# ------------------------------------------------------------------------------ the parameters


def _expected(model: ModelConfig) -> Iterator[tuple[str, Place, int | None, str]]:
    """For each array of the format its name, what it is, its layer, and the name of ours."""
    ours = set(_names(model))
    for name, place in ARRAYS.items():
        if name in ours:
            yield place.name, place, None, name
    for name, place in ARRAYS_OF_LAYER.items():
        if f"layers/{name}" in ours:
            for layer in range(model.n_layers):
                yield name_in_layer(place, layer), place, layer, f"layers/{name}"


def _names(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters, layers stacked, by names such as layers/q_DKGH."""
    return {name: leaf.shape for name, leaf in named(shapes_of(model)).items()}


def check_arrays(arrays: Weights, model: ModelConfig, folder: Path) -> None:
    """Refuse weights of which one is missing, has another shape, or has no place in the model."""
    shapes, known = _names(model), set()
    for name, place, layer, ours in _expected(model):
        known.add(name)
        require(name in arrays.shapes, f"{folder} lacks the array {name}")
        wanted = place.shape(shapes[ours][layer is not None :])
        require(
            arrays.shapes[name] == wanted,
            f"{folder}: {name} has shape {arrays.shapes[name]}, where config.json asks for {wanted}",
        )
    more = sorted(n for n in arrays.shapes if n not in known and not n.endswith(IGNORED))
    head = ARRAYS["output_VD"].name
    if more == [head] and np.array_equal(arrays[head], arrays[ARRAYS["embedding_VD"].name]):
        return  # tied, and written twice
    require(
        not more,
        f"{folder} has {len(more)} arrays that the architecture has no place for, such as {more[:1]}",
    )


def _parameters(arrays: Weights, run: RunConfig) -> Any:
    """The parameters as a run's are saved: layers stacked, float32."""
    filled = {n: np.empty(shape, np.float32) for n, shape in _names(run.model).items()}
    for name, place, layer, ours in _expected(run.model):
        target = filled[ours] if layer is None else filled[ours][layer]
        target[...] = place.ours(arrays[name], target.shape)

    def of(path: Any, _: Any) -> jax.Array:
        return jnp.asarray(filled.pop(name_of(path)))

    return jax.tree_util.tree_map_with_path(of, shapes_of(run.model))


# ------------------------------------------------------------------------------------- the run


def _run(name: str, model: ModelConfig, context_length: Any, weights: str) -> RunConfig:
    """A run as the rest of the program knows it; the smallest budget stands for one not known."""
    try:
        return RunConfig(
            name=name,
            model=model,
            context_length=context_length,
            batch_tokens=context_length,
            tokens=context_length,
            data=DataConfig(corpus="unknown", tokenizer=TOKENIZER_NAME),
            evaluation=EvaluationConfig(tokens=max(EvaluationConfig().tokens, context_length)),
            imported=weights,
        )
    except UserError as error:
        raise UserError(f"cannot import it: {error}") from None


def _result(
    run: RunConfig,
    config: Mapping[str, Any],
    ends: list[int],
    weights: list[Path],
    data: dict[str, Any],
) -> dict[str, Any]:
    parameters = costs.parameters(run.model)
    return {
        "name": run.name,
        "digest": run.digest,
        "config": run.to_dict(),
        "n_exact": parameters.non_embedding,
        "n_total": parameters.total,
        "data": data,
        "evaluations": {},
        "imported": {
            "model_type": config.get("model_type"),
            "eos_token_id": ends,
            "files": [file.name for file in weights],
            "sha256": run.imported,
        },
    }
