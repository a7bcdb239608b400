"""The classes of docs/extending.md work from a YAML run, from the shell and from Python."""

import contextlib
import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamafactory_ddm import load
from llamafactory_ddm.checkpoints.families import MODEL_FAMILIES
from llamafactory_ddm.cli.convert import main as convert
from llamafactory_ddm.cli.generate import main
from llamafactory_ddm.diffusion.schedules import SCHEDULES
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.objectives import OBJECTIVES
from llamafactory_ddm.sampling import STRATEGIES
from llamafactory_ddm.utils.plugins import GROUP
from support.cli import ROOT, evaluations, history

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.S)
CHOSEN = {"noise_schedule": "quadratic", "noise_process": "clipped"}
STRATEGY = {"denoising_strategy": "left_to_right", "early_stop": "none", "diffusion_steps": 12}


@contextlib.contextmanager
def restored_registries():
    """Restore the registries at the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (STRATEGIES, SCHEDULES, OBJECTIVES, MODEL_FAMILIES):
            patch.setattr(registry, "_entries", dict(registry._entries))
        yield


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "my_plugin.py"
    path.write_text("\n\n".join(BLOCKS))
    return str(path)


@pytest.fixture(scope="module")
def plugged(plugin, train_small, tmp_path_factory):
    """A checkpoint of a YAML run with the plugin; the registries are restored afterwards."""
    with restored_registries():
        folder = tmp_path_factory.mktemp("plugged") / "out"
        keys = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 3}
        yield train_small(folder, plugins=[plugin], **CHOSEN, **keys)


def test_each_is_short():
    assert len(BLOCKS) == 4
    assert all(len(block.splitlines()) < 30 for block in BLOCKS)


def test_without_the_plugin_the_names_are_unknown(train_small, tmp_path):
    for key, name in CHOSEN.items():
        with pytest.raises(ValueError, match=f"{key} .*{name}.*plugins"):
            train_small(tmp_path / "out", **{key: name})


def test_training_and_evaluation(plugged, checkpoint):
    assert DiffusionConfig.load(plugged).noise_schedule == "quadratic"
    assert DiffusionConfig.load(plugged).noise_process == "clipped"
    metrics = evaluations(plugged)[-1]
    assert history(plugged)[0]["loss"] != history(checkpoint)[0]["loss"]
    assert metrics["eval_loss"] > 0 and "eval_nll" in metrics


def test_sampling_from_a_yaml(plugged, plugin, generate, tmp_path):
    texts = [
        generate(tmp_path / str(number), model_name_or_path=plugged, plugins=plugin, **STRATEGY, **arguments)
        for number, arguments in enumerate(
            [{}, {"strategy_args": {"per_step": 4}}, {"strategy_args": '{"per_step": 4}'}]
        )
    ]
    assert texts[0] != texts[1] == texts[2]
    with pytest.raises(ValueError, match=r"strategy_args.*'per_stp'.*'per_step'"):
        generate(tmp_path / "wrong", model_name_or_path=plugged, strategy_args={"per_stp": 4}, **STRATEGY)


def test_sampling_from_shell_and_python(plugged, plugin, capsys):
    options = ["--plugins", plugin, "--strategy", "left_to_right", "--max-new-tokens", "8"]
    options += ["--strategy-args", '{"per_step": 4}', "--temperature", "0"]
    assert main([str(plugged), "--prompt", "Tom saw", *options]) == 0
    shell = capsys.readouterr().out.strip()
    (generated,) = load(plugged, plugins=[plugin], device="cpu").generate(
        "Tom saw", max_new_tokens=8, denoising_strategy="left_to_right", strategy_args={"per_step": 4}, temperature=0
    )
    assert shell and shell == str(getattr(generated, "predict", generated)).strip()


def test_converting_a_checkpoint_of_a_plugin(plugged, plugin, tmp_path, capsys):
    arguments = [str(plugged), str(tmp_path / "out"), "--published"]
    with restored_registries():
        for registry in (STRATEGIES, SCHEDULES, OBJECTIVES, MODEL_FAMILIES):
            for name in (*CHOSEN.values(), "left_to_right", "my_diffusion"):
                registry._entries.pop(name, None)
        assert convert(arguments) == 1 and "plugins" in capsys.readouterr().err
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, f"{GROUP}:{plugin}", raising=False)
            assert convert([*arguments, "--plugins", plugin]) == 0, capsys.readouterr().err


def test_a_checkpoint_names_what_it_needs(plugged, monkeypatch):
    for registry in (SCHEDULES, OBJECTIVES):
        with monkeypatch.context() as patch:
            patch.setattr(registry, "_entries", {"linear": None, "masked": None})
            with pytest.raises(ValueError, match=f"diffusion_config.json: {registry.key} .*plugins"):
                load(plugged, device="cpu")


def test_a_model_family(plugged, plugin, checkpoint, train_small, tmp_path):
    """The shared checkpoint, published with other names of weights and settings."""
    published = shutil.copytree(checkpoint, tmp_path / "published")
    weights = load_file(published / "model.safetensors")
    names = {key: key.replace("transformer.h.", "net.blocks.").replace("transformer.", "net.") for key in weights}
    save_file({names[key]: value for key, value in weights.items()}, published / "model.safetensors", {"format": "pt"})
    mask = DiffusionConfig.load(checkpoint).mask_token_id
    (published / "diffusion_config.json").unlink()
    raw = json.loads((published / "config.json").read_text())
    shape = {"vocab": raw["vocab_size"], "width": raw["n_embd"], "depth": raw["n_layer"], "heads": raw["n_head"]}
    shape |= {"length": raw["n_positions"], "model_type": "my_diffusion", "mask_token_id": mask}
    (published / "config.json").write_text(json.dumps(shape))
    out = train_small(tmp_path / "out", model_name_or_path=published, plugins=[plugin], max_steps=1)
    assert (DiffusionConfig.load(out).mask_token_id, DiffusionConfig.load(out).shift) == (mask, True)
    assert json.loads((out / "config.json").read_text())["model_type"] == "gpt2"
    assert load_file(out / "model.safetensors").keys() == weights.keys()
    loaded = load(published, plugins=[plugin], device="cpu").model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
