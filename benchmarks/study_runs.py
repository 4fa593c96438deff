"""How good `suggest` and the law of sparsity are, on synthetic data with a known truth.

    python benchmarks/study_runs.py suggest|sparsity [--sets 1000]

Every number printed is reproducible: data set i uses seed (--seed, i).
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np
from scipy.optimize import least_squares

from gqa_scaling.config import ModelConfig, Question, RunConfig
from gqa_scaling.context_sharding import ContextSharding, density
from gqa_scaling.costs import n_formula, training_flops
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.experiment.ladder import FIGURE_2_LADDER
from gqa_scaling.study.fit import fit
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.ranking import rank
from gqa_scaling.study.reading import published
from gqa_scaling.study.results import Heads, Results
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.suggest import Belief, Decider, Runs
from gqa_scaling.study.suggest import suggest as suggested

SEED = 2027
PUBLISHED = published()


def _decisions(f: Fit, r: Results, q: Question) -> list[tuple[Heads, tuple[Heads, ...]]]:
    """The best configuration and the tied ones of every answer, as `frontier` finds them."""
    family, out = family_of(r), []
    for loss in q.losses:
        n = np.vstack([f.curves.n_star(loss), f.draws.n_star(loss)])
        for context in q.contexts:
            ranking = rank(Deployment(family, q, context), f.heads, n)
            rows = [ranking.of(k, ranking.costs[0]) for k in range(len(f.heads))]
            rows.sort(key=lambda row: row.order)
            out.append((rows[0].heads, ranking.tied))
    return out


SPARSE_AT = 4096  # tokens of training
PATTERNS = (
    None,
    ContextSharding(64, 4, 8),
    ContextSharding(64, 4, 8, dense_layers="every 2"),
    ContextSharding(64, 4),
    ContextSharding(64, 16, 4),
    ContextSharding(64, 16, 16),
    ContextSharding(64, 4, 16, dense_kv_heads=1),
    ContextSharding(64, 8, 8, dense_layers="first 1, last 1"),
)


def sparsity(sets: int, seed: int) -> None:
    """Patterns left out, predicted by several forms of what sparsity costs, under several truths.

    Seven patterns and dense, (8,8) and (8,2), five sizes, 0.1% noise; each pattern in turn is left
    out with both. rho is the mean density over layers and heads, rho_h that of one head. Then, for
    the form that the joint laws have, how often r's interval holds it.
    """
    shapes = [(h, p, L) for h in ((8, 8), (8, 2)) for p in PATTERNS for L in (4, 6, 8, 12, 16)]
    whose = np.array([PATTERNS.index(p) for _, p, _ in shapes])
    x = np.log([n_formula(L, 64 * L, 0, 0) / 3e7 for _, _, L in shapes])
    q = np.log2([h[1] for h, _, _ in shapes])
    mean, each = (
        np.zeros(len(shapes)),
        np.zeros(len(shapes)),
    )  # halvings of rho; of rho_h on average
    for i, ((_, kv), p, L) in enumerate(shapes):
        layers = p.layers(L, kv) if p else [(None,)]
        heads = [density([(head,)], SPARSE_AT) for layer in layers for head in layer]
        mean[i], each[i] = -np.log2(np.mean(heads)), -np.mean(np.log2(heads))
    dense = np.exp(-0.1 - 0.2 * x - 0.015 * q)
    truths = {
        "excess * rho^-r": dense * np.exp(0.025 * mean),
        "excess * mean of rho_h^-r": dense * np.exp(0.025 * each),
        "excess + c log 1/rho": dense + 0.025 * mean,
        "excess * (1 + c (1/rho - 1)^1/2)": dense * (1 + 0.03 * np.sqrt(2**mean - 1)),
        "excess * (1 + c log(1/rho)^3/2)": dense * (1 + 0.015 * mean**1.5),
    }
    forms = {  # of the logarithm of the excess, and what is added to it
        "none": lambda t: (0.0, 0.0),
        "rho^-r": lambda t: (t[4] * mean, 0.0),
        "rho_h^-r": lambda t: (t[4] * each, 0.0),
        "+ c log 1/rho": lambda t: (0.0, t[4] * mean),
        "exp(r log^g)": lambda t: (t[4] * mean ** np.clip(t[5], 0.2, 4), 0.0),
        "exp(r/rho)": lambda t: (t[4] * (2**mean - 1), 0.0),
    }
    print(f"patterns left out, root mean square error in millinats{'':12}" + _row(forms, "{:>14}"))
    for name, excess in truths.items():
        errors = {form: [] for form in forms}
        for i in range(max(2, sets // 250)):
            rng = np.random.default_rng((seed, i))
            y = (1.9 + excess) * (1 + 0.001 * rng.standard_normal(len(x)))
            for form, out in itertools.product(forms, range(1, len(PATTERNS))):

                def loss(t: np.ndarray, form: str = form) -> np.ndarray:
                    rise, more = forms[form](t)
                    return t[0] + np.exp(t[1] - t[2] * x - t[3] * q + rise) + more

                keep = whose != out
                start = [1.8, 0.0, 0.2, 0.01, 0.02, 1.0]
                found = least_squares(lambda t: (loss(t) - y)[keep], start)  # noqa: B023
                errors[form] += ((loss(found.x) - 1.9 - excess)[~keep] ** 2).tolist()
        rms = [1e3 * np.sqrt(np.mean(e)) for e in errors.values()]
        print(f"{name:<67}" + _row(rms, "{:>14.1f}"))
    n = [float(n_formula(L, 64 * L, *h)) for h, _, L in shapes]
    columns = {
        "n_heads": [h for (h, _), _, _ in shapes],
        "n_kv_heads": [k for (_, k), _, _ in shapes],
    }
    columns |= {"n_layers": [L for *_, L in shapes], "d_model": [64 * L for *_, L in shapes]}
    columns = {k: np.array(v) for k, v in columns.items()} | {"n_params": np.array(n)}
    columns |= {"tokens": 20 * np.array(n), "context_length": np.full(len(n), SPARSE_AT)}
    columns |= {"pattern": np.array([p for _, p, _ in shapes], object)}
    columns |= {"name": np.array([f"r{i}" for i in range(len(n))], object)}
    blank = dataclasses.replace(PUBLISHED.select(np.zeros(len(n), int)), **columns)
    for own, shared in ((0.001, 0.0), (0.002, 0.001)):
        held, widths = [], []
        for i in range(max(20, sets // 5)):
            rng = np.random.default_rng((seed, i))
            error = own * rng.standard_normal(len(x)) + np.tile(shared * rng.standard_normal(5), 16)
            r = dataclasses.replace(blank, loss=(1.9 + truths["excess * rho^-r"]) * (1 + error))
            low, high = fit(r, law="product", refits=400, seed=i).constants["r"][1]
            held.append(low <= 0.025 <= high)
            widths.append(high - low)
        print(
            f"r = 0.025, noise {own:.1%} of a run and {shared:.1%} of a size: 90% interval holds it "
            f"in {np.mean(held):.0%} of {len(held)}, median width {np.median(widths):.4f}"
        )


def _row(values: Iterable[object], form: str) -> str:
    return "".join(form.format(value) for value in values)


HEADS = head_candidates(32)


def _grid_study(seed: int, i: int) -> tuple[Results, Results]:
    """21 configurations x 6 sizes of separate curves, observed with noise, and without.

    0.2% independent noise and 0.1% shared within a size; the curves are no joint law.
    """
    rng, sizes = np.random.default_rng((seed, i, len(HEADS))), np.array(FIGURE_2_LADDER)
    floor, shared = rng.uniform(1.9, 2.2), 0.001 * rng.standard_normal(len(sizes))
    layers, width = (np.tile(sizes[:, j], len(HEADS)) for j in (0, 1))
    h, kv = (np.repeat([pair[j] for pair in HEADS], len(sizes)) for j in (0, 1))
    n = n_formula(layers, width, h, kv).astype(float)
    log_h, log_kv = (np.log2([pair[j] for pair in HEADS]) for j in (0, 1))
    b = 0.2 + 0.003 * log_h + 0.004 * rng.standard_normal(len(HEADS))
    u = np.log(0.78) - 0.045 * log_h - 0.015 * log_kv + 0.001 * log_h**2
    u = u + 0.01 * rng.standard_normal(len(HEADS))
    true = floor + np.exp(np.repeat(u, 6) - np.repeat(b, 6) * (np.log(n) - np.log(4e8)))
    error = np.tile(shared, len(HEADS)) + 0.002 * rng.standard_normal(len(n))
    blank = PUBLISHED.select(np.zeros(len(n), int))
    name = np.array([f"L{a}-h{b}-kv{c}" for a, b, c in zip(layers, h, kv, strict=True)], object)
    smooth = dataclasses.replace(
        blank,
        **{"n_heads": h, "n_kv_heads": kv, "n_layers": layers, "d_model": width, "n_params": n},
        **{"tokens": 20 * n, "loss": true, "name": name, "source": "simulation"},
    )
    return dataclasses.replace(smooth, loss=true * (1 + error)), smooth


def _grid(r: Results) -> list[RunConfig]:
    """The runs of a study as an experiment declares them."""
    columns = (r.name.tolist(), *(getattr(r, k).tolist() for k in ("n_layers", "d_model")), r.heads)
    return [
        RunConfig(
            name=name,
            model=ModelConfig(layers, width, *heads),
            context_length=8192,
            batch_tokens=2**19,
            tokens_per_param=20.0,
        )
        for name, layers, width, heads in zip(*columns, strict=True)
    ]


def suggest(sets: int, seed: int) -> None:
    """Regret after k runs, or a share of the grid's FLOPs, in the order that `suggest` gives.

    It is asked as `gqa-scaling suggest` asks it: for eight runs, per FLOP, and again with their
    losses. Against it stand a random order and the grid's own, the largest size first, from the
    same nine runs. What is recommended is the belief's best; after the full grid, `frontier`'s.
    """
    studies, counts, shares, tally = max(30, sets // 5), (18, 30, 42), (0.12, 0.20), {}
    for i in range(studies):
        seen, smooth = _grid_study(seed, i)
        truth = fit(smooth, refits=100)
        ends = [truth.curves.loss(k, np.array(truth.points.range_n(k))) for k in range(len(HEADS))]
        high, low = min(e.max() for e in ends), max(e.min() for e in ends)
        losses = tuple(float(high + (low - high) * f) for f in (0.3, 0.6, 0.9))
        q = Question(contexts=(8192, 131072), losses=losses)
        answers = frontier(truth, smooth, q).answers
        excess = np.array([[a.choice(h).excess for h in HEADS] for a in answers])

        def regret_of(picked: list[Heads], excess: np.ndarray = excess) -> float:
            return excess[range(len(picked)), [HEADS.index(h) for h in picked]].mean()

        whole = _decisions(fit(seen, refits=100), seen, q)
        tally.setdefault("full grid", []).append(regret_of([best for best, _ in whole]))
        grid = _grid(seen)
        flops = np.array([float(training_flops(run)) for run in grid])
        index = {run.name: j for j, run in enumerate(grid)}
        runs = Runs.of(list(zip(seen.heads, seen.n_layers, seen.d_model, strict=True)), HEADS)
        decider = Decider(seen, HEADS, q)
        corner = [h in ((1, 1), (8, 2), (32, 32)) for h in seen.heads]
        start = np.flatnonzero(np.isin(seen.n_layers, (12, 20, 32)) & corner).tolist()
        rest = [j for j in range(len(grid)) if j not in start]
        asked = list(start)
        while len(asked) < counts[-1] or flops[asked].sum() < shares[-1] * flops.sum():
            found = suggested(seen.select(np.array(asked)), grid, q, seed=i)
            asked += [index[each.name] for each in found]
        orders = {
            "suggest": asked,
            "random": start + np.random.default_rng((seed, i)).permutation(rest).tolist(),
            "in order": start + sorted(rest, key=lambda j, size=seen.n_layers: -size[j]),
        }
        for policy, order in orders.items():
            cuts = {f"{count} of {len(grid)} runs": order[:count] for count in counts}
            for share in shares:
                left, taken = share * flops.sum() - flops[start].sum(), list(start)
                for j in order[len(start) :]:  # whatever still fits is run
                    if flops[j] <= left:
                        left, taken = left - flops[j], [*taken, j]
                cuts[f"{share:.0%} of the FLOPs"] = taken
            for cut, taken in cuts.items():
                at = Runs(runs.curve[taken], runs.log_backbone[taken])
                belief = Belief(HEADS, at, seen.loss[taken])
                costs = decider.costs(belief, belief.mode)
                regret = regret_of([HEADS[int(c[0].argmin())] for c in costs])
                spent = len(taken), flops[taken].sum() / flops.sum()
                tally.setdefault((policy, cut), []).append((regret, *spent))
    full = 100 * np.array(tally.pop("full grid"))

    def told(values: np.ndarray) -> str:
        return f"{values.mean():.3f}% of Z +- {values.std() / np.sqrt(studies):.3f}"

    print(f"full grid, 126 runs: mean regret {told(full)} ({studies} studies of seed {seed} x 6)")
    for (policy, cut), rows in tally.items():
        regret, count, spent = np.array(rows).T
        print(
            f"{policy}, {cut}: mean regret {told(100 * regret)}, more than the full grid by "
            f"{told(100 * regret - full)}; on average {count.mean():.0f} runs, {spent.mean():.0%} "
            "of the FLOPs"
        )


if __name__ == "__main__":
    every = {f.__name__: f for f in (suggest, sparsity)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", metavar="|".join(every))
    parser.add_argument("--sets", type=int, default=200, help="synthetic data sets (default: 200)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of them (default: {SEED})")
    given = parser.parse_args()
    for name in given.which or every:
        if name not in every:
            parser.error(f"{name!r} is not one of {', '.join(every)}")
        every[name](given.sets, given.seed)
