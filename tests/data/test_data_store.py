"""A token store holds exactly the corpus, is there entirely or not at all, and notices damage."""

import dataclasses
import filecmp
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import zstandard

from gqa_scaling.config import DataConfig, UserError
from gqa_scaling.data import build, open_store, prepare, tokenise, verification
from gqa_scaling.data.corpus import FETCHED
from gqa_scaling.data.manifest import content_hash, file_entries
from gqa_scaling.data.verification import NOTE


def held_out(text, fraction=0.2):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < fraction * 2**64


def expected(texts, heldout):
    """The bytes of a split, as ids, straight from the definition."""
    kept = [list(t.encode()) + [256] for t in texts.values() if held_out(t) == heldout]
    return [i for k in kept for i in k], np.cumsum([len(k) for k in kept]).tolist()


def ends_of(store, split):
    """Where the documents of a split end, EOS included."""
    return np.load(store.path / f"{split}.documents.npy").tolist()


def names(path):
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_document_lies_in_its_split_in_order_and_ends_with_eos(store, texts, split):
    tokens, ends = expected(texts, split == "heldout")
    total = {"train": store.train_tokens, "heldout": store.heldout_tokens}[split]
    assert store.tokens(split, 0, total).tolist() == tokens
    assert ends_of(store, split) == ends
    assert store.tokens(split, 5, 9).dtype == np.uint16


def test_bytes_per_token_counts_text_without_eos(store, texts):
    held = [t for t in texts.values() if held_out(t)]
    size = sum(len(t.encode()) for t in held)
    assert store.heldout_bytes_per_token == size / (size + len(held))


def test_hashes_say_what_they_are_of(store, texts):
    digests = b"".join(hashlib.sha256(t.encode()).digest() for t in texts.values())
    assert store.describe()["corpus_hash"] == hashlib.sha256(digests).hexdigest()
    assert len(store.hash) == 64
    json.dumps(store.describe())
    assert str(store.path) not in json.dumps(store.describe())


