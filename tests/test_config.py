import dataclasses
import json
import math
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_scaling.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    Needles,
    NeedleTask,
    OptimizerConfig,
    Question,
    RopeScaling,
    RunConfig,
    UserError,
    differing_fields,
    round_up,
)
from gqa_scaling.context_sharding import ContextSharding

GROUPS = {
    name: kind
    for name, kind in typing.get_type_hints(RunConfig).items()
    if dataclasses.is_dataclass(kind)
}


def model(**changes) -> ModelConfig:
    fields = {"n_layers": 4, "d_model": 256, "n_heads": 4, "n_kv_heads": 2}
    return ModelConfig(**fields | changes)


def run(**changes) -> RunConfig:
    fields = {
        "name": "golden",
        "model": model(),
        "context_length": 1024,
        "batch_tokens": 65536,
        "tokens_per_param": 20.0,
        "data": DataConfig(tokenizer="bpe-4096"),
        "optimizer": OptimizerConfig(learning_rate=5e-4),
        "seed": 1,
    }
    return RunConfig(**fields | changes)


def changed(base: RunConfig, path: str, value: object) -> RunConfig:
    """`base` with the field at `path` (model.n_heads) replaced."""
    group, _, leaf = path.rpartition(".")
    if not group:
        return dataclasses.replace(base, **{leaf: value})
    return dataclasses.replace(
        base, **{group: dataclasses.replace(getattr(base, group), **{leaf: value})}
    )


def json_round_trip(config: RunConfig) -> RunConfig:
    return RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))


# ------------------------------------------------------------------------------ valid configs

counts = st.integers(1, 10**6)
fractions = st.floats(0, 1)
positive = st.floats(1e-12, 1e12) | st.integers(1, 10**6)  # people write 20 where 20.0 belongs
paths = st.sampled_from(["stdlib", "texts", "/somewhere/texts", "a/b.jsonl.zst", "c/d.parquet"])
tokenizers = st.sampled_from(["bytes", "tokenizer.json", "/somewhere/t.json", "bpe-32k.json"])


@st.composite
def models(draw):
    n_kv_heads = draw(st.integers(1, 64))
    pattern = draw(st.none() | patterns())
    return ModelConfig(
        n_layers=draw(st.integers(1, 10**4) if pattern is None else st.integers(2, 64)),
        d_model=draw(counts),
        n_heads=n_kv_heads * draw(st.integers(1, 64)),
        n_kv_heads=n_kv_heads,
        head_dim=2 * draw(counts),
        d_ff=draw(st.none() | counts),
        vocab_size=draw(counts),
        tie_embeddings=draw(st.booleans()),
        rope_theta=draw(positive),
        rope_scaling=draw(st.none() | st.just(RopeScaling(32.0, 1, 4, 8192))),
        norm_eps=draw(positive),
        qk_norm=draw(st.booleans()),
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        pattern=pattern,
    )


@st.composite
def patterns(draw):
    return ContextSharding(
        block=draw(st.integers(1, 128)),
        local=draw(st.integers(1, 64)),
        stride=draw(st.none() | st.integers(1, 64)),
        sinks=draw(st.integers(0, 4)),
        dense_layers=draw(st.sampled_from(["", "first 1", "every 2", "1"])),
    )


@st.composite
def optimizers(draw):
    warmup, schedule = draw(fractions), draw(st.sampled_from(["wsd", "cosine"]))
    return OptimizerConfig(
        learning_rate=draw(positive),
        schedule=schedule,
        warmup=warmup,
        decay=draw(st.floats(0, (1 - warmup) / 2)) if schedule == "wsd" else 0.2,
        final_fraction=draw(fractions),
        beta1=draw(st.floats(0, 0.99) | st.just(0)),
        weight_decay=draw(st.floats(0, 10) | st.integers(0, 10)),
        clip_norm=draw(positive),
    )


