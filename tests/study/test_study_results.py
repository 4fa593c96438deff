"""Results: our runs, CSV files from elsewhere, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest

from gqa_scaling.config import DataConfig, EvaluationConfig, ModelConfig, RunConfig, UserError
from gqa_scaling.costs import n_exact
from gqa_scaling.runs import run_directory
from gqa_scaling.study import results
from gqa_scaling.study.report import results_csv
from gqa_scaling.study.results import check, flags, from_csv, from_runs, published

HEADER = "n_heads,n_kv_heads,n_layers,d_model,loss"


def _csv(tmp_path, text):
    file = tmp_path / "runs.csv"
    file.write_text(text)
    return file


def _run(name="a", layers=2, seed=0):
    return RunConfig(
        name=name,
        model=ModelConfig(layers, 64, 4, 2, head_dim=16, vocab_size=256, dtype="float32"),
        context_length=32,
        batch_tokens=64,
        tokens=640,
        seed=seed,
        data=DataConfig(),
        evaluation=EvaluationConfig(tokens=1024),
    )


def _finish(root, run, loss=2.0, **changes):
    directory = run_directory(root, "smoke", run)
    directory.path.mkdir(parents=True)
    data = {"store_hash": "s", "corpus_hash": "c", "tokenizer_hash": "t", "vocab_size": 256}
    result = {
        "name": run.name,
        "n_exact": n_exact(run.model),
        "tokens": 640,
        "epochs": 0.5,
        "data": data | changes.pop("data", {}),
        "evaluations": {run.evaluation_digest: {"loss": loss, "hash": changes.pop("hash", "e")}},
        "versions": {"jax": "1"},
    }
    directory.finish(result | changes, {"training_seconds": 2.0})


def test_published_points_are_the_forty_of_figure_2():
    r = published()
    assert len(r) == 40
    assert r.count == "n_formula"
    assert r.ladder == tuple((n, 64 * n) for n in (12, 16, 20, 24, 28, 32))
    at = {
        (h, n): (loss, count)
        for h, n, loss, count in zip(r.heads, r.n_layers, r.loss, r.n_params, strict=True)
    }
    assert at[(8, 8), 12] == (3.1184, 75497472)
    assert r.tokens[0] == 20 * r.n_params[0]


def test_columns_in_any_order_further_ones_and_comments(tmp_path):
    text = "# by hand\nloss, d_model ,who,n_kv_heads,n_layers,n_heads\n\n# more\n2.5,128,me,1,2,4\n"
    r = from_csv(_csv(tmp_path, text))
    assert r.heads == [(4, 1)]
    assert r.n_params[0] == 8 * 2 * 128**2 + 2 * 2 * 128 * 64 * 5
    assert (r.loss[0], r.head_dim[0], r.n_layers[0], r.d_model[0]) == (2.5, 64, 2, 128)
    assert math.isnan(r.tokens[0])


def test_own_parameter_counts_are_kept_and_named(tmp_path):
    r = from_csv(_csv(tmp_path, "n_heads,n_kv_heads,n_params,loss\n4,1,1.5e6,2.5\n"))
    assert r.count == "n_given"
    assert r.n_params[0] == 1.5e6
    assert r.ladder[0] == (4, 256)  # no shapes: the published ladder
    assert any("own count" in f for f in flags(r))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"{HEADER}\n4,1,2,128,2.5\n4,1,x,128,2.4\n", ("line 3", "n_layers", "'x'")),
        (f"# c\n\n{HEADER}\n4,1,2,128,nan\n", ("line 4", "loss", "'nan'")),
        (f"{HEADER}\n4,1,2,128,-2\n", ("line 2", "loss", "'-2'")),
        (f"{HEADER}\n4,1,2.5,128,2\n", ("line 2", "n_layers", "whole")),
        (f"{HEADER}\n4,3,2,128,2\n", ("line 2", "n_kv_heads=3", "n_heads=4")),
        (f"{HEADER}\n4,1,2,128\n", ("line 2", "4 values for 5 columns")),
        (f"{HEADER}\n4,1,2,,2\n", ("line 2", "d_model is empty")),
        ("n_heads,loss,n_params\n4,2,1\n", ("column n_kv_heads is missing",)),
        ("n_heads,n_kv_heads,loss\n4,1,2\n", ("n_params, or n_layers and d_model",)),
        ("loss,loss\n1,2\n", ("loss appears twice",)),
        (f"{HEADER}\n", ("holds no runs",)),
        ("", ("holds no runs",)),
        (f"{HEADER}\n1e30,1,2,128,2\n", ("line 2", "n_heads='1e30'", "below 2^53")),
        (f"{HEADER},n_count\n4,1,2,128,2,mine\n", ("line 2", "n_count='mine'")),
    ],
)
def test_malformed_files_get_one_line_naming_place_and_value(tmp_path, text, parts):
    with pytest.raises(UserError) as error:
        from_csv(_csv(tmp_path, text))
    message = str(error.value)
    assert "\n" not in message
    assert "runs.csv" in message
    for part in parts:
        assert part in message


def test_absent_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        from_csv(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        from_csv(tmp_path / "b.csv")


def test_contradictions_and_repetitions_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="appears twice"):
        from_csv(_csv(tmp_path, f"{HEADER}\n4,1,2,128,2.5\n4,1,2,128,2.5\n"))
    with pytest.raises(UserError, match=r"losses 2\.5 and 2\.6.*their own seed"):
        from_csv(_csv(tmp_path, f"{HEADER}\n4,1,2,128,2.5\n4,1,2,128,2.6\n"))
    seeds = from_csv(_csv(tmp_path, f"{HEADER},seed\n4,1,2,128,2.5,0\n4,1,2,128,2.6,1\n"))
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("column", "word"),
    [
        ("evaluation", "evaluation sets"),
        ("tokenizer", "tokenizers"),
        ("corpus", "corpora"),
        ("vocab_size", "vocabulary"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(column, word):
    r = published()
    mixed = getattr(r, column).copy()
    mixed[3] = 7 if column == "vocab_size" else "other"
    with pytest.raises(UserError, match=word) as error:
        check(dataclasses.replace(r, **{column: mixed}))
    assert r.name[3] in str(error.value)


def test_our_runs_are_read_and_the_missing_are_listed(tmp_path):
    runs = [_run("a"), _run("b", layers=3), _run("c", layers=4)]
    _finish(tmp_path, runs[0], loss=2.5)
    _finish(tmp_path, runs[1], loss=2.25, epochs=5.5, skipped_steps=3)
    r = from_runs(tmp_path, "smoke", runs)
    assert r.count == "n_exact"
    assert r.missing == ("c",)
    assert r.loss.tolist() == [2.5, 2.25]
    assert r.n_params[1] == n_exact(runs[1].model)
    assert (r.evaluation[0], r.corpus[0], r.tokenizer[0], r.vocab_size[0]) == ("e", "c", "t", 256)
    assert r.provenance["training_seconds"] == 4.0
    told = " ".join(flags(r))
    assert "1 runs saw their corpus more than 4 times (b)" in told
    assert "not finished: c" in told
    assert "1 runs skipped 3 training steps (b)" in told


def test_a_run_judged_only_by_another_evaluation_is_missing(tmp_path):
    run = _run("a")
    _finish(tmp_path, run)
    other = dataclasses.replace(run, evaluation=EvaluationConfig(tokens=2048))
    with pytest.raises(UserError, match=r"no finished runs under .*missing: a"):
        from_runs(tmp_path, "smoke", [other])


def test_our_runs_with_bad_losses_or_mixed_data_are_refused(tmp_path):
    runs = [_run("a"), _run("b", layers=3)]
    _finish(tmp_path, runs[0])
    _finish(tmp_path, runs[1], data={"corpus_hash": "another"})
    with pytest.raises(UserError, match="corpora"):
        from_runs(tmp_path, "smoke", runs)
    bad = _run("n", layers=5)
    _finish(tmp_path, bad, loss=float("nan"))
    with pytest.raises(UserError, match="loss=nan"):
        from_runs(tmp_path, "smoke", [bad])


def test_half_a_shape_is_no_shape(tmp_path):
    r = from_csv(_csv(tmp_path, "n_heads,n_kv_heads,n_params,n_layers,loss\n4,1,1.5e6,2,2.5\n"))
    assert (r.n_layers[0], r.d_model[0], r.count) == (0, 0, "n_given")


@pytest.mark.parametrize("key", ["loss", "n_exact", "tokens", "evaluations"])
def test_a_damaged_result_is_refused_by_file_and_key(tmp_path, key):
    run = _run()
    _finish(tmp_path, run)
    file = run_directory(tmp_path, "smoke", run).result_file
    whole = json.loads(file.read_text())
    result = whole["result"]
    del (result["evaluations"][run.evaluation_digest] if key == "loss" else result)[key]
    file.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=rf"result\.json.*{key} is missing"):
        from_runs(tmp_path, "smoke", [run])


def test_runs_carry_their_architecture_vocabulary_and_every_version(tmp_path):
    runs = [_run("a"), _run("b", layers=3)]
    _finish(tmp_path, runs[0], data={"vocab_size": 200})
    _finish(tmp_path, runs[1], data={"vocab_size": 200}, versions={"jax": "2"})
    r = from_runs(tmp_path, "smoke", runs)
    assert r.template == runs[0].model
    assert r.vocab_size.tolist() == [256, 256]
    assert r.provenance["versions"] == {"jax": "1 and 2"}
    other = dataclasses.replace(runs[1].model, qk_norm=True)
    runs.append(dataclasses.replace(runs[1], name="q", model=other))
    _finish(tmp_path, runs[2])
    with pytest.raises(UserError, match=r"mix architectures.*q: qk_norm=True"):
        from_runs(tmp_path, "smoke", runs)


def test_the_written_csv_reads_back_the_same(tmp_path):
    r = published()
    again = from_csv(_csv(tmp_path, results_csv(r)))
    assert again.count == r.count
    for column in results.COLUMNS:
        a, b = getattr(r, column), getattr(again, column)
        same = (
            a == b
            if a.dtype == object
            else np.isclose(a.astype(float), b.astype(float), rtol=0, equal_nan=True)
        )
        assert same.all(), column
