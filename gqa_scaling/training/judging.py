"""Everything that a trained model is judged by: its loss, and what else the run asks for.

Each further part is kept in judged.json as soon as it is known: an evaluation that was interrupted
goes on from there, and a later one computes only what is new.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gqa_scaling.data import TokenStore
from gqa_scaling.devices import processes
from gqa_scaling.fields import digest_of
from gqa_scaling.files.runs import RunDirectory, read_json
from gqa_scaling.files.storage import write_json
from gqa_scaling.training.averaging import averaged_steps
from gqa_scaling.training.evaluation import Evaluation, Found, evaluator
from gqa_scaling.training.needles import needle_accuracy
from gqa_scaling.training.setup import Setup


def judge(
    setup: Setup,
    store: TokenStore,
    directory: RunDirectory,
    evaluate: Callable[[Any], Evaluation],
    parameters: Any,
) -> Evaluation:
    """Everything that the run's evaluation asks for, of these parameters.

    `evaluate` gives the loss. Called by every process of a job.
    """
    run, asked = setup.run, setup.run.evaluation
    value, kept = evaluate(parameters), _Kept(directory)
    same = {"averaged": averaged_steps(run)}
    losses = {}
    for context in asked.contexts:
        what = {"loss at": context, "tokens": asked.tokens, "of": run.evaluation_context, **same}

        def loss(context: int = context) -> float:
            return evaluator(setup, store, context)(parameters).loss

        losses[str(context)] = kept.value(what, loss)
    task = asked.needles
    if task is None:
        return replace(value, loss_by_context=losses or None)
    accuracy = {}
    for length in task.lengths or (run.context_length,):
        what = {"needles at": length, **task.to_dict(), **same}
        del what["lengths"]

        def answered(length: int = length) -> list[float]:
            return needle_accuracy(setup, store, task, length, parameters)

        accuracy[str(length)] = kept.value(what, answered)
    found = Found(task.form, task.trials, task.places, accuracy)
    return replace(value, loss_by_context=losses or None, needles=found)


class _Kept:
    """Parts of evaluations of one run, in its judged.json."""

    def __init__(self, directory: RunDirectory) -> None:
        self.file = directory.judged_file
        self.parts = read_json(self.file) if self.file.exists() else {}

    def value(self, what: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The value of the part, computed where it is not known yet."""
        key = digest_of(what)
        if key not in self.parts:
            self.parts[key] = {"what": what, "value": compute()}
            if processes.is_leader():
                write_json(self.file, self.parts)
        return self.parts[key]["value"]