@st.composite
def configs(draw):
    context, sequences = draw(st.integers(1, 10**5)), draw(st.integers(1, 100))
    accumulation = draw(st.integers(1, 8))
    longest = context * draw(st.integers(1, 8))
    tokens = draw(st.none() | counts)
    return RunConfig(
        name=draw(st.sampled_from(["a", "b-1.5+c_d"])),
        model=draw(models()),
        context_length=context,
        batch_tokens=context * sequences * accumulation,
        tokens=tokens,
        tokens_per_param=draw(positive) if tokens is None else None,
        seed=draw(st.integers(0, 2**31 - 1)),
        data=DataConfig(
            corpus=draw(paths),
            tokenizer=draw(tokenizers | st.integers(258, 10**6).map("bpe-{}".format)),
            heldout_fraction=draw(st.floats(1e-6, 0.999)),
            store=draw(st.none() | st.just("data/x")),
            allow_repeats=draw(st.booleans()),
        ),
        optimizer=draw(optimizers()),
        evaluation={
            "tokens": longest + draw(st.integers(0, 10**6)),
            "longest_context": longest,
        },
        parallel={  # tables do as well
            "fsdp": draw(st.integers(1, 64)),
            "accumulation": accumulation,
            "remat": draw(st.sampled_from(["none", "dots", "full"])),
        },
        checkpoint={"every_steps": draw(counts)},
        note=draw(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))),
    )


@given(configs())
def test_json_round_trip_gives_the_same_value_and_digests(config):
    back = json_round_trip(config)
    assert back == config
    assert back.digest == config.digest
    assert back.evaluation_digest == config.evaluation_digest
    assert differing_fields(config, back) == []


# ------------------------------------------------------------------------------------- digest


def test_golden_digest():
    assert (run().digest, run().evaluation_digest) == ("656c7b035e8c", "fb23e39143f4"), (
        "The digest of an unchanged run has changed: every run that anybody has trained would be "
        "trained again, because its directory is no longer found. A new field must have a default "
        "that means what was done before (fields at their default are left out of the digest), "
        "and a default never changes. Only if old results are really worth nothing any more, "
        "raise SCHEMA_VERSION and put the new digests here."
    )


FREE = {
    "max_nonfinite_steps": 5,
    "max_spike_steps": 5,
    "profile": "20:30",
    "name": "renamed",
    "note": "said aloud",
    "data.store": "/elsewhere",
    "data.allow_repeats": True,
    "evaluation.tokens": 2**18,
    "evaluation.longest_context": 4096,
    "evaluation.every_steps": 10,
    "evaluation.contexts": (512, 1024),
    "evaluation.needles": NeedleTask(lengths=(512,)),
    "evaluation.average": 3,
    "parallel.data": 2,
    "parallel.fsdp": 2,
    "parallel.context": 2,
    "parallel.tensor": 2,
    "parallel.accumulation": 2,
    "parallel.remat": "full",
    "parallel.attention": "reference",
    "checkpoint.every_steps": 7,
    "checkpoint.keep": 5,
}
DEFINING = {
    "context_length": 2048,
    "batch_tokens": 131072,
    "tokens_per_param": 21.0,
    "seed": 2,
    "imported": "0123456789ab",
    "model.n_layers": 5,
    "model.d_model": 320,
    "model.n_heads": 8,
    "model.n_kv_heads": 4,
    "model.head_dim": 32,
    "model.d_ff": 1024,
    "model.vocab_size": 4096,
    "model.tie_embeddings": False,
    "model.rope_theta": 1e4,
    "model.rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192),
    "model.norm_eps": 1e-5,
    "model.qk_norm": True,
    "model.dtype": "float32",
    "model.pattern": ContextSharding(64, 4, stride=8, dense_layers="every 2"),
    "data.corpus": "texts",
    "data.tokenizer": "bytes",
    "data.text_field": "content",
    "data.heldout_fraction": 0.1,
    "data.needles": Needles(0.5, "tokens"),
    "start_from": "laptop/L2-d32-0123456789ab",
    "optimizer.learning_rate": 1e-4,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.2,
    "optimizer.warmup_tokens": 1024,
    "optimizer.decay": 0.3,
    "optimizer.final_fraction": 0.0,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99,
    "optimizer.epsilon": 1e-7,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 2.0,
    "optimizer.spike_factor": 20.0,
}


def test_each_field_is_known_to_define_the_result_or_not():
    every = {f.name for f in dataclasses.fields(RunConfig)} - GROUPS.keys()
    for group, cls in GROUPS.items():
        every |= {f"{group}.{f.name}" for f in dataclasses.fields(cls)}
    budget = {"tokens"}  # in the place of tokens_per_param, see below
    assert FREE.keys() | DEFINING.keys() | budget == every, "put the new field in one of the two"


