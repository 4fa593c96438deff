"""The context law, the token law and the answers at equal training FLOPs as tables.

A `Sheet` is what is said, once; `rich_sheet` puts it on a terminal and `html_sheet` on the page.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from gqa_scaling.study import context, laws, tokens
from gqa_scaling.study.aligned import Aligned, Goal, Served, Trained
from gqa_scaling.study.context import ContextLaw
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fit import LEVEL, interval
from gqa_scaling.study.flatness import Flatness
from gqa_scaling.study.frontier import OBJECTIVES, Serving
from gqa_scaling.study.sparsity import Sparsity
from gqa_scaling.study.tables import _table, millinats, pair, percent, span
from gqa_scaling.study.tokens import TokenLaw
from gqa_scaling.units import quantity


@dataclass(frozen=True)
class Sheet:
    """A table with a title above and notes below; the first column is the rows' name.

    A line break in a heading parts it from its unit; `spare` headings go where width is wanting.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()


def rich_sheet(sheet: Sheet) -> RenderableType:
    """For a terminal."""
    title = Text(sheet.title, style="bold")  # a table's own is folded at the table's width
    if not sheet.rows:
        return Group(title, *sheet.notes)
    table = _table("", *sheet.header, spare=sheet.spare)
    for row in sheet.rows:
        table.add_row(*row)
    return Group(title, table, *([""] if sheet.notes else []), *sheet.notes)


def flag_lines(flags: Sequence[str]) -> list[RenderableType]:
    """What must be known, a line each."""
    return [Text(f"! {flag}", style="yellow") for flag in flags]


def html_sheet(sheet: Sheet) -> str:
    """For the page, under a heading of its own."""

    def line(cells: Sequence[str], tag: str) -> str:
        texts = (html.escape(c.replace("\n", " ")) for c in cells)
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    body = "".join(line(row, "td") for row in sheet.rows)
    table = f"<table><thead>{line(sheet.header, 'th')}</thead><tbody>{body}</tbody></table>"
    notes = "".join(f'<p class="quiet">{html.escape(note)}</p>' for note in sheet.notes)
    scroll = f'<div class="scroll">{table}</div>' if sheet.rows else ""
    return f"<p><b>{html.escape(sheet.title)}</b></p>{scroll}{notes}"


# --------------------------------------------------------------------------------------- laws


def context_sheet(law: ContextLaw) -> Sheet:
    """The offset of every training context length."""
    rows = []
    for i, t in enumerate(law.lengths):
        ends = span(interval(law.delta_draws[:, i]), "+.4f")
        reference = t == law.reference
        rows.append(
            (
                f"{t:,}",
                str(law.runs[i]),
                "0" if reference else f"{law.delta[i]:+.4f}",
                "reference" if reference else ends,
            )
        )
    return Sheet(
        f"Context law: L = {context.FORMULA}",
        ("T\n(tokens)", "points", "delta(T)\n(nats)", f"{LEVEL:.0%} interval"),
        tuple(rows),
        (
            f"delta(T): loss at T minus loss at {law.reference:,} tokens, for every N and "
            "configuration.",
            f"Intervals: {law.fit.how}",
        ),
    )


def flatness_sheet(found: Flatness) -> Sheet:
    """The test of configuration by T and what it means; no rows, three lines."""
    title = f"Do differences between configurations move with T, from {found.since:,} tokens on?"
    if found.movement is None:
        return Sheet(title, (), (), (found.sentence(),))
    m, base = found.movement, pair(found.baseline)
    lengths = ", ".join(f"{t:,}" for t in found.lengths)
    return Sheet(
        title,
        (),
        (),
        (
            f"F-test of configuration x T at T = {lengths}: F({found.dof[0]}, {found.dof[1]}) = "
            f"{found.statistic:.2f}, p = {found.p_value:.2g}",
            f"Largest movement of dL = (L - L{base}) / L{base}: {100 * m.value:+.2f}% for "
            f"{pair(m.heads)} from {m.shorter:,} to {m.longer:,} tokens, {LEVEL:.0%} simultaneous "
            f"interval {100 * m.interval[0]:+.2f}% to {100 * m.interval[1]:+.2f}%",
            found.sentence(),
        ),
    )


