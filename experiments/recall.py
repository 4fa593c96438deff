"""What do few KV heads and sparse patterns lose where reading far is what counts? An hour of a CPU.

    gqa-scaling prepare experiments.recall
    gqa-scaling run experiments.recall --workers 2
    gqa-scaling report experiments.recall

Models this small do not learn to use distant text (docs/context_sharding.md). So two fifths of the text are
associative recall: pairs of rare tokens that are told once and asked for again anywhere in the
context. Judged by needles at several lengths and depths, and by the loss of the same text with
less of it before.
"""

from gqa_scaling.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Needles,
    NeedleTask,
    OptimizerConfig,
    Question,
    RunConfig,
)
from gqa_scaling.context_sharding import ContextSharding

QUESTION = Question(contexts=(128, 1024), baseline=(8, 8), demonstration=True)
WINDOW = ContextSharding(block=8, local=4)
STRIPES = ContextSharding(block=8, local=4, stride=4)
MODELS = {  # <- what is compared: query heads, KV heads, pattern
    "dense-h8-kv8": (8, 8, None),
    "dense-h4-kv1": (4, 1, None),
    "window32-h8-kv8": (8, 8, WINDOW),
    "w32s4-h8-kv8": (8, 8, STRIPES),
}
STEPS = 600
SEEDS = (0, 1, 2)


def run(name: str, seed: int = 0, steps: int = STEPS) -> RunConfig:
    """Two layers, which recall takes at the least: to find the pair, and to copy from it."""
    n_heads, n_kv_heads, pattern = MODELS[name]
    return RunConfig(
        name=name + (f"-seed{seed}" if seed else "") + ("" if steps == STEPS else "-untrained"),
        model=ModelConfig(
            n_layers=2,
            d_model=64,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=16,
            vocab_size=264,
            rope_theta=10_000.0,
            dtype="float32",
            pattern=pattern,
        ),
        data=DataConfig(
            corpus="stdlib", tokenizer="bytes", needles=Needles(share=0.4, form="tokens")
        ),
        context_length=128,
        batch_tokens=2048,
        tokens=steps * 2048,
        optimizer=OptimizerConfig(learning_rate=5e-3),
        evaluation=EvaluationConfig(
            tokens=2**16,
            contexts=(16, 32, 64, 128),
            needles=NeedleTask(lengths=(32, 64, 96, 128), form="tokens"),
        ),
        checkpoint=CheckpointConfig(every_steps=200),
        seed=seed,
    )


def runs() -> list[RunConfig]:
    """Every model with every seed, and one after its first step: what chance gives."""
    trained = [run(name, seed) for seed in SEEDS for name in MODELS]
    return [*trained, run("dense-h8-kv8", steps=1)]
