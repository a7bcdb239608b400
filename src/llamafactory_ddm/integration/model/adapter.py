"""What a diffusion model needs before and after LLaMA-Factory adds or merges adapters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.adapters import base_of, fit_embeddings
from ...checkpoints.hub import origin_of
from ...checkpoints.layouts import is_model_folder, layout_of_folder, stored_num_embeddings
from ...checkpoints.weights import load_weights, stored_dtype
from ...modeling.activations import fuse_gelu
from ...modeling.bidirectional import make_bidirectional
from ...modeling.embeddings import init_new_embeddings, num_embeddings, resize_embeddings
from ...modeling.lora import resolve_lora_targets, tie_again
from ..logs import get_logger
from ..resolve.vocabulary import Vocabulary, check_embeddings_trained

logger = get_logger(__name__)
_current_setup: ContextVar[AdapterSetup | None] = ContextVar("current_setup", default=None)


def current_setup() -> AdapterSetup | None:
    """Return the setup of the diffusion run that is loading a model; None outside `loading_with`."""
    return _current_setup.get()


@contextmanager
def loading_with(setup: AdapterSetup) -> Iterator[None]:
    """Within the block, have LLaMA-Factory's loader check every weight and apply `setup` around adapters."""
    token = _current_setup.set(setup)
    try:
        yield
    finally:
        _current_setup.reset(token)


