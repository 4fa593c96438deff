"""What finished runs say of a run that has none yet: its loss, and where that is expected.

The interval of a run holds the uncertainty of the curve, the noise of one run and the error that
the runs of its size share. Of heads that nobody trained it also holds how far configurations stray
from the law that predicts them (`strays`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from gqa_scaling.config import MOST_TOKENS, RunConfig, UserError, between, require
from gqa_scaling.costs import n_exact, training_tokens
from gqa_scaling.study.build import run_interval
from gqa_scaling.study.candidates import candidates, sizes_of
from gqa_scaling.study.choices import Law
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.points import Interval
from gqa_scaling.study.results import Heads, Results, heads_of, pairs, pattern_of
from gqa_scaling.study.uncertainty import interval

SAME_BUDGET = 1.1  # budgets that differ by less are one
Beyond = Literal["", "sizes", "heads"]
_SIZE = ("n_heads", "n_kv_heads", "n_layers", "d_model")


@dataclass(frozen=True)
class Expected:
    """The loss expected of one size of a configuration, in nats, with the central 90% of a run and of
    its curve.

    `n` is counted as the fit counts. `beyond` says what the size goes beyond: "sizes" outside those
    of its heads' curve, "heads" that no finished run has; "" where it lies among the finished runs.
    """

    heads: Heads
    n: float
    law: Law
    loss: float
    run_interval: Interval
    curve_interval: Interval
    beyond: Beyond


@dataclass(frozen=True)
class Prediction(Expected):
    run: RunConfig

    def to_dict(self) -> dict[str, Any]:
        run = self.run
        low, high = self.run_interval
        return plain(
            {
                "name": run.name,
                "digest": run.digest,
                "evaluation_digest": run.evaluation_digest,
                **{name: getattr(run.model, name) for name in _SIZE},
                "pattern": run.model.pattern.label if run.model.pattern else None,
                "n": self.n,
                "context_length": run.context_length,
                "tokens": training_tokens(run),
                "law": self.law,
                "beyond": self.beyond,
                "predicted_nats": self.loss,
                "low_nats": low,
                "high_nats": high,
                "curve_interval_nats": self.curve_interval,
            }
        )


def predict(
    found: Estimates, results: Results, grid: Sequence[RunConfig], runs: Sequence[RunConfig]
) -> tuple[Prediction, ...]:
    """The loss of each of these runs, from what was estimated from `results`, runs of `grid`.

    Raises UserError for a run that those say nothing of: another corpus, evaluation, head size,
    context length or token budget, or heads that no law across the configurations reaches.
    """
    finished = [run for run in grid if run.name in results.name]
    for run in runs:
        _require_like(run, results, finished)
        own = float(n_exact(run.model)), run.context_length, float(training_tokens(run))
        require_told(run.name, found, results, *own)
    new = sorted({_heads(run) for run in runs} - set(found.fit.heads), key=str)
    among = of_new_heads(found, results, new) if new else found
    return tuple(_of_curve(run, among if _heads(run) in new else found) for run in runs)


def of_new_heads(found: Estimates, results: Results, new: Sequence[Heads]) -> Estimates:
    """The curves of heads that nobody trained, by one law for all and how far heads stray from it."""
    require(
        not any(map(pattern_of, new)),
        f"{results.source}: no finished run attends as {pairs(new)}: train that pattern once",
    )
    how = {k: getattr(found.fit, k) for k in ("refits", "seed", "context_length")}
    return replace(found, fit=candidates(results, new, **how).fit)


def _heads(run: RunConfig) -> Heads:
    return heads_of(run.model.n_heads, run.model.n_kv_heads, run.model.pattern)


def _require_like(run: RunConfig, results: Results, finished: Sequence[RunConfig]) -> None:
    """Refuse a run whose loss is another quantity than that of the finished runs."""
    one = finished[0]
    for what, own, theirs in (
        ("corpus or tokenizer", run.data.declaration(), one.data.declaration()),
        ("evaluation", run.evaluation_digest, one.evaluation_digest),
        ("vocabulary", run.model.vocab_size, one.model.vocab_size),
        ("head size", run.model.head_dim, one.model.head_dim),
        ("tied embeddings", run.model.tie_embeddings, one.model.tie_embeddings),
        ("normalised queries and keys", run.model.qk_norm, one.model.qk_norm),
    ):
        require(
            own == theirs,
            f"{run.name}: its {what} is not that of the finished runs of {results.source}: they say "
            "nothing of its loss",
        )


def require_told(
    label: str,
    found: Estimates,
    results: Results,
    n: float,
    train_context: int | None,
    tokens: float | None,
) -> None:
    """Refuse a context length or a token budget, of training, that the laws do not speak of.

    The model of N parameters is called `label`; None stands for what is not named.
    """
    lengths = found.context.lengths if found.context else (found.fit.context_length,)
    if lengths == (None,):
        lengths = tuple(sorted(set(results.context_length.tolist())))
    require(
        train_context is None or train_context in lengths,
        f"{label}: no finished run has its context length of {train_context or 0:,} tokens, only "
        f"{', '.join(f'{t:,}' if t else 'an unknown one' for t in lengths)}",
    )
    if tokens is None:
        return
    between("tokens", tokens, 1, MOST_TOKENS, "tokens")
    if found.tokens:
        return
    same = results
    if train_context is not None:
        same = results.select(results.context_length == train_context)
    for known, mine in ((same.tokens, tokens), (same.tokens / same.n_params, tokens / n)):
        every = np.r_[known, mine]
        if known.max() > SAME_BUDGET * known.min():
            continue  # this is not what the finished runs have in common
        if every.max() <= SAME_BUDGET * every.min():
            return
        theirs = f"{known.min():,.4g} to {known.max():,.4g}"
        said = theirs if np.isfinite(known).all() else "which do not all say theirs"
        raise UserError(
            f"{label}: it trains on {tokens:,.0f} tokens, which is not the budget of the finished runs "
            f"({said}): what it loses by that is not known"
        )


def _of_curve(run: RunConfig, found: Estimates) -> Prediction:
    size = _heads(run), float(n_exact(run.model))
    return Prediction(
        **vars(expected(found, *size, run.context_length, float(training_tokens(run)))), run=run
    )


def expected(
    found: Estimates,
    heads: Heads,
    n: float,
    train_context: int | None = None,
    tokens: float | None = None,
) -> Expected:
    """The loss at N = n, counted as the fit counts, on the curve of these heads, which it must have.

    `train_context` and `tokens` are those of training, which the runs must speak of (`require_told`): by
    default those that the curves are shown at. Raises UserError for heads without a curve.
    """
    fitted = found.fit
    k = fitted.index(heads)
    best, draws = fitted.curves.loss(k, n), fitted.draws.loss(k, n)
    if found.context and train_context is not None:
        at = found.context.lengths.index(train_context)
        best = best + found.context.delta[at]
        draws = draws + found.context.delta_draws[:, at]
    if found.tokens and tokens is not None:
        best = found.tokens.best.loss(k, n, tokens)[0]
        draws = found.tokens.draws.loss(k, n, tokens)
    low, high = sizes_of(fitted, k)
    known = (fitted.points.curve == k).any()
    return Expected(
        heads=heads,
        n=n,
        law=fitted.law,
        loss=float(best),
        run_interval=run_interval(fitted, draws),
        curve_interval=interval(draws),
        beyond="heads" if not known else "" if low <= n <= high else "sizes",
    )