def token_sheet(law: TokenLaw) -> Sheet:
    """The curves of the token law and the terms that all configurations share."""
    f, header = law.fit, ("heads, KV", "points", "N\n(parameters)", "a\n(parameters)", "b")
    low, high = interval(f.draws.b)
    scale = laws.scale(law.best.u[0], law.best.b[0], law.best.centre)
    rows = tuple(
        (
            pair(heads),
            str(int((f.points.curve == k).sum())),
            " - ".join(quantity(v) for v in f.points.range_n(k)),
            quantity(float(scale[k])),
            f"{law.best.b[0, k]:.4f}",
            f"{low[k]:.4f} to {high[k]:.4f}",
        )
        for k, heads in enumerate(law.heads)
    )
    (floor, floor_ends), (beta, beta_ends) = law.floor, law.beta
    ends = [(d, *law.term(d)) for d in law.range_tokens]
    terms = " and ".join(f"{v:.3f} at D = {quantity(d)} ({span(e)})" for d, v, e in ends)
    p = f.points
    seeds = (
        f"; {1e3 * p.noise:.2f} between replicate seeds ({p.noise_dof} degrees of freedom)"
        if p.noise is not None
        else ""
    )
    shared = "not to be told"
    if f.shared.shared is not None:
        shared = f"{1e3 * f.shared.shared:.2f} (p = {f.shared.p_value:.2f})"
    return Sheet(
        f"Token law: L = {tokens.FORMULA}",
        (*header, f"b,\n{LEVEL:.0%} interval"),
        rows,
        (
            f"{f.source}: {len(p.n)} points, N is {f.count} without embeddings, D from "
            f"{quantity(law.range_tokens[0])} to {quantity(law.range_tokens[1])} training tokens",
            f"E = {floor:.4f} nats, {LEVEL:.0%} interval {span(floor_ends)}",
            f"beta = {beta:.4f}, {LEVEL:.0%} interval {span(beta_ends, '.4f')}; B = "
            f"{law.scale:.4g} nats tokens^beta",
            f"B D^-beta, nats with {LEVEL:.0%} intervals: {terms}",
            f"R² = {f.r2:.5f} over all points; {'converged' if f.converged else 'NOT converged'}, "
            f"Jacobian rank {f.rank} of {f.n_parameters}, condition {law.condition:.0f}",
            f"Noise: {1e3 * f.sigma:.2f} millinats around the law{seeds}; shared by a size: "
            f"{shared}",
            f"Intervals: {f.how}",
        ),
    )


def sparsity_sheet(found: Sparsity, objective: str) -> Sheet:
    """What each pattern costs in loss and saves in serving, and what density does."""
    rows = tuple(
        (
            pair(row.heads),
            f"{row.density:.3f}",
            f"{row.effective:,.0f}",
            millinats(row.loss),
            " to ".join(map(millinats, row.loss_interval)),
            percent(row.saving),
            " to ".join(map(percent, row.saving_interval)),
        )
        for row in found.rows
    )
    notes = [
        f"Density: share of the causal query-key pairs computed at the training context, "
        f"{found.train_context:,} tokens, where losses are measured. Loss: higher than dense with "
        f"the same heads at N = {quantity(found.n)}. T_eff at {found.context:,} tokens, saved: "
        f"{OBJECTIVES[objective]} there against the same dense heads at {found.loss:g} nats. "
        f"{LEVEL:.0%} intervals."
    ]
    if found.rate is None:
        notes.append(f"No rate of loss by density: {found.no_rate}")
    else:
        ends = span(tuple(np.exp(found.rate_interval)), ".4f")
        adds = found.halving
        notes.append(
            f"Law {found.law}: each halving of density multiplies the excess loss over E by exp(r) = "
            f"{np.exp(found.rate):.4f} ({ends})"
            + (f", the first adds {millinats(adds)} millinats at that N" if adds else "")
            + (f"; {found.left_out}" if found.left_out else "")
        )
    best = [
        f"{c.density:.3f} at {c.context:,} tokens ({pair(c.heads)}, in {percent(c.probability, 0)} of "
        "the refits)"
        for c in found.cheapest
    ]
    if best:
        notes.append(f"Cheapest density for {found.loss:g} nats: {'; '.join(best)}")
    header = ("heads, KV", "density", "T_eff\n(tokens)", "loss higher\n(millinats)")
    header += ("90% interval", f"{OBJECTIVES[objective]} saved", "its 90%\ninterval")
    return Sheet(
        "What sparsity costs and saves", header, rows, tuple(notes), ("its 90%\ninterval",)
    )


