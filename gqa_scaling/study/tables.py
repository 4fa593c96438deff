"""The answers as tables for people: `rich` renderables no wider than 100 columns, better than 80."""

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

from gqa_scaling.study.build import Model
from gqa_scaling.study.compare import Score
from gqa_scaling.study.fit import LEVEL, Fit, interval
from gqa_scaling.study.frontier import MISSED, Answer, Choice, Frontier, headline
from gqa_scaling.study.heads import HeadLaw
from gqa_scaling.study.results import pair, pairs, pattern_of
from gqa_scaling.study.serving import OBJECTIVES, Serving
from gqa_scaling.study.suggest import Suggestion
from gqa_scaling.units import byte_size, quantity


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage; a dash when there is none."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "-"


def span(values: tuple[float, float], form: str = ".3f") -> str:
    return f"{values[0]:{form}} to {values[1]:{form}}"


def shape(layers: float, width: float) -> str:
    return f"{layers:.1f} x {width:.0f}" if math.isfinite(layers) else "-"


class _Fitted(Table):
    """A table that on a narrow terminal leaves out `spare` columns, and says which."""

    spare: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown, out = copy.copy(self), []
        for name in self.spare:
            if _least_width(shown.columns) <= options.max_width:
                break
            kept = [c for c in shown.columns if c.header != name]
            shown.columns = [dataclasses.replace(c, _index=i) for i, c in enumerate(kept)]
            out.append(name.split("\n")[0])
            shown.caption = f"left out for want of width: {', '.join(out)}"
        yield from Table.__rich_console__(shown, console, options)


def _least_width(columns: Sequence[Column]) -> int:
    """Characters that the columns need, two between them; those that wrap need their words."""

    def parts(c: Column) -> Iterator[str]:
        for text in (str(c.header), *map(str, c.cells)):
            yield from text.splitlines() if c.no_wrap else text.split()

    return sum(max(map(cell_len, parts(c)), default=0) for c in columns) + 2 * len(columns) - 2


def _table(title: str, *columns: str, spare: Sequence[str] = ()) -> Table:
    table = _Fitted(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=None,
        padding=(0, 1),
        pad_edge=False,
    )
    table.spare = spare
    for i, name in enumerate(columns):
        wraps = name in ("run", "tied with")  # lists and names may fold, numbers never
        table.add_column(
            name,
            justify="right" if i else "left",
            no_wrap=not wraps,
            overflow="fold" if wraps else "ellipsis",
        )
    return table


def _flags(flags: Sequence[str]) -> list[RenderableType]:
    return [Text(f"! {flag}", style="yellow") for flag in flags]


def fit_table(fit: Fit) -> RenderableType:
    """What `fit` prints: the curves, E, the noise, and what must be known of them."""
    table = _table(
        f"Law {fit.law}: L = {fit.formula}",
        "heads, KV",
        "sizes",
        "N\n(parameters)",
        "a\n(parameters)" if fit.law == "separate" else "a of N_b\n(parameters)",
        "b",
        "b,\n90% interval",
        "R²",
    )
    low, high = interval(fit.draws.b)
    for k, heads in enumerate(fit.heads):
        first, last = fit.points.range_n(k)
        table.add_row(
            pair(heads),
            str(len(set(fit.points.n[fit.points.curve == k]))),
            f"{quantity(first)} - {quantity(last)}",
            quantity(float(fit.scale[k])),
            f"{fit.curves.b[k]:.4f}",
            f"{low[k]:.4f} to {high[k]:.4f}",
            f"{fit.r2_by_curve[k]:.5f}",
        )
    noise = fit.points.noise
    seeds = (
        f"; {1e3 * noise:.2f} between replicate seeds ({fit.points.noise_dof} degrees of freedom)"
        if noise is not None
        else ""
    )
    shared = (
        f"; shared by a size: {1e3 * fit.shared.shared:.2f} (p = {fit.shared.p_value:.2f})"
        if fit.shared.shared is not None
        else ""
    )
    lines = [
        f"{fit.source}: {len(fit.points.n)} points, N is {fit.count} without embeddings",
        f"E = {fit.floor:.4f} nats, {LEVEL:.0%} interval {span(fit.floor_interval)}",
        *(
            f"{name} = {value:.4f}, {LEVEL:.0%} interval {span(ends, '.4f')}"
            for name, (value, ends) in fit.constants.items()
            if name != "E"
        ),
        f"R² = {fit.r2:.5f} over all points; {'converged' if fit.converged else 'NOT converged'}, "
        f"Jacobian rank {fit.rank} of {fit.n_parameters}",
        f"Noise: {1e3 * fit.sigma:.2f} millinats around the curves{seeds}{shared}",
        f"Intervals: {fit.how}",
    ]
    return Group(table, "", *lines, *_flags(fit.flags))


