"""Needles: a value told once within a long text and asked for later.

The prompts are the single-needle tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654) in words of
our own: a word's value is stated somewhere in a text, and the question at its end repeats the
statement up to the value. `needle_prompt` builds one prompt to judge a model by; `Mixture` writes
statements and questions over training sequences. Both are functions of numbers that are declared,
so every process that asks gets the same tokens.
"""

import functools
import hashlib
import itertools
import random
from dataclasses import dataclass

import numpy as np

from gqa_scaling.config import require
from gqa_scaling.data.store import TokenStore
from gqa_scaling.data.tokenizer import Tokenizer
from gqa_scaling.text import NeedleForm, Needles

STATEMENT = "\nThe code of {word}:"  # and the value; a question is the same without it
RARE_TOKENS = 32  # that are asked for, and as many that are answers, where a needle is two tokens
OCCURRENCES = 4  # of a statement in a training sequence: it is told once and asked for again
NO_TOKENS = np.array([], np.int64)
REPEATED = "Rain falls on the hills, rivers run to the sea, and clouds come back again. "
_NOUNS = """
acorn amber anchor apple apron arrow autumn badge baker balloon bamboo banner barley barrel
basin basket beach beacon beaver bell berry blanket blossom board bottle branch bread breeze
brick bridge broom brush bucket butter button cabin cable camel canal candle canvas carpet
carrot castle cedar cellar chain chair cherry chest church circle cliff clock cloud clover coal
coast cobalt coffee comet copper coral corn cotton cradle crane creek crown crystal curtain
daisy dancer desert diamond dolphin donkey door dragon drum eagle earth echo elbow ember engine
falcon farmer feather fence fern fiddle field finger flame flower forest fountain fox garden
garlic gate ginger glacier glass globe glove goat gold goose granite grape gravel guitar hammer
harbor harvest hawk hazel heron hill honey horse house island ivory ivy jacket jewel jungle
kettle key kitchen kite ladder lake lamp lantern leaf lemon letter lily lime lion lizard magnet
maple marble market meadow melon mirror moon moss mountain mouse needle nest night north oak
ocean olive onion orange orchard otter owl oyster paddle palace paper parrot path peach pearl
pebble pencil pepper piano pigeon pillow pine planet plum pocket pond poppy potato prairie
pumpkin quartz rabbit rain raven reef ribbon river road robin rocket rope rose ruby saddle
sailor salmon salt sand sapphire scarf school season shadow sheep shell shore silk silver
slate smoke snow south sparrow spider spoon spring spruce square stable stone storm stream
sugar summer sun swan table teapot temple thistle thunder tiger timber tower train tulip
tunnel turtle valley velvet village violet wagon walnut water wheat wheel whistle willow
window winter wolf wood wool yard zebra
"""
WORDS = tuple(_NOUNS.split())


# ---------------------------------------------------------------------------------- one needle


@dataclass(frozen=True)
class Needle:
    """A statement is `asked` + `answer` + an end of line, a question is `asked`: tokens of each."""

    asked: np.ndarray
    answer: np.ndarray
    end: np.ndarray

    @property
    def statement(self) -> np.ndarray:
        return np.concatenate([self.asked, self.answer, self.end])