@dataclass
class AdapterSetup:
    """Prepares a base model before LLaMA-Factory adds or merges adapters, and finishes it afterwards.

    Attributes:
        vocabulary: the tokens of the run.
        num_stored: number of embeddings in the saved base model.
        model_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's, with this package's keys.
        new_adapter: whether the run creates an adapter.
        do_train: whether the run trains the model.
        autocast: whether it trains in mixed precision.
    """

    vocabulary: Vocabulary
    num_stored: int
    model_args: Any
    finetuning_args: Any
    new_adapter: bool
    do_train: bool
    autocast: bool
    _tied: list[Any] = field(default_factory=list, init=False)  # configs whose embeddings are tied

    @property
    def adapters(self) -> tuple[str, ...]:
        """Folders of existing adapters."""
        return tuple(self.model_args.adapter_name_or_path or ())

    def prepare_base(self, model: Any) -> None:
        """Resize the base model's embeddings, load the checkpoint's weights, and resolve LoRA's target modules.

        Raises:
            ValueError: if an adapter cannot hold a new token, lora_target matches no module, or weights do not fit.
        """
        self._tied = [
            config
            for config in (model.config, model.config.get_text_config())
            if getattr(config, "tie_word_embeddings", False)
        ]
        base = self.model_args.model_name_or_path
        origin = origin_of(base)
        if origin != base:
            # An adapter records its base by this name, which must stay valid without the cache.
            model.name_or_path = model.config._name_or_path = origin
        self._warn_of_other_base(base, origin)
        if self.new_adapter:
            resolve_lora_targets(model, self.finetuning_args)
            self._warn_of_stacked_adapters()
        checkpoint = self.finetuning_args.checkpoint_dir
        if self._has_other_weights():
            # LLaMA-Factory converts trained weights to float32 later; they must not be rounded before.
            model.to(stored_dtype(checkpoint))
            layout = layout_of_folder(checkpoint)
            self.num_stored = stored_num_embeddings(checkpoint, layout) or self.num_stored
            resize_embeddings(model, self.num_stored)
            load_weights(model, checkpoint, rename=None if layout is None else layout.to_standard)
        for folder in self.adapters:
            fit_embeddings(model, folder, num_stored=self.num_stored)
        self._add_embeddings(model)

    def _warn_of_stacked_adapters(self) -> None:
        """Warn that an adapter trained on top of others needs them: its folder records only the base model."""
        if self.adapters:
            existing = ",".join(self.adapters)
            logger.warning_rank0(
                f"The new adapter is trained on top of {existing} and works only together with it: set "
                f"adapter_name_or_path: {existing},OUTPUT_DIR, or merge {existing} first with llamafactory-cli export."
            )

    def _add_embeddings(self, model: Any) -> None:
        """Check that the embeddings of new tokens will be trained, then add and initialise them."""
        vocabulary = self.vocabulary
        num_stored = num_embeddings(model) if self.adapters else self.num_stored
        if self.do_train and (self.new_adapter or self.finetuning_args.finetuning_type == "freeze"):
            check_embeddings_trained(vocabulary, model, num_stored, self.model_args, self.finetuning_args)
        new_tokens = vocabulary.untrained(num_stored)
        if self.model_args.resize_vocab:
            initialised_here = {vocabulary.mask.token, *vocabulary.pad_tokens}
            upstream = self._initialised_upstream(new_tokens, num_stored, num_embeddings(model)) - initialised_here
            new_tokens = {t: i for t, i in new_tokens.items() if t not in upstream}
        if new_tokens:
            logger.info_rank0(
                f"{vocabulary.describe(new_tokens)}: new to the model; their embeddings start as the mean of the rest."
            )
        init_new_embeddings(model, new_tokens.values(), known=min(vocabulary.additions.n_before, num_stored))

    def _initialised_upstream(self, new_tokens: dict[str, int], num_stored: int, size: int) -> set[str]:
        """Return the new tokens whose embeddings LLaMA-Factory initialised and the model, of `size` rows, still has.

        Up to 0.9.5 it initialises every row that it adds. From 0.9.6 on, if its keys name new tokens, it initialises
        these alone, also in existing rows; from descriptions, those that are described. Weights that checkpoint_dir
        loads afterwards replace them.
        """
        from llamafactory.model import patcher

        args = self.model_args
        within = {token for token, index in new_tokens.items() if index < size}
        named = {*(args.add_tokens or ()), *(args.add_special_tokens or ())}
        described = getattr(args, "_special_token_descriptions", None)
        if described and args.init_special_tokens.startswith("desc"):
            named = {*described}
        if named and "new_tokens" in inspect.signature(patcher.resize_embedding_layer).parameters:
            return set() if self._has_other_weights() else within & named
        return within if size > num_stored else set()

    def _has_other_weights(self) -> bool:
        """Tell whether checkpoint_dir replaces the base's weights; a whole model there was loaded as the base."""
        checkpoint = self.finetuning_args.checkpoint_dir
        return bool(checkpoint) and not is_model_folder(checkpoint)

    def _warn_of_other_base(self, base: str, origin: str) -> None:
        """Warn of adapters that were trained on another base model."""
        for folder in self.adapters:
            trained_on = base_of(folder)
            if trained_on != origin and Path(trained_on).resolve() not in (
                Path(base).resolve(),
                Path(origin).resolve(),
            ):
                logger.warning_rank0(
                    f"The adapter {folder} was trained on {trained_on} and is loaded on {base}: unless the two are "
                    "the same model, the result is not the model that was trained."
                )

    @contextmanager
    def explain_shape_mismatch(self) -> Iterator[None]:
        """Turn PEFT's error for an adapter that does not fit into one that names its base model.

        Raises:
            ValueError: if the shapes of the adapter's weights are not those of the model.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.adapters or "size mismatch" not in str(error):
                raise
            base = origin_of(self.model_args.model_name_or_path)
            trained_on = ", ".join(
                f"{folder} was trained on {base_of(folder)}" for folder in self.adapters if base_of(folder) != base
            )
            shapes = re.findall(r"size mismatch for (\S+): .*?(\[[^]]*\]).*?(\[[^]]*\])", str(error))
            mismatches = "; ".join(f"{name} {stored} instead of {expected}" for name, stored, expected in shapes[:2])
            trained_on = trained_on or "the model has changed since the adapter was trained"
            raise ValueError(
                f"adapter_name_or_path: the shapes of its weights do not fit model_name_or_path: {base}"
                f"{f' ({mismatches})' if mismatches else ''}; {trained_on}; "
                "set model_name_or_path to the model that the adapter was trained on"
            ) from error

    def finish(self, model: Any) -> None:
        """Tie embeddings again that PEFT untied, make attention bidirectional, and compute GELU in one kernel.

        Raises:
            ValueError: if trained weights in float32 need mixed precision, which is off.
        """
        for config in self._tied:
            config.tie_word_embeddings = True  # LLaMA-Factory may unset it where a merge leaves two weights
        tie_again(model)
        dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" not in name and p.is_floating_point()}
        targets = self.finetuning_args.additional_target
        freezes = self.finetuning_args.finetuning_type == "freeze"
        if self.do_train and (targets or freezes) and len(dtypes) > 1 and not self.autocast:
            key = "finetuning_type: freeze" if freezes else f"additional_target: {', '.join(targets)}"
            raise ValueError(
                f"{key} trains weights in float32 while the other weights of the model are in "
                f"{', '.join(str(d).removeprefix('torch.') for d in dtypes - {torch.float32})}, which needs mixed "
                "precision; set bf16: true, or start from a model that is stored in float32"
            )
        make_bidirectional(model)
        fuse_gelu(model)
