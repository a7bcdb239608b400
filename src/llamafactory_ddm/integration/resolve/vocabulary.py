"""Resolves the tokens of a run, adds the missing ones to its tokenizer, and checks that the model will learn them.

Ids are assigned in this order: the checkpoint's mask and padding tokens (which have ids already), LLaMA-Factory's
add_tokens and add_special_tokens, the template's tokens, the mask token, the padding tokens. All are added before data
are tokenised.
"""

from __future__ import annotations

from collections.abc import Iterable
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

_ADD_KEYS = "add_tokens or add_special_tokens"


@dataclass
class Additions:
    """The tokens that have been added to a tokenizer so far.

    Attributes:
        n_before: number of ids before any token was added.
        ids: id of each added token.
        keys: the YAML key that added it.
    """

    n_before: int
    ids: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    _recorded: set[str] = field(default_factory=set)

    @classmethod
    def start(cls, tokenizer: Any) -> Additions:
        """Return an empty record of the tokens that will be added to a tokenizer."""
        vocabulary = tokenizer.get_vocab()
        return cls(max(vocabulary.values(), default=-1) + 1, _recorded=set(vocabulary))

    def record(self, tokenizer: Any, key: str = _ADD_KEYS) -> None:
        """Record the tokens that are new since the last call as added by `key`."""
        vocabulary = tokenizer.get_vocab()
        for token in sorted(vocabulary.keys() - self._recorded, key=vocabulary.__getitem__):
            self.ids[token], self.keys[token] = int(vocabulary[token]), key
        self._recorded = set(vocabulary)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a run; its tokenizer has all of them.

    Attributes:
        mask: the mask token.
        pad_tokens: spellings of the padding tokens of the variable-length format.
        additions: the tokens that the run has added.
        role_ids: id of each token with a role: mask, padding, EOS and BOS. Each needs an embedding.
    """

    mask: ResolvedMaskToken
    pad_tokens: tuple[str, ...]
    additions: Additions
    role_ids: dict[str, int]

    def untrained(self, n_embeddings: int) -> dict[str, int]:
        """Return token and id of the tokens that a model with `n_embeddings` embeddings was not trained on."""
        beyond = {token: index for token, index in self.role_ids.items() if index >= n_embeddings}
        return {**self.additions.ids, **beyond}

    def describe(self, tokens: Iterable[str]) -> str:
        """Return tokens grouped by the keys that added them, for messages."""
        by_key: dict[str, list[str]] = {}
        for token in tokens:
            by_key.setdefault(self.additions.keys.get(token, "the tokenizer"), []).append(token)
        return " and ".join(f"{key} ({', '.join(map(repr, group))})" for key, group in by_key.items())

    def alternative(self, tokens: Iterable[str]) -> str:
        """Return the alternative to adding new tokens, for messages."""
        is_pad = not {*self.pad_tokens}.isdisjoint(tokens)
        return "use existing tokens" + ("; variable_length: eos_eos needs no padding token" if is_pad else "")


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


def restore_stored_tokens(tokenizer: Any, config: DiffusionConfig, mask: ResolvedMaskToken) -> None:
    """Add the checkpoint's mask and padding tokens to the tokenizer, before other tokens take their ids.

    Raises:
        ValueError: if the tokenizer gives one of them another id.
    """
    add_mask_token(tokenizer, mask)
    stored = config.variable_length
    if stored is None:
        return
    add_pad_tokens(tokenizer, stored.pad_tokens)
    for token, expected in zip(stored.pad_tokens, stored.pad_token_ids, strict=True):
        index = tokenizer.convert_tokens_to_ids(token)
        if index != expected:
            raise ValueError(
                f"the padding token {token!r} has the id {index} in the tokenizer, but {expected} in the checkpoint; "
                "use the tokenizer that was saved with the checkpoint"
            )


def resolve_vocabulary(
    tokenizer: Any,
    additions: Additions,
    mask: ResolvedMaskToken | None,
    config: DiffusionConfig | None,
    lengths: LengthPlan | None,
    mask_token: str | int | None,
) -> Vocabulary:
    """Add the mask and padding tokens that the tokenizer lacks, and return the tokens of the run.

    Args:
        tokenizer: the run's tokenizer, with the template's tokens.
        additions: the tokens that were added to it.
        mask: the checkpoint's mask token; None for an autoregressive model.
        config: the checkpoint's diffusion config.
        lengths: the variable-length format, or None.
        mask_token: value of the YAML key.
    Raises:
        ValueError: if there is no mask token, or it has another role in the tokenizer.
    """
    if mask is None:
        mask = resolve_mask_token(tokenizer, mask_token)
    check_roles(tokenizer, mask, mask_token)
    add_mask_token(tokenizer, mask)
    additions.record(tokenizer, "mask_token")
    stored = None if config is None else config.variable_length
    pad_tokens = () if stored is None else stored.pad_tokens
    if lengths is not None:
        pad_tokens = pad_names(tokenizer, lengths.format, lengths.colors, stored)
    add_pad_tokens(tokenizer, pad_tokens)
    additions.record(tokenizer, "variable_length")
    roles = {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token} - {None}
    role_ids = {str(token): int(tokenizer.convert_tokens_to_ids(token)) for token in sorted({*pad_tokens, *roles})}
    return Vocabulary(mask, pad_tokens, additions, {mask.token: mask.id, **role_ids})


def check_new_tokens(
    vocabulary: Vocabulary, model_config: Any, model_args: Any, training_args: Any, finetuning_args: Any
) -> None:
    """Check, before the model is loaded, that it will learn its new tokens.

    Raises:
        ValueError: if it would not, naming the tokens, the key that adds them and the remedy.
    """
    if not training_args.do_train:
        if training_args.do_eval or training_args.do_predict:  # a run that only prepares data uses no model
            check_all_trained(vocabulary)
        return
    # An adapter, or the weights of a checkpoint_dir, may hold more embeddings than the base model.
    may_have_more = bool(model_args.adapter_name_or_path or finetuning_args.checkpoint_dir)
    n_embeddings = model_config.get_text_config().vocab_size
    new_ids = vocabulary.additions.ids if may_have_more else vocabulary.untrained(n_embeddings)
    if not new_ids:
        return
    new_tokens, alternative = f"{vocabulary.describe(new_ids)}: new to the model", vocabulary.alternative(new_ids)
    if model_args.quantization_bit is not None or getattr(model_config, "quantization_config", None):
        raise ValueError(
            f"{new_tokens}, but a quantised model cannot get new embeddings; {alternative}, or train the full model "
            "with them first, without quantization_bit"
        )
    kind = finetuning_args.finetuning_type
    if kind == "freeze" and not finetuning_args.freeze_extra_modules:
        raise _not_trained(new_tokens, kind, "the input embedding (wte, embed_tokens)", alternative)
    if kind == "lora" and resumes_adapter(model_args, finetuning_args):
        raise ValueError(
            f"{new_tokens}, but the adapter of adapter_name_or_path does not hold their embeddings; {alternative}, or "
            "merge the adapter with llamafactory-cli export and train a new one with resize_vocab: true"
        )
    if kind == "lora" and not (finetuning_args.additional_target or model_args.resize_vocab):
        raise _not_trained(new_tokens, kind, "the input embedding (wte, embed_tokens)", alternative)


def check_all_trained(vocabulary: Vocabulary) -> None:
    """Check that a run that does not train adds no token.

    Raises:
        ValueError: if it does, naming the tokens and the key that adds them.
    """
    new_tokens = vocabulary.additions.ids
    if new_tokens:
        raise ValueError(
            f"{vocabulary.describe(new_tokens)}: new to the model, but this run does not train; set tokens that the "
            "model was trained with, or train it first (eval_on_start: true evaluates before the first step)"
        )


def resumes_adapter(model_args: Any, finetuning_args: Any) -> bool:
    """Tell whether the run trains an existing adapter."""
    return model_args.adapter_name_or_path is not None and not finetuning_args.create_new_adapter


def check_embeddings_trained(
    vocabulary: Vocabulary, model: Any, n_embeddings: int, model_args: Any, finetuning_args: Any
) -> None:
    """Check that the run will train and save the embeddings of tokens that are new to `model`.

    Args:
        vocabulary: the tokens of the run.
        model: the model before its embeddings are resized.
        n_embeddings: number of embeddings in the checkpoint.
        model_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's, with valid names of modules.
    Raises:
        ValueError: if it will not, naming the modules to add.
    """
    new_ids, kind = vocabulary.untrained(n_embeddings), finetuning_args.finetuning_type
    if not new_ids or kind == "full":
        return
    if kind == "lora":
        if model_args.resize_vocab and finetuning_args.additional_target is None:
            return  # LLaMA-Factory trains both embeddings
        names = finetuning_args.additional_target
    else:
        names = finetuning_args.freeze_extra_modules
    embedding, head = embedding_names(model)
    trains_input, trains_output = stored_embeddings(model, names or (), freeze=kind == "freeze")
    # [MASK] is never generated, so its row in an untied output embedding needs no training.
    if trains_input and (trains_output or set(new_ids) == {vocabulary.mask.token}):
        return
    missing = [] if trains_input else [embedding]
    if head and not trains_output and not has_tied_embeddings(model):
        missing.append(head)
    modules = ", ".join(name.rpartition(".")[2] for name in missing)
    new_tokens = f"{vocabulary.describe(new_ids)}: new to the model"
    raise _not_trained(new_tokens, kind, modules, vocabulary.alternative(new_ids))


def _not_trained(new_tokens: str, kind: str, modules: str, alternative: str) -> ValueError:
    """Return the error for new tokens whose embeddings would not be trained, with the modules to train."""
    alternative = f"{alternative}; or train the full model first, with stage: ddm"
    if kind == "lora":
        return ValueError(
            f"{new_tokens}, but a LoRA adapter does not hold their embeddings; set resize_vocab: true; or add "
            f"{modules} to additional_target; or {alternative}"
        )
    return ValueError(
        f"{new_tokens}, but finetuning_type: freeze does not train their embeddings; add {modules} to "
        f"freeze_extra_modules; or {alternative}"
    )
