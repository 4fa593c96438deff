import pytest

from gqa_scaling.config import Question
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fit import fit
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.reading import published
from gqa_scaling.study.study import Study


@pytest.fixture(scope="session")
def chen() -> Fit:
    """The published points, by a curve for each configuration."""
    return fit(published())


@pytest.fixture(scope="session")
def study() -> Study:
    """A small answer from the published points."""
    r = published()
    found = fit(r, refits=100)
    asked = Question(contexts=(8192,), losses=(2.8,))
    return Study(r, Estimates(found), frontier(found, r, asked))


@pytest.fixture(scope="module")
def csv(request, tmp_path_factory):
    """The module's own study, with a little noise, as a file that users bring."""
    r = request.module.study(0.002, seed=5)
    columns = ("n_heads", "n_kv_heads", "n_layers", "d_model", "context_length", "tokens", "loss")
    lines = [",".join(str(getattr(r, c)[i]) for c in columns) for i in range(len(r))]
    path = tmp_path_factory.mktemp("study") / "runs.csv"
    path.write_text("\n".join([",".join(columns), *lines]))
    return path
