"""A small decoder whose tokenizer knows ChatML, its data sets, and runs of it by keys, in this process."""

import json

import torch
from transformers import AddedToken, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from .cli import ROOT

PAIR = {"columns": {"prompt": "q", "response": "a"}}
TEXT = {"columns": {"prompt": "text"}}
CHAT = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
TOKENS = ("<|im_start|>", "<|im_end|>", "<|mask|>")


def save_decoder(folder, *, tokens=TOKENS, bos=True):
    """Save a random Qwen2 of two layers with the built-in tokenizer and further special tokens; returns the folder."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    if not bos:
        tokenizer.bos_token = None
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, **sizes
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_data(folder, **sets):
    """Write data sets, each as (rows, its entry of dataset_info.json without the file); returns the folder."""
    folder.mkdir()
    info = {}
    for name, (rows, entry) in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        info[name] = {"file_name": f"{name}.json", **entry}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def run_keys(folder, **keys):
    """Run upstream's trainer with small sizes and `keys`, of which None takes one away; returns the output folder."""
    from llamafactory.train.tuner import run_exp

    small = {
        "finetuning_type": "full",
        "cutoff_len": 64,
        "packing": False,
        "overwrite_cache": True,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "output_dir": folder,
    }
    if keys.get("do_train"):
        small |= {
            "mask_token": "<|mask|>",
            "anneal_steps": 0,
            "per_device_train_batch_size": 2,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
        }
    if keys.get("do_predict"):
        small |= {"denoising_strategy": "low_confidence", "diffusion_steps": 4, "logits_temp": 0}
    given = {**small, **keys}
    run_exp(
        {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in given.items()
            if value is not None
        }
    )
    return folder
