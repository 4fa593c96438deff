"""Loss against the shape of models of one N: head size, FFN ratio and aspect, one at a time.

Chen et al. 2025 leave these as they are; Bian et al. 2025 (arXiv 2510.18245) make the loss at a given N and
D conditional on shape. Here each shape is held against the one that was trained with most seeds.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from gqa_scaling.study.results import Results
from gqa_scaling.study.uncertainty import LEVEL

SAME_SIZE = 1.03  # factor within which N, and the training tokens, count as the same
SAME_RATIO = 1.25  # and F/d, where it is not what is varied: whole widths allow no better


@dataclass(frozen=True)
class Shaped:
    """One shape: its runs' rows, with F the size of its FFN."""

    n_layers: int
    d_model: int
    head_dim: int
    ffn: float
    rows: tuple[int, ...]

    @property
    def ratio(self) -> float:
        return self.ffn / self.d_model


@dataclass(frozen=True)
class OnAxis:
    """A shape's place on an axis, its mean loss in nats over `runs` seeds, and that minus the loss of the
    shape in the middle, with the half width of its interval (None where no seeds tell the noise)."""

    axis: str
    n_params: float
    value: float
    loss: float
    runs: int
    difference: float
    half: float | None

    @property
    def is_middle(self) -> bool:
        return self.half == 0.0


AXES: dict[str, tuple[Callable[[Shaped], float], Callable[[Shaped, Shaped], bool]]] = {
    "head size": (
        lambda s: s.head_dim,
        lambda s, m: s.n_layers == m.n_layers and _near(s.ratio, m.ratio, SAME_RATIO),
    ),
    "FFN ratio F/d": (
        lambda s: s.ratio,
        lambda s, m: s.n_layers == m.n_layers and s.head_dim == m.head_dim,
    ),
    "aspect d/L": (
        lambda s: s.d_model / s.n_layers,
        lambda s, m: (
            s.head_dim == m.head_dim
            and _near(s.ratio, m.ratio, SAME_RATIO)
            and (s.n_layers != m.n_layers or s == m)
        ),
    ),
}


def shape_axes(results: Results) -> list[OnAxis]:
    """Every shape on each axis along which a size has three or more; none where runs have no shapes, or
    where N is not counted exactly, as F follows from it."""
    if results.count != "n_exact" or not np.all(results.n_layers > 0):
        return []
    sizes = [shapes for shapes in _sizes(results) if len(shapes) > 2]
    deviation, dof = _noise(results, sizes)
    quantile = float(stdtrit(dof, (1 + LEVEL) / 2)) if dof else None
    out = []
    for shapes in sizes:
        middle = max(shapes, key=lambda s: len(s.rows))
        if sum(len(s.rows) == len(middle.rows) for s in shapes) > 1:
            continue  # none stands out
        for axis, (value, alike) in AXES.items():
            on = sorted((s for s in shapes if alike(s, middle)), key=value)
            if len({round(value(s), 6) for s in on}) < 3:
                continue
            for s in on:
                loss = float(results.loss[list(s.rows)].mean())
                base = float(results.loss[list(middle.rows)].mean())
                spread = math.sqrt(1 / len(s.rows) + 1 / len(middle.rows))
                half = None if quantile is None else quantile * deviation * spread
                n = float(results.n_params[list(middle.rows)].mean())
                known = 0.0 if s == middle else half
                out.append(OnAxis(axis, n, value(s), loss, len(s.rows), loss - base, known))
    return sorted(out, key=lambda p: (list(AXES).index(p.axis), p.n_params))


def _near(a: float, b: float, factor: float) -> bool:
    return abs(math.log(a / b)) <= math.log(factor)


def _sizes(r: Results) -> Iterator[list[Shaped]]:
    """The shapes of each size: dense runs of one N, D, context and attention width."""
    left = [i for i in np.argsort(r.n_params, kind="stable").tolist() if r.pattern[i] is None]
    while left:
        first, *_ = left

        def same(i: int, first: int = first) -> bool:
            sized = _near(r.n_params[i], r.n_params[first], SAME_SIZE)
            budget = math.isnan(r.tokens[i]) or _near(r.tokens[i], r.tokens[first], SAME_SIZE)
            context = r.context_length[i] == r.context_length[first]
            wide = all(
                heads[i] * r.head_dim[i] == heads[first] * r.head_dim[first]
                for heads in (r.n_heads, r.n_kv_heads)
            )
            return bool(sized and budget and context and wide)

        group = [i for i in left if same(i)]
        left = [i for i in left if i not in group]
        shapes: dict[tuple[int, int, int, float], list[int]] = {}
        for i in group:
            L, d, size = int(r.n_layers[i]), int(r.d_model[i]), int(r.head_dim[i])
            attention = 2 * L * d * size * (r.n_heads[i] + r.n_kv_heads[i])
            ffn = float(r.n_params[i] - attention - (2 * L + 1) * d) / (3 * L * d)
            shapes.setdefault((L, d, size, round(ffn, 3)), []).append(i)
        yield [Shaped(*shape, tuple(rows)) for shape, rows in shapes.items()]


def _noise(r: Results, sizes: list[list[Shaped]]) -> tuple[float, int]:
    """The standard deviation of one run, in nats, and its degrees of freedom, from all seeds."""
    sums, dof = 0.0, 0
    for shaped in (s for shapes in sizes for s in shapes):
        losses = r.loss[list(shaped.rows)]
        sums += float(((losses - losses.mean()) ** 2).sum())
        dof += len(losses) - 1
    return (math.sqrt(sums / dof), dof) if dof else (0.0, 0)
