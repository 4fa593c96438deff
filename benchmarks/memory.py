"""Memory of a training step: what `costs.training_bytes` predicts against what TPU compilers say.

    JAX_PLATFORMS=cpu python benchmarks/memory.py [--results FILE] [--print-only] [--set judging]

Two sets of shapes: what the prediction was fitted on, and what it is judged by. A constant is
changed while looking at the first only, and `launch` adds a margin that covers the error on the
second. Needs libtpu (`pip install -e '.[tpu]'`), no TPU. A shape takes from seconds to two minutes
to compile; answers are appended to the file, and shapes that it has are not compiled again.
"""

import argparse
import json
from pathlib import Path

from gqa_scaling import costs
from gqa_scaling.config import ModelConfig, ParallelConfig, RunConfig
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.hardware import topology
from gqa_scaling.layout import axis_sizes
from gqa_scaling.pods import compile_run


def shape(
    name: str,
    place: str,
    sizes: tuple[int, int, int, int],
    context: int,
    batch: int,
    *,
    parallel: ParallelConfig = ParallelConfig(),
    **model,
) -> tuple[str, RunConfig]:
    """L x d with (query, KV) heads, on a topology."""
    run = RunConfig(
        name=name,
        model=ModelConfig(*sizes, **model),
        context_length=context,
        batch_tokens=batch * context,
        tokens=100 * batch * context,
        parallel=parallel,
    )
    axis_sizes(run, topology(place).chips)
    return place, run


