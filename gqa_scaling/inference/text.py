"""Text as its tokens come: a character that tokens cut is held back until it is whole."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from gqa_scaling.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gqa_scaling.inference.generate import Generation

CUT = "�"  # what `Tokenizer.decode` makes of a character that is not whole
BEFORE = 8  # tokens of a prompt that the first new one is decoded with


class TextStream:
    """The text after a prompt, piece by piece; all pieces together are the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int]) -> None:
        self._decode = tokenizer.decode
        # A token is decoded with some before it: what it says, a space or none, may depend on them.
        self._tokens = [int(token) for token in prompt][-BEFORE:]
        self._said = len(self._tokens)
        self._begin = 0

    def add(self, token: int) -> str:
        """What can be said now."""
        self._tokens.append(token)
        return self._new(last=False)

    def end(self) -> str:
        """What was held back; a character that never became whole is U+FFFD."""
        return self._new(last=True)

    def _new(self, last: bool) -> str:
        before = self._decode(np.array(self._tokens[self._begin : self._said], np.int64))
        text = self._decode(np.array(self._tokens[self._begin :], np.int64))
        if len(text) <= len(before) or (text.endswith(CUT) and not last):
            return ""
        self._begin, self._said = self._said, len(self._tokens)
        return text[len(before) :]


def texts_of(generation: "Generation", tokenizer: Tokenizer) -> Iterator[list[str]]:
    """What has been written after each prompt, each time that the next tokens are there."""
    streams = [TextStream(tokenizer, tokens) for tokens in generation.prompts]
    texts = [""] * len(streams)
    for tokens in generation:
        for i, token in enumerate(tokens):
            texts[i] += "" if token is None else streams[i].add(token)
            if generation.ended[i] is not None:
                texts[i] += streams[i].end()
        yield list(texts)
