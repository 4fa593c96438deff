"""Causal grouped-query attention: `attend`, and one module for each way of computing it."""

from gqa_scaling.model.attention.attend import attend

__all__ = ["attend"]
