"""Names and notes that a terminal or a table may mistake for markup are printed as they are."""

import io
import sys
from dataclasses import replace
from pathlib import Path

from bad_input_kit import TINY, finished
from rich.console import Console

from gqa_scaling import cli
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.sweep import display
from gqa_scaling.sweep.status import read_status

ODD = "[red]x[/] [/] :smile: {task} \\[b]"


def test_what_names_have_in_brackets_is_printed_as_it_is(workplace, capsys):
    (workplace / "[red].py").write_text("from experiments.tiny import runs\n")
    for verb in ("plan", "status", "checkpoints"):
        more = ("--hardware", "v5e", f"--note={ODD}") if verb == "plan" else ()
        assert cli.main((verb, "[red].py", *more)) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert ("[red]" in out) or verb == "checkpoints"
        assert (f"note: {ODD}" in out) == (verb == "plan")


def test_a_csv_named_and_filled_with_brackets_is_printed_as_it_is(workplace, capsys):
    lines = ["name,n_heads,n_kv_heads,loss,n_params"]
    for i, n in enumerate((1e6, 2e6, 4e6, 8e6, 16e6)):
        lines += [f"{ODD} {i},4,4,{2 + 100 / n**0.3},{n}", f"b{i},4,1,{2.1 + 100 / n**0.3},{n}"]
    Path("run[seed1] [red].csv").write_text("\n".join(lines))
    assert cli.main(("fit", "run[seed1] [red].csv", "--refits", "100")) == 0, (
        capsys.readouterr().err
    )
    out = capsys.readouterr().out
    assert "run[seed1] [red].csv: 10 points" in out
    assert f"{ODD} 0" in out


def test_the_display_of_a_sweep_shows_brackets_as_they_are(workplace):
    tiny = replace(load_experiment(TINY), name=ODD)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with display._progress(console) as progress:
        display._bar(tiny, progress)(read_status(workplace, tiny))
    assert ODD in console.file.getvalue()


def test_watch_shows_brackets_as_they_are(workplace, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    monkeypatch.setattr(sys, "stdout", said)
    for place in finished(workplace):
        place.path.mkdir(parents=True, exist_ok=True)
        place.fail(f"Traceback\nValueError: {ODD}\n", "ValueError")
    assert cli.main(("status", TINY, "--watch")) == 1
    assert ODD in said.getvalue()
