"""A finished run as something that infers: its model on the devices here, its tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from flax import nnx

from gqa_scaling.config import RunConfig, UserError, require
from gqa_scaling.data.manifest import read_manifest
from gqa_scaling.data.store import TokenStore
from gqa_scaling.data.tokenizer import Tokenizer, bytes_tokenizer, read_tokenizer
from gqa_scaling.devices.mesh import abstract
from gqa_scaling.files.checkpoint import load_parameters
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.files.storage import as_path, expanded
from gqa_scaling.inference.decode import for_platform, lay_out, serving_mesh
from gqa_scaling.inference.generate import Decoder
from gqa_scaling.model.transformer import create


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to decode."""

    run: RunConfig
    decoder: Decoder
    tokenizer: Tokenizer


def open_trained(directory: RunDirectory, devices: Sequence[jax.Device] | None = None) -> Trained:
    """A finished run's model on these devices, by default all, whatever mesh it was trained on.

    Files and arrays are verified. Raises `UserError` for a run that is unfinished, parameters that are
    missing or damaged, and a tokenizer that is gone or another one.
    """
    run, tokenizer = directory.config(), tokenizer_of(directory)
    config = for_platform(run.model)
    mesh = serving_mesh(config, devices)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: nnx.state(create(run.model, run.seed)))
        state = load_parameters(directory.parameters, abstract(shapes, mesh))
        parameters = lay_out(config, state)
    return Trained(run, Decoder(config, parameters, mesh, tokenizer.vocab_size), tokenizer)


def require_finished(directory: RunDirectory) -> None:
    """Refuse a run without a result, saying where it stands."""
    path = directory.path
    require(directory.config_file.exists(), f"{path} is no run: it has no config.json")
    if directory.result() is not None:
        return
    state = directory.state()
    step = directory.last_metrics("learning/loss").get("step")
    trained = f", at step {step:,}" if step else ", with no step logged"
    remedy = {
        "running": "wait for it to end",
        "failed": "see why with `gqa-scaling status`, and `run --retry-failed`",
    }.get(state, "finish it with `gqa-scaling run`")
    raise UserError(f"{path} is unfinished ({state}{trained}): {remedy}")


def tokenizer_of(directory: RunDirectory) -> Tokenizer:
    """The tokenizer that a finished run was trained with, told by its hash.

    It is bytes, or in the run's token store, or the tokenizer.json that the run names. Raises
    `UserError` where none of them is the one.
    """
    require_finished(directory)
    run, whole = directory.config(), directory.result()
    assert whole is not None
    wanted = whole["result"].get("data", {}).get("tokenizer_hash")
    if run.data.tokenizer == "bytes":
        found, where = bytes_tokenizer(), "bytes"
    else:
        found, where = _kept_tokenizer(run)
    require(
        found.sha256 == wanted,
        f"{directory.path} was trained with another tokenizer than {where}: its hash is "
        f"{str(wanted)[:12]}, and here {found.sha256[:12]}; bring back the one it was trained with, "
        "or name its token store with --data.store",
    )
    return found


def _kept_tokenizer(run: RunConfig) -> tuple[Tokenizer, str]:
    """The tokenizer of the run's token store, or the file that the run names."""
    store = as_path(run.data.store_path)
    if (store / "store.json").is_file():
        return TokenStore(store, read_manifest(store)).tokenizer, f"that of {store}"
    named = run.data.tokenizer
    if named.endswith(".json") and expanded(named).is_file():
        return read_tokenizer(named), named
    raise UserError(
        f"the tokenizer {named!r} is gone: there is no token store at {store}; make it again with "
        "`gqa-scaling prepare EXPERIMENT`, or start in the folder that the run was started in"
    )
