"""Follow-up runs: one more model, trained as the runs of a grid were trained.

A study answers with a model that its grid does not hold. `follow_up` is the run that trains it,
`find_follow_ups` those that have been trained since.
"""

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gqa_scaling.config import DIGEST_LENGTH, ModelConfig, RunConfig, UserError
from gqa_scaling.costs import n_exact, n_formula
from gqa_scaling.files.runs import RunDirectory


def follow_up(
    runs: Sequence[RunConfig], model: ModelConfig, tokens: int | None = None
) -> RunConfig:
    """The run that trains `model` as the grid's runs were trained.

    Data, batch, context length, evaluation and learning rate are those of the run nearest in size,
    counted at the model's heads. Of several, those with its heads, its pattern and the least seed
    come first. Without `tokens`, a budget that all runs share stays as it is, and budgets that grow
    with the model keep their tokens per parameter. The name says what is trained, the note whose
    learning rate it has.
    """

    def size(m: ModelConfig) -> float:
        heads = model.n_heads, model.n_kv_heads, model.head_dim
        return math.log(n_formula(m.n_layers, m.d_model, *heads))

    def distance(run: RunConfig) -> tuple[float, bool, bool, int]:
        m = run.model
        other = (m.n_heads, m.n_kv_heads) != (model.n_heads, model.n_kv_heads)
        return abs(size(m) - size(model)), other, m.pattern != model.pattern, run.seed

    near = min(runs, key=distance)
    ratio = None if tokens else near.tokens_per_param
    if not tokens and near.tokens is not None:
        if len({run.tokens for run in runs}) == 1:
            tokens = near.tokens
        else:
            ratio = near.tokens / n_exact(near.model)
    name = f"built-L{model.n_layers}-d{model.d_model}-h{model.n_heads}-kv{model.n_kv_heads}"
    if model.pattern:
        name += "-" + re.sub(r"[^a-zA-Z0-9]+", "-", model.pattern.label)
    return replace(
        near,
        name=name,
        model=model,
        tokens=tokens,
        tokens_per_param=ratio,
        note=f"learning rate {near.optimizer.learning_rate:g} of {near.name}",
    )


def find_follow_ups(root: Path, experiment: str, runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs in the experiment's folder that `follow_up` gives for these runs, none of them.

    They were trained as the grid was, so a study's predictions can be checked by them.
    """
    own, found = {run.digest for run in runs}, []
    for file in sorted((root / experiment).glob("*/config.json")):
        if file.parent.name[-DIGEST_LENGTH:] in own:  # hundreds of them, and not worth reading
            continue
        with contextlib.suppress(UserError):  # what another version declared is not understood
            run = RunDirectory(file.parent).config()
            alike = [r for r in runs if r.context_length == run.context_length]
            if not alike:
                continue
            several_budgets = len({(r.model, r.seed) for r in alike}) < len(alike)
            made = follow_up(alike, run.model, run.tokens if several_budgets else None)
            if made.digest == run.digest:
                found.append(replace(made, name=run.name))
    return found