def compare_table(scores: Sequence[Score]) -> RenderableType:
    """How well each law predicts what it was not shown."""
    sharded = any(s.unseen_patterns is not None for s in scores)
    table = _table(
        "Laws: root mean square errors",
        "law",
        "parameters",
        "residual\n(millinats)",
        "unseen heads\n(millinats)",
        *(["unseen pattern\n(millinats)"] if sharded else []),
        "largest size\n(% of loss)",
    )

    def known(value: float | None) -> str:
        return f"{1e3 * value:.2f}" if value is not None else "-"

    for s in scores:
        table.add_row(
            s.law,
            str(s.parameters),
            known(s.residual),
            known(s.unseen_heads),
            *([known(s.unseen_patterns)] if sharded else []),
            percent(s.largest_size, 3) if s.largest_size is not None else "-",
        )
    notes = [f"{s.law}: L = {s.formula}" for s in scores]
    return Group(table, "", *notes)


def heads_table(found: Sequence[HeadLaw]) -> RenderableType:
    """Loss against query heads at a fixed N."""
    at = f" at N = {quantity(found[0].n)}" if found else ": no n_kv has four or more n_heads"
    table = _table(
        f"L = a n_h^b + c{at}",
        "KV heads",
        "n_h",
        "a\n(nats)",
        "b",
        "b,\n90% interval",
        "c\n(nats)",
        "R²",
    )
    for law in found:
        table.add_row(
            "n_h" if law.n_kv_heads is None else str(law.n_kv_heads),
            " ".join(map(str, law.n_heads)),
            f"{law.a:.3f}",
            f"{law.b:.3f}",
            span(law.b_interval),
            f"{law.c:.3f}",
            f"{law.r2:.5f}",
        )
    return table


def residual_table(fit: Fit, most: int = 8) -> RenderableType:
    """The points that pull the most on E, with their residuals."""
    table = _table(
        f"Points that move E most (of {len(fit.points.n)})",
        "run",
        "N",
        "loss\n(nats)",
        "minus curve\n(millinats)",
        "leverage",
        "moves E by\n(nats)",
    )
    for i in sorted(range(len(fit.points.n)), key=lambda i: -abs(fit.influence[i]))[:most]:
        table.add_row(
            str(fit.points.name[i]),
            quantity(float(fit.points.n[i])),
            f"{fit.points.loss[i]:.4f}",
            f"{1e3 * fit.residual[i]:+.2f}",
            f"{fit.leverage[i]:.2f}",
            f"{-fit.influence[i]:+.4f}",
        )
    return table


def frontier_table(frontier: Frontier) -> RenderableType:
    """What `frontier` prints: one row per target loss and context."""
    q = frontier.question
    table = _table(
        f"Cheapest configuration by {_objective(frontier)}, FLOPs {q.convention}",
        "context\n(tokens)",
        "loss\n(nats)",
        "heads, KV",
        "N*",
        "L x d",
        "memory\n(values)",
        "FLOPs",
        "Z",
        "P(best)",
        "regret",
        "tied with",
        spare=("L x d", "FLOPs", "regret", "memory\n(values)"),
    )
    for answer in sorted(frontier.answers, key=lambda a: a.context):
        best = answer.best
        if not best.reached:
            table.add_row(f"{answer.context:,}", f"{answer.loss:g}", "none", *["-"] * 8)
            continue
        table.add_row(
            f"{answer.context:,}",
            f"{answer.loss:g}",
            pair(best.heads) + ("~" if best.extrapolated else ""),
            quantity(best.n),
            shape(best.n_layers, best.d_model),
            quantity(best.memory),
            quantity(best.flops),
            quantity(best.z),
            percent(best.probability, 0),
            percent(best.regret, 2),
            pairs([h for h in answer.tied if h != best.heads]) or "-",
        )
    lines = [_units(frontier), f"Probabilities: {frontier.intervals}; ties hold {LEVEL:.0%}"]
    if any(math.isinf(a.best.regret) for a in frontier.answers if a.best.reached):
        lines.append("Regret -: in some refits only another configuration reaches the loss.")
    return Group(table, "", *lines)


