"""Log-likelihoods, against the NumPy transformer of tests/model."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face_kit import make_run, model, some_tokens

from gqa_scaling.config import ModelConfig, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.inference.decode import empty_cache, random_parameters, read
from gqa_scaling.inference.scoring import Scorer
from gqa_scaling.inference.trained import named
from gqa_scaling.model import einsum
from gqa_scaling.model.transformer import create

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
import numpy_transformer

LONGEST = 50  # no power of two, and shorter than some of the sequences
SPARSE = model(n_layers=3, pattern=ContextSharding(8, 2, stride=3, dense_layers="first 1"))


def reference(trained, tokens):
    """(T, V) logits of one sequence, in float64."""
    flat = {k: np.asarray(v, np.float64) for k, v in named(trained.parameters()).items()}
    layers = {k.removeprefix("layers/"): v for k, v in flat.items() if k.startswith("layers/")}
    arrays = {k: v for k, v in flat.items() if "/" not in k} | {"layers": layers}
    return numpy_transformer.logits(arrays, trained.run.model, np.array([tokens]))[0]


@pytest.fixture(scope="module", params=[model(tie_embeddings=False), SPARSE], ids=["dense", "hcs"])
def scored(request, tmp_path_factory):
    trained = make_run(tmp_path_factory.mktemp("run"), request.param)
    return trained, Scorer(trained.model(), LONGEST, rows=3)


def test_loglikelihoods_are_sums_over_the_continuation(scored):
    trained, scorer = scored
    sizes = [(5, 3), (1, 1), (40, 11), (70, 20), (1, 50), (33, 1), (12, 12)]
    tokens = some_tokens(sum(map(sum, sizes)))
    requests = []
    for context, continuation in sizes:
        cut, tokens = tokens[: context + continuation], tokens[context + continuation :]
        requests.append((cut[:context].tolist(), cut[context:].tolist()))
    best = int(reference(trained, requests[0][0])[-1].argmax())
    requests.append((requests[0][0], [best]))  # what the model itself would write
    found = scorer.loglikelihoods(requests)
    for (context, continuation), (likely, greedy) in zip(requests, found, strict=True):
        whole = [*context, *continuation][-(LONGEST + 1) :]
        z = reference(trained, whole[:-1])[-len(continuation) :]
        z = z - z.max(-1, keepdims=True)
        expected = z[range(len(continuation)), continuation] - np.log(np.exp(z).sum(-1))
        assert likely == pytest.approx(expected.sum(), abs=1e-3)
        assert greedy == (z.argmax(-1) == continuation).all()
    assert found[-1][1]
    assert not found[2][1]


def test_lengths_are_rounded_up_so_that_few_programs_are_compiled(tmp_path):
    trained = make_run(tmp_path, model(n_layers=1))
    scorer = Scorer(trained.model(), 100, rows=2)
    requests = [([1], list(range(1, 1 + n))) for n in range(1, 100, 3)]
    scorer.loglikelihoods(requests)
    assert scorer._score._cache_size() == 3  # 32, 64 and 100


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda s: s.loglikelihoods([([], [1])]), "at least one token"),
        (lambda s: s.loglikelihoods([([1], [2] * 51)]), "must hold 1 to 50"),
    ],
)
def test_what_does_not_fit_is_refused(scored, call, part):
    with pytest.raises(UserError, match=part):
        call(scored[1])


def test_sizes_that_are_none_are_refused(tmp_path):
    network = make_run(tmp_path, model(n_layers=1)).model()
    with pytest.raises(UserError, match="max_length=0"):
        Scorer(network, 0, 1)
    with pytest.raises(UserError, match="batch_size=0"):
        Scorer(network, 8, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decoding_and_scoring_in_float32_keep_all_digits(dtype, monkeypatch):
    """As training does (tests/training/test_training_lowering.py): what is compared is computed alike."""
    monkeypatch.setattr(einsum, "platform", lambda: "gpu")
    config = ModelConfig(2, 32, 4, 2, vocab_size=264, dtype=dtype)
    parameters = jax.eval_shape(lambda: random_parameters(config))
    cache = jax.eval_shape(lambda: empty_cache(config, 2, 64))
    tokens, counts = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    decoded = read.trace(config, parameters, cache, tokens, counts)
    scorer = Scorer(create(config, 0), 32, 2)
    scored = scorer._score.trace(scorer._parameters, tokens, tokens)
    for traced in (decoded, scored):
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        exact = ["precision = [HIGHEST, HIGHEST]" in line for line in products]
        assert len(products) > 5
        assert all(exact) if dtype == "float32" else not any(exact)
