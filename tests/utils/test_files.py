import os

import pytest

from llamafactory_ddm.utils.files import published_together


def fill(folder, **files):
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def texts(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_files_replace_those_of_the_same_name_and_leave_others(tmp_path):
    fill(tmp_path, a__json="old", optimizer__pt="kept")
    with published_together(tmp_path, last="z.json") as scratch:
        fill(scratch, a__json="new", z__json="last")
        assert texts_of_files(tmp_path) == {"a.json": "old", "optimizer.pt": "kept"}
    assert texts(tmp_path) == {"a.json": "new", "optimizer.pt": "kept", "z.json": "last"}


def texts_of_files(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def test_an_error_changes_nothing_and_names_the_cure(tmp_path):
    fill(tmp_path, model__safetensors="old")
    words = r"could not save to .*no space.*resume_from_checkpoint: true"
    with pytest.raises(OSError, match=words), published_together(tmp_path, last="z.json") as scratch:
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


def test_what_a_killed_save_left_is_cleared(tmp_path):
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
    kept = {"config.json"} if saved.startswith("model") else {"adapter_config.json"}
    assert {p.name for p in tmp_path.iterdir()} == {saved, "notes.txt", *kept}
