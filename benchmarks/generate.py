"""Decoding beside transformers: seconds of a token by both, for one model on this CPU.

    make bench-transformers

A model of 100M parameters with random weights is exported and read by transformers (PyTorch, float32),
whose `generate` goes on from a static cache that is full but for the last tokens, and from its default
cache, which grows. Ours decodes as `generate` does here, from a cache as full. First both go on from one
prompt, and must give equal tokens. Times are medians of rounds that take turns; on a busy machine trust the
ratios.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

try:
    import torch
    import transformers
except ModuleNotFoundError as missing:
    sys.exit(
        f"generate.py needs {missing.name}: `make bench-transformers` installs it and runs this"
    )

from gqa_scaling.devices.host_memory import ready_host_memory

ready_host_memory()  # before jax is imported
sys.path.append(str(Path(__file__).parents[1] / "tests/inference"))

import jax  # noqa: E402
from hugging_face_kit import make_run  # noqa: E402

from gqa_scaling.config import ModelConfig  # noqa: E402
from gqa_scaling.inference.cases import Case  # noqa: E402
from gqa_scaling.inference.generate import Generation  # noqa: E402
from gqa_scaling.inference.hugging_face_export import export  # noqa: E402
from gqa_scaling.inference.timing import Bench  # noqa: E402

MODEL = ModelConfig(12, 768, 8, 8, dtype="float32")
KV_HEADS, BATCHES, CONTEXTS = (8, 1), (1, 8), (1024, 4096, 8192)
ROUNDS, TOKENS, SAME = 5, 8, 16
PROMPT = list(range(40, 90))


class Theirs:
    """`generate` of transformers, with a cache that holds all of a context but its last tokens."""

    def __init__(self, network, batch, context, kind):
        self.network, self.context, c = network, context, network.config
        heads, size = c.num_key_value_heads, c.head_dim
        self.kept = context - TOKENS - 1
        if kind == "static":
            self.cache = transformers.StaticCache(config=c, max_cache_len=context)
            self.cache.early_initialization(batch, heads, size, torch.float32, torch.device("cpu"))
        else:
            self.cache = transformers.DynamicCache(config=c)
            for layer in range(c.num_hidden_layers):
                states = torch.zeros(batch, heads, self.kept, size)
                self.cache.update(states, states.clone(), layer)
        self.kind = kind
        self.tokens = torch.full((batch, self.kept + 1), 40)

    def seconds(self):
        if self.kind == "static":
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.kept)
        elif more := self.cache.get_seq_length() - self.kept:
            self.cache.crop(-more)
        start = time.perf_counter()
        made = greedy(self.network, self.tokens, TOKENS, past_key_values=self.cache)
        seconds = (time.perf_counter() - start) / TOKENS
        assert made.shape[1] == TOKENS
        return seconds


def greedy(network, tokens, count, **how):
    """The next tokens, by transformers."""
    with torch.no_grad():
        made = network.generate(
            tokens,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=-1,
            **how,
        )
    return made[:, tokens.shape[1] :]


def median_seconds(cases):
    """Of each, by rounds that take turns; the first of each only warms up."""
    for seconds in cases.values():
        seconds()
    found = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, seconds in cases.items():
            found[name].append(seconds())
    return {name: statistics.median(each) for name, each in found.items()}


def compare(model, folder):
    """The rows of one model."""
    trained = make_run(folder, model)
    export(trained, folder / "exported")
    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "exported", dtype=torch.float32
    ).eval()
    decoder = trained.decoder()
    ours = Generation(
        replace(decoder, vocab_size=model.vocab_size), [PROMPT], tokens=SAME, context=128
    )
    for _ in ours:
        pass
    assert greedy(network, torch.tensor([PROMPT]), SAME)[0].tolist() == ours.made[0]
    for batch in BATCHES:
        for context in CONTEXTS:
            case = Case(model, context, batch, "float32", (context, batch))
            with jax.set_mesh(decoder.mesh):
                bench = Bench(case, decoder.parameters, decoder.mesh)
            bench.decoded(TOKENS)
            cases = {"ours": lambda bench=bench: bench.decoded(TOKENS)}
            for kind in ("static", "dynamic"):
                cases[kind] = Theirs(network, batch, context, kind).seconds
            found = median_seconds(cases)
            own = found.pop("ours")
            times = "".join(f"{1e3 * s:10.1f}{s / own:7.2f}" for s in found.values())
            print(f"{model.n_kv_heads:3}{batch:6}{context:8}{1e3 * own:9.1f}{times}", flush=True)


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ", end="")
    print(f"transformers {transformers.__version__}; jax {jax.__version__}; ms a token of each")
    print(f"{'KV':>3}{'batch':>6}{'context':>8}{'ours':>9}{'static':>10}{'ratio':>7}", end="")
    print(f"{'dynamic':>10}{'ratio':>7}")
    for n_kv_heads in KV_HEADS:
        with tempfile.TemporaryDirectory() as folder:
            compare(replace(MODEL, n_kv_heads=n_kv_heads), Path(folder))


if __name__ == "__main__":
    main()
