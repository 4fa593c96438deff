"""One HTML page that answers the question, its figures inside it; data and pictures beside it."""

import base64
import html
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from gqa_scaling import __version__
from gqa_scaling.config import Question, UserError, require
from gqa_scaling.files.storage import as_path
from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.compare import compare
from gqa_scaling.study.frontier import Frontier
from gqa_scaling.study.judged import to_dict
from gqa_scaling.study.report import answers, estimates, tradeoffs
from gqa_scaling.study.report.assumptions import sensitivity_table
from gqa_scaling.study.report.clocked import clock_table
from gqa_scaling.study.report.csv_files import frontier_csv, results_csv
from gqa_scaling.study.report.files import TENSORBOARD, settled, write_files
from gqa_scaling.study.report.forecasts import forecast_table
from gqa_scaling.study.report.judged import judged_tables, needle_maps
from gqa_scaling.study.report.pictures import (
    NEEDLES,
    PICTURES,
    SHAPES,
    all_figures,
    cards,
    rendered,
)
from gqa_scaling.study.report.sentences import model_text, sentence
from gqa_scaling.study.report.shape_axes import loss_against_shape, shape_tables
from gqa_scaling.study.report.table import Column, Table
from gqa_scaling.study.report.tensorboard import events_file
from gqa_scaling.study.results import Results, flags, pair
from gqa_scaling.study.study import Study
from gqa_scaling.study.tokens import spans_budgets

DATA = (
    "judged",
    "fit",
    "frontier",
    "context_law",
    "token_law",
    "flatness",
    "aligned",
    "sparsity",
    "sensitivity",
    "forecasts",
)
# Every file that a report may write into the page's folder; TensorBoard's by how its name begins.
WRITTEN = (
    "results.csv",
    "frontier.csv",
    *(f"{name}.json" for name in DATA),
    *(f"figures/{name}.{kind}" for name in PICTURES for kind in ("svg", "png")),
    TENSORBOARD,
)
MOST_COMPARED = 40  # configurations: each is left out in turn, of every law, of all the others


def write_report(path: Path | str, study: Study, command: str = "") -> Path:
    """Write the page to `path` and its data into the same folder; every file appears whole.

    The pictures and tables are also written to study/ for TensorBoard. `command` is what reproduces
    the study and is printed on the page. Returns the page's path. Raises UserError, and writes nothing,
    where it would replace a file that no report wrote (`files`).
    """
    path = settled(as_path(path))
    written: dict[str, bytes] = {}
    pictures = {}
    for name, (figure, caption) in all_figures(study).items():
        svg, png = rendered(figure)
        written |= {f"figures/{name}.svg": svg, f"figures/{name}.png": png}
        pictures[name] = _picture(svg, caption)
    told = list(sections(study, pictures))
    tables = {heading: _markdown(parts) for heading, parts in told}
    now, events = events_file(cards(study), {name: text for name, text in tables.items() if text})
    written[TENSORBOARD + now] = events
    written["results.csv"] = results_csv(study.results).encode()
    written["frontier.csv"] = frontier_csv(study.frontier).encode()
    data = {"fit": study.fit.to_dict(), "frontier": study.frontier.to_dict()} | study.estimated()
    data |= {"forecasts": study.forecasts.to_dict()} if study.forecasts else {}
    data |= {"sparsity": study.sparsity.to_dict()} if study.sparsity else {}
    data |= {"sensitivity": study.sensitivity.to_dict()} if study.sensitivity else {}
    data |= {"judged": judged} if (judged := to_dict(study.results)) else {}
    written |= {f"{name}.json": _json(value) for name, value in data.items()}
    written[path.name] = page(study, told, command).encode()
    write_files(path.parent, written)
    return path


def write_judged(
    path: Path | str, results: Results, question: Question, reason: str, command: str = ""
) -> Path:
    """The page of runs that no law can be fitted to, for this reason: what each was judged by.

    Otherwise as `write_report`.
    """
    path = settled(as_path(path))
    written = {"results.csv": results_csv(results).encode()}
    written["judged.json"] = _json(to_dict(results))
    images: dict[str, bytes] = {}
    pictures: dict[str, list[str]] = {"needles": [], "loss_against_shape": []}
    drawn = {"needles": (needle_maps(results), NEEDLES)}
    drawn["loss_against_shape"] = (loss_against_shape(results), SHAPES)
    for name, (figure, caption) in drawn.items():
        if figure is not None:
            svg, images[name] = rendered(figure)
            written |= {f"figures/{name}.svg": svg, f"figures/{name}.png": images[name]}
            pictures[name].append(_picture(svg, caption))
    told: list[Section] = [
        ("Shape at the same N", [*shape_tables(results), *pictures["loss_against_shape"]]),
        ("What they were judged by", [*judged_tables(results), *pictures["needles"]]),
        ("Every run", [runs_table(results)]),
    ]
    now, events = events_file(images, {heading: _markdown(parts) for heading, parts in told})
    written[TENSORBOARD + now] = events
    text = _filled(
        title=results.source,
        asked="What are these models worth?",
        demonstration=question.demonstration,
        answer=f"No law is fitted to these runs, and none is the cheapest: {reason}.",
        flags=flags(results),
        told=told,
        command=command,
    )
    written[path.name] = text.encode()
    write_files(path.parent, written)
    return path


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _picture(svg: bytes, caption: str) -> str:
    data, text = base64.b64encode(svg).decode(), html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


# ----------------------------------------------------------------------------------- the page


Section = tuple[str, Sequence[Table | str]]  # a heading, then tables and HTML


def page(study: Study, told: Iterable[Section], command: str) -> str:
    """The HTML text around the sections of a study."""
    frontier = study.frontier
    contexts = ", ".join(f"{c:,}" for c in frontier.question.contexts)
    return _filled(
        title=study.results.source,
        asked=f"Which head configuration reaches a loss at {contexts} tokens of context for the "
        f"least {'hardware-aware cost ' if frontier.objective == 'z' else ''}"
        f"{OBJECTIVES[frontier.objective]}?",
        demonstration=frontier.question.demonstration,
        answer=sentence(frontier),
        flags=frontier.flags,
        told=told,
        command=command,
    )


def _filled(
    *,
    title: str,
    asked: str,
    demonstration: bool,
    answer: str,
    flags: Iterable[str],
    told: Iterable[Section],
    command: str,
) -> str:
    """The template with these texts in it."""
    template = resources.files(__package__) / "page.html"
    label = (
        '<p><span class="demo">demonstration</span> These models are too small and too few to decide '
        "anything by.</p>"
    )
    known = "".join(f"<li>{html.escape(flag)}</li>" for flag in flags)
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Cost-optimal GQA: {title}"),
        question=html.escape(asked),
        label=label if demonstration else "",
        answer=html.escape(answer),
        flags=f'<div class="flags"><b>Read with care</b><ul>{known}</ul></div>' if known else "",
        sections="\n".join(
            f"<h2>{html.escape(heading)}</h2>\n" + "\n".join(map(_html, parts))
            for heading, parts in told
            if parts
        ),
        command=html.escape(command or "gqa_scaling.study.report.page.write_report"),
    )


def _html(part: Table | str) -> str:
    return part.html() if isinstance(part, Table) else part


def _markdown(parts: Iterable[Table | str]) -> str:
    return "\n\n".join(part.markdown() for part in parts if isinstance(part, Table))


def sections(study: Study, pictures: Mapping[str, str]) -> Iterator[Section]:
    """Every section of the page; `pictures` are whole <figure> elements by name.

    A table or a picture of its own is one function and a line here.
    """
    frontier, sparse, aligned = study.frontier, study.sparsity, study.aligned

    def shown(*names: str) -> list[str]:
        return [pictures[name] for name in names if name in pictures]

    yield "The cheapest configurations", [answers.frontier_table(frontier)]
    if timed := clock_table(frontier):
        yield "By Z and by the clock", [timed]
    yield "What they save", [answers.saving_table(frontier)]
    yield "What they gain at equal cost", [answers.gain_table(frontier)]
    yield (
        "Models to build",
        [
            answers.model_table(frontier),
            _training(frontier),
            *([answers.check_table(frontier)] if frontier.checks else []),
            *shown("heat_map", "savings", "gains", "probabilities", "loss_against_costs"),
        ],
    )
    if study.sensitivity:
        yield "What the answer hangs on", [sensitivity_table(study.sensitivity)]
    if study.forecasts:
        yield "Forecasts", [forecast_table(study.forecasts), *shown("forecasts")]
    if sparse:
        table = tradeoffs.sparsity_table(sparse, frontier.objective)
        yield "Dense and sharded", [table, *shown("loss_against_density", "loss_by_position")]
    yield (
        "Context and training tokens",
        [
            *estimates.wide_law_tables(study.estimates),
            *(tradeoffs.aligned_tables(aligned) if aligned else []),
        ],
    )
    yield "Shape at the same N", [*shape_tables(study.results), *shown("loss_against_shape")]
    yield "What else they were judged by", [*judged_tables(study.results), *shown("needles")]
    yield (
        "The loss curves",
        [
            estimates.fit_table(study.fit),
            *_compared(study),
            *shown("loss_curves", "loss_against_heads", "residuals"),
        ],
    )
    yield "The runs", [runs_table(study.results)]
    yield "How this was made", [_made(study)]


