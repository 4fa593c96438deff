"""Runs with random parameters, made as training leaves them, and the shapes that are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from gqa_scaling.config import DataConfig, EvaluationConfig, ModelConfig, RopeScaling, RunConfig
from gqa_scaling.data.tokenizer import bytes_tokenizer
from gqa_scaling.files.checkpoint import save_parameters
from gqa_scaling.files.runs import run_directory
from gqa_scaling.inference.trained import Trained, name_of, open_trained, shapes_of

POSITIONS = 512
VOCABULARY = 264  # bytes, EOS, and some that training never sees


def model(n_layers=2, d_model=48, n_heads=4, n_kv_heads=2, **others):
    fields = {"head_dim": 12, "d_ff": 40, "vocab_size": VOCABULARY, "dtype": "float32", **others}
    return ModelConfig(n_layers, d_model, n_heads, n_kv_heads, **fields)


# Every way of sharing KV heads, heads as wide as the model, wider and narrower, widths that are no
# multiple of the heads, tied and untied, with and without norms of queries and keys.
MODELS = {
    "mha-tied": model(n_kv_heads=4),
    "gqa-wider-untied": model(head_dim=16, tie_embeddings=False, rope_theta=1e4, norm_eps=1e-5),
    "mqa-narrower-no-multiple-untied": model(
        d_model=50, n_kv_heads=1, head_dim=8, tie_embeddings=False
    ),
    "mha-wider-no-multiple": model(d_model=40, n_heads=3, n_kv_heads=3, head_dim=16),
    "qk-norm": model(d_model=50, n_heads=6, qk_norm=True),
    "qk-norm-untied": model(n_kv_heads=1, head_dim=16, qk_norm=True, tie_embeddings=False),
    "stretched-rope": model(head_dim=32, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 128)),
}
ARCHITECTURES = {
    "mha-tied": "LlamaForCausalLM",
    "gqa-wider-untied": "LlamaForCausalLM",
    "mqa-narrower-no-multiple-untied": "MistralForCausalLM",
    "mha-wider-no-multiple": "MistralForCausalLM",
    "qk-norm": "Qwen3ForCausalLM",
    "qk-norm-untied": "Qwen3ForCausalLM",
    "stretched-rope": "LlamaForCausalLM",
}


def random_parameters(config: ModelConfig, seed: int = 0) -> nnx.State:
    """Of the size that training begins with, but with norms that are not 1, so that none can be
    taken for another."""
    rng = np.random.default_rng(seed)

    def of(path, shape):
        if "norm" in name_of(path):
            return jnp.asarray(rng.uniform(0.5, 1.5, shape.shape), jnp.float32)
        size = config.d_model**-0.5
        return jnp.asarray(rng.normal(0, size, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(of, shapes_of(config))


def make_run(root, config: ModelConfig, name="random", done=True, **fields) -> Trained:
    """The directory of a run of `config`, with random parameters and, when done, a result."""
    run = RunConfig(
        name=name,
        model=config,
        **{
            "context_length": POSITIONS,
            "batch_tokens": POSITIONS,
            "tokens": POSITIONS,
            "data": DataConfig(corpus="texts", tokenizer="bytes"),
            "evaluation": EvaluationConfig(tokens=POSITIONS),
            **fields,
        },
    )
    directory, tokenizer = run_directory(root, "random", run), bytes_tokenizer()
    data = {
        "corpus": "texts",
        "store_hash": "5" * 64,
        "tokenizer_hash": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
    }
    directory.begin(run, data)
    if not done:
        return directory
    save_parameters(directory.parameters, random_parameters(config))
    evaluation = {"loss": 5.5, "bits_per_byte": 7.9, "targets": POSITIONS, "hash": "e" * 64}
    result = {"tokens": POSITIONS, "data": data, "evaluations": {run.evaluation_digest: evaluation}}
    directory.finish(result, {})
    return open_trained(directory.path)


BOS = 257  # of a tokenizer that puts one before a text; bytes and EOS are the tokens before it


def ask_for_bos(folder) -> None:
    """Have the tokenizer of an export put "<s>" before a text, as those of Llama do."""
    path = folder / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_special_tokens(["<s>"])
    assert library.token_to_id("<s>") == BOS
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    path.write_text(library.to_str())


def some_tokens(count: int = POSITIONS, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


def our_logits(trained: Trained, tokens_T: np.ndarray) -> np.ndarray:
    """(T, V), float32."""
    network = trained.model()
    forward = jax.jit(lambda tokens_BT: network.logits(network(tokens_BT)))
    return np.asarray(forward(jnp.asarray(tokens_T)[None])[0])