def runner_up(answer: Answer) -> str:
    """The second cheapest configuration; a dash where no second one reaches the loss."""
    rest = answer.choices[1:2]
    return pair(rest[0].heads) if rest and rest[0].reached else "-"


def saving_table(frontier: Frontier) -> RenderableType:
    """What the cheapest configuration saves against the baseline at equal loss."""
    third = frontier.objective if frontier.objective not in ("memory", "flops") else "z"
    table = _table(
        f"Saved against {pair(frontier.baseline)} at equal loss, {LEVEL:.0%} intervals",
        "context\n(tokens)",
        "loss\n(nats)",
        "heads, KV",
        "memory",
        "FLOPs",
        OBJECTIVES[third],
        "90% interval",
        "runner-up",
        "dearer by",
        spare=("runner-up", "dearer by"),
    )
    for answer in sorted(frontier.answers, key=lambda a: a.context):
        best = answer.best
        if not best.reached:
            table.add_row(f"{answer.context:,}", f"{answer.loss:g}", "none", *["-"] * 6)
            continue
        table.add_row(
            f"{answer.context:,}",
            f"{answer.loss:g}",
            pair(best.heads),
            percent(best.saving["memory"]),
            percent(best.saving["flops"]),
            percent(best.saving[third]),
            " to ".join(percent(v) for v in best.saving_interval[third]),
            runner_up(answer),
            percent(answer.margin, 2),
        )
    return table


def gain_table(frontier: Frontier) -> RenderableType:
    """What is gained for the baseline's cost at the target loss: the configuration of least loss."""
    base, kind = pair(frontier.baseline), _objective(frontier)
    table = _table(
        f"Gained over {base} at equal {kind}, {LEVEL:.0%} intervals",
        "context\n(tokens)",
        "target\n(nats)",
        "heads, KV",
        "N",
        "loss\n(nats)",
        f"loss of {base}\n(nats)",
        "lower by\n(millinats)",
        "90% interval",
        spare=("N",),
    )
    for answer in sorted(frontier.answers, key=lambda a: a.context):
        row, choice = (f"{answer.context:,}", f"{answer.loss:g}"), answer.lowest
        if choice is None:
            table.add_row(*row, "none", *["-"] * 5)
            continue
        e = choice.equal_cost
        table.add_row(
            *row,
            pair(choice.heads) + ("~" if e.extrapolated else ""),
            quantity(e.n),
            f"{e.loss:.4f}",
            f"{e.loss + e.gain:.4f}",
            millinats(e.gain),
            " to ".join(millinats(v) for v in e.gain_interval),
        )
    return table


def millinats(value: float) -> str:
    """Nats as millinats with one digit; a dash when there is none."""
    return f"{round(1e3 * value, 1) + 0:.1f}" if math.isfinite(value) else "-"


def check_table(frontier: Frontier) -> RenderableType:
    """Runs that the fit has not seen, against what its curves said of them."""
    table = _table(
        "Trained since and not in the fit: losses in nats",
        "run",
        "N",
        "predicted",
        "90% of a run",
        "measured",
        "minus predicted\n(millinats)",
        spare=("N",),
    )
    for c in frontier.checks:
        table.add_row(
            c.name,
            quantity(c.n),
            f"{c.predicted:.4f}",
            span(c.run_interval, ".4f"),
            f"{c.measured:.4f}",
            f"{1e3 * c.difference:+.1f}",
        )
    return table


