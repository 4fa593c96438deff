"""What the page computes is what the command line prints, whatever is moved."""

import json
import re
import shlex

import pytest
from calibrate_kit import calibrated_file
from hypothesis import given, settings
from hypothesis import strategies as st
from page_kit import Engine, agree, answered, printed

from gqa_scaling.cli import _parse
from gqa_scaling.study.report.csv_files import results_csv
from gqa_scaling.study.report.sentences import sentence
from gqa_scaling.study.report.table import margin, percent
from gqa_scaling.units import byte_size, quantity

REFITS = "--refits 120"


@pytest.fixture(scope="module")
def chen():
    """The published points: a joint law, configurations that were never trained."""
    study, held = answered(f"gqa-scaling frontier chen2025 {REFITS} --losses 2.8 --contexts 131072")
    return study, Engine(held)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A study with patterns, each configuration by a curve of its own."""
    from test_study_sparsity import HYBRID, STRIDED, WINDOW, study

    file = tmp_path_factory.mktemp("sharded") / "runs of mine.csv"
    runs = study((None, STRIDED, HYBRID, WINDOW), heads=((8, 2),), noise=0.001)
    file.write_text(results_csv(runs))
    command = (
        f"gqa-scaling frontier {shlex.quote(str(file))} {REFITS} --losses 2.8 --contexts 65536"
    )
    return *answered(command), file


SETTINGS = [
    {"context": 8192, "loss": 2.65},
    {"lambda": 0.35, "alpha": 0.62, "beta": 0.4, "convention": "per_token"},
    {"baseline": "(8,1)", "indifference": 0.07, "kv_multiple": 2},
    {"baseline": "llama3", "context": 32768},
    {"baseline": "8,8@L24d1536", "loss": 2.9},
    {"objective": "bytes", "batch": 24, "weight_bytes": 1, "cache_bytes": 0.5, "limit_gib": 3},
    {"objective": "dollars", "hardware": "h100", "price": 2.5, "batch": 64},
    {"objective": "seconds", "hardware": "v5e", "candidates": ["(4,1)", "(8,8)", "(4,4)"]},
    {"loss": 2.1, "objective": "flops"},
    {"loss": 2.1, "lambda": 1},
    {"loss": 2.1, "lambda": 0},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda c: ",".join(map(str, c)))
def test_whatever_is_moved_the_command_prints_the_same(chen, capsys, changes):
    told = chen[1].asked(**changes)
    assert told["again"] == told["state"]  # by the way of the address
    agree(told["answer"], printed(told["command"], capsys))


@pytest.mark.parametrize("output", ["", " --output-tokens 512"])
def test_a_machine_that_was_timed_is_priced_as_on_the_command_line(tmp_path, capsys, output):
    path = calibrated_file(tmp_path)
    said = json.loads(path.read_text())
    said["judged"] = [judged | {"ratio": 0.1} for judged in said["judged"]]  # so far off
    path.write_text(json.dumps(said))
    asked = f"--losses 2.8 --contexts 8192 --price 3 --cost {path}{output}"
    study, held = answered(f"gqa-scaling frontier chen2025 {REFITS} {asked}")
    engine = Engine(held)
    assert engine.asked()["sentence"].split("(")[0] == sentence(study.frontier).split("(")[0]
    far = re.search("NOT DECIDED[^.]*[.][^.]*[.]", sentence(study.frontier))[0]
    assert far in engine.asked()["sentence"]
    assert "NOT DECIDED" not in engine.asked(objective="z")["sentence"]
    whole = {"baseline": "8,8@L24d1536", "loss": 2.9}
    for changes in ({}, {"batch": 16, "objective": "dollars"}, {"objective": "z"}, whole):
        told = engine.asked(**changes)
        assert "--cost" in told["command"]
        agree(told["answer"], printed(told["command"], capsys))
    assert "was timed with" in engine.asked(weight_bytes=1)["wrong"]
    assert "--cost" not in engine.asked(hardware="h100")["command"]


@pytest.mark.parametrize(
    "changes", [{}, {"context": 100}, {"context": 5000, "objective": "memory"}]
)
def test_patterns_read_what_they_read_on_the_command_line(sharded, capsys, changes):
    _, held, _ = sharded
    told = Engine(held).asked(**changes)
    answer = printed(told["command"], capsys)
    agree(told["answer"], answer)
    for mine, its in zip(told["answer"]["choices"], answer["choices"], strict=True):
        assert mine["effective"] == pytest.approx(its["effective"], rel=1e-9)


def test_the_sentence_is_that_of_the_command_line_but_for_the_gain(chen, sharded):
    for study, engine in (chen, (sharded[0], Engine(sharded[1]))):
        whole = re.sub(
            r"; or [\d.]+ nats (less|more) at the same [^(]*\([^)]*\)", "", sentence(study.frontier)
        )
        assert engine.asked()["sentence"] == whole


def test_a_question_that_the_command_line_refuses_is_refused_in_one_line(chen):
    engine = chen[1]
    for changes, words in [
        ({"lambda": 1.5}, "λ must be from 0 to 1"),
        ({"context": 0}, "context must be a whole number from 1"),
        ({"loss": None}, "target loss"),
        ({"batch": 1.5}, "batch must be a whole number"),
        ({"objective": "seconds"}, "need hardware"),
        ({"baseline": "16,3@L2d64"}, "24,8@L36d1536"),
        ({"candidates": []}, "rank at least one"),
    ]:
        assert words in engine.asked(**changes)["wrong"]


def test_an_address_of_somebody_elses_is_taken_as_far_as_it_is_one(chen):
    text = "context=4096&nothing=3&candidates=(4,1)|(99,1)&objective=<script>&hardware=toString"
    state = chen[1].run(f"asking.fromAddress({json.dumps(text)})")
    assert (state["context"], state["candidates"]) == (4096, ["(4,1)"])
    assert (state["objective"], state["hardware"]) == ("z", None)


def test_what_the_command_was_given_it_is_given_again(sharded):
    _, held, file = sharded
    command = Engine(held).asked(**{"alpha": 0.25})["command"]
    assert command.startswith(f"gqa-scaling frontier {shlex.quote(str(file))} --refits 120 ")
    args, rest = _parse(shlex.split(command)[1:])
    assert (args.source, args.refits, args.memory_power, rest) == (str(file), 120, 0.25, [])


# ------------------------------------------------------------------------------------- numbers in words

ENGINE = Engine()
VALUES = st.lists(
    st.one_of(
        st.floats(1e-9, 1e19),
        st.floats(1e-9, 2),
        st.integers(0, 4000).map(lambda k: k / 1000),
        st.integers(0, 400).map(lambda k: k / 16),
        st.just(float("inf")),
    ),
    min_size=1,
    max_size=40,
)


@given(VALUES)
@settings(max_examples=40)
def test_numbers_are_written_as_the_command_line_writes_them(values):
    text = "[" + ",".join("Infinity" if v == float("inf") else repr(v) for v in values) + "]"
    finite = [v for v in values if v != float("inf")]
    assert ENGINE.run(f"{text}.map(Words.quantity)") == [quantity(v) for v in values]
    for digits in (0, 1, 2):
        shares = [v for v in finite if v < 1e12]
        written = ENGINE.run(f"{json.dumps(shares)}.map((v) => Words.percent(v, {digits}))")
        assert written == [percent(v, digits) for v in shares]
    bare = json.dumps(finite)
    assert ENGINE.run(f"{bare}.map((v) => Words.costText('bytes', v))") == [*map(byte_size, finite)]
    assert ENGINE.run(f"{bare}.map(Words.margin)") == [*map(margin, finite)]
