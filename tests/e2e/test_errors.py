"""Mistakes in a YAML: an error that names the key or the file, and an output folder with no file in it."""

import json
import shutil

import pytest

from llamafactory_ddm.integration import workflow
from llamafactory_ddm.modeling.bidirectional import NotBidirectionalError
from support.published import write_dream, write_llada


def expect(train, folder, pattern, error=ValueError, **keys):
    with pytest.raises(error, match=pattern):
        train(folder, **keys)
    assert not folder.exists() or not list(folder.iterdir())


def test_files_that_do_not_exist(train_small, tmp_path):
    out = tmp_path / "out"
    expect(train_small, out, "^model_name_or_path: data/tiny_gpt ", model_name_or_path="data/tiny_gpt")
    expect(train_small, out, r"^model_name_or_path: \./x ", model_name_or_path="./x")
    expect(train_small, out, "^checkpoint_dir: nowhere ", checkpoint_dir="nowhere")
    expect(train_small, out, "gpt9 .*tokenizer", model_name_or_path="gpt9")


def test_incomplete_models_with_remote_code(train_small, tmp_path):
    """No prompt asks whether to run their code."""
    for write in (write_llada, write_dream):
        model = write(tmp_path / write.__name__)
        shard = model / "model-00001-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        pattern = r"model-00001-of-00002\.safetensors .*\d+ bytes"
        expect(train_small, tmp_path / "out", pattern, model_name_or_path=str(model))
        shard.unlink()
        expect(train_small, tmp_path / "out", "model-00001-of-00002", model_name_or_path=str(model))
        pattern = "^checkpoint_dir: .*model_name_or_path"
        expect(train_small, tmp_path / "out", pattern, checkpoint_dir=str(model))


def test_no_mask_token(train_small, tmp_path):
    out = tmp_path / "out"
    expect(train_small, out, "set mask_token", mask_token=None)
    expect(train_small, out, "^mask_token.*the cat sat on", mask_token="the cat sat on")
    expect(train_small, out, "^mask_token.*99999", mask_token=99999)


def test_a_key_that_contradicts_the_checkpoint(train_small, checkpoint, tmp_path):
    out, base = tmp_path / "out", {"model_name_or_path": checkpoint}
    expect(train_small, out, "^shift: False .*checkpoint", shift=False, **base)
    expect(train_small, out, "^noise_schedule: cosine ", noise_schedule="cosine", **base)
    expect(train_small, out, f"^mask_token: 5 .*{checkpoint}", mask_token=5, **base)
    train_small(out, mask_token="<|mask|>", noise_schedule="linear", shift=True, max_steps=1, **base)


def test_lengths(train_small, small_data, tmp_path):
    out = tmp_path / "out"
    expect(train_small, out, "^cutoff_len: 300 .*cutoff_len: 256", cutoff_len=300)


