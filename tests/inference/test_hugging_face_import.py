"""What `gqa-scaling import` makes of folders: ours, and such as others write."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face_kit import (
    BOS,
    MODELS,
    ask_for_bos,
    make_run,
    model,
    random_parameters,
    some_tokens,
)
from numpy_hugging_face import logits

from gqa_scaling import api, cli
from gqa_scaling.config import ParallelConfig, UserError
from gqa_scaling.files.checkpoint import load_parameters, save_parameters
from gqa_scaling.inference.generate import Generation
from gqa_scaling.inference.hugging_face_export import export
from gqa_scaling.inference.hugging_face_import import import_folder
from gqa_scaling.inference.trained import named, open_trained
from gqa_scaling.training.setup import set_up


@pytest.fixture
def folder(tmp_path):
    """An export of three files."""
    export(make_run(tmp_path, model()), tmp_path / "folder", shard_bytes=60_000)
    return tmp_path / "folder"


def edit(folder, name="config.json", **changes):
    """Change fields of a JSON file of the folder; None removes one."""
    path = folder / name
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


# ------------------------------------------------------------------------------------ the way in


@pytest.mark.parametrize("name", MODELS)
def test_what_left_comes_back_to_the_bit(name, tmp_path):
    trained = make_run(tmp_path, MODELS[name])
    export(trained, tmp_path / "folder")
    directory, new = import_folder(tmp_path / "folder", "back", tmp_path)
    back = open_trained(directory.path)
    assert new
    assert back.run.model == trained.run.model
    assert back.run.context_length == trained.run.context_length
    ours, theirs = named(random_parameters(MODELS[name])), named(back.parameters())
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(np.asarray(ours[key]), np.asarray(theirs[key]))


def test_weights_of_16_bits_are_held_exactly(tmp_path):
    export(make_run(tmp_path, model()), tmp_path / "half", "bfloat16")
    directory, _ = import_folder(tmp_path / "half", "half", tmp_path)
    back = open_trained(directory.path)
    assert back.run.model.dtype == "bfloat16"
    for value in named(back.parameters()).values():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, value.astype(jnp.bfloat16).astype(np.float32))
    full, _ = import_folder(tmp_path / "half", "half", tmp_path, "float32")
    assert open_trained(full.path).run.model.dtype == "float32"
    assert full.path != directory.path


def test_greedy_tokens_are_those_of_the_format(tmp_path, folder):
    directory, _ = import_folder(folder, "back", tmp_path)
    network, prompt, count = open_trained(directory.path).model(), some_tokens(16), 64
    forward = jax.jit(lambda tokens_BT: network.logits(network(tokens_BT))[0])
    ours = np.zeros(len(prompt) + count, int)
    ours[: len(prompt)] = prompt
    for position in range(len(prompt), len(ours)):  # what stands behind a position is not seen
        ours[position] = np.asarray(forward(jnp.asarray(ours)[None]))[position - 1].argmax()
    theirs = logits(folder, ours)[len(prompt) - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(ours[len(prompt) :], theirs)


def test_an_import_is_found_again_and_other_weights_are_another_run(tmp_path, folder):
    first, new = import_folder(folder, "back", tmp_path)
    again, anew = import_folder(folder, "back", tmp_path)
    assert (first.path, new, anew) == (again.path, True, False)
    other = make_run(tmp_path, model(), name="other", seed=7)
    parameters = random_parameters(model(), seed=7)
    shutil.rmtree(other.directory.parameters)
    save_parameters(other.directory.parameters, parameters)
    export(other, tmp_path / "others")
    elsewhere, _ = import_folder(tmp_path / "others", "back", tmp_path)
    assert elsewhere.path != first.path


def test_what_was_interrupted_is_made_whole(tmp_path, folder):
    directory, _ = import_folder(folder, "back", tmp_path)
    directory.result_file.unlink()
    with pytest.raises(UserError, match="unfinished"):
        open_trained(directory.path)
    assert import_folder(folder, "back", tmp_path)[1]
    assert named(open_trained(directory.path).parameters())


def test_an_import_leaves_again(tmp_path, folder):
    directory, _ = import_folder(folder, "back", tmp_path)
    export(open_trained(directory.path), tmp_path / "again")
    tokens = some_tokens(32)
    np.testing.assert_array_equal(logits(tmp_path / "again", tokens), logits(folder, tokens))
    text = (tmp_path / "again/README.md").read_text()
    assert open_trained(directory.path).run.imported in text
    assert "trained on" not in text


def test_parameters_are_laid_out_over_a_mesh_as_those_of_any_run(tmp_path, folder):
    """As continued training reads them."""
    directory, _ = import_folder(folder, "back", tmp_path)
    run = directory.config()
    assert run.parallel == ParallelConfig()
    parameters = load_parameters(directory.parameters, set_up(run, jax.devices()[:1]).parameters)
    assert named(parameters).keys() == named(open_trained(directory.path).parameters()).keys()


# --------------------------------------------------------------------------- as others write it


def test_configs_of_transformers_4_are_read(tmp_path, folder):
    """Theta at the top, the scaling beside it, and what is at its default left out."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    edit(folder, rope_parameters=..., rope_theta=5e5, rope_scaling=scaling, head_dim=..., dtype=...)
    edit(folder, rms_norm_eps=1e-5, torch_dtype="float32")
    config = open_trained(import_folder(folder, "old", tmp_path)[0].path).run.model
    assert config.head_dim == 12  # 48 / 4
    assert (config.rope_theta, config.norm_eps) == (5e5, 1e-5)
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 8.0
    edit(folder, rope_scaling=None, rope_theta=..., rms_norm_eps=...)
    config = open_trained(import_folder(folder, "older", tmp_path)[0].path).run.model
    assert (config.rope_theta, config.norm_eps, config.rope_scaling) == (1e4, 1e-6, None)


