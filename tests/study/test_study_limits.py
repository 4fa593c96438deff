"""Any study ends with an answer or a line that says why there is none, in little memory."""

import dataclasses
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from study_kit import answered, read, small_study

from gqa_scaling.cli import main
from gqa_scaling.config import Question, UserError
from gqa_scaling.costs import n_formula
from gqa_scaling.ladder import MOST_LAYERS, MOST_PARAMETERS, REACH
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier, largest, scale_of
from gqa_scaling.study.results import from_csv, published
from gqa_scaling.study.shapes import shapes

NEAR_FLOOR = Path(__file__).parent / "twelve_runs_near_floor.csv"


def ends_well(seed: int, refits: int, page: Path | None = None) -> tuple[int, bool]:
    """Peak memory of a study in bytes, and whether it was answered."""
    tracemalloc.start()
    try:
        study, told = small_study(seed), ""
        try:
            answer = answered(*study, refits, page)
        except UserError as error:
            told = str(error)
            assert told
            assert "\n" not in told
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if told:
        return peak, False
    scale = scale_of(read(study[0]))
    for each in answer.answers:
        for choice in each.choices:
            low, high = scale.reach(choice.heads)
            assert choice.n == math.inf or low <= choice.n <= high
            assert 0 <= choice.unreachable <= 1
            least, most = choice.n_interval
            assert low <= least <= most
            assert most == math.inf or most <= high
            if choice.unreachable == 0:
                assert most < math.inf
            assert choice.equal_cost.n <= high or math.isnan(choice.equal_cost.n)
    return peak, True


@pytest.mark.parametrize("seed", range(40))
def test_a_small_study_ends_with_an_answer_or_a_line(seed):
    peak, _ = ends_well(seed, refits=100)
    assert peak < 2**27


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1300, 10))
def test_hundreds_of_small_studies_end_so(first, tmp_path):
    """Every tenth with its page."""
    told = [
        ends_well(s, 1000, tmp_path / "report.html" if s % 10 == 0 else None)
        for s in range(first, first + 10)
    ]
    assert max(peak for peak, _ in told) < 2**29
