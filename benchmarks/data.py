"""What text and batches cost: the loader in tokens a second, `prepare` with one thread and with two.

    python benchmarks/data.py

Times are processor time (user and system, of all threads), which a busy machine hardly changes; in
brackets the wall time. The loader reads a store of random tokens, as a training step does: the
threads that read ahead, and the thread that takes the batches. `prepare` encodes the standard library
by a BPE that is trained on it first. What two threads could gain on two quiet cores is all that was
computed, divided by what the busiest thread did of it.
"""

import argparse
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
from rich.progress import Progress

from gqa_scaling.config import DataConfig
from gqa_scaling.data import tokenise
from gqa_scaling.data.corpus import open_corpus
from gqa_scaling.data.loader import TrainingData
from gqa_scaling.data.store import TokenStore
from gqa_scaling.data.tokenizer import bytes_tokenizer, train_bpe

SHAPES = ((128, 8), (1024, 8), (1024, 64), (8192, 8), (131072, 4))  # T, B
TOKENS = 2**26


def random_store(folder: Path) -> TokenStore:
    """TOKENS random tokens below 4,096 as a store; nothing else of one is made."""
    shard = folder / "train-00000.bin"
    np.random.default_rng(0).integers(0, 4096, TOKENS, dtype=np.uint16).tofile(shard)
    return TokenStore(
        folder,
        {
            "declaration": {"corpus": "random", "tokenizer": "none"},
            "dtype": "<u2",
            "splits": {"train": {"tokens": TOKENS, "shards": [{"file": shard.name}]}},
        },
    )


def loader(folder: Path) -> None:
    store = random_store(folder)
    print(f"{'loader':12}{'T':>8}{'B':>5}{'us a batch':>12}{'Mtok/s':>9}")
    for T, B in SHAPES:
        batches = TrainingData(store, T, B, seed=0).iterate(0, [(range(B), range(T))])
        for _ in range(8):
            next(batches)
        steps = max(32, 2**21 // (B * T))
        cores, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            next(batches)
        cores, wall = time.process_time() - cores, time.perf_counter() - wall
        rates = steps * B * T / cores / 1e6, steps * B * T / wall / 1e6
        microseconds = cores / steps * 1e6
        print(f"{'':12}{T:8,}{B:5}{microseconds:12.0f}{rates[0]:9.1f} ({rates[1]:.1f})", flush=True)


def prepare(folder: Path, turns: int) -> None:
    corpus = open_corpus(DataConfig())
    texts = [document.text for document in corpus.documents()]
    cores, wall = time.process_time(), time.perf_counter()
    bpe = train_bpe(4096, texts, "bpe-4096")
    cores, wall = time.process_time() - cores, time.perf_counter() - wall
    megabytes = sum(map(len, texts)) / 1e6
    print(f"prepare     {megabytes:.1f} MB; training bpe-4096 on it {cores:.1f} s ({wall:.1f})")
    print(f"{'':12}{'tokenizer':>10}{'threads':>8}{'s':>7}{'busiest thread':>20}{'gain':>7}")
    for turn in range(turns):  # taking turns
        for tokenizer in (bpe, bytes_tokenizer()):
            for workers in (1, 2):
                place = folder / f"{turn}-{tokenizer.name}-{workers}"
                place.mkdir()
                cores, wall, busiest = tokenised(place, corpus, tokenizer, workers)
                print(
                    f"{'':12}{tokenizer.name:>10}{workers:8}{cores:7.2f}{busiest:12.2f} "
                    f"({wall:.2f}){cores / busiest:7.2f}",
                    flush=True,
                )


def tokenised(place: Path, corpus, tokenizer, workers: int) -> tuple[float, float, float]:
    """Processor seconds of all, wall seconds, and processor seconds of the thread that had the most."""
    threads: Counter[int] = Counter()
    encode = tokenise._encode

    def timed(*arguments):
        began = time.thread_time()
        out = encode(*arguments)
        threads[threading.get_ident()] += time.thread_time() - began
        return out

    with mock.patch.object(tokenise, "_encode", timed):
        began = time.process_time(), time.perf_counter(), time.thread_time()
        tokenise.tokenise(place, DataConfig(), corpus, tokenizer, workers, Progress(disable=True))
        cores, wall = time.process_time() - began[0], time.perf_counter() - began[1]
        threads[0] = time.thread_time() - began[2]
    return cores, wall, max(threads.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=2, help="of each prepare (default: 2)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loader(Path(folder))
        prepare(Path(folder), given.turns)
