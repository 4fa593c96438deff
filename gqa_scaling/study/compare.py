"""Which law to trust: how well each predicts configurations and sizes it was not shown."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import UserError
from gqa_scaling.study.choices import Law
from gqa_scaling.study.fit import make_model
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.models import LAWS, formula
from gqa_scaling.study.points import Points, points
from gqa_scaling.study.results import Results, pattern_of
from gqa_scaling.study.solver import solve_point


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
    p, head_dim = points(results, context_length), int(results.head_dim[0])
    largest = np.zeros(len(p.n), bool)
    for k in range(len(p.heads)):
        mine = np.flatnonzero(p.curve == k)
        largest[mine[-1]] = len(mine) > 3  # a curve must keep three sizes
    patterns = [pattern_of(heads) for heads in p.heads]
    sparse = [
        [k for k, own in enumerate(patterns) if own == each]
        for each in sorted(pattern for pattern in set(patterns) if pattern)
    ]
    out = []
    for law in LAWS:
        try:
            model = make_model(law, p, head_dim)
        except UserError:  # too few configurations for this law, or shapes unknown
            continue

        def unseen(left_out: list[list[int]], law: Law = law) -> float | None:
            """The error of configurations left out together, each group of them in turn."""
            if law == "separate":
                return None
            masks = [~np.isin(p.curve, group) for group in left_out]
            return _rms(np.concatenate([_error(p, law, head_dim, keep) for keep in masks]))

        each = [[k] for k in range(len(p.heads))]
        last = _error(p, law, head_dim, ~largest) / p.loss[largest] if largest.any() else None
        out.append(
            Score(
                law=law,
                parameters=len(model.names),
                residual=_rms(_error(p, law, head_dim, np.ones(len(p.n), bool), inside=True)),
                unseen_heads=unseen(each) if len(p.heads) > 3 else None,
                largest_size=_rms(last) if last is not None else None,
                formula=formula(law, model.names),
                unseen_patterns=unseen(sparse) if len(sparse) > 1 else None,
            )
        )
    return tuple(out)


def leave_one_out_error(
    results: Results, law: Law, context_length: int | None = None
) -> np.ndarray:
    """Prediction minus loss, in nats, of every point by a fit without its configuration."""
    p, head_dim = points(results, context_length), int(results.head_dim[0])
    masks = [p.curve != k for k in range(len(p.heads))]
    return np.concatenate([_error(p, law, head_dim, keep) for keep in masks])


def _error(
    p: Points, law: Law, head_dim: int, keep: np.ndarray, inside: bool = False
) -> np.ndarray:
    """Prediction minus loss for the points left out (or kept), everything chosen on those kept."""
    model = make_model(law, p, head_dim, keep)
    found = solve_point(model, p.loss, p.replicates * keep)
    error = model.predict(found.parameters[None])[0] - p.loss
    return error[keep if inside else ~keep]


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))
