"""Starts, needles and evaluations that no run can have."""

import pytest
from bad_input_kit import PLAN, TINY

from gqa_scaling import cli


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("start_from='tiny' must be EXPERIMENT/NAME-DIGEST", "--start-from tiny"),
        ("start_from='older/x' must be EXPERIMENT/NAME-DIGEST", "--start-from older/x"),
        ("share=0.0 must be greater than 0 and at most 1", "--data.needles.share 0"),
        ("share=1.5 must be greater than 0 and at most 1", "--data.needles.share 1.5"),
        ("missing field data.needles.share", "--data.needles.form tokens"),
        ("form='word' must be one of", "--data.needles.form=word"),
        ("seed=-1 must not be negative", "--data.needles.share 0.5 --data.needles.seed -1"),
        ("must be one of repeated, number, uuid, tokens", "--evaluation.needles.form x"),
        ("length=0 must be a number from 1", "--evaluation.needles.lengths 0"),
        ("depths=0 must be greater than 0", "--evaluation.needles.depths 0"),
        ("trials=10001 must be at most 10,000", "--evaluation.needles.trials 10001"),
        (
            "contexts=3 must divide the longest context of the evaluation, 32",
            "--evaluation.contexts 3",
        ),
        (
            "--evaluation.contexts='x' must be a whole number such as 1000000",
            "--evaluation.contexts 8,x",
        ),
        ("average=0 must be a number from 1", "--evaluation.average 0"),
        ("average=2 must be at most 1: of 10 steps a state", "--evaluation.average 2"),
    ],
)
def test_fields(refused, said, arguments):
    refused(said, *PLAN, *arguments.split())


def test_a_parent_of_another_architecture_is_refused_when_planned(refused, workplace):
    (workplace / "experiments/wide.py").write_text(
        "from dataclasses import replace\n"
        "from experiments import tiny\n"
        "from gqa_scaling.experiment.starts import start_of\n"
        "def runs():\n"
        "    first = tiny.runs()[0]\n"
        "    wide = replace(first.model, d_model=64)\n"
        "    return [first, replace(first, name='wide', model=wide, start_from=start_of(first, 'wide'))]\n"
    )
    said = "wide cannot start from L1-h1, which has another architecture (model.d_model: 32 -> 64)"
    refused(said, "plan", "experiments.wide", "--hardware", "v5e")


def test_a_parent_that_is_nowhere_is_missed_by_run(refused, workplace, capsys):
    (workplace / "texts").mkdir()
    for i in range(40):
        (workplace / f"texts/{i}.txt").write_text(f"document {i} " * 30)
    more = ("--data.corpus", "texts", "--start-from", "older/x-0123456789ab")
    assert cli.main(("prepare", TINY, *more)) == 0
    capsys.readouterr()
    said = "starts from older/x-0123456789ab, and runs/older/x-0123456789ab is not finished"
    refused(said, "run", TINY, *more, "--quiet", "--evaluation.tokens", "64")
