"""Is everything right and fast on this machine's GPU or TPU? One command for a bare machine:

    make accelerator

or, where jax is installed already, in calls of any length:

    python benchmarks/accelerator.py --only right --minutes 8
    python benchmarks/accelerator.py --minutes 9

First whether all is right: what `gqa-scaling doctor` says, every attention kernel against the
reference, training against the CPU, gradients, a resumed run. Then how fast: attention and training
beside PyTorch, where a Python with torch is named by --torch or is this one. Each part runs in a
process of its own and is kept when it ends, for this device alone: killed at any point, the same
command goes on. A part that was wrong is tried again, and so is one whose code, jax or torch has
changed. Ends with a table and pictures in docs/accelerators/DEVICE.md, and with 1 where something is
wrong, 2 where jax computes on the CPU, 75 where time ran out.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]
sys.path.insert(0, str(CHECKOUT))

from gqa_scaling.devices.compiler_flags import keep_native_atomics  # noqa: E402
from gqa_scaling.devices.host_memory import computes_on_cpu, ready_host_memory  # noqa: E402
from gqa_scaling.files.storage import cache_folder, write_atomic  # noqa: E402

RIGHT, FAST = "right", "fast"
LEAST_MINUTES = 0.5  # with less left no part is started
NAMED = {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}  # what jax is told, so that it does not go on without
# Parts that start jax only in processes of their own, which need the device for themselves.
STARTERS = ("doctor", "resume", "decode")


@dataclass(frozen=True)
class Part:
    """A function of `accelerator_parts`, or of `torch_llama` where it is `torch`'s."""

    name: str
    kind: str
    function: str
    minutes: float  # after which it is given up
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    torch: bool = False

    @property
    def file(self):
        return re.sub(r"\W+", "-", self.name.lower()) + ".json"


def _training(size, context, remat, pattern=False):
    name = f"training {size} {context // 1024}K {remat}" + (" pattern" if pattern else "")
    asked = {"size": size, "context": context, "remat": remat, "pattern": pattern}
    return Part(name, FAST, "training", 5, asked)


def _torch_training(size, context):
    shapes = {"150M": (12, 1024, 16, 4), "470M": (24, 1280, 20, 5), "1.2B": (36, 1536, 24, 8)}
    name = f"PyTorch {size} {context // 1024}K"
    asked = {"size": shapes[size], "context": context}
    return Part(name, FAST, "training", 8, asked, torch=True)  # it compiles for each that it tries


PARTS = (
    Part("doctor", RIGHT, "doctor", 3),
    Part("attention", RIGHT, "attention", 5),
    Part("steps", RIGHT, "steps", 3),
    Part("gradients", RIGHT, "gradients", 3),
    Part("resume", RIGHT, "resume", 4),
    _training("1.2B", 8192, "dots"),
    _training("1.2B", 8192, "none"),
    _torch_training("1.2B", 8192),
    Part("speed of attention, d_h 64", FAST, "speed", 5, {"head_dim": 64}),
    Part("FlashAttention, d_h 64", FAST, "speed", 3, {"head_dim": 64}, torch=True),
    _training("150M", 8192, "none"),
    _torch_training("150M", 8192),
    _training("470M", 8192, "dots"),
    _torch_training("470M", 8192),
    _training("1.2B", 32768, "dots"),
    _torch_training("1.2B", 32768),
    _training("1.2B", 32768, "dots", pattern=True),
    _training("150M", 8192, "dots"),
    _training("470M", 8192, "none"),
    _training("1.2B", 8192, "full"),
    Part("speed of attention, d_h 128", FAST, "speed", 5, {"head_dim": 128}),
    Part("FlashAttention, d_h 128", FAST, "speed", 3, {"head_dim": 128}, torch=True),
    Part("decoding", FAST, "decode", 6),
)


