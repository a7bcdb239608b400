"""Every YAML of examples/, through the real command line, with small sizes and the built-in model."""

import shutil

import pytest
from omegaconf import OmegaConf

from llamafactory_ddm.integration.hparams.stages import STAGES
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.blocks import as_block_model
from support.cli import ROOT, predictions, run
from support.published import write_dream, write_llada
from support.published_sdar import write_sdar

FITTING, PREPARING = "varlen_fit_length.yaml", "prepare_data_tiny.yaml"
QUESTION = "Sam has 3 eggs. He gets 2 more. How many eggs does he have?"
RECIPES = sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
SERVING = [name for name in RECIPES if name.endswith("_chat.yaml")]
QUICK = ("tiny_gpt2_full_ddm.yaml", "tiny_gpt2_inference.yaml", "tiny_gpt2_lora_ddm_sft.yaml", "varlen_eval.yaml")
SMALL_TRAINING = (
    "max_steps=2",
    "warmup_steps=0",
    "per_device_train_batch_size=2",
    "per_device_eval_batch_size=4",
    "gradient_accumulation_steps=2",
    "logging_steps=1",
    "save_steps=1",
    "cutoff_len=32",
    "use_cpu=true",
    "overwrite_cache=true",
)


# Recipes of models that are named as they were published -> a miniature of theirs.
PUBLISHED = {
    "GSAI-ML/LLaDA-8B-Instruct": write_llada,
    "Dream-org/Dream-v0-Instruct-7B": write_dream,
    "JetLM/SDAR-4B-Chat": write_sdar,
}
PROBLEMS = {"gsm8k": "tiny_problems_train", "gsm8k_test": "tiny_problems_eval"}


