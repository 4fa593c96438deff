"""Whether a trained model finds needles: what it writes after the question, decoded greedily.

A prompt counts where the tokens written are those of the answer, all of them. Texts may be longer
than those that the model was trained on: the cache is as long as the text.
"""

import numpy as np

from gqa_scaling.data import TokenStore
from gqa_scaling.data.needles import needle_prompt
from gqa_scaling.fields import round_up
from gqa_scaling.inference.generate import LENGTHS, Decoder, Generation
from gqa_scaling.text import NeedleTask


def needles_found(
    decoder: Decoder,
    store: TokenStore,
    task: NeedleTask,
    length: int,
    depth: float,
    tokens: int,
    first: int | None = None,
) -> float:
    """The share of the task's prompts of a length and depth whose answer the model writes.

    As many prompts are decoded at a time as hold `tokens`, at least one. `first` is a token that is
    put before each, beyond its length. Raises UserError as `needle_prompt` does.
    """
    prompts = [
        needle_prompt(store, length, depth, task.form, task.seed, trial)
        for trial in range(task.trials)
    ]
    before = [] if first is None else [first]
    count = max(len(prompt.answer) for prompt in prompts)
    batches = -(-task.trials // max(1, tokens // length))
    rows = -(-task.trials // batches)
    found = []
    for start in range(0, task.trials, rows):
        batch = prompts[start : start + rows]
        filled = batch + batch[:1] * (rows - len(batch))  # of the same shape as the others
        texts = [np.concatenate([before, each.tokens[: -len(each.answer)]]) for each in filled]
        context = round_up(max(map(len, texts)) + count, LENGTHS)  # that lengths share programs
        generation = Generation(decoder, texts, tokens=count, context=context)
        for _ in generation:
            pass
        found += [
            np.array_equal(made[: len(each.answer)], each.answer)
            for made, each in zip(generation.made, batch, strict=False)
        ]
    return float(np.mean(found))
