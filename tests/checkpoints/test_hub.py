"""A diffusion model or adapter on the Hub becomes its downloaded folder, and any other name is unchanged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import LlamaConfig

from llamafactory_ddm.checkpoints import hub
from llamafactory_ddm.checkpoints.hub import local_folder, origin_of
from support.published import in_hub, write_dream, write_llada


@pytest.fixture
def downloads(monkeypatch):
    """The downloads that are requested from the Hub; none is made."""
    calls = []
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: calls.append(args))
    return calls


def test_folders_and_other_models_stay_as_they_are(tmp_path, downloads):
    LlamaConfig().save_pretrained(tmp_path / "ordinary")
    (tmp_path / "empty").mkdir()
    cache, _ = in_hub(tmp_path / "hub", "owner/ordinary", [tmp_path / "ordinary" / "config.json"])
    published = write_llada(tmp_path / "LLaDA-mini")
    for name in (tmp_path / "ordinary", tmp_path / "empty", tmp_path / "nowhere", "./x", "a/b/c", published):
        assert local_folder(name) == str(name)
    for name in ("owner/ordinary", "owner/unknown", "gpt9", "-", "a--b", "owner/with space"):
        assert local_folder(name, download_dir=str(cache)) == name
    assert downloads == []


def test_only_what_looks_like_a_name_is_looked_up(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(hub, "cached_file", lambda name, *args, **kwargs: names.append(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("./x", "/x", "~/x", "a/b/c", "data/x", "gpt2", "owner/model"):
        local_folder(name)
    assert set(names) == {"gpt2", "owner/model"}


@pytest.mark.parametrize("write", [write_llada, write_dream])
def test_a_published_family_is_found_by_its_config(write, tmp_path):
    published = write(tmp_path / "published")
    cache, snapshot = in_hub(tmp_path / "hub", "owner/mini", [p for p in published.iterdir() if p.suffix != ".py"])
    assert local_folder("owner/mini", download_dir=str(cache)) == str(snapshot)


def test_a_download_in_the_usual_cache_goes_by_its_name(tmp_path, monkeypatch):
    """An adapter records the Hub name, unless the download is not in the usual cache."""
    (tmp_path / "diffusion_config.json").write_text("{}")
    cache, snapshot = in_hub(tmp_path / "hub", "owner/model", [tmp_path / "diffusion_config.json"])
    assert local_folder("owner/model", download_dir=str(cache)) == str(snapshot)
    assert origin_of(snapshot) == str(snapshot)  # not the usual cache
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    assert origin_of(snapshot) == "owner/model"
    older = snapshot.with_name("another")
    older.mkdir()
    assert origin_of(older) == str(older)
    assert origin_of("/") == "/" and origin_of("x") == "x"


def test_its_own_folder_alone_is_downloaded(tmp_path, monkeypatch):
    """Neither checkpoints in subfolders, nor code, nor both kinds of weights."""
    (tmp_path / "diffusion_config.json").write_text("{}")
    cache, snapshot = in_hub(tmp_path / "hub", "owner/model", [tmp_path / "diffusion_config.json"])
    listed = ["diffusion_config.json", "merges.txt", "vocab.json", "chat_template.jinja", "model.safetensors"]
    needed = [*listed]
    listed += ["README.md", "modeling_llada.py", "pytorch_model.bin", "training_args.bin"]
    listed += ["checkpoint-5/model.safetensors", "checkpoint-5/optimizer.bin", "checkpoint-5/config.json"]
    downloaded, options = [], {}

    def download(name, *, allow_patterns, ignore_patterns, **kwargs):
        options.update(kwargs)
        files = list(filter_repo_objects(listed, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        downloaded.append(files)
        for file in files:
            (snapshot / file).touch()
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    local_folder("owner/model", revision="main", download_dir=str(cache), token="secret")
    assert downloaded == [needed]
    assert options == {"revision": "main", "cache_dir": str(cache), "token": "secret"}
    downloaded.clear()
    listed.remove("model.safetensors")
    (snapshot / "model.safetensors").unlink()
    local_folder("owner/model", download_dir=str(cache))
    assert downloaded[1:] == [["pytorch_model.bin"]]


def test_a_download_that_fails_is_an_error(tmp_path, monkeypatch):
    published = write_llada(tmp_path / "LLaDA-mini")
    cache, _ = in_hub(tmp_path / "hub", "owner/LLaDA-mini", [published / "config.json"])
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no line")))
    with pytest.raises(ValueError, match=r"owner/LLaDA-mini .*\(no line\)"):
        local_folder("owner/LLaDA-mini", download_dir=str(cache))


@pytest.mark.slow
def test_by_name_from_the_shell(tmp_path):
    """HF_HOME is the folder of the Hub's cache."""
    published = write_llada(tmp_path / "LLaDA-mini")
    files = [path for path in published.iterdir() if path.suffix != ".py"]
    in_hub(tmp_path / "home" / "hub", "owner/LLaDA-mini", files)
    before = {path: path.stat().st_mtime_ns for path in Path(tmp_path / "home").rglob("*")}
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_CACHE"}
    argv = ["generate", "owner/LLaDA-mini", "--max-new-tokens", "3", "--steps", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "llamafactory_ddm.cli.main", *argv],
        env={**env, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "custom code" not in done.stdout + done.stderr
    new_files = {path for path in Path(tmp_path / "home").rglob("*") if path.is_file()} - before.keys()
    assert not [path for path in new_files if path.suffix == ".safetensors"]  # no second copy
