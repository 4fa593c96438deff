"""Which of two is cheaper: at equal loss, cost and size, by training FLOPs, and in words."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console
from scipy.optimize import minimize_scalar
from study_kit import layers_by_hand
from test_study_tokens import BETA, DATA, FLOOR, TRUTH, study

from gqa_scaling import cli
from gqa_scaling.config import Question, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.costs import HardwareCost, inference_flops, inference_memory, n_formula
from gqa_scaling.costs import training_flops_formula as training_flops
from gqa_scaling.hardware import hardware
from gqa_scaling.study.build import build
from gqa_scaling.study.estimates import estimate
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.reading import published
from gqa_scaling.study.report.compared import compared, sentence
from gqa_scaling.study.results import pair
from gqa_scaling.study.serving import Deployment, Serving
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.sides import Side, side
from gqa_scaling.study.versus import versus
from gqa_scaling.units import quantity

ASKED = Question(contexts=(131072,), losses=(2.8,), convention="per_sequence")


@pytest.fixture(scope="module")
def chen():
    return estimate(published(), refits=200)


def match(chen, first, second, question=ASKED, **options):
    return versus(chen, published(), Side(first), Side(second), question, **options).headline


def test_it_agrees_with_the_frontier_whose_baseline_is_the_second(chen):
    for context, loss in ((8192, 2.9), (131072, 2.7)):
        q = dataclasses.replace(ASKED, contexts=(context,), losses=(loss,))
        m = match(chen, (4, 1), (8, 1), q)
        own = dataclasses.replace(q, baseline=(8, 1))
        choice = frontier(chen.fit, published(), own).at(loss, context).choice((4, 1))
        for gap in m.equal_loss:
            assert gap.gain == pytest.approx(choice.saving[gap.kind], abs=1e-9)
            assert gap.gain_interval == pytest.approx(choice.saving_interval[gap.kind], abs=1e-9)
        assert m.equal_loss[0].n[0] == pytest.approx(choice.n)
        assert m.equal_cost.n[0] == pytest.approx(choice.equal_cost.n, rel=1e-9)
        assert m.equal_cost.gain == pytest.approx(choice.equal_cost.gain, abs=1e-9)
        assert m.equal_cost.gain_interval == pytest.approx(
            choice.equal_cost.gain_interval, abs=1e-9
        )


def test_equal_sizes_differ_by_the_curves(chen):
    m, fit = match(chen, (4, 1), (8, 1)), chen.fit
    n = m.equal_size.n[0]
    assert m.equal_size.n == (n, n)
    of = [float(fit.curves.loss(fit.index(h), n)) for h in ((4, 1), (8, 1))]
    assert (m.equal_size.first, m.equal_size.second) == pytest.approx(of)
    assert m.equal_size.gain == pytest.approx(of[1] - of[0])
    assert m.equal_size.second == pytest.approx(2.8)


def test_the_other_way_round_is_the_other_side_of_it(chen):
    one, other = match(chen, (4, 1), (8, 2)), match(chen, (8, 2), (4, 1))
    assert {one.verdict, other.verdict} == {"first", "second"}
    assert one.within == other.within
    for a, b in zip(one.equal_loss, other.equal_loss, strict=True):
        assert (a.first, a.second) == pytest.approx((b.second, b.first))
        assert a.probability == pytest.approx(1 - b.probability)
        assert (1 - a.gain) * (1 - b.gain) == pytest.approx(1)


def test_a_model_is_compared_at_its_own_loss_cost_and_size(chen):
    first, second = side("8,1@L24d1536", chen.fit.heads), Side((4, 1))
    q = dataclasses.replace(ASKED, losses=None)
    whole = versus(chen, published(), first, second, q)
    m, n = whole.headline, n_formula(24, 1536, 8, 1)
    place = Deployment(family_of(published()), q, 131072)
    model = build(chen.fit, place, (8, 1), n)
    assert (model.n_layers, model.d_model) == (24, 1536)
    assert whole.reference == first
    assert whole.labels == ("(8,1)@L24d1536", "(4,1)")
    assert m.loss == pytest.approx(model.loss)
    gap = m.equal_loss[0]
    assert (gap.first, gap.n[0]) == pytest.approx((model.z, n))
    assert m.equal_cost.n[0] == n
    assert m.equal_size.n == (n, n)
    assert chen.fit.curves.loss(chen.fit.index((4, 1)), gap.n[1]) == pytest.approx(m.loss)
    # off the ladder costs are those of the shape, not of the ladder's model of as many parameters
    deep = versus(chen, published(), side("8,1@L48d1088", chen.fit.heads), second, q).headline
    memory = inference_memory(n_formula(48, 1088, 8, 1), 131072, 48, 64, 1)
    flops = inference_flops(n_formula(48, 1088, 8, 1), 131072, 48, 64, 8, "per_sequence")
    assert deep.equal_loss[0].first == pytest.approx(HardwareCost()(memory, flops))


def test_two_models_are_also_compared_as_they_are(chen):
    both = [side(text, chen.fit.heads) for text in ("8,1@L24d1536", "8,8@L24d1536")]
    m = versus(chen, published(), *both, dataclasses.replace(ASKED, losses=None)).headline
    cost, *_, loss = m.itself
    n = [n_formula(24, 1536, 8, kv) for kv in (1, 8)]
    assert cost.n == loss.n == tuple(n)
    assert loss.gain == pytest.approx(-0.0355, abs=1e-3)
    assert cost.probability == 1
    assert cost.gain_interval == pytest.approx((cost.gain, cost.gain))  # of arithmetic, no noise
    assert m.equal_loss[0].n[1] == n[1]
    assert m.equal_loss[0].n[0] > n[0]  # grown until it reaches the second's loss


def test_the_verdict_knows_indifference_from_doubt(chen):
    same = {"losses": (2.8,), "contexts": (131072,)}  # (4,1) and (8,1) differ by 0.1% of Z
    verdicts = {
        margin: match(
            chen, (4, 1), (8, 1), dataclasses.replace(ASKED, **same, indifference=margin)
        ).verdict
        for margin in (0.0, 0.01, 0.05)
    }
    assert verdicts == {0.0: "open", 0.01: "equivalent", 0.05: "equivalent"}
    assert match(chen, (8, 8), (8, 1)).verdict == "second"
    assert match(chen, (8, 1), (8, 8)).verdict == "first"
    limited = match(chen, (8, 8), (8, 1), serving=Serving(limit_bytes=4e9))
    assert limited.verdict == "second"
    assert math.isinf(limited.equal_loss[0].first)
    out = dataclasses.replace(ASKED, losses=(0.5,))
    assert match(chen, (4, 1), (8, 1), out).verdict == "neither"


# ------------------------------------------------------------------------- what training takes


def least_flops(heads, loss):
    """By scipy from the truth: the least training FLOPs over N, D solved for."""

    def log_flops(x):
        n, (a, b) = math.exp(x), TRUTH[heads]
        excess = loss - FLOOR - (a / n) ** b
        if excess <= 0:
            return 99.0
        layers = layers_by_hand(n, heads)
        per_token = training_flops(n, 8192, layers, 64, heads[0])
        return math.log(DATA * excess ** (-1 / BETA) * per_token)

    low, high = (math.log(n_formula(s, 64 * s, *heads)) for s in (8, 24))
    return math.exp(
        minimize_scalar(
            log_flops, bounds=(low, high), options={"xatol": 1e-6}, method="bounded"
        ).fun
    )


def test_the_compute_multiplier_is_the_ratio_of_the_least_flops():
    r = study()
    found = estimate(r, refits=100)
    q = Question(contexts=(8192,), losses=(3.3, 3.2))
    whole = versus(found, r, Side((4, 1)), Side((8, 8)), q)
    assert whole.no_training == ""
    for m in whole.matches:
        expected = [least_flops(h, m.loss) for h in ((4, 1), (8, 8))]
        g = m.training
        assert (g.first, g.second) == pytest.approx(expected, rel=2e-3)
        assert g.gain == pytest.approx(expected[1] / expected[0], rel=2e-3)
        assert g.probability in (0, 1)
    n = n_formula(12, 768, 4, 1)
    own = versus(found, r, Side((4, 1), (12, 768)), Side((8, 8)), Question(contexts=(8192,)))
    g, tokens = own.headline.training, found.tokens.at_tokens  # its loss is that at these tokens
    assert g.n[0] == n
    assert g.tokens[0] == pytest.approx(tokens, rel=1e-3)
    assert g.first == pytest.approx(tokens * training_flops(n, 8192, 12, 64, 4), rel=1e-3)


def test_without_budgets_it_says_why_there_is_no_multiplier(chen):
    whole = versus(chen, published(), Side((4, 1)), Side((8, 1)), ASKED)
    assert "needs runs of one context length with several token budgets" in whole.no_training
    assert whole.headline.training is None
    assert whole.no_training in sentence(whole)
    r = study(context=0)
    lengthless = versus(estimate(r, refits=100), r, Side((4, 1)), Side((8, 8)), Question())
    assert "fill in column context_length" in lengthless.no_training


# ------------------------------------------------------------------------------------ in words


def test_the_sentence_says_which_by_how_much_and_how_sure(chen):
    text = sentence(versus(chen, published(), Side((8, 1)), Side((8, 8)), ASKED))
    assert text.startswith("For 2.8 nats at 131,072 tokens (8,1) is the cheaper: (8,1) takes 4")
    assert "less Z (90% interval 4" in text
    assert "in 100% of the refits" in text
    worse = sentence(versus(chen, published(), Side((8, 8)), Side((8, 1)), ASKED))
    assert "(8,1) is the cheaper: (8,8) takes 7" in worse
    assert "more Z (90% interval 7" in worse
    assert "(4,1) and (8,1) are as good, within 1%" in sentence(
        versus(chen, published(), Side((4, 1)), Side((8, 1)), ASKED)
    )


def test_tables_fit_100_columns(chen):
    both = [side(text, chen.fit.heads) for text in ("8,1@L24d1536", "4,1")]
    console = Console(width=100, file=io.StringIO(), record=True)
    q = dataclasses.replace(ASKED, losses=None)
    console.print(compared(versus(chen, published(), *both, q)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("width", [80, 140])
def test_both_costs_and_the_machine_are_told(chen, width):
    s = Serving(batch=16, hardware=hardware("h100"))
    found = versus(
        chen, published(), side("8,1"), side("8,8"), Question(contexts=(131072,)), "dollars", s
    )
    console = Console(width=width, file=io.StringIO())
    console.print(compared(found))
    gap, text = found.headline.equal_loss[0], console.file.getvalue()
    for said in (quantity(gap.first), quantity(gap.second), "Served: batch 16", "on h100"):
        assert said in text


def test_what_cannot_be_compared_is_refused(chen):
    heads = chen.fit.heads
    for text in ("8", "8,1@", "8,1@L0d64", "8,1@d64L4", "8,1@L99999999999d64", "x,1", ""):
        with pytest.raises(UserError):
            side(text, heads)
    with pytest.raises(UserError, match=r"configuration \(9,3\) is not in this study; there are"):
        match(chen, (9, 3), (8, 1))
    with pytest.raises(UserError, match="compared with itself"):
        match(chen, (8, 1), (8, 1))
    with pytest.raises(UserError, match="leave the target loss out"):
        versus(chen, published(), Side((8, 1), (24, 1536)), Side((4, 1)), ASKED)
    with pytest.raises(UserError, match="this study speaks of"):
        versus(chen, published(), Side((8, 1), (1, 1)), Side((4, 1)), Question())
    with pytest.raises(UserError, match=r"\(8,1\) has no n_kv that is a multiple of 2"):
        match(chen, (8, 2), (8, 1), serving=Serving(kv_multiple=2))


def test_the_command_line(capsys):
    ask = ["chen2025", "--refits", "100", "--context", "131072", "--loss", "2.8"]
    assert cli.main(["compare", "chen2025", "4,1", "(8, 2)", *ask[1:]]) == 0
    out = capsys.readouterr().out
    assert "At equal size, that of (8,2) at that loss" in out
    assert "Compared by a curve of its own for each." in out
    assert cli.main(["compare", "chen2025", "4,1", "8,2", *ask[1:], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["matches"][0]["verdict"] == "first"
    assert told["first_label"] == "(4,1)"
    assert told["law"] == "separate"  # as --help says of two that were trained
    assert cli.main(["compare", "chen2025", "4,1", "8,2@L24d1536", "--refits", "100"]) == 0
    assert "8,2)@L24d1536" in capsys.readouterr().out
    assert cli.main(["compare", "chen2025", "4,1", "3,1", *ask[1:]]) == 0  # predicted
    out = capsys.readouterr().out
    assert "N of (3,1)" in out
    assert "(3,1) was never trained: predicted, by law" in out
    assert "around which each configuration strays" in out
    assert cli.main(["compare", "chen2025", "4,1", "3,1", "--law", "separate", *ask[1:]]) == 2
    assert "(3,1) cannot be predicted" in capsys.readouterr().err


def test_sides_are_named_as_they_are_printed():
    pattern = ContextSharding(block=64, local=16, stride=8)
    sharded = (8, 1, pattern)
    assert side(pair(sharded), [sharded]).heads == sharded
    assert side(f"8,1 {pattern.label}@L4d256", [sharded]) == Side(sharded, (4, 256))
    assert side("(8, 1)", [sharded]) == Side((8, 1))
    assert side("24,8@L36d1536") == Side((24, 8), (36, 1536))
    with pytest.raises(UserError, match="must be heads such as"):
        side(pair(sharded), [])