def main(words=None):
    args = _arguments(words)
    if args.part:
        return _child(args)
    if computes_on_cpu() and not args.small:
        print("this machine has no accelerator: --small runs a shrunken set on the CPU")
        return 2
    here = where()
    if here["platform"] == "cpu" and not args.small:
        print("jax goes on without this machine's accelerator: gqa-scaling doctor says why")
        return 2
    folder = Path(args.out) / _named_after(here["device"], args.small)
    folder.mkdir(parents=True, exist_ok=True)
    names = {*args.only} or {RIGHT, FAST}
    torch = _with_torch(args)
    parts = [p for p in PARTS if names & {p.kind, p.name} and (torch or not p.torch)]
    ends = time.monotonic() + 60 * args.minutes
    for part in parts:
        if right(_kept(part, args, folder) or {"failed": "not done"}):
            continue
        left = (ends - time.monotonic()) / 60
        if left < LEAST_MINUTES:
            break
        found = _start(part, args, folder, min(left, part.minutes))
        if found is None:  # this call's time is up, not the part's
            break
        write_atomic(folder / part.file, json.dumps({**found, **key(part, args)}, indent=1))
        print(f"{part.name}: {summary(found)}", flush=True)
    done = {part: found for part in PARTS if (found := _kept(part, args, folder))}
    page = write_page(done, Path(args.docs), here, args.small)
    missing = [part.name for part in parts if part not in done]
    wrong = [part.name for part in parts if part in done and not right(done[part])]
    for name in wrong:
        print(f"WRONG {name}: {summary(done[next(p for p in parts if p.name == name)])}")
    print(
        f"{len(parts) - len(missing)} of {len(parts)} parts are done, {len(wrong)} of them wrong: {page}"
    )
    if names & {FAST} and not (torch or args.small):
        print("no Python here has torch: --torch names one, to measure PyTorch too")
    if missing:
        print(f"the same command goes on with {missing[0]}")
    return 1 if wrong else 75 if missing else 0


def _arguments(words):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", default=[], help="right, fast, or names of parts")
    add("--minutes", type=float, default=60.0, help="stop before they are over (default: 60)")
    add("--small", action="store_true", help="a shrunken set, also on a CPU")
    add("--out", default=str(CHECKOUT / ".cache/accelerator"), help="where finished parts are kept")
    add("--docs", default=str(CHECKOUT / "docs/accelerators"), help="where the page is written")
    add("--torch", help="a Python that has torch (default: this one, if it has)")
    add("--part", help=argparse.SUPPRESS)
    return parser.parse_args(words)


# ------------------------------------------------------------------------------- running parts


ASK = """
import json, jax
device = jax.devices()[0]
print(json.dumps([device.platform, device.device_kind, jax.__version__]))
"""


