"""The runs of a study as the table that is fitted: seeds averaged, in one order, or refused."""

from dataclasses import dataclass

import numpy as np

from gqa_scaling.config import require
from gqa_scaling.study.results import Heads, Results, pair
from gqa_scaling.units import quantity

MIN_SIZES = 3
Interval = tuple[float, float]


@dataclass(frozen=True)
class Points:
    """The mean loss of each cell of runs, sorted by heads and then by N; one entry for each point.

    A cell is a configuration at one size and, where a law speaks of them, one training context
    length and one number of training tokens. `replicates` counts the seeds behind each mean.
    `noise` is the standard deviation of one run around its cell's mean, in nats, from `noise_dof`
    degrees of freedom; None without replicates. `density` belongs to each configuration: that of
    its attention at the training context (the share of the causal query-key pairs that are
    computed; 1 when dense), a geometric mean over its sizes. Unknown tokens are NaN.
    """

    heads: tuple[Heads, ...]
    density: np.ndarray  # of each configuration
    curve: np.ndarray  # index into heads
    n: np.ndarray
    n_layers: np.ndarray
    d_model: np.ndarray
    context: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    replicates: np.ndarray
    name: np.ndarray
    noise: float | None
    noise_dof: int

    @property
    def centre(self) -> np.ndarray:
        """Mean ln N of each curve."""
        x = np.log(self.n)
        return np.array([x[self.curve == k].mean() for k in range(len(self.heads))])

    @property
    def size(self) -> np.ndarray:
        return size_labels(self.curve, self.n, self.n_layers, self.d_model)

    def range_n(self, k: int) -> Interval:
        """The least and the largest N that configuration k was trained at."""
        n = self.n[self.curve == k]
        return float(n.min()), float(n.max())


def points(results: Results, context_length: int | None = None, *, joint: bool = False) -> Points:
    """The points of the runs at one context length, each size trained on one number of tokens.

    Raises UserError when the runs span several context lengths and none is named, and as `cells`.
    """
    r = results
    if context_length is not None:
        lengths = sorted(set(r.context_length.tolist()))
        require(
            context_length in lengths,
            f"{r.source}: no runs at context length {context_length}; there are "
            f"{', '.join(map(str, lengths))}",
        )
        r = r.select(r.context_length == context_length)
    else:
        r.only(
            "context_length",
            "runs at context lengths {} cannot share a curve; name one of them",
        )
    return cells(r, 1, joint=joint)


def cells(
    results: Results, shared: int, over: tuple[str, ...] = (), *, joint: bool = False
) -> Points:
    """The points of these runs for a law with `shared` parameters besides two for each curve.

    A `joint` law has no curve for each: it takes a configuration with a single size.
    `over` names what sets cells apart besides the configuration and its size: "context_length" or
    "tokens". Raises UserError when head sizes are mixed, one size was trained on several numbers of
    tokens that the law does not speak of, a configuration has fewer than three sizes, or nothing
    would be left to judge the noise by.
    """
    r = results
    dims = np.unique(r.head_dim)
    require(
        len(dims) == 1,
        f"{r.source}: head sizes {', '.join(map(str, dims))} cannot share a study; fit one of them",
    )
    columns = (r.heads, r.n_params, r.n_layers, r.d_model, *(getattr(r, name) for name in over))
    keys = list(zip(*columns, strict=True))
    found: dict[tuple, list[int]] = {}
    for i in sorted(range(len(r)), key=lambda i: keys[i]):
        found.setdefault(keys[i], []).append(i)
    members = list(found.values())
    first = [cell[0] for cell in members]
    tokens = np.array([_tokens(r, cell, over) for cell in members])
    heads: tuple[Heads, ...] = tuple(dict.fromkeys(key[0] for key in found))
    curve = np.array([heads.index(key[0]) for key in found])
    missing = f"; not finished: {', '.join(r.missing)}" if r.missing else ""
    sizes = [len(np.unique(r.n_params[first][curve == k])) for k in range(len(heads))]
    short = [f"{pair(h)} has {n}" for h, n in zip(heads, sizes, strict=True) if n < MIN_SIZES]
    require(
        joint or not short,
        f"{r.source}: too few runs to fit: each configuration needs {MIN_SIZES} sizes, but "
        f"{', '.join(short)}{missing}; a joint law, --law product, takes one with a single size",
    )
    free = 2 * len(heads) + shared
    require(
        joint or len(members) > free,
        f"{r.source}: too few runs to fit: {len(members)} points leave nothing to judge the noise "
        f"of {free} parameters; add {'runs' if over else 'a size or a configuration'}{missing}",
    )
    squares = sum(((r.loss[cell] - r.loss[cell].mean()) ** 2).sum() for cell in members)
    dof = len(r) - len(members)
    return Points(
        heads=heads,
        density=densities(r.density[first], curve),
        curve=curve,
        n=r.n_params[first],
        n_layers=r.n_layers[first],
        d_model=r.d_model[first],
        context=r.context_length[first],
        tokens=tokens,
        loss=np.array([r.loss[cell].mean() for cell in members]),
        replicates=np.array([len(cell) for cell in members]),
        name=_names(r, first, over),
        noise=float(np.sqrt(squares / dof)) if dof else None,
        noise_dof=dof,
    )


