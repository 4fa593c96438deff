"""Shapes between the sizes of a ladder, and the nearest that can be built."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_scaling.config import UserError
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.experiment.ladder import FIGURE_2_LADDER, PUBLISHED_LADDER
from gqa_scaling.study.shapes import nearest_buildable, shapes, width_step

heads = st.sampled_from(head_candidates(128))
head_sizes = st.sampled_from([16, 64, 128])
parameters = st.floats(4, 11).map(lambda exponent: 10**exponent)
ladders = st.sampled_from(
    [PUBLISHED_LADDER, FIGURE_2_LADDER, ((2, 32), (3, 48), (5, 112)), ((2, 64), (2, 128), (4, 128))]
)


@given(heads, head_sizes, ladders)
def test_each_size_is_recovered_at_its_own_n(heads, head_dim, ladder):
    n = [n_formula(*size, *heads, head_dim) for size in ladder]
    assert np.transpose(shapes(n, heads, head_dim, ladder)) == pytest.approx(
        np.array(ladder), rel=1e-9
    )


@given(st.lists(parameters, min_size=1, max_size=5), heads, head_sizes, ladders)
def test_shapes_have_the_parameters_asked_for(n, heads, head_dim, ladder):
    layers, width = shapes(np.array([*n, np.inf]), heads, head_dim, ladder)
    assert n_formula(layers, width, *heads, head_dim)[:-1] == pytest.approx(np.array(n), rel=1e-9)
    assert np.isinf([layers[-1], width[-1]]).all()


@given(parameters, heads, head_sizes, ladders)
def test_aspect_ratio_lies_between_those_of_the_two_nearest_sizes(n, heads, head_dim, ladder):
    layers, width = shapes(n, heads, head_dim, ladder)
    ratio = width / layers
    counted = [(n_formula(*size, *heads, head_dim), size[1] / size[0]) for size in ladder]
    if n <= counted[0][0]:
        assert ratio == pytest.approx(counted[0][1])
    elif n >= counted[-1][0]:
        assert ratio == pytest.approx(counted[-1][1])
    else:
        (low, a), (high, b) = next(p for p in itertools.pairwise(counted) if n <= p[1][0])
        assert ratio == pytest.approx(a + (b - a) * (n - low) / (high - low), rel=1e-9)


@given(st.floats(1.001, 10), parameters, heads)
def test_more_parameters_are_more_layers_where_the_aspect_ratio_is_one(factor, n, heads):
    layers, width = shapes([n, n * factor], heads, 64, FIGURE_2_LADDER)
    assert layers[1] > layers[0]
    assert width[1] > width[0]


def tolerance(n: float) -> float:
    """How far a whole shape may be from N: whole layers and widths of 64 are coarse when small."""
    return 0.4 * (1e6 / n) ** (1 / 3)


grid_heads = st.sampled_from(head_candidates(32))
buildable = st.floats(7, 11).map(lambda exponent: 10**exponent)


@given(buildable, grid_heads)
def test_nearest_buildable_is_whole_and_near(n, heads):
    layers, width = nearest_buildable(n, heads, 64, PUBLISHED_LADDER)
    assert type(layers) is type(width) is int
    assert width % 64 == 0
    assert n_formula(layers, width, *heads) == pytest.approx(n, rel=tolerance(n))


@given(st.floats(1, 10), buildable, grid_heads)
def test_nearest_buildable_grows_with_n(factor, n, heads):
    sizes = [nearest_buildable(each, heads, 64, PUBLISHED_LADDER) for each in (n, factor * n)]
    built = [n_formula(*size, *heads) for size in sizes]
    assert built[1] >= built[0] * (1 - tolerance(n) / 2)


@given(heads, st.sampled_from(PUBLISHED_LADDER))
def test_nearest_buildable_returns_a_published_size_at_its_own_n(heads, size):
    assert nearest_buildable(n_formula(*size, *heads), heads, 64, PUBLISHED_LADDER) == size


@given(st.floats(1, 10**6), heads)
def test_the_least_shape_is_one_layer_and_one_multiple(n, heads):
    layers, width = nearest_buildable(n, heads, 64, PUBLISHED_LADDER, multiple=32)
    assert layers >= 1
    assert width >= 32
    assert width % 32 == 0


@pytest.mark.parametrize("n", [0, -5, float("nan")])
def test_no_parameters_are_refused(n):
    with pytest.raises(UserError, match="must be greater than 0"):
        nearest_buildable(n, (8, 8), 64, PUBLISHED_LADDER)


@pytest.mark.parametrize(
    ("widths", "step"), [((256, 512), 64), ((48, 72), 24), ((100, 102), 8), ((96, 192), 64)]
)
def test_new_widths_keep_what_all_widths_are_multiples_of(widths, step):
    assert width_step(tuple((2, width) for width in widths)) == step