@pytest.mark.parametrize("path", FREE)
def test_digest_ignores_what_does_not_define_the_result(path):
    other = changed(run(), path, FREE[path])
    assert other != run()
    assert other.digest == run().digest
    assert differing_fields(run(), other) == []


@pytest.mark.parametrize("path", DEFINING)
def test_digest_sees_what_defines_the_result(path):
    other = changed(run(), path, DEFINING[path])
    assert other.digest != run().digest
    named = {line.split(":")[0] for line in differing_fields(run(), other)}
    assert named
    assert all(name == path or name.startswith(f"{path}.") for name in named)


def test_of_a_parent_the_digest_alone_is_part_of_a_run():
    one, renamed, other = (
        run(start_from=start)
        for start in ("laptop/a-0123456789ab", "laptop/b-c-0123456789ab", "laptop/a-ab0123456789")
    )
    assert one.digest == renamed.digest != other.digest
    assert differing_fields(one, renamed) == []
    assert differing_fields(one, other) == ["start_from: 0123456789ab -> ab0123456789"]


@pytest.mark.parametrize(
    "asked", [{"contexts": (512,)}, {"needles": NeedleTask()}, {"average": 2}], ids=str
)
def test_what_a_model_is_judged_by_is_part_of_the_evaluation(asked):
    judged = dataclasses.replace(run().evaluation, **asked)
    assert run(evaluation=judged).evaluation_digest != run().evaluation_digest
    assert run(evaluation=judged).digest == run().digest


def test_an_average_is_one_of_checkpoints_so_far_apart():
    judged = dataclasses.replace(run().evaluation, average=2)
    apart = [run(evaluation=judged, checkpoint=CheckpointConfig(every)) for every in (100, 200)]
    assert apart[0].evaluation_digest != apart[1].evaluation_digest
    plain = [run(checkpoint=CheckpointConfig(every)) for every in (100, 200)]
    assert plain[0].evaluation_digest == plain[1].evaluation_digest


def test_the_two_token_budgets_are_different_runs():
    other = run(tokens=10**6, tokens_per_param=None)
    assert other.digest != run().digest
    assert differing_fields(run(), other) == [
        "tokens: None -> 1000000",
        "tokens_per_param: 20.0 -> None",
    ]


def test_digest_leaves_out_fields_at_their_default():
    spelt_out = run(
        model=model(d_ff=round_up(8 * 256 / 3, 32), dtype="bfloat16", qk_norm=False),
        data=DataConfig(corpus="stdlib", tokenizer="bpe-4096", heldout_fraction=0.05),
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="wsd", clip_norm=1),
    )
    assert spelt_out.digest == run().digest
    assert set(run().definition()["model"]) == {"n_layers", "d_model", "n_heads", "n_kv_heads"}
    assert run().definition()["optimizer"] == {"learning_rate": 5e-4}


def test_digest_does_not_tell_20_from_20_point_0():
    assert run(tokens_per_param=20).digest == run(tokens_per_param=20.0).digest
    assert json_round_trip(run(tokens_per_param=20)).digest == run(tokens_per_param=20).digest


def test_a_corpus_and_a_tokenizer_may_move():
    here = run(data=DataConfig(corpus="/here/texts", tokenizer="/here/t.json"))
    there = run(data=DataConfig(corpus="there/texts/", tokenizer="t.json"))
    assert here.digest == there.digest
    assert differing_fields(here, there) == []
    other = run(data=DataConfig(corpus="/here/books", tokenizer="/here/t.json"))
    assert differing_fields(here, other) == ["data.corpus: texts -> books"]


def test_evaluation_digest_covers_the_targets_and_nothing_else():
    wider = changed(run(), "evaluation.tokens", 2**18)
    longer = changed(run(), "evaluation.longest_context", 4096)
    assert len({r.evaluation_digest for r in (run(), wider, longer)}) == 3
    assert changed(run(), "evaluation.every_steps", 10).evaluation_digest == run().evaluation_digest
    own = changed(run(), "evaluation.longest_context", 1024)  # what None stands for
    assert own.evaluation_digest == run().evaluation_digest


# ------------------------------------------------------------------------------------ refusals


