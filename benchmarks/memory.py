"""Memory of a training step: what `memory.training_bytes` predicts, and what TPU compilers assign.

    JAX_PLATFORMS=cpu python benchmarks/memory.py --results memory.jsonl

Two sets of shapes: those the prediction was fitted on, and those it is judged by. Who changes the
prediction looks at the first set only; the margin of `launch` covers the error on the second.

Needs libtpu (`pip install -e '.[tpu]'`) and no TPU. The compiler is stopped as soon as it has said
which memory it assigns: generating code takes ten times as long and changes nothing. A shape takes
some ten seconds. With --results answers are appended to the file, and shapes found there are not
compiled again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gqa_scaling.config import ModelConfig, ParallelConfig, RunConfig, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.devices.layout import axis_sizes
from gqa_scaling.hardware import GIB, Slice, slice_of
from gqa_scaling.sweep import memory
from gqa_scaling.sweep.compile import ASSIGNED
from gqa_scaling.sweep.pods import COMMAND, compiler_environment, request, require_compiler

LONGEST = 900  # seconds to wait for a compiler


def shape(
    name: str,
    place: str,
    sizes: tuple[int, int, int, int],
    context: int,
    batch: int,
    *,
    parallel: ParallelConfig | None = None,
    **model,
) -> tuple[str, RunConfig]:
    """L x d with (query, KV) heads, on a topology."""
    run = RunConfig(
        name=name,
        model=ModelConfig(*sizes, **model),
        context_length=context,
        batch_tokens=batch * context,
        tokens=100 * batch * context,
        parallel=parallel or ParallelConfig(),
    )
    axis_sizes(run, slice_of(place).chips)
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
    shape("base", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096),
    shape("base-dots", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, parallel=P(remat="dots")),
    shape("base-full", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, parallel=P(remat="full")),
    shape("base-qk", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, qk_norm=True),
    shape("base-h128", "v5e:1x1", (8, 512, 4, 1), 2048, 8, head_dim=128, vocab_size=4096),
    shape("base-v6e", "v6e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096),
    shape("base-block", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, parallel=P(attention="blockwise")),
    shape("base-acc", "v5e:1x1", (8, 512, 8, 2), 2048, 8, vocab_size=4096, parallel=P(accumulation=4)),
    shape("base-vocab", "v5e:1x1", (4, 512, 8, 2), 2048, 4, vocab_size=65536, tie_embeddings=False),
    # small models on many chips
    shape("many", "v5e:8x8", (6, 384, 6, 2), 1024, 128, vocab_size=50304),
    shape("many-fsdp", "v6e:8x8", (6, 384, 6, 2), 1024, 128, vocab_size=50304, parallel=P(fsdp=16)),
    shape("many-untied", "v5e:4x4", (6, 384, 6, 2), 2048, 32, vocab_size=50304, tie_embeddings=False, parallel=P(fsdp=8)),
    shape("many-h128", "v6e:4x4", (8, 512, 8, 1), 4096, 16, head_dim=128, vocab_size=32000, tie_embeddings=False, parallel=P(fsdp=4, context=2)),
    shape("many-h128-qk", "v6e:4x4", (8, 512, 8, 1), 4096, 16, head_dim=128, vocab_size=32000, tie_embeddings=False, qk_norm=True, parallel=P(fsdp=4, context=2)),
    # middle ones
    shape("mid", "v5e:4x4", (16, 1024, 16, 4), 4096, 32, parallel=P(fsdp=16)),
    shape("mid-v6e", "v6e:4x4", (16, 1024, 16, 4), 4096, 32, parallel=P(fsdp=16)),
    shape("mid-v5p", "v5p:2x2x4", (16, 1024, 16, 4), 4096, 32, parallel=P(fsdp=16)),
    shape("mid-full", "v5e:4x4", (16, 1024, 16, 4), 4096, 64, parallel=P(fsdp=16, remat="full")),
    shape("mid-dots", "v6e:4x4", (16, 1024, 8, 2), 4096, 64, head_dim=128, parallel=P(fsdp=16, remat="dots")),
    shape("mid-acc", "v5e:4x4", (16, 1024, 16, 2), 4096, 64, tie_embeddings=False, parallel=P(fsdp=16, accumulation=4)),
    shape("mid-tensor", "v5e:4x4", (16, 1024, 16, 4), 4096, 32, parallel=P(fsdp=4, tensor=4)),
    shape("mid-repeat", "v6e:4x4", (12, 1024, 16, 1), 4096, 32, vocab_size=32000, tie_embeddings=False, parallel=P(fsdp=8, tensor=2, remat="full")),
    shape("mid-context", "v6e:4x4", (12, 1024, 16, 4), 16384, 8, vocab_size=32000, parallel=P(fsdp=4, context=4)),
    shape("mid-slices", "2xv5e:2x4", (12, 768, 12, 12), 2048, 32, vocab_size=50304, tie_embeddings=False, parallel=P(fsdp=8)),
    # patterns, long contexts
    shape("pattern", "v5e:2x4", (8, 512, 8, 2), 16384, 4, vocab_size=16384, pattern=ContextSharding(64, 16, 8), parallel=P(fsdp=2, context=2)),
    shape("pattern-v6e", "v6e:4x4", (12, 768, 12, 4), 65536, 2, vocab_size=50304, pattern=ContextSharding(64, 16, 16, dense_kv_heads=1), parallel=P(fsdp=2, context=8)),
    shape("pattern-h128", "v6e:4x4", (8, 1024, 8, 2), 32768, 4, head_dim=128, vocab_size=50304, pattern=ContextSharding(128, 8, dense_layers="every 4"), parallel=P(fsdp=4, context=4, remat="full")),
    shape("long-h128", "v6e:8x8", (16, 1536, 12, 2), 65536, 4, head_dim=128, tie_embeddings=False, parallel=P(fsdp=4, context=16, remat="full")),
    shape("long-one", "v5e:1x1", (4, 256, 4, 1), 32768, 1, vocab_size=256, parallel=P(remat="full")),
    shape("float32", "v5e:2x2", (6, 512, 8, 4), 2048, 16, vocab_size=8192, dtype="float32", parallel=P(fsdp=2)),
    shape("reference", "v5e:1x1", (4, 256, 4, 2), 1024, 8, vocab_size=1024, parallel=P(attention="reference")),
    shape("large", "v5p:4x4x4", (24, 3072, 24, 4), 8192, 64, head_dim=128, vocab_size=100352, tie_embeddings=False, qk_norm=True, parallel=P(fsdp=64, remat="full")),
)  # fmt: skip


def assigned(run: RunConfig, place: Slice) -> int:
    """Bytes of device memory that the compiler assigns to the train step of a run."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w+") as said:
        compiler = subprocess.Popen(
            COMMAND,
            env={**compiler_environment(place), "TMPDIR": folder},  # where it has its reports
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            text=True,
        )
        try:
            compiler.stdin.write(request(run, place))
            compiler.stdin.close()
            end = time.monotonic() + LONGEST
            while time.monotonic() < end:
                ended = compiler.poll() is not None
                for report in Path(folder).rglob("*memory-usage-report.txt"):
                    found = ASSIGNED.search(report.read_text())
                    if found:
                        return int(found[1])
                if ended:
                    break
                time.sleep(0.2)
        finally:
            compiler.kill()
            compiler.wait()
        said.seek(0)
        raise RuntimeError(f"{run.name}: the compiler said nothing of memory: {said.read()[-500:]}")


