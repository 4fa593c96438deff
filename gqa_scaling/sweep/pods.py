"""Whether a run fits a TPU pod, said by its compiler before anything is paid for; no jax here.

`compile_run` starts `gqa_scaling.sweep.compile` in a process of its own and tells what came of it.
"""

import hashlib
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from gqa_scaling import costs
from gqa_scaling.config import ParallelConfig, RunConfig, UserError, require
from gqa_scaling.devices.layout import axis_sizes, layout_refusal
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.storage import make_folder, write_json
from gqa_scaling.hardware import Slice, hardware
from gqa_scaling.sweep import memory
from gqa_scaling.sweep.plan import hardware_flops_per_token

INSTALL = "pip install -e '.[tpu]'"
COMMAND = (sys.executable, "-m", "gqa_scaling.sweep.compile")
INVOLUNTARY = re.compile(r"(?i)involuntary full rematerialization.*")
POLICIES: tuple[Literal["none", "dots", "full"], ...] = (
    "none",
    "dots",
    "full",
)  # least FLOPs first
TRIES = 3  # changes that are compiled before giving up


@dataclass(frozen=True)
class Compiled:
    """What the train step of one shape needs on each chip, in bytes.

    `others` are further runs of the same shape, `pattern` is the label of the keys that heads see, ""
    for all of them. `needed` is all that the step needs at once: `arguments` (state and batch),
    `temporaries` and the program, `code`; `predicted` is the same by arithmetic. Where that does not
    fit, the compiler says `needed` and `allowed` only, and the rest is None or empty; `change` is
    then what makes it fit.

    `flops` and the bytes of `collectives` count one step with every turn of its loops; `mean_turns`
    is the assumed mean for loops whose turns the data decide, `kernels` the calls whose FLOPs are
    left out. `donated` is the share of the state whose memory the new state takes over,
    `involuntary` are the partitioner's complaints, and `gathered` the parameters that are joined in
    all layers at once: the last two should be empty.
    """

    run: str
    others: tuple[str, ...]
    pattern: str
    topology: str
    compiler: str
    mesh: dict[str, int]
    parallel: ParallelConfig
    allowed: int
    needed: int
    predicted: int
    arguments: int | None = None
    temporaries: int | None = None
    code: int | None = None
    donated: float | None = None
    flops: float | None = None
    model_flops: float | None = None
    mean_turns: float | None = None
    kernels: int = 0
    collectives: tuple[dict[str, Any], ...] = ()
    involuntary: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    seconds: float | None = None
    change: "Compiled | None" = None

    @property
    def fits(self) -> bool:
        return self.needed <= self.allowed

    @property
    def received(self) -> float:
        """Bytes that a chip receives from others in one step."""
        return sum(row["bytes"] for row in self.collectives)

    @property
    def overlapped(self) -> float:
        """Those of them during which it goes on computing."""
        return sum(row["bytes"] for row in self.collectives if row["overlaps"])

    def to_dict(self) -> dict[str, Any]:
        sums = {"received": self.received, "overlapped": self.overlapped}
        return {**asdict(self), "fits": self.fits, **sums}


def require_compiler() -> None:
    """Raise UserError unless the TPU compiler is installed."""
    require(
        importlib.util.find_spec("libtpu") is not None,
        f"--compile needs the TPU compiler, the libtpu package: {INSTALL}, which needs no TPU",
    )


