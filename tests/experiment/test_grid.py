import pytest

from gqa_scaling.config import ModelConfig, RunConfig, UserError
from gqa_scaling.experiment.grid import head_candidates, unique


def test_the_published_grid_has_21_head_configurations():
    candidates = head_candidates(32)
    assert len(candidates) == len(set(candidates)) == 21
    powers = {1, 2, 4, 8, 16, 32}
    assert set(candidates) == {(h, kv) for h in powers for kv in powers if kv <= h}


def test_one_head_is_one_candidate():
    assert head_candidates(1) == [(1, 1)]


@pytest.mark.parametrize("count", [0, -2, 3, 24])
def test_only_powers_of_two(count):
    with pytest.raises(UserError, match=f"max_heads={count} must be a power of two"):
        head_candidates(count)


def run(name: str, n_heads: int = 4) -> RunConfig:
    return RunConfig(name, ModelConfig(2, 32, n_heads, 4), 64, 256, tokens=2560)


def test_runs_that_share_a_name_or_a_definition_are_refused():
    assert unique(iter([run("a"), run("b", n_heads=8)])) == [run("a"), run("b", n_heads=8)]
    with pytest.raises(UserError, match="runs a and a share one name"):
        unique([run("a"), run("a", n_heads=8)])
    with pytest.raises(UserError, match="runs a and b share one definition"):
        unique([run("a"), run("b")])
