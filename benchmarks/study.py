"""How good the study's estimates and decisions are, on synthetic data with a known truth.

    python benchmarks/study.py recovery|coverage|choice|robust|laws|speed|suggest [--sets 1000]

Truths are the curves fitted to the 40 published points of Chen et al. 2025 unless said otherwise;
every number printed is reproducible: data set i uses seed (17, i).
"""

import argparse
import dataclasses
import time

import numpy as np

from gqa_scaling.config import Question
from gqa_scaling.costs import n_formula
from gqa_scaling.grid import head_candidates
from gqa_scaling.ladder import FIGURE_2_LADDER
from gqa_scaling.study.compare import compare
from gqa_scaling.study.fit import BOOTSTRAPS, fit, interval
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.models import Separate, solve_point
from gqa_scaling.study.results import Results, published
from gqa_scaling.study.suggest import Belief, Decider, Runs

PUBLISHED = published()
TRUTH = fit(PUBLISHED, refits=100)


def _smooth() -> Results:
    """The published design with the losses of the truth."""
    at = {name: i for i, name in enumerate(TRUTH.points.name)}
    return dataclasses.replace(PUBLISHED, loss=TRUTH.predicted[[at[n] for n in PUBLISHED.name]])


def noisy(i: int, own: float, shared: float = 0.0) -> Results:
    """Data set i: independent and within-a-size shared relative errors."""
    rng, smooth = np.random.default_rng((17, i)), _smooth()
    sizes, index = np.unique(smooth.n_layers, return_inverse=True)
    error = shared * rng.standard_normal(len(sizes))[index]
    error = error + own * rng.standard_normal(len(smooth))
    return dataclasses.replace(smooth, loss=smooth.loss * (1 + error))


def recovery(sets: int) -> None:
    """Noise-free truths: worst errors of E and b, point-fit time."""
    rng, worst, failures, times = np.random.default_rng(0), np.zeros(2), 0, []
    for _ in range(min(sets, 400)):
        k, sizes = int(rng.integers(2, 22)), int(rng.integers(4, 9))
        floor, b = rng.uniform(0.5, 2.5), rng.uniform(0.08, 0.4, k)
        curve = np.repeat(np.arange(k), sizes)
        x = np.concatenate([np.linspace(-2.7, 2.7, sizes) + rng.normal(0, 0.05, sizes) for _ in b])
        y = floor + rng.uniform(0.3, 1.5, k)[curve] * np.exp(-b[curve] * x)
        model = Separate(curve, x, np.zeros(k))
        begin = time.perf_counter()
        found = solve_point(model, y, np.ones(len(y)), np.zeros(len(model.names)))
        times.append(time.perf_counter() - begin)
        p = found.parameters
        error = np.array([abs(p[0] - floor), np.abs(p[-k:] - b).max()])
        worst, failures = np.maximum(worst, error), failures + (not found.converged)
    print(
        f"recovery, {len(times)} truths: worst |dE| {worst[0]:.1e}, worst |db| {worst[1]:.1e}, "
        f"{failures} failures, median {1e3 * np.median(times):.1f} ms"
    )


def coverage(sets: int) -> None:
    """How often 90% intervals hold the truth, pooled over configurations."""
    n_true = {loss: TRUTH.curves.n_star(loss) for loss in (3.0, 2.8)}
    for kind in BOOTSTRAPS[:2]:
        for own, shared in ((0.001, 0), (0.002, 0), (0.005, 0), (0.001, 0.001), (0.002, 0.001)):
            hit = [[], [], []]
            for i in range(sets):
                f = fit(noisy(i, own, shared), bootstrap=kind, refits=400, seed=i)
                low, high = f.floor_interval
                hit[0].append(low <= TRUTH.floor <= high)
                low, high = interval(f.draws.b)
                hit[1].append((low <= TRUTH.curves.b) & (TRUTH.curves.b <= high))
                for loss, n in n_true.items():
                    low, high = interval(f.draws.n_star(loss))
                    hit[2].append((low <= n) & (n <= high))
            e, b, n = (100 * np.mean(h) for h in hit)
            print(
                f"coverage, {kind} bootstrap, {own:.1%} independent + {shared:.1%} shared noise, "
                f"{sets} sets: E {e:.1f}%, b {b:.1f}%, log N* {n:.1f}%",
                flush=True,
            )


