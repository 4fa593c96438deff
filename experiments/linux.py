"""Which heads at 20 tokens a parameter? Some twenty-five hours of two CPU cores.

    gqa-scaling fetch linux-6.1                           # 139 MB from Debian, no account
    gqa-scaling prepare experiments.linux
    gqa-scaling restore studies/linux_lr.csv              # these four to go on from the runs that are kept
    gqa-scaling restore studies/linux.csv
    gqa-scaling restore studies/linux_equal_tokens.csv
    gqa-scaling restore studies/linux_all_text.csv
    gqa-scaling run experiments.linux@lr --workers 2      # the learning rate, at three sizes
    gqa-scaling run experiments.linux --workers 2         # on a GPU without --workers
    gqa-scaling report experiments.linux
    gqa-scaling run experiments.linux@equal_tokens --workers 2
    gqa-scaling run experiments.linux@all_text --workers 2

Six sizes spanning 30x, each trained on 20 tokens for each of its own parameters as Chen et al. 2025
do, and eight head configurations: query heads from 2 to 16 at one KV head, KV heads from 1 to 8 at
eight query heads, and MHA with 2, 4 and 8. Two more seeds of four cells tell what is noise; the last two were
added when runs of these sizes were seen to differ in whether they had learned to copy from their context. The last run
is three times as large as any other, to be forecast from them (`gqa-scaling forecast`) before it begins.

`equal_tokens` is what that asked for: three of the widths again, each run on the same 16M tokens, some three
times what it took those that had learned to copy. The runs are new from their first step on, as is their seed. Its last
run has the shape of the largest above, for what is forecast of it to be seen in hours instead of a day.

`all_text` asks once more, with other seeds, and by 16 times as much held-out text of all kinds: the runs above were judged by
the beginning of the held-out split, which is a part of `Documentation/`.
"""

from dataclasses import replace

from gqa_scaling.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Question,
    RunConfig,
)

LARGEST = (8, 232), (4, 4)  # 4.0M parameters
VARIANTS = ("lr", "equal_tokens", "all_text")
QUESTION = Question(contexts=(2048, 8192, 32768), baseline=(8, 8))
SIZES = ((2, 32), (3, 48), (4, 64), (4, 88), (5, 112), (6, 144))  # L, d
HEADS = ((8, 8), (8, 2), (8, 1), (16, 1), (4, 4), (4, 1), (2, 2), (2, 1))  # <- what is varied


def rate_at(d: int) -> float:
    """The maximum learning rate at width d.

    A power law through the optima of the sweep, each that of a parabola in ln(rate) through the three
    best: 0.019, 0.0091 and 0.0074 at widths 32, 48 and 64 (studies/linux_lr.csv). Larger sizes were not
    swept.
    """
    return float(f"{6.9e-3 * (64 / d) ** 1.39:.2g}")


def run(
    size: tuple[int, int],
    heads: tuple[int, int],
    seed: int = 0,
    learning_rate: float | None = None,
    name: str = "",
) -> RunConfig:
    """One cell of the grid."""
    (L, d), (n_h, n_kv) = size, heads
    return RunConfig(
        name=f"L{L}-d{d}-h{n_h}-kv{n_kv}" + (f"-seed{seed}" if seed else "") + name,
        model=ModelConfig(L, d, n_h, n_kv, head_dim=16, vocab_size=1024, dtype="float32"),
        data=DataConfig(corpus="linux-6.1", tokenizer="bpe-1024"),
        context_length=256,
        batch_tokens=2048,
        tokens_per_param=20.0,
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=learning_rate or rate_at(d)),
        evaluation=EvaluationConfig(tokens=2**18),
        checkpoint=CheckpointConfig(every_steps=500),
    )


def runs(variant: str = "") -> list[RunConfig]:
    """Sizes x heads, the smallest first, each with its replicate seeds, and one run of a far larger size."""
    if variant == "lr":
        return learning_rate_runs()
    if variant == "equal_tokens":
        return equal_token_runs()
    if variant == "all_text":
        return all_text_runs()
    grid = [run(size, heads) for size in SIZES for heads in HEADS]
    replicates = [(SIZES[1], (8, 8)), (SIZES[2], (4, 1)), (SIZES[2], (8, 8)), (SIZES[3], (8, 2))]
    seeds = [run(size, heads, seed) for size, heads in replicates for seed in (1, 2)]
    return sorted([*grid, *seeds, run(*LARGEST)], key=lambda r: r.model.d_model)


def learning_rate_runs() -> list[RunConfig]:
    """The three smallest sizes with MHA, a factor of two between rates, another seed than any cell."""
    rates = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    return [run(size, HEADS[0], 1000, rate, f"-lr{rate:g}") for size in SIZES[:3] for rate in rates]


def equal_token_runs() -> list[RunConfig]:
    """Three widths x heads on 16M tokens, the middle one first, two more seeds of a cell at two of them, and
    the far larger size."""
    cells = [(size, heads, 3) for size in (SIZES[2], SIZES[3], SIZES[1]) for heads in HEADS]
    seeds = [(size, (8, 1), seed) for size in (SIZES[2], SIZES[1]) for seed in (4, 5)]
    return [on_equal_tokens(*cell) for cell in [*cells, *seeds, (*LARGEST, 3)]]


def all_text_runs() -> list[RunConfig]:
    """The widths at which most runs learn to copy x heads on 16M tokens, and one of them with another seed."""
    much = EvaluationConfig(tokens=2**22)
    return [
        replace(on_equal_tokens(size, heads, seed), evaluation=much)
        for size, seed in ((SIZES[3], 6), (SIZES[2], 6), (SIZES[4], 6), (SIZES[3], 7))
        for heads in HEADS
    ]


def on_equal_tokens(size: tuple[int, int], heads: tuple[int, int], seed: int) -> RunConfig:
    """One cell, trained on 16M tokens whatever its size."""
    return replace(run(size, heads, seed, name="-16M"), tokens=16_000_000, tokens_per_param=None)
