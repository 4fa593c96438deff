"""The tables of the answers: what is cheapest, what it saves and gains, what to build."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group

from gqa_scaling.baselines import WholeModel
from gqa_scaling.study.baseline import in_words, label
from gqa_scaling.study.candidates import KNOWN
from gqa_scaling.study.choices import OBJECTIVES, Law, Objective
from gqa_scaling.study.frontier import Answer, Choice, Frontier
from gqa_scaling.study.report.clocked import clock_table
from gqa_scaling.study.report.sentences import sentence
from gqa_scaling.study.report.table import (
    INTERVAL,
    Column,
    Table,
    cost_heading,
    cost_text,
    margin,
    millinats,
    percent,
    shown,
    span,
)
from gqa_scaling.study.results import Heads, pair, pairs
from gqa_scaling.study.serving import Serving
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import byte_size, quantity

CONTEXT = Column("context", lambda answer: f"{answer.context:,}", "tokens")
LOSS = Column("loss", lambda answer: f"{answer.loss:g}", "nats")
TARGET = Column("target", lambda answer: f"{answer.loss:g}", "nats")


def frontier_tables(frontier: Frontier) -> list[Table]:
    checks = [check_table(frontier)] if frontier.checks else []
    timed = clock_table(frontier)
    whole = (saving_table, gain_table, model_table)
    first = [frontier_table(frontier), *([timed] if timed else [])]
    return [*first, *(table(frontier) for table in whole), *checks]


def frontier_answer(frontier: Frontier, more: Sequence[Table] = ()) -> Group:
    """The answer for a terminal: in a sentence, in tables, and what must be known of it."""
    return shown([*frontier_tables(frontier), *more], frontier.flags, sentence(frontier))


def _by_context(frontier: Frontier) -> list[Answer]:
    return sorted(frontier.answers, key=lambda answer: answer.context)


def _best(cell: Callable[[Choice], str], none: str = "-") -> Callable[[Answer], str]:
    """The cell of an answer's cheapest configuration; `none` where none reaches the loss."""
    return lambda answer: cell(answer.best) if answer.best.reached else none


def _marked(choice: Choice) -> str:
    return pair(choice.heads) + ("~" if choice.extrapolated else "")


def frontier_table(frontier: Frontier) -> Table:
    q, u, laws = frontier.question, frontier.units, list(frontier.answers[0].under)
    far = frontier.untimed
    predicted = any(c.known != "measured" for c in frontier.answers[0].choices)

    def decided(cell: Callable[[Choice], str]) -> Callable[[Answer], str]:
        told = _best(cell)
        return lambda answer: "-" if far(answer) else told(answer)

    notes = [
        f"FLOPs: {u['flops']}. Z: {u['z']}."
        + (f" T_eff in {u['effective']}." if frontier.sharded else "")
        + (f" Served: {frontier.serving.describe()}." if frontier.serving != Serving() else "")
        + " ~ outside the fitted sizes.",
        f"Probabilities: {frontier.intervals}. Tied: in {LEVEL:.0%} of the refits everything else is "
        f"dearer than the cheapest by more than {margin(q.indifference)}; = within that in {LEVEL:.0%} of "
        "them.",
    ]
    if why := dict.fromkeys(far(a) for a in frontier.answers if far(a)):
        notes.append(f"Not decided: {'; '.join(why)}.")
    if any(math.isinf(a.best.regret) for a in frontier.answers if a.best.reached):
        notes.append("Regret -: in some refits only another configuration reaches the loss.")
    if predicted:
        notes.append(
            f"Curves: law {frontier.law!r} for heads that were not trained, straying from it by as much as "
            "the trained ones do; of trained heads their own, shrunk towards that law where they have few "
            "sizes. measured: these heads were trained; predicted: within the head counts that were; "
            "beyond: predicted beyond the trained heads."
        )
    if laws:
        notes.append(
            f"Dearer by {' or '.join(laws)}: what this answer costs more, by the curves of that law, than "
            "that law's own best. Separate curves rank trained heads alone (-: not this answer's)."
        )
    return Table(
        f"Cheapest configuration by {OBJECTIVES[frontier.objective]}, FLOPs {q.convention}",
        [
            CONTEXT,
            LOSS,
            Column("heads, KV", _best(_marked, "none")),
            *_known_columns(frontier, _best),
            Column("N*", _best(lambda c: quantity(c.n))),
            Column(
                f"N*, {LEVEL:.0%}\ninterval",
                _best(lambda c: span(c.n_interval, quantity)),
                page_only=True,
            ),
            Column("L x d", _best(lambda c: _shape(c.n_layers, c.d_model)), spare=1),
            Column("memory", _best(lambda c: quantity(c.memory)), "values", spare=4),
            Column("FLOPs", _best(lambda c: quantity(c.flops)), spare=2),
            Column("Z", _best(lambda c: quantity(c.z)), spare=5 if laws else 0),
            *_own_cost(frontier.objective, _best),
            Column("P(best)", decided(lambda c: percent(c.probability, 0))),
            Column("regret", decided(lambda c: percent(c.regret, 2)), spare=3),
            *(_safest_columns() if predicted else []),
            *map(_under, laws),
            Column("tied with", lambda a: "not decided" if far(a) else _tied(a), fold=True),
        ],
        _by_context(frontier),
        notes,
        f"Loss in {u['loss']}. N*: {u['n']} ({frontier.count}). Memory in {u['memory']}. Regret: the "
        "expected excess cost over the refits. Tied without =: these runs do not tell it from the "
        "cheapest, and the difference may matter.",
    )


