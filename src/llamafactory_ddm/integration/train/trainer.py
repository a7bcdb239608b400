"""The trainer of the diffusion stages: it noises batches, computes logits of scored tokens only, averages exactly."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from accelerate.utils.operations import ConvertOutputsToFp32, send_to_device
from llamafactory.train.pt.trainer import CustomTrainer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_utils import EvalLoopOutput

from ...diffusion.attention import annealing_ratio
from ...evaluation.bound import N_STATISTICS, bound_metrics, row_statistics
from ...modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ...modeling.model_flops import StepCounts
from ...modeling.model_info import implementation, window_of
from ...modeling.quantization import evaluation_mode
from ...modeling.row_selecting_head import RowSelectingHead
from ...modeling.sequence_parallel import SequenceParallel
from ...modeling.sparse_attention import FLEX, attention_implementation
from ...modeling.tiled_attention import TILED, takes_tiles
from ...objectives.base import Objective
from ...utils.devices import copies_in_background
from ...utils.files import explain_disk_errors, published_together
from ...utils.host_memory import keep_freed_memory
from ...utils.random_state import unchanged_random_state
from ..logs import describe, get_logger
from ..model.model_card import Origin, write_trained
from ..resolve.run_settings import write_run_settings
from .attention_inputs import PLACEMENT, AttentionInputs
from .finite import FiniteLoss, LossNotFiniteError, weights_are_finite
from .step_loss import StepLoss
from .step_metrics import StepMetrics
from .tasks import TaskEvaluation
from .utilization import Utilization, utilization

logger = get_logger(__name__)


class DiffusionTrainer(CustomTrainer):
    """LLaMA-Factory's pre-training trainer with a diffusion objective.

    Args:
        objective: noise process and loss.
        diffusion_config: the diffusion config of the checkpoints; annealing starts at its attention_ratio.
        anneal_steps: optimiser steps from causal to full attention.
        eval_time_samples: noise levels per evaluated row.
        stop_after_nan_steps: number of consecutive steps with a NaN or infinite loss that ends the run; 0 for none.
        sparse_attention: train block attention with FlexAttention.
        logits_chunk: scored tokens whose logits exist at once; None for an automatic number, 0 for all.
        peak_tflops: 10^12 operations a second of one device, for the MFU; None for those of its data sheet.
        sequence_parallel_size: processes that share each row in training.
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
        sparse_attention: bool = False,
        logits_chunk: int | None = None,
        peak_tflops: float | None = None,
        sequence_parallel_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.args.device == torch.device("cpu", 0):
            # The device of several CPU processes, to which torch cannot load the state of an optimiser.
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs for one process split batches inexactly; set FORCE_TORCHRUN=1 for one "
                "process per GPU, or CUDA_VISIBLE_DEVICES=0 for one GPU"
            )
        self._check_fsdp()
        self.objective = objective
        self.diffusion_config = diffusion_config
        self.anneal_steps = anneal_steps
        self.eval_time_samples = eval_time_samples
        self.origin: Origin | None = None  # for the model card
        self.run_settings: dict[str, Any] | None = None  # saved with checkpoints, and checked when resuming
        self.tasks: TaskEvaluation | None = None
        self._task_metrics: dict[str, float] = {}  # of the evaluation in progress
        self._tasks_failed = False  # in the last evaluation
        # The denominator covers the whole optimiser step, so LLaMA-Factory must not average over micro-batches again.
        self.model_accepts_loss_kwargs = True
        self._head = RowSelectingHead(self.model)
        self._step_loss = StepLoss(
            self._head, objective, logits_chunk, is_compiled=bool(getattr(self.args, "torch_compile", False))
        )
        self._is_checked = False
        self._dense = implementation(self.model)
        self._masked = TILED if takes_tiles(self.model, self.args.device) else self._dense
        self._trained_with = FLEX if sparse_attention else self._masked
        world, rank = self.args.world_size, self.args.process_index
        self._sequence: SequenceParallel | None = None
        if sequence_parallel_size > 1:
            if sparse_attention:
                raise ValueError(
                    f"sequence_parallel_size: {sequence_parallel_size} does not work with sparse_attention: true; "
                    "remove one of them"
                )
            self._sequence = SequenceParallel(self.model, sequence_parallel_size, world, self.args.device.type)
            self._trained_with = self._sequence.name
        # Of the processes with other rows: their number, and which of them this one is.
        self._groups, self._group = world // sequence_parallel_size, rank // sequence_parallel_size
        self._attention = AttentionInputs(diffusion_config, objective.seed)
        self._step_metrics = StepMetrics()
        self._window = window_of(self.model)
        self._peak_tflops = peak_tflops
        self._utilization: Utilization | None = None
        self.stop_after_nan_steps = stop_after_nan_steps
        self._finite = FiniteLoss(stop_after_nan_steps, self.args.device)
        self._best_ratio: float | None = None  # attention ratio of the best weights, once they are loaded
        self._last_metrics: dict[str, float] | None = None  # of the present weights
        self.steps_taken = 0  # by the last call of train

    def _check_fsdp(self) -> None:
        """Refuse FSDP where accelerate would drop it, and have checkpoints hold the whole model.

        Raises:
            ValueError: if the run asks for FSDP and accelerate does not shard, for FSDP 2 and does not train, or for
                FSDP 2 with offload without a backend for CPU tensors.
        """
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp: accelerate shards on GPUs only; on {self.args.device.type} each process would keep the whole "
                "model; remove fsdp and fsdp_config, or use deepspeed instead"
            )
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            from torch.distributed import get_backend_config
            from torch.distributed.fsdp import CPUOffloadPolicy

            if not self.args.do_train:
                raise ValueError(
                    "fsdp: accelerate prepares a model for FSDP 2 with its optimizer only; to evaluate without "
                    "do_train, remove fsdp and fsdp_config"
                )
            plugin = self.accelerator.state.fsdp_plugin
            clips = self.args.max_grad_norm is not None and self.args.max_grad_norm > 0
            if isinstance(plugin.cpu_offload, CPUOffloadPolicy) and clips and "cpu:" not in get_backend_config():
                backend = get_backend_config()
                raise ValueError(
                    f"fsdp: offload keeps gradients on the CPU, where the backend {backend} cannot compute their "
                    f"norm; set ddp_backend: {backend},cpu:gloo"
                )
            # By default FSDP 2 saves shards alone, and so no model that can be loaded. accelerate keeps old configs.
            plugin.state_dict_config = plugin.optim_state_dict_config = None
            plugin.set_state_dict_type("FULL_STATE_DICT")

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Keep batches on the CPU: noise is drawn there, and only the tensors of the step go to the device."""
        with self._same_rows_in_a_group():
            loader = super().get_train_dataloader()
        if getattr(loader, "device", None) is not None:
            loader.device = None
        return loader

    @contextmanager
    def _same_rows_in_a_group(self) -> Iterator[None]:
        """Within the block, accelerate prepares data loaders that give the same rows to processes that share rows."""
        if self._sequence is None:
            yield
            return
        if not hasattr(self.accelerator, "_prepare_device_mesh"):
            raise ValueError("sequence_parallel_size needs a newer accelerate: pip install -U accelerate")
        mesh = self._sequence.mesh
        self.accelerator._prepare_device_mesh = lambda: mesh
        try:
            yield
        finally:
            del self.accelerator._prepare_device_mesh

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Take the micro-batches of one optimiser step and noise them.

        Returns:
            The noised micro-batches, and the loss's denominator summed over all of them and over ranks.
        """
        if self.state.global_step >= self.state.max_steps:
            # The run resumed from its last step, within an epoch; transformers checks max_steps only after a step.
            self.control.should_training_stop = True
            return [], None
        self._step_metrics.start()
        batches: list[dict[str, Any]] = []
        total = torch.zeros((), dtype=torch.int64)
        for micro in range(num_batches):
            try:
                collated = next(epoch_iterator)
            except StopIteration:
                break
            inputs, denominator = self._noise(collated, micro)
            if copies_in_background(device):
                inputs = {key: _copied(value, device) for key, value in inputs.items()}
            batches.append(inputs)
            if self._counts_rows:
                total += denominator
        if not batches:
            return batches, None
        self.steps_taken += 1
        # One reduction for both: this step's denominator, and whether the last step's loss was finite on all ranks.
        sums = self._sum_over_ranks(torch.stack([total.to(device, non_blocking=True), self._finite.take().to(device)]))
        self._finite.count(sums[1], self.state.global_step)
        return batches, sums[0]

    @property
    def _counts_rows(self) -> bool:
        """Whether this process is the one that counts the rows which its group shares."""
        return self._sequence is None or self._sequence.rank == 0

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

    def _noise(self, collated: dict[str, Tensor], micro: int) -> tuple[dict[str, Any], Tensor]:
        args = self.args
        objective = self.objective
        clean = objective.clean(collated)
        n_rows = len(clean.x_0)
        per_rank = args.train_batch_size
        micro_step = self.state.global_step * args.gradient_accumulation_steps + micro
        first_index = (micro_step * self._groups + self._group) * per_rank
        sample_index = torch.arange(first_index, first_index + n_rows)
        clean = clean.truncated(objective.truncate_ratio, seed=objective.seed, sample_index=sample_index)
        batch = objective.noise(
            clean,
            sample_index=sample_index,
            group_size=per_rank * self._groups * args.gradient_accumulation_steps,
            step=self.state.global_step,
        )
        if self._counts_rows:
            self._step_metrics.add_counts(
                StepCounts.of(clean, batch, self._window),
                n_masked=int(batch.n_masked),
                n_maskable=int(batch.n_maskable),
                n_tokens=clean.n_tokens,
            )
        z_t, head_index, scored = batch.z_t, batch.head_index, batch.scored
        placement = clean.placement() if batch.placement is None else batch.placement
        if self._sequence is not None:
            z_t, head_index, placement = self._sequence.padded(z_t, head_index, placement)
            head_index, scored = self._sequence.scored(z_t.shape, head_index, scored)
        inputs: dict[str, Any] = {
            "input_ids": z_t,  # under this name transformers counts tokens and operations
            "head_index": head_index,
            **scored,
            **self._attention.on_host(self.model, z_t.shape, placement),
        }
        return inputs, batch.denominator

    # ---- the step ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as LLaMA-Factory does.

        Raises:
            LossNotFiniteError: if the loss stays NaN or infinite, or is NaN or infinite at the end.
        """
        self._finite = FiniteLoss(self.stop_after_nan_steps, self.args.device)
        self._best_ratio, self._last_metrics, self.steps_taken = None, None, 0
        dtype = self._mask_dtype(self.args.device)
        self._utilization = utilization(self.model, self._head.module, self.args, self._peak_tflops, dtype)
        if self.args.device.type == "cpu":
            keep_freed_memory()
        with attention_implementation(self.model, self._trained_with):
            return super().train(*args, **kwargs)

    def attention_ratio(self, step: int) -> float:
        """Return the probability that a query sees a later key at step `step`, at least the checkpoint's."""
        return max(self.diffusion_config.attention_ratio, annealing_ratio(step, self.anneal_steps))

    def reached_ratio(self) -> float:
        """Return the attention ratio of the last step of the present weights."""
        if self._best_ratio is not None:
            return self._best_ratio
        steps = self.state.global_step
        return self.attention_ratio(steps - 1) if steps else self.diffusion_config.attention_ratio

    def trained_steps(self) -> int:
        """Return the number of steps that the present weights were trained for."""
        is_best = self._best_ratio is not None
        return int(self.state.best_global_step or 0) if is_best else self.state.global_step

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
                "num_items_in_batch is None: compute_loss needs the training loop; call evaluate() for the bound"
            )
        z_t = inputs["input_ids"]
        self._check_model(model)
        step = self.state.global_step
        attention = self._attention.of_step(
            self.model,
            z_t,
            {name: inputs[name] for name in PLACEMENT if name in inputs},
            self._mask_dtype(z_t.device),
            ratio=self.attention_ratio(step),
            step=step,
        )
        if self._sequence is not None:
            z_t, attention = self._sequence.inputs(z_t, attention)
        loss, terms = self._step_loss(model, z_t, attention, inputs, num_items_in_batch)
        self._finite.add(loss)
        self._step_metrics.add_terms(terms)
        loss = loss * self.args.world_size  # gradients are averaged over ranks; the denominator is summed
        return (loss, {}) if return_outputs else loss

    def _check_model(self, model: Any) -> None:
        """Check once that `model` attends as it should, and keep its logits in half precision.

        Raises:
            NotBidirectionalError: if it does not.
        """
        keep_half_logits(self.model)  # each time, because training and evaluation prepare the model again
        if not self._is_checked:
            # In whole rows, and with the name of the attention that the run asked for in errors.
            present = implementation(self.model)
            with attention_implementation(self.model, present if present == FLEX else self._dense):
                self._attention.probe(getattr(model, "_orig_mod", model), self.model)
            self._is_checked = True

    def _whole_rows(self) -> AbstractContextManager[None]:
        """Return a context in which each process computes whole rows."""
        return nullcontext() if self._sequence is None else attention_implementation(self.model, self._dense)

    def _mask_dtype(self, device: torch.device) -> Any:
        # Autocast starts inside the prepared model's forward, so the accelerator determines the dtype of the queries.
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if device.type == "cpu" and not self.accelerator.native_amp:  # fp16 has no effect on a CPU
            return self.model.dtype
        return half.get(str(self.accelerator.mixed_precision), self.model.dtype)

    # ---- evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as LLaMA-Factory does, on `tasks` too, and keep the metrics for `last_evaluation`."""
        is_whole = not args and kwargs.get("eval_dataset") is None  # the whole evaluation data
        if is_whole:
            self._tasks_failed = False
            self._task_metrics = {} if self.tasks is None else self._run_tasks(self.tasks)
        present = implementation(self.model)
        with attention_implementation(self.model, self._masked if present == self._dense else present):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if is_whole:
            self._last_metrics = None if self._tasks_failed else metrics
        return metrics

    def _run_tasks(self, tasks: TaskEvaluation) -> dict[str, float]:
        """Return the metrics of the tasks and the seconds that they took.

        If they fail after a step of training, the run goes on without them, so that no training is lost;
        `last_evaluation` runs them again after the model is saved. With several processes a failure is an error, as
        the others wait for the one that failed.
        """
        start = time.perf_counter()
        try:
            with self.beside_training():
                metrics = tasks.metrics(self.args.world_size)
        except Exception as error:  # any: tasks have code and data of their authors
            if not (self.is_in_train and self.steps_taken) or self.args.world_size > 1:
                raise
            self._tasks_failed = True
            step = self.state.global_step
            logger.warning_rank0(f"No metrics of eval_tasks at step {step}: {describe(error)}")
            return {}
        return metrics | {"eval_tasks_runtime": round(time.perf_counter() - start, 4)}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Tell whether the evaluation is the best so far, which it is not without the metric of a task that failed."""
        name = self.args.metric_for_best_model
        if name is not None and self._tasks_failed and f"eval_{name.removeprefix('eval_')}" not in metrics:
            return False
        return bool(super()._determine_best_metric(metrics, trial))

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """Let the block use the model in evaluation mode; nothing that training draws, measures or sets changes."""
        if not self.is_in_train:
            self.model.to(self.args.device)
        with (
            self._step_metrics.pause(),
            unchanged_random_state(),
            evaluation_mode(self.model),
            attention_implementation(self.model, self._dense),
            self.accelerator.autocast(),
        ):
            yield

    def last_evaluation(self) -> dict[str, float]:
        """Return the metrics of the present weights, evaluated now unless the training loop has done so."""
        # After training, full_eval in half precision casts the weights, which changes the metrics.
        casts = self.args.bf16_full_eval or self.args.fp16_full_eval
        return self.evaluate() if casts or self._last_metrics is None else self._last_metrics

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step as LLaMA-Factory does, and forget the metrics of the old weights."""
        self._last_metrics = None
        return super().training_step(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Estimate the evidence bound of the model's attention; the same for any batch size and number of ranks."""
        total, n_rows = torch.zeros(N_STATISTICS, dtype=torch.float64), 0
        with self._step_metrics.pause(), torch.no_grad(), self._whole_rows():
            for model, batch, sample_index in self.evaluation_batches(dataloader, description):
                statistics = row_statistics(
                    self.objective,
                    self.objective.clean(batch),
                    partial(self.bound_logits, model),
                    samples=self.eval_time_samples,
                    sample_index=sample_index,
                )
                gathered: Tensor = self.accelerator.gather_for_metrics(statistics.float().to(self.args.device))
                total += gathered.cpu().double().sum(dim=0)
                n_rows += len(gathered)
        metrics = bound_metrics(total.tolist(), prefix=metric_key_prefix, term=self.objective.term)
        # One log line and one call of the callbacks have all metrics; of several data sets those of the first.
        metrics, self._task_metrics = metrics | self._task_metrics, {}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=n_rows)

    def evaluation_batches(
        self, dataloader: DataLoader, description: str
    ) -> Iterator[tuple[Any, dict[str, Tensor], Tensor]]:
        """Yield the model in evaluation mode, each batch, and the sample indices of its rows in the data set."""
        model = self._prepare_for_evaluation(dataloader)
        self._check_model(model)
        args = self.args
        progress = tqdm(dataloader, desc=description, disable=args.disable_tqdm or not self.is_world_process_zero())
        with evaluation_mode(model):
            for ordinal, batch in enumerate(progress):
                first_index = (ordinal * args.world_size + args.process_index) * args.eval_batch_size
                yield model, batch, torch.arange(first_index, first_index + len(batch["input_ids"]))

    def _prepare_for_evaluation(self, dataloader: DataLoader) -> Any:
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
        """Return the logits at `head_index`, [n, vocab], with full attention, or of two streams with blocks.

        Args:
            model: the prepared model.
            z: [batch, columns] int64, on any device.
            head_index: [n] int64, into [batch * columns].
            placement: from `Objective.evaluation_input`, or `CleanBatch.placement` with full attention.
        """
        device = self.args.device
        placement = self._attention.on_host(self.model, z.shape, placement)
        z, head_index = z.to(device), head_index.to(device)
        placement = {name: send_to_device(value, device) for name, value in placement.items()}
        with self.compute_loss_context_manager(), self._head.only(head_index):
            attention = self._attention.build(self.model, z, placement, self._mask_dtype(device))
            logits: Tensor = model(input_ids=z, use_cache=False, **attention).logits
        return logits.reshape(-1, logits.shape[-1])

    # ---- logs and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the diffusion metrics since the last log to a training log."""
        if "loss" in logs:
            ratio = self.attention_ratio(max(self.state.global_step - 1, 0))
            logs |= self._step_metrics.take(
                self._sum_over_ranks, self.objective.term, self.args.device, ratio, self._utilization
            )
        if "train_runtime" in logs and not self.steps_taken:
            return  # no step was taken, so the loss of 0 is meaningless
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save no checkpoint and no final model after a NaN or infinite loss."""
        stops, saves = self.control.should_training_stop, self.control.should_save
        if (stops or saves) and not self._is_finite():
            step = self.state.global_step
            if stops and not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
                raise LossNotFiniteError(
                    f"the loss or a weight is NaN or infinite after the last step, {step}, so the model is not saved; "
                    "resume from the last checkpoint, or start over, with a lower learning_rate"
                )
            if saves:
                logger.warning_rank0(f"Step {step} is not saved: its loss or a weight is NaN or infinite.")
            self.control.should_save = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _is_finite(self) -> bool:
        """Tell whether the last step's loss and the weights are finite; waits for the device."""
        self._finite.count(self._sum_over_ranks(self._finite.take()), self.state.global_step)
        self._finite.read_all()
        return weights_are_finite(self.model, self._sum_over_ranks, self.args.device) and not self._finite.streak

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        self._best_ratio = DiffusionConfig.load(best).attention_ratio
        if best.name != f"checkpoint-{self.state.global_step}":
            self._last_metrics = None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of missing weights, except those that are tied to loaded weights."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        missing = load_result.missing_keys
        loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
        untied = [name for name in missing if id(parameters.get(name)) not in loaded]
        super()._issue_warnings_after_load(type(load_result)(untied, load_result.unexpected_keys))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._step_metrics.pause(), explain_disk_errors(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def create_model_card(self, language: Any = None, license: Any = None, **kwargs: Any) -> None:
        """Write README.md; LLaMA-Factory's would describe an autoregressive model."""
        if self.origin is not None and self.is_world_process_zero():
            write_trained(self, self.origin, kwargs.get("model_name"))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with published_together(output_dir or self.args.output_dir, last=FILE_NAME) as scratch:
            super()._save(str(scratch), state_dict=state_dict)
            if self.run_settings is not None and output_dir not in (None, self.args.output_dir):
                write_run_settings(self.run_settings, scratch)
            replace(self.diffusion_config, attention_ratio=self.reached_ratio()).save(scratch)


def _copied(value: Any, device: torch.device) -> Any:
    """Return an input of a step on the device, copied in the background; one that is no tensor stays as it is."""
    return value.pin_memory().to(device, non_blocking=True) if isinstance(value, Tensor) else value


def keep_half_logits(model: Any) -> bool:
    """Remove the conversion of outputs to float32 that accelerate adds to a model for mixed precision; keep autocast.

    accelerate can still undo its changes.

    Args:
        model: the module whose `forward` accelerate replaced, not a wrapper of it.
    Returns:
        Whether the model had such a conversion.
    """
    forward = vars(model).get("forward")
    converter = getattr(getattr(forward, "__func__", forward), "__wrapped__", None)
    if not isinstance(converter, ConvertOutputsToFp32):
        return False
    inner = converter.model_forward
    model.forward = MethodType(inner, model) if hasattr(forward, "__func__") else inner
    return True
