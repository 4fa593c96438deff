"""The data of a study as CSV files: its runs, and every configuration of its answers."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from gqa_scaling.study.candidates import KNOWN
from gqa_scaling.study.frontier import Frontier
from gqa_scaling.study.report.answers import saved_kinds
from gqa_scaling.study.results import Results, pattern_of

HEADER = "name,n_heads,n_kv_heads,"  # what a CSV file of our runs begins with


def results_csv(results: Results) -> str:
    """The runs as a CSV that `reading.from_csv` reads; unknown values are left empty."""
    rows = [
        {
            k: ""
            if v is None or (v == 0 and k not in ("seed", "epochs", "gained_by_rereading"))
            else v
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
            pattern = pattern_of(c.heads)
            sparse = {"pattern": pattern.label if pattern else "", "t_eff": c.effective}
            row = {
                "context_tokens": answer.context,
                "loss_nats": answer.loss,
                "rank": rank,
                "n_heads": c.heads[0],
                "n_kv_heads": c.heads[1],
                **(sparse if frontier.sharded else {}),
                "known": KNOWN[c.known],
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
                "within": c.within,
                "regret": c.regret,
                "unreachable": c.unreachable,
                "extrapolated": int(c.extrapolated),
            }
            if rank == 1:
                row |= {f"excess_by_{law}": excess for law, excess in answer.under.items()}
            for kind in saved_kinds(frontier):
                row[f"{kind}_saving"] = c.saving[kind]
                row[f"{kind}_saving_low"], row[f"{kind}_saving_high"] = c.saving_interval[kind]
            e = c.equal_cost
            row |= {"equal_cost_n": e.n, "equal_cost_loss_nats": e.loss, "gain_nats": e.gain}
            row["gain_low"], row["gain_high"] = e.gain_interval
            row["equal_cost_extrapolated"] = int(e.extrapolated)
            rows.append(row)
    return _csv(list(rows[0]), rows)  # the first row is of an answer's best, which has every column


def _csv(header: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