def _known_columns(frontier: Frontier, wrap: Callable[..., Callable[[Any], str]]) -> list[Column]:
    """Whether a row's heads were trained: a word on a terminal, all of it on the page."""
    if all(c.known == "measured" for c in frontier.answers[0].choices):
        return []
    return [
        Column("known", wrap(lambda c: c.known), terminal_only=True),
        Column("known", wrap(lambda c: KNOWN[c.known]), page_only=True),
    ]


def _own_cost(objective: Objective, wrap: Callable[..., Callable[[Any], str]]) -> list[Column]:
    """What is to be least, where that is none of the costs that are always told."""
    if objective in ("memory", "flops", "z"):
        return []
    cell = wrap(lambda c: cost_text(objective, c.cost))
    return [Column(cost_heading(objective), cell)]


def _safest_columns() -> list[Column]:
    """The cheapest configuration that was trained, and what it costs more than the cheapest."""

    def cell(write: Callable[[Choice], str]) -> Callable[[Answer], str]:
        return lambda answer: write(answer.safest) if answer.safest else "-"

    return [
        Column("best\nmeasured", cell(lambda c: pair(c.heads))),
        Column("dearer by", cell(lambda c: percent(c.excess))),
    ]


def _under(law: Law) -> Column:
    """What an answer would cost more by another law, than that law's own best."""

    def cell(answer: Answer) -> str:
        if not answer.best.reached:
            return "-"
        excess = answer.under[law]
        return "never" if excess == math.inf else percent(excess)

    return Column(f"dearer by\n{law}", cell, spare=6)


def _shape(layers: float, width: float) -> str:
    return f"{layers:.1f} x {width:.0f}" if math.isfinite(layers) else "-"


def _tied(answer: Answer) -> str:
    alike = answer.equivalent
    others = [h for h in answer.tied if h != answer.best.heads and h not in alike]
    told = (f"= {pairs(alike)}" if alike else "", pairs(others))
    return "; ".join(filter(None, told)) or "-"


def shown_saving(objective: Objective) -> Objective:
    """What savings are told of beside memory and FLOPs, with an interval."""
    return objective if objective not in ("memory", "flops") else "z"


def saved_kinds(frontier: Frontier) -> tuple[Objective, ...]:
    """What savings there are of: memory, FLOPs, Z, and the objective where it is another."""
    kinds: tuple[Objective, ...] = ("memory", "flops", "z", frontier.objective)
    return tuple(dict.fromkeys(kinds))


def saving_table(frontier: Frontier) -> Table:
    third = shown_saving(frontier.objective)

    def saved(kind: Objective) -> tuple[Column, Column]:
        saving = _best(lambda c: percent(c.saving[kind]))
        ends = _best(lambda c: span(c.saving_interval[kind], percent))
        spare, rare = 0 if kind == third else 3, kind not in ("memory", "flops", third)
        return (
            Column(OBJECTIVES[kind], saving, page_only=rare),
            Column(INTERVAL, ends, spare=spare, page_only=rare),
        )

    return Table(
        f"Saved against {label(frontier.baseline)}{_at_equal_loss(frontier)}, {LEVEL:.0%} intervals",
        [
            CONTEXT,
            LOSS,
            Column("heads, KV", _best(lambda c: pair(c.heads), "none")),
            *(column for kind in saved_kinds(frontier) for column in saved(kind)),
            Column("runner-up", _runner_up, spare=1),
            Column(
                "dearer by",
                lambda a: percent(a.margin, 2) if a.best.reached else "-",
                spare=2,
            ),
        ],
        _by_context(frontier),
        notes=[f"Baseline: {in_words(frontier.baseline)}.", *_whole_note(frontier)],
        about=f"Saved: {frontier.units['saving']}, FLOPs {frontier.question.convention}.",
    )


def _at_equal_loss(frontier: Frontier) -> str:
    """Whether the baseline has the target loss: one model has its own, whatever is asked for."""
    whole = isinstance(frontier.baseline, WholeModel) and frontier.question.losses
    return "" if whole else " at equal loss"


def _whole_note(frontier: Frontier) -> list[str]:
    if not isinstance(frontier.baseline, WholeModel):
        return []
    base = frontier.answers[0].baseline
    return [f"Its predicted loss is {base.loss:.4f} nats, its N {quantity(base.n)}."]


def _runner_up(answer: Answer) -> str:
    """The second cheapest configuration; a dash where no second one reaches the loss."""
    rest = answer.choices[1:2]
    return pair(rest[0].heads) if rest and rest[0].reached else "-"


def gain_table(frontier: Frontier) -> Table:
    """What is gained for the baseline's cost at the target loss: the configuration of least loss."""
    base, kind = label(frontier.baseline), OBJECTIVES[frontier.objective]

    def lowest(cell: Callable[[Choice], str], none: str = "-") -> Callable[[Answer], str]:
        return lambda answer: cell(answer.lowest) if answer.lowest else none

    def gained(cell: Callable[[Choice], str]) -> Callable[[Answer], str]:
        """A dash where the baseline itself has the least loss: it gains nothing over itself."""
        return lowest(lambda c: "-" if c.heads == frontier.baseline else cell(c))

    def heads_of(choice: Choice) -> str:
        return pair(choice.heads) + ("~" if choice.equal_cost.extrapolated else "")

    def own(heads: Heads) -> Column:
        def cell(answer: Answer) -> str:
            e = answer.choice(heads).equal_cost
            if not math.isfinite(e.gain):
                return "-"
            far = "~" if e.extrapolated else ""
            return f"{millinats(e.gain)}{far} ({span(e.gain_interval, millinats)})"

        return Column(f"{pair(heads)} lower by", cell, "millinats", page_only=True)

    return Table(
        f"Gained over {base} at equal {kind}, {LEVEL:.0%} intervals",
        [
            CONTEXT,
            TARGET,
            Column("heads, KV", lowest(heads_of, "none")),
            Column("N", lowest(lambda c: quantity(c.equal_cost.n)), spare=1),
            Column("loss", lowest(lambda c: f"{c.equal_cost.loss:.4f}"), "nats"),
            Column(
                f"loss of {base}",
                gained(lambda c: f"{c.equal_cost.loss + c.equal_cost.gain:.4f}"),
                "nats",
            ),
            Column("lower by", gained(lambda c: millinats(c.equal_cost.gain)), "millinats"),
            Column(
                INTERVAL,
                gained(lambda c: span(c.equal_cost.gain_interval, millinats)),
            ),
            *(own(heads) for heads in frontier.told if heads != frontier.baseline),
        ],
        _by_context(frontier),
        about=f"For the {kind} that the baseline {base} costs at the target loss: the configuration of "
        "least loss, then every configuration, each and the baseline at the largest size of that "
        "cost. ~ outside the fitted sizes.",
    )


