"""A LLaDA or Dream by path or hub name becomes a plain model in a cache, once, and anything else is left alone."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from llamafactory_ddm import load
from llamafactory_ddm.checkpoints import plain_copy as recognition
from llamafactory_ddm.checkpoints.convert import convert
from llamafactory_ddm.checkpoints.plain_copy import CACHE, ORIGIN_NAME, cache_root, origin_of, plain_folder
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.limits import LIMIT
from support.published import all_weights, in_hub, llada_weights, write_dream, write_llada


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def llada(tmp_path):
    return write_llada(tmp_path / "LLaDA-mini")


def entries(cache):
    """What lies in the cache, but for locks."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock")) if cache.exists() else []


def test_a_folder_is_converted_once_into_what_convert_makes(llada, cache, tmp_path):
    said = []
    first = plain_folder(llada, say=said.append)
    again = plain_folder(str(llada), say=said.append)
    assert first == again and Path(first).parent == cache and Path(first).name.startswith("LLaDA-mini-")
    assert len(said) == 1
    for words in (str(llada), first, CACHE, f"llamafactory-ddm convert {llada} OUT"):
        assert words in said[0]
    convert(llada, tmp_path / "out")
    ours, theirs = ({path.name: path.read_bytes() for path in Path(f).iterdir()} for f in (first, tmp_path / "out"))
    sizes = {name: len(value) for name, value in ours.items() if name != ORIGIN_NAME}
    assert json.loads(ours.pop(ORIGIN_NAME)) == {"origin": str(llada), "folder": str(llada), "files": sizes}
    assert ours == theirs
    assert origin_of(first) == str(llada) and origin_of(tmp_path / "out") == str(tmp_path / "out")
    assert entries(cache) == [Path(first).name]


def test_a_file_that_is_exchanged_gives_another_copy(llada, cache):
    before = plain_folder(llada)
    shutil.rmtree(llada)
    write_llada(llada, {key: value + 1 for key, value in llada_weights().items()})
    after = plain_folder(llada)
    assert after != before
    assert not torch.equal(
        all_weights(Path(after))["model.norm.weight"], all_weights(Path(before))["model.norm.weight"]
    )
    (llada / "README.md").write_text("Words are no part of a model.")
    assert plain_folder(llada) == after


def test_models_of_one_name_are_kept_apart(cache, tmp_path):
    folders = []
    for number, parent in enumerate(("a", "b")):
        (tmp_path / parent).mkdir()
        weights = {key: value + number for key, value in llada_weights().items()}
        folders.append(plain_folder(write_llada(tmp_path / parent / "model", weights)))
    assert len(set(folders)) == 2


def test_a_newer_conversion_makes_a_new_copy(llada, cache, monkeypatch):
    before = plain_folder(llada)
    monkeypatch.setattr(recognition, "_CONVERSION", recognition._CONVERSION + 1)
    assert plain_folder(llada) != before


def test_what_is_no_model_of_ours_stays_as_it_is(tmp_path, cache, monkeypatch):
    LlamaConfig().save_pretrained(tmp_path / "ordinary")
    (tmp_path / "empty").mkdir()
    hub, _ = in_hub(tmp_path / "hub", "owner/ordinary", [tmp_path / "ordinary" / "config.json"])
    asked = []
    monkeypatch.setattr(recognition, "snapshot_download", lambda *a, **k: asked.append(a))
    for name in (tmp_path / "ordinary", tmp_path / "empty", tmp_path / "nowhere", "./x", "a/b/c"):
        assert plain_folder(name) == str(name)
    for name in ("owner/ordinary", "owner/unknown", "gpt9", "-", "a--b", "owner/with space"):
        assert plain_folder(name, download_dir=str(hub)) == name
    assert asked == [] and entries(cache) == []