def _tokens(r: Results, cell: list[int], over: tuple[str, ...]) -> float:
    """The training tokens of the runs of a cell, NaN when none says them; UserError for several."""
    known = sorted({float(t) for t in r.tokens[cell] if np.isfinite(t)})
    where, rule = "", "a curve needs one token budget for each size"
    if "context_length" in over:
        where = f" at context length {r.context_length[cell[0]]}"
        rule = (
            "a context law needs one token budget for each size: name a length with --context to "
            "fit a token law there"
        )
    require(
        len(known) < 2,
        f"{r.source}: {r.name[cell[0]]} was trained on {', '.join(f'{t:,.0f}' for t in known)} "
        f"tokens{where}; {rule}",
    )
    return known[0] if known else np.nan


def _names(r: Results, rows: list[int], over: tuple[str, ...]) -> np.ndarray:
    """The runs' names, with the context or the tokens where runs of one name differ in them."""
    names = [str(name) for name in r.name[rows]]
    for column in over:
        if len(set(names)) < len(names):
            marks = [
                f"T={v:,}" if column == "context_length" else f"D={quantity(v)}"
                for v in getattr(r, column)[rows]
            ]
            names = [f"{name} {mark}" for name, mark in zip(names, marks, strict=True)]
    return np.array(names, dtype=object)


def densities(density: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """The geometric mean over the points of each configuration."""
    return np.exp(np.bincount(curve, np.log(density)) / np.bincount(curve))


def labels(*columns: np.ndarray) -> np.ndarray:
    """One label for every combination of these columns that occurs."""
    whole = np.stack([np.asarray(c, float) for c in columns])
    return np.unique(whole, axis=1, return_inverse=True)[1].ravel()


def ranks(values: np.ndarray, within: np.ndarray) -> np.ndarray:
    """The rank of each value, from 0, among the distinct values with the same label in `within`."""
    out = np.zeros(len(values), int)
    for label in np.unique(within):
        out[within == label] = np.unique(values[within == label], return_inverse=True)[1]
    return out


def size_labels(
    curve: np.ndarray, n: np.ndarray, n_layers: np.ndarray, d_model: np.ndarray
) -> np.ndarray:
    """A label for the size of each point or run: its (L, d), else the rank of its N on its curve.

    Sizes are counted in this one way wherever errors of a size, or a size at several context
    lengths, are looked at. Without shapes, ranks say which sizes belong together only where every
    curve has equally many; elsewhere each size of each curve stands for itself.
    """
    if n_layers.all():
        return labels(n_layers, d_model)
    rank = ranks(n, curve)
    most = [rank[curve == k].max() for k in np.unique(curve)]
    return labels(curve, n) if np.ptp(most) else rank
