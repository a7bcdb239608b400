"""The keys of `stage: ddm-sft`."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.keys import key

KEYS = ("train_on_padding", "sep_token", "split_digits")


@dataclass
class FinetuningKeys:
    """Arguments of diffusion finetuning; a key left at None takes what the checkpoint says."""

    train_on_padding: bool | None = key(
        None,
        "Fill each row up to cutoff_len with padding that the model learns to generate, as generation has to know "
        "where a response ends; false hides the padding. Defaults to the checkpoint's, then to true, with packing to "
        "false.",
        kind="boolean",
    )
    # An id may come as an int from YAML; the annotation is for the command line's parser, which takes one type.
    sep_token: str | None = key(
        None,
        "With template: diffullama, the token between prompt and response: a token of the vocabulary or an id. "
        "Defaults to the checkpoint's.",
        kind="token",
    )
    split_digits: bool | None = key(
        None,
        "Make every digit a token of its own; the tokenizer keeps it. Defaults to what the tokenizer does.",
        kind="boolean",
    )
