"""What a diffusion model needs before upstream adds or merges adapters, and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llamafactory.extras import logging

from ..modeling.adapters import base_of, settle_targets, stores_embedding, tie_again
from ..modeling.bidirectional import make_bidirectional
from ..modeling.checkpoints import load_weights, stored_dtype
from ..modeling.mask_token import ResolvedMaskToken, add_mask_token, needs_row
from ..modeling.pad_tokens import add_pad_tokens, new_names
from ..modeling.published import is_model_folder, layout_of_folder
from ..modeling.recognition import origin_of

logger = logging.get_logger(f"llamafactory.{__name__}")
_loading: ContextVar[bool] = ContextVar("loading", default=False)


def in_a_diffusion_run() -> bool:
    """Tell whether upstream is loading the model of a diffusion run."""
    return _loading.get()


@contextmanager
def loading_for_diffusion() -> Iterator[None]:
    """Have upstream's loader demand every weight in the block."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


@dataclass
class AroundAdapter:
    """What is done to a base model before upstream adds or merges adapters, and after.

    Attributes:
        tokenizer: gets the mask token.
        mask: of the run.
        finetuning_args: upstream's, with our keys.
        new_adapter: whether an adapter is about to be made.
        do_train: whether the model is about to be trained.
        autocast: whether it is trained in mixed precision.
        pad_tokens: spellings of the pad tokens that the run needs.
        base: the model's folder or name.
        adapters: folders of adapters that are there already.
    """

    tokenizer: Any
    mask: ResolvedMaskToken
    finetuning_args: Any
    new_adapter: bool
    do_train: bool
    autocast: bool
    pad_tokens: tuple[str, ...] = ()
    base: str = ""
    adapters: tuple[str, ...] = ()

    def before(self, model: Any) -> None:
        """Give the base model its mask token and the checkpoint's weights, and settle what LoRA takes hold of.

        Raises:
            ValueError: if an adapter could not hold the new token, a name matches nothing, or weights do not fit.
        """
        origin = origin_of(self.base)
        if origin != self.base:
            # An adapter remembers its base by this name, and is to find it when the cache is gone.
            model.name_or_path = model.config._name_or_path = origin
        for folder in self.adapters:
            trained_on = base_of(folder)
            if trained_on != origin and Path(trained_on).resolve() not in (
                Path(self.base).resolve(),
                Path(origin).resolve(),
            ):
                logger.warning_rank0(
                    f"The adapter {folder} was trained on {trained_on}, and is put on {self.base}: that gives another "
                    "model than was trained, unless the two are the same."
                )
        if self.new_adapter:
            settle_targets(model, self.finetuning_args)
            if needs_row(model, self.mask) and not stores_embedding(model, self.finetuning_args):
                raise ValueError(
                    f"mask_token: {self.mask.token!r} is new to the model, and a LoRA adapter does not hold its "
                    "embedding; name a token that exists, add the name of the input embedding to additional_target "
                    "(wte, embed_tokens), or adapt the model in full first, with stage: ddm"
                )
        elif self.do_train and self.finetuning_args.finetuning_type == "freeze" and needs_row(model, self.mask):
            raise ValueError(
                f"mask_token: {self.mask.token!r} is new to the model, and finetuning_type: freeze would not train "
                "its embedding; name a token that exists, or adapt the model in full first, with stage: ddm"
            )
        self._check_new_pads(model)
        add_mask_token(model, self.tokenizer, self.mask)
        add_pad_tokens(model, self.tokenizer, self.pad_tokens)
        checkpoint = self.finetuning_args.checkpoint_dir
        if checkpoint and not is_model_folder(checkpoint):
            # Upstream makes float32 of what it trains only after this, and weights must not be rounded before.
            model.to(stored_dtype(checkpoint))
            layout = layout_of_folder(checkpoint)
            load_weights(model, checkpoint, rename=None if layout is None else layout.to_standard)

    def _check_new_pads(self, model: Any) -> None:
        """Check that pad tokens that the model lacks would be trained, and stored.

        Raises:
            ValueError: if not, naming the cure.
        """
        new, kind = new_names(self.tokenizer, self.pad_tokens), self.finetuning_args.finetuning_type
        if not new or not self.do_train or kind == "full":
            return
        if self.new_adapter and stores_embedding(model, self.finetuning_args):
            return
        said, cure = "finetuning_type: freeze would not train their embeddings", "finetune in full"
        if kind == "lora" and self.new_adapter:
            said = "a LoRA adapter does not hold their embeddings"
            cure = "add the name of the input embedding to additional_target (wte, embed_tokens)"
        elif kind == "lora":
            said = "the adapter that goes on training does not hold their embeddings"
            cure = "begin a new one (create_new_adapter: true) with the input embedding in additional_target"
        raise ValueError(
            f"variable_length: the pad tokens {', '.join(new)} are new to the model, and {said}; {cure}, or use "
            "variable_length: eos_eos"
        )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say whose an adapter is that does not fit.

        Raises:
            ValueError: if the shapes of the adapter's weights are not those of the model.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.adapters or "size mismatch" not in str(error):
                raise
            owners = ", ".join(f"{folder} was trained on {base_of(folder)}" for folder in self.adapters)
            raise ValueError(
                f"adapter_name_or_path: the shapes of its weights are not those of model_name_or_path: {self.base}; "
                f"{owners}"
            ) from error

    def after(self, model: Any) -> None:
        """Mend what adapters untie, and switch attention.

        Raises:
            ValueError: if the adapter's copy of an embedding has a precision that the model cannot be run in.
        """
        tie_again(model)
        own = {p.dtype for name, p in model.named_parameters() if "lora_" not in name and p.is_floating_point()}
        targets = self.finetuning_args.additional_target
        freezes = self.finetuning_args.finetuning_type == "freeze"
        if self.do_train and (targets or freezes) and len(own) > 1 and not self.autocast:
            what = "what finetuning_type: freeze leaves" if freezes else f"additional_target: {', '.join(targets)}"
            raise ValueError(
                f"{what} is trained in float32 beside "
                f"a model in {', '.join(str(d).removeprefix('torch.') for d in own - {torch.float32})}, which needs "
                "mixed precision: set bf16: true, or start from a model that is stored in float32"
            )
        make_bidirectional(model)
