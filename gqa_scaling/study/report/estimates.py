"""The tables of what was estimated: curves, laws over contexts and tokens, and their comparison."""

from collections.abc import Callable, Sequence

from gqa_scaling.study import context, tokens
from gqa_scaling.study.compare import Score
from gqa_scaling.study.context import ContextLaw
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.flatness import Flatness
from gqa_scaling.study.heads import HeadLaw
from gqa_scaling.study.misfit import POWER, Misfit
from gqa_scaling.study.report.table import INTERVAL, Column, Table, percent, span
from gqa_scaling.study.results import pair
from gqa_scaling.study.tokens import TokenLaw
from gqa_scaling.study.uncertainty import LEVEL, interval
from gqa_scaling.units import count, quantity

_MEANING = {
    "p - q": ": how much more of ln(L - E) doubling query heads gains than doubling KV heads"
}


def law_tables(found: Estimates) -> list[Table]:
    """The curves and whatever law and test stand behind them."""
    out = [] if found.tokens else [fit_table(found.fit)]
    return out + wide_law_tables(found)


def wide_law_tables(found: Estimates) -> list[Table]:
    """What runs tell that span several context lengths or token budgets; none where they do not."""
    return [
        *([token_table(found.tokens)] if found.tokens else []),
        *([context_table(found.context)] if found.context else []),
        *([flatness_table(found.flatness)] if found.flatness else []),
    ]


def fit_table(fit: Fit) -> Table:
    constants = [
        f"{name} = {value:.4f}, {INTERVAL} {span(ends, '.4f')}{_MEANING.get(name, '')}"
        for name, (value, ends) in fit.constants.items()
        if name != "E"
    ]
    return Table(
        f"Law {fit.law}: L = {fit.formula}",
        [
            *_curve_columns(
                fit, Column("sizes", lambda k: str(len({*fit.points.n[fit.points.curve == k]})))
            ),
            Column("R²", lambda k: f"{fit.r2_by_curve[k]:.5f}"),
        ],
        range(len(fit.heads)),
        (
            f"{fit.source}: {count(len(fit.points.n), 'point')}, N is {fit.count} without embeddings",
            f"E = {fit.floor:.4f} nats, {INTERVAL} {span(fit.floor_interval)}",
            *constants,
            _solution(fit),
            _noise(fit, "curves"),
            *_misfit(fit.misfit),
            f"Intervals: {fit.how}",
        ),
    )


def token_table(law: TokenLaw) -> Table:
    fit, (low, high) = law.fit, law.range_tokens
    (floor, floor_ends), (beta, beta_ends) = law.floor, law.beta
    terms = " and ".join(
        f"{value:.3f} at D = {quantity(d)} ({span(ends)})"
        for d, (value, ends) in ((d, law.term(d)) for d in (low, high))
    )
    return Table(
        f"Token law: L = {tokens.FORMULA}",
        _curve_columns(fit, Column("points", lambda k: str(int((fit.points.curve == k).sum())))),
        range(len(fit.heads)),
        (
            f"{fit.source}: {count(len(fit.points.n), 'point')}, N is {fit.count} without embeddings, D from "
            f"{quantity(low)} to {quantity(high)} training tokens",
            f"E = {floor:.4f} nats, {INTERVAL} {span(floor_ends)}",
            f"beta = {beta:.4f}, {INTERVAL} {span(beta_ends, '.4f')}; B = "
            f"{law.scale:.4g} nats tokens^beta",
            f"B D^-beta, nats with {LEVEL:.0%} intervals: {terms}",
            f"{_solution(fit)}, condition {law.condition:.0f}",
            _noise(fit, "law"),
            *_misfit(fit.misfit),
            f"Intervals: {fit.how}",
        ),
    )


def _curve_columns(fit: Fit, size: Column) -> list[Column]:
    """What is said of curve k; the column after its name says how large it is."""
    low, high = interval(fit.draws.b)
    a = "a" if fit.law == "separate" else "a of N_b"
    return [
        Column("heads, KV", lambda k: pair(fit.heads[k])),
        size,
        Column("N", lambda k: " - ".join(map(quantity, fit.points.range_n(k))), "parameters"),
        Column(a, lambda k: quantity(float(fit.scale[k])), "parameters"),
        Column("b", lambda k: f"{fit.curves.b[k]:.4f}"),
        Column(f"b,\n{INTERVAL}", lambda k: span((low[k], high[k]), ".4f")),
    ]


def _solution(fit: Fit) -> str:
    return (
        f"R² = {fit.r2:.5f} over all points; {'converged' if fit.converged else 'NOT converged'}, "
        f"Jacobian rank {fit.rank} of {fit.n_parameters}"
    )


def _noise(fit: Fit, law: str) -> str:
    said = [f"Noise: {1e3 * fit.sigma:.2f} millinats around the {law}"]
    if fit.points.noise is not None:
        said.append(
            f"{1e3 * fit.points.noise:.2f} between replicate seeds ({fit.points.noise_dof} degrees of "
            "freedom)"
        )
    if fit.shared.shared is not None:
        said.append(
            f"shared by a size: {1e3 * fit.shared.shared:.2f} (p = {fit.shared.p_value:.2f})"
        )
    return "; ".join(said)


