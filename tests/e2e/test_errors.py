"""A user's mistakes: one error that names the cause and the cure, and nothing half written."""

import json
import shutil

import pytest

from llamafactory_ddm.modeling.bidirectional import NotBidirectionalError
from support.published import write_dream, write_llada


def expect(train, folder, words, error=ValueError, **keys):
    with pytest.raises(error, match=words):
        train(folder, **keys)
    assert not folder.exists() or not list(folder.iterdir())


def test_files_that_do_not_exist(train_small, tmp_path):
    out = tmp_path / "out"
    expect(train_small, out, r"model_name_or_path: data/tiny_gpt is not a folder", model_name_or_path="data/tiny_gpt")
    expect(train_small, out, r"model_name_or_path: \./x is not a folder", model_name_or_path="./x")
    expect(train_small, out, "checkpoint_dir: nowhere is not a folder", checkpoint_dir="nowhere")
    expect(train_small, out, "gpt9 has no tokenizer that could be loaded", model_name_or_path="gpt9")


def test_models_with_code_of_their_own_that_are_not_whole(train_small, tmp_path, monkeypatch):
    """Nobody is asked whether to run their code, and nothing is left where their plain copies would be."""
    monkeypatch.setenv("LLAMAFACTORY_DDM_CACHE", str(tmp_path / "cache"))
    for write in (write_llada, write_dream):
        model = write(tmp_path / write.__name__)
        shard = model / "model-00001-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        words = r"model-00001-of-00002.safetensors has \d+ bytes, its header says \d+: truncated or altered"
        expect(train_small, tmp_path / "out", words, model_name_or_path=str(model))
        shard.unlink()
        expect(train_small, tmp_path / "out", "names model-00001-of-00002", model_name_or_path=str(model))
        words = "checkpoint_dir: .* as it was published, a whole model; name it as model_name_or_path"
        expect(train_small, tmp_path / "out", words, checkpoint_dir=str(model))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_no_mask_token(train_small, tmp_path):
    out = tmp_path / "out"
    expect(train_small, out, "no mask token, and none is given: set mask_token", mask_token=None)
    expect(train_small, out, "is not one token but", mask_token="the cat sat on")
    expect(train_small, out, "is not an id of the vocabulary, which has", mask_token=99999)


def test_a_key_that_contradicts_the_checkpoint(train_small, checkpoint, tmp_path):
    out, base = tmp_path / "out", {"model_name_or_path": checkpoint}
    expect(train_small, out, "shift: False contradicts the checkpoint", shift=False, **base)
    expect(train_small, out, "noise_schedule: cosine contradicts", noise_schedule="cosine", **base)
    expect(train_small, out, "mask_token: 5 has id 5, but .*diffusion_config.json says", mask_token=5, **base)
    train_small(out, mask_token="<|mask|>", noise_schedule="linear", shift=True, max_steps=1, **base)


