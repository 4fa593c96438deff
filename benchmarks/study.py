"""How good the study's estimates and decisions are, on synthetic data with a known truth.

    python benchmarks/study.py coverage|laws|bound [--sets 1000]

Truths are the curves fitted to the 40 published points of Chen et al. 2025 unless said otherwise;
every number printed is reproducible: data set i uses seed (--seed, i). Nothing was tuned on the
data sets of the default seed; those of seed 17 were looked at while the methods were made.
"""

import argparse
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable
from unittest import mock

import numpy as np
from scipy.optimize import least_squares
from scipy.special import stdtrit

from gqa_scaling.config import Question
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.study.candidates import candidates
from gqa_scaling.study.choices import Law
from gqa_scaling.study.compare import preferred_law
from gqa_scaling.study.context import context_law
from gqa_scaling.study.fit import fit, make_model
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.models import LAWS
from gqa_scaling.study.points import points
from gqa_scaling.study.reading import published
from gqa_scaling.study.results import Results
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.solver import Solution, solve_point
from gqa_scaling.study.uncertainty import interval

SEED = 2027
PUBLISHED = published()
TRUTHS: dict[Law, Fit] = {
    law: fit(PUBLISHED, law=law, refits=100) for law in ("separate", "product")
}
TRUTH = TRUTHS["separate"]
_AT = {name: i for i, name in enumerate(TRUTH.points.name)}
SMOOTH = dataclasses.replace(PUBLISHED, loss=TRUTH.predicted[[_AT[n] for n in PUBLISHED.name]])


@dataclasses.dataclass(frozen=True)
class World:
    """A truth to fit data of: the loss of configuration k at N (arrays), and noise of its runs.

    `own` and `shared` are standard deviations in nats, of a run and of all runs of a size; `t` draws
    a run's errors from Student's t with three degrees of freedom. `floors` is the deviation of E
    between configurations, `further` the c of a further term c ln N, `spoiled` nats added to one run.
    `seeds` runs of each size and configuration share errors of deviation `cell`, as of a setting that
    suits one of them less. `law` is the one whose curves, fitted to the published points, are the truth.
    """

    own: float = 0.0028
    shared: float = 0.0
    t: bool = False
    floors: float = 0.0
    further: float = 0.0
    spoiled: float = 0.0
    seeds: int = 1
    cell: float = 0.0
    law: Law = "separate"

    def data(self, seed: int, i: int) -> tuple[Results, Callable[[int, np.ndarray], np.ndarray]]:
        """Data set i, and its truth."""
        rng, c = np.random.default_rng((seed, i)), TRUTHS[self.law].curves
        runs = SMOOTH.select(np.repeat(np.arange(len(SMOOTH)), self.seeds))
        floors = self.floors * rng.standard_normal(len(TRUTH.heads))
        floors -= floors.mean()

        def truth(k: int, n: np.ndarray) -> np.ndarray:
            return c.loss(k, n) + floors[k] + self.further * np.log(np.asarray(n) / 3e8)

        whose = np.array([TRUTH.index(h) for h in runs.heads])
        loss = np.array([float(truth(*at)) for at in zip(whose, runs.n_params, strict=True)])
        draw = (
            rng.standard_t(3, len(loss)) / np.sqrt(3) if self.t else rng.standard_normal(len(loss))
        )
        sizes, index = np.unique(runs.n_layers, return_inverse=True)
        error = self.own * draw + self.shared * rng.standard_normal(len(sizes))[index]
        error[rng.integers(len(loss))] += self.spoiled
        if self.cell:
            error += self.cell * np.repeat(rng.standard_normal(len(SMOOTH)), self.seeds)
        numbered = np.tile(np.arange(self.seeds), len(SMOOTH))
        return dataclasses.replace(runs, loss=loss + error, seed=numbered), truth


