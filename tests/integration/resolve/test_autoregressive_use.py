"""A diffusion model in autoregressive stages and commands: training warns, serving recognises it, others refuse."""

import json
import re

import pytest


@pytest.fixture
def folders(tmp_path):
    """Folders as the parser sees them: a diffusion model, two adapters of which one is diffusion, LLaDA, another."""
    for name in ("ours", "adapter", "other_adapter", "published", "plain"):
        (tmp_path / name).mkdir()
    for name in ("ours", "adapter"):
        (tmp_path / name / "diffusion_config.json").write_text("{}")
    for name, kind in (("ours", "gpt2"), ("published", "llada"), ("plain", "gpt2")):
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    for name in ("adapter", "other_adapter"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    return {path.name: str(path) for path in tmp_path.iterdir()}


def named(folders, keys):
    """Fill in the folders' paths, in lists with commas too."""
    return {
        key: ",".join(folders.get(name, name) for name in value.split(",")) if isinstance(value, str) else value
        for key, value in keys.items()
    }


MODELS = [
    ({"model_name_or_path": "ours"}, "ours"),
    ({"model_name_or_path": "published"}, "published"),
    ({"model_name_or_path": "plain", "adapter_name_or_path": "adapter"}, "adapter"),
    ({"model_name_or_path": "plain", "adapter_name_or_path": "other_adapter,adapter"}, "adapter"),
]
EXTRA_MODELS = [
    ({"model_name_or_path": "plain", "ref_model": "ours"}, "ours"),
    ({"model_name_or_path": "plain", "ref_model_adapters": "other_adapter,adapter"}, "adapter"),
    ({"model_name_or_path": "plain", "reward_model": "adapter"}, "adapter"),
]


def finetuning_type(keys):
    return {"finetuning_type": "lora" if "adapter_name_or_path" in keys or "reward_model" in keys else "full"}


def as_argv(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("form", [dict, as_argv])
def test_a_diffusion_model_is_served_without_naming_a_stage(upstream, folders, form):
    for keys, _ in MODELS:
        args = {**named(folders, keys), **finetuning_type(keys), "diffusion_steps": 8}
        *_, finetuning_args, _ = upstream[0].get_infer_args(form(args))
        assert (finetuning_args.diffusion_stage, finetuning_args.diffusion_steps) == ("ddm-sft", 8)
        assert {"diffusion_steps", "stage"} <= finetuning_args.parsed.user_keys


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
@pytest.mark.parametrize("form", [dict, as_argv])
def test_other_engines_do_not_serve_a_diffusion_model(upstream, folders, form, backend):
    for keys in (*(keys for keys, _ in MODELS), {"model_name_or_path": "plain", "stage": "ddm"}):
        args = {**named(folders, keys), **finetuning_type(keys), "infer_backend": backend}
        with pytest.raises(ValueError, match=f"infer_backend: {backend} .*huggingface"):
            upstream[0].get_infer_args(form(args))


def test_an_autoregressive_stage_serves_no_diffusion_model(upstream, folders, caplog):
    for keys, name in MODELS:
        caplog.clear()
        args = {**named(folders, keys), **finetuning_type(keys), "stage": "sft"}
        with pytest.raises(ValueError, match=rf"llamafactory-ddm generate {folders[name]};"):
            upstream[0].get_infer_args(args)
        assert f"{folders[name]} is a diffusion model" in caplog.text


def test_llamafactorys_evaluation_is_refused(upstream, folders, tmp_path):
    for keys, _ in MODELS:
        args = {
            **named(folders, keys),
            **finetuning_type(keys),
            "task": "mmlu_test",
            "save_dir": str(tmp_path / "new"),
        }
        with pytest.raises(ValueError, match="llamafactory-ddm generate"):
            upstream[0].get_eval_args(args)


def test_other_models_are_served(upstream, folders, tmp_path):
    parser = upstream[0]
    keys = {"model_name_or_path": folders["plain"], "finetuning_type": "lora"}
    *_, finetuning_args, _ = parser.get_infer_args({**keys, "adapter_name_or_path": folders["other_adapter"]})
    assert finetuning_args.diffusion_stage is None
    parser.get_eval_args({**keys, "task": "mmlu_test", "save_dir": str(tmp_path / "e")})
    (tmp_path / "plain" / "config.json").write_text("no JSON")  # LLaMA-Factory reports the fault
    parser.get_infer_args(keys)


@pytest.mark.parametrize("file", ["diffusion_config.json", "config.json"])
def test_a_model_in_the_hubs_cache_is_recognised(upstream, tmp_path, file):
    """The cache is searched by the model's name, as LLaMA-Factory does."""
    root = tmp_path / "hub" / "models--someone--diffuses"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    (snapshot / file).write_text(json.dumps({"model_type": "Dream"}))
    keys = {"model_name_or_path": "someone/diffuses", "finetuning_type": "full", "cache_dir": str(tmp_path / "hub")}
    assert upstream[0].get_infer_args(keys)[2].diffusion_stage == "ddm-sft"
    with pytest.raises(ValueError, match="generate someone/diffuses"):
        upstream[0].get_infer_args({**keys, "stage": "sft"})


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "ppo", "dpo", "kto"])
def test_training_gives_a_warning(upstream, basic, folders, caplog, stage):
    needed = {"reward_model": "plain"} if stage == "ppo" else {}
    for keys, name in [*MODELS, *EXTRA_MODELS]:
        caplog.clear()
        lora = {"finetuning_type": "lora"} if stage == "ppo" else finetuning_type(keys)
        upstream[0].get_train_args(basic(stage=stage, template="default", **lora, **named(folders, needed | keys)))
        assert re.search(rf"{folders[name]} is a diffusion model .*stage: {stage} ", caplog.text)


