"""The trainer of the diffusion stages: noised batches, logits of scored tokens only, exact averaging, evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from llamafactory.train.pt.trainer import CustomTrainer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_utils import EvalLoopOutput

from ...diffusion.attention import annealed_visibility, annealing_ratio
from ...evaluation.bound import N_STATISTICS, bound_metrics, row_statistics
from ...modeling.bidirectional import full_attention_mask, probe_bidirectional
from ...modeling.denoiser import RowSelectingHead
from ...modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ...modeling.quantization import evaluation_mode
from ...objectives.base import Objective
from ...utils.files import explain_disk_errors, published_together
from ..logs import get_logger
from ..model.model_card import Origin, write_trained
from ..resolve.run_facts import save_facts
from .finite import FiniteLoss, LossNotFiniteError, weights_are_finite

logger = get_logger(__name__)


class DiffusionTrainer(CustomTrainer):
    """LLaMA-Factory's pre-training trainer with a diffusion objective.

    Args:
        objective: noise and loss.
        diffusion_config: the diffusion config of the checkpoints; annealing starts at its attention_ratio.
        anneal_steps: optimiser steps from causal to full attention.
        eval_time_samples: noise levels per evaluated row.
        stop_after_nan_steps: number of consecutive steps with a NaN or infinite loss that ends the run; 0 for none.
        kwargs: arguments of LLaMA-Factory's trainer.
    """

    model: Any  # as in LLaMA-Factory's trainer, which mypy does not see

    def __init__(
        self,
        *,
        objective: Objective,
        diffusion_config: DiffusionConfig,
        anneal_steps: int,
        eval_time_samples: int,
        stop_after_nan_steps: int = 2,
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
        self.origin: Origin | None = None  # for the model card
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
        self.stop_after_nan_steps = stop_after_nan_steps
        self._finite = FiniteLoss(stop_after_nan_steps, self.args.device)
        self._loaded_ratio: float | None = None  # of the best weights, once they are loaded
        self._evaluated: dict[str, float] | None = None  # what an evaluation of the present weights gave
        self.steps_taken = 0  # by this call of train

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Keep batches on the CPU: noise is drawn there, and only the tensors of the step go to the device."""
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
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the end of a run within an epoch; LLaMA-Factory checks max_steps only after a step.
            self.control.should_training_stop = True
            return [], None
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
        self.steps_taken += 1
        # One reduction for two: this step's denominator, and whether the last step's loss was finite everywhere.
        sums = self._summed(torch.stack([total.to(device, non_blocking=True), self._finite.take().to(device)]))
        self._finite.count(sums[1], self.state.global_step)
        return batches, sums[0]

    def _summed(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

    def _noise(self, collated: dict[str, Tensor], micro: int) -> tuple[dict[str, Any], Tensor]:
        args = self.args
        objective = self.objective
        clean = objective.clean(collated)
        n_rows = len(clean.x_0)
        per_rank = args.train_batch_size
        micro_step = self.state.global_step * args.gradient_accumulation_steps + micro
        first = (micro_step * args.world_size + args.process_index) * per_rank
        sample_index = torch.arange(first, first + n_rows)
        clean = clean.truncated(objective.truncate_ratio, seed=objective.seed, sample_index=sample_index)
        batch = objective.noise(
            clean,
            sample_index=sample_index,
            group_size=per_rank * args.world_size * args.gradient_accumulation_steps,
            step=self.state.global_step,
        )
        counts = (len(batch.head_index), int(batch.n_masked), int(batch.n_maskable), clean.n_tokens)
        self._counts += torch.tensor(counts)
        # Upstream counts tokens and operations by this key.
        inputs: dict[str, Any] = {
            "input_ids": batch.z_t,
            "head_index": batch.head_index,
            **batch.scored,
            **clean.placement(),
        }
        return inputs, batch.denominator

    # ---- the step ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as LLaMA-Factory does.

        Raises:
            LossNotFiniteError: if the loss stays NaN or infinite, or is NaN or infinite at the end.
        """
        self._finite = FiniteLoss(self.stop_after_nan_steps, self.args.device)
        self._loaded_ratio, self._evaluated, self.steps_taken = None, None, 0
        return super().train(*args, **kwargs)

    def attention_ratio(self, step: int) -> float:
        """Return the probability that a query sees a later key at step `step`, at least the checkpoint's."""
        return max(self.diffusion_config.attention_ratio, annealing_ratio(step, self.anneal_steps))

    def reached_ratio(self) -> float:
        """Return the attention ratio of the last step that the present weights were trained in."""
        if self._loaded_ratio is not None:
            return self._loaded_ratio
        steps = self.state.global_step
        return self.attention_ratio(steps - 1) if steps else self.diffusion_config.attention_ratio

    def trained_steps(self) -> int:
        """Return the number of steps that the present weights were trained for (the best ones: up to their step)."""
        best = self._loaded_ratio is not None
        return int(self.state.best_global_step or 0) if best else self.state.global_step

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
        with self._head.only(inputs["head_index"]):
            output = model(
                input_ids=z_t, attention_mask=mask, position_ids=inputs.get("position_ids"), use_cache=False
            )
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        loss, terms = self.objective.loss(logits, inputs, num_items_in_batch)
        self._finite.see(loss)
        self._terms = terms if self._terms is None else self._terms + terms
        loss = loss * self.args.world_size  # gradients are averaged over ranks, the denominator is their sum
        return (loss, output) if return_outputs else loss

    def probe(self, model: Any) -> None:
        """Check once that `model` attends in both directions, and keep its logits in the precision of the forward.

        Raises:
            NotBidirectionalError: if it does not.
        """
        keep_half_logits(self.model)  # each time, as evaluating and training prepare it again
        if not self._probed:
            probe_bidirectional(getattr(model, "_orig_mod", model), inner=self.model)
            self._probed = True

    def _attention_mask(self, z_t: Tensor, is_padding: Tensor | None, document: Tensor | None) -> Any:
        """Return the attention mask; without padding and packing it is built once for each optimiser step."""
        ratio = self.attention_ratio(self.state.global_step)
        draw = self.state.global_step if ratio < 1.0 else -1
        key = None if is_padding is not None or document is not None else (draw, *z_t.shape)
        if key is None or key != self._mask_key:
            visible = None if ratio == 1.0 else self._visibility(ratio, draw, z_t.shape[1], z_t.device)
            self._mask = self._full_attention_mask(z_t, is_padding, document, visible)
            self._mask_key = key
        return self._mask

    def _visibility(self, ratio: float, draw: int, length: int, device: torch.device) -> Tensor:
        """Return the step's annealed visibility, drawn once for each length."""
        if self._visible_key != (draw, length):
            self._visible = annealed_visibility(length, ratio, seed=self.objective.seed, draw=draw, device=device)
            self._visible_key = (draw, length)
        return self._visible

    def _full_attention_mask(
        self, z: Tensor, is_padding: Tensor | None, document: Tensor | None, visible: Tensor | None = None
    ) -> Any:
        # Autocast is entered inside the prepared model's forward, so the accelerator tells the dtype of the queries.
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = half.get(str(self.accelerator.mixed_precision), self.model.dtype)
        if z.device.type == "cpu" and not self.accelerator.native_amp:  # it runs fp16 on a CPU as it runs none
            dtype = self.model.dtype
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as LLaMA-Factory does, and keep the metrics of the present weights."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if not args and kwargs.get("eval_dataset") is None:  # not a part of the data
            self._evaluated = metrics
        return metrics

    def last_evaluation(self) -> dict[str, float]:
        """Return the metrics of the present weights, evaluated now unless the training loop has done so."""
        # After training, evaluation in half precision turns the weights into it.
        again = self.args.bf16_full_eval or self.args.fp16_full_eval
        return self.evaluate() if again or self._evaluated is None else self._evaluated

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step as LLaMA-Factory does, and drop the metrics of the old weights."""
        self._evaluated = None
        return super().training_step(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Estimate the evidence bound with full attention; it is the same for any batch size and number of ranks."""
        total, n_rows = torch.zeros(N_STATISTICS, dtype=torch.float64), 0
        with self._pause(), torch.no_grad():
            for model, batch, sample_index in self.prepared_batches(dataloader, description):
                found = row_statistics(
                    self.objective,
                    self.objective.clean(batch),
                    partial(self.bound_logits, model),
                    samples=self.eval_time_samples,
                    sample_index=sample_index,
                )
                gathered: Tensor = self.accelerator.gather_for_metrics(found.float().to(self.args.device))
                total += gathered.cpu().double().sum(dim=0)
                n_rows += len(gathered)
        metrics = bound_metrics(total.tolist(), prefix=metric_key_prefix, term=self.objective.term)
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=n_rows)

    def prepared_batches(
        self, dataloader: DataLoader, description: str
    ) -> Iterator[tuple[Any, dict[str, Tensor], Tensor]]:
        """Yield the model in evaluation mode, each batch, and the sample indices of its rows in the data set."""
        model = self._prepared_model(dataloader)
        self.probe(model)
        args = self.args
        progress = tqdm(dataloader, desc=description, disable=args.disable_tqdm or not self.is_world_process_zero())
        with evaluation_mode(model):
            for ordinal, batch in enumerate(progress):
                first = (ordinal * args.world_size + args.process_index) * args.eval_batch_size
                yield model, batch, torch.arange(first, first + len(batch["input_ids"]))

    def _prepared_model(self, dataloader: DataLoader) -> Any:
        model = self._wrap_model(self.model, training=False, dataloader=dataloader)
        if not self.accelerator._models and model is self.model:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                model = self.accelerator.prepare(model)
            else:
                model = self.accelerator.prepare_model(model, evaluation_mode=True)
            if self.is_fsdp_enabled:
                self.model = model
        if not self.is_in_train:
            if self.args.fp16_full_eval:
                model = model.to(dtype=torch.float16, device=self.args.device)
            elif self.args.bf16_full_eval:
                model = model.to(dtype=torch.bfloat16, device=self.args.device)
        return model

    def bound_logits(self, model: Any, z: Tensor, head_index: Tensor, placement: Mapping[str, Tensor]) -> Tensor:
        """Return the logits at `head_index`, [n, vocab], with full attention.

        Args:
            model: the prepared model.
            z: [batch, length] int64, on any device.
            head_index: [n] int64, into [batch * length].
            placement: from `CleanBatch.placement`.
        """
        device = self.args.device
        z, head_index = z.to(device), head_index.to(device)
        placement = {name: value.to(device) for name, value in placement.items()}
        with self.compute_loss_context_manager(), self._head.only(head_index):
            mask = self._full_attention_mask(z, placement.get("is_padding"), placement.get("document"))
            logits: Tensor = model(
                input_ids=z, attention_mask=mask, position_ids=placement.get("position_ids"), use_cache=False
            ).logits
        return logits.reshape(-1, logits.shape[-1])

    # ---- logs and checkpoints ----

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Exclude the block's time from tokens_per_second."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the diffusion metrics since the last log to a training log."""
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
        if "train_runtime" in logs and not self.steps_taken:
            return  # no step was trained, so the loss of 0 means nothing
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do not save weights after a NaN or infinite loss, neither as a checkpoint nor as the final model."""
        ends, saves = self.control.should_training_stop, self.control.should_save
        if (ends or saves) and not self._is_sound():
            step = self.state.global_step
            if ends and not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
                raise LossNotFiniteError(
                    f"the loss or a weight is NaN or infinite after the last step, {step}, so the model is not saved; "
                    "resume from the last checkpoint, or start over, with a lower learning_rate"
                )
            if saves:
                logger.warning_rank0(f"Step {step} is not saved: its loss or a weight is NaN or infinite.")
            self.control.should_save = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _is_sound(self) -> bool:
        """Tell whether the last step's loss and the weights are finite; waits for the device."""
        self._finite.count(self._summed(self._finite.take()), self.state.global_step)
        self._finite.read_all()
        return weights_are_finite(self.model, self._summed, self.args.device) and not self._finite.streak

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        self._loaded_ratio = DiffusionConfig.load(best).attention_ratio
        if best.name != f"checkpoint-{self.state.global_step}":
            self._evaluated = None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of missing weights, except those that are tied to loaded weights."""
        of = dict(self.model.named_parameters(remove_duplicate=False))
        missing = load_result.missing_keys
        there = {id(parameter) for name, parameter in of.items() if name not in missing}
        tied = {name for name in missing if name in of and id(of[name]) in there}
        kept = [name for name in missing if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(kept, load_result.unexpected_keys))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._pause(), explain_disk_errors(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def create_model_card(self, language: Any = None, license: Any = None, **given: Any) -> None:
        """Write README.md; the base class would describe an autoregressive model."""
        if self.origin is not None and self.is_world_process_zero():
            write_trained(self, self.origin, given.get("model_name"))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with published_together(output_dir or self.args.output_dir, last=FILE_NAME) as scratch:
            super()._save(str(scratch), state_dict=state_dict)
            if self.run_facts is not None and output_dir not in (None, self.args.output_dir):
                save_facts(self.run_facts, scratch)
            replace(self.diffusion_config, attention_ratio=self.reached_ratio()).save(scratch)


def keep_half_logits(model: Any) -> bool:
    """Remove the conversion of outputs to float32 that accelerate adds to a model for mixed precision.

    Autocast stays, and accelerate can still undo its changes.

    Args:
        model: the module whose `forward` accelerate replaced, not a wrapper of it.
    Returns:
        Whether there was such a conversion.
    """
    forward = vars(model).get("forward")
    converter = getattr(getattr(forward, "__func__", forward), "__wrapped__", None)
    if not isinstance(converter, ConvertOutputsToFp32):
        return False
    inner = converter.model_forward
    model.forward = MethodType(inner, model) if hasattr(forward, "__func__") else inner
    return True