def refused(build, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


WRONG = {
    "model.d_model": [-1],
    "model.d_ff": [0],
    "model.vocab_size": [0],
    "model.rope_theta": [math.nan],
    "model.norm_eps": [0.0],
    "data.heldout_fraction": [0.0],
    "optimizer.learning_rate": [0.0],
    "optimizer.beta2": [1.5],
    "optimizer.weight_decay": [-1.0, math.inf],
    "evaluation.tokens": [0],
    "evaluation.every_steps": [-1],
    "parallel.tensor": [0],
    "checkpoint.every_steps": [0],
    "checkpoint.keep": [0],
    "name": ["a/b", "../a", "-a"],
    "seed": [-1],
    "batch_tokens": [0],
    "tokens_per_param": [0.0],
}


@pytest.mark.parametrize(("path", "value"), [(p, v) for p, values in WRONG.items() for v in values])
def test_what_cannot_be_is_refused_by_name_and_value(path, value):
    refused(lambda: changed(run(), path, value), f"{path.rpartition('.')[2]}={value!r}")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.n_layers", 0, "n_layers=0 must be greater than 0"),
        ("model.n_layers", 4.5, "n_layers=4.5 must be of type int"),
        ("model.n_layers", True, "n_layers=True must be of type int"),
        ("model.n_layers", "4", "n_layers='4' must be of type int"),
        ("model.n_kv_heads", 3, "n_kv_heads=3 must divide n_heads=4"),
        ("model.n_kv_heads", 8, "n_kv_heads=8 must divide n_heads=4"),
        ("model.head_dim", 63, "head_dim=63 must be even"),
        ("model.rope_theta", math.inf, "rope_theta=inf must be finite"),
        ("model.dtype", "float16", "dtype='float16' must be one of bfloat16, float32"),
        ("data.corpus", "", "corpus"),
        ("data.heldout_fraction", 1, "heldout_fraction=1.0"),
        ("data.tokenizer", "bpe-257", "bpe-N with N >= 258"),
        ("data.tokenizer", "bpe-big", "bpe-N with N >= 258"),
        ("data.tokenizer", "bpe-²", "bpe-N with N >= 258"),
        ("data.tokenizer", "gpt2", "must be bytes, bpe-N or the path of a tokenizer.json"),
        ("optimizer.learning_rate", math.inf, "learning_rate=inf must be finite"),
        ("optimizer.schedule", "linear", "schedule='linear' must be one of wsd, cosine"),
        ("optimizer.warmup", 0.9, "warmup=0.9 and decay=0.2"),
        ("optimizer.decay", -0.1, "decay=-0.1 must lie between 0 and 1"),
        ("evaluation.tokens", 1023, "evaluation.tokens=1023 must be at least longest_context=1024"),
        ("evaluation.longest_context", 1536, "must be a multiple of context_length=1024"),
        ("evaluation.longest_context", 512, "must be a multiple of context_length=1024"),
        ("parallel.data", 0, "data=0 must be -1 or greater than 0"),
        ("parallel.accumulation", 3, "accumulation=3 must divide the 64 sequences"),
        ("parallel.remat", "some", "remat='some' must be one of none, dots, full"),
        ("parallel.attention", "fast", "attention='fast' must be one of auto"),
        ("name", "", "name"),
        ("context_length", 1000, "batch_tokens=65536 must be a multiple of context_length=1000"),
        ("tokens_per_param", None, "exactly one of tokens and tokens_per_param"),
        ("tokens", 10**6, "exactly one of tokens and tokens_per_param"),
    ],
)
def test_nonsense_is_refused_when_built(path, value, said):
    refused(lambda: changed(run(), path, value), said)


def test_a_cosine_decays_after_whatever_warmup_and_takes_no_other_decay():
    assert OptimizerConfig(schedule="cosine", warmup=0.9).phases(100, 1) == (90, 10)
    refused(lambda: OptimizerConfig(schedule="cosine", decay=0.3), "decay=0.3 is for schedule wsd")


