"""Which law to trust: how well each predicts configurations and sizes it was not shown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import UserError
from gqa_scaling.study.choices import Law
from gqa_scaling.study.fit import make_model
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.models import LAWS, formula
from gqa_scaling.study.points import MIN_SIZES, Points, points
from gqa_scaling.study.results import Results, pattern_of
from gqa_scaling.study.solver import solve_point

Pair = tuple[np.ndarray, np.ndarray]  # the points to fit, and those to predict
_CONFIGURATIONS = 3  # with three a law is still fitted when the others are left out


@dataclass(frozen=True)
class Score:
    """Root mean square errors of one law.

    `residual`, `unseen_heads` (each configuration left out in turn), `more_heads` (the largest
    counts of query heads left out, or of KV heads: see `_cuts`), `more_heads_and_size` (the largest
    size left out with them) and `unseen_patterns` (each pattern in turn, with all heads it was run
    with) are in nats; `largest_size` (every configuration's largest size left out) is relative to
    the loss. None where the law cannot say: separate curves know nothing of a configuration never
    run.
    """

    law: Law
    parameters: int
    residual: float
    unseen_heads: float | None
    largest_size: float | None
    formula: str
    unseen_patterns: float | None = None
    more_heads: float | None = None
    more_heads_and_size: float | None = None

    def to_dict(self) -> dict[str, Any]:
        names = {"residual": "residual_nats", "unseen_heads": "leave_one_heads_out_nats"}
        names |= {"largest_size": "leave_largest_size_out_relative"}
        names |= {"unseen_patterns": "leave_one_pattern_out_nats"}
        names |= {"more_heads": "leave_most_heads_out_nats"}
        names |= {"more_heads_and_size": "leave_most_heads_and_largest_size_out_nats"}
        told = {k: v for k, v in asdict(self).items() if v is not None or k != "unseen_patterns"}
        formula = told.pop("formula")
        return plain({names.get(k, k): v for k, v in told.items()} | {"formula": formula})


def compare(results: Results, context_length: int | None = None) -> tuple[Score, ...]:
    """Score every law that these runs can be fitted with."""
    p, head_dim = points(results, context_length, joint=True), int(results.head_dim[0])
    few = min(np.bincount(p.curve)) < MIN_SIZES
    largest = np.zeros(len(p.n), bool)
    for k in range(len(p.heads)):
        mine = np.flatnonzero(p.curve == k)
        largest[mine[-1]] = len(mine) > 3  # a curve must keep three sizes
    every, left_out, out = np.ones(len(p.n), bool), _left_out(p), []
    for law in LAWS:
        if law == "separate" and few:
            continue
        try:
            model = make_model(law, p, head_dim)
        except UserError:  # too few configurations for this law, or shapes unknown
            continue
        errors = {
            name: _beyond(p, law, head_dim, pairs) if pairs and law != "separate" else None
            for name, pairs in left_out.items()
        }
        size = (
            _error(p, law, head_dim, ~largest, largest) / p.loss[largest] if largest.any() else None
        )
        out.append(
            Score(
                law=law,
                parameters=len(model.names),
                residual=_rms(_error(p, law, head_dim, every, every)),
                largest_size=_rms(size) if size is not None else None,
                formula=formula(law, model.names),
                **errors,
            )
        )
    return tuple(out)


def preferred_law(results: Results) -> Law:
    """The joint law for questions that go beyond the heads that were trained.

    That with the least error where the most heads and the largest size were left out; where no such
    test can be made, the most heads, else each configuration in turn, else the one with the fewest
    parameters; of equals the first. Raises UserError where no joint law can be fitted.
    """
    p, head_dim = points(results, joint=True), int(results.head_dim[0])
    models = {law: make_model(law, p, head_dim) for law in LAWS if law != "separate"}
    left_out = _left_out(p)
    for name in ("more_heads_and_size", "more_heads", "unseen_heads"):
        if left_out[name]:
            errors = {law: _beyond(p, law, head_dim, left_out[name]) for law in models}
            return min(models, key=errors.__getitem__)
    return min(models, key=lambda law: len(models[law].names))


def _left_out(p: Points) -> dict[str, list[Pair]]:
    """For each error of a `Score` the points to fit and those to predict; none where it cannot be had."""
    cuts, size = _cuts(p), p.n_layers * p.d_model**2.0
    last, patterns = size >= size.max(), np.array([pattern_of(h) for h in p.heads], object)[p.curve]
    sparse = [patterns == each for each in sorted(set(patterns) - {None})]
    each = [p.curve == k for k in range(len(p.heads))]
    return {
        "unseen_heads": [(~own, own) for own in each] if len(each) > _CONFIGURATIONS else [],
        "unseen_patterns": [(~own, own) for own in sparse] if len(sparse) > 1 else [],
        "more_heads": cuts,
        "more_heads_and_size": [
            (keep & ~last, asked & last) for keep, asked in cuts if (asked & last).any()
        ],
    }


def _beyond(p: Points, law: Law, head_dim: int, pairs: Sequence[Pair]) -> float:
    """The error of the points that the second of each pair marks, fitted to the first."""
    errors = [_error(p, law, head_dim, keep, asked) for keep, asked in pairs]
    return _rms(np.concatenate(errors))


def _cuts(p: Points) -> list[Pair]:
    """Points to fit and points to predict with more heads of one kind than any of those fitted.

    For query heads, and for KV heads: all configurations with as many or more of that kind are left
    out, for every number that leaves three configurations with two or more numbers of that kind.
    Predicted are those left out whose number of the other kind was kept, as the others would ask
    for something that the kept points tell nothing of. Shapes must be known.
    """
    heads, out = np.array([h[:2] for h in p.heads]), []
    for kind in (0, 1):
        for least in np.unique(heads[:, kind])[2:]:
            kept = heads[:, kind] < least
            asked = ~kept & np.isin(heads[:, 1 - kind], heads[kept, 1 - kind])
            if len(np.unique(heads[kept], axis=0)) >= _CONFIGURATIONS and asked.any():
                out.append((kept[p.curve], asked[p.curve]))
    return out


def _error(p: Points, law: Law, head_dim: int, keep: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Prediction minus loss for the points `asked`, fitted to those to `keep`."""
    model = make_model(law, p, head_dim, keep)
    found = solve_point(model, p.loss, p.replicates * keep)
    return (model.predict(found.parameters[None])[0] - p.loss)[asked]


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))
