"""What a trained model is judged by beside its loss: contexts, needles, averages of states."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_kit import tiny_run, write_corpus

from gqa_scaling import cli
from gqa_scaling.config import DataConfig, NeedleTask, Question, RunConfig, UserError
from gqa_scaling.data import TokenStore, open_store, prepare
from gqa_scaling.data.loader import heldout_chunks
from gqa_scaling.data.needles import Prompt, needle_prompt
from gqa_scaling.devices import processes
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.checkpoint import Checkpoints, load_parameters
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.inference import needles
from gqa_scaling.inference.hugging_face_export import export
from gqa_scaling.inference.hugging_face_import import import_folder
from gqa_scaling.inference.trained import open_trained
from gqa_scaling.sweep import run as sweep
from gqa_scaling.training import judging
from gqa_scaling.training.setup import Setup, set_up

TASK = NeedleTask(lengths=(24, 32), depths=3, trials=3, form="tokens")


def judged(**asked: object) -> RunConfig:
    return tiny_run(evaluation=dataclasses.replace(tiny_run().evaluation, **asked))


def evaluate(run: RunConfig) -> dict:
    """The run's evaluation, of the finished run in this working directory."""
    assert sweep.run_sweep(Experiment("tiny", (run,), Question()), Path("runs")).done == 1
    return finished().result()["result"]["evaluations"][run.evaluation_digest]


def finished() -> RunDirectory:
    return run_directory("runs", "tiny", tiny_run())


def model_of(setup: Setup) -> nnx.Module:
    return nnx.merge(setup.graph, load_parameters(finished().parameters, setup.parameters))


@pytest.fixture(autouse=True)
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def test_losses_by_context_are_of_the_same_targets_with_less_before_them() -> None:
    found = evaluate(judged(contexts=(8, 32)))
    assert found["loss_by_context"]["32"] == pytest.approx(found["loss"], rel=1e-6)
    chunks = heldout_chunks(open_store(tiny_run().data), 8, 1024, 32)
    assert len(chunks) * 8 == found["targets"]
    model = model_of(set_up(tiny_run()))
    logits = np.asarray(model.logits(model(chunks[:, :-1])), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logp, chunks[:, 1:, None], -1)
    assert found["loss_by_context"]["8"] == pytest.approx(nll.mean(), rel=1e-5)


