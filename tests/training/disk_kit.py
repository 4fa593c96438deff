"""A disk that fails under a run. Two processes of its own:

python disk_kit.py break MOMENT HOW ...    the command `gqa-scaling ...`, whose disk fails at MOMENT
python disk_kit.py story KIND MOMENT HOW   on a small disk mounted at ./disk: that command, then the
                                           disk mended and the command again; prints both as JSON
"""

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DISK = Path("disk")
FILLER = DISK / "filler"
BROKEN = Path("broken")  # when the disk failed
RUN = ("run", "tiny.py", "--quiet", "--root", str(DISK / "runs"))


def fail(how: str) -> None:
    """From now on the disk is full, or read-only, or files may not be larger than so many bytes."""
    BROKEN.write_text(str(time.time()))
    if how == "full":
        with open(FILLER, "ab", buffering=0) as file:
            for size in (2**16, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
    elif how == "read-only":  # as the kernel does when it finds the file system damaged
        subprocess.run(["mount", "-o", "remount,abort", str(DISK)], check=True)
    else:
        limit = int(how)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def arrange(moment: str, how: str) -> None:
    """Have the disk fail just before the program first comes to this place."""
    from gqa_scaling.files import checkpoint, runs
    from gqa_scaling.sweep import run as sweep
    from gqa_scaling.training import loop, speed

    def before(owner: Any, name: str, here: Callable[..., bool] = lambda *_: True) -> None:
        real, done = getattr(owner, name), []

        def wrapped(*args: Any, **options: Any) -> Any:
            if not done and here(*args):
                done.append(moment)
                fail(how)
            return real(*args, **options)

        setattr(owner, name, wrapped)

    if moment == "start":
        fail(how)
    elif moment.startswith("step"):
        before(speed.Speed, "step_ended", lambda _, step: step == int(moment.removeprefix("step")))
    elif moment.startswith("save"):
        at = int(moment.removeprefix("save"))
        before(checkpoint.Checkpoints, "save", lambda _, step, *rest: step == at)
    else:
        places = {
            "claim": (sweep, "claim"),
            "config": (runs.RunDirectory, "begin"),
            "attempt": (runs.RunDirectory, "add_attempt"),
            "seal": (checkpoint, "seal"),
            "parameters": (loop, "save_parameters"),
            "evaluation": (loop, "judge"),
            "events": (loop, "write_hparams"),
            "result": (runs.RunDirectory, "finish"),
            "end": (runs.RunDirectory, "clean"),
        }
        before(*places[moment])


def story(kind: str, moment: str, how: str) -> None:
    DISK.mkdir()
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(DISK)], check=True)
    else:
        image = Path("image")
        with image.open("wb") as file:
            file.truncate(2**25)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(DISK)], check=True)
    BROKEN.write_text(str(time.time()))
    line = [sys.executable, __file__, "break", moment, how, *RUN]
    first = subprocess.run(line, capture_output=True, text=True)
    seconds = time.time() - float(BROKEN.read_text())
    failures = len(list(DISK.glob("runs/tiny/*/failure.json")))
    if kind == "tmpfs":
        FILLER.unlink(missing_ok=True)
    else:
        subprocess.run(["umount", str(DISK)], check=True)
        subprocess.run(["e2fsck", "-fy", str(image)], stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", "loop", str(image), str(DISK)], check=True)
    again = subprocess.run(
        [sys.executable, "-m", "gqa_scaling", *RUN], capture_output=True, text=True
    )
    results = [json.loads(f.read_text())["result"] for f in DISK.glob("runs/tiny/*/result.json")]
    found = {
        "code": first.returncode,
        "said": first.stderr,
        "seconds": seconds,
        "failures": failures,
        "again": [again.returncode, again.stderr],
        "result": json.dumps(results, sort_keys=True),
    }
    print(json.dumps(found))
    subprocess.run(["umount", str(DISK)], check=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "story":
        story(*rest)
    else:
        from gqa_scaling.cli import main

        arrange(*rest[:2])
        sys.exit(main(rest[2:]))
