"""`stage: ddm-sft` from YAML: the full model, adapters, packing, published layouts, export, resuming."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from llamafactory_ddm import load
from llamafactory_ddm.modeling.diffusion_config import FILE_NAME, DiffusionConfig
from llamafactory_ddm.modeling.special_tokens import splits_digits
from support.cli import ABSENT, ROOT, history, predictions, run, train_here

SOLVE = "tiny_gpt2_sft_inference.yaml"
LORA = "tiny_gpt2_lora_ddm_sft.yaml"
IDS = torch.arange(40)[None]


def losses(folder):
    return [log["loss"] for log in history(folder)]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.zeros(1, 1, 40, 40)).logits


def merged(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter))


def export(folder, base, adapter, **keys):
    words = {"model_name_or_path": base, "adapter_name_or_path": adapter, "finetuning_type": "lora", **keys}
    words |= {"template": "diffullama", "export_dir": folder, "infer_dtype": "float32"}
    run("export", *(word for key, value in words.items() for word in (f"--{key}", str(value))))


def solve(folder, **keys):
    small = {"max_samples": 3, "diffusion_steps": 4, "cutoff_len": 64, "overwrite_cache": True}
    train_here(SOLVE, output_dir=folder, **{**small, **keys})
    return predictions(folder)


def test_the_tokenizer_of_a_finetuned_model_formats_its_prompts(checkpoint, finetuned):
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template is None
    tokenizer = AutoTokenizer.from_pretrained(finetuned)
    turn = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "<|endoftext|>Q\nA<|endoftext|>"


def test_the_checkpoint_says_how_it_was_finetuned(finetuned, tmp_path):
    config, tokenizer = DiffusionConfig.load(finetuned), AutoTokenizer.from_pretrained(finetuned)
    assert config.train_on_padding is True
    assert (config.sep_token, config.sep_token_id) == ("Ċ", tokenizer.convert_tokens_to_ids("Ċ"))
    assert len(solve(tmp_path / "solved", model_name_or_path=finetuned)) == 3
    results = json.loads((tmp_path / "solved" / "predict_results.json").read_text())
    assert "predict_gsm8k_accuracy" in results


def test_only_the_response_is_noised(finetuned, small_data, tmp_path, finetune):
    """Of a response of one token, only that token and EOS are maskable."""
    rows = [{"instruction": "Tom has 3 apples.", "output": "3"}] * 16
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    for split in ("train", "eval"):
        (data / f"tiny_problems_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune(tmp_path / "hidden", dataset_dir=data, train_on_padding=False, max_steps=8, antithetic_time=False)
    assert DiffusionConfig.load(tmp_path / "hidden").train_on_padding is False
    for log in history(tmp_path / "hidden"):
        masked = log["masked_fraction"] * 4 * 2  # 4 rows of 2 maskable tokens: the digit and EOS
        assert masked == pytest.approx(round(masked), abs=1e-6)
    odd = [round(log["masked_fraction"] * 8) % 2 for log in history(tmp_path / "hidden")]
    assert any(odd)  # with one maskable token per row, all would be even eighths


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"train_on_padding": False},
        {"sep_token": "!"},
        {"train_on_prompt": True},
        {"template": "alpaca", "sep_token": ABSENT, "cutoff_len": 120},
        {"packing": True},
        {"neat_packing": True},
    ],
    ids=str,
)
def test_each_key_changes_the_loss(change, finetuned, finetune, tmp_path):
    assert losses(finetune(tmp_path / "out", **change)) != losses(finetuned)


@pytest.mark.slow
def test_packing_and_neat_packing_are_the_same(finetune, tmp_path):
    packed = {"cutoff_len": 128, "max_steps": 2}
    one, two = (
        finetune(tmp_path / "one", packing=True, **packed),
        finetune(tmp_path / "two", neat_packing=True, **packed),
    )
    assert losses(one) == pytest.approx(losses(two), rel=1e-6)
    assert DiffusionConfig.load(one).train_on_padding is False


@pytest.mark.slow
def test_several_turns_and_mask_history(small_data, finetune, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    row = {"instruction": "And 2 more?", "output": "5", "history": [["Tom has 3 apples.", "3"]]}
    (data / "turns.json").write_text(json.dumps([row] * 16))
    info = {"turns": {"file_name": "turns.json", "columns": {"prompt": "instruction", "response": "output"}}}
    info["turns"]["columns"]["history"] = "history"
    (data / "dataset_info.json").write_text(json.dumps(info))
    keys = {"dataset_dir": data, "dataset": "turns", "eval_dataset": ABSENT, "template": "default"}
    keys |= {"sep_token": ABSENT, "cutoff_len": 96, "train_on_padding": False}
    both = finetune(tmp_path / "both", **keys)
    last = finetune(tmp_path / "last", **keys, mask_history=True)
    assert losses(both) != losses(last)
    with pytest.raises(ValueError, match=r"template: diffullama .*4 messages"):
        finetune(tmp_path / "refused", **{**keys, "template": "diffullama", "sep_token": "\n"})


def test_freeze_trains_the_last_layers_only(checkpoint, finetune, tmp_path):
    out = finetune(tmp_path / "out", finetuning_type="freeze", freeze_trainable_layers=1)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, out))
    changed = {key for key in after if not torch.equal(before[key].float(), after[key].float())}
    assert changed
    assert all(".h.3." in key for key in changed)


# ---- adapters ----


def test_an_adapter_of_gpt2(adapter):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert set(settings["target_modules"]) == {"c_attn", "c_proj", "c_fc"}
    assert {path.name for path in adapter.iterdir()} >= {"adapter_model.safetensors", FILE_NAME, "tokenizer.json"}
    assert not (adapter / "model.safetensors").exists()
    assert DiffusionConfig.load(adapter).sep_token == "Ċ"


def test_an_adapter_generates_and_can_be_trained_further(adapter, checkpoint, finetune, tmp_path):
    keys = {"model_name_or_path": checkpoint, "adapter_name_or_path": str(adapter), "finetuning_type": "lora"}
    texts = solve(tmp_path / "solved", **keys)
    generator = load(adapter)
    assert generator.config.sep_token == "Ċ"
    torch.testing.assert_close(logits(generator.model), logits(merged(checkpoint, adapter)), rtol=1e-4, atol=1e-5)
    assert len(texts) == 3
    further = finetune(tmp_path / "further", recipe=LORA, adapter_name_or_path=str(adapter))
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, further))
    assert old.keys() == new.keys()
    assert losses(further)[0] < losses(adapter)[0]


def test_an_adapter_on_top_of_another_gives_a_warning(adapter, finetune, tmp_path, caplog):
    keys = {"recipe": LORA, "adapter_name_or_path": str(adapter), "max_steps": 1}
    finetune(tmp_path / "further", **keys)
    assert ",OUTPUT_DIR" not in caplog.text
    finetune(tmp_path / "new", **keys, create_new_adapter=True)
    assert f"adapter_name_or_path: {adapter},OUTPUT_DIR" in caplog.text


@pytest.mark.parametrize("stage", [None, "ddm-sft"])
def test_export_is_base_and_adapter(adapter, checkpoint, tmp_path, stage):
    out = tmp_path / "out"
    export(out, checkpoint, adapter, **({"stage": stage} if stage else {}))
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(exported), logits(merged(checkpoint, adapter)), rtol=0, atol=1e-5)
    assert DiffusionConfig.load(out) == DiffusionConfig.load(adapter)
    assert AutoTokenizer.from_pretrained(out).mask_token == "<|mask|>"
    assert len(solve(tmp_path / "solved", model_name_or_path=out)) == 3


@pytest.mark.slow
def test_a_trained_copy_of_tied_embeddings_stays_tied(checkpoint, finetune, tmp_path):
    out = finetune(tmp_path / "adapter", recipe=LORA, additional_target="wte")
    assert any("wte" in key for key in load_file(out / "adapter_model.safetensors"))
    export(tmp_path / "out", checkpoint, out)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert exported.lm_head.weight is exported.transformer.wte.weight
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not torch.equal(exported.transformer.wte.weight, base.transformer.wte.weight.float())
    torch.testing.assert_close(logits(exported), logits(load(out).model), rtol=1e-5, atol=1e-5)
    # Further training starts from the same loss.
    again = finetune(tmp_path / "again", recipe=LORA, model_name_or_path=tmp_path / "out", learning_rate=0.0)
    same = finetune(tmp_path / "same", recipe=LORA, adapter_name_or_path=str(out), learning_rate=0.0)
    assert losses(again) == pytest.approx(losses(same), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["use_dora", "use_rslora"])
def test_llamafactorys_variants_of_lora(key, adapter, checkpoint, finetune, tmp_path):
    out = finetune(tmp_path / "out", recipe=LORA, **{key: True})
    assert json.loads((out / "adapter_config.json").read_text())[key] is True
    assert losses(out)[-1] != losses(adapter)[-1]
    export(tmp_path / "merged", checkpoint, out)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(exported), logits(merged(checkpoint, out)), rtol=1e-5, atol=1e-5)


def test_a_module_name_that_matches_nothing_is_an_error(finetune, tmp_path):
    with pytest.raises(ValueError, match=r"lora_target: q_proj .*c_attn \(4 modules\)"):
        finetune(tmp_path / "out", recipe=LORA, lora_target="c_attn,q_proj")
    with pytest.raises(ValueError, match=r"additional_target: embed_tokens .*wte"):
        finetune(tmp_path / "out", recipe=LORA, additional_target="embed_tokens")


def test_a_tied_output_embedding_is_trained_through_the_input_embedding(finetune, tmp_path):
    with pytest.raises(ValueError, match=r"additional_target: lm_head .*wte"):
        finetune(tmp_path / "out", recipe=LORA, additional_target="lm_head")
    both = finetune(tmp_path / "both", recipe=LORA, additional_target="wte,lm_head")
    one = finetune(tmp_path / "one", recipe=LORA, additional_target="wte")
    assert losses(both) == pytest.approx(losses(one), rel=1e-4)


def test_a_new_mask_token_needs_its_embedding_in_the_adapter(finetune, tmp_path):
    base = tmp_path / "base"  # the built-in model in float32
    AutoModelForCausalLM.from_pretrained(ROOT / "data" / "tiny_gpt2", dtype=torch.float32).save_pretrained(base)
    AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2").save_pretrained(base)
    keys = {"recipe": LORA, "model_name_or_path": base, "mask_token": "<|mask|>", "anneal_steps": 0}
    with pytest.raises(ValueError, match=r"mask_token .*resize_vocab: true.*additional_target"):
        finetune(tmp_path / "out", **keys)
    out = finetune(tmp_path / "out", **keys, additional_target="wte")
    texts = solve(
        tmp_path / "solved",
        model_name_or_path=base,
        adapter_name_or_path=str(out),
        finetuning_type="lora",
    )
    assert len(texts) == 3
    half = {**keys, "model_name_or_path": "data/tiny_gpt2", "additional_target": "wte"}
    with pytest.raises(ValueError, match=r"additional_target: wte .*float32.*bfloat16"):
        finetune(tmp_path / "half", **half)
    assert load(out).generate(max_new_tokens=4)


def test_an_adapter_of_another_model_is_refused(adapter, train_small, tmp_path):
    other = train_small(tmp_path / "other", shift=False)
    keys = {"model_name_or_path": other, "adapter_name_or_path": str(adapter), "finetuning_type": "lora"}
    with pytest.raises(ValueError, match=r"shift: True.*shift: False"):
        solve(tmp_path / "solved", **keys)


@pytest.mark.slow
def test_an_adapter_on_another_base(adapter, finetuned, tmp_path, caplog):
    keys = {"model_name_or_path": finetuned, "adapter_name_or_path": str(adapter), "finetuning_type": "lora"}
    solve(tmp_path / "solved", **keys)
    assert re.search(rf"adapter {adapter} .*{finetuned}", caplog.text)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=741, n_positions=256, n_embd=64, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(finetuned).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"shapes .*small \(.*c_attn"):
        solve(tmp_path / "solved", **{**keys, "model_name_or_path": tmp_path / "small"})


def test_an_adapter_is_not_a_model_and_a_model_not_an_adapter(adapter, finetuned, tmp_path):
    with pytest.raises(ValueError, match=r"model_name_or_path: .*adapter_name_or_path"):
        solve(tmp_path / "solved", model_name_or_path=adapter)
    keys = {"adapter_name_or_path": str(finetuned), "finetuning_type": "lora"}
    with pytest.raises(ValueError, match=r"adapter_name_or_path: .*adapter_config.json"):
        solve(tmp_path / "solved", model_name_or_path=finetuned, **keys)


def test_freeze_refuses_what_it_cannot_train(finetune, tmp_path):
    keys = {"model_name_or_path": "data/tiny_gpt2", "finetuning_type": "freeze", "anneal_steps": 0}
    with pytest.raises(ValueError, match=r"mask_token .*finetuning_type: freeze .*freeze_extra_modules"):
        finetune(tmp_path / "out", **keys, mask_token="<|new|>")
    with pytest.raises(ValueError, match=r"finetuning_type: freeze .*float32.*bfloat16"):
        finetune(tmp_path / "out", **keys, mask_token="!")


@pytest.mark.slow
def test_tokenised_rows_fit_or_are_refused(finetune, tmp_path):
    keys = {"tokenized_path": str(tmp_path / "tokens"), "eval_dataset": ABSENT, "train_on_padding": False}
    finetune(tmp_path / "out", **keys)
    finetune(tmp_path / "out", **keys)
    with pytest.raises(ValueError, match=r"tokenized_path: .*cutoff_len: 24"):
        finetune(tmp_path / "out", **keys, cutoff_len=24)


def test_a_missing_column(small_data, finetuned, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    (data / "tiny_problems_eval.jsonl").write_text('{"instruction": "Tom has 3 apples."}\n')
    assert len(solve(tmp_path / "solved", model_name_or_path=finetuned, dataset_dir=data)) == 1  # a test set
    (data / "tiny_problems_eval.jsonl").write_text('{"output": "3"}\n')
    with pytest.raises(ValueError, match=r"dataset: tiny_problems_eval .*'instruction'"):
        solve(tmp_path / "solved", model_name_or_path=finetuned, dataset_dir=data)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny_gpt2_full_ddm_sft.yaml", LORA])
def test_a_resumed_run_is_the_uninterrupted_one(recipe, finetune, tmp_path):
    keys = {"recipe": recipe, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = finetune(tmp_path / "whole", **keys)
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    finetune(half, **keys, resume_from_checkpoint=str(half / "checkpoint-2"))
    assert losses(whole) == losses(half)
    name = "adapter_model.safetensors" if recipe == LORA else "model.safetensors"
    one, two = load_file(whole / name), load_file(half / name)
    assert all(torch.equal(one[key], two[key]) for key in one)
    for change, words in (({"train_on_padding": False}, "train_on_padding: False"), ({"sep_token": "!"}, "sep_token")):
        with pytest.raises(ValueError, match=f"{words}.*checkpoint-2"):
            finetune(half, **keys, resume_from_checkpoint=str(half / "checkpoint-2"), **change)


# ---- published layouts ----


def as_published(checkpoint, folder):
    """Write a checkpoint with DiffuGPT's names of weights, without the files that this package adds."""
    folder.mkdir()
    names = {"transformer.wte.weight": "embed_tokens.weight"}
    weights = load_file(checkpoint / "model.safetensors")
    renamed = {
        names.get(key) or key.replace("transformer.", "denoise_model."): value for key, value in weights.items()
    }
    renamed["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(renamed, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_checkpoint_dir_reads_diffugpts_layout(checkpoint, finetune, tmp_path):
    source = as_published(checkpoint, tmp_path / "published")
    keys = {"model_name_or_path": "data/tiny_gpt2", "checkpoint_dir": str(source), "mask_token": "<|mask|>"}
    direct, through = finetune(tmp_path / "direct"), finetune(tmp_path / "through", **keys, anneal_steps=1000)
    assert losses(through) == pytest.approx(losses(direct), rel=1e-4)
    assert {log["attention_ratio"] for log in history(through)} == {1.0}  # its attention is already annealed
    with pytest.raises(ValueError, match=r"model_name_or_path: .*DiffuGPT.*llamafactory-ddm convert.*checkpoint_dir"):
        finetune(tmp_path / "not", model_name_or_path=source)
    # LLaMA-Factory's default finetuning_type, lora, has no effect in a run that neither trains nor loads an adapter.
    words = {**keys, "finetuning_type": ABSENT, "sep_token": "\n"}
    assert len(solve(tmp_path / "solved", **words)) == 3


@pytest.mark.slow
def test_lora_on_a_published_checkpoint(checkpoint, finetune, tmp_path):
    source = as_published(checkpoint, tmp_path / "published")
    shutil.copytree(ROOT / "data" / "tiny_gpt2", tmp_path / "base")
    base = {"model_name_or_path": tmp_path / "base", "checkpoint_dir": str(source), "mask_token": "<|mask|>"}
    with pytest.raises(ValueError, match=r"checkpoint_dir: .*llamafactory-ddm convert"):
        finetune(tmp_path / "out", recipe=LORA, **base, anneal_steps=0)
    tokens = ("--mask-token", str(len(AutoTokenizer.from_pretrained(checkpoint)) - 1))
    done = run("convert", source, tmp_path / "converted", "--base", checkpoint, *tokens, program="llamafactory-ddm")
    assert "is ready" in done.stdout
    direct = finetune(tmp_path / "direct", recipe=LORA)
    through = finetune(tmp_path / "through", recipe=LORA, model_name_or_path=tmp_path / "converted")
    assert losses(through) == pytest.approx(losses(direct), rel=1e-4)


# ---- what a user gets wrong ----


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sep_token": ABSENT}, "template: diffullama .*sep_token"),
        ({"sep_token": "<|mask|>"}, r"sep_token: '<\|mask\|>' .*mask token"),
        ({"sep_token": "two words"}, "sep_token: 'two words' "),
        ({"template": "alpaca"}, r"sep_token: '\\n' .*template is alpaca"),
        ({"template": ABSENT}, r"sep_token: '\\n' .*no template .*template: diffullama"),
        ({"packing": True, "train_on_padding": True}, "train_on_padding: true .*packing: true"),
        ({"split_digits": False}, "split_digits: false "),
        ({"train_on_padding": "maybe"}, "train_on_padding .*true or false"),
        ({"finetuning_type": "oft"}, "finetuning_type .*full, freeze, lora.*ddm-sft"),
        (
            {"adapter_name_or_path": "nowhere", "finetuning_type": "lora"},
            "adapter_name_or_path: nowhere ",
        ),
    ],
    ids=str,
)
def test_mistakes_name_the_key(keys, words, finetune, tmp_path):
    with pytest.raises(ValueError, match=words):
        finetune(tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def test_keys_that_contradict_the_checkpoint(finetuned, finetune, tmp_path):
    for keys, words in (
        ({"train_on_padding": False}, "train_on_padding: False .*train_on_padding: True"),
        ({"sep_token": "!"}, "sep_token: '!' .*checkpoint"),
        ({"packing": True}, "train_on_padding: true of the checkpoint .*packing: true"),
    ):
        with pytest.raises(ValueError, match=words):
            finetune(tmp_path / "out", model_name_or_path=finetuned, **keys)


def test_finetuning_keys_are_refused_by_stage_ddm(train_small, tmp_path):
    with pytest.raises(ValueError, match=r"train_on_padding: .*stage is ddm"):
        train_small(tmp_path / "out", train_on_padding=True)


@pytest.mark.slow
def test_digits_stay_split_in_the_saved_tokenizer(small_data, tmp_path, checkpoint, finetune):
    """From a tokenizer that joins them."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    raw = json.loads((base / "tokenizer.json").read_text())
    raw["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = raw["model"]["vocab"]
    free = next(token for token in vocabulary if len(token) > 4 and not token.startswith("<"))
    vocabulary["11"] = vocabulary.pop(free)
    raw["model"]["merges"] = [["1", "1"]] + [m for m in raw["model"]["merges"] if free not in ("".join(m), *m)]
    (base / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = AutoTokenizer.from_pretrained(base)
    if splits_digits(tokenizer):
        pytest.fail("the tokenizer of this test should join digits")
    out = finetune(tmp_path / "out", model_name_or_path=base, split_digits=True)
    assert splits_digits(AutoTokenizer.from_pretrained(out))
