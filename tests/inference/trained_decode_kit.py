"""The parameters of a finished run, dense and under every pattern, decoded greedily with a cache and
without one, as JSON.

    python trained_decode_kit.py RUN

256 tokens after four prompts of unequal length. Without a cache all texts are read anew for every
token, by the model's own forward pass. Where both differ, `behind` is how far what the cache chose is
behind in those logits: texts are followed along the cache's own tokens, so that one difference makes
no others.
"""

import dataclasses
import json
import sys

import jax
import numpy as np
from flax import nnx

from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.inference.decode import lay_out, serving_mesh
from gqa_scaling.inference.generate import Decoder, Generation
from gqa_scaling.inference.trained import open_trained
from gqa_scaling.model.transformer import create

TOKENS, LONGEST = 256, 384
PROMPTS = ("def", "import os\n\n\nclass Reader:\n    def __init__(self", "x", "for i in range(")
PATTERNS = {
    "dense": None,
    "window": ContextSharding(block=8, local=4),
    "stripes": ContextSharding(block=8, local=4, stride=4),
    "sinks": ContextSharding(block=8, local=4, sinks=1),
    "mixed": ContextSharding(block=8, local=4, stride=4, sinks=1, dense_layers="first 1"),
}


def compared(trained, pattern):
    """Differing tokens of all, and how far behind the first choice these are at the most."""
    config = dataclasses.replace(trained.run.model, dtype="float32", pattern=pattern)
    graph, _ = nnx.split(nnx.eval_shape(lambda: create(config, 0)))
    state = trained.parameters()
    mesh = serving_mesh(config)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        parameters = lay_out(config, jax.device_put(state, whole))
    tokenizer = trained.tokenizer()
    decoder = Decoder(config, parameters, mesh, tokenizer.vocab_size)
    prompts = tokenizer.encode(list(PROMPTS))
    generation = Generation(decoder, prompts, tokens=TOKENS, context=LONGEST)
    for _ in generation:
        pass
    model = nnx.merge(graph, state)

    @jax.jit
    def logits(tokens_BT):
        return model.logits(model(tokens_BT, attention="reference"))

    texts = np.zeros((len(prompts), LONGEST), np.int32)
    for row, (prompt, made) in enumerate(zip(prompts, generation.made, strict=True)):
        texts[row, : len(prompt) + len(made)] = [*prompt, *made]
    logits_BTV = np.asarray(logits(texts))[..., : tokenizer.vocab_size]
    differing, behind = 0, 0.0
    for row, (prompt, made) in enumerate(zip(prompts, generation.made, strict=True)):
        ours = logits_BTV[row, len(prompt) - 1 : len(prompt) + len(made) - 1]
        gap = ours.max(-1) - ours[np.arange(len(made)), made]
        differing += int((gap > 0).sum())
        behind = max(behind, float(gap.max()))
    return {
        "differing": differing,
        "behind": behind,
        "texts": generation.made,
        "mesh": dict(mesh.shape),
    }


if __name__ == "__main__":
    trained = open_trained(sys.argv[1])
    print(json.dumps({name: compared(trained, pattern) for name, pattern in PATTERNS.items()}))
