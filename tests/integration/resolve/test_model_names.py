"""Which folder a run uses for a diffusion model that it names by a hub, and what is asked of hubs for it."""

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from llamafactory_ddm.integration.resolve import model_names
from llamafactory_ddm.integration.resolve.model_names import resolve_model_names
from support.published import in_hub, write_dream


def arguments(name, **keys):
    defaults = {
        "adapter_name_or_path": None,
        "adapter_folder": None,
        "model_revision": "main",
        "cache_dir": None,
        "hf_hub_token": None,
        "trust_remote_code": False,
    }
    return SimpleNamespace(model_name_or_path=str(name), **{**defaults, **keys})


def test_folders_and_other_models_stay(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    for name in (str(tmp_path / "llama"), str(write_dream(tmp_path / "dream")), "owner/unknown", "gpt2"):
        args = arguments(name, cache_dir=str(tmp_path / "hub"))
        resolve_model_names(args)
        assert args.model_name_or_path == name


@pytest.mark.parametrize("trusted", [False, True])
def test_published_code_is_not_run(trusted, tmp_path, caplog):
    args = arguments(write_dream(tmp_path / "dream"), trust_remote_code=trusted)
    resolve_model_names(args)
    assert args.trust_remote_code is False
    assert ("Qwen2ForCausalLM" in caplog.text) is trusted
    LlamaConfig().save_pretrained(tmp_path / "llama")
    other = arguments(tmp_path / "llama", trust_remote_code=trusted)
    resolve_model_names(other)
    assert other.trust_remote_code is trusted


def test_a_name_on_another_hub(tmp_path, monkeypatch):
    """Where upstream fetches from another hub, that is where a name is looked for."""
    folder = write_dream(tmp_path / "fetched")
    monkeypatch.setattr(model_names, "try_download_model_from_other_hub", lambda args: str(folder))
    args = arguments("owner/dream", trust_remote_code=True)
    resolve_model_names(args)
    assert args.model_name_or_path == str(folder)
    assert args.trust_remote_code is False


def test_a_published_folder_is_named_from_any_working_directory(tmp_path, monkeypatch):
    folder = write_dream(tmp_path / "dream")
    monkeypatch.chdir(tmp_path)
    args = arguments("dream")
    resolve_model_names(args)
    assert args.model_name_or_path == str(folder)


def test_revision_token_and_folder_reach_the_hub(monkeypatch):
    where = {}
    monkeypatch.setattr(model_names, "local_folder", lambda name, **keys: where.update(keys) or name)
    resolve_model_names(arguments("owner/x", model_revision="v2", cache_dir="/hub", hf_hub_token="t"))
    assert where == {"revision": "v2", "download_dir": "/hub", "token": "t"}


def test_models_and_adapters_of_ours_on_a_hub_become_folders(tmp_path):
    """By name alone a model would be taken for an autoregressive one, as its diffusion_config.json is not read."""
    (tmp_path / "diffusion_config.json").write_text("{}")
    hub, model = in_hub(tmp_path / "hub", "owner/ours", [tmp_path / "diffusion_config.json"])
    _, adapter = in_hub(tmp_path / "hub", "owner/adapter", [tmp_path / "diffusion_config.json"])
    args = arguments("owner/ours", cache_dir=str(hub), adapter_name_or_path=["owner/adapter", "saves/other"])
    resolve_model_names(args)
    assert args.model_name_or_path == str(model)
    assert args.adapter_name_or_path == [str(adapter), "saves/other"]


def test_the_revision_is_that_of_adapters_too(monkeypatch):
    """As LLaMA-Factory passes it to PEFT; a folder within an adapter is PEFT's."""
    names = []
    monkeypatch.setattr(
        model_names, "local_folder", lambda name, **keys: names.append((name, keys["revision"])) or name
    )
    resolve_model_names(arguments("owner/x", model_revision="v2", adapter_name_or_path=["owner/a"]))
    assert names == [("owner/x", "v2"), ("owner/a", "v2")]
    names.clear()
    keys = {"adapter_name_or_path": ["owner/a"], "adapter_folder": "inner"}
    resolve_model_names(arguments("owner/x", **keys))
    assert names == [("owner/x", "main")]
