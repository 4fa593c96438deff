"""One HTML page that answers the question, its figures inside it; data and pictures beside it."""

import base64
import csv
import html
import io
import json
import string
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from gqa_scaling import __version__
from gqa_scaling.config import UserError, require
from gqa_scaling.files.storage import as_path
from gqa_scaling.study import tables
from gqa_scaling.study.board import events_file
from gqa_scaling.study.compare import Score, compare
from gqa_scaling.study.fit import LEVEL, Fit, interval
from gqa_scaling.study.frontier import Answer, Frontier
from gqa_scaling.study.outputs import PICTURES, settled, write_files
from gqa_scaling.study.plots import FIGURES, STYLE, all_figures
from gqa_scaling.study.results import Heads, Results, pattern_of
from gqa_scaling.study.serving import OBJECTIVES
from gqa_scaling.study.sheets import Sheet, html_sheet, sparsity_sheet
from gqa_scaling.study.sparsity import Sparsity, sparsity
from gqa_scaling.study.tokens import spans_budgets

_SPARSE = ("loss_against_density", "loss_by_position")
# Every file that may lie beside the page; the pictures for TensorBoard by how their names begin.
BESIDE = (
    "results.csv",
    "frontier.csv",
    *(f"{data}.json" for data in ("fit", "frontier", "context_law", "token_law", "flatness")),
    *(f"{data}.json" for data in ("aligned", "sparsity")),
    *(f"figures/{name}.{kind}" for name in FIGURES for kind in ("svg", "png")),
    PICTURES,
)
_DECISION = ("heat_map", "savings", "gains", "probabilities", "loss_against_costs")


def write_report(
    path: Path | str,
    results: Results,
    fit: Fit,
    frontier: Frontier,
    command: str = "",
    sheets: Sequence[Sheet] = (),
    beside: dict[str, Any] | None = None,
) -> Path:
    """Write the page to `path` and its data beside it; every file appears whole.

    The figures are also written to study/ as TensorBoard images.

    `command` is what reproduces the study and is printed on the page. `sheets` are further tables
    for it, and `beside` is further data, each key a JSON file. Returns the page's path. Raises
    UserError, and writes nothing, where it would replace a file that no report wrote (`outputs`).
    """
    path = settled(as_path(path))
    files: dict[str, bytes] = {}
    pictures, images = {}, {}
    sparse = sparsity(fit, results, frontier)
    for name, (figure, caption) in all_figures(fit, results, frontier, sparse).items():
        svg, png = _render(figure, "svg"), _render(figure, "png")
        files |= {f"figures/{name}.svg": svg, f"figures/{name}.png": png}
        pictures[name], images[name] = _picture(svg, caption), png
    now, events = events_file(images)
    files[PICTURES + now] = events
    files["results.csv"] = results_csv(results).encode()
    files["frontier.csv"] = frontier_csv(frontier).encode()
    data = {"fit": fit.to_dict(), "frontier": frontier.to_dict(), **(beside or {})}
    data |= {"sparsity": sparse.to_dict()} if sparse else {}
    files |= {f"{name}.json": _json(value) for name, value in data.items()}
    text = page(results, fit, frontier, pictures, command, sheets, sparse)
    files[path.name] = text.encode()
    write_files(path.parent, files)
    return path


