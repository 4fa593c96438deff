"""Checkpoints are whole or said not to be: every damage is found, named, and the step before used."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_kit as kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_kit import tiny_run

from gqa_scaling import cli
from gqa_scaling.config import UserError
from gqa_scaling.data import open_store
from gqa_scaling.files import array_checksums as array_checksums_module
from gqa_scaling.files import checkpoint, checksums
from gqa_scaling.files.array_checksums import array_checksums
from gqa_scaling.files.checkpoint import load_parameters, open_checkpoints
from gqa_scaling.files.claims import claim
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.sweep.status import read_checkpoints
from gqa_scaling.training import loop, speed

KIT = Path(kit.__file__)
LIKE = kit.abstract(kit.small_state())


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "deleted": (Path.unlink, "is missing"),
    "truncated": (truncate, "is truncated"),
    "emptied": (lambda file: os.truncate(file, 0), "is truncated"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "is too long"),
    "first bit": (lambda file: kit.flip(file, 0), "is altered"),
    "middle bit": (lambda file: kit.flip(file, 4 * file.stat().st_size), "is altered"),
    "last bit": (lambda file: kit.flip(file, -1), "is altered"),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Steps 5 and 10."""
    kit.save_steps(tmp_path / "checkpoints", 5, 10)
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    kit.save_steps(folder, 5)
    return folder / "5"


def restored(folder: Path) -> checkpoint.Restored:
    with open_checkpoints(folder, keep=2) as checkpoints:
        found = checkpoints.restore_latest(LIKE)
    assert found is not None
    assert kit.same(found.state, kit.small_state(found.step))
    assert found.position == {"step": found.step}
    return found


# ------------------------------------------------------------------------- damage to files


def test_whole_steps_are_restored_newest_first(saved: Path) -> None:
    found = restored(saved)
    assert (found.step, found.damaged) == (10, ())


def test_without_any_checkpoint_there_is_nothing_to_restore(tmp_path: Path) -> None:
    with open_checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.restore_latest(LIKE) is None


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_is_found_and_named(untouched: Path, kind: str) -> None:
    damage, words = DAMAGES[kind]
    for name in kit.files(untouched):
        file = untouched / name
        content = file.read_bytes()
        damage(file)
        try:
            found = checksums.examine(untouched)
        finally:
            file.write_bytes(content)
        expected = words
        if name == checksums.SEAL_NAME and kind != "deleted":
            expected = "is altered"
        assert (found.state, found.damage) == ("damaged", (f"{name} {expected}",))
    assert checksums.examine(untouched).state == "whole"


@pytest.mark.parametrize("note", checksums.COMMIT_NOTES)
def test_the_notes_of_the_commit_must_be_there(untouched: Path, note: str) -> None:
    content = (untouched / note).read_bytes()
    (untouched / note).unlink()
    try:
        assert checksums.examine(untouched).damage == (f"{note} is missing",)
    finally:
        (untouched / note).write_bytes(content)


@given(st.data())
@settings(max_examples=300)
def test_any_one_bit_is_found(untouched: Path, data: st.DataObject) -> None:
    file = untouched / data.draw(st.sampled_from(kit.files(untouched)))
    bit = data.draw(st.integers(0, 8 * file.stat().st_size - 1))
    kit.flip(file, bit)
    try:
        assert checksums.examine(untouched).state == "damaged"
    finally:
        kit.flip(file, bit)


