import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamafactory_ddm.modeling.checkpoints import (
    BrokenCheckpointError,
    last_complete_checkpoint,
    load_weights,
    verify_checkpoint,
)
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.tiny import tiny_model

CONFIG = DiffusionConfig("<|mask|>", 39, True, "masked", 0.0, "linear", 1.0)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as training leaves it."""
    path = tmp_path / "checkpoint-4"
    tiny_model().save_pretrained(path)
    CONFIG.save(path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"a": torch.arange(50)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    return path


def cut(path, share=0.5):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def test_a_complete_checkpoint_passes(folder):
    verify_checkpoint(folder)
    verify_checkpoint(folder, resume=True)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_weights(folder, share):
    cut(folder / "model.safetensors", share)
    with pytest.raises(BrokenCheckpointError, match=r"model\.safetensors"):
        verify_checkpoint(folder)


def test_longer_weights(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(BrokenCheckpointError, match="truncated or altered"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_truncated_training_state(folder, name):
    cut(folder / name)
    with pytest.raises(BrokenCheckpointError, match=name.replace(".", r"\.")):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["trainer_state.json", "diffusion_config.json"])
def test_what_resuming_needs(folder, name):
    (folder / name).unlink()
    verify_checkpoint(folder)
    with pytest.raises(BrokenCheckpointError, match=name.replace(".", r"\.")):
        verify_checkpoint(folder, resume=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"global_step": "x"}'])
def test_an_unreadable_trainer_state(folder, text):
    (folder / "trainer_state.json").write_text(text)
    with pytest.raises(BrokenCheckpointError, match=r"trainer_state\.json is not readable"):
        verify_checkpoint(folder, resume=True)


def test_a_tampered_diffusion_config(folder):
    (folder / "diffusion_config.json").write_text("{}")
    with pytest.raises(BrokenCheckpointError, match="lacks"):
        verify_checkpoint(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpointError, match="holds no weights"):
        verify_checkpoint(folder)


def shard(folder):
    weights = load_file(folder / "model.safetensors")
    names = list(weights)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, keys in halves.items():
        save_file({k: weights[k] for k in keys}, folder / file)
    table = {k: file for file, keys in halves.items() for k in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "model.safetensors").unlink()


def test_shards(folder):
    shard(folder)
    verify_checkpoint(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(BrokenCheckpointError, match=r"names b\.safetensors, not found"):
        verify_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BrokenCheckpointError, match="not a readable index"):
        verify_checkpoint(folder)


def test_the_last_complete_checkpoint_is_found(folder):
    root = folder.parent
    for step in (8, 20):
        shutil.copytree(folder, root / f"checkpoint-{step}")
    (root / "checkpoint-old").mkdir()
    cut(root / "checkpoint-20" / "optimizer.pt")
    best, skipped = last_complete_checkpoint(root)
    assert best == root / "checkpoint-8"
    assert [path.name for path, _ in skipped] == ["checkpoint-20"]
    assert "optimizer.pt" in skipped[0][1]
    assert last_complete_checkpoint(root / "nowhere") == (None, [])


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
def test_weights_are_loaded_exactly(folder, kind):
    if kind == "shards":
        shard(folder)
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    model = tiny_model(seed=5)
    load_weights(model, folder)
    for one, two in zip(model.state_dict().values(), tiny_model().state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("transformer.h.0.ln_1.weight"), r"missing transformer\.h\.0\.ln_1\.weight"),
        (lambda w: w.update(extra=torch.zeros(2)), "unexpected extra"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.zeros(3)}), r"ln_f\.bias \(3,\) instead of \(32,\)"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(folder, change, words):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    model = tiny_model(seed=5)
    with pytest.raises(ValueError, match=words):
        load_weights(model, folder)
    for one, two in zip(model.parameters(), tiny_model(seed=5).parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_pickle_is_not_run(folder):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BrokenCheckpointError, match="cannot be read"):
        load_weights(tiny_model(), folder)
