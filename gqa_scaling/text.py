"""Which text a run is trained on, and on which it is judged and how."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from gqa_scaling.fields import INT32_MAX, Json, between, not_negative, positive, require

MOST_BPE_TOKENS = 2**22  # its trainer takes memory for all of them at once
MOST_TRIALS = 10_000  # of one length and depth, and depths
MOST_AVERAGED = 1000  # states of a run, each kept as a checkpoint until it is finished
NeedleForm = Literal["repeated", "number", "uuid", "tokens"]  # of the single-needle tasks


@dataclass(frozen=True)
class Needles(Json):
    """Needles in the training text: numbers told once and asked for later in the same sequence.

    They are written over `share` of the tokens of every sequence, statements and questions at random
    places; what they are is a function of `seed` and of the sequence's place in the corpus.
    `form` is that of `NeedleTask`. The token store and the held-out text stay as they are.
    """

    share: float
    form: NeedleForm = "number"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share <= 1, f"share={self.share} must be greater than 0 and at most 1")
        not_negative(self, "seed")


@dataclass(frozen=True)
class DataConfig(Json):
    """Which text, and how it is cut into tokens.

    `corpus` is "stdlib" (the source text of the running Python's standard library), "linux-6.1"
    (the source of the Linux kernel, which `gqa-scaling fetch` brings), a folder of text files, or a .jsonl/.jsonl.gz/.jsonl.zst/.parquet file or folder of such files with a
    `text_field`. `tokenizer` is "bytes", "bpe-N" (a byte-level BPE of N tokens trained on the
    corpus), or the path of a tokenizer.json. `store` is where the tokens lie: not part of the run's
    identity, as its content hash is checked whenever a run is resumed. `allow_repeats` lets a run
    make more than `MAX_EPOCHS` passes over the corpus. `needles` are mixed into the training text.
    """

    corpus: str = "stdlib"
    tokenizer: str = "bytes"
    text_field: str = "text"
    heldout_fraction: float = 0.05
    store: str | None = None
    allow_repeats: bool = False
    needles: Needles | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.corpus), "corpus must name a corpus: stdlib, a folder or a file")
        require(
            0 < self.heldout_fraction < 1,
            f"heldout_fraction={self.heldout_fraction} must lie strictly between 0 and 1",
        )
        if self.tokenizer.startswith("bpe-") and not self.tokenizer.endswith(".json"):
            size = re.fullmatch(r"bpe-([0-9]{1,9})", self.tokenizer)
            require(
                size is not None and 258 <= int(size[1]) <= MOST_BPE_TOKENS,
                f"tokenizer={self.tokenizer!r} must be bpe-N with N >= 258 (256 bytes, EOS and a "
                f"merge) and <= {MOST_BPE_TOKENS:,}",
            )
        else:
            require(
                self.tokenizer == "bytes" or self.tokenizer.endswith(".json"),
                f"tokenizer={self.tokenizer!r} must be bytes, bpe-N or the path of a tokenizer.json",
            )

    @property
    def name(self) -> str:
        """A name for people and for the default folder of the store, such as stdlib-bpe-4096."""
        return f"{_last_part(self.corpus)}-{_last_part(self.tokenizer).removesuffix('.json')}"

    @property
    def store_path(self) -> str:
        return self.store or f"data/{self.name}"

    def declaration(self) -> dict[str, Any]:
        """What the token store is made of; names without folders, so that a corpus may move."""
        return {
            "corpus": _last_part(self.corpus),
            "tokenizer": _last_part(self.tokenizer),
            "text_field": self.text_field,
            "heldout_fraction": self.heldout_fraction,
        }


def _last_part(path: str) -> str:
    return PurePosixPath(path).name


@dataclass(frozen=True)
class NeedleTask(Json):
    """Prompts that ask for a needle, by length and depth (the single-needle tasks of RULER, Hsieh et
    al. 2024, arXiv 2404.06654).

    A word's value is told once in a text of `lengths` tokens (none: the training context) and asked
    for at its end. `depths` places are tried, evenly from the beginning of the text to its end, with
    `trials` prompts for each length and depth. Forms: "repeated", a 7-digit number within one
    sentence repeated; "number", the same within held-out text; "uuid", a UUID within it. What small
    models can learn is "tokens", associative recall within held-out text: the question is one of the
    32 last tokens of the vocabulary, its answer one of the 32 before those, so chance is 1 in 32.
    """

    lengths: tuple[int, ...] = ()
    depths: int = 5
    trials: int = 20
    form: NeedleForm = "number"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for length in self.lengths:
            between("length", length, 1, INT32_MAX, "tokens")
        positive(self, "depths", "trials", most=MOST_TRIALS)
        not_negative(self, "seed")
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))

    @property
    def places(self) -> tuple[float, ...]:
        """The depths: 0 is the beginning of the text, 1 its end, before the question."""
        return tuple(i / max(1, self.depths - 1) for i in range(self.depths))


@dataclass(frozen=True)
class EvaluationConfig(Json):
    """How a trained model is judged: mean next-token cross-entropy on held-out text.

    At most `tokens` targets are used, in pieces of `longest_context` that are spread evenly over the
    held-out text. It is the longest context length of the experiment (None: the run's own), so that
    every run of an experiment is judged on the same targets. The loss is also measured at a few points during training, on a part
    of the targets that costs no more than 2% of it; `every_steps` > 0 measures it that often, on all of
    them. Those values are logged and never enter the result.

    What follows is judged only when asked for: the same targets with the text cut into `contexts` of
    other lengths; `needles`; and with `average` > 1 the mean of the parameters after the last step
    and of the `average` - 1 last checkpoints instead of the former.
    """

    tokens: int = 2**20
    longest_context: int | None = None
    every_steps: int = 0
    contexts: tuple[int, ...] = ()
    needles: NeedleTask | None = None
    average: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "tokens", "longest_context")
        not_negative(self, "every_steps")
        for context in self.contexts:
            between("context", context, 1, INT32_MAX, "tokens")
        between("average", self.average, 1, MOST_AVERAGED, "states")
        object.__setattr__(self, "contexts", tuple(sorted(set(self.contexts))))
