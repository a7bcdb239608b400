"""Miniatures of LLaDA and Dream in their own layouts, and their logits written out from their formulas."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from llamafactory_ddm.checkpoints.families.llada import WEIGHT_NAMES as LLADA

from .tiny import tiny_tokenizer

MASK_ID = 262
ROWS, WIDTH, INNER, LAYERS, HEADS, KEY_HEADS, LENGTH = 288, 32, 48, 2, 4, 2, 256
HEAD = WIDTH // HEADS
LLADA_CONFIG = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "activation_type": "silu",
    "alibi": False,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_size": ROWS,
    "vocab_size": ROWS,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "mask_token_id": MASK_ID,
    "include_bias": False,
    "include_qkv_bias": False,
    "layer_norm_type": "rms",
    "max_sequence_length": LENGTH,
    "mlp_hidden_size": INNER,
    "mlp_ratio": 4,
    "n_heads": HEADS,
    "n_kv_heads": KEY_HEADS,
    "n_layers": LAYERS,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "weight_tying": False,
}
DREAM_CONFIG = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "vocab_size": ROWS,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "mask_token_id": MASK_ID,
}


def llada_weights():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    weights = {
        "model.transformer.wte.weight": draw(ROWS, WIDTH),
        "model.transformer.ln_f.weight": 1 + draw(WIDTH),
        "model.transformer.ff_out.weight": draw(ROWS, WIDTH),
    }
    shapes = {"q_proj": (WIDTH, WIDTH), "k_proj": (KEY_HEADS * HEAD, WIDTH), "v_proj": (KEY_HEADS * HEAD, WIDTH)}
    shapes |= {"attn_out": (WIDTH, WIDTH), "ff_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH)}
    shapes |= {"ff_out": (WIDTH, INNER)}
    for number in range(LAYERS):
        block = f"model.transformer.blocks.{number}."
        weights |= {f"{block}{name}.weight": draw(*shape) for name, shape in shapes.items()}
        weights |= {f"{block}{name}.weight": 1 + draw(WIDTH) for name in ("attn_norm", "ff_norm")}
    return weights


def by_formula(weights, ids, *, theta=500000.0, eps=1e-5, names=lambda name: name, biased=False):
    """LLaDA's logits: RMSNorm, rotary angles on split halves, full attention, a gated SiLU, an output embedding."""
    w = {name: weights[names(name)] for name in llada_weights()}

    def norm(x, scale):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale

    def turn(x):  # [heads, length, HEAD]
        angle = torch.arange(len(ids))[:, None] / theta ** (torch.arange(0, HEAD, 2) / HEAD)[None]
        first, second = x[..., : HEAD // 2], x[..., HEAD // 2 :]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    x = w["model.transformer.wte.weight"][ids]
    for number in range(LAYERS):
        b = f"model.transformer.blocks.{number}."
        h = norm(x, w[b + "attn_norm.weight"])

        def heads(name, count, h=h, b=b):
            bias = weights[names(b + name + ".weight").replace("weight", "bias")] if biased else 0
            return (h @ w[b + name + ".weight"].T + bias).view(len(ids), count, HEAD).transpose(0, 1)

        q, k, v = turn(heads("q_proj", HEADS)), turn(heads("k_proj", KEY_HEADS)), heads("v_proj", KEY_HEADS)
        k, v = (each.repeat_interleave(HEADS // KEY_HEADS, dim=0) for each in (k, v))
        mixed = (q @ k.transpose(1, 2) / HEAD**0.5).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).reshape(len(ids), WIDTH) @ w[b + "attn_out.weight"].T
        h = norm(x, w[b + "ff_norm.weight"])
        inner = functional.silu(h @ w[b + "ff_proj.weight"].T) * (h @ w[b + "up_proj.weight"].T)
        x = x + inner @ w[b + "ff_out.weight"].T
    return norm(x, w["model.transformer.ln_f.weight"]) @ w["model.transformer.ff_out.weight"].T


def dream_weights():
    """Dream's: LLaDA's under Qwen2's names, with biases of queries, keys and values."""
    weights = {LLADA.to_standard(name): value for name, value in llada_weights().items()}
    generator = torch.Generator().manual_seed(1)
    for name in list(weights):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name.replace("weight", "bias")] = torch.randn(len(weights[name]), generator=generator)
    return weights


def dream_by_formula(weights, ids):
    """Dream's logits, of the next position as a Qwen2 gives them."""
    return by_formula(weights, ids, theta=1000000.0, eps=1e-6, names=LLADA.to_standard, biased=True)


def write_shards(folder, weights, config, shards=2):
    """A folder as published, but for the tokenizer."""
    folder.mkdir()
    index = {}
    for number in range(shards):
        part = dict(list(weights.items())[number::shards])
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def llada_tokenizer():
    """One file, the end of text being the padding, headers of turns, and a mask that no role names."""
    tokenizer = tiny_tokenizer()
    others = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens(["<|mdm_mask|>", *others], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<|mdm_mask|>") == MASK_ID
    tokenizer.bos_token = "<|startoftext|>"
    return tokenizer


def write_dream_tokenizer(folder):
    """Words and merges in files of their own, the rest in a config that names a class of its own."""
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {"0": "<|endoftext|>", str(MASK_ID): "<|mask|>", "263": "<|im_start|>", "264": "<|im_end|>"}
    added["265"] = "<|beginoftext|>"
    settings = {
        "added_tokens_decoder": {number: {"content": text, **flags} for number, text in added.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_llada(folder, weights=None, **changed):
    """A miniature LLaDA as it was published; its code, which nobody is to run, fails at once."""
    write_shards(folder, llada_weights() if weights is None else weights, {**LLADA_CONFIG, **changed})
    llada_tokenizer().save_pretrained(folder)
    for name in ("configuration_llada.py", "modeling_llada.py"):
        (folder / name).write_text("raise RuntimeError('published code was run')\n")
    return folder


def write_dream(folder, **changed):
    """A miniature Dream as it was published."""
    write_shards(folder, dream_weights(), {**DREAM_CONFIG, **changed})
    write_dream_tokenizer(folder)
    for name in ("configuration_dream.py", "modeling_dream.py", "tokenization_dream.py"):
        (folder / name).write_text("raise RuntimeError('published code was run')\n")
    return folder


def all_weights(folder):
    """The weights of all files of a folder."""
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def in_hub(folder, name, files):
    """Lay files out as Hugging Face's cache has them; returns the cache and the snapshot."""
    revision = hashlib.sha1(name.encode()).hexdigest()
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for path in files:
        blob = repository / "blobs" / hashlib.sha1(path.name.encode()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return folder, snapshot
