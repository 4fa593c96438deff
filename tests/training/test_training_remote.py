"""A run whose directory and tokens lie on an S3-compatible server: nothing is lost, nothing differs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest
from checkpoint_kit import abstract, same, save_steps, small_state
from moto.s3.responses import S3Response
from training_kit import result_of, tiny_run

from gqa_scaling import cli
from gqa_scaling.config import UserError
from gqa_scaling.data import open_store, prepare
from gqa_scaling.data.loader import TrainingData
from gqa_scaling.data.store import cached_store
from gqa_scaling.devices import processes
from gqa_scaling.files import claims
from gqa_scaling.files.checkpoint import open_checkpoints
from gqa_scaling.files.checksums import examine_run
from gqa_scaling.files.claims import claim
from gqa_scaling.files.runs import RunDirectory, run_directory, write_json
from gqa_scaling.files.storage import as_path, cache_folder, replace, sizes, version, write_atomic
from gqa_scaling.sweep.status import read_checkpoints

# The command, killed at a moment; or at step 13 it says so and goes on after a line of input.
COMMAND = """
import sys
import time
sys.path.insert(0, {kit!r})
import training_kit
from gqa_scaling.training import speed

moment = sys.argv.pop(1)
tick = speed.Speed.step_ended

def wait(self, step):
    if step == 13:
        print("step 13", flush=True)
        sys.stdin.readline()
    if step > 13:
        time.sleep(0.05)  # so that some steps are left when it stops
    tick(self, step)

if moment == "wait":
    speed.Speed.step_ended = wait
elif moment:
    training_kit.arrange(moment)
