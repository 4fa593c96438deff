"""Loss over parameters and training tokens: L(N, D; H) = E + (a/N)^b + B D^-beta.

a and b are each configuration's own, E, B and beta are shared: the additive form of Hoffmann et
al. 2022 (their approach 3) with the curves of Chen et al. 2025, section 4.1. It needs token budgets
that vary at a fixed size, and is what aligns configurations by training FLOPs (see `equal_training`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import require
from gqa_scaling.study.curves import Curves, centred
from gqa_scaling.study.fit import brought, fit_model
from gqa_scaling.study.fitted import Fit, flagged, plain
from gqa_scaling.study.models import SeparateCurves
from gqa_scaling.study.points import Interval, Points, cells, labels, ranks
from gqa_scaling.study.results import Heads, Results, flags
from gqa_scaling.study.uncertainty import interval
from gqa_scaling.units import quantity

FORMULA = "(a/N)^b + E + B D^-beta; E, B and beta shared"
_MIN_BUDGETS = 3
_MIN_VARIATION = 0.1  # standard deviation of ln D around what N says of it
_MAX_CONDITION = 1e5
_BETAS = np.r_[0.02, 0.06, np.linspace(0.1, 1.0, 10)]  # tried for the start of a search


def spans_budgets(results: Results) -> bool:
    """Whether some size of a configuration was trained on several token budgets."""
    r = results
    budgets: dict[tuple, float] = {}
    keys = zip(r.heads, r.n_params, r.n_layers, r.d_model, r.context_length, strict=True)
    for key, tokens in zip(keys, r.tokens.tolist(), strict=True):
        if tokens == tokens and abs(budgets.setdefault(key, tokens) / tokens - 1) > 0.01:
            return True
    return False


class OverTokens(SeparateCurves):
    """Curves that share E and a data term exp(v - beta (ln D - mean ln D))."""

    def __init__(self, p: Points) -> None:
        self.token_centre = float(np.log(p.tokens).mean())
        self.z = np.log(p.tokens) - self.token_centre
        super().__init__(p, others={"v": np.ones_like(self.z), "beta": -self.z})

    def shared_terms(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for beta in _BETAS:
            row = np.zeros(len(self.names))
            row[2] = beta
            yield np.stack([np.ones_like(self.z), np.exp(-beta * self.z)], 1), row

    def set_shared_terms(self, row: np.ndarray, terms: np.ndarray) -> None:
        row[0], row[1] = terms[0], np.log(max(terms[1], 1e-4))

    def surface(self, rows: np.ndarray) -> "Surface":
        return Surface(self.curves(rows), rows[:, 1], rows[:, 2], self.token_centre)


@dataclass(frozen=True)
class Surface:
    """L(N, D; H) in nats for many sets of parameters at once, each a row: the best or the draws.

    The `curves` and, beside them, exp(v - beta (ln D - token_centre)); `v` and `beta` are (rows,).
    """

    curves: Curves
    v: np.ndarray
    beta: np.ndarray
    token_centre: float

    def data(self, tokens: np.ndarray | float) -> np.ndarray:
        """B D^-beta in nats for tokens of shape (), (rows,) or (rows, more)."""
        v, beta = self._like(tokens, self.v), self._like(tokens, self.beta)
        return np.exp(v - beta * (np.log(tokens) - self.token_centre))

    def loss(self, k: int, n: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Loss of configuration k; n and tokens of shape (), (rows,) or (rows, more), alike."""
        c = self.curves
        floor, u, b = (self._like(tokens, p) for p in (c.floor, c.u[:, k], c.b[:, k]))
        with np.errstate(over="ignore"):
            return centred(n, u, b, floor, c.centre[k]) + self.data(tokens)

    def _like(self, value: np.ndarray | float, parameter: np.ndarray) -> np.ndarray:
        return parameter[:, None] if np.ndim(value) == 2 else parameter

    def first(self, other: "Surface") -> "Surface":
        """The rows of this one, then those of the other."""
        v, beta = np.r_[self.v, other.v], np.r_[self.beta, other.beta]
        return Surface(self.curves.then(other.curves), v, beta, self.token_centre)


