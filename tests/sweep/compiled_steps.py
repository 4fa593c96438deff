"""Run by test_compile.py with 8 virtual devices: compiles train steps on several meshes, as JSON."""

import dataclasses
import json
import re

import jax

from gqa_scaling.config import ModelConfig, ParallelConfig, RunConfig
from gqa_scaling.sweep import compile
from gqa_scaling.sweep.hlo import Program
from gqa_scaling.training.step import abstract_step

RUN = RunConfig(
    name="a",
    model=ModelConfig(3, 64, 4, 2, head_dim=16, vocab_size=512, dtype="float32"),
    context_length=256,
    batch_tokens=8 * 256,
    tokens=10 * 8 * 256,
)
MESHES = {
    "data 8": ParallelConfig(),
    "fsdp 4, context 2": ParallelConfig(fsdp=4, context=2),
    "all four": ParallelConfig(data=2, fsdp=2, context=2, remat="dots"),
    "tensor": ParallelConfig(fsdp=2, context=2, tensor=2, accumulation=2, remat="full"),
    "repeated heads": ParallelConfig(context=2, tensor=4),
}
texts = []


def read(text: str, turns: float) -> Program:
    texts.append(text)
    return Program(text, turns)


compile.Program = read
out = {}
for name, parallel in MESHES.items():
    run = dataclasses.replace(RUN, parallel=parallel)
    found = compile.compile_step(run)
    arrays = re.findall(r"f32\[([\d,]+)\]", texts.pop())
    shapes = {tuple(sorted(map(int, dims.split(",")))) for dims in arrays}
    state = jax.tree.leaves(abstract_step(run)[1][0][0])
    stacks = {tuple(sorted(x.shape)) for x in state if x.ndim > 2}
    out[name] = {k: found[k] for k in ("mesh", "donated", "gathered", "mean_turns", "flops")}
    out[name]["whole stacks"] = sorted(stacks & shapes)
print(json.dumps(out))