def key(place: str, run: RunConfig) -> str:
    """What the compiler sees."""
    return json.dumps([place, run.to_dict()], sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="a file that keeps the answers")
    parser.add_argument("--set", choices=("calibration", "judging"), help="one of the two only")
    args = parser.parse_args()
    try:
        require_compiler()
    except UserError as error:
        sys.exit(f"benchmarks/memory.py: {error}")
    lines = args.results.read_text().splitlines() if args.results and args.results.exists() else []
    known = {row["key"]: row["bytes"] for row in map(json.loads, lines)}
    for name, shapes in (("calibration", CALIBRATION), ("judging", JUDGING)):
        if args.set not in (None, name):
            continue
        print(f"{name}\n  {'shape':18}{'chips':12}{'assigned':>9}{'predicted':>10}  GiB")
        errors = []
        for place, run in shapes:
            if key(place, run) not in known:
                known[key(place, run)] = assigned(run, slice_of(place))
                if args.results:
                    row = {"key": key(place, run), "bytes": known[key(place, run)]}
                    with args.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            found = known[key(place, run)]
            whole = memory.training_bytes(run, slice_of(place).chips, "tpu")
            predicted = whole.total - whole.program  # the report leaves the program out
            errors.append(predicted / found - 1)
            print(
                f"  {run.name:18}{place:12}{found / GIB:9.2f}{predicted / GIB:10.2f} {errors[-1]:+5.0%}",
                flush=True,
            )
        print(f"  from {min(errors):+.0%} to {max(errors):+.0%}")


if __name__ == "__main__":
    main()