@dataclass(frozen=True)
class TokenLaw:
    """The fitted surface, its draws, and the curves at one token budget.

    `best` has one row, `draws` one for each refit. `fit` holds the curves at `at_tokens`, with
    every run brought there by the law. `tokens` are the budgets of the points of `fit`;
    `condition` is the condition number of the scaled Jacobian and `variation` the standard
    deviation of ln D around what N says of it. `flags` are those of the law itself: the flags of
    `fit` but for the budget that its curves are shown at.
    """

    fit: Fit
    best: Surface
    draws: Surface
    at_tokens: float
    tokens: np.ndarray
    condition: float
    variation: float
    flags: tuple[str, ...]

    @property
    def heads(self) -> tuple[Heads, ...]:
        return self.fit.heads

    @property
    def range_tokens(self) -> Interval:
        """The least and the largest token budget of the runs."""
        return float(self.tokens.min()), float(self.tokens.max())

    @property
    def floor(self) -> tuple[float, Interval]:
        """E, the loss of endless parameters and tokens, in nats."""
        return float(self.best.curves.floor[0]), interval(self.draws.curves.floor)

    @property
    def beta(self) -> tuple[float, Interval]:
        return float(self.best.beta[0]), interval(self.draws.beta)

    @property
    def scale(self) -> float:
        """B of B D^-beta, in nats times tokens^beta."""
        b = self.best
        with np.errstate(over="ignore"):
            return float(np.exp(b.v[0] + b.beta[0] * b.token_centre))

    def term(self, tokens: float) -> tuple[float, Interval]:
        """B D^-beta at a budget, in nats, with its interval."""
        return float(self.best.data(tokens)[0]), interval(self.draws.data(tokens))

    def to_dict(self) -> dict[str, Any]:
        low, high = self.range_tokens
        ends = {f"{d:.6g}": dict(zip(("nats", "interval_nats"), self.term(d))) for d in (low, high)}  # noqa: B905
        return plain(
            {
                "formula": FORMULA,
                "E_nats": self.floor[0],
                "E_interval_nats": self.floor[1],
                "B_nats_tokens_to_beta": self.scale,
                "beta": self.beta[0],
                "beta_interval": self.beta[1],
                "tokens_range": self.range_tokens,
                "token_term_at": ends,
                "curves_at_tokens": self.at_tokens,
                "condition": self.condition,
                "variation_of_ln_tokens": self.variation,
                "intervals": self.fit.how,
            }
        )


def token_law(
    results: Results,
    *,
    at_tokens: float | None = None,
    refits: int = 1000,
    seed: int = 0,
) -> TokenLaw:
    """Fit L(N, D; H) to runs of one context length and bootstrap it.

    `at_tokens` is the budget that `fit` shows the curves at, by default the geometric mean of the
    runs' budgets, where they are known best. Raises UserError when runs differ in context length
    or do not say their tokens, when fewer than three budgets are there, when D follows from N, or
    when the runs do not determine every parameter.
    """
    r = results
    length = r.only(
        "context_length",
        "runs at context lengths {} cannot share a token law; name one with --context",
    )
    unknown = r.name[~np.isfinite(r.tokens)]
    require(
        not len(unknown),
        f"{r.source}: {unknown[0] if len(unknown) else ''} does not say its training tokens; fill in "
        "column tokens or tokens_per_param",
    )
    p = cells(r, 3, over=("tokens",))
    budgets = np.unique(np.round(np.log(p.tokens), 2))
    require(
        len(budgets) >= _MIN_BUDGETS,
        f"{r.source}: {len(budgets)} token budgets cannot tell the shape of a power of D; a token "
        f"law needs {_MIN_BUDGETS}",
    )
    variation = _variation(p)
    require(
        variation >= _MIN_VARIATION,
        f"{r.source}: training tokens follow from the size (ln D varies by {variation:.2g} around "
        f"what N says of it, a token law needs {_MIN_VARIATION:g}); train some sizes on two or more "
        "token budgets",
    )
    model = OverTokens(p)
    budget = ranks(p.tokens, labels(p.curve, p.n))  # of a size, as budgets may follow N
    fitted = fit_model(
        r,
        p,
        model,
        (p.size, labels(p.size, budget)),
        title="the token law",
        refits=refits,
        seed=seed,
        context_length=length or None,
    )
    jacobian = np.sqrt(p.replicates)[:, None] * model.jacobian(fitted.parameters[None])[0]
    condition = float(np.linalg.cond(jacobian / np.linalg.norm(jacobian, axis=0)))
    require(
        condition <= _MAX_CONDITION,
        f"{r.source}: these runs do not tell what size does from what data does (condition number "
        f"{condition:.2g} of the scaled Jacobian, above {_MAX_CONDITION:g}); train some sizes on "
        "budgets further apart",
    )
    at = float(np.exp(model.token_centre)) if at_tokens is None else float(at_tokens)
    require(np.isfinite(at) and at > 0, f"at_tokens={at} must be greater than 0")
    best, draws = (model.surface(v) for v in (fitted.parameters[None], fitted.parameter_draws))
    more = float(best.data(at)[0])
    fitted = brought(fitted, model, best.data(p.tokens[None])[0] - more, (more, draws.data(at)))
    first, last = p.tokens.min(), p.tokens.max()
    shown = (
        f"the runs span {quantity(first)} to {quantity(last)} training tokens: curves and losses are "
        f"those at D = {quantity(at)} tokens whatever N is, every run brought there by the law"
    )
    known = [*flags(r), shown]
    if not first <= at <= last:
        known.append(f"D = {quantity(at)} tokens lies outside the budgets that were trained")
    if best.beta[0] <= 0:
        known.append("loss does not fall with training tokens")
    fitted = flagged(fitted, known)
    own = tuple(flag for flag in fitted.flags if flag != shown)
    return TokenLaw(fitted, best, draws, at, p.tokens, condition, variation, own)


def _variation(p: Points) -> float:
    """Standard deviation of ln D around a line in ln N, each configuration with a line of its own."""
    z, group = np.log(p.tokens), np.eye(len(p.heads))[p.curve]
    x = np.log(p.n) - p.centre[p.curve]
    columns = np.hstack([group, group * x[:, None]])
    fitted, *_ = np.linalg.lstsq(columns, z)
    return float(np.std(z - columns @ fitted))
