"""The tokens that a run adds to its tokenizer, and checks that the model will learn them.

Ids are assigned in this order: the checkpoint's mask and padding tokens (which have ids already), LLaMA-Factory's
add_tokens and add_special_tokens, the template's tokens, the mask token, the padding tokens. All are added before data
are tokenised, for autoregressive base models and diffusion checkpoints alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...modeling.diffusion_config import DiffusionConfig
from ...modeling.embeddings import has_tied_embeddings
from ...modeling.lora import embedding_names, stored_embeddings
from ...modeling.special_tokens import (
    ResolvedMaskToken,
    add_mask_token,
    add_pad_tokens,
    check_roles,
    pad_names,
    resolve_mask_token,
)
from .variable_length import LengthPlan

_ADDS = "add_tokens or add_special_tokens"


@dataclass
class Additions:
    """The tokens that have been added to a tokenizer so far.

    Attributes:
        known: ids below this number existed before.
        fresh: id of each added token.
        reasons: the YAML key that added it.
    """

    known: int
    fresh: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    @classmethod
    def to(cls, tokenizer: Any) -> Additions:
        """Return the additions to a tokenizer in its present state, none yet."""
        vocabulary = tokenizer.get_vocab()
        return cls(max(vocabulary.values(), default=-1) + 1, _seen=set(vocabulary))

    def note(self, tokenizer: Any, key: str = _ADDS) -> None:
        """Record the tokens that are new since the last call as added by `key`."""
        vocabulary = tokenizer.get_vocab()
        for token in sorted(vocabulary.keys() - self._seen, key=vocabulary.__getitem__):
            self.fresh[token], self.reasons[token] = int(vocabulary[token]), key
        self._seen = set(vocabulary)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a run; its tokenizer has all of them.

    Attributes:
        mask: the mask token.
        pads: spellings of the padding tokens of the variable-length format.
        additions: the tokens that the run has added.
        needed: id of each other token that the model needs an embedding of.
    """

    mask: ResolvedMaskToken
    pads: tuple[str, ...]
    additions: Additions
    needed: dict[str, int]

    def lacking(self, rows: int) -> dict[str, int]:
        """Return token and id of the tokens that a model with `rows` embeddings was not trained on or lacks."""
        without = {token: index for token, index in self.needed.items() if index >= rows}
        return {**self.additions.fresh, **without}

    def said(self, lacking: dict[str, int]) -> str:
        """Return the tokens grouped by the keys that added them, for messages."""
        groups: dict[str, list[str]] = {}
        for token in lacking:
            groups.setdefault(self.additions.reasons.get(token, "the tokenizer"), []).append(token)
        return " and ".join(f"{key} ({', '.join(map(repr, tokens))})" for key, tokens in groups.items())

    def others(self, lacking: dict[str, int]) -> str:
        """Return a hint at tokens to use instead of new ones, for messages."""
        without_pads = "; variable_length: eos_eos needs no pad token" if {*self.pads} & lacking.keys() else ""
        return f"name tokens that exist{without_pads}"


@dataclass
class RunTokenizer:
    """The tokenizer of a run, and the diffusion config and mask token of its checkpoint.

    Attributes:
        module: LLaMA-Factory's `tokenizer` and `processor`.
        additions: the tokens that have been added to it.
        config: the checkpoint's diffusion config; None for an autoregressive model.
        mask: the checkpoint's mask token; None for an autoregressive model.
    """

    module: dict[str, Any]
    additions: Additions
    config: DiffusionConfig | None
    mask: ResolvedMaskToken | None


def restore_stored(tokenizer: Any, config: DiffusionConfig, mask: ResolvedMaskToken) -> None:
    """Add the tokens that the checkpoint was trained with to the tokenizer, before other tokens take their ids.

    Raises:
        ValueError: if the tokenizer gives one of them another id.
    """
    add_mask_token(tokenizer, mask)
    ends = config.variable_length
    if ends is None:
        return
    add_pad_tokens(tokenizer, ends.pad_tokens)
    for token, index in zip(ends.pad_tokens, ends.pad_token_ids, strict=True):
        found = tokenizer.convert_tokens_to_ids(token)
        if found != index:
            raise ValueError(
                f"the tokenizer gives the pad token {token!r} the id {found}, expected {index}; use the tokenizer "
                "that was saved with the checkpoint"
            )


def resolve_vocabulary(
    tokenizer: Any,
    additions: Additions,
    mask: ResolvedMaskToken | None,
    config: DiffusionConfig | None,
    lengths: LengthPlan | None,
    mask_token: str | int | None,
) -> Vocabulary:
    """Add the tokens that the tokenizer still lacks, and return the tokens of the run; call it after the template.

    Args:
        tokenizer: the run's tokenizer, with the template's tokens.
        additions: the tokens that were added to it.
        mask: the checkpoint's mask token; None for an autoregressive model.
        config: the checkpoint's diffusion config.
        lengths: the variable-length format, or None.
        mask_token: value of the YAML key.
    Raises:
        ValueError: if there is no mask token, or text needs it.
    """
    if mask is None:
        mask = resolve_mask_token(tokenizer, mask_token)
    check_roles(tokenizer, mask, mask_token)
    add_mask_token(tokenizer, mask)
    additions.note(tokenizer, "mask_token")
    stored = None if config is None else config.variable_length
    pads = () if stored is None else stored.pad_tokens
    if lengths is not None:
        pads = pad_names(tokenizer, lengths.format, lengths.colors, stored)
    add_pad_tokens(tokenizer, pads)
    additions.note(tokenizer, "variable_length")
    roles = {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token} - {None}
    others = {str(token): int(tokenizer.convert_tokens_to_ids(token)) for token in sorted({*pads, *roles})}
    return Vocabulary(mask, pads, additions, {mask.token: mask.id, **others})