def overrides(name, folder, data, checkpoint, finetuned, adapter):
    """The keys that make a recipe small; everything else runs as it stands."""
    keys = OmegaConf.load(ROOT / "examples" / name)
    if "_block_inference" in name:
        source = finetuned if keys.stage == "ddm-sft" else checkpoint
        checkpoint = finetuned = as_block_model(source, folder / "block")
    result = [f"output_dir={folder / 'out'}"]
    if "additional_target" in keys and keys.model_name_or_path not in PUBLISHED:
        result.append("additional_target=wte")
    for key in ("dataset", "eval_dataset"):
        if keys.get(key) in PROBLEMS:
            result += [f"{key}={PROBLEMS[keys[key]]}", f"dataset_dir={data}"]
    if keys.model_name_or_path in PUBLISHED:
        result.append(f"model_name_or_path={PUBLISHED[keys.model_name_or_path](folder / 'published')}")
        if keys.get("do_predict"):
            small = ["max_samples=2", "diffusion_steps=6", "max_new_tokens=12", "cutoff_len=240"]
            return [*result, *small, *(["block_length=6"] if "block_length" in keys else []), "overwrite_cache=true"]
        small = [*SMALL_TRAINING, "save_strategy=steps", "num_train_epochs=1", "warmup_ratio=0", "cutoff_len=200"]
        return [*result, *small]
    if keys.get("do_predict") and "adapter_name_or_path" in keys:
        result += [f"model_name_or_path={checkpoint}", f"adapter_name_or_path={adapter}"]
        return [*result, "max_samples=2", "diffusion_steps=12", "cutoff_len=64", "overwrite_cache=true"]
    if keys.get("do_predict") and "eval_dataset" in keys:
        model = finetuned if keys.get("template") == "diffullama" else checkpoint
        small = ["max_samples=2", "diffusion_steps=12", "cutoff_len=90", "overwrite_cache=true"]
        small += ["max_new_tokens=12"] if "max_new_tokens" in keys else []
        return [*result, f"model_name_or_path={model}", *small]
    if keys.get("do_predict"):
        return [*result, f"model_name_or_path={checkpoint}", "num_samples=2", "diffusion_steps=3", "cutoff_len=12"]
    base = "data/tiny_gpt2" if "mask_token" in keys or keys.stage in ("pt", "sft") else checkpoint
    result += [f"model_name_or_path={base}", f"dataset_dir={data}"]
    if keys.get("template") == "diffullama" and "sep_token" not in keys:
        result.append("sep_token=10")  # which the converted model names
    if "deepspeed" in keys:
        result.append("deepspeed=null")  # an extra, with tests of its own
    if keys.get("dataset") in ("fineweb", "fineweb_edu"):
        result.append("dataset=tiny_corpus_train")
    if keys.get("dataset") == "slimpajama,starcoder":
        result.append("dataset=tiny_corpus_train,tiny_corpus_eval")
    if "eval_steps" in keys:
        result += ["eval_steps=1", "val_size=4"] if "val_size" in keys else ["eval_steps=1"]
    if isinstance(keys.get("mask_token"), int) or keys.get("mask_token") in ("<|fim_pad|>", "ти"):
        result.append("mask_token=10")  # what the recipe names is one of its model's
    if keys.get("sep_token") == "======":
        result.append("sep_token=10")
    if keys.get("template") == "qwen3_nothink":
        result.append("template=default")  # the built-in model lacks the tokens of the recipe's
    if keys.stage == "sft":
        result.append("lora_target=c_attn")  # upstream's "all" does not find GPT-2's layers
    if keys.get("save_strategy") == "epoch":
        result += ["save_strategy=steps", "num_train_epochs=1", "warmup_ratio=0"]
    if keys.get("eval_strategy") == "epoch":
        result += ["eval_strategy=steps", "eval_steps=1"]
    if "val_size" in keys:
        result.append("val_size=4")
    if "tokenized_path" in keys:
        result += [f"tokenized_path={folder / 'rows'}", "preprocessing_num_workers=1", "dataloader_num_workers=0"]
    if keys.get("streaming"):
        result.append("dataloader_num_workers=1")
    if keys.get("do_train"):
        # Rows of variable length are left out where they are too long.
        longer = ["cutoff_len=250"] if "variable_length" in keys else []
        longer += ["cutoff_len=120"] if keys.get("template") == "qwen3_nothink" else []  # its answers have to fit
        return [*result, *SMALL_TRAINING, *longer]
    if name == FITTING:
        return [*result, "variable_length=eos_eos", "sep_token=10", "overwrite_cache=true", "num_train_epochs=1"]
    if keys.get("eval_eos"):
        return [*result, "max_samples=4", "overwrite_cache=true", "variable_length=eos_eos", "sep_token=10"]
    return [*result, "cutoff_len=32", "val_size=4"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in RECIPES
        if name not in (*SERVING, PREPARING)
    ],
)
def test_the_recipe_runs(name, tmp_path, small_data, checkpoint, finetuned, adapter):
    keys = OmegaConf.load(ROOT / "examples" / name)
    words = overrides(name, tmp_path, small_data, checkpoint, finetuned, adapter)
    if name == FITTING:
        model = shutil.copytree(checkpoint, tmp_path / "model")
        words = [f"model_name_or_path={model}" if word.startswith("model_name") else word for word in words]
        run("fit-length", f"examples/{name}", *words, program="llamafactory-ddm")
        assert (model / "length_predictors.safetensors").is_file()
        return
    run("train", f"examples/{name}", *words)
    out = tmp_path / "out"
    if keys.get("do_predict"):
        assert len(predictions(out)) == 2
    elif keys.get("eval_eos"):
        assert (out / "eos_metrics.json").is_file() and (out / "eos_metrics.png").is_file()
    elif keys.get("do_train") and keys.stage == "ddm":
        config = DiffusionConfig.load(out)
        assert config.attention_ratio == (2 / keys.anneal_steps if keys.get("anneal_steps") else 1.0)
        assert (config.variable_length is not None) == ("variable_length" in keys)
    elif keys.get("do_train"):
        weights = "adapter_model" if keys.finetuning_type == "lora" else "model"
        assert (out / f"{weights}.safetensors").is_file()
        assert (out / "diffusion_config.json").is_file() == (keys.stage in STAGES)
    else:
        assert (tmp_path / "rows" / "train").is_dir()
        assert not out.exists()


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_what_a_user_wants_to_know(name):
    header = (ROOT / "examples" / name).read_text().split("\n###")[0]
    for word in (f"examples/{name}", "Hardware:", "Result:"):
        assert word in header, word
    assert "Time:" in header or "preprocess" in name


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVING)
def test_the_recipe_chats(name, tmp_path, finetuned):
    """The API and the web chat read the same YAML, in tests of theirs."""
    model = as_block_model(finetuned, tmp_path / "block") if "_block_" in name else finetuned
    words = (f"model_name_or_path={model}", "cutoff_len=64")
    done = run("chat", f"examples/{name}", *words, input=f"{QUESTION}\nexit\n")
    assert done.stdout.count("Assistant: ") == 1 and "error" not in done.stdout


def test_the_corpus_of_the_recipe_is_prepared_and_trained_on(tmp_path, train_small):
    run("--out", tmp_path, program="data/make_shards.py")
    paths = (f"sources.web.path={tmp_path / 'web'}", f"sources.code.path={tmp_path / 'code' / '*.jsonl.zst'}")
    done = run(
        "prepare-data",
        f"examples/{PREPARING}",
        *paths,
        f"tokenized_path={tmp_path / 'rows'}",
        "preprocessing_num_workers=1",
        program="llamafactory-ddm",
    )
    for reason in ("language == en", "language_score >= 0.1", "deduplicate"):
        assert f"dropped by {reason}: " in done.stdout
    keys = {"tokenized_path": tmp_path / "rows", "cutoff_len": 128, "do_eval": True, "max_steps": 1}
    out = train_small(tmp_path / "out", **keys)
    assert DiffusionConfig.load(out).canvas == 128 and (out / "eval_results.json").is_file()
