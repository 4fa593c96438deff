"""Decoding timed on all devices together, and what they hold of the weights, as JSON."""

import json
from dataclasses import replace

import jax

from gqa_scaling.config import ModelConfig
from gqa_scaling.inference import machine, timing
from gqa_scaling.inference.cases import Case
from gqa_scaling.inference.decode import random_parameters, serving_mesh
from gqa_scaling.inference.machine import Meter

DENSE = ModelConfig(2, 32, 8, 4, head_dim=8, vocab_size=40, dtype="float32")

if __name__ == "__main__":
    timing.ROUNDS, timing.ROUND_SECONDS, machine.SAMPLES = 1, 0, 1
    machine.HOST_ARRAY_BYTES, machine.HOST_PRODUCT = 2**16, 16
    meter = Meter(jax.devices())
    models = {"dense": (DENSE, 8), "odd": (replace(DENSE, n_heads=3, n_kv_heads=3), 3)}
    cases = [Case(m, 64, batch, "float32", (64, batch)) for m, batch in models.values()]
    here = meter.machine()
    rows = [row for rows in timing.time_cases(cases, meter, here, 1e6) for row in rows]
    found = {
        name: {"bytes": row.bytes, "skipped": row.skipped}
        for name, (m, _) in models.items()
        for row in rows
        if row.model == m and row.phase == "decode"
    }
    odd = models["odd"][0]
    with jax.set_mesh(serving_mesh(odd)):
        arrays = jax.tree.leaves(random_parameters(odd))
    weights = sum(part.data.nbytes for x in arrays for part in x.addressable_shards)
    print(json.dumps({"devices": here.devices, "rows": found, "odd_weights": weights}))