@pytest.mark.parametrize("size", [97, 1000])
def test_shards_are_read_across_their_boundaries(config, monkeypatch, store, texts, size):
    monkeypatch.setattr(tokenise, "SHARD_TOKENS", size)
    sharded = prepare(config())
    sharded.verify()
    tokens, ends = expected(texts, heldout=False)
    n = len(tokens)
    assert len(list(sharded.path.glob("train-*.bin"))) == -(-n // size)
    assert ends_of(sharded, "train") == ends
    spans = [(0, n), (0, 0), (n, n), (n - 1, n), (0, size), (size, 2 * size), (size - 1, size + 1)]
    for start, stop in [*spans, (size, size), (size // 2, 4 * size + 1)]:
        for one in (store, sharded):
            assert one.tokens("train", start, stop).tolist() == tokens[start:stop]
    for start, stop in [(0, n + 1), (-1, 3), (4, 3)]:
        with pytest.raises(IndexError, match="must lie within"):
            sharded.tokens("train", start, stop)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
def test_the_number_of_workers_changes_no_byte(config, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "as it was")
    monkeypatch.setattr(tokenise, "TASK_BYTES", 500)  # more tasks than the pool looks ahead
    stores = [
        prepare(config(tokenizer=tokenizer, store=str(tmp_path / str(n))), workers=n)
        for n in (1, 2)
    ]
    assert os.environ["TOKENIZERS_PARALLELISM"] == "as it was"
    assert stores[0].hash == stores[1].hash
    files = [name for name in names(stores[0].path) if name != NOTE]
    assert filecmp.cmpfiles(stores[0].path, stores[1].path, files, shallow=False)[0] == files


def test_the_order_of_documents_and_their_names_do_not_choose_the_split(config, tmp_path, texts):
    lines = [json.dumps({"text": t}) + "\n" for t in reversed(texts.values())]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    a, b = (
        prepare(config()),
        prepare(config(corpus=str(tmp_path / "c.jsonl"), store=f"{tmp_path}/b")),
    )
    assert a.heldout_tokens == b.heldout_tokens
    assert a.hash != b.hash  # but the tokens come in another order


def test_bpe_store_decodes_to_its_documents(config, texts):
    store = prepare(config(tokenizer="bpe-300"))
    assert store.vocab_size == 300
    assert open_store(config(tokenizer="bpe-300")).tokenizer == store.tokenizer
    assert (
        store.describe()["tokenizer_hash"]
        == hashlib.sha256((store.path / "tokenizer.json").read_bytes()).hexdigest()
    )
    begin, out = 0, []
    for end in ends_of(store, "train"):
        document = store.tokens("train", begin, end)
        assert document[-1] == store.tokenizer.eos
        out.append(store.tokenizer.decode(document))
        begin = end
    assert out == [t for t in texts.values() if not held_out(t)]


def test_bpe_learns_nothing_from_the_held_out_split(config, folder, tmp_path, texts):
    base = prepare(config(tokenizer="bpe-300"))
    shutil.copytree(folder, tmp_path / "more")
    extra = next(t for i in range(100) if held_out(t := f"{i} " + "zq" * 3000))
    (tmp_path / "more" / "extra.txt").write_text(extra)
    other = prepare(config(corpus=f"{tmp_path}/more", tokenizer="bpe-300", store=f"{tmp_path}/t"))
    assert other.describe()["tokenizer_hash"] == base.describe()["tokenizer_hash"]
    assert other.heldout_tokens > base.heldout_tokens


def test_no_op_when_it_is_there_and_rebuild_replaces(config, tmp_path):
    first = prepare(config())
    stamp = (first.path / "store.json").stat().st_mtime_ns
    assert prepare(config()).hash == first.hash == open_store(config()).hash
    assert (first.path / "store.json").stat().st_mtime_ns == stamp
    assert prepare(config(), rebuild=True).hash == first.hash
    assert (first.path / "store.json").stat().st_mtime_ns != stamp
    assert names(tmp_path) == ["s"]


def test_another_declaration_is_refused_by_name_of_what_differs(config):
    prepare(config())
    for verb in (prepare, open_store):
        with pytest.raises(
            UserError, match=r"heldout_fraction: 0.2 -> 0.3.*data\.store.*--rebuild"
        ):
            verb(config(heldout_fraction=0.3))
    assert prepare(config(heldout_fraction=0.3), rebuild=True).heldout_tokens > 0


def test_a_store_may_travel_without_its_corpus_but_notices_a_changed_one(config, folder, tmp_path):
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    store = prepare(config(corpus=str(moved)))
    assert prepare(config()).hash == store.hash  # the same corpus in another place
    (moved / "new.txt").write_text("new")
    with pytest.raises(UserError, match=r"has changed since.*--rebuild"):
        prepare(config(corpus=str(moved)))
    shutil.rmtree(moved)
    assert prepare(config(corpus=str(moved))).hash == store.hash


def test_a_missing_store_says_how_to_make_it(config):
    with pytest.raises(UserError, match="gqa-scaling prepare"):
        open_store(config())


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("train-00000.bin", cut, r"train-00000\.bin has \d+ bytes but must have \d+"),
        ("train-00000.bin", Path.unlink, r"train-00000\.bin of the token store is missing"),
        ("heldout-00000.bin", lambda p: p.write_bytes(b""), "has 0 bytes"),
        ("heldout.documents.npy", cut, r"heldout\.documents\.npy has"),
        ("store.json", lambda p: p.write_bytes(b""), r"store\.json is damaged"),
        ("store.json", lambda p: p.write_bytes(b"[]"), r"store\.json is damaged"),
        ("store.json", lambda p: p.write_bytes(b"{}"), r"store\.json is damaged"),
        ("store.json", cut, r"store\.json is damaged"),
    ],
)
def test_damage_is_named_when_opened(config, store, file, damage, words):
    path = Path(shutil.copytree(store.path, config().store))
    damage(path / file)
    for verb in (open_store, prepare):
        with pytest.raises(UserError, match=words + ".*--rebuild") as caught:
            verb(config())
        assert "\n" not in str(caught.value)
    assert prepare(config(), rebuild=True).hash == store.hash


def test_store_json_is_held_to_its_own_hash_and_schema(config, store):
    path = Path(shutil.copytree(store.path, config().store)) / "store.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"dtype": "<u4"}))
    with pytest.raises(UserError, match="its hash is not that of its content"):
        open_store(config())
    path.write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(UserError, match="has schema 99"):
        open_store(config())


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def out_of_range(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were read to verify them, in the order of their names."""
    done = []
    verify = verification.verify_file

    def noted(file, *rest):
        done.append(file.name)
        verify(file, *rest)

    monkeypatch.setattr(verification, "verify_file", noted)
    return done


@pytest.mark.parametrize("damage", [flip, zero, out_of_range])
@pytest.mark.parametrize("file", ["train-00000.bin", "heldout-00000.bin", "train.documents.npy"])
def test_what_is_not_as_it_was_written_is_found_also_after_it_was_whole(
    config, store, file, damage
):
    path = Path(shutil.copytree(store.path, config().store))
    opened = open_store(config())
    opened.verify()
    damage(path / file)
    for look in (lambda: open_store(config()).verify(), lambda: prepare(config())):
        with pytest.raises(UserError, match=f"{file} is damaged.*--rebuild") as caught:
            look()
        assert str(caught.value).count("\n") == 0
    assert opened.hash == prepare(config(), rebuild=True).hash
    open_store(config()).verify()


def test_a_whole_store_is_read_once_and_again_when_a_file_changes(config, reads):
    files = names(prepare(config()).path)
    files.remove("store.json")
    files.remove(NOTE)
    assert sorted(reads) == files  # when it was made
    open_store(config()).verify()
    assert sorted(reads) == files
    shard = Path(config().store, "train-00000.bin")
    shard.write_bytes(shard.read_bytes())
    open_store(config()).verify()
    assert sorted(reads) == sorted(files * 2)
    prepare(config())
    assert sorted(reads) == sorted(files * 3)  # always


def test_bits_that_turn_without_a_trace_are_found_by_prepare_and_remembered(config, monkeypatch):
    """As on a disk that rots: size and times stay as they were."""
    path = prepare(config()).path
    state = verification._state
    before = state(path, open_store(config()).manifest, file_entries(manifest_of(path)))
    flip(path / "train-00000.bin")
    monkeypatch.setattr(verification, "_state", lambda *_: before)
    open_store(config()).verify()
    for verb in (prepare, lambda data: open_store(data).verify()):
        with pytest.raises(UserError, match=r"train-00000\.bin is damaged"):
            verb(config())


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"[]", b"{}"])
def test_a_note_that_says_something_else_counts_for_nothing(config, reads, garbage):
    path = prepare(config()).path
    (path / NOTE).write_bytes(garbage)
    reads.clear()
    open_store(config()).verify()
    open_store(config()).verify()
    assert len(reads) == 4


def test_where_the_store_cannot_be_written_the_note_is_kept_in_the_cache(
    config, store, monkeypatch, tmp_path, reads, capsys
):
    path = Path(shutil.copytree(store.path, config().store))
    (path / NOTE).unlink(missing_ok=True)
    (path / NOTE).mkdir()  # no file can be written there, also not by root
    monkeypatch.setenv("GQA_SCALING_CACHE", str(tmp_path / "cache"))
    open_store(config()).verify()
    open_store(config()).verify()
    assert len(reads) == 4
    assert len(names(tmp_path / "cache" / "verified")) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GQA_SCALING_CACHE", str(tmp_path / "file"))  # nor there
    open_store(config()).verify()
    open_store(config()).verify()
    assert len(reads) == 12
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("again", [False, True])
def test_a_pipe_in_the_place_of_the_note_is_refused_and_not_waited_for(config, store, again):
    path = Path(shutil.copytree(store.path, config().store))
    (path / NOTE).unlink(missing_ok=True)
    os.mkfifo(path / NOTE)
    with pytest.raises(UserError, match=r"\.verified must be a plain file, and is a pipe: remove"):
        open_store(config()).verify(again)


def manifest_of(path):
    return json.loads((path / "store.json").read_text())


def sealed_anew(path, file, change):
    """The file changed and its checksum with it, as by a program that wrote it wrongly."""
    manifest = manifest_of(path)
    change(path / file)
    for entry in file_entries(manifest):
        if entry["file"] == file:
            entry["sha256"] = hashlib.sha256((path / file).read_bytes()).hexdigest()
    manifest["hash"] = content_hash(manifest)
    (path / "store.json").write_text(json.dumps(manifest))


def test_tokens_beyond_the_vocabulary_are_refused(config, store):
    path = Path(shutil.copytree(store.path, config().store))
    sealed_anew(path, "heldout-00000.bin", out_of_range)
    words = r"heldout-00000\.bin holds token 65535, but .* ends at 256: build it again"
    with pytest.raises(UserError, match=words):
        open_store(config()).verify()


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (r"dtype='O' is no token's", lambda m: m.update(dtype="O")),
        (r"dtype='<f2' is no token's", lambda m: m.update(dtype="<f2")),
        (r"train has .* tokens of 4 bytes", lambda m: m.update(dtype="<u4")),
        (r"heldout has 0 tokens", lambda m: m["splits"]["heldout"].update(tokens=0)),
        (r"train has .* in 0 bytes", lambda m: m["splits"]["train"].update(shards=[])),
    ],
)
def test_a_store_json_that_contradicts_itself_is_refused(config, store, words, change):
    path = Path(shutil.copytree(store.path, config().store))
    manifest = manifest_of(path)
    change(manifest)
    manifest["hash"] = content_hash(manifest)
    (path / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"store\.json is damaged \({words}.*build it again"):
        open_store(config())


def test_a_store_is_verified_also_for_a_user_without_a_home(config, store, monkeypatch, reads):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    Path(shutil.copytree(store.path, config().store), NOTE).unlink(missing_ok=True)
    for name in ("GQA_SCALING_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    open_store(config()).verify()
    open_store(config()).verify()
    assert len(reads) == 4


@pytest.mark.parametrize("place", [0, 5, -1])
def test_documents_must_end_one_after_the_other_and_where_the_tokens_do(config, store, place):
    def change(file):
        ends = np.load(file)
        ends[place] += -ends[place] if place == 0 else 10**6
        np.save(file, ends)

    path = Path(shutil.copytree(store.path, config().store))
    sealed_anew(path, "train.documents.npy", change)
    with pytest.raises(UserError, match=r"train\.documents\.npy must say where documents end"):
        open_store(config()).verify()


def test_processes_that_verify_at_once_read_a_store_once(config, store, tmp_path):
    Path(shutil.copytree(store.path, config().store))
    (tmp_path / "s" / NOTE).unlink(missing_ok=True)
    program = (
        "import sys, time; from gqa_scaling.config import DataConfig\n"
        "from gqa_scaling.data import open_store, verification\n"
        "read = verification._read_all\n"
        "def noted(*a): print('read'); time.sleep(0.5); read(*a)\n"
        "verification._read_all = noted\n"
        "data = DataConfig(corpus=sys.argv[1], heldout_fraction=0.2, store=sys.argv[2])\n"
        "store = open_store(data); print('ready', flush=True); sys.stdin.readline()\n"
        "store.verify()\n"
    )
    line = [sys.executable, "-c", program, config().corpus, config().store]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(line, **pipes) for _ in range(2)]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    said = [one.communicate()[0] for one in both]
    assert sorted(said) == ["", "read\n"]
    assert [one.returncode for one in both] == [0, 0]


def test_a_changed_tokenizer_json_is_refused_and_an_absent_one_is_not_needed(config, tmp_path):
    source = prepare(config(tokenizer="bpe-300", store=f"{tmp_path}/bpe"))
    file = Path(shutil.copy(source.path / "tokenizer.json", tmp_path / "t.json"))
    store = prepare(config(tokenizer=str(file)))
    assert store.describe()["tokenizer_hash"] == source.describe()["tokenizer_hash"]
    assert np.array_equal(store.tokens("train", 0, 999), source.tokens("train", 0, 999))
    file.write_text(file.read_text() + "\n")
    for verb in (open_store, prepare):
        with pytest.raises(UserError, match=r"t\.json' has changed since"):
            verb(config(tokenizer=str(file)))
    file.unlink()
    open_store(config(tokenizer=str(file)))


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "heldout"), (1 - 1e-9, "train")])
def test_an_empty_split_is_refused_and_leaves_nothing(config, tmp_path, fraction, split):
    with pytest.raises(UserError, match=f"the {split} split is empty: none of the 120 documents"):
        prepare(config(heldout_fraction=fraction))
    assert names(tmp_path) == []


def test_a_bad_corpus_leaves_nothing(config, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    with pytest.raises(UserError, match="line 2"):
        prepare(config(corpus=str(tmp_path / "c.jsonl")))
    assert names(tmp_path) == ["c.jsonl"]


def test_a_full_disk_is_one_line_and_leaves_nothing(config, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write the token store") as caught:
            prepare(config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the token store"):
        prepare(config(store=str(tmp_path / "file" / "s")))


def test_somebody_elses_folder_is_never_replaced(config, tmp_path):
    (tmp_path / "s").mkdir()
    prepare(config())  # an empty folder is no obstacle
    shutil.rmtree(tmp_path / "s")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("years of work")
    for rebuild in (False, True):
        with pytest.raises(UserError, match="is in the way"):
            prepare(config(), rebuild=rebuild)
    assert names(tmp_path / "s") == ["thesis.txt"]


SCRIPT = """
import json, sys, time
from gqa_scaling.config import DataConfig
from gqa_scaling.data import prepare, tokenise

def until(documents, stall, tasks=tokenise._tasks):
    for number, task in enumerate(tasks(documents)):
        if number == stall:
            time.sleep(60)
        yield task

if __name__ == "__main__":
    fields, stall = json.loads(sys.argv[1])
    tokenise.TASK_BYTES = 100
    tokenise._tasks = lambda documents: until(documents, stall)
    prepare(DataConfig(**fields), workers=2)
"""


def start(path, config, stall=None):
    """Prepare in another process, which stops and waits before task number `stall`."""
    path.write_text(SCRIPT)
    arguments = json.dumps([dataclasses.asdict(config), stall])
    return subprocess.Popen([sys.executable, path, arguments], start_new_session=True)


def wait_until(condition):
    """Wait for another process; the limit only ends a test that would fail anyway."""
    for _ in range(30_000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("nothing happened")


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_way_back_through_a_folder_to_be_made_hides_none(config, tmp_path, rebuild):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for place in ("new/../mine", "new/..", "other/deep/../../mine"):
        with pytest.raises(UserError, match="is in the way"):
            prepare(config(store=str(tmp_path / place)), workers=1, rebuild=rebuild)
        assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert names(tmp_path / "mine") == ["notes.txt"]


def test_what_is_put_there_meanwhile_is_not_removed(config, tmp_path, monkeypatch):
    place, building = tmp_path / "mine", build._build

    def slow(*arguments):
        building(*arguments)
        place.mkdir()
        (place / "notes.txt").write_text("mine")

    monkeypatch.setattr(build, "_build", slow)
    with pytest.raises(UserError, match=r"notes\.txt in it is no part of a token store"):
        prepare(config(store=str(place)), workers=1)
    assert names(place) == ["notes.txt"]


def test_a_killed_prepare_leaves_no_store_and_the_next_one_cleans_up(config, tmp_path):
    killed = start(tmp_path / "script.py", config(), stall=20)
    wait_until(lambda: list(tmp_path.glob(".s.partial/train-*.bin")))
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "s").exists()
    with pytest.raises(UserError, match="there is no token store"):
        open_store(config())
    prepare(config()).verify()
    assert names(tmp_path) == ["s", "script.py"]


def test_two_prepares_at_once_make_one_store(config, tmp_path):
    both = [start(tmp_path / f"script{i}.py", config()) for i in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    open_store(config()).verify()
    assert names(tmp_path) == ["s", "script0.py", "script1.py"]


def test_two_prepares_at_once_put_one_store_into_a_bucket(config, bucket, monkeypatch):
    there, write, other = config(store=f"{bucket}/tokens"), build.write_atomic, []
    with ThreadPoolExecutor(1) as pool:

        def slow_write(path, data):
            """Another one begins just before the first is done."""
            if not other:
                other.append(pool.submit(prepare, there, show=False))
                wait(other, timeout=1)
            write(path, data)

        monkeypatch.setattr(build, "write_atomic", slow_write)
        prepare(there, show=False)
        assert other[0].result().hash == open_store(there).hash
    open_store(there).verify()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_another_disk_stays_one(config, tmp_path, there):
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        (disk / "s").mkdir()
    (tmp_path / "s").symlink_to(disk / "s")
    for rebuild in (False, True, True):
        prepare(config(), show=False, rebuild=rebuild).verify()
        assert (names(tmp_path), names(disk)) == (["disk", "s"], ["s"])
        assert (tmp_path / "s").is_symlink()


def test_the_folder_of_the_command_is_no_store(config, tmp_path, monkeypatch):
    (tmp_path / "s").mkdir()
    monkeypatch.chdir(tmp_path / "s")
    with pytest.raises(UserError, match=r"data\.store='\.' is the folder of this command"):
        prepare(config(store="."), show=False)


def test_a_fetched_corpus_is_known_by_its_records(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = tmp_path / FETCHED["linux-6.1"]
    records.parent.mkdir()
    records.write_bytes(zstandard.compress(b'{"text": "a"}\n{"text": "b"}\n' * 40))
    linux = config(corpus="linux-6.1", heldout_fraction=0.5)
    prepare(linux, show=False)
    records.write_bytes(zstandard.compress(b'{"text": "another"}\n{"text": "b"}\n' * 99))
    with pytest.raises(UserError, match="has changed since"):
        prepare(linux, show=False)
    records.unlink()
    (tmp_path / "linux-6.1").mkdir()  # somebody's own folder
    prepare(linux, show=False)


def test_left_out_files_are_reported_unless_told_not_to(config, folder, tmp_path, capsys):
    corpus = shutil.copytree(folder, tmp_path / "mixed")
    (corpus / "image.png").write_bytes(b"\xff\xfe\xfd")
    store = prepare(config(corpus=str(corpus)))
    assert capsys.readouterr().err == "left out 1 file not in UTF-8: image.png\n"
    assert store.manifest["corpus"]["not_utf8"] == ["image.png"]
    prepare(config(corpus=str(corpus), store=f"{tmp_path}/t"), show=False)
    assert capsys.readouterr() == ("", "")


def test_the_standard_library_needs_nothing(tmp_path):
    store = prepare(DataConfig(store=str(tmp_path / "s")))
    assert store.train_tokens > 5_000_000
    assert 0.01 < store.heldout_tokens / store.train_tokens < 0.15