from gqa_scaling.cli import main
sys.exit(main())
"""
KIT = str(Path(__file__).parent)


@pytest.fixture
def place(bucket, workplace, compiled, monkeypatch):
    """The root of runs in the bucket, with the tokens beside it; the working directory is local."""
    monkeypatch.setenv("GQA_SCALING_RUNS", str(bucket / "runs"))
    cache_folder().mkdir()
    (cache_folder() / "compiled").symlink_to(compiled)
    Path("command.py").write_text(COMMAND.format(kit=KIT))
    assert main("prepare") == 0
    return bucket / "runs"


@pytest.fixture
def undisturbed(trained):
    """The result of the run on a disk."""
    return result_of(trained / "runs")


def command(verb, *more, moment=""):
    return [sys.executable, "command.py", moment, verb, "tiny.py", *more]


def store(root):
    return ["--data.store", str(root.parent / "tokens")]


def main(verb, *more):
    root = as_path(os.environ["GQA_SCALING_RUNS"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "join", lambda alone=False: None)
        return cli.main([verb, "tiny.py", *more, *store(root)])


def start(root, moment=""):
    line = [*command("run", "--quiet", moment=moment), *store(root)]
    return subprocess.run(line, capture_output=True, text=True)


# ------------------------------------------------------------------------------- interruptions


def test_killed_in_a_save_and_in_evaluation_and_read_from_there(place, undisturbed, capsys):
    for moment in ("save", "evaluation"):
        assert start(place, moment).returncode == -signal.SIGKILL
        assert run_directory(place, "tiny", tiny_run()).state() == "stale"
    assert main("run", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert result_of(place) == undisturbed
    directory = run_directory(place, "tiny", tiny_run())
    assert len(directory.attempts()) == 2  # the third only evaluated
    assert not directory.checkpoints.exists()
    assert not directory.claim_file.exists()
    names = sizes(directory.path)
    assert {"config.json", "metrics.jsonl", "attempts.jsonl", "result.json"} <= names.keys()
    assert sum("tfevents" in name for name in names) == 3  # of two attempts, of HParams
    assert main("status", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert status["counts"]["done"] == 1
    assert status["runs"][0]["path"].startswith(str(place))
    assert main("run") == 0
    assert "finished" in capsys.readouterr().out
    assert cli.main(["checkpoints", str(place / "tiny")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["compilation", "step3", "step13", "step24"])
def test_killed_at_each_moment(place, undisturbed, moment):
    assert start(place, moment).returncode == -signal.SIGKILL
    assert start(place).returncode == 0
    assert result_of(place) == undisturbed


@pytest.mark.slow
def test_a_server_that_goes_away_costs_no_more_than_time(place, undisturbed, s3_server):
    line = [*command("run", moment="wait"), *store(place)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(line, text=True, **pipes) as running:
        assert running.stdout.readline() == "step 13\n"
        s3_server.stop()
        try:
            _, said = running.communicate("go on\n")
        finally:
            s3_server.start()
    assert (running.returncode, said.count("\n")) == (74, 1), said
    assert said.startswith("gqa-scaling: remote storage failed (")
    directory = run_directory(place, "tiny", tiny_run())
    assert not directory.failure_file.exists()
    assert [kept.state for kept in examine_run(directory.checkpoints, directory.parameters)]
    done = start(place)
    assert (done.returncode, done.stderr) == (0, "")
    assert result_of(place) == undisturbed


@pytest.mark.slow
def test_preempted_it_saves_and_continues(place, undisturbed):
    line = [*command("run", "--quiet", moment="wait"), *store(place)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(line, text=True, **pipes) as running:
        assert running.stdout.readline() == "step 13\n"
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate("go on\n")
    assert running.returncode == 75, said
    kept = read_checkpoints([run_directory(place, "tiny", tiny_run())])[0]
    assert kept.resume == kept.kept[0].name
    assert kept.damaged == 0
    assert start(place).returncode == 0
    assert result_of(place) == undisturbed


def test_a_study_is_read_and_written_there(bucket):
    csv = resources.files("gqa_scaling.study") / "chen2025.csv"
    write_atomic(bucket / "runs.csv", csv.read_bytes())
    beside = ["--data", "--figures", "svg", "--tensorboard"]
    assert cli.main(["report", str(bucket / "runs.csv"), "--refits", "100", *beside]) == 0
    names = sizes(bucket / "runs-report")
    assert {"report.html", "fit.json", "results.csv"} <= names.keys()
    assert any(name.startswith("figures/") and name.endswith(".svg") for name in names)
    assert sum(name.startswith("study/events.out.tfevents") for name in names) == 1
    assert not [name for name in names if Path(name).name.startswith(".")]


# ------------------------------------------------------------------------ what cannot be done


def test_a_bucket_that_is_not_there_is_said_before_anything_is_trained(place, capsys, monkeypatch):
    monkeypatch.setattr("gqa_scaling.training.loop.train", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr("gqa_scaling.devices.processes.join", lambda alone: None)  # once a process
    monkeypatch.setenv("GQA_SCALING_RUNS", "s3://nowhere-at-all/runs")
    assert (
        cli.main(["run", "tiny.py", "--quiet", "--data.store", str(place.parent / "tokens")]) == 2
    )
    said = capsys.readouterr().err
    assert said.startswith("gqa-scaling: cannot write to s3://nowhere-at-all/runs (")
    assert said.count("\n") == 1


def test_a_server_that_does_not_answer_is_one_line(place, s3_server, capsys):
    s3_server.stop()
    try:
        for verb in ("status", "fit"):
            assert main(verb) == 74
            said = capsys.readouterr().err
            assert said.startswith("gqa-scaling: remote storage failed (")
            assert said.count("\n") == 1
    finally:
        s3_server.start()


# --------------------------------------------------------------------------------- checkpoints


def test_checkpoints_are_saved_verified_and_restored(bucket):
    save_steps(bucket, 1, 2, 3)
    assert [kept.name for kept in examine_run(bucket, bucket / "none")] == ["step 3", "step 2"]
    with open_checkpoints(bucket, 2) as checkpoints:
        found = checkpoints.restore_latest(abstract(small_state()))
    assert (found.step, found.position, found.damaged) == (3, {"step": 3}, ())
    assert same(found.state, small_state(3))


def test_a_damaged_one_is_named_and_the_one_before_used(bucket, capsys):
    save_steps(bucket, 1, 2)
    file = bucket / "2/state/manifest.ocdbt"
    write_atomic(file, file.read_bytes()[:-1])
    assert examine_run(bucket, bucket / "none")[0].damage == ("state/manifest.ocdbt is truncated",)
    with open_checkpoints(bucket, 2) as checkpoints:
        found = checkpoints.restore_latest(abstract(small_state()))
        assert found.step == 1
        assert same(found.state, small_state(1))
        checkpoints.save(2, small_state(2), {"step": 2})
    assert "step 1" in capsys.readouterr().err
    assert [kept.state for kept in examine_run(bucket, bucket / "none")] == ["whole", "whole"]


def test_one_without_its_last_object_never_counted(bucket):
    save_steps(bucket, 1, 2)
    (bucket / "2/commit_success.txt").unlink()
    states = [(kept.name, kept.state) for kept in examine_run(bucket, bucket / "none")]
    assert states == [("step 1", "whole"), ("step 2", "unfinished")]
    with open_checkpoints(bucket, 2) as checkpoints:
        assert checkpoints.manager.latest_step() == 1
    assert [kept.name for kept in examine_run(bucket, bucket / "none")] == ["step 1"]


def test_a_server_that_is_away_is_no_damage(bucket, s3_server):
    save_steps(bucket, 1)
    s3_server.stop()
    try:
        with pytest.raises(Exception, match="Could not connect"):
            examine_run(bucket, bucket / "none")
    finally:
        s3_server.start()
    assert examine_run(bucket, bucket / "none")[0].state == "whole"


# -------------------------------------------------------------------------------------- claims


def test_one_at_a_time_holds_a_run(bucket):
    directory = RunDirectory(bucket / "run")
    with claim(directory.claim_file) as first:
        assert first
        assert directory.state() == "running"
        with claim(directory.claim_file) as second:
            assert not second
    assert not directory.claim_file.exists()
    with claim(directory.claim_file) as third:
        assert third


@pytest.fixture
def stale(bucket, monkeypatch):
    """A run whose holder, on another machine, has not been heard from for long."""
    directory = RunDirectory(bucket / "run")
    write_json(directory.claim_file, {"host": "elsewhere", "pid": 1, "born": "1", "token": "t"})
    with claim(directory.claim_file) as mine:
        assert not mine  # it was renewed just now
    monkeypatch.setattr(claims, "STALE_SECONDS", -1)
    assert directory.state() == "stale"
    return directory


def never(*_: object) -> None:
    pytest.fail("it waits")


def test_a_stale_claim_is_taken_over_at_once(stale, monkeypatch):
    monkeypatch.setattr(time, "sleep", never)
    with claim(stale.claim_file) as mine:
        assert mine
    assert not stale.claim_file.exists()


@pytest.mark.parametrize("happened", ["renewed", "taken over", "given back"])
def test_a_claim_that_changed_since_it_was_judged_is_not_taken_over(stale, monkeypatch, happened):
    """Between two requests of ours: the server refuses the one that takes it over."""
    before, judge = json.loads(stale.claim_file.read_text()), claims._is_stale
    new = {"renewed": {"renewed": 1.0}, "taken over": {"token": "another's"}}

    def judge_and_lose(*looked: object) -> bool:
        found = judge(*looked)
        if happened == "given back":
            stale.claim_file.unlink()
        else:
            write_json(stale.claim_file, before | new[happened])
        return found

    monkeypatch.setattr(claims, "_is_stale", judge_and_lose)
    monkeypatch.setattr(time, "sleep", never)
    with claim(stale.claim_file) as mine:
        assert not mine
    if happened == "given back":
        assert not stale.claim_file.exists()
    else:
        assert json.loads(stale.claim_file.read_text()) == before | new[happened]


def test_of_many_that_find_a_claim_stale_one_has_it(stale, monkeypatch):
    judge, many = claims._is_stale, threading.Barrier(8)

    def judge_together(*looked: object) -> bool:
        found = judge(*looked)
        many.wait()  # nobody writes before all have judged
        return found

    monkeypatch.setattr(claims, "_is_stale", judge_together)

    def contend(_: int) -> bool:
        with claim(stale.claim_file) as mine:
            many.wait()  # nobody gives it back before all have tried
            return mine

    with ThreadPoolExecutor(many.parties) as pool:
        assert sum(pool.map(contend, range(many.parties))) == 1


@pytest.mark.parametrize("answer", ["writes in any case", "refuses conditions"])
def test_where_the_server_cannot_decide_the_last_that_writes_has_a_stale_claim(
    stale, monkeypatch, answer
):
    put = S3Response.put_object

    def put_without_conditions(self: S3Response) -> object:
        if "If-Match" in self.headers and answer == "refuses conditions":
            return 501, {}, "<Error><Code>NotImplemented</Code></Error>"
        self.headers = {k: v for k, v in self.headers.items() if k != "If-Match"}
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", put_without_conditions)
    other = {**json.loads(stale.claim_file.read_text()), "token": "another's"}
    monkeypatch.setattr(time, "sleep", lambda seconds: write_json(stale.claim_file, other))
    with claim(stale.claim_file) as mine:
        assert not mine
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with claim(stale.claim_file) as mine:
        assert mine
    assert slept == [claims.SETTLE_SECONDS]
    assert not stale.claim_file.exists()


def test_a_claim_is_renewed_until_it_is_gone(bucket, monkeypatch):
    directory, told = RunDirectory(bucket / "run"), threading.Event()
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(claims._thread, "interrupt_main", told.set)
    with claim(directory.claim_file):
        seen = version(directory.claim_file)
        while version(directory.claim_file) == seen:
            pass
        assert not replace(directory.claim_file, "{}", seen)  # a stranger's that judged the first
        assert not told.is_set()
        directory.claim_file.unlink()
        assert told.wait(60)  # nor is a claim that is gone made anew
    assert not directory.claim_file.exists()


# -------------------------------------------------------------------------------------- tokens


@pytest.fixture
def tokens(bucket, workplace, monkeypatch):
    """The data of a run whose tokens lie in the bucket and not on this machine yet."""
    data = tiny_run(data=tiny_run().data).data
    data = type(data)(**{**data.to_dict(), "store": str(bucket / "tokens")})
    prepare(data, show=False)
    monkeypatch.setenv("GQA_SCALING_CACHE", str(cache_folder().with_name("other")))
    return data


def test_shards_are_copied_once_and_mapped(tokens, s3_server):
    store = open_store(tokens)
    assert not cache_folder().exists()  # to plan needs no shard
    assert store.hash == open_store(tiny_run().data).hash
    store.fetch()
    copies = sizes(cache_folder() / "tokens" / store.hash)
    assert {name for name in copies if name.endswith(".bin")} == {
        "train-00000.bin",
        "heldout-00000.bin",
    }
    local = open_store(tiny_run().data)
    s3_server.stop()
    try:
        batch = TrainingData(store, 32, 4, 0).batch(3)
        assert (batch == TrainingData(local, 32, 4, 0).batch(3)).all()
    finally:
        s3_server.start()
    assert store.tokens("train", 0, 9).tolist() == local.tokens("train", 0, 9).tolist()
    assert store.tokens("train", 0, 9).base is not None  # mapped, not read


def test_a_shard_that_is_not_what_was_written_is_refused(tokens, bucket):
    file = bucket / "tokens/train-00000.bin"
    write_atomic(file, bytes(len(file.read_bytes())))
    with pytest.raises(UserError, match=r"tokens/train-00000.bin is damaged"):
        open_store(tokens).fetch()
    assert not [name for name in sizes(cache_folder()) if "train" in name and "lock" not in name]
    file.unlink()
    with pytest.raises(UserError, match=r"tokens/train-00000.bin of the token store is missing"):
        open_store(tokens)


def test_a_copy_that_is_damaged_here_is_named_and_fetched_again_once_removed(tokens):
    store = open_store(tokens)
    store.verify()
    copy = cached_store(store.hash) / "train-00000.bin"
    copy.write_bytes(bytes(copy.stat().st_size))
    words = r"train-00000\.bin is damaged, .*: remove it, and it is copied from the bucket again"
    with pytest.raises(UserError, match=words):
        open_store(tokens).verify()
    copy.unlink()
    open_store(tokens).verify()


def test_a_store_that_is_half_there_is_none(tokens, bucket):
    before = sizes(bucket / "tokens")
    (bucket / "tokens/store.json").unlink()  # the last that is written
    with pytest.raises(UserError, match="there is no token store at s3://"):
        open_store(tokens)
    write_atomic(bucket / "tokens/train-00007.bin", "of an older one")
    prepare(tokens, show=False)
    assert sizes(bucket / "tokens") == before
    open_store(tokens).verify()


def test_a_corpus_must_be_here(tokens):
    data = type(tokens)(corpus="s3://somewhere/text", store=tokens.store + "-2")
    with pytest.raises(UserError, match="must lie on this machine"):
        prepare(data, show=False)
