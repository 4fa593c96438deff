"""Exports and imports, as transformers itself reads and writes them.

It needs PyTorch, whose only build on PyPI for Linux brings gigabytes of CUDA with it: where it is not
installed this is skipped, and `make test-transformers` runs it in an environment of its own.
"""

import numpy as np
import pytest
from hugging_face_kit import (
    ARCHITECTURES,
    MODELS,
    ask_for_bos,
    make_run,
    model,
    our_logits,
    some_tokens,
)
from safetensors.numpy import load_file

from gqa_scaling.data.tokenizer import bytes_tokenizer
from gqa_scaling.inference.hugging_face_export import export
from gqa_scaling.inference.hugging_face_import import import_folder
from gqa_scaling.inference.trained import open_trained

MISSING = "needs PyTorch and transformers: make test-transformers has them"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend


def theirs(folder):
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return network.eval()


def their_logits(network, tokens_T):
    with torch.no_grad():
        return network(torch.tensor(tokens_T)[None]).logits[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_ours(name, tmp_path):
    trained = make_run(tmp_path, MODELS[name])
    export(trained, tmp_path / "out")
    network, tokens = theirs(tmp_path / "out"), some_tokens()
    assert type(network).__name__ == ARCHITECTURES[name]
    ours = our_logits(trained, tokens)
    np.testing.assert_allclose(their_logits(network, tokens), ours, rtol=0, atol=1e-4)
    prompt = torch.tensor(tokens[:16])[None]
    with torch.no_grad():
        out = network.generate(
            prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=-1
        )[0]
    continued = our_logits(trained, out.numpy())[15:-1].argmax(-1)
    np.testing.assert_array_equal(out[16:].numpy(), continued)


def test_the_tokenizer_gives_our_tokens(tmp_path):
    trained = make_run(tmp_path, model())
    export(trained, tmp_path / "out")
    tokenizer, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        bytes_tokenizer(),
    )
    text = "  héllo\n\t<|endoftext|> \U0001f600 don't  "
    assert tokenizer(text)["input_ids"] == ours.encode([text])[0].tolist()
    assert tokenizer.decode(ours.encode([text])[0]) == text
    assert tokenizer.eos_token_id == ours.eos
    assert tokenizer.model_max_length == trained.run.context_length


def their_models():
    sizes = {
        "vocab_size": 264,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    stretched = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    return {
        "llama": transformers.LlamaConfig(**sizes, head_dim=32, rope_parameters=stretched),
        "mistral": transformers.MistralConfig(
            **sizes | {"hidden_size": 50}, head_dim=8, sliding_window=None
        ),
        "qwen3": transformers.Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True),
    }


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_what_transformers_saves_comes_in_to_the_bit(kind, tmp_path):
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(their_models()[kind]).eval()
    network.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    export(make_run(tmp_path, model()), tmp_path / "ours")  # for its tokenizer
    tokenizer = (tmp_path / "ours/tokenizer.json").read_text()
    (tmp_path / "theirs/tokenizer.json").write_text(tokenizer)
    back = open_trained(import_folder(tmp_path / "theirs", kind, tmp_path)[0].path)
    export(back, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    state = {k: v.numpy() for k, v in network.state_dict().items()}
    if network.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert again.keys() == state.keys()
    for name, values in state.items():
        np.testing.assert_array_equal(again[name], values)
    tokens = some_tokens()
    np.testing.assert_allclose(
        our_logits(back, tokens), their_logits(network, tokens), rtol=0, atol=1e-4
    )


def test_texts_begin_as_its_tokenizer_has_them_begin(tmp_path):
    export(make_run(tmp_path, model()), tmp_path / "folder")
    ask_for_bos(tmp_path / "folder")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    back = open_trained(import_folder(tmp_path / "folder", "back", tmp_path)[0].path)
    export(back, tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    (ours,) = back.tokens_of(["some text"])
    assert ours.tolist() == theirs("some text")["input_ids"] == again("some text")["input_ids"]
