"""The YAML keys of `stage: ddm-sft` alone."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.keys import key

KEYS = ("train_on_padding", "sep_token", "split_digits")


@dataclass
class FinetuningKeys:
    """Keys of diffusion finetuning; a key that is None takes its value from the checkpoint."""

    train_on_padding: bool | None = key(
        None,
        "Pad each row up to cutoff_len (with attention: block, up to the end of its last block) with padding that the "
        "model learns to generate, so that it learns where a response ends; false hides the padding from the model. "
        "Defaults to the checkpoint's, then to true (with packing to false).",
        kind="boolean",
    )
    # A YAML may give an id as an int; upstream's command-line parser allows one type in the annotation.
    sep_token: str | None = key(
        None,
        "With template: diffullama, the token between prompt and response: a token of the vocabulary or its id. "
        "Defaults to the checkpoint's.",
        kind="token",
    )
    split_digits: bool | None = key(
        None,
        "Tokenise every digit separately; stored in the tokenizer. Defaults to what the tokenizer does.",
        kind="boolean",
    )
