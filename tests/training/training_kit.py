"""A tiny experiment on generated text, for tests that train. Also run as a process of its own:

python training_kit.py MOMENT      train in the working directory, killed with SIGKILL at MOMENT
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from gqa_scaling.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)

EXPERIMENT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from training_kit import tiny_run

def runs():
    return [tiny_run()]
"""
WORDS = ("loss", "heads", "cache", "query", "token", "layer", "scale", "mesh", "the", "of", "a")


def write_corpus(folder: Path, documents: int = 40) -> None:
    """Text that is cheap to make and has something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for i in range(documents):
        lines = (" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(40))
        (folder / f"{i:03d}.txt").write_text("\n".join(lines))


def make_workplace(folder: Path) -> None:
    """A folder with a prepared corpus and tiny.py, an experiment of one `tiny_run`."""
    from gqa_scaling.data import prepare

    write_corpus(folder / "corpus")
    (folder / "tiny.py").write_text(EXPERIMENT)
    with contextlib.chdir(folder):
        prepare(tiny_run().data, show=False)


def result_of(root: Path) -> str:
    """What the run of tiny.py is worth; where its tokens lay is part of its config, not of that."""
    from gqa_scaling.files.runs import run_directory

    whole = run_directory(root, "tiny", tiny_run()).result()
    assert whole is not None
    whole["result"]["config"]["data"].pop("store")
    return json.dumps(whole["result"], sort_keys=True)


def tiny_run(name: str = "tiny", **changes: object) -> RunConfig:
    """A run of 24 steps that takes a few seconds; `corpus` lies in the working directory."""
    run = RunConfig(
        name=name,
        model=ModelConfig(2, 16, 4, 2, head_dim=4, vocab_size=264, dtype="float32"),
        data=DataConfig(corpus="corpus", heldout_fraction=0.2),
        context_length=32,
        batch_tokens=128,
        tokens=24 * 128,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        evaluation=EvaluationConfig(tokens=1024),
        checkpoint=CheckpointConfig(every_steps=5),
    )
    return dataclasses.replace(run, **changes)


def traced_steps(folder: Path) -> list[int]:
    """The steps that the one trace below a run's folder holds."""
    import jax

    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    trace = jax.profiler.ProfileData.from_file(str(file))
    events = (e for plane in trace.planes for line in plane.lines for e in line.events)
    with warnings.catch_warnings():
        # From Python 3.12 on C++ is warned of a type of its own; as an error that ends the process.
        kind = "builtin type event_stats has no __module__ attribute"
        warnings.filterwarnings("ignore", kind, DeprecationWarning)
        return sorted({dict(e.stats)["step_num"] for e in events if e.name == "train"})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(moment: str) -> None:
    """Have this process killed at a moment of its run: compilation, save, evaluation or step N."""
    from gqa_scaling.files import checkpoint
    from gqa_scaling.training import loop, speed

    if moment == "compilation":
        import jax

        jax.config.update("jax_enable_compilation_cache", False)
        place = loop.parallel.BatchLayout.place

        def first_batch(*args: object) -> object:
            threading.Timer(0.3, die).start()  # compiling the step takes longer than that
            return place(*args)

        loop.parallel.BatchLayout.place = first_batch
    elif moment == "save":
        save = checkpoint.Checkpoints.save

        def save_and_die(self: object, step: int, *args: object) -> None:
            save(self, step, *args)  # returns while the files are being written
            if step == 10:
                die()

        checkpoint.Checkpoints.save = save_and_die
    elif moment == "evaluation":
        make = loop.evaluator

        def make_and_die(*args: object) -> object:
            evaluate = make(*args)  # on a few targets during training, on all of them after it
            return lambda parameters, *few: evaluate(parameters, *few) if few else die()

        loop.evaluator = make_and_die
    elif moment.startswith("step"):
        tick = speed.Speed.step_ended

        def tick_or_die(self: object, step: int) -> None:
            if step == int(moment.removeprefix("step")):
                die()
            tick(self, step)

        speed.Speed.step_ended = tick_or_die
    else:
        raise ValueError(moment)


def disturb(process: str, what: str) -> None:
    """In one process of a job, as "1:TERM:7" asks: a signal or an error at a step.

    After a SIGTERM, or from "SLOW" on, steps are slow, so that some are left when all stop.
    """
    from gqa_scaling.training import speed

    which, act, at = what.split(":")
    tick = speed.Speed.step_ended

    def disturbed(self: object, step: int) -> None:
        tick(self, step)
        if process == which and step == int(at) and act != "SLOW":
            if act == "ERROR":
                raise RuntimeError(f"process {process} fails at step {step}")
            os.kill(os.getpid(), signal.Signals[f"SIG{act}"])
        if act in ("TERM", "SLOW") and step >= int(at):
            time.sleep(0.05)

    speed.Speed.step_ended = disturbed


if __name__ == "__main__":
    from gqa_scaling.data import open_store
    from gqa_scaling.files.claims import claim
    from gqa_scaling.files.runs import run_directory
    from gqa_scaling.training.loop import train

    arrange(sys.argv[1])
    run = tiny_run()
    directory = run_directory("runs", "tiny", run)
    with claim(directory.claim_file) as mine:
        assert mine
        train(run, directory, open_store(run.data))