@functools.lru_cache(maxsize=8)
def _asked(tokenizer: Tokenizer) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The questions for all words, and the end of a statement."""
    texts = [STATEMENT.format(word=word) for word in WORDS]
    return tuple(tokenizer.encode(texts)), tokenizer.encode(["\n"])[0]


def words(form: NeedleForm) -> int:
    """How many different things can be asked for."""
    return RARE_TOKENS if form == "tokens" else len(WORDS)


def _value(form: NeedleForm, dice: random.Random) -> str:
    """A number of 7 digits, or a UUID."""
    if form != "uuid":
        return f"{_below(dice, 9_000_000) + 1_000_000}"
    digits = "".join(f"{_below(dice, 2**16):04x}" for _ in range(8))
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _needle(tokenizer: Tokenizer, form: NeedleForm, word: int, dice: random.Random) -> Needle:
    """A needle for this word; question and answer are tokenised apart, so that both are the same
    tokens wherever they stand. In the form "tokens" a word is a token."""
    if form == "tokens":
        require(
            tokenizer.vocab_size > 2 * RARE_TOKENS,
            f'needles of the form "tokens" need a tokenizer of more than {2 * RARE_TOKENS} tokens, and '
            f"{tokenizer.name!r} has {tokenizer.vocab_size}: choose a larger one, or another form",
        )
        value = RARE_TOKENS + _below(dice, RARE_TOKENS)
        asked, answer = (np.array([_rare_token(tokenizer, i)]) for i in (word, value))
        return Needle(asked, answer, NO_TOKENS)
    questions, end = _asked(tokenizer)
    (answer,) = tokenizer.encode([f" {_value(form, dice)}"])
    return Needle(questions[word], answer, end)


def _rare_token(tokenizer: Tokenizer, i: int) -> int:
    """The i-th of the last tokens of the vocabulary, the one that ends documents left out."""
    token = tokenizer.vocab_size - 1 - i
    return token - (token <= tokenizer.eos)


def _dice(*named: object) -> random.Random:
    """Random numbers that are a function of what is named; `random()` alone is the same in every
    version of Python."""
    seed = hashlib.sha256(" ".join(map(str, named)).encode()).digest()
    return random.Random(int.from_bytes(seed[:8]))


def _below(dice: random.Random, bound: int) -> int:
    """A whole number from 0 to `bound` - 1."""
    return int(dice.random() * bound)


def _shuffled(dice: random.Random, items: list[int]) -> list[int]:
    return [item for _, item in sorted((dice.random(), item) for item in items)]


# ------------------------------------------------------------------------ prompts to judge by


@dataclass(frozen=True)
class Prompt:
    """`tokens` int32 [length + 1]: text with a statement, then the question and the `answer`.

    A model that reads `tokens[:-1]` has `length` positions; the last `len(answer)` of its
    predictions are those of the answer.
    """

    tokens: np.ndarray
    answer: np.ndarray


def needle_prompt(
    store: TokenStore, length: int, depth: float, form: NeedleForm, seed: int, trial: int
) -> Prompt:
    """The prompt number `trial` of a length, and of a depth from 0, the statement first, to 1.

    The haystack is held-out text from a random place on, for "repeated" one sentence again and
    again. Word, value and haystack depend on (length, seed, trial) alone, so that depths are
    compared on equal terms. Raises UserError where the length is too short for the needle, or the
    held-out text for the length.
    """
    dice = _dice("prompt", form, length, seed, trial)
    needle = _needle(store.tokenizer, form, _below(dice, words(form)), dice)
    ends = np.concatenate([needle.asked, needle.answer])
    room = length + 1 - len(needle.statement) - len(ends)
    require(
        room > 0,
        f"evaluation.needles.lengths={length} is too short: statement and question alone have "
        f"{len(needle.statement) + len(ends)} tokens of {store.name}",
    )
    if form == "repeated":
        sentence = store.tokenizer.encode([REPEATED])[0]
        hay = np.resize(sentence, room)
    else:
        require(
            store.heldout_tokens >= room,
            f"evaluation.needles.lengths={length} needs {room:,} tokens of held-out text and "
            f"{store.name} has {store.heldout_tokens:,}: raise heldout_fraction or choose a larger "
            "corpus",
        )
        first = _below(dice, store.heldout_tokens - room + 1)
        hay = store.tokens("heldout", first, first + room)
    place = round(depth * room)
    tokens = np.concatenate([hay[:place], needle.statement, hay[place:], ends])
    return Prompt(tokens.astype(np.int32), needle.answer.astype(np.int32))


# ------------------------------------------------------------------- needles in training text


@dataclass(frozen=True)
class Mixture:
    """Needles written over the training sequences of a store, each of `length` tokens."""

    needles: Needles
    tokenizer: Tokenizer
    length: int

    def __post_init__(self) -> None:
        form, share = self.needles.form, self.needles.share
        size = OCCURRENCES * len(_needle(self.tokenizer, form, 0, _dice("size")).statement)
        require(
            size <= self.length,
            f"data.needles need sequences of {size} tokens for one statement and its questions, not "
            f"{self.length}: raise context_length",
        )
        many, most = share * self.length / size, words(form) - 1
        require(
            many <= most,
            f"data.needles.share={share:g} of {self.length:,} tokens are {many:,.0f} needles, and at "
            f"most {most} are put into a sequence: take at most {most * size / self.length:.2g}",
        )

    def segments(self, sequence: int) -> list[tuple[int, np.ndarray]]:
        """(first position, tokens) of everything that is written over a training sequence.

        As many needles as make up the share, in expectation. A question is the statement again, as
        its answer is learnt from; their order and places are random.
        """
        n = self.needles
        dice = _dice("mixture", n.form, n.seed, self.length, sequence)
        chosen: list[np.ndarray] = []
        room, slack, part = n.share * self.length, self.length, dice.random()
        for word in _shuffled(dice, list(range(words(n.form)))):
            statement = _needle(self.tokenizer, n.form, word, dice).statement
            size = OCCURRENCES * len(statement)
            if part * size >= room or size > slack:
                break
            chosen.append(statement)
            room, slack = room - size, slack - size
        parts = [chosen[i] for i in _shuffled(dice, [*range(len(chosen))] * OCCURRENCES)]
        gaps = sorted(_below(dice, slack + 1) for _ in parts)
        before = itertools.accumulate(map(len, parts), initial=0)
        return [(gap + at, part) for gap, at, part in zip(gaps, before, parts, strict=False)]

    def over(self, tokens: np.ndarray, sequence: int, first: int) -> None:
        """Write the needles of a sequence over a piece of it, which begins at position `first`."""
        for start, part in self.segments(sequence):
            low, high = max(start, first), min(start + len(part), first + len(tokens))
            if low < high:
                tokens[low - first : high - first] = part[low - start : high - start]
