"""Small studies of every kind, plausible and not, as the CSV files that users bring, and an answer."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import approx_fprime, least_squares

from gqa_scaling.config import Question, UserError
from gqa_scaling.costs import n_formula
from gqa_scaling.hardware import hardware
from gqa_scaling.study import fit as fitting
from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.equal_training import equal_training
from gqa_scaling.study.estimates import Estimates, estimate
from gqa_scaling.study.frontier import Frontier, frontier
from gqa_scaling.study.models import LAWS, Model
from gqa_scaling.study.points import Points
from gqa_scaling.study.reading import from_text
from gqa_scaling.study.report import answers, estimates
from gqa_scaling.study.report.sentences import training
from gqa_scaling.study.report.tradeoffs import aligned_answer, sparsity_table
from gqa_scaling.study.report.write import write_report
from gqa_scaling.study.results import Results
from gqa_scaling.study.serving import Serving
from gqa_scaling.study.solver import refit, solve_point
from gqa_scaling.study.study import Study

LADDERS = (
    ((1, 16), (1, 32), (2, 32), (2, 64), (3, 96), (4, 128)),
    ((2, 24), (2, 48), (3, 64), (4, 96), (6, 128), (8, 256)),
    ((12, 768), (16, 1024), (20, 1280), (24, 1536), (28, 1792), (32, 2048)),
    ((64, 8), (128, 8), (256, 16), (512, 16), (600, 24), (700, 24)),  # deep and thin
    ((1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 4096)),  # one layer, ever wider
    ((9000, 1), (9500, 1), (9900, 2), (9990, 2), (9999, 3), (10000, 3)),  # at the limit of depth
)
HEADS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 8), (32, 8))
PATTERNS = (
    {"pattern_block": 16, "pattern_local": 4, "pattern_dense_layers": "every 2"},
    {"pattern_block": 64, "pattern_local": 1, "pattern_stride": 16},
    {"pattern_block": 8, "pattern_local": 2, "pattern_sinks": 1},
    {
        "pattern_block": 32,
        "pattern_local": 2,
        "pattern_stride": 8,
        "pattern_dense_layers": "last 1",
    },
)


def layers_by_hand(n: float, heads: tuple[int, int]) -> float:
    """The layers of a model of N parameters where d = 64 L and heads are 64 wide."""
    roots = np.roots([8 * 64**2, 2 * 64 * 64 * sum(heads), 0, -n])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def failing(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Have this share of the refits not converge."""
    refit = fitting.refit

    def some(model: Model, y: np.ndarray, *rest: Any) -> tuple[np.ndarray, ...]:
        rows, cost, _ = refit(model, y, *rest)
        return rows, cost, np.arange(len(y)) >= share * len(y)

    monkeypatch.setattr(fitting, "refit", some)


