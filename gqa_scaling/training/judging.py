"""Everything that a trained model is judged by: its loss, and what else the run asks for.

Each further part is kept in judged.json as soon as it is known: an evaluation that was interrupted
goes on from there, and a later one computes only what is new.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gqa_scaling.config import RunConfig
from gqa_scaling.data import TokenStore
from gqa_scaling.data.loader import heldout_chunks
from gqa_scaling.data.needles import needle_prompt
from gqa_scaling.devices import processes
from gqa_scaling.fields import digest_of
from gqa_scaling.files.runs import RunDirectory, read_json
from gqa_scaling.files.storage import write_json
from gqa_scaling.inference.generate import Decoder
from gqa_scaling.inference.needles import needles_found
from gqa_scaling.inference.trained import load_decoder, open_trained
from gqa_scaling.training.averaging import averaged_steps
from gqa_scaling.training.evaluation import Evaluation, Found, evaluator
from gqa_scaling.training.monitor import NonFiniteLoss
from gqa_scaling.training.setup import Setup


def check_evaluation(run: RunConfig, store: TokenStore) -> None:
    """Raise UserError where the store has too little held-out text to judge the run as it asks."""
    asked = run.evaluation
    heldout_chunks(store, run.context_length, asked.tokens, run.evaluation_context)
    if asked.needles is not None:
        for length in asked.needles.lengths or (run.context_length,):
            needle_prompt(store, length, 0.0, asked.needles.form, asked.needles.seed, 0)


def judge(
    setup: Setup,
    store: TokenStore,
    directory: RunDirectory,
    evaluate: Callable[[Any], Evaluation],
    parameters: Any,
) -> Evaluation:
    """Everything that the run's evaluation asks for, of these parameters.

    `evaluate` gives the loss. Called by every process of a job. Raises NonFiniteLoss for a loss that
    is no number.
    """
    run, asked = setup.run, setup.run.evaluation

    def whole() -> dict[str, Any]:
        value = evaluate(parameters)
        if not math.isfinite(value.loss):
            raise NonFiniteLoss(f"evaluation loss {value.loss} after the last step")
        return value.to_dict()

    if not asked.contexts and asked.needles is None:
        return Evaluation(**whole())
    # a model that was imported may be judged on one text after another
    kept = _Kept(directory, {"text": store.hash} if run.imported else {})
    same = {"tokens": asked.tokens, "of": run.evaluation_context, "averaged": averaged_steps(run)}
    own = {"loss at": "its own context", "read": "twice", **same}
    value = Evaluation(**kept.value(own, whole))
    losses = {}
    for context in asked.contexts:
        what = {"loss at": context, **same}

        def loss(context: int = context) -> float:
            return evaluator(setup, store, context)(parameters).loss

        losses[str(context)] = kept.value(what, loss)
    return replace(
        value,
        loss_by_context=losses or None,
        needles=_needles(run, store, directory, kept) if asked.needles else None,
    )


def _needles(run: RunConfig, store: TokenStore, directory: RunDirectory, kept: "_Kept") -> Found:
    """Needles found, by decoding: the parameters that are judged are read anew, laid out for it."""
    task, averaged = run.evaluation.needles, averaged_steps(run)
    assert task is not None
    saved = directory.averaged(run) if averaged else directory.parameters
    first = open_trained(directory).first_token if run.imported else None

    @functools.cache
    def decoder() -> Decoder:
        return load_decoder(saved, run.model, store.vocab_size)

    def share(length: int, depth: float) -> float:
        prompts = {"form": task.form, "trials": task.trials, "seed": task.seed}
        what = {"needles at": length, "depth": depth, "averaged": averaged, **prompts}
        tokens = run.batch_tokens // run.parallel.accumulation
        return kept.value(
            what, lambda: needles_found(decoder(), store, task, length, depth, tokens, first)
        )

    accuracy = {
        str(length): [share(length, depth) for depth in task.places]
        for length in task.lengths or (run.context_length,)
    }
    return Found(task.form, task.trials, task.places, accuracy)


class _Kept:
    """Parts of evaluations of one run, in its judged.json, and what is common to those asked for."""

    def __init__(self, directory: RunDirectory, common: dict[str, Any]) -> None:
        self.file, self.common = directory.judged_file, common
        self.parts = read_json(self.file) if self.file.exists() else {}

    def value(self, what: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The value of the part, computed where it is not known yet."""
        what = what | self.common
        key = digest_of(what)
        if key not in self.parts:
            self.parts[key] = {"what": what, "value": compute()}
            if processes.is_leader():
                write_json(self.file, self.parts)
        return self.parts[key]["value"]