def _render(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(STYLE):  # the salt that makes two SVGs of one picture equal
        figure.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _picture(svg: bytes, caption: str) -> str:
    data = base64.b64encode(svg).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


# ----------------------------------------------------------------------------------- the page


def page(
    results: Results,
    fit: Fit,
    frontier: Frontier,
    pictures: dict[str, str],
    command: str,
    sheets: Sequence[Sheet] = (),
    sparse: Sparsity | None = None,
) -> str:
    """The HTML text; `pictures` are whole <figure> elements by name."""
    template = resources.files("gqa_scaling.study") / "report.html"
    q, u = frontier.question, frontier.units
    contexts = ", ".join(f"{c:,}" for c in q.contexts)
    flags = "".join(f"<li>{html.escape(flag)}</li>" for flag in frontier.flags)
    fit_figures = [name for name in pictures if name not in (*_DECISION, *_SPARSE)]
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Cost-optimal GQA: {results.source}"),
        question=html.escape(
            f"Which head configuration reaches a loss at {contexts} tokens of context for the "
            f"least {'hardware-aware cost ' if frontier.objective == 'z' else ''}"
            f"{OBJECTIVES[frontier.objective]}?"
        ),
        label='<p><span class="demo">demonstration</span> These models are too small and too few '
        "to decide anything by.</p>"
        if q.demonstration
        else "",
        answer=html.escape(tables.sentence(frontier)),
        flags=f'<div class="flags"><b>Read with care</b><ul>{flags}</ul></div>' if flags else "",
        units=html.escape(
            f"Loss in {u['loss']}. N*: {u['n']} ({fit.count}). Memory in {u['memory']}. "
            f"{u['flops']}. Z = {u['z']}. "
            + (f"T_eff in {u['effective']}. " if frontier.sharded else "")
            + "~ marks an N* outside the fitted sizes; regret is the "
            "expected excess cost over the draws, - where some draw reaches the loss only with another."
        ),
        frontier=_frontier_table(frontier),
        savings=_saving_table(frontier),
        probability=html.escape(
            f"Probabilities, regrets and intervals: {frontier.intervals}. Tied configurations are "
            f"the fewest that hold {LEVEL:.0%} of the probability of being the cheapest."
        ),
        saving_note=html.escape(
            f"Saved: {u['saving']}, the baseline {tables.pair(frontier.baseline)} at the same loss."
        ),
        gains=_gain_table(frontier),
        gain_note=html.escape(
            f"For the {OBJECTIVES[frontier.objective]} that the baseline "
            f"{tables.pair(frontier.baseline)} costs at the target loss: its loss minus that of each "
            "configuration, all at the largest size of that cost. ~ marks one outside the fitted "
            "sizes; 90% intervals."
        ),
        serving=html.escape(f"weights and KV cache for {frontier.serving.sizes()}"),
        models=_model_table(frontier),
        training=_training(frontier),
        checks=_check_table(frontier),
        sparsity=_sparsity(sparse, frontier, pictures),
        figures_decision="".join(pictures[name] for name in _DECISION if name in pictures),
        law=html.escape(
            f"Law {fit.law}: L = {fit.formula}. E = {fit.floor:.4f} nats, "
            f"{LEVEL:.0%} interval {tables.span(fit.floor_interval)}; R² = {fit.r2:.5f} over "
            f"{len(fit.points.n)} points; one run's noise {1e3 * fit.sigma:.2f} millinats."
        ),
        curves=_curve_table(fit),
        sheets="<h2>Context and training tokens</h2>" + "".join(map(html_sheet, sheets))
        if sheets
        else "",
        laws=_laws(results, fit),
        fit_note=html.escape(
            f"Intervals: {fit.how}. {fit.refits_failed} refits failed. Least squares "
            f"{'converged' if fit.converged else 'did not converge'}; Jacobian rank {fit.rank} of "
            f"{fit.n_parameters}."
        ),
        figures_fit="".join(pictures[name] for name in fit_figures),
        runs_note=html.escape(
            f"{len(results)} runs from {results.source}"
            + (f"; not finished: {', '.join(results.missing)}" if results.missing else "")
            + f". N is {results.count}, without embeddings; loss in nats per token."
        ),
        runs=_run_table(results),
        made=_made(results, fit),
        command=html.escape(command or "gqa_scaling.study.report.write_report"),
    )


def _sparsity(sparse: Sparsity | None, frontier: Frontier, pictures: dict[str, str]) -> str:
    if sparse is None:
        return ""
    sheet = html_sheet(sparsity_sheet(sparse, frontier.objective))
    shown = "".join(pictures[name] for name in _SPARSE if name in pictures)
    return f"<h2>Dense and sharded</h2>{sheet}{shown}"


