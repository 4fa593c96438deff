"""What `gqa-scaling export` writes, against a forward pass written from the formats alone."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from hugging_face_kit import (
    ARCHITECTURES,
    MODELS,
    POSITIONS,
    make_run,
    model,
    our_logits,
    some_tokens,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy_hugging_face import logits, read_weights

from gqa_scaling import cli
from gqa_scaling.config import DataConfig, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.data.tokenizer import bytes_tokenizer, train_bpe
from gqa_scaling.inference.hugging_face_export import bytes_definition, export
from gqa_scaling.inference.trained import open_trained


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_folder_are_ours(name, tmp_path):
    trained = make_run(tmp_path, MODELS[name])
    done = export(trained, tmp_path / "out")
    tokens = some_tokens()
    assert done.architecture == ARCHITECTURES[name]
    np.testing.assert_allclose(
        our_logits(trained, tokens), logits(tmp_path / "out", tokens), rtol=0, atol=1e-4
    )


def test_weights_beyond_float16_are_refused_and_nothing_is_written(tmp_path, monkeypatch):
    trained = make_run(tmp_path, model())
    large = jax.tree.map(lambda x: x * 1e6, trained.parameters())
    monkeypatch.setattr(type(trained), "parameters", lambda self: large)
    with pytest.raises(UserError, match=r"more than float16 holds: export it as bfloat16"):
        export(trained, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_bfloat16_weights_are_the_nearest_ones(tmp_path):
    trained = make_run(tmp_path, model())
    export(trained, tmp_path / "exact")
    export(trained, tmp_path / "out", "bfloat16")
    exact, rounded = read_weights(tmp_path / "exact"), read_weights(tmp_path / "out")
    assert exact.keys() == rounded.keys()
    for name in exact:
        np.testing.assert_allclose(rounded[name], exact[name], rtol=2**-8, atol=0)
    assert any((rounded[name] != exact[name]).any() for name in exact)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_large_weights_are_cut_into_files_with_an_index(tmp_path):
    trained = make_run(tmp_path, model(tie_embeddings=False))
    whole = export(trained, tmp_path / "whole")
    cut = export(trained, tmp_path / "cut", shard_bytes=40_000)
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) == cut.files > 2
    assert files[0] == f"model-00001-of-{cut.files:05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == whole.weight_bytes == cut.weight_bytes
    together, apart = read_weights(tmp_path / "whole"), read_weights(tmp_path / "cut")
    assert index["weight_map"].keys() == together.keys() == apart.keys()
    for name, values in together.items():
        np.testing.assert_array_equal(values, apart[name])


# ------------------------------------------------------------------------------- the tokenizer

BYTES = tokenizers.Tokenizer.from_str(bytes_definition(256))
BYTES.encode_special_tokens = True


@given(st.text(), st.binary())
def test_bytes_as_a_tokenizer_json_are_bytes(text, some_bytes):
    ours = bytes_tokenizer()
    assert BYTES.encode(text).ids == ours.encode([text])[0].tolist()
    assert BYTES.decode(list(text.encode())) == text
    for end in (ours.eos, ours.eos + 3):  # a model may know more numbers than there are tokens
        assert BYTES.decode([*some_bytes, end]) == ours.decode([*some_bytes, end])


def test_every_byte_has_its_own_number():
    text = "".join(map(chr, range(0x300))) + "\U0001f600\u2028\ufeff"
    assert BYTES.encode(text).ids == list(text.encode())
    assert BYTES.token_to_id("<|endoftext|>") == 256


def test_a_bpe_leaves_with_the_model(tmp_path, monkeypatch):
    text = "the cache of the query heads\n" * 20
    learnt = train_bpe(270, [text], "bpe-270")
    (tmp_path / "t.json").write_text(learnt.definition)
    data = DataConfig(corpus="texts", tokenizer=str(tmp_path / "t.json"))
    trained = make_run(tmp_path, model(vocab_size=270), data=data)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        export(trained, tmp_path / "out")
    trained.result["data"]["tokenizer_hash"] = learnt.sha256
    export(trained, tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert theirs.encode(text).ids == learnt.encode([text])[0].tolist()
    said = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert theirs.id_to_token(said["eos_token_id"]) == "<|endoftext|>"


# ---------------------------------------------------------------------------------- the folder


def test_the_folder_says_where_it_came_from(tmp_path):
    trained = make_run(tmp_path, model(d_model=50, head_dim=14))
    notes = export(trained, tmp_path / "out").notes
    text = (tmp_path / "out/README.md").read_text()
    said = json.loads((tmp_path / "out/gqa_scaling.json").read_text())
    begin = "nothing stands before a text"
    for part in (trained.run.digest, "5" * 64, "e" * 64, "5.5000 nats", begin, *notes):
        assert part in text
    assert [note.split()[0] for note in notes] == ["head_dim=14", "hidden_size=50"]
    assert said["run"]["digest"] == trained.run.digest
    assert said["data"]["store_hash"] == "5" * 64


def test_an_export_replaces_one_but_nothing_else(tmp_path):
    trained = make_run(tmp_path, model())
    export(trained, tmp_path / "out")
    export(trained, tmp_path / "out", "bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no export"):
        export(trained, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out", "random"]


def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch):
    trained = make_run(tmp_path, model())
    export(trained, tmp_path / "out")
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "out").iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gqa_scaling.inference.hugging_face_export._readme", full)
    with pytest.raises(OSError, match="No space"):
        export(trained, tmp_path / "out", "bfloat16")
    assert sorted((p.name, p.read_bytes()) for p in (tmp_path / "out").iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "random"]


def refused(words, capsys, *parts):
    assert cli.main(list(map(str, words))) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    for part in parts:
        assert part in said.err


def test_what_cannot_leave_is_refused_in_one_line(tmp_path, capsys):
    sparse = make_run(tmp_path, model(pattern=ContextSharding(16, 2, stride=4)))
    refused(
        ["export", sparse.directory.path, tmp_path / "out"], capsys, "model.pattern", "stride=4"
    )
    begun = make_run(tmp_path, model(), name="begun", done=False)
    refused(["export", begun.path, tmp_path / "out"], capsys, "unfinished (pending")
    refused(["export", tmp_path, tmp_path / "out"], capsys, "is no run: it has no config.json")
    lost = DataConfig(corpus="texts", tokenizer="bpe-300", store=str(tmp_path / "gone"))
    trained = make_run(tmp_path, model(), name="lost", data=lost)
    refused(["export", trained.directory.path, tmp_path / "out"], capsys, "'bpe-300'", "gone")
    done = make_run(tmp_path, model(), name="done").directory.path
    refused(["export", done, "s3://bucket/out"], capsys, "folder of this machine")
    refused(["export", done, done / "config.json"], capsys, "cannot be a folder")
    refused(["export", done, tmp_path / "out", "--dtype", "int8"], capsys, "--dtype", "int8")
    refused(["export", done, done], capsys, "is no export of this program")
    refused(["export", done, tmp_path / "out", "--seed", "1"], capsys, "--seed changes runs")
    assert not (tmp_path / "out").exists()


def test_the_verb_writes_the_folder(tmp_path, capsys):
    trained = make_run(tmp_path, model())
    path, out = trained.directory.path, tmp_path / "new/out"
    assert cli.main(["export", str(path), str(out), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{out}: LlamaForCausalLM, ")
    assert said[1].startswith("note: head_dim=12 ")
    assert open_trained(path).run.context_length == POSITIONS