def test_the_step_before_is_used_whichever_file_is_damaged_how(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    kit.save_steps(folder, 5, 10)
    names = [n for n in kit.files(folder / "10") if "/d/" not in n]
    names += ["state/ocdbt.process_0/d/"]  # of those the one with the arrays
    for i, name in enumerate(names):
        damage, _ = list(DAMAGES.values())[i % len(DAMAGES)]
        newest = max(int(p.name) for p in folder.iterdir())
        file = (
            kit.data_file(folder / str(newest))
            if name.endswith("/")
            else folder / f"{newest}/{name}"
        )
        damage(file)
        with open_checkpoints(folder, keep=2) as checkpoints:
            found = checkpoints.restore_latest(LIKE)
            before = found.step
            assert before < newest
            assert kit.same(found.state, kit.small_state(before))
            (line,) = found.damaged
            assert (
                f"{folder / str(newest)} is damaged: {file.relative_to(folder / str(newest))}"
                in line
            )
            assert f"{line}; going on from step {before}\n" in capfd.readouterr().err
            assert not (folder / str(newest)).exists()
            checkpoints.save(newest, kit.small_state(newest), {"step": newest})
            checkpoints.save(newest + 1, kit.small_state(newest + 1), {"step": newest + 1})
        assert restored(folder).step == newest + 1


def test_several_damaged_steps_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    kit.save_steps(folder, 5, 10, 15, keep=3)
    kit.flip(kit.data_file(folder / "15"), 1000)
    kit.data_file(folder / "10").unlink()
    found = restored(folder)
    assert (found.step, len(found.damaged)) == (5, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["5"]


def test_when_none_is_whole_it_is_refused_and_nothing_is_removed(saved: Path) -> None:
    kit.flip(kit.data_file(saved / "10"), 1000)
    (saved / "5" / "position" / "metadata").unlink()
    before = sorted(saved.rglob("*"))
    message = (
        rf"{saved} holds no whole checkpoint: .*/10 is damaged: state/ocdbt.* is altered; "
        rf".*/5 is damaged: position/metadata is missing\. Put .* or remove {saved} to train"
    )
    with open_checkpoints(saved, keep=2) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore_latest(LIKE)
    assert sorted(saved.rglob("*")) == before


def test_a_file_that_cannot_be_read_is_damage(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checksums._sha256

    def bad_sector(path: Path) -> str:
        if path == saved / "10/state/manifest.ocdbt":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(checksums, "_sha256", bad_sector)
    found = restored(saved)
    assert found.step == 5
    assert found.damaged[0].endswith("state/manifest.ocdbt cannot be read")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux names open files there")
def test_all_of_a_save_is_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the machine's fall would leave empty files where a checkpoint was."""
    kept, fsync = set(), os.fsync

    def noted(descriptor: int) -> None:
        assert not (tmp_path / "5").exists()
        kept.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    kit.save_steps(tmp_path, 5)
    written = tmp_path / f"5{checksums.UNFINISHED_SUFFIX}"
    parts = {str(written / name) for name in kit.files(tmp_path / "5")}
    folders = {str(Path(part).parent) for part in parts}
    assert parts | folders <= kept


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_what_is_refused_just_now_is_no_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Taken for damage, the newest checkpoint would be removed."""

    def refuse(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checksums, "_sha256", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        restored(saved)
    monkeypatch.undo()
    assert restored(saved).step == 10


def test_a_folder_that_is_gone_is_told_in_few_words(saved: Path) -> None:
    shutil.rmtree(saved / "10" / "state")
    (line,) = restored(saved).damaged
    assert "10 is damaged: state/_METADATA is missing; " in line
    assert line.endswith(" more files")


def test_another_tree_is_no_damage(saved: Path) -> None:
    """A mistake of ours must not make the program throw good checkpoints away."""
    with open_checkpoints(saved, keep=2) as checkpoints:
        with pytest.raises(ValueError, match="structure"):
            checkpoints.restore_latest((LIKE[0], {"count": LIKE[1]["count"], "other": LIKE[0]}))
        assert checkpoints.manager.latest_step() == 10


# ------------------------------------------------------------------------ saves and retention


def test_the_last_steps_are_kept_and_the_others_leave_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with open_checkpoints(folder, keep=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, kit.small_state(step), {"step": step})
        checkpoints.wait()
        assert sorted(p.name for p in folder.iterdir()) == ["4", "5"]
    assert restored(folder).step == 5


def test_what_a_kill_left_of_a_save_and_of_a_removal_is_cleared_away(saved: Path) -> None:
    for leftover in (f"15{checksums.UNFINISHED_SUFFIX}", f"{checkpoint.REMOVED}/1"):
        (saved / leftover / "state").mkdir(parents=True)
    found = restored(saved)
    assert (found.step, found.damaged) == (10, ())
    assert sorted(p.name for p in saved.iterdir()) == ["10", "5"]


def test_a_state_may_be_donated_as_soon_as_its_save_has_returned(tmp_path: Path) -> None:
    step_fn = jax.jit(lambda x: jax.tree.map(lambda a: a * 5 + 1, x), donate_argnums=0)
    state = {"a": jnp.arange(2**20, dtype=jnp.int32), "b": jnp.ones((512, 512), jnp.int32)}
    like = kit.abstract(state)
    with open_checkpoints(tmp_path / "checkpoints", keep=9) as checkpoints:
        for step in range(1, 6):
            state = step_fn(state)
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
        for step in range(1, 6):
            checkpoints.restore(step, like)  # raises when the sums are of a later step


def test_a_failing_seal_is_raised_and_the_step_does_not_count(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "seal", full)
    with open_checkpoints(saved, keep=2) as checkpoints:
        checkpoints.save(15, kit.small_state(15), {"step": 15})
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    monkeypatch.undo()
    assert restored(saved).step == 10


# ---------------------------------------------------------------------------- array checksums


def by_numpy(x: np.ndarray) -> str:
    """The checksum of an array, written a second time: bytes to words, Python's own modulo."""
    width = min(x.dtype.itemsize, 4)
    words = np.frombuffer(x.tobytes(), f"<u{width}").astype(np.uint64)
    index = np.arange(words.size, dtype=np.uint64)
    index = (index ^ (index >> np.uint64(16))) * np.uint64(0x85EBCA6B) % 2**32
    index = (index ^ (index >> np.uint64(13))) * np.uint64(0xC2B2AE35) % 2**32
    weights = (index ^ (index >> np.uint64(16))) | np.uint64(1)
    plain = sum(int(w) for w in words) % 2**32
    weighted = sum(int(w) * int(o) for w, o in zip(words, weights, strict=True)) % 2**32
    return f"{plain:08x}{weighted:08x}"


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"]
)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 4), (0, 3), (65, 33)])
@pytest.mark.parametrize("most", [array_checksums_module.MOST_BY_NUMPY, -1])
def test_array_checksums_agree_with_numpy(
    monkeypatch, most: int, dtype: str, shape: tuple[int, ...]
) -> None:
    """Also those of a compiled program, which large states and accelerators get."""
    monkeypatch.setattr(array_checksums_module, "MOST_BY_NUMPY", most)
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.normal(size=shape) * 100, dtype))
    assert array_checksums({"x": jnp.asarray(x)}).values() == {"x": by_numpy(x)}