def choice(sets: int) -> None:
    """How often the tied set holds the true best, how large it is, and the regret of the choice."""
    q = Question(contexts=(8192, 131072), losses=(3.0, 2.9, 2.8, 2.7), convention="per_sequence")
    truth = frontier(dataclasses.replace(TRUTH, draws=_one_draw()), _smooth(), q)
    for own, shared in ((0.001, 0), (0.002, 0), (0.005, 0), (0.002, 0.001)):
        held, regret, size = [], [], []
        for i in range(sets):
            r = noisy(i, own, shared)
            for answer in frontier(fit(r, refits=400, seed=i), r, q).answers:
                true = truth.at(answer.loss, answer.context)
                held.append(true.best.heads in answer.tied)
                regret.append(true.choice(answer.best.heads).excess)
                size.append(len(answer.tied))
        worst = min(100 * np.mean(held[j :: len(truth.answers)]) for j in range(len(truth.answers)))
        print(
            f"choice, {own:.1%} independent + {shared:.1%} shared noise, {sets} sets x "
            f"{len(truth.answers)} answers: truth in the tied set {100 * np.mean(held):.1f}% "
            f"(hardest answer {worst:.1f}%), mean size {np.mean(size):.2f}, mean regret "
            f"{100 * np.mean(regret):.3f}% of Z",
            flush=True,
        )


def _one_draw() -> object:
    c = TRUTH.curves
    return dataclasses.replace(c, floor=c.floor[None], u=c.u[None], b=c.b[None])


def robust(sets: int) -> None:
    """Widening of E's interval when one run is spoiled by +2%, each run in turn."""
    for flag in (False, True):
        good = np.ptp(fit(PUBLISHED, robust=flag, refits=1000).floor_interval)
        ratios = []
        for i in range(len(PUBLISHED)):
            loss = PUBLISHED.loss.copy()
            loss[i] *= 1.02
            spoiled = fit(dataclasses.replace(PUBLISHED, loss=loss), robust=flag, refits=1000)
            ratios.append(np.ptp(spoiled.floor_interval) / good)
        print(
            f"one run spoiled by +2%, {'robust' if flag else 'plain'}: E's interval "
            f"x{np.median(ratios):.2f} (median), x{max(ratios):.2f} (worst of 40)"
        )


def laws(sets: int) -> None:
    """Errors of every law on runs it was not shown, published points."""
    for s in compare(PUBLISHED):
        unseen = "-" if s.unseen_heads is None else f"{s.unseen_heads:.4f} nats"
        print(
            f"law {s.law}, {s.parameters} parameters: configurations left out {unseen}, largest "
            f"size left out {s.largest_size:.3%}"
        )


def speed(sets: int) -> None:
    """Seconds for a fit with 1,000 refits."""
    rng, pick = np.random.default_rng(0), PUBLISHED.select(np.arange(len(PUBLISHED)) < 6)
    heads = head_candidates(32)
    rows = {
        k: np.tile(getattr(pick, k), len(heads))
        for k in ("n_layers", "d_model", "head_dim", "seed")
    }
    h, kv = (np.repeat([pair[i] for pair in heads], len(pick)) for i in (0, 1))
    n = n_formula(rows["n_layers"], rows["d_model"], h, kv).astype(float)
    many = PUBLISHED.select(np.zeros(len(n), int))
    loss = 2.0 + (8e7 / (1 + 0.1 * np.log2(h)) / n) ** 0.2 * (
        1 + 0.005 * rng.standard_normal(len(n))
    )
    names = np.array([f"r{i}" for i in range(len(n))], object)
    rows |= {"n_heads": h, "n_kv_heads": kv, "n_params": n, "loss": loss, "name": names}
    many = dataclasses.replace(many, **rows, tokens=20 * n)
    for name, r in (("7 configurations", PUBLISHED), ("21 configurations", many)):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            fit(r, refits=1000)
            times.append(time.perf_counter() - begin)
        print(f"fit and 1,000 refits, {name}, {len(r)} runs: {np.median(times):.2f} s")


