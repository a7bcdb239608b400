"""Models with random weights, in the shapes that the parts use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """A GPT-2 if `inner` is None, else a Llama; the last id of the vocabulary is [MASK].

    Attributes:
        layers: their number.
        width: of the hidden states.
        heads: of attention.
        vocabulary: number of ids.
        positions: largest number of tokens in a row.
        inner: width of the feed-forward layers of a Llama.
        kv_heads: heads of keys and values of a Llama; None for `heads`.
        is_tied: whether a Llama's output embedding is its input embedding, as a GPT-2's is.
        scale: standard deviation of the weights.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    inner: int | None = None
    kv_heads: int | None = None
    is_tied: bool = True
    scale: float = 0.02

    @property
    def mask_id(self) -> int:
        """Return the id of [MASK]."""
        return self.vocabulary - 1


# Vocabularies are multiples of 64, to which LLaMA-Factory resizes an embedding.
GPT2_SMALL = Shape(12, 768, 12, 50304, 1024)
LLAMA_1B = Shape(16, 2048, 32, 128320, 2048, inner=8192, kv_heads=8)  # of Llama 3.2 1B
LLAMA_7B = Shape(32, 4096, 32, 32064, 2048, inner=11008, is_tied=False)  # of Llama 2 7B
SMALL_GPT2 = Shape(4, 256, 4, 1024, 256, scale=0.1)  # for checks of numbers
SMALL_LLAMA = Shape(4, 256, 4, 1024, 256, inner=512, kv_heads=2, is_tied=False, scale=0.1)
TOY_GPT2 = Shape(2, 32, 2, 64, 64, scale=0.1)
TOY_LLAMA = Shape(2, 32, 2, 64, 64, inner=64, kv_heads=1, is_tied=False, scale=0.1)


def make_model(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Return a causal model with the same weights on every device, or, made on a GPU, with weights of its own.

    Args:
        shape: of the model.
        device: on which it is made; small models are made on the CPU and moved, so that their weights are the same.
        dtype: of the weights.
        config: further keys of the config.
    """
    torch.manual_seed(0)
    common = {
        "vocab_size": shape.vocabulary,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions,
        "initializer_range": shape.scale,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
        **config,
    }
    if shape.inner is None:
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model_class: Any = GPT2LMHeadModel
        made: Any = GPT2Config(**common, **no_dropout)
    else:
        model_class = LlamaForCausalLM
        made = LlamaConfig(
            **common,
            intermediate_size=shape.inner,
            num_key_value_heads=shape.kv_heads or shape.heads,
            tie_word_embeddings=shape.is_tied,
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(made)
    finally:
        torch.set_default_dtype(before)


def with_adapter(model: Any) -> Any:
    """Return a model with LoRA adapters of rank 8 on all linear layers; they are float32, as LLaMA-Factory's are."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted
