"""The page: one HTML file that answers the question, and can be asked others, with no server."""

import base64
import functools
import html
import importlib.util
import json
import re
import string
from collections.abc import Container, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from gqa_scaling.config import Question, UserError, require
from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.compare import compare
from gqa_scaling.study.frontier import Frontier
from gqa_scaling.study.report import answers, estimates, tradeoffs
from gqa_scaling.study.report.assumptions import sensitivity_table
from gqa_scaling.study.report.carried import Again, carried
from gqa_scaling.study.report.charts import charts
from gqa_scaling.study.report.clocked import clock_table
from gqa_scaling.study.report.csv_files import results_csv
from gqa_scaling.study.report.forecasts import forecast_table
from gqa_scaling.study.report.judged import judged_tables
from gqa_scaling.study.report.runs import made_table, runs_table
from gqa_scaling.study.report.sentences import model_text, sentence
from gqa_scaling.study.report.shape_axes import shape_tables
from gqa_scaling.study.report.table import Column, Table, card_styles
from gqa_scaling.study.results import Results, flags
from gqa_scaling.study.study import Study
from gqa_scaling.study.tokens import spans_budgets

MOST_COMPARED = 40  # configurations: each is left out in turn, of every law, of all the others
_BOKEH = ("bokeh.min.js", "bokeh-api.min.js")  # of its wheel: plots, and how to describe them
NUMERICS = (
    "patterns.js",
    "clock.js",
    "numerics.js",
    "words.js",
    "question.js",
)  # these know of no page
SCRIPTS = (*NUMERICS, "drawing.js", "pictures.js", "page.js")
SUMMARY = "summary"  # the element that tells an index of several pages what this one says

Section = tuple[str, Sequence[Table | str]]  # a heading, then tables and HTML


def study_page(study: Study, command: str = "", again: Again | None = None) -> str:
    """The page of a study; the same for the same study.

    `command` is what wrote it, and `again` the command that prints the same answer to the question
    that is asked on the page.
    """
    frontier, drawn = study.frontier, charts(study)
    contexts = ", ".join(f"{c:,}" for c in frontier.question.contexts)
    return _filled(
        title=study.results.source,
        asked=f"Which head configuration reaches a loss at {contexts} tokens of context for the "
        f"least {'hardware-aware cost ' if frontier.objective == 'z' else ''}"
        f"{OBJECTIVES[frontier.objective]}?",
        demonstration=frontier.question.demonstration,
        answer=sentence(frontier),
        flags=frontier.flags,
        told=sections(study, drawn),
        command=command,
        decide=part("decide.html"),
        carried=carried(study, again or Again("", Question())),
        charts=drawn,
    )


def judged_page(results: Results, question: Question, reason: str, command: str = "") -> str:
    """The page of runs that no law can be fitted to, for this reason: what each was judged by."""
    told: list[Section] = [
        *judged_sections(results),
        ("Every run", [runs_table(results), _download(results)]),
    ]
    return _filled(
        title=results.source,
        asked="What are these models worth?",
        demonstration=question.demonstration,
        answer=f"No law is fitted to these runs, and none is the cheapest: {reason}.",
        flags=flags(results),
        told=told,
        command=command,
    )


def judged_sections(results: Results) -> list[Section]:
    """What runs are worth without a law."""
    return [
        ("Shape at the same N", shape_tables(results)),
        ("What they were judged by", judged_tables(results)),
    ]


def _filled(
    *,
    title: str,
    asked: str,
    demonstration: bool,
    answer: str,
    flags: Iterable[str],
    told: Iterable[Section],
    command: str,
    decide: str = "",
    carried: dict[str, Any] | None = None,
    charts: dict[str, Any] | None = None,
) -> str:
    label = (
        '<p><span class="demo">demonstration</span> These models are too small and too few to decide '
        "anything by.</p>"
    )
    known = [html.escape(flag) for flag in flags]
    items = "".join(f"<li>{flag}</li>" for flag in known)
    care = f"<b>Read with care</b> ({len(known)}), of the question as the page opens"
    summary = {"title": title, "question": asked, "answer": answer}
    return string.Template(part("page.html")).substitute(
        title=html.escape(f"Cost-optimal GQA: {title}"),
        source=html.escape(title),
        style=f"{part('page.css')}\n{card_styles()}",
        question=html.escape(asked),
        label=label if demonstration else "",
        answer=html.escape(answer),
        flags=f'<details class="flags"><summary>{care}</summary><ul>{items}</ul></details>'
        if known
        else "",
        decide=decide,
        sections="\n".join(
            f"<details><summary><h2>{html.escape(heading)}</h2></summary>\n"
            + "\n".join(part.html() if isinstance(part, Table) else part for part in parts)
            + "\n</details>"
            for heading, parts in told
            if parts
        ),
        command=" ".join(
            f'<span class="option">{html.escape(part)}</span>'
            for part in re.split(r" (?=--)", command or "gqa_scaling.study.report")
        ),
        scripts=_json(SUMMARY, summary) + (_scripts(carried, charts or {}) if carried else ""),
    )