WORLDS = {
    "independent errors, 2.8 mn": World(),
    "the same, product truth": World(law="product"),
    "and 1 mn shared by a size": World(shared=0.001),
    "and 2 mn shared by a size": World(shared=0.002),
    "and 4 mn shared by a size": World(shared=0.004),
    "t with 3 degrees of freedom": World(t=True),
    "E differs by head, 10 mn": World(floors=0.010),
    "one run spoiled by 50 mn": World(spoiled=0.05),
    "4 seeds": World(seeds=4),
    "4 seeds, 2.8 mn common to them": World(seeds=4, cell=0.0028),
    "a further -0.1 ln N": World(further=-0.1),
    "the same, a tenth of the noise": World(further=-0.1, own=0.00028),
}


def plain_fit(r: Results, far: np.ndarray, losses: np.ndarray) -> tuple[dict, np.ndarray]:
    """The plain alternative: scipy's least squares with one E, intervals by the delta method.

    Returns 90% intervals (low, high) of E, b, ln N* at `losses` and the loss at `far`, each of all
    configurations, and ln N* itself.
    """
    curve = np.array([TRUTH.index(h) for h in r.heads])
    x, k = np.log(r.n_params) - TRUTH.curves.centre[curve], len(TRUTH.heads)

    def parts(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return q[1 : k + 1], q[k + 1 :]

    def residuals(q: np.ndarray) -> np.ndarray:
        u, b = parts(q)
        return q[0] + np.exp(u[curve] - b[curve] * x) - r.loss

    start = np.r_[0.8 * r.loss.min(), np.full(k, np.log(0.3 * r.loss.mean())), np.full(k, 0.2)]
    found = least_squares(residuals, start, bounds=(np.r_[0, np.full(2 * k, -9)], 9), x_scale="jac")

    def asked(q: np.ndarray) -> dict[str, np.ndarray]:
        u, b = parts(q)
        with np.errstate(invalid="ignore", divide="ignore"):
            n = TRUTH.curves.centre + (u - np.log(losses - q[0])) / b
        top = q[0] + np.exp(u - b * (np.log(far) - TRUTH.curves.centre))
        return {"E": q[:1], "b": b, "N*": n, "loss beyond": top}

    value, dof = asked(found.x), len(x) - len(found.x)
    spread = np.linalg.pinv(found.jac.T @ found.jac) * 2 * found.cost / dof
    steps = 1e-6 * np.eye(len(found.x))
    intervals = {}
    for name, at in value.items():
        slopes = np.array([(asked(found.x + h)[name] - at) / 1e-6 for h in steps])
        half = stdtrit(dof, 0.95) * np.sqrt(np.einsum("pi,pq,qi->i", slopes, spread, slopes))
        intervals[name] = at - half, at + half
    with np.errstate(invalid="ignore", divide="ignore"):
        u, b = parts(found.x)
        star = {
            loss: TRUTH.curves.centre + (u - np.log(np.maximum(loss - found.x[0], 0))) / b
            for loss in ASKED.losses
        }
    return intervals, star


def told_by(f: Fit, far: np.ndarray, losses: np.ndarray) -> tuple[dict, dict]:
    """What a study's curves say of the configurations of `TRUTH`, as `plain_fit` does.

    Curves in N_b have a b of another meaning, which is left out.
    """
    k = [f.index(h) for h in TRUTH.heads]
    with np.errstate(divide="ignore"):
        n_star = [np.log(f.draws.n_star(loss)[:, j]) for loss, j in zip(losses, k, strict=True)]
        star = {loss: np.log(f.curves.n_star(loss))[k] for loss in ASKED.losses}
    drawn = {
        "E": f.draws.floor[:, None],
        "N*": np.stack(n_star, 1),
        "loss beyond": np.stack([f.draws.loss(j, n) for j, n in zip(k, far, strict=True)], 1),
    }
    if f.curves.backbone is None:
        drawn["b"] = f.draws.b[:, k]
    return {key: interval(value) for key, value in drawn.items()}, star


ASKED = Question(contexts=(8192, 131072), losses=(3.0, 2.9, 2.8, 2.7), convention="per_sequence")


def coverage(sets: int, seed: int) -> None:
    """Coverage, choice and regret of `fit`, of the curves that `frontier` ranks by, and of the plain
    alternative, world by world.

    90% intervals of E, of every b, of ln N* at the loss of the largest size, and of the loss at
    twice that size. Right: how often the configuration chosen is the cheapest, over 4 losses by 2
    contexts; regret: how much more the chosen one costs, in Z. Told: how often the fit says that
    errors are shared, that a run is spoiled, that the curves bend, or that it could not see a bend.
    """
    grid = np.geomspace(1e6, 1e12, 4001)
    far = np.array([2 * TRUTH.points.range_n(k)[1] for k in range(len(TRUTH.heads))])
    family = family_of(SMOOTH)
    print(
        "coverage in %" + 26 * " " + "E    b   N*  loss at 2N  width of E  right  regret  seconds"
    )
    for name, world in WORLDS.items():
        hits: dict[str, list] = {"fit": [], "frontier": [], "plain": []}
        told: Counter = Counter()
        for i in range(sets):
            r, truth = world.data(seed, i)
            smooth = np.array([truth(k, grid) for k in range(len(far))])
            losses = np.array([float(truth(k, n / 2)) for k, n in enumerate(far)])
            actual = {
                "E": np.array([TRUTHS[world.law].floor if not world.further else np.nan]),
                "b": TRUTH.curves.b
                if not world.further and world.law == "separate"
                else np.full(len(far), np.nan),
                "N*": np.log(far / 2),
                "loss beyond": np.array([float(truth(k, n)) for k, n in enumerate(far)]),
            }
            begin = time.process_time()
            f = fit(r, refits=400, seed=i)
            ways = {"fit": told_by(f, far, losses)}
            spent = {"fit": time.process_time() - begin}
            begin = time.process_time()
            ways["frontier"] = told_by(candidates(r, refits=400, seed=i).fit, far, losses)
            spent["frontier"] = time.process_time() - begin
            begin = time.process_time()
            ways["plain"] = plain_fit(r, far, losses)
            spent["plain"] = time.process_time() - begin
            told["shared"] += (f.shared.p_value or 1) < 0.05
            told["spoiled"] += bool(f.strange)
            told[f.misfit.verdict] += 1
            for way, (intervals, stars) in ways.items():
                row = [
                    np.mean((intervals[key][0] <= value) & (value <= intervals[key][1]))
                    if key in intervals and np.isfinite(value).all()
                    else np.nan
                    for key, value in actual.items()
                ]
                right, regret = [], []
                for loss, context in itertools.product(ASKED.losses, ASKED.contexts):
                    at = Deployment(family, ASKED, context)
                    true = [np.interp(-loss, -each, grid) for each in smooth]
                    costs = np.array(
                        [float(at.costs(n, TRUTH.heads[j]).z) for j, n in enumerate(true)]
                    )
                    guess = [
                        float(at.costs(np.exp(n), TRUTH.heads[j]).z)
                        for j, n in enumerate(stars[loss])
                    ]
                    best = int(np.nanargmin(guess))
                    right.append(best == costs.argmin())
                    regret.append(costs[best] / costs.min() - 1)
                width = float(np.ptp(intervals["E"], axis=0)[0])
                hits[way].append((*row, width, np.mean(right), np.mean(regret), spent[way]))
        for way, rows in hits.items():
            e, b, n, loss = 100 * np.mean(rows, 0)[:4]
            width, (right, regret) = np.median(rows, 0)[4], 100 * np.mean(rows, 0)[5:7]
            print(
                f"{name if way == 'fit' else '':31}{way:8}  {e:3.0f}  {b:3.0f}  {n:3.0f}  {loss:10.0f}"
                f"  {width:10.3f}  {right:4.0f}%  {regret:5.2f}%  {np.median(rows, 0)[-1]:7.3f}"
            )
        print(
            " " * 41 + ", ".join(f"{what} {times / sets:.0%}" for what, times in told.items()),
            flush=True,
        )


def head_truths(rng: np.random.Generator) -> dict[str, Callable]:
    """Six kinds of truth over heads: loss of (n_h, n_kv, L, d), each with constants of its own."""
    floor, b, p = rng.uniform(1.7, 2.2), rng.uniform(0.15, 0.3), rng.uniform(0.02, 0.06)
    q, s, g = rng.uniform(0.005, 0.02), rng.uniform(0.1, 0.3), rng.uniform(0.3, 0.9)
    weak, half, c = rng.uniform(0.05, 0.25), rng.uniform(2, 8), rng.uniform(0.05, 0.5, 2)
    odd, bent = rng.standard_normal((2, 33, 33))

    def x(L: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.log(8 * L * d**2 / 4e8)

    def whole(h: np.ndarray, kv: np.ndarray, L: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.log(n_formula(L, d, h, kv) / 4e8)

    def powers(h: np.ndarray, kv: np.ndarray) -> np.ndarray:
        return 0.06 * (h**-weak - 1) / weak + 0.02 * (kv**-weak - 1) / weak

    def strays(h: np.ndarray, kv: np.ndarray, L: np.ndarray, d: np.ndarray) -> np.ndarray:
        u = 0.01 * odd[h.astype(int), kv.astype(int)] - p * np.log2(h) - q * np.log2(kv)
        return u - (b + 0.003 * np.log2(h) + 0.004 * bent[h.astype(int), kv.astype(int)]) * whole(
            h, kv, L, d
        )

    return {
        "a product of powers": lambda h, kv, L, d: (
            floor + 0.8 * np.exp(-b * x(L, d)) * h ** (-1.4 * p) * kv ** (-1.4 * q)
        ),
        "a sum of powers": lambda h, kv, L, d: (
            floor + 0.6 * np.exp(-b * x(L, d)) * (1 + c[0] * h**-g + 0.4 * c[1] * kv**-g)
        ),
        "powers added to the loss": lambda h, kv, L, d: (
            floor + 0.55 * np.exp(-b * whole(h, kv, L, d)) + powers(h, kv)
        ),
        "configurations stray": lambda h, kv, L, d: floor + 0.78 * np.exp(strays(h, kv, L, d)),
        "hyperbolas": lambda h, kv, L, d: (
            floor + 0.7 * np.exp(-b * x(L, d)) * (1 + 0.15 / (1 + h / half) + 0.05 / (1 + kv / 2))
        ),
        "more effective parameters": lambda h, kv, L, d: (
            floor
            + 0.8
            * np.exp(-b * x(L, d))
            * (1 + s * np.log2(1 + h) + 0.3 * s * np.log2(1 + kv)) ** (-1.5 * b)
        ),
    }


def laws(sets: int, seed: int) -> None:
    """Joint laws fitted to the seven published configurations, and what they miss of all 21.

    Root mean square errors in millinats at L = 16, 24, 32 of the head counts within those trained |
    beyond them | beyond them at L = 48; errors of a run 0.1%, of a size 0.05%. "chosen" is the law
    that `preferred_law` takes for each data set.
    """
    p, heads = points(SMOOTH), np.array(head_candidates(32), float)
    everyone = (*p.heads, *(h for h in head_candidates(32) if h not in p.heads))
    wide = dataclasses.replace(p, heads=everyone, density=np.ones(len(everyone)))
    heads = np.array(everyone, float)
    mine, shape = heads[p.curve], (p.n_layers.astype(float), p.d_model.astype(float))
    beyond, names = (heads > 8).any(1), [law for law in LAWS if law != "separate"]
    print(" " * 28 + "".join(f"{name:^22}" for name in [*names, "chosen"]))
    for kind in head_truths(np.random.default_rng(0)):
        errors: dict[str, list] = {name: [] for name in [*names, "chosen"]}
        for i in range(max(2, sets // 10)):
            rng = np.random.default_rng((seed, i))
            truth = head_truths(rng)[kind]
            size = 0.0005 * rng.standard_normal(p.size.max() + 1)[p.size]
            y = truth(*mine.T, *shape) * (1 + 0.001 * rng.standard_normal(len(p.n)) + size)
            by_name = dict(zip(p.name, y, strict=True))
            r = dataclasses.replace(SMOOTH, loss=np.array([by_name[n] for n in SMOOTH.name]))
            for law in names:
                found = solve_point(make_model(law, p, 64), y, np.ones(len(y)))
                curves = make_model(law, wide, 64).curves(found.parameters)
                rows = []
                for layers in (16.0, 24.0, 32.0, 48.0):
                    x = np.log(n_formula(layers, 64 * layers, 0, 0)) - curves.centre
                    sizes = np.full(len(heads), layers)
                    right = truth(*heads.T, sizes, 64 * sizes)
                    rows.append(curves.floor + np.exp(curves.u - curves.b * x) - right)
                errors[law].append(rows)
            best = preferred_law(r)
            errors["chosen"].append(errors[best][-1])
        told = ""
        for each in map(np.array, errors.values()):
            parts = each[:, :3][..., ~beyond], each[:, :3][..., beyond], each[:, 3][:, beyond]
            told += "{:6.1f} |{:5.1f} |{:5.1f}  ".format(
                *(1e3 * np.sqrt(np.mean(part**2)) for part in parts)
            )
        print(f"{kind:28}{told}", flush=True)


def bound(sets: int, seed: int) -> None:
    """Noise and coverage where E is held at 0, counted as an E that absorbed nothing or as free.

    Two configurations of five sizes, (a/N)^0.1 + E with 0.3% noise, at one training context or at
    two: E is hardly told from 0. Of the data sets whose fitted E is 0: the mean of sigma^2 to its
    true value, which should be 1, the share of such data sets, and how often the 90% intervals of
    the bootstrap hold b and the loss at ten times the largest size.
    """
    blank, b, own = PUBLISHED.select(np.zeros(10, int)), 0.1, 0.003
    layers = np.tile([12, 16, 20, 24, 28], 2)
    h, kv = np.repeat([4, 8], 5), np.repeat([1, 8], 5)
    n = n_formula(layers, 64 * layers, h, kv).astype(float)
    columns = {"n_heads": h, "n_kv_heads": kv, "n_layers": layers, "d_model": 64 * layers}
    columns |= {"n_params": n, "tokens": 20 * n}
    columns["name"] = np.array([f"r{i}" for i in range(len(n))], object)
    one = dataclasses.replace(blank, **columns, source="simulation")
    both = one.select(np.tile(np.arange(10), 2))
    both = dataclasses.replace(both, context_length=np.repeat([4096, 8192], 10))
    engines = {
        "one context": (one, fit),
        "context law": (both, lambda r, **k: context_law(r, **k).fit),
    }
    for (name, (r, engine)), floor in itertools.product(engines.items(), (0.0, 0.5)):
        true = floor + np.exp(0.6 - b * np.log(r.n_params / 2e8))
        far = floor + np.exp(0.6 - b * np.log(10 * n.max() / 2e8))
        told = {
            "absorbed nothing": Solution.absorbing,
            "free": property(lambda found: found.jacobian),
        }
        for way, absorbing in told.items():
            rows = []
            for i in range(sets):
                rng = np.random.default_rng((seed, i))
                error = own * np.mean(true) * rng.standard_normal(len(r))
                with mock.patch.object(Solution, "absorbing", absorbing):
                    f = engine(dataclasses.replace(r, loss=true + error), refits=200, seed=i)
                if f.at_bound == "lower":
                    low, high = interval(f.draws.b)
                    ends = interval(f.draws.loss(1, 10 * n.max()))
                    held = np.mean((low <= b) & (b <= high)), ends[0] <= far <= ends[1]
                    rows.append(((f.sigma / (own * np.mean(true))) ** 2, *held))
            square, inside, loss = np.mean(rows, 0)
            print(
                f"E held at 0 in {len(rows)} of {sets} sets of seed {seed}, {name}, true E {floor:g}, "
                f"counted as if it {way if way != 'free' else 'were free'}: sigma^2 {square:.2f} of the "
                f"true, b covered {inside:.0%}, loss at ten times the largest size {loss:.0%}",
                flush=True,
            )


if __name__ == "__main__":
    every = {f.__name__: f for f in (coverage, laws, bound)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", metavar="|".join(every))
    parser.add_argument("--sets", type=int, default=200, help="synthetic data sets (default: 200)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of them (default: {SEED})")
    given = parser.parse_args()
    for name in given.which or every:
        if name not in every:
            parser.error(f"{name!r} is not one of {', '.join(every)}")
        every[name](given.sets, given.seed)
