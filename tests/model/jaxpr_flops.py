"""Counts the FLOPs of all matrix products in a traced function, loops included."""

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_dot_flops(fn, *args) -> int:
    """FLOPs (2 for each multiply-add) of every dot_general that `fn(*args)` runs.

    A scan counts length times its body, a cond its dearest branch, a choice by platform the branch
    of a CPU. A while loop with a product
    in it has no trip count to read and raises ValueError.
    """
    return _flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _flops(jaxpr) -> int:
    return sum(_equation_flops(e) for e in jaxpr.eqns)


def _equation_flops(e) -> int:
    if e.primitive.name == "dot_general":
        (contracted, _), _ = e.params["dimension_numbers"]
        shape = e.invars[0].aval.shape
        return 2 * e.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    if platforms := e.params.get("branches_platforms"):
        mine = next(i for i, names in enumerate(platforms) if names is None or "cpu" in names)
        return _flops(e.params["branches"][mine].jaxpr)
    inner = [_flops(jaxpr) for value in e.params.values() for jaxpr in _jaxprs(value)]
    if e.primitive.name == "scan":
        return e.params["length"] * sum(inner)
    if e.primitive.name == "cond":
        return max(inner)
    if e.primitive.name == "while" and sum(inner):
        raise ValueError("cannot count a product inside a while loop")
    return sum(inner)


def _jaxprs(value):
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
