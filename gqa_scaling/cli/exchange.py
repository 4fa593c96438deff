"""The verbs that let models out and in: export, import, harness."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gqa_scaling.cli.shared import Verb, nothing_left
from gqa_scaling.config import require
from gqa_scaling.units import byte_size, count

if TYPE_CHECKING:
    from pathlib import Path


def _on_the_host() -> None:
    """Have jax keep parameters in the memory of this machine: they only pass through."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _folder(text: str) -> "Path":
    """The path of a folder of this machine. Raises UserError for one in a bucket."""
    from gqa_scaling.files.storage import as_path, is_remote

    require(not is_remote(text), f"{text} must be a folder of this machine")
    return as_path(text)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="EXPERIMENT:NAME, or the directory of a finished run")
    parser.add_argument("output", help="folder to write; an earlier export there is replaced")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default: float32, as they were trained)",
    )


def _export(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.load import named_run
    from gqa_scaling.inference.hugging_face_export import export
    from gqa_scaling.inference.trained import open_trained

    _on_the_host()
    done = export(
        open_trained(named_run(args.run, rest, args.root)), _folder(args.output), args.dtype
    )
    print(
        f"{done.path}: {done.architecture}, {byte_size(done.weight_bytes)} of {args.dtype} weights "
        f"in {count(done.files, 'file')}"
    )
    for note in done.notes:
        print(f"note: {note}")
    return 0


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", help="a Llama, Mistral or Qwen3 model: config.json, *.safetensors, tokenizer.json"
    )
    parser.add_argument("name", help="of the run that it becomes")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="that it computes in (default: that of its weights)",
    )


def _import(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling import costs
    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.inference.hugging_face_import import import_folder

    nothing_left(rest)
    _on_the_host()
    root = runs_root(args.root)
    directory, new = import_folder(_folder(args.folder), args.name, root, args.dtype)
    model = directory.config().model
    print(
        f"{directory.path}: {costs.parameters(model).total:,} parameters, {model.n_heads} query and "
        f"{model.n_kv_heads} KV heads of {model.head_dim}{'' if new else ', imported before'}"
    )
    return 0


def _add_harness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        help="EXPERIMENT:NAME, or the directory of a finished run; all that follows is lm-eval's own",
    )


def _harness(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """lm-eval's own command, which knows the run as a model."""
    from gqa_scaling.experiment.load import named_run

    directory = named_run(args.run, [], args.root)
    require(
        importlib.util.find_spec("lm_eval") is not None,
        "the evaluation harness is not installed: pip install 'gqa-scaling[harness]'",
    )
    from gqa_scaling.inference.trained import open_trained

    open_trained(directory)  # refused before lm-eval loads anything
    from lm_eval.__main__ import cli_evaluate

    from gqa_scaling.inference.harness import NAME

    model = json.dumps({"run": str(directory.path)})
    sys.argv = ["lm-eval", "run", "--model", NAME, "--model_args", model, *rest]
    cli_evaluate()
    return 0


VERBS: dict[str, Verb] = {
    "export": (_export, "write a trained model as a Hugging Face folder", _add_export),
    "harness": (_harness, "run lm-eval's tasks on a trained model", _add_harness),
    "import": (_import, "make a run of a Llama, Mistral or Qwen3 folder", _add_import),
}
