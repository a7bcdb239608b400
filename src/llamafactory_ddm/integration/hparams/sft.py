"""The keys of `stage: ddm-sft`."""

from __future__ import annotations

from dataclasses import dataclass, field

KEYS = ("train_on_padding", "sep_token", "split_digits")


@dataclass
class FinetuningKeys:
    """Arguments of diffusion finetuning; a key left at None takes what the checkpoint says."""

    train_on_padding: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: (stage: ddm-sft) pad each row to cutoff_len with padding that the model learns to write, "
                "as generation has to know where a response ends; false hides the padding. Defaults to the "
                "checkpoint's, then to true, with packing to false."
            )
        },
    )
    # An id may come as an int from YAML; the annotation is for the command line's parser, which takes one type.
    sep_token: str | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: (stage: ddm-sft) the token between prompt and response under template: diffullama, a "
                "token of the vocabulary or an id. Defaults to the checkpoint's."
            )
        },
    )
    split_digits: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: (stage: ddm-sft) make every digit a token of its own; the tokenizer keeps it. Defaults to "
                "what the tokenizer does."
            )
        },
    )
