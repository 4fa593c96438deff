"""The estimate that finished runs allow: one curve each, the context law or the token law."""

from dataclasses import dataclass
from typing import Any

from gqa_scaling.config import MOST_CONTEXT, MOST_TOKENS, between, require
from gqa_scaling.study.choices import Law
from gqa_scaling.study.context import ContextLaw, context_law, spans_contexts
from gqa_scaling.study.fit import fit
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.flatness import FLAT_FROM, Flatness, flatness
from gqa_scaling.study.results import Results
from gqa_scaling.study.tokens import TokenLaw, spans_budgets, token_law
from gqa_scaling.study.uncertainty import REFITS


@dataclass(frozen=True)
class Estimates:
    """The curves as a `Fit`, and the law and test behind them where runs span more than size."""

    fit: Fit
    context: ContextLaw | None = None
    tokens: TokenLaw | None = None
    flatness: Flatness | None = None

    def to_dict(self) -> dict[str, Any]:
        parts = {
            "context_law": self.context,
            "token_law": self.tokens,
            "flatness": self.flatness,
        }
        return {k: v.to_dict() for k, v in parts.items() if v is not None}


def estimate(
    results: Results,
    *,
    context_length: int | None = None,
    law: Law = "separate",
    refits: int = 1000,
    seed: int = 0,
    flat_from: int = FLAT_FROM,
    at_tokens: float | None = None,
) -> Estimates:
    """Fit what the runs allow, all of them or those of `context_length`.

    Runs of one context length and one budget for each size give `fit`; several lengths give
    `context_law`, several budgets for a size `token_law`, whose curves are shown at `at_tokens`.
    Runs of several lengths are tested for `flatness` from `flat_from` tokens on, also when one is
    named. Raises UserError as those do, and when a joint law is asked of the wide laws.
    """
    between("refits", refits, *REFITS)
    between("flat_from", flat_from, 1, MOST_CONTEXT, "tokens")
    if at_tokens is not None:
        between("at_tokens", at_tokens, 1, MOST_TOKENS, "tokens")
    r = results
    require(
        not r.mixed,
        f"{r.source}: the runs mix architectures ({r.mixed}); fit one architecture at a time, as with "
        "--without",
    )
    chosen = r if context_length is None else r.select(r.context_length == context_length)
    wide = spans_contexts(chosen) or spans_budgets(chosen)
    require(
        not wide or law == "separate",
        f"{r.source}: law={law!r} takes runs of one context length and one token budget for each "
        "size; use law 'separate'"
        + (", or name one length with --context" if spans_contexts(chosen) else ""),
    )
    over_tokens = wide and not spans_contexts(chosen)
    require(
        at_tokens is None or over_tokens,
        f"{r.source}: a budget to show the curves at needs runs with several token budgets for a "
        "size and one context length; leave --at-tokens out",
    )
    tested = flatness(r, flat_from, seed=seed) if spans_contexts(r) else None
    contexts = tokens = None
    refitting: dict[str, Any] = {"refits": refits, "seed": seed}
    if over_tokens:
        tokens = token_law(chosen, at_tokens=at_tokens, **refitting)
        found = tokens.fit
    elif wide:
        contexts = context_law(r, **refitting)
        found = contexts.fit
    else:
        found = fit(r, context_length=context_length, law=law, **refitting)
    return Estimates(found, contexts, tokens, tested)
