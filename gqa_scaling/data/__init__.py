"""Text -> tokens -> batches.

    corpus.py     documents in one fixed order, from a folder, JSONL, Parquet or the standard library
    tokenizer.py  bytes, a BPE trained on the corpus, or somebody's tokenizer.json
    tokenise.py   documents encoded by threads, and written in their order
    build.py      `gqa-scaling prepare`: makes a store
    manifest.py   store.json, what a store is made of
    verification  whether the files of a store still are what was written
    store.py      the token store that every run reads
    loader.py     batch number `step` of a training run, and the evaluation stream

`loader` is imported by name: it brings in Grain, and Grain brings in jax.
"""

from gqa_scaling.data.build import prepare
from gqa_scaling.data.store import TokenStore, open_store
from gqa_scaling.data.tokenizer import Tokenizer

__all__ = ["TokenStore", "Tokenizer", "open_store", "prepare"]
