# %% [markdown]
# # A study from declaration to figure
#
# Four head configurations of small byte-level models, three sizes each: declared, trained, fitted, answered,
# drawn. Some minutes on two CPU cores. Open it in Jupyter or VS Code, where `# %%` begins a cell, or run it
# as a script; interrupted, it continues. What each function takes and gives is in docs/api.md.

# %%
import matplotlib.pyplot as plt

from gqa_scaling import api
from gqa_scaling.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Question,
    RunConfig,
)

CORPUS = "stdlib"  # the source of Python's standard library; or a folder of text files
STEPS = 600
SIZES = ((1, 32), (2, 48), (3, 72))  # layers, width
HEADS = ((4, 4), (4, 1), (2, 1), (1, 1))  # query heads, KV heads

# %% [markdown]
# ## Declare
# A run is a plain object; its fields are those of `RunConfig`, and nonsense is refused here.


# %%
def declared(layers: int, width: int, n_heads: int, n_kv_heads: int) -> RunConfig:
    """A run of this size with these heads."""
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": 8}
    return RunConfig(
        name=f"L{layers}-d{width}-h{n_heads}-kv{n_kv_heads}",
        model=ModelConfig(layers, width, **heads, vocab_size=264, dtype="float32"),
        data=DataConfig(corpus=CORPUS),
        context_length=64,
        batch_tokens=1024,
        tokens=1024 * STEPS,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        evaluation=EvaluationConfig(tokens=2**14),
    )


runs = [declared(*size, *heads) for size in SIZES for heads in HEADS]
question = Question(contexts=(1024, 8192), baseline=(4, 4), demonstration=True)
experiment = api.declare("notebook", runs, question)

# %% [markdown]
# ## Train
# What has a result already is not trained again.

# %%
api.train(experiment)

# %% [markdown]
# ## Look at the runs

# %%
trained = api.read(experiment)
table = api.columns(trained)  # or api.frame(trained), with pandas
for name, n, loss in zip(table["name"], table["n_params"], table["loss"], strict=True):
    print(f"{name:20} N = {n:7,.0f}  {loss:.3f} nats")

# %% [markdown]
# ## Fit and answer

# %%
fitted = api.fit(trained)
api.show(fitted)

# %%
between = sorted(fitted.fit.points.loss)[len(runs) // 2]
study = api.frontier(trained, losses=[round(float(between), 2)])
api.show(study)

# %% [markdown]
# ## A figure of one's own
# `api.plot` draws on any axes, in the style that is set; the rest is plain matplotlib.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
api.plot(left, study, "losses")
left.legend(title="heads, KV", frameon=False)
api.plot(right, study, "memory")
answer = study.frontier.headline
right.axhline(answer.loss, color="grey", linewidth=0.8)
best = answer.best
right.set_title(
    f"{best.heads} at {answer.context:,} tokens: {best.saving['memory']:.0%} less memory"
)
figure.savefig("notebook.png", dpi=150)

# %% [markdown]
# ## What a model has learnt

# %%
model = api.load(experiment, runs[-1].name)
print(model.write("import ", tokens=40, temperature=0.8)[0])