P = ParallelConfig
JUDGING = (
    shape("head-128", "v6e:8x8", (12, 768, 12, 2), 4096, 32, head_dim=128, tie_embeddings=False, qk_norm=True, parallel=P(fsdp=8, context=2)),
    shape("small-replicated", "v5e:4x4", (4, 256, 4, 1), 1024, 64, vocab_size=32000),
    shape("dots", "v5e:4x8", (24, 1024, 16, 4), 2048, 64, parallel=P(fsdp=32, remat="dots")),
    shape("mha-full", "v6e:4x4", (8, 512, 8, 8), 8192, 16, vocab_size=8192, parallel=P(fsdp=4, remat="full")),
    shape("tensor-v5p", "v5p:2x4x4", (16, 2048, 16, 2), 4096, 64, head_dim=128, vocab_size=32000, tie_embeddings=False, parallel=P(fsdp=16, tensor=2, remat="dots")),
    shape("pattern-half", "v5e:4x4", (12, 768, 12, 4), 32768, 4, pattern=ContextSharding(64, 16, 8, dense_layers="every 2"), parallel=P(fsdp=2, context=4)),
    shape("float32", "v5e:2x2", (6, 384, 6, 2), 2048, 32, vocab_size=256, dtype="float32"),
    shape("accumulated", "v6e:4x4", (12, 1024, 8, 1), 8192, 64, head_dim=128, qk_norm=True, parallel=P(fsdp=16, accumulation=4, remat="full")),
    shape("all-axes", "v5e:8x8", (20, 1280, 20, 4), 4096, 64, vocab_size=100352, tie_embeddings=False, parallel=P(fsdp=8, context=2, tensor=2)),
    shape("blockwise", "v5e:2x4", (10, 640, 10, 2), 4096, 32, parallel=P(fsdp=8, attention="blockwise")),
    shape("tiny-256", "v5e:16x16", (3, 192, 3, 1), 512, 256, vocab_size=512),
    shape("long-full", "v6e:8x16", (32, 2560, 20, 4), 65536, 8, head_dim=128, parallel=P(fsdp=8, context=16, remat="full")),
    shape("two-slices", "2xv5e:4x4", (12, 768, 12, 3), 2048, 64, parallel=P(fsdp=16)),
    shape("head-256", "v5e:1x1", (8, 1024, 8, 2), 4096, 4, head_dim=256, vocab_size=16384, parallel=P(accumulation=2)),
    shape("reference", "v5e:2x2", (6, 512, 8, 2), 1024, 16, vocab_size=8192, parallel=P(attention="reference")),
    shape("pattern-long", "v6e:4x8", (12, 1024, 8, 2), 131072, 2, head_dim=128, pattern=ContextSharding(128, 8, 16, sinks=1), parallel=P(fsdp=2, context=16, remat="dots")),
)  # fmt: skip
CALIBRATION = (
    # one chip, and what each part holds
    shape("c-base", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096),
    shape("c-base-dots", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, parallel=P(remat="dots")),
    shape("c-base-full", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, parallel=P(remat="full")),
    shape("c-base-qk", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, qk_norm=True),
    shape("c-base-h128", "v5e:1x1", (8, 512, 4, 1), 2048, 8, head_dim=128, vocab_size=4096),
    shape("c-base-v6e", "v6e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096),
    shape("c-base-block", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, parallel=P(attention="blockwise")),
    shape("c-base-acc", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, parallel=P(accumulation=4)),
    shape("c-base-vocab", "v5e:1x1", (4, 512, 8, 2), 2048, 4, vocab_size=65536, tie_embeddings=False),
    # small models on many chips
    shape("c-many", "v5e:8x8", (6, 384, 6, 2), 1024, 128, vocab_size=50304),
    shape("c-many-fsdp", "v6e:8x8", (6, 384, 6, 2), 1024, 128, vocab_size=50304, parallel=P(fsdp=16)),
    shape("c-many-untied", "v5e:4x4", (6, 384, 6, 2), 2048, 32, vocab_size=50304, tie_embeddings=False, parallel=P(fsdp=8)),
    shape("c-many-h128", "v6e:4x4", (8, 512, 8, 1), 4096, 16, head_dim=128, vocab_size=32000, tie_embeddings=False, parallel=P(fsdp=4, context=2)),
    shape("c-many-h128-qk", "v6e:4x4", (8, 512, 8, 1), 4096, 16, head_dim=128, vocab_size=32000, tie_embeddings=False, qk_norm=True, parallel=P(fsdp=4, context=2)),
    # middle ones
    shape("c-mid", "v5e:4x4", (16, 1024, 16, 4), 4096, 32, parallel=P(fsdp=16)),
    shape("c-mid-v6e", "v6e:4x4", (16, 1024, 16, 4), 4096, 32, parallel=P(fsdp=16)),
    shape("c-mid-v5p", "v5p:2x2x4", (16, 1024, 16, 4), 4096, 32, parallel=P(fsdp=16)),
    shape("c-mid-full", "v5e:4x4", (16, 1024, 16, 4), 4096, 64, parallel=P(fsdp=16, remat="full")),
    shape("c-mid-dots", "v6e:4x4", (16, 1024, 8, 2), 4096, 64, head_dim=128, parallel=P(fsdp=16, remat="dots")),
    shape("c-mid-acc", "v5e:4x4", (16, 1024, 16, 2), 4096, 64, tie_embeddings=False, parallel=P(fsdp=16, accumulation=4)),
    shape("c-mid-tensor", "v5e:4x4", (16, 1024, 16, 4), 4096, 32, parallel=P(fsdp=4, tensor=4)),
    shape("c-mid-repeat", "v6e:4x4", (12, 1024, 16, 1), 4096, 32, vocab_size=32000, tie_embeddings=False, parallel=P(fsdp=8, tensor=2, remat="full")),
    shape("c-mid-context", "v6e:4x4", (12, 1024, 16, 4), 16384, 8, vocab_size=32000, parallel=P(fsdp=4, context=4)),
    shape("c-mid-slices", "2xv5e:2x4", (12, 768, 12, 12), 2048, 32, vocab_size=50304, tie_embeddings=False, parallel=P(fsdp=8)),
    # patterns, long contexts
    shape("c-pattern", "v5e:2x4", (8, 512, 8, 2), 16384, 4, vocab_size=16384, pattern=ContextSharding(64, 16, 8), parallel=P(fsdp=2, context=2)),
    shape("c-pattern-v6e", "v6e:4x4", (12, 768, 12, 4), 65536, 2, vocab_size=50304, pattern=ContextSharding(64, 16, 16, dense_kv_heads=1), parallel=P(fsdp=2, context=8)),
    shape("c-pattern-h128", "v6e:4x4", (8, 1024, 8, 2), 32768, 4, head_dim=128, vocab_size=50304, pattern=ContextSharding(128, 8, dense_layers="every 4"), parallel=P(fsdp=4, context=4, remat="full")),
    shape("c-long-h128", "v6e:8x8", (16, 1536, 12, 2), 65536, 4, head_dim=128, tie_embeddings=False, parallel=P(fsdp=4, context=16, remat="full")),
    shape("c-long-one", "v5e:1x1", (4, 256, 4, 1), 32768, 1, vocab_size=256, parallel=P(remat="full")),
    shape("c-float32", "v5e:2x2", (6, 512, 8, 4), 2048, 16, vocab_size=8192, dtype="float32", parallel=P(fsdp=2)),
    shape("c-reference", "v5e:1x1", (4, 256, 4, 2), 1024, 8, vocab_size=1024, parallel=P(attention="reference")),
    shape("c-large", "v5p:4x4x4", (24, 3072, 24, 4), 8192, 64, head_dim=128, vocab_size=100352, tie_embeddings=False, qk_norm=True, parallel=P(fsdp=64, remat="full")),
)  # fmt: skip


def key(place: str, run: RunConfig) -> str:
    """What the compiler sees."""
    return json.dumps([place, run.to_dict()], sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=Path("memory.jsonl"))
    parser.add_argument("--print-only", action="store_true")
    parser.add_argument("--set", choices=("calibration", "judging"))
    args = parser.parse_args()
    sets = {"calibration": CALIBRATION, "judging": JUDGING}
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    known = {row["key"]: row for row in map(json.loads, lines)}
    for name in [args.set] if args.set else sets:
        for place, run in sets[name]:
            if key(place, run) in known or args.print_only:
                continue
            try:
                found = compile_run(run, topology(place))
                row = {
                    "key": key(place, run),
                    "name": run.name,
                    "needed": found.needed,
                    "arguments": found.arguments,
                    "temporaries": found.temporaries,
                    "code": found.code,
                    "seconds": found.seconds,
                }
            except Exception as e:
                row = {"key": key(place, run), "name": run.name, "needed": None, "error": str(e)}
            print(
                row["name"],
                row["needed"] and row["needed"] / 2**30,
                costs.training_bytes(run, topology(place).chips, "tpu").total / 2**30,
                row.get("seconds"),
                row.get("error"),
                flush=True,
            )
            with args.results.open("a") as f:
                f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
