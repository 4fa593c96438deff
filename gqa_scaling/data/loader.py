"""Batch number `step` of a training run, and the stream that a model is judged on.

There is one global stream of chunks, and the state of the data is the global step alone: every
process may read the rows and the time slices of a batch that its own devices hold, so nothing
changes with the number of processes, and at long context no process needs a whole sequence.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from gqa_scaling.config import require
from gqa_scaling.data.needles import Mixture
from gqa_scaling.data.store import TokenStore
from gqa_scaling.text import Needles


@dataclass(frozen=True)
class TrainingData:
    """The training split of `store`, cut into chunks, shuffled anew in each epoch.

    Chunk i is the `context_length` + 1 tokens from i x `context_length` on: neighbours share one
    token, so that each token is a target once in an epoch. The last short chunk is dropped. The
    order of the chunks depends on `seed` only, not on `batch_size`. `needles` are written over each
    chunk, the same ones in every epoch.
    """

    store: TokenStore
    context_length: int
    batch_size: int
    seed: int
    needles: Needles | None = None

    def __post_init__(self) -> None:
        name, tokens = self.store.name, self.store.train_tokens
        require(
            self.chunks_per_epoch > 0,
            f"context_length={self.context_length} is too long for the {tokens:,} training tokens of "
            f"{name}, which must hold one more than that: shorten it or choose a larger corpus",
        )
        require(
            self.chunks_per_epoch >= self.batch_size,
            f"a batch of {self.batch_size} sequences must not exceed the {self.chunks_per_epoch} that "
            f"the {tokens:,} training tokens of {name} hold at context_length={self.context_length}: "
            "choose a smaller batch or a larger corpus",
        )
        _ = self._mixture  # refuses what does not fit

    @functools.cached_property
    def _mixture(self) -> Mixture | None:
        if self.needles is None:
            return None
        return Mixture(self.needles, self.store.tokenizer, self.context_length + 1)

    @property
    def chunks_per_epoch(self) -> int:
        return max(self.store.train_tokens - 1, 0) // self.context_length

    @functools.cached_property
    def _order(self) -> grain.MapDataset:
        """Element `step` holds the chunk numbers of batch `step`; it has no end that is ever met."""
        # Epoch e is shuffled by seed + e, so neighbouring seeds are first hashed apart.
        seed = int.from_bytes(hashlib.sha256(f"shuffle {self.seed}".encode()).digest()[:4])
        chunks = grain.MapDataset.range(self.chunks_per_epoch)
        # Without a number of epochs the length is one that `len` cannot give for batches of one.
        epochs = 2**62 // self.chunks_per_epoch
        return chunks.shuffle(seed).repeat(epochs).batch(self.batch_size)

    def chunks(self, step: int) -> list[int]:
        """Which chunks of the training split batch `step` holds."""
        return self._order[step].tolist()

    def batch(self, step: int, rows: range | None = None, time: range | None = None) -> np.ndarray:
        """The tokens of batch `step`, int32 [rows, time + 1].

        `rows` selects among the `batch_size` sequences and `time` among the `context_length`
        positions. One token follows the last position: `[:, :-1]` are the inputs at `time` and
        `[:, 1:]` their targets.
        """
        whole = range(self.batch_size), range(self.context_length)
        return self._read(
            self._order[step],
            whole[0] if rows is None else rows,
            whole[1] if time is None else time,
        )

    def iterate(
        self, start_step: int, pieces: Sequence[tuple[range, range]]
    ) -> Iterator[list[np.ndarray]]:
        """The (rows, time) `pieces` of batch `start_step`, `start_step` + 1, ... without end.

        Threads read ahead.
        """
        # The order of a batch is looked up once, not for every piece: that is most of the work.
        batches = self._order[start_step:].map(
            lambda chunks: [self._read(chunks, rows, time) for rows, time in pieces]
        )
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(batches.to_iter_dataset(options))

    def _read(self, chunks: np.ndarray, rows: range, time: range) -> np.ndarray:
        inside = 0 <= time.start < time.stop <= self.context_length
        if time.step != 1 or not inside:
            raise IndexError(f"time={time} must be contiguous, not empty, and among the positions")
        out = np.empty((len(rows), len(time) + 1), np.int32)
        for row, chunk in enumerate(chunks[rows.start : rows.stop]):
            first = int(chunk) * self.context_length
            out[row] = self.store.tokens("train", first + time.start, first + time.stop + 1)
            if self._mixture is not None:
                self._mixture.over(out[row], int(chunk), time.start)
        return out


def heldout_chunks(
    store: TokenStore, context_length: int, tokens: int, multiple_of: int
) -> np.ndarray:
    """The evaluation stream as chunks, int32 [n, context_length + 1], read-only.

    The stream is at most `tokens` targets, in pieces of `multiple_of` with one token before each. Pieces are
    spread evenly over the held-out split: documents of one kind lie together there, and few long ones
    may fill its beginning. Chunks of a piece overlap by one token, so that each of its targets is one
    exactly once, whatever the context length. Raises UserError when the split is too short.
    """
    require(
        multiple_of % context_length == 0,
        f"multiple_of={multiple_of} must be a multiple of context_length={context_length}",
    )
    pieces = _evaluation_pieces(store, tokens, multiple_of)
    windows = np.lib.stride_tricks.sliding_window_view(pieces, context_length + 1, axis=1)
    chunks = windows[:, ::context_length].reshape(-1, context_length + 1)
    chunks.flags.writeable = False
    return chunks


def evaluation_hash(store: TokenStore, tokens: int, multiple_of: int) -> str:
    """sha256 over the tokens of the evaluation stream: equal hashes mean the same targets."""
    return hashlib.sha256(_evaluation_pieces(store, tokens, multiple_of).tobytes()).hexdigest()


def _evaluation_pieces(store: TokenStore, tokens: int, multiple_of: int) -> np.ndarray:
    """The pieces, little-endian int32 [n, multiple_of + 1]."""
    targets = store.heldout_tokens - 1
    count = min(tokens, targets) // multiple_of
    require(
        count > 0,
        f"the evaluation stream must hold {multiple_of} targets, the longest context of the "
        f"experiment, but the held-out split of {store.name} has {store.heldout_tokens:,} tokens and "
        f"evaluation.tokens={tokens}: raise heldout_fraction or choose a larger corpus",
    )
    apart = targets // count
    starts = range(0, count * apart, apart)
    pieces = [store.tokens("heldout", start, start + multiple_of + 1) for start in starts]
    return np.stack(pieces).astype("<i4")