def test_a_tied_head_may_be_written_twice(tmp_path):
    export(make_run(tmp_path, model(tie_embeddings=False)), tmp_path / "untied")
    edit(tmp_path / "untied", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"no place for, such as \['lm_head.weight'\]"):
        import_folder(tmp_path / "untied", "x", tmp_path)
    path = tmp_path / "untied/model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    table = slice(*header["model.embed_tokens.weight"]["data_offsets"])
    head = slice(*header["lm_head.weight"]["data_offsets"])
    body = bytearray(content[8 + length :])
    body[head] = body[table]
    path.write_bytes(content[: 8 + length] + body)
    assert import_folder(tmp_path / "untied", "x", tmp_path)[1]


def test_texts_begin_with_the_token_that_the_tokenizer_puts_there(tmp_path, folder):
    ask_for_bos(folder)
    back = open_trained(import_folder(folder, "back", tmp_path)[0].path)
    assert back.tokens_of(["ab"])[0].tolist() == [BOS, 97, 98]
    export(back, tmp_path / "again")
    said = f"token {BOS}, which the tokenizer puts there, stands before a text"
    assert said in (tmp_path / "again/README.md").read_text()
    again = open_trained(import_folder(tmp_path / "again", "again", tmp_path)[0].path)
    assert again.first_token == BOS
    assert json.loads((tmp_path / "again/config.json").read_text())["bos_token_id"] == BOS


def test_texts_end_with_the_tokens_that_the_config_names(tmp_path, folder):
    plain, new = import_folder(folder, "plain", tmp_path / "plain")
    assert (open_trained(plain.path).stops, new) == ([256], True)
    edit(folder, eos_token_id=[98, 256])
    back = open_trained(import_folder(folder, "named", tmp_path)[0].path)
    assert back.stops == [98, 256]
    export(back, tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == [98, 256]
    again, _ = import_folder(tmp_path / "again", "again", tmp_path / "elsewhere")
    assert open_trained(again.path).stops == [98, 256]


def test_python_gives_a_text_the_token_it_begins_with_and_its_ends(tmp_path, folder, monkeypatch):
    ask_for_bos(folder)
    edit(folder, eos_token_id=98)
    directory = import_folder(folder, "back", tmp_path)[0]
    asked = []

    class Asked(Generation):
        def __init__(self, decoder, prompts, **how):
            asked.append((prompts[0].tolist(), how["stop"]))
            super().__init__(decoder, prompts, **how)

    monkeypatch.setattr("gqa_scaling.inference.generate.Generation", Asked)
    api.load(directory.path).write("ab", tokens=1)
    assert asked == [([BOS, 97, 98], [98, 256])]


def test_models_trained_here_begin_with_nothing(tmp_path):
    trained = make_run(tmp_path, model(n_layers=1))
    assert trained.first_token is None
    assert trained.tokens_of(["ab"])[0].tolist() == [97, 98]


# ------------------------------------------------------------------------------------ refusals


def drop_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_shard(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder):
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"{")