HEADS = head_candidates(32)


def _grid_study(i: int) -> tuple[Results, Results]:
    """21 configurations x 6 sizes of separate curves, observed with noise, and without.

    0.2% independent noise and 0.1% shared within a size; the curves are no joint law.
    """
    rng, sizes = np.random.default_rng((23, i)), np.array(FIGURE_2_LADDER)
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


def suggest(sets: int) -> None:
    """Regret of the recommendation after k runs chosen by `suggest`, at random, and after all."""
    counts, tally = (18, 30, 42), {}
    for i in range(sets):
        seen, smooth = _grid_study(i)
        truth = fit(smooth, refits=100)
        ends = [truth.curves.loss(k, np.array(truth.points.range_n(k))) for k in range(len(HEADS))]
        high, low = min(e.max() for e in ends), max(e.min() for e in ends)
        losses = tuple(float(high + (low - high) * f) for f in (0.3, 0.6, 0.9))
        q = Question(contexts=(8192, 131072), losses=losses)
        answers = frontier(truth, smooth, q).answers
        excess = np.array([[a.choice(h).excess for h in HEADS] for a in answers])
        whole = frontier(fit(seen, refits=100), seen, q).answers
        picked = [HEADS.index(a.best.heads) for a in whole]
        tally.setdefault(("full grid", len(seen)), []).append(
            excess[range(len(picked)), picked].mean()
        )
        runs = Runs(
            np.array([HEADS.index(h) for h in seen.heads]),
            np.log(n_formula(seen.n_layers, seen.d_model, 0, 0).astype(float)),
            np.ones(len(seen)),
        )
        decider = Decider(seen, HEADS, q)
        corner = [h in ((1, 1), (8, 2), (32, 32)) for h in seen.heads]
        start = np.flatnonzero(np.isin(seen.n_layers, (12, 20, 32)) & corner).tolist()
        for policy in ("suggest", "random", "in order"):
            rng, chosen = np.random.default_rng(i), list(start)
            order = [j for j in rng.permutation(len(seen)) if j not in start]
            if policy == "in order":
                order = sorted(order, reverse=True)
            while True:
                at = Runs(runs.curve[chosen], runs.log_backbone[chosen], runs.flops[chosen])
                if policy == "suggest" or len(chosen) in counts:
                    belief = Belief(HEADS, at, seen.loss[chosen], np.ones(len(chosen)))
                if len(chosen) in counts:
                    best = [int(c[0].argmin()) for c in decider.costs(belief, belief.mode)]
                    regret = excess[range(len(best)), best].mean()
                    tally.setdefault((policy, len(chosen)), []).append(regret)
                if len(chosen) == counts[-1]:
                    break
                if policy == "suggest":
                    theta = belief.draw(rng, 300)
                    gains = decider.gains(belief, theta, runs, decider.costs(belief, theta))
                    gains[chosen] = -1
                    chosen.append(int(gains.argmax()))
                else:
                    chosen.append(order.pop())
    for (policy, count), regrets in tally.items():
        mean, error = 100 * np.mean(regrets), 100 * np.std(regrets) / np.sqrt(len(regrets))
        print(
            f"{policy}, {count} of 126 runs: mean regret {mean:.3f}% of Z +- {error:.3f} "
            f"({len(regrets)} studies x 6 answers)"
        )


if __name__ == "__main__":
    every = {f.__name__: f for f in (recovery, speed, laws, robust, choice, coverage, suggest)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", metavar="|".join(every))
    parser.add_argument("--sets", type=int, default=1000, help="synthetic data sets")
    given = parser.parse_args()
    for name in given.which or every:
        if name not in every:
            parser.error(f"{name!r} is not one of {', '.join(every)}")
        every[name](given.sets)
