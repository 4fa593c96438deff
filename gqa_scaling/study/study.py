"""A study that was answered: its runs, what was estimated from them, and what that recommends."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gqa_scaling.study.candidates import Candidates
from gqa_scaling.study.equal_training import EqualTraining
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.frontier import Frontier
from gqa_scaling.study.histories import NO_HISTORIES, Histories
from gqa_scaling.study.results import Results
from gqa_scaling.study.scores import NO_FORECASTS, Forecasts
from gqa_scaling.study.sensitivity import Sensitivity, sensitivity
from gqa_scaling.study.sparsity import Sparsity, sparsity


@dataclass(frozen=True)
class Study:
    """All that is shown of a study; `aligned` are its answers at equal training FLOPs, if any.

    `candidates` have the curves of what is ranked, where these are more than were estimated.
    `forecasts` and `histories` are those of the experiment's runs; others' runs have none.
    """

    results: Results
    estimates: Estimates
    frontier: Frontier
    aligned: EqualTraining | None = None
    candidates: Candidates | None = None
    forecasts: Forecasts = NO_FORECASTS
    histories: Histories = NO_HISTORIES

    @property
    def fit(self) -> Fit:
        return self.estimates.fit

    @property
    def ranked(self) -> Candidates:
        """What is ranked: the configurations that were trained where nothing else is said."""
        return self.candidates or Candidates(self.estimates, self.fit, self.fit.heads)

    @cached_property
    def sparsity(self) -> Sparsity | None:
        """What patterns cost and save; None where all runs are dense."""
        return sparsity(self.fit, self.results, self.frontier)

    @cached_property
    def sensitivity(self) -> Sensitivity | None:
        """What the answer hangs on; None where nothing reaches its loss."""
        return sensitivity(self.ranked.fit, self.results, self.frontier)

    def estimated(self) -> dict[str, Any]:
        """What stands beside the fit and the frontier, ready for JSON."""
        aligned = {"aligned": self.aligned.to_dict()} if self.aligned else {}
        return self.estimates.to_dict() | aligned
