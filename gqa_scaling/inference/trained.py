"""A trained model taken from its run directory: its config, its parameters, its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gqa_scaling.config import ModelConfig, RunConfig, UserError, require
from gqa_scaling.data.store import open_store
from gqa_scaling.data.tokenizer import Tokenizer, bytes_tokenizer, read_tokenizer
from gqa_scaling.devices.layout import AXES
from gqa_scaling.devices.mesh import abstract
from gqa_scaling.files.checkpoint import load_parameters
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.files.storage import as_path, expanded
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

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its training text.

        It lies beside the parameters of an imported model, else in the token store that the run
        names, or is the tokenizer.json that it names. Raises UserError where it is at none of these
        places, or has changed.
        """
        data = self.run.data
        if data.tokenizer == "bytes":
            return bytes_tokenizer()
        beside, store = self.directory.path / TOKENIZER_NAME, as_path(data.store_path)
        if beside.exists():
            found = read_tokenizer(beside)
        elif (store / "store.json").is_file():
            found = open_store(data).tokenizer
        elif data.tokenizer.endswith(".json") and expanded(data.tokenizer).is_file():
            found = read_tokenizer(data.tokenizer)
        else:
            raise UserError(
                f"the tokenizer {data.tokenizer!r} of {self.directory.path} is not to be found: its "
                f"token store {store} is not there; run this where it is, or prepare it again"
            )
        trained_with = self.result.get("data", {}).get("tokenizer_hash")
        require(
            found.sha256 == trained_with,
            f"{self.directory.path} was trained with another tokenizer than the {found.name} that is "
            f"there now (sha256 {found.sha256[:12]}, trained with {str(trained_with)[:12]})",
        )
        return found


def open_trained(path: str | Path) -> Trained:
    """The run at this path. Raises UserError where there is none, or where it is not done."""
    directory = RunDirectory(as_path(path))
    require(
        directory.config_file.exists(),
        f"{directory.path} is no run: it has no config.json; name the directory of one run, such as "
        "runs/smoke/NAME-DIGEST",
    )
    run, whole = directory.config(), directory.result()
    if whole is None:
        raise UserError(
            f"{directory.path} is not finished ({directory.state()}): it has no result.json; run it "
            "to its end first"
        )
    return Trained(directory, run, whole["result"])


def shapes_of(model: ModelConfig) -> nnx.State:
    """The parameters of a model as abstract arrays."""
    return nnx.split(nnx.eval_shape(lambda: create(model, 0)))[1]


def name_of(path: Any) -> str:
    """The name of a parameter at a path of the tree, such as layers/q_DKGH."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named(parameters: nnx.State) -> dict[str, Any]:
    """The parameters by their names."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {name_of(path): leaf for path, leaf in leaves}