def law_sheets(found: Estimates) -> list[Sheet]:
    """What stands beside the fit where runs span several context lengths or token budgets."""
    out = [token_sheet(found.tokens)] if found.tokens else []
    out += [context_sheet(found.context)] if found.context else []
    return out + ([flatness_sheet(found.flatness)] if found.flatness else [])


# --------------------------------------------------------------------- equal training FLOPs


_BEYOND = {"": "", "larger": "+", "smaller": "-"}


def _mark(value: float, outside: bool) -> str:
    return quantity(value) + ("~" if outside else "")


def goal_title(answer: Aligned, goal: Goal) -> str:
    """The baseline run that sets the training FLOPs, in words."""
    return (
        f"{goal.flops:.3g} training FLOPs: {pair(answer.baseline)} at N = {quantity(goal.n)} on D = "
        f"{quantity(goal.tokens)} tokens, T = {answer.train_context:,}, loss {goal.loss:.4f} nats "
        f"({span(goal.loss_interval)}){'~' if goal.outside else ''}"
    )


def trained_sheet(answer: Aligned, goal: Goal) -> Sheet:
    """The lowest loss of every configuration for the baseline's training FLOPs."""
    header = ("heads, KV", "D at\nthat N", "loss there\n(nats)", "best N", "its D")
    header += ("its loss\n(nats)", f"below the baseline\n(nats, {LEVEL:.0%} interval)", "P(best)")

    def row(t: Trained) -> tuple[str, ...]:
        return (
            pair(t.heads),
            _mark(t.same_n_tokens, t.same_n_outside),
            f"{t.same_n_loss:.4f}",
            _mark(t.n, t.n_outside) + _BEYOND[t.beyond],
            _mark(t.tokens, t.tokens_outside),
            f"{t.loss:.4f}",
            f"{t.gain:.4f} ({span(t.gain_interval)})",
            percent(t.probability, 0),
        )

    return Sheet(
        "Lowest loss for these training FLOPs: at that N, and at the best N among those trained",
        header,
        tuple(row(t) for t in goal.trained),
        spare=header[1:3],
    )


def served_sheet(answer: Aligned, goal: Goal, at: int) -> Sheet:
    """Every configuration at equal training FLOPs and loss, cheapest to serve first."""
    q, objective = answer.question, answer.objective
    third = objective if objective not in ("memory", "flops") else "z"
    header = ("heads, KV", "N", "D\n(tokens)", "memory\n(values)", "FLOPs", "Z")
    header += ("memory\nsaved", "FLOPs\nsaved")
    header += (f"{OBJECTIVES[third]} saved\n({LEVEL:.0%} interval)", "P(best)")

    def row(s: Served) -> tuple[str, ...]:
        if not math.isfinite(s.n):
            return (pair(s.heads), "never", *["-"] * (len(header) - 3), percent(s.probability, 0))
        return (
            pair(s.heads),
            _mark(s.n, s.n_outside),
            _mark(s.tokens, s.tokens_outside),
            quantity(s.memory),
            quantity(s.flops),
            quantity(s.z),
            percent(s.saving["memory"]),
            percent(s.saving["flops"]),
            f"{percent(s.saving[third])} ({' to '.join(map(percent, s.saving_interval[third]))})",
            percent(s.probability, 0),
        )

    return Sheet(
        f"Cheapest to serve at {at:,} tokens by {OBJECTIVES[objective]}, same training FLOPs and "
        f"loss ({q.convention})",
        header,
        tuple(row(s) for s in goal.served[at]),
        spare=(*header[3:6], *header[6:8]),
    )


