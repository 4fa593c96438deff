"""Run by test_compile.py with 8 virtual devices: compiles train steps on several meshes, as JSON."""

import dataclasses
import json
import re

import jax

from gqa_scaling.config import ModelConfig, ParallelConfig, RunConfig
from gqa_scaling.sweep.compile import compile_step
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
    "fsdp 4, context 2": ParallelConfig(fsdp=4, context=2, remat="full"),
    "all four": ParallelConfig(data=2, fsdp=2, context=2, remat="dots"),
    "tensor": ParallelConfig(fsdp=2, context=2, tensor=2, accumulation=2),
    "repeated heads": ParallelConfig(context=2, tensor=4),
}
out = {}
for name, parallel in MESHES.items():
    found = compile_step(dataclasses.replace(RUN, parallel=parallel))
    out[name] = {k: found[k] for k in ("mesh", "donated", "gathered", "mean_turns", "flops")}

step, arguments, mesh = abstract_step(
    dataclasses.replace(RUN, parallel=ParallelConfig(fsdp=4, context=2))
)
with jax.set_mesh(mesh):
    text = step.lower(*arguments).compile().as_text()
found = {tuple(sorted(map(int, dims.split(",")))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
stacks = {tuple(sorted(x.shape)) for x in jax.tree.leaves(arguments[0][0]) if x.ndim > 2}
out["whole stacks"] = [list(dims) for dims in stacks & found]
print(json.dumps(out))