def _misfit(found: Misfit) -> list[str]:
    out = []
    if found.found is not None:
        out.append(
            f"A further c ln N: c = {found.bend:+.3f} nats, p = {found.p_value:.2f}; would be found "
            f"{POWER:.0%} of the time: {found.found:.2g}, {1e3 * (found.found_rms or 0):.2f} millinats "
            "off the curves"
        )
    if found.replicate_p_value is not None:
        out.append(
            f"Misses against seeds: p = {found.replicate_p_value:.2f}; would be found {POWER:.0%} of "
            f"the time: {1e3 * (found.replicate_found or 0):.2f} millinats off the curves"
        )
    return out


def residual_table(fit: Fit, most: int = 8) -> Table:
    p = fit.points
    return Table(
        f"Points that move E most (of {len(p.n)})",
        [
            Column("run", lambda i: str(p.name[i]), fold=True),
            Column("N", lambda i: quantity(float(p.n[i]))),
            Column("loss", lambda i: f"{p.loss[i]:.4f}", "nats"),
            Column("minus curve", lambda i: f"{1e3 * fit.residual[i]:+.2f}", "millinats"),
            Column("leverage", lambda i: f"{fit.leverage[i]:.2f}"),
            Column("moves E by", lambda i: f"{-fit.influence[i]:+.4f}", "nats"),
        ],
        sorted(range(len(p.n)), key=lambda i: -abs(fit.influence[i]))[:most],
    )


def context_table(law: ContextLaw) -> Table:
    def offset(i: int) -> tuple[str, str]:
        if law.lengths[i] == law.reference:
            return "0", "reference"
        return f"{law.delta[i]:+.4f}", span(interval(law.delta_draws[:, i]), "+.4f")

    return Table(
        f"Context law: L = {context.FORMULA}",
        [
            Column("T", lambda i: f"{law.lengths[i]:,}", "tokens"),
            Column("points", lambda i: str(law.runs[law.lengths[i]])),
            Column("delta(T)", lambda i: offset(i)[0], "nats"),
            Column(INTERVAL, lambda i: offset(i)[1]),
        ],
        range(len(law.lengths)),
        (
            f"delta(T): loss at T minus loss at {law.reference:,} tokens, for every N and "
            "configuration.",
            f"Intervals: {law.fit.how}",
        ),
    )


def flatness_table(found: Flatness) -> Table:
    title = f"Do differences between configurations move with T, from {found.since:,} tokens on?"
    if found.movement is None:
        return Table(title, notes=(found.sentence(),))
    m, base = found.movement, pair(found.baseline)
    lengths = ", ".join(f"{t:,}" for t in found.lengths)
    return Table(
        title,
        notes=(
            f"F-test of configuration x T at T = {lengths}: F({found.dof[0]}, {found.dof[1]}) = "
            f"{found.statistic:.2f}, p = {found.p_value:.2g}",
            f"Largest movement of dL = (L - L{base}) / L{base}: {100 * m.value:+.2f}% for "
            f"{pair(m.heads)} from {m.shorter:,} to {m.longer:,} tokens, {LEVEL:.0%} simultaneous "
            f"interval {100 * m.interval[0]:+.2f}% to {100 * m.interval[1]:+.2f}%",
            found.sentence(),
        ),
    )


def compare_table(scores: Sequence[Score], where: str = "") -> Table:
    """How well each law predicts what it was not shown; `where` says of which runs."""

    def error(name: str) -> Callable[[Score], str]:
        return lambda s: "-" if (rms := getattr(s, name)) is None else f"{1e3 * rms:.2f}"

    pattern = Column("unseen pattern", error("unseen_patterns"), "millinats")
    return Table(
        f"Laws: root mean square errors{where}",
        [
            Column("law", lambda s: s.law),
            Column("parameters", lambda s: str(s.parameters)),
            Column("residual", error("residual"), "millinats"),
            Column("unseen heads", error("unseen_heads"), "millinats"),
            Column("more heads", error("more_heads"), "millinats"),
            Column("more heads,\nlargest size", error("more_heads_and_size"), "millinats"),
            *([pattern] if any(s.unseen_patterns is not None for s in scores) else []),
            Column(
                "largest size",
                lambda s: "-" if s.largest_size is None else percent(s.largest_size, 3),
                "% of loss",
            ),
        ],
        scores,
        [f"{s.law}: L = {s.formula}" for s in scores],
        "How well each law predicts runs that it was not shown: each configuration in turn; those with "
        "the most query heads, or KV heads; the same at the largest size, which is not shown either; "
        "the largest size of each.",
    )


def heads_table(found: Sequence[HeadLaw]) -> Table:
    at = f" at N = {quantity(found[0].n)}" if found else ": no n_kv has four or more n_heads"
    return Table(
        f"L = a n_h^b + c{at}",
        [
            Column("KV heads", lambda law: str(law.n_kv_heads or "n_h")),
            Column("n_h", lambda law: " ".join(map(str, law.n_heads))),
            Column("a", lambda law: f"{law.a:.3f}", "nats"),
            Column("b", lambda law: f"{law.b:.3f}"),
            Column(f"b,\n{INTERVAL}", lambda law: span(law.b_interval)),
            Column("c", lambda law: f"{law.c:.3f}", "nats"),
            Column("R²", lambda law: f"{law.r2:.5f}"),
        ],
        found,
    )