def _scripts(carried: dict[str, Any], charts: dict[str, Any]) -> str:
    """What the page computes with and draws with; Bokeh is a third of a library, and all of it local."""
    code = [*map(_bokeh, _BOKEH), *map(part, SCRIPTS)]
    return "\n".join(
        [
            _json("carried", carried),
            _json("charts", charts),
            *(f"<script>\n{_in_a_script(text)}\n</script>" for text in code),
        ]
    )


def _json(name: str, value: Any) -> str:
    """A value in the page, as data: nothing in it can end its element."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _in_a_script(code: str) -> str:
    """JavaScript that cannot end the element that it stands in."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", code, flags=re.IGNORECASE)


def part(name: str) -> str:
    """A file that lies beside this module, as text."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _bokeh(name: str) -> str:
    """A file of BokehJS, out of Bokeh's wheel; Bokeh itself, which takes a second to load, is not."""
    found = importlib.util.find_spec("bokeh")
    if found is None or found.origin is None:
        raise UserError("the page draws with bokeh, which is not installed: pip install bokeh")
    folder = Path(found.origin).parent / "server" / "static" / "js"
    text = (folder / name).read_text(encoding="utf-8")
    return re.sub(r"^//# sourceMappingURL=.*$", "", text, flags=re.MULTILINE)


def sections(study: Study, drawn: Container[str] = ()) -> Iterator[Section]:
    """Every section below the answer, with places for the charts that are `drawn`. A table of its own is
    one function and a line here."""
    frontier, sparse, aligned = study.frontier, study.sparsity, study.aligned

    def chart(name: str) -> list[str]:
        return [f'<div class="chart plot" data-chart="{name}"></div>'] if name in drawn else []

    yield "Loss curves of all runs", [*chart("loss_curves"), *chart("residuals")]
    yield (
        "The answers as they were asked for",
        [
            answers.frontier_table(frontier),
            answers.saving_table(frontier),
            answers.gain_table(frontier),
        ],
    )
    if timed := clock_table(frontier):
        yield "By Z and by the clock", [timed]
    yield (
        "Models to build",
        [
            answers.model_table(frontier),
            _training(frontier),
            *([answers.check_table(frontier)] if frontier.checks else []),
        ],
    )
    if study.sensitivity:
        yield "What the answer hangs on", [sensitivity_table(study.sensitivity)]
    if study.forecasts:
        yield (
            "Forecasts, and how they fared",
            [*chart("forecasts"), forecast_table(study.forecasts)],
        )
    if sparse:
        table = tradeoffs.sparsity_table(sparse, frontier.objective)
        yield "Dense and sharded", [table, *chart("positions")]
    yield (
        "Context and training tokens",
        [
            *estimates.wide_law_tables(study.estimates),
            *(tradeoffs.aligned_tables(aligned) if aligned else []),
        ],
    )
    yield "Shape at the same N", shape_tables(study.results)
    yield "What else they were judged by", judged_tables(study.results)
    yield "The fit", [estimates.fit_table(study.fit), *_compared(study)]
    yield "Training curves", chart("training")
    if study.histories.unfinished:
        yield "What failed or is not finished", [_unfinished_table(study)]
    yield "The runs", [runs_table(study.results), _download(study.results)]
    yield "How this was made", [made_table(study.results, study.fit.how), *_config(study)]


def markdown(told: Iterable[Section]) -> dict[str, str]:
    """The tables of every section, for TensorBoard."""
    tables = {
        heading: "\n\n".join(part.markdown() for part in parts if isinstance(part, Table))
        for heading, parts in told
    }
    return {heading: text for heading, text in tables.items() if text}


def _training(frontier: Frontier) -> str:
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


def _unfinished_table(study: Study) -> Table:
    return Table(
        "",
        [
            Column("run", lambda u: u.name),
            Column("state", lambda u: u.state),
            Column("error", lambda u: u.kind or "-"),
            Column("what it said", lambda u: u.why or "-", fold=True),
        ],
        study.histories.unfinished,
        about="They enter no curve. The same command that ran the grid goes on with them.",
    )


def _config(study: Study) -> list[str]:
    if not study.histories.config:
        return []
    text = html.escape(json.dumps(study.histories.config, indent=1, sort_keys=True))
    return [f'<p class="quiet">What all runs were asked for alike:</p><pre>{text}</pre>']


def _download(results: Results) -> str:
    data = base64.b64encode(results_csv(results).encode()).decode()
    return (
        f'<p><a download="results.csv" href="data:text/csv;base64,{data}">Download the runs</a> as the '
        "CSV file that every verb reads.</p>"
    )