@given(st.integers(0, 3 * 5 * 4 * 32 - 1))
def test_one_altered_bit_alters_the_checksum(bit: int) -> None:
    x = np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)
    data = bytearray(x.tobytes())
    data[bit // 8] ^= 1 << bit % 8
    y = np.frombuffer(bytes(data), np.float32).reshape(x.shape)
    assert array_checksums([jnp.asarray(y)]).values() != array_checksums([jnp.asarray(x)]).values()


@pytest.mark.parametrize("block", [1, 64, 1024, 2**14])
def test_blocks_that_changed_places_alter_the_checksum(block: int) -> None:
    x = np.random.default_rng(2).normal(size=2**16).astype(np.float32)
    y = x.copy()
    y[:block], y[2**15 : 2**15 + block] = x[2**15 : 2**15 + block], x[:block]
    (a,), (b,) = (array_checksums([jnp.asarray(z)]).values().values() for z in (x, y))
    assert a[:8] == b[:8]
    assert a[8:] != b[8:]


def test_damage_between_memory_and_files_is_found_in_the_restored_arrays(saved: Path) -> None:
    kit.write_other_state(saved / "10", saved / "5")
    assert checksums.examine(saved / "10").state == "whole"
    found = restored(saved)
    assert found.step == 5
    assert "array 0/gate and 3 more differs from its checksum" in found.damaged[0]


# --------------------------------------------------------------------- meshes and processes


def run_kit(*arguments: object, devices: int = 1) -> list[str]:
    return [sys.executable, str(KIT), *map(str, arguments)], {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def test_verified_and_damage_found_on_other_meshes(tmp_path: Path) -> None:
    command, environment = run_kit("meshes", tmp_path / "meshes", devices=8)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["equal"]  # four meshes, one checksum
    assert told["verified"] == 16
    for step, *lines in told["detected"]:
        assert step == 4
        assert "array 0/gate and 3 more differs from its checksum" in lines[0]
    assert len(told["detected"]) == 4


@pytest.mark.slow
def test_two_processes_verify_together_and_agree(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for me in range(2):
        command, environment = run_kit("process", tmp_path / "ck", me, 2, port, devices=2)
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        outcomes = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    told = [json.loads(out.splitlines()[-1]) for out, _ in outcomes]
    assert told[0] == told[1]
    assert (told[0]["step"], told[0]["same"], told[0]["again"]) == (4, True, 5)
    assert told[0]["said"][0].endswith("6 is damaged: state/manifest.ocdbt is altered")
    assert told[0]["said"][1].endswith("is missing")


# -------------------------------------------------------------------------------- parameters


def test_trained_parameters_are_verified(tmp_path: Path) -> None:
    path, parameters = tmp_path / "parameters", kit.small_state(3)[0]
    checkpoint.save_parameters(path, parameters)
    checkpoint.save_parameters(path, parameters)
    assert kit.same(load_parameters(path, LIKE[0]), parameters)
    for damage, words in DAMAGES.values():
        checkpoint.save_parameters(path, parameters)
        file = path / "_METADATA"
        damage(file)
        message = rf"{path} is damaged: _METADATA {words}; remove {tmp_path} and run it again"
        with pytest.raises(UserError, match=message):
            load_parameters(path, LIKE[0])


def test_parameters_damaged_before_their_files_were_sealed_are_found(tmp_path: Path) -> None:
    path, parameters = tmp_path / "parameters", kit.small_state(3)[0]
    checkpoint.save_parameters(path, parameters)
    arrays = checksums.read_seal(path).arrays
    checksums.seal(path, {**arrays, "half": "0" * 16})
    with pytest.raises(UserError, match="parameters is damaged: restored, array half differs"):
        load_parameters(path, LIKE[0])


# ------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_goes_on_from_the_step_before_to_the_same_result(
    workplace: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run()
    store, tick = open_store(run.data), speed.Speed.step_ended
    straight = run_directory(trained / "runs", "tiny", run)

    def stop(self: object, step: int) -> None:
        if step == 18:
            raise KeyboardInterrupt
        tick(self, step)

    directory = RunDirectory(Path("damaged"))
    with monkeypatch.context() as patch:
        patch.setattr(speed.Speed, "step_ended", stop)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run, directory, store)
    damaged = directory.checkpoints / "15"
    kit.flip(kit.data_file(damaged), 5000)
    loop.train(run, directory, store)
    assert directory.result()["result"] == straight.result()["result"]
    assert [a["first_step"] for a in directory.attempts()] == [0, 10]
    (line,) = directory.attempts()[1]["damaged_checkpoints"]
    assert f"{damaged} is damaged: state/" in line
    lines = [m["step"] for m in directory.metrics() if "learning/loss" in m]
    assert lines == list(range(1, 25))


# ------------------------------------------------------------------------------ the verb


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunDirectory]:
    """Three runs of an experiment in the working directory: two with steps 5 and 10, one not begun."""
    text = f"""
import sys
sys.path.append({str(KIT.parent)!r})
from training_kit import tiny_run
def runs():
    return [tiny_run(f"seed{{i}}", seed=i) for i in range(3)]
"""
    (tmp_path / "grid.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GQA_SCALING_RUNS", "runs")
    runs = [tiny_run(f"seed{i}", seed=i) for i in range(3)]
    directories = [run_directory("runs", "grid", run) for run in runs]
    for run, directory in zip(runs[:2], directories, strict=False):
        directory.begin(run, {})
        kit.save_steps(directory.checkpoints, 5, 10)
    return directories


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    capsys.readouterr()
    code = cli.main(["checkpoints", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_verb_lists_and_verifies(
    experiment: list[RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = told(capsys, "grid.py")
    assert (code, out["damaged"], len(out["runs"])) == (0, 0, 2)
    kit.flip(kit.data_file(experiment[0].checkpoints / "10"), 99)
    (experiment[1].checkpoints / f"15{checksums.UNFINISHED_SUFFIX}").mkdir()
    code, out = told(capsys, "grid.py")
    first, second = out["runs"]
    assert (code, out["damaged"]) == (1, 1)
    assert [(k["name"], k["state"]) for k in first["kept"]] == [
        ("step 10", "damaged"),
        ("step 5", "whole"),
    ]
    assert first["kept"][0]["damage"][0].endswith("is altered")
    assert first["kept"][1]["bytes"] > 16_000
    assert first["kept"][1]["saved"] == pytest.approx(time.time(), abs=300)
    assert (first["resume"], second["resume"]) == ("step 5", "step 10")
    assert second["kept"][2]["state"] == "unfinished"
    assert told(capsys, "grid.py", "--only", "seed1") == (0, {"damaged": 0, "runs": [second]})
    assert told(capsys, experiment[1].path) == (0, {"damaged": 0, "runs": [second]})
    assert told(capsys, "runs/grid")[1]["damaged"] == 1
    assert cli.main(["checkpoints", "grid.py"]) == 1
    table = capsys.readouterr().out
    assert "checkpoints of 2 runs: 3 whole, 1 damaged, 1 unfinished" in table
    kit.data_file(experiment[0].checkpoints / "5").unlink()
    assert told(capsys, experiment[0].path)[1]["runs"][0]["resume"] == "refused: none is whole"


def test_the_verb_changes_nothing_while_a_run_is_being_trained(
    experiment: list[RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = experiment[0]
    (directory.checkpoints / f"15{checksums.UNFINISHED_SUFFIX}" / "state").mkdir(parents=True)

    def listing() -> list[tuple[Path, int]]:
        return [(p, p.stat().st_mtime_ns) for p in sorted(directory.path.rglob("*"))]

    with claim(directory.claim_file):
        before = listing()
        code, out = told(capsys, "grid.py", "--only", "seed0")
        assert listing() == before
    assert (code, out["runs"][0]["state"]) == (0, "running")


def test_a_step_that_retention_takes_meanwhile_is_no_damage(
    experiment: list[RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, look = experiment[0].checkpoints, checksums.read_seal

    def taken(path: Path) -> checksums.Seal:
        if path == folder / "5":
            path.rename(folder.parent / "elsewhere")
        return look(path)

    monkeypatch.setattr(checksums, "read_seal", taken)
    (run,) = read_checkpoints([experiment[0]])
    assert [(k.name, k.state) for k in run.kept] == [("step 10", "whole")]


def test_the_verb_tells_of_parameters(
    experiment: list[RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = experiment[0]
    checkpoint.save_parameters(directory.parameters, kit.small_state()[0])
    resume = told(capsys, directory.path)[1]["runs"][0]["resume"]
    assert resume == "parameters: evaluation is left"
    kit.flip(directory.parameters / "manifest.ocdbt", 50)
    code, out = told(capsys, directory.path)
    assert (code, out["runs"][0]["resume"]) == (1, "refused: parameters are damaged")
    directory.finish({}, {})
    code, out = told(capsys, directory.path)
    (kept,) = out["runs"][0]["kept"]
    assert (code, kept["name"], kept["damage"]) == (1, "parameters", ["manifest.ocdbt is altered"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nothing.py", "no such file"),
        (".", "neither a run nor a folder of runs"),
        (". --only x", "is a directory: --only, --shard and fields select of a grid"),
        ("grid.py --only x", "matches none of 3 runs"),
    ],
)
def test_the_verb_refuses_in_one_line(
    experiment: list[RunDirectory],
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    said: str,
) -> None:
    assert cli.main(["checkpoints", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_the_verb_needs_no_jax(experiment: list[RunDirectory]) -> None:
    script = """
import sys
from gqa_scaling.cli import main
main(["checkpoints", "grid.py"])
print("loaded:", *sorted({"jax", "orbax", "flax"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded:"


# -------------------------------------------------------------------------- kill -9, at size

MIB = 512
SHARES = (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1)  # of the bytes, written when the kill comes


class _Saving:
    """A process that saves step 2 when told to."""

    def __init__(self, folder: Path) -> None:
        command, environment = run_kit("save", folder, MIB)
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def begin(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.communicate(timeout=120)


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def reached(unfinished: Path, moment: float | str) -> bool:
    """Whether a save under way has got to a moment, or past its end."""
    if unfinished.with_name("2").exists():
        return True
    try:
        if moment == "sealed":
            return (unfinished / checksums.SEAL_NAME).exists()
        return unfinished.exists() and written(unfinished) >= moment * MIB * 2**20
    except FileNotFoundError:  # a file was renamed while we looked
        return False


@pytest.mark.slow
def test_killed_at_ten_moments_of_a_save_of_half_a_gigabyte(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    unfinished = folder / f"2{checksums.UNFINISHED_SUFFIX}"
    undisturbed = _Saving(folder)  # also saves step 1
    began = time.monotonic()
    undisturbed.begin()
    while undisturbed.process.stdout.readline() != "saved\n":
        pass
    seconds = time.monotonic() - began
    undisturbed.end()
    assert checksums.examine(folder / "1").bytes >= 500e6
    print(f"\nundisturbed: {seconds:.2f} s for {written(folder / '2') / 1e6:.0f} MB")
    inside = 0
    for moment in (*SHARES, "all written", "sealed"):
        shutil.rmtree(folder / "2", ignore_errors=True)
        saving = _Saving(folder)
        saving.begin()
        began = time.monotonic()
        while not reached(unfinished, 1 if moment == "all written" else moment):
            time.sleep(0.001)
        if moment == "all written":
            time.sleep(0.1)  # its files are being hashed
        saving.process.send_signal(signal.SIGKILL)
        after = time.monotonic() - began
        saving.end()
        committed = (folder / "2").exists()
        assert unfinished.exists() != committed
        inside += not committed
        megabytes = written(unfinished) / 1e6
        command, environment = run_kit("restore", folder, MIB)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        print(
            f"killed at {moment}: after {after:.2f} s, "
            f"{'committed' if committed else f'cut short with {megabytes:.0f} MB on disk'}; "
            f"restored step {found['step']}, the same bits: {found['same']}"
        )
        assert found == {"step": 2 if committed else 1, "same": True, "said": []}
    assert inside >= 8
