"""A trained model taken from its run directory: its config, its parameters, its tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gqa_scaling.config import ModelConfig, RunConfig, UserError, require
from gqa_scaling.data.manifest import read_manifest
from gqa_scaling.data.store import TokenStore
from gqa_scaling.data.tokenizer import Tokenizer, bytes_tokenizer, read_tokenizer
from gqa_scaling.devices.layout import AXES
from gqa_scaling.devices.mesh import abstract
from gqa_scaling.files.checkpoint import load_parameters
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.files.storage import as_path, expanded
from gqa_scaling.inference.decode import for_platform, lay_out, serving_mesh
from gqa_scaling.inference.generate import Decoder
from gqa_scaling.model.transformer import Transformer, create

TOKENIZER_NAME = "tokenizer.json"  # in the directory of a run that was imported


@dataclass(frozen=True)
class Trained:
    """A run that is done. `result` is what its result.json tells of it."""

    directory: RunDirectory
    run: RunConfig
    result: dict[str, Any]

    def parameters(self, device: jax.Device | None = None) -> nnx.State:
        """The trained parameters in float32, whole on one device, by default the first.

        Raises UserError where a file or an array of them is not what was saved.
        """
        mesh = Mesh(np.array([device or jax.devices()[0]]).reshape((1,) * len(AXES)), AXES)
        return load_parameters(self.directory.parameters, abstract(shapes_of(self.run.model), mesh))

    def model(self, device: jax.Device | None = None) -> Transformer:
        """The trained model on one device, by default the first."""
        graph, _ = nnx.split(nnx.eval_shape(lambda: create(self.run.model, 0)))
        return nnx.merge(graph, self.parameters(device))

    def decoder(self) -> Decoder:
        """The model laid out for decoding on all devices.

        The mesh that it was trained on does not matter. Raises UserError as `parameters` and
        `tokenizer` do.
        """
        vocab_size = self.tokenizer().vocab_size
        return load_decoder(self.directory.parameters, self.run.model, vocab_size)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was trained with, told by its hash.

        It is bytes, or lies beside the parameters of an imported model, or in the token store that
        the run names, or is the tokenizer.json that it names. Raises UserError where it is at none of
        these places, or has changed.
        """
        if self.run.data.tokenizer == "bytes":
            found, where = bytes_tokenizer(), "bytes"
        else:
            found, where = self._kept_tokenizer()
        wanted = self.result.get("data", {}).get("tokenizer_hash")
        require(
            found.sha256 == wanted,
            f"{self.directory.path} was trained with another tokenizer than {where}: its hash is "
            f"{str(wanted)[:12]}, and here {found.sha256[:12]}; bring back the one it was trained with, "
            "or name its token store with --data.store",
        )
        return found

    @property
    def first_token(self) -> int | None:
        """The token that stands before every text: for models trained here none, for one that was
        imported what its tokenizer.json puts there, as transformers does."""
        before = self.tokenizer().put_before if self.run.imported else []
        return before[0] if before else None

    @property
    def stops(self) -> list[int]:
        """The tokens that end a text: that of its tokenizer, and of an imported model those that its
        config.json named."""
        named = self.result.get("imported", {}).get("eos_token_id", [])
        return sorted({self.tokenizer().eos, *named})

    def tokens_of(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of texts as the model is to read them, `first_token` before each."""
        before = [] if self.first_token is None else [self.first_token]
        return [
            np.concatenate([before, tokens]).astype(np.int32)
            for tokens in self.tokenizer().encode(list(texts))
        ]

    def _kept_tokenizer(self) -> tuple[Tokenizer, str]:
        """The tokenizer and where it was found."""
        named, store = self.run.data.tokenizer, as_path(self.run.data.store_path)
        beside = self.directory.path / TOKENIZER_NAME
        if beside.exists():
            return read_tokenizer(beside), str(beside)
        if (store / "store.json").is_file():
            return TokenStore(store, read_manifest(store)).tokenizer, f"that of {store}"
        if named.endswith(".json") and expanded(named).is_file():
            return read_tokenizer(named), named
        raise UserError(
            f"the tokenizer {named!r} is gone: there is no token store at {store}; make it again with "
            "`gqa-scaling prepare EXPERIMENT`, or start in the folder that the run was started in"
        )


def open_trained(path: str | Path | RunDirectory) -> Trained:
    """The run at this path. Raises UserError where there is none, where it is not done, or where it was put
    back from a kept study, which has no parameters."""
    directory = path if isinstance(path, RunDirectory) else RunDirectory(as_path(path))
    require(
        directory.config_file.exists(),
        f"{directory.path} is no run: it has no config.json; name the directory of one run, such as "
        "runs/smoke/NAME-DIGEST",
    )
    run, whole = directory.config(), directory.result()
    if whole is None:
        state = directory.state()
        step = directory.last_metrics("learning/loss").get("step")
        trained = f", at step {step:,}" if step else ", with no step logged"
        remedy = {
            "running": "wait for it to end",
            "failed": "see why with `gqa-scaling status`, and `run --retry-failed`",
        }.get(state, "finish it with `gqa-scaling run`")
        raise UserError(f"{directory.path} is unfinished ({state}{trained}): {remedy}")
    require(
        not directory.is_restored(),
        f"{directory.path} was put back from a kept study, without its parameters: remove it and train it "
        "again with `gqa-scaling run`",
    )
    return Trained(directory, run, whole["result"])


def load_decoder(path: Path, model: ModelConfig, vocab_size: int) -> Decoder:
    """Parameters that were saved at a path, laid out for decoding on all devices.

    Raises UserError where they are missing or damaged.
    """
    config = for_platform(model)
    mesh = serving_mesh(config)
    with jax.set_mesh(mesh):
        parameters = load_parameters(path, abstract(shapes_of(model), mesh))
        return Decoder(config, lay_out(config, parameters), mesh, vocab_size)


def shapes_of(model: ModelConfig) -> nnx.State:
    """The parameters of a model as abstract arrays."""
    return jax.eval_shape(lambda: nnx.state(create(model, 0)))


def name_of(path: Any) -> str:
    """The name of a parameter at a path of the tree, such as layers/q_DKGH."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named(parameters: nnx.State) -> dict[str, Any]:
    """The parameters by their names."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {name_of(path): leaf for path, leaf in leaves}