def test_tokenised_rows_that_are_too_long(train_small, tmp_path):
    from datasets import Dataset, DatasetDict

    row = {"input_ids": [[1] * 300], "attention_mask": [[1] * 300]}
    DatasetDict({"train": Dataset.from_dict(row)}).save_to_disk(tmp_path / "rows")
    expect(
        train_small,
        tmp_path / "out",
        r"tokenized_path: .* 300 tokens",
        tokenized_path=tmp_path / "rows",
        eval_dataset=None,
    )


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "^dataset: short "),
        ('{"text": \n', "dataset: short: .*short.jsonl .*line 1"),
        (json.dumps({"text": "Too short."}) + "\n", "dataset: short .*cutoff_len: 64"),
    ],
)
def test_empty_and_short_data(train_small, tmp_path, text, pattern):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "short.jsonl").write_text(text)
    info = {"short": {"file_name": "short.jsonl", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    keys = {"dataset": "short", "dataset_dir": folder, "eval_dataset": None, "cutoff_len": 64}
    expect(train_small, tmp_path / "out", pattern, **keys)


def test_a_data_file_that_is_missing(train_small, tmp_path):
    info = {"gone": {"file_name": "gone.jsonl", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"dataset": "gone", "dataset_dir": tmp_path, "eval_dataset": None}
    expect(train_small, tmp_path / "out", "gone", **keys)
    expect(train_small, tmp_path / "out", "undefined_name", dataset="undefined_name")


def test_broken_checkpoints(train_small, generate, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"broken.*model\.safetensors .*\d+ bytes"):
        generate(tmp_path / "out", model_name_or_path=broken)
    with pytest.raises(ValueError, match=r"broken.*model\.safetensors .*\d+ bytes"):
        generate(tmp_path / "out", model_name_or_path="data/tiny_gpt2", checkpoint_dir=broken)
    shutil.copytree(checkpoint, broken, dirs_exist_ok=True)
    config = broken / "diffusion_config.json"
    config.write_text(config.read_text().replace('"shift": true', '"shift": "maybe"'))
    with pytest.raises(ValueError, match=r"diffusion_config.json.*shift .*'maybe'"):
        generate(tmp_path / "out", model_name_or_path=broken)
    assert not (tmp_path / "out").exists()


def test_generating_with_an_autoregressive_model(generate, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"data/tiny_gpt2 .*diffusion_config\.json"):
        generate(tmp_path / "out", model_name_or_path="data/tiny_gpt2")
    # With mask_token the user declares it a diffusion model; a new token cannot be one that it was trained with.
    with pytest.raises(ValueError, match=r"^mask_token .*<\|mask\|>"):
        generate(tmp_path / "out", model_name_or_path="data/tiny_gpt2", mask_token="<|mask|>", shift=True)
    assert len(generate(tmp_path / "out", model_name_or_path="data/tiny_gpt2", mask_token=5)) == 3
    assert any(log.levelname == "WARNING" and "data/tiny_gpt2" in log.getMessage() for log in caplog.records)


def test_annealing_under_flash_attention(train_small, tmp_path, monkeypatch):
    from llamafactory_ddm.modeling import bidirectional

    monkeypatch.setattr(bidirectional, "implementation", lambda model: "flash_attention_2")
    monkeypatch.setattr(bidirectional, "_probe_segments", lambda *args: None)  # as the attention is still sdpa
    expect(train_small, tmp_path / "out", "^anneal_steps .*attention", anneal_steps=10)


def test_flash_attention_2_is_not_installed(train_small, generate, checkpoint, tmp_path, monkeypatch):
    """LLaMA-Factory would warn, and train with another attention."""
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    pattern = r"^flash_attn: fa2 cannot be used.*llamafactory-ddm\[flash-attn\].*flash_attn: sdpa"
    expect(train_small, tmp_path / "out", pattern, flash_attn="fa2")
    with pytest.raises(ValueError, match=pattern):
        generate(tmp_path / "out", model_name_or_path=checkpoint, flash_attn="fa2")
    rows = tmp_path / "rows"
    train_small(tmp_path / "out", flash_attn="fa2", do_train=False, tokenized_path=rows)  # only prepares data
    assert rows.is_dir()


def test_flash_attention_3_is_not_installed(train_small, tmp_path):
    expect(train_small, tmp_path / "out", "^flash_attn: fa3 .*flash_attn: fa2 or sdpa", flash_attn="fa3")


def test_a_model_that_cannot_be_made_bidirectional(train_small, tmp_path):
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    folder = tmp_path / "mamba"
    MambaForCausalLM(MambaConfig(vocab_size=800, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained("data/tiny_gpt2").save_pretrained(folder)
    expect(train_small, tmp_path / "out", "[Mm]amba", NotBidirectionalError, model_name_or_path=folder)


def test_diffullamas_own_inference_yaml_works(generate, checkpoint, tmp_path, small_data):
    """It sets a data set, packing and val_size, which generation from noise does not use."""
    texts = generate(
        tmp_path / "out",
        model_name_or_path="data/tiny_gpt2",
        checkpoint_dir=checkpoint,
        shift=True,
        dataset="tiny_corpus_train",
        dataset_dir=small_data,
        template="empty",
        packing=True,
        streaming=False,
        overwrite_cache=True,
        preprocessing_num_workers=1,
        overwrite_output_dir=True,
        val_size=4,
        logits_temp=0.98,
        diffusion_steps=8,
    )
    assert len(texts) == 3


def test_streaming_a_local_file_without_workers(train_small, tmp_path):
    expect(train_small, tmp_path / "out", "dataloader_num_workers.*streaming: true", streaming=True, eval_dataset=None)


def test_annealing_a_diffusion_model_has_no_effect_and_is_logged(train_small, checkpoint, tmp_path, caplog):
    train_small(tmp_path / "out", model_name_or_path=checkpoint, anneal_steps=7, max_steps=1)
    assert "anneal_steps: 7 " in caplog.text


def test_resuming_with_keys_that_contradict_the_checkpoint(train_small, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False}
    out = train_small(tmp_path / "out", **keys)
    with pytest.raises(ValueError, match=r"^shift: False .*resume"):
        train_small(out, **keys, resume_from_checkpoint=True, shift=False)
    with pytest.raises(ValueError, match=r"^mask_token: .*resume"):
        train_small(out, **keys, resume_from_checkpoint=True, mask_token=9)


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({"do_sample": False}, "^do_sample: .*logits_temp: 0"),
        ({"num_beams": 4}, "^num_beams: "),
        ({"denoising_strategy": "topq"}, "^denoising_strategy .*'topq'.*'topk'"),
        ({"diffusion_steps": 0}, "^diffusion_steps .* 0"),
        ({"diffusion_steps": 4, "block_length": 2}, r"diffusion_steps: 4 .*\b6 blocks"),
        ({"cutoff_len": 1}, "^cutoff_len .* 1"),
        ({"confidence_threshold": 0.5}, r"confidence_threshold: 0\.5 .*denoising_strategy: confidence_threshold"),
        ({"entropy_bound": 3}, "entropy_bound: 3.*denoising_strategy: entropy_bound"),
        ({"remask_cap": 0.5}, r"remask_cap: 0\.5 .*denoising_strategy: remdm"),
        ({"denoising_strategy": "remdm", "eos_last": True}, "eos_last: true .*remdm"),
        ({"edit_ratio": 1}, r"^edit_ratio .*\[0, 1\).* 1"),
        ({"edit_ratio": 0.2, "edit_threshold": 0.9}, r"edit_ratio: 0\.2 .*edit_threshold: 0\.9"),
        ({"edit_steps": 2}, "edit_steps: 2 "),
        ({"guidance_scale": 2}, r"guidance_scale: 2\.0 .*generate_from"),
        ({"prefix_length": 4}, "prefix_length: 4 .*generate_from: prefix"),
        ({"generate_from": "prompt"}, "generate_from: prompt .*stage: ddm"),
        ({"generate_from": "prefix"}, "^eval_dataset: .*generate_from: noise"),
        ({"suppress_tokens": "nonsuch"}, "^suppress_tokens: 'nonsuch' "),
        # A digit is the token of this text, not an id.
        ({"suppress_tokens": ",".join([*map(str, range(740)), *"!\"#$%&'()"])}, "^suppress_tokens: 739 "),
        ({"commit_schedule": "dream", "denoising_strategy": "topk"}, "commit_schedule: dream .*topk"),
        ({"score_distribution": "filtered", "denoising_strategy": "random"}, "score_distribution: filtered .*random"),
    ],
)
def test_keys_of_generation_that_do_not_fit(generate, tmp_path, keys, pattern):
    with pytest.raises(ValueError, match=pattern):
        generate(tmp_path / "out", **keys)
    assert not (tmp_path / "out" / "generated_predictions.jsonl").exists()


def test_suppress_tokens_is_checked_before_the_model_is_loaded(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "load_diffusion_model", lambda *words: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"^suppress_tokens: 'nonsuch' "):
        generate(tmp_path / "out", suppress_tokens="nonsuch")


@pytest.mark.parametrize(
    ("texts", "keys", "pattern"),
    [
        (["A cat.", ""], {}, "text 1: .*prompt"),
        (["A cat.", "A dog saw a cat. " * 9], {}, r"text 1: .*\d+ tokens .*cutoff_len: 12"),
        (["A <|infill:2|> cat."], {}, r"text 0: .*<\|infill:2\|>.* generate_from: infill"),
        (["A cat."], {"prefix_length": 10}, r"text 0: .*\d+ tokens.*prefix_length: 10"),
        (["A cat."], {"max_new_tokens": 300}, r"text 0: .*\b256 positions"),
        (["A cat."], {"generate_from": "infill"}, r"text 0: .*<\|infill:8\|>"),
        (["A <|infill:0|> cat."], {"generate_from": "infill"}, r"text 0: .*<\|infill:0\|>"),
        (["A <|infill|> cat."], {"generate_from": "infill"}, r"text 0: .*<\|infill\|> .*label"),
    ],
)
def test_prompts_that_cannot_be_used(generate, tmp_path, texts, keys, pattern):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    info = {"prompts": {"file_name": "prompts.jsonl", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"generate_from": "prefix", "eval_dataset": "prompts", "dataset_dir": tmp_path, **keys}
    with pytest.raises(ValueError, match=pattern):
        generate(tmp_path / "out", **keys)
    assert not (tmp_path / "out" / "generated_predictions.jsonl").exists()


def test_generation_needs_the_whole_model(generate, tmp_path):
    from types import SimpleNamespace

    from llamafactory_ddm.integration.resolve.checks import check_predict

    with pytest.raises(ValueError, match=r"do_predict.*FSDP"):
        check_predict(SimpleNamespace(do_predict=True, fsdp="full_shard"), frozenset())
    check_predict(SimpleNamespace(do_predict=False, fsdp="full_shard"), frozenset({"num_beams"}))
