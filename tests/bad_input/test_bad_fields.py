"""Values of fields and of arguments that no run or verb can have."""

import pytest
from bad_input_kit import HUGE, LONG, PLAN, TINY

WHOLE = [
    "model.n-layers",
    "model.d-model",
    "model.n-heads",
    "model.n-kv-heads",
    "model.head-dim",
    "model.d-ff",
    "model.vocab-size",
    "context-length",
    "batch-tokens",
    "tokens",
    "seed",
    "parallel.data",
    "parallel.fsdp",
    "parallel.context",
    "parallel.tensor",
    "parallel.accumulation",
    "evaluation.tokens",
    "evaluation.longest-context",
    "evaluation.every-steps",
    "checkpoint.every-steps",
    "checkpoint.keep",
    "max-nonfinite-steps",
]
REAL = [
    "model.rope-theta",
    "model.norm-eps",
    "optimizer.learning-rate",
    "optimizer.warmup",
    "optimizer.decay",
    "optimizer.final-fraction",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.epsilon",
    "optimizer.weight-decay",
    "optimizer.clip-norm",
    "optimizer.spike-factor",
    "tokens-per-param",
    "data.heldout-fraction",
]


@pytest.mark.parametrize("field", WHOLE)
def test_whole_numbers(refused, field):
    for value in (HUGE, "-" + HUGE, LONG, "-2", "nan", "1e3", "True"):
        err = refused("", *PLAN, f"--{field}={value}")
        assert field.rpartition(".")[2].replace("-", "_") in err.replace("-", "_")
        assert value in (LONG, HUGE, "-" + HUGE) or value in err