def check_new_tokens(
    vocabulary: Vocabulary, model_config: Any, model_args: Any, training_args: Any, finetuning_args: Any
) -> None:
    """Check, before the model is loaded, that it will learn its new tokens.

    Raises:
        ValueError: if it would not, naming the tokens, the key that adds them and what to do.
    """
    if not training_args.do_train:
        if training_args.do_eval or training_args.do_predict:  # a run that only prepares data uses no model
            refuse_untrained(vocabulary)
        return
    # An adapter, or the weights of a checkpoint_dir, may hold more rows than the base model.
    grown = bool(model_args.adapter_name_or_path or finetuning_args.checkpoint_dir)
    lacking = vocabulary.additions.fresh if grown else vocabulary.lacking(model_config.get_text_config().vocab_size)
    if not lacking:
        return
    said, others = f"{vocabulary.said(lacking)}: new to the model", vocabulary.others(lacking)
    if model_args.quantization_bit is not None or getattr(model_config, "quantization_config", None):
        raise ValueError(
            f"{said}, and a quantised model cannot grow; {others}; or add them once without "
            "quantization_bit: train the full model, save, and quantise the result"
        )
    kind = finetuning_args.finetuning_type
    if kind == "freeze" and not finetuning_args.freeze_extra_modules:
        raise _not_learnt(said, kind, "the input embedding (wte, embed_tokens)", others)
    if kind == "lora" and resumes_adapter(model_args, finetuning_args):
        raise ValueError(
            f"{said}, and the adapter that goes on training does not hold their embeddings; {others}; or "
            "merge the adapter with llamafactory-cli export and begin a new one on that, with resize_vocab: true"
        )
    if kind == "lora" and not (finetuning_args.additional_target or model_args.resize_vocab):
        raise _not_learnt(said, kind, "the input embedding (wte, embed_tokens)", others)


def refuse_untrained(vocabulary: Vocabulary) -> None:
    """Refuse untrained tokens in a run that does not train.

    Raises:
        ValueError: if there are any, naming the tokens and the key that adds them.
    """
    fresh = vocabulary.additions.fresh
    if fresh:
        raise ValueError(
            f"{vocabulary.said(fresh)}: new to the model, and a run that trains nothing cannot use tokens that the "
            "model was never trained on; name those that it was trained with, or train first (eval_on_start: true "
            "evaluates before the first step)"
        )


def resumes_adapter(model_args: Any, finetuning_args: Any) -> bool:
    """Tell whether the run trains an existing adapter."""
    return model_args.adapter_name_or_path is not None and not finetuning_args.create_new_adapter


def check_stored(vocabulary: Vocabulary, model: Any, rows: int, model_args: Any, finetuning_args: Any) -> None:
    """Check that the run will train and store the embeddings of tokens that are new to `model`.

    Args:
        vocabulary: the tokens of the run.
        model: the model before its embeddings are resized.
        rows: number of embeddings in the checkpoint.
        model_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's, with checked names of modules.
    Raises:
        ValueError: if it will not, naming the modules to add.
    """
    lacking, kind = vocabulary.lacking(rows), finetuning_args.finetuning_type
    if not lacking or kind == "full":
        return
    if kind == "lora":
        if model_args.resize_vocab and finetuning_args.additional_target is None:
            return  # upstream adds both embeddings
        names = finetuning_args.additional_target
    else:
        names = finetuning_args.freeze_extra_modules
    embedding, head = embedding_names(model)
    trained, written = stored_embeddings(model, names or (), freeze=kind == "freeze")
    trained_together = has_tied_embeddings(model)
    # [MASK] is never generated, so its entry in an untied output embedding needs no training.
    if trained and (written or set(lacking) == {vocabulary.mask.token}):
        return
    ends = [*([] if trained else [embedding]), *([head] if head and not (written or trained_together) else [])]
    missing = ", ".join(name.rpartition(".")[2] for name in ends)
    raise _not_learnt(f"{vocabulary.said(lacking)}: new to the model", kind, missing, vocabulary.others(lacking))


def _not_learnt(said: str, kind: str, missing: str, others: str) -> ValueError:
    """Return the error for tokens whose embeddings would not be trained; `missing` are the modules to name."""
    others = f"{others}; or adapt the model in full first, with stage: ddm"
    if kind == "lora":
        return ValueError(
            f"{said}, and a LoRA adapter does not hold their embeddings; set resize_vocab: true; or add {missing} to "
            f"additional_target; or {others}"
        )
    return ValueError(
        f"{said}, and finetuning_type: freeze would not train their embeddings; add {missing} to "
        f"freeze_extra_modules; or {others}"
    )
