"""What the verbs cost with many runs: processor seconds, and how often they ask the disk.

    python benchmarks/many_runs.py
    python benchmarks/many_runs.py --runs 168 --verbs status report

Makes run directories of grids of 168 and of 1,680 runs: the 21 published head configurations at 8
sizes, and at 20 sizes with four seeds of each, with losses of a law and 0.2% noise, 500 logged steps
each; of twelve one has failed half-way and one has not begun. Each verb then is a process of its own. Shown are processor
seconds (user and system; wall time in brackets), the exponent that they grow with between the two
grids after the start, which is that of `--version`, files opened and asked for (stat, listing) in the
folder of the runs, for each run, and peak memory. --slow 5 has a disk take 5 ms for each of these, as
one in a network may: read the wall time then.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from gqa_scaling import costs
from gqa_scaling.config import RunConfig
from gqa_scaling.experiment.ladder import TRAINED_SIZES, Size
from gqa_scaling.experiment.scales import FULL
from gqa_scaling.files.runs import run_directory

VERBS = {
    "start": "--version",
    "plan": "plan {spec} --root {root} --hardware v5e --devices 64",
    "status": "status {spec} --root {root}",
    "disk": "disk --root {root}",
    "show": "show {spec}:{run} --root {root}",
    "results": "results {spec} --root {root}",
    "fit": "fit {spec} --root {root}",
    "frontier": "frontier {spec} --root {root}",
    "suggest": "suggest {spec} --root {root}",
    "report": "report {spec} --root {root} --output {root}/report.html",
}
MODULE = """import sys
sys.path.insert(0, {here!r})
from many_runs import grid
from gqa_scaling.config import Question
QUESTION = Question(contexts=(8192, 131072), baseline=(8, 8))
def runs():
    return grid({count})