def _html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def _frontier_table(frontier: Frontier) -> str:
    header = ["context (tokens)", "loss (nats)", "heads, KV", "N* (parameters)", "90% interval"]
    header += ["L x d", "memory (values)", f"FLOPs ({frontier.question.convention})", "Z"]
    header += ["P(best)", "regret", "tied with"]
    rows = []
    for answer in sorted(frontier.answers, key=lambda a: a.context):
        best, q = answer.best, tables.quantity
        if not best.reached:
            rows.append([*_goal(answer), *["-"] * 9])
            continue
        rows.append(
            [
                *_goal(answer),
                q(best.n),
                " to ".join(q(v) for v in best.n_interval),
                tables.shape(best.n_layers, best.d_model),
                q(best.memory),
                q(best.flops),
                q(best.z),
                tables.percent(best.probability, 0),
                tables.percent(best.regret, 2),
                tables.pairs([h for h in answer.tied if h != best.heads]) or "-",
            ]
        )
    return _html(header, rows)


def _saving_table(frontier: Frontier) -> str:
    header = ["context (tokens)", "loss (nats)", "heads, KV"]
    for kind in _kinds(frontier):
        convention = f" ({frontier.question.convention})" if kind == "flops" else ""
        kind = OBJECTIVES[kind] + convention
        header += [f"{kind} saved", "90% interval"]
    header += ["runner-up", "dearer by"]
    rows = []
    for answer in sorted(frontier.answers, key=lambda a: a.context):
        row = _goal(answer)
        if not answer.best.reached:
            rows.append([*row, *["-"] * (len(header) - len(row))])
            continue
        for kind in _kinds(frontier):
            row.append(tables.percent(answer.best.saving[kind]))
            ends = answer.best.saving_interval[kind]
            row.append(" to ".join(tables.percent(v) for v in ends))
        rows.append([*row, tables.runner_up(answer), tables.percent(answer.margin, 2)])
    return _html(header, rows)


def _gain_table(frontier: Frontier) -> str:
    header = ["context (tokens)", "target (nats)"]
    heads = [c.heads for c in frontier.answers[0].choices]
    kept = sorted(h for h in heads if h != frontier.baseline)
    header += [f"{tables.pair(heads)} lower by (millinats)" for heads in kept]
    rows = []
    for answer in sorted(frontier.answers, key=lambda a: a.context):
        row = [f"{answer.context:,}", f"{answer.loss:g}"]
        for heads in kept:
            e = answer.choice(heads).equal_cost
            ends = " to ".join(tables.millinats(v) for v in e.gain_interval)
            far = "~" if e.extrapolated else ""
            known = e.gain == e.gain
            row.append(f"{tables.millinats(e.gain)}{far} ({ends})" if known else "-")
        rows.append(row)
    return _html(header, rows)


def _training(frontier: Frontier) -> str:
    """How to train each different model, as HTML."""
    models = {a.model.config: a.model for a in frontier.answers if a.model}.values()
    commands = [m.command for m in models if m.command and not m.trained]
    out = ""
    if any(not m.command for m in models):
        out += (
            "<p>To train one, declare an experiment: these runs come without their corpus.</p><pre>"
            + html.escape("\n".join(map(tables.model_text, models)))
            + "</pre>"
        )
    if commands:
        text = html.escape("\n\n".join(commands))
        out += f"<p>Each of these commands trains one of them as the study's runs were:</p><pre>{text}</pre>"
    return out


def _check_table(frontier: Frontier) -> str:
    if not frontier.checks:
        return ""
    header = ["run", "heads, KV", "L x d", "N without embeddings", "predicted (nats)"]
    header += ["90% of a run", "measured (nats)", "minus predicted (millinats)"]
    rows = [
        [
            c.name,
            tables.pair(c.heads),
            f"{c.n_layers} x {c.d_model}",
            f"{c.n:,.0f}",
            f"{c.predicted:.4f}",
            tables.span(c.run_interval, ".4f"),
            f"{c.measured:.4f}",
            f"{1e3 * c.difference:+.1f}",
        ]
        for c in frontier.checks
    ]
    about = "<p>Trained since and not in the fit, against what its curves predicted:</p>"
    return f'{about}<div class="scroll">{_html(header, rows)}</div>'


def _kinds(frontier: Frontier) -> tuple[str, ...]:
    """What savings are shown of: memory, FLOPs, Z, and the objective where it is another."""
    return tuple(dict.fromkeys(("memory", "flops", "z", frontier.objective)))