def compiler_environment(place: Slice) -> dict[str, str]:
    """What makes libtpu compile on a CPU host, ask no metadata server and say its warnings."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": place.cloud_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "1",
        "TPU_STDERR_LOG_LEVEL": "1",  # at its default the partitioner's warnings are not heard
    }


def request(run: RunConfig, place: Slice) -> str:
    """What COMMAND reads from its standard input."""
    return json.dumps({"run": run.to_dict(), "topology": place.name, "parent": os.getpid()})


def compile_run(run: RunConfig, place: Slice, kept: Path | None = None) -> Compiled:
    """What the compiler says of one run. Out of memory is an answer, not an error.

    With a folder `kept` the answer is looked for there first, and left there; it is found again by
    the same compiler and the same code.
    Raises UserError when the run cannot be laid out over the chips, or the compiler fails.
    """
    file = None if kept is None else kept / f"{_digest(run, place)}.json"
    if file is not None and file.exists():
        found = json.loads(file.read_text())
    else:
        found = _ask(run, place)
        if file is not None:
            make_folder(file.parent)
            write_json(file, found)
    flops = costs.training_flops_per_token(run.model, run.context_length) * run.batch_tokens
    fits = "arguments" in found
    return Compiled(
        run=run.name,
        others=(),
        pattern=run.model.pattern.label if run.model.pattern else "",
        topology=place.name,
        parallel=run.parallel,
        allowed=found.pop("allowed", hardware(place.kind).memory),
        predicted=memory.training_bytes(run, place.chips, "tpu").total,
        model_flops=flops / place.chips if fits else None,
        involuntary=tuple(found.pop("involuntary")),
        collectives=tuple(found.pop("collectives", ())),
        gathered=tuple(found.pop("gathered", ())),
        **found,
    )


def _ask(run: RunConfig, place: Slice) -> dict[str, Any]:
    """What a compiler in a process of its own answers, and what its partitioner complained of."""
    done = subprocess.run(
        COMMAND,
        input=request(run, place),
        env=compiler_environment(place),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise UserError(f"{run.name}: {_crash(place, done.returncode, done.stderr)}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "refused" in found:
        raise UserError(f"{run.name} on {place.name}: {found['refused']}")
    return {**found, "involuntary": list(dict.fromkeys(INVOLUNTARY.findall(done.stderr)))}


def _digest(run: RunConfig, place: Slice) -> str:
    """What an answer rests on, as 16 hex digits: shape and slice, compiler, and all code here."""
    digest = hashlib.sha256(repr((_shape(run), place.name)).encode())
    for package in ("libtpu", "jax", "jaxlib", "flax", "optax"):
        digest.update(metadata.version(package).encode() + b"\0")
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _crash(place: Slice, code: int, said: str) -> str:
    """One line for a compiler that died: the last thing it said that is not a stack trace."""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    fatal = [x for x in lines if re.match(r"(F\d{4} |[\w.]*(Error|Exception)\b)", x)]
    last = (fatal or lines or ["it said nothing"])[-1]
    return f"the TPU compiler failed for {place.name} ({how}): {last[:400]}"


def shapes(runs: tuple[RunConfig, ...]) -> list[tuple[RunConfig, ...]]:
    """Runs whose train steps are one program, together: the rest of a run is only numbers in it."""
    alike: dict[Any, list[RunConfig]] = {}
    for run in runs:
        alike.setdefault(_shape(run), []).append(run)
    return [tuple(group) for group in alike.values()]


def _shape(run: RunConfig) -> tuple[Any, ...]:
    """All of a run that its train step is made of."""
    spikes = run.optimizer.spike_factor > 0  # then the state holds more
    return run.model, run.context_length, run.batch_tokens, run.parallel, spikes


def check(experiment: Experiment, place: Slice) -> None:
    """Raise UserError unless every run can be laid out over the chips, with the attention that it
    asks for, and the compiler is there."""
    require(place.is_tpu, f"--compile asks the compiler of TPUs: {place.name} is no slice of them")
    for first, *_ in shapes(experiment.runs):
        reason = layout_refusal(first, place.chips, "tpu")
        require(not reason, f"{first.name} on {place.name}: {reason}")
    require_compiler()


def compile_experiment(
    experiment: Experiment, place: Slice, say: Callable[[str], None], kept: Path | None = None
) -> list[Compiled]:
    """Every distinct shape of an experiment, compiled; for those that do not fit the change.

    `say` is told of progress; answers are `kept` as by `compile_run`. Raises UserError as `check` and `compile_run` do.
    """
    check(experiment, place)
    groups = shapes(experiment.runs)
    out = []
    for i, (first, *others) in enumerate(groups, 1):
        say(f"compiling {i} of {len(groups)} for {place.name}: {first.name}")
        found = compile_run(first, place, kept)
        if not found.fits:
            found = replace(found, change=nearest_fit(first, place, found, say, kept))
        out.append(replace(found, others=tuple(run.name for run in others)))
    return out


def nearest_fit(
    run: RunConfig,
    place: Slice,
    found: Compiled,
    say: Callable[[str], None],
    kept: Path | None = None,
) -> Compiled | None:
    """The change of remat, accumulation or mesh that costs least and makes the run fit.

    Of the `candidates`, those that arithmetic predicts to fit, scaled by how far it was off for this
    run, are compiled in turn. None when none of the first few fits.
    """
    off = max(1.0, found.needed / found.predicted)
    tried = 0
    for changed in candidates(run, place):
        if off * memory.training_bytes(changed, place.chips, "tpu").total > found.allowed:
            continue
        say(f"  does not fit; trying {difference(run, changed)}")
        answer = compile_run(changed, place, kept)
        if answer.fits:
            return answer
        tried += 1
        if tried == TRIES:
            break
    return None


def candidates(run: RunConfig, place: Slice) -> Iterator[RunConfig]:
    """Other ways to spread the run that are possible, those that cost least first.

    By FLOPs executed, then tensor, microbatches and axes that change. As much remat, accumulation and
    tensor as there is or more; fsdp and context as they come. `data` may shrink, and stays a
    multiple of the slices, which it alone crosses.
    """
    now, sizes_now = run.parallel, axis_sizes(run, place.chips)
    data, fsdp, _, tensor = sizes_now
    heavier = POLICIES[POLICIES.index(now.remat) :]
    parts = [
        i
        for i in range(now.accumulation, run.batch_size + 1, now.accumulation)
        if run.batch_size % i == 0
    ]
    axes = (_powers(fsdp * data), _powers(place.chips), (tensor, 2 * tensor, 4 * tensor))
    found = []
    for remat, accumulation, f, c, t in itertools.product(heavier, parts, *axes):
        spread = replace(
            now, data=-1, fsdp=f, context=c, tensor=t, accumulation=accumulation, remat=remat
        )
        changed = replace(run, parallel=spread)
        if layout_refusal(changed, place.chips, "tpu"):
            continue
        sizes = axis_sizes(changed, place.chips)
        same = sizes == sizes_now and (remat, accumulation) == (now.remat, now.accumulation)
        if sizes[0] % place.slices or sizes[0] > data or same:
            continue
        moved = sum(a != b for a, b in zip(sizes, sizes_now, strict=True))
        cost = (hardware_flops_per_token(changed), t, accumulation, moved, -sizes[0], c)
        found.append((cost, changed))
    for _, changed in sorted(found, key=lambda candidate: candidate[0]):
        yield changed


def _powers(most: int) -> list[int]:
    """1, 2, 4 and so on."""
    return [2**k for k in range(most.bit_length())]


def difference(old: RunConfig, new: RunConfig) -> str:
    """The options that turn one layout into the other: --parallel.remat full."""
    a, b = old.parallel.to_dict(), new.parallel.to_dict()
    return " ".join(f"--parallel.{key} {b[key]}" for key in b if a[key] != b[key])
