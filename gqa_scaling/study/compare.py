"""Which law to trust: how well each predicts configurations and sizes it was not shown."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import UserError
from gqa_scaling.study.choices import Law
from gqa_scaling.study.fit import Points, make_model, plain, points
from gqa_scaling.study.models import LAWS, formula, solve_point
from gqa_scaling.study.results import Results, pattern_of


@dataclass(frozen=True)
class Score:
    """Root mean square errors of one law.

    `residual`, `unseen_heads` (each configuration left out in turn) and `unseen_patterns` (each
    pattern in turn, with all heads it was run with) are in nats; `largest_size` (every
    configuration's largest size left out) is relative to the loss. None where the law cannot say:
    separate curves know nothing of a configuration never run.
    """

    law: Law
    parameters: int
    residual: float
    unseen_heads: float | None
    largest_size: float | None
    formula: str
    unseen_patterns: float | None = None

    def to_dict(self) -> dict[str, Any]:
        names = {"residual": "residual_nats", "unseen_heads": "leave_one_heads_out_nats"}
        names |= {"largest_size": "leave_largest_size_out_relative"}
        names |= {"unseen_patterns": "leave_one_pattern_out_nats"}
        told = {k: v for k, v in asdict(self).items() if v is not None or k != "unseen_patterns"}
        formula = told.pop("formula")
        return plain({names.get(k, k): v for k, v in told.items()} | {"formula": formula})


def compare(results: Results, context_length: int | None = None) -> tuple[Score, ...]:
    """Score every law that these runs can be fitted with."""
    p = points(results, context_length)
    patterns = [None, *sorted({h[2] for h in p.heads if pattern_of(h)})]
    out = []
    for law in LAWS:
        head_dim, everything = int(results.head_dim[0]), np.ones(len(p.n), bool)
        try:
            model, _ = make_model(law, p, head_dim)
        except UserError:  # too few configurations for this law, or shapes unknown
            continue
        largest = np.zeros(len(p.n), bool)
        for k in range(len(p.heads)):
            mine = np.flatnonzero(p.curve == k)
            largest[mine[-1]] = len(mine) > 3  # a curve must keep three sizes
        heads = [p.curve != k for k in range(len(p.heads))] if law != "separate" else []
        unseen = np.concatenate([_error(p, law, head_dim, keep) for keep in heads] or [[]])
        whose = np.array([patterns.index(pattern_of(p.heads[k])) for k in p.curve])
        others = [whose != i for i in range(1, len(patterns))] if law != "separate" else []
        sparse = np.concatenate([_error(p, law, head_dim, keep) for keep in others] or [[]])
        last = (
            _error(p, law, head_dim, ~largest) / p.loss[largest] if largest.any() else np.array([])
        )
        out.append(
            Score(
                law=law,
                parameters=len(model.names),
                residual=_rms(_error(p, law, head_dim, everything, inside=True)),
                unseen_heads=_rms(unseen) if len(unseen) and len(p.heads) > 3 else None,
                largest_size=_rms(last) if len(last) else None,
                formula=formula(law, model.names),
                unseen_patterns=_rms(sparse) if len(others) > 1 else None,
            )
        )
    return tuple(out)


def _error(
    p: Points, law: Law, head_dim: int, keep: np.ndarray, inside: bool = False
) -> np.ndarray:
    """Prediction minus loss for the points left out (or kept), everything chosen on those kept."""
    model, ridge = make_model(law, p, head_dim, keep)
    y = np.where(keep, p.loss, p.loss[keep].max())  # what is left out may not bound E
    found = solve_point(model, y, p.replicates * keep, ridge)
    error = model.predict(found.parameters[None])[0] - p.loss
    return error[keep if inside else ~keep]


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))
