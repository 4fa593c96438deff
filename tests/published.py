"""A run of the size that most published numbers are of, for tests of what it costs."""

from gqa_scaling.config import ModelConfig, RunConfig

MODEL = ModelConfig(24, 1280, 8, 2)


def published_run(**changes: object) -> RunConfig:
    """20 tokens per parameter at T = 8K in batches of 512K tokens (Chen et al. 2025, section 4)."""
    fields = {
        "name": "a",
        "model": MODEL,
        "context_length": 8192,
        "batch_tokens": 2**19,
        "tokens_per_param": 20.0,
    }
    return RunConfig(**fields | changes)