def aligned_sentence(answer: Aligned) -> str:
    """The answer in a few sentences, with its intervals and whatever weakens it."""
    start = "Demonstration, too small to decide by. " if answer.question.demonstration else ""
    goal = answer.goals[len(answer.goals) // 2]
    best, at = goal.trained[0], max(answer.question.contexts)
    served, kind = goal.served[at][0], OBJECTIVES[answer.objective]
    far = " outside what was trained" if best.n_outside or best.tokens_outside else ""
    if best.beyond:
        far += f", the {'largest' if best.beyond == 'larger' else 'smallest'} size trained"
    first = (
        f"{start}For the training FLOPs of {pair(answer.baseline)} at {quantity(goal.n)} parameters "
        f"on {quantity(goal.tokens)} tokens ({goal.flops:.3g}, T = {answer.train_context:,}), "
        f"{pair(best.heads)} reaches the lowest loss: {best.loss:.4f} nats at {quantity(best.n)} on "
        f"{quantity(best.tokens)} tokens{far}: {best.gain:.4f} below the baseline ({LEVEL:.0%} interval "
        f"{span(best.gain_interval, '.4f')}), lowest in {percent(best.probability, 0)} of the "
        "refits. "
    )
    if not served.reached:
        return f"{first}At equal loss none can be served at {at:,} tokens with what must hold."
    if served.heads == answer.baseline and abs(served.saving[answer.objective]) < 1e-6:
        return (
            f"{first}At equal loss none is cheaper to serve at {at:,} tokens than that baseline run "
            f"itself, in {percent(served.probability, 0)} of the refits."
        )
    ends = served.saving_interval[answer.objective]
    far = " outside what was trained" if served.n_outside or served.tokens_outside else ""
    saved = served.saving[answer.objective]
    return (
        f"{first}At equal loss the cheapest to serve at {at:,} tokens is {pair(served.heads)} at "
        f"{quantity(served.n)} on {quantity(served.tokens)} tokens{far}: {percent(abs(saved))} "
        f"{'less' if saved >= 0 else 'more'} {kind} than that baseline run ({LEVEL:.0%} interval "
        f"{percent(ends[0])} to {percent(ends[1])}), cheapest in "
        f"{percent(served.probability, 0)} of the refits."
    )


def aligned_sheets(answer: Aligned) -> list[Sheet]:
    """Every table at equal training FLOPs, with the conventions below the last."""
    out = []
    for goal in answer.goals:
        out.append(Sheet(goal_title(answer, goal), (), ()))
        out.append(trained_sheet(answer, goal))
        out += [served_sheet(answer, goal, at) for at in sorted(goal.served)]
    u = answer.units
    effective = f" T_eff in {u['effective']}." if "effective" in u else ""
    served = f" Served: {answer.serving.describe()}." if answer.serving != Serving() else ""
    notes = (
        f"Training FLOPs: {u['training_flops']}. D is what they buy at N.",
        f"Inference {u['flops']}. Z: {u['z']}.{effective}{served} Saved: {u['saving']} at the same context.",
        f"Probabilities and intervals: {answer.intervals}. ~ more than 10% outside what was trained; "
        "+ (-) the law falls further at larger (smaller) N than trained.",
    )
    return [*out, Sheet("Conventions", (), (), notes)]


def aligned_tables(answer: Aligned) -> RenderableType:
    """Everything that is printed at equal training FLOPs."""
    parts: list[RenderableType] = [Text(aligned_sentence(answer), style="bold")]
    for sheet in aligned_sheets(answer):
        parts += ["", rich_sheet(sheet)]
    return Group(*parts, *flag_lines(answer.flags))
