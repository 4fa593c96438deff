"""From an answer to its training: the command for each model, and what runs trained since say."""

import fnmatch
import shlex
from collections.abc import Sequence
from dataclasses import replace

from gqa_scaling.config import RunConfig
from gqa_scaling.experiment.follow_ups import find_follow_ups, follow_up
from gqa_scaling.experiment.overrides import overrides_to
from gqa_scaling.files.runs import evaluation_in, run_directory
from gqa_scaling.study.build import Check, Model, check_runs
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.frontier import Frontier
from gqa_scaling.study.reading import from_runs
from gqa_scaling.study.source import Source


def with_training(
    answer: Frontier, source: Source, found: Estimates, options: Sequence[str] = (), *, fit: Fit
) -> Frontier:
    """The answer with the command that trains each model, and the runs that can check it.

    `options` end the commands; `fit` has the curves of all that is ranked. Without an experiment the answer stays as it is: nothing is known of
    how others' runs were trained.
    """
    if source.experiment is None or source.root is None:
        return answer
    results, name, root = source.results, source.experiment.name, source.root
    context = found.fit.trained_at(results)
    tokens = round(found.tokens.at_tokens) if found.tokens else None
    runs = [run for run in source.grid if run.context_length == context]
    finished = {run.digest: run.name for run in runs if run.name in results.name}

    def with_command(model: Model) -> Model:
        run = follow_up(runs, model.config, tokens)
        command = training_command(source, overrides_to(source.grid, run), options)
        return replace(model, command=command, trained=finished.get(run.digest, ""))

    checks: list[Check] = []
    for run in find_follow_ups(root, name, runs):
        whole = run_directory(root, name, run).result()
        if tokens in (None, run.tokens) and evaluation_in(whole, run.evaluation_digest):
            one = from_runs(root, name, [run])
            if all(getattr(one, k)[0] == getattr(results, k)[0] for k in ("evaluation", "corpus")):
                checks += check_runs(fit, one)
    answers = tuple(
        replace(each, model=each.model and with_command(each.model)) for each in answer.answers
    )
    return replace(answer, answers=answers, checks=tuple(checks))


def training_command(
    source: Source, arguments: Sequence[str], options: Sequence[str] = (), forecast: bool = True
) -> str:
    """The command that trains what these arguments make of the source's experiment.

    With `forecast` it first seals one, from the runs of the source that are finished then. `options`
    end it.
    """
    first = ["--forecast", shlex.join([source.name, *source.overrides])] if forecast else []
    named = ["gqa-scaling", "run", source.name, *source.overrides]
    return shell_command([*named, *arguments, *first, *options])


def command_of(
    source: Source, run: RunConfig | None, options: Sequence[str] = (), forecast: bool = True
) -> str:
    """The command that trains this run of a source's experiment; "" where there is none."""
    if run is None:
        return ""
    alike = [r for r in source.grid if fnmatch.fnmatch(r.name, run.name) or run.name in r.name]
    fields = ["--only", run.name] if alike == [run] else overrides_to(source.grid, run)
    return training_command(source, fields, options, forecast)


def shell_command(words: Sequence[str], width: int = 78) -> str:
    """The command in lines that a shell takes as one, none broken inside an argument."""
    starts = [i for i, word in enumerate(words) if i and word.startswith("--")]
    ends = [*starts, len(words)]
    parts = [shlex.join(words[a:b]) for a, b in zip([0, *starts], ends, strict=True)]
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) > width:
            lines.append(f"   {part}")
        else:
            lines[-1] += f" {part}"
    return " \\\n".join(lines)
