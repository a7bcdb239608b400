import os
import stat

import pytest

from llamafactory_ddm.utils.files import CouldNotSave, new_folder, published_together, replacing


def fill(folder, **files):
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def texts(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("kind", "text"), [("w", "caf\u00e9\n"), ("wb", b"\xff\n")])
def test_a_new_file_takes_the_place_of_the_old_one_and_has_ordinary_permissions(tmp_path, umask, kind, text):
    path = tmp_path / "new" / "a.json"
    for _ in range(2):
        with replacing(path, kind) as file:
            file.write(text)
        assert path.read_bytes() == (text if kind == "wb" else text.encode())
        path.with_name("a.json.tmp").write_text("left by a killed write, longer than the text")
    assert mode(path) == 0o640


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_alone_and_an_error_names_it(tmp_path, monkeypatch, fails, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_):
        raise error(28, "No space left on device")

    if fails != "write":
        monkeypatch.setattr(os, fails, fail)
    with pytest.raises(error) as caught, replacing(path) as file:
        file.write("half")
        if fails == "write":
            fail()
    assert texts(tmp_path) == {"a.json": "old"}
    assert error is KeyboardInterrupt or str(path) in str(caught.value)


def test_a_new_folder_appears_when_it_is_complete_and_has_ordinary_permissions(tmp_path, umask):
    (tmp_path / "model").mkdir()
    for target in (tmp_path / "absent" / "a", tmp_path):
        with new_folder(target / "model") as scratch:
            fill(scratch, a__json="new")
            assert not (target / "model" / "a.json").exists()
        assert texts(target / "model") == {"a.json": "new"} and mode(target / "model") == 0o750
        assert [path.name for path in target.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_fails_does_not_appear(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / name) as scratch:
            fill(scratch, a__json="half")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not texts(tmp_path / "empty")


def test_files_replace_those_of_the_same_name_and_leave_others(tmp_path):
    fill(tmp_path, a__json="old", optimizer__pt="kept")
    with published_together(tmp_path, last="z.json") as scratch:
        fill(scratch, a__json="new", z__json="last")
        assert texts_of_files(tmp_path) == {"a.json": "old", "optimizer.pt": "kept"}
    assert texts(tmp_path) == {"a.json": "new", "optimizer.pt": "kept", "z.json": "last"}


def texts_of_files(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def test_an_error_changes_nothing_and_says_what_to_do(tmp_path):
    fill(tmp_path, model__safetensors="old")
    pattern = rf"{tmp_path}: no space.*resume_from_checkpoint: true"
    with pytest.raises(CouldNotSave, match=pattern), published_together(tmp_path, last="z.json") as scratch:
        fill(scratch, model__safetensors="half")
        raise OSError("no space left on device")
    assert texts(tmp_path) == {"model.safetensors": "old"}


def test_weights_come_first_and_the_mark_of_completeness_last(tmp_path, monkeypatch):
    order = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(os.path.basename(b)), real(a, b)))
    with published_together(tmp_path, last="a.json") as scratch:
        for name in ("a.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
            (scratch / name).write_text("x")
    assert order == ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "a.json"]


def test_weights_of_an_earlier_save_in_another_layout_are_removed(tmp_path):
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "adapter.txt"):
        (tmp_path / name).write_text("old")
    with published_together(tmp_path, last="z.json") as scratch:
        (scratch / "model.safetensors").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.txt", "model.safetensors"]


def test_files_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / ".unfinished-abc").mkdir()
    (tmp_path / ".unfinished-abc" / "model.safetensors").write_text("half")
    with published_together(tmp_path, last="z.json") as scratch:
        (scratch / "z.json").write_text("x")
    assert texts(tmp_path) == {"z.json": "x"}


@pytest.mark.parametrize("saved", ["model.safetensors", "adapter_model.safetensors"])
def test_a_model_and_an_adapter_do_not_mix(tmp_path, saved):
    old = ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.bin", "README.md", "notes.txt")
    for name in old:
        (tmp_path / name).write_text("old")
    with published_together(tmp_path, last="z.json") as scratch:
        (scratch / saved).write_text("new")
        (scratch / ("config.json" if saved.startswith("model") else "adapter_config.json")).write_text("new")
    remaining = {"config.json"} if saved.startswith("model") else {"adapter_config.json"}
    assert {p.name for p in tmp_path.iterdir()} == {saved, "notes.txt", *remaining}
