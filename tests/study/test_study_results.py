"""Results: our runs, CSV files from elsewhere, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_scaling.config import DataConfig, EvaluationConfig, ModelConfig, RunConfig, UserError
from gqa_scaling.costs import n_exact, n_formula
from gqa_scaling.files.runs import run_directory
from gqa_scaling.study import results
from gqa_scaling.study.reading import from_csv, from_runs, from_text, published
from gqa_scaling.study.report.csv_files import results_csv
from gqa_scaling.study.results import check, flags

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
        (f"{HEADER}\n3,4,2,128,2\n", ("line 2", "n_kv_heads=4", "at most n_heads=3")),
        (f"{HEADER}\n4,1,2,128\n", ("line 2", "4 values for 5 columns")),
        (f"{HEADER}\n4,1,2,128,3_1\n", ("line 2", "'3_1' must be a number")),
        (f"{HEADER}\n4,1,1２,128,3\n", ("line 2", "must be a whole number")),
        (f"{HEADER}\n4,1,2,,2\n", ("line 2", "d_model is empty")),
        ("n_heads,loss,n_params\n4,2,1\n", ("column n_kv_heads is missing",)),
        ("n_heads,n_kv_heads,loss\n4,1,2\n", ("n_params, or n_layers and d_model",)),
        (f"{HEADER},loss\n4,1,2,128,2,2\n", ("loss appears twice",)),
        ("8,8,12,768,3.1\n8,1,12,768,3.2\n", ("line 1", "value 8", "n_heads,n_kv_heads")),
        ("# mine\na,8,3.1\nb,8,3.2\n", ("line 2", "value 8", "begin with a header")),
        (f"{HEADER}\n4,1,2,128,{'2' * 200_000}\n", ("line 2", "cannot be read as CSV")),
        (f"{HEADER},tokens\n4,1,2,128,2,inf\n", ("line 2", "tokens='inf'")),
        (f"{HEADER},epochs\n4,1,2,128,2,nan\n", ("line 2", "epochs='nan'")),
        (f"{HEADER},context_length\n4,1,2,128,2,1e30\n", ("line 2", "context_length='1e30'")),
        (f"{HEADER},seed\n4,1,2,128,2,-1\n", ("line 2", "seed='-1'")),
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


def test_empty_columns_at_the_end_are_no_repetition(tmp_path):
    assert len(from_csv(_csv(tmp_path, f"{HEADER},,\n4,1,2,128,2,,\n"))) == 1


# ------------------------------------------------------------------------ N against the shapes

SHAPES = [(4, 256), (6, 512), (12, 768), (16, 1024), (24, 1280)]
COUNTED = "n_heads,n_kv_heads,n_layers,d_model,head_dim,n_params,n_count,loss"


def _counted(tmp_path, n_of, count="", heads=((8, 8), (8, 1)), shapes=SHAPES, head_dim=64):
    """A file whose N is what `n_of` makes of each model."""
    rows = [COUNTED]
    for h, kv in heads:
        for layers, d in shapes:
            n = n_of(h, kv, layers, d)
            rows.append(f"{h},{kv},{layers},{d},{head_dim},{n},{count},{4 - layers / 20 - kv / 99}")
    return _csv(tmp_path, "\n".join(rows) + "\n")


def _exact(h, kv, layers, d, head_dim=64, **fields):
    return n_exact(ModelConfig(layers, d, h, kv, head_dim=head_dim, **fields))


def _plain(h, kv, layers, d):
    return n_formula(layers, d, h, kv, 64)


@pytest.mark.parametrize(
    ("count", "n_of"),
    [
        ("", _plain),
        ("n_formula", _plain),
        ("", lambda *m: f"{_plain(*m):.3g}"),  # as a table prints it
        ("", lambda *m: f"{_plain(*m):.1g}" if m[3] == 512 else _plain(*m)),
        ("", _exact),
        ("n_exact", _exact),
        ("n_exact", lambda *m: _exact(*m, qk_norm=True)),
        ("n_exact", lambda *m: _exact(*m, d_ff=4 * m[3])),
        ("", lambda *m: _exact(*m, d_ff=4 * m[3], qk_norm=True)),
        ("n_exact", lambda *m: _exact(*m, d_ff=1)),
        ("n_exact", lambda *m: _exact(*m, d_ff=100 * m[3])),
        ("", lambda h, kv, L, d: f"{_exact(h, kv, L, d, d_ff=8 * d):.3g}"),  # all as wide
        ("", lambda h, kv, L, d: f"{_exact(h, kv, L, d, d_ff=(8 if kv == 1 else 2) * d):.2g}"),
        ("", lambda h, kv, L, d: _exact(h, kv, L, d, d_ff=d // 2 * (1 + L % 3))),  # no two alike
        ("n_given", lambda *m: 30 * _plain(*m)),  # of many experts, say
        ("n_given", lambda *m: _plain(*m) + 50304 * m[3]),  # embeddings counted
    ],
)
def test_every_way_to_count_n_is_believed(tmp_path, count, n_of):
    r = from_csv(_counted(tmp_path, n_of, count))
    assert len(r) == 10
    again = tmp_path / "again.csv"
    again.write_text(results_csv(r))  # what report writes
    assert from_csv(again).n_params.tolist() == r.n_params.tolist()


@given(
    st.integers(1, 40),
    st.integers(1, 300).map(lambda k: 8 * k),
    st.sampled_from([(1, 1), (4, 2), (8, 1), (32, 32)]),
    st.sampled_from([2, 16, 64, 128]),
    st.one_of(st.none(), st.integers(1, 10_000)),
    st.booleans(),
)
def test_every_model_that_can_be_built_is_believed(layers, d, heads, head_dim, d_ff, qk_norm):
    model = ModelConfig(layers, d, *heads, head_dim=head_dim, d_ff=d_ff, qk_norm=qk_norm)
    text = f"{COUNTED}\n{heads[0]},{heads[1]},{layers},{d},{head_dim},{n_exact(model)},n_exact,2\n"
    assert from_text(text, "runs.csv").n_params[0] == n_exact(model)


@pytest.mark.parametrize("count", ["", "n_formula", "n_exact"])
@pytest.mark.parametrize("factor", [1e-3, 0.45, 0.7, 1.5, 2.2, 10, 1e6])
def test_an_n_that_contradicts_its_shape_is_refused_with_both_and_the_remedy(
    tmp_path, count, factor
):
    right = _exact if count == "n_exact" else _plain

    def wrong(h, kv, layers, d):
        n = right(h, kv, layers, d)
        return round(factor * n) + 1 if (kv, layers) == (1, 12) else n

    with pytest.raises(UserError) as error:
        from_csv(_counted(tmp_path, wrong, count))
    message = str(error.value)
    assert "\n" not in message
    for part in ("line 9", f"n_params={wrong(8, 1, 12, 768):,}", "n_layers=12", "d_model=768"):
        assert part in message
    assert f"{_plain(8, 1, 12, 768):,} parameters without embeddings" in message
    assert "(8,1) heads of size 64" in message
    assert "leave n_params out" in message


@pytest.mark.parametrize("count", ["", "n_given"])
def test_no_count_is_below_the_attentions(tmp_path, count):
    with pytest.raises(UserError, match=r"line 2: n_params=.* contradicts"):
        from_csv(_counted(tmp_path, lambda h, kv, L, d: 2 * L * d * 64 * (h + kv), count))


def test_lines_of_a_neighbouring_size_are_noticed(tmp_path):
    def shifted(h, kv, layers, d):
        at = SHAPES.index((layers, d))
        return _plain(h, kv, *(SHAPES[at - 1] if (kv, at) == (1, 3) else SHAPES[at]))

    with pytest.raises(UserError, match=r"line 10: n_params=.* contradicts n_layers=16"):
        from_csv(_counted(tmp_path, shifted))


def test_without_shapes_any_n_is_the_files_own(tmp_path):
    text = "n_heads,n_kv_heads,n_layers,n_params,loss\n4,1,2,7e9,2.5\n"
    assert from_csv(_csv(tmp_path, text)).n_params[0] == 7e9


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
        (
            "evaluation",
            "evaluation sets .*; judge all of them anew by one: another evaluation.tokens",
        ),
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
    assert "1 run saw their corpus more than 4 times (b)" in told
    assert "not finished: c" in told
    assert "1 run skipped 3 training steps (b)" in told


@pytest.mark.parametrize(
    ("trained", "epochs", "told"),
    [
        ((1.5, 1.4), 0.5, "lie 0.65 nats above training losses"),  # as where English judges C
        ((2.5, 2.4), 0.5, "lie 0.35 nats below training losses"),
        ((2.05, 2.02), 0.5, ""),  # text of one kind
        ((1.5, 1.4), 2.0, ""),  # the gap of a text that was read twice is another thing
        ((None, None), 0.5, ""),
    ],
)
def test_held_out_text_of_another_kind_than_the_training_text_is_told(
    tmp_path, trained, epochs, told
):
    runs = [_run("a"), _run("b", layers=3)]
    for run, loss in zip(runs, trained, strict=True):
        _finish(tmp_path, run, loss=2.1, epochs=epochs, **({"train_loss": loss} if loss else {}))
    found = [flag for flag in flags(from_runs(tmp_path, "smoke", runs)) if "held-out" in flag]
    assert len(found) == bool(told)
    assert not told or (told in found[0] and "median of 2 runs" in found[0])


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
    with pytest.raises(UserError, match="loss must be a finite number, not nan"):
        from_runs(tmp_path, "smoke", [bad])


def test_half_a_shape_is_no_shape(tmp_path):
    r = from_csv(_csv(tmp_path, "n_heads,n_kv_heads,n_params,n_layers,loss\n4,1,1.5e6,2,2.5\n"))
    assert (r.n_layers[0], r.d_model[0], r.count) == (0, 0, "n_given")


@pytest.mark.parametrize("value", [0, -1, True, "5", 1e300, 10**400])
@pytest.mark.parametrize("key", ["n_exact", "tokens"])
def test_a_count_that_cannot_be_is_refused(tmp_path, key, value):
    run = _run()
    _finish(tmp_path, run)
    file = run_directory(tmp_path, "smoke", run).result_file
    whole = json.loads(file.read_text())
    whole["result"][key] = value
    file.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=rf"result\.json.*{key}=.*must be a number from 1"):
        from_runs(tmp_path, "smoke", [run])


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


@pytest.mark.parametrize("mark", [";", "\t"])
def test_columns_that_no_comma_separates_are_told_the_remedy(mark):
    text = mark.join(("n_heads", "n_kv_heads", "n_params", "loss")) + "\n" + mark.join("1234")
    with pytest.raises(
        UserError, match="separate columns by commas, and write decimals with a point"
    ):
        from_text(text, "mine.csv")