def drop_weights(folder):
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


def double_shard(folder):
    first = folder / "model-00001-of-00003.safetensors"
    shutil.copy(first, folder / "model-00002-of-00003.safetensors")


def climb(folder):
    weight_map = {"a": "../elsewhere.safetensors"}
    edit(folder, "model.safetensors.index.json", weight_map=weight_map)


def unnamed_end(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|stop|>"))


REFUSED = {
    "a missing shard": (drop_shard, "model-00002-of-00003.safetensors", "is missing"),
    "a shard cut short": (cut_shard, "model-00002-of-00003.safetensors is damaged or cut short"),
    "a damaged header": (cut_header, "model-00001-of-00003.safetensors", "no safetensors file"),
    "no safetensors": (drop_weights, "only weights as safetensors are read"),
    "a shard twice": (double_shard, "so does another file"),
    "an index out of the folder": (climb, "index.json is damaged"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "an unknown tokenizer": (unnamed_end, "has no end-of-text token"),
    "a tokenizer of another kind": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "must be one that `tokenizers` reads",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "a damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "another architecture": (
        lambda f: edit(f, architectures=["GemmaForCausalLM"], model_type="gemma"),
        "config.json is of GemmaForCausalLM: only LlamaForCausalLM",
    ),
    "a size that lacks": (lambda f: edit(f, hidden_size=...), "hidden_size is missing"),
    "a size that is none": (lambda f: edit(f, hidden_size="48"), "hidden_size must be a whole"),
    "sizes of another model": (
        lambda f: edit(f, intermediate_size=64),
        "mlp.gate_proj.weight has shape (40, 48), where config.json asks for (64, 48)",
    ),
    "heads that do not divide": (lambda f: edit(f, num_key_value_heads=3), "n_kv_heads=3"),
    "more layers": (lambda f: edit(f, num_hidden_layers=3), "lacks the array model.layers.2."),
    "fewer layers": (lambda f: edit(f, num_hidden_layers=1), "9 arrays", "no place for"),
    "a smaller vocabulary": (lambda f: edit(f, vocab_size=200), "shape (264, 48)"),
    "biases": (lambda f: edit(f, attention_bias=True), "attention_bias=True is not supported"),
    "an end that is no token": (lambda f: edit(f, eos_token_id="</s>"), "eos_token_id='</s>'"),
    "another activation": (lambda f: edit(f, hidden_act="gelu"), "hidden_act='gelu'"),
    "quantized weights": (
        lambda f: edit(f, quantization_config={"quant_method": "gptq"}),
        "quantization_config=",
    ),
    "a sliding window": (
        lambda f: edit(f, model_type="mistral", architectures=["MistralForCausalLM"]),
        "sliding_window=4096 is not supported",
    ),
    "windows in some layers": (
        lambda f: edit(f, layer_types=["full_attention", "sliding_attention"]),
        "every layer must be full_attention",
    ),
    "another scaling of RoPE": (
        lambda f: edit(f, rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "rope_type='yarn' is not supported",
    ),
    "RoPE on a part of a head": (
        lambda f: edit(f, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "partial_rotary_factor=0.5 is not supported",
    ),
    "a scaling that lacks a number": (
        lambda f: edit(f, rope_parameters={"rope_type": "llama3", "factor": 4.0}),
        "low_freq_factor is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_in_one_line(case, folder, tmp_path, capsys):
    damage, *parts = REFUSED[case]
    damage(folder)
    words = ["import", str(folder), "model", "--root", str(tmp_path / "runs")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in parts:
        assert part in said
    assert not (tmp_path / "runs").exists()


def test_the_verb_makes_the_run(folder, tmp_path, capsys):
    words = ["import", str(folder), "llama", "--root", str(tmp_path / "runs")]
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("parameters, 4 query and 2 KV heads of 12")
    assert second == f"{first}, imported before"
    for bad, part in (
        (["import", str(tmp_path / "none"), "x"], "is no folder"),
        (["import", str(folder), "a/b"], "name='a/b'"),
        (["import", "s3://bucket/model", "x"], "folder of this machine"),
    ):
        assert cli.main([*bad, "--root", str(tmp_path / "runs")]) == 2
        said = capsys.readouterr().err
        assert part in said
        assert said.count("\n") == 1