def small_study(seed: int) -> tuple[str, Question, dict, dict]:
    """A CSV file of 2 to 6 sizes of 1 to 8 configurations, a question, options and how to serve."""
    rng = np.random.default_rng(seed)
    ladder = LADDERS[rng.integers(len(LADDERS))][: rng.choice([2, 3, 4, 4, 5, 5, 6])]
    configurations = []
    for i in rng.choice(len(HEADS), rng.choice([1, 2, 3, 3, 4, 4, 6, 8]), replace=False):
        configurations.append((HEADS[i], {}))
        if rng.random() < 0.3:
            configurations[-1] = HEADS[i], PATTERNS[rng.integers(len(PATTERNS))]
    head_dim = int(rng.choice([8, 16, 64, 128]))
    lengths = [int(rng.choice([64, 512, 8192]))]
    lengths += [4 * lengths[0]] if rng.random() < 0.15 else []
    budgets = [10, 20, 40] if rng.random() < 0.15 else [20]
    floor, b = rng.choice([0.0, 0.05, 0.5, 1.7, 3.0, 4.5]), rng.uniform(0.02, 0.9)
    height, noise = rng.choice([1e-4, 0.02, 0.5, 2.0]), rng.choice([0.0, 0.001, 0.01, 0.05])
    kind = rng.choice(["law", "law", "law", "law", "constant", "rising", "random", "spoiled"])
    missing, known = rng.choice([0.0, 0.0, 0.0, 0.1, 0.4]), rng.random() < 0.8
    known = known or any(pattern for _, pattern in configurations)
    rows = []
    for layers, width in ladder:
        for (h, kv), pattern in configurations:
            for length in lengths:
                for budget in budgets:
                    n = n_formula(layers, width, h, kv, head_dim)
                    excess = height * (n / 1e5) ** -b * (1 - 0.02 * np.log2(h))
                    loss = {
                        "constant": 3.0,
                        "rising": 5.0 - excess,
                        "random": rng.uniform(0.02, 20.0),
                    }.get(str(kind), floor + excess + 0.1 * budget**-0.5)
                    loss *= 1 + noise * rng.standard_normal()
                    if kind == "spoiled" and rng.random() < 0.1:
                        loss *= 3
                    row = {"n_heads": h, "n_kv_heads": kv, "head_dim": head_dim, "loss": loss}
                    row |= {"context_length": length, "n_params": n, "tokens": budget * n}
                    if known:
                        row |= {"n_layers": layers, "d_model": width} | pattern
                    rows += [row] if rng.random() >= missing else []
    columns = dict.fromkeys(k for row in rows for k in row) or {"n_heads": None}
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    targets = [floor + 1e-9, floor * 1.0001, floor + 0.1 * height, floor + height, 0.5, 4.6, 90.0]
    targets = [float(t) for t in rng.choice(targets, 2) if t >= 0.01]
    contexts = rng.choice([1, 512, 4096, 131072, 10**6, 10**12], 2)
    question = Question(
        contexts=tuple(map(int, contexts)),
        losses=tuple(targets) if targets and rng.random() < 0.8 else None,
        convention=str(rng.choice(["per_token", "per_sequence"])),
        memory_power=float(rng.choice([0.01, 0.5, 4.0], p=[0.1, 0.8, 0.1])),
    )
    wide = len(lengths) + len(budgets) > 2 and rng.random() < 0.9  # has a law of its own
    options = {
        "law": "separate" if wide else str(rng.choice(LAWS, p=[0.6, 0.2, 0.2])),
    }
    serving = {
        "objective": str(rng.choice(list(OBJECTIVES))),
        "serving": Serving(
            batch=int(rng.choice([1, 10**6])),
            hardware=hardware(str(rng.choice(["v5e", "h100"]))),
            limit_bytes=float(rng.choice([np.inf, np.inf, 1e3, 1e9])),
            kv_multiple=int(rng.choice([1, 1, 2])),
        ),
    }
    return text.getvalue(), question, options, serving


def refits_beside_scipys(
    model: Model, p: Points, w: np.ndarray, rng: np.random.Generator, **options: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The parameters of four refits, each beside those of `least_squares` with these options.

    On the way the Jacobian is compared with differences, and the costs with each other.
    """
    best = solve_point(model, p.loss, w).parameters
    at = best + 0.01 * rng.standard_normal(len(best))
    numeric = approx_fprime(at, lambda q: model.predict(q[None])[0])
    assert np.allclose(model.jacobian(at[None])[0], numeric, atol=2e-6)
    y = model.predict(best[None]) + 0.003 * rng.standard_normal((4, len(w)))
    rows, costs, done = refit(model, y, np.tile(w, (4, 1)), np.tile(best, (4, 1)))
    assert done.all()
    for row, cost, loss in zip(rows, costs, y, strict=True):
        other = least_squares(
            lambda q, loss=loss: np.sqrt(w) * (model.predict(q[None])[0] - loss), best, **options
        )
        assert 2 * other.cost == pytest.approx(cost, rel=1e-7)
        yield row, other.x


def read(text: str) -> Results:
    return from_text(text, "study.csv")


def answered(
    text: str, question: Question, options: dict, serving: dict, refits: int, page: Path | None
) -> Frontier:
    """The answer as the verbs give it, every table of it rendered; UserError where there is none."""
    results = read(text)
    found = estimate(results, refits=refits, **options)
    answer = frontier(found.fit, results, question, **serving)
    whole = Study(results, found, answer)
    console = Console(width=100, file=io.StringIO())
    console.print(estimates.fit_table(found.fit), estimates.residual_table(found.fit))
    console.print(answers.frontier_answer(answer), training(answer))
    for each in answer.answers:
        console.print(answers.ranking_table(each, answer))
    if whole.sparsity:
        console.print(sparsity_table(whole.sparsity, answer.objective))
    console.print(*estimates.wide_law_tables(found))
    data = [found.fit.to_dict(), found.to_dict(), answer.to_dict()]
    json.dumps([*data, *_aligned(found, results, question, serving, console)], allow_nan=False)
    if page is not None:
        write_report(page, whole)
    return answer


def _aligned(
    found: Estimates, results: Results, question: Question, serving: dict, console: Console
) -> Iterator[dict]:
    if found.tokens is None:
        return
    try:
        whole = equal_training(found.tokens, results, question, **serving)
    except UserError:  # a loss that the baseline never reaches; the other answers stand
        return
    console.print(aligned_answer(whole))
    yield whole.to_dict()