def test_only_what_looks_like_a_name_is_looked_up(tmp_path, cache, monkeypatch):
    asked = []
    monkeypatch.setattr(recognition, "cached_file", lambda name, *a, **k: asked.append(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("./x", "/x", "~/x", "a/b/c", "data/x", "gpt2", "owner/model"):
        plain_folder(name)
    assert set(asked) == {"gpt2", "owner/model"}


def test_a_name_on_the_hub(llada, cache, tmp_path):
    hub, snapshot = in_hub(tmp_path / "hub", "owner/LLaDA-mini", [p for p in llada.iterdir() if p.suffix != ".py"])
    made = plain_folder("owner/LLaDA-mini", download_dir=str(hub))
    assert Path(made).name.startswith("LLaDA-mini-")
    assert DiffusionConfig.load(made).mask_token == "<|mdm_mask|>"
    # Without the folder of this run a name alone would not be found again.
    assert origin_of(made) == str(snapshot)


def test_a_model_of_ours_on_the_hub_is_its_folder(tmp_path, cache, monkeypatch):
    """It is named by the hub in what is trained from it, unless a run would look for it elsewhere."""
    (tmp_path / "diffusion_config.json").write_text("{}")
    hub, snapshot = in_hub(tmp_path / "hub", "owner/ours", [tmp_path / "diffusion_config.json"])
    assert plain_folder("owner/ours", download_dir=str(hub)) == str(snapshot)
    assert origin_of(snapshot) == str(snapshot)  # not the usual cache
    monkeypatch.setattr(recognition, "HF_HUB_CACHE", str(hub))
    assert origin_of(snapshot) == "owner/ours"
    other = snapshot.with_name("another")
    other.mkdir()
    assert origin_of(other) == str(other)
    assert origin_of("/") == "/" and origin_of("x") == "x"
    assert entries(cache) == []


def test_of_a_model_of_ours_its_own_folder_is_downloaded(tmp_path, cache, monkeypatch):
    """Neither checkpoints within it, nor both kinds of weights."""
    from huggingface_hub.utils import filter_repo_objects

    (tmp_path / "diffusion_config.json").write_text("{}")
    hub, snapshot = in_hub(tmp_path / "hub", "owner/ours", [tmp_path / "diffusion_config.json"])
    listed = ["diffusion_config.json", "model.safetensors", "pytorch_model.bin", "training_args.bin"]
    listed += ["checkpoint-5/model.safetensors", "checkpoint-5/optimizer.bin", "checkpoint-5/config.json"]
    fetched = []

    def download(name, *, allow_patterns, ignore_patterns, **rest):
        kept = list(filter_repo_objects(listed, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        fetched.append(kept)
        for file in kept:
            (snapshot / file).touch()
        return str(snapshot)

    monkeypatch.setattr(recognition, "snapshot_download", download)
    plain_folder("owner/ours", download_dir=str(hub))
    assert fetched == [["diffusion_config.json", "model.safetensors"]]
    fetched.clear()
    listed.remove("model.safetensors")
    (snapshot / "model.safetensors").unlink()
    plain_folder("owner/ours", download_dir=str(hub))
    assert fetched == [["diffusion_config.json"], ["pytorch_model.bin"]]


def test_nothing_but_weights_config_and_tokenizer_is_asked_of_the_hub(llada, cache, tmp_path, monkeypatch):
    """The patterns, tried on what a hub would list."""
    from huggingface_hub.utils import filter_repo_objects

    hub, snapshot = in_hub(tmp_path / "hub", "owner/LLaDA-mini", list(llada.iterdir()))
    asked = {}

    def download(name, *, allow_patterns, ignore_patterns, **rest):
        asked.update(name=name, patterns=allow_patterns, **rest)
        return str(snapshot)

    monkeypatch.setattr(recognition, "snapshot_download", download)
    made = plain_folder("owner/LLaDA-mini", download_dir=str(hub), revision="main", token="secret")
    assert (asked["revision"], asked["cache_dir"], asked["token"]) == ("main", str(hub), "secret")
    listed = [path.name for path in snapshot.iterdir()] + [
        "merges.txt",
        "vocab.json",
        "README.md",
        "pytorch_model.bin",
    ]
    kept = set(filter_repo_objects(listed, allow_patterns=asked["patterns"]))
    assert {"merges.txt", "vocab.json", "tokenizer.json", "config.json"} < kept
    assert not {name for name in kept if name.endswith((".py", ".md", ".bin"))}
    assert origin_of(made) == str(snapshot)
    monkeypatch.setattr(recognition, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no line")))
    with pytest.raises(
        ValueError, match=r"owner/LLaDA-mini is LLaDA as it was published.*not be downloaded \(no line"
    ):
        plain_folder("owner/LLaDA-mini", download_dir=str(hub))


@pytest.mark.slow
def test_by_name_from_the_shell_and_in_the_usual_places(llada, tmp_path):
    """HF_HOME says where the hub's files lie, and the plain copies beside them."""
    in_hub(tmp_path / "home" / "hub", "owner/LLaDA-mini", [path for path in llada.iterdir() if path.suffix != ".py"])
    env = {key: value for key, value in os.environ.items() if key not in (CACHE, "HF_HUB_CACHE")}
    words = ["generate", "owner/LLaDA-mini", "--max-new-tokens", "3", "--steps", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "llamafactory_ddm.cli.main", *words],
        env={**env, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = entries(tmp_path / "home" / "llamafactory_ddm")
    assert origin_of(tmp_path / "home" / "llamafactory_ddm" / made) == "owner/LLaDA-mini"
    assert "owner/LLaDA-mini is LLaDA as it was published" in done.stderr
    assert "custom code" not in done.stdout + done.stderr


@pytest.mark.slow
def test_processes_that_start_at_once_make_one_copy(llada, cache):
    script = (
        "import sys\n"
        "from llamafactory_ddm.checkpoints import plain_copy as recognition\n"
        "sys.stdin.readline()\n"  # until all of them are here
        "print(recognition.plain_folder(sys.argv[1], say=lambda text: print('MADE')))\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(llada)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=LIMIT) for process in started]
    assert all(process.returncode == 0 for process in started), ended
    lines = [line for out, _ in ended for line in out.splitlines()]
    (made,) = entries(cache)
    assert lines.count("MADE") == 1 and lines.count(str(cache / made)) == 3


def test_waiting_for_the_one_who_converts(llada, cache, monkeypatch):
    """What another process made while this one waited for the lock is used, not made again."""
    made = Path(plain_folder(llada))
    hidden = made.rename(made.with_name("hidden"))

    class Held:
        def __init__(self, path):
            assert path == cache / f".{made.name}.lock"

        def __enter__(self):
            hidden.rename(made)

        def __exit__(self, *rest):
            pass

    monkeypatch.setattr(recognition, "WeakFileLock", Held)
    monkeypatch.setattr(recognition, "convert", None)
    assert plain_folder(llada) == str(made)


def test_what_a_killed_process_left_is_cleared(llada, cache):
    made = Path(plain_folder(llada))
    shutil.rmtree(made)
    for name in (f".{made.name}.unfinished", f"..{made.name}.unfinished-a1b2"):
        (cache / name).mkdir()
        (cache / name / "model.safetensors").write_bytes(b"half")
    (cache / ".another-0123.unfinished").mkdir()  # somebody else is at it
    assert plain_folder(llada) == str(made)
    assert entries(cache) == sorted([".another-0123.unfinished", made.name])


def test_a_copy_that_lost_a_file_is_made_again(llada, cache):
    made = Path(plain_folder(llada))
    shard = sorted(made.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    for damage in (
        shard.unlink,
        lambda: shard.write_bytes(whole[:-1]),
        (made / ORIGIN_NAME).unlink,
        lambda: (made / ORIGIN_NAME).write_text(""),
    ):
        damage()
        assert plain_folder(llada) == str(made) and shard.read_bytes() == whole
    for name in sorted(path.name for path in made.iterdir()):
        before = (made / name).read_bytes()
        for damage in ((made / name).unlink, lambda path=made / name: path.write_text("{")):
            damage()
            assert plain_folder(llada) == str(made) and (made / name).read_bytes() == before, name


def test_a_folder_by_another_name_is_the_same_copy(llada, cache, tmp_path):
    (tmp_path / "link").symlink_to(llada)
    assert {plain_folder(name) for name in (llada, tmp_path / "link", llada / ".." / llada.name)} == {
        plain_folder(llada)
    }


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "names model-00002-of-00002.safetensors, not"),
        (lambda f: cut(f / "model-00001-of-00002.safetensors"), "its header says .*: truncated or altered"),
        (lambda f: change(f, n_layers=3), r"missing model\.layers\.2\."),
        (lambda f: change(f, n_layers=1), r"unexpected model\.layers\.1\."),
        (lambda f: change(f, mlp_hidden_size=47), "of another shape"),
        (lambda f: change(f, mask_token_id=287), "has id 287, which is no token of the tokenizer"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    ],
)
def test_what_does_not_fit_is_an_error_and_leaves_nothing(llada, cache, spoil, words):
    spoil(llada)
    with pytest.raises(ValueError, match=words):
        plain_folder(llada)
    assert entries(cache) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def change(folder, **keys):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **keys}))


def test_a_disk_without_room(llada, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    weights = sum(path.stat().st_size for path in llada.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 20_000_000))
    with pytest.raises(ValueError, match=rf"takes 67 MB, and {cache} has 20 MB left; .* set {CACHE} to"):
        plain_folder(llada)
    assert entries(cache) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, weights + 2**26))
    assert plain_folder(llada).startswith(str(cache))


def test_a_disk_that_fills_up_on_the_way(llada, cache, monkeypatch):
    def full(source, target, **rest):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recognition, "convert", full)
    with pytest.raises(OSError, match="No space left"):
        plain_folder(llada)
    assert entries(cache) == []


def test_a_cache_that_cannot_be_written(llada, cache):
    cache.write_text("no folder")
    with pytest.raises(ValueError, match=rf"{cache}, where a plain copy is to be made, cannot be written .*{CACHE}"):
        plain_folder(llada)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv(CACHE, "~/models")
    assert cache_root() == Path.home() / "models"
    monkeypatch.setenv(CACHE, "")
    assert cache_root().name == "llamafactory_ddm"


def test_load_takes_what_was_published(cache, tmp_path):
    for write, shift in ((write_llada, False), (write_dream, True)):
        model = load(write(tmp_path / write.__name__))
        assert model.config.shift is shift
        assert len(model.generate("The", max_new_tokens=4)) == 1