@functools.cache
def where():
    """What jax computes on here, by a process that ends: a device serves one at a time."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"jax does not start: {done.stderr.strip()[-600:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(("platform", "device", "jax"), found, strict=True))


@functools.cache
def source(part):
    """What a part's result hangs on: the code that it runs."""
    here = CHECKOUT / "benchmarks"
    files = [here / "torch_llama.py"] if part.torch else [here / "accelerator_parts.py"]
    files += [] if part.torch else sorted((CHECKOUT / "gqa_scaling").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def key(part, args):
    """What is kept holds for: the part's code, the device, jax, and the Python that has torch."""
    found = {"source": source(part), "small": args.small, **where()}
    return {**found, "torch": _with_torch(args)} if part.torch else found


def _kept(part, args, folder):
    """What was found of a part under this key, None where nothing was. Without a Python that has
    torch, what another call timed by one holds as well."""
    path, wanted = folder / part.file, key(part, args)
    if part.torch and wanted["torch"] is None:
        del wanted["torch"]
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if wanted.items() <= found.items() else None


def _with_torch(args):
    """A Python that has torch, or None; a shrunken set is without."""
    if args.small:
        return None
    has_torch = importlib.util.find_spec("torch") is not None
    return args.torch or (sys.executable if has_torch else None)


def _start(part, args, folder, minutes):
    """What a part found, {"failed": why}, or None where it was cut short by the call's time."""
    began = time.monotonic()
    if part.torch:
        asked = {"part": part.function, **part.arguments}
        command = [_with_torch(args), str(CHECKOUT / "benchmarks/torch_llama.py")]
        command.append(json.dumps(asked))
    else:
        command = [sys.executable, __file__, "--part", part.name, "--out", str(folder)]
        command += ["--small"] if args.small else []
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    platforms = environment.get("JAX_PLATFORMS") or NAMED.get(where()["platform"], "")
    if platforms and "cpu" not in platforms:
        platforms = f"{platforms},cpu"  # whose results are the reference
    environment["JAX_PLATFORMS"] = platforms
    if part.function in STARTERS:
        environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, said = process.communicate(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        _end(process)
        if minutes < part.minutes:
            return None
        return {"failed": f"not done after {minutes:.0f} minutes"}
    except BaseException:
        _end(process)
        raise
    seconds = time.monotonic() - began
    if process.returncode:
        return {
            "failed": f"ended with {process.returncode}: {said.strip()[-600:]}",
            "seconds": seconds,
        }
    rows = json.loads(out.strip().splitlines()[-1])
    return {**(rows if isinstance(rows, dict) else {"rows": rows}), "seconds": seconds}


def _end(process):
    """With all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _child(args):
    from gqa_scaling.devices.processes import end_with

    ready_host_memory()
    end_with(os.getppid())
    part = next(part for part in PARTS if part.name == args.part)
    print(json.dumps(_call(part, args.small, Path(args.out))))
    return 0


def _call(part, small, folder):
    """What a part finds, in this process; what it keeps as it goes is put into the folder."""
    keep_native_atomics()
    sys.path.insert(0, str(CHECKOUT / "benchmarks"))
    import accelerator_parts
    import jax

    from gqa_scaling.devices.compilation_cache import keep_compiled

    if not small:
        if part.function not in STARTERS and jax.default_backend() == "cpu":
            return {"failed": "jax goes on without this machine's accelerator"}
        keep_compiled(cache_folder() / "compiled")
    try:
        asked = dict(part.arguments)
        if part.function == "decode":  # rows of other code would be told as this one's
            asked["output"] = folder / f"timings-jax-{jax.__version__}-{source(part)}.json"
        rows = getattr(accelerator_parts, part.function)(small, **asked)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error)[-600:]}"}
    return {"rows": rows}


def checks(found):
    return [row for row in found.get("rows", []) if "limit" in row]


def right(found):
    """Whether a part ended and all its checks hold; a NaN holds nowhere."""
    return "failed" not in found and all(row["found"] < row["limit"] for row in checks(found))


def summary(found):
    """A finished part in a line."""
    if "failed" in found:
        return f"failed, {found['failed']}"
    rows = checks(found)
    bad = [row for row in rows if not row["found"] < row["limit"]]
    if bad:
        worst = max(bad, key=lambda row: row["found"] / row["limit"])
        return f"{len(bad)} of {len(rows)} wrong: {worst['what']} {worst['found']:.2g}, not below {worst['limit']:g}"
    if rows:
        return f"{len(rows)} checks are right"
    return found.get("note") or "; ".join(_measured(row) for row in found["rows"][:4])


def _measured(row):
    shown = {
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "GiB": "{:.1f} GiB",
        "forward": "{:.2f} ms",
        "both": "{:.2f} ms with gradients",
    }
    cells = [form.format(row[key]) for key, form in shown.items() if row.get(key) is not None]
    return f"{row['what']}: {', '.join(cells) or row.get('note', '')}"


# ------------------------------------------------------------------------------------ the page


TIMED = {"ms": ".3g", "tokens_per_second": ",.0f"}


def _named_after(device, small):
    """What the page of a device is called, and the folder of its parts."""
    return re.sub(r"\W+", "-", device.lower()) + ("-small" if small else "")


def write_page(done, folder, here, small):
    """docs/accelerators/DEVICE.md and its pictures; where it is."""
    device, version, name = here["device"], here["jax"], _named_after(here["device"], small)
    lines = [f"# {device}", ""]
    lines.append(
        f"Written by `python benchmarks/accelerator.py` with jax {version}; what it measures stands in "
        "[accelerators.md](../accelerators.md)."
    )
    good = [part for part in done if part.kind == RIGHT]
    lines += ["", "## Right", "", "| part | found |", "|---|---|"]
    lines += [f"| {part.name} | {_cell(summary(done[part]))} |" for part in good]
    wrong = [row for part in good for row in checks(done[part]) if not row["found"] < row["limit"]]
    if wrong:
        lines += ["", "| wrong | found | must be below |", "|---|---:|---:|"]
        lines += [f"| {_cell(r['what'])} | {r['found']:.3g} | {r['limit']:g} |" for r in wrong]
    training = [
        row
        for part, found in done.items()
        if part.function == "training"
        for row in _named(part, found)
    ]
    if training:
        lines += ["", "## Training", ""]
        lines += ["| model | tokens/s | MFU | GiB at most | |", "|---|---:|---:|---:|---|"]
        for row in training:
            mfu = "-" if row.get("mfu") is None else f"{row['mfu']:.1%}"
            rate = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "-"
            size = f"{row['GiB']:.1f}" if row.get("GiB") else "-"
            lines.append(
                f"| {_cell(row['what'])} | {rate} | {mfu} | {size} | {_cell(row.get('note', ''))} |"
            )
    attention = [
        row
        for part, found in done.items()
        if part.function == "speed"
        for row in found.get("rows", [])
    ]
    if attention:
        lines += ["", "## Attention", "", "Milliseconds, batch 1.", ""]
        lines += ["| | forward | and backward | as fast as the fastest dense of ours | 1/density |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for row in attention:
            times = [
                f"{row[k]:.3g}" if k in row else "-" for k in ("forward", "both", "faster", "ideal")
            ]
            lines.append(f"| {_cell(row['what'])} | {' | '.join(times)} |")
    decoding = [
        row for part in done if part.function == "decode" for row in done[part].get("rows", [])
    ]
    if decoding:
        lines += [
            "",
            "## Decoding",
            "",
            "Milliseconds of a prefill, or of a step that decodes.",
            "",
        ]
        lines += ["| | ms | tokens/s | |", "|---|---:|---:|---|"]
        for row in decoding:
            times = [f"{row[k]:{form}}" if k in row else "-" for k, form in TIMED.items()]
            lines.append(f"| {_cell(row['what'])} | {' | '.join(times)} | {_cell(row['note'])} |")
    folder.mkdir(parents=True, exist_ok=True)
    if attention or any("tokens_per_second" in row for row in training):
        draw(training, attention, folder / f"{name}.png")
        lines += ["", f"![Training and attention on {device}]({name}.png)"]
    failed = [part for part, found in done.items() if "failed" in found]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"* {part.name}: {_cell(done[part]['failed'])}" for part in failed]
    path = folder / f"{name}.md"
    write_atomic(path, "\n".join(lines) + "\n")
    return path


def _cell(text):
    return " ".join(str(text).replace("|", "\\|").split())


def _named(part, found):
    """Rows of training; those of PyTorch say which model they are of."""
    rows = found.get("rows", [])
    return [
        {**row, "what": f"{part.name}, compiled" if part.torch else row["what"]} for row in rows
    ]


def draw(training, attention, path):
    """Tokens a second of each model, and times of attention against T, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle) = plt.subplots(1, 2, figsize=(13, 5))
    bars = [row for row in training if "tokens_per_second" in row]
    colours = ["C1" if "PyTorch" in row["what"] else "C0" for row in bars]
    left.barh(
        [row["what"] for row in bars], [row["tokens_per_second"] for row in bars], color=colours
    )
    for i, row in enumerate(bars):
        label = "" if row.get("mfu") is None else f" MFU {row['mfu']:.0%}"
        left.text(row["tokens_per_second"], i, label, va="center", fontsize="small")
    left.invert_yaxis()
    left.set(xlabel="tokens/s", title="Training step")
    left.margins(x=0.2)
    by_name = {}
    for row in attention:
        name, _, rest = row["what"].partition(", T ")
        T, _, rest = rest.partition(", d_h ")
        by_name.setdefault(f"{name}, d_h {rest.split(',')[0]}", []).append(
            (int(T.replace(",", "")), row["both"])
        )
    for name, points in by_name.items():
        middle.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    middle.set(xscale="log", yscale="log", xlabel="context length T", ylabel="ms")
    middle.set_title("Attention, forward and backward")
    if by_name:
        middle.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