def test_lengths(train_small, small_data, tmp_path):
    out = tmp_path / "out"
    expect(train_small, out, "cutoff_len: 300 exceeds the model's 256 positions; set cutoff_len: 256", cutoff_len=300)


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
    ("text", "words"),
    [
        ("", "dataset: short has no row"),
        ('{"text": \n', "dataset: short: .*short.jsonl .*line 1"),
        (json.dumps({"text": "Too short."}) + "\n", "dataset: short .*cutoff_len: 64"),
    ],
)
def test_empty_and_short_data(train_small, tmp_path, text, words):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "short.jsonl").write_text(text)
    info = {"short": {"file_name": "short.jsonl", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    keys = {"dataset": "short", "dataset_dir": folder, "eval_dataset": None, "cutoff_len": 64}
    expect(train_small, tmp_path / "out", words, **keys)


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
    with pytest.raises(ValueError, match="truncated or altered"):
        generate(tmp_path / "out", model_name_or_path=broken)
    with pytest.raises(ValueError, match="truncated or altered"):
        generate(tmp_path / "out", model_name_or_path="data/tiny_gpt2", checkpoint_dir=broken)
    shutil.copytree(checkpoint, broken, dirs_exist_ok=True)
    config = broken / "diffusion_config.json"
    config.write_text(config.read_text().replace('"shift": true', '"shift": "maybe"'))
    with pytest.raises(ValueError, match="shift must be bool"):
        generate(tmp_path / "out", model_name_or_path=broken)
    assert not (tmp_path / "out").exists()


def test_generating_with_a_model_that_is_no_diffusion_model(generate, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"holds no diffusion_config\.json"):
        generate(tmp_path / "out", model_name_or_path="data/tiny_gpt2")
    # The user may say that it is one; a token that no model was trained with cannot be its mask.
    with pytest.raises(
        ValueError, match=r"mask_token \('<\|mask\|>'\): new to the model, and a run that trains nothing"
    ):
        generate(tmp_path / "out", model_name_or_path="data/tiny_gpt2", mask_token="<|mask|>", shift=True)
    assert len(generate(tmp_path / "out", model_name_or_path="data/tiny_gpt2", mask_token=5)) == 3
    assert "nothing but the YAML says that it is a diffusion model, trained with" in caplog.text


def test_annealing_under_flash_attention(train_small, tmp_path, monkeypatch):
    from llamafactory_ddm.modeling import bidirectional

    monkeypatch.setattr(bidirectional, "_implementation", lambda model: "flash_attention_2")
    expect(train_small, tmp_path / "out", "anneal_steps needs an attention mask", anneal_steps=10)


def test_a_model_that_cannot_be_made_bidirectional(train_small, tmp_path):
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    folder = tmp_path / "mamba"
    MambaForCausalLM(MambaConfig(vocab_size=800, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained("data/tiny_gpt2").save_pretrained(folder)
    expect(
        train_small, tmp_path / "out", "cannot be made bidirectional", NotBidirectionalError, model_name_or_path=folder
    )


def test_diffullamas_own_inference_yaml_works(generate, checkpoint, tmp_path, small_data):
    """It names a data set, packing and val_size, none of which unconditional generation needs."""
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


def test_streaming_a_local_file_in_no_parts(train_small, tmp_path):
    words = "dataset: .*dataloader_num_workers.* streaming: true"
    expect(train_small, tmp_path / "out", words, streaming=True, eval_dataset=None)


def test_annealing_a_diffusion_model_is_said_to_be_of_no_effect(train_small, checkpoint, tmp_path, caplog):
    train_small(tmp_path / "out", model_name_or_path=checkpoint, anneal_steps=7, max_steps=1)
    assert "anneal_steps: 7 has no effect" in caplog.text


def test_resuming_another_process_is_an_error(train_small, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False}
    out = train_small(tmp_path / "out", **keys)
    with pytest.raises(ValueError, match="shift: False contradicts the checkpoint to resume from"):
        train_small(out, **keys, resume_from_checkpoint=True, shift=False)
    with pytest.raises(ValueError, match=r"mask_token: .* contradicts the checkpoint to resume from"):
        train_small(out, **keys, resume_from_checkpoint=True, mask_token=9)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"do_sample": False}, "do_sample: for the most probable tokens set logits_temp: 0"),
        ({"num_beams": 4}, "num_beams: a diffusion model has no beams"),
        ({"denoising_strategy": "topq"}, "denoising_strategy must be one of .* did you mean 'topk'"),
        ({"diffusion_steps": 0}, "diffusion_steps must be at least 1"),
        ({"diffusion_steps": 4, "block_length": 2}, "diffusion_steps: 4 is too few for 6 blocks"),
        ({"cutoff_len": 1}, "cutoff_len must be at least 2, got 1"),
        ({"confidence_threshold": 0.5}, "is read by denoising_strategy: confidence_threshold only"),
        ({"entropy_bound": 3}, "is read by denoising_strategy: entropy_bound only"),
        ({"remask_cap": 0.5}, "remask_cap: 0.5 is read by denoising_strategy: remdm only"),
        ({"denoising_strategy": "remdm", "eos_last": True}, "eos_last: true needs .* which remdm does not"),
        ({"edit_ratio": 1}, r"edit_ratio must lie in \[0, 1\), got 1"),
        ({"edit_ratio": 0.2, "edit_threshold": 0.9}, "edit_ratio: 0.2 and edit_threshold: 0.9 are two rules"),
        ({"edit_steps": 2}, "edit_steps: 2 has no effect"),
        ({"guidance_scale": 2}, "needs a prompt to guide by, but generate_from is noise"),
        ({"prefix_length": 4}, "prefix_length needs generate_from: prefix"),
        ({"generate_from": "prompt"}, "generate_from: prompt does not go with stage: ddm"),
        ({"generate_from": "prefix"}, "nothing to generate from: set eval_dataset"),
        ({"suppress_tokens": "nonsuch"}, "'nonsuch' is neither a token of the vocabulary nor an id"),
        # A digit is the token of this text, no id.
        (
            {"suppress_tokens": ",".join([*map(str, range(740)), *"!\"#$%&'()"])},
            "suppress_tokens: 739 of .* leaves no text but its end",
        ),
        ({"commit_schedule": "dream", "denoising_strategy": "topk"}, "commit_schedule: dream has no effect"),
        ({"score_distribution": "filtered", "denoising_strategy": "random"}, "filtered has no effect"),
    ],
)
def test_keys_of_generation_that_do_not_fit(generate, tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        generate(tmp_path / "out", **keys)
    assert not (tmp_path / "out" / "generated_predictions.jsonl").exists()


@pytest.mark.parametrize(
    ("texts", "keys", "words"),
    [
        (["A cat.", ""], {}, "text 1: the prompt is empty"),
        (["A cat.", "A dog saw a cat. " * 9], {}, "text 1: its .* tokens leave no room within cutoff_len: 12"),
        (["A <|infill:2|> cat."], {}, r"text 0: it holds the marker <\|infill:2\|>.* generate_from: infill"),
        (["A cat."], {"prefix_length": 10}, "text 0: it has .* tokens, so prefix_length: 10 leaves nothing"),
        (["A cat."], {"max_new_tokens": 300}, "more than the model's 256 positions"),
        (["A cat."], {"generate_from": "infill"}, "text 0: .*no infilling marker"),
        (["A <|infill:0|> cat."], {"generate_from": "infill"}, r"<\|infill:0\|> is empty"),
        (["A <|infill|> cat."], {"generate_from": "infill"}, r"<\|infill\|> .*no label"),
    ],
)
def test_prompts_that_cannot_be_used(generate, tmp_path, texts, keys, words):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    info = {"prompts": {"file_name": "prompts.jsonl", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"generate_from": "prefix", "eval_dataset": "prompts", "dataset_dir": tmp_path, **keys}
    with pytest.raises(ValueError, match=words):
        generate(tmp_path / "out", **keys)
    assert not (tmp_path / "out" / "generated_predictions.jsonl").exists()


def test_generation_needs_the_whole_model(generate, tmp_path):
    from types import SimpleNamespace

    from llamafactory_ddm.integration.resolve.checks import check_predict

    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 and FSDP do not give"):
        check_predict(SimpleNamespace(do_predict=True, fsdp="full_shard"), frozenset())
    check_predict(SimpleNamespace(do_predict=False, fsdp="full_shard"), frozenset({"num_beams"}))