def _goal(answer: Answer) -> list[str]:
    best = answer.best
    name = tables.pair(best.heads) + ("~" if best.extrapolated else "")
    return [
        f"{answer.context:,}",
        f"{answer.loss:g}",
        name if best.reached else "none reaches it",
    ]


def _model_table(frontier: Frontier) -> str:
    header = ["context (tokens)", "target (nats)", "heads, KV", "L x d"]
    header += ["N without embeddings", "all parameters", "loss predicted (nats)"]
    header += [
        "90% interval of the curve",
        "90% interval of a run",
        f"FLOPs ({frontier.question.convention})",
        "weights",
    ]
    header += ["KV cache", "in this study"]
    rows = []
    for answer in sorted(frontier.answers, key=lambda a: a.context):
        m = answer.model
        if m is None:
            continue
        rows.append(
            [
                f"{answer.context:,}",
                f"{answer.loss:g}",
                tables.pair(m.heads),
                f"{m.n_layers} x {m.d_model}",
                f"{m.n_exact:,}",
                f"{m.parameters:,}",
                f"{m.loss:.4f}",
                tables.span(m.loss_interval, ".4f"),
                tables.span(m.run_interval, ".4f"),
                tables.quantity(m.flops),
                tables.byte_size(m.weight_bytes),
                tables.byte_size(m.cache_bytes),
                m.trained or "no",
            ]
        )
    return _html(header, rows)


def _curve_table(fit: Fit) -> str:
    header = [
        "heads, KV",
        "sizes",
        "N from",
        "N to",
        "a (parameters)",
        "b",
        "b, 90% interval",
        "R²",
    ]
    low, high = interval(fit.draws.b)
    rows = []
    for k, heads in enumerate(fit.heads):
        first, last = fit.points.range_n(k)
        rows.append(
            [
                tables.pair(heads),
                str(len(set(fit.points.n[fit.points.curve == k]))),
                tables.quantity(first),
                tables.quantity(last),
                tables.quantity(float(fit.scale[k])),
                f"{fit.curves.b[k]:.4f}",
                f"{low[k]:.4f} to {high[k]:.4f}",
                f"{fit.r2_by_curve[k]:.5f}",
            ]
        )
    return _html(header, rows)


MOST_COMPARED = 40  # configurations: each is left out in turn, of every law, of all the others


def _laws(results: Results, fit: Fit) -> str:
    """The laws compared; nothing where a size has several token budgets, which they cannot take."""
    if spans_budgets(results):
        return ""
    about = "How well each law predicts runs it was not shown, as root mean square errors"
    at = fit.context_length
    where = f", T = {at:,} tokens" if at and len(set(results.context_length.tolist())) > 1 else ""
    try:
        require(
            len(fit.heads) <= MOST_COMPARED,
            f"with {len(fit.heads)} configurations that takes minutes; fit --compare does it",
        )
        scores = _law_table(compare(results, at))
    except UserError as error:  # the runs of this length alone may be too few
        return f'<p class="quiet">Laws are not compared: {html.escape(str(error))}</p>'
    return f'<p>{about}{where}:</p>\n<div class="scroll">{scores}</div>'


def _law_table(scores: Sequence[Score]) -> str:
    sharded = any(s.unseen_patterns is not None for s in scores)
    header = ["law", "formula", "parameters", "residual (millinats)"]
    header += ["configurations left out (millinats)"]
    header += ["patterns left out (millinats)"] if sharded else []
    header += ["largest size left out (% of loss)"]

    def known(value: float | None, factor: float, digits: int) -> str:
        return "-" if value is None else f"{factor * value:.{digits}f}"

    rows = [
        [
            s.law,
            s.formula,
            str(s.parameters),
            known(s.residual, 1e3, 2),
            known(s.unseen_heads, 1e3, 2),
            *([known(s.unseen_patterns, 1e3, 2)] if sharded else []),
            known(s.largest_size, 100, 3),
        ]
        for s in scores
    ]
    return _html(header, rows)


