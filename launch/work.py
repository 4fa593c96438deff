"""What a job does on each of its hosts: its runs, one after another.

    python -m launch.work EXPERIMENT RUN... [-- OVERRIDES]

Each run is `gqa-scaling run` in a process of its own, so that one that crashes leaves the others
alone. SIGTERM is passed on and the run saves. Exit codes are those of `gqa-scaling run`: 0 done;
1 a run failed and the others went on; 2 the user can mend it; 75 saved, start again; 134, 137 and
143 a process was lost. Any other end of a process is a crash, 1. A run that ends with 74, as its bucket
is away, is given again after each of WAITS; then the job ends with 1. One of several processes that fails
is recorded and ends with 70, and its peers are lost: where runs are left the job is to start again, with 75,
and passes over that one.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

DONE, FAILED, MENDABLE, FAILED_OF_SEVERAL, AWAY, PREEMPTED = 0, 1, 2, 70, 74, 75
LOST = (134, 137, 143)  # SIGABRT when a peer is gone, SIGKILL, SIGTERM before it could be heard
WAITS = (60, 300, 900)  # seconds; a machine is paid for meanwhile, as one made anew would be


def commands(experiment: str, runs: Sequence[str], overrides: Sequence[str]) -> list[list[str]]:
    """One `gqa-scaling run` for each run."""
    start = [sys.executable, "-m", "gqa_scaling", "run", experiment, "--only"]
    return [[*start, exactly(run), *overrides] for run in runs]


def exactly(name: str) -> str:
    """The --only pattern that matches this name alone: a bare one also matches longer names."""
    return f"[{name[0]}]{name[1:]}"


class Work:
    """A job's runs in progress; `stop` may be called from a signal handler."""

    def __init__(self, todo: list[list[str]]) -> None:
        self.todo = todo
        self.stopped = False
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Do it all and return the exit code."""
        worst = DONE
        for command in self.todo:
            code = self._carry_out(command)
            for seconds in WAITS:
                if code == AWAY:
                    print(f"launch: once more in {seconds} s: {command}", file=sys.stderr)
                    self._pause(seconds)
                    code = self._carry_out(command)
            if code == FAILED_OF_SEVERAL and command is not self.todo[-1]:
                return PREEMPTED
            if code not in (DONE, FAILED):
                return FAILED if code in (AWAY, FAILED_OF_SEVERAL) else code
            worst = max(worst, code)
        return worst

    def _carry_out(self, command: list[str]) -> int:
        """The exit code of one run, or that of a job that was stopped before."""
        if self.stopped:
            return PREEMPTED
        self._child = subprocess.Popen(command)
        self._end_if_stopped()  # while it was started
        self.wait()
        return meaning(self._child.wait())

    def _pause(self, seconds: int) -> None:
        for _ in range(seconds):
            if not self.stopped:
                time.sleep(1)

    def stop(self, *_: object) -> None:
        """Have the run save and end, and begin no other."""
        self.stopped = True
        self._end_if_stopped()

    def _end_if_stopped(self) -> None:
        if self.stopped and self._child is not None:
            self._child.terminate()

    def wait(self, seconds: float = math.inf) -> None:
        """Return when the run has ended, or after so many seconds; also inside a signal handler, where
        Popen.wait hangs."""
        options = os.WEXITED | os.WNOWAIT | (os.WNOHANG if seconds < math.inf else 0)
        began = time.monotonic()
        while self._child is not None and self._child.returncode is None:
            if os.waitid(os.P_PID, self._child.pid, options) or time.monotonic() - began >= seconds:
                return
            time.sleep(0.1)


def meaning(code: int) -> int:
    """The exit code of the contract for how a process ended."""
    code = 128 - code if code < 0 else code
    known = (DONE, FAILED, MENDABLE, FAILED_OF_SEVERAL, AWAY, PREEMPTED, *LOST)
    return code if code in known else FAILED


def parse(arguments: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(experiment, runs, overrides) of a command line; names of runs are never '--'."""
    end = arguments.index("--", 1) if "--" in arguments[1:] else len(arguments)
    return arguments[0], list(arguments[1:end]), list(arguments[end + 1 :])


def main(arguments: Sequence[str]) -> int:
    work = Work(commands(*parse(arguments)))
    signal.signal(signal.SIGTERM, work.stop)
    return work.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
