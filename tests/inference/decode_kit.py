"""Small models, dense and of every pattern, decoded greedily with a cache and without one, as JSON.

    python decode_kit.py

Prompts of unequal length go on together. Without a cache each text is computed anew, by the model's own
forward pass, one sequence alone.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
from flax import nnx

from gqa_scaling.config import ModelConfig
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.inference.decode import lay_out, serving_mesh
from gqa_scaling.inference.generate import Decoder, Generation
from gqa_scaling.model.transformer import create

DENSE = ModelConfig(
    2, 32, 8, 4, head_dim=8, vocab_size=40, dtype="float32", qk_norm=True, tie_embeddings=False
)
VARIANTS = {
    "dense": DENSE,
    "mqa": dataclasses.replace(DENSE, n_kv_heads=1, tie_embeddings=True),
    "window": dataclasses.replace(DENSE, pattern=ContextSharding(4, 2)),
    "mixed": dataclasses.replace(
        DENSE,
        n_layers=3,
        pattern=ContextSharding(4, 2, stride=4, sinks=1, dense_kv_heads=2, dense_layers="1"),
    ),
}
PROMPTS = [np.arange(n) * 7 % 40 for n in (5, 29, 1, 14)]
TOKENS = 24


def model(config):
    """Larger weights than at the start, so that choices are clear and texts differ."""
    graph, state = nnx.split(create(config, 0))
    return nnx.merge(graph, jax.tree.map(lambda x: x * 2.0 if x.ndim > 1 else x, state))


@functools.cache
def decoder(config):
    mesh = serving_mesh(config)
    with jax.set_mesh(mesh):
        return Decoder(config, lay_out(config, nnx.state(model(config))), mesh, config.vocab_size)


@functools.cache
def logits_of(config):
    own = model(config)
    return jax.jit(lambda x: own.logits(own(x))[0])


def uncached(config, prompt, tokens=TOKENS):
    """Greedy tokens, and how far each was ahead of the second choice."""
    text, ahead = np.array(prompt), []
    for _ in range(tokens):
        padded = np.pad(text, (0, 64 - len(text)))  # causal: what comes after changes nothing
        logits = np.asarray(logits_of(config)(padded[None]))[len(text) - 1]
        text = np.append(text, logits.argmax())
        ahead.append(float(np.diff(np.sort(logits)[-2:])[0]))
    return text[len(prompt) :].tolist(), min(ahead)


def cached(config, prompts=PROMPTS, **how):
    generation = Generation(decoder(config), prompts, tokens=TOKENS, context=64, **how)
    for _ in generation:
        pass
    return generation.made


if __name__ == "__main__":
    found = {name: cached(config) for name, config in VARIANTS.items()}
    meshes = {name: dict(serving_mesh(config).shape) for name, config in VARIANTS.items()}
    print(json.dumps({"texts": found, "meshes": meshes}))
