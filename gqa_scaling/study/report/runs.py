"""The finished runs of a study as a table, and what made them."""

import time
from collections.abc import Callable

import numpy as np

from gqa_scaling import __version__
from gqa_scaling.study.report.table import Column, Table
from gqa_scaling.study.results import Results, pair
from gqa_scaling.units import count
from gqa_scaling.versions import commit

_GAINED = (
    "Gained by context: the loss at the first positions of a sequence minus that at the last, of as many equal "
    "parts as the evaluation tells apart (at most 32)."
)
_REREAD = (
    "Gained by rereading: the loss on held-out text minus that on the same text right after it."
)


def runs_table(results: Results) -> Table:
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
            *_gains(r),
        ],
        range(len(r)),
        [
            f"{count(len(r), 'run')} from {r.source}. N is {r.count}, without embeddings; loss in nats per token.",
            *([_GAINED] if r.positions else []),
            *([_REREAD] if _reread(r) else []),
            *([f"Not finished: {', '.join(r.missing)}."] if r.missing else []),
        ],
    )


def _reread(r: Results) -> bool:
    return bool(np.isfinite(r.gained_by_rereading).any())


def _gains(r: Results) -> list[Column]:
    """What context gains a run: its loss at the first positions minus that at the last; and what it
    gains to read a text again."""

    def gain(i: int) -> str:
        losses = r.positions.get(str(r.name[i]), ())
        return f"{losses[0] - losses[-1]:.3f}" if losses else "-"

    reread = r.gained_by_rereading

    def again(i: int) -> str:
        return f"{reread[i]:.3f}" if np.isfinite(reread[i]) else "-"

    return [
        *([Column("gained by\ncontext", gain, "nats", spare=1)] if r.positions else []),
        *([Column("by\nrereading", again, "nats", spare=1)] if _reread(r) else []),
    ]


def made_by(results: Results, intervals: str = "") -> list[tuple[str, str]]:
    """With what, and on what, the runs were trained; `intervals` is how a fit's were made."""
    r, p = results, results.provenance
    versions = ", ".join(f"{k} {v}" for k, v in sorted((p.get("versions") or {}).items()))
    seconds = p.get("training_seconds")
    days = [time.strftime("%Y-%m-%d", time.gmtime(second)) for second in p.get("began") or ()]
    commits = {name or "not noted": n for name, n in (p.get("commits") or {}).items()}
    facts = [
        ("experiment", p.get("experiment")),
        ("versions", versions),
        ("runs by commit", ", ".join(f"{name}: {n}" for name, n in commits.items())),
        ("devices", ", ".join(map(str, p.get("devices") or []))),
        ("begun", " to ".join(dict.fromkeys(days))),
        ("training time, all runs", f"{seconds:,.0f} s" if seconds else ""),
        ("corpus hash", r.corpus[0]),
        ("tokenizer hash", r.tokenizer[0]),
        ("vocabulary", f"{r.vocab_size[0]:,} tokens" if r.vocab_size[0] else ""),
        ("evaluation hash", r.evaluation[0]),
        ("training seeds", ", ".join(map(str, sorted(set(r.seed.tolist()))))),
        ("intervals", intervals),
        ("this was written by", f"gqa-scaling {__version__} {commit()}".strip()),
    ]
    return [(name, str(value)) for name, value in facts if value]


def made_table(results: Results, intervals: str) -> Table:
    """The same on the page."""
    columns = [Column("", lambda fact: fact[0]), Column("", lambda fact: fact[1])]
    return Table("", columns, made_by(results, intervals))
