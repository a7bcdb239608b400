"""The layouts in which DiffuGPT, DiffuLLaMA and its GSM8K adapter were published, and what their tokens are.

Their code wraps the decoder, so that weights are called `embed_tokens.`, `denoise_model.` and `lm_head.`; DiffuLLaMA
as it was published has the names of any Llama. No file says which token is the mask, so that is a table here.

Source: DiffuLLaMA (arXiv 2410.17891) and its code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..modeling.diffusion_config import DiffusionConfig

_ADAPTER_PREFIX = "base_model.model."
# Buffers of old GPT-2 files, and the autoregressive model that lies beside the other in DiffuGPT's .bin files.
_IGNORED = re.compile(r"(denoise_model|transformer)\.h\.\d+\.attn\.(bias|masked_bias)|model\..*")


@dataclass(frozen=True)
class Layout:
    """Names of weights as published, and as Hugging Face has them.

    Attributes:
        name: for messages.
        decoder: what begins the names of the decoder in Hugging Face's model.
        embedding: what begins those of its input embedding.
    """

    name: str
    decoder: str
    embedding: str

    def to_standard(self, key: str) -> str | None:
        """Return Hugging Face's name of a published one, or None for what belongs to no model.

        Raises:
            ValueError: if it is neither.
        """
        prefix = _ADAPTER_PREFIX if key.startswith(_ADAPTER_PREFIX) else ""
        bare = key.removeprefix(prefix)
        if not prefix and _IGNORED.fullmatch(bare):
            return None
        for published, standard in self._pairs():
            if bare.startswith(published):
                return prefix + standard + bare.removeprefix(published)
        raise ValueError(f"{key} is no name of the layout of {self.name}")

    def to_published(self, key: str) -> str:
        """Return the published name of one of Hugging Face's.

        Raises:
            ValueError: if it is none of this kind of model.
        """
        prefix = _ADAPTER_PREFIX if key.startswith(_ADAPTER_PREFIX) else ""
        bare = key.removeprefix(prefix)
        for published, standard in self._pairs():
            if bare.startswith(standard):
                return prefix + published + bare.removeprefix(standard)
        raise ValueError(f"{key} has no name in the layout of {self.name}")

    def _pairs(self) -> tuple[tuple[str, str], ...]:
        """Published and standard beginnings, the longer standard ones first."""
        return (("embed_tokens.", self.embedding), ("denoise_model.", self.decoder), ("lm_head.", "lm_head."))


DIFFUGPT = Layout("DiffuGPT", decoder="transformer.", embedding="transformer.wte.")
WRAPPED_LLAMA = Layout("DiffuLLaMA's wrapper", decoder="model.", embedding="model.embed_tokens.")
LAYOUTS = {"gpt2": DIFFUGPT, "llama": WRAPPED_LLAMA}


@dataclass(frozen=True)
class PublishedTokens:
    """Ids of a published model's special tokens.

    Attributes:
        mask_id: of [MASK].
        sep_id: between prompt and response of its finetuned models.
        pad_id: of padding; None is the end-of-text token.
        new_mask: spelling of [MASK] where it is not in the base model's vocabulary.
    """

    mask_id: int
    sep_id: int
    pad_id: int | None
    new_mask: str | None = None


# Kind of model and rows of its embedding -> its tokens. DiffuGPT-M added its mask to GPT-2's 50,257 tokens.
TOKENS = {
    ("gpt2", 50257): PublishedTokens(mask_id=10541, sep_id=50155, pad_id=None),
    ("gpt2", 50258): PublishedTokens(mask_id=50257, sep_id=50155, pad_id=101, new_mask="[\u00a8M\u00a8]"),
    ("llama", 32000): PublishedTokens(mask_id=811, sep_id=4936, pad_id=30399),
}


def set_published_padding(model_type: str, rows: int, tokenizer: Any) -> None:
    """Have the tokenizer pad as the published model was trained to, if it is in the table."""
    tokens = TOKENS.get((model_type, rows))
    if tokens is not None:
        pad = tokens.pad_id
        tokenizer.pad_token = tokenizer.eos_token if pad is None else tokenizer.convert_ids_to_tokens(pad)


def published_config(model_type: str, rows: int, tokenizer: Any) -> DiffusionConfig | None:
    """Return what a published model would say about itself, or None if it is not in the table.

    Args:
        model_type: of its config.
        rows: of its embedding.
        tokenizer: its own, or that of the base model.
    """
    tokens = TOKENS.get((model_type, rows))
    if tokens is None:
        return None
    mask = tokens.new_mask or tokenizer.convert_ids_to_tokens(tokens.mask_id)
    sep = tokenizer.convert_ids_to_tokens(tokens.sep_id)
    if mask is None or sep is None:
        return None
    return DiffusionConfig(
        mask_token=mask,
        mask_token_id=tokens.mask_id,
        shift=True,
        noise_process="masked",
        uniform_ratio=0.0,
        noise_schedule="linear",
        attention_ratio=1.0,
        sep_token=sep,
        sep_token_id=tokens.sep_id,
    )
