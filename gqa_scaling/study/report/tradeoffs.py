"""The tables of two trade-offs: what sparsity costs and saves, and what equal training FLOPs buy."""

import math
from collections.abc import Callable

import numpy as np
from rich.console import Group

from gqa_scaling.study.choices import OBJECTIVES, Objective
from gqa_scaling.study.equal_training import EqualTraining, Goal, Served
from gqa_scaling.study.report.answers import shown_saving
from gqa_scaling.study.report.sentences import aligned_sentence
from gqa_scaling.study.report.table import INTERVAL, Column, Table, millinats, percent, shown, span
from gqa_scaling.study.results import pair
from gqa_scaling.study.serving import Serving
from gqa_scaling.study.sparsity import Sparsity
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import quantity


def sparsity_table(found: Sparsity, objective: Objective) -> Table:
    notes = [
        f"Density: share of the causal query-key pairs computed at the training context, "
        f"{found.train_context:,} tokens, where losses are measured. Loss: higher than dense with "
        f"the same heads at N = {quantity(found.n)}. T_eff at {found.context:,} tokens, saved: "
        f"{OBJECTIVES[objective]} there against the same dense heads at {found.loss:g} nats. "
        f"{LEVEL:.0%} intervals.",
        _density_rate(found),
    ]
    best = [
        f"{c.density:.3f} at {c.context:,} tokens ({pair(c.heads)}, in {percent(c.probability, 0)} of "
        "the refits)"
        for c in found.cheapest
    ]
    if best:
        notes.append(f"Cheapest density for {found.loss:g} nats: {'; '.join(best)}")
    return Table(
        "What sparsity costs and saves",
        [
            Column("heads, KV", lambda row: pair(row.heads)),
            Column("density", lambda row: f"{row.density:.3f}"),
            Column("T_eff", lambda row: f"{row.effective:,.0f}", "tokens"),
            Column("loss higher", lambda row: millinats(row.loss), "millinats"),
            Column(INTERVAL, lambda row: span(row.loss_interval, millinats)),
            Column(f"{OBJECTIVES[objective]} saved", lambda row: percent(row.saving)),
            Column(
                f"its {LEVEL:.0%}\ninterval",
                lambda row: span(row.saving_interval, percent),
                spare=1,
            ),
        ],
        found.rows,
        notes,
    )


def _density_rate(found: Sparsity) -> str:
    """What each halving of density does to the loss, or why that cannot be told."""
    if found.rate is None or found.rate_interval is None:
        return f"No rate of loss by density: {found.no_rate}"
    adds = found.halving
    return (
        f"Law {found.law}: each halving of density multiplies the excess loss over E by exp(r) = "
        f"{np.exp(found.rate):.4f} ({span(np.exp(found.rate_interval), '.4f')})"
        + (f", the first adds {millinats(adds)} millinats at that N" if adds else "")
        + (f"; {found.left_out}" if found.left_out else "")
    )


# --------------------------------------------------------------------- equal training FLOPs


def aligned_answer(answer: EqualTraining) -> Group:
    """The answer for a terminal: in sentences, in tables, and what must be known of it."""
    return shown(aligned_tables(answer), answer.flags, aligned_sentence(answer))


def aligned_tables(answer: EqualTraining) -> list[Table]:
    """Every table at equal training FLOPs, with the conventions in the last."""
    out = []
    for goal in answer.goals:
        out += [Table(_goal_title(answer, goal)), trained_table(goal)]
        out += [served_table(answer, goal, at) for at in sorted(goal.served)]
    u = answer.units
    effective = f" T_eff in {u['effective']}." if "effective" in u else ""
    served = f" Served: {answer.serving.describe()}." if answer.serving != Serving() else ""
    notes = (
        f"Training FLOPs: {u['training_flops']}. D is what they buy at N.",
        f"Inference {u['flops']}. Z: {u['z']}.{effective}{served} Saved: {u['saving']} at the same context.",
        f"Probabilities and intervals: {answer.intervals}. ~ more than 10% outside what was trained; "
        "+ (-) the law falls further at larger (smaller) N than trained.",
    )
    return [*out, Table("Conventions", notes=notes)]


def _goal_title(answer: EqualTraining, goal: Goal) -> str:
    return (
        f"{goal.flops:.3g} training FLOPs: {pair(answer.baseline)} at N = {quantity(goal.n)} on D = "
        f"{quantity(goal.tokens)} tokens, T = {answer.train_context:,}, loss {goal.loss:.4f} nats "
        f"({span(goal.loss_interval)}){'~' if goal.outside else ''}"
    )


def _marked(value: float, outside: bool) -> str:
    return quantity(value) + ("~" if outside else "")


def trained_table(goal: Goal) -> Table:
    beyond = {"": "", "larger": "+", "smaller": "-"}
    return Table(
        "Lowest loss for these training FLOPs: at that N, and at the best N among those trained",
        [
            Column("heads, KV", lambda t: pair(t.heads)),
            Column("D at\nthat N", lambda t: _marked(t.same_n_tokens, t.same_n_outside), spare=1),
            Column("loss there", lambda t: f"{t.same_n_loss:.4f}", "nats", spare=2),
            Column("best N", lambda t: _marked(t.n, t.n_outside) + beyond[t.beyond]),
            Column("its D", lambda t: _marked(t.tokens, t.tokens_outside)),
            Column("its loss", lambda t: f"{t.loss:.4f}", "nats"),
            Column(
                "below the baseline",
                lambda t: f"{t.gain:z.4f} ({span(t.gain_interval, 'z.3f')})",
                f"nats, {INTERVAL}",
            ),
            Column("P(best)", lambda t: percent(t.probability, 0)),
        ],
        goal.trained,
    )


def served_table(answer: EqualTraining, goal: Goal, at: int) -> Table:
    third = shown_saving(answer.objective)

    def known(cell: Callable[[Served], str], none: str = "-") -> Callable[[Served], str]:
        return lambda s: cell(s) if math.isfinite(s.n) else none

    def saved(s: Served) -> str:
        return f"{percent(s.saving[third])} ({span(s.saving_interval[third], percent)})"

    return Table(
        f"Cheapest to serve at {at:,} tokens by {OBJECTIVES[answer.objective]}, same training FLOPs and "
        f"loss ({answer.question.convention})",
        [
            Column("heads, KV", lambda s: pair(s.heads)),
            Column("N", known(lambda s: _marked(s.n, s.n_outside), "never")),
            Column("D", known(lambda s: _marked(s.tokens, s.tokens_outside)), "tokens"),
            Column("memory", known(lambda s: quantity(s.memory)), "values", spare=1),
            Column("FLOPs", known(lambda s: quantity(s.flops)), spare=2),
            Column("Z", known(lambda s: quantity(s.z)), spare=3),
            Column("memory\nsaved", known(lambda s: percent(s.saving["memory"])), spare=4),
            Column("FLOPs\nsaved", known(lambda s: percent(s.saving["flops"])), spare=5),
            Column(f"{OBJECTIVES[third]} saved", known(saved), f"{LEVEL:.0%} interval"),
            Column("P(best)", lambda s: percent(s.probability, 0)),
        ],
        goal.served[at],
    )
