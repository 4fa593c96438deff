"""The verb that judges a trained model by more than its loss: other contexts, and needles."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from gqa_scaling.cli.shared import Verb, add_json, print_json, print_table, whole
from gqa_scaling.config import NeedleTask, ParallelConfig, RunConfig, require
from gqa_scaling.text import NeedleForm

if TYPE_CHECKING:
    from gqa_scaling.data import TokenStore
    from gqa_scaling.files.runs import RunDirectory
    from gqa_scaling.inference.trained import Trained
    from gqa_scaling.study.judged import Row

_TASK = ("lengths", "depths", "trials", "seed")
PICTURE = "needles.png"  # in the directory of the run


def _add_judge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="directory of a finished run, or EXPERIMENT:NAME of one of its runs")
    add(
        "--contexts",
        type=whole,
        nargs="+",
        metavar="T",
        help="the loss of the same targets with the text cut into these lengths",
    )
    add("--needles", choices=get_args(NeedleForm), help="what is hidden in a text and asked for")
    add(
        "--lengths",
        type=whole,
        nargs="+",
        metavar="T",
        help="of the texts with needles, also beyond the training context (default: that)",
    )
    add("--depths", type=int, help="places of the needle in the text (default: 5)")
    add("--trials", type=int, help="prompts of each length and depth (default: 20)")
    add("--seed", type=int, help="of the needles (default: 0)")
    add("--tokens", type=int, help="most held-out tokens that losses are means over")
    add("--store", help="folder of the tokens (default: those it was trained on)")
    add_json(parser)


def _judge(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.load import named_run

    directory = named_run(args.source, rest, args.root)
    run = _asked(directory.config(), args)

    from gqa_scaling.devices.compilation_cache import keep_compiled
    from gqa_scaling.devices.processes import require_platform
    from gqa_scaling.files.storage import cache_folder
    from gqa_scaling.inference.trained import open_trained

    require_platform()
    keep_compiled(cache_folder() / "compiled")
    trained = open_trained(directory)
    known = trained.result["evaluations"].get(run.evaluation_digest, {})
    if args.store is not None and known.get("hash") != _targets(run):  # it was judged on other text
        known = {}
    if not known or (run.context_length >= 4 and "loss_of_second_reading" not in known):
        _evaluate(trained, run)  # the second also where an earlier version judged it
        trained = open_trained(directory)
    value = trained.result["evaluations"][run.evaluation_digest]

    from gqa_scaling.study.judged import judged_row
    from gqa_scaling.study.report.judged import tables_of_run
    from gqa_scaling.study.report.table import shown

    row = judged_row(run, value)
    picture = _draw(row, directory)
    if args.json:
        print_json({"run": str(directory.path), "evaluation": value, "picture": picture})
        return 0
    print_table(shown(tables_of_run(row), sentence=_sentence(row)))
    print(f"kept in {directory.result_file}" + (f"; the map is {picture}" if picture else ""))
    return 0


def _asked(run: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The run with the evaluation that is asked for.

    A context beyond the longest of its evaluation becomes the longest: losses are then means over a
    multiple of it. Raises UserError for an evaluation that no run can have.
    """
    asked = run.evaluation
    if args.contexts is not None:
        longest = max(run.evaluation_context, *args.contexts)
        asked = replace(asked, contexts=tuple(args.contexts), longest_context=longest)
    task = {"form": args.needles} | {n: getattr(args, n) for n in _TASK}
    task = {name: value for name, value in task.items() if value is not None}
    if task:
        asked = replace(asked, needles=replace(asked.needles or NeedleTask(), **task))
    if args.tokens is not None:
        asked = replace(asked, tokens=args.tokens)
    data = run.data if args.store is None else replace(run.data, store=args.store)
    return replace(run, evaluation=asked, data=data)


def _evaluate(trained: "Trained", run: RunConfig) -> None:
    """Judge it, and have result.json keep that. As many devices as divide a batch share the work,
    whatever it was trained on."""
    import jax

    from gqa_scaling.devices.layout import check_layout
    from gqa_scaling.files.claims import claim
    from gqa_scaling.training.judging import check_evaluation
    from gqa_scaling.training.loop import reevaluate

    store = _store(run)
    store.verify()
    check_evaluation(run, store)
    rows = run.batch_size // run.parallel.accumulation
    devices = jax.devices()[: math.gcd(jax.device_count(), rows, run.model.d_model)]
    parallel = ParallelConfig(fsdp=len(devices), accumulation=run.parallel.accumulation)
    run = replace(run, parallel=parallel)
    check_layout(run, len(devices), jax.default_backend(), devices[0].device_kind)
    with claim(trained.directory.claim_file) as mine:
        require(mine, f"{trained.directory.path} is in use by another process: wait for it to end")
        reevaluate(run, trained.directory, store, devices=devices)


def _store(run: RunConfig) -> "TokenStore":
    """The tokens of the run; for a model that was imported, those of any text in its tokens."""
    from gqa_scaling.data.manifest import read_manifest
    from gqa_scaling.data.store import TokenStore, open_store
    from gqa_scaling.files.storage import as_path

    if not run.imported:
        return open_store(run.data)
    path = as_path(run.data.store_path)
    require(
        (path / "store.json").is_file(),
        f"{run.name} was imported, and there is no token store at {path} to judge it on: make one "
        "with `gqa-scaling prepare EXPERIMENT --data.tokenizer RUN/tokenizer.json --data.store "
        "FOLDER`, and name it with --store FOLDER",
    )
    return TokenStore(path, read_manifest(path))


def _targets(run: RunConfig) -> str:
    """The hash of the evaluation stream in the run's tokens."""
    from gqa_scaling.data.loader import evaluation_hash

    return evaluation_hash(_store(run), run.evaluation.tokens, run.evaluation_context)


def _sentence(row: "Row") -> str:
    gained = row.judged.gained_by_rereading
    again = f"; to read a text again gains {gained:.3f} nats per token" if gained == gained else ""
    return (
        f"{row.name}: {row.loss:.4f} nats per token at {row.context_length:,} tokens, "
        f"{row.judged.bits_per_byte:.4f} bits per byte{again}"
    )


def _draw(row: "Row", directory: "RunDirectory") -> str | None:
    """The map of needles as a PNG file beside the result; None where none were asked for."""
    from gqa_scaling.files.storage import write_atomic
    from gqa_scaling.study.report.loss_pictures import map_of
    from gqa_scaling.study.report.pictures import rendered

    figure = map_of([row])
    if figure is None:
        return None
    path = directory.path / PICTURE
    write_atomic(path, rendered(figure, "png"))
    return str(path)


VERBS: dict[str, Verb] = {
    "judge": (_judge, "the loss by context, and needles found, of a trained model", _add_judge),
}
