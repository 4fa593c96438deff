"""A store replaces its folder as a whole: nothing that is no part of a store may lie in it."""

import shutil

import pytest

from gqa_scaling.config import UserError
from gqa_scaling.data import prepare


@pytest.mark.parametrize("name", ["notes.txt", "deep/train-00000.bin", ".env", "store.json.bak"])
def test_a_rebuild_removes_nobodys_file(config, name):
    path, top = prepare(config(), show=False).path, name.partition("/")[0]
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{top} in it is no part of a token store.*move that"):
        prepare(config(), show=False, rebuild=True)
    assert (path / name).read_text() == "mine"
    assert prepare(config(), show=False).path == path  # the store itself is as good as before
    shutil.move(path / top, path.parent)
    prepare(config(), show=False, rebuild=True)


@pytest.mark.parametrize("text", ['{"shop": "mine"}', "none", "[1]"])
def test_a_store_json_of_something_else_is_not_replaced(config, tmp_path, text):
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "store.json").write_text(text)
    with pytest.raises(UserError, match=r"store\.json in it is no part of a token store"):
        prepare(config(store=str(place)), show=False, rebuild=True)
    assert (place / "store.json").read_text() == text


def test_a_store_never_empties_a_bucket(config, bucket):
    (bucket / "results.csv").write_text("mine")
    with pytest.raises(UserError, match=r"results\.csv in it is no part of a token store"):
        prepare(config(store=str(bucket)), show=False)
    assert (bucket / "results.csv").read_text() == "mine"
    store = prepare(config(store=f"{bucket}/tokens"), show=False)
    prepare(config(store=f"{bucket}/tokens"), show=False, rebuild=True)
    assert (bucket / "results.csv").read_text() == "mine"
    assert store.train_tokens > 0