def _training(frontier: Frontier) -> str:
    """How to train each different model, as HTML."""
    models = {a.model.config: a.model for a in frontier.answers if a.model}.values()
    commands = [m.command for m in models if m.command and not m.trained]
    out = ""
    if any(not m.command for m in models):
        text = html.escape("\n".join(map(model_text, models)))
        out += (
            "<p>To train one, declare an experiment: these runs come without their corpus.</p>"
            f"<pre>{text}</pre>"
        )
    if commands:
        text = html.escape("\n\n".join(commands))
        out += f"<p>Each of these commands trains one of them as the study's runs were:</p><pre>{text}</pre>"
    return out


def _compared(study: Study) -> list[Table]:
    """The laws compared; nothing where a size has several token budgets, which they cannot take."""
    results, fit = study.results, study.fit
    if spans_budgets(results):
        return []
    at, several = fit.context_length, len(set(results.context_length.tolist())) > 1
    try:
        require(
            len(fit.heads) <= MOST_COMPARED,
            f"with {len(fit.heads)} configurations that takes minutes; fit --compare does it",
        )
        scores = compare(results, at)
    except UserError as error:  # the runs of this length alone may be too few
        return [Table("", notes=[f"Laws are not compared: {error}"])]
    return [estimates.compare_table(scores, f", T = {at:,} tokens" if at and several else "")]


def runs_table(results: Results) -> Table:
    """Every run, with what is known of it."""
    r = results

    def known(column: str, form: str) -> Callable[[int], str]:
        values = getattr(r, column)
        return lambda i: format(v, form) if (v := float(values[i])) == v and v else "-"

    return Table(
        "",
        [
            Column("run", lambda i: str(r.name[i])),
            Column("heads, KV", lambda i: pair(r.heads[i])),
            Column(
                "L x d", lambda i: f"{r.n_layers[i]} x {r.d_model[i]}" if r.n_layers[i] else "-"
            ),
            Column("N", lambda i: f"{r.n_params[i]:,.0f}", r.count),
            Column("context", known("context_length", ",.0f"), "tokens"),
            Column("training tokens", known("tokens", ",.0f")),
            Column("seed", lambda i: str(r.seed[i])),
            Column("learning rate", known("learning_rate", "g")),
            Column("epochs", known("epochs", ".2f")),
            Column("loss", lambda i: f"{r.loss[i]:.4f}", "nats"),
        ],
        range(len(r)),
        about=f"{len(r)} runs from {r.source}"
        + (f"; not finished: {', '.join(r.missing)}" if r.missing else "")
        + f". N is {r.count}, without embeddings; loss in nats per token.",
    )


def _made(study: Study) -> Table:
    """With what, and on what, the runs were trained."""
    r, p = study.results, study.results.provenance
    versions = ", ".join(f"{k} {v}" for k, v in sorted((p.get("versions") or {}).items()))
    seconds = p.get("training_seconds")
    facts = [
        ("experiment", p.get("experiment")),
        ("gqa-scaling", __version__),
        ("versions", versions),
        ("devices", ", ".join(map(str, p.get("devices") or []))),
        ("training time, all runs", f"{seconds:,.0f} s" if seconds else ""),
        ("corpus hash", r.corpus[0]),
        ("tokenizer hash", r.tokenizer[0]),
        ("vocabulary", f"{r.vocab_size[0]:,} tokens" if r.vocab_size[0] else ""),
        ("evaluation hash", r.evaluation[0]),
        ("training seeds", ", ".join(map(str, sorted(set(r.seed.tolist()))))),
        ("intervals", study.fit.how),
    ]
    known = [(name, str(value)) for name, value in facts if value]
    return Table("", [Column("", lambda fact: fact[0]), Column("", lambda fact: fact[1])], known)