def test_what_is_read_twice_is_the_same_text_again() -> None:
    """The targets of both readings are the same, and both readings are means over them."""
    run = tiny_run()
    found = finished().result()["result"]["evaluations"][run.evaluation_digest]
    half = run.context_length // 2
    text = heldout_chunks(open_store(run.data), run.context_length, 1024, 32)[:, :half]
    model = model_of(set_up(run))
    logits = np.asarray(model.logits(model(np.concatenate([text, text], 1))), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for name, of in (("first", logp[:, : half - 1]), ("second", logp[:, half:-1])):
        nll = -np.take_along_axis(of, text[:, 1:, None], -1)
        assert found[f"loss_of_{name}_reading"] == pytest.approx(nll.mean(), rel=1e-5)
    events = EventAccumulator(str(finished().path)).Reload()
    gained = found["loss_of_first_reading"] - found["loss_of_second_reading"]
    last = events.Scalars("evaluation/gained_by_rereading")[-1]
    assert (last.step, last.value) == (24, pytest.approx(gained, abs=1e-6))


def test_the_verb_reads_twice_what_an_earlier_version_judged() -> None:
    whole, digest = finished().result(), tiny_run().evaluation_digest
    before = dict(whole["result"]["evaluations"][digest])
    for name in ("first", "second"):
        del whole["result"]["evaluations"][digest][f"loss_of_{name}_reading"]
    finished().result_file.write_text(json.dumps(whole))
    assert cli.main(["judge", str(finished().path)]) == 0
    again = finished().result()["result"]["evaluations"][digest]
    assert again["loss_of_second_reading"] == pytest.approx(before["loss_of_second_reading"])
    assert again["loss"] == pytest.approx(before["loss"])


def test_an_answer_counts_where_greedy_decoding_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are what greedy decoding, one token at a time, gives; some then have a token changed."""
    setup = set_up(tiny_run())
    model = model_of(setup)

    @jax.jit
    def after(tokens: jax.Array) -> jax.Array:
        return jnp.argmax(model.logits(model(tokens[None]))[0], -1)

    def prompt(store: TokenStore, length: int, depth: float, *named: object) -> Prompt:
        made = needle_prompt(store, length, depth, *named)
        tokens, trial = made.tokens.copy(), named[-1]
        for place in range(length - 3, length + 1):
            tokens[place] = after(tokens[:-1])[place - 1]
        if depth == 1 or trial == 1:  # at the last depth all are wrong, before it one of three
            wrong = length - (trial if depth == 1 else 2)
            tokens[wrong] = (tokens[wrong] + 1) % 257
        return Prompt(tokens, tokens[-4:])

    monkeypatch.setattr(needles, "needle_prompt", prompt)
    found = evaluate(judged(needles=TASK))["needles"]
    assert found["accuracy"].keys() == {"24", "32"}
    assert found["depths"] == [0, 0.5, 1]
    for shares in found["accuracy"].values():
        assert shares == pytest.approx([2 / 3, 2 / 3, 0])


def test_a_model_that_has_not_seen_the_task_finds_nothing() -> None:
    found = evaluate(judged(needles=TASK))
    assert all(share == 0 for shares in found["needles"]["accuracy"].values() for share in shares)
    events = EventAccumulator(str(finished().path)).Reload()
    (curve,) = [t for t in events.Tags()["scalars"] if t == "needles/accuracy_at_24_tokens"]
    assert [(e.step, e.value) for e in events.Scalars(curve)] == [(0, 0), (50, 0), (100, 0)]


def forbidden(*args: object) -> float:
    raise AssertionError("is known already")


def test_parts_that_are_known_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = judging.needles_found, []

    def killed_once(decoder: object, store: object, task: object, *at: float) -> float:
        asked.append(at[:2])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(decoder, store, task, *at)

    monkeypatch.setattr(judging, "needles_found", killed_once)
    with pytest.raises(KeyboardInterrupt):
        evaluate(judged(needles=TASK, contexts=(8,)))
    found = evaluate(judged(needles=TASK, contexts=(8,)))
    assert asked == [(24, 0), (24, 0.5), (24, 1), (24, 1), (32, 0), (32, 0.5), (32, 1)]
    monkeypatch.setattr(judging, "needles_found", forbidden)
    monkeypatch.setattr(judging, "load_decoder", forbidden)  # nor are the parameters read
    shorter = evaluate(judged(needles=dataclasses.replace(TASK, lengths=(24,), depths=2)))
    whole = found["needles"]["accuracy"]["24"]
    assert shorter["needles"]["accuracy"]["24"] == [whole[0], whole[2]]


def test_plain_runs_have_neither_the_file_nor_the_fields(trained: Path) -> None:
    assert not finished().judged_file.exists()
    whole = finished().result()["result"]
    text = json.dumps(whole)
    for name in ("needles", "contexts", "average", "start_from", "loss_by_context"):
        assert name not in text


# ------------------------------------------------------------------------------------ the verb


def test_a_finished_run_is_judged_beyond_its_context(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished().result()["result"]["evaluations"]
    words = ["judge", str(finished().path), "--contexts", "8", "64", "--needles", "tokens"]
    words += ["--lengths", "24", "64", "--depths", "2", "--trials", "2", "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    value = found["evaluation"]
    assert value["loss_by_context"].keys() == {"8", "64"}
    assert value["needles"]["accuracy"].keys() == {"24", "64"}
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    after = finished().result()["result"]["evaluations"]
    assert {digest: after[digest] for digest in before} == before
    monkeypatch.setattr("gqa_scaling.training.loop.reevaluate", forbidden)
    assert cli.main(words) == 0  # known
    assert json.loads(capsys.readouterr().out) == found
    assert cli.main(words[:-1]) == 0
    said = capsys.readouterr().out
    assert "Loss by context" in said
    assert "Needles found (tokens), by depth in the text and by its length" in said


def test_an_imported_model_is_judged_on_the_text_that_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    export(open_trained(finished()), Path("exported"), "float32")
    directory, _ = import_folder(Path("exported"), "tiny", Path("runs"), None)
    write_corpus(Path("longer"), documents=80)
    for corpus in ("corpus", "longer"):
        tokenizer = str(directory.path / "tokenizer.json")
        prepare(
            DataConfig(corpus, tokenizer, heldout_fraction=0.2, store=f"of-{corpus}"), show=False
        )

    def judged_on(corpus: str, *contexts: str) -> dict:
        words = [
            "judge",
            str(directory.path),
            "--store",
            f"of-{corpus}",
            "--tokens",
            "512",
            "--json",
        ]
        assert cli.main([*words, "--contexts", *contexts]) == 0
        return json.loads(capsys.readouterr().out)["evaluation"]

    first, other = judged_on("corpus", "8"), judged_on("longer", "8")
    assert other["hash"] != first["hash"]
    assert other["loss"] != first["loss"]
    assert other["loss_by_context"] != first["loss_by_context"]
    assert judged_on("longer", "8", "16")["loss_by_context"]["8"] == other["loss_by_context"]["8"]
    assert judged_on("corpus", "8") == first


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--contexts 24", "contexts=24 must divide the longest context of the evaluation, 32"),
        ("--needles number --lengths 8", "lengths=8 is too short"),
        ("--trials 0", "trials=0 must be greater than 0"),
        ("--contexts x", "invalid int value: 'x'"),
        ("--contexts 8 --store elsewhere", "there is no token store at elsewhere"),
    ],
)
def test_the_verb_refuses_in_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished().result_file.read_bytes()
    assert cli.main(["judge", str(finished().path), *words.split()]) == 2
    out = capsys.readouterr().err
    assert said in out
    assert out.count("\n") == 1
    assert finished().result_file.read_bytes() == before


# ----------------------------------------------------------------------------------- averages


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[np.ndarray]]:
    """The parameters of every checkpoint that is saved, by step."""
    save, seen = Checkpoints.save, {}

    def noting(self: Checkpoints, step: int, state: tuple, position: dict) -> None:
        seen[step] = [np.asarray(x).copy() for x in jax.tree.leaves(state[0])]
        save(self, step, state, position)

    monkeypatch.setattr(Checkpoints, "save", noting)
    return seen


def test_the_mean_of_the_last_states_is_judged(states: dict[int, list[np.ndarray]]) -> None:
    run = judged(average=4)  # of steps 10, 15, 20 and the last, 24; two checkpoints are kept else
    shutil.rmtree(finished().path)
    found, setup = evaluate(run), set_up(run)
    assert sorted(states) == [5, 10, 15, 20]
    last = jax.tree.leaves(load_parameters(finished().parameters, setup.parameters))
    mean = jax.tree.leaves(load_parameters(finished().averaged(run), setup.parameters))
    for i, array in enumerate(mean):
        wanted = (states[10][i] + states[15][i] + states[20][i] + np.asarray(last[i])) / 4
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-7)
    plain = evaluate(tiny_run())
    assert plain["loss"] != found["loss"]
    assert not finished().checkpoints.exists()
    further = evaluate(judged(average=4, contexts=(8,)))  # of the same mean, which was kept
    assert further["loss"] == found["loss"]


def test_an_average_that_was_not_asked_for_in_time_is_refused() -> None:
    before = finished().result_file.read_bytes()
    with pytest.raises(UserError, match="tiny is finished and its checkpoints are removed"):
        evaluate(judged(average=2))
    assert finished().result_file.read_bytes() == before


def test_an_average_over_a_state_that_is_gone_is_refused_before_the_steps_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.rmtree(finished().path)
    asked = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(processes, "preempted", lambda: next(asked) == 18)
        with pytest.raises(processes.Preempted):
            evaluate(tiny_run())  # of steps 5, 10, 15 and 18 the last two are kept
    before = [line["step"] for line in finished().metrics()]
    with pytest.raises(
        UserError, match=r"average=4 needs the checkpoint of step 10, .* kept 15, 18"
    ):
        evaluate(judged(average=4))
    assert [line["step"] for line in finished().metrics()] == before
    assert not finished().failure_file.exists()
    assert "loss" in evaluate(judged(average=3))  # of steps 15, 20 and 24


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"average": 6}, "evaluation.average=6 must be at most 5"),
        ({"needles": NeedleTask(lengths=(8,))}, "lengths=8 is too short"),
        ({"needles": NeedleTask(lengths=(10**6,))}, "tokens of held-out text"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_training(asked: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        sweep.check(Experiment("tiny", (judged(**asked),), Question()), Path("elsewhere"))
