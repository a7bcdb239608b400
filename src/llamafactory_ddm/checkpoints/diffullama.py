"""The published layouts of DiffuGPT, DiffuLLaMA and its GSM8K adapter, and their special tokens.

The published code wraps the decoder, so the names of weights start with `embed_tokens.`, `denoise_model.` or
`lm_head.`. DiffuLLaMA itself was published with the names of any Llama. The published files do not name the mask
token; the table `TOKENS` does.

Source: DiffuLLaMA (arXiv 2410.17891) and its code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..modeling.diffusion_config import DiffusionConfig
from .weights import ADAPTER_PREFIX

# Buffers of old GPT-2 files, and the autoregressive model that DiffuGPT's .bin files also hold.
_IGNORED = re.compile(r"(denoise_model|transformer)\.h\.\d+\.attn\.(bias|masked_bias)|model\..*")


@dataclass(frozen=True)
class Layout:
    """The published names of weights, and Hugging Face's names.

    Attributes:
        name: name of the layout in messages.
        decoder: prefix of the decoder's names in Hugging Face's model.
        embedding: prefix of the input embedding's names in Hugging Face's model.
    """

    name: str
    decoder: str
    embedding: str

    def to_standard(self, key: str) -> str | None:
        """Return Hugging Face's name for a published name, or None for a weight that the model does not use.

        Raises:
            ValueError: if the name does not belong to this layout.
        """
        prefix = ADAPTER_PREFIX if key.startswith(ADAPTER_PREFIX) else ""
        bare = key.removeprefix(prefix)
        if not prefix and _IGNORED.fullmatch(bare):
            return None
        for published, standard in self._pairs():
            if bare.startswith(published):
                return prefix + standard + bare.removeprefix(published)
        raise ValueError(f"{key} is not a name of the published layout of {self.name}")

    def to_published(self, key: str) -> str:
        """Return the published name for Hugging Face's name.

        Raises:
            ValueError: if this layout has no such weight.
        """
        prefix = ADAPTER_PREFIX if key.startswith(ADAPTER_PREFIX) else ""
        bare = key.removeprefix(prefix)
        for published, standard in self._pairs():
            if bare.startswith(standard):
                return prefix + published + bare.removeprefix(standard)
        raise ValueError(f"{key} has no name in the published layout of {self.name}")

    def _pairs(self) -> tuple[tuple[str, str], ...]:
        """Return pairs of published and standard prefixes, the longer standard ones first."""
        return (("embed_tokens.", self.embedding), ("denoise_model.", self.decoder), ("lm_head.", "lm_head."))


DIFFUGPT = Layout("DiffuGPT", decoder="transformer.", embedding="transformer.wte.")
WRAPPED_LLAMA = Layout("DiffuLLaMA's wrapper", decoder="model.", embedding="model.embed_tokens.")
LAYOUTS = {"gpt2": DIFFUGPT, "llama": WRAPPED_LLAMA}


@dataclass(frozen=True)
class PublishedTokens:
    """Ids of a published model's special tokens.

    Attributes:
        mask_id: id of [MASK].
        sep_id: id of the token between prompt and response in its finetuned models.
        pad_id: id of the padding token; None means EOS.
        new_mask: spelling of [MASK] if it is not in the base model's vocabulary.
    """

    mask_id: int
    sep_id: int
    pad_id: int | None
    new_mask: str | None = None


# (model_type, number of embeddings) -> special tokens. DiffuGPT-M added its mask to GPT-2's 50,257 tokens.
TOKENS = {
    ("gpt2", 50257): PublishedTokens(mask_id=10541, sep_id=50155, pad_id=None),
    ("gpt2", 50258): PublishedTokens(mask_id=50257, sep_id=50155, pad_id=101, new_mask="[\u00a8M\u00a8]"),
    ("llama", 32000): PublishedTokens(mask_id=811, sep_id=4936, pad_id=30399),
}


def set_published_padding(model_type: str, num_embeddings: int, tokenizer: Any) -> None:
    """Set the tokenizer's padding token to that of the published model, if `TOKENS` lists the model."""
    tokens = TOKENS.get((model_type, num_embeddings))
    if tokens is not None:
        pad_id = tokens.pad_id
        tokenizer.pad_token = tokenizer.eos_token if pad_id is None else tokenizer.convert_ids_to_tokens(pad_id)


def published_config(model_type: str, num_embeddings: int, tokenizer: Any) -> DiffusionConfig | None:
    """Return the diffusion config of a published model, or None if `TOKENS` does not list it.

    Args:
        model_type: model_type in its config.json.
        num_embeddings: number of its embeddings.
        tokenizer: its own tokenizer, or the base model's.
    """
    tokens = TOKENS.get((model_type, num_embeddings))
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
