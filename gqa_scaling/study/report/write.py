"""What `report` writes: the page alone, and beside it only what was asked for."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gqa_scaling.config import Question
from gqa_scaling.files.storage import as_path
from gqa_scaling.study.judged import to_dict
from gqa_scaling.study.report.carried import Again
from gqa_scaling.study.report.csv_files import frontier_csv, results_csv
from gqa_scaling.study.report.files import TENSORBOARD, settled, signed, write_files, write_page
from gqa_scaling.study.report.page import (
    judged_page,
    judged_sections,
    markdown,
    sections,
    study_page,
)
from gqa_scaling.study.results import Results
from gqa_scaling.study.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["svg", "pdf"]
PARTS = (
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


@dataclass(frozen=True)
class Beside:
    """What is written beside the page: static figures, the data as CSV and JSON, TensorBoard events."""

    figures: Format | None = None
    data: bool = False
    tensorboard: bool = False

    def names(self, pictures: Iterable[str]) -> tuple[str, ...]:
        """Every file that this may write; those for TensorBoard by how their names begin."""
        out = [f"figures/{name}.{self.figures}" for name in pictures] if self.figures else []
        out += ["results.csv", "frontier.csv", *(f"{n}.json" for n in PARTS)] if self.data else []
        return (*out, TENSORBOARD) if self.tensorboard else tuple(out)


NOTHING = Beside()


def write_report(
    path: Path | str,
    study: Study,
    command: str = "",
    again: Again | None = None,
    beside: Beside = NOTHING,
) -> Path:
    """Write the page to `path`, and beside it what is asked for; every file appears whole.

    `command` and `again` as in `page.study_page`. Returns the page's path. Raises UserError, and
    writes nothing, where it would replace a file that no report wrote (`files`).
    """
    path = settled(as_path(path))
    written: dict[str, bytes] = {}
    if beside.figures or beside.tensorboard:
        from gqa_scaling.study.report.pictures import all_figures, cards  # a second to load

        figures = all_figures(study)
        told = markdown(sections(study)) if beside.tensorboard else {}
        images = cards(study) if beside.tensorboard else {}
        written |= _figures(figures, images, told, beside)
    if beside.data:
        data: dict[str, Any] = {"fit": study.fit.to_dict(), "frontier": study.frontier.to_dict()}
        data |= study.estimated()
        data |= {"forecasts": study.forecasts.to_dict()} if study.forecasts else {}
        data |= {"sparsity": study.sparsity.to_dict()} if study.sparsity else {}
        data |= {"sensitivity": study.sensitivity.to_dict()} if study.sensitivity else {}
        data |= {"judged": judged} if (judged := to_dict(study.results)) else {}
        written["results.csv"] = results_csv(study.results).encode()
        written["frontier.csv"] = frontier_csv(study.frontier).encode()
        written |= {f"{name}.json": _json(value) for name, value in data.items()}
    _write(path, study_page(study, command, again), written)
    return path


def write_judged(
    path: Path | str,
    results: Results,
    question: Question,
    reason: str,
    command: str = "",
    beside: Beside = NOTHING,
) -> Path:
    """The page of runs that no law can be fitted to, for this reason: what each was judged by."""
    path = settled(as_path(path))
    written: dict[str, bytes] = {}
    if beside.figures or beside.tensorboard:
        from gqa_scaling.study.report.loss_pictures import loss_against_shape, needle_maps
        from gqa_scaling.study.report.pictures import rendered

        drawn = {"needles": needle_maps(results), "loss_against_shape": loss_against_shape(results)}
        figures = {name: figure for name, figure in drawn.items() if figure is not None}
        images = {name: rendered(figure, "png") for name, figure in figures.items()}
        written |= _figures(figures, images, markdown(judged_sections(results)), beside)
    if beside.data:
        written["results.csv"] = results_csv(results).encode()
        written["judged.json"] = _json(to_dict(results))
    _write(path, judged_page(results, question, reason, command), written)
    return path


def _write(path: Path, page: str, written: dict[str, bytes]) -> None:
    if written:
        write_files(path.parent, written)
    write_page(path, signed(page))


def _figures(
    figures: "dict[str, Figure]", images: dict[str, bytes], told: dict[str, str], beside: Beside
) -> dict[str, bytes]:
    """The static figures as files; images (PNG) and tables as TensorBoard events."""
    from gqa_scaling.study.report.pictures import rendered
    from gqa_scaling.study.report.tensorboard import events_file

    out = {}
    if beside.figures:
        for name, figure in figures.items():
            out[f"figures/{name}.{beside.figures}"] = rendered(figure, beside.figures)
    if beside.tensorboard:
        now, events = events_file(images, told)
        out[TENSORBOARD + now] = events
    return out


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
