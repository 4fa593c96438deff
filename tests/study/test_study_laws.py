"""What every law does alike: one curve for each configuration, joint laws, the context law and the
token law."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_kit import failing

from gqa_scaling import cli
from gqa_scaling.config import UserError
from gqa_scaling.study import fit as fitting
from gqa_scaling.study.estimates import estimate
from gqa_scaling.study.fit import fit
from gqa_scaling.study.models import Model
from gqa_scaling.study.points import size_labels
from gqa_scaling.study.reading import from_csv
from gqa_scaling.study.solver import solve_point
from gqa_scaling.study.uncertainty import influence

HEADS = ((4, 1), (8, 2), (8, 8))
LAYERS = (4, 6, 8, 12)
FITTED = {  # law asked for, training contexts, token budgets
    "separate": ("separate", (1024,), (1e8,)),
    "product": ("product", (1024,), (1e8,)),
    "fading": ("fading", (1024,), (1e8,)),
    "context law": ("separate", (1024, 4096), (1e8,)),
    "token law": ("separate", (1024,), (1e8, 4e8, 16e8)),
}


def study(path, fitted, loss, shapes=True):
    """Runs for a law; `loss` takes KV heads, L, T and D."""
    rows = ["n_heads,n_kv_heads,n_layers,d_model,context_length,tokens,loss"]
    _, contexts, budgets = FITTED[fitted]
    for h, kv in HEADS:
        for layers in LAYERS:
            for t in contexts:
                for d in budgets:
                    y = loss(kv, layers, t, d)
                    rows.append(f"{h},{kv},{layers},{64 * layers},{t},{d},{float(y)!r}")
    path.write_text("\n".join(rows) + "\n")
    return from_csv(path)


def plain(seed=0, noise=0.003, floor=1.8):
    rng = np.random.default_rng(seed)

    def loss(kv, layers, t, d):
        curve = (1 - 0.02 * np.log2(kv)) * (layers / 6) ** -0.7
        return floor + curve + (1e7 / d) ** 0.3 + 0.01 * (t > 1024) + noise * rng.normal()

    return loss


def estimated(r, fitted, refits=100):
    return estimate(r, law=FITTED[fitted][0], refits=refits)


def answer_or_line(r, fitted):
    """The fit, or None where the runs are refused as not determining it."""
    try:
        return estimated(r, fitted).fit
    except UserError:
        return None


@pytest.mark.parametrize("fitted", FITTED)
@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.02, "2 of 100 refits did not converge, left out"),
        (0.2, "20 of 100 refits did not converge, left out: the intervals are too short"),
    ],
)
def test_some_failed_refits_are_said(tmp_path, monkeypatch, fitted, share, words):
    r = study(tmp_path / "runs.csv", fitted, plain())
    failing(monkeypatch, share)
    found = estimated(r, fitted).fit
    assert words in found.flags
    assert len(found.draws.floor) == 100 * (1 - share)


@pytest.mark.parametrize("fitted", FITTED)
@pytest.mark.parametrize("share", [0.5, 0.99, 1.0])
def test_most_failed_refits_are_refused(tmp_path, monkeypatch, fitted, share):
    r = study(tmp_path / "runs.csv", fitted, plain())
    failing(monkeypatch, share)
    failed = f"{share * 100:.0f} of 100 refits did not converge"
    law = f"the {fitted}" if "law" in fitted else f"law {fitted!r}"
    with pytest.raises(UserError, match=rf"runs\.csv: {law}: {failed}"):
        estimated(r, fitted)


@pytest.mark.parametrize("verb", [("fit",), ("frontier", "--align", "training"), ("report",)])
def test_no_interval_comes_from_no_refit(tmp_path, monkeypatch, capsys, verb):
    study(tmp_path / "runs.csv", "token law", plain())
    failing(monkeypatch, 1.0)
    assert cli.main([verb[0], str(tmp_path / "runs.csv"), "--refits", "100", *verb[1:]]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "the token law: 100 of 100 refits did not converge" in said.err
    assert said.out == ""


@pytest.mark.parametrize("fitted", [e for e in FITTED if e != "fading"])
def test_an_e_at_its_bound_takes_no_degree_of_freedom(tmp_path, fitted):
    def bent(
        kv, layers, t, d
    ):  # loss falls faster and faster with size: least squares holds E at 0
        return (
            3.0 - 0.05 * np.log2(kv) - 0.01 * layers**2 + (1e7 / d) ** 0.3 + noise[layers, kv, t, d]
        )

    rng, noise = np.random.default_rng(0), {}
    _, contexts, budgets = FITTED[fitted]
    for key in (
        (a, kv, t, d) for _, kv in HEADS for a in LAYERS for t in contexts for d in budgets
    ):
        noise[key] = float(0.002 * rng.normal())
    found = estimated(study(tmp_path / "runs.csv", fitted, bent), fitted).fit
    assert found.at_bound == "lower"
    free = len(found.points.n) - (found.n_parameters - 1)
    assert found.sigma == pytest.approx(np.sqrt((found.residual**2).sum() / free), rel=1e-6)
    assert found.leverage.sum() == pytest.approx(found.n_parameters - 1, abs=1e-6)
    assert not found.influence.any()


@given(st.lists(st.floats(1e-300, 100), min_size=2, max_size=6))
def test_e_can_lie_between_0_and_the_least_loss_whatever_the_losses(losses):
    k = len(losses)
    model = Model(
        ("E",),
        ("E",),
        np.ones((k, 1)),
        (np.zeros((k, 1)),),
        *np.zeros((2, 1, 1)),
        np.zeros(k, int),
        *np.zeros((2, k)),
    )
    (low,), (high,) = model.floor_limits(np.array([losses]), np.ones((1, k)))
    assert low == 0 < high < min(losses)


@pytest.mark.parametrize("fitted", FITTED)
@pytest.mark.parametrize("least", [1e-9, 0.004])
def test_a_loss_near_0_is_fitted_and_draws_stay_above_it(tmp_path, fitted, least):
    def falling(kv, layers, t, d):
        return least if layers == 12 else 5.0 / layers + 0.01 * kv + 1e6 / d * (t / 1024)

    r = study(tmp_path / "runs.csv", fitted, lambda *run: 1 + falling(*run))
    r = dataclasses.replace(r, loss=r.loss - 1)  # a file of such losses may be refused
    found = answer_or_line(r, fitted)
    assert found is None or 0 <= found.floor < r.loss.min()
    assert found is None or found.draws.floor.min() >= 0


@pytest.mark.parametrize("fitted", FITTED)
def test_equal_losses_end_in_an_answer_or_a_line(tmp_path, fitted):
    found = answer_or_line(study(tmp_path / "runs.csv", fitted, lambda *_: 2.5), fitted)
    assert found is None or 2.4 < found.floor < 2.5


# ---------------------------------------------------------------------------- sizes without shapes


def unshaped(path, drop=()):
    """Runs at two contexts that give N alone; `drop` holds (curve, size) that were not run."""
    rows, loss = ["n_heads,n_kv_heads,n_params,context_length,loss"], plain()
    for k, (h, kv) in enumerate(HEADS):
        for i, layers in enumerate(LAYERS):
            for t in (8192, 16384):
                if (k, i) not in drop:
                    n = 10_000 * layers**3 + 500 * kv
                    rows.append(f"{h},{kv},{n},{t},{float(loss(kv, layers, t, 1e8))!r}")
    path.write_text("\n".join(rows) + "\n")
    return from_csv(path)


def test_sizes_without_shapes_are_ranks_where_all_curves_have_equally_many(tmp_path):
    r = unshaped(tmp_path / "runs.csv")
    curve = np.repeat(np.arange(3), 8)
    ranks = size_labels(curve, r.n_params, r.n_layers, r.d_model)
    assert ranks.tolist() == np.repeat(np.arange(4), 2).tolist() * 3
    found = estimate(r, refits=100)
    assert found.flatness.verdict != "untested"
    assert len(np.unique(found.fit.shared.loading.sum(1))) == 1


def test_sizes_without_shapes_stand_alone_where_curves_have_unlike_many(tmp_path):
    r = unshaped(tmp_path / "runs.csv", drop={(0, 0)})  # ranks would join the second with the first
    one = fit(r, context_length=8192, refits=100)
    assert len(set(one.points.size)) == 11
    wide = estimate(r, refits=100)
    assert len(set(wide.fit.points.size)) == 11  # of 22 points, each size at two contexts
    assert wide.fit.shared.loading.sum(1).max() <= 2
    assert wide.flatness.verdict == "untested"
    assert "columns n_layers and d_model say which sizes are one" in wide.flatness.untested


# ------------------------------------------------------------------- where least squares may stray


def test_the_best_limit_of_e_is_found_at_the_end_of_a_flat_valley(tmp_path):
    # one curve that rises: every E fits nearly as well, and 0 best
    n = (81920, 229376, 720896, 2490368, 9175040)
    losses = (4.978093, 4.987667, 4.993490, 4.996740, 4.998425)
    rows = [f"2,1,{n},{loss}" for n, loss in zip(n, losses, strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join(["n_heads,n_kv_heads,n_params,loss", *rows]))
    found = fit(from_csv(tmp_path / "runs.csv"), refits=100)
    assert found.at_bound == "lower"
    assert found.converged


@pytest.mark.parametrize("law", ["product", "fading"])
def test_what_no_run_moves_stays_where_the_search_began(tmp_path, law):
    # without (4,4) all have one KV head, and q, the exponent of KV heads, could be anything
    rows, noise = ["n_heads,n_kv_heads,n_layers,d_model,loss"], np.random.default_rng(0)
    for h, kv in ((1, 1), (4, 1), (4, 4), (8, 1)):
        for layers in LAYERS:
            y = 1.4 + (1 - 0.02 * np.log2(h)) * (layers / 6) ** -0.3 + 0.02 * noise.normal()
            rows.append(f"{h},{kv},{layers},{64 * layers},{y}")
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    p = fitting.points(from_csv(tmp_path / "runs.csv"))
    seen = p.curve != p.heads.index((4, 4))
    model = fitting.make_model(law, p, 64)
    found = solve_point(model, p.loss, seen.astype(float))
    assert found.parameters[model.names.index("q")] == 0


def test_parameters_count_as_determined_alike_for_every_law(tmp_path):
    # two sizes are all but one: b is not told from u, nor either from E
    jacobian = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1e-9], [1.0, 2.0, 1.0], [1.0, 2.0, 1.0]])
    assert influence(jacobian[:2], np.ones(2), np.zeros(2))[2] == 2
    leverage, _, rank = influence(jacobian, np.ones(4), np.zeros(4))
    assert rank == 2
    assert leverage.sum() == pytest.approx(2)


def test_a_size_is_an_n_for_every_law(tmp_path):
    # three shapes of (4,1), two of them with one N
    rows = ["n_heads,n_kv_heads,n_layers,d_model,n_params,n_count,context_length,loss"]
    for h, kv in HEADS:
        for i, layers in enumerate(LAYERS[:3]):
            same = 2 if i == 1 and h == 4 else i
            for t in (1024, 4096):
                y = 2.0 + (same + 1) ** -0.5 + 0.001 * i + 0.01 * kv
                rows.append(f"{h},{kv},{layers},{64 * layers},{1e8 * (same + 1)},n_given,{t},{y}")
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    r = from_csv(tmp_path / "runs.csv")
    for options in ({}, {"context_length": 1024}):
        with pytest.raises(UserError, match=r"needs 3 sizes, but \(4,1\) has 2"):
            estimate(r, refits=100, **options)
