"""Finished runs as a table, and the record of each: everything that made its result."""

import json

from gqa_scaling.files.runs import run_directory
from gqa_scaling.study.report.table import Column, Table
from gqa_scaling.study.results import Results, listed, pair
from gqa_scaling.study.source import Source
from gqa_scaling.units import quantity

HEADER = "name,n_heads,n_kv_heads,"  # what a CSV file of runs begins with


def records(source: Source) -> str:
    """A line of JSON for each finished run of an experiment: its whole result.json.

    That is the config, digest, hashes of corpus, tokenizer and evaluation, losses, the attempts with
    the versions and the commit of each, and the speed.
    """
    assert source.experiment is not None
    assert source.root is not None
    names = set(source.results.name.tolist())
    runs = [run for run in source.experiment.runs if run.name in names]
    folders = [run_directory(source.root, source.experiment.name, run) for run in runs]
    return "".join(json.dumps(folder.result(), sort_keys=True) + "\n" for folder in folders)


def runs_table(results: Results) -> Table:
    """A row for each run, in the order in which they were declared."""
    rows = list(range(len(results)))
    columns = [
        Column("run", lambda i: str(results.name[i])),
        Column("heads", lambda i: pair(results.heads[i])),
        Column("L x d", lambda i: f"{results.n_layers[i]}x{results.d_model[i]}"),
        Column("N", lambda i: quantity(results.n_params[i]), "parameters"),
        Column("T", lambda i: f"{results.context_length[i]:,}", "tokens"),
        Column("trained on", lambda i: quantity(results.tokens[i]), "tokens"),
        Column("seed", lambda i: f"{results.seed[i]}"),
        Column("loss", lambda i: f"{results.loss[i]:.4f}", "nats"),
    ]
    notes = [f"N: {results.count}, without embeddings."]
    notes += [f"Not finished: {listed(results.missing)}."] if results.missing else []
    return Table(results.source, columns, rows, notes)
