"""The Python interface: what the command line does, for notebooks and scripts (docs/api.md).

Nothing heavy is imported until a function needs it; what is asked of a study never loads jax.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_scaling.config import Question, RunConfig, UserError, require

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from matplotlib.axes import Axes

    from gqa_scaling.experiment.load import Experiment
    from gqa_scaling.inference.generate import Decoder
    from gqa_scaling.inference.trained import Trained
    from gqa_scaling.study.candidates import Which
    from gqa_scaling.study.choices import Law, Objective
    from gqa_scaling.study.estimates import Estimates
    from gqa_scaling.study.predict import Expected
    from gqa_scaling.study.results import Heads
    from gqa_scaling.study.serving import Serving
    from gqa_scaling.study.source import Source
    from gqa_scaling.study.study import Study
    from gqa_scaling.study.versus import Versus

# ------------------------------------------------------------------------------ runs and tables


def declare(name: str, runs: Iterable[RunConfig], question: Question | None = None) -> "Experiment":
    """An experiment that is declared here instead of in a module of its own.

    Its runs lie in the folder `name` of all runs. Raises UserError for no runs, or two of one name.
    """
    from gqa_scaling.experiment.grid import unique
    from gqa_scaling.experiment.load import Experiment
    from gqa_scaling.experiment.starts import parents_first

    found = list(runs)
    require(bool(found), f"{name}: an experiment needs at least one run")
    ordered = tuple(parents_first(unique(found)))
    return Experiment(name, ordered, question or Question(), ordered)


def train(experiment: "Experiment", root: str | Path | None = None) -> None:
    """Make the tokens that its runs need and train those that have no result, in this process.

    It may be interrupted at any moment, and called again. `root` is the folder of all runs, by default
    $GQA_SCALING_RUNS or runs. Raises UserError for what you can mend, and where a run failed.
    """
    from gqa_scaling.data.build import prepare
    from gqa_scaling.data.store import stores_of
    from gqa_scaling.files.runs import run_directory, runs_root
    from gqa_scaling.sweep.run import run_sweep

    for data in stores_of(experiment.runs).values():
        prepare(data, show=False)
    folder = runs_root(None if root is None else str(root))
    if run_sweep(experiment, folder).failed:
        runs = ((run, run_directory(folder, experiment.name, run)) for run in experiment.runs)
        failed = [run.name for run, directory in runs if directory.failure_file.exists()]
        raise UserError(f"{experiment.name}: {', '.join(failed)} failed; see gqa-scaling status")


def read(
    source: "str | Path | Experiment",
    overrides: Sequence[str] = (),
    *,
    without: Sequence[str] = (),
    root: str | Path | None = None,
) -> "Source":
    """The finished runs of an experiment (experiments.smoke, a path, or one declared here), of a CSV
    file, or `chen2025`, the published ones.

    `overrides` change an experiment's fields as on the command line: ["--seed", "1"]. `without` leaves
    runs out, by patterns of their names, and configurations such as 8,1. Raises UserError for what
    cannot be read or compared.
    """
    from gqa_scaling.study.source import read_source

    what = str(source) if isinstance(source, str | Path) else source
    return read_source(what, overrides, None if root is None else str(root), without)


def _runs(source: "Source | str | Path | Experiment") -> "Source":
    from gqa_scaling.study.source import Source

    return source if isinstance(source, Source) else read(source)


def columns(source: "Source | str | Path | Experiment") -> "dict[str, np.ndarray]":
    """The table of the runs, an array for each column, in the units of docs/api.md."""
    import numpy as np

    rows = _runs(source).results.rows()
    return {
        name: np.array([np.nan if row[name] is None else row[name] for row in rows])
        for name in rows[0]
    }


def frame(source: "Source | str | Path | Experiment") -> "pandas.DataFrame":
    """The same as a pandas frame. Raises UserError where pandas is not installed."""
    try:
        import pandas
    except ModuleNotFoundError:
        raise UserError("pandas is not installed: pip install pandas, or take columns()") from None
    return pandas.DataFrame(columns(source))


# -------------------------------------------------------------------------------- what they say


def fit(
    source: "Source | str | Path | Experiment", *, law: "Law" = "separate", **options: Any
) -> "Estimates":
    """The loss laws that the runs allow, with `refits` (1000) bootstrap draws.

    Options: refits, seed, context_length (runs of one training context alone), flat_from, at_tokens.
    Raises UserError for too few runs, and for a law that they do not allow.
    """
    from gqa_scaling.study.estimates import estimate

    return estimate(_runs(source).results, law=law, **options)


def predict(
    source: "Source | str | Path | Experiment",
    found: "Estimates",
    model: str,
    n: float | None = None,
    *,
    train_context: int | None = None,
    tokens: float | None = None,
) -> "Expected":
    """The loss that is expected of a model, with 90% intervals of one run and of the curve.

    `model` is a whole one such as 8,1@L24d1536, or heads such as 8,1 with N = `n`, trained or not;
    `found` is what `fit` made of the source. `train_context` and `tokens` are those of training: where
    the runs do not tell what they do, only the runs' own. Raises UserError for what the study does not
    speak of.
    """
    from gqa_scaling.study.ask import predict_one

    return predict_one(_runs(source), found, model, n, train_context, tokens)


def frontier(
    source: "Source | str | Path | Experiment",
    *,
    losses: Sequence[float] | None = None,
    contexts: Sequence[int] | None = None,
    candidates: "Which | Sequence[Heads | str] | None" = None,
    objective: "Objective" = "z",
    serving: "Serving | None" = None,
    law: "Law | None" = None,
    refits: int = 1000,
    context_length: int | None = None,
    **question: Any,
) -> "Study":
    """The cheapest configuration for each target loss (nats) and context (tokens), and how sure it is.

    What is not named is as the source's question has it. `question` are its other fields: baseline,
    convention, weight, memory_power, compute_power, indifference (0.01 is 1%). `candidates` are
    "all", "measured" or heads [(8, 1), "4,1"]. Raises UserError for what cannot be answered.
    """
    from gqa_scaling.study.ask import answer, asked

    changes = {**_question(losses, contexts), **question}
    how: dict[str, Any] = {"refits": refits, "context_length": context_length}
    runs = _runs(source)
    named = candidates is None or isinstance(candidates, str)
    which: Any = candidates if named else [_heads(heads) for heads in candidates or ()]
    asking = asked(runs.question, **changes)
    return answer(runs, asking, objective, serving, which=which, law=law, **how)


def compare(
    source: "Source | str | Path | Experiment",
    first: str,
    second: str,
    *,
    losses: Sequence[float] | None = None,
    contexts: Sequence[int] | None = None,
    objective: "Objective" = "z",
    serving: "Serving | None" = None,
    law: "Law | None" = None,
    refits: int = 1000,
    context_length: int | None = None,
    **question: Any,
) -> "Versus":
    """Which of two is cheaper or better, by how much and how sure: heads 8,1 or models 8,1@L24d1536.

    Two that were trained are compared by curves of their own, others as `frontier` ranks them. The
    rest is as there.
    """
    from gqa_scaling.study.ask import compare_two

    changes = {**_question(losses, contexts), **question}
    how: dict[str, Any] = {"refits": refits, "context_length": context_length}
    return compare_two(_runs(source), first, second, changes, objective, serving, law=law, **how)


def _heads(heads: "Heads | str") -> "Heads":
    """Heads as (8, 1) or as they are typed, 8,1."""
    from gqa_scaling.baselines import written_heads

    found = written_heads(heads) if isinstance(heads, str) else heads
    if found is None:
        raise UserError(f"candidates={heads!r} must be heads such as (8, 1) or '8,1'")
    return found


def _question(
    losses: Sequence[float] | None, contexts: Sequence[int] | None
) -> dict[str, tuple | None]:
    return {
        "losses": None if losses is None else tuple(losses),
        "contexts": None if contexts is None else tuple(contexts),
    }


# ------------------------------------------------------------------------------ showing them


def show(found: "Estimates | Study | Versus") -> None:
    """Print what the command line prints of it: `gqa-scaling fit`, `frontier` or `compare`."""
    from gqa_scaling.cli.shared import print_table
    from gqa_scaling.study.estimates import Estimates
    from gqa_scaling.study.report import answers, compared, estimates
    from gqa_scaling.study.report.sentences import training
    from gqa_scaling.study.report.table import shown
    from gqa_scaling.study.study import Study

    if isinstance(found, Estimates):
        tables = [*estimates.law_tables(found), estimates.residual_table(found.fit)]
        print_table(shown(tables, found.fit.flags))
    elif isinstance(found, Study):
        print_table(answers.frontier_answer(found.frontier))
        print(training(found.frontier))
    else:
        print_table(compared.compared(found))


def plot(axes: "Axes", found: "Study | Estimates", what: str = "losses") -> None:
    """Draw on matplotlib axes of your own, in your own style; `axes.legend()` names the heads.

    Of a fit: "losses" (runs, curves and 90% bands over N) and "residuals". Of a study too: "memory",
    "flops" and "z" (losses against these costs at the longest context), "heat_map" and
    "probabilities". Raises UserError for what there is not.
    """
    from gqa_scaling.study.report.pictures import ON_AXES
    from gqa_scaling.study.study import Study

    known = ON_AXES if isinstance(found, Study) else ("losses", "residuals")
    require(what in known, f"{what!r} cannot be drawn of this; take one of {', '.join(known)}")
    draw: Callable[[Axes, Any], None] = ON_AXES[what]
    draw(axes, found)


# ------------------------------------------------------------------------------ a trained model


@dataclass(frozen=True)
class LoadedModel:
    """A finished run at work. `run` is its config, `result` what result.json tells of it."""

    trained: "Trained"

    @property
    def run(self) -> RunConfig:
        return self.trained.run

    @property
    def result(self) -> dict[str, Any]:
        return self.trained.result

    @functools.cached_property
    def _decoder(self) -> "Decoder":
        return self.trained.decoder()

    def logits(self, text: str) -> "np.ndarray":
        """Logits after each token of the text, (tokens, vocabulary) in float32.

        On a CPU they are computed in float32, elsewhere in the model's dtype. Raises UserError for an
        empty text, and for one of more tokens than the model was trained on.
        """
        import numpy as np

        tokenizer, longest = self.trained.tokenizer(), self.run.context_length
        tokens_T = tokenizer.encode([text])[0]
        count = len(tokens_T)
        require(0 < count <= longest, f"a text of {count:,} tokens: give it 1 to {longest:,}")
        logits_TV = np.asarray(self._logits(tokens_T[None].astype(np.int32)))[0]
        return logits_TV[:, : tokenizer.vocab_size]  # rows beyond were never trained towards

    @functools.cached_property
    def _logits(self) -> Callable:
        """Tokens (B, T) to logits (B, T, V), compiled once for each shape."""
        import jax
        from flax import nnx

        from gqa_scaling.inference.decode import for_platform
        from gqa_scaling.model.einsum import full_precision

        run = replace(self.run, model=for_platform(self.run.model))
        graph, parameters = nnx.split(replace(self.trained, run=run).model())

        @jax.jit
        def logits(parameters: Any, tokens_BT: Any) -> Any:
            model = nnx.merge(graph, parameters)
            with full_precision(run.model.dtype):
                return model.logits(model(tokens_BT))

        return functools.partial(logits, parameters)

    def write(
        self,
        *prompts: str,
        tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        context: int | None = None,
    ) -> list[str]:
        """What the model writes after each prompt, as `generate` has it.

        Raises UserError for options that cannot be and prompts that leave no room in the context.
        """
        from gqa_scaling.inference.generate import Generation
        from gqa_scaling.inference.sampling import Sampling
        from gqa_scaling.inference.text import texts_of

        tokenizer = self.trained.tokenizer()
        generation = Generation(
            self._decoder,
            self.trained.tokens_of(prompts),
            tokens=tokens,
            context=context or self.run.context_length,
            sampling=Sampling(temperature, top_k, top_p),
            seeds=seed,
            stop=self.trained.stops,
        )
        return list(texts_of(generation, tokenizer))[-1]


def load(
    run: "str | Path | Experiment",
    name: str | None = None,
    *,
    overrides: Sequence[str] = (),
    root: str | Path | None = None,
) -> LoadedModel:
    """A finished run: its directory, EXPERIMENT:NAME, or an experiment declared here and a name.

    `overrides` change an experiment's fields as on the command line. Raises UserError where there is
    no such run, it is not finished, or a file of it is damaged.
    """
    from gqa_scaling.experiment.load import named_run, run_of
    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.inference.trained import open_trained

    folder = None if root is None else str(root)
    if isinstance(run, str | Path):
        spec = str(run) if name is None else f"{run}:{name}"
        return LoadedModel(open_trained(named_run(spec, overrides, folder)))
    require(name is not None and not overrides, f"name one of the runs of {run.name}, as it is")
    found = run_of(run, str(name), runs_root(folder), run.name, "api.train")
    return LoadedModel(open_trained(found))
