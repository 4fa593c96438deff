import pytest


@pytest.fixture(scope="module")
def csv(request, tmp_path_factory):
    """The module's own study, with a little noise, as a file that users bring."""
    r = request.module.study(0.002, seed=5)
    columns = ("n_heads", "n_kv_heads", "n_layers", "d_model", "context_length", "tokens", "loss")
    lines = [",".join(str(getattr(r, c)[i]) for c in columns) for i in range(len(r))]
    path = tmp_path_factory.mktemp("study") / "runs.csv"
    path.write_text("\n".join([",".join(columns), *lines]))
    return path
