from dataclasses import replace
from pathlib import Path

import decode_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_kit import DENSE, PROMPTS, VARIANTS, cached, decoder, uncached
from eight_devices import on_eight_devices
from jax.sharding import AbstractMesh

from gqa_scaling.config import ModelConfig, UserError
from gqa_scaling.devices.layout import AXES
from gqa_scaling.inference.accuracy import cache_error
from gqa_scaling.inference.decode import copies_said, empty_cache, prefill, step
from gqa_scaling.inference.generate import Generation
from gqa_scaling.inference.sampling import Sampling
from gqa_scaling.units import byte_size


@pytest.fixture(scope="module")
def wanted():
    """Texts without a cache; every choice is clear enough to be the same on any processor."""
    found = {name: [uncached(config, p) for p in PROMPTS] for name, config in VARIANTS.items()}
    assert all(ahead > 1e-4 for texts in found.values() for _, ahead in texts)
    return {name: [text for text, _ in texts] for name, texts in found.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_of_unequal_prompts_are_those_without_a_cache(name, wanted):
    assert len({tuple(text) for text in wanted[name]}) == len(PROMPTS)
    assert cached(VARIANTS[name]) == wanted[name]


def test_so_they_are_on_eight_devices(wanted):
    found, _ = on_eight_devices(Path(decode_kit.__file__))
    assert found["texts"] == wanted
    tensor = {name: mesh["tensor"] for name, mesh in found["meshes"].items()}
    assert tensor == {"dense": 8, "mqa": 8, "window": 8, "mixed": 2}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_at_every_position_are_those_without_a_cache(name):
    config, own = VARIANTS[name], decode_kit.model(VARIANTS[name])
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 50))
    expected = jax.jit(lambda x: own.logits(own(x, attention="reference")))(tokens)
    ready, counts = decoder(config), np.array([33, 8])
    with jax.set_mesh(ready.mesh):
        cache = empty_cache(config, 2, 64)
        logits, cache = prefill(config, ready.parameters, cache, tokens[:, :40], counts, chunk=10)
        for ahead in range(17):
            at = [0, 1], counts + ahead - 1
            np.testing.assert_allclose(logits, expected[at], atol=5e-5)
            more = tokens[[0, 1], counts + ahead]
            logits, cache = step(config, ready.parameters, cache, more)
    assert cache.length_B.tolist() == [50, 25]


def test_a_prompt_that_does_not_fit_or_is_empty_is_refused():
    ready = decoder(DENSE)
    with jax.set_mesh(ready.mesh):
        cache = empty_cache(DENSE, 1, 8)
        for prompt, said in ((np.zeros((1, 9)), "9 tokens do not fit into a cache for 8"),
                             (np.zeros((1, 0)), "every prompt must have at least one token")):  # fmt: skip
            with pytest.raises(UserError, match=said):
                prefill(DENSE, ready.parameters, cache, prompt)
    for prompts, said in (([], "at least one prompt"), ([[]], "the prompt is empty"),
                          ([[1], range(64)], "prompt 2 has 64 tokens and leaves no room")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            Generation(ready, prompts, tokens=1, context=64)


def test_what_is_drawn_depends_on_text_and_seed_alone():
    how = {"sampling": Sampling(1.0, top_k=20, top_p=0.9)}
    together = cached(DENSE, seeds=7, **how)
    alone = [cached(DENSE, [prompt], seeds=7, **how)[0] for prompt in PROMPTS[:2]]
    assert together[:2] == alone
    twice = cached(DENSE, [PROMPTS[0]] * 2, seeds=[7, 8], **how)
    assert twice[0] == alone[0] != twice[1]


def test_texts_end_at_a_stop_token_at_what_was_asked_and_at_the_context():
    ready, (text, *_) = decoder(DENSE), cached(DENSE)
    token = text[10]
    first = text.index(token)
    prompts = [PROMPTS[0], np.arange(60) % 40]
    generation = Generation(ready, prompts, tokens=20, context=64, stop=[token])
    rows = list(generation)
    assert generation.made[0] == text[:first]
    assert generation.ended[0] == "stop"
    made = generation.made[1]
    assert (generation.ended[1], len(made)) in (("context", 4), ("stop", len(made)))
    assert rows[first][0] is None
    assert [row[0] for row in rows[:first]] == text[:first]


def test_tokens_that_the_tokenizer_does_not_know_are_never_drawn():
    ready = decoder(DENSE)
    few = type(ready)(ready.config, ready.parameters, ready.mesh, 3)
    generation = Generation(few, [[1]], tokens=24, context=64, sampling=Sampling(100.0))
    assert {row[0] for row in generation} == {0, 1, 2}


def test_the_error_of_a_cache_is_that_of_its_bits():
    tokens = np.random.default_rng(0).integers(40, size=(2, 20))
    ready = decoder(DENSE)
    same, coarse = (cache_error(ready, tokens, each) for each in ("float32", "int8"))
    assert (same.largest, same.rms, same.loss_change, same.same_choice) == (0, 0, 0, 1)
    assert same.targets == 38
    own = decode_kit.model(DENSE)
    log_p = jax.nn.log_softmax(own.logits(own(jnp.asarray(tokens))))[:, :-1]
    loss = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], -1).mean()
    assert same.loss == pytest.approx(loss, abs=1e-5)
    assert 1e-4 < coarse.rms < coarse.largest < 0.2 * coarse.logits_rms
    assert 0 < abs(coarse.loss_change) < 0.05
    assert "int8 cache against float32" in coarse.sentence


def test_copies_of_a_large_cache_are_said():
    """One KV head over 4 devices: all of them hold its whole cache."""
    config = ModelConfig(24, 1536, 8, 1, dtype="bfloat16")
    mesh = AbstractMesh((1, 1, 1, 4), AXES)
    said = copies_said(config, mesh, 4, 131072, "bfloat16")
    cache = 2 * 4 * 131072 * 24 * 64 * 2
    assert said.startswith(
        f"each KV head's cache lies on 4 devices, as 4 share 1 KV head: {byte_size(cache)}"
    )
    assert copies_said(config, mesh, 1, 8192, "bfloat16") == ""  # small
    assert copies_said(replace(config, n_kv_heads=4), mesh, 4, 131072, "bfloat16") == ""
    assert copies_said(config, AbstractMesh((4, 1, 1, 1), AXES), 4, 131072, "bfloat16") == ""