def training(frontier: Frontier) -> str:
    """How to train the model of the sentence; plain text, for its command must not be folded."""
    answer = headline(frontier)
    m = answer.model
    if m is None:
        return ""
    goal = f"{answer.loss:g} nats at {answer.context:,} tokens"
    if m.trained:
        return f"The model to build for {goal} is a run of this study: {m.trained}."
    if not m.command:
        return (
            f"To build for {goal}: {model_text(m)}. To train it, declare an experiment "
            "(docs/using.md): these runs come without their corpus."
        )
    others = {a.model.command for a in frontier.answers if a.model} - {m.command, ""}
    more = "\nThe commands of the other models are in the report and in --json." if others else ""
    return f"Train the model to build for {goal}:\n\n{m.command}\n{more}"


def model_text(model: Model) -> str:
    """The model's architecture as it is declared."""
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")
    known = {k: getattr(model.config, k) for k in names}
    known = {k: v for k, v in known.items() if v is not None}
    if pattern := model.config.pattern:
        fields = (
            (f.name, f.default, getattr(pattern, f.name)) for f in dataclasses.fields(pattern)
        )
        own = {name: value for name, default, value in fields if value != default}
        known["pattern"] = f"ContextSharding({_arguments(own)})"
    return f"ModelConfig({_arguments(known)})"


def _arguments(values: dict[str, object]) -> str:
    return ", ".join(f"{k}={v if k == 'pattern' else repr(v)}" for k, v in values.items())


def model_table(frontier: Frontier) -> RenderableType:
    """The models one can build, the loss expected of one run, and exact costs."""
    table = _table(
        f"Models to build (FLOPs {frontier.question.convention}; {frontier.serving.sizes()})",
        "context\n(tokens)",
        "heads, KV",
        "L x d",
        "N",
        "predicted loss\n(nats, 90% of a run)",
        "FLOPs",
        "weights",
        "KV cache",
        spare=("FLOPs", "weights"),
    )
    for answer in sorted(frontier.answers, key=lambda a: a.context):
        m: Model | None = answer.model
        if m is None:
            continue
        table.add_row(
            f"{answer.context:,}",
            pair(m.heads),
            f"{m.n_layers} x {m.d_model}",
            quantity(m.n_exact),
            f"{m.loss:.4f} ({span(m.run_interval)})",
            quantity(m.flops),
            byte_size(m.weight_bytes),
            byte_size(m.cache_bytes),
        )
    return table


def ranking_table(answer: Answer, frontier: Frontier) -> RenderableType:
    """Every configuration at one target loss and context, cheapest first."""
    table = _table(
        f"{answer.loss:g} nats at {answer.context:,} tokens, by {_objective(frontier)} "
        f"({frontier.question.convention})",
        "heads, KV",
        "N*",
        *(["T_eff\n(tokens)"] if frontier.sharded else []),
        "memory\n(values)",
        "FLOPs",
        "Z",
        "dearer by",
        "P(best)",
        "regret",
        "loss lower by\nat equal cost\n(millinats)",
        spare=("FLOPs", "memory\n(values)"),
    )
    for c in answer.choices:
        table.add_row(
            pair(c.heads) + ("~" if c.extrapolated else ""),
            quantity(c.n),
            *([f"{c.effective:,.0f}" if c.reached else "-"] if frontier.sharded else []),
            quantity(c.memory),
            quantity(c.flops),
            quantity(c.z),
            percent(c.excess, 2),
            percent(c.probability, 0),
            percent(c.regret, 2),
            millinats(c.equal_cost.gain),
        )
    return table


def suggest_table(suggestions: Sequence[Suggestion]) -> RenderableType:
    """The runs to do next, in order."""
    table = _table(
        "Runs to do next, most regret lowered per FLOP first",
        "run",
        "heads, KV",
        "L x d",
        "training\n(FLOPs)",
        "regret\nbefore",
        "regret\nafter",
    )
    for s in suggestions:
        table.add_row(
            s.name,
            pair(s.heads),
            f"{s.n_layers} x {s.d_model}",
            quantity(s.flops),
            percent(s.regret_before, 3),
            percent(s.regret_after, 3),
        )
    note = "Regret: expected excess of Z over the cheapest, mean over the question's answers."
    return Group(table, "", note)


