"""Which kind of model a folder holds."""

import json

import pytest

from llamafactory_ddm.checkpoints.kind import check_kind, model_or_adapter
from support.tiny import save_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


def adapter(folder, base, config_of=None):
    """Write the config of an adapter, and the diffusion config of a model beside it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    if config_of is not None:
        (folder / "diffusion_config.json").write_bytes((config_of / "diffusion_config.json").read_bytes())
    return str(folder)


def test_models(folders):
    ar, ddm = map(str, folders)
    assert check_kind(ar, "ar") is None
    assert check_kind(ddm, "diffusion").mask_token == "<|mask|>"
    assert check_kind("gpt2-of-the-hub", "ar") is None  # known when it is loaded
    with pytest.raises(ValueError, match=f"{ar} holds no diffusion_config.json, .*kind: ar"):
        check_kind(ar, "diffusion")
    with pytest.raises(ValueError, match=f"{ddm} is a diffusion model.*remove kind: ar"):
        check_kind(ddm, "ar")
    for kind in ("ar", "diffusion"):
        with pytest.raises(ValueError, match="/absent is not a folder"):
            check_kind("/absent", kind)


def test_adapters(folders, tmp_path):
    """An adapter of an autoregressive model may make a diffusion model of it; one of a diffusion model is never ar."""
    ar, ddm = folders
    assert check_kind(adapter(tmp_path / "a", ar), "ar") is None
    assert check_kind(adapter(tmp_path / "b", ar, ddm), "diffusion") is not None
    with pytest.raises(ValueError, match="holds no diffusion_config"):
        check_kind(str(tmp_path / "a"), "diffusion")
    with pytest.raises(ValueError, match="is a diffusion model"):
        check_kind(str(tmp_path / "b"), "ar")
    with pytest.raises(ValueError, match=f"adapter of the diffusion model {ddm}"):
        check_kind(adapter(tmp_path / "c", ddm), "ar")
    for kind in ("ar", "diffusion"):
        with pytest.raises(ValueError, match="adapter of /gone, which is not a folder"):
            check_kind(adapter(tmp_path / f"d-{kind}", "/gone", ddm if kind == "diffusion" else None), kind)


def test_model_and_adapter(folders, tmp_path):
    ar, ddm = map(str, folders)
    path = adapter(tmp_path / "a", ar)
    assert model_or_adapter(ar, None) == ar
    assert model_or_adapter(None, path) == model_or_adapter(f"{ar}/", path) == path
    with pytest.raises(ValueError, match=f"model_name_or_path: {ddm} is not the model of the adapter"):
        model_or_adapter(ddm, path)
    with pytest.raises(ValueError, match=r"adapter_name_or_path: .*holds no adapter_config"):
        model_or_adapter(None, ar)