"""
LOGGED = 500  # steps, about as many as a run logs
HELD_OUT = {"bits_per_byte": 1.0, "hash": "0" * 64, "loss_by_position": [2.0] * 32}
DATA = {"tokenizer_hash": "1" * 64, "corpus_hash": "2" * 64, "store_hash": "3" * 64}
LAYOUT = {"device": "TPU v5e", "processes": 16, "attention": "splash", "mesh": {"fsdp": 64}}


def grid(count: int) -> list[RunConfig]:
    """168 runs, or more: 84 of each further size, with four seeds."""
    if count == 168:
        return [FULL.run(size, heads) for size in reversed(TRAINED_SIZES) for heads in FULL.heads]
    sizes = [Size(f"L{L}-d{64 * L}", L, 64 * L, 3e-4) for L in range(10, 10 + count // 84)]
    runs = [FULL.run(size, heads) for size in reversed(sizes) for heads in FULL.heads]
    return [
        replace(run, name=f"{run.name}-seed{seed}", seed=seed) for run in runs for seed in range(4)
    ]


def loss_of(run: RunConfig) -> float:
    """A law of about the published losses, in nats."""
    m, n = run.model, costs.parameters(run.model).non_embedding
    excess = 0.78 * m.n_heads**-0.065 * m.n_kv_heads**-0.02 * (n / 4e8) ** -0.2
    return 1.9 + excess


def make(root: Path, count: int) -> None:
    """The run directories, as training leaves them but for the trained parameters."""
    for i, run in enumerate(grid(count)):
        if i % 12 == 3:
            continue
        rng = np.random.default_rng((count, i))
        loss = loss_of(run) * (1 + 0.002 * rng.standard_normal())
        steps, directory = costs.training_steps(run), run_directory(root, "study", run)
        finished, began = i % 12 != 7, 1.76e9 + 3600 * i
        directory.begin(run, DATA)
        attempt = {"began": began, "first_step": 0, "layout": LAYOUT, "damaged_checkpoints": []}
        directory.add_attempt(attempt)
        logged = np.unique(np.linspace(1, steps if finished else steps // 2, LOGGED).astype(int))
        rate = {"perf/step_time_seconds": 1.0, "perf/mfu": 0.5, "perf/checkpoint_seconds": 10.0}
        rate |= {"perf/per_device_tokens_per_sec": 8192.0, "perf/evaluation_seconds": 10.0}
        lines = [
            {"step": int(step), "time": began + step, "learning/grad_norm": 1.0}
            | {"learning/loss": loss + 8 / (1 + step / 20), "learning/current_learning_rate": 1e-3}
            | rate
            for step in logged
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        directory.metrics_file.write_text(text)
        if not finished:
            directory.fail("Traceback ...\nRuntimeError: out of memory", "RuntimeError")
            continue
        result = {
            "name": run.name,
            "digest": run.digest,
            "config": run.to_dict(),
            "steps": steps,
            "tokens": costs.training_tokens(run),
            "training_flops": costs.training_flops(run),
            "n_exact": costs.parameters(run.model).non_embedding,
            "epochs": 0.1,
            "train_loss": loss,
            "skipped_steps": 0,
            "data": DATA,
            "evaluations": {run.evaluation_digest: {"loss": loss, "targets": 2**22, **HELD_OUT}},
            "versions": {"gqa-scaling": "0.1.0"},
            "layout": LAYOUT,
        }
        timing = {"training_seconds": 1.0 * steps, "finished": began + steps}
        directory.finish(result, timing)


def counted(root: str, words: list[str], slow: float) -> None:
    """Do what `gqa-scaling WORDS` does, and say on the last line what it took."""
    found = {"open": 0, "stat": 0}

    def note(what: str, path) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root):
            found[what] += 1
            time.sleep(slow / 1e3)

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.scandir", "os.listdir"):
            note("open" if event == "open" else "stat", arguments[0])

    def asked(ask):  # the interpreter tells hooks nothing of these
        def ask_and_count(path, *rest, **named):
            note("stat", path)
            return ask(path, *rest, **named)

        return ask_and_count

    os.stat, os.lstat = asked(os.stat), asked(os.lstat)
    sys.addaudithook(hook)
    from gqa_scaling.cli import main

    sys.argv = ["gqa-scaling", *words]
    try:
        code = main()
    except SystemExit as end:
        code = end.code or 0
    use = resource.getrusage(resource.RUSAGE_SELF)
    row = {"code": code, "seconds": use.ru_utime + use.ru_stime, "MiB": use.ru_maxrss / 2**10}
    print(json.dumps(row | found))


def measure(verb: str, folder: Path, count: int, slow: float) -> dict[str, float]:
    names = {"spec": folder / "study.py", "root": folder / "runs", "run": grid(count)[0].name}
    words = VERBS[verb].format(**names).split()
    arguments = ["--counted", str(folder / "runs"), f"--slow={slow}", "--"]
    began = time.perf_counter()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments, *words],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=True,
    )
    row = json.loads(done.stdout.splitlines()[-1])
    if row["code"]:
        sys.exit(f"gqa-scaling {' '.join(words)} ended with {row['code']}:\n{done.stdout[-2000:]}")
    return row | {"wall": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[168, 1680], help="168, or n x 84")
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--slow", type=float, default=0.0, metavar="MS", help="of each request")
    parser.add_argument("--counted", help=argparse.SUPPRESS)
    args, words = parser.parse_known_args()
    if args.counted is not None:
        counted(args.counted, [word for word in words if word != "--"], args.slow)
        return
    start, last = 0.0, {}
    print(
        f"{'verb':10}{'runs':>6}{'s':>8} {'(wall)':>8}{'grows':>7}{'open':>6}{'stat':>6}{'MiB':>6}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for count in args.runs:
            folder = Path(temporary, str(count))
            folder.mkdir()
            make(folder / "runs", count)
            here = str(Path(__file__).parent.absolute())
            (folder / "study.py").write_text(MODULE.format(here=here, count=count))
            for verb in args.verbs:
                row = measure(verb, folder, count, args.slow)
                start = row["seconds"] if verb == "start" else start
                grows = ""
                if verb in last and verb != "start":
                    many, seconds = last[verb]
                    ratio = max(row["seconds"] - start, 1e-3) / max(seconds - start, 1e-3)
                    grows = f"{math.log(ratio) / math.log(count / many):.2f}"
                last[verb] = count, row["seconds"]
                print(
                    f"{verb:10}{count:6,}{row['seconds']:8.2f} {'(' + format(row['wall'], '.1f'):>7})"
                    f"{grows:>7}{row['open'] / count:6.1f}{row['stat'] / count:6.1f}{row['MiB']:6.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
