"""gqa_scaling: the cheapest grouped-query transformer for a loss and a context length."""

__version__ = "0.1.0"