def model_table(frontier: Frontier) -> Table:
    return Table(
        f"Models to build (FLOPs {frontier.question.convention}; {frontier.serving.sizes()})",
        [
            CONTEXT,
            Column("target", lambda a: f"{a.loss:g}", "nats", spare=3),
            Column("heads, KV", lambda a: pair(a.model.heads)),
            Column("L x d", lambda a: f"{a.model.n_layers} x {a.model.d_model}"),
            Column("N", lambda a: quantity(a.model.n_exact)),
            Column("all parameters", lambda a: f"{a.model.parameters:,}", page_only=True),
            Column(
                "predicted loss",
                lambda a: f"{a.model.loss:.4f} ({span(a.model.run_interval)})",
                f"nats, {LEVEL:.0%} of a run",
            ),
            Column(
                f"{LEVEL:.0%} of the curve",
                lambda a: span(a.model.loss_interval, ".4f"),
                "nats",
                page_only=True,
            ),
            Column("FLOPs", lambda a: quantity(a.model.flops), spare=1),
            Column("weights", lambda a: byte_size(a.model.weight_bytes), spare=2),
            Column("KV cache", lambda a: byte_size(a.model.cache_bytes)),
            Column("in this study", lambda a: a.model.trained or "no", page_only=True),
        ],
        [answer for answer in _by_context(frontier) if answer.model],
        about="The nearest whole layers and width to each N*, what the fitted curve predicts for it, "
        "and its exact costs. N without embeddings.",
    )


def check_table(frontier: Frontier) -> Table:
    return Table(
        "Trained since and not in the fit: losses in nats",
        [
            Column("run", lambda c: c.name, fold=True),
            Column("heads, KV", lambda c: pair(c.heads), page_only=True),
            Column("L x d", lambda c: f"{c.n_layers} x {c.d_model}", page_only=True),
            Column("N", lambda c: quantity(c.n), spare=1),
            Column("predicted", lambda c: f"{c.predicted:.4f}"),
            Column(f"{LEVEL:.0%} of a run", lambda c: span(c.run_interval, ".4f")),
            Column("measured", lambda c: f"{c.measured:.4f}"),
            Column("minus predicted", lambda c: f"{1e3 * c.difference:+.1f}", "millinats"),
        ],
        frontier.checks,
    )


def ranking_table(answer: Answer, frontier: Frontier) -> Table:
    effective = Column("T_eff", lambda c: f"{c.effective:,.0f}" if c.reached else "-", "tokens")
    return Table(
        f"{answer.loss:g} nats at {answer.context:,} tokens, by {OBJECTIVES[frontier.objective]} "
        f"({frontier.question.convention})",
        [
            Column("heads, KV", _marked),
            *_known_columns(frontier, lambda cell: cell),
            Column("N*", lambda c: quantity(c.n)),
            *([effective] if frontier.sharded else []),
            Column("memory", lambda c: quantity(c.memory), "values", spare=2),
            Column("FLOPs", lambda c: quantity(c.flops), spare=1),
            Column("Z", lambda c: quantity(c.z)),
            *_own_cost(frontier.objective, lambda cell: cell),
            Column("dearer by", lambda c: percent(c.excess, 2)),
            Column("P(best)", lambda c: percent(c.probability, 0)),
            Column(
                f"within {margin(frontier.question.indifference)}",
                lambda c: percent(c.within, 0),
                spare=3,
            ),
            Column("regret", lambda c: percent(c.regret, 2)),
            Column(
                "loss lower by\nat equal cost",
                lambda c: "-" if c.heads == frontier.baseline else millinats(c.equal_cost.gain),
                "millinats",
            ),
        ],
        answer.choices,
    )
