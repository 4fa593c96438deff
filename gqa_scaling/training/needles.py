"""Whether a trained model finds needles: accuracy by the length of the text and the needle's depth.

An answer counts where every token of it is the model's first choice after the prompt and the
answer's tokens before it. That is when greedy decoding of the prompt would give the answer, known
from one forward pass.
"""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gqa_scaling.data import TokenStore
from gqa_scaling.data.needles import needle_prompt
from gqa_scaling.devices.layout import zigzag
from gqa_scaling.devices.mesh import BatchLayout
from gqa_scaling.model.loss import per_position_rank
from gqa_scaling.text import NeedleTask
from gqa_scaling.training.setup import Setup, at_length


def needle_accuracy(
    setup: Setup, store: TokenStore, task: NeedleTask, length: int, parameters: Any
) -> list[float]:
    """The share of prompts of a length that are answered, for each of the task's `places`."""
    setup = at_length(setup, length)
    mesh, rows = setup.mesh, setup.run.batch_size
    layout = BatchLayout(mesh, rows, length)
    order = zigzag(np.arange(length), mesh.shape["context"])

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def is_first(parameters: Any, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        model = nnx.merge(setup.graph, parameters)
        return per_position_rank(model, inputs_BT, targets_BT, attention=setup.attention) == 0

    asked = [(depth, trial) for depth in task.places for trial in range(task.trials)]
    found: list[bool] = []
    for start in range(0, len(asked), rows):
        prompts = [
            needle_prompt(store, length, depth, task.form, task.seed, trial)
            for depth, trial in asked[start : start + rows]
        ]
        tokens = np.stack([prompt.tokens for prompt in prompts])
        tokens = np.pad(tokens, ((0, rows - len(prompts)), (0, 0)), mode="edge")
        pieces = [
            tokens[of.start : of.stop, time.start : time.stop + 1] for of, time in layout.pieces
        ]
        first_BT = np.empty((rows, length), bool)
        first_BT[:, order] = jax.device_get(is_first(parameters, *layout.place(pieces)))
        found += [
            bool(row[-len(p.answer) :].all()) for row, p in zip(first_BT, prompts, strict=False)
        ]
    return np.reshape(found, (-1, task.trials)).mean(1).tolist()
