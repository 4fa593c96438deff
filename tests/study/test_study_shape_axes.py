"""Loss against head size, FFN ratio and aspect at one N: which runs are compared, and how surely."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

from gqa_scaling import costs
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.study.reading import from_text
from gqa_scaling.study.report.loss_pictures import loss_against_shape
from gqa_scaling.study.report.shape_axes import shape_tables
from gqa_scaling.study.results import Results, flags
from gqa_scaling.study.shape_axes import AXES, shape_axes

NOISE = (0.004, -0.002, -0.002)  # of the three seeds in the middle


def loss_of(n: float, head_dim: int, ratio: float, aspect: float) -> float:
    """Each axis has its best value at the middle of `experiments.shape@laptop`, but for head size."""
    bend = 0.01 * math.log(ratio / 3) ** 2 + 0.02 * math.log(aspect / 16) ** 2
    return 2 + (1e5 / n) ** 0.2 + bend - 0.005 * math.log2(head_dim / 16)


def study(spec: str = "experiments.shape@laptop", seeds: bool = True) -> Results:
    lines = ["name,n_heads,n_kv_heads,head_dim,n_layers,d_model,n_params,tokens,loss,seed,n_count"]
    for run in load_experiment(spec, (), Path("no-runs")).runs:
        m = run.model
        if run.seed and not seeds:
            continue
        loss = loss_of(150_000, m.head_dim, m.ffn_dim / m.d_model, m.d_model / m.n_layers)
        loss += NOISE[run.seed] if run.name.rpartition("-")[2].startswith(("middle", "seed")) else 0
        row = [run.name, m.n_heads, m.n_kv_heads, m.head_dim, m.n_layers, m.d_model]
        row += [costs.n_exact(m), costs.training_tokens(run), loss, run.seed, "n_exact"]
        lines.append(",".join(map(str, row)))
    return from_text("\n".join(lines), "shapes.csv")


def test_each_axis_holds_what_differs_in_it_alone():
    results = study()
    points = [p for p in shape_axes(results) if 190_000 < p.n_params < 210_000]
    values = {axis: [round(p.value, 2) for p in points if p.axis == axis] for axis in AXES}
    assert values == {
        "head size": [4, 8, 16, 32],
        "FFN ratio F/d": [1, 1.75, 3, 4.07, 5.79],
        "aspect d/L": [5.5, 8.67, 16, 25.33, 48],
    }


def test_differences_are_those_of_the_losses_with_the_noise_of_seeds():
    results = study()
    points = shape_axes(results)
    heads = [p for p in points if p.axis == "head size" and 190_000 < p.n_params < 210_000]
    assert [p.difference for p in heads] == pytest.approx([0.01, 0.005, 0, -0.005], abs=1e-9)
    deviation = np.std(NOISE, ddof=1)  # the same at each of three sizes
    half = student.ppf(0.95, 6) * deviation * math.sqrt(1 + 1 / 3)
    assert [p.half for p in heads] == pytest.approx([half, half, 0, half])
    assert [p.runs for p in heads] == [1, 1, 3, 1]


def test_without_seeds_no_shape_stands_in_the_middle():
    assert shape_axes(study(seeds=False)) == []


def test_a_grid_of_heads_is_none_of_shapes():
    results = study("experiments.head_ladder@smoke")
    assert shape_axes(results) == []
    assert not any("several shapes" in flag for flag in flags(results))


def test_a_fit_over_shapes_is_to_be_read_with_care():
    assert any("3 sizes were trained in several shapes" in flag for flag in flags(study()))


def test_table_and_picture_show_them():
    results = study()
    (table,) = shape_tables(results)
    text = table.markdown()
    assert "the middle" in text
    assert "-5.0 ± 7.8" in text
    figure = loss_against_shape(results)
    assert figure is not None
    assert [axis.get_xlabel() for axis in figure.axes] == list(AXES)
    assert shape_tables(study("experiments.head_ladder@smoke")) == []
    assert loss_against_shape(study("experiments.head_ladder@smoke")) is None
