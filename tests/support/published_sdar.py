"""A miniature SDAR in its published layout, and its logits written out from their formula."""

import json
import math

import torch
from torch.nn import functional

from .published import write_shards
from .tiny import tiny_tokenizer

ROWS, WIDTH, INNER, LAYERS, HEADS, KEY_HEADS, HEAD = 288, 24, 40, 2, 4, 2, 8  # HEADS * HEAD is not WIDTH
THETA, EPS, MASK = 1e6, 1e-6, "<|MASK|>"
ADDED = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", MASK)
# Written from the published one, whose mask_token_id and block_size only the training code adds.
SDAR_CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "bos_token_id": 0,
    "debug": False,
    "eos_token_id": 0,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 256,
    "max_window_layers": LAYERS,
    "micro_forward": False,
    "model_type": "sdar",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEY_HEADS,
    "rms_norm_eps": EPS,
    "rope_scaling": None,
    "rope_theta": THETA,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": ROWS,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sdar_weights(tied=False):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    weights = {"model.embed_tokens.weight": draw(ROWS, WIDTH), "model.norm.weight": 1 + draw(WIDTH)}
    if not tied:
        weights["lm_head.weight"] = draw(ROWS, WIDTH)
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        for name, rows in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            weights[f"{layer}self_attn.{name}_proj.weight"] = draw(rows * HEAD, WIDTH)
        weights[f"{layer}self_attn.o_proj.weight"] = draw(WIDTH, HEADS * HEAD)
        for name in ("q_norm", "k_norm"):
            weights[f"{layer}self_attn.{name}.weight"] = 1 + draw(HEAD)
        for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            weights[f"{layer}mlp.{name}_proj.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{name}.weight"] = 1 + draw(WIDTH)
    return weights


def sdar_by_formula(weights, ids, block):
    """SDAR's logits [tokens, ROWS], token by token: query i sees key j exactly if j // block <= i // block."""

    def norm(x, scale):
        return x / (x.square().mean() + EPS).sqrt() * scale

    def turn(x, position):  # rotates the pairs (c, c + HEAD / 2)
        half = HEAD // 2
        turned = torch.empty_like(x)
        for c in range(half):
            angle = position / THETA ** (2 * c / HEAD)
            cos, sin = math.cos(angle), math.sin(angle)
            turned[c] = x[c] * cos - x[c + half] * sin
            turned[c + half] = x[c + half] * cos + x[c] * sin
        return turned

    xs = [weights["model.embed_tokens.weight"][i] for i in ids]
    for number in range(LAYERS):
        w = {name.split(f"layers.{number}.")[1]: v for name, v in weights.items() if f"layers.{number}." in name}

        def project(name, x, w=w):
            return (w[f"self_attn.{name}_proj.weight"] @ x).view(-1, HEAD)

        normed = [norm(x, w["input_layernorm.weight"]) for x in xs]
        q = [[turn(norm(h, w["self_attn.q_norm.weight"]), i) for h in project("q", x)] for i, x in enumerate(normed)]
        k = [[turn(norm(h, w["self_attn.k_norm.weight"]), i) for h in project("k", x)] for i, x in enumerate(normed)]
        v = [project("v", x) for x in normed]
        after = []
        for i, x in enumerate(xs):
            seen = [j for j in range(len(xs)) if j // block <= i // block]
            heads = []
            for head in range(HEADS):
                group = head * KEY_HEADS // HEADS
                scores = torch.stack([q[i][head] @ k[j][group] for j in seen]) / math.sqrt(HEAD)
                heads.append(sum(p * v[j][group] for p, j in zip(scores.softmax(0), seen, strict=True)))
            x = x + w["self_attn.o_proj.weight"] @ torch.cat(heads)
            h = norm(x, w["post_attention_layernorm.weight"])
            inner = functional.silu(w["mlp.gate_proj.weight"] @ h) * (w["mlp.up_proj.weight"] @ h)
            after.append(x + w["mlp.down_proj.weight"] @ inner)
        xs = after
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return torch.stack([head @ norm(x, weights["model.norm.weight"]) for x in xs])


def write_sdar_tokenizer(folder):
    """The files of Qwen2's tokenizer, with classes of the published code and a mask token in its role."""
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    first = max(model["vocab"].values()) + 1
    added = {"0": "<|endoftext|>", **{str(first + number): text for number, text in enumerate(ADDED)}}
    settings = {
        "added_tokens_decoder": {number: {"content": text, **flags} for number, text in added.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", "tokenization_qwen2_fast.Fast"]},
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "mask_token": MASK,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_sdar(folder, weights=None, **changed):
    """A miniature SDAR as it was published; its code, which nobody is to run, fails at once."""
    tied = changed.get("tie_word_embeddings", False)
    config = {key: value for key, value in {**SDAR_CONFIG, **changed}.items() if value is not ...}
    write_shards(folder, sdar_weights(tied) if weights is None else weights, config)
    write_sdar_tokenizer(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "do_sample": True, "eos_token_id": [0], "temperature": 0.6, "top_k": 20})
    )
    for name in ("configuration_sdar", "modeling_sdar", "tokenization_qwen2", "tokenization_qwen2_fast"):
        (folder / f"{name}.py").write_text("raise RuntimeError('published code was run')\n")
    return folder
