"""`generate` from a run that was finished without being trained: its weights are those at the start."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from flax import nnx

from gqa_scaling import cli
from gqa_scaling.data.tokenizer import bytes_tokenizer
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.checkpoint import save_parameters
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.model.transformer import create

NAME = "experiments.tiny:L2-h2"


def finished(**changes) -> RunDirectory:
    """The run that `NAME` is."""
    run = next(run for run in load_experiment("experiments.tiny").runs if run.name == "L2-h2")
    directory = run_directory("runs", "tiny", dataclasses.replace(run, **changes))
    data = {"tokenizer_hash": bytes_tokenizer().sha256}
    directory.begin(dataclasses.replace(run, **changes), data)
    save_parameters(directory.parameters, nnx.state(create(run.model, 0)))
    result = {"data": data, "evaluations": {run.evaluation_digest: {"loss": 5.0}}}
    directory.finish(result, {})
    return directory


@pytest.fixture
def generate(workplace, capsys, monkeypatch):
    """generate(*arguments): exit code, stdout, stderr."""
    monkeypatch.setenv("GQA_SCALING_CACHE", str(workplace / "cache"))
    monkeypatch.setattr("gqa_scaling.devices.compilation_cache.keep_compiled", lambda folder: None)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["generate", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_the_same_seed_writes_the_same_text_for_people_and_for_programs(generate):
    path = str(finished().path)
    prompts = ("--prompt", "ü ", "--prompt", "def f")
    code, out, said = generate(path, *prompts, "--tokens", "8", "--seed", "3")
    assert code == 0
    assert "8 prompt tokens, first token after " in said
    code, again, _ = generate(NAME, *prompts, "--tokens", "8", "--seed", "3", "--json")
    found = json.loads(again)
    texts = [row["prompt"] + row["text"] for row in found["texts"]]
    assert out == f"{texts[0]}\n\n{texts[1]}\n"
    assert found["prompt_tokens"] == 8
    assert found["tokens"] == sum(len(row["tokens"]) for row in found["texts"])
    assert all(row["ended"] in ("tokens", "stop") for row in found["texts"])
    assert found["first_token_seconds"] > 0
    *_, other = (generate(path, *prompts, "--tokens", "8", "--seed", "4", "--json")[1],)
    assert json.loads(other)["texts"] != found["texts"]


def test_a_text_ends_with_the_context_and_the_error_of_the_cache_is_said(generate):
    path = str(finished().path)
    how = ("--temperature", "0", "--cache", "int8", "--cache-error")
    _, out, said = generate(path, "--prompt", "x" * 20, "--context", "30", *how)
    assert "the text ends with the context of 30 tokens: --context makes it longer" in said
    assert "int8 cache against float32: logits differ by" in said
    assert "of 29 positions" in said
    assert len(out) <= 31


def unfinished(path: Path) -> None:
    (path / "result.json").unlink()
    (path / "metrics.jsonl").write_text('{"step": 7, "learning/loss": 3.0}\n')


def other_tokenizer(path: Path) -> None:
    whole = json.loads((path / "result.json").read_text())
    whole["result"]["data"]["tokenizer_hash"] = "0" * 64
    (path / "result.json").write_text(json.dumps(whole))


def bpe_without_a_store(path: Path) -> None:
    whole = json.loads((path / "config.json").read_text())
    whole["config"]["data"]["tokenizer"] = "bpe-300"
    (path / "config.json").write_text(json.dumps(whole))


def damaged(path: Path) -> None:
    for file in (path / "parameters").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", ""), "--prompt '' is empty: give it some text"),
        ((), "--prompt"),
        (("--prompt", "x" * 40), "prompt 1 has 40 tokens and the context is 32: shorten it, or give "
         "--context 296; the model was trained on 32"),
        (("--prompt", "x", "--tokens", "0"), "--tokens 0 must be greater than 0"),
        (("--prompt", "x", "--tokens", "9" * 20), "must be greater than 0 and at most 2,147,483,647"),
        (("--prompt", "x", "--context", "9" * 20), "must be greater than 0 and at most 2,147,483,647"),
        (("--prompt", "x", "--top-p", "2"), "top_p=2.0 must be greater than 0 and at most 1"),
        (("--prompt", "x", "--temperature", "nan"), "--temperature"),
        (("--prompt", "x", "--cache", "int4"), "--cache"),
        (("--prompt", "x", "--seed", "-1"), "--seed -1 must lie between 0 and 2^31 - 1"),
        (("--prompt", "x", "--model.n-layers", "3"), "changes runs of a grid"),
        (("--prompt", "\udcff"), "is no UTF-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_one_line(generate, arguments, said):
    code, out, err = generate(str(finished().path), *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_memory_that_is_full_is_told_in_one_line(generate, monkeypatch):
    def full(*args: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9\nmore")

    monkeypatch.setattr("gqa_scaling.inference.generate.empty_cache", full)
    code, _, err = generate(str(finished().path), "--prompt", "x")
    assert (code, err.count("\n")) == (2, 1)
    assert "the devices' memory is full (Out of memory allocating 9): ask for less" in err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (unfinished, "is unfinished (pending, at step 7): finish it with `gqa-scaling run`"),
        (other_tokenizer, "was trained with another tokenizer than bytes"),
        (bpe_without_a_store, "the tokenizer 'bpe-300' is gone: there is no token store at"),
        (damaged, "is damaged"),
    ],
)
def test_a_run_that_cannot_write_is_refused_in_one_line(generate, damage, said):
    path = finished().path
    damage(path)
    code, out, err = generate(str(path), "--prompt", "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("runs/tiny", "runs/tiny is no run: it holds 1: name one of L2-h2-"),
        ("experiments.tiny", "'experiments.tiny' names no run: give its directory, or EXPERIMENT:NAME"),
        ("experiments.tiny:L2-h3", "experiments.tiny has no run named 'L2-h3' (did you mean"),
        ("experiments.tiny:L1-h1", "L1-h1 has not been started: there is no runs/tiny/L1-h1-"),
        ("nowhere", "'nowhere' names no run"),
    ],
)  # fmt: skip
def test_a_name_of_no_run_is_refused_in_one_line(generate, source, said):
    finished()
    code, out, err = generate(source, "--prompt", "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