def frontier_tables(frontier: Frontier) -> RenderableType:
    """Everything `frontier` prints but `training`: the answer in a sentence, then its tables."""
    return Group(
        Text(sentence(frontier), style="bold"),
        "",
        frontier_table(frontier),
        "",
        saving_table(frontier),
        "",
        gain_table(frontier),
        "",
        model_table(frontier),
        *(["", check_table(frontier)] if frontier.checks else []),
        *_flags(frontier.flags),
    )


def _objective(frontier: Frontier) -> str:
    return OBJECTIVES[frontier.objective]


def _units(frontier: Frontier) -> str:
    u = frontier.units
    effective = f" T_eff in {u['effective']}." if frontier.sharded else ""
    serving = f" Served: {frontier.serving.describe()}." if frontier.serving != Serving() else ""
    return f"FLOPs: {u['flops']}. Z: {u['z']}.{effective}{serving} ~ outside the fitted sizes."


def _less(saving: float) -> str:
    return f"{percent(abs(saving))} {'less' if saving >= 0 else 'more'}"


def _gained(choice: Choice, kind: str) -> str:
    """What the choice gains in loss at the baseline's cost, as the end of a sentence."""
    e = choice.equal_cost
    if not math.isfinite(e.gain):
        return ""
    low, high = sorted(e.gain_interval if e.gain >= 0 else (-v for v in e.gain_interval))
    far = ", outside the fitted sizes" if e.extrapolated else ""
    return (
        f"; or {abs(e.gain):.3f} nats {'less' if e.gain >= 0 else 'more'} at the same {kind} "
        f"({low:.3f} to {high:.3f}{far})"
    )


def _sparse(choice: Choice) -> str:
    """The pattern of a choice within a sentence, "" when it is dense."""
    pattern = pattern_of(choice.heads)
    return (
        f" with pattern {pattern.label} (T_eff {choice.effective:,.0f} tokens)" if pattern else ""
    )


def sentence(frontier: Frontier) -> str:
    """The answer in one or two sentences, with its interval and whatever weakens it."""
    answer = headline(frontier)
    best: Choice = answer.best
    start = "Demonstration, too small to decide by. " if frontier.question.demonstration else ""
    if frontier.doubt:
        start += f"NOT TO BE RELIED ON: {frontier.doubt}. "
    goal = f"{answer.loss:g} nats at {answer.context:,} tokens"
    if not best.reached:
        return (
            f"{start}No configuration reaches {goal} with what must hold at any size that can be "
            "built, by these curves: it is out of reach."
        )
    names, kind = OBJECTIVES, _objective(frontier)
    saved = best.saving[frontier.objective]
    low, high = best.saving_interval[frontier.objective]
    if best.heads == frontier.baseline:
        saving = "it is the baseline itself"
    elif math.isfinite(saved):
        rest = [k for k in ("memory", "flops", "z") if k != frontier.objective]
        saving = (
            f"{_less(saved)} {kind} than {pair(frontier.baseline)} at the same loss ({LEVEL:.0%} "
            f"interval {percent(low, 1)} to {percent(high, 1)}), with "
            + " and ".join(f"{_less(best.saving[k])} {names[k]}" for k in rest)
            + _gained(best, kind)
        )
    else:
        saving = f"{pair(frontier.baseline)} never reaches that loss"
    others = [h for h in answer.tied if h != best.heads]
    tie = (
        f" The noise cannot tell it from {pairs(others)}."
        if others
        else f" It is the cheapest in {percent(best.probability, 0)} of the refits."
    )
    missed = (
        f" {percent(best.unreachable, 0)} of the refits never reach that loss with it, at any size that "
        "can be built within what must hold."
        if best.unreachable > MISSED
        else ""
    )
    far = " Its size lies outside the fitted ones." if best.extrapolated else ""
    if pattern_of(best.heads) and answer.context > frontier.train_context:
        far += (
            f" That its pattern costs no more loss there than at the {frontier.train_context:,} tokens "
            "it was trained at is untested."
        )
    return (
        f"{start}For {goal}, take {best.heads[0]} query head{'s' if best.heads[0] > 1 else ''} and "
        f"{best.heads[1]} KV head{'s' if best.heads[1] > 1 else ''}{_sparse(best)} at {quantity(best.n)} parameters: "
        f"{saving}."
        f"{tie}{missed}{far}"
    )
