import json
import re
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamafactory_ddm.checkpoints.layouts import layout_of_folder
from llamafactory_ddm.checkpoints.weights import (
    BrokenCheckpointError,
    last_complete_checkpoint,
    load_weights,
    stored_dtype,
    verify_checkpoint,
    weight_files,
)
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.tiny import tiny_model

CONFIG = DiffusionConfig("<|mask|>", 39, True, "masked", 0.0, "linear", 1.0)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as training saves it."""
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
    size = (folder / "model.safetensors").stat().st_size
    with pytest.raises(BrokenCheckpointError, match=rf"model\.safetensors .*{size}"):
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
    with pytest.raises(BrokenCheckpointError, match=r"trainer_state\.json"):
        verify_checkpoint(folder, resume=True)


def test_a_tampered_diffusion_config(folder):
    (folder / "diffusion_config.json").write_text("{}")
    with pytest.raises(BrokenCheckpointError, match=r"diffusion_config\.json"):
        verify_checkpoint(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpointError, match=r"model\.safetensors.*pytorch_model\.bin"):
        verify_checkpoint(folder)


def test_shards_that_are_incomplete(folder):
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(BrokenCheckpointError, match=r"00001-of-00002\.safetensors.*model\.safetensors\.index"):
        verify_checkpoint(folder)
    table = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(BrokenCheckpointError, match=r"index\.json.*model-00002-of-00002"):
        verify_checkpoint(folder)


def read(folder):
    """Return copies of the weights, so that the file can be overwritten."""
    return {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}


def shard(folder):
    weights = read(folder)
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
    with pytest.raises(BrokenCheckpointError, match=r"index\.json.*b\.safetensors"):
        verify_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BrokenCheckpointError, match=r"index\.json"):
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
    for actual, expected in zip(model.state_dict().values(), tiny_model().state_dict().values(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda w: w.pop("transformer.h.0.ln_1.weight"), r"transformer\.h\.0\.ln_1\.weight"),
        (lambda w: w.update(extra=torch.zeros(2)), r"\bextra\b"),
        (lambda w: w.update({"transformer.ln_f.bias": torch.zeros(3)}), r"ln_f\.bias \(3,\).*\(32,\)"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(folder, change, pattern):
    weights = read(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors")
    model = tiny_model(seed=5)
    with pytest.raises(ValueError, match=pattern):
        load_weights(model, folder)
    for actual, expected in zip(model.parameters(), tiny_model(seed=5).parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_pickle_is_not_run(folder):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BrokenCheckpointError, match=r"pytorch_model\.bin"):
        load_weights(tiny_model(), folder)


SAVE_ORDER = ("config.json", "model.safetensors", "diffusion_config.json", "optimizer.pt", "scheduler.pt")
SAVE_ORDER += ("rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("count", range(len(SAVE_ORDER)))
def test_a_save_killed_at_any_file_is_passed_over(folder, count):
    """Files are saved in this order; a kill leaves the first ones complete, the next truncated, the others absent."""
    killed = folder.parent / "checkpoint-10"
    killed.mkdir()
    for name in SAVE_ORDER[: count + 1]:
        shutil.copy(folder / name, killed / name)
    if count > 0:
        cut(killed / SAVE_ORDER[count], 0.7)
    best, skipped = last_complete_checkpoint(folder.parent)
    assert best == folder
    assert [path for path, _ in skipped] == [killed]


def test_the_newest_is_that_of_the_highest_step(folder):
    for step in (9, 10, 100):
        shutil.copytree(folder, folder.parent / f"checkpoint-{step}")
    (folder.parent / "checkpoint-100" / "trainer_state.json").unlink()
    best, skipped = last_complete_checkpoint(folder.parent)
    assert best == folder.parent / "checkpoint-10"
    assert [path.name for path, _ in skipped] == ["checkpoint-100"]


def test_no_complete_checkpoint(folder):
    cut(folder / "model.safetensors")
    best, skipped = last_complete_checkpoint(folder.parent)
    assert best is None and "model.safetensors" in skipped[0][1]


def test_resuming_needs_the_optimizer(folder):
    (folder / "optimizer.pt").unlink()
    verify_checkpoint(folder)
    with pytest.raises(BrokenCheckpointError, match=r"optimizer\.pt.*save_only_model.*model_name_or_path"):
        verify_checkpoint(folder, resume=True)
    (folder / "global_step4").mkdir()  # where DeepSpeed keeps it
    verify_checkpoint(folder, resume=True)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": "x"},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, None]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        "[" * 100_000,
    ],
)
def test_a_tampered_header(folder, header):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(BrokenCheckpointError, match=r"model\.safetensors"):
        verify_checkpoint(folder)


def test_a_file_of_zeros(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(BrokenCheckpointError, match=r"model\.safetensors"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("table", [{"a": 5}, {"a": None}, {"a": []}, [1], {}])
def test_a_tampered_index(folder, table):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(BrokenCheckpointError, match=r"model\.safetensors\.index\.json"):
        verify_checkpoint(folder)


OUTSIDE = [
    "../outside.safetensors",
    "sub/../../outside.safetensors",
    "/outside.safetensors",
    "..",
    "a\\b.safetensors",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_of_its_own_folder_only(folder, name):
    """The files exist, so that only the name can be the error."""
    shard(folder)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    (folder / "sub").mkdir()
    (folder / "b.safetensors").rename(folder.parent / "outside.safetensors")
    if name.startswith("/"):
        name = str(folder.parent / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {k: name if v == "b.safetensors" else v for k, v in table.items()}}))
    for use in (verify_checkpoint, weight_files, stored_dtype, layout_of_folder, last_weights):
        with pytest.raises(BrokenCheckpointError, match=rf"index\.json .*{re.escape(repr(name))}"):
            use(folder)


def last_weights(folder):
    """Read the weights as a resuming run does."""
    faults = last_complete_checkpoint(folder.parent)[1]
    raise BrokenCheckpointError(faults[0][1])


@pytest.mark.parametrize("name", ["../outside.safetensors", 5, "gone.safetensors"])
def test_a_config_names_weights_of_its_own_folder_only(folder, name):
    """Transformers would read that file, which has not been checked."""
    (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(BrokenCheckpointError, match=rf"config\.json .*{re.escape(str(name))}"):
        verify_checkpoint(folder)


def test_a_config_that_names_its_weights(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    (folder / "model.safetensors").write_bytes(b"of no one")
    (folder / "config.json").write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    verify_checkpoint(folder)


def test_files_of_the_hubs_cache_may_be_links(folder):
    shard(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    verify_checkpoint(folder)
    assert {path.name for path in weight_files(folder)} == {"a.safetensors", "b.safetensors"}


def test_of_several_files_the_one_that_transformers_reads_is_checked(folder):
    shard(folder)
    (folder / "pytorch_model.bin").write_bytes(b"old")
    verify_checkpoint(folder)
    assert {path.name for path in weight_files(folder)} == {"a.safetensors", "b.safetensors"}


def test_a_shard_of_another_save(folder):
    shard(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(BrokenCheckpointError, match=r"b\.safetensors .*transformer\."):
        verify_checkpoint(folder)
    with pytest.raises(BrokenCheckpointError, match=r"b\.safetensors .*transformer\."):
        load_weights(tiny_model(), folder)


def test_a_truncated_shard(folder):
    shard(folder)
    cut(folder / "b.safetensors", 0.9)
    size = (folder / "b.safetensors").stat().st_size
    with pytest.raises(BrokenCheckpointError, match=rf"b\.safetensors .*{size}"):
        verify_checkpoint(folder)


def as_bin(folder, state, **options):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin", **options)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_bin(folder, share):
    as_bin(folder, read(folder))
    cut(folder / "pytorch_model.bin", share)
    with pytest.raises(BrokenCheckpointError, match=r"pytorch_model\.bin"):
        verify_checkpoint(folder)


def test_the_end_of_a_zip_alone_is_no_zip(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(b"\0" * 300 + path.read_bytes()[-60:])
    assert zipfile.is_zipfile(path)
    with pytest.raises(BrokenCheckpointError, match=r"optimizer\.pt"):
        verify_checkpoint(folder)


def test_weights_in_the_format_of_old_pytorch(folder):
    """Models on the Hub from before 2020 are not zip files; a truncated one is detected only when it is loaded."""
    as_bin(folder, read(folder), _use_new_zipfile_serialization=False)
    verify_checkpoint(folder)
    model = tiny_model(seed=5)
    load_weights(model, folder)
    assert torch.equal(model.transformer.wte.weight, tiny_model().transformer.wte.weight)
    cut(folder / "pytorch_model.bin", 0.6)
    with pytest.raises(BrokenCheckpointError, match=r"pytorch_model\.bin"):
        load_weights(tiny_model(), folder)


@pytest.mark.parametrize("state", [[1], {"state_dict": {"a": torch.zeros(1)}}, {"lm_head.weight": 3}])
def test_a_bin_of_something_else(folder, state):
    as_bin(folder, state)
    with pytest.raises(BrokenCheckpointError, match=r"pytorch_model\.bin"):
        load_weights(tiny_model(), folder)


def test_tied_weights_may_be_stored_twice_but_must_be_equal(folder):
    weights = read(folder)
    assert "lm_head.weight" not in weights  # saved once
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    load_weights(tiny_model(seed=5), folder)
    weights["lm_head.weight"][0] += 1
    save_file(weights, folder / "model.safetensors")
    model = tiny_model(seed=5)
    with pytest.raises(ValueError, match=r"(wte|lm_head)\.weight.*(wte|lm_head)\.weight"):
        load_weights(model, folder)
    assert torch.equal(model.lm_head.weight, tiny_model(seed=5).lm_head.weight)


def test_an_untied_output_embedding_may_not_be_absent(folder):
    model = tiny_model(seed=5)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_weights(model, folder)


def test_a_prefix_is_part_of_the_name(folder):
    save_file({f"model.{key}": value for key, value in read(folder).items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r" transformer\..* \d+ .* model\.transformer\."):
        load_weights(tiny_model(), folder)


def test_the_model_keeps_its_own_dtype(folder):
    model = tiny_model(seed=5).bfloat16()
    load_weights(model, folder)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.transformer.wte.weight, tiny_model().transformer.wte.weight.bfloat16())


def test_a_model_on_the_meta_device_is_an_error(folder):
    with pytest.raises(ValueError, match="meta"):
        load_weights(tiny_model().to("meta"), folder)


def test_empty_weights_are_not_tied_to_each_other(tmp_path):
    """Empty tensors all have the address 0."""
    model = torch.nn.ParameterDict({"a": torch.empty(0), "b": torch.empty(0)})
    save_file({"a": torch.empty(0)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing b"):
        load_weights(model, tmp_path)