@pytest.mark.parametrize("field", REAL)
def test_real_numbers(refused, field):
    for value in ("nan", "inf", "-inf", "1e300", "-1e-3", LONG, "x"):
        err = refused("", *PLAN, f"--{field}={value}")
        assert field.rpartition(".")[2].replace("-", "_") in err.replace("-", "_")


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("n_layers=10001 must be at most 10,000", "--model.n-layers 10001"),
        ("n_heads=20000 must be at most 10,000", "--model.n-heads 20000"),
        ("d_model=2147483648 must be at most 2,147,483,647", "--model.d-model 2147483648"),
        ("seed=2147483648 must be at most 2,147,483,647", "--seed 2147483648"),
        ("seed=1099511627776", "--seed 1099511627776"),
        ("seed=-1 must not be negative", "--seed -1"),
        ("learning_rate=0.0 must be greater than 0", "--optimizer.learning-rate 0"),
        ("learning_rate=1e-300 must be at least 1.2e-38", "--optimizer.learning-rate 1e-300"),
        ("epsilon=1e-50 must be at least", "--optimizer.epsilon 1e-50"),
        ("at most 2,147,483,647 can be counted", "--tokens 999999999999999999"),
        ("at most 2,147,483,647 can be counted", "--tokens-per-param 1e30"),
        ("head_dim=7 must be even", "--model.head-dim 7"),
        ("dtype='fp8' must be one of", "--model.dtype fp8"),
        ("remat='all' must be one of", "--parallel.remat all"),
        ("attention='flash' must be one of", "--parallel.attention flash"),
        ("schedule='linear' must be one of", "--optimizer.schedule linear"),
        ("profile='1:99999999999999999999'", "--profile 1:99999999999999999999"),
        (f"profile='1:{LONG}'", f"--profile 1:{LONG}"),
        ("profile='5:3'", "--profile 5:3"),
        ("corpus must name a corpus", "--data.corpus="),
        ("a pattern needs", "--model.pattern.block 4"),
        (
            "block=2147483648 must be an integer",
            "--model.pattern.block 2147483648 --model.pattern.local 1",
        ),
        (f"block={HUGE}", f"--model.pattern.block {HUGE} --model.pattern.local 1"),
        ("stride=0 must be an integer", "--model.pattern.block 4 --model.pattern.local 1 "
         "--model.pattern.stride 0"),
        (
            "dense_layers='every 99999999999999'",
            "--model.pattern.block 4 --model.pattern.local 1 "
            "--model.pattern.dense-layers=every_99999999999999",
        ),
        (
            "a pattern may have at most 65,536 KV heads in all layers",
            "--model.pattern.block 4 --model.pattern.local 1 --model.n-layers 9999 --model.n-heads 8 "
            "--model.n-kv-heads 8",
        ),
        ("tokenizer='bpe-99999999999' must be bpe-N", "--data.tokenizer bpe-99999999999"),
        ("tokenizer='bpe-1000000000' must be bpe-N", "--data.tokenizer bpe-1000000000"),
        ("<= 4,194,304", "--data.tokenizer bpe-4194305"),
        ("tokenizer='bpe-0' must be bpe-N", "--data.tokenizer bpe-0"),
        ("tokenizer='bpe--1' must be bpe-N", "--data.tokenizer bpe--1"),
        ("tokenizer='bpe-1e9' must be bpe-N", "--data.tokenizer bpe-1e9"),
        ("tokenizer='bpe-' must be bpe-N", "--data.tokenizer bpe-"),
        ("must be bpe-N", "--data.tokenizer bpe-٣٠٠"),
        ("must be bpe-N", f"--data.tokenizer bpe-{LONG}"),
        ("tokenizer='gpt2' must be bytes", "--data.tokenizer gpt2"),
        ("tokenizer='' must be bytes", "--data.tokenizer="),
        ("note='a\\x00b' must not hold a NUL", "--note a\0b"),
        ("corpus='a\\x00b' must not hold a NUL", "--data.corpus a\0b"),
        ("store='a\\x00b' must not hold a NUL", "--data.store a\0b"),
        ("unknown field --foo\\nbar", "--foo\nbar 1"),
        ("--hardware takes one value, not '\\x1b[31m'", "\x1b[31m"),
    ],
)  # fmt: skip
def test_fields(refused, said, arguments):
    refused(said, *PLAN, *(part.replace("_9", " 9") for part in arguments.split(" ")))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("has 300 bytes and may have at most 242", "n" * 300),
        ("has 243 bytes", "n" * 243),
        ("has 244 bytes", "ñ" * 122),
        ("name must not be empty", ""),
        ("name='../x'", "../x"),
        ("name='a/b'", "a/b"),
        ("name='..'", ".."),
        ("name='-x'", "-x"),
        ("name='a b'", "a b"),
        ("name='a\\nb'", "a\nb"),
        ("name='run[seed1]'", "run[seed1]"),
        ("name='[/]'", "[/]"),
        ("name='a*'", "a*"),
        ("name='~'", "~"),
        ("must not hold a NUL", "a\0"),
        ("name='\\udcff'", "\udcff"),
        ("name='\\u202e'", "\u202e"),
        ("name=':smile:'", ":smile:"),
    ],
)
def test_names(refused, said, name):
    refused(said, *PLAN, f"--name={name}", "--only", "L1-h1")


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("unknown verb 'plna' (did you mean plan?)", "plna experiments.tiny"),
        ("--shard '1' must be i/n", "--shard 1"),
        ("--shard '-1/2' must be i/n", "--shard=-1/2"),
        ("--shard '2/2' must be i/n", "--shard 2/2"),
        (f"--shard '0/{LONG}' must be i/n", f"--shard 0/{LONG}"),
        ("--only '' matches", "--only [!x"),
        ("devices=0", "--hardware v5e --devices 0"),
        ("devices=-3", "--hardware v5e --devices -3"),
        ("invalid int value: 'nan'", "--hardware v5e --devices nan"),
        (HUGE, f"--hardware v5e --devices {HUGE}"),
        ("--mfu: nan must be a finite number", "--hardware v5e --mfu nan"),
        ("--mfu: inf must be a finite number", "--hardware v5e --mfu inf"),
        ("mfu=0.0", "--hardware v5e --mfu 0"),
        ("--price: nan must be a finite number", "--hardware v5e --price nan"),
        ("--price: inf must be a finite number", "--hardware v5e --price inf"),
        ("price=-1.0", "--hardware v5e --price -1"),
        ("unknown hardware ''", "--hardware="),
        ("unknown hardware '[red]'", "--hardware [red]"),
        ("unknown slice ''", "--compile="),
        ("no v5e slice is 0x0", "--compile v5e:0x0"),
        ("v5e:99999999999x4", "--compile v5e:99999999999x4"),
        (f"v5e:{LONG}x4", f"--compile v5e:{LONG}x4"),
        ("0xv5e:2x2", "--compile 0xv5e:2x2"),
    ],
)
def test_arguments_of_plan(refused, said, arguments):
    verb = () if arguments.startswith("plna") else ("plan", TINY)
    refused("" if said.startswith("--only") else said, *verb, *arguments.split(" "))


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("--workers 0 must be", "run experiments.tiny --workers 0"),
        ("--workers -1 must be", "run experiments.tiny --workers -1"),
        ("invalid int value: 'two'", "run experiments.tiny --workers two"),
        ("--workers 0 must be", "prepare experiments.tiny --workers 0"),
        ("--workers -2 must be", "prepare experiments.tiny --workers -2"),
        ("invalid int value: '1.5'", "prepare experiments.tiny --workers 1.5"),
        ("--watch is for people", "status experiments.tiny --watch --json"),
        ("--watch needs a terminal", "status experiments.tiny --watch"),
        ("unexpected argument 'extra'", "learning-rates experiments.tiny extra"),
        ("unknown experiment 'experiments.tinny'", "checkpoints experiments.tinny"),
        ("unknown experiment 'experiments'", "checkpoints experiments/none"),
        ("neither a run nor a folder of runs", "checkpoints experiments"),
        ("experiments is a directory: --only", "checkpoints experiments --only x"),
        ("experiments is a directory: --only", "checkpoints experiments --seed 1"),
        ("unknown experiment 'x\\ny'", "status x\ny"),
    ],
)
def test_arguments_of_other_verbs(refused, said, arguments):
    refused("" if "none" in arguments else said, *arguments.split(" "))
