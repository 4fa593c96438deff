import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_scaling.config import UserError
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.experiment.ladder import (
    FIGURE_2_LADDER,
    INTERPOLATION_LADDER,
    PUBLISHED_LADDER,
    TRAINED_SIZES,
    interpolate,
    nearest_buildable,
)

heads = st.sampled_from(head_candidates(128))
head_sizes = st.sampled_from([16, 64, 128])
parameters = st.floats(4, 11).map(lambda exponent: 10**exponent)
ladders = st.sampled_from([PUBLISHED_LADDER, FIGURE_2_LADDER, ((2, 32), (3, 48), (5, 112))])


def test_published_sizes():
    assert [(s.name, s.n_layers, s.d_model, s.learning_rate) for s in TRAINED_SIZES] == [
        ("3M", 4, 256, 1e-3),
        ("19M", 6, 512, 1e-3),
        ("85M", 12, 768, 1e-3),
        ("150M", 12, 1024, 1e-3),
        ("200M", 16, 1024, 5e-4),
        ("470M", 24, 1280, 5e-4),
        ("680M", 24, 1536, 2e-4),
        ("1.2B", 36, 1536, 2e-4),
    ]
    assert INTERPOLATION_LADDER == (
        (36, 2048),
        (48, 2560),
        (54, 3072),
        (64, 4096),
        (72, 6144),
        (80, 8192),
    )
    assert PUBLISHED_LADDER[7:9] == ((36, 1536), (36, 2048))
    assert len(PUBLISHED_LADDER) == 14
    assert FIGURE_2_LADDER[0] == (12, 768)
    assert FIGURE_2_LADDER[-1] == (32, 2048)


@given(heads, head_sizes, ladders)
def test_each_size_is_recovered_at_its_own_n(heads, head_dim, ladder):
    for n_layers, d_model in ladder:
        n = n_formula(n_layers, d_model, *heads, head_dim)
        shape = interpolate(n, *heads, head_dim, ladder)
        assert shape.n_layers == pytest.approx(n_layers, rel=1e-9)
        assert shape.d_model == pytest.approx(d_model, rel=1e-9)


@given(parameters, heads, head_sizes, ladders)
def test_interpolated_shape_has_the_parameters_asked_for(n, heads, head_dim, ladder):
    shape = interpolate(n, *heads, head_dim, ladder)
    assert n_formula(shape.n_layers, shape.d_model, *heads, head_dim) == pytest.approx(n, rel=1e-9)


@given(parameters, heads, head_sizes, ladders)
def test_aspect_ratio_lies_between_those_of_the_two_nearest_sizes(n, heads, head_dim, ladder):
    shape = interpolate(n, *heads, head_dim, ladder)
    ratio = shape.d_model / shape.n_layers
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
    small = interpolate(n, *heads, ladder=FIGURE_2_LADDER)
    large = interpolate(n * factor, *heads, ladder=FIGURE_2_LADDER)
    assert large.n_layers > small.n_layers
    assert large.d_model > small.d_model


def tolerance(n: float) -> float:
    """How far a whole shape may be from N: whole layers and widths of 64 are coarse when small."""
    return 0.4 * (1e6 / n) ** (1 / 3)


grid_heads = st.sampled_from(head_candidates(32))
buildable = st.floats(7, 11).map(lambda exponent: 10**exponent)


@given(buildable, grid_heads)
def test_nearest_buildable_is_whole_and_near(n, heads):
    shape = nearest_buildable(n, *heads)
    assert (shape.n_layers, shape.d_model) == (int(shape.n_layers), int(shape.d_model))
    assert shape.d_model % 64 == 0
    assert n_formula(shape.n_layers, shape.d_model, *heads) == pytest.approx(n, rel=tolerance(n))


@given(st.floats(1, 10), buildable, grid_heads)
def test_nearest_buildable_grows_with_n(factor, n, heads):
    small, large = nearest_buildable(n, *heads), nearest_buildable(factor * n, *heads)
    built = [n_formula(s.n_layers, s.d_model, *heads) for s in (small, large)]
    assert built[1] >= built[0] * (1 - tolerance(n) / 2)


@given(heads, st.sampled_from(PUBLISHED_LADDER))
def test_nearest_buildable_returns_a_published_size_at_its_own_n(heads, size):
    shape = nearest_buildable(n_formula(*size, *heads), *heads)
    assert (shape.n_layers, shape.d_model) == size


@given(st.floats(1, 10**6), heads)
def test_the_least_shape_is_one_layer_and_one_multiple(n, heads):
    shape = nearest_buildable(n, *heads, multiple=32)
    assert shape.n_layers >= 1
    assert shape.d_model >= 32
    assert shape.d_model % 32 == 0


@pytest.mark.parametrize("n", [0, -5, float("nan")])
def test_no_parameters_are_refused(n):
    with pytest.raises(UserError, match="must be greater than 0"):
        interpolate(n, 8, 8)