def test_from_dict_names_what_is_wrong():
    good = run().to_dict()

    def without(table: dict, key: str) -> dict:
        return {k: v for k, v in table.items() if k != key}

    def build(data: object):
        return lambda: RunConfig.from_dict(typing.cast(dict, data))

    heads = good["model"] | {"n_head": 8}
    refused(build(good | {"model": heads}), "unknown field model.n_head (did you mean n_heads?)")
    refused(build(good | {"sead": 1}), "unknown field sead (did you mean seed?)")
    refused(build(good | {"qqq": 1}), "unknown field qqq")
    refused(build(without(good, "context_length")), "missing field context_length")
    few = without(good["model"], "n_layers")
    refused(build(good | {"model": few}), "missing field model.n_layers")
    refused(build(good | {"model": [1]}), "ModelConfig in model must be a table of fields")
    refused(build([]), "RunConfig must be a table of fields")
    text = good["model"] | {"n_layers": "4"}
    refused(build(good | {"model": text}), "model.n_layers='4' must be of type int")


def test_fields_that_are_left_out_get_their_default():
    least = {
        "name": "a",
        "model": {"n_layers": 1, "d_model": 8, "n_heads": 1, "n_kv_heads": 1},
        "context_length": 8,
        "batch_tokens": 8,
        "tokens": 8,
    }
    assert RunConfig.from_dict(least) == RunConfig("a", ModelConfig(1, 8, 1, 1), 8, 8, tokens=8)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        run().seed = 3


# --------------------------------------------------------------------------- derived quantities


@given(st.integers(1, 10**5))
def test_default_ffn_is_eight_thirds_rounded_up_to_32(d):
    ffn = model(d_model=d).ffn_dim
    assert ffn % 32 == 0
    assert 8 * d <= 3 * ffn < 8 * d + 96


def test_derived_quantities():
    assert model(n_heads=8, n_kv_heads=2).group_size == 4
    assert model(d_ff=100).ffn_dim == 100
    assert run().batch_size == 64
    assert DataConfig(corpus="/a/texts/", tokenizer="/b/my.json").name == "texts-my"
    assert DataConfig().store_path == "data/stdlib-bytes"
    assert DataConfig(store="/fast/disk").store_path == "/fast/disk"


def test_question_refuses_nonsense():
    refused(lambda: Question(contexts=()), "contexts")
    refused(lambda: Question(contexts=(8192, 0)), "context=0")
    refused(lambda: Question(losses=(2.5, -1.0)), "target loss=-1.0")
    refused(lambda: Question(convention="per_batch"), "convention='per_batch'")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"contexts": ("a",)}, "contexts[0]='a' must be of type int"),
        ({"contexts": 8192}, "contexts=8192 must be a tuple of ints"),
        ({"contexts": "8192"}, "contexts='8192' must be a tuple of ints"),
        ({"contexts": (8192, 1.5)}, "contexts[1]=1.5 must be of type int"),
        ({"contexts": (True,)}, "contexts[0]=True must be of type int"),
        ({"losses": 2.5}, "losses=2.5 must be a tuple of floats"),
        ({"losses": ("low",)}, "losses[0]='low' must be of type float"),
        ({"baseline": "8,8"}, "baseline='8,8' must be a pair of heads such as (8, 8)"),
        ({"baseline": (8,)}, "baseline=(8,) must be a tuple of 2 ints"),
        (
            {"baseline": (8, 8, 8)},
            "ContextSharding in baseline[2] must be a table of fields, not 8",
        ),
        ({"baseline": (8, None)}, "baseline[1]=None must be of type int"),
        ({"weight": "0.9"}, "weight='0.9' must be of type float"),
        ({"memory_power": None}, "memory_power=None must be of type float"),
        ({"demonstration": "yes"}, "demonstration='yes' must be of type bool"),
    ],
)
def test_a_question_checks_the_type_of_every_field(fields, words):
    refused(lambda: Question(**fields), words)


def test_a_question_is_one_value_however_it_was_written():
    listed = Question(contexts=[8192], losses=[3], baseline=[8, 8])
    assert listed == Question(contexts=(8192,), losses=(3.0,), baseline=(8, 8))
    sharded = Question(baseline=(8, 8, ContextSharding(64, 4, 8)))
    for question in (listed, sharded):
        assert Question.from_dict(json.loads(json.dumps(question.to_dict()))) == question


def test_what_a_question_names_twice_is_asked_once():
    asked = Question(contexts=(64, 32, 64), losses=(2.0, 1.5, 2.0))
    assert (asked.contexts, asked.losses) == ((64, 32), (2.0, 1.5))
