"""The training loop of the diffusion stages: noised batches, logits of masked tokens only, and exact averaging."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from llamafactory.train.pt.trainer import CustomTrainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..diffusion.attention import annealed_visibility, annealing_ratio
from ..modeling.bidirectional import full_attention_mask, probe_bidirectional
from ..modeling.denoiser import RowSelectingHead
from ..modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ..modeling.objective import Objective
from .evaluation import evaluate_bound
from .half_logits import keep_half_logits
from .run_facts import save_facts
from .saving import explained, published_together


class DiffusionTrainer(CustomTrainer):
    """Upstream's pre-training trainer with a diffusion objective.

    Args:
        objective: noise and loss; holds every formula.
        diffusion_config: what the checkpoints say about themselves; its attention ratio is where annealing starts.
        anneal_steps: optimiser steps from causal to full attention.
        eval_time_samples: noise levels per evaluated row.
        kwargs: upstream's.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        diffusion_config: DiffusionConfig,
        anneal_steps: int,
        eval_time_samples: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.args.device == torch.device("cpu", 0):
            # Several processes without a GPU: torch cannot load an optimizer to "cpu:0", which upstream asks of it.
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process drives {self.args.n_gpu} GPUs, which splits batches inexactly; "
                "start with FORCE_TORCHRUN=1, or show one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.objective = objective
        self.diffusion_config = diffusion_config
        self.anneal_steps = anneal_steps
        self.eval_time_samples = eval_time_samples
        self.run_facts: dict[str, Any] | None = None  # kept with the checkpoints that a run is resumed from
        # The denominator covers the whole optimiser step, so upstream must not average over micro-batches again.
        self.model_accepts_loss_kwargs = True
        self._head = RowSelectingHead(self.model)
        self._probed = False
        self._mask_key: tuple[Any, ...] | None = None
        self._mask: Any = None
        self._visible_key: tuple[int, int] | None = None
        self._visible = torch.empty(0)
        self._terms: Tensor | None = None
        self._counts = torch.zeros(4, dtype=torch.int64)  # scored, masked, maskable, tokens since the last log
        self._clock: float | None = None
        self._paused = 0.0

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Leave batches on the CPU: noise is drawn there, and only what the step needs is sent to the device."""
        loader = super().get_train_dataloader()
        if getattr(loader, "device", None) is not None:
            loader.device = None
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Take the micro-batches of one optimiser step and noise them.

        Returns:
            The noised micro-batches, and the loss's denominator summed over all of them and over ranks.
        """
        if self._clock is None:
            self._clock, self._paused = time.perf_counter(), 0.0
        batches: list[dict[str, Any]] = []
        total = torch.zeros((), dtype=torch.int64)
        for micro in range(num_batches):
            try:
                clean = next(epoch_iterator)
            except StopIteration:
                break
            inputs, share = self._noise(clean, micro)
            if device.type == "cuda":  # pinned copies do not make the host wait
                inputs = {key: value.pin_memory().to(device, non_blocking=True) for key, value in inputs.items()}
            batches.append(inputs)
            total += share
        if not batches:
            return batches, None
        total = total.to(device, non_blocking=True)
        return batches, self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total

    def _noise(self, collated: dict[str, Tensor], micro: int) -> tuple[dict[str, Any], Tensor]:
        args = self.args
        objective = self.objective
        clean = objective.clean(collated)
        n_rows = len(clean.x_0)
        per_rank = args.train_batch_size
        micro_step = self.state.global_step * args.gradient_accumulation_steps + micro
        first = (micro_step * args.world_size + args.process_index) * per_rank
        rows = torch.arange(first, first + n_rows)
        clean = clean.truncated(objective.truncate_ratio, seed=objective.seed, rows=rows)
        batch = objective.noise(
            clean,
            rows=rows,
            group_size=per_rank * args.world_size * args.gradient_accumulation_steps,
            step=self.state.global_step,
        )
        counts = (len(batch.head_rows), int(batch.n_masked), int(batch.n_maskable), clean.n_tokens)
        self._counts += torch.tensor(counts)
        # Upstream counts tokens and operations by this key.
        inputs: dict[str, Any] = {
            "input_ids": batch.z_t,
            "head_rows": batch.head_rows,
            **batch.scored,
            **clean.placement(),
        }
        return inputs, batch.denominator

    # ---- the step ----

    def attention_ratio(self, step: int) -> float:
        """Return the share of future keys visible at optimiser step `step`, at least what the checkpoint reached."""
        return max(self.diffusion_config.attention_ratio, annealing_ratio(step, self.anneal_steps))

    def reached_ratio(self) -> float:
        """Return the share of future keys that the last finished step saw."""
        steps = self.state.global_step
        return self.attention_ratio(steps - 1) if steps else self.diffusion_config.attention_ratio

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the micro-batch's share of the step's loss, scaled so that averaging over ranks is exact."""
        if num_items_in_batch is None:
            raise RuntimeError(
                "the trainer was called outside its training loop; use evaluate() for the evidence bound"
            )
        z_t = inputs["input_ids"]
        self.probe(model)
        mask = self._attention_mask(z_t, inputs.get("is_padding"), inputs.get("document"))
        with self._head.only(inputs["head_rows"]):
            output = model(
                input_ids=z_t, attention_mask=mask, position_ids=inputs.get("position_ids"), use_cache=False
            )
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        loss, terms = self.objective.loss(logits, inputs, num_items_in_batch)
        self._terms = terms if self._terms is None else self._terms + terms
        loss = loss * self.args.world_size  # gradients are averaged over ranks, the denominator is their sum
        return (loss, output) if return_outputs else loss

    def probe(self, model: Any) -> None:
        """Prove once that `model` attends in both directions; its logits stay in the precision they are made in.

        Raises:
            NotBidirectionalError: if it does not.
        """
        keep_half_logits(self.model)  # each time, as evaluating and training prepare it anew
        if not self._probed:
            probe_bidirectional(getattr(model, "_orig_mod", model), inner=self.model)
            self._probed = True

    def _attention_mask(self, z_t: Tensor, is_padding: Tensor | None, document: Tensor | None) -> Any:
        """Return the forward's attention mask, built once an optimiser step where no row differs from the others."""
        ratio = self.attention_ratio(self.state.global_step)
        draw = self.state.global_step if ratio < 1.0 else -1
        key = None if is_padding is not None or document is not None else (draw, *z_t.shape)
        if key is None or key != self._mask_key:
            visible = None if ratio == 1.0 else self._visibility(ratio, draw, z_t.shape[1], z_t.device)
            self._mask = self._full_attention_mask(z_t, is_padding, document, visible)
            self._mask_key = key
        return self._mask

    def _visibility(self, ratio: float, draw: int, length: int, device: torch.device) -> Tensor:
        """Return the step's matrix, drawn once for every micro-batch of one length."""
        if self._visible_key != (draw, length):
            self._visible = annealed_visibility(length, ratio, seed=self.objective.seed, draw=draw, device=device)
            self._visible_key = (draw, length)
        return self._visible

    def _full_attention_mask(
        self, z: Tensor, is_padding: Tensor | None, document: Tensor | None, visible: Tensor | None = None
    ) -> Any:
        # Autocast is entered inside the prepared model's forward, so ask the accelerator what the queries will be.
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = half.get(str(self.accelerator.mixed_precision), self.model.dtype)
        return full_attention_mask(
            self.model,
            batch=z.shape[0],
            length=z.shape[1],
            is_padding=is_padding,
            document=document,
            visible=visible,
            dtype=dtype,
            device=z.device,
        )

    # ---- evaluation ----

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Estimate the evidence bound with full attention: the same for any batch size or number of ranks."""
        with self._pause():
            metrics, rows = evaluate_bound(self, dataloader, description=description, prefix=metric_key_prefix)
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=rows)

    def bound_logits(self, model: Any, z: Tensor, rows: Tensor, placement: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of `rows`, [n, vocab], under full attention.

        Args:
            model: prepared.
            z: [batch, length] int64.
            rows: [n] int64, into [batch * length].
            placement: what `CleanBatch.placement` returns, on the device of `z`.
        """
        with self.compute_loss_context_manager(), self._head.only(rows):
            mask = self._full_attention_mask(z, placement.get("is_padding"), placement.get("document"))
            logits: Tensor = model(
                input_ids=z, attention_mask=mask, position_ids=placement.get("position_ids"), use_cache=False
            ).logits
        return logits.reshape(-1, logits.shape[-1])

    # ---- logs and checkpoints ----

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Keep the block's time out of tokens_per_second."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training log the diffusion's own figures since the last one."""
        if "loss" in logs and self._terms is not None:
            terms = self.accelerator.reduce(self._terms, "sum").item()
            counts = self.accelerator.reduce(self._counts.to(self.args.device), "sum").tolist()
            elapsed = time.perf_counter() - (self._clock or 0.0) - self._paused
            logs[self.objective.term] = terms / max(counts[0], 1)
            logs["masked_fraction"] = counts[1] / max(counts[2], 1)
            logs["attention_ratio"] = self.attention_ratio(max(self.state.global_step - 1, 0))
            logs["tokens_per_second"] = round(counts[3] / elapsed, 1) if elapsed > 0 else 0.0
            self._terms, self._clock, self._paused = None, None, 0.0
            self._counts.zero_()
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._pause(), explained(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with published_together(output_dir or self.args.output_dir, last=FILE_NAME) as scratch:
            super()._save(str(scratch), state_dict=state_dict)
            if self.run_facts is not None and output_dir not in (None, self.args.output_dir):
                save_facts(self.run_facts, scratch)
            replace(self.diffusion_config, attention_ratio=self.reached_ratio()).save(scratch)
