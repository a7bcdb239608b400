"""Which folder stands in for a diffusion model that a run names, and what is asked of hubs for it."""

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from llamafactory_ddm.checkpoints.plain_copy import CACHE, origin_of
from llamafactory_ddm.integration.model import plain_copy as plain_models
from support.published import in_hub, write_dream


def arguments(name, **keys):
    given = {
        "adapter_name_or_path": None,
        "adapter_folder": None,
        "model_revision": "main",
        "cache_dir": None,
        "hf_hub_token": None,
        **keys,
    }
    return SimpleNamespace(model_name_or_path=str(name), **given)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))


def test_a_published_folder_gives_way_to_its_plain_copy(tmp_path):
    args = arguments(write_dream(tmp_path / "dream"))
    plain_models.resolve_model_names(args)
    assert args.model_name_or_path.startswith(str(tmp_path / "cache" / "dream-"))
    assert origin_of(args.model_name_or_path) == str(tmp_path / "dream")
    plain_models.resolve_model_names(args)  # of which nothing more is made
    assert origin_of(args.model_name_or_path) == str(tmp_path / "dream")


def test_whichever_rank_makes_the_copy_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_RANK", "1")
    args = arguments(write_dream(tmp_path / "dream"))
    plain_models.resolve_model_names(args)
    assert caplog.text.count("is Dream as it was published, with code of its own") == 1
    plain_models.resolve_model_names(arguments(tmp_path / "dream"))
    assert caplog.text.count("is Dream as it was published") == 1


def test_another_model_stays(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    for name in (str(tmp_path / "llama"), "owner/unknown", "gpt2"):
        args = arguments(name, cache_dir=str(tmp_path / "hub"))
        plain_models.resolve_model_names(args)
        assert args.model_name_or_path == name
    assert not (tmp_path / "cache").exists()


def test_a_name_on_another_hub(tmp_path, monkeypatch):
    """Where upstream fetches from another hub, that is where a name is looked for."""
    folder = write_dream(tmp_path / "fetched")
    monkeypatch.setattr(plain_models, "try_download_model_from_other_hub", lambda args: str(folder))
    args = arguments("owner/dream")
    plain_models.resolve_model_names(args)
    assert origin_of(args.model_name_or_path) == str(folder)


def test_revision_token_and_folder_reach_the_hub(monkeypatch):
    asked = {}
    monkeypatch.setattr(plain_models, "plain_folder", lambda name, **keys: asked.update(keys) or name)
    plain_models.resolve_model_names(arguments("owner/x", model_revision="v2", cache_dir="/hub", hf_hub_token="t"))
    assert (asked["revision"], asked["download_dir"], asked["token"]) == ("v2", "/hub", "t")


def test_models_and_adapters_of_ours_on_a_hub_become_folders(tmp_path):
    """By name alone a model would be taken for an autoregressive one, as its diffusion_config.json is not read."""
    (tmp_path / "diffusion_config.json").write_text("{}")
    hub, model = in_hub(tmp_path / "hub", "owner/ours", [tmp_path / "diffusion_config.json"])
    _, adapter = in_hub(tmp_path / "hub", "owner/adapter", [tmp_path / "diffusion_config.json"])
    args = arguments("owner/ours", cache_dir=str(hub), adapter_name_or_path=["owner/adapter", "saves/other"])
    plain_models.resolve_model_names(args)
    assert args.model_name_or_path == str(model)
    assert args.adapter_name_or_path == [str(adapter), "saves/other"]


def test_the_revision_is_that_of_adapters_too(monkeypatch):
    """As LLaMA-Factory passes it to PEFT; a folder within an adapter is PEFT's."""
    asked = []
    monkeypatch.setattr(
        plain_models, "plain_folder", lambda name, **keys: asked.append((name, keys["revision"])) or name
    )
    plain_models.resolve_model_names(arguments("owner/x", model_revision="v2", adapter_name_or_path=["owner/a"]))
    assert asked == [("owner/x", "v2"), ("owner/a", "v2")]
    asked.clear()
    keys = {"adapter_name_or_path": ["owner/a"], "adapter_folder": "inner"}
    plain_models.resolve_model_names(arguments("owner/x", **keys))
    assert asked == [("owner/x", "main")]
