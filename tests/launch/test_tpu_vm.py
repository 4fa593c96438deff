"""The start-up script of a TPU slice in a real bash with fake tools: whatever happens, it ends."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from gqa_scaling.config import ModelConfig, RunConfig
from gqa_scaling.hardware import SLICES, hardware
from launch import tpu_vm
from launch.jobs import Job
from launch.submission import Study
from launch.targets import Target

RUN = RunConfig("L1", ModelConfig(1, 32, 1, 1), 32, 32, tokens=32)
JOB = Job("grid-l1", SLICES["v5e-16"], (RUN,), 60.0)
STUDY = Study("experiments.grid", "grid", (), "gs://mine/runs")
PRICE = "is billed $19.20 an hour until you do: gcloud compute tpus queued-resources delete grid-l1"

# Every program of the script is this one under another name. It notes the call, does what `plan`
# says to this call (`n` counts them), and then what such a program does.
FAKE = r"""#!/bin/bash
call="${0##*/} ${*//$'\n'/; }"
echo "$call" >> "$FAKES/calls"
n=0
while read -r _; do n=$((n + 1)); done < "$FAKES/calls"
source "$FAKES/plan"
case $call in
  "hostname "*) echo t1v-n-0a1b-w-0 ;;
  "date "*) echo 2025-07-01 ;;
  "systemctl is-active"*) exit 3 ;;
  systemd-run*) shift; "$@"; exit 0 ;;
  "timeout "*) shift; "$@" ;;
  "gcloud storage cp log "*) /bin/cp log "$FAKES/log-in-bucket" ;;
  *"-m uv venv"*)
    [[ ! -e .venv ]] || exit 2  # as uv does
    /bin/mkdir -p .venv/bin && /bin/cp "$FAKES/python3" .venv/bin/python ;;
  mkdir* | cp* | grep* | rm*) "/bin/${0##*/}" "$@" ;;
