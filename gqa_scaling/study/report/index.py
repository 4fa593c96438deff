"""One page for a folder of several studies: what each report says, and the way to it."""

import html
import json
import re
import string
from os.path import relpath
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gqa_scaling.config import require
from gqa_scaling.files.storage import as_path, is_remote
from gqa_scaling.study.report.files import is_page, signed, write_page
from gqa_scaling.study.report.page import SUMMARY, part

_SUMMARY = re.compile(
    rb'<script type="application/json" id="' + SUMMARY.encode() + rb'">(.*?)</script>', re.DOTALL
)
DEPTH = 2  # folders below that are looked into: runs/NAME/report.html, and one more


def write_index(path: Path, folder: Path) -> list[str]:
    """Write to `path` what every report in and below `folder` answers; returns their places."""
    folder = as_path(folder)
    patterns = ["*/" * depth + "*.html" for depth in range(DEPTH + 1)]
    pages = sorted({page for pattern in patterns for page in folder.glob(pattern)}, key=str)
    found = [(page, told) for page in pages if page != path and (told := summary(page))]
    require(
        bool(found),
        f"{folder} holds no report: write some first, such as `gqa-scaling report experiments.smoke`",
    )
    items = "\n".join(_item(_link(page, path), told) for page, told in found)
    text = string.Template(part("index.html")).substitute(
        title=html.escape(f"Cost-optimal GQA: {len(found)} studies"),
        style=part("page.css"),
        count=f"{len(found)} {'study' if len(found) == 1 else 'studies'}",
        items=items,
    )
    write_page(path, signed(text))
    return [str(page) for page, _ in found]


def summary(page: Path) -> dict[str, Any] | None:
    """What a report says of itself; None for a file that no report wrote."""
    data = page.read_bytes()
    told = _SUMMARY.search(data) if is_page(data) else None
    return json.loads(told[1]) if told else None


def _link(page: Path, index: Path) -> str:
    return str(page) if is_remote(page) else quote(Path(relpath(page, index.parent)).as_posix())


def _item(link: str, told: dict[str, Any]) -> str:
    words = {name: html.escape(told[name]) for name in ("title", "question", "answer")}
    return (
        f'<article><h2><a href="{html.escape(link)}">{words["title"]}</a></h2>'
        f'<p class="quiet">{words["question"]}</p><p>{words["answer"]}</p></article>'
    )