def test_other_models_and_diffusion_stages_give_no_warning(upstream, basic, folders, caplog):
    parser = upstream[0]
    parser.get_train_args(basic(stage="pt", model_name_or_path=folders["plain"]))
    parser.get_train_args(basic(model_name_or_path=folders["ours"]))
    assert "is a diffusion model" not in caplog.text


def test_generating_with_an_autoregressive_stage_is_refused(upstream, basic, folders, monkeypatch):
    monkeypatch.setattr(upstream[0], "_check_extra_dependencies", lambda *rest: None)
    keys = {"do_train": False, "do_predict": True, "predict_with_generate": True, "eval_dataset": "x", "dataset": None}
    args = basic(stage="sft", template="default", model_name_or_path=folders["ours"], **keys)
    with pytest.raises(ValueError, match=r"do_predict: .*ours .*stage: ddm-sft"):
        upstream[0].get_train_args(args)


@pytest.mark.parametrize("subfolder", ["", "checkpoint-4"])
def test_no_weights_are_saved_beside_a_diffusion_config(upstream, basic, folders, tmp_path, subfolder):
    folder = tmp_path / "out" / subfolder
    folder.mkdir(parents=True)
    (folder / "diffusion_config.json").write_text("{}")
    args = basic(stage="pt", model_name_or_path=folders["plain"])
    with pytest.raises(ValueError, match="output_dir"):
        upstream[0].get_train_args({**args, "overwrite_output_dir": True})
    with pytest.raises(ValueError, match="output_dir"):
        upstream[0].get_train_args(args)
    upstream[0].get_train_args({**args, "do_train": False, "do_eval": True, "eval_dataset": "x", "dataset": None})


def test_a_diffusion_run_is_not_resumed_by_an_autoregressive_stage(upstream, basic, folders):
    args = basic(stage="pt", model_name_or_path=folders["plain"], resume_from_checkpoint=folders["ours"])
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*ours .*stage: ddm"):
        upstream[0].get_train_args(args)
