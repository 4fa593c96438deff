"""A run directory as a model of lm-eval, the Language Model Evaluation Harness.

Importing this registers it: `gqa-scaling harness RUN --tasks ...` does so and then is lm-eval, with
`--model gqa_scaling --model_args run=RUN`. A model says the same here and, exported, as lm-eval's `hf`.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from gqa_scaling.config import require
from gqa_scaling.inference.generate import Decoder, Generation
from gqa_scaling.inference.scoring import Scorer
from gqa_scaling.inference.trained import open_trained

NAME = "gqa_scaling"
ROWS = 8  # sequences at a time where batch_size is left to us


@register_model(NAME)
class RunModel(TemplateLM):  # type: ignore[misc]  # lm-eval may not be installed
    """What lm-eval asks of a model: log-likelihoods of text, and greedy continuations.

    `run` is a run directory; `batch_size` sequences are computed at a time, each of at most
    `max_length` tokens, by default the context that the run was trained with.
    """

    def __init__(
        self,
        run: str,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        unknown = others.keys() - {"device", "max_batch_size"}  # what lm-eval gives every model
        require(not unknown, f"unknown model_args: {', '.join(sorted(unknown))}")
        self._rows = ROWS if batch_size in (None, "auto") else int(str(batch_size))
        self._trained = open_trained(run)
        self._text = self._trained.tokenizer()
        self.max_length = int(max_length or self._trained.run.context_length)
        print(
            f"{NAME}: texts of up to {self.max_length:,} tokens, of longer ones the end; continuations "
            f"are greedy, {self.max_gen_toks:,} tokens at most where a task does not say; "
            f"{self._rows} texts at a time",
            file=sys.stderr,
            flush=True,
        )

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._trained.model(), self.max_length, self._rows)

    @functools.cached_property
    def _decoder(self) -> Decoder:
        """Any row of the vocabulary may be chosen, also one that no token has, as in `hf`."""
        vocab_size = self._trained.run.model.vocab_size
        return dataclasses.replace(self._trained.decoder(), vocab_size=vocab_size)

    @property
    def eot_token_id(self) -> int:
        return self._text.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which nothing is known."""
        first = self._trained.first_token
        return self.eot_token_id if first is None else first

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many; half the context at the most."""
        return min(256, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        return self._text.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        """The tokens of a text, with the one that the model was trained to see before it, if any,
        unless special tokens are not to be added."""
        if add_special_tokens is False:
            return self._text.encode([string])[0].tolist()
        return self._trained.tokens_of([string])[0].tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        answers = self._scorer.loglikelihoods([(context, end) for _, context, end in requests])
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        ends = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            for pair in utils.get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(pair)))
            ends.append(len(windows))
        each = [likely for likely, _ in self._loglikelihood_tokens(windows)]
        sums = [sum(each[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        out: dict[int, str] = {}
        alike: dict[str, list[int]] = {}  # what is asked in the same way is computed together
        for i, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(i)
        for group in alike.values():
            asked = normalize_gen_kwargs(requests[group[0]].args[1], self.max_gen_toks)
            require(
                not asked.get("do_sample"),
                "do_sample=True is not supported: continuations are greedy here",
            )
            stops = handle_stop_sequences(asked["until"], eos=None)
            texts = self._written(
                [requests[i].args[0] for i in group], asked["max_gen_toks"], stops
            )
            for i, text in zip(group, texts, strict=True):
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
                out[i] = text
        return [out[i] for i in range(len(requests))]

    def _written(self, prompts: Sequence[str], count: int, stops: Sequence[str]) -> list[str]:
        """What comes after each prompt, up to a stop or `count` tokens, decoded with a cache.

        Of a prompt the end is read that leaves room for them.
        """
        room = self.max_length - count
        require(
            count > 0 and room > 0,
            f"{count} new tokens after a prompt must be above 0 and less than the context of "
            f"{self.max_length}",
        )
        tokens = [(self.tok_encode(text) or [self.prefix_token_id])[-room:] for text in prompts]
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        out = [""] * len(tokens)
        for start in range(0, len(order), self._rows):
            batch = order[start : start + self._rows]
            filled = batch + batch[:1] * (
                self._rows - len(batch)
            )  # of the same shape as the others
            generation = Generation(
                self._decoder,
                [tokens[i] for i in filled],
                tokens=count,
                context=self.max_length,
                stop=[self.eot_token_id],
            )
            for _ in generation:
                texts = [self._text.decode(generation.made[row]) for row in range(len(batch))]
                if all(
                    ended or any(stop in text for stop in stops if stop)
                    for text, ended in zip(texts, generation.ended, strict=False)
                ):
                    break
            for row, i in enumerate(batch):
                text = self._text.decode(generation.made[row])
                out[i] = postprocess_generated_text(text, list(stops), None)
        return out
