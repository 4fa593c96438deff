"""Text -> tokens -> batches.

`loader` is imported by name: it brings in Grain, and Grain brings in jax.
"""

from gqa_scaling.data.build import prepare
from gqa_scaling.data.store import TokenStore, open_store
from gqa_scaling.data.tokenizer import Tokenizer

__all__ = ["TokenStore", "Tokenizer", "open_store", "prepare"]