def _run_table(results: Results) -> str:
    r = results
    header = ["run", "heads, KV", "L x d", f"N ({r.count})", "context (tokens)", "training tokens"]
    header += ["seed", "learning rate", "epochs", "loss (nats)"]

    def known(value: float, form: str) -> str:
        return format(value, form) if value == value and value else "-"

    rows = [
        [
            str(r.name[i]),
            tables.pair(heads),
            f"{r.n_layers[i]} x {r.d_model[i]}" if r.n_layers[i] else "-",
            f"{r.n_params[i]:,.0f}",
            known(float(r.context_length[i]), ",.0f"),
            known(float(r.tokens[i]), ",.0f"),
            str(r.seed[i]),
            known(float(r.learning_rate[i]), "g"),
            known(float(r.epochs[i]), ".2f"),
            f"{r.loss[i]:.4f}",
        ]
        for i, heads in enumerate(r.heads)
    ]
    return _html(header, rows)


def _made(results: Results, fit: Fit) -> str:
    p = results.provenance
    versions = ", ".join(f"{k} {v}" for k, v in sorted((p.get("versions") or {}).items()))
    seconds = p.get("training_seconds")
    facts = [
        ("experiment", p.get("experiment")),
        ("gqa-scaling", __version__),
        ("versions", versions),
        ("devices", ", ".join(map(str, p.get("devices") or []))),
        ("training time, all runs", f"{seconds:,.0f} s" if seconds else ""),
        ("corpus hash", results.corpus[0]),
        ("tokenizer hash", results.tokenizer[0]),
        ("vocabulary", f"{results.vocab_size[0]:,} tokens" if results.vocab_size[0] else ""),
        ("evaluation hash", results.evaluation[0]),
        ("training seeds", ", ".join(map(str, sorted(set(results.seed.tolist()))))),
        ("intervals", fit.how),
    ]
    return _html(["", ""], [[k, str(v)] for k, v in facts if v])


# ------------------------------------------------------------------------------------ the data


def results_csv(results: Results) -> str:
    """The runs as a CSV that `results.from_csv` reads; unknown values are left empty."""
    rows = [
        {
            k: "" if v is None or (v == 0 and k not in ("seed", "epochs")) else v
            for k, v in row.items()
        }
        for row in results.rows()
    ]
    return _csv([*rows[0], "n_count"], [row | {"n_count": results.count} for row in rows])


def frontier_csv(frontier: Frontier) -> str:
    """One line for each target loss, context and configuration; units in the header."""
    rows: list[dict[str, Any]] = []
    for answer in frontier.answers:
        for rank, c in enumerate(answer.choices, 1):
            row = {
                "context_tokens": answer.context,
                "loss_nats": answer.loss,
                "rank": rank,
                "n_heads": c.heads[0],
                "n_kv_heads": c.heads[1],
                **({"pattern": _label(c.heads), "t_eff": c.effective} if frontier.sharded else {}),
                "tied": int(c.heads in answer.tied),
                "n_parameters": c.n,
                "n_low": c.n_interval[0],
                "n_high": c.n_interval[1],
                "n_layers": c.n_layers,
                "d_model": c.d_model,
                "memory_values": c.memory,
                f"flops_{frontier.question.convention}": c.flops,
                "z": c.z,
                "bytes": c.bytes,
                "cost": c.cost,
                "excess": c.excess,
                "probability": c.probability,
                "regret": c.regret,
                "unreachable": c.unreachable,
                "extrapolated": int(c.extrapolated),
            }
            for kind in _kinds(frontier):
                row[f"{kind}_saving"] = c.saving[kind]
                row[f"{kind}_saving_low"], row[f"{kind}_saving_high"] = c.saving_interval[kind]
            e = c.equal_cost
            row |= {"equal_cost_n": e.n, "equal_cost_loss_nats": e.loss, "gain_nats": e.gain}
            row["gain_low"], row["gain_high"] = e.gain_interval
            row["equal_cost_extrapolated"] = int(e.extrapolated)
            rows.append(row)
    return _csv(list(rows[0]), rows)


def _label(heads: Heads) -> str:
    pattern = pattern_of(heads)
    return pattern.label if pattern else ""


def _csv(header: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