esac
"""
TOOLS = ("hostname", "mkdir", "systemctl", "cp", "systemd-run", "timeout", "gcloud", "python3")
TOOLS += ("rm", "date", "grep")


class Machine:
    """A worker of a slice: its disk outlives its boots."""

    def __init__(self, folder: Path, setup: tuple[str, ...] = ()):
        self.fakes, self.home = folder / "fakes", folder / "home"
        self.fakes.mkdir()
        for tool in (*TOOLS, "sleep"):
            (self.fakes / tool).write_text(FAKE)
            (self.fakes / tool).chmod(0o755)
        own = {"bucket": "gs://mine", "project": "p", "zone": "z", "setup": setup}
        target = Target("tpu-vm", JOB.slice, hardware("v5e"), **own)
        text = tpu_vm.startup_script(JOB, target, STUDY, "gs://mine/code/0")
        (folder / "startup-script").write_text(text.replace(tpu_vm.HOME, str(self.home)))

    def boot(self, plan: str = "") -> list[str]:
        """The calls of the start-up script and the service, when `plan` happens."""
        (self.fakes / "plan").write_text(plan)
        (self.fakes / "calls").write_text("")
        alive, held = os.pipe()
        subprocess.run(
            ["/bin/bash", str(self.fakes.parent / "startup-script")],
            env={"PATH": str(self.fakes), "FAKES": str(self.fakes)},
            capture_output=True,
            start_new_session=True,
            pass_fds=[held],
        )
        os.close(held)
        os.read(alive, 1)  # the end of file: no process has it open any more
        os.close(alive)
        calls = (self.fakes / "calls").read_text()
        return calls.replace(f"{self.fakes.parent}/", "").splitlines()

    @property
    def log_in_bucket(self) -> str:
        path = self.fakes / "log-in-bucket"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def undisturbed() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        return Machine(Path(folder)).boot()


def is_deletion(call: str) -> bool:
    return "queued-resources delete" in call


def given_back(calls: list[str]) -> bool:
    """Whether the deletion was asked for, and before it the copy of the log."""
    deletions = [i for i, call in enumerate(calls) if is_deletion(call)]
    copies = [i for i, call in enumerate(calls) if call.startswith("gcloud storage cp log gs://")]
    return bool(deletions) and bool(copies) and copies[0] < deletions[0]


CALLS = undisturbed()
EACH = pytest.mark.parametrize("n", range(1, len(CALLS) + 1), ids=lambda n: CALLS[n - 1][:40])


def test_undisturbed_it_sets_up_works_copies_its_log_and_deletes_the_slice(machine):
    assert {call.split()[0] for call in CALLS} >= {*TOOLS, "python"}
    at = [next(i for i, call in enumerate(CALLS) if text in call) for text in STAGES]
    assert at == sorted(at)
    assert CALLS[-1] == (
        "gcloud compute tpus queued-resources delete grid-l1 --project p --zone z --force --quiet "
        "--async"
    )
    machine.boot()
    assert "the job ended with exit code 0: the slice is given back" in machine.log_in_bucket
    assert "billed" not in machine.log_in_bucket


STAGES = ("rsync", "pip install", "uv venv", "launch.work experiments.grid L1", "cp log", "delete")


@EACH
def test_whichever_command_fails_the_slice_is_given_back(n, machine):
    calls = machine.boot(f"[ $n != {n} ] || exit 1")
    assert given_back(calls)
    assert (PRICE in machine.log_in_bucket) == is_deletion(CALLS[n - 1])
    assert is_deletion(calls[-1])


@pytest.mark.parametrize("tool", [*TOOLS, "python"])
def test_a_tool_that_never_works_is_no_reason_to_go_on_for_ever(tool, machine):
    machine.boot()  # a second boot has a .venv
    ends = "" if tool != "gcloud" else 'if [[ $call = "sleep "* ]]; then exit 1; fi\n'
    calls = machine.boot(f"{ends}if [[ $call = '{tool} '* ]]; then exit 1; fi")
    assert given_back(calls)
    log = (machine.home / "log").read_text()
    assert (PRICE in log) == (tool == "gcloud")


def test_where_deletion_is_refused_the_price_is_in_the_log_and_it_asks_again(machine):
    calls = machine.boot(
        'if [[ $call = *"queued-resources delete"* && $n -lt 25 ]]; then exit 1; fi'
    )
    assert sum(map(is_deletion, calls)) > 1
    pause = [call for call in calls if call == "sleep 600"]
    assert len(pause) == sum(map(is_deletion, calls)) - 1
    assert machine.log_in_bucket.splitlines()[-1].endswith(
        f"{PRICE} --project p --zone z --force --quiet"
    )


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
@EACH
def test_a_reboot_in_the_middle_begins_again_and_gives_the_slice_back(n, signal, machine):
    """SIGTERM goes to all processes of the service; a lost machine is like SIGKILL to all."""
    before = machine.boot(f"[ $n != {n} ] || kill -{signal} 0")
    ended = any("launch.work" in call for call in CALLS[: n - 1])  # its slice may be given back
    assert ended or not any(map(is_deletion, before))
    after = machine.boot()
    assert any("launch.work" in call for call in after)
    assert given_back(after)


def test_a_job_that_loses_a_process_is_started_five_times_a_day(machine):
    lost = 'if [[ $call = "python -m launch.work"* ]]; then exit 134; fi\n'
    calls = machine.boot(lost)
    assert sum("launch.work" in call for call in calls) == tpu_vm.STARTS_A_DAY == 5
    assert given_back(calls)
    assert "has ended early 5 times today: the slice is given back" in machine.log_in_bucket
    again = machine.boot(lost)  # a reboot is no new day
    assert not any("launch.work" in call for call in again)
    assert given_back(again)
    tomorrow = machine.boot(f'{lost}if [[ $call = "date "* ]]; then echo 2025-07-02; exit; fi\n')
    assert sum("launch.work" in call for call in tomorrow) == 5
    assert given_back(tomorrow)


@pytest.mark.parametrize("code", [0, 1, 2, 75, 126, 127, 134, 137, 139, 143])
def test_what_is_started_again(code, machine):
    plan = f'if [[ $call = "python -m launch.work"* ]]; then exit {code}; fi'
    calls = machine.boot(plan)
    again = code in (75, 134, 137, 143)
    assert sum("launch.work" in call for call in calls) == (5 if again else 1)
    assert given_back(calls)


def test_another_worker_leaves_the_slice_to_the_first_unless_it_cannot_go_on(machine):
    third = 'if [[ $call = "hostname "* ]]; then echo t1v-n-0a1b-w-3; exit; fi\n'
    assert not any(map(is_deletion, machine.boot(third)))
    calls = machine.boot(f'{third}if [[ $call = *"pip install"* ]]; then exit 1; fi')
    assert given_back(calls)
    assert "gcloud storage cp log gs://mine/logs/grid-l1-w-3.log" in calls
    assert not any("launch.work" in call for call in calls)


@pytest.mark.parametrize("code", [1, 2])
def test_another_worker_that_fails_alone_gives_the_slice_back_after_the_first_had_its_time(
    code, machine
):
    third = 'if [[ $call = "hostname "* ]]; then echo t1v-n-0a1b-w-3; exit; fi\n'
    calls = machine.boot(f'{third}if [[ $call = "python -m launch"* ]]; then exit {code}; fi')
    assert given_back(calls)
    assert calls.index("sleep 60") < next(i for i, c in enumerate(calls) if "cp log" in c)
    assert f"the job ended with exit code {code}" in machine.log_in_bucket


def test_run_again_by_hand_it_leaves_a_job_in_peace(machine):
    calls = machine.boot('if [[ $call = "systemctl is-active"* ]]; then exit 0; fi')
    assert [call.split()[0] for call in calls] == ["hostname", "mkdir", "systemctl"]


@pytest.mark.parametrize("command", ["echo 'open", "exit 7", "(", "fi", "$NOT_SET", "if"])
def test_a_set_up_command_that_cannot_be_read_fails_alone(command, tmp_path):
    machine = Machine(tmp_path, setup=(command,))
    calls = machine.boot()
    assert given_back(calls)
    assert "the machine could not be set up" in machine.log_in_bucket


def test_the_launch_says_what_a_slice_costs_and_how_to_delete_it():
    target = Target("tpu-vm", JOB.slice, hardware("v5e"), bucket="gs://mine", project="p", zone="z")
    said = "\n".join(tpu_vm.after([JOB], target, STUDY))
    assert "until it is deleted (v5e-16 $19.20 an hour)" in said
    assert f"clean up: {tpu_vm.delete_command(JOB, target)}\n" in said


def test_nothing_but_this_folder_is_written(machine):
    before = set(os.listdir(machine.fakes.parent))
    machine.boot()
    assert set(os.listdir(machine.fakes.parent)) - before == {"home"}
