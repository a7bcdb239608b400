"""Steps of a diffusion model before and after LLaMA-Factory adds or merges adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.adapters import base_of, fit_embeddings
from ...checkpoints.hub import origin_of
from ...checkpoints.layouts import is_model_folder, layout_of_folder, stored_num_embeddings
from ...checkpoints.weights import load_weights, stored_dtype
from ...modeling.bidirectional import make_bidirectional
from ...modeling.embeddings import init_new_embeddings, num_embeddings, resize_embeddings
from ...modeling.lora import resolve_lora_targets, tie_again
from ..logs import get_logger
from ..resolve.vocabulary import Vocabulary, check_embeddings_trained

logger = get_logger(__name__)
_at_work: ContextVar[AdapterSetup | None] = ContextVar("at_work", default=None)


def setup_at_work() -> AdapterSetup | None:
    """Return the setup of the diffusion run that is loading a model; None outside of one."""
    return _at_work.get()


@contextmanager
def loading_with(setup: AdapterSetup) -> Iterator[None]:
    """Within the block, have LLaMA-Factory's loader check every weight and apply `setup` around adapters."""
    token = _at_work.set(setup)
    try:
        yield
    finally:
        _at_work.reset(token)


@dataclass
class AdapterSetup:
    """Prepares a base model before LLaMA-Factory adds or merges adapters, and finishes it afterwards.

    Attributes:
        vocabulary: the tokens of the run.
        rows: number of embeddings in the saved base model.
        model_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's, with this package's keys.
        new_adapter: whether the run creates an adapter.
        do_train: whether the run trains the model.
        autocast: whether it trains in mixed precision.
    """

    vocabulary: Vocabulary
    rows: int
    model_args: Any
    finetuning_args: Any
    new_adapter: bool
    do_train: bool
    autocast: bool

    @property
    def adapters(self) -> tuple[str, ...]:
        """Folders of existing adapters."""
        return tuple(self.model_args.adapter_name_or_path or ())

    def prepare_base(self, model: Any) -> None:
        """Resize the base model's embeddings, load the checkpoint's weights, and resolve LoRA's target modules.

        Raises:
            ValueError: if an adapter could not hold a new token, a name matches no module, or weights do not fit.
        """
        base = self.model_args.model_name_or_path
        origin = origin_of(base)
        if origin != base:
            # An adapter records its base by this name, which must stay valid when the cache is gone.
            model.name_or_path = model.config._name_or_path = origin
        self._warn_of_other_base(base, origin)
        if self.new_adapter:
            resolve_lora_targets(model, self.finetuning_args)
            self._tell_of_a_chain()
        checkpoint = self.finetuning_args.checkpoint_dir
        if checkpoint and not is_model_folder(checkpoint):
            # LLaMA-Factory converts trained weights to float32 later; they must not be rounded before.
            model.to(stored_dtype(checkpoint))
            layout = layout_of_folder(checkpoint)
            self.rows = stored_num_embeddings(checkpoint, layout) or self.rows
            resize_embeddings(model, self.rows)
            load_weights(model, checkpoint, rename=None if layout is None else layout.to_standard)
        for folder in self.adapters:
            fit_embeddings(model, folder, own=self.rows)
        self._make_room(model)

    def _tell_of_a_chain(self) -> None:
        """Warn that an adapter on top of others needs them, as its own folder records only the base model."""
        if self.adapters:
            names = ",".join(self.adapters)
            logger.warning_rank0(
                f"The new adapter is trained on top of {names} and works only together with it: set "
                f"adapter_name_or_path: {names},OUTPUT_DIR, or merge {names} first with llamafactory-cli export."
            )

    def _make_room(self, model: Any) -> None:
        """Add and initialise embeddings for the tokens that the model lacks, after checking that they are trained."""
        vocabulary = self.vocabulary
        rows = num_embeddings(model) if self.adapters else self.rows
        if self.do_train and (self.new_adapter or self.finetuning_args.finetuning_type == "freeze"):
            check_embeddings_trained(vocabulary, model, rows, self.model_args, self.finetuning_args)
        lacking = vocabulary.untrained(rows)
        if self.model_args.resize_vocab and num_embeddings(model) > rows:
            # LLaMA-Factory has initialised the embeddings it added, except those of [MASK] and padding.
            ours = {vocabulary.mask.token, *vocabulary.pad_tokens}
            lacking = {token: i for token, i in lacking.items() if token in ours or i >= num_embeddings(model)}
        if lacking:
            logger.info_rank0(
                f"{vocabulary.describe(lacking)}: new to the model; their embeddings begin as the mean of the others."
            )
        init_new_embeddings(model, lacking.values(), known=min(vocabulary.additions.n_before, rows))

    def _warn_of_other_base(self, base: str, origin: str) -> None:
        """Warn of adapters that were trained on another base model."""
        for folder in self.adapters:
            trained_on = base_of(folder)
            if trained_on != origin and Path(trained_on).resolve() not in (
                Path(base).resolve(),
                Path(origin).resolve(),
            ):
                logger.warning_rank0(
                    f"The adapter {folder} was trained on {trained_on}, and is put on {base}: that gives another "
                    "model than was trained, unless the two are the same."
                )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Name the base model of an adapter whose shapes do not fit.

        Raises:
            ValueError: if the shapes of the adapter's weights are not those of the model.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.adapters or "size mismatch" not in str(error):
                raise
            base = origin_of(self.model_args.model_name_or_path)
            owners = ", ".join(
                f"{folder} was trained on {base_of(folder)}" for folder in self.adapters if base_of(folder) != base
            )
            shapes = re.findall(r"size mismatch for (\S+): .*?(\[[^]]*\]).*?(\[[^]]*\])", str(error))
            said = "; ".join(f"{name} {theirs} against the model's {ours}" for name, theirs, ours in shapes[:2])
            owners = owners or "the model is not as it was when the adapter was trained"
            raise ValueError(
                f"adapter_name_or_path: the shapes of its weights are not those of model_name_or_path: {base}"
                f"{f' ({said})' if said else ''}; {owners}"
            ) from error

    def finish(self, model: Any) -> None:
        """Tie embeddings again that PEFT untied, and make attention bidirectional.

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
